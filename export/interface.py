"""The interface of an exported graph: what it takes, gives and was made from. It travels in the file as strings."""

from __future__ import annotations

import inspect
import json
import keyword
from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bigain_fx.export.ports import Path, Port, dotted, leaves, nested
from bigain_fx.passes.errors import ExportError, InputError
from bigain_fx.passes.images import Hint, as_grids, as_hint, text_of
from bigain_fx.passes.kv import TIMESTEP_INPUTS

__all__ = ["Interface", "Port", "describe"]

_FORMAT = 1  # of the "interface" entry; files of another one are refused
_CPU = torch.device("cpu")
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Interface:
    """What an exported denoiser takes, gives and was made from.

    Attributes:
        model: the class name of the denoiser.
        parameters: the parameters of its ``forward``, in order.
        defaults: the defaults of those that have a JSON value for one.
        inputs, outputs: the tensors of the graph, in its order.
        constants: what else the graph was captured with, by dotted path; it is built in.
        config: the model's config, JSON values only.
        method: what was applied, such as ``"bigain-tm:0.7+bigain-td:2:0.9"``, or ``"dense"``.
        grid: rows and columns in image tokens at the finest resolution, or those of each image, where known.
        versions: of bigain_fx, torch, the opset; a digest of the weights.
    """

    model: str
    parameters: tuple[str, ...]
    defaults: Mapping[str, Any]
    inputs: tuple[Port, ...]
    constants: Mapping[str, Any]
    outputs: tuple[Port, ...]
    config: Mapping[str, Any]
    method: str
    grid: Hint | None
    versions: Mapping[str, str]

    @property
    def telling(self) -> tuple[Port, ...]:
        """The inputs whose shapes tell graphs apart: all but the timestep, which may be a number."""
        return tuple(port for port in self.inputs if port.key not in TIMESTEP_INPUTS)

    @property
    def built_in_grid(self) -> Hint | None:
        """The grid that calls must have; None where any will do."""
        return None if self.method == "dense" else self.grid

    @property
    def key(self) -> Hashable:
        """What a call chooses among graphs of one model by: shapes, constants and the grid."""
        return tuple(port.shape for port in self.telling), repr(sorted(self.constants.items())), self.built_in_grid

    def has_constants(self, given: Mapping[str, Any]) -> bool:
        """Whether what is no input among ``given``, by dotted path, is what is built in."""
        ports = {port.key for port in self.inputs} | {"return_dict"}
        try:
            self._check_constants({key: value for key, value in given.items() if key not in ports})
        except InputError:
            return False
        return True

    def to_metadata(self) -> dict[str, str]:
        """Every part as a string: the versions, ``method`` and ``grid`` plain, ``config`` and ``interface`` as JSON."""
        interface = {
            "format": _FORMAT,
            "model": self.model,
            "parameters": self.parameters,
            "defaults": dict(self.defaults),
            "inputs": [asdict(port) for port in self.inputs],
            "constants": dict(self.constants),
            "outputs": [asdict(port) for port in self.outputs],
            "versions": list(self.versions),
        }
        grid = {"grid": text_of(as_grids(self.grid))} if self.grid else {}
        own = {"method": self.method, "config": json.dumps(dict(self.config)), "interface": json.dumps(interface)}
        return {**self.versions, **grid, **own}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Interface:
        """Read what :meth:`to_metadata` wrote; other entries are ignored.

        Raises:
            ExportError: the metadata is not of a file of ours, or its interface is malformed.
        """
        if "interface" not in metadata or "bigain_fx" not in metadata:
            raise ExportError("not made by bigain-fx: no interface in the metadata; use export_onnx or export_package")
        try:
            interface = cls._parse(metadata)
            interface._rehearse()
        except Exception as error:  # of whatever kind: what follows is the reader's own, on someone else's data
            what = repr(error).replace("\n", " ")
            raise ExportError(f"the interface in its metadata is malformed ({what:.300}); export it again") from error
        return interface

    @classmethod
    def _parse(cls, metadata: Mapping[str, str]) -> Interface:
        data = json.loads(metadata["interface"])
        if data["format"] != _FORMAT:
            raise ValueError(f"format {data['format']}, this bigain-fx reads {_FORMAT}")
        inputs, outputs = (tuple(map(Port.parse, data[side])) for side in ("inputs", "outputs"))
        names = [port.name for port in inputs + outputs]
        if not inputs or not outputs or len(set(names)) < len(names):
            raise ValueError(f"inputs and outputs {names} must be there, each under its own name")
        keys = {port.key for port in inputs}
        if not all(isinstance(port.path[0], str) for port in inputs) or len(keys) < len(inputs):
            raise ValueError(f"the inputs {names} must be keyword arguments, each its own")
        paths = [port.path for port in outputs]
        if [path for path, _ in leaves(nested([(path, 0) for path in paths]))] != paths:
            raise ValueError(f"{paths} are not the paths of an output")
        first = [path[0] for path in paths if path]
        if not all(isinstance(key, int) for key in first) and not all(map(_is_field, first)):
            raise ValueError(f"{paths} do not begin with names of fields")
        images = metadata["grid"].split("+") if "grid" in metadata else []
        grids = [tuple(int(side) for side in image.split("x")) for image in images]
        model, parameters, config = data["model"], data["parameters"], json.loads(metadata["config"])
        if not all(isinstance(name, str) for name in (model, *parameters)) or not isinstance(parameters, list):
            raise TypeError(f"{model!r} is no model's name, or {parameters!r} are no parameters")
        if not all(isinstance(values, dict) for values in (data["defaults"], data["constants"], config)):
            raise TypeError("defaults, constants and config must be objects")
        if private := [name for name in config if name.startswith("_")]:  # none is written
            raise ValueError(f"no model has {private[0]!r} in its config")
        return cls(
            model=model,
            parameters=tuple(parameters),
            defaults=data["defaults"],
            inputs=inputs,
            constants=data["constants"],
            outputs=outputs,
            config=config,
            method=metadata["method"],
            grid=as_hint(as_grids(grids)) if grids else None,
            versions={str(name): metadata[name] for name in data["versions"]},
        )

    def _rehearse(self) -> None:
        """Do all that a call does, but for running the graph: what is inconsistent fails here and not there."""
        meta = torch.device("meta")
        named = {port.path[0] for port in self.inputs} | {"return_dict"}
        others = {name: value for name, value in self.defaults.items() if name not in named}
        given = {dotted(path): value for path, value in leaves(others)}
        given |= {key: value for key, value in self.constants.items() if value is not None}
        given |= {port.key: torch.empty(port.shape, dtype=port.torch_dtype, device=meta) for port in self.inputs}
        self._bring(given, meta)
        self.output([torch.empty(port.shape, dtype=port.torch_dtype, device=meta) for port in self.outputs])

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name, defaults included.

        Raises:
            InputError: too many arguments, or one that is given twice.
        """
        if len(args) > len(self.parameters):
            raise InputError(f"{len(args)} arguments by position; {self.model} takes {', '.join(self.parameters)}")
        by_position = dict(zip(self.parameters, args, strict=False))
        if twice := [name for name in by_position if name in kwargs]:
            raise InputError(f"{twice[0]} is given twice, by position and by name; give it once")
        return {**self.defaults, **by_position, **kwargs}

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device = _CPU) -> list[Tensor]:
        """Bring a call to the graph's flat inputs, as :meth:`Port.bring` does for each.

        ``return_dict`` is left to the caller, and what is None is absent.

        Args:
            args, kwargs: the call, as the original's ``forward`` takes it.
            device: where the graph runs, with its index; only a timestep is moved there.

        Raises:
            InputError: an input that is missing, unknown, on another device, or of another shape or floating dtype; a
                constant other than what is built into the graph.
        """
        given = {dotted(path): value for path, value in leaves(self.arguments(args, kwargs))}
        given.pop("return_dict", None)
        return self._bring(given, device)

    def _bring(self, given: Mapping[str, Any], device: torch.device) -> list[Tensor]:
        ports = {port.key: port for port in self.inputs}
        self._check_constants({key: value for key, value in given.items() if key not in ports})
        for key in ports:
            if key not in given:
                raise InputError(f"{key} is missing; the graph takes {self._takes}")
        return [port.bring(given[key], device) for key, port in ports.items()]

    def output(self, tensors: Sequence[Tensor]) -> Any:
        """The original's output from the graph's flat one: nested dicts and tuples, or the tensor itself."""
        return nested([(port.path, tensor) for port, tensor in zip(self.outputs, tensors, strict=True)])

    @property
    def _takes(self) -> str:
        constants = [f"{key}={value!r}" for key, value in self.constants.items()]
        return ", ".join([*map(str, self.inputs), *constants])

    def _check_constants(self, given: Mapping[str, Any]) -> None:
        built_in = {dotted(path): value for path, value in leaves(self.defaults)} | dict(self.constants)
        for key, value in given.items():
            if isinstance(value, Tensor):
                raise InputError(f"{key} is a tensor that the graph was exported without; it takes {self._takes}")
            # Only plain values are compared: an array would compare by element.
            if key not in built_in or not _is_plain(value) or value != built_in[key]:
                what = f"{key}={value!r}" if _is_plain(value) else f"{key}, a {type(value).__name__},"
                raise InputError(f"{what} is not what the graph was exported with; it takes {self._takes}")
        for key, value in self.constants.items():
            if value is not None and key not in given:
                raise InputError(f"{key} is missing; the graph was exported with {key}={value!r}, give it too")


def describe(
    model: nn.Module,
    signature: inspect.Signature,
    arguments: Mapping[str, Any],
    out_spec: pytree.TreeSpec,
    outputs: Sequence[Any],
    method: str,
    grid: Hint | None,
    versions: Mapping[str, str],
) -> Interface:
    """Describe the graph that was captured of ``model(**arguments)``.

    Args:
        model: the denoiser; its ``config`` is recorded where it has one.
        signature: of its ``forward``.
        arguments: canonical keyword arguments, as ``bigain_fx.calls.CallBinder.bind`` returns them.
        out_spec, outputs: the pytree of the output, and its flat tensors, real or fake.
        method, grid, versions: as in :class:`Interface`.

    Raises:
        ExportError: an argument that is neither a tensor nor a JSON value, or an output that is no tensor.
    """
    given = [(path, value) for path, value in leaves(arguments, nones=True) if path != ("return_dict",)]
    tensors = [(path, value) for path, value in given if isinstance(value, Tensor)]
    uses = Counter(path[-1] for path, _ in tensors)
    inputs = tuple(Port.of(_name(path, uses[path[-1]] > 1), path, value) for path, value in tensors)
    places = list(leaves(pytree.tree_unflatten(list(range(len(outputs))), out_spec)))
    if not inputs or not all(isinstance(i, int) and isinstance(outputs[i], Tensor) for _, i in places):
        raise ExportError(
            f"{type(model).__name__} must take and give tensors, in dicts, lists or tuples, to be exported"
        )
    ports = tuple(Port.of(f"out_{_name(path, whole=True)}", path, outputs[i]) for path, i in places)
    if len(ports) == 1:
        ports = (replace(ports[0], name=f"out_{inputs[0].name}"),)
    defaults = {name: item.default for name, item in signature.parameters.items() if item.default is not item.empty}
    config = getattr(model, "config", None)
    return Interface(
        model=type(model).__name__,
        parameters=tuple(name for name, item in signature.parameters.items() if item.kind not in _VARIADIC),
        defaults=_json_values(defaults),
        inputs=inputs,
        constants=dict(_constants(given, defaults)),
        outputs=ports,
        config=_json_values(config) if isinstance(config, Mapping) else {},
        method=method,
        grid=grid,
        versions=dict(versions),
    )


def _name(path: Path, whole: bool) -> str:
    last = path[-1] if path else ""
    return last if isinstance(last, str) and not whole else "_".join(map(str, path))


def _constants(given: Sequence[tuple[Path, Any]], defaults: Mapping[str, Any]) -> dict[str, Any]:
    constants = {}
    for path, value in given:
        key = dotted(path)
        if (value is None and defaults.get(key) is None) or isinstance(value, Tensor):
            continue
        if value is not None and not _is_plain(value):
            raise ExportError(f"{key} is a {type(value).__name__}, which no file can hold; give a tensor or a number")
        constants[key] = value
    return constants


def _is_field(key: str | int) -> bool:
    """Whether an output class can have a field of that name beside what a dict has."""
    named = isinstance(key, str) and key.isidentifier() and key.isascii() and not keyword.iskeyword(key)
    return named and not str(key).startswith("_") and not hasattr(OrderedDict, str(key)) and key != "to_tuple"


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _json_values(items: Mapping[str, Any]) -> dict[str, Any]:
    """The public ones of ``items`` that JSON can hold, as it holds them: tuples become lists."""
    kept = {}
    for name, value in items.items():
        try:
            value = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
        if not name.startswith("_"):
            kept[name] = value
    return kept
