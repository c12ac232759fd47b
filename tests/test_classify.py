"""Diffusion classification against the plain loop, written here once more, one image, one class, one pair at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import bigain_fx as bgx
from bigain_fx import embedded
from bigain_fx.classify import Classification, DiffusionClassifier, encode, wilson
from bigain_fx.embedded import ClassConditional
from bigain_fx.embedded.data import data_set
from tests.test_sample import Recorder, _one_thread, tiny  # noqa: F401

KINDS: dict[str, tuple[Any, tuple[float, float]]] = {
    "epsilon": (DDIMScheduler(), (999, 0)),
    "epsilon of a scheduler of sigmas": (EulerDiscreteScheduler(), (999, 0)),
    "v": (DDIMScheduler(prediction_type="v_prediction"), (999, 0)),
    "flow": (FlowMatchEulerDiscreteScheduler(shift=3.0), (999, 0)),
    "flow, fractions": (FlowMatchEulerDiscreteScheduler(), (0.999, 0)),
    "flow, from noise to image": (FlowMatchEulerDiscreteScheduler(shift=3.0), (0.001, 1)),
}


def of(bundle: ClassConditional, denoiser: Any = None, **options: Any) -> DiffusionClassifier:
    """A classifier of all classes of ``bundle``, exhaustive with three pairs unless ``options`` say otherwise."""
    conditions = bundle.condition(torch.arange(bundle.num_classes))
    given = {"n_samples": (3,), "to_keep": (1,), "batch": 4} | options
    return DiffusionClassifier(denoiser or bundle.model, bundle.scheduler, conditions, **given)


def at(kind: str, step: int) -> tuple[float, float, Tensor]:
    """Share of signal, share of noise, and timestep input of one row at a training step, worked out here."""
    scheduler, (noisy, clean) = KINDS[kind]
    if "flow" not in kind:
        cosine, linear = (
            scheduler.config.beta_schedule != "linear",
            torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64),
        )
        cumulative = torch.cumprod(1 - linear, 0)[step]
        if cosine:
            cumulative = scheduler.alphas_cumprod.double()[step]
        return float(cumulative.sqrt()), float((1 - cumulative).sqrt()), torch.tensor([step])
    share, shift = (step + 1) / 1000, scheduler.config.shift
    share = shift * share / (1 + (shift - 1) * share)
    time = {(999, 0): 1000 * share, (0.999, 0): share, (0.001, 1): 1 - share}[noisy, clean]
    return 1 - share, share, torch.tensor([time])


def plain_loop(bundle: ClassConditional, kind: str, images: Tensor, classifier: DiffusionClassifier) -> Tensor:
    """Errors ``(n, classes)``, averaged over all pairs."""
    errors = torch.zeros(len(images), bundle.num_classes, dtype=torch.float64)
    for i, image in enumerate(images):
        steps, noises = classifier.draw_pairs(image.shape, i)
        for c in range(bundle.num_classes):
            for step, noise in zip(steps.tolist(), noises, strict=True):
                signal, spread, time = at(kind, step)
                target = {"e": noise, "v": signal * noise - spread * image, "f": noise - image}[kind[0]]
                if kind.endswith("to image"):
                    target = -target
                noisy = signal * image + spread * noise
                output = bundle.model(noisy[None], timestep=time, class_labels=torch.tensor([c])).sample[
                    0, : len(image)
                ]
                errors[i, c] += float(((output - target) ** 2).mean()) / len(steps)
    return errors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out_channels", [1, 2])
@pytest.mark.parametrize("batch", [4, 5, 64])
def test_equals_the_plain_loop(kind: str, out_channels: int, batch: int) -> None:
    scheduler, units = KINDS[kind]
    bundle = replace(tiny(out_channels=out_channels), scheduler=scheduler)
    scheduler.set_timesteps(7)  # what a pipeline did with it before does not matter
    images, ticks = torch.rand(3, 1, 8, 8) * 2 - 1, []
    classifier = of(bundle, n_samples=(4,), batch=batch, seed=7, units=units)
    found = classifier(images, progress=lambda: ticks.append(1))
    expected = plain_loop(bundle, kind, images, classifier)
    torch.testing.assert_close(found.errors, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.predicted, expected.argmin(1))
    assert (found.pairs == 4).all()
    assert found.calls == len(ticks) == -(-3 * 4 * 3 // batch)


def test_every_class_sees_the_same_pairs_in_calls_of_one_shape() -> None:
    bundle = tiny()
    recorder = Recorder(bundle.model)
    of(bundle, recorder, units=(999, 0))(torch.rand(2, 1, 8, 8))
    assert {tuple(call["x"].shape) for call in recorder.calls} == {(4, 1, 8, 8)}
    x, times, labels = (torch.cat([call[key] for call in recorder.calls])[:18] for key in recorder.calls[0])
    by_pair: dict[int, list[int]] = {}
    for row in range(18):
        same = [other for other in range(18) if torch.equal(x[row], x[other])]
        assert len({int(times[other]) for other in same}) == 1
        by_pair[same[0]] = sorted(int(labels[other]) for other in same)
    assert list(by_pair.values()) == [[0, 1, 2]] * 6


def test_pairs_are_seeded_uniform_and_their_own_for_each_image() -> None:
    bundle, shape = tiny(), (1, 8, 8)
    classifier = of(bundle, n_samples=(5,), seed=1)
    steps, noise = classifier.draw_pairs(shape, 2)
    assert noise.shape == (5, *shape)
    assert steps.dtype == torch.int64
    again = of(bundle, n_samples=(2, 5), to_keep=(2, 1), seed=1, batch=7).draw_pairs(shape, 2)
    assert all(torch.equal(a, b) for a, b in zip((steps, noise), again, strict=True))
    assert not torch.equal(noise, classifier.draw_pairs(shape, 3)[1])
    assert not torch.equal(noise, of(bundle, n_samples=(5,), seed=2).draw_pairs(shape, 2)[1])
    many = of(bundle, n_samples=(20_000,)).draw_pairs((1,), 0)[0]
    assert many.min() in range(5)
    assert many.max() in range(995, 1000)
    share = many.bincount(minlength=1000).view(10, 100).sum(1) / 2000
    torch.testing.assert_close(share, torch.ones(10), rtol=0, atol=0.1)


def test_images_keep_their_pairs_wherever_they_are_classified() -> None:
    bundle, images = tiny(), torch.rand(5, 1, 8, 8)
    whole, rest = of(bundle)(images), of(bundle)(images[3:], first=3)
    torch.testing.assert_close(whole.errors[3:], rest.errors, rtol=1e-5, atol=1e-7)


class Offsets(nn.Module):
    """Answers ``offsets[class]`` everywhere: with zero noise and zero latents the error of a class is its square."""

    def __init__(self, offsets: list[float]) -> None:
        super().__init__()
        self.offsets = torch.tensor(offsets)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.offsets[class_labels].view(-1, 1, 1, 1).expand_as(x),)


def test_classes_are_dropped_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = DiffusionClassifier(
        Offsets([0.5, 0.1, 0.9, 0.2, 0.7]), DDIMScheduler(), {"class_labels": torch.arange(5)}, n_samples=(2, 6, 7),
        to_keep=(3, 2, 1), batch=4, units=(999, 0),
    )  # fmt: skip
    pairs = torch.zeros(7, dtype=torch.int64), torch.zeros(7, 1, 8, 8)
    monkeypatch.setattr(classifier, "draw_pairs", lambda shape, image: pairs)
    found = classifier(torch.zeros(2, 1, 8, 8))
    assert found.pairs.tolist() == [[6, 7, 2, 7, 2]] * 2
    torch.testing.assert_close(found.errors[0], torch.tensor([0.25, 0.01, 0.81, 0.04, 0.49], dtype=torch.float64))
    assert found.ranked.tolist() == [[1, 3, 0, 4, 2]] * 2
    assert found.calls == 5 + 6 + 1  # 2 x 2 x 5, 2 x 4 x 3 and 2 x 1 x 2 rows, by four


def test_the_winner_is_among_the_classes_that_were_kept() -> None:
    errors = torch.tensor([[0.5, 0.2, 0.9], [0.1, 0.4, 0.15]], dtype=torch.float64)
    found = Classification(errors, torch.tensor([[4, 4, 4], [1, 4, 4]]), 1)
    assert found.predicted.tolist() == [1, 2]
    assert found.runner_up.tolist() == [0, 1]
    torch.testing.assert_close(found.margin, torch.tensor([0.3, 0.25], dtype=torch.float64))


@pytest.mark.slow
def test_adaptive_and_exhaustive_agree_on_digits_where_the_margin_is_clear() -> None:
    bundle, held_out = embedded.load("mnist-dit"), data_set("mnist").held_out.first(8)
    images, labels = held_out.images, held_out.labels
    exhaustive = of(bundle, n_samples=(6,), batch=20)(images)
    adaptive = of(bundle, n_samples=(2, 6), to_keep=(4, 1), batch=20)(images)
    assert adaptive.calls < exhaustive.calls
    kept = adaptive.pairs == 6
    assert (kept.sum(1) == 4).all()
    torch.testing.assert_close(adaptive.errors[kept], exhaustive.errors[kept], rtol=1e-4, atol=1e-7)
    clear = exhaustive.margin > exhaustive.margin.median()
    assert torch.equal(adaptive.predicted[clear], exhaustive.predicted[clear])
    assert int((exhaustive.predicted == labels).sum()) >= 5


@pytest.mark.parametrize("method", [None, bgx.LaplacianMerge(0.5), bgx.KVDownsample(2)])
def test_an_optimized_denoiser_is_asked_in_one_graph(method: Any) -> None:
    bundle, images = tiny(), torch.rand(2, 1, 8, 8)
    fast = bgx.optimize(bundle.model, method=method, backend="eager")
    found = of(bundle, fast)(images)
    assert len(fast._graphs) == 1
    same = torch.allclose(found.errors, of(bundle)(images).errors, rtol=1e-5)
    assert same == (method is None)


@pytest.mark.slow
def test_compiled_exported_and_eager_agree(tmp_path: Path) -> None:
    bundle, images = tiny(), torch.rand(3, 1, 8, 8)
    method = bgx.LaplacianMerge(0.5)
    eager = of(bundle, bgx.optimize(bundle.model, method=method, backend="eager"))(images)
    compiled = of(bundle, bgx.optimize(bundle.model, method=method))(images)
    torch.testing.assert_close(compiled.errors, eager.errors, rtol=1e-4, atol=1e-6)
    inputs = {"timestep": torch.zeros(4, dtype=torch.int64), "class_labels": torch.zeros(4, dtype=torch.int64)}
    bgx.export_onnx(bundle.model, (torch.zeros(4, 1, 8, 8),), tmp_path / "tiny.onnx", kwargs=inputs, method=method)
    exported = of(bundle, bgx.OrtDenoiser(tmp_path / "tiny.onnx"), units=(999, 0))(images)
    torch.testing.assert_close(exported.errors, eager.errors, rtol=1e-3, atol=1e-5)


def test_conditions_may_be_nested_and_further_inputs_are_passed_on() -> None:
    seen: list[dict[str, Any]] = []

    def denoiser(x: Tensor, timestep: Tensor, **given: Any) -> tuple[Tensor]:
        seen.append(given)
        return (x,)

    conditions = {
        "encoder_hidden_states": torch.arange(2.0)[:, None, None].expand(2, 3, 4),
        "added_cond_kwargs": {"time_ids": torch.arange(12.0).view(2, 6)},
    }
    classifier = DiffusionClassifier(
        denoiser, DDIMScheduler(), conditions, inputs={"mark": 1}, n_samples=(1,), to_keep=(1,), batch=2, units=(999, 0)
    )
    classifier(torch.zeros(1, 4, 8, 8))
    (call,) = seen
    assert torch.equal(call["encoder_hidden_states"], conditions["encoder_hidden_states"])
    assert torch.equal(call["added_cond_kwargs"]["time_ids"], torch.arange(12.0).view(2, 6))
    assert call["mark"] == 1
    assert call["return_dict"] is False


def test_images_are_encoded_by_their_autoencoder() -> None:
    small: dict[str, Any] = {"block_out_channels": (4,), "norm_num_groups": 2, "scaling_factor": 0.5}
    vae = AutoencoderKL(latent_channels=2, shift_factor=0.25, **small).eval()
    images = torch.rand(2, 3, 8, 8)
    mean, _ = vae.quant_conv(vae.encoder(images)).chunk(2, dim=1)
    torch.testing.assert_close(encode(vae, images), (mean - 0.25) * 0.5)
    assert encode(AutoencoderKL(**small).eval(), images).shape == (2, 4, 8, 8)


def test_wilson_interval() -> None:
    low, high = wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1
    assert wilson(10, 10)[0] < 0.75


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_samples": (0,)}, r"n_samples=\(0,\) must ascend from 1 or more"),
        ({"n_samples": (5, 5), "to_keep": (2, 1)}, r"n_samples=\(5, 5\) must ascend"),
        ({"n_samples": (5, 20)}, r"to_keep=\(1,\) descend to 1, one for each round"),
        ({"n_samples": (5, 20), "to_keep": (1, 5)}, r"to_keep=\(1, 5\) descend to 1"),
        ({"to_keep": (2,)}, r"to_keep=\(2,\) descend to 1"),
        ({"batch": 0}, "batch=0 must be an integer from 1"),
        ({"scheduler": DDIMScheduler(prediction_type="sample")}, "prediction_type='sample' of the scheduler must be"),
        ({"conditions": {}}, r"conditions have shapes \[\]; all must be tensors with one row for each"),
        ({"conditions": {"class_labels": torch.zeros(1)}}, r"conditions have shapes \[\(1,\)\]"),
        ({"conditions": {"a": torch.zeros(3), "b": torch.zeros(2)}}, r"conditions have shapes \[\(3,\), \(2,\)\]"),
        ({"conditions": {"a": "cat"}}, r"conditions have shapes \['str'\]"),
        ({"denoiser": nn.Identity()}, "those in which Identity takes its timestep are not known; name them"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    bundle = tiny()
    arguments: dict[str, Any] = {
        "denoiser": bundle.model, "scheduler": bundle.scheduler, "conditions": bundle.condition(torch.arange(3)),
        "n_samples": (2,), "to_keep": (1,),
    }  # fmt: skip
    with pytest.raises(bgx.InputError, match=message) as caught:
        DiffusionClassifier(**(arguments | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (8, 8)])
def test_latents_that_are_none_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(bgx.InputError, match=r"latents are torch.float32"):
        of(tiny())(torch.zeros(shape))
