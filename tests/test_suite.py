"""The speed yardstick: what is measured again and what is not, its table and its figure against numbers by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bigain_fx import optimize
from bigain_fx.bench import BenchError, cuda_graphs, figure, goals, parts, result, speed, split, suite
from bigain_fx.bench import run as bench
from bigain_fx.bench.suite import Run
from bigain_fx.models import load
from bigain_fx.passes.grammar import parse

ROOT = Path(__file__).resolve().parent.parent
RUN = Run("mnist-dit", "dense,tome:0.5", rounds=1, backend="eager")


# ------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("name", suite.SUITES)
def test_no_two_runs_of_a_suite_share_a_name(name: str) -> None:
    names = [run.name for run in suite.SUITES[name]]
    assert len(set(names)) == len(names)
    assert len({run.name for runs in suite.SUITES.values() for run in runs}) == sum(map(len, suite.SUITES.values()))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "cpu-mnist-dit-batch1-float32-eager"),
        ({"backend": "inductor", "mode": "reduce-overhead", "size": 64, "batch": 2},
         "cpu-mnist-dit-64-batch2-float32-reduce-overhead"),
        ({"workload": "flux", "layers": 4, "device": "cuda", "dtype": "float16"},
         "cuda-flux-4layers-batch1-float16-eager"),
    ],
)  # fmt: skip
def test_names_tell_runs_apart(change: dict[str, Any], name: str) -> None:
    assert replace(RUN, **change).name == name


@dataclass
class Process:
    """Of a run that leaves its file at once, or fails; its turn has come when its file is gone."""

    run: Run
    turn: Path | None
    status: int
    log: list[str]

    def poll(self) -> int | None:
        return self.status or None

    def wait(self) -> int:
        self.log.append(f"timed {self.run.batch}")
        assert self.turn is None or not self.turn.exists()
        return self.status


def measured(
    monkeypatch: pytest.MonkeyPatch, *, failing: tuple[str, ...] = (), log: list[str] | None = None
) -> list[str]:
    """Fills with the names of the runs that start."""
    names: list[str] = []

    def start(run: Run, folder: Path, turn: Path | None) -> Process:
        names.append(run.name)
        if run.name not in failing:
            if turn:
                turn.touch()
            command = result.command(["bigain-fx", *run.command(), "--out", str(folder), "--name", run.name])
            (folder / f"{run.name}.json").write_text(json.dumps({"command": command, "versions": result.versions()}))
        (log if log is not None else []).append(f"started {run.batch}")
        return Process(run, turn, 2 * (run.name in failing), log if log is not None else [])

    monkeypatch.setattr(Run, "start", start)
    return names


def test_what_is_done_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, told = measured(monkeypatch), []
    runs = [RUN, replace(RUN, batch=2)]
    assert suite.run(runs, tmp_path, told.append) == []
    assert names == [run.name for run in runs]
    assert suite.run(runs, tmp_path, told.append) == []
    assert len(names) == 2
    assert told[2:] == [f"{run.name}: done before, by the same command and versions" for run in runs]

    runs[1] = replace(runs[1], methods="dense,tome:0.7")
    assert runs[1].name == names[1], "the same file, by another command"
    suite.run(runs, tmp_path, told.append)
    assert names[2:] == [runs[1].name]

    file = tmp_path / f"{RUN.name}.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"versions": found["versions"] | {"bigain_fx": "0.0.1"}}))
    suite.run(runs, tmp_path, told.append)
    assert names[3:] == [RUN.name]


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [RUN, replace(RUN, batch=2), replace(RUN, batch=3)]
    names, told = measured(monkeypatch, failing=(runs[1].name,)), []
    assert suite.run(runs, tmp_path, told.append) == [runs[1].name]
    assert names == [run.name for run in runs]
    assert f"{runs[1].name} fails: exit status 2, see above" in told
    suite.run(runs, tmp_path, told.append)
    assert names[3:] == [runs[1].name], "and is tried again"


def test_no_run_starts_after_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [replace(RUN, batch=batch) for batch in (1, 2, 3, 4)]
    names, told = measured(monkeypatch), []
    suite.run(runs[3:], tmp_path, told.append)
    clock = iter([0.0, 0.0, 5.0, 10.0])
    assert suite.run(runs, tmp_path, told.append, limit=10, clock=lambda: next(clock)) == []
    assert names[1:] == [runs[0].name, runs[1].name]
    assert told[-1] == "runs left after 10 s: 1; the same command goes on with them"


def test_runs_compile_side_by_side_and_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, log = [replace(RUN, batch=batch) for batch in (1, 2, 3)], list[str]()
    measured(monkeypatch, failing=(runs[0].name,), log=log)
    assert suite.run(runs, tmp_path, lambda _: None, jobs=2) == [runs[0].name]
    assert log == ["started 1", "started 2", "timed 1", "timed 2", "started 3", "timed 3"]
    with pytest.raises(BenchError, match="jobs=0 must be an integer from 1"):
        suite.run(runs, tmp_path, lambda _: None, jobs=0)


def test_a_run_waits_for_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turn, log = tmp_path / "turn", []
    monkeypatch.setattr(
        "bigain_fx.bench.timing.interleave",
        lambda calls, *_, **__: log.append(turn.exists()) or dict.fromkeys(calls, (1.0,)),
    )
    monkeypatch.setattr("bigain_fx.bench.run.time.sleep", lambda _: (log.append(turn.exists()), turn.unlink()))
    found = bench.run(load("mnist-dit", batch=1), {}, rounds=1, backend="eager", turn=turn, progress=False)
    assert log == [True, False], "it waited, and was timed after its turn had come"
    assert found.notes == ("built beside other runs, timed alone: compile times are longer than alone",)


@pytest.mark.slow
def test_the_command_line_measures_then_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run for real, in its own process, and one that cannot be; then the table alone, of the same files."""
    out = tmp_path / "out"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(suite.SUITES, "quick", (RUN, replace(RUN, size=30)))
    with pytest.raises(suite.typer.Exit) as stopped:
        suite.main(suite.What.quick, out)
    assert stopped.value.exit_code == 1
    assert sorted(file.name for file in (out / "speed").iterdir()) == [f"{RUN.name}.json", f"{RUN.name}.md"]
    assert RUN.is_done(out / "speed")
    assert not replace(RUN, rounds=2).is_done(out / "speed")
    text, picture = (out / "speed.md").read_text(), (out / "speed-quick.png").read_bytes()
    assert "| `tome:0.5` |" in text
    assert str(tmp_path) not in text
    assert "cpu-mnist-dit-30-batch1-float32-eager fails: exit status 2, see above" in capsys.readouterr().out
    for file in ("speed.md", "speed-quick.png"):
        (out / file).unlink()
    suite.main(suite.What.table, out)
    assert (out / "speed.md").read_text() == text
    assert (out / "speed-quick.png").read_bytes() == picture


