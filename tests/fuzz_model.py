"""Transformer denoisers in plain torch, built from named choices: blocks of `fuzz_attention` on residual streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz_attention import Attention
from tests.fuzz_parts import Choices, CrossAttention, Env, Norm, Pair, Sizes, overwrite, renamed

CHANNELS, PATCH = 3, 2
PLAIN: Choices = {
    "kind": "image", "order": "image_first", "projection": "separate", "bias": "yes", "qk_norm": "none",
    "layout": "early", "gqa": "none", "rotary": "none", "table": "buffer", "rotary_at": "own", "mask": "none",
    "scale": "default", "gate": "none", "dropout": "no", "out": "linear", "reads": "none", "pooled": "no",
    "cross": "none", "odd": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Design:
    """All choices of one model; ``blocks`` and ``between`` have one entry a block."""

    source: str  # "conv" and "unshuffle": latents (B, 3, h, w); "tokens": (B, N, 3); "frames": (B, 2, 3, h, w)
    grid: Pair
    batch: int
    text: int
    width: int
    heads: int
    dim: int
    text_source: str  # "input", "param" (class tokens, registers), "pad" (zeros at the end), "reference" (an image)
    shared_order: str  # where text stands in a shared sequence: "first", "last", "around"
    split: str  # how a shared sequence is taken apart: "slice", "split", "narrow"
    embed: str  # "plain", "norm", "positions"
    doubled: str  # "yes": the batch is doubled inside, as for guidance
    refiner: str  # "yes": a self-attention among text tokens first
    between: tuple[str, ...]  # before each block: "none", "skip", "conv", "down_conv", "down_pool", "down_merge"
    repeat: int  # how often the blocks run one after the other, with the same weights
    blocks: tuple[Choices, ...]
    timestep: str  # "none", "sample" (B,), "one" (1,)
    dtype: str

    def grids(self) -> list[Pair]:
        """The grid of each block."""
        found, (rows, columns) = [], self.grid
        for step in self.between:
            if step.startswith("down"):
                rows, columns = rows // 2, columns // 2
            found.append((rows, columns))
        return found

    @property
    def start(self) -> int:
        """Text tokens before the image in a shared sequence."""
        order = "last" if self.text_source == "pad" else self.shared_order
        return {"first": self.text, "last": 0, "around": self.text // 2}[order]


class Block(nn.Module):
    """Norms, modulation, one self-attention, maybe a cross-attention and an MLP, on residual streams."""

    def __init__(self, c: Choices, sizes: Sizes) -> None:
        super().__init__()
        self.c, self.sizes, width = c, sizes, sizes.width
        self.norm = Norm(c["norm"], width, sizes.grid, c["norm_cast"] == "yes")
        self.attn = Attention(c, sizes)
        if c["modulation"] == "scale_shift":
            self.modulation = nn.Linear(width, 2 * width)
        elif c["modulation"] == "table":
            self.table = nn.Parameter(torch.randn(2, width) * 0.5)
        if c["dual"] == "yes":
            self.attn2 = Attention(PLAIN, sizes)
        if c["kind"] in ("joint", "added"):
            self.norm_text = nn.LayerNorm(width)
        if c["cross"] == "separate":
            self.norm_cross, self.cross = nn.LayerNorm(width), CrossAttention(sizes)
        if c["mlp"] == "yes":
            self.norm_mlp = nn.LayerNorm(width)
            self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        if c["post"] == "norm":
            self.post = nn.LayerNorm(width)
        if c["odd"] == "append":
            self.extra_token = nn.Parameter(torch.randn(1, 1, width))

    def forward(
        self, h: Tensor, text: Tensor | None, env: Env, before: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Both streams after the block; ``before``, of ``h`` and of the result: what that is the norm of, if it is."""
        c = self.c
        x, metric = self.prepare(self.enter(h), env, before)
        y = self.norm_text(text) if c["kind"] in ("joint", "added") else None  # type: ignore[arg-type]
        if self.attn.oracles:
            metric = metric.clone()
        if c["odd"] == "inplace_h":
            h.mul_(0.5)
        elif c["odd"] == "inplace_h_view":
            h.unsqueeze(0)[:, :, :1].mul_(-0.5)
        elif c["odd"] == "base_h":
            base, h = h, renamed(h, c["alias"])
            overwrite(base, c["write"])
        if c["norm"] == "none" and c["odd"] in ("inplace_h", "inplace_h_view", "base_h"):
            metric = x  # what is attended to is no norm's output any more
        out, out_text = self.attn(x, metric, y, env, text)
        if c["dual"] == "yes":
            out = out + self.attn2(x, metric, None, env, None)[0]
        out = self.leave(out)
        if c["odd"] == "inplace_residual":
            h.add_(out)
        else:
            h = (x if c["residual"] == "input" else h) + out
        text = text if out_text is None else text + out_text
        if c["cross"] == "separate":
            h = h + self.branch(lambda s: self.cross(s, text, project=True), self.norm_cross(h))
        if c["mlp"] == "yes":
            h = h + self.branch(self.mlp, self.norm_mlp(h))
        return (self.post(h), text, h) if c["post"] == "norm" else (h, text, None)

    def branch(self, layers: Callable[[Tensor], Tensor], s: Tensor) -> Tensor:
        """``layers(s)``, on merged tokens where the oracle is for the whole block."""
        used = self.attn.used
        return layers(s) if used is None else used.spread(layers(used.squeeze(s)))

    def prepare(self, h: Tensor, env: Env, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is attended to, and the metric that ``docs/operators.md`` prescribes."""
        c, base = self.c, h
        h = renamed(h, c["alias"]) if c["odd"] == "base_above" else h
        above, x = h, self.norm(h)
        if c["odd"] == "base_above":
            above = h.clone() if self.attn.oracles else h
            overwrite(base, c["write"])
        if c["odd"] == "inplace_above":
            above = h.clone() if self.attn.oracles else h
            h.unsqueeze(0)[:, :, ::2].mul_(-0.5)
        if c["norm"] == "none":
            above = None if before is None or c["odd"] in ("roll", "flip", "append") else self.enter(before)
        if c["odd"] == "x_cast":
            x = x.double().to(x.dtype)
        if c["modulation"] == "none":
            return x, x if above is None else above
        assert env.emb is not None
        if c["modulation"] == "scale_shift":
            shift, scale = self.modulation(F.silu(env.emb))[:, None].chunk(2, -1)
        else:
            shift, scale = (self.table[None] + env.emb.unsqueeze(1)).chunk(2, 1)
        x = x * (1 + scale) + shift
        return x, x

    def enter(self, h: Tensor) -> Tensor:
        (rows, columns), (b, n, width) = self.sizes.grid, h.shape
        match self.c["odd"]:
            case "roll":
                return h.roll(1, 1)
            case "flip":
                return h.flip(1)
            case "transposed":
                return h.view(b, rows, columns, width).transpose(1, 2).reshape(b, n, width)
            case "windows":
                cut = h.view(b, rows // 2, 2, columns // 2, 2, width).permute(0, 1, 3, 2, 4, 5)
                return cut.reshape(-1, 4, width)
            case "across_batch":
                return h.transpose(0, 1)
            case "joined_batch":
                return h.reshape(1, b * n, width)
            case "drop":
                return h[:, 1:]
            case "append":
                return torch.cat([h, self.extra_token.expand(b, -1, -1)], 1)
        return h

    def leave(self, y: Tensor) -> Tensor:
        (rows, columns), (b, n, width) = self.sizes.grid, y.shape
        match self.c["odd"]:
            case "roll":
                return y.roll(-1, 1)
            case "flip":
                return y.flip(1)
            case "transposed":
                return y.view(b, columns, rows, width).transpose(1, 2).reshape(b, n, width)
            case "windows":
                cut = y.view(-1, rows // 2, columns // 2, 2, 2, width).permute(0, 1, 3, 2, 4, 5)
                return cut.reshape(-1, rows * columns, width)
            case "across_batch":
                return y.transpose(0, 1)
            case "joined_batch":
                return y.reshape(-1, rows * columns, width)
            case "drop":
                return F.pad(y, (0, 0, 1, 0))
            case "append":
                return y[:, :-1]
        return y


class Between(nn.Module):
    """From the tokens of one block to those of the next."""

    def __init__(self, kind: str, grid: Pair, width: int) -> None:
        super().__init__()
        self.kind, self.grid = kind, grid
        if kind == "conv":
            self.layer: nn.Module = nn.Conv2d(width, width, 3, padding=1)
        elif kind == "down_conv":
            self.layer = nn.Conv2d(width, width, 2, stride=2)
        elif kind == "down_merge":
            self.layer = nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        (rows, columns), (b, n, width) = self.grid, h.shape
        if self.kind == "down_merge":
            cut = h.view(b, rows // 2, 2, columns // 2, 2, width).permute(0, 1, 3, 2, 4, 5)
            return self.layer(cut.reshape(b, n // 4, 4 * width))
        image = h.transpose(1, 2).unflatten(2, self.grid)
        if self.kind == "down_pool":
            return F.avg_pool2d(image, 2).flatten(2).transpose(1, 2)
        y = self.layer(image).flatten(2).transpose(1, 2)
        return h + y if self.kind == "conv" else y


class Denoiser(nn.Module):
    """A patch embedding, blocks, a head; returns the image's tokens (B, N, 4) and, if there is text, its stream."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.design, width, grids = design, design.width, design.grids()
        if design.source in ("conv", "frames"):
            self.patch = nn.Conv2d(CHANNELS, width, PATCH, stride=PATCH)
        else:
            self.linear = nn.Linear(CHANNELS * (PATCH**2 if design.source == "unshuffle" else 1), width)
        if design.embed == "positions":
            self.position = nn.Parameter(torch.randn(1, design.grid[0] * design.grid[1], width))
        if design.text_source == "reference":
            self.patch_reference = nn.Conv2d(CHANNELS, width, PATCH, stride=PATCH)
        elif design.text_source == "param":
            self.tokens = nn.Parameter(torch.randn(1, design.text, width))
        if design.timestep != "none":
            self.time, self.frequencies = nn.Linear(width, width), nn.Buffer(torch.logspace(0, -3, width))
        self.norm = nn.LayerNorm(width)

        def sizes(grid: Pair) -> Sizes:
            return Sizes(grid, design.text, width, design.heads, design.dim, design.start)

        self.blocks = nn.ModuleList(Block(c, sizes(grid)) for c, grid in zip(design.blocks, grids, strict=True))
        above = [design.grid, *grids[:-1]]
        self.between = nn.ModuleList(
            Between(kind, grid, width) for kind, grid in zip(design.between, above, strict=True)
        )
        if "skip" in design.between:
            self.skip = nn.Linear(2 * width, width)
        if design.refiner == "yes":
            self.refiner = CrossAttention(sizes(design.grid))
        self.head = nn.Linear(width, 4)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.data *= 2  # attention that matters

    def forward(
        self,
        image: Tensor,
        text: Tensor | None = None,
        mask: Tensor | None = None,
        timestep: Tensor | None = None,
        ids: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        design = self.design
        h, before = self.start(image)
        if reference is not None:
            text = self.patch_reference(reference).flatten(2).transpose(1, 2)
        elif design.text and design.text_source == "param":
            text = self.tokens.expand(len(h), -1, -1)
        emb = None
        if timestep is not None:
            emb = self.time((timestep[:, None] * self.frequencies).cos().to(h.dtype)).expand(len(h), -1)
        if design.doubled == "yes":
            h, emb, mask, ids = (None if t is None else torch.cat([t, t]) for t in (h, emb, mask, ids))
            before, text = None, None if text is None else torch.cat([text, -text])
        if design.refiner == "yes":
            y = self.norm(text)
            text = text + self.refiner(y, y, project=True)  # type: ignore[operator]
        joined = 0  # image tokens in a sequence that is shared with the text
        first = h
        for block, between, kind in [*zip(self.blocks, self.between, design.between, strict=True)] * design.repeat:
            shared = block.c["kind"] == "shared"
            if joined and not (shared and kind == "none"):
                (h, text), joined, before = self.take_apart(h, joined), 0, None
            if kind == "skip":
                h, before = self.skip(torch.cat([h, first], -1)), None
            elif kind != "none":
                h, before = between(h), None
                ids = ids if kind == "conv" else None
                first = first if kind == "conv" else h
            if shared and not joined:
                h, joined, before = self.put_together(h, text), block.sizes.image, None
            h, text, before = block(h, text, Env(emb, mask, ids), before)
        if joined:
            h, text = self.take_apart(h, joined)
        h = self.head(h)
        if design.doubled == "yes":
            first, second = h.chunk(2)
            h = second + 2 * (first - second)
        return (h,) if text is None else (h, text)

    def start(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """The image stream, and what it is the layer norm of, if it is one."""
        match self.design.source:
            case "conv" | "frames":
                image = image.flatten(0, 1) if image.ndim == 5 else image
                h = self.patch(image).flatten(2).transpose(1, 2)
            case "unshuffle":
                (rows, columns), b = self.design.grid, len(image)
                cut = image.view(b, CHANNELS, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
                h = self.linear(cut.reshape(b, rows * columns, -1))
            case _:
                h = self.linear(image)
        match self.design.embed:
            case "norm":
                return self.norm(h), h
            case "positions":
                h = h + self.position
        return h, None

    def put_together(self, h: Tensor, text: Tensor | None) -> Tensor:
        design = self.design
        if design.text_source == "pad":
            return F.pad(h, (0, 0, 0, design.text))
        assert text is not None
        pieces = [text[:, : design.start], h, text[:, design.start :]]
        return torch.cat([piece for piece in pieces if piece.shape[1]], 1)

    def take_apart(self, h: Tensor, image: int) -> tuple[Tensor, Tensor | None]:
        """Image and text from a shared sequence (B, S, C)."""
        start, rest = self.design.start, self.design.text - self.design.start
        if self.design.split == "split":
            first, tokens, last = h.split([start, image, rest], 1)
        else:
            first, last = h[:, :start], h[:, start + image :]
            tokens = h.narrow(1, start, image) if self.design.split == "narrow" else h[:, start : start + image]
        if self.design.text_source == "pad":
            return tokens, None
        return tokens, torch.cat([first, last], 1) if start and rest else first if start else last
