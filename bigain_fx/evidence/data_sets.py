"""Labelled images to classify, read through Hugging Face ``datasets``: from its hub, an image folder or parquet files.

Known by name are ImageNet-1K, ImageNet-100, the Oxford-IIIT Pets and COCO 2017. The images keep the data set's order.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bigain_fx.passes.checks import told
from bigain_fx.passes.errors import InputError, first_line
from bigain_fx.pictures import to_tensor

COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps what is needed, and how a text-to-image model is asked for one of its classes.

    Attributes:
        hub: its id on the hub, if it has one.
        split: the split on the hub that it is evaluated on.
        prompt: of a class; its name is put in.
        image: the column of images.
        label: the column of a class, or of a list of classes; a dot goes into a nested column.
        names: of the classes, for files in which labels are bare numbers; none if more than one order is in use.
    """

    hub: str | None = None
    split: str | None = None
    prompt: str = "a photo of a {}"
    image: str = "image"
    label: str = "label"
    names: tuple[str, ...] = ()


KNOWN = {
    "imagenet-1k": Layout("ILSVRC/imagenet-1k", "validation"),
    "imagenet-100": Layout("clane9/imagenet-100", "validation"),
    "pets": Layout("timm/oxford-iiit-pet", "test", prompt="a photo of a {}, a type of pet"),
    "coco": Layout("detection-datasets/coco", "val", label="objects.category", names=COCO_CLASSES),
}
"""The data sets that are known by name."""

