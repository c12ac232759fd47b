"""Ten-line attention layers, named for their layout.

Each calls `squeeze` on what it projects, and `spread` on what it adds back. Both are the identity unless a test sets
them to the naive operators: the toy is then its own oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C, HEADS, H, W = 16, 2, 4, 6
N = H * W


class Toy(nn.Module):
    """A patch embedding, one attention branch on the residual stream, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, C, 1)
        self.norm = nn.LayerNorm(C)
        self.q, self.k, self.v, self.out = (nn.Linear(C, C) for _ in range(4))
        self.squeeze: Callable[[Tensor, Tensor], Tensor] = lambda x, metric: x
        self.squeeze_kv: Callable[[Tensor, Tensor], Tensor] | None = None
        self.spread: Callable[[Tensor], Tensor] = lambda y: y

    def tokens(self, image: Tensor) -> Tensor:
        return self.embed(image).flatten(2).transpose(1, 2)

    def forward(self, image: Tensor) -> Tensor:
        residual = self.tokens(image)
        return residual + self.branch(self.norm(residual), residual)

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        whole, x = x, self.squeeze(x, metric)
        rows = x if self.squeeze_kv is None else self.squeeze_kv(whole, metric)
        return self.spread(self.out(self.attend(heads(self.q(x)), heads(self.k(rows)), heads(self.v(rows)))))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return join(F.scaled_dot_product_attention(q, k, v))


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], -1, HEADS, C // HEADS).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], -1, C)


class Separate(Toy):
    """The plain layout: metric on the residual stream, before the norm."""


class LiteralSizes(Toy):
    """Views that spell the number of tokens out."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, n = q.shape[0], q.shape[2]
        flat = [t.reshape(b * HEADS, t.shape[2], C // HEADS) for t in (q, k, v)]
        o = F.scaled_dot_product_attention(*flat)
        return o.view(b, HEADS, n, C // HEADS).permute(0, 2, 1, 3).reshape(b, n, C)


class FusedProjection(Toy):
    """One linear layer for q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        whole, x = x, self.squeeze(x, metric)
        rows = x if self.squeeze_kv is None else self.squeeze_kv(whole, metric)
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.squeeze_kv is not None:
            _, k, v = self.qkv(rows).chunk(3, -1)
        return self.spread(self.out(self.attend(heads(q), heads(k), heads(v))))


class FusedUnbind(FusedProjection):
    """One linear layer, reshaped to (3, B, heads, N, d) and unbound."""

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        whole, x = x, self.squeeze(x, metric)
        rows = x if self.squeeze_kv is None else self.squeeze_kv(whole, metric)

        def split(t: Tensor) -> tuple[Tensor, ...]:
            return self.qkv(t).view(t.shape[0], -1, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4).unbind(0)

        q, k, v = split(x)
        if self.squeeze_kv is not None:
            _, k, v = split(rows)
        return self.spread(self.out(self.attend(q, k, v)))


class NormedHeads(Toy):
    """Queries and keys normed per head, as an op and spelled out."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = F.rms_norm(q, (C // HEADS,))
        k = k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + 1e-6)
        return super().attend(q, k, v)


class Casts(Toy):
    """Each projection casts its own input, as autocast does; the result is cast back."""

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        whole, x = x, self.squeeze(x, metric)
        rows = x if self.squeeze_kv is None else self.squeeze_kv(whole, metric)
        q, k, v = (F.linear(t.double(), p.weight.double()) for t, p in ((x, self.q), (rows, self.k), (rows, self.v)))
        return self.spread(self.out(self.attend(heads(q), heads(k), heads(v)).float()))


class Gated(Toy):
    """The output is gated per channel, then dropped out (inactive) and rescaled, before the residual."""

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        return F.dropout(super().branch(x, metric), 0.1, False) * torch.full((1, 1, C), 0.5) / 2.0


class Modulated(Toy):
    """A scale and a shift after the norm: the metric is the attention's input itself."""

    def forward(self, image: Tensor) -> Tensor:
        residual = self.tokens(image)
        x = self.norm(residual) * 1.5 + 0.1
        return residual + self.branch(x, x)


class GroupNormed(Toy):
    """A group norm on the 4-D features, flattened afterwards: the metric is the norm's input, as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.group = nn.GroupNorm(4, C)

    def forward(self, image: Tensor) -> Tensor:
        features = self.embed(image)
        x = self.group(features).flatten(2).transpose(1, 2)
        y = self.branch(x, features.flatten(2).transpose(1, 2))
        return features + y.transpose(1, 2).unflatten(2, (H, W))


class PositionsAdded(Toy):
    """A learned position added to each token: adds keep the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, N, C))

    def tokens(self, image: Tensor) -> Tensor:
        return super().tokens(image) + self.position


