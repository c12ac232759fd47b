"""What the `zoo_more_*` files share: tiny sizes, lively random weights, inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests.zoo import Case, lively

GRID = (4, 6)
TOKENS = math.prod(GRID)
TEXT = 6
"""As many as a grid half as fine as `GRID` has cells: what takes text for an image will be seen."""
HEADS, HEAD = 2, 16
WIDTH = HEADS * HEAD
ROPE = (4, 6, 6)

NO_IMAGE = "not made from the model's first input"
"""Why the attention of text to itself is kept."""
NO_GRID = "no grid"
"""Why an attention is kept whose tokens may lie anywhere."""


def make(name: str, config: Mapping[str, Any]) -> nn.Module:
    """The diffusers model ``name`` with random weights, in eval mode and without gradients."""
    model: nn.Module = getattr(diffusers, name)(**config)
    return lively(model)


def case(name: str, config: Mapping[str, Any], inputs: Callable[[], dict[str, Any]], **more: Any) -> Case:
    """The case of the diffusers class ``name``; what follows a dash in ``name`` tells variants of it apart."""
    return Case(name, partial(make, name.split("-")[0], config), inputs, **more)


def noise(*shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape)


def steps() -> Tensor:
    """``(2,)`` timesteps in training steps."""
    return torch.tensor([100.0, 700.0])


def image_ids(frame: int = 0, grid: tuple[int, int] = GRID) -> Tensor:
    """``(N, 3)`` positions ``(frame, row, column)`` of the tokens of ``grid``, row by row."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([torch.full_like(rows, frame), rows, columns], -1).reshape(-1, 3).float()


def text_ids(count: int = TEXT) -> Tensor:
    """``(count, 3)`` positions of text tokens: all zero."""
    return torch.zeros(count, 3)


def padded_mask() -> Tensor:
    """``(2, TEXT)``: the second prompt is two tokens shorter."""
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[1, -2:] = False
    return mask
