"""The grids of the images in one sequence of tokens, as values."""

from __future__ import annotations

import math
from typing import Any

from bigain_fx.passes import checks
from bigain_fx.passes.errors import GridError

Grid = tuple[int, int]
Grids = tuple[Grid, ...]
"""Those of the images in one sequence of tokens, one behind another."""
Hint = Grid | Grids
"""The same as a caller gives it and a report shows it: one image is a pair, several are pairs."""


def as_grids(hint: object) -> Grids:
    """The grids that a caller gives, ``(rows, columns)`` or a list of these, one for each image.

    Raises:
        GridError: it is neither, or a side is no positive integer.
    """
    pairs: list[Any] = [hint] if _is_pair(hint) else [*hint] if isinstance(hint, tuple | list) else []
    if not pairs or not all(map(_is_pair, pairs)):
        raise GridError(
            f"{checks.told('grid', hint)} must be two positive integers (rows, columns), in image tokens, or a list of "
            "such pairs, one for each image"
        )
    return tuple((int(rows), int(columns)) for rows, columns in pairs)


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(checks.counts, value))


def as_hint(grids: Grids) -> Hint:
    """The inverse of :func:`as_grids`."""
    return grids[0] if len(grids) == 1 else grids


def tokens_on(grids: Grids) -> int:
    """The tokens of all images."""
    return sum(map(math.prod, grids))


def text_of(grids: Grids, between: str = "+") -> str:
    """Such as ``"64x64"`` or ``"64x64+32x48"``."""
    return between.join(f"{rows}x{columns}" for rows, columns in grids)
