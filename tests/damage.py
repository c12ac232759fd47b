"""Seeded damage to the contents of files: bytes flipped, cut and doubled, and values of JSON replaced by odd ones."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, -0.5, 2**70, -(2**70), 10**400, float("nan"), float("inf"), float("-inf"), 1e300, "", "1",
    "__init__", [], [1], {}, {"a": 1}, [[[]]],
)  # fmt: skip


def bytes_of(content: bytes, seed: int, count: int) -> Iterator[bytes]:
    """``count`` damaged versions of ``content``, none of them equal to it."""
    draw = random.Random(seed)
    while count:
        damaged, place = bytearray(content), draw.randrange(len(content))
        match draw.randrange(5):
            case 0:
                damaged[place] ^= 1 << draw.randrange(8)
            case 1:
                del damaged[place:]
            case 2:
                del damaged[place : place + draw.randint(1, 9)]
            case 3:
                damaged[place:place] = damaged[place : place + draw.randint(1, 9)]
            case 4:
                damaged[place : place + draw.randint(1, 9)] = draw.randbytes(draw.randint(1, 9))
        if damaged != content:
            count -= 1
            yield bytes(damaged)


def values_of(content: Any) -> Iterator[str]:
    """The JSON of ``content`` with each of its values replaced by each of :data:`ODD`, taken out, and put in twice."""
    for path in _paths(content):
        for odd in ODD:
            yield json.dumps(_changed(content, path, odd))
        if path:
            whole = copy.deepcopy(content)
            parent = _at(whole, path[:-1])
            del parent[path[-1]]
            yield json.dumps(whole)
            if isinstance(parent, dict):
                parent[f"{path[-1]}!"] = 0
                yield json.dumps(whole)
    yield "[" * 100_000
    yield '{"a":' * 5_000 + "1" + "}" * 5_000


def _paths(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from _paths(value, (*path, key))


def _at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def _changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    whole = copy.deepcopy(content)
    _at(whole, path[:-1])[path[-1]] = value
    return whole
