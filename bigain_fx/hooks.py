"""Hooks in a model: those that no graph can hold, and those that a graph holds once and for all."""

from __future__ import annotations

from torch import nn

from bigain_fx.passes.errors import InputError
from bigain_fx.quantized import is_layer


def hook_in(model: nn.Module) -> str | None:
    """Return the first hook of accelerate or diffusers in ``model`` that a graph cannot hold, in words, or None.

    Such hooks bring weights in and out, or decide at every call what to compute.
    """
    for path, module in model.named_modules():
        at = f" at {path}" if path else ""
        outer = vars(module).get("_hf_hook")
        for hook in getattr(outer, "hooks", (outer,)):
            if hook is not None and getattr(hook, "offload", True):
                return f"accelerate's {type(hook).__name__}{at}"
        if hooks := getattr(vars(module).get("_diffusers_hook"), "hooks", None):
            return f"diffusers' {next(iter(hooks))!r}{at}"
    return None


def check_hooks(model: nn.Module) -> None:
    """Refuse a model with hooks that no graph can hold.

    Raises:
        InputError: it has one.
    """
    if hook := hook_in(model):
        raise InputError(
            f"{type(model).__name__} has {hook}, which no graph can hold; remove it, and if it offloads weights use "
            "enable_model_cpu_offload() once the optimized denoiser is in the pipeline"
        )


def traced_hooks(model: nn.Module) -> list[str]:
    """Return the paths of modules with forward hooks: a graph has what they compute, and does not call them.

    Quantized layers are called with their hooks.
    """
    return [
        path or type(model).__name__
        for path, module in model.named_modules()
        if (module._forward_hooks or module._forward_pre_hooks) and not is_layer(module)
    ]
