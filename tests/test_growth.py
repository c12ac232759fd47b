"""What deciding costs by the number of tokens: exponents, table and figure against numbers by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bigain_fx.bench import growth

FOUND: dict[str, Any] = {
    "device": "cpu", "rounds": 3, "date": "today", "command": "typed", "machine": {"cpu": "Abacus"},
    "versions": {"torch": "2.13"},
    "rows": [{"tokens": 100, "seconds": [1e-3, 2e-3, 3e-3]}, {"tokens": 1000, "seconds": [1e-1, 2e-2, 3e-3]}],
}  # fmt: skip


def test_exponents_by_hand() -> None:
    assert growth.exponents(FOUND["rows"]) == [pytest.approx([2, 1, 0])]
    assert growth.exponents(FOUND["rows"][:1]) == []


def test_table_by_hand() -> None:
    lines = growth.markdown(FOUND).splitlines()
    assert "| tokens | whole grid | window=16 | window=8 |" in lines
    assert "| 100 | 1.00 | 2.00 | 3.00 |" in lines
    assert "| 1,000 | 100.00 (2.00) | 20.00 (1.00) | 3.00 (0.00) |" in lines


def test_figure_shows_the_same_numbers() -> None:
    (axes,) = growth.draw(FOUND).axes
    lines = {line.get_label(): list(map(float, line.get_ydata())) for line in axes.lines}  # type: ignore[arg-type]
    assert lines == {
        "whole grid": [1, 100], "window=16": [2, 20], "window=8": [3, 3], "linear": pytest.approx([3, 30]),
    }  # fmt: skip


def test_what_is_planned_is_what_the_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Any] = []

    def record(metric: torch.Tensor, grid: Any, cell: Any, merged: int, window: Any) -> None:
        planned.append((tuple(metric.shape), grid, cell, merged, window))

    monkeypatch.setattr(torch.ops.bigain, "merge_plan", record)
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    growth.main(tmp_path, rounds=1, sizes=2)
    assert set(planned) == {
        ((1, 1024, 320), (32, 32), (2, 2), 716, (32, 32)), ((1, 1024, 320), (32, 32), (2, 2), 716, (16, 16)),
        ((1, 1024, 320), (32, 32), (2, 2), 716, (8, 8)), ((1, 2304, 320), (48, 48), (2, 2), 1612, (48, 48)),
        ((1, 2304, 320), (48, 48), (2, 2), 1612, (16, 16)), ((1, 2304, 320), (48, 48), (2, 2), 1612, (8, 8)),
    }  # fmt: skip
    assert len(planned) == 2 * len(set(planned)), "a round to warm up, and one that counts"


def test_it_runs(tmp_path: Path) -> None:
    growth.main(tmp_path, rounds=1, backend="aot_eager", sizes=1)
    (row,) = json.loads((tmp_path / "growth-cpu.json").read_text())["rows"]
    assert row["tokens"] == 1024
    assert len(row["seconds"]) == 3
    assert min(row["seconds"]) > 0
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".md", ".png"]
