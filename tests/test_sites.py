"""The matcher on toys: what is rewritten equals the toy with naive operators inside; what is not says why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bigain_fx as bgx
from bigain_fx.capture import capture
from bigain_fx.passes.grid import grids_from_hint
from bigain_fx.passes.images import Grids
from bigain_fx.passes.methods import Methods, normalize
from bigain_fx.passes.pipeline import Rewritten, rewrite
from tests import oracle, toys

GRID = (toys.H, toys.W)
MERGED = oracle.merged_count(GRID, (2, 2), 0.5)


def run(toy: toys.Toy, methods: Methods, batch: int = 2) -> tuple[Rewritten, Tensor, Tensor]:
    image = toys.image(batch)
    rewritten = rewrite(capture(toy.eval(), {"image": image}).module, methods)
    with torch.no_grad():
        return rewritten, rewritten.module(image)[0], image


def with_oracle(toy: toys.Toy, image: Tensor, merge: bool, kv: bool) -> Tensor:
    """The toy's own forward with the naive operators inside."""
    plans: list[oracle.Plan] = []

    def squeeze(x: Tensor, metric: Tensor) -> Tensor:
        plans.append(oracle.merge_plan(metric, GRID, (2, 2), MERGED))
        return oracle.merge(x, plans[0])

    if merge:
        toy.squeeze, toy.spread = squeeze, lambda y: oracle.unmerge(y, plans[0])
    if kv:
        toy.squeeze_kv = lambda x, metric: oracle.kv_downsample(x, 0.9, GRID, 2)
    with torch.no_grad():
        return toy(image)


