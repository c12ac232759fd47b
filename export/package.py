"""AOTInductor packages: compiled once, loaded without tracing or compiling; several graphs share their weights."""

from __future__ import annotations

import io
import os
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram

from bigain_fx.export.archive import Archive, Constant, add_weights
from bigain_fx.export.interface import Interface
from bigain_fx.export.ports import packed
from bigain_fx.export.retrace import quiet
from bigain_fx.passes import checks
from bigain_fx.passes.errors import ExportError, InputError, first_line
from bigain_fx.passes.ops.kernels import without_kernels

Graph = tuple[ExportedProgram, Mapping[str, str]]
"""A program that takes flat, contiguous tensors by position and returns a flat list or tuple of them; its metadata."""


def write_package(graphs: Sequence[Graph], path: Path) -> None:
    """Compile programs for the device of their example inputs, and write them to one file, equal weights once.

    The file appears whole or not at all.

    Args:
        graphs: at least one; the metadata, strings to strings, is kept beside torch's own.
        path: ends in ``.pt2``.

    Raises:
        InputError: ``path`` ends in something else, or is in no folder.
        ExportError: an example input that is not contiguous, code that does not compile, a disk that is full.
    """
    from torch._inductor.package.package import package_aoti

    if path.suffix != ".pt2" or not path.parent.is_dir():
        raise InputError(f"path={str(path)!r} must end in .pt2, in a folder that is there")
    for program, _ in graphs:
        args, _ = program.example_inputs
        if strided := [index for index, tensor in enumerate(args) if not tensor.is_contiguous()]:
            raise ExportError(f"example input {strided[0]} is not contiguous, as every call's will be; export a copy")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            temporary = Path(folder) / path.name
            files, constants = dict[str, list[str]](), dict[str, dict[str, Constant]]()
            with quiet(), without_kernels():  # a package needs no Python operators
                for number, graph in enumerate(graphs):
                    name = f"graph-{number:03}"
                    files[name], constants[name] = _compile(*graph)
                with temporary.open("wb") as file:
                    sink = _Sink(file)
                    package_aoti(cast(IO[bytes], sink), files)  # type: ignore[arg-type]
                    if sink.error:
                        raise sink.error
            add_weights(temporary, constants)
            for found, (_, metadata) in zip(Archive(temporary).metadata, graphs, strict=True):
                if not metadata.items() <= found.items():
                    raise ExportError(f"torch left entries out of the metadata {sorted(metadata)}")
            os.replace(temporary, path)
    except Exception as error:
        raise ExportError(f"{path} is not written: {first_line(error)}") from error


def _compile(program: ExportedProgram, metadata: Mapping[str, str]) -> tuple[list[str], dict[str, Constant]]:
    """The files that AOTInductor makes of ``program``, without its weights, and these by name."""
    made = torch._inductor.aot_compile(
        program.module(check_guards=False),
        *program.example_inputs,
        options={
            "aot_inductor.package": True,
            "aot_inductor.package_constants_in_so": False,
            "aot_inductor.package_constants_on_disk_format": "pickle_weights",
            "aot_inductor.metadata": dict(metadata),  # a copy: torch adds its own entries
        },
    )
    assert isinstance(made, list)
    weights = next(item for item in made if not isinstance(item, str))
    held = {}
    for name, (tensor, properties) in weights.items():
        # As torch has it in memory: compiled code trusts the strides.
        last = sum((size - 1) * stride for size, stride in zip(properties.shape, properties.stride, strict=True))
        length = last + 1 if 0 not in properties.shape else 0
        flat = tensor.detach().as_strided((length,), (1,), properties.offset)
        held[name] = Constant(flat, tuple(properties.shape), tuple(properties.stride))
    return [item for item in made if isinstance(item, str)], held


@dataclass(frozen=True)
class PackagedGraph:
    """One graph of a package: what it takes and gives, and how it is run."""

    interface: Interface
    metadata: Mapping[str, str]
    run: Callable[[Sequence[Tensor]], list[Tensor]]


class Package:
    """A compiled denoiser, ready to run. Loading one runs the machine code in it: load only what you trust.

    Args:
        path: a file that :func:`write_package` wrote.

    Attributes:
        graphs: one or several; their weights are in memory once.
        device: what they were compiled for.

    Raises:
        ExportError: a file that is missing, cut short, damaged, not one of ours, or that torch cannot load.
        InputError: it was compiled for a device that torch does not see.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = checks.path("path", path)
        archive = Archive(self.path)
        try:
            interfaces = [Interface.from_metadata(metadata) for metadata in archive.metadata]
        except ExportError as error:
            raise ExportError(f"{self.path}: {error}") from None
        self.device = self._device(archive.metadata[0])
        constants = archive.constants(self.device)
        runs = [self._load(name, weights, archive.metadata[0]) for name, weights in constants.items()]
        if self.device.type != "cpu":
            free_with(runs, [tensor for weights in constants.values() for tensor in weights.values()])
        self.graphs = tuple(map(PackagedGraph, interfaces, archive.metadata, runs))

    def _load(
        self, name: str, weights: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        try:
            # Not aoti_load_package: to compare processors, it compiles test programs.
            loader = torch._C._aoti.AOTIModelPackageLoader(os.fspath(self.path), name, False, 1, -1)
            loader.load_constants(dict(weights), False, True, True)  # not copied
        except Exception as error:
            made, here = metadata.get("torch"), torch.__version__
            raise ExportError(
                f"torch {here} cannot load {self.path}, made with torch {made}: {first_line(error)}"
            ) from error

        def run(inputs: Sequence[Tensor], _kept: Mapping[str, Tensor] = weights) -> list[Tensor]:
            """Run the graph on tensors of its shapes and dtypes, in its order, on the package's device."""
            # Compiled code trusts strides and alignment to be those of the example inputs.
            return loader.boxed_run([packed(tensor) for tensor in inputs])

        return run

    def _device(self, metadata: Mapping[str, str]) -> torch.device:
        kind = metadata.get("AOTI_DEVICE_KEY", "cpu")
        if kind == "cpu":
            made, here = metadata.get("AOTI_CPU_ISA", ""), torch.backends.cpu.get_cpu_capability()
            if _level(made) > _level(here):
                raise InputError(f"{self.path} is compiled for {made}, this processor has {here}; export it here")
            return torch.device(kind)
        if kind != "cuda" or not torch.cuda.is_available():
            raise InputError(
                f"{self.path} is compiled for {kind}, which torch does not see here; export it for the CPU"
            )
        return torch.device(kind, torch.cuda.current_device())


def free_with(runs: Sequence[Callable[..., Any]], tensors: Sequence[Tensor]) -> None:
    """Free the memory of ``tensors`` when the last of ``runs`` is gone: torch's handles of weights hold it for good."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]
    left = [len(runs)]

    def one_less() -> None:
        left[0] -= 1
        for storage in () if left[0] else storages:
            storage.resize_(0)

    for run in runs:
        weakref.finalize(run, one_less).atexit = False


class _Sink(io.RawIOBase):
    """A file that keeps its first error for later: torch's archive writer ends the process when a write fails."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.error: Exception | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def write(self, data: Any) -> int:
        try:
            if self.error is None:
                self._file.write(data)
        except (OSError, ValueError) as error:  # no space, or closed already
            self.error = error
        return len(data)


def _level(instructions: str) -> int:
    """How far the vector instructions of x86 go: 0, 256 or 512 bits; code beyond it ends the process."""
    return 512 if "AVX512" in instructions else 256 if "AVX2" in instructions else 0
