"""Destination rules: the ones there are, by the naive operators, and one that is added as a user would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bigain_fx as bgx
from bigain_fx import regions
from bigain_fx.passes import destinations, ops
from bigain_fx.passes.destinations import RULES, Laplacian, Random, Rows, operator_of
from bigain_fx.passes.grammar import parse
from bigain_fx.passes.ops import cell_tokens
from tests import oracle
from tests.test_ops import LAYOUTS, Pair, one_hot, zeros
from tests.test_scope import GRID, MERGED, RATIO, run
from tests.toys import H, Toy, W

Make = Callable[[int, int, int], Tensor]


@bgx.destination_rule
@dataclass(frozen=True)
class Loudest(bgx.Destinations):
    """The token of each cell whose metric is longest, or the n-th longest."""

    name = "test_loudest"
    after: int = 0
    upside_down: bool = False

    def positions(self, metric: Tensor, grid: Any, cell: Any) -> Tensor:
        length = metric.float().norm(dim=-1)[:, cell_tokens(grid, cell, metric.device)]
        return length.argsort(-1, descending=not self.upside_down)[:, :, self.after]


def loudest(metric: Tensor, after: int = 0) -> list[list[int]]:
    chosen = []
    for row in metric.norm(dim=-1).tolist():
        cells = [[row[token] for token in tokens] for tokens in oracle.cell_tokens(GRID, (2, 2))]
        chosen.append([cell.index(sorted(cell, reverse=True)[after]) for cell in cells])
    return chosen


def by_hand(toy: Toy, image: Tensor, after: int) -> Tensor:
    """What ``toy`` gives where the loudest tokens take the others in."""
    plans: list[oracle.Plan] = []

    def squeeze(x: Tensor, residual: Tensor) -> Tensor:
        chosen = loudest(residual, after)
        each = [oracle.merge_plan(residual[b : b + 1], GRID, (2, 2), MERGED, chosen[b]) for b in range(len(x))]
        plans.append(oracle.Plan(*(torch.cat([getattr(plan, name) for plan in each]) for name in ("assign", "rep"))))
        return oracle.merge(x, plans[0])

    toy.squeeze, toy.spread = squeeze, lambda y: oracle.unmerge(y, plans[0])
    with torch.no_grad():
        return toy(image)


@pytest.mark.parametrize(("after", "backend"), [(0, "eager"), (2, "eager"), (2, "aot_eager")])
def test_a_rule_of_ones_own_is_used(after: int, backend: str) -> None:
    torch.manual_seed(0)
    toy, image = Toy().eval(), torch.randn(2, 3, H, W)
    (method,) = parse(f"merge:{RATIO}:destinations=test_loudest" + (f"(after={after})" if after else ""))
    assert method == bgx.Merge(RATIO, destinations=Loudest(after))
    fast = bgx.optimize(toy, (image,), method=method, backend=backend)
    assert [site.action for site in fast.report.sites] == ["merge"]
    paper = bgx.optimize(toy, (image,), method=bgx.LaplacianMerge(RATIO), backend="eager")
    with torch.no_grad():
        found, other = fast(image), paper(image)
    torch.testing.assert_close(found, by_hand(toy, image, after), rtol=1e-4, atol=1e-5)
    assert (found - other).norm() > 1e-3 * other.norm()


@pytest.mark.parametrize("rule", [Loudest(1), Loudest(upside_down=True), Rows(), Random(4), Laplacian()], ids=str)
def test_every_rule_has_an_onnx_form(rule: bgx.Destinations, tmp_path: Path) -> None:
    """The export compares the file with torch, plans included; a rule's operators are torch's own in it."""
    torch.manual_seed(0)
    toy, image = Toy().eval(), torch.randn(2, 3, H, W)
    method = bgx.Merge(RATIO, destinations=rule)
    record = bgx.export_onnx(toy, (image,), tmp_path / "toy.onnx", method=method)
    assert record.graphs[0].plan_agreement == 1
    plan = "LaplacianMergePlan" if rule == Laplacian() else "MergePlan"
    assert record.operators[f"bigain::{plan}"] == 1


@pytest.mark.parametrize("rule", [Loudest(1, True), Rows(), Laplacian(), bgx.ToMe(seed=3).destinations], ids=str)
def test_the_operator_of_a_rule(rule: bgx.Destinations) -> None:
    metric, operator = torch.randn(2, 35, 8), operator_of(type(rule))
    values = [getattr(rule, name) for name in type(rule).__dataclass_fields__ if name != "name"]
    assert torch.equal(operator(metric, [5, 7], [2, 2], *values), rule.positions(metric, (5, 7), (2, 2)))
    torch.library.opcheck(operator, (metric, [5, 7], [2, 2], *values))
    assert destinations.rule_of(operator) is type(rule)


def test_methods_name_their_rules() -> None:
    assert bgx.LaplacianMerge().destinations == bgx.Merge().destinations == Laplacian()
    assert bgx.LaplacianMerge(cell_layout="row").destinations == Rows()
    assert bgx.ToMe(seed=3).destinations == Random(3)
    assert {Random(3), Random(), Random(0)} == {Random(), Random(3)}


@pytest.mark.parametrize(
    ("text", "rule"),
    [("laplacian", Laplacian()), ("row", Rows()), ("random", Random()), ("random(seed=-3)", Random(-3)),
     ("test_loudest(after=1;upside_down=true)", Loudest(1, True)), ("test_loudest(upside_down=false)", Loudest())],
)  # fmt: skip
def test_a_rule_in_text(text: str, rule: bgx.Destinations) -> None:
    (method,) = parse(f"merge:0.5:destinations={text}:scope=block")
    assert method == bgx.Merge(0.5, scope="block", destinations=rule)
    assert parse(str(method)) == (method,)


@pytest.mark.parametrize("text", ["centre", "", "random(seeds=1)", "random(", "random(seed)", "row(seed=1)"])
def test_no_such_rule(text: str) -> None:
    with pytest.raises(bgx.MethodError, match=r"must be one of laplacian, random, row|no valid number"):
        parse(f"merge:0.5:destinations={text}")


@pytest.mark.parametrize("value", [None, "random", Random, bgx.Destinations()])
def test_what_is_no_rule(value: Any) -> None:
    with pytest.raises(bgx.MethodError, match=r"^destinations=.* must be a registered rule; there are laplacian, rand"):
        bgx.Merge(destinations=value)


def rule(name: Any, field: type = int, frozen: bool = True, whole: bool = True) -> Any:
    """A rule that was not registered; it has ``positions`` if it is ``whole``."""
    given = {"__annotations__": {"field": field}, "field": 0, "name": name}
    made: Any = type("Made", (bgx.Destinations,), given | ({"positions": lambda *_: None} if whole else {}))
    return dataclass(frozen=frozen)(made)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "rule=5 must be a frozen dataclass derived from Destinations"),
        (bgx.Destinations, "must be a frozen dataclass"),
        (rule("odd", frozen=False), "rule=Made must be frozen"),
        (rule("odd", whole=False), "rule=Made has no positions"),
        (rule("not-a-word"), "name='not-a-word' of Made must be a word of small letters"),
        (rule(None), "name=None of Made must be a word"),
        (rule("odd", field=list), "Made.field is of type list; a field must be one of int, float, str, bool"),
        (rule("row"), "name='row' of Made is that of bigain_fx.passes.destinations.rows.Rows"),
    ],
)
def test_what_cannot_be_registered(given: Any, message: str) -> None:
    known = dict(RULES)
    with pytest.raises(bgx.MethodError, match=message):
        bgx.destination_rule(given)
    assert known == RULES


def test_a_rule_may_be_registered_again() -> None:
    assert bgx.destination_rule(Loudest) is Loudest


def test_code_is_cached_under_the_rules_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that is written in a notebook has no file: what it does is read from its code."""
    digests = [regions._source()]
    for positions in (Loudest.positions, Rows.positions):
        typed: Any = type("Typed", (Rows,), {"__module__": "a_notebook", "positions": positions})
        monkeypatch.setitem(RULES, "typed", typed)
        digests.append(regions._source())
    assert len({*digests}) == 3


