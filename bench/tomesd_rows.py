"""Rows of tomesd, the published package of ToMe for diffusion: it patches Python where we rewrite a graph."""

from __future__ import annotations

import copy
import inspect as signatures
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bigain_fx import Report, ToMe, inspect
from bigain_fx.bench import BenchError

if TYPE_CHECKING:
    from bigain_fx.models import Workload

BLOCK = "BasicTransformerBlock"
RECOMPILES = 256
NORMS = ("layer_norm", "ada_norm", "ada_norm_zero")


@dataclass(frozen=True)
class Patched:
    """A patched copy of the denoiser, the arguments of a call, and what ToMe at this ratio does to our graph."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    report: Report

    def call(self, backend: str, mode: str | None) -> Callable[[], Any]:
        """What calls it as it is (``"eager"``), or compiled; random destinations break the graph at each block."""
        if backend == "eager":
            return partial(self.model, *self.args, **self.kwargs)
        compiled = torch.compile(self.model, dynamic=False, backend=backend, mode=mode)
        return Settled(partial(compiled, *self.args, **self.kwargs))


class Settled:
    """A compiled call whose first call is two: where graphs break, the second still compiles.

    It breaks into functions that are compiled for one block after another, more often than torch allows by default;
    what goes beyond would silently run without being compiled.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call, self._settled = call, False

    def __call__(self) -> Any:
        """Call it."""
        if not self._settled:
            with torch._dynamo.config.patch(recompile_limit=RECOMPILES):
                self._call()
                output = self._call()
            self._settled = True
            return output
        return self._call()


def parse(text: str) -> tuple[float, ...]:
    """Read a comma-separated list of ratios.

    Raises:
        BenchError: an entry that is no number.
        MethodError: a ratio that cannot be.
    """
    try:
        ratios = tuple(float(entry) for entry in text.split(",") if text)
    except ValueError:
        raise BenchError(f"tomesd={text!r} must be ratios such as 0.5,0.7") from None
    return tuple(ToMe(ratio).ratios[0] for ratio in ratios)


def refuse(workload: Workload) -> str | None:
    """Why tomesd cannot patch ``workload`` here, or None."""
    if find_spec("tomesd") is None:
        return "tomesd is not installed; pip install 'bigain-fx[bench]'"
    model = type(workload.model).__name__
    blocks = [module for module in workload.model.modules() if _is_block(module)]
    if not blocks:
        return f"tomesd patches {BLOCK}, and {model} has none"
    unknown = {str(getattr(block, "norm_type", NORMS[0])) for block in blocks} - {*NORMS}
    if unknown:
        return f"tomesd's {BLOCK} does not know the norm {min(unknown)!r} of {model}"
    return None


def _is_block(module: nn.Module) -> bool:
    return any(base.__name__ == BLOCK for base in type(module).__mro__)


def patch(workload: Workload, ratio: float) -> Patched:
    """Patch a copy of the denoiser that shares its weights.

    tomesd's defaults, but for ``max_downsample``: it is such that the finest grid is merged and no other, as by our
    methods. A tensor of the image goes in by position, where tomesd looks for its size.

    Raises:
        BigainError: whatever :func:`bigain_fx.inspect` raises.
    """
    import tomesd

    report = inspect(
        workload.model, workload.args, workload.kwargs, method=ToMe(ratio, window=None), grid=workload.grid
    )
    tensors = [*workload.model.parameters(), *workload.model.buffers()]
    model = copy.deepcopy(workload.model, {id(tensor): tensor for tensor in tensors})
    args, kwargs = workload.args, dict(workload.kwargs)
    if not args:
        args = (kwargs.pop(next(iter(signatures.signature(workload.model.forward).parameters))),)
    pixels = math.prod(args[0].shape[2:])
    tokens = max((site.tokens for site in report.rewritten), default=pixels)
    tomesd.apply_patch(model, ratio=ratio, max_downsample=math.ceil(math.sqrt(pixels // tokens)))
    return Patched(model, args, kwargs, report)
