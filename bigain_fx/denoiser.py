"""``optimize``: a denoiser in, a compiled, token-compressed denoiser out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
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
    value_read,
)
from bigain_fx.hooks import hook_in, traced_hooks
from bigain_fx.model_state import some
from bigain_fx.numbers import Numbers
from bigain_fx.passes.errors import CaptureError, GridError, InputError
from bigain_fx.passes.images import Hint
from bigain_fx.passes.methods import Method, Methods, normalize
from bigain_fx.quantized import call_quantized
from bigain_fx.regions import as_regions
from bigain_fx.report import Report, announce
from bigain_fx.settings import Settings
from bigain_fx.standin import StandIn
from bigain_fx.states import States
from bigain_fx.torch_internals import one_at_a_time

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
        numbers: paths of the model's float attributes that are inputs too, behind the tensors.
    """

    graph: GraphModule
    run: Callable[..., Any]
    out_spec: pytree.TreeSpec
    report: Report
    numbers: tuple[str, ...] = ()


class _Slot:
    """One graph, and when it was used last."""

    def __init__(self, prepared: Prepared, used: int) -> None:
        self.prepared, self.used = prepared, used


class OptimizedDenoiser(StandIn):
    """A denoiser whose self-attentions are compressed; it is called exactly as the original is, and passes for it.

    Its weights and submodules are the original's, under the same names. Whatever else the original has (``config``,
    ``dtype``, its class, ...) is read and set there. Copied or unpickled, it captures anew. Threads may share it.

    A graph belongs to the signature of the inputs and to a state of the model: which adapter is active, say. The graphs
    of a state are kept as long as the model has their weights.

    Attributes:
        original: the model it was made from; its weights are these weights.
        methods: what is applied, timestep units filled in.
    """

    def __init__(self, model: nn.Module, methods: Methods, settings: Settings) -> None:
        super().__init__()
        self.methods = families.resolve(methods, model)
        self._settings, self._binder, self._read_grid = settings, CallBinder(model), families.GridReader()
        self._numbers = Numbers(model)
        self._states = States(model, self._numbers.tensor)
        self._graphs: dict[Key, _Slot] = {}  # by the number of a state, and a signature
        self._known: dict[Key, str] = {}  # every signature that was captured
        self._state: int | None = None
        self._clock = count(1)
        self._latest: Prepared | None = None
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
            return self._prepared(self._binder.bind(args, kwargs)[0])[0]
        if args or kwargs:
            raise InputError("example_inputs is given beside other arguments; give one of them")
        return tuple(self._prepared(self._binder.bind(*call)[0])[0] for call in as_calls(example_inputs))

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser; arguments and result are those of the original's ``forward``.

        Raises:
            InputError: arguments that ``forward`` does not take, a tensor on another device or of another floating
                dtype than the weights, an input that requires gradients, or inputs that were not prepared where
                ``on_new_signature`` is ``"raise"``.
            CaptureError: a new input signature that ``torch.export`` cannot capture.
        """
        arguments, wants_class = self._binder.bind(args, kwargs)
        expected = self._settings.on_new_signature == "raise"
        prepared, inputs = self._prepared(arguments, expected=expected)
        with torch.inference_mode(False), torch.no_grad():
            try:
                outputs = self._run(prepared, inputs)
            except Exception:
                again, inputs = self._prepared(arguments, expected=expected, look=True)
                if again is prepared:
                    raise
                prepared, outputs = again, self._run(again, inputs)
            output = pytree.tree_unflatten(outputs, prepared.out_spec)
        if wants_class or not isinstance(output, Mapping):
            return output
        return tuple(output.values())

    def _run(self, prepared: Prepared, inputs: list[Tensor]) -> Any:
        # Tensors made in inference mode would recompile the graph; a copy made outside of it does not.
        inputs = [tensor.clone() if tensor.is_inference() else tensor for tensor in inputs]
        if not self._settings.has_cuda_graphs:
            return prepared.run(*inputs)
        # A CUDA graph writes its outputs to the same memory at every call, and a step of guidance makes two.
        torch.compiler.cudagraph_mark_step_begin()
        return pytree.tree_map_only(Tensor, torch.clone, prepared.run(*inputs))

    def _prepared(
        self, arguments: Mapping[str, Any], *, expected: bool = False, look: bool = False
    ) -> tuple[Prepared, list[Tensor]]:
        """Return the graph for these arguments, captured if it is not there, and its inputs.

        Args:
            arguments: canonical keyword arguments.
            expected: capture only what was captured once.
            look: at everything, the dtypes, devices and shapes of weights too, which Dynamo guards else.
        """
        arguments = self._numbers.as_inputs(arguments)
        grid = families.grid_for(self._settings.grid, arguments, self._read_grid(arguments))
        signature = (signature_of(arguments), grid.grid)
        state = None if look else self._states.unmoved(with_kinds=self._settings.backend == "eager")
        slot = self._graphs.get((state, signature))
        if slot is None:
            with one_at_a_time():
                slot, arguments = self._found_or_made(arguments, signature, grid, expected)
        elif torch.is_grad_enabled():
            check_gradients(arguments)
        slot.used = next(self._clock)
        self._latest = prepared = slot.prepared
        return prepared, [*flat_tensors(arguments), *map(self._states.tensors.__getitem__, prepared.numbers)]

    def _found_or_made(
        self, arguments: Mapping[str, Any], signature: Key, grid: families.Reading, expected: bool
    ) -> tuple[_Slot, Mapping[str, Any]]:
        """Return the graph for these arguments, and these, with another float as a tensor perhaps."""
        state = self._look()
        if slot := self._graphs.get((state, signature)):
            if torch.is_grad_enabled():
                check_gradients(arguments)
            return slot, arguments
        inputs = described(arguments, grid.grid)
        if signature not in self._known and expected:
            prepared = "; ".join(self._known.values()) or "nothing"
            raise InputError(f"{inputs}: not prepared, and on_new_signature='raise'; prepared: {prepared}")
        if signature not in self._known and self._known:
            log.warning("%s: new input signature, capturing graph %d: %s", self._name, len(self._known) + 1, inputs)
        if grid.reason:
            log.warning("%s: %s", self._name, grid.reason)
        captured, arguments = self._capture_numbers(arguments, grid.grid)
        announce(captured.report)
        signature = (signature_of(arguments), grid.grid)
        state = self._look(captured=True)  # where a first call filled something in, the model is in another state
        slot = self._graphs[state, signature] = _Slot(captured, next(self._clock))
        self._known[signature] = self._known.pop(signature, described(arguments, grid.grid))
        self._drop_oldest()
        return slot, arguments

    def _capture_numbers(self, arguments: Mapping[str, Any], grid: Hint | None) -> tuple[Prepared, Mapping[str, Any]]:
        """Capture with the floats that change from call to call as inputs, if the graph allows that."""
        given, held = self._numbers.moving(arguments, signature_of), self._states.moving()
        if given or held:
            as_inputs = self._numbers.as_inputs(arguments, given)
            try:
                captured = self._capture(as_inputs, grid, held)
                if read := value_read(captured.graph.graph):
                    raise CaptureError(f"forward makes a number of the tensor {read}")
            except CaptureError as error:
                paths = sorted(given | held)
                log.warning("%s: each value of %s is a graph of its own: %s", self._name, some(paths), error)
                self._numbers.kept |= dict.fromkeys(given, str(error))
                self._states.kept |= dict.fromkeys(held, str(error))
            else:
                self._numbers.promote(given)
                self._states.promote(held)
                return captured, as_inputs
        return self._capture(arguments, grid), arguments

    def _drop_oldest(self) -> None:
        """Keep ``max_graphs`` graphs, and as many signatures."""
        while len(self._graphs) > self._settings.max_graphs:
            oldest = min(self._graphs, key=lambda key: self._graphs[key].used)
            del self._graphs[oldest]
            log.warning("%s: dropping a graph, max_graphs=%d: %s", self._name, self._settings.max_graphs,
                        self._known[oldest[1]])  # fmt: skip
        held = {inputs for _, inputs in self._graphs}
        for inputs in [inputs for inputs in self._known if inputs not in held]:
            if len(self._known) > self._settings.max_graphs:
                del self._known[inputs]

    def _look(self, captured: bool = False) -> int:
        """Return the number of the state that the model is in, and make its graphs the ones that are used."""
        found = self._states.look()
        if captured and found.changed:
            # What a first call fills in is there for later ones: it changes none of the graphs that were made without.
            last = self._state
            self._graphs = {
                (found.number if state == last else state, key): slot for (state, key), slot in self._graphs.items()
            }
        self._state = found.number
        for (state, _), slot in self._graphs.items():
            if state == found.number:
                renew(slot.prepared.graph, found.renewed)
        if found.changed and not captured and self._graphs:
            if found.known:
                log.info("%s is as it was once, and its graphs are there: %s", self._name, some(found.changed))
            else:
                log.warning("%s changed, its graphs are captured anew when next called: %s", self._name,
                            some(found.changed))  # fmt: skip
        held = self._states.numbers
        self._graphs = {key: slot for key, slot in self._graphs.items() if key[0] in held}
        return found.number

    def _capture(self, arguments: Mapping[str, Any], grid: Hint | None, more: Iterable[str] = ()) -> Prepared:
        if self.original.training:
            raise InputError(f"{self._name} is in train mode; call model.eval() first")
        _check_hooks(self.original)
        check_inputs(self.original, arguments)
        numbers = self._states.values({*self._states.inputs, *more})
        captured = capture(self.original, arguments, numbers)
        if hooked := traced_hooks(self.original):
            log.warning(
                "%s: forward hooks are part of its graph, and are not called again: %s", self._name, some(hooked)
            )
        try:
            rewritten = self._settings.rewrite(captured.module, self.methods, grid)
        except GridError as error:
            if self._settings.grid is not None:
                raise
            log.warning("%s: the grid that its inputs tell is not used: %s", self._name, error)
            rewritten = self._settings.rewrite(captured.module, self.methods, None)
        call_quantized(rewritten.module)
        report = Report.of(self._name, self.methods, rewritten)
        if self._settings.backend != "eager":
            as_regions(rewritten.module)
        run = self._settings.compile(rewritten.module, self._check_kinds)
        return Prepared(rewritten.module, run, captured.out_spec, report, captured.numbers)

    def _check_kinds(self) -> None:
        """Refuse to compile a graph again for weights that are not what it was captured with."""
        if not self._states.same_kinds():
            raise InputError(f"weights of {self._name} have other dtypes, devices or shapes than when it was captured")

    def _inspect(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Report:
        """What would be done for these inputs; nothing is kept, and nothing is logged of it."""
        arguments, _ = self._binder.bind(args, kwargs)
        grid = families.grid_for(self._settings.grid, arguments, self._read_grid(arguments))
        with one_at_a_time():
            return self._capture(arguments, grid.grid).report

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
        ((args, kwargs),) = as_calls([(() if args is None else args, {} if kwargs is None else kwargs)])
        optimized.prepare(*args, **kwargs)
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
    return optimize(model, method=method, backend="eager", grid=grid)._inspect(args or (), kwargs or {})
