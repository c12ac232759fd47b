"""Rows that ONNX Runtime runs: the same denoiser and inputs, exported, on as many threads as torch has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bigain_fx import OrtDenoiser, Report, export_onnx
from bigain_fx.deploy import onnx_missing
from bigain_fx.passes.methods import Methods

if TYPE_CHECKING:
    from bigain_fx.models import Workload

CUDA = "CUDAExecutionProvider"


def refuse(workload: Workload) -> str | None:
    """Why ONNX Runtime cannot run ``workload`` here, or None."""
    if reason := onnx_missing():
        return reason
    import onnxruntime

    weight = next(workload.model.parameters())
    if weight.is_cuda and CUDA not in onnxruntime.get_available_providers():
        return f"this onnxruntime has no {CUDA}; pip install onnxruntime-gpu in its place"
    if weight.dtype not in (torch.float32, torch.float16):
        return f"{weight.dtype} is not exported; use float32 or float16"
    return None


def build(workload: Workload, methods: Methods, folder: Path) -> tuple[Callable[[], Any], Report]:
    """Export ``workload`` into ``folder`` and load it; the call, and what was done to the attentions.

    Nothing is verified here: the benchmark compares every row with dense eager itself.

    Raises:
        BigainError: whatever :func:`bigain_fx.export_onnx` and :class:`bigain_fx.OrtDenoiser` raise.
    """
    import onnxruntime

    path = folder / f"{len(list(folder.glob('*.onnx')))}.onnx"
    record = export_onnx(workload.model, workload.args, path, kwargs=workload.kwargs, method=methods, verify=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    denoiser = OrtDenoiser(path, session_options=options)
    return partial(denoiser, *workload.args, **workload.kwargs), record.graphs[0].report
