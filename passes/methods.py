"""The methods: frozen, hashable values that say what to do with a self-attention, validated when made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from bigain_fx.passes import checks
from bigain_fx.passes.alpha import LinearAlpha
from bigain_fx.passes.destinations import RULES, Destinations, Laplacian, Random, Rows
from bigain_fx.passes.errors import MethodError
from bigain_fx.passes.where import Where, as_where, where_text

MERGE, KV = "merge", "kv"
CHOICES = {
    "scope": ("attention", "block"),
    "align": ("sample", "batch"),
    "unmerge": ("copy", "blend"),
}
SMOOTHEST = Laplacian()
LEADING = ("ratio", "factor", "alpha")
"""Fields that a text gives by their place; ``scope`` may be given by its value alone."""


@dataclass(frozen=True)
class _Merge:
    """What every merging method has; see :class:`LaplacianMerge`."""

    kind: ClassVar[str] = MERGE
    name: ClassVar[str]
    ratio: float | tuple[float, ...] = 0.7
    cell: tuple[int, int] = (2, 2)
    levels: int | None = 1
    where: Where = field(default=None, kw_only=True)
    scope: str = "attention"
    align: str = "sample"
    proportional: bool = False
    unmerge: str = "copy"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            checks.choice(name, getattr(self, name), choices, error=MethodError)
        checks.flag("proportional", self.proportional, error=MethodError)
        _keep(self, "cell", _cell(self.cell))
        cap = 1 - 1 / math.prod(self.cell)
        if not self.ratios:
            raise MethodError("ratio=() must be a number, or one for each attention")
        ratios = tuple(_number("ratio", ratio) for ratio in self.ratios)
        for ratio in ratios:
            if not 0 <= ratio <= cap:
                raise MethodError(f"ratio={ratio!r} must be between 0 and {cap:g} for cell={self.cell}")
        _keep(self, "ratio", ratios if isinstance(self.ratio, tuple) else ratios[0])
        _keep(self, "levels", _positive_or_none("levels", self.levels, "all"))
        _keep(self, "where", as_where(self.where))

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratio of each attention, or the one ratio of all."""
        return self.ratio if isinstance(self.ratio, tuple) else (self.ratio,)

    @property
    def idle(self) -> bool:
        """Whether it changes nothing, whatever the graph."""
        return not any(self.ratios)

    def __str__(self) -> str:
        return _text(self, "/".join(f"{ratio:g}" for ratio in self.ratios))


@dataclass(frozen=True)
class _Match(_Merge):
    """What merges that compare tokens have besides; see :class:`LaplacianMerge`."""

    window: int | None = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        _keep(self, "window", _positive_or_none("window", self.window, "the whole grid"))


@dataclass(frozen=True)
class LaplacianMerge(_Match):
    """BiGain-TM: the token of lowest Laplacian score in each cell takes in its most similar sources (paper, L-GTM).

    Attributes:
        ratio: share of the tokens that merge away, from 0 to ``1 - 1 / (rows * columns)``; or one for each
            self-attention that ``levels`` and ``where`` leave, in the order in which they run
            (:func:`bigain_fx.calibrate`).
        cell: (rows, columns) of tokens that elect one destination.
        levels: how many of the finest image grids to merge on; None is all of them.
        where: which attentions to merge in: a glob pattern of their names, such as ``"transformer_blocks.[1-5].*"``, a
            tuple of patterns, or a function that answers for the record of an attention (``docs/operators.md``, "Where
            they apply"); None is all of them.
        scope: ``"attention"`` (the paper), or ``"block"``: every branch of the residual stream from one self-attention
            to the next, cross-attention and MLP too, works on the merged tokens.
        align: ``"sample"`` plans each sample of a batch on its own; ``"batch"`` makes one plan for all of them, from
            their metrics side by side: for the halves of guidance, or one image under many conditions.
        proportional: whether a key counts for all tokens of its group (proportional attention, Bolya et al. 2023); not
            in the paper, which lets each count as one.
        unmerge: what a token that merged away gets back: ``"copy"``, its group's row (the paper), or ``"blend"``, a
            mean of the rows of the three groups most similar to it; not in the paper.
        window: longest side, in tokens, of the tiles within which a token finds what it merges into; their sides divide
            the grid's. None is the whole grid (the paper): it costs more and was never better (``docs/operators.md``).
        cell_layout: ``"block"``, cells as in the paper's text, or ``"row"``, as the released code forms them.
    """

    name: ClassVar[str] = "bigain-tm"
    cell_layout: str = "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("cell_layout", self.cell_layout, ("block", "row"), error=MethodError)

    @property
    def destinations(self) -> Destinations:
        """The rule that picks them."""
        return Rows() if self.cell_layout == "row" else SMOOTHEST


@dataclass(frozen=True)
class ToMe(_Match):
    """ToMe for diffusion, the baseline: as :class:`LaplacianMerge`, with a random destination in each cell.

    Attributes:
        ratio, cell, levels, where, scope, align, proportional, unmerge, window: as in :class:`LaplacianMerge`.
        seed: of the draw, one per graph and grid.
    """

    name: ClassVar[str] = "tome"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _keep(self, "seed", checks.integer("seed", self.seed, error=MethodError))

    @property
    def destinations(self) -> Destinations:
        """The rule that picks them."""
        return Random(self.seed)


@dataclass(frozen=True)
class Merge(_Match):
    """A merge whose destination rule is yours: :class:`LaplacianMerge` and :class:`ToMe` are two that have names.

    Attributes:
        ratio, cell, levels, scope, align, proportional, unmerge, window: as in :class:`LaplacianMerge`.
        destinations: which token of each cell the others merge into; :func:`bigain_fx.destination_rule` adds a rule.
    """

    name: ClassVar[str] = "merge"
    destinations: Destinations = SMOOTHEST

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.destinations) not in RULES.values():
            given = checks.told("destinations", self.destinations)
            raise MethodError(f"{given} must be a registered rule; there are {', '.join(RULES)}")


