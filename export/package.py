"""AOTInductor packages: compiled once, loaded without tracing or compiling."""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram

from bigain_fx.export.interface import Interface
from bigain_fx.export.ports import packed
from bigain_fx.export.retrace import quiet
from bigain_fx.passes import checks
from bigain_fx.passes.errors import ExportError, InputError, first_line
from bigain_fx.passes.ops.kernels import without_kernels


def write_package(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Compile ``program`` for the device of its example inputs, and write it with ``metadata`` to ``path``.

    The file appears whole or not at all.

    Args:
        program: takes flat, contiguous tensors by position and returns a flat list or tuple of tensors.
        path: ends in ``.pt2``.
        metadata: strings to strings, kept beside torch's own.

    Raises:
        InputError: ``path`` ends in something else, or is in no folder.
        ExportError: an example input that is not contiguous, code that does not compile, a disk that is full.
    """
    from torch._inductor import aoti_compile_and_package

    if path.suffix != ".pt2" or not path.parent.is_dir():
        raise InputError(f"path={str(path)!r} must end in .pt2, in a folder that is there")
    args, _ = program.example_inputs
    if strided := [index for index, tensor in enumerate(args) if not tensor.is_contiguous()]:
        raise ExportError(f"example input {strided[0]} is not contiguous, as every call's will be; export a copy")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            temporary = Path(folder) / path.name
            with temporary.open("wb") as file, quiet(), without_kernels():  # a package needs no Python operators
                sink = _Sink(file)
                # The metadata as a copy: torch adds its own entries to what it is given.
                aoti_compile_and_package(
                    program,
                    package_path=cast(IO[bytes], sink),
                    inductor_configs={"aot_inductor.metadata": dict(metadata)},
                )
                if sink.error:
                    raise sink.error
            if not metadata.items() <= read_metadata(temporary).items():
                raise ExportError(f"torch left entries out of the metadata {sorted(metadata)}")
            os.replace(temporary, path)
    except Exception as error:
        raise ExportError(f"{path} is not written: {first_line(error)}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of the package at ``path``; none of its code runs.

    Raises:
        ExportError: a file that is missing, cut short or no package.
    """
    if not os.path.isfile(path):
        raise ExportError(f"{path} is not there")
    if not zipfile.is_zipfile(path):  # the directory of an archive is at its end
        raise ExportError(f"{path} is cut short, or no AOTInductor package")
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next(name for name in archive.namelist() if name.endswith("_metadata.json"))
            return {str(key): str(value) for key, value in json.loads(archive.read(entry)).items()}
    except Exception as error:
        raise ExportError(f"{path} is an archive, but no whole AOTInductor package") from error


class Package:
    """A compiled denoiser, ready to run. Loading one runs the machine code in it: load only what you trust.

    Args:
        path: a file that :func:`write_package` wrote.

    Attributes:
        metadata: what it was written with, and torch's own.
        interface: what it takes and gives.
        device: what it was compiled for.

    Raises:
        ExportError: a file that is missing, cut short, not one of ours, or that torch cannot load.
        InputError: it was compiled for a device that torch does not see.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = checks.path("path", path)
        self.metadata = read_metadata(self.path)
        try:
            self.interface = Interface.from_metadata(self.metadata)
        except ExportError as error:
            raise ExportError(f"{self.path}: {error}") from None
        self.device = self._device()
        try:
            # Not aoti_load_package: to compare processors, it compiles test programs.
            loader = torch._C._aoti.AOTIModelPackageLoader(os.fspath(self.path), "model", False, 1, -1)
        except Exception as error:
            made, here = self.metadata.get("torch"), torch.__version__
            raise ExportError(
                f"torch {here} cannot load {self.path}, made with torch {made}: {first_line(error)}"
            ) from error
        self._run: Callable[[list[Tensor]], list[Tensor]] = loader.boxed_run

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run the graph on tensors of its shapes and dtypes, in its order, on :attr:`device`."""
        # Compiled code trusts strides and alignment to be those of the example inputs.
        return self._run([packed(tensor) for tensor in inputs])

    def _device(self) -> torch.device:
        kind = self.metadata.get("AOTI_DEVICE_KEY", "cpu")
        if kind == "cpu":
            made, here = self.metadata.get("AOTI_CPU_ISA", ""), torch.backends.cpu.get_cpu_capability()
            if _level(made) > _level(here):
                raise InputError(f"{self.path} is compiled for {made}, this processor has {here}; export it here")
            return torch.device(kind)
        if kind != "cuda" or not torch.cuda.is_available():
            raise InputError(
                f"{self.path} is compiled for {kind}, which torch does not see here; export it for the CPU"
            )
        return torch.device(kind, torch.cuda.current_device())


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
