"""How far fewer tokens can be carried: the nodes that work token by token, and where all tokens are given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from heapq import heappop, heappush

import torch
from torch.fx import Graph, Node

from bigain_fx.passes.arguments import NORMS, SDPA
from bigain_fx.passes.axes import BATCH, TOKENS, Dim, Layout, Refusal, aten, names, parts, shape_of
from bigain_fx.passes.grid import CONVOLUTIONS, sample_inputs
from bigain_fx.passes.memory import descendants, written_by
from bigain_fx.passes.rules import from_elsewhere, lined_up, propagate

_LAYERS = NORMS | CONVOLUTIONS | {aten.linear.default, aten.embedding.default, aten.conv1d.default, SDPA}
_ADDS = frozenset({aten.add.Tensor, aten.add_.Tensor})


@dataclass(frozen=True)
class Region:
    """Nodes that go on with fewer tokens.

    Attributes:
        nodes: in graph order.
        exits: those whose other readers see all tokens, ``(B, rows, ...)``.
        loose: those that hold no image token any more (text split off): their readers take them as they are.
        joins: whether everything that reads an exit adds it to something, as a residual stream does.
        layouts: of ``nodes`` and of all that they read with a layout.
    """

    nodes: tuple[Node, ...]
    exits: tuple[Node, ...]
    loose: tuple[Node, ...]
    joins: bool
    layouts: Mapping[Node, Layout] = field(repr=False)


def features(graph: Graph) -> Set[Node]:
    """What depends on the sample or on a layer of the model, or is given and added (the residuals of a ControlNet).

    All else is positions, masks, constants.
    """
    layers = [node for node in graph.nodes if node.target in _LAYERS]
    given = descendants(graph.find_nodes(op="placeholder"), graph)
    adds = [node for node in graph.nodes if node.target in _ADDS]
    added = {source for node in adds for source in node.all_input_nodes if len(shape_of(source)) > 2} & given
    return {*descendants([*sample_inputs(graph), *layers], graph), *added}


def step(node: Node, layouts: Mapping[Node, Layout], learned: Set[Node]) -> Layout | Refusal:
    """Layout of ``node``, if what it meets from elsewhere can follow a change of the tokens."""
    layout = propagate(node, layouts)
    return layout if isinstance(layout, Refusal) else check_company(node, layout, layouts, learned) or layout


def check_company(node: Node, layout: Layout, layouts: Mapping[Node, Layout], learned: Set[Node]) -> Refusal | None:
    """Why what ``node`` meets from elsewhere, with a value for every token, cannot follow a change of the tokens."""
    beside = lined_up(node, layout, layouts)
    for operand, dims in from_elsewhere(node, layout, layouts).items():
        if writer := written_by(operand, node):
            return Refusal(f"meets {operand.name}, which {writer.name} changes in place", node.name)
        if operand in learned:
            return Refusal(f"meets {operand.name}, which has a value for every token", node.name)
        if any(len(parts(beside[dim])[1]) > 1 for dim in dims):
            return Refusal(f"meets {operand.name} where tokens and others are one dimension", node.name)
        if any(BATCH in names(dim) and len(dim) > 1 for dim in beside):
            return Refusal(f"meets {operand.name} where samples and heads are one dimension", node.name)
    return None


def grow(
    starts: Sequence[Node],
    layouts: Mapping[Node, Layout],
    form: tuple[Dim, Dim],
    learned: Set[Node],
    read: Set[Node],
) -> Region | Refusal:
    """Follow ``starts`` token by token until all tokens are needed.

    Args:
        starts: the first nodes of the region.
        layouts: of what the starts read with fewer tokens (and nobody else does), or of nodes of the region itself.
        form: the batch and the tokens that an exit must have as first and second dimension; text may stand beside.
        learned: from :func:`features`.
        read: nodes that must have all tokens again, whoever reads them.

    Returns:
        The region, or the reason why it would be empty.
    """
    barred: dict[Node, str] = {}
    while True:
        known: dict[Node, Layout] = {}
        nodes, loose, stopped = _walk(starts, layouts, known, learned, read, barred)
        inside = set(nodes)
        exits = [
            node
            for node in nodes
            if node not in loose and (node in read or any(user not in inside for user in node.users))
        ]
        bad = {
            node: "its output has no (batch, tokens, channels) form"
            for node in exits
            if not _can_exit(node, known[node], form)
        } | {
            node: f"is changed in place by {writer.name}"
            for node in nodes
            # What all tokens are given back to may change afterwards, but nothing that goes on with fewer may show it.
            if (writer := written_by(node)) and any(user in inside for user in node.users)
        }  # fmt: skip
        if not bad:
            break
        barred |= bad
    if not nodes or any(start not in inside for start in starts):
        reason = next(iter(stopped.values()), Refusal("nothing reads its output", starts[0].name))
        return Refusal(f"its output: {reason.reason}", reason.node)
    readers = [user for node in exits for user in node.users if user not in inside]
    joins = bool(exits) and all(user.target in _ADDS for user in readers)
    return Region(tuple(nodes), tuple(exits), tuple(loose), joins, {**layouts, **known})


def _walk(
    starts: Sequence[Node],
    layouts: Mapping[Node, Layout],
    known: dict[Node, Layout],
    learned: Set[Node],
    read: Set[Node],
    barred: Mapping[Node, str],
) -> tuple[list[Node], list[Node], dict[Node, Refusal]]:
    """The nodes reached, those of them without tokens, and why the others were not; layouts go into ``known``."""
    pending: list[Node] = []
    seen: set[Node] = set()
    nodes: list[Node] = []
    loose: list[Node] = []
    stopped: dict[Node, Refusal] = {}
    for start in starts:
        heappush(pending, start)
    while pending:
        node = heappop(pending)
        if node in seen:
            continue
        seen.add(node)
        layout = layouts.get(node) or step(node, layouts if node in starts else known, learned)
        if node in barred:
            layout = Refusal(barred[node], node.name)
        if isinstance(layout, Refusal):
            stopped[node] = layout
            continue
        known[node] = layout
        nodes.append(node)
        if not any(TOKENS in names(dim) for dim in layout):
            loose.append(node)
            continue
        for user in () if node in read else node.users:
            heappush(pending, user)
    return nodes, loose, stopped


def _can_exit(node: Node, layout: Layout, form: tuple[Dim, Dim]) -> bool:
    if not isinstance(node.meta.get("val"), torch.Tensor) or len(layout) < 3:
        return False
    return (layout[0], parts(layout[1])[1]) == form and not any(names(dim) for dim in layout[2:])