@bgx.destination_rule
@dataclass(frozen=True)
class Wrong(bgx.Destinations):
    """One position too few, or numbers with a fraction."""

    name = "test_wrong"
    fraction: bool = False

    def positions(self, metric: Tensor, grid: Any, cell: Any) -> Tensor:
        return torch.zeros(6) if self.fraction else torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("fraction", "told"), [(False, r"\(5,\) and dtype torch.int64"), (True, r"\(6,\) and dtype torch.float32")]
)
def test_positions_of_another_shape_are_refused(fraction: bool, told: str) -> None:
    with pytest.raises(bgx.MethodError, match=rf"{told}; they must be \(6,\) or \(2, 6\) int64"):
        run(Toy(), bgx.Merge(RATIO, destinations=Wrong(fraction)), torch.randn(2, 3, H, W))


# ------------------------------------------------------------------------------------- the rules there are


@pytest.mark.parametrize(("grid", "cell"), LAYOUTS)
@pytest.mark.parametrize("make", [torch.randn, zeros, one_hot])
def test_the_smoothest_of_each_cell(make: Make, grid: Pair, cell: Pair) -> None:
    metric = make(2, grid[0] * grid[1], 8)
    cells = oracle.cell_tokens(grid, cell)
    chosen = oracle.destinations(oracle.laplacian_score(metric, grid), grid, cell)
    expected = [[tokens.index(token) for tokens, token in zip(cells, row, strict=True)] for row in chosen]
    assert Laplacian().positions(metric, grid, cell).tolist() == expected


