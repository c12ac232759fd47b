"""What the README claims is what the committed results say."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_row_of_the_results_table_is_in_a_result_file() -> None:
    """Rows read ``| [file](bench/results/file.json) | method | speed-up | interval | efficiency |``."""
    file_and_method = r"^\| \[.*?\]\((bench/results/\S+?\.json)\) \| `(.+?)` "
    numbers = r"\| (\d\.\d\d)x \| (\d\.\d\d) to (\d\.\d\d) \| (\S+) \|$"
    rows = re.findall(file_and_method + numbers, (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 3
    for file, method, *claimed in rows:
        result = json.loads((ROOT / file).read_text())
        (row,) = (row for row in result["rows"] if row["name"] == method)
        speedup = row["speedup"]
        measured = [f"{speedup[key]:.2f}" for key in ("median", "low", "high")]
        measured.append("-" if row["efficiency"] is None else f"{row['efficiency']:.2f}")
        assert claimed == measured, (file, method)


def test_the_dense_runtimes_are_compared_as_measured() -> None:
    result = json.loads((ROOT / "bench/results/sd2-2x4x64x64-cpu-float32.json").read_text())
    (row,) = (row for row in result["rows"] if row["name"] == "onnx:dense")
    assert (
        f"dense ONNX is {row['speedup']['median']:.2f}x as fast as dense compiled" in (ROOT / "README.md").read_text()
    )


def test_the_times_to_the_first_step_are_those_of_the_result_file() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    (file,) = re.findall(r"\[startup\]\((bench/results/\S+?\.json)\)", text)
    rows = json.loads((ROOT / file).read_text())["rows"]
    for row in rows:
        way, _, cache = row["name"].partition(", ")
        assert f"{row['total_s']:.1f} s by `{way}`" + f", {cache}" * bool(cache) in text


def test_compiling_takes_what_the_result_files_say() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    found = re.findall(r"(\d\.\d\d)x for \[[^]]+\]\((bench/results/compile-\S+?\.json)\)", text)
    assert {file for _, file in found} == {f"bench/results/compile-{name}.json" for name in ("sdxl", "flux")}
    for claimed, file in found:
        dense, *rows = json.loads((ROOT / file).read_text())["rows"]
        assert dense["ratio"] is None
        assert claimed == f"{max(row['ratio'] for row in rows):.2f}"
        assert max(row["ratio"] for row in rows) <= 1.25
        assert max(row["passes_s"] for row in rows) < 2


def test_accuracies_are_those_of_the_evidence() -> None:
    """Rows read ``| [model](file) | `method` | accuracy (interval) | points (interval) | FID | GFLOPs |``."""
    pattern = r"^\| \[.*?\]\((bench/results/evidence/\S+?\.json)\) \| `(.+?)` \| (.+) \|$"
    rows = re.findall(pattern, (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 8
    for file, method, claimed in rows:
        (row,) = (row for row in json.loads((ROOT / file).read_text())["rows"] if row["method"] == method)
        accuracy, low, high = (100 * value for value in (row["correct"] / row["images"], row["low"], row["high"]))
        gains = [100 * (row[name] or 0) for name in ("gain", "gain_low", "gain_high")]
        points = "{:+.1f} ({:+.1f} to {:+.1f})".format(*gains) if row["against"] not in (None, "dense") else "-"
        measured = [f"{accuracy:.1f} ({low:.1f} to {high:.1f})", points, f"{row['fid']:.1f}", f"{row['gflops']:.2f}"]
        assert claimed.split(" | ") == measured, (file, method)
