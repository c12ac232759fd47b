"""The only place where nodes are made, each with a fake-run ``meta["val"]`` and the provenance of what it replaces."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from bigain_fx.passes.axes import aten
from bigain_fx.passes.memory import written

Made = TypeVar("Made")
BRANCH = "bigain_branch"
"""Key in the ``meta`` of emitted nodes: the name of the merge with whose tokens they go on, or nothing."""
# Torch calls these impure, for the random numbers that they could draw.
_DROPPABLE = frozenset({aten.scaled_dot_product_attention.default, aten.dropout.default})


def _kind(node: Node) -> Any:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return node.name
    layout = tuple(value.shape), value.stride(), value.storage_offset()
    return type(value).__name__, *layout, value.dtype, value.device


class Surgeon:
    """Edits one graph module in place, on behalf of one attention at a time."""

    def __init__(self, module: GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self._values: dict[str, Any] = {}
        self._constants: dict[str, Node] = {}
        self._made: dict[Any, Any] = {}
        vals = [node.meta.get("val") for node in module.graph.nodes]
        self._mode = next((value.fake_mode for value in vals if hasattr(value, "fake_mode")), None) or FakeTensorMode()

    def emit(self, target: Any, args: tuple[Any, ...], like: Node, kwargs: Mapping[str, Any] | None = None) -> Node:
        """Create one call at the current insertion point; its provenance is that of ``like``."""
        node = self.graph.call_function(target, args, dict(kwargs or {}))
        # Blocks repeat: most calls were made before on values of the same kind.
        key = str((target, map_arg((node.args, node.kwargs), _kind)))
        if key not in self._values:
            concrete: Any = map_arg((node.args, node.kwargs), lambda item: item.meta["val"])
            with self._mode, torch.no_grad():
                self._values[key] = target(*concrete[0], **concrete[1])
        node.meta["val"] = self._values[key]
        node.meta[BRANCH] = ""
        node.meta["origin"] = like.meta.get("origin", like.name)
        for origin in ("nn_module_stack", "stack_trace", "torch_fn", "source_fn_stack"):
            if origin in like.meta:
                node.meta[origin] = like.meta[origin]
        return node

    def item(self, source: Node, index: int) -> Node:
        """Create the getitem of result ``index`` of ``source``."""
        node = self.graph.call_function(operator.getitem, (source, index))
        node.meta = {**source.meta, "val": source.meta["val"][index]}
        return node

    def constant(self, name: str, value: Tensor, like: Node) -> Node:
        """A buffer of the module, made once per ``name``, and read once, before all else."""
        if name not in self._constants:
            self.module.register_buffer(name, value.to(like.meta["val"].device), persistent=False)
            with self.after(next(iter(self.graph.nodes))):
                self._constants[name] = node = self.graph.get_attr(name)
            node.meta["val"] = self._mode.from_tensor(getattr(self.module, name), static_shapes=True)
        return self._constants[name]

    def once(self, key: Any, after: Node, make: Callable[[], Made]) -> Made:
        """What ``make`` emits right behind ``after``, made at the first call with this ``key``."""
        if key not in self._made:
            with self.after(after):
                self._made[key] = make()
        made: Made = self._made[key]
        return made

    @contextmanager
    def after(self, node: Node) -> Iterator[None]:
        """Insert what is emitted behind ``node``, and behind the inputs and constants that follow it."""
        behind = node.next
        while behind.op in ("placeholder", "get_attr"):  # so a constant is defined wherever another one is used
            behind = behind.next
        with self.graph.inserting_before(behind):
            yield

    def inline_contexts(self) -> None:
        """Put what ran inside ``no_grad``, or inside an autocast that does nothing here, where it is called.

        Rotary embeddings are often computed under ``torch.autocast("cuda", enabled=False)``.
        """
        for node in list(self.graph.nodes):
            if node.target is torch.ops.higher_order.wrap_with_autocast and not self._casts(*node.args[:3]):
                self._inline(node, node.args[4], node.args[5:])
            elif node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
                self._inline(node, node.args[1], node.args[2:])

    def _casts(self, device: Any, dtype: Any, enabled: Any) -> bool:
        """Whether an autocast context changes anything, given that which surrounds the capture."""
        devices = {value.device.type for node in self.graph.nodes if isinstance(value := node.meta.get("val"), Tensor)}
        available = device in devices and torch.amp.is_autocast_available(device)
        return available and bool(enabled or torch.is_autocast_enabled(device))

    def _inline(self, call: Node, body: Any, args: Any) -> None:
        inner = self.module.get_submodule(body.target)
        assert isinstance(inner, GraphModule)
        if any(node.op in ("get_attr", "call_module") for node in inner.graph.nodes):
            return
        env: dict[Node, Any] = dict(zip(inner.graph.find_nodes(op="placeholder"), args, strict=True))
        with self.graph.inserting_before(call):
            for node in inner.graph.nodes:
                if node.op == "call_function":
                    env[node] = self.graph.node_copy(node, lambda item: env[item])
                    env[node].meta |= {key: call.meta[key] for key in ("nn_module_stack",) if key in call.meta}
        results: Any = inner.graph.output_node().args[0]
        for user in list(call.users):
            user.replace_all_uses_with(env[results[user.args[1]]])
            self.graph.erase_node(user)
        self.graph.erase_node(call)

    def clean(self) -> None:
        """Drop what nobody reads, and the metadata checks that export leaves at casts: they keep tensors alive."""
        for node in self.graph.nodes:
            if node.target is aten._assert_tensor_metadata.default:
                self.graph.erase_node(node)
        self.graph.eliminate_dead_code(
            lambda node: (node.is_impure() and node.target not in _DROPPABLE) or bool(written(node))
        )

    def finish(self) -> GraphModule:
        """Clean up, check the graph, and generate its code."""
        self.clean()
        self.graph.lint()
        self.module.recompile()
        return self.module
