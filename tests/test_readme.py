"""What the README claims is what the committed results say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README, SPEED, QUALITY, EXPORT = (
    ROOT / "README.md",
    *(ROOT / f"docs/{name}.md" for name in ("speed", "quality", "export")),
)


def words(file: Path) -> str:
    """The text in one line, with links as the README has them."""
    return " ".join(file.read_text().split()).replace("](../", "](")


def tables(file: Path) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of every table whose rows begin with a link to a result file."""
    found: list[tuple[list[str], list[list[str]]]] = []
    header: list[str] = []
    for line in file.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("| "):
            header = []
        elif not header:
            header = cells
            found.append((header, []))
        elif "](../bench/results/" in cells[0]:
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


@pytest.mark.parametrize(
    "file", [README, ROOT / "CONTRIBUTING.md", ROOT / "bench/README.md", *sorted(ROOT.glob("docs/*.md"))],
    ids=lambda file: file.name,
)  # fmt: skip
def test_every_link_leads_somewhere(file: Path) -> None:
    for link in re.findall(r"\]\((?!https?://)([^)#]*)(#[^)]*)?\)", file.read_text()):
        target = file.parent / link[0] if link[0] else file
        assert target.exists(), link[0]
        if link[1] and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert link[1][1:] in slugs, link


@pytest.mark.parametrize("file", [SPEED, QUALITY], ids=lambda file: file.stem)
def test_every_cell_of_the_tables_is_in_a_result_file(file: Path) -> None:
    """Columns are named after rows of the file that a line begins with."""
    assert len(tables(file)) == 2
    for header, rows in tables(file):
        for link, *cells in rows:
            (name,) = re.findall(r"\]\(\.\./(bench/results/\S+?\.json)\)", link)
            result = json.loads((ROOT / name).read_text())
            for row, cell in zip(header[1:], cells, strict=True):
                expected = shown(result, row.strip("`")) if row.startswith("`") else f"{result[row]:,}"
                assert cell == expected, (name, row)


CASES = [
    # The words before a link, the file that it names, and the row of it that is claimed.
    ("`KVDownsample(2)`", "speed/cuda-sd2-128-batch2-bfloat16", "bigain-td:2"),
    ("downsampling", "speed/cuda-sd2-64-batch2-bfloat16", "bigain-td:2"),
    ("merging", "speed/cuda-sd2-64-batch2-bfloat16", "bigain-tm:0.7:window=16"),
    ("`LaplacianMerge(0.7)`", "speed/cpu-sd2-64-batch2-float32", "bigain-tm:0.7:window=16"),
    ("`LaplacianMerge(0.7)`", "speed/cpu-sd2-128-batch1-float32", "bigain-tm:0.7:window=16"),
    ('scope="block")`', "speed/cpu-dit-xl-2-64-batch2-float32", "bigain-tm:0.7:block:window=16"),
    ("merging 0.7 takes", "evidence/photo-dit-main", "dense"),
    ("% to", "evidence/photo-dit-main", "bigain-tm:0.7"),
    ("LaplacianMerge(0.7))`", "speed/cpu-sd2-64-batch2-float32", "onnx:bigain-tm:0.7"),
]


def test_what_to_expect_was_measured() -> None:
    text = README.read_text()
    claims = list(re.finditer(r"\[([^]]+)\]\(bench/results/(\S+?)\.json\)", text))
    assert len(claims) == len(CASES)
    for claim, (end, named, row) in zip(claims, CASES, strict=True):
        assert text[: claim.start()].rstrip(" |").endswith(end), (claim[0], end)
        result = json.loads((ROOT / f"bench/results/{named}.json").read_text())
        assert (claim[2], claim[1]) == (named, shown(result, row))


def test_a_call_costs_what_was_measured() -> None:
    text = words(README)
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
    peer, ours = gain["tomesd:0.7"], gain["bigain-tm:0.7:window=16"]
    assert (
        f"`tomesd`, the published package of token merging, reaches {peer} where the fourth line has {ours}"
        in words(README)
    )
    text = words(SPEED)
    dense, merged = gain["onnx:dense"], gain["onnx:bigain-tm:0.7"]
    assert f"dense ONNX is {dense} as fast as dense compiled, and merging gains {merged} on top of it" in text
    dense, peer, ours = gain["dense eager"], gain["tomesd:0.7 eager"], gain["bigain-tm:0.7 eager"]
    assert f"dense eager is {dense} as fast as dense compiled, tomesd eager {peer}, ours eager {ours}" in text


def test_the_go_no_go_holds_as_often_as_claimed() -> None:
    rows = json.loads((ROOT / "bench/results/sweep-cpu.json").read_text())["rows"]
    claim = f"[{sum(row['holds'] for row in rows)} of {len(rows)} shapes](bench/results/sweep-cpu.md)"
    assert claim in words(SPEED)


def test_the_times_to_the_first_step_are_those_of_the_result_file() -> None:
    text = words(EXPORT)
    (file,) = re.findall(r"\[startup\]\((bench/results/\S+?\.json)\)", text)
    rows = json.loads((ROOT / file).read_text())["rows"]
    for row in rows:
        way, _, cache = row["name"].partition(", ")
        assert f"{row['total_s']:.1f} s by `{way}`" + f", {cache}" * bool(cache) in text


def test_compiling_takes_what_the_result_files_say() -> None:
    text = words(SPEED)
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
    claims = re.findall(rf"{number} points \({number} to {number}\) on `([\w-]+)`", QUALITY.read_text())
    assert len(claims) >= 3
    for *claimed, model in claims:
        rows = json.loads((ROOT / f"bench/results/evidence/{model}-main.json").read_text())["rows"]
        known = [
            [f"{100 * row[name]:+.1f}" for name in ("gain", "gain_low", "gain_high")] for row in rows if row["gain"]
        ]
        assert claimed in known, model
