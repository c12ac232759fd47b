"""``export_onnx`` and ``export_package``: the graph that ``optimize`` compiles, as a file."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bigain_fx.export.retrace import retrace
from bigain_fx.families import GridHint
from bigain_fx.passes import checks
from bigain_fx.passes.errors import ExportError, InputError, first_line
from bigain_fx.passes.images import as_grids, text_of
from bigain_fx.passes.methods import Method, normalize
from bigain_fx.quantized import first_layer, first_quantized
from bigain_fx.report import Report
from bigain_fx.trace import Example, Traced, cast, check, digest, examples_of, trace

if TYPE_CHECKING:
    from bigain_fx.export.verify import Deviation

DTYPES = (torch.float32, torch.float16)


@dataclass(frozen=True)
class GraphRecord:
    """One exported graph.

    Attributes:
        path: of the file.
        operators: how many nodes of each there are; those outside of ONNX's own domain as ``domain::Name``.
        deviations: of each output from torch's, given equal plans; empty where nothing was verified.
        plan_agreement: share of tokens that torch's own plans put into the same group; None without plans.
        report: what was done to the attentions.
    """

    path: Path
    operators: Mapping[str, int]
    deviations: tuple[Deviation, ...]
    plan_agreement: float | None
    report: Report


@dataclass(frozen=True)
class ExportRecord:
    """What :func:`export_onnx` wrote.

    Attributes:
        graphs: one per entry of the example inputs.
        opset: of the standard operators.
        bytes: of all files, shared weights counted once.
        seconds: from the call to the files, verification included.
    """

    graphs: tuple[GraphRecord, ...]
    opset: int
    bytes: int
    seconds: float

    @property
    def operators(self) -> Mapping[str, int]:
        """Operators of all graphs together."""
        return sum((Counter(graph.operators) for graph in self.graphs), Counter[str]())

    @property
    def deviations(self) -> tuple[Deviation, ...]:
        """Deviations of all graphs."""
        return tuple(deviation for graph in self.graphs for deviation in graph.deviations)

    def __str__(self) -> str:
        lines = [f"opset {self.opset}, {self.bytes / 1e6:.1f} MB, {self.seconds:.0f} s"]
        for graph in self.graphs:
            ours = [f"{count} {name}" for name, count in graph.operators.items() if name.startswith("bigain::")]
            lines.append(f"{graph.path}: {sum(graph.operators.values())} nodes, {', '.join(ours) or 'none of ours'}")
            for found in graph.deviations:
                db = "exact" if found.db is None else f"{found.db:.0f} dB"
                lines.append(f"  {found.name}: {found.relative_l2:.1e} relative L2, {found.max_abs:.1e} at most, {db}")
            if graph.plan_agreement is not None:
                lines.append(f"  plans agree with torch's on {graph.plan_agreement:.2%} of the tokens")
        return "\n".join(lines)


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...] | None,
    path: str | Path,
    *,
    kwargs: Mapping[str, Any] | None = None,
    method: Method | Iterable[Method] | None,
    dtype: torch.dtype | None = None,
    grid: GridHint = None,
    opset: int = 20,
    attention: str = "MultiHeadAttention",
    example_inputs: Sequence[Example] | None = None,
    verify: bool = True,
) -> ExportRecord:
    """Write the rewritten graph of a denoiser as ONNX, its operators as functions of the domain ``bigain``.

    Timesteps become float32 inputs, which hold integers and fractions alike. Up to 2 GB, the weights are in the file;
    above, in one beside it.

    Args:
        model: a denoiser in eval mode; it is left as it is.
        args, kwargs: example inputs, as for :func:`bigain_fx.optimize`; the shapes of the graph are theirs.
        path: ends in ``.onnx``.
        method: as for :func:`bigain_fx.optimize`; ``()`` for the dense graph.
        dtype: of weights and floating inputs, ``torch.float32`` or ``torch.float16``; the model's own by default.
        grid: as for :func:`bigain_fx.optimize`.
        opset: of the standard operators, 18 to 23.
        attention: ``"MultiHeadAttention"``, ONNX Runtime's own operator, or ``"standard"`` for any runtime:
            ``Attention`` from opset 23 on, ``MatMul`` and ``Softmax`` below.
        example_inputs: several ``(args, kwargs)`` in the place of ``args`` and ``kwargs``: one graph is written for
            each, its name that of ``path`` with the shape of the first input (of all of them, and the grid, where that
            is needed to tell two apart); all share one weight file.
        verify: run each file on the CPU and compare it with torch.

    Raises:
        InputError: ``path``, ``dtype``, ``opset``, ``attention`` or the inputs are none of these; no onnx here.
        ExportError: the model is quantized, torch cannot export the graph, an output is not finite or deviates from
            torch's, or the files cannot be written. Files that were there before are still there, and nothing else;
            where a disk fails between two sizes, the error names those that were replaced.
        BigainError: what :func:`bigain_fx.optimize` raises.
    """
    started = time.perf_counter()
    check_options(opset, attention)
    checks.flag("verify", verify)
    from bigain_fx.export import files
    from bigain_fx.export.onnx_graph import to_onnx
    from bigain_fx.export.verify import verify as verify_file

    check(model, dtype)
    target = _check_path(path, ".onnx")
    if quantized := first_quantized(model):
        raise ExportError(
            f"{quantized} is quantized, and ONNX has no operator for it; export the model before it is quantized, with "
            "dtype=torch.float16 for half the bytes"
        )
    examples = examples_of(args, kwargs, example_inputs)
    original = cast(model, dtype)
    _check_dtypes(original)
    versions = {"opset": str(opset), "weights": digest(original)}
    traced = [trace(original, *example, normalize(method), grid, dtype, versions) for example in examples]
    names = _file_names(target, traced) if example_inputs is not None else [target.name]
    models = {}
    for name, graph in zip(names, traced, strict=True):
        models[name] = to_onnx(
            graph.module, graph.inputs, opset=opset, attention=attention,
            input_names=[port.name for port in graph.interface.inputs],
            output_names=[port.name for port in graph.interface.outputs],
        )  # fmt: skip
        models[name].metadata_props.update(graph.interface.to_metadata())
    records = []
    with files.staging(target.parent) as folder:
        files.save(models, folder, target.stem)
        for name, graph in zip(names, traced, strict=True):
            files.check(folder / name)
            found = verify_file(folder / name, graph.module, graph.inputs, graph.interface) if verify else None
            records.append(
                GraphRecord(
                    target.parent / name, _operators(models[name]), found.deviations if found else (),
                    found.plan_agreement if found else None, graph.report,
                )
            )  # fmt: skip
        size = files.publish(folder, target.parent)
    return ExportRecord(tuple(records), opset, size, time.perf_counter() - started)


def export_package(
    model: nn.Module,
    args: tuple[Any, ...] | None,
    path: str | Path,
    *,
    kwargs: Mapping[str, Any] | None = None,
    method: Method | Iterable[Method] | None,
    dtype: torch.dtype | None = None,
    grid: GridHint = None,
    example_inputs: Sequence[Example] | None = None,
) -> Report:
    """Compile the rewritten graph of a denoiser ahead of time, with AOTInductor, for the device that it is on.

    :func:`bigain_fx.load_package` runs it in another process, without tracing or compiling.

    Args:
        model, args, kwargs, method, grid: as for :func:`export_onnx`.
        path: ends in ``.pt2``.
        dtype: of weights and floating inputs; the model's own by default.
        example_inputs: several ``(args, kwargs)`` in the place of ``args`` and ``kwargs``: the file holds one graph for
            each, and the weights once; a call is answered by the graph of its inputs' shapes.

    Returns:
        What was done to the attentions, in the first of several graphs.

    Raises:
        InputError: ``path``, ``dtype`` or the inputs are none of these.
        ExportError: the model has layers of a quantizer (its weights may be quantized), the graph does not compile, or
            the file cannot be written; one that was there before still is.
        BigainError: what :func:`bigain_fx.optimize` raises.
    """
    from bigain_fx.export.package import write_package

    check(model, dtype)
    target = _check_path(path, ".pt2")
    if layer := first_layer(model):
        raise ExportError(
            f"{layer} is quantized, and runs in Python, which a package does without; use optimize(), or export the "
            "model before it is quantized"
        )
    original = cast(model, dtype)
    examples = examples_of(args, kwargs, example_inputs)
    traced = [trace(original, *example, normalize(method), grid, dtype, {}) for example in examples]
    _file_names(target, traced)
    try:
        programs = [retrace(graph.module, graph.inputs) for graph in traced]
    except Exception as error:
        raise ExportError(f"torch.export cannot capture the rewritten graph: {first_line(error)}") from error
    write_package(
        [(program, graph.interface.to_metadata()) for program, graph in zip(programs, traced, strict=True)], target
    )
    return traced[0].report


def _check_dtypes(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype not in DTYPES:
            raise InputError(
                f"dtype {parameter.dtype} is not exported to ONNX: ONNX Runtime has no Conv for it on the CPU, and on "
                "CUDA none up to opset 21, and no Resize or Pad; use dtype=torch.float16 or torch.float32"
            )


def _operators(model: Any) -> dict[str, int]:
    names = (f"{node.domain}::{node.op_type}" if node.domain else str(node.op_type) for node in model.graph)
    return dict(sorted(Counter(names).items()))


def _file_names(target: Path, traced: Sequence[Traced]) -> list[str]:
    """A name for each graph: the shape of the first input, of all of them, and the grid, as far as is needed."""
    faces = [graph.interface for graph in traced]
    if len({face.key for face in faces}) == len(faces):
        shapes = [["x".join(map(str, port.shape)) for port in face.telling] for face in faces]
        grids = [text_of(as_grids(face.grid)) if face.grid else "" for face in faces]
        for told in (
            [each[:1] for each in shapes], shapes, [[*each, grid] for each, grid in zip(shapes, grids, strict=True)]
        ):  # fmt: skip
            names = [f"{target.stem}-{'-'.join(each)}{target.suffix}" for each in told]
            if len(set(names)) == len(names):
                return names
    raise InputError(
        f"example_inputs has two of one size among {[face.inputs[0].shape for face in faces]}; shapes, grids and "
        "constants of the inputs tell graphs apart"
    )


def _check_path(path: str | Path, suffix: str) -> Path:
    target = checks.path("path", path)
    if target.suffix != suffix or not os.path.isdir(target.parent):
        raise InputError(f"{checks.told('path', str(path))} must end in {suffix}, in a folder that is there")
    return target


def check_options(opset: int, attention: str) -> None:
    """Refuse options of :func:`export_onnx` before minutes are spent on a model.

    Raises:
        InputError: one that is none, or no onnx here.
    """
    if reason := onnx_missing():
        raise InputError(reason)
    from bigain_fx.export.onnx_graph import ATTENTIONS, OPSETS

    checks.integer("opset", opset, least=OPSETS[0], most=OPSETS[-1])
    checks.choice("attention", attention, ATTENTIONS)


def onnx_missing() -> str | None:
    """What ONNX export lacks here and how to get it, in a sentence, or None."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if not missing:
        return None
    return f"{missing[0]} is not installed; pip install 'bigain-fx[onnx]', or 'bigain-fx[onnx-gpu]' for CUDA"
