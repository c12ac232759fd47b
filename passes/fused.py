"""Projections that share one linear layer: q, k and v in one, or with the MLP beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import Any

from torch.fx import Node

from bigain_fx.passes.arguments import ChannelParts, channel_parts
from bigain_fx.passes.axes import aten
from bigain_fx.passes.region import Region
from bigain_fx.passes.sites import AttentionSite
from bigain_fx.passes.surgery import Surgeon


def separated(surgeon: Surgeon, site: AttentionSite, replayed: Set[Node]) -> AttentionSite:
    """``site`` with a layer of its own for each part of a shared projection of which only some are ``replayed``."""
    layouts, paths = dict(site.layouts), dict(site.paths)
    for linear in sorted({node for path in paths.values() for node in path}):
        parts = channel_parts(linear, replayed)
        if not parts.ranges.keys() & replayed or parts.ranges.keys() <= replayed:
            continue
        made = _separate(surgeon, linear, parts)
        layouts |= {layer: layouts[part] for part, layer in made.items() if part in layouts}
        for key, path in paths.items():
            paths[key] = _exchanged(path, made, parts)
        block = tuple((source, _with(region, made, parts)) for source, region in site.block)
        site = replace(site, paths=paths, layouts=layouts, block=block)
    return site


def _with(region: Region, made: Mapping[Node, Node], parts: ChannelParts) -> Region:
    layouts = dict(region.layouts) | {layer: region.layouts[part] for part, layer in made.items()
                                      if part in region.layouts}  # fmt: skip
    return replace(region, nodes=_exchanged(region.nodes, made, parts), layouts=layouts)


def _exchanged(nodes: Iterable[Node], made: Mapping[Node, Node], parts: ChannelParts) -> tuple[Node, ...]:
    return tuple(sorted(made.get(node, node) for node in nodes if node not in parts.carriers))


def _separate(surgeon: Surgeon, linear: Node, parts: ChannelParts) -> dict[Node, Node]:
    """Replace each part of ``linear`` by a layer with those rows of the weight; return the layer of each."""
    source, weight, bias = (*linear.args, None)[:3]
    made: dict[Node, Node] = {}
    with surgeon.after(linear):
        for part, (start, stop) in parts.ranges.items():
            rows: list[Any] = [
                None if tensor is None else surgeon.emit(aten.slice.Tensor, (tensor, 0, start, stop), like=linear)
                for tensor in (weight, bias)
            ]
            made[part] = surgeon.emit(aten.linear.default, (source, *rows), like=linear)
    for part, layer in made.items():
        part.replace_all_uses_with(layer)
    return made
