"""The demo, on its own wiring: random weights, tiny numbers, no compiler."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import bigain_fx as bgx
from bigain_fx import demo, demo_report, embedded
from bigain_fx.pictures import as_text
from bigain_fx.stopwatch import interleaved
from tests.test_sample import _one_thread, tiny  # noqa: F401

PICTURES = {"mnist-dit-digits.png", "accuracy-and-time.png"}
TINY = demo.Budget(
    models=("mnist-dit",), exported=("mnist-dit",), batch=10, rows=1, steps=1, images=10, pairs=1, rounds=2
)


def untrained(name: str) -> embedded.ClassConditional:
    return tiny(size=32, classes=10)


@pytest.fixture
def tiny_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "QUICK", TINY)
    monkeypatch.setattr(embedded, "load", untrained)


@pytest.mark.usefixtures("tiny_demo")
def test_leaves_a_report_whose_numbers_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "demo"
    returned = demo.run(out, quick=True, backend="eager")
    assert {path.name for path in out.iterdir()} == PICTURES | {"report.md", "report.json"}
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)
    summary = json.loads((out / "report.json").read_text())
    assert summary == json.loads(json.dumps(returned))
    text = (out / "report.md").read_text()
    (model,) = summary["models"]
    assert [row["method"] for row in model["variants"]] == list(demo.METHODS)
    assert summary["labels"] == list(range(10))
    for row in model["variants"]:
        hits = sum(a == b for a, b in zip(row["predicted"], summary["labels"], strict=True))
        assert row["correct"] == hits
        assert row["accuracy"] == hits / 10
        assert len(row["call_seconds"]) == TINY.rounds
        assert "| " + " | ".join(demo_report.cells(row, 10)) + " |" in text
        assert row["sites_markdown"] in text
    dense, merged, downsampled = model["variants"]
    assert dense["output_db"] is None
    assert (dense["same_as_dense"], dense["speedup"]) == (10, 1)
    assert merged["output_db"] > 0
    assert downsampled["output_db"] > 0
    assert [site["action"] for site in merged["sites"]["sites"]] == ["merge"]
    assert [site["action"] for site in downsampled["sites"]["sites"]] == ["kv"]
    assert [row["method"] for row in model["onnx"]] == ["dense", "bigain-tm:0.7"]
    assert model["onnx"][0]["speedup"] == 1
    for row in model["onnx"]:
        assert row["output_db"] > 80
        assert len(row["call_seconds"]) == TINY.rounds
        assert "| " + " | ".join(demo_report.onnx_cells(row)) + " |" in text
    assert "a quick run without mnist-unet" in text
    assert "bigain-fx bench sd2" in text
    assert all(f"]({name})" in text for name in PICTURES)
    printed = capsys.readouterr().out
    assert "report.md" in printed
    # Without a terminal a line says what is being done, and the first digits come before anything is compiled.
    stages = ["first digits", "█", "trace ...", "export to ONNX ...", "time ...", "generate ...", "classify ..."]
    places = [printed.index(stage) for stage in stages]
    assert places == sorted(places)


def test_every_variant_starts_from_the_same_noise_and_pairs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And without the packages for ONNX, a line says so."""
    monkeypatch.setattr(demo, "onnx_missing", lambda: "onnx is not installed")
    monkeypatch.setattr(demo, "QUICK", TINY)
    monkeypatch.setattr(demo, "METHODS", ("dense", "dense"))
    bundle = untrained("mnist-dit")
    monkeypatch.setattr(embedded, "load", lambda name: bundle)
    (model,) = demo.run(tmp_path, quick=True, backend="eager")["models"]
    first, second = model["variants"]
    assert model["onnx"] == []
    assert "No ONNX rows: onnx is not installed." in (tmp_path / "report.md").read_text()
    assert first["predicted"] == second["predicted"]
    assert (second["images_db"], second["output_db"]) == (None, None)


def test_a_picture_as_text() -> None:
    digit = torch.full((1, 1, 8, 4), -1.0)
    digit[0, 0, :2, :2], digit[0, 0, 2:6, 2:], digit[0, 0, 6:] = 1.0, 1.0, 1.0
    assert as_text(digit.expand(4, 1, 8, 4), across=2) == "\n".join(["▀▄▀▄", "▄█▄█"] * 2)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_demo")
def test_a_failed_run_leaves_the_last_one_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.md").write_text("earlier")

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_report, "markdown", fails)
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path, quick=True, backend="eager")
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
    assert (tmp_path / "report.md").read_text() == "earlier"


@pytest.mark.parametrize("below", ["", "folder"])
def test_refuses_an_out_that_is_or_lies_under_a_file(tmp_path: Path, below: str) -> None:
    file = tmp_path / "taken"
    file.write_text("kept")
    with pytest.raises(bgx.InputError, match=r"out=.*name a(nother)? folder"):
        demo.run(file / below, quick=True, backend="eager")
    assert file.read_text() == "kept"


def test_without_a_compiler_one_line_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import cpp_builder

    monkeypatch.setenv("PATH", str(tmp_path))
    cpp_builder.cpp_compiler_search.cache_clear()
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(bgx.BigainError, match=r"C\+\+ compiler .*--backend eager") as caught,
    ):
        demo.run(tmp_path / "out", quick=True)
    cpp_builder.cpp_compiler_search.cache_clear()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_without_python_headers_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr("sysconfig.get_path", lambda *_, **__: str(tmp_path))
    with pytest.raises(bgx.InputError, match=r"Python\.h.*--backend eager"):
        demo.check_backend("inductor")


def test_an_unknown_backend_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(bgx.InputError, match="backend='inducter' is not known"):
        demo.run(tmp_path / "out", backend="inducter")


def test_both_budgets_fill_the_batch_and_balance_the_classes() -> None:
    for budget in (demo.FULL, demo.QUICK):
        assert budget.images % 10 == 0
        assert 20 * budget.rows % budget.batch == 0
        assert budget.images * budget.pairs * 10 % budget.batch == 0


@pytest.mark.parametrize(
    ("quartiles", "words"),
    [
        ((1.1, 1.3), "the speed of dense."),
        ((0.6, 0.8), "slower: the model is too small"),
        ((0.95, 1.05), "no clear difference: the model is too small"),
        ((0.6, 1.3), "no clear difference: the timings scatter"),
    ],
)
def test_the_verdict_is_plain_about_time(quartiles: tuple[float, float], words: str) -> None:
    said = demo_report.verdict({"method": "m", "speedup": math.prod(quartiles) ** 0.5, "speedup_quartiles": quartiles})
    assert words in said


def test_timed_calls_take_turns() -> None:
    order: list[str] = []
    seconds = interleaved([lambda: order.append("a"), lambda: order.append("b")], rounds=2)
    assert [len(found) for found in seconds] == [2, 2]
    assert "".join(order) == "ba" + "ab" + "ba"


def test_decibels() -> None:
    x = torch.randn(1000)
    noisy = demo_report.decibels(x, x + 0.1 * x, float(x.square().mean()))
    assert noisy == pytest.approx(20, abs=1e-3)
    assert demo_report.decibels(x, x, 1.0) is None
