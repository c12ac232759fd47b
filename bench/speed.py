"""What the speed yardstick found, from its files: ``speed.md``, and a figure for each suite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bigain_fx.bench import goals, result, timing

Result = Mapping[str, Any]

HEAD = """# Speed

What `python -m bigain_fx.bench.suite` measured, by suite; [README.md](../README.md) says how, and what columns mean.
Each workload is one interleaved run; speed-ups are within it, over its dense compiled row (ONNX rows: over dense ONNX).
In parentheses are 95 % intervals over its rounds. *Over tomesd*: likewise over tomesd, compiled, where a row merges as
much.
"""
COLUMNS = (
    "workload", "tokens", "row", "median (ms)", "speed-up", "efficiency", "over tomesd", "peak (MB)", "compile (s)",
)  # fmt: skip


def load(folder: Path, names: Iterable[str]) -> list[Result]:
    """The results of ``names`` that are in ``folder``, in this order."""
    files = [folder / f"{name}.json" for name in names]
    return [result.read(file) | {"file": file.stem} for file in files if file.is_file()]


def to_markdown(results_of: Mapping[str, Sequence[Result]]) -> str:
    """A table for each suite that has results, with where they were measured, what is missing, and its goals."""
    parts = [HEAD]
    for suite, results in results_of.items():
        if not results:
            continue
        places = dict.fromkeys(result.place(found) for found in results)
        parts += [f"\n## {suite}\n\n", *(f"- {place}\n" for place in places)]
        parts += [f"- {found['file']}: {note}\n" for found in results for note in found["notes"]]
        parts.append(f"\n| {' | '.join(COLUMNS)} |\n| --- | ---: | --- |{' ---: |' * (len(COLUMNS) - 3)}\n")
        parts += [f"| {' | '.join(_cells(found, row))} |\n" for found in results for row in found["rows"]]
        if reached := goals.to_markdown(suite, results, _link):
            parts.append(f"\n### {suite}: the goals\n\n{reached}")
    return "".join(parts)


def title(found: Result) -> str:
    """What was run, in words: ``"sd2, bfloat16, reduce-overhead"``."""
    kinds = [found["workload"], found["dtype"], found["backend"] != "inductor" and found["backend"], found["mode"]]
    return ", ".join(kind for kind in kinds if kind)


def _link(found: Result) -> str:
    shape = "x".join(map(str, next(iter(found["inputs"].values()))))
    return f"[{title(found)}, {shape}](speed/{found['file']}.md)"


def _text(found: timing.Estimate | None, unit: str = "") -> str:
    return "-" if found is None else f"{found.median:.2f}{unit} ({found.low:.2f} to {found.high:.2f})"


def _cells(found: Result, row: Mapping[str, Any]) -> list[str]:
    compiled = row["compile_s"]
    return [
        _link(found), str(found["tokens"] or "-"), f"`{row['name']}`",
        f"{row['median_s'] * 1e3:.1f}", _text(timing.Estimate(**row["speedup"]), "x"),
        _text(row["efficiency"] and timing.Estimate(**row["efficiency"])), _text(goals.over_tomesd(found, row), "x"),
        "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / result.MB:.0f}",
        "-" if compiled is None else f"{compiled:.1f}" + " (cached)" * row["compile_cached"],
    ]  # fmt: skip


def write(out: Path, names_of: Mapping[str, Iterable[str]], tell: Callable[[str], None]) -> None:
    """Write ``speed.md`` and ``speed-<suite>.png`` into ``out``, from the files in its folder ``speed``.

    Args:
        out: where the folder ``speed`` is.
        names_of: the runs of each suite.
        tell: hears what is written.

    Raises:
        BenchError: it cannot be written.
    """
    results_of = {suite: load(out / "speed", names) for suite, names in names_of.items()}
    result.write(out / "speed.md", to_markdown(results_of))
    tell(f"{(out / 'speed.md').as_posix()} is written")
    if find_spec("matplotlib") is None:
        tell("no figures: matplotlib is not installed")
        return
    from bigain_fx.bench import figure

    for suite, results in results_of.items():
        if results:
            figure.save(figure.draw(results), out / f"speed-{suite}.png")
            tell(f"{(out / f'speed-{suite}.png').as_posix()} is drawn")
