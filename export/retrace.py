"""A rewritten graph as an exported program: what both ways out of torch start from."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

_EXPORTER_LOG = "torch.onnx._internal.exporter._registration"


def retrace(module: nn.Module, inputs: Sequence[Tensor]) -> ExportedProgram:
    """Export ``module``, which takes ``inputs`` by position, with static shapes; its weights are shared."""
    with torch.no_grad(), quiet():
        return torch.export.export(module, tuple(inputs), strict=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch says of its own deprecated specs, and of packages that its exporter would like to find."""
    log = logging.getLogger(_EXPORTER_LOG)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
            yield
    finally:
        log.setLevel(level)
