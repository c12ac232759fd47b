"""The speed yardstick in one go: ``python -m bigain_fx.bench.suite cpu``, ``gpu``, ``quick`` or ``table``.

Each run is ``bigain-fx bench`` in a process of its own, and leaves its files in the folder ``speed``; one that is there
already, by the same command and versions, is not measured again. The table and the figures are drawn from these files.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bigain_fx import command_line
from bigain_fx.bench import BenchError, result, speed
from bigain_fx.passes import checks

LAUNCH = "import sys; from bigain_fx.cli import main; sys.argv[0] = 'bigain-fx'; main()"
SAME = ("torch", "bigain_fx")
"""What must be of one version for a result to stand."""


@dataclass(frozen=True)
class Run:
    """One call of ``bigain-fx bench``: the fields are its argument and its options."""

    workload: str
    methods: str
    size: int | None = None
    batch: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    onnx: str = ""
    eager: str = ""
    tomesd: str = ""
    rounds: int = 3
    warmup: int = 0
    layers: int | None = None
    backend: str = "inductor"
    mode: str | None = None

    @property
    def name(self) -> str:
        """Of its files, without suffix: all that tells it from the other runs."""
        parts = [
            self.device, self.workload, self.layers and f"{self.layers}layers", self.size, f"batch{self.batch}",
            self.dtype, self.backend != "inductor" and self.backend, self.mode,
        ]  # fmt: skip
        return "-".join(str(part) for part in parts if part)

    def command(self) -> list[str]:
        """What is typed, but for where the files go."""
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "workload"}
        given = [(f"--{name}", str(value)) for name, value in options.items() if value is not None]
        return ["bench", self.workload, *(word for pair in given for word in pair)]

    def is_done(self, folder: Path) -> bool:
        """Whether ``folder`` has its result, by the same command and versions."""
        file = folder / f"{self.name}.json"
        versions, mine = result.versions(), result.command(["bigain-fx", *self.command()]) + " --out "
        try:
            found = result.read(file)
            same_versions = all(found["versions"][name] == versions[name] for name in SAME)
            return same_versions and bool(found["command"].startswith(mine))
        except (BenchError, KeyError, TypeError, AttributeError):  # it is not there, or damaged
            return False

    def start(self, folder: Path, turn: Path | None) -> subprocess.Popen[bytes]:
        """Run it in a fresh process, which writes its files into ``folder``; ``turn`` is that of the benchmark."""
        where = ["--out", str(folder), "--name", self.name, *(["--turn", str(turn)] if turn else [])]
        return subprocess.Popen([sys.executable, "-W", "ignore", "-c", LAUNCH, *self.command(), *where])


PAPER = "bigain-tm:0.7:window=all"
UNET = f"dense,tome:0.7:window=all,{PAPER},bigain-tm:0.7:window=16,bigain-td:2"
DIT = f"dense,{PAPER},bigain-tm:0.7:window=16,bigain-tm:0.7:block:window=16,bigain-td:2"
OURS = "dense,bigain-tm:0.7:window=16,bigain-td:2"
BLOCK = OURS + ",bigain-tm:0.7:block:window=16"
SWEEP = (
    f"dense,tome:0.7:window=all,bigain-tm:0.3:window=all,bigain-tm:0.5:window=all,{PAPER},bigain-tm:0.75:window=all,"
    "bigain-tm:0.7:block:window=all,bigain-tm:0.7:window=16,todo:2,bigain-td:2,bigain-td:4"
)
CPU = (
    Run("sd2", UNET + ",todo:2", 64, 2, onnx=f"dense,{PAPER}", eager=PAPER, tomesd="0.7", rounds=7),
    Run("sd2", UNET, 96, 2, tomesd="0.7"),
    Run("dit-xl-2", DIT + ",tome:0.7:window=all", 64, 2, tomesd="0.7", rounds=7),
    Run("pixart", DIT, 128, 1, layers=7),
    Run("sd2", UNET, 128, 1, tomesd="0.7"),
    Run("sd3", DIT, 128, 1, layers=3),
    Run("dit-xl-2", SWEEP, 32, 2, onnx=f"dense,{PAPER}", eager=PAPER, tomesd="0.7", rounds=5),
    Run("flux", DIT, 128, 1, layers=1),
    Run("sdxl", "dense,bigain-tm:0.7:window=16", 128, 1),
)
"""The most telling runs first: a limit may cut the list short. With fewer layers where all of them take too long."""


def _on_gpu(
    workload: str, methods: str, size: int, *, dtype: str = "bfloat16", mode: str | None = None,
    tomesd: str = "", layers: int | None = None,
) -> Run:  # fmt: skip
    return Run(workload, methods, size, 2, "cuda", dtype, tomesd=tomesd, rounds=30, warmup=5, layers=layers, mode=mode)


GRAPHS = "reduce-overhead"
GPU = (
    _on_gpu("sd2", OURS, 64, mode=GRAPHS, tomesd="0.7"),
    _on_gpu("sd2", OURS, 128, mode=GRAPHS, tomesd="0.7"),
    _on_gpu("dit-xl-2", BLOCK, 64, mode=GRAPHS),
    _on_gpu("pixart", BLOCK, 128, mode=GRAPHS),
    _on_gpu("flux", BLOCK, 128, layers=4, mode=GRAPHS),
    _on_gpu("sd2", OURS, 128, dtype="float16", tomesd="0.7"),
    # the first six fill ten minutes: on an H200, six side by side, a row of SD 2.0 takes 40 s to compile
    _on_gpu("sd2", OURS + f",{PAPER}", 128, tomesd="0.7"),
    _on_gpu("sd2", OURS + f",{PAPER}", 64, tomesd="0.7"),
    _on_gpu("dit-xl-2", BLOCK, 64),
    _on_gpu("pixart", BLOCK, 128),
    _on_gpu("flux", BLOCK, 128, layers=4),
    _on_gpu("sd3", BLOCK, 128, layers=8),
    _on_gpu("sd2", OURS, 96, mode=GRAPHS, tomesd="0.7"),
    _on_gpu("sd2", OURS, 64, dtype="float16", tomesd="0.7"),
    # and the others; SDXL takes the longest to compile
    _on_gpu("sdxl", OURS, 128, mode=GRAPHS),
    _on_gpu("sdxl", OURS, 128),
    _on_gpu("sdxl", OURS, 128, dtype="float16"),
    _on_gpu("sd3", BLOCK, 128, layers=8, mode=GRAPHS),
    _on_gpu("dit-xl-2", BLOCK, 64, dtype="float16"),
    _on_gpu("pixart", BLOCK, 128, dtype="float16"),
    _on_gpu("flux", BLOCK, 128, layers=4, dtype="float16"),
)
QUICK = (
    Run("mnist-dit", "dense,bigain-tm:0.7:window=16,bigain-td:2", rounds=2, backend="aot_eager"),
    Run("mnist-unet", "dense,bigain-tm:0.7:window=16", batch=2, tomesd="0.7", rounds=2, backend="eager"),
)
"""The embedded denoisers, hardly compiled: shows in seconds that everything works, and no more than that."""
SUITES: dict[str, tuple[Run, ...]] = {"cpu": CPU, "gpu": GPU, "quick": QUICK}


def run(
    runs: Sequence[Run],
    folder: Path,
    tell: Callable[[str], None],
    *,
    limit: float | None = None,
    jobs: int = 1,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Measure what is not done yet; a run that fails does not stop the others.

    Args:
        runs: in this order.
        folder: for their files.
        tell: hears of each run.
        limit: no run starts later than this many seconds after the first.
        jobs: as many runs are compiled side by side; then each is timed alone.
        clock: seconds, monotonic.

    Returns:
        The names of the runs that failed.

    Raises:
        BenchError: ``jobs`` is not positive.
    """
    checks.integer("jobs", jobs, least=1, most=1024, error=BenchError)
    failed, started = [], clock()
    todo = [each for each in runs if not each.is_done(folder)]
    for each in runs:
        if each not in todo:
            tell(f"{each.name}: done before, by the same command and versions")
    for first in range(0, len(todo), jobs):
        passed = clock() - started
        if limit is not None and passed >= limit:
            tell(f"runs left after {limit:g} s: {len(todo) - first}; the same command goes on with them")
            break
        together = todo[first : first + jobs]
        tell(f"{', '.join(each.name for each in together)}: {len(todo) - first} to go, {passed:.0f} s so far")
        failed += _measure(together, folder, tell)
    return failed


