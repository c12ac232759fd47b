"""The only place where nodes are made, each with a fake-run ``meta["val"]`` and the provenance of what it replaces."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

from bigain_fx.passes.axes import TOKENS, Layout, aten, names

# Torch calls these impure, for the random numbers that they could draw.
_DROPPABLE = frozenset({aten.scaled_dot_product_attention.default, aten.dropout.default})
_SIZED = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})


class Surgeon:
    """Edits one graph module in place, on behalf of one attention at a time."""

    def __init__(self, module: GraphModule) -> None:
        self.module, self.graph = module, module.graph
        vals = [node.meta.get("val") for node in module.graph.nodes]
        self._mode = next(value.fake_mode for value in vals if hasattr(value, "fake_mode"))

    def emit(self, target: Any, args: tuple[Any, ...], like: Node, kwargs: Mapping[str, Any] | None = None) -> Node:
        """Create one call at the current insertion point; its provenance is that of ``like``."""
        node = self.graph.call_function(target, args, dict(kwargs or {}))
        concrete = [tree_map(lambda item: item.meta["val"] if isinstance(item, Node) else item, part)
                    for part in (node.args, node.kwargs)]  # fmt: skip
        with self._mode, torch.no_grad():
            node.meta["val"] = target(*concrete[0], **concrete[1])
        node.meta["origin"] = like.meta.get("origin", like.name)
        for key in ("nn_module_stack", "stack_trace", "torch_fn", "source_fn_stack"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        return node

    def item(self, source: Node, index: int) -> Node:
        """Create the getitem of result ``index`` of ``source``."""
        node = self.graph.call_function(operator.getitem, (source, index))
        node.meta = {**source.meta, "val": source.meta["val"][index]}
        return node

    def constant(self, name: str, value: Tensor, like: Node) -> Node:
        """A buffer of the module, made once per ``name``."""
        if not hasattr(self.module, name):
            self.module.register_buffer(name, value.to(like.meta["val"].device), persistent=False)
        node = self.graph.get_attr(name)
        node.meta["val"] = self._mode.from_tensor(getattr(self.module, name))
        return node

    def replay(
        self, nodes: Sequence[Node], env: Mapping[Node, Node], layouts: Mapping[Node, Layout], before: int, after: int
    ) -> dict[Node, Node]:
        """Emit ``nodes`` again with their operands replaced by ``env``, ``after`` tokens where there were ``before``.

        Returns ``env`` with every replayed node added. ``nodes`` are in graph order.
        """
        known = dict(env)
        for node in nodes:
            args = tree_map(lambda item: known.get(item, item) if isinstance(item, Node) else item, node.args)
            kwargs = tree_map(lambda item: known.get(item, item) if isinstance(item, Node) else item, node.kwargs)
            if node.target in _SIZED and node in layouts:
                args = tuple(_resize(arg, node, layouts[node], before, after) for arg in args)
            known[node] = self.emit(node.target, args, node, kwargs)
        return known

    def clean(self) -> None:
        """Drop what nobody reads, and the metadata checks that export leaves at casts: they keep tensors alive."""
        for node in self.graph.nodes:
            if node.target is aten._assert_tensor_metadata.default:
                self.graph.erase_node(node)
        self.graph.eliminate_dead_code(lambda node: node.is_impure() and node.target not in _DROPPABLE)

    def finish(self) -> GraphModule:
        """Clean up, check the graph, and generate its code."""
        self.clean()
        self.graph.lint()
        self.module.recompile()
        return self.module


def _resize(argument: Any, node: Node, layout: Layout, before: int, after: int) -> Any:
    """Rewrite the literal sizes of a view: the dimension that holds the tokens has ``after`` of them."""
    if not isinstance(argument, list | tuple):
        return argument
    return [
        size // before * after if TOKENS in names(dim) and size != -1 else size
        for size, dim in zip(argument, layout, strict=True)
    ]
