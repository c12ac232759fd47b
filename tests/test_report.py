"""What is logged of a capture: its headline, and at WARNING, with the reason, where a method changed nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bigain_fx as bgx
from bigain_fx.passes.methods import Method
from bigain_fx.passes.pipeline import SiteRecord
from bigain_fx.report import Report
from tests import toys

IMAGE = {"image": toys.image()}
TOO_LARGE = bgx.LaplacianMerge(0.5, cell=(8, 8))
SAYS = "bigain-tm:0.5:cell=8x8 changed nothing: cell (8, 8) is larger than the grid (4, 6) (1 of 1)"


def optimize(model: nn.Module, method: Any, folder: Path) -> Report:
    return bgx.optimize(model, (), IMAGE, method=method, backend="eager").report


def dynamo(model: nn.Module, method: Any, folder: Path) -> Report:
    torch._dynamo.reset()
    options = {"method": method, "backend": "eager"}
    with torch.no_grad():
        torch.compile(model, backend="bigain", dynamic=False, options=options)(**IMAGE)
    return bgx.inspect(model, (), IMAGE, method=method)


def onnx(model: nn.Module, method: Any, folder: Path) -> Report:
    return bgx.export_onnx(model, (), folder / "toy.onnx", kwargs=IMAGE, method=method, verify=False).graphs[0].report


def package(model: nn.Module, method: Any, folder: Path) -> Report:
    return bgx.export_package(model, (), folder / "toy.pt2", kwargs=IMAGE, method=method)


WAYS: list[Callable[[nn.Module, Any, Path], Report]] = [optimize, dynamo, onnx, package]


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[str, str]]]:
    caplog.set_level(logging.INFO, "bigain_fx")
    return lambda: [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "bigain_fx"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_method_that_changed_nothing_says_so(
    way: Callable[[nn.Module, Any, Path], Report], logged: Callable[[], list[tuple[str, str]]], tmp_path: Path
) -> None:
    report = way(toys.Separate().eval(), TOO_LARGE, tmp_path)
    assert report.unchanged == SAYS
    assert logged() == [("WARNING", f"{report.headline}; {SAYS}")]


@pytest.mark.parametrize("method", [(), None, bgx.LaplacianMerge(0.5), (bgx.ToMe(0.5), bgx.ToDo())])
def test_what_changed_something_or_was_to_change_nothing_is_no_warning(
    method: Any, logged: Callable[[], list[tuple[str, str]]], tmp_path: Path
) -> None:
    report = optimize(toys.Separate().eval(), method, tmp_path)
    assert report.unchanged is None
    assert logged() == [("INFO", report.headline)]


def test_one_of_two_methods_that_changed_nothing_says_so(
    logged: Callable[[], list[tuple[str, str]]], tmp_path: Path
) -> None:
    report = optimize(toys.Separate().eval(), (TOO_LARGE, bgx.ToDo()), tmp_path)
    assert len(report.rewritten) == 1
    assert logged() == [("WARNING", f"{report.headline}; {SAYS}")]


def test_inspect_gives_the_report_and_says_nothing(logged: Callable[[], list[tuple[str, str]]]) -> None:
    assert bgx.inspect(toys.Separate().eval(), (), IMAGE, method=TOO_LARGE).unchanged == SAYS
    assert logged() == []


def record(reason: str, level: int | None = None, action: str = "kept") -> SiteRecord:
    return SiteRecord("attn", action, reason, 24, 24, None if level is None else (4, 6), level, 0, 0)


CROSS, LOST = "cross-attention (at scaled_dot_product_attention_3)", "no grid: pass grid= (at layer_norm{})"


@pytest.mark.parametrize(
    ("methods", "sites", "said"),
    [
        ((bgx.ToMe(0.0),), [record("ratio 0", 1), record("level 2", 2)], "tome:0 changed nothing: ratio 0 (1 of 1)"),
        (
            (bgx.ToMe(0.0, levels=None), bgx.ToDo()),
            [record("ratio 0", 1, "kv"), record("a", 2), record("ratio 0", 3), record(CROSS)],
            "tome:0:levels=all changed nothing: ratio 0 (2 of 3), a (1 of 3)",
        ),
        (
            (bgx.ToDo(), bgx.ToMe(0.5)),
            [record(CROSS), record(LOST.format("_2")), record(LOST.format("_7"))],
            "todo:2 + tome:0.5 changed nothing: no grid: pass grid= (2 of 3), cross-attention (1 of 3)",
        ),
        ((bgx.ToDo(),), [], "todo:2 changed nothing: there is no attention"),
        ((bgx.ToDo(),), [record("", 1, "kv"), record(CROSS)], None),
        (
            (bgx.ToDo(),),
            [record(text, 1) for text in "abcdb"],
            "todo:2 changed nothing: b (2 of 5), a (1 of 5), c (1 of 5)",
        ),
    ],
)  # fmt: skip
def test_the_most_common_reasons_of_what_a_method_is_for(
    methods: tuple[Method, ...], sites: list[SiteRecord], said: str | None
) -> None:
    assert Report("Toy", methods, tuple(sites), 0, 0).unchanged == said
