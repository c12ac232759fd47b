"""Random small transformer graphs: rewriting is refused, or equal to an oracle put in by hand (`tests.fuzz`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from tests import fuzz, fuzz_cases, oracle

BATCH = 50
QUICK = range(25)


def check(seeds: range) -> list[fuzz.Outcome]:
    """The outcomes of ``seeds``; fails with every case that does."""
    outcomes = [fuzz.check(seed) for seed in seeds]
    failed = [str(outcome) for outcome in outcomes if outcome.problems]
    assert not failed, f"{len(failed)} of {len(outcomes)} cases failed:\n\n" + "\n\n".join(failed)
    return outcomes


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("first", [pytest.param(first, id=f"seeds-{first}-{first + 4}") for first in QUICK[::5]])
def test_random_graphs_are_refused_or_equal_to_the_oracle(first: int) -> None:
    check(range(first, first + 5))


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", [pytest.param(first, id=f"seeds-{first}-{first + BATCH - 1}") for first in range(0, 1000, BATCH)]
)
def test_a_thousand_random_graphs_are_refused_or_equal_to_the_oracle(first: int) -> None:
    outcomes = check(range(first, first + BATCH))
    words = [outcome.word for outcome in outcomes]
    assert words.count("rewritten") >= 0.5 * BATCH, words
    assert words.count("skipped") <= 0.06 * BATCH, words
    assert all(outcome.change > 1e-3 for outcome in outcomes if outcome.word == "rewritten")


def test_a_seed_is_a_case() -> None:
    assert fuzz.draw(7) == fuzz.draw(7)
    assert len({str(dataclasses.replace(fuzz.draw(seed), seed=0)) for seed in range(200)}) == 200
    drawn = [fuzz.draw(seed) for seed in range(1000)]
    for name, values in fuzz_cases.OPTIONS.items():
        assert {c[name] for case in drawn for c in case.design.blocks} == set(values), name


@pytest.mark.parametrize("operator", ["merge", "kv_downsample"])
def test_another_operator_is_noticed(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(oracle, operator)
    monkeypatch.setattr(oracle, operator, lambda x, *rest: right(x, *rest) * 1.001)
    kind = operator.split("_")[0]
    seeds = [seed for seed in QUICK if any(method.kind == kind for method in fuzz.draw(seed).methods)]
    outcome = next(found for found in map(fuzz.check, seeds) if found.problems)
    assert "from the oracle's" in outcome.problems[0]
    assert f"seed {outcome.case.seed}:" in str(outcome)


def test_refusing_everything_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fuzz.rewrite
    monkeypatch.setattr(fuzz, "rewrite", lambda module, methods, grid: right(module, (), grid))
    problems = [problem for seed in range(4) for problem in fuzz.check(seed).problems]
    assert any("must have" in problem for problem in problems), problems
