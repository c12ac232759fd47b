"""Several images in one attention: each is scored, merged and downsampled by itself (docs/operators.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import bigain_fx as bgx
from bigain_fx.capture import capture
from bigain_fx.passes.grammar import parse
from bigain_fx.passes.methods import normalize
from bigain_fx.passes.pipeline import Rewritten, rewrite
from tests import by_hand, oracle, toys
from tests.oracle import Pair
from tests.test_architectures import COMPILED_TOLERANCE, each
from tests.test_scope import Blocks
from tests.toys import C
from tests.zoo import Case
from tests.zoo_checks import (
    BLEND,
    BOTH,
    KV,
    MERGE,
    PROPORTIONAL,
    TOLERANCE,
    Applied,
    check_report,
    load,
    one_thread,
    optimize,
    relative,
    tensors,
)
from tests.zoo_images import IMAGES, KONTEXT, ids


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


SLOW = pytest.mark.slow
APPLIED = {"merge": MERGE, "kv": KV, "both": BOTH, "blend": BLEND}


@each(IMAGES)
@pytest.mark.parametrize("applied", ["merge", "both", *(pytest.param(name, marks=SLOW) for name in ("kv", "blend"))])
def test_rewritten_as_by_hand(case: Case, applied: str) -> None:
    check_by_hand(case, APPLIED[applied])


def check_by_hand(case: Case, applied: Applied) -> None:
    fast, loaded = optimize(case, applied.method), load(case)
    check_report(case, fast.report, applied.action)
    expected = tensors(by_hand.run(loaded.model, loaded.inputs, case.sites, **applied.by_hand))
    assert relative(expected, loaded.output) > 100 * TOLERANCE, "the case would not notice a dense model"
    assert relative(tensors(fast(**loaded.inputs)), expected) <= TOLERANCE


@each(tuple(case for case in IMAGES if case.name.startswith("flux")))
def test_proportional_as_by_hand(case: Case) -> None:
    """The others have masks of their own."""
    check_by_hand(case, PROPORTIONAL)


@each(tuple(case for case in IMAGES if case.name in ("flux-kontext", "qwen-image-edit")))
@pytest.mark.parametrize("options", [{}, {"unmerge": "blend"}], ids=["copy", "blend"])
def test_block_scope(case: Case, options: dict[str, str]) -> None:
    """The same attentions, and the layers around them run on the merged tokens too."""
    fast, loaded = optimize(case, bgx.LaplacianMerge(0.5, scope="block", **options)), load(case)
    check_report(case, fast.report, "merge")
    attention = optimize(case, bgx.LaplacianMerge(0.5, **options))
    assert fast.report.flops_after < attention.report.flops_after
    assert relative(tensors(fast(**loaded.inputs)), loaded.output) > 100 * TOLERANCE


# --------------------------------------------------------------------------------------- every method, on a toy

GRIDS = ((4, 6), (2, 2), (6, 4))
TOTAL, FIRST = 52, 2


class Images(toys.Toy):
    """The tokens of several images between learned ones, in one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.randn(1, FIRST, C)), nn.Parameter(torch.randn(1, 3, C))

    def tokens(self, image: Tensor) -> Tensor:
        sides = [each.expand(len(image), -1, -1) for each in (self.first, self.last)]
        return torch.cat([sides[0], image, sides[1]], 1)


Maker = Callable[[Tensor, Pair], oracle.Plan]


def laplacian(metric: Tensor, grid: Pair, ratio: float = 0.5, **options: Any) -> oracle.Plan:
    return oracle.merge_plan(metric, grid, (2, 2), oracle.merged_count(grid, (2, 2), ratio), **options)


def in_windows(metric: Tensor, grid: Pair) -> oracle.Plan:
    """Windows of at most four tokens: (4, 2) of (4, 6), (2, 2) of (2, 2), (2, 4) of (6, 4)."""
    return laplacian(metric, grid, window={(4, 6): (4, 2), (2, 2): (2, 2), (6, 4): (2, 4)}[grid])


def by_rows(metric: Tensor, grid: Pair) -> oracle.Plan:
    positions = oracle.row_positions(oracle.laplacian_score(metric, grid), grid, (2, 2))
    plans = [laplacian(metric[b : b + 1], grid, positions=positions[b]) for b in range(len(metric))]
    return oracle.Plan(*(torch.cat([getattr(plan, name) for plan in plans]) for name in ("assign", "rep")))


def drawn(metric: Tensor, grid: Pair) -> oracle.Plan:
    return laplacian(metric, grid, positions=oracle.random_positions(grid, (2, 2), 3))


