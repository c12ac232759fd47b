"""What a block does token by token from one self-attention to the next: where merged tokens can be carried besides."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from bigain_fx.passes.axes import BATCH, TOKENS, Dim, Layout, Refusal, aten, named, names, parts
from bigain_fx.passes.memory import aliases, written, written_by
from bigain_fx.passes.region import Region, grow
from bigain_fx.passes.rules import propagate
from bigain_fx.passes.sites import AttentionSite, Surroundings


def with_blocks(
    graph: Graph, attentions: Mapping[Node, AttentionSite | Refusal], around: Surroundings
) -> dict[Node, AttentionSite]:
    """The sites among ``attentions``, by node, with the regions of their blocks (``docs/operators.md``, "Scope")."""
    sites = [site for site in attentions.values() if isinstance(site, AttentionSite)]
    regions = {site.sdpa: _attention_region(site, around) for site in sites}
    latest = _latest_attention(graph, regions, attentions.keys() - regions.keys())
    claimed = {node for site in sites for node in (*site.region.nodes, *regions[site.sdpa].nodes)}
    found = {site.sdpa: replace(site, block=((site.x, regions[site.sdpa]),)) for site in sites}
    for linear in graph.find_nodes(op="call_function", target=aten.linear.default):
        source: Any = linear.args[0]
        if linear in claimed or source not in latest:
            continue
        sdpa, layout = latest[source]
        region = _branch(source, layout, found[sdpa], around, claimed)
        if region is not None:
            claimed |= set(region.nodes)
            found[sdpa] = replace(found[sdpa], block=(*found[sdpa].block, (source, region)))
    return found


def _latest_attention(
    graph: Graph, regions: Mapping[Node, Region], refused: Set[Node]
) -> dict[Node, tuple[Node, Layout]]:
    """For every node that has the tokens of attentions, in their order: the last of these, and the node's layout.

    Behind a self-attention among ``refused`` there is none, until the next: its block is not ours to merge.
    """
    exits = {node: (sdpa, region.layouts[node]) for sdpa, region in regions.items() for node in region.exits}
    latest: dict[Node, tuple[Node, Layout]] = {}
    behind: dict[Node, Node] = {}  # what is computed from a refused self-attention, and that
    for node in graph.nodes:
        if node in exits:
            latest[node] = exits[node]
            continue
        for target in written(node):
            for alias in aliases(target):
                latest.pop(alias, None)
        above = {source: latest[source] for source in node.all_input_nodes if source in latest}
        other = max((behind[source] for source in node.all_input_nodes if source in behind), default=None)
        if node in refused and sum(_reads(source, latest) for source in pytree.tree_leaves(node.args)) > 1:
            other = node
        last = max((sdpa for sdpa, _ in above.values()), default=None)
        if other is not None and (last is None or last < other):
            behind[node] = other
        elif last is not None:
            layout = propagate(node, {source: layout for source, (sdpa, layout) in above.items() if sdpa is last})
            if not isinstance(layout, Refusal) and any(TOKENS in names(dim) for dim in layout):
                latest[node] = last, layout
    return latest


def _reads(operand: object, latest: Mapping[Node, Any]) -> bool:
    """Whether ``operand`` is made of nodes of ``latest``, by what mixes no channels: text is projected first."""
    pending, seen = [operand], set()
    while pending:
        node = pending.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        if node in latest:
            return True
        seen.add(node)
        pending.extend(() if node.target is aten.linear.default else node.all_input_nodes)
    return False


def _attention_region(site: AttentionSite, around: Surroundings) -> Region:
    """All that the projections of ``x`` lead to: the attention, and what runs beside it (Flux's single blocks)."""
    inside = {node for path in site.paths.values() for node in path}
    starts = [user for user in site.x.users if user in inside or user.target is aten.linear.default]
    layouts = {site.x: site.layouts[site.x], site.sdpa: site.layouts[site.sdpa]}
    region = grow(starts, layouts, _form(site), around.learned, around.read)
    whole = isinstance(region, Region) and site.sdpa in region.nodes and region.joins and not written_by(site.x)
    return region if whole else site.region  # type: ignore[return-value]


def _branch(
    source: Node, layout: Layout, site: AttentionSite, around: Surroundings, claimed: Set[Node]
) -> Region | None:
    """The region of the linear layers that read ``source``, if all of it ends in residual joins."""
    form = _form(site)
    if len(layout) != 3 or (layout[0], parts(layout[1])[1]) != form or names(layout[2]) or written_by(source):
        return None
    starts = [user for user in source.users if user.target is aten.linear.default and user not in claimed]
    region = grow(starts, {source: layout}, form, around.learned, around.read)
    return region if isinstance(region, Region) and region.joins and not claimed & set(region.nodes) else None


def _form(site: AttentionSite) -> tuple[Dim, Dim]:
    return named(BATCH, site.batch), named(TOKENS, site.tokens)
