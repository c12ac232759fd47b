"""A module that passes for another: pipelines find under it what they look for in the original."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from bigain_fx.passes.errors import InputError

_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_UNSHARED = ("_hf_hook", "_old_forward")


class StandIn(nn.Module):
    """A module of another's weights and submodules, under the same names.

    Its class, for whoever asks ``isinstance`` or writes it down, is the original's: diffusers finds LoRA adapters, and
    the names for ``model_index.json``, by it. What it lacks is read from the original, and what only the original has
    is set there. It stays in eval mode.

    Attributes:
        original: whose place it takes.
    """

    original: Any

    def _stand_in_for(self, model: nn.Module) -> None:
        """Take the place of ``model``; attributes of one's own are set before."""
        own = {"original": model, "training": False, "__module__": type(model).__module__}
        vars(self).update({name: vars(model)[name] for name in _SHARED}, **own)

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        return type(vars(self).get("original", self))

    def __getattr__(self, name: str) -> Any:
        original = vars(self).get("original")
        if original is None or name.startswith("__") or name in _UNSHARED:
            return super().__getattr__(name)
        return getattr(original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        original = vars(self).get("original")
        ours = name in vars(self) or name in _UNSHARED or hasattr(type(self), name)
        if original is None or ours or not hasattr(original, name):
            super().__setattr__(name, value)
        else:
            setattr(original, name, value)

    def train(self, mode: bool = True) -> StandIn:
        """Put the original into eval mode too.

        Raises:
            InputError: ``mode`` is True.
        """
        if mode:
            raise InputError("an optimized denoiser cannot train; train .original, then optimize it again")
        self.original.eval()
        return self


def _original(name: str) -> Callable[..., Any]:
    """The method of the original, which may be another than ``nn.Module``'s."""

    @wraps(getattr(nn.Module, name))
    def call(self: StandIn, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.original, name)(*args, **kwargs)
        return self if result is self.original else result

    return call


for _name in ("to", "cpu", "cuda", "half", "float", "double", "bfloat16", "state_dict", "load_state_dict"):
    setattr(StandIn, _name, _original(_name))
