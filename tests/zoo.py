"""What a tiny denoiser of the zoo is, and where its image self-attentions sit.

`zoo_named`, `zoo_unets` and `zoo_more` hold the denoisers; `by_hand` puts the operators of docs/operators.md at their
sites without any pass. Everything in them was worked out from the models' source by hand, not from captured graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Grid = tuple[int, int]
CROSS = {"*.attn2": "cross-attention"}
"""Why most blocks of diffusers keep their second attention."""


@dataclass(frozen=True)
class Part:
    """Output channels ``[start, stop)`` of the linear layer at ``path``; all of them by default."""

    path: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Site:
    """One image self-attention.

    Attributes:
        name: module path, as the report gives it.
        q: the linear layer, or the part of one, that makes queries of the image tokens x.
        k: the same for keys.
        v: the same for values.
        grid: rows and columns of the image tokens; of each image, where several come one behind another.
        norm: path of the norm whose *input* is the metric (x is that norm's direct output); None: the metric is x.
        x_offset: rows of x before the image tokens (Flux single blocks: text first).
        offset: rows before the image tokens among the rows of the attention's q, k and v.
    """

    name: str
    q: Part
    k: Part
    v: Part
    grid: Grid | tuple[Grid, ...]
    norm: str | None = None
    x_offset: int = 0
    offset: int = 0

    @property
    def images(self) -> list[tuple[Grid, int, int]]:
        """The grid, the first token and the end of each image."""
        found, start = [], 0
        grids: Any = [self.grid] if isinstance(self.grid[0], int) else self.grid
        for rows, columns in grids:
            found.append(((rows, columns), start, start + rows * columns))
            start += rows * columns
        return found


@dataclass(frozen=True)
class Case:
    """One denoiser, tiny and random.

    Attributes:
        name: pytest id.
        build: makes the model, in eval mode and without gradients; called after ``torch.manual_seed(0)``.
        inputs: makes the keyword arguments of one call; called after ``torch.manual_seed(1)``.
        grid: ``grid=`` of `bigain_fx.optimize`, only where neither the graph nor ``img_ids``/``img_shapes`` can tell.
        sites: every image self-attention that both methods rewrite with ``levels=None``.
        kept: fnmatch pattern of a module path -> a part of the reason with which its attention is kept.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    grid: Grid | tuple[Grid, ...] | None = None
    sites: tuple[Site, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)


def site(
    name: str, grid: Grid | tuple[Grid, ...], norm: str | None = None, *, x_offset: int = 0, offset: int = 0
) -> Site:
    """The site of an attention module whose projections are its layers ``to_q``, ``to_k`` and ``to_v``."""
    q, k, v = (Part(f"{name}.to_{key}") for key in "qkv")
    return Site(name, q, k, v, grid, norm, x_offset, offset)


def fused_site(path: str, width: int, grid: Grid | tuple[Grid, ...], norm: str | None = None, **offsets: int) -> Site:
    """The site whose q, k and v are the first three ``width`` output channels of the linear layer at ``path``."""
    q, k, v = (Part(path, third * width, (third + 1) * width) for third in range(3))
    return Site(path.rpartition(".")[0], q, k, v, grid, norm, **offsets)


def lively(model: nn.Module) -> nn.Module:
    """``model`` in eval mode, without gradients, every weight drawn anew so that attention matters.

    A fresh model attends evenly, and its branches may be closed by gates of zero: it would hide what is tested.
    """
    for name, weight in model.named_parameters():
        weight.requires_grad_(False)
        owner, _, kind = name.rpartition(".")
        sharp = 1.5 if owner.endswith(("_q", "_k", "q_proj", "k_proj")) else 1.0
        if kind == "weight" and weight.ndim > 1:
            weight.normal_(0, sharp / math.sqrt(math.prod(weight.shape[1:])))
        elif kind == "weight":
            weight.normal_(sharp, 0.2)
        else:
            weight.normal_(0, 0.3)
    return model.eval()