def test_the_gpu_script_runs_the_suite_with_what_it_carries(tmp_path: Path) -> None:
    """A stand-in for Python says what it is called with; the script is called through the link, from elsewhere."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PYTHONPATH| $*"\n')
    python.chmod(0o755)
    (tmp_path / "bigain_fx").symlink_to(ROOT / "bigain_fx")
    done = subprocess.run(
        ["bash", "bigain_fx/bench/gpu.sh", "quick", "--limit", "5"], cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "PYTHON": str(python), "OUT": "elsewhere"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path, _, called = done.stdout.splitlines()[-2].partition("| ")
    assert called == "-m bigain_fx.bench.cuda_graphs"
    path, _, called = done.stdout.splitlines()[-1].partition("| ")
    assert path.split(":")[0] == str(ROOT)
    assert called == "-m bigain_fx.bench.suite quick --jobs 6 --limit 240 --out elsewhere --limit 5"


def test_the_gpu_script_installs_what_its_machine_lacks(tmp_path: Path) -> None:
    """What is there stays: an older package may be what another needs."""
    (tmp_path / "bench" / "wheels").mkdir(parents=True)
    shutil.copy(ROOT / "bench" / "gpu.sh", tmp_path / "bench")
    for name in ("rich-99.0-py3-none-any.whl", "onnx_ir-99.0-py3-none-any.whl", "not_there-1.0-py3-none-any.whl"):
        (tmp_path / "bench" / "wheels" / name).touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = - ] && exec {sys.executable} "$@"\necho "$*"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "bench/gpu.sh", "quick"], cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "PYTHON": str(python)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (installed,) = (line for line in done.stdout.splitlines() if line.startswith("-m pip install"))
    wheels = [Path(word).name for word in installed.split() if word.endswith(".whl")]
    assert wheels == ["not_there-1.0-py3-none-any.whl"]


def test_an_output_that_the_next_call_overwrites_is_found() -> None:
    memory, inputs = torch.zeros(3), [torch.ones(3), -torch.ones(3)]
    cuda_graphs.check_outputs(lambda each: memory.copy_(each * 2).clone(), lambda each: each * 2, inputs)
    with pytest.raises(BenchError, match=r"output 0 is 6\.93e\+00 from eager's after 2 calls"):
        cuda_graphs.check_outputs(lambda each: memory.copy_(each * 2), lambda each: each * 2, inputs)


@pytest.mark.slow
def test_outputs_outlive_the_next_call_here(capsys: pytest.CaptureFixture[str]) -> None:
    cuda_graphs.main()
    assert capsys.readouterr().out.startswith("outputs of mode='reduce-overhead' outlive the next call on c")


# ------------------------------------------------------------------------------------- table and figure


def made_up(workload: str, side: int, tokens: int, rows: dict[str, float], **fields: Any) -> dict[str, Any]:
    """A result whose rows have these speed-ups, with intervals of a tenth below and two tenths above."""
    return {
        "file": f"{workload}-{side}", "workload": workload, "dtype": "float32", "backend": "inductor", "mode": None,
        "inputs": {"sample": [2, 4, side, side]}, "tokens": tokens, "notes": [], "seed": 0,
        "machine": {"cpu": "Abacus", "threads": 2}, "versions": {"torch": "2.13", "cuda": None},
        "rows": [
            {
                "name": name, "median_s": 6 / factor, "seconds": [5 / factor, 6 / factor, 7 / factor],
                "bound": "bound:merge:0.7" if name.endswith("0.7") else None,
                "speedup": {"median": factor, "low": factor - 0.1, "high": factor + 0.2},
                "efficiency": {"median": 0.5, "low": 0.4, "high": 0.6} if name.startswith("bigain") else None,
                "peak_bytes": 2_500_000,
                "compile_s": None if name.endswith("eager") else 4.0, "compile_cached": name == "dense",
            }
            for name, factor in rows.items()
        ],
    } | fields  # fmt: skip


RESULTS = [
    made_up("sd2", 96, 9216, {"dense": 1.0, "bigain-tm:0.7": 1.5, "tomesd:0.7": 1.25, "bound:merge:0.7": 2.0}),
    made_up("sd2", 64, 4096, {"dense eager": 0.75, "bigain-tm:0.7": 1.2, "bigain-td:2": 1.1, "tome:0.7": 1.15}),
    made_up(
        "dit", 64, 1024, {"bigain-tm:0.7:block:window=16": 3.0}, mode="reduce-overhead", notes=["no tomesd rows: none"]
    ),
]


def test_table_against_numbers_by_hand() -> None:
    text = speed.to_markdown({"cpu": RESULTS, "gpu": []})
    lines = text.splitlines()
    assert text.count("\n## ") == 1
    assert lines.count("- cpu Abacus, threads 2; torch 2.13") == 1
    assert "- dit-64: no tomesd rows: none" in lines
    assert (
        "| [sd2, float32, 2x4x96x96](speed/sd2-96.md) | 9216 | `bigain-tm:0.7` | 4000.0 | 1.50x (1.40 to 1.70) "
        "| 0.50 (0.40 to 0.60) | 1.20x (1.20 to 1.20) | 2 | 4.0 |"
    ) in lines
    assert "| `dense` | 6000.0 | 1.00x (0.90 to 1.20) | - | - | 2 | 4.0 (cached) |" in text
    assert "| `dense eager` | 8000.0 | 0.75x (0.65 to 0.95) | - | - | 2 | - |" in text
    assert "| `tomesd:0.7` | 4800.0 | 1.25x (1.15 to 1.45) | - | - | 2 | 4.0 |" in text
    without = "| `bigain-tm:0.7` | 5000.0 | 1.20x (1.10 to 1.40) | 0.50 (0.40 to 0.60) | - | 2 | 4.0 |"
    assert without in text, "no tomesd in that run"
    rows = [line for line in lines[: lines.index("### cpu: the goals")] if line.startswith("| ")]
    assert len(rows) == 2 + 4 + 4 + 1
    assert {line.count("|") for line in rows} == {len(speed.COLUMNS) + 1}


def test_goals_against_numbers_by_hand() -> None:
    sd2 = made_up("sd2", 96, 9216, {"dense": 1.0, goals.MERGING: 1.25, "tomesd:0.7": 1.0, goals.DOWNSAMPLING: 1.1})
    for row in sd2["rows"][1:]:
        row["bound"] = "bound:merge:0.7"
    sd2["rows"][3] |= {"peak_bytes": 5_000_000, "efficiency": None}
    small = made_up("dit-xl-2", 32, 256, {"bigain-td:2": 1.0})
    found = [sd2, made_up("dit-xl-2", 64, 1024, {goals.BLOCK: 2.1}), small]
    text = goals.to_markdown("cpu", found, lambda result: result["file"])
    assert text.removeprefix(goals.HEAD).splitlines() == [
        f"| efficiency, merging | 0.95 | sd2-96 | `{goals.MERGING}` | 0.50 (0.40 to 0.60) | no |",
        "| efficiency, downsampling | 0.97 | sd2-96 | `bigain-td:2` | - | no bound, or within noise of dense |",
        f"| over tomesd, compiled | 1.15 | sd2-96 | `{goals.MERGING}` | 1.25 | yes |",
        f"| over dense, merging | 1.30 | sd2-96 | `{goals.MERGING}` | 1.25 (1.15 to 1.45) | within the interval |",
        f"| over dense, block scope | 2.00 | dit-xl-2-64 | `{goals.BLOCK}` | 2.10 (2.00 to 2.30) | yes |",
        f"| peak memory, dense over ours | 1.00 | sd2-96 | `{goals.MERGING}` | 1.00 | yes |",
        "| peak memory, dense over ours | 1.00 | sd2-96 | `bigain-td:2` | 0.50 | no |",
    ]
    assert goals.to_markdown("quick", found, str) == ""
    assert goals.memory(sd2 | {"mode": "reduce-overhead"}, sd2["rows"][1]) is None, "CUDA graphs' pool is not seen"


def test_the_whole_grid_keeps_its_line_in_the_figure() -> None:
    """Rows that name no window were measured when the whole grid was the default."""
    drawn = [figure.draw([made_up("w", 8, 64, {name: 1.5})]) for name in ("bigain-tm:0.7", "bigain-tm:0.7:window=all")]
    before, now = ([text.get_text() for text in each.legends[0].get_texts()] for each in drawn)
    assert before == now == ["merging 0.7"]


def test_figure_shows_the_same_numbers(tmp_path: Path) -> None:
    assert sum(axes.axison for axes in figure.draw([made_up(f"w{n}", 8, 64, {}) for n in range(4)]).axes) == 4
    drawn = figure.draw(RESULTS)
    panels = {axes.get_title(): axes for axes in drawn.axes if axes.axison}
    assert list(panels) == ["sd2, float32", "dit, float32, reduce-overhead"]
    sd2 = panels["sd2, float32"]
    lines = {bar.get_label(): bar for bar in sd2.containers}
    assert sorted(map(str, lines)) == [
        "ToMe 0.7 on our graph", "free bound of merging 0.7", "keys and values by 2", "merging 0.7",
        "tomesd 0.7, compiled",
    ]  # fmt: skip
    points, _, (bars,) = lines["merging 0.7"].lines  # type: ignore[attr-defined]
    assert list(points.get_ydata()) == [1.2, 1.5]
    assert list(points.get_xdata()) == pytest.approx([4096, 9216], rel=0.05)
    ends = [[y for _, y in segment] for segment in bars.get_segments()]
    assert ends == [pytest.approx([1.1, 1.4]), pytest.approx([1.4, 1.7])]
    assert [label.get_text() for label in sd2.get_xticklabels()] == ["9,216\nbatch 2", "4,096\nbatch 2"]
    figure.save(drawn, tmp_path / "speed.png")
    with Image.open(tmp_path / "speed.png") as picture:
        assert picture.width > picture.height > 100
    assert [file.name for file in tmp_path.iterdir()] == ["speed.png"]


def test_without_matplotlib_there_is_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigain_fx.bench.speed.find_spec", lambda _: None)
    told: list[str] = []
    speed.write(tmp_path, {"cpu": []}, told.append)
    assert told[-1] == "no figures: matplotlib is not installed"
    assert [file.name for file in tmp_path.iterdir()] == ["speed.md"]


# ------------------------------------------------------------------------------------- the split


@pytest.mark.slow
def test_parts_add_up_and_are_counted() -> None:
    """Six blocks on one grid: a plan, a merge, an unmerge and an attention in each."""
    workload = load("mnist-dit", batch=1)
    found = parts.split(workload, parse("bigain-tm:0.7"), rounds=3, backend="aot_eager")
    assert list(found["parts"]) == list(parts.PARTS)
    assert sum(found["parts"].values()) == pytest.approx(found["total_s"])
    assert all(seconds > 0 for seconds in found["parts"].values())
    assert {part: found["calls"][part] for part in parts.ALONE} == dict.fromkeys(parts.ALONE, 6)
    graph = optimize(workload.model, workload.args, workload.kwargs, method=parse("bigain-tm:0.7"), backend="eager")
    nodes = graph.prepare(*workload.args, **workload.kwargs).graph.graph.nodes
    assert found["calls"]["linear"] == sum(node.target is torch.ops.aten.linear.default for node in nodes)
    assert set(found["compiled"]) == {*parts.ALONE, "call"}
    assert min(found["compiled"].values()) > 0


@pytest.mark.parametrize(
    ("method", "there", "not_there"),
    [
        ("dense", ["attention", "linear"], ["score", "match", "select", "merge", "unmerge"]),
        ("tome:0.7", ["match", "select", "merge", "unmerge"], ["score"]),
        ("bigain-td:2", ["merge", "attention"], ["score", "match", "select", "unmerge"]),
        ("bigain-tm:0.5:unmerge=blend", ["score", "match", "select", "unmerge"], []),
    ],
)
def test_parts_are_those_of_the_method(method: str, there: list[str], not_there: list[str]) -> None:
    found = parts.split(load("mnist-dit", batch=1), parse(method), rounds=1, backend="eager")
    assert all(found["parts"][part] > 0 for part in there)
    assert all(found["parts"][part] == 0 for part in not_there)
    assert found["compiled"] == {}
    with pytest.raises(BenchError, match="rounds=0 must be an integer from 1"):
        parts.split(load("mnist-dit", batch=1), (), rounds=0)


def test_split_writes_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        "parts": dict(zip(parts.PARTS, (1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3, 7e-3, 8e-3, 4e-3), strict=True)),
        "total_s": 4e-2, "graph_s": 3e-2, "calls": {"plan": 6, "merge": 5}, "compiled": {"plan": 2.5e-3, "call": 2e-2},
    }  # fmt: skip
    monkeypatch.setattr(split, "split", lambda *_: made)
    split.main("mnist-dit", batch=1, out=tmp_path)
    stem = "split-cpu-mnist-dit-batch1-float32-bigain-tm-0.7-window=16"
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{stem}.json", f"{stem}.md"]
    assert json.loads((tmp_path / f"{stem}.json").read_text())["parts"] == made["parts"]
    lines = (tmp_path / f"{stem}.md").read_text().splitlines()
    assert "| plan: score, match, select | 6 | 6.00 | 15.0% | 2.50 |" in lines
    assert "| - match | - | 2.00 | 5.0% | - |" in lines
    assert "| merge | 5 | 4.00 | 10.0% | - |" in lines
    assert "| all | - | 40.00 | 100.0% | 20.00 |" in lines
