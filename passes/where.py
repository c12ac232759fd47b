"""``where=`` of a method: which attentions it is for, by glob patterns on their names or by a function of their record.

A pattern is matched with the whole name, as :func:`fnmatch.fnmatchcase` does: ``*`` stands for any text, dots too,
``?`` for one character, ``[1-5]`` for one of several.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from typing import Any

from bigain_fx.passes import checks
from bigain_fx.passes.errors import MethodError, RewriteError, first_line

Where = str | tuple[str, ...] | Callable[[Any], bool] | None
RESERVED = ":+,/"
"""What separates methods, fields and patterns in the text grammar."""
NAMES = 8
"""As many are named where a pattern matches none of them."""


def as_where(value: Any) -> Where:
    """Return ``value`` as a field of a frozen method; one pattern alone stands for a tuple of it.

    Raises:
        MethodError: it is neither a pattern, nor a tuple of some, nor a function, nor None.
    """
    if value is None or (callable(value) and getattr(value, "__hash__", None) is not None):
        given: Where = value
        return given
    patterns = value if isinstance(value, tuple) else (value,)
    if not patterns or not all(isinstance(pattern, str) and pattern.strip() for pattern in patterns):
        right = (
            "a glob pattern of names, such as 'transformer_blocks.[1-5].*', a tuple of these, or a function of a site"
        )
        raise MethodError(f"{checks.told('where', value)} must be {right}")
    if any(set(RESERVED) & set(pattern) for pattern in patterns):
        raise MethodError(f"{checks.told('where', value)} has one of {' '.join(RESERVED)} in it; write ? in its place")
    return tuple(map(str, patterns)) if len(patterns) > 1 else str(patterns[0])


def where_text(where: Where) -> str:
    """Return ``where`` in the text grammar; a function by its name, which cannot be read back."""
    if isinstance(where, str | tuple):
        return "/".join(_patterns(where))
    return getattr(where, "__name__", type(where).__name__)


def read_where(given: str) -> Where:
    """Return what :func:`where_text` made of patterns."""
    return tuple(given.split("/")) if "/" in given else given


def leaves_out(where: Where, site: Any) -> bool:
    """Return whether ``where`` leaves out the attention of the record ``site``.

    Raises:
        RewriteError: it is a function, and raises an error.
    """
    if where is None or isinstance(where, str | tuple):
        return where is not None and not any(fnmatchcase(site.name, pattern) for pattern in _patterns(where))
    try:
        return not where(site)
    except Exception as error:  # whatever the caller's function raises
        raise RewriteError(
            f"where={where_text(where)} raises {type(error).__name__} for {site.name}: {first_line(error)}"
        ) from error


def check_names(where: Where, names: Collection[str]) -> None:
    """Refuse a pattern that matches no attention.

    Raises:
        RewriteError: none of ``names`` matches; some of these are named.
    """
    for pattern in _patterns(where) if isinstance(where, str | tuple) else ():
        if not any(fnmatchcase(name, pattern) for name in names):
            known = list(dict.fromkeys(names))
            more = f" and {len(known) - NAMES} more" if len(known) > NAMES else ""
            raise RewriteError(
                f"where={pattern!r} matches no attention; there are {', '.join(known[:NAMES]) or 'none'}{more}"
            )


def _patterns(where: str | tuple[str, ...]) -> tuple[str, ...]:
    return where if isinstance(where, tuple) else (where,)
