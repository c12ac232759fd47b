"""``optimize``: a denoiser in, a compiled, token-compressed denoiser out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bigain_fx import families
from bigain_fx.calls import CallBinder, as_calls
from bigain_fx.graphs import Graphs
from bigain_fx.hooks import check_hooks
from bigain_fx.passes.errors import InputError
from bigain_fx.passes.methods import Method, Methods, normalize
from bigain_fx.prepare import Prepared
from bigain_fx.report import Report
from bigain_fx.settings import Settings
from bigain_fx.standin import StandIn


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
        self._settings, self._binder = settings, CallBinder(model)
        self._graphs = Graphs(model, self.methods, settings)
        self._stand_in_for(model)

    @property
    def report(self) -> Report:
        """What was done to each attention of the graph that was captured or used last.

        Raises:
            InputError: nothing was captured yet.
        """
        if self._graphs.latest is None:
            raise InputError("report: nothing was captured yet; call the model, or give optimize() example inputs")
        return self._graphs.latest.report

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
            return self._graphs.ready(self._binder.bind(args, kwargs)[0])[0]
        if args or kwargs:
            raise InputError("example_inputs is given beside other arguments; give one of them")
        return tuple(self._graphs.ready(self._binder.bind(*call)[0])[0] for call in as_calls(example_inputs))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
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
        prepared, inputs = self._graphs.ready(arguments, expected=expected)
        with torch.inference_mode(False), torch.no_grad():
            try:
                outputs = self._run(prepared, inputs)
            except Exception:
                again, inputs = self._graphs.ready(arguments, expected=expected, look=True)
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

    def __reduce__(self) -> tuple[Any, ...]:
        return OptimizedDenoiser, (self.original, self.methods, self._settings)


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
        RewriteError: an alpha schedule, and no timestep input; ratios that are more or fewer than attentions; a
            ``where`` that matches no attention.
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
    check_hooks(model)
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
    fast = optimize(model, method=method, backend="eager", grid=grid)
    (call,) = as_calls([(() if args is None else args, {} if kwargs is None else kwargs)])
    return fast._graphs.inspect(fast._binder.bind(*call)[0])
