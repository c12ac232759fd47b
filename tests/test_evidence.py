"""The document of the evidence says what the result files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bigain_fx.bench import evidence, evidence_document, evidence_figures
from bigain_fx.passes.grammar import parse_list

ROOT = Path(__file__).parent.parent


def row(method: str, correct: int, gain: tuple[float, float, float] | None = None, **changed: Any) -> dict[str, Any]:
    low, high = correct / 100 - 0.1, correct / 100 + 0.1
    mean, gain_low, gain_high = gain or (None, None, None)
    return {
        "method": method, "correct": correct, "images": 100, "low": low, "high": high,
        "against": None if gain is None else "tome:0.7", "gain": mean, "gain_low": gain_low, "gain_high": gain_high,
        "p": None if gain is None else 0.01, "mean_average_precision": None, "agreement": 1.0, "fid": 12.345,
        "db": 20.0, "gflops": 1.0, "ms": 5.0, "sites": 4,
    } | changed  # fmt: skip


def result(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": "photo-dit", "data": "photo", "classes": 14, "images": 100, "generated": 50,
        "n_samples": [4, 12], "to_keep": [5, 1],
        "steps": 20, "guidance": 2.0, "batch": 20, "ms": {"dense, eager": 8.0, "dense": 6.0, "bigain-tm:0.7": 5.0},
        "machine": {"processor": "some", "torch": "2"}, "rows": list(rows),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("gain", "word"),
    [((0.06, 0.01, 0.11), "better"), ((-0.06, -0.11, -0.01), "worse"), ((0.06, -0.01, 0.13), "not decided")],
)
def test_only_an_interval_without_zero_decides(gain: tuple[float, float, float], word: str) -> None:
    main = result(row("dense", 60), row("tome:0.7", 40), row("bigain-tm:0.7", 46, gain))
    text = evidence_document.text({"photo-dit-main": main}, Path("figures"))
    assert (
        f"photo-dit {100 * gain[0]:+.1f} points ({100 * gain[1]:+.1f} to {100 * gain[2]:+.1f}, p 0.01), {word}" in text
    )
    assert "(the paper) | 46.0 (36.0 to 56.0) | 12.3" in text
    assert "| photo-dit | `bigain-tm:0.7` | 5.0 | 1.60x | 1.20x |" in text
    assert "One call of 20 rows" in text
    assert "chance is 7 % on photo." in text
    assert "4 pairs of timestep and noise for each of 14 classes, then 12 in all for the best 5; 20 steps" in text
    assert "figures/overview.png" in text
    assert "\n## Ours\n" in evidence_document.text({"photo-dit-main": main}, Path("figures"), "## Ours\n")


def test_every_study_has_a_section() -> None:
    found = {f"photo-dit-{study.name}": result(row("dense", 60)) for study in evidence.STUDIES}
    text = evidence_document.text(found, Path("figures"))
    assert "## Merging: photo-dit" in text
    assert "## Downsampling keys and values: photo-dit" in text
    assert "[100 images classified, 50 generated](figures/photo-dit-merging.json)" in text
    assert "figures/sweeps.png" in text
    assert len(evidence_figures.overview(found).axes) == 1


def test_sweeps_are_drawn_over_the_ratio_and_over_alpha() -> None:
    merging = result(
        row("dense", 60), row("tome:0.7", 40), row("tome:0.5", 50), row("tome:0.7:no_longer=there", 1),
        row(f"bigain-tm:0.7{evidence.BETTER}", 45), row("bigain-tm:0.7:window=8", 1),
    )  # fmt: skip
    downsampling = result(
        row("dense", 60),
        row("todo:2", 20),
        row("bigain-td:2:-0.25", 42),
        row("bigain-td:2:0.8..1.2", 1),
        row("todo:4", 9),
    )  # fmt: skip
    figure = evidence_figures.sweeps({"photo-dit-merging": merging, "photo-dit-downsampling": downsampling})
    above, below = (
        {str(line.get_label()): [list(point) for point in line.get_xydata()] for line in axes.lines}
        for axes in figure.axes
    )
    assert above.pop("dense")[0][1] == below.pop("dense")[0][1] == 60
    assert above == {"ToMe": [[0.5, 50], [0.7, 40]], "with proportional attention and blending": [[0.7, 45]]}
    assert below == {"4 times fewer keys": [[-0.25, 42], [1, 20]], "16 times fewer keys": [[1, 9]]}


def test_spectra_and_calibrations_are_tables() -> None:
    frequencies = [0.0, 0.25, 0.4375, 0.5]
    curves = {"retention": [[1, 1, 0.5, 0.7]], "deviation": [[0, 0, 1.0, 1.5]], "timesteps": [100]}
    spectrum = {"model": "photo-dit", "methods": {"todo:2": {"frequencies": frequencies, **curves}}}
    item = {"schedule": "bigain-td:2:0.1..0.2", "constant": "bigain-td:2:0.15", "timesteps": [50.0], "best": [0.123]}
    merging = {"bigain-tm:0.5": {"method": "bigain-tm:0.25/0.75:cell=4x4", "relative": [0.6, 0.456]}}
    calibration = {"model": "photo-dit", "factors": {"2": item}, "merging": merging}
    found = {"photo-dit-spectrum": spectrum, "photo-dit-calibration": calibration}
    text = evidence_document.text(found, Path("figures"))
    assert "| `todo:2` | 0.60, 1.25 |" in text
    assert "figures/photo-dit-spectrum/spectrum.png" in text
    assert "| photo-dit | 2 | `bigain-td:2:0.1..0.2` | `bigain-td:2:0.15` | 0.12 |" in text
    assert "| photo-dit | `bigain-tm:0.5` | `bigain-tm:0.25/0.75:cell=4x4` | 0.46 |" in text


@pytest.mark.parametrize("study", evidence.STUDIES, ids=lambda study: study.name)
def test_methods_of_the_studies_are_valid_and_start_with_dense(study: evidence.Study) -> None:
    methods = parse_list(study.methods)
    assert next(iter(methods)) == "dense"
    assert len(methods) == len(study.methods.split(","))


def test_the_committed_document_is_that_of_the_committed_results() -> None:
    document = ROOT / "docs" / "evidence.md"
    found = evidence.results(evidence.RESULTS)
    if not document.exists():
        assert not found
        return
    reading = evidence.reading(evidence.RESULTS)
    assert document.read_text() == evidence_document.text(found, Path("../bench/results/evidence"), reading)


@pytest.mark.slow
def test_a_quick_run_of_the_evidence(tmp_path: Path) -> None:
    studies = "main,spectrum,calibration"
    arguments = ["--quick", "--models", "mnist-dit,photo-dit", "--studies", studies, "--work", str(tmp_path / "work")]
    with pytest.raises(SystemExit) as done:
        evidence.main([*arguments, "--out", str(tmp_path), "--document", str(tmp_path / "evidence.md")])
    assert not done.value.code
    for model in ("mnist-dit", "photo-dit"):
        rows = json.loads((tmp_path / f"{model}-main.json").read_text())["rows"]
        given = list(parse_list(evidence.STUDIES[0].methods))
        better = given.index(f"bigain-tm:0.7{evidence.BETTER}{evidence.WHOLE}") + 1
        assert [found["method"] for found in rows] == [*given[:better], "calibrated bigain-tm:0.7", *given[better:]]
        assert rows[better]["gflops"] <= rows[better - 1]["gflops"]
        assert all(found["fid"] > 0 for found in rows)
    assert (tmp_path / "overview.png").stat().st_size > 10_000
    text = (tmp_path / "evidence.md").read_text()
    assert "## What becomes of high frequencies" in text
    assert "## Which alpha" in text
