"""From a captured graph to a rewritten copy of it, with a record of what happened to every attention."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
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
from bigain_fx.passes.grid import check_hint
from bigain_fx.passes.images import Grids, Hint, as_grids, as_hint, tokens_on
from bigain_fx.passes.methods import KV, MERGE, MergeMethod, Method, Methods
from bigain_fx.passes.sites import AttentionSite, Unplaced, find_sites, module_name
from bigain_fx.passes.spelled import spelled_out
from bigain_fx.passes.surgery import Surgeon
from bigain_fx.passes.where import check_names, leaves_out, where_text

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
        grid: ``(h, w)`` of its tokens, those of each image where it has several, None where unknown.
        level: which of the grids that is, the finest (of most tokens) being 1; None where unknown.
        flops, flops_after: of its projections and attention, the plan included.
        ms, ms_after: milliseconds before and now, its share of a plan included; None where nothing was timed.
    """

    name: str
    action: str
    reason: str
    tokens: int
    tokens_after: int
    grid: Hint | None
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
    module: GraphModule,
    methods: Methods = (),
    grid: Hint | None = None,
    kept: Mapping[int, str] | None = None,
    *,
    fragment: bool = False,
) -> Rewritten:
    """Apply ``methods`` to a copy of ``module``; weights are shared, ``module`` stays as it is.

    Args:
        module: a pre-dispatch ATen graph whose nodes carry ``meta["val"]``.
        methods: at most one of each kind, as :func:`bigain_fx.passes.methods.normalize` returns them.
        grid: ``(rows, columns)`` of image tokens at the finest resolution, for graphs that cannot tell; a list of these
            where several images lie one behind another.
        kept: why an attention is to be left as it is, by its place among the records.
        fragment: whether the graph may be a part of the model: then ``where`` may name attentions that are not in it.

    Raises:
        GridError: a hint that contradicts the graph or fits no attention.
        RewriteError: an alpha schedule without a timestep input; ratios that are more or fewer than attentions; a
            ``where`` that matches no attention, or raises an error.
    """
    grids = None if grid is None else as_grids(grid)
    return _rewrite(module, methods, grids, kept or {}, fragment)


