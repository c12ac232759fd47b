"""A package on disk: torch's archive of compiled code, and in it the weights of all its graphs, each once.

Beside torch's own entries, ``bigain/weights`` holds the bytes of the weights and ``bigain/index.json`` says which of
them each graph calls by what name, with digests of weights and code. The archive is not compressed, so that weights
are mapped where they lie.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from bigain_fx.export.weights import WeightWriter, digest_of, digests_of, fingerprint, reading
from bigain_fx.passes.errors import ExportError

_WEIGHTS, _INDEX = "bigain/weights", "bigain/index.json"
_FORMAT = 2  # of the index; in the first one a package had none
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Constant:
    """A weight as compiled code trusts it to lie: ``flat`` in memory, viewed with ``shape`` and ``stride``."""

    flat: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def add_weights(path: Path, graphs: Mapping[str, Mapping[str, Constant]]) -> None:
    """Add the weights, and an index of all that is in it, to the package at ``path``."""
    if not zipfile.is_zipfile(path):
        raise ExportError(f"{path.name} was cut short by torch")
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        code = {name: digest_of(archive.read(name)).hex() for name in archive.namelist() if _is_code(name)}
        index = dict[str, dict[str, Any]]()
        digests = dict[str, bytes]()
        entry = zipfile.ZipInfo(f"{root}/{_WEIGHTS}")
        with archive.open(entry, "w", force_zip64=True) as file:
            assert archive.fp is not None
            writer = WeightWriter(cast(BinaryIO, file), archive.fp.tell())
            for graph, constants in graphs.items():
                index[graph] = {}
                for name, constant in constants.items():
                    flat = constant.flat
                    field = {"length": flat.numel(), "dtype": str(flat.dtype), "device": flat.device.type,
                             "shape": list(constant.shape), "stride": list(constant.stride)}  # fmt: skip
                    offset, digest = writer.add(flat.cpu().contiguous().view(torch.uint8).numpy())
                    digests[_label(graph, name, field)] = digest
                    index[graph][name] = {"offset": offset, **field}
        made = {"format": _FORMAT, "graphs": index, "weights": fingerprint(digests), "code": code}
        archive.writestr(f"{root}/{_INDEX}", json.dumps(made))


def _label(graph: str, name: str, field: Mapping[str, Any]) -> str:
    """What a weight is called in :func:`fingerprint`: all that is said of it but where it is."""
    return json.dumps([graph, name, *(field[key] for key in ("length", "dtype", "device", "shape", "stride"))])


def _is_code(name: str) -> bool:
    return name.endswith((".so", "_metadata.json"))


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of the package at ``path``, of the first of several graphs; none of its code runs.

    Raises:
        ExportError: a file that is missing, cut short, damaged or no package.
    """
    return Archive(path).metadata[0]


class Archive:
    """What is read of a package before its code is loaded.

    Raises:
        ExportError: a file that is missing, cut short, damaged or no package.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ExportError(f"{path} is not there")
        if not zipfile.is_zipfile(path):  # the directory of an archive is at its end
            raise ExportError(f"{path} is cut short, or no AOTInductor package")
        try:
            with zipfile.ZipFile(path) as archive:
                self._entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                self._index: Any = json.loads(archive.read(self._entries[_INDEX])) if _INDEX in self._entries else None
                graphs = self._index["graphs"] if self._index else {"model": {}}
                self.metadata = [self._metadata_of(archive, name) for name in graphs]
            if not self.metadata:
                raise ValueError("no graphs")
        except Exception as error:
            raise ExportError(f"{path} is an archive, but no whole AOTInductor package") from error

    def _metadata_of(self, archive: zipfile.ZipFile, graph: str) -> dict[str, str]:
        start = f"data/aotinductor/{graph}/"
        entry = next(name for name in self._entries if name.startswith(start) and name.endswith("_metadata.json"))
        found = json.loads(archive.read(self._entries[entry]))
        return {str(key): str(value) for key, value in found.items()}

    def constants(self, device: torch.device) -> dict[str, dict[str, Tensor]]:
        """The weights of each graph by name: views of the file, mapped, or of one copy of them on ``device``.

        Raises:
            ExportError: a file of an older version, or one that is damaged.
        """
        if self._index is None or self._index.get("format") != _FORMAT:
            raise ExportError(f"{self.path} was made by another version of bigain-fx; export it again")
        with reading(self.path):
            return self._constants(device)

    def _constants(self, device: torch.device) -> dict[str, dict[str, Tensor]]:
        mapped, contents, labels = self._mapped(), dict[int, Tensor](), dict[str, int]()
        placed, graphs = dict[tuple[Any, ...], Tensor](), dict[str, dict[str, Tensor]]()
        for graph, fields in self._index["graphs"].items():
            graphs[graph] = {}
            for name, field in fields.items():
                dtype, start = _DTYPES[field["dtype"]], field["offset"]
                end = start + field["length"] * dtype.itemsize
                if not 0 <= start <= end <= len(mapped):
                    raise ValueError(f"{name} is not within the weights")
                labels[_label(graph, name, field)], key = start, (start, end, dtype, field["device"])
                content = contents[start] = mapped[start:end]
                if key not in placed:
                    placed[key] = _placed(content, dtype, _CPU if field["device"] == "cpu" else device)
                graphs[graph][name] = placed[key].as_strided(field["shape"], field["stride"])
        digests = dict(zip(contents, digests_of(content.numpy for content in contents.values()), strict=True))
        with zipfile.ZipFile(self.path) as archive:
            code = {name: digest_of(archive.read(name)).hex() for name in archive.namelist() if _is_code(name)}
        found = fingerprint({label: digests[start] for label, start in labels.items()})
        if (found, code) != (self._index["weights"], self._index["code"]):
            raise ValueError("its weights or its code are not those that were exported")
        return graphs

    def _mapped(self) -> Tensor:
        """The bytes of the weights: pages of the file, which the system reads when they are used."""
        info = self._entries[_WEIGHTS]
        with self.path.open("rb") as file:
            file.seek(info.header_offset + 26)
            start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            size = file.seek(0, os.SEEK_END)
        if info.compress_type != zipfile.ZIP_STORED or start + info.file_size > size:
            raise ValueError("its weights are compressed")
        return torch.from_file(os.fspath(self.path), size=size, dtype=torch.uint8)[start : start + info.file_size]


def _placed(content: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``content`` on ``device``, where compiled code expects it to start."""
    if device.type == "cpu" and content.data_ptr() % 64 == 0:
        return content.view(dtype)
    return content.clone().view(dtype).to(device)
