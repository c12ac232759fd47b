"""Self-attentions in plain torch, built from named choices, each with a place for an oracle.

An attention without an oracle is ordinary code. With one, it projects its input again from what the oracle makes of
it, and lets the oracle attend: at full length, so that positions, masks and order are nobody's concern.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz_parts import CUTS, Choices, CrossAttention, Env, HeadNorm, Rotary, Sizes, overwrite, renamed


class Oracle(Protocol):
    """What is put in by hand at one attention; ``block``: and at what else works token by token up to the next one."""

    block: bool

    def swap(self, x: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        """What queries, and what keys and values, are projected from: as long as ``x`` (B, S, C)."""

    def squeeze(self, x: Tensor) -> Tensor:
        """``x`` (B, S, C) with the rows of representatives replaced by the means of their groups."""

    def spread(self, y: Tensor) -> Tensor:
        """``y`` (B, S, C) with the row of its representative for every token of the image."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, at: tuple[Tensor, Tensor, Tensor], **options: Any) -> Tensor:
        """Attention at full length.

        ``at`` has the positions of the image among queries and among keys, and the sample of each row of the first
        dimension.
        """


class Attention(nn.Module):
    """One self-attention, all of its choices included, up to but not including the residual."""

    def __init__(self, c: Choices, sizes: Sizes) -> None:
        super().__init__()
        self.c, self.sizes = c, sizes
        self.oracles: list[Oracle | None] = []  # one for each call to come
        self.used: Oracle | None = None  # by the last call, where the oracle is for the whole block
        self.between: Callable[[], None] = lambda: None  # what happens after queries, before keys and values
        width, heads, dim = sizes.width, sizes.heads, sizes.dim
        self.groups = {"none": heads, "broadcast": 1}.get(c["gqa"], heads // 2)
        inner, small, bias = heads * dim, self.groups * dim, c["bias"] == "yes"
        self.parts = [inner, small, small]
        self.rest = {"mlp": 2 * width, "gated": inner}.get(c["projection"], 0)
        match c["projection"]:
            case "separate" | "lora" | "tied_qk" | "tied_kv":
                self.q, self.k, self.v = (nn.Linear(width, n, bias) for n in self.parts)
            case "kv_fused":
                self.q, self.kv = nn.Linear(width, inner, bias), nn.Linear(width, 2 * small, bias)
            case "qk_fused":
                self.qk, self.v = nn.Linear(width, inner + small, bias), nn.Linear(width, small, bias)
            case _:
                self.qkv = nn.Linear(width, inner + 2 * small + self.rest, bias)
        if c["projection"] == "lora":
            self.down, self.up = nn.Linear(width, 2, False), nn.Linear(2, inner, False)
        across = c["qk_norm"] == "across"
        self.norm_q, self.norm_k = (HeadNorm(c["qk_norm"], n if across else dim) for n in (inner, small))
        self.own = sizes.image + (sizes.text if c["kind"] == "shared" else 0)
        self.rows = self.own + (sizes.text if c["kind"] == "joint" else 0)
        self.keys = self.own + (sizes.text if c["kind"] in ("joint", "added") else 0)
        self.start = sizes.text if c["order"] == "text_first" else 0
        if c["kind"] in ("image", "shared"):
            self.start = sizes.start if c["kind"] == "shared" else 0
        if c["rotary"] != "none":
            whole = c["kind"] == "shared" or c["rotary_at"] == "joined"
            self.rotary = Rotary(c, sizes, self.rows, self.start) if whole else Rotary(c, sizes, sizes.image, 0)
        if c["kind"] in ("joint", "added"):
            self.text_q, self.text_k, self.text_v = nn.Linear(width, inner), *(nn.Linear(width, small) for _ in "kv")
            self.text_out = nn.Linear(inner, width)
        self.positions = nn.Parameter(torch.randn(self.own, dim)) if c["odd"] == "positions" else None
        if c["odd"] in ("conv_v", "lepe"):
            self.conv = nn.Conv1d(small if c["odd"] == "conv_v" else inner, small, 3, padding=1, groups=dim)
        if c["mask"] == "relative":
            self.table = nn.Parameter(torch.randn(7, heads) * 2)
            self.index = nn.Buffer(torch.randint(7, (self.rows, self.keys)))
        if c["mask"] in ("keys", "full", "full_heads", "full_bool"):
            shape = {"keys": (1, 1, 1), "full_heads": (1, heads, self.rows)}.get(c["mask"], (self.rows,))
            self.bias = nn.Buffer(torch.randn(*shape, self.keys) * 2)
        self.out = nn.Linear(inner + (self.rest if c["projection"] == "mlp" else 0), width, bias)
        if c["gate"] in ("token", "head_token"):
            self.gate = nn.Linear(width, inner if c["gate"] == "token" else heads)
        elif c["gate"] != "none":
            self.constant_gate = nn.Parameter(torch.randn(*((heads, 1, 1) if c["gate"] == "head" else (width,))))
        if c["reads"] != "none":
            self.extra = nn.Linear({"o": inner, "x": width, "q": inner}.get(c["reads"], small), width)
        if c["out"] == "sandwich":
            self.post = nn.LayerNorm(width)
        if c["cross"] in ("added", "same_query"):
            self.cross = CrossAttention(sizes)
        self.drop = nn.Dropout(0.1)

    @property
    def early(self) -> bool:
        """Whether heads come before rows from the start: (B, H, S, D), else (B, S, H, D)."""
        return self.c["layout"] in ("early", "flat", "head_major")

    def project(self, x: Tensor, env: Env) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v, each (B, H, S, D) or (B, S, H, D), and what else the projection gives: (B, S, ...) or None."""
        c, (b, n, _), dim = self.c, x.shape, self.sizes.dim
        rest: Tensor | None = None
        match c["projection"]:
            case "separate" | "lora":
                first = x.clone() if c["odd"] == "base_clones" else x
                q = self.q(first) + 0.5 * self.up(self.down(first)) if c["projection"] == "lora" else self.q(first)
                self.between()
                x = x.clone() if c["odd"] == "base_clones" else x
                k, v = self.k(x), self.v(x)
            case "tied_qk":
                q, v = self.q(x), self.v(x)
                k = q
            case "tied_kv":
                q, k = self.q(x), self.k(x)
                v = k
            case "kv_fused":
                q, (k, v) = self.q(x), self.kv(x).chunk(2, -1)
            case "qk_fused":
                (q, k), v = self.qk(x).split(self.parts[:2], -1), self.v(x)
            case "chunk":
                q, k, v = self.qkv(x).chunk(3, -1)
            case "split":
                q, k, v = self.qkv(x).split(self.parts, -1)
            case "slices":
                y, (i, j, _) = self.qkv(x), self.parts
                q, k, v = y[..., :i], y[..., i : i + j], y[..., i + j :]
            case "unbind":
                q, k, v = self.qkv(x).view(b, n, 3, -1, dim).permute(2, 0, 3, 1, 4).unbind(0)
            case "per_head":
                q, k, v = self.qkv(x).view(b, n, -1, 3 * dim).chunk(3, -1)
            case _:
                q, k, v, rest = self.qkv(x).split([*self.parts, self.rest], -1)
        if c["odd"] == "conv_v":
            v = v + self.conv(v.transpose(1, 2)).transpose(1, 2)
        if c["qk_norm"] == "across":
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (self.heads(t) for t in (q, k, v))
        if c["qk_norm"] != "across":
            q, k = self.norm_q(q), self.norm_k(k)
        if self.positions is not None:
            at_heads = self.positions if self.early else self.positions[:, None]
            q, k = q + at_heads, k + at_heads
        if c["rotary"] != "none" and c["rotary_at"] == "own":
            q, k = (self.rotary(t, 1 if self.early else 2, env) for t in (q, k))
        return q, k, v, rest

    def heads(self, t: Tensor) -> Tensor:
        """Split heads off (B, S, H * D), in the layout chosen."""
        if t.ndim == 4:
            first = self.c["projection"] == "unbind"
            return t if first == self.early else t.transpose(1, 2)
        b, n, _ = t.shape
        if self.c["layout"] == "unflatten":
            return t.unflatten(-1, (-1, self.sizes.dim))
        t = t.reshape(b, n, -1, self.sizes.dim)
        return t.transpose(1, 2) if self.early else t

    def context(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of the text stream (B, T, C)."""
        dim = self.sizes.dim
        q, k, v = (p(y).unflatten(-1, (-1, dim)) for p in (self.text_q, self.text_k, self.text_v))
        if self.c["qk_norm"] not in ("none", "across"):
            q, k = self.norm_q(q), self.norm_k(k)
        return tuple(t.transpose(1, 2) if self.early else t for t in (q, k, v))  # type: ignore[return-value]

    def mask(self, env: Env) -> Tensor | None:
        """The mask over all keys; True or 0 lets a query see a key."""
        kind, dtype = self.c["mask"], self.out.weight.dtype
        if kind in ("text_bool", "text_add", "outer"):
            assert env.mask is not None
            image = torch.ones(len(env.mask), self.sizes.image, dtype=torch.bool, device=env.mask.device)
            keys, queries = (torch.cat([env.mask[:, :start], image, env.mask[:, start:]], 1)
                             for start in (self.key_start, self.start))  # fmt: skip
            if kind == "outer":
                return (1 - (queries[:, :, None] & keys[:, None]).to(dtype))[:, None] * -1e4
            return keys[:, None, None] if kind == "text_bool" else (1 - keys[:, None, None].to(dtype)) * -1e4
        if kind == "relative":
            return self.table[self.index].permute(2, 0, 1)[None]
        if kind in ("none", "causal"):
            return None
        return self.bias > -2.5 if kind == "full_bool" else self.bias

    @property
    def key_start(self) -> int:
        """Where the image starts among the keys."""
        flipped = self.c["odd"] in ("keys_other_way", "misaligned")
        return self.sizes.text - self.start if flipped else self.start

    def forward(
        self, x: Tensor, metric: Tensor, y: Tensor | None, env: Env, text: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The branch's output for ``x`` (B, S, C), and for the context ``y`` (B, T, C) of joint attention."""
        c, rows = self.c, 2 if self.early else 1
        oracle = self.oracles.pop(0) if self.oracles else None
        base = x
        match c["odd"]:
            case "base_first":
                overwrite(base, c["write"])
                x = renamed(base, c["alias"])
            case "base_before" | "base_after" | "base_between" | "base_clones":
                x = renamed(base, c["alias"])
        if c["odd"] == "base_before":
            overwrite(base, c["write"])
        if c["odd"] in ("base_first", "base_before"):
            metric = x
        elif c["odd"] == "base_after" and c["alias"] in CUTS:
            metric = x.clone()
        if c["odd"] in ("base_between", "base_clones"):
            self.between = lambda: overwrite(base, c["write"])
        q, k, v, rest = self.project(x, env)
        whole = {"q": q, "k": k, "v": v}
        if oracle is not None:
            for_queries, for_keys = oracle.swap(x, metric)
            q, (_, k, v, _) = self.project(for_queries, env)[0], self.project(for_keys, env)
            if oracle.block:
                x, rest = for_queries, self.project(for_queries, env)[3]
        self.used = oracle if oracle is not None and oracle.block else None
        match c["odd"]:
            case "inplace_x":
                x.mul_(0.5)
            case "inplace_x_view":
                x.unsqueeze(0).mul_(0.5)
            case "base_after":
                overwrite(base, c["write"])
            case "inplace_q" | "base_q":
                other = renamed(q, c["alias"])
                for t in {id(t): t for t in (q, whole["q"])}.values():
                    overwrite(t, "mul" if c["odd"] == "inplace_q" else c["write"])
                q = q if c["odd"] == "inplace_q" else other
        if y is not None:
            text_q, text_k, text_v = self.context(y)
            q = self.join(q, text_q, False) if c["kind"] == "joint" else q
            k = self.join(k, text_k, c["odd"] in ("keys_other_way", "misaligned"))
            v = self.join(v, text_v, c["odd"] == "keys_other_way")
        if c["rotary"] != "none" and c["rotary_at"] == "joined":
            q, k = (self.rotary(t, 1 if self.early else 2, env) for t in (q, k))
        elif c["rotary"] != "none" and c["rotary_at"] == "slice":
            for t in (q, k):
                span = slice(self.start, self.start + self.sizes.image)
                image = t[:, :, span] if self.early else t[:, span]
                image.copy_(self.rotary(image, 1 if self.early else 2, env))
        if c["odd"] == "flip_kv":
            k, v = k.flip(rows), v.flip(rows)
        elif c["odd"] == "flip_k":
            k = k.flip(rows)
        elif c["odd"] == "roll_q":
            q = q.roll(1, rows)
        if not self.early:
            q, k, v = (t.permute(0, 2, 1, 3) for t in (q, k, v))
        o = self.attend(q, k, v, env, oracle)
        o_text: Tensor | None = None
        if c["kind"] == "joint" and self.start:
            o_text, o = o[:, : self.sizes.text], o[:, self.sizes.text :]
        elif c["kind"] == "joint":
            o, o_text = o.split([self.sizes.image, self.sizes.text], 1)
        out = self.finish(o, rest, whole, x, text, env)
        out = out if self.used is None else self.used.spread(out)
        return out, None if o_text is None else self.text_out(o_text)

    def join(self, t: Tensor, text: Tensor, other_way: bool) -> Tensor:
        first = (self.start > 0) != other_way
        return torch.cat([text, t] if first else [t, text], 2 if self.early else 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, env: Env, oracle: Oracle | None) -> Tensor:
        """(B, H, S, D) -> (B, S, H * D)."""
        c, (b, h, n, dim) = self.c, q.shape
        options: dict[str, Any] = {}
        if c["gqa"] == "expand":
            k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(b, h, -1, dim) for t in (k, v))
        elif c["gqa"] == "interleave":
            k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        elif c["gqa"] == "flag":
            options["enable_gqa"] = True
        if (mask := self.mask(env)) is not None:
            if c["odd"] == "base_mask":
                base = mask.clone()
                mask = renamed(base, c["alias"])
                overwrite(base, c["write"])
            options["attn_mask"] = mask
        if c["mask"] == "causal":
            options["is_causal"] = True
        if c["scale"] == "given":
            options["scale"] = 0.7
        if c["layout"] == "flat":
            q, k, v = (t.reshape(b * h, t.shape[2], dim) for t in (q, k, v))
        elif c["layout"] == "head_major":
            q, k, v = (t.transpose(0, 1).reshape(b * h, t.shape[2], dim) for t in (q, k, v))
        if c["odd"] == "windows_rows":
            q, k, v = (t.unflatten(-2, (-1, 2)) for t in (q, k, v))
        if oracle is None:
            o = F.scaled_dot_product_attention(q, k, v, **options)
        else:
            image, samples = torch.arange(self.sizes.image), torch.arange(b)
            at_queries = image if c["kind"] == "added" else image + self.start
            at_keys = self.keys - 1 - (image + self.key_start) if c["odd"] == "flip_kv" else image + self.key_start
            if q.ndim == 3:
                samples = samples.repeat(h) if c["layout"] == "head_major" else samples.repeat_interleave(h)
            o = oracle.attend(q, k, v, (at_queries, at_keys, samples), **options)
        if c["odd"] == "windows_rows":
            o = o.flatten(-3, -2)
        if c["layout"] == "flat":
            o = o.view(b, h, n, dim)
        elif c["layout"] == "head_major":
            o = o.view(h, b, n, dim).transpose(0, 1)
        if c["gate"] == "head":
            o = o * self.constant_gate
        if c["layout"] == "late":
            return o.permute(0, 2, 1, 3).reshape(b, n, h * dim)
        return o.transpose(1, 2).flatten(2)

    def finish(
        self, o: Tensor, rest: Tensor | None, whole: Mapping[str, Tensor], x: Tensor, text: Tensor | None, env: Env
    ) -> Tensor:
        """From the attention's output (B, S, H * D) to the branch's (B, S, C)."""
        c, attended = self.c, o
        if c["reads"] == "v_direct":
            o = o + self.rows_of(whole["v"])
        if c["odd"] == "lepe":
            o = o + self.conv(self.rows_of(whole["v"]).transpose(1, 2)).transpose(1, 2)
        if c["gate"] == "token":
            o = o * self.gate(x).sigmoid()
        elif c["gate"] == "head_token":
            o = (o.unflatten(-1, (self.sizes.heads, -1)) * self.gate(x).sigmoid()[..., None]).flatten(2)
        if c["projection"] == "gated":
            o = o * rest.sigmoid()  # type: ignore[union-attr]
        if c["cross"] == "added":
            o = o + self.cross(x, text, project=False)
        elif c["cross"] == "same_query":
            o = o + self.cross(whole["q"] if self.early else whole["q"].transpose(1, 2), text, project=False)
        if c["odd"] == "inplace_o":
            o.mul_(0.5)
        elif c["odd"] == "base_o":
            base, o = o, renamed(o, c["alias"])
            overwrite(base, c["write"])
        out = self.out(torch.cat([o, F.gelu(rest)], -1) if c["projection"] == "mlp" else o)  # type: ignore[arg-type]
        if c["dropout"] == "yes":
            out = self.drop(out)
        match c["out"]:
            case "sandwich":
                out = self.post(out)
            case "scaled":
                out = out.float().div(1.5).to(out.dtype)
        match c["gate"]:
            case "modulation":
                out = out * env.emb[:, None].tanh()  # type: ignore[index]
            case "param":
                out = self.constant_gate * out
        if c["odd"] == "inplace_out":
            out.mul_(0.5)
        elif c["odd"] == "inplace_row":
            out[:, :1].mul_(0.5)
        elif c["odd"] == "base_out":
            base, out = out, renamed(out, c["alias"])
            overwrite(base, c["write"])
        if c["reads"] == "x_direct":
            out = out + x
        elif c["reads"] not in ("none", "v_direct"):
            read = {"o": attended, "x": x}.get(c["reads"])
            read = self.extra(self.rows_of(whole[c["reads"]]) if read is None else read)
            out = out + (read.mean(1, keepdim=True) if c["pooled"] == "yes" else read)
        return out

    def rows_of(self, t: Tensor) -> Tensor:
        """Queries, keys or values as (B, S, H * D)."""
        return (t.transpose(1, 2) if self.early else t).flatten(2)
