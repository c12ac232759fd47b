"""Attention that is no scaled-dot-product node: found by what it multiplies, reported by module, never rewritten."""

from __future__ import annotations

from collections.abc import Set

from torch.fx import Graph, Node

from bigain_fx.passes.arguments import SDPA
from bigain_fx.passes.axes import Refusal, aten
from bigain_fx.passes.sites import module_name

_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default})
_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})


def spelled_out(graph: Graph, learned: Set[Node]) -> dict[Node, Refusal]:
    """The first node of each attention that is spelled out, or runs in a kernel of its own, and why it is kept.

    Args:
        graph: with ``meta["val"]`` and the module stack on every node.
        learned: what depends on a layer of the model.
    """
    products: dict[str, Node] = {}
    kernels: dict[Node, Refusal] = {}
    softmaxes = {module_name(node) for node in graph.nodes if node.target in _SOFTMAX}
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "call_function" and "attention" in name and node.target is not SDPA:
            kernels[node] = Refusal(f"attention by {name}: only scaled_dot_product_attention is rewritten", node.name)
        elif node.target in _PRODUCTS and sum(source in learned for source in node.all_input_nodes) > 1:
            products.setdefault(module_name(node), node)
    return kernels | {
        node: Refusal(
            "spelled out as matrix products and softmax: only scaled_dot_product_attention is rewritten"
            if module in softmaxes else "linear attention: products of features without a softmax",
            node.name,
        )
        for module, node in products.items()
    }  # fmt: skip
