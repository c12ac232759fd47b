"""What a destination rule is, how one is made known, and how it is written in text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from bigain_fx.passes.errors import MethodError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

    from bigain_fx.passes.surgery import Surgeon

_BOOLS = {"true": True, "false": False}
_READ = {"int": int, "float": float, "str": str, "bool": _BOOLS.__getitem__}
"""What a field of a rule may be, which is also what an operator takes, and how its text is read."""


class Destinations:
    """Which token of each complete cell the others merge into: a rule, as a frozen, hashable value.

    A rule of your own is one registered class, whose fields are numbers, flags or words::

        @bgx.destination_rule
        @dataclass(frozen=True)
        class Loudest(bgx.Destinations):
            name = "loudest"

            def positions(self, metric, grid, cell):
                return metric.norm(dim=-1)[:, cell_tokens(grid, cell, metric.device)].argmax(-1)

    ``Merge(0.7, destinations=Loudest())`` takes it, ``merge:0.7:destinations=loudest`` on a command line; with a field,
    ``random(seed=3)``, and several apart by semicolons.

    Attributes:
        name: of the rule, in text and of its operator, ``bigain::<name>_positions``.
    """

    name: ClassVar[str]

    def positions(self, metric: Tensor, grid: Sequence[int], cell: Sequence[int]) -> Tensor:
        """Return where in each complete cell its destination is, in torch operators that a compiler can trace.

        Args:
            metric: ``(B, N, C)`` floating, what the plan is made from, tokens row-major.
            grid: ``(h, w)`` with ``h * w == N``.
            cell: ``(rows, columns)``.

        Returns:
            ``(B, cells)`` or ``(cells,)`` int64 offsets within a cell, cells and offsets row-major.
        """
        raise NotImplementedError

    def emit(self, surgeon: Surgeon, metric: Node, grid: Sequence[int], cell: Sequence[int], like: Node) -> Node | None:
        """Emit what gives :meth:`positions`: by default an operator of this rule.

        Raises:
            MethodError: positions of another shape or dtype.
        """
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        node = surgeon.emit(operator_of(type(self)), (metric, list(grid), list(cell), *values), like=like)
        found, batch = node.meta["val"], len(metric.meta["val"])
        cells = math.prod(side // step for side, step in zip(grid, cell, strict=True))
        if str(found.dtype) != "torch.int64" or found.shape not in ((cells,), (batch, cells)):
            raise MethodError(
                f"destinations={self}: its positions have shape {tuple(found.shape)} and dtype {found.dtype}; they "
                f"must be ({cells},) or ({batch}, {cells}) int64"
            )
        return node

    def __str__(self) -> str:
        given = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]  # type: ignore[arg-type]
        shown = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value, default in given
                 if value != default]  # fmt: skip
        return f"{self.name}({';'.join(shown)})" if shown else self.name


RULES: dict[str, type[Destinations]] = {}
"""The rules that are known, by name."""
Rule = TypeVar("Rule", bound=type[Destinations])
_OPERATORS: dict[Any, str] = {}


def destination_rule(rule: Rule) -> Rule:
    """Make ``rule`` known, by its name; usable as a decorator above ``@dataclass(frozen=True)``.

    Raises:
        MethodError: no frozen dataclass, no ``positions``, a name that is taken or no word, a field that is no int,
            float, bool or str.
    """
    if not (isinstance(rule, type) and issubclass(rule, Destinations) and is_dataclass(rule)):
        raise MethodError(f"rule={rule!r} must be a frozen dataclass derived from Destinations")
    if rule.positions is Destinations.positions:
        raise MethodError(f"rule={rule.__name__} has no positions(metric, grid, cell); that is what a rule is")
    if not rule.__dataclass_params__.frozen:
        raise MethodError(f"rule={rule.__name__} must be frozen: @dataclass(frozen=True)")
    name = getattr(rule, "name", None)
    if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise MethodError(f"name={name!r} of {rule.__name__} must be a word of small letters, digits and underscores")
    for field, kind in _kinds(rule).items():
        if kind not in _READ:
            raise MethodError(f"{rule.__name__}.{field} is of type {kind}; a field must be one of {', '.join(_READ)}")
    known = RULES.get(name)
    if known is not None and _identity(known) != _identity(rule):
        raise MethodError(f"name={name!r} of {rule.__name__} is that of {known.__module__}.{known.__qualname__}")
    RULES[name] = rule
    return rule


def parse(text: str) -> Destinations:
    """Read a rule as it prints itself, such as ``"random(seed=3)"``.

    Raises:
        MethodError: no such rule, or no such field.
        ValueError: a number that cannot be read.
    """
    found = re.fullmatch(r"(\w+)(?:\((.*)\))?", text)
    rule = RULES.get(found[1]) if found else None
    given = dict(item.partition("=")[::2] for item in found[2].split(";")) if found and found[2] else {}
    kinds = _kinds(rule) if rule else {}
    if rule is None or set(given) - set(kinds):
        raise MethodError(f"destinations={text!r} must be one of {', '.join(RULES)}, or with a field: random(seed=3)")
    try:
        return rule(**{name: _READ[kinds[name]](value) for name, value in given.items()})  # type: ignore[operator]
    except KeyError as error:
        raise ValueError(f"{error} is neither true nor false") from None


def rule_of(operator: Any) -> type[Destinations] | None:
    """Return the rule whose positions ``operator`` computes."""
    return RULES.get(_OPERATORS.get(operator, ""))


def operator_of(rule: type[Destinations]) -> Any:
    """Return the operator ``bigain::<name>_positions(Tensor metric, int[2] grid, int[2] cell, <fields>) -> Tensor``."""
    return _defined(rule.name)


@cache
def _defined(name: str) -> Any:
    import torch

    taken = "".join(f", {kind} {field}" for field, kind in _kinds(RULES[name]).items())
    operator = f"bigain::{name}_positions"
    signature = f"(Tensor metric, int[2] grid, int[2] cell{taken}) -> Tensor"
    torch.library.define(operator, signature, tags=torch.Tag.pt2_compliant_tag)

    def positions(metric: Tensor, grid: list[int], cell: list[int], *values: Any) -> Tensor:
        return RULES[name](*values).positions(metric, grid, cell)

    torch.library.impl(operator, "CompositeImplicitAutograd", positions)
    overload = getattr(torch.ops.bigain, f"{name}_positions").default
    _OPERATORS[overload] = name
    return overload


def _kinds(rule: type[Destinations]) -> dict[str, str]:
    """The type of each field, as it is written."""
    return {field.name: getattr(field.type, "__name__", str(field.type)) for field in fields(rule)}  # type: ignore[arg-type]


def _identity(rule: type[Destinations]) -> tuple[Any, ...]:
    """What must stay for a rule to be registered again, as a notebook's cell does that runs twice."""
    return rule.__module__, rule.__qualname__, *_kinds(rule).items()
