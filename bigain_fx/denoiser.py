"""``optimize``: a denoiser in, a compiled, token-compressed denoiser out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from threading import RLock
from typing import Any, Literal, overload

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from bigain_fx import families
from bigain_fx.capture import (
    CallBinder,
    as_calls,
    capture,
    check_gradients,
    check_inputs,
    described,
    flat_tensors,
    renew,
    signature_of,
)
from bigain_fx.passes.errors import GridError, InputError
from bigain_fx.passes.images import Hint
from bigain_fx.passes.methods import Method, Methods, normalize
from bigain_fx.quantized import call_as_functions
from bigain_fx.regions import as_regions, own_cache
from bigain_fx.report import Report
from bigain_fx.settings import Settings
from bigain_fx.standin import StandIn
from bigain_fx.watch import Change, Watch, hook_in

log = logging.getLogger("bigain_fx")

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Prepared:
    """One captured and rewritten graph, for one input signature.

    Attributes:
        graph: takes the flat tensor inputs.
        run: the graph itself with the backend ``"eager"``, else what compiles it.
        out_spec: the pytree of the model's output.
        report: what was done to its attentions.
    """

    graph: GraphModule
    run: Callable[..., Any]
    out_spec: pytree.TreeSpec
    report: Report


class OptimizedDenoiser(StandIn):
    """A denoiser whose self-attentions are compressed; it is called exactly as the original is, and passes for it.

    Its weights and submodules are the original's, under the same names. Whatever else the original has (``config``,
    ``dtype``, its class, ...) is read and set there. Copied or unpickled, it captures anew. Threads may share it.

    Attributes:
        original: the model it was made from; its weights are these weights.
        methods: what is applied, timestep units filled in.
    """

    def __init__(self, model: nn.Module, methods: Methods, settings: Settings) -> None:
        super().__init__()
        self.methods = families.resolve(methods, model)
        self._settings, self._binder, self._read_grid = settings, CallBinder(model), families.GridReader()
        self._entries: dict[Key, Prepared] = {}
        self._known: dict[Key, str] = {}  # every signature that was captured, the one used last at the end
        self._latest: Prepared | None = None
        self._watch: Watch | None = None
        self._lock = RLock()
        self._stand_in_for(model)

    @property
    def report(self) -> Report:
        """What was done to each attention of the graph that was captured or used last.

        Raises:
            InputError: nothing was captured yet.
        """
        if self._latest is None:
            raise InputError("report: nothing was captured yet; call the model, or give optimize() example inputs")
        return self._latest.report

    @overload
    def prepare(self, *args: Any, example_inputs: None = None, **kwargs: Any) -> Prepared: ...
    @overload
    def prepare(self, *, example_inputs: Iterable[object]) -> tuple[Prepared, ...]: ...
    def prepare(
        self, *args: Any, example_inputs: Iterable[object] | None = None, **kwargs: Any
    ) -> Prepared | tuple[Prepared, ...]:
        """Capture and rewrite the graph for these inputs, unless it is there; it is compiled when first called.

        Args:
            args, kwargs: of one call.
            example_inputs: of several calls in their place, each ``(args, kwargs)`` or the keyword arguments alone:
                one graph for each.

        Raises:
            BigainError: as for :func:`optimize`.
        """
        if example_inputs is None:
            return self._entry(self._binder.bind(args, kwargs)[0])
        if args or kwargs:
            raise InputError("example_inputs is given beside other arguments; give one of them")
        return tuple(self._entry(self._binder.bind(*call)[0]) for call in as_calls(example_inputs))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser; arguments and result are those of the original's ``forward``.

        Raises:
            InputError: arguments that ``forward`` does not take, a tensor on another device or of another floating
                dtype than the weights, an input that requires gradients, or inputs that were not prepared where
                ``on_new_signature`` is ``"raise"``.
            CaptureError: a new input signature that ``torch.export`` cannot capture.
        """
        arguments, wants_class = self._binder.bind(args, kwargs)
        entry = self._entry(arguments, expected=self._settings.on_new_signature == "raise")
        with torch.inference_mode(False), torch.no_grad(), own_cache():
            # Tensors made in inference mode would recompile the graph; a copy made outside of it does not.
            inputs = [tensor.clone() if tensor.is_inference() else tensor for tensor in flat_tensors(arguments)]
            output = pytree.tree_unflatten(entry.run(*inputs), entry.out_spec)
        if wants_class or not isinstance(output, Mapping):
            return output
        return tuple(output.values())

    def _entry(self, arguments: Mapping[str, Any], *, expected: bool = False) -> Prepared:
        """The graph for these arguments, captured if it is not there; ``expected``: only if it once was."""
        with self._lock:
            return self._find(arguments, expected)

    def _find(self, arguments: Mapping[str, Any], expected: bool) -> Prepared:
        change = self._watch.changed() if self._watch is not None else Change()
        if change.what:
            log.warning("%s changed, its graphs are captured anew when next called: %s", self._name, change.what)
            self._entries.clear()
        for entry in self._entries.values():
            renew(entry.graph, change.renewed)
        grid = families.grid_for(self._settings.grid, arguments, self._read_grid(arguments))
        key = (signature_of(arguments), grid.grid)
        if key not in self._entries:
            inputs = described(arguments, grid.grid)
            if key not in self._known and expected:
                prepared = "; ".join(self._known.values()) or "nothing"
                raise InputError(f"{inputs}: not prepared, and on_new_signature='raise'; prepared: {prepared}")
            if key not in self._known and self._known:
                count = len(self._known) + 1
                log.warning("%s: new input signature, capturing graph %d: %s", self._name, count, inputs)
            if grid.reason:
                log.warning("%s: %s", self._name, grid.reason)
            self._entries[key] = self._capture(arguments, grid.grid)
            self._known.setdefault(key, inputs)
        elif torch.is_grad_enabled():
            check_gradients(arguments)
        self._latest = self._entries[key]
        self._known[key] = self._known.pop(key)
        if len(self._known) > self._settings.max_graphs:
            oldest = next(iter(self._known))
            self._entries.pop(oldest, None)
            log.warning("%s: dropping a graph, max_graphs=%d: %s", self._name, self._settings.max_graphs,
                        self._known.pop(oldest))  # fmt: skip
        return self._latest

    def _capture(self, arguments: Mapping[str, Any], grid: Hint | None) -> Prepared:
        if self.original.training:
            raise InputError(f"{self._name} is in train mode; call model.eval() first")
        _check_hooks(self.original)
        check_inputs(self.original, arguments)
        captured = capture(self.original, arguments)
        self._watch = Watch(self.original)
        try:
            rewritten = self._settings.rewrite(captured.module, self.methods, grid)
        except GridError as error:
            if self._settings.grid is not None:
                raise
            log.warning("%s: the grid that its inputs tell is not used: %s", self._name, error)
            rewritten = self._settings.rewrite(captured.module, self.methods, None)
        call_as_functions(rewritten.module)
        report = Report.of(self._name, self.methods, rewritten)
        log.info("%s", report.headline)
        if self._settings.backend != "eager":
            as_regions(rewritten.module)
        run = self._settings.compile(rewritten.module)
        return Prepared(rewritten.module, run, captured.out_spec, report)

    @property
    def _name(self) -> str:
        return type(self.original).__name__

    def __reduce__(self) -> tuple[Any, ...]:
        return OptimizedDenoiser, (self.original, self.methods, self._settings)


