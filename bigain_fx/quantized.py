"""Quantized weights in a captured graph: a linear layer stays one node.

torchao's weights are tensor subclasses. Traced through, a linear layer becomes the integer products and scales that it
is made of, and nobody can tell its input from its output any more. So the graph is captured with plain stand-ins of the
same shape and dtype, which hold no memory, and gets the real weights afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def _is_quantized(weight: nn.Parameter) -> bool:
    return bool(is_traceable_wrapper_subclass(weight))


@contextmanager
def plain_weights(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """While it is open, stand-ins are in the places of quantized weights; yields those, by path."""
    held = [
        (f"{path}.{name}" if path else name, module, name, weight)
        for path, module in model.named_modules()
        for name, weight in module._parameters.items()
        if isinstance(weight, nn.Parameter) and _is_quantized(weight)
    ]
    try:
        for _, module, name, weight in held:
            plain = torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
            module._parameters[name] = nn.Parameter(plain, requires_grad=False)
        yield {path: weight for path, _, _, weight in held}
    finally:
        for _, module, name, weight in held:
            module._parameters[name] = weight


def put_back(graph: GraphModule, weights: Mapping[str, nn.Parameter]) -> None:
    """Give a graph that was captured with stand-ins the quantized weights, by path."""
    for path, weight in weights.items():
        owner, _, name = path.rpartition(".")
        graph.get_submodule(owner)._parameters[name] = weight


def call_as_functions(graph: GraphModule) -> None:
    """Let a graph of quantized weights call ``F.linear``, which is what they override; ``aten.linear`` they do not."""
    if any(map(_is_quantized, graph.parameters())):
        for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
            node.target = nn.functional.linear
        graph.recompile()
