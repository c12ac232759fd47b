"""The operators put into eager denoisers by hand at the attention, by the loops of `oracle` and without any pass.

Nothing changes its length, so that whatever lies between a projection and its attention (per-head norms, rotary
angles, masks, the order of text and image) stays the model's own. Hooks on the linear layers of a `zoo.Site` hand them
other image rows, and `F.scaled_dot_product_attention` sees fewer of the keys and values (docs/operators.md):

- merging: the row of each group's representative holds the group's mean. Other rows are no keys and no values, and the
  attention's output at token i is the one at the representative of i.
- downsampling: the row of nearest(i) holds D(x)[i] where keys and values are projected; only these rows are kept.
- blending: as merging, but the attention's output at token i is a mean of those at several representatives. What comes
  after it until the residual sum must be linear, then, and at most add a bias.
- both: queries as in merging, keys and values as in downsampling of the unmerged tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import oracle
from tests.zoo import Part, Site

CELL = (2, 2)
attention = F.scaled_dot_product_attention


@dataclass
class Operators:
    """One site's part of one call: what its hooks saw, and the tokens that they hand out.

    Attributes:
        site: where.
        ratio, factor, alpha, blend, proportional: as for `run`.
        metric: what the site's norm read, as tokens; None without a norm.
        x: the image tokens (B, N, C) that the site's projections read; None before they did.
        queries, keys: x with the rows that queries, and keys and values, are made of.
        plan: groups of tokens, None without merging; those of several images one behind another.
        plans: the same for each image.
        runs: attentions that were changed so far.
    """

    site: Site
    ratio: float | None
    factor: int | None
    alpha: float
    blend: bool
    proportional: bool
    metric: Tensor | None = None
    x: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    plan: oracle.Plan | None = None
    plans: Sequence[oracle.Plan] = ()
    runs: int = 0

    def see_norm(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Pre-hook of the norm: a group norm reads (B, C, ...), others (B, rows, C)."""
        value = inputs[0]
        self.metric = value.flatten(2).transpose(1, 2) if isinstance(module, nn.GroupNorm) else self._image(value)

    def project(
        self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, *, parts: Mapping[str, Part]
    ) -> Tensor:
        """Hook of a linear layer: ``parts`` of its output, by ``"q"``, ``"k"``, ``"v"``, from other image rows."""
        rows = inputs[0]
        self._take(self._image(rows))
        output = output.clone()
        for key, part in parts.items():
            changed = rows.clone()
            self._image(changed).copy_(self.queries if key == "q" else self.keys)  # type: ignore[arg-type]
            output[..., part.start : part.stop] = module.forward(changed)[..., part.start : part.stop]
        return output

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Mapping[str, Any]) -> Tensor:
        """The attention over (B, heads, rows, channels) with fewer keys, at full length again."""
        assert self.x is not None
        tokens, offset, rows = self.x.shape[1], self.site.offset, k.shape[-2]
        text = [row for row in range(rows) if not offset <= row < offset + tokens]
        kept = torch.tensor([text + [offset + token for token in sample] for sample in self._kept()])
        if mask is not None:
            mask = mask.expand(torch.broadcast_shapes(mask.shape, (q.shape[0], 1, 1, rows)))
            mask = mask.take_along_dim(kept[:, None, None], -1)
        if self.proportional and self.plan is not None:
            weight = torch.cat([torch.zeros(len(kept), len(text)), oracle.group_sizes(self.plan).log()], 1)
            mask = weight[:, None, None] if mask is None else mask + weight[:, None, None]
        k, v = (t.take_along_dim(kept[:, None, :, None], -2) for t in (k, v))
        output = attention(q, k, v, mask, **options)
        if self.plan is not None:
            start = offset if q.shape[-2] > tokens else 0  # queries of the image alone
            group = torch.tensor(self.plan.token_map())[:, None, :, None]
            image = output[..., start : start + tokens, :]
            if self.blend:
                few = image.take_along_dim(self.plan.rep[:, None, :, None], -2).transpose(1, 2).flatten(2)
                metric = self.x if self.metric is None else self.metric
                each, groups = [], 0
                for plan, (_, first, end) in zip(self.plans, self.site.images, strict=True):
                    count = plan.rep.shape[1]
                    each.append(oracle.blend(few[:, groups : groups + count], metric[:, first:end], plan))
                    groups += count
                spread = torch.cat(each, 1).unflatten(2, (image.shape[1], -1)).transpose(1, 2)
            else:
                spread = image.take_along_dim(group, -2)
            output = torch.cat([output[..., :start, :], spread, output[..., start + tokens :, :]], -2)
        self.x, self.metric, self.runs = None, None, self.runs + 1
        return output

    def _image(self, rows: Tensor) -> Tensor:
        """The image tokens among ``rows`` (B, rows, C), a view."""
        count = self.site.images[-1][-1]
        return rows[:, self.site.x_offset : self.site.x_offset + count]

    def _take(self, x: Tensor) -> None:
        """Make the rows to hand out, once a call."""
        if self.x is not None:
            assert torch.equal(self.x, x), f"{self.site.name}: its projections read different tokens"
            return
        self.x, self.queries, self.plan = x.clone(), x.clone(), None
        if self.ratio is not None:
            assert self.metric is not None or self.site.norm is None, f"{self.site.norm} did not run"
            metric = x if self.metric is None else self.metric
            self.plans = [
                oracle.merge_plan(metric[:, first:end], grid, CELL, oracle.merged_count(grid, CELL, self.ratio))
                for grid, first, end in self.site.images
            ]
            self.plan = oracle.one_behind_another(self.plans)
            merged = oracle.merge(x, self.plan)
            self.queries.scatter_(1, self.plan.rep[..., None].expand_as(merged), merged)
        self.keys = self.queries
        if self.factor is not None:
            each = [
                oracle.kv_downsample(x[:, first:end], self.alpha, grid, self.factor)
                for grid, first, end in self.site.images
            ]
            rows = torch.cat(each, 1)
            nearest = torch.tensor(self._kept())[..., None]
            self.keys = x.scatter(1, nearest.expand_as(rows), rows)

    def _kept(self) -> list[list[int]]:
        """The image tokens that are keys, per sample."""
        assert self.x is not None
        if self.factor is not None:
            near = [
                first + token
                for grid, first, _ in self.site.images
                for token in oracle.nearest_tokens(grid, self.factor)
            ]
            return [near] * len(self.x)
        if self.plan is not None:
            return [[int(token) for token in sample] for sample in self.plan.rep]
        return [list(range(self.x.shape[1]))] * len(self.x)


