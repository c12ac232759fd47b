"""ONNX Runtime sessions on torch tensors, bound by their memory: nothing is copied on the way in or out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bigain_fx.export.interface import Interface
from bigain_fx.export.ports import packed
from bigain_fx.export.weights import reading
from bigain_fx.passes import checks
from bigain_fx.passes.errors import ExportError, InputError, first_line

if TYPE_CHECKING:
    from bigain_fx.export.onnx_file import Digests, OnnxFile

Provider = str | tuple[str, dict[str, Any]]

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_NO_FALLBACK = "session.disable_cpu_ep_fallback"
_ON_CUDA = ("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider", _CUDA)
# As ONNX Runtime prints a type, and the element type that it binds.
_ELEMENTS: dict[torch.dtype, tuple[str, Any]] = {
    torch.float32: ("tensor(float)", np.float32),
    torch.float16: ("tensor(float16)", np.float16),
    torch.float64: ("tensor(double)", np.float64),
    torch.int64: ("tensor(int64)", np.int64),
    torch.int32: ("tensor(int32)", np.int32),
    torch.int16: ("tensor(int16)", np.int16),
    torch.int8: ("tensor(int8)", np.int8),
    torch.uint8: ("tensor(uint8)", np.uint8),
    torch.bool: ("tensor(bool)", np.bool_),
}


class Argument(NamedTuple):
    """An input or an output of a graph, as ONNX Runtime has it."""

    name: str
    shape: list[Any]
    type: str


class SharedWeights:
    """Weights that sessions on the CPU hold once, together.

    ONNX Runtime makes a copy of its own of each weight that it packs, or lays out anew, for its fastest kernels. So it
    does neither here: it runs on the weight file as it lies, mapped.
    """

    def __init__(self) -> None:
        self.digests: Digests = {}
        self._values: dict[tuple[Any, ...], Any] = {}

    def give(self, file: OnnxFile, options: Any) -> None:
        """Put the weights of ``file`` that are in a file of their own into the session options."""
        ort = _runtime()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.add_session_config_entry("session.disable_prepacking", "1")
        for weight in file.external:
            key = (*weight.stretch, weight.shape, weight.dtype)
            if key not in self._values:
                mapped = np.require(weight.content().view(weight.dtype).reshape(weight.shape), requirements="A")
                self._values[key] = ort.OrtValue.ortvalue_from_numpy(mapped)
            options.add_initializer(weight.name, self._values[key])


class Session:
    """One ONNX file, ready to run.

    Args:
        path: the file; its external data lies beside it.
        providers: execution providers in order of preference, each a name or ``(name, options)``; by default CUDA where
            torch and ONNX Runtime both have it, then the CPU.
        session_options: an ``onnxruntime.SessionOptions``, for threads and the like.
        shared: the weights of sessions that are used together, see :class:`SharedWeights`.
        strict: refuse to leave nodes to the CPU; ``providers`` must not name it then, and have no CPU by default.

    Attributes:
        metadata: the model's ``metadata_props``.

    Raises:
        ExportError: a file that is missing, cut short, damaged or no ONNX model, its external data too; weights that
            are not those that were exported; with ``strict``, nodes that no provider takes.
        InputError: ONNX Runtime is not installed, or a provider is not to be had; with ``strict``, the CPU is one.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        providers: Sequence[Provider] | None = None,
        session_options: Any = None,
        shared: SharedWeights | None = None,
        strict: bool = False,
    ) -> None:
        ort = _runtime()
        self.path = checks.path("path", path)
        given = [providers] if isinstance(providers, str) else providers
        _check_providers(given)
        if session_options is not None and not isinstance(session_options, ort.SessionOptions):
            told = checks.told("session_options", session_options)
            raise InputError(f"{told} must be an onnxruntime.SessionOptions, or None")
        checks.flag("strict", strict)
        wanted = list(given) if given is not None else _default_providers(ort, strict)
        _check_available(wanted, ort.get_available_providers())
        if strict and _CPU in map(_name, wanted):
            raise InputError(
                f"strict=True leaves nothing to the CPU, and the providers are {wanted}; name others, such as {_CUDA}, "
                "which torch and ONNX Runtime must both have"
            )
        self._shared = shared or SharedWeights()
        from bigain_fx.export import onnx_file

        file = onnx_file.read(self.path, self._shared.digests)
        self.metadata = file.metadata
        if session_options is None:
            session_options = ort.SessionOptions()
            session_options.log_severity_level = 3  # else it warns of each constant that it does not fold
            if shared and set(map(_name, wanted)) == {_CPU}:
                self._shared.give(file, session_options)
        try:
            # Without this, a provider that fails to start is replaced by the CPU with no more than a printed line.
            with _no_fallback(session_options) if strict else nullcontext():
                self._session = ort.InferenceSession(
                    os.fspath(self.path), sess_options=session_options, providers=wanted, enable_fallback=0
                )
        except Exception as error:
            if isinstance(error, TypeError | ValueError) and not isinstance(error, UnicodeError):
                raise InputError(f"providers={wanted!r}: {first_line(error)}") from error
            how = " with strict=True" if strict else ""
            raise ExportError(f"ONNX Runtime cannot load {self.path}{how}: {first_line(error)}") from error
        active = self._session.get_providers()
        if dropped := [name for name in map(_name, wanted) if name not in active]:
            raise InputError(
                f"provider {dropped[0]} did not start, only {active} did; ONNX Runtime's log says why, often that its "
                f"CUDA or cuDNN is another version than torch's {torch.version.cuda}"
            )
        self.device = self._device(active)
        with reading(self.path):
            self._inputs, self._outputs = (
                [Argument(each.name, list(each.shape), each.type) for each in side]
                for side in (self._session.get_inputs(), self._session.get_outputs())
            )

    def check(self, interface: Interface) -> None:
        """Check that the graph takes and gives what ``interface`` says.

        Raises:
            ExportError: it does not.
        """
        for ports, arguments in ((interface.inputs, self._inputs), (interface.outputs, self._outputs)):
            said = [(port.name, list(port.shape), _ELEMENTS.get(port.torch_dtype, (port.dtype,))[0]) for port in ports]
            found = [tuple(argument) for argument in arguments]
            if said != found:
                raise ExportError(f"{self.path}: the graph has {found}, its metadata says {said}; export it again")

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
        """Run the graph.

        Args:
            inputs: in the graph's order, of its shapes and dtypes, on :attr:`device`.
            outputs: shape and dtype of each.

        Returns:
            Fresh tensors on :attr:`device`, ready for torch's current stream.

        Raises:
            InputError: a value that the graph cannot take, such as a label out of range.
        """
        sources = [packed(tensor.detach()) for tensor in inputs]
        results = [torch.empty(tuple(shape), dtype=dtype, device=self.device) for shape, dtype in outputs]
        binding = self._session.io_binding()
        for argument, tensor in zip(self._inputs, sources, strict=True):
            binding.bind_input(argument.name, *self._buffer(tensor))
        for argument, tensor in zip(self._outputs, results, strict=True):
            binding.bind_output(argument.name, *self._buffer(tensor))
        # ONNX Runtime has a stream of its own.
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise InputError(f"ONNX Runtime cannot run {self.path} on these inputs: {first_line(error)}") from error
        binding.synchronize_outputs()
        return results

    def _buffer(self, tensor: Tensor) -> tuple[str, int, Any, list[int], int]:
        element = _ELEMENTS[tensor.dtype][1]
        return self.device.type, self.device.index or 0, element, list(tensor.shape), tensor.data_ptr()

    def _device(self, active: Sequence[str]) -> torch.device:
        for name in active:
            if name in _ON_CUDA:
                return torch.device("cuda", int(self._session.get_provider_options()[name].get("device_id", 0)))
        return torch.device("cpu")


