"""The operators put into eager diffusers models by attention processors, by the loops of `oracle`.

`apply` copies a model, finds its image self-attentions by running it once, and gives those on the finest grids a
processor that merges tokens, downsamples keys and values, or both. The metric follows BiGain (arXiv 2603.12240), see
`docs/operators.md`: the residual stream where the attention reads a plain layer norm (U-Net blocks), else the
attention's input (DiT).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from tests import oracle

Pair = tuple[int, int]


@dataclass(frozen=True)
class Merge:
    """Token merging; ``positions`` gives each cell's destination for a grid, None is the lowest Laplacian score."""

    ratio: float
    cell: Pair = (2, 2)
    positions: Callable[[Pair, Pair], Sequence[int]] | None = None
    levels: int | None = 1


@dataclass(frozen=True)
class Ramp:
    """Alpha linear in the timestep, clamped outside."""

    noisy: float = 0.8
    clean: float = 1.2
    t_noisy: float = 999
    t_clean: float = 0


@dataclass(frozen=True)
class Downsample:
    """Key and value downsampling by ``factor`` an axis."""

    factor: int
    alpha: float | Ramp = 0.9
    levels: int | None = 1


@dataclass
class Recorder:
    """What the hooks saw last: the timestep of the model's call, the input of each block's first norm."""

    timestep: Any = None
    residual: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Processor:
    """Stands in for diffusers' `AttnProcessor2_0` in one self-attention, without mask or group norm."""

    name: str
    grid: Pair
    recorder: Recorder
    merge: Merge | None
    downsample: Downsample | None

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention over (B, N, C) tokens, at full resolution again when it returns."""
        x = hidden_states
        batch = x.shape[0]
        plan = self._plan(x)
        queries = x if plan is None else oracle.merge(x, plan)
        sources = queries if self.downsample is None else self._downsample(x, self.downsample)

        def heads(tokens: Tensor) -> Tensor:
            return tokens.view(batch, tokens.shape[1], attn.heads, -1).transpose(1, 2)

        query, key, value = heads(attn.to_q(queries)), heads(attn.to_k(sources)), heads(attn.to_v(sources))
        y = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        y = attn.to_out[1](attn.to_out[0](y))
        return y if plan is None else oracle.unmerge(y, plan)

    def _plan(self, x: Tensor) -> oracle.Plan | None:
        if self.merge is None:
            return None
        cell = self.merge.cell
        positions = None if self.merge.positions is None else self.merge.positions(self.grid, cell)
        merged = oracle.merged_count(self.grid, cell, self.merge.ratio)
        return oracle.merge_plan(self.recorder.residual.get(self.name, x), self.grid, cell, merged, positions)

    def _downsample(self, x: Tensor, method: Downsample) -> Tensor:
        alpha: float | list[float]
        if isinstance(method.alpha, Ramp):
            ramp = method.alpha
            step = self.recorder.timestep
            alpha = oracle.linear_alpha(step, x.shape[0], ramp.noisy, ramp.clean, ramp.t_noisy, ramp.t_clean)
        else:
            alpha = method.alpha
        return oracle.kv_downsample(x, alpha, self.grid, method.factor)


def self_attentions(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Pair]:
    """The name and grid of every image self-attention that one call of ``model`` runs, in the order of the modules."""
    grids: dict[str, Pair] = {}

    def blocks(prefix: str, grid: Pair) -> None:
        for name, module in model.named_modules():
            inside = name.startswith(f"{prefix}.") or not prefix
            if inside and isinstance(module, BasicTransformerBlock) and not module.only_cross_attention:
                grids[f"{name}.attn1"] = grid

    def see_image(prefix: str) -> Callable[..., None]:
        return lambda module, inputs: blocks(prefix, (inputs[0].shape[-2], inputs[0].shape[-1]))

    def see_patches(module: PatchEmbed, inputs: tuple[Tensor]) -> None:
        blocks("", (inputs[0].shape[-2] // module.patch_size, inputs[0].shape[-1] // module.patch_size))

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, Transformer2DModel):
            hooks.append(module.register_forward_pre_hook(see_image(name)))
        elif isinstance(module, PatchEmbed):
            hooks.append(module.register_forward_pre_hook(see_patches))
    with torch.no_grad():
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return grids


def action(merge: Merge | None, downsample: Downsample | None) -> str:
    """``"merge"``, ``"kv"``, ``"merge+kv"`` or ``"kept"``."""
    return "+".join(kind for kind, part in (("merge", merge), ("kv", downsample)) if part is not None) or "kept"


def apply(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    merge: Merge | None = None,
    downsample: Downsample | None = None,
    only: Collection[str] | None = None,
) -> tuple[nn.Module, dict[str, str]]:
    """A copy of ``model`` with the operators in its self-attentions, and the `action` of each, by module name.

    Cross-attentions are not listed. ``only`` names the self-attentions to change; None is all of them.
    """
    model = copy.deepcopy(model)
    found = self_attentions(model, args, kwargs)
    grids = sorted(set(found.values()), key=lambda grid: -grid[0] * grid[1])
    recorder = Recorder()
    signature = inspect.signature(model.forward)

    def see_timestep(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        recorder.timestep = signature.bind(*inputs, **keywords).arguments["timestep"]

    def see_residual(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda module, inputs: recorder.residual.__setitem__(name, inputs[0])

    model.register_forward_pre_hook(see_timestep, with_kwargs=True)
    actions = {}
    for name, grid in found.items():
        if only is not None and name not in only:
            actions[name] = "kept"
            continue
        attention = model.get_submodule(name)
        norm = model.get_submodule(name.removesuffix("attn1") + "norm1")
        assert isinstance(attention, Attention)
        if isinstance(norm, nn.LayerNorm):
            norm.register_forward_pre_hook(see_residual(name))
        merging = merge if merge is not None and grid in grids[: merge.levels] else None
        sampling = downsample if downsample is not None and grid in grids[: downsample.levels] else None
        processor: Any = Processor(name, grid, recorder, merging, sampling)
        attention.set_processor(processor)
        actions[name] = action(merging, sampling)
    return model, actions
