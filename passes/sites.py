"""From every scaled-dot-product attention to a site that can be rewritten, or to a refusal that says why not.

Seeded at the SDPA node, a site is found by dataflow alone: up to the one tensor ``x`` that q, k and v are projected
from, down to the last node before the branch meets all tokens again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from bigain_fx.passes.axes import (
    BATCH,
    CASTS,
    NORMS,
    PERMUTATIONS,
    TOKENS,
    VIEWS,
    Layout,
    Refusal,
    aten,
    inactive_dropout,
    named,
    names,
    propagate,
    shape_of,
)

SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class AttentionSite:
    """One self-attention over ``(B, N, C)`` tokens.

    Attributes:
        name: path of the module it came from.
        sdpa: the attention node.
        x: ``(B, N, C)``, what q, k and v are projected from.
        metric: nodes from after the norm's input to ``x``; empty where the metric is ``x`` itself
            (``docs/operators.md``, "Metric").
        norm: the norm whose input is the metric, or None.
        paths: for each of ``"q"``, ``"k"``, ``"v"``: the nodes after ``x`` up to the SDPA operand, in graph order;
            empty once the operand no longer comes from ``x``.
        output: nodes after the SDPA up to where tokens are given back, in graph order.
        layouts: layout of every node of ``paths`` and ``output``.
    """

    name: str
    sdpa: Node
    x: Node
    norm: Node | None
    metric: tuple[Node, ...]
    paths: Mapping[str, tuple[Node, ...]] = field(repr=False)
    output: tuple[Node, ...] = field(repr=False)
    layouts: Mapping[Node, Layout] = field(repr=False)

    @property
    def tokens(self) -> int:
        """``N``."""
        return shape_of(self.x)[1]

    @property
    def batch(self) -> int:
        """``B``."""
        return shape_of(self.x)[0]

    @property
    def exit(self) -> Node:
        """The ``(B, N, C')`` node whose readers see all tokens."""
        return self.output[-1]


def module_name(node: Node) -> str:
    """Path of the innermost module that ``node`` was traced in, its own name if it was in none."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    return str(paths[-1]) if paths else str(node.meta.get("origin", node.name))


def find_sites(graph: Graph) -> list[tuple[str, AttentionSite | Refusal]]:
    """One record per SDPA node, in graph order, with the module it came from: a site or the reason why it is none."""
    return [(module_name(node), _match(node)) for node in graph.nodes if node.target is SDPA]


def _match(sdpa: Node) -> AttentionSite | Refusal:
    refusal = _check_attention(sdpa)
    if refusal:
        return refusal
    operands: dict[str, Node] = dict(zip("qkv", sdpa.all_input_nodes, strict=True))
    sources = {key: _projected_from(node) for key, node in operands.items()}
    for key, found in sources.items():
        if not found:
            return Refusal(f"{key} is not a linear projection", operands[key].name)
    if all(len(found) > 1 for found in sources.values()):
        return Refusal("joint attention: q, k and v are projected from several tensors", sdpa.name)
    if len(set.union(*sources.values())) != 1:
        return Refusal("cross-attention: q, k and v are not projected from the same tensor", sdpa.name)
    (x,) = sources["q"]
    shape = shape_of(x)
    if len(shape) != 3 or shape[1] < 2:
        return Refusal(f"its input has shape {shape}, not (batch, tokens, channels)", x.name)

    layouts: dict[Node, Layout] = {x: (named(BATCH, shape[0]), named(TOKENS, shape[1]), named("", shape[2]))}
    paths: dict[str, tuple[Node, ...]] = {}
    for key, operand in operands.items():
        paths[key] = tuple(sorted(_between(x, operand)))
    for node in sorted({node for path in paths.values() for node in path}):
        layout = propagate(node, layouts)
        if isinstance(layout, Refusal):
            return layout
        layouts[node] = layout
    for key, operand in operands.items():
        batch, *_, rows, channels = layouts[operand]
        if rows != named(TOKENS, shape[1]) or names(channels) or (shape[0] > 1 and names(batch) != {BATCH}):
            return Refusal(f"the rows of {key} are not the tokens of {x.name}", operand.name)
    inside = {node for path in paths.values() for node in path} | {sdpa}
    for node in inside - {sdpa}:
        outside = [user for user in node.users if user not in inside]
        if outside:
            return Refusal(f"{node.name} is also read outside the attention, by {outside[0].name}", node.name)
    layouts[sdpa] = (*layouts[operands["q"]][:-1], named("", shape_of(sdpa)[-1]))
    output = _way_out(sdpa, layouts, shape[0], shape[1])
    if isinstance(output, Refusal):
        return output
    norm, metric = _metric(x)
    for node in (x, *(norm.all_input_nodes[:1] if norm else ())):
        if changed := next((user for user in node.users if _mutates(user)), None):
            return Refusal(f"{node.name} is changed in place by {changed.name}", node.name)
    return AttentionSite(module_name(sdpa), sdpa, x, norm, metric, paths, output, layouts)


def _check_attention(sdpa: Node) -> Refusal | None:
    """What the SDPA node itself forbids."""
    names_of = ("attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names_of, sdpa.args[3:], strict=False)) | dict(sdpa.kwargs)
    if given.get("attn_mask") is not None:
        return Refusal("attention mask", sdpa.name)
    if given.get("is_causal"):
        return Refusal("causal attention", sdpa.name)
    if given.get("dropout_p"):
        return Refusal("attention dropout is active", sdpa.name)
    if any(not isinstance(size, int) for node in sdpa.all_input_nodes for size in shape_of(node)):
        return Refusal("dynamic shape", sdpa.name)
    if len(sdpa.all_input_nodes) != 3:
        return Refusal("q, k and v are not three tensors", sdpa.name)
    return None


def _projected_from(operand: Node) -> set[Node]:
    """What ``operand`` is projected from: one tensor, through one linear layer or a sum of several in a row (LoRA)."""
    found = _nearest_inputs(operand)
    between = {node for node in found if (above := _nearest_inputs(node)) and above <= found - {node}}
    return found - between


def _nearest_inputs(operand: Node) -> set[Node]:
    """Inputs of the nearest linear layers above ``operand``, casts removed."""
    found: set[Node] = set()
    pending, seen = [operand], {operand}
    while pending:
        node = pending.pop()
        if node.target is aten.linear.default:
            found.add(without_casts(node.args[0]))  # type: ignore[arg-type]
            continue
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        pending.extend(new)
    return found


def without_casts(node: Node) -> Node:
    """The node above ``node`` that holds the same values, up to their dtype and memory layout."""
    while node.target in CASTS or inactive_dropout(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _between(x: Node, operand: Node) -> set[Node]:
    """The nodes that depend on ``x`` and that ``operand`` depends on, ``x`` excluded."""
    depends: dict[Node, bool] = {x: True}
    stack = [operand]
    while stack:
        node = stack[-1]
        unknown = [source for source in node.all_input_nodes if source not in depends]
        if unknown and node not in depends:
            stack.extend(unknown)
            continue
        stack.pop()
        depends.setdefault(node, any(depends.get(source, False) for source in node.all_input_nodes))
    return {node for node, does in depends.items() if does} - {x}


def _way_out(sdpa: Node, layouts: dict[Node, Layout], batch: int, tokens: int) -> tuple[Node, ...] | Refusal:
    """Follow the output token by token to the last ``(B, N, C)`` node before all tokens are needed."""
    path, node, last = [sdpa], sdpa, 0
    target = [named(BATCH, batch), named(TOKENS, tokens)]
    stopped = "its output has no (batch, tokens, channels) form"
    while True:
        readers = list(node.users)
        if len(readers) != 1:
            break
        layout = propagate(readers[0], layouts)
        if isinstance(layout, Refusal):
            stopped = f"its output: {layout.reason}"
            break
        (node,) = readers
        if not isinstance(node.meta.get("val"), torch.Tensor):
            break
        layouts[node] = layout
        path.append(node)
        if len(layout) == 3 and list(layout[:2]) == target and not names(layout[2]):
            last = len(path)
    return tuple(path[:last]) if last else Refusal(stopped, node.name)


def _metric(x: Node) -> tuple[Node | None, tuple[Node, ...]]:
    """The norm that ``x`` is the direct output of, views and casts apart, and the nodes from there to ``x``."""
    path: list[Node] = []
    node = x
    while node.target in VIEWS | PERMUTATIONS | CASTS or inactive_dropout(node):
        path.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return (node, tuple(reversed(path))) if node.target in NORMS else (None, ())