def _measure(together: Sequence[Run], folder: Path, tell: Callable[[str], None]) -> list[str]:
    """Start all, and once each has built its rows, or is at its end, give them their turns; the names that failed."""
    failed = []
    with tempfile.TemporaryDirectory() as turns:
        turn_of = {each: Path(turns) / each.name if len(together) > 1 else None for each in together}
        processes = {each: each.start(folder, turn) for each, turn in turn_of.items()}
        while any(turn and not turn.exists() and processes[each].poll() is None for each, turn in turn_of.items()):
            time.sleep(0.1)
        for each, turn in turn_of.items():
            if turn:
                turn.unlink(missing_ok=True)
            if status := processes[each].wait():
                failed.append(each.name)
                tell(f"{each.name} fails: exit status {status}, see above")
    return failed


class What(StrEnum):
    """What to do: measure one of the suites, or draw what was measured."""

    cpu = "cpu"
    gpu = "gpu"
    quick = "quick"
    table = "table"


def main(
    what: Annotated[What, typer.Argument(help="a set of runs, or table: draw what was measured, measure nothing")],
    out: Annotated[Path, typer.Option(help="folder for speed/, speed.md and the figures")] = Path("bigain-bench"),
    limit: Annotated[float | None, typer.Option(help="seconds after which no new run starts")] = None,
    jobs: Annotated[int, typer.Option(help="runs to compile side by side; each is timed alone")] = 1,
) -> None:
    """Measure the runs of a suite that are not done yet, then write the table and draw the figures."""
    if limit is not None:
        checks.number("limit", limit)
    folder = out / "speed"
    result.prepare(folder)
    console = Console()

    def tell(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    failed = [] if what == What.table else run(SUITES[what], folder, tell, limit=limit, jobs=jobs)
    speed.write(out, {name: [each.name for each in runs] for name, runs in SUITES.items()}, tell)
    if failed:
        tell(f"{len(failed)} failed: {', '.join(failed)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    command_line.run(main)
