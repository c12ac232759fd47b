"""What arguments must be: each check returns the value, or refuses it in a line with its name and what would be right.

Numbers may be of any type that counts as one, numpy's too; True and False are none.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from bigain_fx.passes.errors import BigainError, InputError

INT64 = 2**63 - 1
SEED = 2**42
"""A seed lies within this, above and below: it is multiplied by a million and more to number images."""
MANY = 10**6
"""More rows, pairs or images than any call has."""
FLOAT32 = 3.4028234663852886e38
LENGTH = 100

Kind = type[BigainError]


def told(name: str, value: object) -> str:
    """``name=value`` in one short line."""
    shape = getattr(value, "shape", None)
    try:
        text = repr(value) if not isinstance(shape, tuple) or shape == () else f"{type(value).__name__} {tuple(shape)}"
    except Exception:  # whatever a stranger's repr raises; of an integer of 5,000 digits Python's own
        text = type(value).__name__
    text = " ".join(text.split())
    return f"{name}={text if len(text) <= LENGTH else text[:LENGTH] + '...'}"


def counts(value: Any, least: int = 1, most: int = INT64) -> bool:
    """Whether ``value`` is an integer from ``least`` to ``most``."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= int(value) <= most


def integer(
    name: str, value: Any, *, least: int = -INT64, most: int = INT64, right: str = "", error: Kind = InputError
) -> int:
    """``value`` as an int from ``least`` to ``most``; ``right`` says in words what it must be."""
    if not counts(value, least, most):
        limits = f"of at least {least}" if most == INT64 else f"from {least} to {most}"
        raise error(f"{told(name, value)} must be {right or f'an integer {limits}'}")
    return int(value)


def number(name: str, value: Any, *, right: str = "a finite number", error: Kind = InputError) -> float:
    """``value`` as a float that float32 can hold, or as the int that it is."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not -FLOAT32 <= value <= FLOAT32:  # which NaN is not
        raise error(f"{told(name, value)} must be {right}")
    return value if type(value) is int else float(value)


def integers(name: str, values: Any, *, right: str) -> tuple[int, ...]:
    """``values``, several integers, as a tuple."""
    several = isinstance(values, Sequence) and not isinstance(values, str | bytes)
    if not several or not all(counts(value, -INT64) for value in values):
        raise InputError(f"{told(name, values)} must be {right}")
    return tuple(map(int, values))


def choice(name: str, value: Any, choices: Collection[str], *, error: Kind = InputError) -> str:
    """``value``, one of the strings ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise error(f"{told(name, value)} must be {' or '.join(map(repr, choices))}")
    return value


def flag(name: str, value: Any, *, error: Kind = InputError) -> bool:
    """``value``, True or False."""
    if not isinstance(value, bool):
        raise error(f"{told(name, value)} must be True or False")
    return value


def path(name: str, value: Any) -> Path:
    """``value``, a string or a path, as a path."""
    if not isinstance(value, str | os.PathLike) or not isinstance(text := os.fspath(value), str) or not text:
        raise InputError(f"{told(name, value)} must be a path, as a string or a pathlib.Path")
    return Path(text)


def keywords(name: str, value: Any) -> Mapping[str, Any]:
    """``value``, a mapping of names."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{told(name, value)} must be a mapping of names to values")
    return value


def positional(name: str, value: Any) -> tuple[Any, ...]:
    """``value``, a tuple or list of arguments, as a tuple."""
    if not isinstance(value, tuple | list):
        raise InputError(f"{told(name, value)} must be a tuple of the arguments that are given by position")
    return tuple(value)


def function(name: str, value: Any) -> Any:
    """``value``, which can be called, or None."""
    if value is not None and not callable(value):
        raise InputError(f"{told(name, value)} must be a function, or None")
    return value