@pytest.mark.parametrize(("grid", "cell"), LAYOUTS)
def test_complete_cells_and_random_positions(grid: Pair, cell: Pair) -> None:
    assert tuple(ops.complete_cells(grid, cell)) == (grid[0] // cell[0], grid[1] // cell[1])
    position = Random(3).positions(None, grid, cell)
    assert position.dtype == torch.int64
    assert position.tolist() == oracle.random_positions(grid, cell, 3)
    assert int(position.min()) >= 0
    assert int(position.max()) < cell[0] * cell[1]
    before = torch.random.get_rng_state()
    assert torch.equal(position, Random(3).positions(None, grid, cell))
    assert torch.equal(before, torch.random.get_rng_state()), "the draw must not move the global generator"


def test_random_positions_follow_the_seed() -> None:
    draws = [Random(seed).positions(None, (32, 32), (2, 2)) for seed in (0, 1)]
    assert not torch.equal(*draws)
    assert set(draws[0].tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(("grid", "cell"), LAYOUTS)
@pytest.mark.parametrize("make", [torch.randn, zeros, one_hot])
def test_row_positions_are_those_of_runs(make: Make, grid: Pair, cell: Pair) -> None:
    metric = make(2, grid[0] * grid[1], 8)
    expected = oracle.row_positions(oracle.laplacian_score(metric, grid), grid, cell)
    assert Rows().positions(metric, grid, cell).tolist() == expected


def test_row_positions_of_a_band_worked_by_hand() -> None:
    """Tokens 0 to 3 and 4 to 7 of a 2 x 4 grid are the runs; the lowest scores are at offsets 3 and 1 of them.

    So tokens 5 and 3 are the destinations of the cells (0, 1, 4, 5) and (2, 3, 6, 7).
    """
    metric = torch.tensor([[5.0, -9, 0, 0], [9, 0, 0, 5]]).view(1, 8, 1)
    assert oracle.laplacian_score(metric, (2, 4)).tolist() == [[20, 41, 9, 5, 31, 0, 5, 20]]
    assert Rows().positions(metric, (2, 4), (2, 2)).tolist() == [[3, 1]]
