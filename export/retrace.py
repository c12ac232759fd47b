"""A rewritten graph as an exported program: what both ways out of torch start from."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from bigain_fx.passes.constants import folded
from bigain_fx.passes.pairs import as_pairs, pair

_EXPORTER_LOG = "torch.onnx._internal.exporter._registration"


def retrace(
    module: GraphModule, inputs: Sequence[Tensor], around: Callable[[GraphModule], nn.Module] | None = None
) -> ExportedProgram:
    """Export ``module``, which takes ``inputs`` by position, with static shapes, in real numbers; weights are shared.

    Args:
        module: a rewritten graph.
        inputs: its inputs; the program takes complex ones as :func:`bigain_fx.passes.pairs.pair` makes them.
        around: makes of the graph in real numbers what is exported; by default it is that graph.

    Raises:
        ExportError: complex numbers that have no form in real ones.
    """
    real = as_pairs(folded(module, _has_no_form))
    with torch.no_grad(), quiet():
        return torch.export.export(around(real) if around else real, tuple(map(pair, inputs)), strict=False)


def _has_no_form(node: Node) -> bool:
    """Whether ONNX cannot say what ``node`` does: decompositions of matrices, which Wan-Animate has of a weight."""
    return str(node.target).startswith("aten.linalg_") and node.target is not torch.ops.aten.linalg_vector_norm.default


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
