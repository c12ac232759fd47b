"""docs/architectures.md says what bench/results/architectures.json says, and that is what the passes find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from bigain_fx.bench import BenchError, architectures, published
from bigain_fx.bench.published import FAMILIES, Family
from tests.toys import C, Separate
from tests.toys import H as ROWS
from tests.toys import W as COLUMNS
from tests.zoo_dits import dit, dit_inputs, latte, latte_inputs
from tests.zoo_more import CAUSES

ROOT = Path(__file__).parent.parent
FOUND: dict[str, Any] = json.loads((ROOT / "bench/results/architectures.json").read_text())


def test_the_document_is_made_from_the_results() -> None:
    assert (ROOT / "docs/architectures.md").read_text() == architectures.to_markdown(FOUND)


def test_what_has_no_graph_is_listed_with_its_cause() -> None:
    causes = {name.split("-")[0]: cause for name, cause in CAUSES.items() if not name.startswith("HiDream")}
    causes |= {
        "HiDreamImageTransformer2DModel": CAUSES["HiDreamImageTransformer2DModel"],
        "HiDreamImageTransformer2DModel, with experts": CAUSES["HiDreamImageTransformer2DModel-experts"],
    }
    assert architectures.REFUSED.keys() == causes.keys()
    for name, (why, _) in architectures.REFUSED.items():
        assert causes[name] in why, name


def test_every_family_has_a_row() -> None:
    assert [(row["family"], row["size"]) for row in FOUND["rows"]] == [
        (family.name, family.size) for family in FAMILIES
    ]
    assert [row["family"] for row in FOUND["rows"] if "error" in row] == ["Lumina 2"]


@pytest.mark.parametrize("row", FOUND["rows"], ids=lambda row: row["family"])
def test_rows_add_up(row: dict[str, Any]) -> None:
    if "error" in row:
        return
    placed = sum(count for *_, count in row["grids"])
    finest = max((rows * columns, count) for rows, columns, count in row["grids"])[1] if placed else 0
    assert row["rewritten_at_levels_1"] == finest
    for name, ceiling in row["ceilings"].items():
        kept = sum(group["attentions"] for group in row["kept"] if name in group["methods"])
        assert ceiling["rewritten"] + kept == row["attentions"]
        assert ceiling["rewritten"] <= placed
        assert ceiling["flops"] - ceiling["plan_flops"] <= row["flops"]
    assert row["ceilings"]["block"]["flops"] <= row["ceilings"]["merge"]["flops"]
    assert row["ceilings"]["kv"]["plan_flops"] == 0


def test_counts_known_from_the_papers() -> None:
    """SD's five sites and SDXL's ten of the finest grid; every block of DiTs and of joint attention."""
    found = {row["family"]: row.get("rewritten_at_levels_1") for row in FOUND["rows"]}
    assert [found[name] for name in ("Stable Diffusion 1.5", "Stable Diffusion 2", "SDXL")] == [5, 5, 10]
    assert [found[name] for name in ("DiT-XL/2", "PixArt-Sigma", "Flux.1 dev", "Qwen-Image")] == [28, 28, 57, 60]


def tiny_dit() -> tuple[nn.Module, dict[str, Any]]:
    return dit(), dit_inputs()


def tiny_latte() -> tuple[nn.Module, dict[str, Any]]:
    return latte(), latte_inputs()


def test_a_row_by_hand() -> None:
    """A 4 x 6 grid of 24 tokens: int(16.8) of them merge, 8 are left; 6 keys are left of 24."""
    family = Family("toy", "small", lambda: (Separate().eval(), {"image": torch.randn(1, 3, ROWS, COLUMNS)}))
    row = architectures.measure(family)
    assert row["grids"] == [[ROWS, COLUMNS, 1]]
    assert (row["attentions"], row["rewritten_at_levels_1"], row["kept"]) == (1, 1, [])
    tokens, cells = ROWS * COLUMNS, ROWS * COLUMNS // 4
    rest = 2 * tokens * 3 * C

    def cost(queries: int, keys: int) -> int:
        """Queries, the way out, keys and values, and the two products of attention."""
        return rest + 2 * (2 * queries + 2 * keys) * C * C + 2 * 2 * queries * keys * C

    assert row["flops"] == cost(tokens, tokens)
    plan = 2 * (tokens - cells) * cells * C
    assert row["ceilings"]["merge"] == {"rewritten": 1, "flops": cost(8, 8) + plan, "plan_flops": plan}
    assert row["ceilings"]["kv"] == {"rewritten": 1, "flops": cost(tokens, cells), "plan_flops": 0}


def test_reasons_are_grouped() -> None:
    kept = architectures.measure(Family("tiny", "small", tiny_latte))["kept"]
    (cross,) = (group for group in kept if group["reason"].startswith("cross-attention"))
    (temporal,) = (group for group in kept if "in its batch" in group["reason"])
    assert cross["where"] == ["transformer_blocks.*.attn2"]
    assert (cross["attentions"], cross["methods"]) == (2, ["merge", "block", "kv"])
    assert temporal["where"] == ["temporal_transformer_blocks.*.attn1"]
    assert not any("(at " in group["reason"] for group in kept)


@pytest.mark.slow
def test_done_rows_are_skipped_and_named_ones_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families = tuple(Family(name, "small", tiny_dit) for name in ("first", "SDXL"))
    monkeypatch.setattr(published, "FAMILIES", families)
    seen: list[str] = []
    measure = architectures.measure
    row = measure(families[0])
    monkeypatch.setattr(architectures, "measure", lambda f: seen.append(f.name) or row | {"family": f.name})
    app = architectures.typer.Typer()
    app.command()(architectures.main)
    paths = ["--results", str(tmp_path / "found.json"), "--document", str(tmp_path / "page.md")]
    for names, expected in (["SDXL"], ["SDXL"]), ([], ["first"]), ([], []), (["first"], ["first"]):
        seen.clear()
        assert CliRunner().invoke(app, [*names, *paths]).exit_code == 0
        assert seen == expected
        assert (tmp_path / "page.md").exists() == (names != ["SDXL"]), "it is written once every family is done"
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["family"] for row in rows] == ["first", "SDXL"]
    assert "| SDXL | 2 | 2 of 8x8 | 2 / 2 | " in (tmp_path / "page.md").read_text()


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(BenchError, match="'nothing' is not one of Stable Diffusion 1"):
        architectures.main(["nothing"])
