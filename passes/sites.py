"""From every scaled-dot-product attention to a site that can be rewritten, or to a refusal that says why not.

Seeded at the SDPA node, a site is found by dataflow alone: up to the one tensor ``x`` that the image's q, k and v are
projected from, down to the last nodes before the branch meets all tokens again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

from torch.fx import Graph, Node

from bigain_fx.passes.arguments import SDPA, channel_parts, mask_of
from bigain_fx.passes.axes import (
    BATCH,
    TOKENS,
    Layout,
    Refusal,
    named,
    names,
    parts,
    segment,
    shape_of,
)
from bigain_fx.passes.grid import (
    grids_from_hint,
    image_layouts,
    packed_input,
    placed,
    sample_inputs,
    why_unplaced,
)
from bigain_fx.passes.images import Grids, tokens_on
from bigain_fx.passes.memory import aliases, descendants, written_by
from bigain_fx.passes.metric import Metric, stream
from bigain_fx.passes.projections import as_read, projected_from
from bigain_fx.passes.region import Region, check_company, features, grow, step


@dataclass(frozen=True)
class AttentionSite:
    """One self-attention over the image tokens among the rows of ``x``.

    Attributes:
        name: path of the module it came from.
        sdpa: the attention node.
        x: ``(B, rows, C)``, what q, k and v of the image tokens are projected from.
        before, after: rows of ``x`` that are no image tokens.
        grids: ``(h, w)`` of each image, whose tokens lie one behind another.
        metric: what a plan is made from: ``x``, or the residual stream if ``x`` is a norm's direct output
            (``docs/operators.md``, "Metric").
        paths: for each of ``"q"``, ``"k"``, ``"v"``: the nodes after ``x`` up to the SDPA operand, in graph order.
        carriers: the linear layers of ``paths`` that project more than one thing, and what splits their results.
        output: the region after the SDPA.
        block: regions of the whole block, each with the tensor whose tokens it takes: those that read ``x``, the
            attention among them, then each later branch of the residual stream up to the next attention.
        layouts: of every node of ``paths`` and ``output``.
    """

    name: str
    sdpa: Node
    x: Node
    before: int
    after: int
    grids: Grids
    metric: Metric
    paths: Mapping[str, tuple[Node, ...]] = field(repr=False)
    carriers: Set[Node] = field(repr=False)
    output: Region = field(repr=False)
    block: tuple[tuple[Node, Region], ...] = field(repr=False)
    layouts: Mapping[Node, Layout] = field(repr=False)

    @property
    def tokens(self) -> int:
        """``N``, the image tokens."""
        return shape_of(self.x)[1] - self.before - self.after

    @property
    def region(self) -> Region:
        """All that runs on fewer tokens where the attention alone does."""
        inner = sorted({node for path in self.paths.values() for node in path})
        return replace(self.output, nodes=(*inner, *self.output.nodes), layouts=self.layouts)

    @property
    def batch(self) -> int:
        """``B``."""
        return shape_of(self.x)[0]


@dataclass(frozen=True)
class Unplaced(Refusal):
    """A self-attention over ``tokens`` tokens of which nothing tells where they lie."""

    tokens: int


@dataclass(frozen=True)
class Surroundings:
    """What is known of the graph as a whole.

    Attributes:
        images: layouts in rows and columns.
        learned: what depends on a layer of the model.
        sampled: what depends on the model's first input.
        hint: the grids that were given.
        read: what the rewrites of its attentions read: no region may run past it.
    """

    images: Mapping[Node, Layout]
    learned: Set[Node]
    sampled: Set[Node]
    hint: Grids | None
    read: Set[Node] = frozenset()


def module_name(node: Node) -> str:
    """Path of the innermost module that ``node`` was traced in, its own name if it was in none."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    return str(paths[-1]) if paths else str(node.meta.get("origin", node.name))


