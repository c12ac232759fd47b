"""What a block does token by token from one self-attention to the next: where merged tokens can be carried besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from torch.fx import Graph, Node

from bigain_fx.passes.axes import BATCH, TOKENS, Dim, Layout, Refusal, aten, named, segment, shape_of
from bigain_fx.passes.grid import CONVOLUTIONS, placed
from bigain_fx.passes.region import Region, grow
from bigain_fx.passes.sites import AttentionSite, Surroundings


def with_blocks(graph: Graph, sites: Sequence[AttentionSite], around: Surroundings) -> dict[Node, AttentionSite]:
    """``sites``, by their SDPA node, with the regions of their blocks (``docs/operators.md``, "Scope")."""
    latest = _latest_site(graph, {site.sdpa: site for site in sites}, around.images)
    claimed = {node for site in sites for path in site.paths.values() for node in path}
    found: dict[Node, AttentionSite] = {}
    for site in sites:
        regions = [_attention_region(site, around)]
        claimed |= set(regions[0].nodes)
        result = [(site.x, regions[0])]
        for node in graph.nodes:
            source = node.args[0] if node.target is aten.linear.default and node not in claimed else None
            if not isinstance(source, Node) or latest.get(source) is not site:
                continue
            region = _branch(source, site, around, claimed)
            if region is not None:
                claimed |= set(region.nodes)
                result.append((source, region))
        found[site.sdpa] = replace(site, block=tuple(result))
    return found


def _latest_site(
    graph: Graph, sites: Mapping[Node, AttentionSite], images: Mapping[Node, Layout]
) -> dict[Node, AttentionSite]:
    """For every node on a grid, the last site that it depends on through what keeps tokens where they are."""
    latest: dict[Node, AttentionSite] = {}
    for node in graph.nodes:
        above = [latest[source] for source in node.all_input_nodes if source in latest]
        if node in sites:
            latest[node] = sites[node]
        elif above and node in images and node.target not in CONVOLUTIONS:
            latest[node] = max(above, key=lambda site: site.sdpa)
    return latest


def _attention_region(site: AttentionSite, around: Surroundings) -> Region:
    """All that the projections of ``x`` lead to: the attention, and what runs beside it (Flux's single blocks)."""
    inside = {node for path in site.paths.values() for node in path}
    starts = [user for user in site.x.users if user in inside or user.target is aten.linear.default]
    layouts = {site.x: site.layouts[site.x], site.sdpa: site.layouts[site.sdpa]}
    region = grow(starts, layouts, _form(site), around.learned, around.read)
    if isinstance(region, Refusal) or site.sdpa not in region.nodes:
        inner = tuple(sorted(inside | set(site.output.nodes)))
        return replace(site.output, nodes=inner, layouts=site.layouts)
    return region


def _branch(source: Node, site: AttentionSite, around: Surroundings, claimed: Set[Node]) -> Region | None:
    """The region of the linear layers that read ``source``, if all of it ends in residual joins."""
    place = placed(source, around.images)
    if place is None or place[0] != site.grid or shape_of(source)[0] != site.batch:
        return None
    batch, tokens = _form(site)
    seed: Layout = (batch, segment(place[1], tokens, place[2]), named("", shape_of(source)[2]))
    starts = [user for user in source.users if user.target is aten.linear.default and user not in claimed]
    region = grow(starts, {source: seed}, (batch, tokens), around.learned, around.read)
    return region if isinstance(region, Region) and region.joins and not claimed & set(region.nodes) else None


def _form(site: AttentionSite) -> tuple[Dim, Dim]:
    return named(BATCH, site.batch), named(TOKENS, site.tokens)
