"""bigain-fx: token compression for diffusion denoisers, as a graph rewrite."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigain_fx.calibration import AlphaCalibration, RatioCalibration, calibrate
    from bigain_fx.classify import Classification, DiffusionClassifier
    from bigain_fx.denoiser import OptimizedDenoiser, inspect, optimize
    from bigain_fx.deploy import ExportRecord, export_onnx, export_package
    from bigain_fx.deployed import OrtDenoiser, PackagedDenoiser, load_package
    from bigain_fx.passes.alpha import LinearAlpha
    from bigain_fx.passes.destinations import Destinations, destination_rule
    from bigain_fx.passes.errors import (
        BigainError,
        CaptureError,
        ExportError,
        GridError,
        InputError,
        MethodError,
        RewriteError,
    )
    from bigain_fx.passes.methods import BlockPool, KVDownsample, LaplacianMerge, Merge, ToDo, ToMe
    from bigain_fx.pipelines import Summary, disable, enable, summary
    from bigain_fx.presets import preset
    from bigain_fx.report import Report
    from bigain_fx.select import clear_times

__version__ = "0.1.0"

_HOMES = {
    "bigain_fx.calibration": ("AlphaCalibration", "RatioCalibration", "calibrate"),
    "bigain_fx.classify": ("Classification", "DiffusionClassifier"),
    "bigain_fx.denoiser": ("OptimizedDenoiser", "inspect", "optimize"),
    "bigain_fx.deploy": ("ExportRecord", "export_onnx", "export_package"),
    "bigain_fx.deployed": ("OrtDenoiser", "PackagedDenoiser", "load_package"),
    "bigain_fx.passes.destinations": ("Destinations", "destination_rule"),
    "bigain_fx.passes.errors": (
        "BigainError", "CaptureError", "ExportError", "GridError", "InputError", "MethodError", "RewriteError",
    ),
    "bigain_fx.passes.alpha": ("LinearAlpha",),
    "bigain_fx.passes.methods": ("BlockPool", "KVDownsample", "LaplacianMerge", "Merge", "ToDo", "ToMe"),
    "bigain_fx.pipelines": ("Summary", "disable", "enable", "summary"),
    "bigain_fx.presets": ("preset",),
    "bigain_fx.report": ("Report",),
    "bigain_fx.select": ("clear_times",),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AlphaCalibration", "BigainError", "BlockPool", "CaptureError", "Classification", "Destinations",
    "DiffusionClassifier", "ExportError", "ExportRecord", "GridError", "InputError", "KVDownsample", "LaplacianMerge",
    "LinearAlpha", "Merge", "MethodError", "OptimizedDenoiser", "OrtDenoiser", "PackagedDenoiser", "RatioCalibration",
    "Report", "RewriteError", "Summary", "ToDo", "ToMe",
    "calibrate", "clear_times", "destination_rule", "disable", "enable", "export_onnx", "export_package", "inspect",
    "load_package", "optimize", "preset", "summary",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