def find_sites(graph: Graph, hint: Grids | None = None) -> tuple[dict[Node, AttentionSite | Refusal], Surroundings]:
    """Every SDPA node, in graph order: a site, or the reason why it is none.

    Args:
        graph: pre-dispatch ATen, ``meta["val"]`` on every node.
        hint: the grids of the images at the finest resolution, for graphs that cannot tell.
    """
    attentions = [node for node in graph.nodes if node.target is SDPA]
    around = Surroundings(image_layouts(graph, hint), features(graph), descendants(sample_inputs(graph), graph), hint)
    places = {node: _place(node, around, None) for node in attentions}
    lost = packed_input(graph, hint) is None and all(isinstance(place, Refusal) for place in places.values())
    if hint is not None and lost:
        places = {node: _place(node, around, hint) for node in attentions}
    good = [place for place in places.values() if not isinstance(place, Refusal)]
    read = {node for place in good for node in (place.x, place.metric.source)}
    around = replace(around, read=read)
    found = {
        node: place if isinstance(place, Refusal) else _match(node, place, around) for node, place in places.items()
    }
    # To cut a layer that projects for two attentions, for one of them, is to take it from the other.
    uses = Counter(layer for site in found.values() if isinstance(site, AttentionSite) for layer in site.carriers)
    for node, site in found.items():
        shared = [layer for layer in site.carriers if uses[layer] > 1] if isinstance(site, AttentionSite) else []
        if shared:
            layer = min(shared)
            found[node] = Refusal(f"{layer.name} projects for another attention too", layer.name)
    return found, around


@dataclass(frozen=True)
class _Place:
    """What q, k and v of the image tokens are projected from; fields as in :class:`AttentionSite`."""

    x: Node
    grids: Grids
    before: int
    after: int

    @property
    def metric(self) -> Metric:
        return _checked(stream(self.x), self.x) or Metric(self.x)


def _match(sdpa: Node, place: _Place, around: Surroundings) -> AttentionSite | Refusal:
    operands: dict[str, Node] = dict(zip("qkv", sdpa.args[:3], strict=True))  # type: ignore[arg-type]
    x, before, after = place.x, place.before, place.after
    shape = shape_of(x)
    batch, tokens = named(BATCH, shape[0]), named(TOKENS, shape[1] - before - after)
    seed: Layout = (batch, segment(before, tokens, after), named("", shape[2]))

    layouts: dict[Node, Layout] = {x: seed}
    paths = {key: tuple(sorted(_between(x, operand))) for key, operand in operands.items()}
    inside = {node for path in paths.values() for node in path}
    for node in sorted(inside):
        layout = step(node, layouts, around.learned)
        if isinstance(layout, Refusal):
            return layout
        layouts[node] = layout
    for key, operand in operands.items():
        first, *_, rows, channels = layouts[operand]
        if parts(rows)[1] != tokens or names(channels) or (shape[0] > 1 and names(first) != {BATCH}):
            return Refusal(f"the rows of {key} are not the tokens of {x.name}", operand.name)
    if layouts[operands["k"]][-2] != layouts[operands["v"]][-2]:
        return Refusal("the rows of k and v are in different orders", sdpa.name)
    if mask_of(sdpa) in layouts:
        return Refusal("its mask is computed from features", sdpa.name)
    layouts[sdpa] = (*layouts[operands["q"]][:-1], named("", shape_of(sdpa)[-1]))
    if refusal := check_company(sdpa, layouts[sdpa], layouts, around.learned):
        return refusal
    output = grow([sdpa], {sdpa: layouts[sdpa]}, (batch, tokens), around.learned, around.read)
    if isinstance(output, Refusal):
        return output
    known = inside | {sdpa, *output.nodes}
    cuts = {linear: channel_parts(linear) for linear in inside}
    carriers = {
        node for linear, cut in cuts.items() if not (cut.overlap and written_by(linear)) for node in cut.carriers
    }
    for node in inside - carriers:
        outside = [user for user in node.users if user not in known]
        if outside:
            return Refusal(f"{node.name} is also read outside the attention, by {outside[0].name}", node.name)
    # The rewritten graph reads right behind x what the projections read later, and the norm before.
    last = max(user for alias in aliases(x) & {x, *inside} for user in alias.users if user in inside)
    metric = place.metric
    for node, until in ((x, last), (metric.source, x)):
        if changed := written_by(node, until):
            return Refusal(f"{node.name} is changed in place by {changed.name}", node.name)
    return AttentionSite(
        module_name(sdpa), sdpa, x, before, after, place.grids, metric, paths, carriers, output, (),
        {**layouts, **output.layouts},
    )  # fmt: skip


