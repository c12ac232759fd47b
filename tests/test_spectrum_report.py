"""``bigain-fx spectrum`` on an embedded denoiser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bigain_fx as bgx
from bigain_fx import embedded
from bigain_fx.embedded.data import data_set
from bigain_fx.evidence import spectrum_report
from bigain_fx.evidence.spectrum import measure
from bigain_fx.passes.grammar import parse_list
from tests.test_sample import _one_thread  # noqa: F401

METHODS = parse_list("bigain-tm:0.7,todo:2")


@pytest.mark.slow
def test_the_files_say_what_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spectrum_report.run("mnist-dit", METHODS, (100, 800), images=3, seed=1, out=tmp_path / "new")
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"spectrum.png", "spectrum.json", "plan-bigain-tm-0.7.png"}
    written = json.loads((tmp_path / "new" / "spectrum.json").read_text())
    bundle, images = embedded.load("mnist-dit"), data_set("mnist").held_out.first(3)

    def inputs_at(step: int) -> dict[str, object]:
        noise = torch.randn(images.images.shape, generator=torch.Generator().manual_seed(1))
        timesteps = torch.full((3,), step)
        noisy = bundle.scheduler.add_noise(images.images, noise, timesteps)
        return {"hidden_states": noisy, "timestep": timesteps, "class_labels": images.labels}

    found = measure(bundle.model, inputs_at, method=METHODS["todo:2"], timesteps=(100, 800))
    torch.testing.assert_close(torch.tensor(written["methods"]["todo:2"]["retention"]), found.retention.mean(1))
    torch.testing.assert_close(torch.tensor(written["methods"]["todo:2"]["deviation"]), found.deviation.mean(1))
    high = found.frequencies > 0.375
    assert f"{float(found.retention[0][:, high].mean()):.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": 0}, "images=0 must be between 1 and 500"),
        ({"timesteps": (5, 1000)}, r"timesteps=\[1000\] must be between 0 and 999"),
        ({"model": "sd2"}, "name='sd2' is not an embedded denoiser"),
        ({"methods": parse_list("dense")}, "must be one merge, or one downsampling"),
    ],
)
def test_bad_input_leaves_nothing(changed: dict[str, object], message: str, tmp_path: Path) -> None:
    given = {"model": "mnist-dit", "methods": METHODS, "timesteps": (5,), "images": 2, "seed": 0} | changed
    with pytest.raises(bgx.InputError, match=message):
        spectrum_report.run(**given, out=tmp_path / "new")  # type: ignore[arg-type]
    assert not list(tmp_path.rglob("*.*"))
