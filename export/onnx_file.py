"""An ONNX file on disk: what it needs of other files and says of itself, checked before a runtime sees it."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import FunctionProto, GraphProto, ModelProto, TensorProto

from bigain_fx.export.weights import digests_of, fingerprint, reading
from bigain_fx.passes.errors import ExportError, first_line

DIGEST = "initializers"
"""The metadata entry that holds the digest of the weights."""
_NUMBER = re.compile(r"[0-9]{1,18}")
_NAME = re.compile(r"[^/\\:\0]+")
_DTYPES: dict[int, Any] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.DOUBLE: np.float64,
    TensorProto.INT64: np.int64,
    TensorProto.INT32: np.int32,
    TensorProto.INT16: np.int16,
    TensorProto.INT8: np.int8,
    TensorProto.UINT64: np.uint64,
    TensorProto.UINT32: np.uint32,
    TensorProto.UINT16: np.uint16,
    TensorProto.UINT8: np.uint8,
    TensorProto.BOOL: np.bool_,
}
Digests = dict[tuple[Path, int, int], bytes]
"""Of stretches of files, by file, offset and length."""


@dataclass(frozen=True)
class External:
    """A weight in another file.

    Attributes:
        name: of the initializer.
        path: of the file, which is beside the graph.
        offset: of its first byte there.
        shape, dtype: as numpy has them.
    """

    name: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def stretch(self) -> tuple[Path, int, int]:
        """File, offset and length in bytes."""
        return self.path, self.offset, math.prod(self.shape) * self.dtype.itemsize

    def content(self) -> np.ndarray[Any, Any]:
        """Its bytes, mapped."""
        path, offset, length = self.stretch
        if not length:
            return np.empty(0, np.uint8)
        return np.memmap(path, np.uint8, "r", offset, (length,))


@dataclass(frozen=True)
class OnnxFile:
    """What is read of a file before it is run: its metadata, and the weights that are in other files."""

    path: Path
    metadata: Mapping[str, str]
    external: tuple[External, ...]


def label(name: str, dtype: int, shape: tuple[int, ...]) -> str:
    """What an initializer is called in :func:`fingerprint`."""
    return f"{name} {dtype} {shape}"


def read(path: Path, known: Digests | None = None) -> OnnxFile:
    """Read the file at ``path`` and check all that can be checked without running it, its weights too.

    Args:
        path: of the graph.
        known: digests of weights that were read before; those that are read now are added.

    Raises:
        ExportError: a file that is missing, cut short, damaged or no ONNX; weights that are missing, too short, others
            than when it was exported, or not in a file beside it.
    """
    if not path.is_file():
        raise ExportError(f"{path} is not there")
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except Exception as error:
        raise ExportError(f"{path} is cut short, or no ONNX file: {first_line(error)}") from error
    if not model.graph.output:
        raise ExportError(f"{path} holds no graph; it is cut short, or no ONNX file")
    with reading(path):
        return _read(path, model, {} if known is None else known)


def locations(model: ModelProto) -> set[str]:
    """Every place that ``model`` names for a tensor, wherever in it the tensor is."""
    graphs = (model.graph, *model.functions)
    return {entry.value for graph in graphs for tensor in _tensors(graph) for entry in tensor.external_data
            if entry.key == "location"}  # fmt: skip


def _read(path: Path, model: ModelProto, known: Digests) -> OnnxFile:
    own = [tensor for tensor in model.graph.initializer if _is_external(tensor)]
    everywhere = [tensor for graph in (model.graph, *model.functions) for tensor in _tensors(graph)]
    if sum(map(_is_external, everywhere)) > len(own):
        raise ExportError(f"{path} has data in another file that is no weight of its graph; export it again")
    external = tuple(_external(path, tensor) for tensor in own)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if DIGEST in metadata and metadata[DIGEST] != _digest(model.graph, external, known):
        where = f"{path} and {external[0].path.name}" if external else str(path)
        raise ExportError(f"{where}: the weights are not those that were exported; the files are damaged or mixed up")
    return OnnxFile(path, metadata, external)


def _digest(graph: GraphProto, external: tuple[External, ...], known: Digests) -> str:
    fresh = {each.stretch: each for each in external if each.stretch not in known}
    known.update(zip(fresh, digests_of(each.content for each in fresh.values()), strict=True))
    found = {each.name: known[each.stretch] for each in external}
    for tensor in graph.initializer:
        if not _is_external(tensor):
            content = tensor.raw_data if tensor.HasField("raw_data") else onnx.numpy_helper.to_array(tensor).tobytes()
            found[tensor.name] = hashlib.sha256(content).digest()
    return fingerprint({label(t.name, t.data_type, tuple(t.dims)): found[t.name] for t in graph.initializer})


def _external(path: Path, tensor: TensorProto) -> External:
    where = {entry.key: entry.value for entry in tensor.external_data}
    if len(where) < len(tensor.external_data):
        raise ValueError(f"{tensor.name!r} names its place twice")
    location = where["location"]
    data = path.parent / location
    if not _NAME.fullmatch(location) or location in (".", "..") or not _is_beside(data, path):
        raise ExportError(f"{path} has weights in {location!r:.200}, which is no file of its own folder; refused")
    dtype, shape = np.dtype(_DTYPES[tensor.data_type]), tuple(tensor.dims)
    needed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0:
        raise ValueError(f"{tensor.name!r} has the shape {shape}")
    offset, length = (int(_number(where.get(key, default))) for key, default in (("offset", "0"), ("length", needed)))
    if length != needed:
        raise ValueError(f"{tensor.name!r} has {length} bytes, its shape {shape} takes {needed}")
    size = offset + length
    if not data.is_file():
        raise ExportError(f"{path} has its weights in {data} ({size} bytes), which is not there")
    if data.stat().st_size < size:
        raise ExportError(f"{path} has its weights in {data}: {size} bytes, but {data.stat().st_size} are there")
    return External(tensor.name, data, offset, shape, dtype)


def _is_beside(data: Path, graph: Path) -> bool:
    """Whether a file is in the graph's folder, links followed; both may be links to another folder's, as in a cache."""
    return data.resolve().parent in (graph.parent.resolve(), graph.resolve().parent)


def _number(text: object) -> str:
    if not _NUMBER.fullmatch(str(text)):
        raise ValueError(f"{text!r:.50} is no number of bytes")
    return str(text)


def _is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL or tensor.external_data)


def _tensors(graph: GraphProto | FunctionProto) -> Iterator[TensorProto]:
    """Every tensor in a graph or function: weights, attributes, those of subgraphs."""
    if isinstance(graph, GraphProto):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)
