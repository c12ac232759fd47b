"""Sampling: deterministic, guided as written, one input signature for sampling and classification."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

import bigain_fx as bgx
from bigain_fx.classify import DiffusionClassifier
from bigain_fx.embedded import ClassConditional
from bigain_fx.sample import predict, sample


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small lose time to a second thread, and very much of it where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(
    prediction: str = "epsilon", out_channels: int = 1, size: int = 8, classes: int = 3, layers: int = 1
) -> ClassConditional:
    """A DiT of one block, or more, and random weights."""
    model = DiTTransformer2DModel(
        sample_size=size, in_channels=1, out_channels=out_channels, patch_size=2, num_layers=layers,
        num_attention_heads=2, attention_head_dim=8, num_embeds_ada_norm=classes,
    )  # fmt: skip
    scheduler = DDIMScheduler(prediction_type=prediction)
    return ClassConditional("tiny", model.eval().requires_grad_(False), scheduler, (1, size, size), classes)


def tiny_unet() -> ClassConditional:
    """A U-Net with learned class tokens, three classes and random weights."""
    model = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=8,
        attention_head_dim=1, mid_block_type=None,
    )  # fmt: skip
    tokens = nn.Parameter(torch.randn(4, 8))
    return ClassConditional("tiny", model.eval(), DDIMScheduler(), (1, 8, 8), 3, tokens)


class Recorder(nn.Module):
    """Passes calls on to ``inner`` and keeps their inputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor, **kwargs: Any) -> Any:
        self.calls.append({"x": x, "timestep": timestep, "class_labels": class_labels})
        return self.inner(x, timestep=timestep, class_labels=class_labels, **kwargs)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("out_channels", [1, 2])
def test_equals_a_plain_guided_loop(prediction: str, out_channels: int) -> None:
    bundle = tiny(prediction, out_channels)
    labels, noise, guidance = torch.tensor([2, 0, 1]), torch.randn(3, 1, 8, 8), 3.0
    scheduler = DDIMScheduler(prediction_type=prediction)
    scheduler.set_timesteps(4)
    x = noise
    for t in scheduler.timesteps:
        times = t.repeat(3)
        given = bundle.model(x, timestep=times, class_labels=labels).sample[:, :1]
        null = bundle.model(x, timestep=times, class_labels=torch.full((3,), 3)).sample[:, :1]
        x = scheduler.step(null + guidance * (given - null), t, x).prev_sample
    images = sample(bundle.model, bundle, labels, steps=4, guidance=guidance, noise=noise, batch=4)
    torch.testing.assert_close(images, x, rtol=1e-4, atol=1e-5)


def test_is_deterministic_and_leaves_the_scheduler_alone() -> None:
    bundle = tiny()
    labels, noise = torch.tensor([0, 1]), torch.randn(2, 1, 8, 8)
    before = bundle.scheduler.timesteps.clone()
    first = sample(bundle.model, bundle, labels, steps=3, guidance=2.0, noise=noise, batch=4)
    again = sample(bundle.model, bundle, labels, steps=3, guidance=2.0, noise=noise, batch=4)
    other = sample(bundle.model, bundle, labels, steps=3, guidance=2.0, noise=-noise, batch=4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert bundle.scheduler.num_inference_steps is None
    assert torch.equal(bundle.scheduler.timesteps, before)


def test_guidance_of_one_is_no_guidance_at_half_the_calls() -> None:
    bundle = tiny()
    labels, noise = torch.tensor([0, 1, 2, 0]), torch.randn(4, 1, 8, 8)
    images, calls = {}, {}
    for guidance in (None, 1.0, 2.0):
        recorder = Recorder(bundle.model)
        images[guidance] = sample(recorder, bundle, labels, steps=3, guidance=guidance, noise=noise, batch=4)
        calls[guidance] = len(recorder.calls)
        seen = torch.cat([call["class_labels"] for call in recorder.calls])
        assert bool((seen == bundle.num_classes).any()) == (guidance == 2.0)
    assert torch.equal(images[None], images[1.0])
    assert not torch.equal(images[None], images[2.0])
    assert calls == {None: 3, 1.0: 3, 2.0: 6}


def test_every_call_has_one_shape_and_padding_changes_nothing() -> None:
    bundle = tiny()
    x, timesteps, labels = torch.randn(7, 1, 8, 8), torch.arange(7) * 100, torch.arange(7) % 4
    recorder, ticks = Recorder(bundle.model), []
    padded = predict(recorder, bundle.condition, x, timesteps, labels, batch=4, progress=lambda: ticks.append(1))
    assert [tuple(call["x"].shape) for call in recorder.calls] == [(4, 1, 8, 8)] * 2
    assert [tuple(call["timestep"].shape) for call in recorder.calls] == [(4,)] * 2
    assert len(ticks) == 2
    whole = bundle.model(x, timestep=timesteps, class_labels=labels).sample
    torch.testing.assert_close(padded, whole)


@pytest.mark.parametrize("make", [tiny, tiny_unet])
def test_one_graph_serves_sampling_and_classification(make: Callable[[], ClassConditional]) -> None:
    bundle = make()
    fast = bgx.optimize(bundle.model, method=bgx.LaplacianMerge(0.7), backend="eager")
    images = sample(fast, bundle, torch.arange(3), steps=2, guidance=2.0, noise=torch.randn(3, 1, 8, 8), batch=4)
    classifier = DiffusionClassifier(
        fast, bundle.scheduler, bundle.condition(torch.arange(3)), n_samples=(1,), to_keep=(1,), batch=4
    )
    found = classifier(images[:1])
    assert images.shape == (3, 1, 8, 8)
    assert found.errors.shape == (1, 3)
    assert images.abs().max() <= 1
    assert len(fast._graphs) == 1
    assert fast.report.rewritten


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0 must be an integer from 1 to the scheduler's 1000"),
        ({"batch": 0}, "batch=0 must be an integer from 1"),
        ({"noise": torch.zeros(2, 1, 8, 8)}, r"noise has shape \(2, 1, 8, 8\); it must be \(1, 1, 8, 8\)"),
        ({"labels": torch.tensor([3])}, r"labels=\[3\] must be classes from 0 to 2"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    bundle = tiny()
    noise = torch.zeros(1, 1, 8, 8)
    arguments: dict[str, Any] = {"labels": torch.tensor([0]), "steps": 2, "guidance": None, "noise": noise, "batch": 2}
    with pytest.raises(bgx.InputError, match=message) as caught:
        sample(bundle.model, bundle, **(arguments | change))
    assert "\n" not in str(caught.value)