def _runtime() -> ModuleType:
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise InputError(
            f"{error.name} is not installed; pip install 'bigain-fx[onnx]', or 'bigain-fx[onnx-gpu]' for CUDA"
        ) from error
    module: ModuleType = onnxruntime
    return module


def _check_providers(providers: Any) -> None:
    several = providers is None or isinstance(providers, list | tuple)
    for provider in providers or () if several else ():
        pair = isinstance(provider, tuple) and len(provider) == 2 and isinstance(provider[1], dict)
        several &= isinstance(provider[0] if pair else provider, str)
    if not several:
        raise InputError(f"{checks.told('providers', providers)} must be names of providers, or (name, options)")


def _name(provider: Provider) -> str:
    return provider if isinstance(provider, str) else provider[0]


def _default_providers(ort: ModuleType, strict: bool) -> list[Provider]:
    if not torch.cuda.is_available() or _CUDA not in ort.get_available_providers():
        return [_CPU]
    return [_CUDA] if strict else [_CUDA, _CPU]


@contextmanager
def _no_fallback(options: Any) -> Iterator[None]:
    """Make sessions fail that leave nodes to the CPU; ``options`` are the caller's, and as they were afterwards."""
    try:
        before = options.get_session_config_entry(_NO_FALLBACK)
    except RuntimeError:  # it has no such entry
        before = "0"
    options.add_session_config_entry(_NO_FALLBACK, "1")
    try:
        yield
    finally:
        options.add_session_config_entry(_NO_FALLBACK, before)


def _check_available(wanted: Sequence[Provider], available: Sequence[str]) -> None:
    if not wanted:
        raise InputError(f"providers is empty; this onnxruntime has {list(available)}")
    for name in map(_name, wanted):
        if name not in available:
            package = "; onnxruntime-gpu in onnxruntime's place has it" if name in _ON_CUDA else ""
            raise InputError(f"provider {name} is not in this onnxruntime, which has {list(available)}{package}")