def count(rewritten: Rewritten, name: str) -> int:
    return sum(name in str(node.target) for node in rewritten.module.graph.nodes)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("merge", "kv"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("toy_class", toys.REWRITTEN, ids=lambda toy_class: toy_class.__name__)
def test_rewritten_toy_equals_its_oracle(toy_class: type[toys.Toy], merge: bool, kv: bool, batch: int) -> None:
    toy = toy_class()
    methods = normalize([bgx.LaplacianMerge(0.5)] * merge + [bgx.KVDownsample(2, 0.9)] * kv)
    rewritten, output, image = run(toy, methods, batch)
    (record,) = rewritten.records
    assert record.action == "+".join(["merge"] * merge + ["kv"] * kv)
    assert (record.grid, record.tokens) == (GRID, toys.N)
    assert record.tokens_after == (toys.N - MERGED if merge else toys.N // 4)
    assert [count(rewritten, f"bigain.{op}") for op in ("merge_plan", "merge.", "unmerge", "kv_downsample")] == [
        merge, merge, merge, kv,
    ]  # fmt: skip
    assert count(rewritten, "scaled_dot_product_attention") == 1
    assert record.flops_after < record.flops or merge  # a plan may cost more than so small an attention
    torch.testing.assert_close(output, with_oracle(toy, image, merge, kv), rtol=1e-4, atol=1e-5)
    dense = with_oracle(toy_class(), image, False, False)
    assert (output - dense).norm() > 1e-3 * dense.norm()


@pytest.mark.parametrize(("toy_class", "reason"), toys.REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_refused_toy_is_left_alone_with_its_reason(toy_class: type[toys.Toy], reason: str) -> None:
    toy = toy_class()
    rewritten, output, image = run(toy, normalize([bgx.LaplacianMerge(0.5), bgx.KVDownsample(2)]))
    (record,) = rewritten.records
    assert record.action == "kept"
    assert reason in record.reason
    assert record.tokens_after == record.tokens
    assert count(rewritten, "bigain") == 0
    if toy_class is not toys.Dropped:
        torch.testing.assert_close(output, with_oracle(toy, image, False, False))


def test_an_attention_straight_on_another_reads_the_compressed_one() -> None:
    toy = toys.Chained()
    rewritten, output, image = run(toy, normalize(bgx.KVDownsample(2, 0.9)))
    torch.testing.assert_close(output, with_oracle(toy, image, False, True), rtol=1e-4, atol=1e-5)
    # Members of one group come back equal, so that the second merge has ties which rounding decides: compare graphs.
    rewritten, _, _ = run(toys.Chained(), normalize(bgx.LaplacianMerge(0.5)))
    assert [record.action for record in rewritten.records] == ["merge", "merge"]
    assert count(rewritten, "scaled_dot_product_attention") == 2
    first, second = (node for node in rewritten.module.graph.nodes if "bigain.merge." in str(node.target))
    assert "layer_norm" in first.args[0].name
    assert "unmerge" in second.args[0].name


def test_every_node_has_a_value_and_says_where_it_came_from() -> None:
    rewritten, _, _ = run(toys.Separate(), normalize([bgx.LaplacianMerge(0.5), bgx.KVDownsample(2)]))
    for node in rewritten.module.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta
            if "bigain" in str(node.target):
                assert node.meta["origin"].startswith("scaled_dot_product_attention")


def test_the_captured_graph_is_not_touched() -> None:
    captured = capture(toys.Separate().eval(), {"image": toys.image()})
    before = str(captured.module.graph)
    rewrite(captured.module, normalize(bgx.LaplacianMerge(0.5)))
    assert str(captured.module.graph) == before


def test_weights_are_shared() -> None:
    toy = toys.Separate().eval()
    rewritten = rewrite(capture(toy, {"image": toys.image()}).module, normalize(bgx.ToMe(0.5)))
    assert {id(p) for p in rewritten.module.parameters()} <= {id(p) for p in toy.parameters()}


def test_a_cell_too_large_and_a_ratio_too_small_are_reasons() -> None:
    both = normalize([bgx.LaplacianMerge(0.5, cell=(5, 2)), bgx.KVDownsample(3)])
    (record,) = run(toys.Separate(), both)[0].records
    assert (record.action, record.reason) == ("kv", "cell (5, 2) is larger than the grid (4, 6)")
    assert record.tokens_after == 4
    (record,) = run(toys.Separate(), normalize(bgx.LaplacianMerge(0.01)))[0].records
    assert (record.action, record.reason) == ("kept", "ratio 0.01 of 24 tokens merges none")


def test_patches_cut_by_a_reshape_have_a_grid() -> None:
    image = torch.randn(2, 3, 2 * toys.H, 2 * toys.W)
    captured = capture(toys.PixelUnshuffled().eval(), {"image": image})
    (record,) = rewrite(captured.module, ()).records
    assert record.grid == GRID


class Flat(toys.Toy):
    """Tokens come flat: the graph cannot tell their grid."""

    def forward(self, image: Tensor) -> Tensor:
        return image + self.branch(self.norm(image), image)


def test_a_hint_gives_the_grid_that_the_graph_cannot() -> None:
    tokens = torch.randn(2, toys.N, toys.C)
    captured = capture(Flat().eval(), {"image": tokens})
    method = normalize(bgx.LaplacianMerge(0.5))
    (record,) = rewrite(captured.module, method).records
    assert record.action == "kept"
    assert "pass grid=" in record.reason
    (record,) = rewrite(captured.module, method, (6, 4)).records
    assert (record.action, record.grid) == ("merge", (6, 4))
    with pytest.raises(bgx.GridError, match=r"grid=\(5, 5\) has 25 tokens; the attentions have \[24\]"):
        rewrite(captured.module, method, (5, 5))
    with pytest.raises(bgx.GridError, match="two positive integers"):
        rewrite(captured.module, method, (24, 0))


def test_a_hint_that_contradicts_the_graph_is_an_error() -> None:
    captured = capture(toys.Separate().eval(), {"image": toys.image()})
    with pytest.raises(bgx.GridError, match=r"contradicts the graph, whose finest image grid is \(4, 6\)"):
        rewrite(captured.module, normalize(bgx.LaplacianMerge(0.5)), (6, 4))


@pytest.mark.parametrize(
    ("hint", "tokens", "grids"),
    [
        (((64, 32),), 2048, ((64, 32),)),
        (((64, 32),), 512, ((32, 16),)),
        (((64, 32),), 1024, None),
        (((6, 6),), 4, ((2, 2),)),
        (((4, 4),), 32, None),
        (((8, 8), (4, 16)), 128, ((8, 8), (4, 16))),
        (((8, 8), (4, 16)), 32, ((4, 4), (2, 8))),
        (((8, 8), (6, 10)), 31, ((4, 4), (3, 5))),
        (((8, 8), (5, 12)), 31, None),
        (((8, 8), (8, 8)), 64, None),
    ],
)
def test_grids_from_hint(hint: Grids, tokens: int, grids: Grids | None) -> None:
    assert grids_from_hint(hint, tokens) == grids
