"""ONNX graphs on disk: all of them, or none, and the file that was there before. Nothing else is deleted, ever.

A graph of up to 2 GB holds its weights. Larger ones, and several that share weights, keep them in one file beside the
graphs, named after its content: a graph never meets weights that are not its own, whenever a write was cut off.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnx_ir as ir

from bigain_fx.export.onnx_file import DIGEST, label, locations
from bigain_fx.export.weights import WeightWriter, digest_of, fingerprint
from bigain_fx.passes.errors import ExportError

log = logging.getLogger("bigain_fx")

LIMIT = 2 * 1024**3 - 16 * 1024**2
"""Bytes that a protobuf file may have, less some room for the graph itself."""
_SMALL = 1024


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
    _finish(models, folder, stem, len(models) > 1 or sum(_nbytes(model) for model in models.values()) > LIMIT)
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
    """Move what :func:`save` wrote to ``folder``, weights before graphs.

    Weights of graphs that are replaced stay, and are named in the log: nothing here can tell who else reads them.

    Returns:
        Bytes of the files that were moved.

    Raises:
        ExportError: a folder has the name of a graph, or a move fails; it says what was moved.
    """
    graphs, data = sorted(staged.glob("*.onnx")), sorted(staged.glob("*.data"))
    replaced = set[str]().union(*(_weights_of(folder / graph.name) for graph in graphs))
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
    for name in sorted(replaced - {path.name for path in data}):
        with suppress(OSError):
            log.warning(
                "%s (%.1f MB) held weights of the graphs that were replaced; delete it if no other graph reads it",
                folder / name, (folder / name).stat().st_size / 1e6,
            )  # fmt: skip
    return size


def _nbytes(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def _finish(models: Mapping[str, ir.Model], folder: Path, stem: str, external: bool) -> None:
    """Give each of ``models`` the digest of its weights; write these into one file, if ``external``, to point at it."""
    unnamed = folder / "weights"
    moved: list[tuple[ir.Value, int]] = []
    with unnamed.open("wb") as file:
        writer = WeightWriter(file)
        for model in models.values():
            digests: dict[str, bytes] = {}
            for value in model.graph.initializers.values():
                held = value.const_value
                assert held is not None
                content = held.tobytes()
                named = label(value.name or "", held.dtype.value, tuple(held.shape.numpy()))
                if external and held.nbytes > _SMALL:
                    offset, digests[named] = writer.add(content)
                    moved.append((value, offset))
                else:
                    digests[named] = digest_of(content)
            model.metadata_props[DIGEST] = fingerprint(digests)
    if not external:
        unnamed.unlink()
        return
    location = f"{stem}-{writer.digest[:12]}.data"
    os.replace(unnamed, folder / location)
    for value, offset in moved:
        held, shape, name = value.const_value, value.shape, value.name
        assert held is not None
        assert shape is not None
        assert name is not None
        value.const_value = ir.ExternalTensor(
            location, offset, held.nbytes, held.dtype, shape=shape, name=name, base_dir=folder
        )


def _weights_of(graph: Path) -> set[str]:
    """Names of the weight files that ``graph`` reads; none if it cannot be read."""
    try:
        return locations(onnx.load(graph, load_external_data=False))
    except Exception:
        return set()
