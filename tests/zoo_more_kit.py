"""What the `zoo_more_*` files share: tiny sizes, lively random weights, inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests.zoo import Case, Part, Site

GRID = (4, 6)
TOKENS = math.prod(GRID)
TEXT = 6
"""As many as a grid half as fine as `GRID` has cells: what takes text for an image will be seen."""
HEADS, HEAD = 2, 16
WIDTH = HEADS * HEAD
ROPE = (4, 6, 6)


def make(name: str, config: Mapping[str, Any]) -> nn.Module:
    """The diffusers model ``name`` with random weights, in eval mode and without gradients."""
    model: nn.Module = getattr(diffusers, name)(**config)
    return enliven(model)


def enliven(model: nn.Module) -> nn.Module:
    """Draw every weight anew: fresh models attend evenly, and open their branches with gates and layers of zeros."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                sharper = 2.0 if name.removesuffix(".weight").endswith(("q", "k")) else 1.0
                weight.normal_(0, sharper / math.sqrt(math.prod(weight.shape[1:])))
            elif name.endswith("weight"):
                weight.normal_(1, 0.1)
            else:
                weight.normal_(0, 0.3)
    return model.eval().requires_grad_(False)


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


def fused(attention: str, path: str, **more: Any) -> Site:
    """A site at ``attention`` whose q, k and v are the thirds of the layer ``path``, on `GRID`."""
    q, k, v = (Part(f"{attention}.{path}", third * WIDTH, (third + 1) * WIDTH) for third in range(3))
    return Site(**{"name": attention, "q": q, "k": k, "v": v, "grid": GRID, **more})
