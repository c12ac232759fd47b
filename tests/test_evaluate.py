"""Evaluation: resumed to the same numbers, nothing counted twice; statistics against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bigain_fx as bgx
from bigain_fx.classify import Classification
from bigain_fx.evidence import summary
from bigain_fx.evidence.evaluate import Evaluation, Measured, Samples, Settings, _read
from bigain_fx.evidence.statistics import bootstrap, mcnemar
from bigain_fx.passes.grammar import parse_list
from bigain_fx.subject import Subject
from tests.damage import bytes_of, values_of
from tests.test_sample import _one_thread, tiny  # noqa: F401

CLASSES = ("a", "b", "c")
SETTINGS = Settings(n_samples=(1, 2), to_keep=(2, 1), batch=6, steps=2, guidance=2.0)


def subject() -> Subject:
    torch.manual_seed(0)
    return Subject(tiny(), CLASSES, (1, 8, 8))


def samples(count: int = 45, broken: int | None = None) -> Samples:
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def image(index: int) -> Tensor:
        if index == broken:
            raise bgx.InputError(f"data='toy': image {index} cannot be decoded")
        return images[index]

    return Samples("toy", CLASSES, count, image, lambda index: (index % 3,))


def measure(evaluation: Evaluation, text: str = "bigain-tm:0.5", **counts: int) -> Measured:
    given = {"images": 45, "generate": 23} | counts
    return evaluation.measure(text, parse_list(text)[text], backend="eager", **given)


def assert_same(one: Measured, other: Measured) -> None:
    assert torch.equal(one.classification.errors, other.classification.errors)
    assert torch.equal(one.classification.pairs, other.classification.pairs)
    assert one.classification.calls == other.classification.calls
    assert torch.equal(one.generated, other.generated)
    assert torch.equal(one.probe, other.probe)


# ------------------------------------------------------------------------------------- the evaluation


def test_a_stopped_evaluation_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    whole = measure(Evaluation(subject(), samples(), SETTINGS, tmp_path / "whole"))
    assert whole.classification.errors.shape == (45, 3)
    assert whole.generated.shape == (23, 1, 8, 8)
    assert whole.sites == 1
    stopped = tmp_path / "stopped"
    with pytest.raises(bgx.InputError, match="image 25 cannot be decoded"):
        measure(Evaluation(subject(), samples(broken=25), SETTINGS, stopped))
    assert [path.name for path in (stopped / "bigain-tm_0.5").iterdir()] == ["classify-000000-000020.safetensors"]
    assert_same(whole, measure(Evaluation(subject(), samples(), SETTINGS, stopped)))


def test_what_is_there_is_not_worked_out_again(tmp_path: Path) -> None:
    first = measure(Evaluation(subject(), samples(), SETTINGS, tmp_path))
    broken = Evaluation(subject(), samples(broken=0), SETTINGS, tmp_path)  # would raise
    assert_same(first, measure(broken))
    fewer = measure(broken, images=40, generate=20)
    assert torch.equal(fewer.classification.errors, first.classification.errors[:40])
    assert torch.equal(fewer.generated, first.generated[:20])


def test_damaged_chunks_are_worked_out_again(tmp_path: Path) -> None:
    whole = measure(Evaluation(subject(), samples(), SETTINGS, tmp_path))
    files = sorted((tmp_path / "bigain-tm_0.5").iterdir())
    good = {file: file.read_bytes() for file in files}
    assert len(files) == 6
    about = Evaluation(subject(), samples(), SETTINGS, tmp_path)._about
    for index, (file, content) in enumerate(good.items()):
        assert _read(file, f"bigain-tm_0.5/{file.stem} {about}") is not None
        for damaged in bytes_of(content, index, 60):
            file.write_bytes(damaged)
            assert _read(file, f"bigain-tm_0.5/{file.stem} {about}") is None, damaged
    assert_same(whole, measure(Evaluation(subject(), samples(), SETTINGS, tmp_path)))
    assert {file: file.read_bytes() for file in files} == good, "and kept again"


def test_a_chunk_in_anothers_place_is_worked_out_again(tmp_path: Path) -> None:
    whole = measure(Evaluation(subject(), samples(), SETTINGS, tmp_path))
    first, second, *_ = sorted((tmp_path / "bigain-tm_0.5").iterdir())
    first.write_bytes(second.read_bytes())
    assert_same(whole, measure(Evaluation(subject(), samples(), SETTINGS, tmp_path)))


def test_damaged_settings_are_written_again(tmp_path: Path) -> None:
    whole = measure(Evaluation(subject(), samples(), SETTINGS, tmp_path))
    file = tmp_path / "settings.json"
    good = file.read_bytes()
    one, said = subject(), []
    for content in [*list(values_of(json.loads(good)))[::4], *bytes_of(good, 0, 60)]:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        try:
            Evaluation(one, samples(), SETTINGS, tmp_path)
            assert json.loads(file.read_bytes()) == json.loads(good)
        except bgx.InputError as error:  # a value of the same kind: another evaluation
            said.append(str(error))
    assert len(said) < 40
    assert all("name another folder" in line and "\n" not in line for line in said)
    file.write_text("{")
    evaluation = Evaluation(subject(), samples(broken=0), SETTINGS, tmp_path)  # would raise
    assert_same(whole, measure(evaluation))
    assert file.read_bytes() == good
    file.write_text("{")
    other = replace(SETTINGS, seed=1)
    mixed = measure(Evaluation(subject(), samples(), other, tmp_path))
    assert_same(mixed, measure(Evaluation(subject(), samples(), other, tmp_path / "other")))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    evaluation = Evaluation(subject(), samples(), SETTINGS, tmp_path)
    (tmp_path / "bigain-tm_0.5" / "classify-000000-000020.safetensors").mkdir(parents=True)
    with pytest.raises(bgx.InputError, match=r"classify-000000-000020\.safetensors' cannot be written.*another folder"):
        measure(evaluation)
    (tmp_path / "file").write_text("")
    with pytest.raises(bgx.InputError, match=r"settings\.json' cannot be written.*name another folder"):
        Evaluation(subject(), samples(), SETTINGS, tmp_path / "file")


def test_other_weights_are_another_evaluation(tmp_path: Path) -> None:
    Evaluation(subject(), samples(), SETTINGS, tmp_path)
    other = subject()
    nn.init.constant_(other.bundle.model.proj_out_2.bias, 7.0)
    with pytest.raises(bgx.InputError, match=r"holds an evaluation with weights='.*', not '.*'; name another folder"):
        Evaluation(other, samples(), SETTINGS, tmp_path)


def test_dense_is_the_plain_model_and_methods_differ(tmp_path: Path) -> None:
    evaluation = Evaluation(subject(), samples(), SETTINGS, tmp_path)
    dense, merged = (measure(evaluation, text, images=9, generate=6) for text in ("dense", "bigain-tm:0.5"))
    torch.testing.assert_close(dense.probe, evaluation.probe_call(subject().bundle.model))
    assert dense.sites == 0
    assert merged.gflops < dense.gflops
    assert not torch.allclose(dense.classification.errors, merged.classification.errors, rtol=1e-4)
    assert measure(evaluation, "dense", images=9, generate=0).generated.numel() == 0


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        (Settings(n_samples=(1, 3), to_keep=(2, 1)), samples(), r"holds an evaluation with n_samples=\[1, 2\], not"),
        (SETTINGS, samples(44).__class__("other", CLASSES, 9, samples().image, samples().labels), "data='toy', not"),
        (SETTINGS, Samples("toy", ("a", "b"), 9, samples().image, samples().labels), "has 2 classes, tiny has 3"),
        (SETTINGS, Samples("toy", CLASSES, 2, samples().image, samples().labels), "has no image of 1 classes: c"),
    ],
)
def test_another_evaluation_is_refused(settings: Settings, data: Samples, message: str, tmp_path: Path) -> None:
    Evaluation(subject(), samples(), SETTINGS, tmp_path)
    before = (tmp_path / "settings.json").read_text()
    with pytest.raises(bgx.InputError, match=message):
        Evaluation(subject(), data, settings, tmp_path)
    assert (tmp_path / "settings.json").read_text() == before


@pytest.mark.parametrize("images", [0, 46])
def test_more_images_than_there_are(images: int, tmp_path: Path) -> None:
    with pytest.raises(bgx.InputError, match=f"images={images} must be between 1 and the 45 of toy"):
        measure(Evaluation(subject(), samples(), SETTINGS, tmp_path), images=images)


# ------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(1, 9, 2 * 11 / 1024), (9, 1, 2 * 11 / 1024), (0, 0, 1.0), (5, 5, 1.0), (0, 3, 0.25)],
)
def test_mcnemar_by_hand(only_first: int, only_second: int, p: float) -> None:
    both = 7
    first = torch.tensor([True] * (both + only_first) + [False] * (only_second + 4))
    second = torch.tensor([True] * both + [False] * only_first + [True] * only_second + [False] * 4)
    assert mcnemar(first, second) == pytest.approx(p)


def test_the_bootstrap_interval_is_that_of_the_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    values = (torch.rand(400, generator=generator) < 0.3).double() - (
        torch.rand(400, generator=generator) < 0.1
    ).double()
    low, high = bootstrap(values)
    half = 1.96 * float(values.std()) / math.sqrt(400)
    assert low == pytest.approx(float(values.mean()) - half, abs=0.01)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.01)
    assert bootstrap(values) == (low, high)
    assert bootstrap(torch.ones(5)) == (1.0, 1.0)


# ------------------------------------------------------------------------------------- the table


def result(text: str, right: list[bool], probe: float = 1.0) -> Measured:
    """Images of class 0, classified as 0 or as 1."""
    errors = torch.tensor([[0.1, 0.2] if good else [0.2, 0.1] for good in right], dtype=torch.float64)
    found = Classification(errors, torch.ones(errors.shape, dtype=torch.int64), 1)
    return Measured(text, found, torch.zeros(0), torch.full((10,), probe), 2.0, 1)


TEXTS = (
    "dense,tome:0.7,bigain-tm:0.7,bigain-tm:0.7:cell_layout=row,bigain-tm:0.5,todo:2,bigain-td:2:0.5,"
    "bigain-tm:0.7+bigain-td:2"
)


def table(**changed: Measured) -> dict[str, summary.Row]:
    methods = parse_list(TEXTS)
    measured = {text: result(text, [True] * 6 + [False] * 4) for text in methods} | changed
    return {row.method: row for row in summary.rows(measured, methods, [(0,)] * 10, {"dense": 1.5}, {"todo:2": 3.0})}


def test_methods_are_compared_with_the_baseline_of_equal_compression() -> None:
    half = replace(result("bigain-tm:0.5", [True] * 6 + [False] * 4), gflops=9.0)
    against = {text: row.against for text, row in table(**{"bigain-tm:0.5": half}).items()}
    assert against == {
        "dense": None, "tome:0.7": "dense", "bigain-tm:0.7": "tome:0.7", "bigain-tm:0.7:cell_layout=row": "tome:0.7",
        "bigain-tm:0.5": "dense", "todo:2": "dense", "bigain-td:2:0.5": "todo:2",
        "bigain-tm:0.7+bigain-td:2": "dense",
    }  # fmt: skip


def test_others_are_compared_with_the_baseline_of_nearest_work() -> None:
    gflops = {
        "dense": 4.0, "tome:0.5": 2.15, "tome:0.7": 1.95, "tome:0.7:block": 2.0, "bigain-tm:0.75/0.5": 2.04,
        "bigain-tm:0.75/0.5:levels=2": 2.0, "bigain-tm:0/0.75": 3.0, "bigain-tm:0.7:cell=4x4": 1.99,
    }  # fmt: skip
    methods = parse_list(",".join(gflops))
    measured = {text: replace(result(text, [True, False]), gflops=work) for text, work in gflops.items()}
    against = {row.method: row.against for row in summary.rows(measured, methods, [(0,)] * 2, {}, {})}
    assert against.pop("bigain-tm:0.75/0.5") == against.pop("bigain-tm:0.7:cell=4x4") == "tome:0.7"
    assert set(against.values()) == {None, "dense"}


def test_a_row_by_hand() -> None:
    better = result("bigain-tm:0.7", [True] * 9 + [False], probe=1.1)
    row = table(**{"bigain-tm:0.7": better})["bigain-tm:0.7"]
    assert (row.correct, row.images, row.accuracy) == (9, 10, 0.9)
    assert row.gain == pytest.approx(0.3)
    assert row.gain_low is not None
    assert row.gain_low >= 0
    assert row.p == pytest.approx(0.25)  # three images, all for the better
    assert row.agreement == pytest.approx(0.7)
    assert row.db == pytest.approx(20.0, abs=1e-3)
    dense = table()["dense"]
    assert (dense.gain, dense.p, dense.db, dense.agreement, dense.fid, dense.ms) == (None, None, None, 1.0, 1.5, None)
    assert table()["tome:0.7"].db == math.inf
    json.dumps([summary.to_dict(row) for row in table().values()], allow_nan=False)
    text = summary.to_table([row])
    assert "| `bigain-tm:0.7` | 90.0 (59.6 to 98.2) | `tome:0.7` | +30.0 (" in text
    assert "exact" in summary.to_table([table()["tome:0.7"]])


def test_average_precision_over_several_labels() -> None:
    """Errors rank image 0 before 1 before 2 for the first class: its positives 0 and 2 have precisions 1 and 2/3."""
    errors = torch.tensor([[0.1, 0.3], [0.2, 0.1], [0.3, 0.2]], dtype=torch.float64)
    found = Classification(errors, torch.ones(3, 2, dtype=torch.int64), 1)
    measured = {"dense": Measured("dense", found, torch.zeros(0), torch.ones(1), 1.0, 0)}
    (row,) = summary.rows(measured, {"dense": ()}, [(0,), (1,), (0, 1)], {}, {})
    assert row.mean_average_precision == pytest.approx(((1 + 2 / 3) / 2 + (1 + 1) / 2) / 2)
    assert row.correct == 3  # the third image is given one of its two labels


class Pixels(nn.Module):
    """Three features: means of thirds of the image."""

    num_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        assert self.weight.dtype == torch.float32
        return self.weight * images.float().flatten(1).unflatten(1, (3, -1)).mean(2)


def frechet(real: Tensor, made: Tensor) -> float:
    a, b = (Pixels()(images).double().numpy() for images in (real, made))
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(first @ second).astype(complex)).real.sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * root)


def test_fid_is_the_frechet_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    real, made, worse = (
        torch.randint(0, top, (60, 1, 6, 6), generator=generator, dtype=torch.uint8) for top in (256, 200, 50)
    )
    found = summary.fids(real.split(7), {"made": made, "worse": worse}, Pixels())
    assert found["made"] == pytest.approx(frechet(real, made), rel=1e-4)
    assert found["worse"] == pytest.approx(frechet(real, worse), rel=1e-4)


def test_the_figure_has_a_row_for_each_method() -> None:
    found = list(table().values())
    drawn = summary.figure("title", found)
    (axes,) = drawn.axes  # not every method has an FID
    assert [label.get_text() for label in axes.get_yticklabels()] == list(parse_list(TEXTS))
    everything: list[Any] = [row for row in found if row.fid is not None]
    assert len(summary.figure("title", everything).axes) == 2
