"""How :func:`bigain_fx.optimize` makes its graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from bigain_fx import families
from bigain_fx.passes.errors import InputError
from bigain_fx.passes.images import Hint
from bigain_fx.passes.methods import Methods
from bigain_fx.passes.pipeline import Rewritten, rewrite
from bigain_fx.select import rewrite_where_faster


@dataclass(frozen=True)
class Settings:
    """How graphs are made, and how many: the arguments of :func:`optimize` beside the model and the method."""

    backend: str | Callable[..., Any] = "inductor"
    grid: families.GridHint = None
    mode: str | None = None
    options: Mapping[str, Any] | None = None
    on_new_signature: str = "compile"
    max_graphs: int = 8
    select: str = "all"

    def __post_init__(self) -> None:
        if self.select not in ("all", "auto"):
            raise InputError(f"select={self.select!r} must be 'all' or 'auto'")
        if self.on_new_signature not in ("compile", "raise"):
            raise InputError(f"on_new_signature={self.on_new_signature!r} must be 'compile' or 'raise'")
        if isinstance(self.max_graphs, bool) or not isinstance(self.max_graphs, int) or self.max_graphs < 1:
            raise InputError(f"max_graphs={self.max_graphs!r} must be a positive integer")

    def rewrite(self, module: GraphModule, methods: Methods, grid: Hint | None) -> Rewritten:
        """The graph with every attention rewritten that can be, or those that gain by it."""
        if self.select == "all":
            return rewrite(module, methods, grid)
        return rewrite_where_faster(module, methods, grid, self.compile, f"{self.backend} {self.mode} {self.options}")

    def compile(self, module: GraphModule) -> Callable[..., Any]:
        """``module`` for the backend, compiled when first called."""
        if self.backend == "eager":
            return module
        options = dict(self.options) if self.options is not None else None
        compiled: Callable[..., Any] = torch.compile(
            module, fullgraph=True, dynamic=False, backend=self.backend, mode=self.mode, options=options
        )
        return compiled
