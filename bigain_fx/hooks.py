"""Hooks in a model: those that no graph can hold, those that it holds once and for all, and those that cast weights.

diffusers' layerwise casting keeps the weights of a layer in a dtype of few bytes, and casts them while the layer runs.
A graph does the same: it reads the stored weight, and a node casts it::

    cast in, layer(x), cast out      ->      linear(x, to(stored weight, compute dtype))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from bigain_fx.passes.errors import InputError
from bigain_fx.quantized import is_layer

_CASTING = "layerwise_casting"
_HELD = frozenset({_CASTING, "peft_autocast_disable"})
"""Names of diffusers' hooks that a graph can hold."""
_OFFLOADS = (
    "it brings weights in when a layer is called, and a graph calls none; cast or quantize the weights, or use "
    "enable_model_cpu_offload() once the optimized denoiser is in the pipeline"
)
_GUIDES = "a guider puts it in anew at every step; use the pipelines' own guidance, such as PAG or skip_guidance_layers"
_CACHES = "it decides at every call what to compute; optimize the blocks one by one, and enable it around these"
_REASONS = {
    "accelerate.hooks": _OFFLOADS,
    "diffusers.hooks.group_offloading": _OFFLOADS,
    "diffusers.hooks.layer_skip": _GUIDES,
    "diffusers.hooks.smoothed_energy_guidance_utils": _GUIDES,
}
"""Where a hook is defined -> why no graph can hold it, and what to do instead."""


def hook_in(model: nn.Module) -> tuple[str, str] | None:
    """Return the first hook of accelerate or diffusers in ``model`` that a graph cannot hold, and why, or None."""
    for path, module in model.named_modules():
        at = f" at {path}" if path else ""
        outer = vars(module).get("_hf_hook")
        for hook in getattr(outer, "hooks", (outer,)):
            if hook is not None and getattr(hook, "offload", True):
                return f"accelerate's {type(hook).__name__}{at}", _why(hook)
        for name, hook in _hooks(module).items():
            if name not in _HELD:
                return f"diffusers' {name!r}{at}", _why(hook)
    return None


def _hooks(module: nn.Module) -> dict[str, Any]:
    """diffusers' hooks on ``module``, by name."""
    found: dict[str, Any] = getattr(vars(module).get("_diffusers_hook"), "hooks", {})
    return found


def _why(hook: object) -> str:
    return _REASONS.get(type(hook).__module__, _CACHES if getattr(hook, "_is_stateful", False) else "remove it")


def check_hooks(model: nn.Module) -> None:
    """Refuse a model with hooks that no graph can hold.

    Raises:
        InputError: it has one.
    """
    if found := hook_in(model):
        hook, reason = found
        raise InputError(f"{type(model).__name__} has {hook}, which no graph can hold: {reason}")


def traced_hooks(model: nn.Module) -> list[str]:
    """Return the paths of modules with forward hooks: a graph has what they compute, and does not call them.

    Quantized layers are called with their hooks.
    """
    return [
        path or type(model).__name__
        for path, module in model.named_modules()
        if (module._forward_hooks or module._forward_pre_hooks) and not is_layer(module)
    ]


def stored_weights(model: nn.Module) -> set[int]:
    """Return the identities of weights that are cast to another dtype before anything is computed with them."""
    return {id(weight) for module in model.modules() if _CASTING in _hooks(module) for weight in module.parameters()}


@contextmanager
def traced_casts(model: nn.Module) -> Iterator[None]:
    """While it is open, layerwise casting makes casts that a capture sees, and stored weights stay where they are."""
    hooks = [(module, hook) for module in model.modules() if (hook := _hooks(module).get(_CASTING))]
    held = [(hook.fn_ref, dict(vars(hook.fn_ref))) for _, hook in hooks]
    try:
        for module, hook in hooks:
            reference = hook.fn_ref
            reference.pre_forward, reference.post_forward = _same_inputs, _same_output
            reference.forward = partial(_with_casts, module, hook.compute_dtype, reference.forward)
        yield
    finally:
        for reference, before in held:
            vars(reference).update(before)


def _same_inputs(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def _same_output(module: nn.Module, output: Any) -> Any:
    return output


def _with_casts(module: nn.Module, dtype: torch.dtype, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``forward`` of ``module`` with its weights, and those inside it, cast to ``dtype``."""
    registries: list[dict[str, Any]] = [
        items for inner in module.modules() for items in (inner._parameters, inner._buffers)
    ]
    held = [dict(items) for items in registries]
    try:
        for items, before in zip(registries, held, strict=True):
            items.update({name: tensor.to(dtype) for name, tensor in before.items()
                          if tensor is not None and tensor.is_floating_point()})  # fmt: skip
        return forward(*args, **kwargs)
    finally:
        for items, before in zip(registries, held, strict=True):
            items.update(before)
