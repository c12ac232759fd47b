"""What the README claims is what the committed results say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def tables() -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of every table whose rows begin with a link to a result file."""
    found: list[tuple[list[str], list[list[str]]]] = []
    header: list[str] = []
    for line in (ROOT / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("| "):
            header = []
        elif not header:
            header = cells
            found.append((header, []))
        elif "](bench/results/" in cells[0]:
            found[-1][1].append(cells)
    return [(header, rows) for header, rows in found if rows]


def shown(result: dict[str, Any], name: str) -> str:
    """What the README says of the row ``name``."""
    row = next((row for row in result["rows"] if row.get("name", row.get("method")) == name), None)
    if row is None:
        return "-"
    if "correct" in row:
        accuracy, low, high = (100 * value for value in (row["correct"] / row["images"], row["low"], row["high"]))
        return f"{accuracy:.1f} ({low:.1f} to {high:.1f})"
    if name == "dense":
        return f"{row['median_s']:.2f} s" if row["median_s"] >= 1 else f"{1e3 * row['median_s']:.1f} ms"
    return "{median:.2f}x ({low:.2f} to {high:.2f})".format(**row["speedup"])


def test_every_cell_of_the_tables_is_in_a_result_file() -> None:
    """Columns are named after rows of the file that a line begins with."""
    assert len(tables()) >= 2
    for header, rows in tables():
        for link, *cells in rows:
            (file,) = re.findall(r"\]\((bench/results/\S+?\.json)\)", link)
            result = json.loads((ROOT / file).read_text())
            for name, cell in zip(header[1:], cells, strict=True):
                expected = shown(result, name.strip("`")) if name.startswith("`") else f"{result[name]:,}"
                assert cell == expected, (file, name)


def test_a_call_costs_what_was_measured() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    names = {"sd2": "SD 2.0", "flux": "Flux", "sdxl": "SDXL"}
    found = {name: json.loads((ROOT / f"bench/results/overhead-{name}.json").read_text()) for name in names}
    for name, shown in names.items():
        assert f"{found[name]['ms']['optimized']:.2f} ms for [{shown}](bench/results/overhead-{name}.md)" in text
    sd2, flux, sdxl = (f"{found[name]['ms']['plain torch.compile']:.2f}" for name in names)
    assert f"which compares every weight at every call, it is {sd2}, {flux} and {sdxl} ms" in text
    assert all(result["over_plain_ms"] < 0 and result["wrapper_ms"] <= 0.15 for result in found.values())


def test_eager_and_onnx_runtime_are_compared_as_measured() -> None:
    result = json.loads((ROOT / "bench/results/speed/cpu-sd2-64-batch2-float32.json").read_text())
    gain = {row["name"]: f"{row['speedup']['median']:.2f}x" for row in result["rows"]}
    text = " ".join((ROOT / "README.md").read_text().split())
    dense, merged = gain["onnx:dense"], gain["onnx:bigain-tm:0.7"]
    assert f"dense ONNX is {dense} as fast as dense compiled, and merging gains {merged} on top of it" in text
    dense, peer, ours = gain["dense eager"], gain["tomesd:0.7 eager"], gain["bigain-tm:0.7 eager"]
    assert f"dense eager is {dense} as fast as dense compiled, tomesd eager {peer}, ours eager {ours}" in text


def test_the_go_no_go_holds_as_often_as_claimed() -> None:
    rows = json.loads((ROOT / "bench/results/sweep-cpu.json").read_text())["rows"]
    claim = f"[{sum(row['holds'] for row in rows)} of {len(rows)} shapes](bench/results/sweep-cpu.md)"
    assert claim in (ROOT / "README.md").read_text()


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


def test_points_are_those_of_the_evidence() -> None:
    """Claims read ``+4.8 points (+1.4 to +8.2) on `photo-dit```."""
    number = r"([+-]\d+\.\d)"
    claims = re.findall(rf"{number} points \({number} to {number}\) on `([\w-]+)`", (ROOT / "README.md").read_text())
    assert len(claims) >= 3
    for *claimed, model in claims:
        rows = json.loads((ROOT / f"bench/results/evidence/{model}-main.json").read_text())["rows"]
        known = [
            [f"{100 * row[name]:+.1f}" for name in ("gain", "gain_low", "gain_high")] for row in rows if row["gain"]
        ]
        assert claimed in known, model
