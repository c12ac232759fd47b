"""ONNX graphs on disk: all of them, or none, and the file that was there before.

A graph of up to 2 GB holds its weights. Larger ones, and several that share weights, keep them in one file beside the
graphs, named after its content: a graph never meets weights that are not its own, whenever a write was cut off.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnx_ir as ir

from bigain_fx.passes.errors import ExportError

LIMIT = 2 * 1024**3 - 16 * 1024**2
"""Bytes that a protobuf file may have, less some room for the graph itself."""
_SMALL = 1024
_OURS = re.compile(r"[^/\\]+-[0-9a-f]{12}\.data")
_ALIGNMENT = 4096


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A new folder inside of ``folder``, gone afterwards: what is whole is moved out of it by :func:`publish`.

    Raises:
        ExportError: ``folder`` is not there or cannot be written; an ``OSError`` in the body, such as a full disk.
    """
    try:
        with TemporaryDirectory(prefix=".unfinished-", dir=folder) as name:
            yield Path(name)
    except OSError as error:
        reason = error.strerror or error
        raise ExportError(f"{folder.name or '.'!r} cannot be written: {reason}; nothing was left") from error


def save(models: Mapping[str, ir.Model], folder: Path, stem: str) -> None:
    """Write each model under its name into ``folder``, an empty one; weights into ``STEM-<digest>.data`` if need be."""
    if len(models) > 1 or sum(_nbytes(model) for model in models.values()) > LIMIT:
        _externalize(models, folder, stem)
    for name, model in models.items():
        ir.save(model, folder / name)


def check(graph: Path) -> None:
    """Check a file against the ONNX standard.

    Raises:
        ExportError: it does not conform.
    """
    try:
        onnx.checker.check_model(os.fspath(graph))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{graph.name} is no valid ONNX: {str(error).strip().splitlines()[0]}") from error


def publish(staged: Path, folder: Path) -> int:
    """Move what :func:`save` wrote to ``folder``, weights before graphs; drop weights that no graph reads any more.

    Returns:
        Bytes of the files that were moved.

    Raises:
        ExportError: a folder has the name of a graph, or a move fails; it says what was moved.
    """
    graphs, data = sorted(staged.glob("*.onnx")), sorted(staged.glob("*.data"))
    replaced = {weights for graph in graphs for weights in _weights_of(folder / graph.name)}
    if taken := [graph.name for graph in graphs if (folder / graph.name).is_dir()]:
        raise ExportError(f"{taken[0]!r} is a folder; name another file; nothing was left")
    fresh = [path.name for path in data if not (folder / path.name).exists()]
    size, moved = 0, list[str]()
    for path in (*data, *graphs):
        size += path.stat().st_size
        try:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(path, folder / path.name)
        except OSError as error:
            written = [name for name in moved if name.endswith(".onnx")]
            for name in [] if written else [name for name in fresh if name in moved]:
                (folder / name).unlink(missing_ok=True)
            what = f"only {', '.join(written)} was replaced" if written else "nothing was left"
            raise ExportError(f"{path.name!r} cannot be written: {error.strerror or error}; {what}") from error
        moved.append(path.name)
    if replaced:
        kept = {weights for graph in folder.glob("*.onnx") for weights in _weights_of(graph)}
        for name in replaced - kept:
            (folder / name).unlink(missing_ok=True)
    return size


def _nbytes(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def _externalize(models: Mapping[str, ir.Model], folder: Path, stem: str) -> None:
    """Move the weights of ``models`` into one file, each distinct one once, and point the graphs at it."""
    written: dict[bytes, int] = {}
    tensors: list[tuple[ir.Value, int]] = []
    whole = hashlib.sha256()
    unnamed = folder / "weights"
    with unnamed.open("wb") as file:
        for model in models.values():
            for value in model.graph.initializers.values():
                if value.const_value is None or value.const_value.nbytes <= _SMALL:
                    continue
                content = value.const_value.tobytes()
                digest = hashlib.sha256(content).digest()
                if digest not in written:
                    file.write(bytes(-file.tell() % _ALIGNMENT))
                    written[digest] = file.tell()
                    file.write(content)
                    whole.update(digest)
                tensors.append((value, written[digest]))
    location = f"{stem}-{whole.hexdigest()[:12]}.data"
    os.replace(unnamed, folder / location)
    for value, offset in tensors:
        held, shape, name = value.const_value, value.shape, value.name
        assert held is not None
        assert shape is not None
        assert name is not None
        value.const_value = ir.ExternalTensor(
            location, offset, held.nbytes, held.dtype, shape=shape, name=name, base_dir=folder
        )


def _weights_of(graph: Path) -> set[str]:
    """Names of the weight files that ``graph`` reads, if it is there and can be read."""
    try:
        model = onnx.load(graph, load_external_data=False)
    except Exception:
        return set()
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    return {entry.value for entry in entries if entry.key == "location" and _OURS.fullmatch(entry.value)}
