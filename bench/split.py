"""How the time of one call divides: ``python -m bigain_fx.bench.split sd2 --size 64``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from bigain_fx import command_line
from bigain_fx.bench import result
from bigain_fx.bench.parts import DECISIONS, PLAN, split
from bigain_fx.cli import Dtype
from bigain_fx.models import check_device, load
from bigain_fx.passes import checks
from bigain_fx.passes.grammar import parse


def to_markdown(found: Mapping[str, Any]) -> str:
    """Where and how it was measured, and a table."""
    compiled, parts, total = found["compiled"], found["parts"], found["total_s"]

    def line(name: str, key: str, seconds: float) -> str:
        alone = f"{compiled[key] * 1e3:.2f}" if key in compiled else "-"
        calls = found["calls"].get(key, "-")
        return f"| {name} | {calls} | {seconds * 1e3:.2f} | {seconds / total:.1%} | {alone} |"

    lines = [
        f"# {found['workload']}, {found['method']}: where the time of a call goes", "",
        f"- {result.place(found)}; {found['dtype']}",
        f"- {found['rounds']} rounds; {found['date']}",
        f"- `{found['command']}`", "",
        "| part | calls | node by node (ms) | share | compiled alone (ms) |", "| --- | ---: | ---: | ---: | ---: |",
        line("plan: score, match, select", PLAN, sum(parts[part] for part in DECISIONS)),
        *(line(f"- {part}" if part in DECISIONS else part, part, seconds) for part, seconds in parts.items()),
        line("all", "call", total),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(
    model: Annotated[str, typer.Argument(help="as for bigain-fx bench")],
    method: Annotated[str, typer.Option(help="one entry, as for bigain-fx bench")] = "bigain-tm:0.7:window=16",
    size: Annotated[int | None, typer.Option(help="side of the latent, in pixels")] = None,
    batch: Annotated[int, typer.Option(help="samples a call")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="of weights and inputs")] = Dtype.float32,
    layers: Annotated[int | None, typer.Option(help="fewer of them, with random weights; all by default")] = None,
    rounds: Annotated[int, typer.Option(help="runs")] = 5,
    out: Annotated[Path, typer.Option(help="folder for the JSON and the Markdown")] = Path("bigain-bench"),
) -> None:
    """Divide one call of MODEL into score, match, select, merge, unmerge, attention, linear, convolution and rest."""
    check_device(device)
    checks.integer("rounds", rounds, least=1, most=checks.MANY)
    methods = parse(method)
    result.prepare(out)
    about = result.about(torch.device(device), "split")
    workload = load(model, size=size, batch=batch, device=device, dtype=getattr(torch, dtype), layers=layers)
    found = {
        "workload": Path(workload.name).name, "size": size, "batch": batch, "method": method, "dtype": dtype.value,
        "rounds": rounds, **about,
    } | split(workload, methods, rounds)  # fmt: skip
    side = [str(size)] if size else []
    stem = "-".join(["split", device, found["workload"], *side, f"batch{batch}", dtype.value, method.replace(":", "-")])
    result.write(out / f"{stem}.md", to_markdown(found))
    result.write(out / f"{stem}.json", json.dumps(found, indent=1) + "\n")
    Console().print(to_markdown(found), markup=False)


if __name__ == "__main__":
    command_line.run(main)
