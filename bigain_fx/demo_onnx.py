"""The ONNX part of ``bigain-fx demo``: the same denoisers exported, timed beside the compiled ones."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigain_fx.demo_report import Variant, decibels
from bigain_fx.deploy import export_onnx
from bigain_fx.deployed import OrtDenoiser
from bigain_fx.embedded import ClassConditional
from bigain_fx.passes.grammar import parse

METHODS = ("dense", "bigain-tm:0.7")


@dataclass(frozen=True)
class Exported:
    """One denoiser as ONNX Runtime runs it; ``export_seconds`` from the model to the session, a first call included."""

    method: str
    denoiser: OrtDenoiser
    export_seconds: float
    output: Tensor


def export(bundle: ClassConditional, call: Callable[[Any], Tensor], example: tuple[Tensor, ...]) -> list[Exported]:
    """Export ``bundle`` by each of :data:`METHODS`, for inputs like ``example``: images, timesteps, labels."""
    import onnxruntime

    images, timesteps, labels = example
    kwargs = {"timestep": timesteps, **bundle.condition(labels)}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    exported = []
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            started, path = time.perf_counter(), Path(folder) / "denoiser.onnx"
            export_onnx(bundle.model, (images,), path, kwargs=kwargs, method=parse(method), verify=False)
            denoiser = OrtDenoiser(path, session_options=options)
            output = call(denoiser)
            exported.append(Exported(method, denoiser, time.perf_counter() - started, output))
    return exported


def summarize(
    exported: Sequence[Exported], seconds: Sequence[tuple[float, ...]], variants: Sequence[Variant]
) -> list[dict[str, Any]]:
    """Rows for the report; ``seconds`` of each round, taken in turns with the compiled ``variants``."""
    compiled = {variant.method: variant for variant in variants}
    rows = []
    for item, own in zip(exported, seconds, strict=True):
        twin = compiled[item.method]
        rows.append(
            {
                "method": item.method,
                "milliseconds_per_call": 1e3 * statistics.median(own),
                "speedup": _ratio(seconds[0], own),
                "over_compiled": _ratio(twin.call_seconds, own),
                "output_db": decibels(twin.output, item.output, float(twin.output.square().mean())),
                "export_seconds": item.export_seconds,
                "call_seconds": list(own),
            }
        )
    return rows


def _ratio(base: Sequence[float], own: Sequence[float]) -> float:
    return statistics.median(before / after for before, after in zip(base, own, strict=True))
