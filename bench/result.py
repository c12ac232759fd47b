"""What a benchmark found, as a value, as JSON-ready data, as Markdown, as two files."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import bigain_fx
from bigain_fx.bench import BenchError
from bigain_fx.bench.timing import Estimate, decibels
from bigain_fx.passes.checks import told
from bigain_fx.passes.errors import first_line

MB = 1e6
COLUMNS = (
    "row", "median (ms)", "speed-up [95 %]", "over", "efficiency [95 %]", "deviation (dB)", "relative L2", "peak (MB)",
    "compile (s)", "GFLOPs", "sites",
)  # fmt: skip
WHOLE = ":window=all"
"""In the name of a row: tokens merge over the whole grid. In committed results, so do those that name no window."""


def plain(name: str) -> str:
    """Return a row's name as rows over the whole grid were called when that was the default: with no window.

    The suites name every window, so that what was measured then keeps its name and its meaning.
    """
    return name.replace(WHOLE, "")


@dataclass(frozen=True)
class Row:
    """One line of the table; what does not apply is None.

    Attributes:
        name: ``"dense eager"``, ``"dense"`` (compiled), a method as it was written, the same and ``" eager"``,
            ``"tomesd:..."`` for that package, ``"bound:..."``, or ``"onnx:..."`` for what ONNX Runtime runs.
        seconds: of each timed round, in order.
        median_s: their median.
        speedup: over the row ``base``, paired within rounds.
        base: ``"onnx:dense"`` for the other ONNX rows, else ``"dense"``.
        bound: name of the free bound of this method.
        efficiency: share of what the bound saves that is saved, ``(1 - row / dense) / (1 - bound / dense)`` of the
            medians of these ratios within rounds, with its interval; None where the bound itself gains nothing for
            certain (its interval reaches 1).
        relative_l2: error of the output against dense eager; 0 is identical.
        peak_bytes: most memory allocated at once by a call, on top of weights and inputs.
        capture_s: to capture and rewrite the graph; for an ONNX row, to export and load it too.
        compile_s: the first call less ``median_s``.
        compile_cached: whether inductor found the graph in its cache, so that ``compile_s`` is no compile time.
        flops: of the graph, for one call.
        sites: attentions that the method changed.
    """

    name: str
    seconds: tuple[float, ...]
    median_s: float
    speedup: Estimate
    base: str
    bound: str | None
    efficiency: Estimate | None
    relative_l2: float | None
    peak_bytes: int | None
    capture_s: float | None
    compile_s: float | None
    compile_cached: bool | None
    flops: int
    sites: int

    @property
    def deviation_db(self) -> float | None:
        """Signal to error against dense eager, in dB; None where there is no error."""
        return decibels(self.relative_l2)

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of :data:`COLUMNS`."""
        exact = "exact" if self.relative_l2 == 0 else "-"
        compiled = _text(self.compile_s, ".1f") + " (cached)" * bool(self.compile_cached)
        return (
            self.name, f"{self.median_s * 1e3:.2f}",
            str(self.speedup), self.base,
            _text(self.efficiency, ""), exact if self.deviation_db is None else f"{self.deviation_db:.1f}",
            _text(self.relative_l2, ".2e"), _text(self.peak_bytes and self.peak_bytes / MB, ".1f"), compiled,
            f"{self.flops / 1e9:.2f}", str(self.sites),
        )  # fmt: skip


