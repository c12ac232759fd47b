"""One tensor that an exported graph takes or gives, and how a call's value is brought to it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigain_fx.passes import checks
from bigain_fx.passes.errors import ExportError, InputError
from bigain_fx.passes.kv import TIMESTEP_INPUTS
from bigain_fx.passes.pairs import pair

Path = tuple[str | int, ...]

_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
}


@dataclass(frozen=True)
class Port:
    """One tensor of a graph: ``Port("text_embeds", ("added_cond_kwargs", "text_embeds"), (2, 1280), "float16")``.

    Attributes:
        name: its name in the graph.
        path: the keys that lead to it, from ``forward``'s keyword arguments or from its output; ``()`` for an output
            that is the tensor itself.
        shape: in full; graphs are static.
        dtype: as torch prints it, without ``torch.``.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def key(self) -> str:
        """The path in one string, such as ``added_cond_kwargs.text_embeds``."""
        return dotted(self.path)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        return _DTYPES[self.dtype]

    def __str__(self) -> str:
        return f"{self.key} {self.shape} {self.dtype}"

    @classmethod
    def of(cls, name: str, path: Path, tensor: Tensor) -> Port:
        """The port that ``tensor`` passes; a complex one as real pairs, ``(..., 2)``.

        Raises:
            ExportError: a dtype that no port has.
        """
        tensor = pair(tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise ExportError(f"{name} has dtype {tensor.dtype}, which cannot be exported; use one of {list(_DTYPES)}")
        return cls(name, path, tuple(tensor.shape), dtype)

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Port:
        """The port whose fields JSON held.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        name, path, shape, dtype = (data[key] for key in ("name", "path", "shape", "dtype"))
        if not isinstance(name, str) or not isinstance(path, list) or not isinstance(shape, list):
            raise TypeError(f"no tensor has the name {name!r}, the path {path!r} and the shape {shape!r}")
        port = cls(name, tuple(path), tuple(shape), dtype)
        if dtype not in _DTYPES or not all(type(size) is int and size >= 0 for size in shape):  # True is an int
            raise ValueError(f"no tensor is {port.shape} {dtype}")
        if not all(type(key) in (str, int) for key in path):
            raise ValueError(f"no path is {port.path}")
        return port

    def bring(self, value: Any, device: torch.device) -> Tensor:
        """``value`` as the graph takes it.

        A timestep may be any number, or a tensor of any dtype and device with one value or one for each of the batch.
        Anything else has this shape and, if it is floating, this dtype; integers are cast, complex numbers are pairs.

        Raises:
            InputError: a value that is none of these, or is on another device.
        """
        return self._timestep(value, device) if self.key in TIMESTEP_INPUTS else self._tensor(value, device)

    def _timestep(self, value: Any, device: torch.device) -> Tensor:
        if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
            value = value.item()
        if not isinstance(value, Tensor | numbers.Real):
            raise InputError(f"{self.key} is a {type(value).__name__}; give a number or a torch.Tensor")
        limit: Any = checks.INT64
        if not isinstance(value, Tensor) and (value < -limit or value > limit):
            raise InputError(f"{checks.told(self.key, value)} must be a number that int64 can hold")
        tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
        if tuple(tensor.shape) == self.shape:
            return tensor.to(device, self.torch_dtype)
        values, count = tensor.to(device, self.torch_dtype).reshape(-1), math.prod(self.shape)
        if tensor.ndim > 1 or values.numel() not in (1, count):
            # A batch of equal timesteps is one timestep.
            if tensor.ndim != 1 or count != 1 or values.numel() == 0 or bool((values != values[0]).any()):
                raise self._misshapen(tensor, " or one value for all")
            values = values[:1]
        return values.expand(count).reshape(self.shape)

    def _tensor(self, value: Any, device: torch.device) -> Tensor:
        if not isinstance(value, Tensor):
            raise InputError(f"{self.key} is a {type(value).__name__}; give a torch.Tensor {self.shape} {self.dtype}")
        tensor = pair(value)
        if tuple(tensor.shape) != self.shape:
            raise self._misshapen(tensor)
        if tensor.device != device:
            raise InputError(f"{self.key} is on {tensor.device}, the graph runs on {device}; move it there")
        # A mask means another thing as bool than as float: integers are cast alone.
        boolean = tensor.dtype == torch.bool and self.torch_dtype.is_floating_point
        if tensor.dtype != self.torch_dtype and (tensor.is_floating_point() or boolean):
            raise InputError(f"{self.key} has dtype {tensor.dtype}, the graph takes {self.torch_dtype}; cast it")
        return tensor.to(self.torch_dtype)

    def _misshapen(self, value: Tensor, also: str = "") -> InputError:
        return InputError(
            f"{self.key} has shape {tuple(value.shape)}, the graph takes {self.shape}{also}; it is static: export "
            "another size with example_inputs="
        )


def packed(tensor: Tensor) -> Tensor:
    """``tensor`` itself if its memory can be handed to a runtime as it lies, else a copy that can."""
    dense = tensor.contiguous()
    # A slice may start anywhere; kernels that load vectors expect what allocators give.
    return dense if dense.data_ptr() % 16 == 0 else dense.clone()


def dotted(path: Path) -> str:
    """The path in one string."""
    return ".".join(map(str, path))


def leaves(value: Any, path: Path = (), *, nones: bool = False) -> Iterator[tuple[Path, Any]]:
    """The leaves of nested mappings, lists and tuples with their paths, in pytree's order; with or without None."""
    if isinstance(value, Mapping):
        children: list[tuple[str | int, Any]] = list(value.items())
    elif isinstance(value, list | tuple):
        children = list(enumerate(value))
    else:
        if nones or value is not None:
            yield path, value
        return
    for key, child in children:
        yield from leaves(child, (*path, key), nones=nones)


def nested(items: Sequence[tuple[Path, Any]]) -> Any:
    """The inverse of :func:`leaves`: dicts, tuples, or the one leaf itself."""
    if items[0][0] == ():
        return items[0][1]
    groups: dict[str | int, list[tuple[Path, Any]]] = {}
    for path, leaf in items:
        groups.setdefault(path[0], []).append((path[1:], leaf))
    built = {key: nested(group) for key, group in groups.items()}
    return tuple(built.values()) if isinstance(next(iter(built)), int) else built