@dataclass(frozen=True)
class BlockPool(_Merge):
    """Pools whole cells, those of lowest Laplacian score, and leaves the others (paper, adaptive block merging).

    Attributes:
        ratio: share of the tokens that go, rounded down to whole cells.
        cell, levels, where, scope, align, proportional, unmerge: as in :class:`LaplacianMerge`.
    """

    name: ClassVar[str] = "block-pool"


@dataclass(frozen=True)
class KVDownsample:
    """BiGain-TD: keys and values from interpolated or extrapolated tokens, queries whole (paper, IE-KVD).

    Attributes:
        factor: per axis, at least 2; keys and values fall by its square. It need not divide the grid's sides.
        alpha: a finite number (0 pools, 1 takes the nearest, above 1 extrapolates) or a :class:`LinearAlpha`.
        levels: how many of the finest image grids to downsample on; None is all of them.
        where: which attentions to downsample in, as in :class:`LaplacianMerge`.
    """

    kind: ClassVar[str] = KV
    name: ClassVar[str] = "bigain-td"
    idle: ClassVar[bool] = False
    factor: int = 2
    alpha: float | LinearAlpha = 0.9
    levels: int | None = 1
    where: Where = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _keep(self, "factor", checks.integer("factor", self.factor, least=2, error=MethodError))
        if not isinstance(self.alpha, LinearAlpha):
            _keep(self, "alpha", _number("alpha", self.alpha))
        _keep(self, "levels", _positive_or_none("levels", self.levels, "all"))
        _keep(self, "where", as_where(self.where))

    def __str__(self) -> str:
        alpha = self.alpha
        shown = f"{alpha.noisy:g}..{alpha.clean:g}" if isinstance(alpha, LinearAlpha) else f"{alpha:g}"
        return _text(self, f"{self.factor}:{shown}")


@dataclass(frozen=True)
class ToDo:
    """ToDo, the baseline: nearest-neighbour downsampling of keys and values (alpha 1).

    Attributes:
        factor, levels, where: as in :class:`KVDownsample`.
    """

    kind: ClassVar[str] = KV
    name: ClassVar[str] = "todo"
    idle: ClassVar[bool] = False
    alpha: ClassVar[float] = 1.0
    factor: int = 2
    levels: int | None = 1
    where: Where = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        checked = KVDownsample(self.factor, self.alpha, self.levels, where=self.where)
        for name in ("factor", "levels", "where"):
            _keep(self, name, getattr(checked, name))

    def __str__(self) -> str:
        return _text(self, f"{self.factor}")


MergeMethod = LaplacianMerge | ToMe | Merge | BlockPool
KVMethod = KVDownsample | ToDo
Method = MergeMethod | KVMethod
Methods = tuple[Method, ...]


def normalize(method: Method | Iterable[Method] | None) -> Methods:
    """Return the methods as a tuple, downsampling first: none (dense), one, or one of each kind.

    Raises:
        MethodError: two methods of one kind, or something that is no method.
    """
    given: tuple[object, ...] = () if method is None else (method,)
    several = isinstance(method, Iterable) and not isinstance(method, str | bytes | Mapping)
    if several and not hasattr(method, "shape"):  # an empty array is no wish for a dense graph
        given = tuple(method)  # type: ignore[arg-type]
    for item in given:
        if not isinstance(item, Method):
            told = checks.told("method", item)
            raise MethodError(f"{told} must be a LaplacianMerge, KVDownsample, ToMe, ToDo, Merge or BlockPool")
    methods = tuple(sorted((item for item in given if isinstance(item, Method)), key=lambda item: item.kind))
    kinds = [item.kind for item in methods]
    for kind in (MERGE, KV):
        if kinds.count(kind) > 1:
            raise MethodError(f"method={given!r} has {kinds.count(kind)} of kind {kind!r}: at most one of each kind")
    return methods


def _text(method: _Merge | KVMethod, leading: str) -> str:
    """As :mod:`bigain_fx.passes.grammar` reads it: the name, ``leading``, and what is not the default."""
    parts = [method.name, leading]
    for item in fields(method):
        value = getattr(method, item.name)
        if item.name in LEADING or value == item.default:
            continue
        shown = _shown(item.name, value)
        parts.append(shown if item.name == "scope" else f"{item.name}={shown}")
    return ":".join(parts)


def _shown(name: str, value: Any) -> str:
    if name == "where":
        return where_text(value)
    shown = "x".join(map(str, value)) if isinstance(value, tuple) else "all" if value is None else str(value)
    return shown.lower() if isinstance(value, bool) else shown


def _keep(method: object, name: str, value: object) -> None:
    """Put a field of a frozen method into its plain form, such as an int of numpy's int64, while it is made."""
    object.__setattr__(method, name, value)


def _number(name: str, value: Any) -> float:
    return checks.number(name, value, error=MethodError)


def _positive_or_none(name: str, value: Any, none: str) -> int | None:
    right = f"a positive integer, or None for {none}"
    return None if value is None else checks.integer(name, value, least=1, right=right, error=MethodError)


def _cell(value: Any) -> tuple[int, int]:
    pair = isinstance(value, tuple) and len(value) == 2 and all(map(checks.counts, value))
    if not pair or math.prod(value) < 2:
        right = "two positive integers (rows, columns), two tokens or more"
        raise MethodError(f"{checks.told('cell', value)} must be {right}")
    return int(value[0]), int(value[1])