def pooled(metric: Tensor, grid: Pair) -> oracle.Plan:
    return oracle.pool_plan(metric, grid, (2, 2), int(grid[0] * grid[1] * 0.5) // 3)


METHODS: dict[str, tuple[Any, Maker]] = {
    "mean": (bgx.LaplacianMerge(0.5), laplacian),
    "none of one image": (bgx.LaplacianMerge(0.1), partial(laplacian, ratio=0.1)),
    "window": (bgx.LaplacianMerge(0.5, window=4), in_windows),
    "row": (bgx.LaplacianMerge(0.5, cell_layout="row"), by_rows),
    "tome": (bgx.ToMe(0.5, seed=3), drawn),
    "pool": (bgx.BlockPool(0.5), pooled),
    "proportional": (bgx.LaplacianMerge(0.5, proportional=True), laplacian),
    "blend": (bgx.LaplacianMerge(0.75, unmerge="blend"), partial(laplacian, ratio=0.75)),
    "aligned": (bgx.LaplacianMerge(0.5, align="batch"), laplacian),
    "block": (bgx.LaplacianMerge(0.5, scope="block"), laplacian),
}


def plan_by_hand(toy: Images, method: Any, make: Maker) -> None:
    """Let ``toy`` do by loops, image by image, what ``method`` does."""
    made: list[tuple[Tensor, list[oracle.Plan], oracle.Plan]] = []
    bounds = [0, *accumulate(map(math.prod, GRIDS))]

    def squeeze(x: Tensor, residual: Tensor) -> Tensor:
        metric = residual[:, FIRST : FIRST + TOTAL]
        if method.align == "batch":
            metric = torch.cat([*metric], 1).unsqueeze(0)
        plans = [make(metric[:, a:b], grid) for (a, b), grid in zip(pairwise(bounds), GRIDS, strict=True)]
        plans = [oracle.Plan(plan.assign.expand(2, -1), plan.rep.expand(2, -1)) for plan in plans]
        made.append((metric, plans, oracle.one_behind_another(plans)))
        few = oracle.merge(x[:, FIRST : FIRST + TOTAL], made[0][2])
        return torch.cat([x[:, :FIRST], few, x[:, FIRST + TOTAL :]], 1)

    def unmerge(y: Tensor) -> Tensor:
        metric, plans, plan = made[0]
        groups = plan.rep.shape[1]
        few = y[:, FIRST : FIRST + groups]
        image = oracle.unmerge(few, plan)
        if method.unmerge == "blend":
            ends = [0, *accumulate(each.rep.shape[1] for each in plans)]
            image = torch.cat([
                oracle.blend(few[:, slice(*rows)], metric[:, slice(*tokens)], each)
                for rows, tokens, each in zip(pairwise(ends), pairwise(bounds), plans, strict=True)
            ], 1)  # fmt: skip
        return torch.cat([y[:, :FIRST], image, y[:, FIRST + groups :]], 1)

    toy.squeeze, toy.spread = squeeze, unmerge
    if method.proportional:  # a key that counts for its group is one repeated as often as the group has tokens
        toy.squeeze_kv = lambda x, metric: unmerge(squeeze(x, metric))


def rewritten(toy: nn.Module, image: Tensor, methods: Any, grid: Any = GRIDS) -> tuple[Rewritten, Tensor]:
    module = capture(toy.eval(), {"image": image}).module
    result = rewrite(module, normalize(methods), grid)
    with torch.no_grad():
        return result, result.module(image)[0]


@pytest.mark.parametrize("name", METHODS)
def test_each_image_by_itself(name: str) -> None:
    method, make = METHODS[name]
    torch.manual_seed(0)
    toy, image = Images(), torch.randn(2, TOTAL, C)
    result, output = rewritten(toy, image, method)
    (record,) = result.records
    assert (record.action, record.grid, record.tokens, record.level) == ("merge", GRIDS, TOTAL, 1)
    with torch.no_grad():
        dense = toy(image)
        plan_by_hand(toy, method, make)
        expected = toy(image)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert (expected - dense).norm() > 1e-3 * dense.norm()


def test_the_tokens_that_are_left() -> None:
    """int(N * ratio) of each: int(24 * 0.55) = 13, int(4 * 0.55) = 2, at most three quarters of 24 = 18."""
    image = torch.randn(2, TOTAL, C)
    (record,) = rewritten(Images(), image, bgx.LaplacianMerge(0.55))[0].records
    assert (record.tokens, record.tokens_after) == (52, 24 - 13 + 4 - 2 + 24 - 13)
    (record,) = rewritten(Images(), image, bgx.BlockPool(0.55))[0].records
    assert record.tokens_after == 24 - 12 + 4 + 24 - 12
    (record,) = rewritten(Images(), image, (bgx.LaplacianMerge(0.01), bgx.KVDownsample(2)))[0].records
    assert (record.action, record.tokens_after) == ("kv", 6 + 1 + 6)
    assert record.reason == "ratio 0.01 of 52 tokens merges none"


@pytest.mark.parametrize(
    ("method", "grids", "reason"),
    [
        (bgx.LaplacianMerge(0.5, cell=(4, 4)), ((4, 6), (2, 14)), "cell (4, 4) is larger than the grid (2, 14)"),
    ],
)
def test_one_image_that_does_not_fit_keeps_the_attention(method: Any, grids: Any, reason: str) -> None:
    (record,) = rewritten(Images(), torch.randn(2, 52, C), method, grids)[0].records
    assert (record.action, record.reason, record.grid) == ("kept", reason, grids)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        (((4, 6), (6, 4)), r"grid=\(\(4, 6\), \(6, 4\)\) has 48 tokens; the attentions have \[57\]"),
        (((4, 6), (0, 4)), r"two positive integers \(rows, columns\), in image tokens, or a list of such pairs"),
        ((), "two positive integers"),
        ("4x6", "two positive integers"),
    ],
)
def test_wrong_grids_are_refused(grids: Any, message: str) -> None:
    with pytest.raises(bgx.GridError, match=message):
        rewritten(Images(), torch.randn(2, TOTAL, C), bgx.LaplacianMerge(0.5), grids)


