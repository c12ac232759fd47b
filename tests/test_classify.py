"""Diffusion classification against the plain loop, written here once more, one image and one class at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

import bigain_fx as bgx
from bigain_fx import embedded
from bigain_fx.classify import Classification, classify, draw_pairs, wilson
from bigain_fx.embedded import ClassConditional
from bigain_fx.embedded.data import digits
from tests.test_sample import Recorder, _one_thread, tiny  # noqa: F401


def plain_loop(bundle: ClassConditional, images: Tensor, pairs: int, seed: int) -> Tensor:
    """Errors (n, classes): noise as the scheduler's cumulative alphas say, average the squared error over the pairs."""
    cumulative = bundle.scheduler.alphas_cumprod
    errors = torch.zeros(len(images), bundle.num_classes, dtype=torch.float64)
    for i, image in enumerate(images):
        timesteps, noises = draw_pairs(bundle, pairs, seed, i)
        for c in range(bundle.num_classes):
            for t, noise in zip(timesteps.tolist(), noises, strict=True):
                signal, spread = cumulative[t].sqrt(), (1 - cumulative[t]).sqrt()
                noisy = signal * image + spread * noise
                v = bundle.scheduler.config.prediction_type == "v_prediction"
                target = signal * noise - spread * image if v else noise
                given = {"timestep": torch.tensor([t]), "class_labels": torch.tensor([c])}
                output = bundle.model(noisy[None], **given).sample[0, : len(image)]
                errors[i, c] += float(((output - target) ** 2).mean()) / pairs
    return errors


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("out_channels", [1, 2])
@pytest.mark.parametrize("batch", [4, 5, 64])
def test_equals_the_plain_loop(prediction: str, out_channels: int, batch: int) -> None:
    bundle = tiny(prediction, out_channels)
    images, ticks = torch.rand(3, 1, 8, 8) * 2 - 1, []
    found = classify(bundle.model, bundle, images, pairs=4, batch=batch, seed=7, progress=lambda: ticks.append(1))
    expected = plain_loop(bundle, images, pairs=4, seed=7)
    torch.testing.assert_close(found.errors, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.predicted, expected.argmin(1))
    assert found.calls == len(ticks) == -(-3 * 4 * 3 // batch)


def test_every_class_sees_the_same_pairs_in_calls_of_one_shape() -> None:
    bundle = tiny()
    recorder = Recorder(bundle.model)
    classify(recorder, bundle, torch.rand(2, 1, 8, 8), pairs=3, batch=4)
    assert {tuple(call["x"].shape) for call in recorder.calls} == {(4, 1, 8, 8)}
    x, times, labels = (torch.cat([call[key] for call in recorder.calls])[:18] for key in recorder.calls[0])
    by_pair: dict[int, list[int]] = {}
    for row in range(18):
        same = [other for other in range(18) if torch.equal(x[row], x[other])]
        assert len({int(times[other]) for other in same}) == 1
        by_pair[same[0]] = sorted(int(labels[other]) for other in same)
    assert list(by_pair.values()) == [[0, 1, 2]] * 6


def test_pairs_are_seeded_uniform_and_their_own_for_each_image() -> None:
    bundle = tiny()
    times, noise = draw_pairs(bundle, 5, 1, 2)
    assert noise.shape == (5, 1, 8, 8)
    assert times.dtype == torch.int64
    assert all(torch.equal(a, b) for a, b in zip((times, noise), draw_pairs(bundle, 5, 1, 2), strict=True))
    assert not torch.equal(noise, draw_pairs(bundle, 5, 1, 3)[1])
    assert not torch.equal(noise, draw_pairs(bundle, 5, 2, 2)[1])
    many = draw_pairs(bundle, 20_000, 0, 0)[0]
    assert many.min() in range(5)
    assert many.max() in range(995, 1000)
    assert abs(float(many.double().mean()) - 499.5) < 10
    share = many.bincount(minlength=1000).view(10, 100).sum(1) / 2000
    torch.testing.assert_close(share, torch.ones(10), rtol=0, atol=0.1)


def test_smallest_error_wins_and_the_margin_is_to_the_runner_up() -> None:
    found = Classification(torch.tensor([[0.5, 0.2, 0.9], [0.1, 0.4, 0.15]], dtype=torch.float64), 1)
    assert found.predicted.tolist() == [1, 0]
    torch.testing.assert_close(found.margin, torch.tensor([0.3, 0.05], dtype=torch.float64))


def test_the_embedded_denoiser_tells_digits_apart() -> None:
    bundle, (_, held_out) = embedded.load("mnist-dit"), digits()
    found = classify(bundle.model, bundle, held_out.images[:10], pairs=2, batch=20)
    assert int((found.predicted == held_out.labels[:10]).sum()) >= 5


def test_wilson_interval() -> None:
    low, high = wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1
    assert wilson(10, 10)[0] < 0.75


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": 0}, "pairs=0 and batch=2 must both be at least 1"),
        ({"batch": 0}, "pairs=1 and batch=0 must both be at least 1"),
        ({"images": torch.zeros(1, 1, 4, 4)}, r"images have shape \(1, 1, 4, 4\)"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    bundle = tiny()
    arguments: dict[str, Any] = {"images": torch.zeros(1, 1, 8, 8), "pairs": 1, "batch": 2}
    with pytest.raises(bgx.InputError, match=message):
        classify(bundle.model, bundle, **(arguments | change))


@pytest.mark.parametrize("scheduler", [DDIMScheduler(prediction_type="sample"), FlowMatchEulerDiscreteScheduler()])
def test_another_prediction_type_is_refused(scheduler: Any) -> None:
    bundle = replace(tiny(), scheduler=scheduler)
    with pytest.raises(bgx.InputError, match="must be 'epsilon' or 'v_prediction'"):
        classify(bundle.model, bundle, torch.zeros(1, 1, 8, 8), pairs=1, batch=2)