def _check_hooks(model: nn.Module) -> None:
    if hook := hook_in(model):
        raise InputError(
            f"{type(model).__name__} has {hook}, which no graph can hold; remove it, and if it offloads weights use "
            "enable_model_cpu_offload() once the optimized denoiser is in the pipeline"
        )


def optimize(
    model: nn.Module,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    method: Method | Iterable[Method] | None,
    select: Literal["all", "auto"] = "all",
    backend: str | Callable[..., Any] = "inductor",
    grid: families.GridHint = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    on_new_signature: Literal["compile", "raise"] = "compile",
    max_graphs: int = 8,
) -> OptimizedDenoiser:
    """Compress a denoiser's self-attention by ``method`` and compile it.

    Args:
        model: a denoiser in eval mode (a diffusers U-Net or transformer, or any module that ``torch.export`` captures).
        args, kwargs: example inputs, as for ``torch.export.export``. With them the graph is captured at once, without
            them at the first call; each new input signature (shapes, dtypes, devices, constants, the grid) is captured
            anew, with a warning.
        method: a merge, a KV downsampling, a tuple with one of each, or ``()`` for the dense graph.
        select: ``"auto"`` measures each kind of attention on this device, and leaves dense what is no faster rewritten;
            the report has the times, which are kept beside inductor's cache.
        backend: anything ``torch.compile`` takes; ``"eager"`` runs the rewritten graph as it is.
        grid: ``(rows, columns)`` in image tokens at the finest resolution, for graphs that cannot tell, or a list of
            these where several images come one behind another (references), or a function that gives either for the
            keyword arguments of a call. The inputs ``img_ids`` and ``img_shapes`` tell it.
        mode, options: as for ``torch.compile``.
        on_new_signature: ``"compile"``, or ``"raise"`` where a call may only use graphs of ``prepare``.
        max_graphs: as many are kept, and the one used least recently is dropped for another, with a warning: a service
            goes on, if slowly, where an error would stop it.

    Returns:
        A module with the call signature and the output class of ``model``. Weights are shared, ``model`` is untouched.
        Writing into its weights shows at once; any other change of it is noticed at the next call, and captured anew.

    Raises:
        MethodError: ``method`` is no method, or holds two of one kind, or a schedule without timestep units for a
            family of which they are not known.
        InputError: ``model`` is no module, in train mode, compiled, optimized or hooked, or the inputs do not suit it.
        CaptureError: ``torch.export`` cannot capture it.
        GridError: ``grid`` does not fit.
        RewriteError: an alpha schedule, and no timestep input; ratios that are more or fewer than attentions.
    """
    methods = normalize(method)
    if not isinstance(model, nn.Module):
        raise InputError(f"model={type(model).__name__} is not an nn.Module; pass the denoiser, such as pipe.unet")
    if isinstance(model, OptimizedDenoiser):
        raise InputError("model is already optimized; optimize its .original")
    if model.training:
        raise InputError(f"{type(model).__name__} is in train mode; call model.eval() first")
    if hasattr(model, "_orig_mod"):
        raise InputError("model was compiled by torch.compile; optimize what it was made from, model._orig_mod")
    _check_hooks(model)
    settings = Settings(backend, grid, mode, options, on_new_signature, max_graphs, select)
    optimized = OptimizedDenoiser(model, methods, settings)
    if args is not None or kwargs is not None:
        optimized.prepare(*(args or ()), **(kwargs or {}))
    return optimized


def inspect(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    method: Method | Iterable[Method] | None = None,
    grid: families.GridHint = None,
) -> Report:
    """Report the attentions of ``model``, and what ``method`` would do to them, without changing anything.

    Works on the meta device as well. Arguments and errors are those of :func:`optimize`.
    """
    return optimize(model, args, kwargs, method=method, backend="eager", grid=grid).report
