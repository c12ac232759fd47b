"""Exported denoisers, called exactly as the originals are: in a diffusers pipeline's place for the U-Net, say."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from bigain_fx.export.interface import Interface, Port
from bigain_fx.export.package import Package
from bigain_fx.export.ports import dotted, leaves
from bigain_fx.export.session import Provider, Session, SharedWeights
from bigain_fx.families import GridReader, built_in
from bigain_fx.passes import checks
from bigain_fx.passes.errors import ExportError, InputError
from bigain_fx.passes.pairs import pair

_log = logging.getLogger("bigain_fx")
File = str | os.PathLike[str]


@dataclass(frozen=True)
class _Graph:
    """One exported graph: its flat inputs to its flat outputs."""

    interface: Interface
    run: Callable[[list[Tensor]], list[Tensor]]

    @property
    def size(self) -> tuple[int, ...]:
        return self.interface.inputs[0].shape

    def takes(self, given: Mapping[str, Any]) -> bool:
        """Whether the arguments ``given``, by dotted path, have the shapes and constants of this graph."""
        shapes = {key: tuple(pair(value).shape) for key, value in given.items() if isinstance(value, Tensor)}
        fits = all(shapes.get(port.key) == port.shape for port in self.interface.telling)
        return fits and self.interface.has_constants(given)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Graph:
        return self


class _MissingError(InputError, AttributeError):
    """What an exported denoiser lacks: ours, and still what ``hasattr`` looks for."""


class DeployedDenoiser(nn.Module):
    """A denoiser that runs exported graphs; it is called as the original is. Its weights are the graphs'.

    What pipelines read of the original is here too: ``config``, ``dtype``, ``device``, ``add_embedding`` (SDXL) and
    ``cache_context`` (Flux), and every entry of the config as an attribute. Its one parameter is empty: it is what
    tells dtype and device to whoever asks the parameters for them. Copies share the graphs; pickled, it is the paths of
    its files.

    Attributes:
        interface: what the graph takes, gives and was made from; of several graphs, the first one's.
        config: the original's.
        device: where it runs, and its inputs must be.
    """

    def __init__(self, graphs: Sequence[_Graph], device: torch.device, opened: tuple[Any, ...] | None) -> None:
        super().__init__()
        self.interface, self.device = graphs[0].interface, device
        self.config = FrozenDict(self.interface.config)
        self._graphs, self._opened = tuple(graphs), opened
        self._warned, self._warned_of_grid, self._read_grid = False, False, GridReader()
        self.placeholder = nn.Parameter(torch.empty(0, dtype=self.dtype, device=device), requires_grad=False)
        self.training = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating input, the sample."""
        dtypes = [port.torch_dtype for port in self.interface.inputs]
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)

    @property
    def add_embedding(self) -> Any:
        """What SDXL's pipelines read of it: ``add_embedding.linear_1.in_features``."""
        if "projection_class_embeddings_input_dim" not in self.config:
            raise AttributeError(f"{self.interface.model} has no add_embedding")
        size = self.config["projection_class_embeddings_input_dim"]
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=size))

    def cache_context(self, name: str) -> AbstractContextManager[None]:
        """Nothing is cached between steps, under any ``name``; pipelines enter this around each call."""
        return nullcontext()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph; arguments are those of the original's ``forward``.

        Returns:
            The original's output, by field and by index; with ``return_dict=False`` a tuple.

        Raises:
            InputError: arguments that the graph does not take, see :meth:`Interface.bind`, that tell of another grid
                than the one that is built in, or that require gradients.
        """
        arguments = self.interface.arguments(args, kwargs)
        graph = self._choose(arguments)
        inputs = graph.interface.bind((), arguments, self.device)
        for port, tensor in zip(graph.interface.inputs, inputs, strict=True):
            if tensor.requires_grad and torch.is_grad_enabled():
                raise InputError(f"{port.key} requires gradients, which an exported graph does not give; detach it")
        with torch.inference_mode(False), torch.no_grad():
            output = graph.interface.output(graph.run(inputs))
        if not isinstance(output, dict):
            return output
        return _output_class(tuple(output))(**output) if arguments.get("return_dict", True) else tuple(output.values())

    def _choose(self, arguments: Mapping[str, Any]) -> _Graph:
        given = {dotted(path): value for path, value in leaves(arguments)}
        first = self.interface.inputs[0]
        size = tuple(getattr(given.get(first.key), "shape", first.shape))
        found = [graph for graph in self._graphs if graph.takes(given)]
        # Another one says what is wrong.
        near = [graph for graph in self._graphs if len(self._graphs) == 1 or graph.size == size]
        if graphs := found or near[:1]:
            return self._of_grid(graphs, arguments)
        sizes = " or ".join(map(str, sorted({graph.size for graph in self._graphs})))
        raise InputError(
            f"{first.key} has shape {size}, there are graphs for {sizes}; export that size too with example_inputs="
        )

    def _of_grid(self, graphs: Sequence[_Graph], arguments: Mapping[str, Any]) -> _Graph:
        """The one of ``graphs`` for the grid of the inputs: plans are built in, and shapes need not tell them apart."""
        grids = list(dict.fromkeys(graph.interface.built_in_grid for graph in graphs))
        known = [grid for grid in grids if grid is not None]
        if len(known) < len(grids):
            return graphs[0]
        read = self._read_grid(arguments)
        grid = built_in(known, read)
        graph = next(graph for graph in graphs if graph.interface.grid == grid)
        if read.reason and not self._warned_of_grid:
            self._warned_of_grid = True
            reason = read.reason.removesuffix("; pass grid=")
            _log.warning("%s: its grid is taken to be %s: %s", self.interface.model, grid, reason)
        return graph

    def train(self, mode: bool = True) -> DeployedDenoiser:
        """Stay in eval mode.

        Raises:
            InputError: ``mode`` is True.
        """
        if mode:
            raise InputError("an exported denoiser cannot train; train the original, then export it again")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeployedDenoiser:
        """Behind ``to``, ``half``, ``cuda``, ...: the graph stays where and what it is, so the rest is refused."""
        try:
            moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
            place = f"{moved.dtype} on {moved.device}"
        except (AssertionError, RuntimeError) as error:
            raise InputError(f"an exported denoiser stays on {self.device}: {error}") from error
        here = f"{self.dtype} on {self.device}"
        if moved.dtype == self.dtype and moved.device.type == "cpu" != self.device.type:
            if not self._warned:
                _log.warning(
                    "an exported denoiser stays on %s, where its graph is compiled for: what offloads it frees nothing",
                    self.device,
                )
            self._warned = True
        elif place != here:
            raise InputError(f"an exported denoiser stays {here}, it cannot become {place}; export or load it for that")
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the weights are the graph's.

        Raises:
            InputError: always.
        """
        raise InputError(
            "an exported denoiser has its weights in its file; load them into the original, export it again"
        )

    def __copy__(self) -> DeployedDenoiser:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> DeployedDenoiser:
        memo[id(self)] = copied = copy.copy(self)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce__(self) -> Any:
        if self._opened is None:
            raise InputError("an exported denoiser with session_options cannot be pickled; open its file anew")
        return type(self), self._opened

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            config = self.__dict__.get("config", {})
            if name in config:
                return config[name]
        what = self.__dict__["interface"].model if "interface" in self.__dict__ else "model"
        raise _MissingError(
            f"{type(self).__name__} has no {name!r}: it is a fixed graph; change the {what} that it was made of, then "
            "export that again"
        )

    def extra_repr(self) -> str:
        """Model, method, sizes and device, for ``print``."""
        sizes = sorted({graph.size for graph in self._graphs})
        return f"{self.interface.model}, {self.interface.method}, {sizes}, {self.device}"


