"""Labelled images from folders, parquet files and a hub that is out of reach, against what was written to disk."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow.parquet
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from PIL import Image
from torch import Tensor

from bigain_fx.evidence import data_sets
from bigain_fx.evidence.data_sets import COCO_CLASSES, KNOWN, open_data
from bigain_fx.passes.errors import InputError


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, and nothing written outside of ``tmp_path``."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def picture(mode: str = "RGB", width: int = 12, height: int = 9) -> Image.Image:
    """Every pixel and channel differs."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (width, height), bytes(37 * i % 251 for i in range(width * height * bands)))


def encoded(image: Image.Image | None = None) -> dict[str, Any]:
    file = io.BytesIO()
    (image or picture()).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def folders(root: Path, **images: int) -> Path:
    for name, count in images.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture().save(root / name / f"test_{i}.png")
    return root


def parquet(path: Path, feature: Any, labels: list[Any], column: str = "label", **others: Any) -> Path:
    """Written by ``datasets`` itself; ``feature`` is that of the labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = others.pop("images", [encoded() for _ in labels])
    features = Features({"image": datasets.Image(), column: feature})
    Dataset.from_dict({"image": images, column: labels}, features=features).to_parquet(path)
    return path


def objects(*categories: list[Any]) -> list[dict[str, Any]]:
    return [{"category": each, "area": [1.0] * len(each)} for each in categories]


def nested(category: Any) -> dict[str, Any]:
    return {"category": List(category), "area": List(Value("float64"))}


def message(source: object, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_data(str(source), **({"size": 8} | options))
    text = str(caught.value)
    assert "\n" not in text
    return text


def by_hand(image: Image.Image, size: int) -> Tensor:
    """Pixel by pixel, from an image that is already resized."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    values = [[image.getpixel((left + x, top + y)) for x in range(size)] for y in range(size)]
    return torch.tensor(values, dtype=torch.float64).permute(2, 0, 1) / 127.5 - 1


def test_a_folder_of_folders(tmp_path: Path) -> None:
    root = folders(tmp_path / "mine[1]", **{"train": 2, "red_fox": 1, "cat": 3})  # "train" is a split to some readers
    (root / "linked").symlink_to(root / "cat")
    (root / "cat" / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    data = open_data(str(root), size=8)
    assert (data.name, len(data)) == ("mine[1]", 9)
    assert data.classes == ("cat", "linked", "red_fox", "train")
    assert [data.labels(i) for i in range(9)] == [(c,) for c in (0, 0, 0, 1, 1, 1, 2, 3, 3)]
    assert data.prompts == ("a photo of a cat", "a photo of a linked", "a photo of a red fox", "a photo of a train")
    assert [path.name for path in tmp_path.iterdir()] == ["mine[1]"], "nothing is copied"


def test_a_split_is_a_folder_within(tmp_path: Path) -> None:
    folders(tmp_path / "data" / "val", b=1, a=1)
    folders(tmp_path / "data" / "train", c=1, d=1)
    assert open_data(str(tmp_path / "data"), size=8, split="val").classes == ("a", "b")
    for options in ({}, {"split": "test"}):
        where = Path(tmp_path / "data", *options.values())
        assert message(tmp_path / "data", **options) == (
            f"data: {where} has no parquet files and no folders of images; split= is a folder within"
        )


@pytest.mark.parametrize(
    ("kind", "names", "prompts"),
    [
        (None, ["a_b"], ["a photo of a a b"]),
        ("pets", ["maine_coon"], ["a photo of a maine coon, a type of pet"]),
        ("imagenet-1k", ["tench, Tinca tinca", "tailed frog"], ["a photo of a tench", "a photo of a tailed frog"]),
        ("imagenet-100", ["langur", "gyromitra"], ["a photo of a langur", "a photo of a gyromitra"]),
    ],
)
def test_parquet_keeps_the_names_and_the_order(
    tmp_path: Path, kind: str | None, names: list[str], prompts: list[str]
) -> None:
    labels = [len(names) - 1, 0, 0]
    path = parquet(tmp_path / "some.parquet", ClassLabel(names=names), labels)
    data = open_data(str(path), size=8, kind=kind)
    assert (data.classes, data.prompts) == (tuple(names), tuple(prompts))
    assert [data.labels(i) for i in range(len(data))] == [(label,) for label in labels]


def test_strings_are_sorted_classes(tmp_path: Path) -> None:
    data = open_data(str(parquet(tmp_path / "some.parquet", Value("string"), ["pug", "boxer", "pug"])), size=8)
    assert data.classes == ("boxer", "pug")
    assert data.targets == ((1,), (0,), (1,))


def test_coco_has_several_labels(tmp_path: Path) -> None:
    rows = objects([2, 0, 2], [], [1])
    path = parquet(tmp_path / "x" / "val-00000.parquet", nested(ClassLabel(names=["b", "c", "a"])), rows, "objects")
    data = open_data(str(path.parent), size=8, kind="coco")
    assert data.classes == ("b", "c", "a")
    assert data.prompts == ("a photo of a b", "a photo of a c", "a photo of a a")
    assert [data.labels(i) for i in range(3)] == [(0, 2), (), (1,)]
    assert data.image(2).shape == (3, 8, 8)


def test_coco_without_its_names_has_the_published_ones(tmp_path: Path) -> None:
    every = objects(list(range(80)))
    path = parquet(tmp_path / "some.parquet", nested(Value("int64")), every, "objects")
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.replace_schema_metadata(None), path)  # as tools that know no images write it
    data = open_data(str(path), size=8, kind="coco")
    assert data.classes == COCO_CLASSES
    assert data.image(0).shape == (3, 8, 8)
    path = parquet(tmp_path / "other.parquet", nested(Value("int64")), objects([1], [90]), "objects")
    assert message(path, kind="coco") == "other.parquet: image 1 has label 90, which is none of 80 classes"


