"""What the tests of the zoo do with a case: build it, capture it once, optimize it, judge its report and its output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import bigain_fx as bgx
from bigain_fx import prepare
from bigain_fx.capture import Captured, capture
from tests.zoo import Case

TOLERANCE = 1e-4
"""Of a rewritten denoiser against `by_hand.run`, relative."""
DENSE_TOLERANCE = 1e-5
"""Of a captured denoiser against itself, relative."""


@dataclass(frozen=True)
class Applied:
    """A method as a user writes it, the same for `by_hand.run`, and what the report calls it."""

    action: str
    method: Any
    by_hand: Mapping[str, Any]


MERGE = Applied("merge", bgx.LaplacianMerge(0.5, levels=None, window=None), {"ratio": 0.5})
KV = Applied("kv", bgx.KVDownsample(2, 0.9, levels=None), {"factor": 2, "alpha": 0.9})
BLEND = Applied(
    "merge", bgx.LaplacianMerge(0.5, levels=None, unmerge="blend", window=None), {"ratio": 0.5, "blend": True}
)
PROPORTIONAL = Applied(
    "merge",
    bgx.LaplacianMerge(0.5, levels=None, proportional=True, window=None),
    {"ratio": 0.5, "proportional": True},
)
BOTH = Applied("merge+kv", (MERGE.method, KV.method), {**MERGE.by_hand, **KV.by_hand})


@dataclass(frozen=True)
class Loaded:
    """A denoiser of the zoo that never ran, the inputs of one call, what it returns, and others to capture with."""

    model: nn.Module
    inputs: dict[str, Any]
    output: tuple[Tensor, ...]
    example: dict[str, Any]


LOADED: dict[str, Loaded] = {}
CAPTURES: dict[nn.Module, Captured] = {}


def load(case: Case) -> Loaded:
    """Build ``case``, and once more to run it."""
    if case.name not in LOADED:
        torch.manual_seed(0)
        model = case.build()
        torch.manual_seed(0)
        twin = case.build()
        torch.manual_seed(1)
        inputs = case.inputs()
        torch.manual_seed(2)
        with torch.no_grad():
            LOADED[case.name] = Loaded(model, inputs, tensors(twin(**inputs)), case.inputs())
    return LOADED[case.name]


def optimize(case: Case, method: Any, backend: str = "eager") -> Any:
    """``case`` optimized for its inputs; capturing takes most of the time, so one capture serves every method."""
    loaded = load(case)
    with mock.patch.object(prepare, "capture", _capture_once):
        return bgx.optimize(loaded.model, (), loaded.example, method=method, backend=backend, grid=case.grid)


def _capture_once(model: nn.Module, arguments: Mapping[str, Any], numbers: Mapping[str, Tensor]) -> Captured:
    assert not numbers
    if model not in CAPTURES:
        CAPTURES[model] = capture(model, arguments)
    return CAPTURES[model]


def tensors(output: Any) -> tuple[Tensor, ...]:
    """The tensors in what a denoiser returns."""
    leaves = pytree.tree_leaves(output.to_tuple() if hasattr(output, "to_tuple") else output)
    return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


def relative(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Relative L2 distance."""
    assert [value.shape for value in result] == [value.shape for value in expected]
    both = [torch.cat([value.double().flatten() for value in values]) for values in (result, expected)]
    assert all(value.isfinite().all() for value in both)
    return float((both[0] - both[1]).norm() / both[1].norm())


def check_original(case: Case) -> None:
    """After capture the model gives what it gives, and holds nothing of the capture."""
    loaded = load(case)
    with torch.no_grad():
        assert relative(tensors(loaded.model(**loaded.inputs)), loaded.output) <= 1e-6


def check_report(case: Case, report: bgx.Report, action: str = "kept") -> None:
    """The rewritten sites are the case's, with their grids; every other is kept for a reason that the case expects."""
    found = {record.name: (record.action, record.grid) for record in report.rewritten}
    assert found == {site.name: (action, site.grid) for site in case.sites}, report
    assert len(report.rewritten) == len(case.sites), report
    kept = [record for record in report.sites if record.action == "kept"]
    for record in kept:
        reasons = [reason for pattern, reason in case.kept.items() if fnmatchcase(record.name, pattern)]
        assert any(reason in record.reason for reason in reasons), f"{record.name}: {record.reason!r}, not {reasons}"
    for pattern in case.kept:
        assert any(fnmatchcase(record.name, pattern) for record in kept), f"no attention {pattern} in {report}"


@contextmanager
def one_thread() -> Iterator[None]:
    """Models this small lose time to a second thread, and very much of it where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