def _place(sdpa: Node, around: Surroundings, hint: Grids | None) -> _Place | Refusal:
    """Where the image tokens of ``sdpa`` come from; ``hint`` places tokens that the graph does not."""
    refusal = _check_attention(sdpa)
    if refusal:
        return refusal
    operands: dict[str, Node] = dict(zip("qkv", sdpa.args[:3], strict=True))  # type: ignore[arg-type]
    sources = {key: projected_from(node) for key, node in operands.items()}
    for key, found in sources.items():
        if not found:
            return Refusal(f"{key} is not a linear projection", operands[key].name)
    shared = sorted(set.intersection(*sources.values()))
    if not shared:
        return Refusal("cross-attention: q, k and v are not projected from the same tensor", sdpa.name)
    shared = [as_read(node, operands.values()) for node in shared]
    places = [_Place(node, *place) for node in shared if (place := placed(node, around.images, around.hint))]
    if places:
        several = Refusal(f"q, k and v are projected from {len(places)} images at once", sdpa.name)
        return places[0] if len(places) == 1 else several
    joint = len(set.union(*sources.values())) > 1
    images = [x for x in shared if x in around.sampled and len(shape_of(x)) == 3 and shape_of(x)[1] > 1]
    if hint and joint:
        images = [x for x in images if shape_of(x)[1] == tokens_on(hint)] or images
    x = (images or shared)[0]
    shape = shape_of(x)
    if len(shape) != 3 or shape[1] < 2:
        return Refusal(f"its input has shape {shape}, not (batch, tokens, channels)", x.name)
    if x not in around.sampled:
        return Refusal("its tokens are not made from the model's first input: no image", x.name)
    known = any(names(dim) for dim in around.images.get(x, ()))
    grids = grids_from_hint(hint, shape[1]) if hint and not known and len(images) == 1 else None
    if grids is None or (joint and grids != hint):
        why = why_unplaced(x, around.images, around.hint)
        return Unplaced(("joint attention: " if joint else "") + why, x.name, shape[1])
    return _Place(x, grids, 0, 0)


def _checked(metric: Metric | None, x: Node) -> Metric | None:
    """``metric`` if it has the rows of ``x``, and nothing between them is changed in place."""
    if metric is None:
        return None
    seen = metric.views[-1] if metric.views else metric.source
    fits = shape_of(seen)[:2] == shape_of(x)[:2] and len(shape_of(seen)) == 3
    return metric if fits and not any(written_by(node, x) for node in _between(metric.source, x)) else None


def _check_attention(sdpa: Node) -> Refusal | None:
    """What the SDPA node itself forbids."""
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), sdpa.args[3:], strict=False)) | dict(sdpa.kwargs)
    if given.get("is_causal"):
        return Refusal("causal attention", sdpa.name)
    if given.get("dropout_p"):
        return Refusal("attention dropout is active", sdpa.name)
    if any(not isinstance(size, int) for node in sdpa.all_input_nodes for size in shape_of(node)):
        return Refusal("dynamic shape", sdpa.name)
    return None


def _between(x: Node, operand: Node) -> set[Node]:
    """The nodes that depend on ``x`` and that ``operand`` depends on, ``x`` excluded."""
    depends: dict[Node, bool] = {x: True}
    stack = [operand]
    while stack:
        node = stack[-1]
        unknown = [source for source in node.all_input_nodes if source not in depends and source > x]
        if unknown and node not in depends:
            stack.extend(unknown)
            continue
        stack.pop()
        depends.setdefault(node, any(depends.get(source, False) for source in node.all_input_nodes))
    return {node for node, does in depends.items() if does} - {x}