class OrtDenoiser(DeployedDenoiser):
    """A denoiser of ONNX files, run by ONNX Runtime.

    Args:
        path: a file of ``export_onnx``, or several of one model at different sizes. The inputs' shapes, constants and
            grids choose among them. On the CPU, several hold their weights in memory once, which takes ONNX Runtime's
            repacking of weights, and so some of its speed, away; with ``session_options`` each packs a copy of its own.
        providers: execution providers in order of preference, each a name or ``(name, options)``; by default CUDA where
            torch and ONNX Runtime both have it, then the CPU.
        session_options: an ``onnxruntime.SessionOptions``, for threads and the like.
        strict: refuse a graph of which nodes would be left to the CPU; without it they run there, at the price of
            copies. ``providers`` must not name the CPU then, and are CUDA alone by default.

    Raises:
        ExportError: a file that is missing, cut short, not one of ours, or of another model than the first; with
            ``strict``, nodes that no provider takes.
        InputError: no file, two for one size, no ONNX Runtime, or a provider that is not to be had; with ``strict``,
            the CPU is one of the providers, or there is no CUDA to take by default.
    """

    def __init__(
        self,
        path: File | Sequence[File],
        providers: Sequence[Provider] | None = None,
        session_options: Any = None,
        strict: bool = False,
    ) -> None:
        paths = [checks.path("path", each) for each in (path if isinstance(path, list | tuple) else (path,))]
        if not paths:
            raise InputError("path is empty; give a file of export_onnx, or several")
        shared = SharedWeights() if len(paths) > 1 else None
        sessions = [Session(each, providers, session_options, shared, strict) for each in paths]
        graphs = [_ort_graph(session) for session in sessions]
        for session, graph in zip(sessions, graphs, strict=True):
            if _identity(graph.interface) != _identity(graphs[0].interface):
                raise ExportError(f"{session.path} is of another model, method or weights than {sessions[0].path}")
        if len({graph.interface.key for graph in graphs}) < len(graphs):
            raise InputError(
                f"path={list(map(str, paths))} has two graphs for one size of {sorted(g.size for g in graphs)}"
            )
        opened = [os.path.abspath(each) for each in paths], providers, None, strict
        super().__init__(graphs, sessions[0].device, opened if session_options is None else None)


