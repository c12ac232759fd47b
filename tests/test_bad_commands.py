"""Every option of every command, given what it must not be: exit status 2 and one line, before anything is done."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from bigain_fx import cli, command_line
from bigain_fx.bench import result
from bigain_fx.embedded.data import data_set
from bigain_fx.evidence import run as evaluation
from bigain_fx.evidence import spectrum_report

DATA = functools.cache(data_set)
pytestmark = pytest.mark.slow
NUMBERS = ("0", "-1", "1.5", "x", "nan", "", "9" * 30)
SEEDS = ("1.5", "x", "nan", "", "9" * 30)
METHODS = (
    "", ",", "x", "tome", "tome:", "tome:nan", "tome:inf", "tome:-1", "tome:0.9", "tome:0.5:seed=" + "9" * 30,
    "tome:0.5:cell=0x0", "tome:0.5:cell=999999999999999999999x2", "bigain-td:2:1e300", "bigain-td:" + "9" * 30,
    "bigain-td:2:0.8..", "bigain-td:2:0.8..1..2", "tome:0.5+tome:0.5", "dense+tome:0.5", "tome:0.5:levels=0",
    "tome:0.5/", "tome:0.5:window=-4", "bigain-td:2:nan..1", "tome:0.5:ratio=0.5", "tome:" + "9" * 5000,
)  # fmt: skip
MODELS = ("", "nope", "empty", "file", "list", "cut", "number", "deep", "unknown", "pipe", "a\0b", "x" * 5000)
FOLDERS = ("file", "file/x", "/proc/nope/x", "a\0b", "x" * 300)
BACKENDS = ("inductorr", "", "bigain", *(("tvm",) if find_spec("tvm") is None else ()))
TINY = ("mnist-dit", "--backend", "eager")
CLASSIFY, EVALUATE = ("classify", "mnist-dit", "cut.png", "--backend", "eager"), ("evaluate", *TINY, "--no-time")
BENCH = ("bench", *TINY, "--onnx", "")

COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "inspect --methods": (("inspect", "mnist-dit", "--methods"), METHODS),
    "spectrum --methods": (("spectrum", "mnist-dit", "--images", "1", "--methods"), METHODS),
    "export --methods": (("export", "mnist-dit", "--methods"), METHODS),
    "export --attention": (("export", "mnist-dit", "--attention"), ("", "x")),
    "export --format": (("export", "mnist-dit", "--format"), ("", "x")),
    "bench --tomesd": ((*BENCH, "--tomesd"), ("-1", "x", "nan", "0.9")),
    "bench --device": ((*BENCH, "--device"), ("tpu", "", "cuda:99")),
    "bench --dtype": ((*BENCH, "--dtype"), ("int8", "")),
    "bench --name": ((*BENCH, "--name"), ("", "a/b", "..", "a\0b")),
    "evaluate --kind": ((*EVALUATE, "--kind"), ("pets", "x")),
    "bench --mode": (("bench", "mnist-dit", "--mode"), ("fast",)),
    "bench --mode of eager": ((*BENCH, "--mode"), ("max-autotune",)),
    "classify images": (("classify", "mnist-dit"), ("nope.png", "cut.png", "empty", "a\0b.png", "x" * 5000)),
    "evaluate --data": (("evaluate", "mnist-dit", "--data"), ("pets", "nope")),
    "spectrum --timesteps": (("spectrum", "mnist-dit", "--timesteps"), ("-1", "1000", "1.5", "x", "", "9" * 30)),
}
for command in ("inspect", "export", "spectrum", "bench"):
    COMMANDS[f"{command} MODEL"] = (command,), MODELS
COMMANDS["generate MODEL"] = ("generate", "--prompts", "a|b"), MODELS
COMMANDS["evaluate MODEL"] = ("evaluate", "--data", "empty"), MODELS
COMMANDS["classify MODEL"] = ("classify", "--prompts", "a|b"), tuple(f"{model}|cut.png" for model in MODELS)
for start, names in {
    ("inspect", "mnist-dit"): "size batch", ("export", "mnist-dit"): "size batch opset",
    ("generate", *TINY): "count steps batch", CLASSIFY: "samples keep batch",
    EVALUATE: "samples keep batch steps images", ("spectrum", "mnist-dit"): "images", BENCH: "size batch rounds layers",
}.items():  # fmt: skip
    for name in names.split():
        COMMANDS[f"{start[0]} --{name}"] = (*start, f"--{name}"), NUMBERS
for start in (("generate", *TINY), CLASSIFY, EVALUATE, ("spectrum", "mnist-dit")):
    COMMANDS[f"{start[0]} --seed"] = (*start, "--seed"), SEEDS
for start in (("generate", *TINY), EVALUATE):
    COMMANDS[f"{start[0]} --guidance"] = (*start, "--guidance"), ("nan", "inf", "-inf", "x", "", "1e999")
COMMANDS["evaluate --generate"] = (*EVALUATE, "--generate"), ("-1", "1", "1.5", "x", "")
COMMANDS["bench --warmup"] = (*BENCH, "--warmup"), ("-1", "1.5", "x", "")
for start in (("generate", *TINY), EVALUATE, ("spectrum", "mnist-dit"), ("export", "mnist-dit"), BENCH,
              ("demo", "--quick", "--backend", "eager")):  # fmt: skip
    COMMANDS[f"{start[0]} --out"] = (*start, "--out"), FOLDERS
for start in (("demo", "--quick"), ("generate", "mnist-dit"), ("classify", "mnist-dit", "cut.png"),
              ("evaluate", "mnist-dit"), ("bench", "mnist-dit", "--onnx", "")):  # fmt: skip
    COMMANDS[f"{start[0]} --backend"] = (*start, "--backend"), BACKENDS


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for module in (evaluation, spectrum_report):
        monkeypatch.setattr(module, "data_set", DATA)
    for name, content in {
        "list": "[1]", "cut": "{", "number": '{"_class_name": 5}', "deep": "[" * 100_000,
        "unknown": '{"_class_name": "no.such"}',
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        for file in ("config.json", "model_index.json"):
            (tmp_path / name / file).write_text(content)
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": 5}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("neither")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\nIHDR")


def said(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bigain-fx", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    try:
        run()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def check(run: Callable[[], object], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
          *arguments: str) -> None:  # fmt: skip
    try:
        status = said(run, monkeypatch, *arguments)
    except Exception as error:
        pytest.fail(f"{told}: {type(error).__name__}: {error}"[:600])
    message = capsys.readouterr().err.strip()
    assert status == 2, told
    # Libraries may have logged something before it.
    assert "Usage:" in message or message.splitlines()[-1].startswith("error: "), f"{told}: {message[-600:]}"
    assert len(message.splitlines()[-1]) < 6000


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_value_is_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    start, values = COMMANDS[command]
    before = sorted(path.name for path in tmp_path.iterdir())
    for value in values:
        words = value.split("|") if command == "classify MODEL" else [value]
        check(cli.main, f"{command} {value[:50]!r}", monkeypatch, capsys, *start, *words)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in made if name not in before and any((tmp_path / name).iterdir())] == []


MODULES = {
    "growth --device": ("tpu", ""), "growth --rounds": NUMBERS, "growth --sizes": NUMBERS,
    "growth --backend": BACKENDS, "growth --out": FOLDERS,
    "split MODEL": MODELS, "split --rounds": NUMBERS, "split --method": METHODS, "split --device": ("tpu", ""),
    "startup MODEL": (), "startup --rounds": NUMBERS, "startup --methods": METHODS, "startup --out": FOLDERS,
    "compile_time MODEL": MODELS, "compile_time --rounds": NUMBERS, "compile_time --out": FOLDERS,
    "suite MODEL": ("", "nope"), "suite --jobs": NUMBERS, "suite --limit": ("nan", "x", ""),
    "architectures MODEL": ("", "nope"),
    "sweep --device": ("tpu", ""), "sweep --rounds": NUMBERS, "sweep --shapes": NUMBERS, "sweep --backend": BACKENDS,
    "evidence --models": ("", "nope"), "evidence --studies": ("", "nope"), "evidence --threads": ("-1", "x", "9" * 30),
    "evidence --out": FOLDERS,
}  # fmt: skip
FIRST = {"split": "mnist-dit", "compile_time": "mnist-dit", "suite": "quick"}


@pytest.mark.parametrize("command", MODULES)
def test_a_wrong_value_of_a_benchmark_is_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, option = command.split()
    module = import_module(f"bigain_fx.bench.{name}")
    run = module.main if name in ("sweep", "evidence") else lambda: command_line.run(module.main)
    for value in MODULES[command]:
        words = [value] if option == "MODEL" else [*([FIRST[name]] if name in FIRST else []), option, value]
        check(run, f"{command} {value[:50]!r}", monkeypatch, capsys, *words)


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000, '{"rows": 5}', '{"rows": [5]}', '{"rows": [{}]}'])
def test_damaged_results_are_measured_again(content: str, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_text(content)
    assert result.rows(path, ("shape",)) == {"rows": []}
    path.write_text('{"rows": [{"shape": 1}], "versions": 2}')
    assert result.rows(path, ("shape",)) == {"rows": [{"shape": 1}], "versions": 2}
