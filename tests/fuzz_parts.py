"""What the attentions of the fuzz test are made of: sizes, norms, rotary angles, cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]
Choices = Mapping[str, str]
EPS = 1e-6


@dataclass(frozen=True)
class Sizes:
    """Of one block: the image's ``grid``, ``text`` tokens, ``width`` of the stream, ``heads`` of ``dim`` channels.

    ``start`` counts the text tokens that precede the image where both share one sequence.
    """

    grid: Pair
    text: int
    width: int
    heads: int
    dim: int
    start: int

    @property
    def image(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Env:
    """What all blocks see beside the streams: ``emb`` (B, C), ``mask`` (B, T) bool, ``ids`` (B, N, 2)."""

    emb: Tensor | None
    mask: Tensor | None
    ids: Tensor | None


CUTS = ("slice", "item", "unbind", "expand")
"""Names that could show less, or more often: between them and a norm, the metric is the attention's input."""


def renamed(t: Tensor, kind: str) -> Tensor:
    """The memory of ``t`` under another name; "contiguous" and "reshape" may copy instead."""
    match kind:
        case "view":
            return t.view(t.shape)
        case "slice":
            return t[:]
        case "detach":
            return t.detach()
        case "item":
            return t.chunk(1, -1)[0]
        case "unbind":
            return t[None].unbind(0)[0]
        case "squeeze":
            return t.unsqueeze(0).squeeze(0)
        case "transpose":
            return t.transpose(0, 1).transpose(0, 1)
        case "expand":
            return t.expand_as(t)
        case "type_as":
            return t.type_as(t)
        case "contiguous":
            return t.contiguous()
    return t.reshape(*t.shape[:-1], 1, -1).flatten(-2)


def overwrite(t: Tensor, kind: str) -> None:
    """Change ``t`` in place: all of it, its second dimension's first rows, or its first channels."""
    match kind:
        case _ if t.dtype == torch.bool:
            t[..., :1].fill_(True)
        case "mul":
            t.mul_(0.5)
        case "tanh":
            t.tanh_()
        case "copy":
            t.copy_(t * 0.7 + 0.1)
        case "rows":
            t[:, :2].mul_(-0.5)
        case "out":
            torch.mul(t, 0.5, out=t)
        case _:
            t[..., :2].fill_(0.3)


class Norm(nn.Module):
    """(B, S, C) -> (B, S, C)."""

    def __init__(self, kind: str, width: int, grid: Pair, cast: bool) -> None:
        super().__init__()
        self.kind, self.width, self.grid, self.cast = kind, width, grid, cast
        if kind in ("layer", "layer_grid"):
            self.layer = nn.LayerNorm(width)
        elif kind == "rms":
            self.layer = nn.RMSNorm(width, EPS)
        elif kind in ("group", "group_rows"):
            self.layer = nn.GroupNorm(2, width)
        if kind == "rms_weight":
            self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "none":
                return x
            case "layer_plain":
                return F.layer_norm(x.float() if self.cast else x, (self.width,)).to(x.dtype)
            case "rms_spelled" | "rms_weight":
                wide = x.float() if self.cast else x
                wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
                return wide.to(x.dtype) * self.weight if self.kind == "rms_weight" else wide.to(x.dtype)
            case "group":
                return self.layer(x.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2)
            case "group_rows":
                return self.layer(x.transpose(1, 2)).transpose(1, 2)
            case "layer_grid":
                return self.layer(x.unflatten(1, self.grid)).flatten(1, 2)
        return self.layer(x)