class PackagedDenoiser(DeployedDenoiser):
    """A denoiser of an AOTInductor package, compiled ahead of time; see :func:`load_package`."""

    def __init__(self, path: File) -> None:
        package = Package(path)
        graphs = [_Graph(graph.interface, graph.run) for graph in package.graphs]
        keys = {graph.interface.key for graph in graphs}
        if len({_identity(graph.interface) for graph in graphs}) > 1 or len(keys) < len(graphs):
            raise ExportError(f"{package.path} is damaged: its graphs are not of one model, each of a size of its own")
        super().__init__(graphs, package.device, (os.path.abspath(path),))


def load_package(path: File) -> PackagedDenoiser:
    """Load a package of ``export_package``; nothing is traced or compiled.

    Loading runs the machine code in the file: load only what you trust.

    Raises:
        ExportError: a file that is missing, cut short, not one of ours, or that torch cannot load.
        InputError: it was compiled for a device that torch does not see.
    """
    return PackagedDenoiser(path)


def _ort_graph(session: Session) -> _Graph:
    try:
        interface = Interface.from_metadata(session.metadata)
    except ExportError as error:
        raise ExportError(f"{session.path}: {error}") from None
    session.check(interface)
    outputs = [(port.shape, port.torch_dtype) for port in interface.outputs]
    return _Graph(interface, lambda inputs: session.run(inputs, outputs))


def _identity(interface: Interface) -> str:
    """What graphs of one model have in common at every size."""

    def ports(side: Sequence[Port]) -> list[tuple[Any, ...]]:
        return [(port.path, port.dtype) for port in side]

    same = (interface.model, interface.method, interface.parameters, dict(interface.config))
    return repr((*same, interface.versions.get("weights"), ports(interface.inputs), ports(interface.outputs)))


@functools.cache
def _output_class(fields: tuple[str, ...]) -> type[BaseOutput]:
    """An output class as diffusers has them. The original's is not imported: a file must not name code to run."""
    return dataclasses.make_dataclass("DenoiserOutput", [(name, Any, None) for name in fields], bases=(BaseOutput,))
