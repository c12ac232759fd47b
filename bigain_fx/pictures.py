"""Image files in and out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from bigain_fx.passes.errors import InputError


def to_tensor(picture: Image.Image, shape: tuple[int, int, int]) -> Tensor:
    """``picture`` as ``shape (C, H, W)`` float32 in [-1, 1], grey or RGB.

    It is turned as its EXIF data say, scaled bicubically to cover H x W, and cut at the centre.
    """
    channels, height, width = shape
    turned = ImageOps.exif_transpose(picture).convert("L" if channels == 1 else "RGB")
    across, down = turned.size
    wide = across * height >= down * width
    size = (across * height // down, height) if wide else (width, down * width // across)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    cut = turned.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(cut, dtype=np.float32)).view(height, width, channels)
    return pixels.permute(2, 0, 1) / 127.5 - 1


def read(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """The image file ``path`` as :func:`to_tensor` returns it.

    Raises:
        InputError: there is no such file, or it holds no image that can be read.
    """
    try:
        with Image.open(path) as picture:
            return to_tensor(picture, shape)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = "is not there" if isinstance(error, FileNotFoundError) else "cannot be read as an image"
        raise InputError(f"image {str(path)!r} {reason}") from error


def write(images: Tensor, folder: Path, names: Sequence[str]) -> None:
    """Write ``images (n, C, H, W)`` uint8 as ``NAME.png`` into ``folder``."""
    for image, name in zip(images, names, strict=True):
        pixels = image.permute(1, 2, 0).cpu().numpy()
        Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels).save(folder / f"{name}.png")


def as_text(images: Tensor, across: int = 5) -> str:
    """Draw ``images (n, 1, H, W)`` in [-1, 1] for a terminal, ``across`` a line, at half their size.

    A letter is two pixels, one above the other; ``n`` is a multiple of ``across``.
    """
    small = torch.nn.functional.avg_pool2d(images, 2)
    rows = [torch.cat(list(row[:, 0]), 1) > -0.3 for row in small.split(across)]
    bright = torch.cat(rows).tolist()
    return "\n".join(
        "".join(" ▀▄█"[above + 2 * below] for above, below in zip(*pair, strict=True)).rstrip()
        for pair in zip(bright[::2], bright[1::2], strict=True)
    )
