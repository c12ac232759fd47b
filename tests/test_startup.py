"""The startup benchmark: fresh processes, real files, one output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bigain_fx.bench import BenchError, startup
from tests.test_optimize import unet


@pytest.mark.slow
def test_every_way_gives_the_same_output(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path / "model")
    rows = startup.run(str(tmp_path / "model"), "bigain-tm:0.5", None, 2, 1, tmp_path)
    assert [row.name for row in rows] == list(startup.ROWS)
    assert all(row.relative_l2 < 1e-5 for row in rows)
    assert all(len(row.runs) == 1 and row.total_s == pytest.approx(sum(row.runs[0])) for row in rows)
    compiled, _, package, onnx = rows
    assert compiled.first_call_s > package.first_call_s
    assert compiled.first_call_s > onnx.first_call_s


def test_a_process_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"a process for package fails: .*inputs.pt"):
        startup._process("package", "mnist-dit", "dense", None, 2, tmp_path, tmp_path / "cache")


def test_two_files_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = startup.Startup("export_package", 1.0, 2.0, 3.0, 6.0, 1e-7, [[1.0, 2.0, 3.0]])
    monkeypatch.setattr(startup, "run", lambda *_: [row])
    app = startup.typer.Typer()
    app.command()(startup.main)
    assert CliRunner().invoke(app, ["mnist-dit", "--out", str(tmp_path)]).exit_code == 0
    assert json.loads((tmp_path / "startup-mnist-dit.json").read_text())["rows"][0]["total_s"] == 6
    text = (tmp_path / "startup-mnist-dit.md").read_text()
    assert "| export_package | 1.00 | 2.00 | 3.00 | 6.00 | 1.0e-07 |" in text
