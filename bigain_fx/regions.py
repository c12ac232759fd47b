"""How a graph with our operators is compiled: each of them once for each shape, and never from an older one's cache.

Inductor writes code node by node: the plan's thirteen kernels, at each of SDXL's seventy attentions, make compiling
take half as long again. What ``torch.compiler.nested_compile_region`` marks is written once, and called.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bigain_fx.passes import ops

REPEATED = frozenset({torch.ops.bigain.merge_plan.default, torch.ops.bigain.merge.default})
"""What inductor gains little by fusing with its neighbours: a plan, and a segment mean."""


def as_regions(module: GraphModule) -> None:
    """Call the operators of :data:`REPEATED`, in place, through functions that torch compiles once for each shape."""
    regions: dict[str, Callable[..., Any]] = {}
    for node in [node for node in module.graph.nodes if node.target in REPEATED]:
        tensors = node.all_input_nodes
        args = [
            tensors.index(item) if isinstance(item, Node) else (list(item) if isinstance(item, Sequence) else item,)
            for item in node.args
        ]
        values = [tensor.meta["val"] for tensor in tensors]
        kinds = [(value.shape, value.stride(), value.dtype, value.device) for value in values]
        key = str((node.target, args, kinds))
        if key not in regions:
            regions[key] = _region(node.target, args)
        node.target, node.args = regions[key], tuple(tensors)
    module.recompile()


@contextmanager
def own_cache() -> Iterator[None]:
    """Cache what is compiled meanwhile under our operators' source too: torch's key has only their names."""
    config: Any = torch.compiler.config
    with config.patch(cache_key_tag=f"{config.cache_key_tag} bigain-fx {_source()}"):
        yield


@cache
def _source() -> str:
    modules = [file.read_bytes() for file in sorted(Path(ops.__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(modules)).hexdigest()


def _region(target: Callable[..., Any], args: Sequence[int | tuple[Any]]) -> Callable[..., Any]:
    """``target`` as a function of its tensors; ``args`` holds their positions, and all else in tuples of one."""

    def region(*tensors: Tensor) -> Any:
        return target(*[tensors[item] if isinstance(item, int) else item[0] for item in args])

    marked: Callable[..., Any] = torch.compiler.nested_compile_region(region)
    marked.__module__, marked.__name__ = __name__, str(target).replace(".", "_")  # what the graph's code calls it
    return marked
