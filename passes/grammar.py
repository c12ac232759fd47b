"""One text grammar names the methods on every command line and in every table.

``dense``, ``tome:0.7``, ``bigain-tm:0.7``, ``bigain-tm:0.7:block``, ``block-pool:0.5``, ``todo:2``, ``bigain-td:2``,
``bigain-td:2:0.9``, ``bigain-td:2:0.8..1.2``, ``bigain-tm:0.2/0.75/0.5``. Any other field is set by name, as in
``bigain-tm:0.7:levels=all:window=all``, ``merge:0.7:destinations=random(seed=3)`` or
``bigain-td:2:where=down_blocks.*/up_blocks.*``; ``+`` joins a merge with a
downsampling, ``,`` lists. Methods print so too.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from bigain_fx.passes import destinations
from bigain_fx.passes.alpha import LinearAlpha
from bigain_fx.passes.errors import MethodError
from bigain_fx.passes.methods import (
    CHOICES,
    LEADING,
    BlockPool,
    KVDownsample,
    LaplacianMerge,
    Merge,
    Method,
    Methods,
    ToDo,
    ToMe,
    normalize,
)
from bigain_fx.passes.where import read_where

SYNTAX = (
    "dense, tome:RATIO[:block], bigain-tm:RATIO[:block], block-pool:RATIO, todo:FACTOR or bigain-td:FACTOR[:ALPHA or "
    ":NOISY..CLEAN], with :FIELD=VALUE for other fields; '+' joins two"
)
_BY_NAME: dict[str, type[Method]] = {
    method.name: method for method in (ToMe, LaplacianMerge, Merge, BlockPool, ToDo, KVDownsample)
}


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
    make = _BY_NAME.get(name)
    known = {field.name for field in fields(make)} if make else set()
    places = [field for field in LEADING if field in known]
    given: dict[str, Any] = {}
    for value in values:
        field, named, setting = value.partition("=")
        if not named:
            is_scope = "scope" in known and value in CHOICES["scope"]
            field, setting = "scope" if is_scope else places.pop(0) if places else "", value
        if field not in known or field in given:
            make = None
            break
        try:
            given[field] = _value(field, setting)
        except ValueError as error:
            raise MethodError(f"methods={text!r}: {part!r} holds no valid number ({error})") from None
    if make is None or not {"ratio", "factor"} & set(given):
        raise MethodError(f"methods={text!r}: {part!r} is not a method; write {SYNTAX}; ',' lists")
    return make(**given)


def _value(field: str, text: str) -> Any:
    match field:
        case "alpha" if ".." in text:
            noisy, clean = text.split("..")
            return LinearAlpha(float(noisy), float(clean))
        case "ratio" if "/" in text:
            return tuple(float(ratio) for ratio in text.split("/"))
        case "ratio" | "alpha":
            return float(text)
        case "factor" | "seed":
            return int(text)
        case "proportional":
            return {"true": True, "false": False}.get(text, text)
        case "where":
            return read_where(text)
        case "levels" | "window":
            return None if text == "all" else int(text)
        case "destinations":
            return destinations.parse(text)
        case "cell":
            return tuple(int(side) for side in text.split("x"))
    return text
