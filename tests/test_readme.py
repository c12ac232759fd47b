"""What the README claims is what the committed results say."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_row_of_the_results_table_is_in_a_result_file() -> None:
    """Rows read ``| [file](bench/results/file.json) | method | speed-up | interval | efficiency |``."""
    rows = re.findall(
        r"^\| \[.*?\]\((bench/results/\S+?\.json)\) \| `(.+?)` \| (\d\.\d\d)x \| (\d\.\d\d) to (\d\.\d\d) \| (\d+) % \|$",
        (ROOT / "README.md").read_text(), re.MULTILINE,
    )  # fmt: skip
    assert len(rows) >= 3
    for file, method, *claimed in rows:
        result = json.loads((ROOT / file).read_text())
        (row,) = (row for row in result["rows"] if row["name"] == method)
        speedup = row["speedup"]
        measured = [speedup["median"], speedup["low"], speedup["high"], 100 * row["efficiency"]]
        assert claimed == [f"{value:.2f}" for value in measured[:3]] + [f"{measured[3]:.0f}"], (file, method)
