"""ONNX Runtime sessions on torch tensors, bound by their memory: nothing is copied on the way in or out."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigain_fx.export.interface import Interface
from bigain_fx.export.ports import packed
from bigain_fx.passes import checks
from bigain_fx.passes.errors import ExportError, InputError, first_line

Provider = str | tuple[str, dict[str, Any]]

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
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


class Session:
    """One ONNX file, ready to run.

    Args:
        path: the file; its external data lies beside it.
        providers: execution providers in order of preference, each a name or ``(name, options)``; by default CUDA where
            torch and ONNX Runtime both have it, then the CPU.
        session_options: an ``onnxruntime.SessionOptions``, for threads and the like.

    Raises:
        ExportError: a file that is missing, cut short or no ONNX model, its external data too.
        InputError: ONNX Runtime is not installed, or a provider is not to be had.
    """

    def __init__(
        self, path: str | os.PathLike[str], providers: Sequence[Provider] | None = None, session_options: Any = None
    ) -> None:
        ort = _runtime()
        self.path = checks.path("path", path)
        given = [providers] if isinstance(providers, str) else providers
        _check_providers(given)
        if session_options is not None and not isinstance(session_options, ort.SessionOptions):
            told = checks.told("session_options", session_options)
            raise InputError(f"{told} must be an onnxruntime.SessionOptions, or None")
        wanted = list(given) if given is not None else _default_providers(ort)
        if session_options is None:
            session_options = ort.SessionOptions()
            session_options.log_severity_level = 3  # else it warns of each constant that it does not fold
        _check_available(wanted, ort.get_available_providers())
        _check_file(self.path)
        try:
            # Without this, a provider that fails to start is replaced by the CPU with no more than a printed line.
            self._session = ort.InferenceSession(
                os.fspath(self.path), sess_options=session_options, providers=wanted, enable_fallback=0
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"providers={wanted!r}: {first_line(error)}") from error
        except Exception as error:
            raise ExportError(f"ONNX Runtime cannot load {self.path}: {first_line(error)}") from error
        active = self._session.get_providers()
        if dropped := [name for name in map(_name, wanted) if name not in active]:
            raise InputError(
                f"provider {dropped[0]} did not start, only {active} did; ONNX Runtime's log says why, often that its "
                f"CUDA or cuDNN is another version than torch's {torch.version.cuda}"
            )
        self.device = self._device(active)
        self._inputs, self._outputs = self._session.get_inputs(), self._session.get_outputs()

    @property
    def metadata(self) -> dict[str, str]:
        """The model's ``metadata_props``."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def check(self, interface: Interface) -> None:
        """Check that the graph takes and gives what ``interface`` says.

        Raises:
            ExportError: it does not.
        """
        for ports, arguments in ((interface.inputs, self._inputs), (interface.outputs, self._outputs)):
            said = [(port.name, list(port.shape), _ELEMENTS.get(port.torch_dtype, (port.dtype,))[0]) for port in ports]
            found = [(argument.name, argument.shape, argument.type) for argument in arguments]
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


def _default_providers(ort: ModuleType) -> list[Provider]:
    cuda = torch.cuda.is_available() and _CUDA in ort.get_available_providers()
    return [_CUDA, _CPU] if cuda else [_CPU]


def _check_available(wanted: Sequence[Provider], available: Sequence[str]) -> None:
    if not wanted:
        raise InputError(f"providers is empty; this onnxruntime has {list(available)}")
    for name in map(_name, wanted):
        if name not in available:
            package = "; onnxruntime-gpu in onnxruntime's place has it" if name in _ON_CUDA else ""
            raise InputError(f"provider {name} is not in this onnxruntime, which has {list(available)}{package}")


def _check_file(path: Path) -> None:
    import onnx

    if not os.path.isfile(path):
        raise ExportError(f"{path} is not there")
    try:
        graph = onnx.load(os.fspath(path), load_external_data=False).graph
    except Exception as error:
        raise ExportError(f"{path} is cut short, or no ONNX file: {first_line(error)}") from error
    if not graph.output:
        raise ExportError(f"{path} holds no graph; it is cut short, or no ONNX file")
    needed: dict[str, int] = {}
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            where = {entry.key: entry.value for entry in tensor.external_data}
            width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            size = int(where.get("length", math.prod(tensor.dims) * width))
            needed[where["location"]] = max(needed.get(where["location"], 0), int(where.get("offset", 0)) + size)
    for location, size in needed.items():
        data = path.parent / location
        if not data.is_file():
            raise ExportError(f"{path} has its weights in {data} ({size} bytes), which is not there")
        if data.stat().st_size < size:
            raise ExportError(f"{path} has its weights in {data}: {size} bytes, but {data.stat().st_size} are there")
