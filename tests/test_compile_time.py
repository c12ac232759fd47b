"""The benchmark of compile times: layouts of whole models, fresh processes, ratios within a round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bigain_fx.bench import BenchError, compile_time
from bigain_fx.models import load
from bigain_fx.passes.methods import LaplacianMerge

SECONDS = {
    "dense": [(1.0, 0.5, 10.0), (1.0, 0.5, 20.0)],
    "bigain-tm:0.7:window=16": [(1.0, 1.0, 11.0), (1.0, 1.0, 25.0)],
    "bigain-tm:0.7:block:window=16": [(1.0, 1.0, 9.0), (1.0, 1.0, 19.0)],
    "bigain-tm:0.7:window=16+bigain-td:2": [(1.0, 2.0, 18.0), (1.0, 2.0, 18.0)],
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Processes that take the seconds above; the methods, in the order in which they are measured."""
    order: list[str] = []

    def process(name: str, method: str, depth: int) -> list[float]:
        order.append(method)
        assert depth == 50 * (order.count(method) - 1)
        return [0 if method == "dense" else 57, 3000, *SECONDS[method][order.count(method) - 1]]

    monkeypatch.setattr(compile_time, "_process", process)
    return order


def test_methods_take_turns_and_are_compared_within_a_round(fake: list[str]) -> None:
    told: list[str] = []
    rows = compile_time.run("flux", 2, told.append)
    assert fake == [*SECONDS, *SECONDS]
    assert len(told) == 8
    assert told[1] == "flux, round 1 of 2, bigain-tm:0.7:window=16: capture 1.0 s, passes 1.00 s, first call 11.0 s"
    assert [row.method for row in rows] == list(SECONDS)
    # The passes count for us; what dense takes to be matched does not count for it.
    assert [row.ratio for row in rows] == [None, *map(pytest.approx, (1.25, 1.0, 1.5))]
    assert [row.first_call_s for row in rows] == [15.0, 18.0, 14.0, 18.0]
    assert [row.rewritten for row in rows] == [0, 57, 57, 57]


def test_two_files_are_left(fake: list[str], tmp_path: Path) -> None:
    app = compile_time.typer.Typer()
    app.command()(compile_time.main)
    done = CliRunner().invoke(app, ["mnist-dit", "--rounds", "1", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "compile-mnist-dit.json").read_text())
    assert [row["method"] for row in found["rows"]] == list(SECONDS)
    assert found["machine"]
    assert found["versions"]["torch"] == torch.__version__
    text = (tmp_path / "compile-mnist-dit.md").read_text()
    assert "| bigain-tm:0.7:window=16 | 57 | 3000 | 1.0 | 1.00 | 11.0 | 1.20 |" in text
    assert "narrow" not in text


@pytest.mark.parametrize("name", compile_time.NARROW)
def test_a_narrow_layout_has_every_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def meta(name: str) -> Any:
        with torch.device("meta"):
            return compile_time.narrow(name)

    narrow, whole = meta(name).model, load(name, batch=1, device="meta").model
    assert [module for module, _ in narrow.named_modules()] == [module for module, _ in whole.named_modules()]
    assert sum(parameter.numel() for parameter in narrow.parameters()) < 2e8


def test_every_grid_is_merged() -> None:
    (merge,) = compile_time.everywhere("bigain-tm:0.7:block")
    assert merge == LaplacianMerge(0.7, levels=None, scope="block")


def test_a_process_that_fails_is_named() -> None:
    with pytest.raises(BenchError, match=r"dense of nothing fails: .*model='nothing' is neither"):
        compile_time._process("nothing", "dense")


@pytest.mark.slow
def test_a_process_compiles() -> None:
    changed, nodes, *seconds = compile_time._process("mnist-dit", "bigain-tm:0.7")
    assert changed > 0
    assert nodes > 100
    assert all(second > 0 for second in seconds)
