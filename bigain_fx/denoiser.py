"""``optimize``: a denoiser in, a compiled, token-compressed denoiser out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bigain_fx.capture import CallBinder, autocast_enabled, capture, flat_tensors, signature_of
from bigain_fx.passes.errors import InputError
from bigain_fx.passes.grid import Grid
from bigain_fx.passes.methods import Method, Methods, normalize
from bigain_fx.passes.pipeline import rewrite
from bigain_fx.report import Report

log = logging.getLogger("bigain_fx")


@dataclass(frozen=True)
class Prepared:
    """One captured and rewritten graph, for one input signature.

    Attributes:
        run: takes the flat tensor inputs; the graph itself with the backend ``"eager"``, else what compiles it.
        out_spec: the pytree of the model's output.
        report: what was done to its attentions.
    """

    run: Callable[..., Any]
    out_spec: pytree.TreeSpec
    report: Report


class OptimizedDenoiser(nn.Module):
    """A denoiser whose self-attentions are compressed; it is called exactly as the original is.

    Whatever else is read from it (``config``, ``dtype``, ``device``, ``add_embedding``, ...) is the original's.

    Attributes:
        original: the model it was made from, untouched; its weights are these weights.
        methods: what is applied.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Methods,
        backend: str | Callable[..., Any],
        grid: Grid | None,
        mode: str | None,
        options: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        self.original, self.methods = model, methods
        self._backend, self._grid, self._mode, self._options = backend, grid, mode, options
        self._binder = CallBinder(model)
        self._entries: dict[tuple[Any, ...], Prepared] = {}
        self._latest: Prepared | None = None
        self.eval()

    @property
    def report(self) -> Report:
        """What was done to each attention of the graph that was captured last.

        Raises:
            InputError: nothing was captured yet.
        """
        if self._latest is None:
            raise InputError("report: nothing was captured yet; call the model, or give optimize() example inputs")
        return self._latest.report

    def prepare(self, *args: Any, **kwargs: Any) -> Prepared:
        """Capture and rewrite the graph for these inputs, unless it is there; it is compiled when first called."""
        arguments, _ = self._binder.bind(args, kwargs)
        return self._entry(arguments)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser; arguments and result are those of the original's ``forward``.

        Raises:
            InputError: arguments that ``forward`` does not take, a tensor on another device or of another floating
                dtype than the weights, or an input that requires gradients.
            CaptureError: a new input signature that ``torch.export`` cannot capture.
        """
        arguments, wants_class = self._binder.bind(args, kwargs)
        entry = self._entry(arguments)
        with torch.inference_mode(False), torch.no_grad():
            # Tensors made in inference mode would recompile the graph; a copy made outside of it does not.
            inputs = [tensor.clone() if tensor.is_inference() else tensor for tensor in flat_tensors(arguments)]
            output = pytree.tree_unflatten(entry.run(*inputs), entry.out_spec)
        if wants_class or isinstance(output, tuple):
            return output
        return tuple(output.values())

    def _entry(self, arguments: Mapping[str, Any]) -> Prepared:
        key = signature_of(arguments)
        if key not in self._entries:
            self._check(arguments)
            if self._entries:
                log.warning("%s: new input signature, capturing graph %d", self._name, len(self._entries) + 1)
            self._entries[key] = self._build(arguments)
        elif torch.is_grad_enabled():
            self._check_gradients(arguments)
        self._latest = self._entries[key]
        return self._latest

    def _build(self, arguments: Mapping[str, Any]) -> Prepared:
        captured = capture(self.original, arguments)
        rewritten = rewrite(captured.module, self.methods, self._grid)
        report = Report.of(self._name, self.methods, rewritten)
        log.info("%s", report.headline)
        run: Callable[..., Any] = rewritten.module
        if self._backend != "eager":
            options = dict(self._options) if self._options is not None else None
            run = torch.compile(
                run, fullgraph=True, dynamic=False, backend=self._backend, mode=self._mode, options=options
            )
        return Prepared(run, captured.out_spec, report)

    def _check(self, arguments: Mapping[str, Any]) -> None:
        """Refuse what would give a wrong answer or a traceback from inside the graph."""
        if self.original.training:
            raise InputError(f"{self._name} is in train mode; call model.eval() first")
        self._check_gradients(arguments)
        weight = next((p for p in self.original.parameters() if p.is_floating_point()), None)
        for name, tensor in _named_tensors(arguments):
            if weight is None:
                return
            if tensor.device != weight.device:
                raise InputError(f"{name} is on {tensor.device}, the weights on {weight.device}; move one of them")
            if (
                _is_sample(name, arguments)
                and tensor.dtype != weight.dtype
                and not autocast_enabled(weight.device.type)
            ):
                raise InputError(f"{name} has dtype {tensor.dtype}, the weights {weight.dtype}; cast one of them")

    def _check_gradients(self, arguments: Mapping[str, Any]) -> None:
        for name, tensor in _named_tensors(arguments):
            if tensor.requires_grad and torch.is_grad_enabled():
                raise InputError(f"{name} requires gradients, which an optimized denoiser does not give; detach it")

    @property
    def _name(self) -> str:
        return type(self.original).__name__

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_modules", {}).get("original")
            if original is None:
                raise
            return getattr(original, name)

    def train(self, mode: bool = True) -> OptimizedDenoiser:
        """Stay in eval mode: the graph was captured there.

        Raises:
            InputError: ``mode`` is True.
        """
        if mode:
            raise InputError("an optimized denoiser cannot train; train .original, then optimize it again")
        self.training = False
        return self


def _named_tensors(arguments: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    leaves, _ = pytree.tree_flatten_with_path(dict(arguments))
    return [(pytree.keystr(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]


def _is_sample(name: str, arguments: Mapping[str, Any]) -> bool:
    first = next(iter(arguments))
    return name == f"['{first}']" and arguments[first].is_floating_point()


def optimize(
    model: nn.Module,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    method: Method | Iterable[Method] | None,
    backend: str | Callable[..., Any] = "inductor",
    grid: Grid | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> OptimizedDenoiser:
    """Compress a denoiser's self-attention by ``method`` and compile it.

    Args:
        model: a denoiser in eval mode (a diffusers U-Net or transformer, or any module that ``torch.export`` captures).
        args, kwargs: example inputs, as for ``torch.export.export``. With them the graph is captured at once, without
            them at the first call; each new input signature (shapes, dtypes, devices) is captured anew, with a warning.
        method: a merge, a KV downsampling, a tuple with one of each, or ``()`` for the dense graph.
        backend: anything ``torch.compile`` takes; ``"eager"`` runs the rewritten graph as it is.
        grid: ``(rows, columns)`` in image tokens at the finest resolution, for graphs that cannot tell.
        mode, options: as for ``torch.compile``.

    Returns:
        A module with the call signature and the output class of ``model``. Weights are shared, ``model`` is untouched.

    Raises:
        MethodError: ``method`` is no method, or holds two of one kind.
        InputError: ``model`` is no module or in train mode, or the inputs do not suit it.
        CaptureError: ``torch.export`` cannot capture it.
        GridError: ``grid`` does not fit.
        RewriteError: an alpha schedule, and no timestep input.
    """
    methods = normalize(method)
    if not isinstance(model, nn.Module):
        raise InputError(f"model={type(model).__name__} is not an nn.Module; pass the denoiser, such as pipe.unet")
    if isinstance(model, OptimizedDenoiser):
        raise InputError("model is already optimized; optimize its .original")
    if model.training:
        raise InputError(f"{type(model).__name__} is in train mode; call model.eval() first")
    optimized = OptimizedDenoiser(model, methods, backend, grid, mode, options)
    if args is not None or kwargs is not None:
        optimized.prepare(*(args or ()), **(kwargs or {}))
    return optimized


def inspect(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    method: Method | Iterable[Method] | None = None,
    grid: Grid | None = None,
) -> Report:
    """Report the attentions of ``model``, and what ``method`` would do to them, without changing anything.

    Works on the meta device as well. Arguments and errors are those of :func:`optimize`.
    """
    return optimize(model, args, kwargs, method=method, backend="eager", grid=grid).report
