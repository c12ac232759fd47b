"""Plans are those of the naive operators on what the denoiser really merges by; pictures show them token by token."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

import bigain_fx as bgx
from bigain_fx.evidence.plans import Plan, borders, observe, plan_figure, plans_of
from tests import oracle
from tests.test_sample import _one_thread, tiny, tiny_unet  # noqa: F401
from tests.test_spectrum import inputs_of, read
from tests.toys import Separate, Toy

Pair = tuple[int, int]
Merge = bgx.LaplacianMerge | bgx.ToMe | bgx.BlockPool


def planned(method: Merge, metric: Tensor, grid: Pair) -> tuple[oracle.Plan, list[list[int]]]:
    """The plan of ``method`` by the naive operators, and the destinations of each sample."""
    merged = oracle.merged_count(grid, method.cell, method.ratio)
    if isinstance(method, bgx.BlockPool):
        plan = oracle.pool_plan(metric, grid, method.cell, merged // 3)
        shared = [[token for token in row.tolist() if row.tolist().count(token) > 1] for row in plan.assign]
        return plan, [list({int(plan.rep[b, group]) for group in groups}) for b, groups in enumerate(shared)]
    chosen = oracle.random_positions(grid, method.cell, method.seed) if isinstance(method, bgx.ToMe) else None
    score = oracle.laplacian_score(metric, grid)
    return oracle.merge_plan(metric, grid, method.cell, merged, chosen), \
        oracle.destinations(score, grid, method.cell, chosen)  # fmt: skip


METHODS: list[Merge] = [
    bgx.LaplacianMerge(0.5), bgx.LaplacianMerge(0.4, cell=(1, 4)), bgx.LaplacianMerge(0.7, scope="block"),
    bgx.ToMe(0.5, seed=3), bgx.BlockPool(0.5),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("family", ["dit", "unet"])
def test_collects_the_plan_of_every_attention(family: str, method: Merge) -> None:
    dit = family == "dit"
    bundle, grid = (tiny(), (4, 4)) if dit else (tiny_unet(), (8, 8))
    inputs = inputs_of(bundle, "hidden_states" if dit else "sample")(300)
    found = plans_of(bundle.model, inputs, method=method)
    paths = [path for path, _ in bundle.model.named_modules() if path.endswith("attn1")]
    assert [plan.site for plan in found] == paths
    merged_by = paths[0] if dit else paths[0].replace("attn1", "norm1")
    torch.testing.assert_close(found[0].metric, read(bundle.model, inputs, merged_by))
    for plan in found:
        expected, destinations = planned(method, plan.metric, grid)
        assert plan.grid == grid
        assert oracle.token_map(plan.assign, plan.rep) == expected.token_map()
        assert [sorted(row) for row in plan.destinations.tolist()] == [sorted(row) for row in destinations]
        alone = [{n for n, shared in enumerate(row) if not shared} for row in plan.merged.tolist()]
        assert alone == oracle.lone_tokens(expected.assign)


def test_a_plan_that_a_batch_shares_has_one_sample() -> None:
    bundle = tiny()
    (plan,) = plans_of(bundle.model, inputs_of(bundle, "hidden_states")(300), method=bgx.ToMe(0.5, align="batch"))
    assert plan.metric.shape == (1, 16, 2 * 16)
    assert plan.assign.shape == (1, 16)


def test_a_plan_differs_from_timestep_to_timestep() -> None:
    bundle = tiny()
    early, late = (
        plans_of(bundle.model, inputs_of(bundle, "hidden_states")(t), method=bgx.LaplacianMerge(0.5))[0]
        for t in (20, 900)
    )
    assert not torch.equal(early.metric, late.metric)
    assert oracle.token_map(early.assign, early.rep) != oracle.token_map(late.assign, late.rep)


class Overwritten(Toy):
    """The residual stream is written over when it is no longer needed."""

    def forward(self, image: Tensor) -> Tensor:
        residual = self.tokens(image)
        summed = residual + self.branch(self.norm(residual), residual)
        return summed + residual.zero_()


def test_a_metric_that_is_overwritten_later_is_kept_as_it_was() -> None:
    model, image = Overwritten().eval(), torch.randn(1, 3, 4, 6)
    (plan,) = plans_of(model, {"image": image}, method=bgx.LaplacianMerge(0.5))
    torch.testing.assert_close(plan.metric, model.tokens(image))


def test_observes_the_first_call_in_each_module_and_the_same_output() -> None:
    bundle = tiny_unet()
    fast = bgx.optimize(bundle.model, method=bgx.LaplacianMerge(0.5, scope="block"), backend="eager")
    inputs = inputs_of(bundle, "sample")(300)
    operator = torch.ops.bigain.merge.default
    calls = observe(fast, inputs, {operator})
    nodes = [node for node in fast.prepare(**inputs).graph.graph.nodes if node.target is operator]
    assert len(nodes) > len(calls) == 3
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert calls[path].operator is operator
    torch.testing.assert_close(calls[path].args[0], read(bundle.model, inputs, path))
    plan = oracle.Plan(calls[path].args[1], torch.zeros(2, calls[path].args[2]))
    torch.testing.assert_close(calls[path].result, oracle.merge(calls[path].args[0], plan))


@pytest.mark.parametrize("method", [bgx.LaplacianMerge(0.0), bgx.ToMe(0.5, cell=(9, 9)), bgx.ToDo(2)], ids=str)
def test_a_method_that_merges_nothing_is_refused(method: Any) -> None:
    with pytest.raises(bgx.InputError, match=f"method={method} merges nothing in Separate; bigain_fx.inspect"):
        plans_of(Separate().eval(), {"image": torch.randn(1, 3, 4, 6)}, method=method)


def by_hand() -> Plan:
    """Two samples of 2x4 tokens; the second is::

    A A B .
    A . B B
    """
    metric = torch.randn(2, 8, 3)
    assign = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 3], [0, 0, 1, 2, 0, 3, 1, 1]])
    return Plan("blocks.0.attn", metric, (2, 4), assign, torch.tensor([[3, 7, 4, 5], [4, 2, 3, 5]]), 2)


def edges(tokens: list[list[int]], merged: list[list[bool]]) -> set[tuple[Pair, Pair]]:
    """The sides on which a merged token meets a token of another group, walking around each token."""
    h, w = len(tokens), len(tokens[0])
    found = set()
    for y in range(h):
        for x in range(w):
            around = {(x - 1, y): ((x, y), (x, y + 1)), (x + 1, y): ((x + 1, y), (x + 1, y + 1)),
                      (x, y - 1): ((x, y), (x + 1, y)), (x, y + 1): ((x, y + 1), (x + 1, y + 1))}  # fmt: skip
            for (i, j), side in around.items():
                if merged[y][x] and 0 <= i < w and 0 <= j < h and tokens[j][i] != tokens[y][x]:
                    found.add(side)
    return found


def test_borders_run_around_groups_and_not_between_tokens_alone() -> None:
    plan = by_hand()
    drawn = borders(plan.assign[1].view(2, 4), plan.merged[1].view(2, 4))
    assert sorted(drawn) == [
        ((1, 1), (1, 2)), ((1, 1), (2, 1)), ((2, 0), (2, 1)), ((2, 1), (2, 2)), ((3, 0), (3, 1)), ((3, 1), (4, 1)),
    ]  # fmt: skip
    random = Plan.of("", torch.randn(1, 48, 5), (6, 8), (2, 2), 20)
    assign, merged = random.assign.view(6, 8), random.merged.view(6, 8)
    assert set(borders(assign, merged)) == edges(assign.tolist(), merged.tolist())
    assert len(borders(assign, merged)) == len(set(borders(assign, merged)))


def test_a_plan_of_a_metric_is_that_of_the_naive_operators() -> None:
    metric, positions = torch.randn(2, 24, 5), torch.tensor([3, 0, 1, 2, 2, 1])
    for given in (None, positions):
        plan = Plan.of("any", metric, (4, 6), (2, 2), 11, given)
        expected = oracle.merge_plan(metric, (4, 6), (2, 2), 11, None if given is None else given.tolist())
        assert oracle.token_map(plan.assign, plan.rep) == expected.token_map()
        assert plan.elected == 6


def pixels(drawn: Figure) -> bytes:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="rgba", dpi=60)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_figure_shows_image_score_destinations_and_groups(channels: int) -> None:
    plan, image = by_hand(), torch.rand(channels, 4, 8) * 2 - 1
    drawn = plan_figure(image, plan, 1)
    panels = drawn.axes[:4]
    assert len(drawn.axes) == 5  # and the scale of the scores
    assert drawn.get_suptitle() == "blocks.0.attn: 8 tokens, 4 after merging"
    titles = [axis.get_title() for axis in panels]
    assert titles == ["image", "Laplacian score", "2 destinations", "2 groups, 2 tokens alone"]
    expected = ((image + 1) / 2).expand(3, -1, -1).permute(1, 2, 0)
    for axis in (panels[0], panels[2], panels[3]):
        torch.testing.assert_close(torch.from_numpy(axis.images[0].get_array()), expected)
    for axis in panels:
        assert all(picture.get_extent() == [0, 4, 2, 0] for picture in axis.images)
        assert (axis.get_xlim(), axis.get_ylim()) == ((0, 4), (2, 0))
    score = oracle.laplacian_score(plan.metric[1:], (2, 4))[0].view(2, 4)
    torch.testing.assert_close(torch.from_numpy(panels[1].images[0].get_array()), score)
    marks = panels[2].collections[0].get_offsets().tolist()
    assert marks == [[0.5, 1.5], [2.5, 0.5]]
    colours = panels[3].images[1].get_array().reshape(8, 4).tolist()
    shown = {tuple(colours[n]) for n in (0, 1, 4)}, {tuple(colours[n]) for n in (2, 6, 7)}
    assert [len(colour) for colour in shown] == [1, 1]
    assert shown[0] != shown[1]
    assert [colours[n][3] > 0 for n in range(8)] == [True, True, True, False, True, False, True, True]
    (lines,) = panels[3].collections
    assert isinstance(lines, LineCollection)
    segments = {tuple((int(x), int(y)) for x, y in line) for line in lines.get_segments()}
    assert segments == set(borders(plan.assign[1].view(2, 4), plan.merged[1].view(2, 4)))
    assert pixels(drawn) == pixels(plan_figure(image, plan, 1)) != pixels(plan_figure(image, plan, 0))


def test_every_group_has_a_colour_of_its_own() -> None:
    plan = Plan.of("any", torch.randn(1, 256, 4), (16, 16), (2, 2), 160)
    colours = plan_figure(torch.zeros(1, 32, 32), plan).axes[3].images[1].get_array().reshape(256, 4).tolist()
    of_group = {group: tuple(colour) for group, colour in zip(plan.assign[0].tolist(), colours, strict=True)
                if colour[3]}  # fmt: skip
    assert len(of_group) > 30
    assert len(set(of_group.values())) == len(of_group)
    assert min(math.dist(a, b) for a in of_group.values() for b in of_group.values() if a != b) > 0.01


@pytest.mark.parametrize(
    ("image", "sample", "message"),
    [
        (torch.zeros(4, 8, 8), 0, r"image has shape \(4, 8, 8\); it must be \(1 or 3, H, W\)"),
        (torch.zeros(1, 1, 8, 8), 0, r"image has shape \(1, 1, 8, 8\); it must be \(1 or 3, H, W\)"),
        (torch.zeros(1, 8, 8), 2, "sample=2 must be from 0 to 1, the samples of the plan"),
        (torch.zeros(1, 8, 8), -1, "sample=-1 must be from 0 to 1"),
    ],
)
def test_the_figure_refuses_what_it_cannot_show(image: Tensor, sample: int, message: str) -> None:
    with pytest.raises(bgx.InputError, match=message) as caught:
        plan_figure(image, by_hand(), sample)
    assert "\n" not in str(caught.value)
