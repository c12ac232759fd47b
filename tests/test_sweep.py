"""The sweep over shapes: one row each, written at once, not measured twice; the table says where it loses."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bigain_fx.bench import sweep, timing
from bigain_fx.bench.sweep import FLOOR, SHAPES, Row, Shape


def test_there_are_forty_shapes() -> None:
    assert len(set(SHAPES)) == 40


def test_a_row_is_measured_once_and_the_table_has_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(shapes: int) -> None:
        sweep.main(["--out", str(tmp_path), "--rounds", "3", "--backend", "eager", "--shapes", str(shapes)])

    with pytest.raises(SystemExit, match="0"):
        run(1)
    (row,) = json.loads((tmp_path / "sweep-cpu.json").read_text())["rows"]
    assert row["shape"] == asdict(SHAPES[0])
    assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
    assert row["holds"] == (row["ratio"]["high"] >= FLOOR)
    losing = Row(SHAPES[1], 2, 1.0, 2.0, timing.Estimate(0.5, 0.45, 0.55))
    monkeypatch.setattr(sweep, "measure", lambda shape, *_: losing if shape == SHAPES[1] else pytest.fail("twice"))
    with pytest.raises(SystemExit, match="0"):
        run(2)
    text = (tmp_path / "sweep-cpu.md").read_text()
    assert "at 1 of 2 shapes" in text if row["holds"] else "at 0 of 2 shapes" in text
    line = f"| 8x8 | 64 | `{SHAPES[1].method}` | 2 of 2 | 1.00 | 2.00 | 0.500 [0.450, 0.550] **slower** |"
    assert line in text


def test_the_figure_shows_the_ratios() -> None:
    rows = [
        asdict(Row(Shape(side, 64, "bigain-td:2"), 2, 1.0, 1.0, timing.Estimate(ratio, ratio - 0.1, ratio + 0.2)))
        for side, ratio in ((8, 1.0), (16, 1.5))
    ]
    merging, downsampling = sweep.draw(rows).axes
    lines = {bar.get_label(): bar for bar in downsampling.containers}
    points, _, (bars,) = lines["64 channels"].lines  # type: ignore[attr-defined]
    assert (list(points.get_xdata()), list(points.get_ydata())) == ([64, 256], [1.0, 1.5])
    assert [[y for _, y in segment] for segment in bars.get_segments()] == [
        pytest.approx([0.9, 1.2]),
        pytest.approx([1.4, 1.7]),
    ]
    assert not any(len(bar.lines[0].get_xdata()) for bar in merging.containers)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("high", "holds"), [(0.98, False), (0.99, True), (1.5, True)])
def test_what_holds(high: float, holds: bool) -> None:
    assert Row(Shape(8, 64, "tome:0.7"), 1, 1.0, 1.0, timing.Estimate(0.9, 0.8, high)).holds == holds
