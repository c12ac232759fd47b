"""How :func:`bigain_fx.optimize` makes its graphs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch._inductor import list_mode_options
from torch.fx import GraphModule

from bigain_fx import families
from bigain_fx.compilers import check_compiler
from bigain_fx.direct import Direct
from bigain_fx.passes import checks
from bigain_fx.passes.errors import GridError
from bigain_fx.passes.images import Hint, as_grids
from bigain_fx.passes.methods import Methods
from bigain_fx.passes.pipeline import Rewritten, rewrite
from bigain_fx.quantized import call_quantized
from bigain_fx.regions import as_regions, own_cache
from bigain_fx.select import rewrite_where_faster
from bigain_fx.torch_internals import compiler

log = logging.getLogger("bigain_fx")


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
        checks.choice("select", self.select, ("all", "auto"))
        checks.choice("on_new_signature", self.on_new_signature, ("compile", "raise"))
        checks.integer("max_graphs", self.max_graphs, least=1, right="a positive integer")
        if self.grid is not None and not callable(self.grid):
            as_grids(self.grid)
        check_compiler(self.backend, self.mode, self.options)

    def rewrite(self, module: GraphModule, methods: Methods, grid: Hint | None, name: str = "the model") -> Rewritten:
        """Return ``module`` with every attention rewritten that can be, or those that gain by it.

        Args:
            module: as captured; it stays as it is.
            methods: timestep units filled in.
            grid: of the image tokens, where it is known; one that inputs told, and that does not fit, is not used.
            name: of the model, for the log.

        Raises:
            GridError: the grid of these settings does not fit.
            RewriteError: as for :func:`bigain_fx.optimize`.
        """
        try:
            found = self._rewrite(module, methods, grid)
        except GridError as error:
            if self.grid is not None:
                raise
            log.warning("%s: the grid that its inputs tell is not used: %s", name, error)
            found = self._rewrite(module, methods, None)
        call_quantized(found.module)
        return found

    def _rewrite(self, module: GraphModule, methods: Methods, grid: Hint | None) -> Rewritten:
        if self.select == "all":
            return rewrite(module, methods, grid)
        return rewrite_where_faster(module, methods, grid, self.compile, self.named)

    def compile(self, module: GraphModule, check: Callable[[], None] = lambda: None) -> Callable[..., Any]:
        """Return ``module`` for the backend, compiled when first called; what repeats in it becomes regions.

        It is compiled again where a weight has another dtype, device or shape.

        Args:
            module: a rewritten graph; with a backend other than ``"eager"`` it is changed in place.
            check: called before the graph is compiled, and compiled again.
        """
        if self.backend == "eager":
            return module
        as_regions(module)
        options = dict(self.options) if self.options is not None else None
        inner = compiler(self.backend, self.mode, options)

        def backend(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            check()
            with own_cache():
                return inner(graph, inputs)

        return Direct(module, backend)

    @property
    def named(self) -> str | None:
        """Backend, mode and options as text that means the same in another process; None if one has no such name.

        A function has none, whatever it is called: its code may be another one the next time.
        """
        try:
            return json.dumps((self.backend, self.mode, self.options and dict(self.options)), sort_keys=True)
        except (TypeError, ValueError):
            return None

    @cached_property
    def has_cuda_graphs(self) -> bool:
        """Whether what is compiled writes its outputs to the same memory at every call."""
        options = {**(list_mode_options(self.mode) if self.mode else {}), **(self.options or {})}
        return self.backend == "inductor" and bool(options.get("triton.cudagraphs"))