class PixelUnshuffled(Toy):
    """Patches cut by a reshape, not by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(3 * 4, C)

    def tokens(self, image: Tensor) -> Tensor:
        b, c, h, w = image.shape
        patches = image.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)
        return self.patch(patches)


class LowRank(Toy):
    """A low-rank adapter beside the query projection, two linear layers in a row, as unmerged LoRA is."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(C, 2), nn.Linear(2, C)

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        whole, x = x, self.squeeze(x, metric)
        rows = x if self.squeeze_kv is None else self.squeeze_kv(whole, metric)
        q = self.q(x) + 0.5 * self.up(self.down(x))
        return self.spread(self.out(self.attend(heads(q), heads(self.k(rows)), heads(self.v(rows)))))


class Chained(Toy):
    """Two attentions in a row, with nothing between them: the second is projected from what the first gives back."""

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        y = super().branch(x, metric)
        return super().branch(y, y)


class InPlace(Toy):
    """The residual and the input's scale are arithmetic in place, as ``+=`` and ``*=`` are."""

    def forward(self, image: Tensor) -> Tensor:
        residual = self.tokens(image)
        x = self.norm(residual)
        x *= 1.5
        residual += self.branch(x, x)
        return residual


class ChangedAfterwards(Toy):
    """The attention's input is overwritten once its projections are made, under another name."""

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        whole, x = x, self.squeeze(x, metric)
        rows = x if self.squeeze_kv is None else self.squeeze_kv(whole, metric)
        q, k, v = heads(self.q(x)), heads(self.k(rows)), heads(self.v(rows))
        whole.unsqueeze(0).mul_(2)
        return self.spread(self.out(self.attend(q, k, v))) + whole.mean(1, keepdim=True)


REWRITTEN: list[type[Toy]] = [
    Separate, LiteralSizes, FusedProjection, FusedUnbind, NormedHeads, Casts, Gated, Modulated, GroupNormed,
    PositionsAdded, LowRank, InPlace, ChangedAfterwards,
]  # fmt: skip


class CrossKeys(Toy):
    """Near miss of Separate: the keys alone come from another tensor."""

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        return self.out(self.attend(heads(self.q(x)), heads(self.k(metric)), heads(self.v(x))))


class CrossValues(Toy):
    """Near miss of Separate: the values alone come from another tensor."""

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        return self.out(self.attend(heads(self.q(x)), heads(self.k(x)), heads(self.v(metric))))


class CrossQueries(Toy):
    """Near miss of Separate: the queries alone come from another tensor."""

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        return self.out(self.attend(heads(self.q(metric)), heads(self.k(x)), heads(self.v(x))))


class Causal(Toy):
    """Causal attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return join(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Dropped(Toy):
    """Attention dropout that is on."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return join(F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))


class Windows(Toy):
    """Attention within windows of four tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.reshape(t.shape[0], HEADS, -1, 4, C // HEADS) for t in (q, k, v))
        return join(F.scaled_dot_product_attention(q, k, v).flatten(2, 3))


class ChannelAttention(Toy):
    """Attention among channels: tokens are what is summed over."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(2, 3) for t in (q, k, v))
        return join(F.scaled_dot_product_attention(q, k, v).transpose(2, 3))


class AcrossBatch(Toy):
    """Attention among the images of a batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 2) for t in (q, k, v))
        return join(F.scaled_dot_product_attention(q, k, v).transpose(0, 2))


class Reused(Toy):
    """Near miss of Separate: the keys are also read outside the attention."""

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        k = self.k(x)
        return self.out(self.attend(heads(self.q(x)), heads(k), heads(self.v(x)))) + k.mean(1, keepdim=True)


class MixedKeys(Toy):
    """Near miss of Separate: a softmax over the tokens, between the projection and the attention."""

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        return self.out(self.attend(heads(self.q(x)), heads(self.k(x).softmax(1)), heads(self.v(x))))


class ChangedInPlace(Toy):
    """Near miss of ChangedAfterwards: the attention's input is overwritten among its projections, by another name."""

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        q = heads(self.q(x))
        x.unsqueeze(0).mul_(2)
        return self.out(self.attend(q, heads(self.k(x)), heads(self.v(x)))) + x.mean(1, keepdim=True)


class Kernel(Toy):
    """Near miss of Separate: a kernel is called by name, as some attention backends do."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return join(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0])


REFUSED: list[tuple[type[Toy], str]] = [
    (CrossKeys, "cross-attention"),
    (CrossValues, "cross-attention"),
    (CrossQueries, "cross-attention"),
    (Causal, "causal"),
    (Dropped, "dropout is active"),
    (Windows, "split or regrouped"),
    (ChannelAttention, "are not the tokens"),
    (AcrossBatch, "are not the tokens"),
    (Reused, "also read outside"),
    (MixedKeys, "tokens are mixed"),
    (ChangedInPlace, "is changed in place"),
    (Kernel, "attention by aten._scaled_dot_product_flash_attention_for_cpu.default: only scaled_dot_product"),
]


def image(batch: int = 2, **options: Any) -> Tensor:
    return torch.randn(batch, 3, H, W, **options)
