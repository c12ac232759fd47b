"""The command line as a user meets it: tables, JSON, typos, one-line errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from PIL import Image

from bigain_fx import cli
from bigain_fx.evidence import run as evaluation
from bigain_fx.evidence.data_sets import LabelledImages
from tests import pipes
from tests.test_optimize import unet


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bigain-fx", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def folder(tmp_path: Path) -> str:
    unet().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str) -> None:
    assert run(monkeypatch, "inspect", folder, "--size", "16", "--methods", "bigain-tm:0.7,todo:2") == 0
    out = capsys.readouterr().out
    assert "bigain-tm:0.7: 3 of 8 attentions rewritten" in out
    assert "todo:2: 3 of 8 attentions rewritten" in out
    assert "256 -> 77" in out
    assert "cross-attention" in out


def test_inspect_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str) -> None:
    assert run(monkeypatch, "inspect", folder, "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["methods"] == ["bigain-tm:0.7"]
    assert len(report["sites"]) == 8


def test_export(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path
) -> None:
    out = tmp_path / "made" / "here"
    assert (
        run(monkeypatch, "export", folder, "--methods", "dense,bigain-tm:0.5", "--size", "16", "--out", str(out)) == 0
    )
    assert sorted(path.name for path in out.iterdir()) == ["model-bigain-tm-0.5.onnx", "model-dense.onnx"]
    printed = capsys.readouterr().out
    assert "3 bigain::LaplacianMergePlan, 3 bigain::Merge, 3 bigain::Unmerge" in printed
    assert "plans agree with torch's on 100.00% of the tokens" in printed


def test_export_of_a_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path
) -> None:
    calls = []
    monkeypatch.setattr("bigain_fx.export.package.write_package", lambda graphs, path: (
        calls.append(graphs[0][1]["method"]), path.write_bytes(b"12")))  # fmt: skip
    assert run(monkeypatch, "export", folder, "--format", "pt2", "--methods", "todo:2", "--out", str(tmp_path)) == 0
    assert calls == ["todo:2"]
    assert "model-todo-2.pt2: 0.0 MB; UNet2DConditionModel, todo:2: 3 of 8" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluate_a_pipeline_on_a_folder_of_images(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pipes.text_to_image().save_pretrained(tmp_path / "pipe")
    for index, name in enumerate(("cat", "cat", "dog", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (24, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    command = [
        "evaluate", str(tmp_path / "pipe"), "--data", str(tmp_path / "images"), "--images", "4", "--generate", "0",
        "--samples", "2", "--keep", "1", "--batch", "4", "--backend", "eager", "--out", str(tmp_path / "out"),
        "--methods", "dense,tome:0.5,bigain-tm:0.5", "--no-time",
    ]  # fmt: skip
    assert run(monkeypatch, *command) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["dense", "tome:0.5", "bigain-tm:0.5"]
    assert report["rows"][2]["against"] == "tome:0.5"
    assert report["rows"][2]["sites"] > 0
    assert report["classes"] == 2
    assert "| `bigain-tm:0.5` |" in printed
    assert "| `bigain-tm:0.5` |" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "report.png").stat().st_size > 5000
    assert run(monkeypatch, *command[:-1], "--time") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["ms"]) == {"dense, eager", "dense", "tome:0.5", "bigain-tm:0.5"}


@pytest.mark.parametrize("names", [("cat", "dog"), ("tabby, cat", "cat, dog", "dog")])
def test_a_class_conditional_pipeline_is_asked_for_the_classes_of_the_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """By name; or, where the data have as many classes as it has, by number: names may be ambiguous."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=16,
        num_embeds_ada_norm=3,
    )  # fmt: skip
    pipe = DiTPipeline(transformer=transformer, vae=pipes.vae(), scheduler=pipes.ddim())
    pipe.register_to_config(id2label={"0": "cat", "1": "bird", "2": "dog"})
    pipe.save_pretrained(tmp_path)
    data = LabelledImages("data", names, "{}", 8, ((0,), (1,)), None)
    monkeypatch.setattr(evaluation, "open_data", lambda source, size, kind: data)
    subject, _ = evaluation.open_both(str(tmp_path), "data", None)
    labels = subject.bundle.condition(torch.arange(len(names)))["class_labels"].tolist()
    assert labels == ([0, 2] if len(names) == 2 else [0, 1, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "photo-dti", "a.png"], "error: model='photo-dti' is neither one of mnist-dit"),
        (["classify", "mnist-dit", "no.png", "--backend", "eager"], "error: image 'no.png' is not there"),
        (["classify", "mnist-dit"], "Missing argument"),
        (["generate", "mnist-dit", "--prompts", "a|b"], "error: prompts=['a', 'b']: mnist-dit knows its classes"),
        (["generate", "mnist-dit", "--backend", "eagre"], "error: backend='eagre' is not known to torch.compile"),
        (["evaluate", "mnist-dit", "--samples", "4,x"], "error: samples='4,x' must be whole numbers, separated by"),
        (["evaluate", "mnist-dit", "--data", "pets"], "error: data='pets': mnist-dit is evaluated on its own"),
        (["evaluate", "mnist-dit", "--generate", "1"], "error: generate=1 must be 0, or 2 or more"),
        (["evaluate", "nowhere"], "error: data=None: name what nowhere is evaluated on"),
        (["spectrum", "sd2"], "error: name='sd2' is not an embedded denoiser"),
        (["inspect", "sd9"], "error: model='sd9' is neither a folder"),
        (["inspect", "sd2", "--methods", "bigain:0.7"], "'bigain:0.7' is not a method"),
        (["inspect", "sd2", "--methods", "tome:2"], "error: ratio=2.0 must be between 0 and 0.75"),
        (["bench", "sd2", "--device", "tpu"], "error: device='tpu' must be 'cpu' or 'cuda'"),
        (["export"], "Missing argument"),
        (
            ["export", "mnist-dit", "--format", "pt2", "--opset", "23"],
            "error: --opset, --attention and --no-verify say",
        ),
        (["export", "sd9"], "error: model='sd9' is neither a folder"),
        (["export", "mnist-dit", "--format", "tflite"], "'tflite' is not one of"),
        (["export", "mnist-dit", "--opset", "17"], "error: opset=17 must be an integer from 18 to 23"),
        (["export", "mnist-dit", "--dtype", "bfloat16"], "error: dtype torch.bfloat16 is not exported to ONNX"),
        (["inspct", "sd2"], "Did you mean 'inspect'?"),
        (["bench", "sd2", "--dtype", "float8"], "'float8' is not one of"),
    ],
)
def test_errors_are_short_and_end_with_status_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err + captured.out


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("demo", "inspect", "export", "bench", "evaluate", "spectrum"))
