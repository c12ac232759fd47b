"""The operators as torch ops: opcheck, one node each in an exported graph, the same compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigain_fx.passes.destinations import RULES
from bigain_fx.passes.ops import kernels

BIGAIN = torch.ops.bigain


def op_samples() -> list[tuple[str, Any, tuple[Any, ...]]]:
    """One call of every op and overload."""
    x = torch.randn(2, 35, 8)
    assign = torch.arange(35).remainder(20).expand(2, 35).contiguous()
    even = torch.randn(2, 24, 8)
    alpha = torch.tensor([0.9, 1.1])
    return [
        ("merge_plan", BIGAIN.merge_plan.default, (x, (5, 7), (2, 2), 20)),
        ("merge_plan-position", BIGAIN.merge_plan.default, (x, (5, 7), (2, 2), 20, torch.tensor([0, 1, 2, 3, 0, 1]))),
        ("merge_plan-window", BIGAIN.merge_plan.default, (x, (5, 7), (1, 2), 20, None, (5, 7))),
        ("merge_plan-bfloat16", BIGAIN.merge_plan.default, (x.bfloat16(), (5, 7), (2, 2), 20)),
        ("pool_plan", BIGAIN.pool_plan.default, (x, (5, 7), (2, 2), 4)),
        ("group_sizes", BIGAIN.group_sizes.default, (assign, 20)),
        ("merge", BIGAIN.merge.default, (x, assign, 20)),
        ("merge-bfloat16", BIGAIN.merge.default, (x.bfloat16(), assign, 20)),
        ("nearest_groups", BIGAIN.nearest_groups.default, (x, assign, torch.arange(20).expand(2, 20).contiguous())),
        ("blend", BIGAIN.blend.default, (x[:, :20], torch.stack([assign, 1 - assign % 2], 1), torch.rand(2, 1, 35))),
        ("unmerge", BIGAIN.unmerge.default, (x[:, :20].contiguous(), assign)),
        ("kv_downsample", BIGAIN.kv_downsample.default, (even, 0.9, (4, 6), 2)),
        ("kv_downsample-Tensor", BIGAIN.kv_downsample.Tensor, (even, alpha, (4, 6), 2)),
        ("kv_downsample-Tensor-bfloat16", BIGAIN.kv_downsample.Tensor, (even.bfloat16(), alpha, (4, 6), 2)),
        ("kv_downsample-cut", BIGAIN.kv_downsample.default, (x, 0.9, (5, 7), 3)),
        ("kv_downsample-Tensor-cut", BIGAIN.kv_downsample.Tensor, (x.bfloat16(), alpha, (5, 7), 2)),
        ("linear_alpha", BIGAIN.linear_alpha.default, (torch.tensor([7, 900]), 2, 0.8, 1.2, 999.0, 0.0)),
        ("linear_alpha-0d", BIGAIN.linear_alpha.default, (torch.tensor(7.5), 2, 0.8, 1.2, 999.0, 0.0)),
    ]


SAMPLES = op_samples()


def test_every_op_and_overload_is_sampled() -> None:
    sampled = {op.name() for _, op, _ in SAMPLES}
    sampled |= {f"bigain::{schema.partition('(')[0]}" for schema in kernels.SCHEMAS}  # in test_kernels
    sampled |= {f"bigain::{rule}_positions" for rule in RULES}  # in test_destinations, defined when first used
    sampled.add("bigain::weight_of")  # stands for a layer in a captured graph, and never runs: in test_quantized
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bigain::")}
    assert {name for name in sampled if not name.endswith("_positions")} <= registered <= sampled


@pytest.mark.parametrize(("op", "args"), [pytest.param(op, args, id=name) for name, op, args in SAMPLES])
def test_opcheck(op: Any, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(op, args)


class Compressed(nn.Module):
    """Every op and overload once or more, on a 6 x 8 grid."""

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Merged and unmerged tokens, and both downsamplings of them."""
        assign, rep = BIGAIN.merge_plan(x, [6, 8], [2, 2], 30)
        merged = BIGAIN.merge(x, assign, 18)
        angles = x.gather(1, rep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        full = BIGAIN.unmerge(torch.tanh(merged) + angles, assign)
        alpha = BIGAIN.linear_alpha(timestep, 2, 0.8, 1.2, 999.0, 0.0)
        return full, BIGAIN.kv_downsample(x, 0.9, [6, 8], 2), BIGAIN.kv_downsample(full, alpha, [6, 8], 5)


def test_ops_are_one_node_each_in_the_exported_graph() -> None:
    x, timestep = torch.randn(2, 48, 16), torch.tensor(321)
    program = torch.export.export(Compressed(), (x, timestep))
    counts: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("bigain."):
            counts[str(node.target)] = counts.get(str(node.target), 0) + 1
    assert counts == {
        "bigain.merge_plan.default": 1,
        "bigain.merge.default": 1,
        "bigain.unmerge.default": 1,
        "bigain.linear_alpha.default": 1,
        "bigain.kv_downsample.default": 1,
        "bigain.kv_downsample.Tensor": 1,
    }
    for got, expected in zip(program.module()(x, timestep), Compressed()(x, timestep), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend: str) -> None:
    x = torch.randn(2, 48, 16)
    compiled = torch.compile(Compressed(), fullgraph=True, dynamic=False, backend=backend)
    with torch.no_grad():
        for step in (0, 321):
            got = compiled(x, torch.tensor(step))
            for left, right in zip(got, Compressed()(x, torch.tensor(step)), strict=True):
                torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_the_plan_is_made_in_float32_under_autocast() -> None:
    metric = torch.randn(2, 64, 8)
    expected = torch.ops.bigain.merge_plan(metric, [8, 8], [2, 2], 40)
    compiled = torch.compile(torch.ops.bigain.merge_plan, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for make in (torch.ops.bigain.merge_plan, compiled):
            for map_, expected_map in zip(make(metric, [8, 8], [2, 2], 40), expected, strict=True):
                assert torch.equal(map_, expected_map)
