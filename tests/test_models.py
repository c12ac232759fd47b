"""Whole small denoisers: `optimize` against eager diffusers with the operators put in by attention processors.

Random weights and fixed seeds; the graph is captured with one set of inputs and judged on another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from torch import Tensor

import bigain_fx as bgx
from bigain_fx.passes import ops
from tests import oracle
from tests.processors import Downsample, Merge, Pair, Ramp, apply

TOLERANCE = 1e-4
BF16_DECIBELS = 20

FINE = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn1",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn1",
]
COARSE = [
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1",
    "mid_block.attentions.0.transformer_blocks.0.attn1",
    "up_blocks.0.attentions.0.transformer_blocks.0.attn1",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn1",
]
BLOCKS = [f"transformer_blocks.{index}.attn1" for index in range(3)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small lose time to a second thread, and very much of it where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    """One method as a user writes it, and the same for the processors."""

    method: Any
    merge: Merge | None = None
    downsample: Downsample | None = None


def random_draw(seed: int) -> Any:
    """ToMe's draw of destinations, which a seed defines and nothing else."""
    return lambda grid, cell: ops.random_positions(grid, cell, seed).tolist()


def cases(levels: int | None) -> dict[str, Case]:
    """Every method at ``levels``."""
    merge, kv = bgx.LaplacianMerge(levels=levels), bgx.KVDownsample(levels=levels)
    ramp = bgx.KVDownsample(alpha=bgx.LinearAlpha(), levels=levels)
    return {
        "merge": Case(merge, Merge(0.7, levels=levels)),
        "merge-2x4": Case(bgx.LaplacianMerge(0.8, (2, 4), levels), Merge(0.8, (2, 4), levels=levels)),
        "tome": Case(bgx.ToMe(seed=5, levels=levels), Merge(0.7, positions=random_draw(5), levels=levels)),
        "tome-top-left": Case(
            bgx.ToMe(0.5, destination="top-left", levels=levels), Merge(0.5, (2, 2), oracle.top_left, levels)
        ),
        "kv": Case(kv, None, Downsample(2, 0.9, levels)),
        "kv-4": Case(bgx.KVDownsample(4, 1.2, levels), None, Downsample(4, 1.2, levels)),
        "kv-linear": Case(ramp, None, Downsample(2, Ramp(), levels)),
        "todo": Case(bgx.ToDo(levels=levels), None, Downsample(2, 1.0, levels)),
        "both": Case((merge, kv), Merge(0.7, levels=levels), Downsample(2, 0.9, levels)),
        "both-linear": Case((merge, ramp), Merge(0.7, levels=levels), Downsample(2, Ramp(), levels)),
    }


def make_unet(linear: bool = False) -> UNet2DConditionModel:
    """Two levels, both with attention: 3 self-attentions on the sample's grid, 4 on the half one, 7 cross-attentions."""
    model = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
        use_linear_projection=linear,
    )
    return sharpen(model)


def make_dit() -> DiTTransformer2DModel:
    """Three blocks on a 16 x 16 grid."""
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=3,
        sample_size=32,
        patch_size=2,
        norm_num_groups=8,
    )
    return sharpen(model)


def sharpen(model: Any) -> Any:
    """Larger self-attention weights: a fresh model attends evenly and adds little, and would hide what is tested."""
    for name, weight in model.named_parameters():
        if ".attn1.to_" in name and weight.ndim == 2:
            weight.data.mul_(3)
    return model.eval()


