"""The methods: frozen, hashable values that say what to do with a self-attention, validated when made.

One text grammar names them on every command line and in every table: ``dense``, ``tome:0.7``, ``bigain-tm:0.7``,
``bigain-tm:0.7:block``, ``todo:2``, ``bigain-td:2``, ``bigain-td:2:0.9``, ``bigain-td:2:0.8..1.2``; ``+`` joins a merge
with a downsampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from bigain_fx.passes.errors import MethodError

MERGE, KV = "merge", "kv"
CHOICES = {
    "scope": ("attention", "block"),
    "align": ("sample", "batch"),
    "metric": ("auto", "stream", "input"),
}


@dataclass(frozen=True)
class LinearAlpha:
    """Alpha of :class:`KVDownsample`, linear in the timestep and clamped outside (paper, IE-KVD).

    Attributes:
        noisy, clean: alpha at ``t_noisy`` and at ``t_clean``.
        t_noisy, t_clean: the ends, in the units in which the model takes its timestep, such as 999 and 0; Flux, for
            one, takes t / 1000. None for both: the units of the model's family, filled in before a graph is rewritten.
    """

    noisy: float = 0.8
    clean: float = 1.2
    t_noisy: float | None = None
    t_clean: float | None = None

    def __post_init__(self) -> None:
        if (self.t_noisy is None) != (self.t_clean is None):
            raise MethodError(f"t_noisy={self.t_noisy!r}, t_clean={self.t_clean!r}: give both ends, or neither")
        for name in ("noisy", "clean") if self.t_noisy is None else ("noisy", "clean", "t_noisy", "t_clean"):
            _number(name, getattr(self, name))
        if self.t_noisy is None:
            return
        if self.t_noisy == self.t_clean:
            raise MethodError(f"t_noisy={self.t_noisy!r} equals t_clean: the two ends of the schedule must differ")

    @property
    def ends(self) -> tuple[float, float, float, float]:
        """``noisy, clean, t_noisy, t_clean``, as floats.

        Raises:
            MethodError: the units of the timestep were not given.
        """
        if self.t_noisy is None or self.t_clean is None:
            raise MethodError("t_noisy=None: name both ends in the model's timestep units, such as 999 and 0")
        return float(self.noisy), float(self.clean), float(self.t_noisy), float(self.t_clean)


@dataclass(frozen=True)
class _Merge:
    """What every merging method has; see :class:`LaplacianMerge`."""

    kind: ClassVar[str] = MERGE
    name: ClassVar[str]
    ratio: float = 0.7
    cell: tuple[int, int] = (2, 2)
    levels: int | None = 1
    scope: str = "attention"
    align: str = "sample"
    metric: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise MethodError(f"{name}={getattr(self, name)!r} must be {' or '.join(map(repr, choices))}")
        if (
            not isinstance(self.cell, tuple)
            or len(self.cell) != 2
            or not all(isinstance(side, int) and side >= 1 for side in self.cell)
            or math.prod(self.cell) < 2
        ):
            raise MethodError(f"cell={self.cell!r} must be two positive integers (rows, columns), two tokens or more")
        cap = 1 - 1 / math.prod(self.cell)
        _number("ratio", self.ratio)
        if not 0 <= self.ratio <= cap:
            raise MethodError(f"ratio={self.ratio!r} must be between 0 and {cap:g} for cell={self.cell}")
        _check_levels(self.levels)

    @property
    def idle(self) -> bool:
        """Whether it changes nothing, whatever the graph."""
        return self.ratio == 0

    def __str__(self) -> str:
        return f"{self.name}:{self.ratio:g}" + (":block" if self.scope == "block" else "")


@dataclass(frozen=True)
class LaplacianMerge(_Merge):
    """BiGain-TM: the token of lowest Laplacian score in each cell takes in its most similar sources (paper, L-GTM).

    Attributes:
        ratio: share of the tokens that merge away, from 0 to ``1 - 1 / (rows * columns)``.
        cell: (rows, columns) of tokens that elect one destination.
        levels: how many of the finest image grids to merge on; None is all of them.
        scope: ``"attention"`` (the paper), or ``"block"``: every branch of the residual stream from one self-attention
            to the next, cross-attention and MLP too, works on the merged tokens.
        align: ``"sample"`` plans each sample of a batch on its own; ``"batch"`` makes one plan for all of them, from
            their metrics side by side: for the halves of guidance, or one image under many conditions.
        metric: what the plan is made from: ``"stream"`` is the input of the norm above the attention, ``"input"`` what
            the attention reads, ``"auto"`` the stream where nothing but the norm lies between (``docs/operators.md``).
    """

    name: ClassVar[str] = "bigain-tm"


@dataclass(frozen=True)
class ToMe(_Merge):
    """ToMe for diffusion, the baseline: as :class:`LaplacianMerge`, with destinations that ignore the image.

    Attributes:
        ratio, cell, levels, scope, align, metric: as in :class:`LaplacianMerge`.
        destination: ``"random"``, one draw per graph and grid from ``seed``, or ``"top-left"`` of each cell.
        seed: of the draw.
    """

    name: ClassVar[str] = "tome"
    destination: str = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.destination not in ("random", "top-left"):
            raise MethodError(f"destination={self.destination!r} must be 'random' or 'top-left'")
        if not isinstance(self.seed, int):
            raise MethodError(f"seed={self.seed!r} must be an integer")


@dataclass(frozen=True)
class KVDownsample:
    """BiGain-TD: keys and values from interpolated or extrapolated tokens, queries whole (paper, IE-KVD).

    Attributes:
        factor: per axis, at least 2; keys and values fall by its square.
        alpha: a finite number (0 pools, 1 takes the nearest, above 1 extrapolates) or a :class:`LinearAlpha`.
        levels: how many of the finest image grids to downsample on; None is all of them.
    """

    kind: ClassVar[str] = KV
    idle: ClassVar[bool] = False
    factor: int = 2
    alpha: float | LinearAlpha = 0.9
    levels: int | None = 1

    def __post_init__(self) -> None:
        if not isinstance(self.factor, int) or self.factor < 2:
            raise MethodError(f"factor={self.factor!r} must be an integer of at least 2")
        if not isinstance(self.alpha, LinearAlpha):
            _number("alpha", self.alpha)
        _check_levels(self.levels)

    def __str__(self) -> str:
        if isinstance(self.alpha, LinearAlpha):
            return f"bigain-td:{self.factor}:{self.alpha.noisy:g}..{self.alpha.clean:g}"
        return f"bigain-td:{self.factor}:{self.alpha:g}"


@dataclass(frozen=True)
class ToDo:
    """ToDo, the baseline: nearest-neighbour downsampling of keys and values (alpha 1).

    Attributes:
        factor, levels: as in :class:`KVDownsample`.
    """

    kind: ClassVar[str] = KV
    idle: ClassVar[bool] = False
    alpha: ClassVar[float] = 1.0
    factor: int = 2
    levels: int | None = 1

    def __post_init__(self) -> None:
        KVDownsample(self.factor, self.alpha, self.levels)

    def __str__(self) -> str:
        return f"todo:{self.factor}"


MergeMethod = LaplacianMerge | ToMe
KVMethod = KVDownsample | ToDo
Method = MergeMethod | KVMethod
Methods = tuple[Method, ...]


def normalize(method: Method | Iterable[Method] | None) -> Methods:
    """Return the methods as a tuple, downsampling first: none (dense), one, or one of each kind.

    Raises:
        MethodError: two methods of one kind, or something that is no method.
    """
    given: tuple[object, ...] = () if method is None else (method,)
    if isinstance(method, Iterable) and not isinstance(method, str):
        given = tuple(method)
    for item in given:
        if not isinstance(item, Method):
            raise MethodError(f"method={item!r} must be a LaplacianMerge, KVDownsample, ToMe or ToDo")
    methods = tuple(sorted((item for item in given if isinstance(item, Method)), key=lambda item: item.kind))
    kinds = [item.kind for item in methods]
    for kind in (MERGE, KV):
        if kinds.count(kind) > 1:
            raise MethodError(f"method={given!r} has {kinds.count(kind)} of kind {kind!r}: at most one of each kind")
    return methods


def parse(text: str) -> Methods:
    """Read one entry of the grammar above, such as ``"bigain-tm:0.7+bigain-td:2"``; ``"dense"`` is ``()``.

    Raises:
        MethodError: an unknown name, a number that cannot be read, or a value the method refuses.
    """
    if text.strip() == "dense":
        return ()
    return normalize([_parse_one(part.strip(), text) for part in text.split("+")])


def parse_list(text: str) -> dict[str, Methods]:
    """Read a comma-separated list, in order, keyed by each entry as it was written."""
    return {entry.strip(): parse(entry) for entry in text.split(",")}


def _parse_one(part: str, text: str) -> Method:
    name, *values = part.split(":")
    try:
        match name, values:
            case "tome" | "bigain-tm", [ratio] | [ratio, "attention" | "block"]:
                merge = ToMe if name == "tome" else LaplacianMerge
                return merge(float(ratio), scope=values[1] if values[1:] else "attention")
            case "todo", [factor]:
                return ToDo(int(factor))
            case "bigain-td", [factor]:
                return KVDownsample(int(factor))
            case "bigain-td", [factor, alpha] if ".." in alpha:
                noisy, clean = alpha.split("..")
                return KVDownsample(int(factor), LinearAlpha(float(noisy), float(clean)))
            case "bigain-td", [factor, alpha]:
                return KVDownsample(int(factor), float(alpha))
    except MethodError:
        raise
    except ValueError as error:
        raise MethodError(f"methods={text!r}: {part!r} holds no valid number ({error})") from None
    raise MethodError(
        f"methods={text!r}: {part!r} is not a method; write dense, tome:RATIO[:block], bigain-tm:RATIO[:block], "
        "todo:FACTOR or bigain-td:FACTOR[:ALPHA or :NOISY..CLEAN], '+' to join two, ',' to list"
    )


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise MethodError(f"{name}={value!r} must be a finite number")


def _check_levels(levels: int | None) -> None:
    if levels is not None and (isinstance(levels, bool) or not isinstance(levels, int) or levels < 1):
        raise MethodError(f"levels={levels!r} must be a positive integer, or None for all")