@pytest.mark.parametrize(("width", "height", "size"), [(12, 9, 6), (9, 14, 6), (9, 9, 6), (40, 30, 30), (7, 5, 10)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_resized_and_cropped(tmp_path: Path, mode: str, width: int, height: int, size: int) -> None:
    original = picture(mode, width, height)
    short = min(width, height)
    rgb = Image.merge("RGB", [original] * 3 if mode == "L" else original.split()[:3])
    resized = rgb.resize((width * size // short, height * size // short), Image.Resampling.BICUBIC)
    path = parquet(tmp_path / "some.parquet", Value("string"), ["a"], images=[encoded(original)])
    image = open_data(str(path), size=size).image(0)
    assert (image.shape, image.dtype) == ((3, size, size), torch.float32)
    torch.testing.assert_close(image.double(), by_hand(resized, size), atol=1e-6, rtol=0)


@pytest.mark.parametrize("turned", [False, True])
def test_the_centre_is_what_is_left(tmp_path: Path, turned: bool) -> None:
    stripes = Image.new("RGB", (30, 10), "red")
    stripes.paste("lime", (10, 0, 20, 10))
    stripes = stripes.transpose(Image.Transpose.ROTATE_90) if turned else stripes
    path = parquet(tmp_path / "some.parquet", Value("string"), ["a"], images=[encoded(stripes)])
    image = open_data(str(path), size=10).image(0)
    assert image.amax((1, 2)).tolist() == image.amin((1, 2)).tolist() == [-1, 1, -1]


def test_cmyk_is_converted(tmp_path: Path) -> None:
    folders(tmp_path / "data", a=0)
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "data" / "a" / "cyan.jpg", quality=100)
    image = open_data(str(tmp_path / "data"), size=4).image(0)
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([-1.0, 1.0, 1.0]), atol=0.05, rtol=0)


def test_turned_upright(tmp_path: Path) -> None:
    folders(tmp_path / "data", a=0)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture(width=8, height=8).save(tmp_path / "data" / "a" / "x.png", exif=exif)
    image = open_data(str(tmp_path / "data"), size=8).image(0)
    expected = by_hand(picture(width=8, height=8), 8).flip(1, 2)
    torch.testing.assert_close(image.double(), expected, atol=1e-6, rtol=0)


def test_a_corrupt_image_is_an_error_of_its_own(tmp_path: Path) -> None:
    root = folders(tmp_path / "data", a=4)
    paths = sorted((root / "a").iterdir())
    paths[1].write_text("no image")
    whole = paths[2].read_bytes()
    paths[2].write_bytes(whole[: len(whole) // 2])
    data = open_data(str(root), size=8)
    paths[3].unlink()
    assert data.image(0).shape == (3, 8, 8)
    for index, reason in {1: "it is no image", 2: "[Tt]runcated", 3: "No such file"}.items():
        assert data.labels(index) == (0,)
        with pytest.raises(
            InputError, match=rf"^data: image {index} \(.*test_{index}.png\) cannot be decoded: .*{reason}"
        ):
            data.image(index)


def test_a_missing_image_is_an_error_of_its_own(tmp_path: Path) -> None:
    path = parquet(tmp_path / "some.parquet", Value("string"), ["a", "a"], images=[None, encoded()])
    data = open_data(str(path), size=8)
    with pytest.raises(InputError, match=r"^some.parquet: image 0 cannot be decoded: it is no image$"):
        data.image(0)
    assert data.image(1).shape == (3, 8, 8)


@pytest.mark.parametrize("index", [-1, 2])
def test_no_such_image(tmp_path: Path, index: int) -> None:
    data = open_data(str(folders(tmp_path / "data", a=2)), size=8)
    for ask in (data.image, data.labels):
        with pytest.raises(InputError, match=rf"^data: there is no image {index}; there are 2, from 0 on$"):
            ask(index)


def test_an_empty_class(tmp_path: Path) -> None:
    root = folders(tmp_path / "data", a=1, b=0, c=1)
    assert message(root) == "data: 1 of 3 classes have no image: b"
    path = parquet(tmp_path / "some.parquet", ClassLabel(names=list("abcdefgh")), [1])
    assert message(path) == "some.parquet: 7 of 8 classes have no image: a, c, d, e, f, ..."


def test_a_missing_column(tmp_path: Path) -> None:
    path = parquet(tmp_path / "some.parquet", Value("string"), ["a"], "breed")
    assert message(path) == "some.parquet: there is no column 'label'; there are image, breed"
    assert message(path, kind="coco") == "some.parquet: there is no column 'objects.category'; there are image, breed"
    datasets.Dataset.from_dict({"img": [1], "label": ["a"]}).to_parquet(path)
    assert message(path) == "some.parquet: there is no column 'image'; there are img, label"


def test_labels_without_names(tmp_path: Path) -> None:
    path = parquet(tmp_path / "some.parquet", Value("int64"), [0, 1])
    for kind in (None, "pets", "imagenet-100"):
        text = "some.parquet: column 'label' is int64; strings or a ClassLabel name the classes"
        assert message(path, kind=kind) == text


@pytest.mark.parametrize(
    ("feature", "labels", "wrong"),
    [(ClassLabel(names=["a"]), [0, -1], "-1"), (ClassLabel(names=["a"]), [0, None], "None"),
     (Value("string"), ["a", None], "None")],
)  # fmt: skip
def test_a_label_that_is_no_class(tmp_path: Path, feature: Any, labels: list[Any], wrong: str) -> None:
    path = parquet(tmp_path / "some.parquet", feature, labels)
    assert message(path) == f"some.parquet: image 1 has label {wrong}, which is none of 1 classes"


def test_a_column_that_is_not_one_of_images(tmp_path: Path) -> None:
    Dataset.from_dict({"image": [1.5], "label": ["a"]}).to_parquet(tmp_path / "some.parquet")
    assert message(tmp_path / "some.parquet").startswith("some.parquet: column 'image' is not one of images: ")


def test_a_wordnet_id_is_a_class_but_no_prompt(tmp_path: Path) -> None:
    data = open_data(str(folders(tmp_path / "data", n01440764=1, n01443537=1)), size=8, kind="imagenet-1k")
    assert data.classes == ("n01440764", "n01443537")
    with pytest.raises(InputError, match=r"^data: class n01440764 is a WordNet id; a prompt needs the name behind it$"):
        data.prompts  # noqa: B018


def test_arguments(tmp_path: Path) -> None:
    names = "imagenet-1k, imagenet-100, pets, coco"
    nowhere = str(tmp_path / "nowhere")
    assert message(nowhere) == f"source={nowhere!r} is no file, no folder, and none of {names}"
    assert message(tmp_path, kind="cats") == f"kind='cats' is not a known data set; choose one of {names}"
    assert message("pets", kind="coco") == "kind='coco' does not go with source='pets', which is a kind itself"
    assert message(tmp_path, size=0) == "size=0 must be at least 1"


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "some.csv").write_text("image,label")
    start = f"some.csv: {tmp_path / 'some.csv'} cannot be read: Parquet "
    assert message(tmp_path / "some.csv").startswith(start)


def repository(root: Path) -> Path:
    """As one on the hub: two splits of which one is broken, and class names in the card alone."""
    parquet(root / "data" / "test-00000-of-00002.parquet", Value("int64"), [1])
    parquet(root / "data" / "test-00001-of-00002.parquet", Value("int64"), [0])
    (root / "data" / "train-00000-of-00001.parquet").write_text("broken")
    names = "\n".join(f"          '{i}': {name}" for i, name in enumerate(("pug", "maine_coon")))
    features = (
        f"  - name: image\n    dtype: image\n  - name: label\n    dtype:\n      class_label:\n        names:\n{names}"
    )
    (root / "README.md").write_text(f"---\ndataset_info:\n  features:\n{features}\n---\n")
    return root


def test_a_known_data_set_is_one_split_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = str(repository(tmp_path / "repository"))
    monkeypatch.setitem(KNOWN, "pets", replace(KNOWN["pets"], hub=hub))
    data = open_data("pets", size=8)
    assert (data.name, data.classes, data.targets) == ("pets", ("pug", "maine_coon"), ((1,), (0,)))
    assert data.prompts[1] == "a photo of a maine coon, a type of pet"
    assert data.image(1).shape == (3, 8, 8)
    assert message("pets", split="val") == f"pets: there is no split 'val' of {hub}; there are train, test"


def test_what_an_earlier_download_left_is_read_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_dict({"image": [encoded()["bytes"]], "label": ["pug"]})
    left = SimpleNamespace(config=SimpleNamespace(data_files=None), as_dataset=lambda split: {"test": rows}[split])
    monkeypatch.setattr(datasets, "load_dataset_builder", {"timm/oxford-iiit-pet": left}.__getitem__)
    data = open_data("pets", size=8)
    assert (data.classes, data.image(0).shape) == (("pug",), (3, 8, 8))


def test_splits_of_parquet_files(tmp_path: Path) -> None:
    root = tmp_path / "x[1]"
    parquet(root / "data" / "test-00000-of-00002.parquet", Value("string"), ["pug"])
    parquet(root / "data" / "test-00001-of-00002.parquet", Value("string"), ["boxer"])
    assert open_data(str(root), size=8).targets == ((1,), (0,))
    parquet(root / "data" / "train-00000-of-00001.parquet", Value("string"), ["boxer"])
    assert open_data(str(root), size=8, split="test").targets == ((1,), (0,))
    for split in (None, "val"):
        text = f"x[1]: split={split!r} must be the first word of some parquet file's name: test, train"
        assert message(root, split=split) == text


@pytest.mark.parametrize("name", KNOWN)
def test_the_hub_is_out_of_reach(name: str) -> None:
    text = message(name)
    hub = KNOWN[name].hub
    assert text.startswith(f"{name}: {hub} cannot be loaded from the hub (Couldn't reach '{hub}' on the Hub")
    assert text.endswith(f"; a folder of its parquet files will do, with kind={name!r}")
    with pytest.raises(InputError) as caught:
        open_data(name, size=8)
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_datasets_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folders(tmp_path / "data", a=1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert message(root) == f"source={str(root)!r} needs datasets; pip install 'bigain-fx[evaluate]'"


def test_importing_needs_no_datasets() -> None:
    code = f"import sys, {data_sets.__name__}; print('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("disabled", [False, True])
def test_progress_bars_are_left_as_they_were(tmp_path: Path, capfd: pytest.CaptureFixture[str], disabled: bool) -> None:
    path = parquet(tmp_path / "some.parquet", Value("string"), ["a"])
    capfd.readouterr()
    (disable_progress_bars if disabled else enable_progress_bars)()
    try:
        open_data(str(path), size=8)
        message(path, kind="coco")
        assert are_progress_bars_disabled() == disabled
        assert capfd.readouterr().err == ""
    finally:
        enable_progress_bars()
