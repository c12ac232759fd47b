"""FLOPs of graphs: as PyTorch's own counter, an independent one, finds them in eager mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import bigain_fx as bgx
from bigain_fx.capture import capture
from bigain_fx.passes.flops import flops, plan_flops
from bigain_fx.passes.methods import normalize
from bigain_fx.passes.pipeline import rewrite
from tests.toys import C, Separate
from tests.toys import H as ROWS
from tests.toys import W as COLUMNS


class Call(nn.Module):
    """One function of tensors ``a`` and ``b``, or of ``a`` alone."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.call(a, b)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, device="meta")


@pytest.mark.parametrize(
    ("call", "a", "b"),
    [
        (F.linear, (2, 5, 6), (7, 6)),
        (torch.matmul, (2, 3, 5, 6), (6, 4)),
        (torch.matmul, (2, 3, 5, 6), (2, 1, 6, 4)),
        (torch.mm, (5, 6), (6, 4)),
        (torch.bmm, (2, 5, 6), (2, 6, 4)),
        (lambda a, b: torch.addmm(b[0], a, b), (5, 6), (6, 4)),
        (lambda a, b: torch.baddbmm(b[:, :1], a, b), (2, 5, 6), (2, 6, 4)),
        (lambda a, b: torch.einsum("bid,bjd->bij", a, b), (2, 5, 6), (2, 7, 6)),
        (lambda a, b: torch.einsum("bid, bjd", a, b), (2, 5, 6), (2, 7, 6)),
        (lambda a, b: torch.einsum("...qd,...kd->...qk", a, b), (2, 3, 5, 6), (2, 3, 7, 6)),
        (lambda a, b: torch.einsum("bhi->ibh", a) + b, (2, 3, 5), (5, 2, 3)),
        (lambda a, b: F.conv1d(a, b, stride=2), (2, 6, 9), (8, 6, 3)),
        (lambda a, b: F.conv2d(a, b, padding=1, groups=2), (2, 6, 9, 8), (8, 3, 3, 3)),
        (lambda a, b: F.conv2d(a, b, padding="same"), (2, 6, 9, 8), (8, 6, 3, 3)),
        (lambda a, b: F.conv3d(a, b, stride=(1, 2, 2)), (2, 4, 5, 6, 8), (8, 4, 1, 2, 2)),
        (lambda a, b: F.conv_transpose1d(a, b, stride=2), (2, 6, 9), (6, 8, 3)),
        (lambda a, b: F.conv_transpose2d(a, b, stride=2, groups=2), (2, 6, 9, 8), (6, 4, 2, 2)),
        (lambda a, b: F.conv_transpose3d(a, b, stride=2), (2, 4, 5, 6, 8), (4, 8, 1, 2, 2)),
        (lambda a, b: F.scaled_dot_product_attention(a, b, b[..., :3]), (2, 4, 5, 6), (2, 4, 7, 6)),
        (lambda a, b: F.scaled_dot_product_attention(a, b, b, enable_gqa=True), (2, 4, 5, 6), (2, 2, 7, 6)),
    ],
)
def test_as_torch_counts_them(call: Callable[..., Tensor], a: tuple[int, ...], b: tuple[int, ...]) -> None:
    model, inputs = Call(call).eval(), {"a": ones(*a), "b": ones(*b)}
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert flops(capture(model, inputs).module.graph.nodes) == counter.get_total_flops()


def test_the_part_of_the_plan() -> None:
    """Every source of 2 x 2 cells is compared with every destination, channel by channel."""
    captured = capture(Separate().eval(), {"image": torch.randn(2, 3, ROWS, COLUMNS)}).module
    merged = rewrite(captured, normalize(bgx.LaplacianMerge(0.5))).module
    cells = ROWS * COLUMNS // 4
    assert plan_flops(captured.graph.nodes) == 0
    assert plan_flops(merged.graph.nodes) == 2 * 2 * 3 * cells * cells * C
    windowed = rewrite(captured, normalize(bgx.LaplacianMerge(0.5, window=2))).module
    assert plan_flops(windowed.graph.nodes) == 2 * 2 * 3 * cells * C