def _rewrite(
    module: GraphModule, methods: Methods, hint: Grids | None, kept: Mapping[int, str], fragment: bool
) -> Rewritten:
    result = GraphModule(module, copy.deepcopy(module.graph))
    surgeon = Surgeon(result)
    canonicalize(surgeon)
    sites_of, around = find_sites(result.graph, hint)
    sites = [site for site in sites_of.values() if isinstance(site, AttentionSite)]
    attentions = sites_of | spelled_out(result.graph, around.learned)
    if any(isinstance(method, MergeMethod) and method.scope == "block" for method in methods):
        attentions |= with_blocks(result.graph, attentions, around)
    found = sorted(attentions.items(), key=itemgetter(0))
    if hint is not None:
        unplaced = [site.tokens for site in sites_of.values() if isinstance(site, Unplaced)]
        check_hint(result.graph, hint, {site.x: site.tokens for site in sites}, unplaced)
    finest = sorted({site.grids for site in sites}, key=lambda grids: (-tokens_on(grids), grids))
    before, flops_before = _module_flops(result.graph), flops(result.graph.nodes)
    names = [module_name(node) for node, _ in found]
    uses = Counter(names)
    dense = {}
    for name, (node, site) in zip(names, found, strict=True):
        grids = site.grids if isinstance(site, AttentionSite) else None
        tokens = site.tokens if isinstance(site, AttentionSite) else _rows(node)
        share = before[name] // uses[name]
        dense[node] = SiteRecord(name, "kept", "", tokens, tokens, as_hint(grids) if grids else None,
                                 finest.index(grids) + 1 if grids else None, share, share)  # fmt: skip
    for method in methods:
        if not fragment:
            check_names(method.where, names)
    each = [_for_each(method, {site.sdpa: dense[site.sdpa] for site in sites}) for method in methods]
    outcomes: list[tuple[str, str, int]] = []
    # The last first: what a site reads is then still what it was found to read.
    for place, (node, site) in reversed(list(enumerate(found))):
        tokens = dense[node].tokens
        if place in kept:
            outcomes.append(("kept", kept[place], tokens))
        elif isinstance(site, Refusal):
            outcomes.append(("kept", f"{site.reason} (at {site.node})", tokens))
        else:
            outcomes.append(_rewrite_site(surgeon, site, [chosen[node] for chosen in each]))
    outcomes.reverse()
    surgeon.finish()
    after = _module_flops(result.graph)
    records = tuple(
        replace(record, action=action, reason=reason, tokens_after=left,
                flops_after=after[record.name] // uses[record.name])
        for record, (action, reason, left) in zip(dense.values(), outcomes, strict=True)
    )  # fmt: skip
    return Rewritten(result, records, flops_before, flops(result.graph.nodes))


def _rows(attention: Node) -> int:
    """Tokens of an attention of any kind."""
    queries = attention.all_input_nodes[0]
    return shape_of(queries)[-2] if attention.target is SDPA else max(shape_of(queries)[-2:], default=0)


def left_out(method: Method, record: SiteRecord) -> str | None:
    """Return why ``method`` is not meant for the self-attention of ``record``, or None: its grid's level, ``where``.

    Raises:
        RewriteError: ``where`` is a function, and raises an error.
    """
    if leaves_out(method.where, record):
        return f"where={where_text(method.where)} leaves it out"
    if method.levels is None or record.level is None or record.level <= method.levels:
        return None
    return f"level {record.level} of the grids, finest first; levels={method.levels}"


def _for_each(method: Method, sites: Mapping[Node, SiteRecord]) -> dict[Node, Method | str]:
    """Return ``method`` as it is at each of ``sites``, or why it is not meant for that one.

    Raises:
        RewriteError: it has a ratio for each attention, and there are more or fewer.
    """
    chosen: dict[Node, Method | str] = {node: left_out(method, record) or method for node, record in sites.items()}
    if not isinstance(method, MergeMethod) or not isinstance(method.ratio, tuple):
        return chosen
    mine = sorted(node for node, item in chosen.items() if item is method)
    if len(method.ratio) != len(mine):
        where = "" if method.where is None else f" that where={where_text(method.where)} leaves"
        raise RewriteError(
            f"ratio={method.ratio!r} has {len(method.ratio)} numbers, and the graph {len(mine)} self-attentions on the "
            f"grids of levels={method.levels}{where}"
        )
    return chosen | {node: replace(method, ratio=ratio) for node, ratio in zip(mine, method.ratio, strict=True)}


def _rewrite_site(surgeon: Surgeon, site: AttentionSite, methods: Sequence[Method | str]) -> tuple[str, str, int]:
    """Apply every method that fits; return the action, the reasons of those that do not, and the tokens left.

    A method that is not meant for ``site`` is given as the reason why.
    """
    reasons: list[str] = [] if methods else ["no method"]
    chosen: dict[str, Method] = {}
    for method in methods:
        if isinstance(method, str):
            reasons.append(method)
        elif (reason := REWRITES[method.kind].refuse(site, method)) or method.idle:
            reasons.append(reason or "ratio 0")
        else:
            chosen[method.kind] = method
    tokens = site.tokens
    for kind, method in chosen.items():
        tokens = REWRITES[kind].tokens_after(site, method)
        site = REWRITES[kind].apply(surgeon, site, method)
    return "+".join(sorted(chosen, reverse=True)) or "kept", "; ".join(dict.fromkeys(reasons)), tokens


def _module_flops(graph: Graph) -> Counter[str]:
    """FLOPs within each module, by path, those of its submodules included."""
    total: Counter[str] = Counter()
    for node in graph.nodes:
        if count := flops([node]):
            parts = module_name(node).split(".")
            for length in range(1, len(parts) + 1):
                total[".".join(parts[:length])] += count
    return total