@dataclass(frozen=True)
class BenchResult:
    """One benchmark: what was run, where, and its rows.

    Attributes:
        workload: name of the workload; ``model`` is the class, ``parameters`` and ``weight_bytes`` its size.
        device: type of the device, ``dtype`` that of the weights.
        inputs: shape of every input, by name.
        backend, mode: as for ``torch.compile``.
        rounds, warmup, seed: as for :func:`bigain_fx.bench.run.run`.
        date: UTC, at the start.
        command: what was typed, paths outside of the current folder cut to their last part.
        machine, versions: what it ran on.
        tokens: of the image, in the largest attention that a row changed; None where none changed one.
        notes: which rows that were asked for are not there, and why.
        rows: dense eager, dense, the methods, tomesd, ONNX Runtime, the bounds.
    """

    workload: str
    model: str
    parameters: int
    weight_bytes: int
    device: str
    dtype: str
    inputs: dict[str, list[int]]
    backend: str
    mode: str | None
    rounds: int
    warmup: int
    seed: int
    date: str
    command: str
    machine: dict[str, str | int]
    versions: dict[str, str | None]
    tokens: int | None
    notes: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def stem(self) -> str:
        """Name of the files, without suffix: workload, first input's shape, device, dtype, and backend if unusual."""
        shape = "x".join(map(str, next(iter(self.inputs.values()), [])))
        parts = [self.workload, shape, self.device, self.dtype]
        parts += [self.backend] * (self.backend != "inductor") + [self.mode or ""]
        return "-".join(re.sub(r"[^\w.]+", "-", part) for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data, for JSON."""
        data = asdict(self)
        rows = [asdict(row) | {"deviation_db": row.deviation_db, "seconds": list(row.seconds)} for row in self.rows]
        return data | {"notes": list(self.notes), "rows": rows}

    def to_markdown(self) -> str:
        """Where and how it was measured, and a table."""
        versions = ", ".join(f"{name} {version or '-'}" for name, version in self.versions.items())
        inputs = ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in self.inputs.items())
        lines = [
            f"# {self.workload}: {self.model}, {self.dtype}, {self.device}",
            "",
            f"- {self.parameters:,} parameters ({self.weight_bytes / MB:.1f} MB); inputs {inputs}",
            f"- {', '.join(f'{name} {value}' for name, value in self.machine.items())}",
            f"- {versions}; backend {self.backend}, mode {self.mode or 'default'}",
            f"- {self.rounds} interleaved rounds after {self.warmup} of warm-up, seed {self.seed}; {self.date}",
            f"- `{self.command}`",
            *(f"- {note}" for note in self.notes),
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "| --- " + "| ---: " * (len(COLUMNS) - 1) + "|",
            *("| " + " | ".join(row.cells()) + " |" for row in self.rows),
        ]
        return "\n".join(lines) + "\n"


def _text(value: float | Estimate | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def about(device: torch.device, module: str) -> dict[str, Any]:
    """When and on what it is measured, by ``python -m bigain_fx.bench.<module>`` with the arguments of this process."""
    return {
        "date": now(), "command": f"python -m bigain_fx.bench.{module} {command(sys.argv[1:])}".rstrip(),
        "machine": machine(device), "versions": versions(),
    }  # fmt: skip


def now() -> str:
    """Date and time, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def place(found: Mapping[str, Any]) -> str:
    """On what ``found`` was measured, in words."""
    kinds = (found["machine"], found["versions"])
    return "; ".join(", ".join(f"{name} {value}" for name, value in kind.items() if value) for kind in kinds)


def machine(device: torch.device) -> dict[str, str | int]:
    """What it runs on: the processor and its memory, and the GPU where that does the work."""
    found: dict[str, str | int] = {"cpu": _cpu(), "threads": torch.get_num_threads(), "system": platform.system()}
    if hasattr(os, "sysconf"):
        found["memory_mb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MB)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_mb": round(properties.total_memory / MB)}
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Of Python, torch, CUDA, diffusers, tomesd, ONNX Runtime and this package; None for what is absent."""
    return {
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "diffusers": _version("diffusers"), "tomesd": _version("tomesd"),
        "onnxruntime": _version("onnxruntime") or _version("onnxruntime-gpu"), "bigain_fx": bigain_fx.__version__,
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def command(arguments: Iterable[str] | None = None) -> str:
    """What was typed, by default ``sys.argv``, with absolute paths cut to their last part."""
    cut = []
    for argument in sys.argv if arguments is None else arguments:
        option, equals, value = argument.rpartition("=")
        cut.append(option + equals + (Path(value).name if Path(value).is_absolute() else value))
    return shlex.join(cut)


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` left at ``path``.

    Raises:
        BenchError: it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BenchError(f"{str(path)!r} cannot be read ({first_line(error)}); measure again without it") from error
    if not isinstance(found, dict):
        raise BenchError(f"{str(path)!r} holds no result; measure again without it")
    return found


def rows(path: Path, keys: Collection[str]) -> dict[str, Any]:
    """What :func:`read` finds, its ``rows`` with ``keys``; no rows where the file is not there, or damaged."""
    try:
        found = read(path)
        whole = all(row.keys() >= set(keys) for row in found["rows"])
    except (BenchError, KeyError, TypeError, AttributeError):
        whole = False
    return found if whole else {"rows": []}


def prepare(folder: Path) -> None:
    """Make ``folder`` and see that files can be written there.

    Raises:
        BenchError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise BenchError(f"{told('out', folder.name)} cannot be written: {reason}; name a folder that can") from error


def write(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` all at once: a reader sees the old file or the new one.

    Raises:
        BenchError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise BenchError(f"{told('file', path.name)} cannot be written: {reason}; name another folder") from error