_SPLITS = {"train", "val", "validation", "test"}


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images with their classes, decoded one at a time.

    Attributes:
        name: the data set's, for messages and records.
        classes: their names, as the data set spells them.
        prompt: what a text-to-image model is asked for; a class is put in.
        size: of the images, in pixels.
        targets: the classes of each image, see :meth:`labels`.
        stored: the ``datasets.Dataset`` of the images as they are stored, one column.
    """

    name: str
    classes: tuple[str, ...]
    prompt: str
    size: int
    targets: tuple[tuple[int, ...], ...]
    stored: Any

    @property
    def prompts(self) -> tuple[str, ...]:
        """One per class: of several names the first one, with spaces for underscores.

        Raises:
            InputError: a class is called by a WordNet id such as ``n01440764``, which no text encoder understands.
        """
        for name in self.classes:
            if re.fullmatch(r"n\d{8}", name):
                raise InputError(f"{self.name}: class {name} is a WordNet id; a prompt needs the name behind it")
        return tuple(self.prompt.format(name.split(",")[0].strip().replace("_", " ")) for name in self.classes)

    def __len__(self) -> int:
        return len(self.targets)

    def labels(self, index: int) -> tuple[int, ...]:
        """The classes of image ``index``, ascending, each once; none for a COCO image in which nothing was marked.

        Raises:
            InputError: there is no such image.
        """
        self._check(index)
        return self.targets[index]

    def image(self, index: int) -> Tensor:
        """Image ``index`` as RGB, ``(3, size, size)`` float32 in [-1, 1].

        It is turned as its EXIF data say, its short side is resized bicubically to ``size``, and its centre cut out.

        Raises:
            InputError: there is no such image, or it cannot be decoded.
        """
        self._check(index)
        (stored,) = self.stored[index].values()
        stored = stored or {"bytes": b"", "path": None}
        try:
            with Image.open(stored["path"] if stored["bytes"] is None else BytesIO(stored["bytes"])) as file:
                return to_tensor(file, (3, self.size, self.size))
        except Exception as error:  # each format's decoder raises its own
            reason = "it is no image" if isinstance(error, UnidentifiedImageError) else first_line(error)
            where = f" ({stored['path']})" if stored["path"] else ""
            raise InputError(f"{self.name}: image {index}{where} cannot be decoded: {reason}") from error

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise InputError(f"{self.name}: there is no image {index}; there are {len(self)}, from 0 on")


def open_data(source: str, *, size: int, kind: str | None = None, split: str | None = None) -> LabelledImages:
    """The data set ``source``; labels are read, images are not.

    Args:
        source: a name in :data:`KNOWN`, which is loaded from the hub; a folder with one folder of images per class; a
            parquet file, or a folder of them.
        size: of the square images, in pixels.
        kind: the known data set whose columns and prompts a file or folder follows; None: columns ``image`` and
            ``label``, and prompts "a photo of a ...".
        split: on the hub, one of the data set's; None: the one to evaluate on. In a folder, the folder within it, or
            the parquet files whose names begin with that word; None: all there is.

    Raises:
        InputError: an argument out of range, a data set that cannot be loaded, a column that is not there, labels
            without names, a label that is no class, a class without images, or ``datasets`` is not installed.
    """
    if size < 1:
        raise InputError(f"size={size} must be at least 1")
    if kind is not None and kind not in KNOWN:
        raise InputError(f"kind={kind!r} is not a known data set; choose one of {', '.join(KNOWN)}")
    if source in KNOWN and kind not in (None, source):
        raise InputError(f"kind={kind!r} does not go with source={source!r}, which is a kind itself")
    if source not in KNOWN and not os.path.exists(source):
        raise InputError(f"{told('source', source)} is no file, no folder, and none of {', '.join(KNOWN)}")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"source={source!r} needs {error.name}; pip install 'bigain-fx[evaluate]'") from error

    name = source if source in KNOWN else Path(source).resolve().name
    layout = KNOWN.get(kind or source, Layout())
    with _no_progress_bars():
        rows = _from_hub(name, layout, split) if source in KNOWN else _from_disk(name, Path(source), split)
        flat = rows.flatten()  # names nested columns with a dot, but may take an image apart
        for column, there in ((layout.image, rows.column_names), (layout.label, flat.column_names)):
            if column not in there:
                raise InputError(f"{name}: there is no column {column!r}; there are {', '.join(there)}")
        try:
            stored = rows.select_columns(layout.image).cast_column(layout.image, datasets.Image(decode=False))
        except Exception as error:
            raise InputError(f"{name}: column {layout.image!r} is not one of images: {first_line(error)}") from error
        labels = [label if isinstance(label, list) else [label] for label in flat[layout.label][:]]
    classes = _classes(name, layout, flat.features[layout.label], labels)
    return LabelledImages(name, classes, layout.prompt, size, _targets(name, classes, labels), stored)


def _from_hub(name: str, layout: Layout, split: str | None) -> Any:
    """The rows of one split; the files of the others are not downloaded."""
    import datasets

    split = split or layout.split
    try:
        builder = datasets.load_dataset_builder(layout.hub)
        files = builder.config.data_files
        if files is None:  # the hub is out of reach, but an earlier load_dataset left the whole data set here
            return builder.as_dataset(split=split)
        if split in files:
            features = builder.info.features
            return datasets.load_dataset("parquet", data_files=files[split], features=features, split="train")
    except Exception as error:
        raise InputError(
            f"{name}: {layout.hub} cannot be loaded from the hub ({first_line(error)}); a folder of its parquet files "
            f"will do, with kind={name!r}"
        ) from error
    raise InputError(f"{name}: there is no split {split!r} of {layout.hub}; there are {', '.join(files)}")


def _from_disk(name: str, path: Path, split: str | None) -> Any:
    """The rows of parquet files or, where there are none, of a folder with one folder of images per class."""
    import datasets

    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        return _from_folders(name, path / (split or ""))
    words = [re.split(r"[-_.]", file.name)[0] for file in files]
    if split not in words if split else len(_SPLITS.intersection(words)) > 1:
        there = ", ".join(sorted(set(words))[:5])
        raise InputError(f"{name}: split={split!r} must be the first word of some parquet file's name: {there}")
    chosen = [glob.escape(str(file)) for file, word in zip(files, words, strict=True) if split in (None, word)]
    try:
        return datasets.load_dataset("parquet", data_files=chosen, split="train")
    except Exception as error:
        raise InputError(f"{name}: {path} cannot be read: {first_line(error.__cause__ or error)}") from error


def _from_folders(name: str, path: Path) -> Any:
    """The rows of a folder with one folder of images per class, in the order of their names.

    The reader in ``datasets`` would take a class called "train" for a split, and pass over linked folders.
    """
    import datasets

    folders = sorted(folder for folder in path.glob("[!.]*") if folder.is_dir())
    suffixes = {suffix for suffix, encoding in Image.registered_extensions().items() if encoding in Image.OPEN}
    files = [(str(f), c.name) for c in folders for f in sorted(c.glob("[!.]*")) if f.suffix.lower() in suffixes]
    if not files:
        raise InputError(f"{name}: {path} has no parquet files and no folders of images; split= is a folder within")
    images, labels = zip(*files, strict=True)
    classes = datasets.ClassLabel(names=[folder.name for folder in folders])
    return datasets.Dataset.from_dict(
        {"image": images, "label": labels}, datasets.Features({"image": datasets.Image(), "label": classes})
    )


def _classes(name: str, layout: Layout, feature: Any, labels: Sequence[Sequence[Any]]) -> tuple[str, ...]:
    """The names of the classes: the data set's own, the labels themselves, or those that were published."""
    while hasattr(feature, "feature"):  # a list of it
        feature = feature.feature
    found = {label for several in labels for label in several} - {None}
    if hasattr(feature, "names"):
        return tuple(feature.names)
    if found and all(isinstance(label, str) for label in found):
        return tuple(sorted(found))
    if not layout.names:
        raise InputError(
            f"{name}: column {layout.label!r} is {feature.dtype}; strings or a ClassLabel name the classes"
        )
    return layout.names


def _targets(name: str, classes: Sequence[str], labels: Sequence[Sequence[Any]]) -> tuple[tuple[int, ...], ...]:
    """The labels, numbers or names, as sorted numbers of classes; every class must have an image."""
    numbers: dict[Any, int] = {key: i for i, each in enumerate(classes) for key in (i, each)}
    for image, several in enumerate(labels):
        for label in several:
            if label not in numbers:
                raise InputError(f"{name}: image {image} has label {label!r}, which is none of {len(classes)} classes")
    targets = tuple(tuple(sorted({numbers[label] for label in several})) for several in labels)
    seen = set().union(*targets)
    empty = [each for i, each in enumerate(classes) if i not in seen]
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise InputError(f"{name}: {len(empty)} of {len(classes)} classes have no image: {shown}")
    return targets


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()
