"""From a captured graph to a rewritten copy of it, with a record of what happened to every attention."""

from __future__ import annotations

import copy
import gc
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from types import ModuleType

from torch.fx import Graph, GraphModule, Node

from bigain_fx.passes import kv, merge
from bigain_fx.passes.arguments import SDPA
from bigain_fx.passes.axes import Refusal, shape_of
from bigain_fx.passes.blocks import with_blocks
from bigain_fx.passes.canonical import canonicalize
from bigain_fx.passes.errors import RewriteError
from bigain_fx.passes.flops import flops
from bigain_fx.passes.grid import Grid, check_form, check_hint
from bigain_fx.passes.methods import KV, MERGE, MergeMethod, Method, Methods
from bigain_fx.passes.sites import AttentionSite, Unplaced, find_sites, module_name
from bigain_fx.passes.spelled import spelled_out
from bigain_fx.passes.surgery import Surgeon

REWRITES: Mapping[str, ModuleType] = {KV: kv, MERGE: merge}
"""The rewrites in the order in which they are applied: merging then takes keys and values as it finds them."""


@dataclass(frozen=True)
class SiteRecord:
    """What was done to one attention.

    Attributes:
        name: path of the module it came from.
        action: ``"merge"``, ``"kv"``, ``"merge+kv"`` or ``"kept"``.
        reason: why it, or part of the method, was not applied; empty otherwise.
        tokens: its image tokens; the rows of its queries where it is kept and they are not known.
        tokens_after: tokens it works on now: the merged ones, or the keys and values where only those fell.
        grid: ``(h, w)`` of its tokens, None where unknown.
        level: which of the grids that is, the finest being 1; None where unknown.
        flops, flops_after: of its projections and attention, the plan included.
        ms, ms_after: milliseconds before and now, its share of a plan included; None where nothing was timed.
    """

    name: str
    action: str
    reason: str
    tokens: int
    tokens_after: int
    grid: Grid | None
    level: int | None
    flops: int
    flops_after: int
    ms: float | None = None
    ms_after: float | None = None


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph, ``records`` of its attentions in graph order, and the FLOPs of the whole graph."""

    module: GraphModule
    records: tuple[SiteRecord, ...]
    flops: int
    flops_after: int


def rewrite(
    module: GraphModule, methods: Methods = (), grid: Grid | None = None, kept: Mapping[int, str] | None = None
) -> Rewritten:
    """Apply ``methods`` to a copy of ``module``; weights are shared, ``module`` stays as it is.

    Args:
        module: a pre-dispatch ATen graph whose nodes carry ``meta["val"]``.
        methods: at most one of each kind, as :func:`bigain_fx.passes.methods.normalize` returns them.
        grid: ``(rows, columns)`` of image tokens at the finest resolution, for graphs that cannot tell.
        kept: why an attention is to be left as it is, by its place among the records.

    Raises:
        GridError: a hint that contradicts the graph or fits no attention.
        RewriteError: an alpha schedule without a timestep input, or ratios that are more or fewer than attentions.
    """
    check_form(grid)
    with _uncollected():
        return _rewrite(module, methods, None if grid is None else (int(grid[0]), int(grid[1])), kept or {})


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: among the nodes of a large graph it takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _rewrite(module: GraphModule, methods: Methods, grid: Grid | None, kept: Mapping[int, str]) -> Rewritten:
    result = GraphModule(module, copy.deepcopy(module.graph))
    surgeon = Surgeon(result)
    canonicalize(surgeon)
    sites_of, around = find_sites(result.graph, grid)
    sites = [site for site in sites_of.values() if isinstance(site, AttentionSite)]
    if any(isinstance(method, MergeMethod) and method.scope == "block" for method in methods):
        sites_of |= with_blocks(result.graph, sites, around)
    found = sorted((sites_of | spelled_out(result.graph, around.learned)).items(), key=itemgetter(0))
    if grid is not None:
        unplaced = [site.tokens for site in sites_of.values() if isinstance(site, Unplaced)]
        check_hint(result.graph, grid, {site.x: site.tokens for site in sites}, unplaced)
    finest = sorted({site.grid for site in sites}, key=lambda sides: (-math.prod(sides), sides))
    names = [module_name(node) for node, _ in found]
    rows = [site.tokens if isinstance(site, AttentionSite) else _rows(node) for node, site in found]
    each = {method.kind: _for_each(method, sites, finest) for method in methods}
    before, flops_before = _module_flops(result.graph), flops(result.graph.nodes)
    outcomes: list[tuple[str, str, int]] = []
    # The last first: what a site reads is then still what it was found to read.
    for place, ((node, site), tokens) in reversed(list(enumerate(zip(found, rows, strict=True)))):
        if place in kept:
            outcomes.append(("kept", kept[place], tokens))
        elif isinstance(site, Refusal):
            outcomes.append(("kept", f"{site.reason} (at {site.node})", tokens))
        else:
            chosen = [each[method.kind].get(node, method) for method in methods]
            outcomes.append(_rewrite_site(surgeon, site, finest.index(site.grid), chosen))
    outcomes.reverse()
    surgeon.finish()
    after = _module_flops(result.graph)
    uses = Counter(names)
    grids = [site.grid if isinstance(site, AttentionSite) else None for _, site in found]
    records = tuple(
        SiteRecord(name, action, reason, tokens, left, sides, finest.index(sides) + 1 if sides else None,
                   before[name] // uses[name], after[name] // uses[name])
        for name, (action, reason, left), tokens, sides in zip(names, outcomes, rows, grids, strict=True)
    )  # fmt: skip
    return Rewritten(result, records, flops_before, flops(result.graph.nodes))


def _rows(attention: Node) -> int:
    """Tokens of an attention of any kind."""
    queries = attention.all_input_nodes[0]
    return shape_of(queries)[-2] if attention.target is SDPA else max(shape_of(queries)[-2:], default=0)


def _for_each(method: Method, sites: Sequence[AttentionSite], finest: Sequence[Grid]) -> dict[Node, Method]:
    """``method`` as it is at the attentions of its levels.

    Raises:
        RewriteError: it has a ratio for each attention, and there are more or fewer.
    """
    mine = sorted(site.sdpa for site in sites if not _out_of_level(method, finest.index(site.grid)))
    if not isinstance(method, MergeMethod) or not isinstance(method.ratio, tuple):
        return dict.fromkeys(mine, method)
    if len(method.ratio) != len(mine):
        raise RewriteError(
            f"ratio={method.ratio!r} has {len(method.ratio)} numbers, and the graph {len(mine)} self-attentions on the "
            f"grids of levels={method.levels}"
        )
    return {node: replace(method, ratio=ratio) for node, ratio in zip(mine, method.ratio, strict=True)}


def _rewrite_site(surgeon: Surgeon, site: AttentionSite, level: int, methods: Sequence[Method]) -> tuple[str, str, int]:
    """Apply every method that fits; return the action, the reasons of those that do not, and the tokens left."""
    reasons: list[str] = [] if methods else ["no method"]
    chosen: dict[str, Method] = {}
    for method in methods:
        reason = _out_of_level(method, level) or REWRITES[method.kind].refuse(site, method)
        if method.idle or reason:
            reasons.append(reason or "ratio 0")
        else:
            chosen[method.kind] = method
    tokens = site.tokens
    for kind, method in chosen.items():
        tokens = REWRITES[kind].tokens_after(site, method)
        site = REWRITES[kind].apply(surgeon, site, method)
    return "+".join(sorted(chosen, reverse=True)) or "kept", "; ".join(dict.fromkeys(reasons)), tokens


def _out_of_level(method: Method, level: int) -> str | None:
    if method.levels is None or level < method.levels:
        return None
    return f"level {level + 1} of the grids, finest first; levels={method.levels}"


def _module_flops(graph: Graph) -> Counter[str]:
    """FLOPs within each module, by path, those of its submodules included."""
    total: Counter[str] = Counter()
    for node in graph.nodes:
        if count := flops([node]):
            parts = module_name(node).split(".")
            for length in range(1, len(parts) + 1):
                total[".".join(parts[:length])] += count
    return total