def unet_inputs(size: Pair, steps: Sequence[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Sample, one timestep for all (one step given) or one a sample, and context, for a batch of 2."""
    timestep = torch.tensor(steps[0] if len(steps) == 1 else list(steps))
    return torch.randn(2, 4, *size).to(dtype), timestep, torch.randn(2, 5, 16).to(dtype)


def dit_inputs(steps: Sequence[int], dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor], dict[str, Tensor]]:
    """Arguments and keywords of the DiT, for a batch of 2."""
    labels = torch.randint(1000, (2,))
    return (torch.randn(2, 4, 32, 32).to(dtype),), {"timestep": torch.tensor(list(steps)), "class_labels": labels}


def relative(result: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    return float((result - expected).norm() / expected.norm())


def decibels(result: Tensor, expected: Tensor) -> float:
    """Signal to error in dB."""
    return -20 * math.log10(relative(result.float(), expected.float()) + 1e-12)


@torch.no_grad()
def compare(model: Any, case: Case, example: Any, inputs: Any, tolerance: float = TOLERANCE) -> Any:
    """Optimized against processors on ``inputs``, and both unlike dense; returns the optimized module."""
    fast = bgx.optimize(model, *example, method=case.method, backend="eager")
    slow, actions = apply(model, *inputs, merge=case.merge, downsample=case.downsample)
    args, kwargs = inputs
    expected = slow(*args, **kwargs).sample
    assert relative(expected, model(*args, **kwargs).sample) > 100 * tolerance, (
        "the case would not notice a dense model"
    )
    assert relative(fast(*args, **kwargs).sample, expected) <= tolerance
    assert {site.name: site.action for site in fast.report.sites if site.name in actions} == actions
    return fast


def actions_of(fast: Any) -> dict[str, list[str]]:
    """Site names by action, in the report's order."""
    names: dict[str, list[str]] = {}
    for site in fast.report.sites:
        names.setdefault(site.action, []).append(site.name)
    return {action: sorted(found) for action, found in names.items()}


def expected_action(case: Case) -> str:
    """What the report calls a case."""
    return "+".join(kind for kind, part in (("merge", case.merge), ("kv", case.downsample)) if part is not None)


def cross(names: Sequence[str]) -> list[str]:
    """The cross-attentions beside some self-attentions."""
    return [name.replace("attn1", "attn2") for name in names]


# ------------------------------------------------------------------------------------- the processors themselves


@torch.no_grad()
def test_processors_without_a_method_change_nothing() -> None:
    unet, dit = make_unet(), make_dit()
    for model, inputs in ((unet, (unet_inputs((16, 24), [7, 900]), {})), (dit, dit_inputs([7, 900]))):
        slow, actions = apply(model, *inputs)
        assert set(actions.values()) == {"kept"}
        assert torch.equal(slow(*inputs[0], **inputs[1]).sample, model(*inputs[0], **inputs[1]).sample)


# ------------------------------------------------------------------------------------- U-Net


@pytest.mark.parametrize("name", list(cases(1)))
@pytest.mark.parametrize("levels", [1, 2])
def test_unet(name: str, levels: int) -> None:
    case = cases(levels)[name]
    size = (16, 16) if levels == 1 else (16, 24)
    model = make_unet(linear=levels == 1)
    inputs = unet_inputs(size, [7, 900] if levels == 1 else [250])
    example = unet_inputs(size, [500, 500] if levels == 1 else [500])
    fast = compare(model, case, (example, {}), (inputs, {}))

    rewritten = FINE if levels == 1 else FINE + COARSE
    kept = cross(FINE + COARSE) + (COARSE if levels == 1 else [])
    assert actions_of(fast) == {expected_action(case): sorted(rewritten), "kept": sorted(kept)}
    for site in fast.report.sites:
        assert (site.action == "kept") == bool(site.reason)


@pytest.mark.parametrize(
    ("size", "tokens"),
    [((16, 16), {(16, 16): (256, 77), (8, 8): (64, 20)}), ((16, 24), {(16, 24): (384, 116), (8, 12): (96, 29)})],
)
def test_unet_report_of_a_merge_by_hand(size: Pair, tokens: dict[Pair, tuple[int, int]]) -> None:
    """256 - int(179.2), 64 - int(44.8), 384 - int(268.8), 96 - int(67.2)."""
    fast = bgx.optimize(make_unet(), unet_inputs(size, [1]), method=bgx.LaplacianMerge(levels=None), backend="eager")
    sites = [site for site in fast.report.sites if site.action == "merge"]
    assert len(sites) == 7
    assert {tuple(site.grid): (site.tokens, site.tokens_after) for site in sites} == tokens
    assert all(site.flops_after < site.flops for site in sites)


def test_unet_with_a_level_for_each_method() -> None:
    case = Case(
        (bgx.LaplacianMerge(levels=1), bgx.KVDownsample(alpha=0.8, levels=2)), Merge(0.7), Downsample(2, 0.8, levels=2)
    )
    inputs = unet_inputs((16, 16), [321])
    fast = compare(make_unet(), case, (inputs, {}), (inputs, {}))
    assert actions_of(fast) == {"merge+kv": sorted(FINE), "kv": sorted(COARSE), "kept": sorted(cross(FINE + COARSE))}


def test_unet_of_a_size_that_cells_do_not_divide() -> None:
    case = cases(1)["merge-2x4"]
    inputs = unet_inputs((10, 18), [321])
    fast = compare(make_unet(), case, (inputs, {}), (inputs, {}))
    assert actions_of(fast)["merge"] == sorted(FINE)


# ------------------------------------------------------------------------------------- DiT


@pytest.mark.parametrize("name", list(cases(1)))
def test_dit(name: str) -> None:
    case = cases(1)[name]
    fast = compare(make_dit(), case, dit_inputs([500, 500]), dit_inputs([7, 900]))
    assert actions_of(fast) == {expected_action(case): BLOCKS}
    assert {(site.tokens, tuple(site.grid)) for site in fast.report.sites} == {(256, (16, 16))}


@torch.no_grad()
def test_dit_has_one_level() -> None:
    model, (args, kwargs) = make_dit(), dit_inputs([7, 900])
    outputs = [
        bgx.optimize(model, args, kwargs, method=bgx.LaplacianMerge(levels=levels), backend="eager")(*args, **kwargs)
        for levels in (1, 2, None)
    ]
    assert torch.equal(outputs[0].sample, outputs[1].sample)
    assert torch.equal(outputs[0].sample, outputs[2].sample)


# ------------------------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("name", ["merge", "kv-linear", "both"])
@torch.no_grad()
def test_unet_in_bfloat16(name: str) -> None:
    model, case = make_unet().bfloat16(), cases(2)[name]
    inputs = unet_inputs((16, 16), [7, 900], torch.bfloat16)
    fast = bgx.optimize(model, inputs, method=case.method, backend="eager")
    slow, _ = apply(model, inputs, {}, merge=case.merge, downsample=case.downsample)
    assert decibels(fast(*inputs).sample, slow(*inputs).sample) >= BF16_DECIBELS


@pytest.mark.parametrize("name", ["merge", "kv-linear", "both"])
@torch.no_grad()
def test_dit_in_bfloat16(name: str) -> None:
    model, case = make_dit().bfloat16(), cases(1)[name]
    args, kwargs = dit_inputs([7, 900], torch.bfloat16)
    fast = bgx.optimize(model, args, kwargs, method=case.method, backend="eager")
    slow, _ = apply(model, args, kwargs, merge=case.merge, downsample=case.downsample)
    assert decibels(fast(*args, **kwargs).sample, slow(*args, **kwargs).sample) >= BF16_DECIBELS


# ------------------------------------------------------------------------------------- nothing to do


@pytest.mark.parametrize(
    "method",
    [
        None,
        bgx.LaplacianMerge(ratio=0.0, levels=None),
        bgx.ToMe(ratio=0.0),
        bgx.KVDownsample(factor=3, levels=None),
        bgx.LaplacianMerge(0.5, cell=(32, 32), levels=None),
    ],
    ids=["none", "ratio-0", "tome-0", "factor-3", "large-cell"],
)
@torch.no_grad()
def test_nothing_to_do_is_the_captured_graph(method: Any) -> None:
    unet, dit = make_unet(), make_dit()
    for model, (args, kwargs) in ((unet, (unet_inputs((16, 16), [7, 900]), {})), (dit, dit_inputs([7, 900]))):
        fast = bgx.optimize(model, args, kwargs, method=method, backend="eager")
        dense = bgx.optimize(model, args, kwargs, method=(), backend="eager")
        assert torch.equal(fast(*args, **kwargs).sample, dense(*args, **kwargs).sample)
        assert {site.action for site in fast.report.sites} == {"kept"}
        assert all(site.reason for site in fast.report.sites)