class HeadNorm(nn.Module):
    """Over the last dimension of queries or keys."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind, self.width = kind, width
        if kind in ("rms", "across"):
            self.layer: nn.Module = nn.RMSNorm(width, EPS)
        elif kind == "layer":
            self.layer = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "none":
                return x
            case "spelled":
                return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS).to(x.dtype)
            case "unit":
                return F.normalize(x, dim=-1) * 2.0
        return self.layer(x)


class Rotary(nn.Module):
    """Rotary angles of ``rows`` rows, the image's from ``start`` on."""

    def __init__(self, c: Choices, sizes: Sizes, rows: int, start: int) -> None:
        super().__init__()
        self.c, self.start, self.text = c, start, rows - sizes.image
        pairs = sizes.dim // 4 if c["rotary"] == "partial" else sizes.dim // 2
        y, x = torch.meshgrid(*(torch.arange(side) for side in sizes.grid), indexing="ij")
        image = torch.stack([y.flatten(), x.flatten()], 1).float()
        text = torch.stack([torch.arange(self.text) + 20.0, torch.zeros(self.text)], 1)
        self.image_ids, self.text_ids = nn.Buffer(image), nn.Buffer(text)
        self.ids = nn.Buffer(torch.cat([text[:start], image, text[start:]]))
        self.frequencies = nn.Buffer(torch.rand(2, pairs) * 2)
        self.cos, self.sin = nn.Buffer(self.angles(self.ids).cos()), nn.Buffer(self.angles(self.ids).sin())
        self.complex = nn.Buffer(torch.polar(torch.ones_like(self.cos), self.angles(self.ids)))

    def angles(self, ids: Tensor) -> Tensor:
        return ids[..., :1] * self.frequencies[0] + ids[..., 1:] * self.frequencies[1]

    def table(self, env: Env) -> Tensor | None:
        """Angles (S, D / 2) or (B, S, D / 2) where they are computed in the graph."""
        match self.c["table"]:
            case "buffer":
                return None
            case "arange":
                steps = torch.arange(len(self.ids), device=self.ids.device, dtype=self.ids.dtype)
                return steps[:, None] * self.frequencies[0]
            case "ids":
                return self.angles(self.ids)
            case "input" if env.ids is not None:
                text = self.text_ids.expand(len(env.ids), -1, -1)
                return self.angles(torch.cat([text[:, : self.start], env.ids, text[:, self.start :]], 1))
        text = self.angles(self.text_ids)
        return torch.cat([text[: self.start], self.angles(self.image_ids), text[self.start :]])

    def forward(self, x: Tensor, heads_dim: int, env: Env) -> Tensor:
        """Rotate ``x``: (B, H, S, D) with ``heads_dim`` 1, or (B, S, H, D) with 2."""
        angles = self.table(env)
        if angles is None:
            cos, sin, turn = self.cos, self.sin, self.complex
        else:
            cos, sin, turn = angles.cos(), angles.sin(), torch.polar(torch.ones_like(angles), angles)
        if self.c["odd"] == "base_table":
            tables = [t.clone() for t in (cos, sin, turn)]
            cos, sin, turn = (renamed(t, self.c["alias"]) for t in tables)
            for t in tables:
                overwrite(t, "mul" if t.is_complex() else self.c["write"])
        if heads_dim == 2 or cos.ndim == 3:
            cos, sin, turn = (t.unsqueeze(-2 if heads_dim == 2 else 1) for t in (cos, sin, turn))
        match self.c["rotary"]:
            case "half":
                cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
                first, second = x.chunk(2, -1)
                return x * cos + torch.cat([-second, first], -1) * sin
            case "interleaved":
                even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
                turned = torch.stack([-odd, even], -1).flatten(-2)
                return x * cos.repeat_interleave(2, -1) + turned * sin.repeat_interleave(2, -1)
            case "complex":
                pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
                return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
        turned, kept = x.chunk(2, -1)
        first, second = turned.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, kept], -1)


class CrossAttention(nn.Module):
    """From image tokens (B, S, C), or queries made already (B, H, S, D), to the text (B, T, C)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        inner = sizes.heads * sizes.dim
        self.sizes, self.q, self.k, self.v = sizes, *(nn.Linear(sizes.width, inner) for _ in range(3))
        self.out = nn.Linear(inner, sizes.width)

    def forward(self, x: Tensor, text: Tensor, project: bool) -> Tensor:
        def heads(t: Tensor) -> Tensor:
            return t.view(t.shape[0], -1, self.sizes.heads, self.sizes.dim).transpose(1, 2)

        q = heads(self.q(x)) if x.ndim == 3 else x
        o = F.scaled_dot_product_attention(q, heads(self.k(text)), heads(self.v(text))).transpose(1, 2).flatten(2)
        return self.out(o) if project else o