def test_grids_that_contradict_the_graph_are_refused() -> None:
    """24 tokens of one image, as the graph tells, and of two, as is said."""
    with pytest.raises(bgx.GridError, match=r"contradicts the graph, whose finest image grid is \(4, 6\)"):
        rewritten(toys.Separate(), toys.image(), bgx.LaplacianMerge(0.5), ((4, 3), (3, 4)))


class Between(Images):
    """Learned tokens between the images: no run of image tokens."""

    def tokens(self, image: Tensor) -> Tensor:
        return torch.cat([image[:, :24], self.first.expand(len(image), -1, -1), image[:, 24:]], 1)


def test_images_that_are_not_one_run_of_tokens_are_left_alone() -> None:
    (record,) = rewritten(Between(), torch.randn(2, TOTAL, C), bgx.LaplacianMerge(0.5))[0].records
    assert record.action == "kept"
    assert f"grid={GRIDS} does not place them" in record.reason


class Turned(nn.Module):
    """(B, N, C) to (B, C, N)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2)


@pytest.mark.parametrize("gate", [False, True])
def test_every_branch_of_a_block_runs_on_the_merged_tokens_of_all_images(gate: bool) -> None:
    torch.manual_seed(0)
    model, image, text = Blocks(gate=gate).eval(), torch.randn(2, TOTAL, C), torch.randn(2, 5, C)
    model.embed = Turned()  # type: ignore[assignment]
    module = capture(model, {"image": image, "text": text}).module
    result = rewrite(module, normalize(bgx.LaplacianMerge(0.5, scope="block")), GRIDS)
    assert [record.action for record in result.records] == ["merge", "kept", "merge", "kept"]
    bounds = [0, *accumulate(map(math.prod, GRIDS))]

    def plan(metric: Tensor) -> oracle.Plan:
        each = [laplacian(metric[:, a:b], grid) for (a, b), grid in zip(pairwise(bounds), GRIDS, strict=True)]
        return oracle.one_behind_another(each)

    with torch.no_grad():
        output, dense = result.module(image, text)[0], model(image, text)
        model.planned = plan
        expected = model(image, text)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert (expected - dense).norm() > 1e-2 * dense.norm()


# --------------------------------------------------------------------------------------- around the passes


@pytest.mark.parametrize("scope", ["attention", "block"])
def test_a_ratio_for_each_attention(scope: str) -> None:
    case = IMAGES[0]
    report = optimize(case, bgx.LaplacianMerge((0.25, 0.5, 0.75), scope=scope)).report
    assert [site.tokens_after for site in report.sites] == [24 - 6 + 48 - 12, 12 + 24, 6 + 12]
    assert "tokens 72 -> 36, grid 4x6+6x8" in str(report)
    assert report.to_dict()["sites"][0]["grid"] == ((4, 6), (6, 8))


@torch.no_grad()
def test_images_of_as_many_tokens_never_share_a_graph() -> None:
    case = IMAGES[0]
    model, inputs = case.build(), case.inputs()
    fast = bgx.optimize(model, method=bgx.LaplacianMerge(0.5), backend="eager")
    swapped = inputs | {"img_ids": ids(KONTEXT[::-1], (0, 1), 3)}
    outputs = [fast(**each).sample for each in (inputs, swapped, inputs, swapped)]
    assert len(fast._graphs) == 2
    assert fast.report.sites[0].grid == KONTEXT[::-1]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    given = bgx.optimize(model, method=bgx.LaplacianMerge(0.5), backend="eager", grid=[list(grid) for grid in KONTEXT])
    assert torch.equal(given(**inputs).sample, outputs[0])


@pytest.mark.parametrize("grid", [(12, 6), (6, 12), (4, 6), [(6, 8), (4, 6)]])
@pytest.mark.parametrize("case", [IMAGES[0], IMAGES[2]], ids=["img_ids", "img_shapes"])
def test_a_grid_that_fits_by_accident_is_refused(case: Case, grid: Any) -> None:
    model, inputs = case.build(), case.inputs()
    fast = bgx.optimize(model, method=bgx.KVDownsample(2), backend="eager", grid=grid)
    with pytest.raises(bgx.GridError, match=r"contradicts the inputs, whose grid is \(\(4, 6\), \(6, 8\)\)"):
        fast(**inputs)


@pytest.mark.slow
@torch.no_grad()
def test_the_backend_takes_a_grid_for_each_image() -> None:
    """Dynamo makes constants of img_shapes; it does not look at the values of img_ids."""
    case = IMAGES[2]
    model, inputs = case.build(), case.inputs()

    def compiled(grid: Any) -> Any:
        torch._dynamo.reset()
        options = {"method": bgx.LaplacianMerge(0.5), "grid": grid, "backend": "eager"}
        return torch.compile(model, backend="bigain", dynamic=False, options=options)

    expected = bgx.optimize(model, method=bgx.LaplacianMerge(0.5), backend="eager")(**inputs).sample
    torch.testing.assert_close(compiled(KONTEXT)(**inputs).sample, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(BackendCompilerFailed, match=r"grid=\(12, 6\) contradicts the inputs, whose grid is"):
        compiled((12, 6))(**inputs)


@pytest.mark.slow
@torch.no_grad()
def test_under_inductor() -> None:
    torch.manual_seed(0)
    toy, image = Images().eval(), torch.randn(2, TOTAL, C)
    methods = (bgx.LaplacianMerge(0.5, unmerge="blend"), bgx.KVDownsample(2))
    fast, eager = (bgx.optimize(toy, method=methods, grid=GRIDS, backend=name) for name in ("inductor", "eager"))
    torch.testing.assert_close(fast(image), eager(image), rtol=1e-4, atol=1e-5)
    assert fast.report.sites[0].action == "merge+kv"


@pytest.mark.slow
@each(tuple(case for case in IMAGES if case.name in ("flux-kontext", "qwen-image-edit")))
def test_denoisers_under_inductor(case: Case) -> None:
    torch.compiler.reset()
    expected = tensors(optimize(case, BOTH.method)(**load(case).inputs))
    fast = optimize(case, BOTH.method, backend="inductor")
    assert relative(tensors(fast(**load(case).inputs)), expected) <= COMPILED_TOLERANCE


@pytest.mark.parametrize("method", ["bigain-tm:0.5+bigain-td:2", "bigain-tm:0.1:proportional=true:unmerge=blend"])
def test_onnx_runtime_agrees_with_torch(method: str, tmp_path: Path) -> None:
    """At a ratio of 0.1 the image of four tokens merges none."""
    torch.manual_seed(0)
    toy, inputs = Images().eval(), {"image": torch.randn(2, TOTAL, C)}
    path = tmp_path / "images.onnx"
    record = bgx.export_onnx(toy, (), path, kwargs=inputs, method=parse(method), grid=GRIDS)
    assert record.deviations[0].relative_l2 <= 1e-4
    assert record.graphs[0].report.sites[0].grid == GRIDS
    assert record.operators["bigain::LaplacianMergePlan"] == len(GRIDS)
    assert record.operators["bigain::Merge"] == 1
    deployed = bgx.OrtDenoiser(path)
    assert deployed.interface.grid == GRIDS
    eager = bgx.optimize(toy, method=parse(method), backend="eager", grid=GRIDS)
    torch.testing.assert_close(deployed(**inputs), eager(**inputs), rtol=1e-3, atol=1e-4)