@dataclass
class Attention:
    """Stands in for ``F.scaled_dot_product_attention``: the site whose projections ran since the last call is meant."""

    operators: Sequence[Operators] = field(repr=False)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **options: Any
    ) -> Tensor:
        ready = [site for site in self.operators if site.x is not None]
        assert len(ready) <= 1, f"one attention for {[site.site.name for site in ready]}"
        if not ready:
            return attention(query, key, value, attn_mask, *args, **options)
        assert not args
        return ready[0].attend(query, key, value, attn_mask, options)


@torch.no_grad()
def run(
    model: nn.Module,
    inputs: Mapping[str, Any],
    sites: Sequence[Site],
    *,
    ratio: float | None = None,
    factor: int | None = None,
    alpha: float = 0.9,
    blend: bool = False,
    proportional: bool = False,
) -> Any:
    """What ``model(**inputs)`` returns with the operators at ``sites``; the model is left as it was.

    Args:
        model: an eager denoiser.
        inputs: keyword arguments of the call.
        sites: where; each of them must run exactly once.
        ratio: merge this part of the tokens by their Laplacian score, in 2x2 cells; None merges none.
        factor: downsample keys and values by it an axis; None leaves them alone.
        alpha: of downsampling.
        blend: give tokens that merged away a mean of several groups.
        proportional: let each key count for its whole group.
    """
    everything = [Operators(site, ratio, factor, alpha, blend, proportional) for site in sites]
    with ExitStack() as stack:
        for operators in everything:
            site = operators.site
            if site.norm is not None:
                norm = model.get_submodule(site.norm)
                stack.callback(norm.register_forward_pre_hook(operators.see_norm).remove)
            parts = {"q": site.q, "k": site.k, "v": site.v}
            for path in {part.path for part in parts.values()}:
                mine = {key: part for key, part in parts.items() if part.path == path}
                hook = partial(operators.project, parts=mine)
                stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", Attention(everything)))
        output = model(**inputs)
    missed = {operators.site.name: operators.runs for operators in everything if operators.runs != 1}
    assert not missed, f"sites that did not run once: {missed}"
    return output
