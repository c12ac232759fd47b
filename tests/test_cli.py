"""The command line as a user meets it: tables, JSON, typos, one-line errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bigain_fx import cli
from tests.test_optimize import unet


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bigain-fx", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def folder(tmp_path: Path) -> str:
    unet().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str) -> None:
    assert run(monkeypatch, "inspect", folder, "--size", "16", "--methods", "bigain-tm:0.7,todo:2") == 0
    out = capsys.readouterr().out
    assert "bigain-tm:0.7: 3 of 8 attentions rewritten" in out
    assert "todo:2: 3 of 8 attentions rewritten" in out
    assert "256 -> 77" in out
    assert "cross-attention" in out


def test_inspect_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str) -> None:
    assert run(monkeypatch, "inspect", folder, "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["methods"] == ["bigain-tm:0.7"]
    assert len(report["sites"]) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "sd9"], "error: model='sd9' is neither a folder"),
        (["inspect", "sd2", "--methods", "bigain:0.7"], "'bigain:0.7' is not a method"),
        (["inspect", "sd2", "--methods", "tome:2"], "error: ratio=2.0 must be between 0 and 0.75"),
        (["bench", "sd2", "--device", "tpu"], "error: device='tpu' must be cpu or cuda"),
        (["inspct", "sd2"], "Did you mean 'inspect'?"),
        (["bench", "sd2", "--dtype", "float8"], "'float8' is not one of"),
    ],
)
def test_errors_are_short_and_end_with_status_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err + captured.out


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("demo", "inspect", "bench"))
