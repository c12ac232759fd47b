"""The go/no-go of ``optimize(select="auto")``: an attention is rewritten only where that is faster on this device.

What a rewrite does to one attention is the difference of two graphs: the nodes of the dense one that are gone or read
something else, and those that are there instead. Both are compiled by themselves and called in turns on random tensors
of the right shapes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import os
import re
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from bigain_fx.passes import checks
from bigain_fx.passes.errors import InputError, first_line
from bigain_fx.passes.images import Hint
from bigain_fx.passes.methods import Methods
from bigain_fx.passes.pipeline import Rewritten, rewrite
from bigain_fx.quantized import call_quantized, kinds_of
from bigain_fx.regions import as_function, boundary, described, own_cache
from bigain_fx.stopwatch import interleaved, synchronizer

log = logging.getLogger("bigain_fx")

ROUNDS, SECONDS = (9, 60), 1.0
"""At least and at most so many rounds, and as many as fit into the time."""
_KEPT = re.compile(r"[0-9a-f]{64}\.json")
STOPS = (TimeoutError, InterruptedError, CancelledError)
"""Errors that someone else raised to stop the work; an interrupt from the keyboard is no ``Exception`` at all."""
Compile = Callable[[GraphModule], Callable[..., Any]]


@dataclass(frozen=True)
class Span:
    """Milliseconds of one call: the fastest round, and the quartiles over all of them."""

    fastest: float
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Cost:
    """What one attention costs: dense, and rewritten."""

    dense: Span
    rewritten: Span

    @property
    def pays(self) -> bool:
        """Whether rewriting wins by the fastest rounds, and by its upper quartile against the lower one of dense."""
        return self.rewritten.fastest < self.dense.fastest and self.rewritten.high < self.dense.low


def rewrite_where_faster(
    module: GraphModule, methods: Methods, grid: Hint | None, compile: Compile, setup: str | None
) -> Rewritten:
    """As :func:`bigain_fx.passes.pipeline.rewrite`, but attentions that are no faster rewritten are kept.

    Those that do the same at the same shapes are measured once. Where a busy machine scatters the times, dense stays.

    Args:
        module, methods, grid: as for ``rewrite``.
        compile: how a graph is compiled.
        setup: what the times depend on beside the graph: backend, mode, options. None: no text tells it, so nothing is
            read from the times that were kept, and nothing is kept.

    Raises:
        BigainError: as for ``rewrite``.
    """
    everything = rewrite(module, methods, grid)
    places = [place for place, record in enumerate(everything.records) if record.action != "kept"]
    if not places:
        return everything
    dense = rewrite(module, (), grid).module
    call_quantized(dense)
    costs: dict[int, Cost] = {}
    kept: dict[int, str] = {}
    for members in _alike(everything, places):
        alone = rewrite(module, methods, grid, dict.fromkeys(set(places) - {members[0]}, "")).module
        call_quantized(alone)
        try:
            costs |= dict.fromkeys(members, _cost(dense, alone, compile, setup))
        except Exception as error:  # whatever a backend raises: what cannot be measured stays dense
            if stop := stopped_by(error):
                raise stop from error
            reason = first_line(getattr(error, "inner_exception", error))  # what Dynamo wraps
            kept |= dict.fromkeys(members, f"not measured: {reason}")
    for place, cost in costs.items():
        if not cost.pays:
            before, after = cost.dense.median, cost.rewritten.median
            kept[place] = f"no faster on this device: {before:.3g} ms dense, {after:.3g} ms rewritten"
    chosen = rewrite(module, methods, grid, kept) if kept else everything
    records = tuple(
        replace(record, ms=known.dense.median, ms_after=(known.rewritten if known.pays else known.dense).median)
        if (known := costs.get(place))
        else record
        for place, record in enumerate(chosen.records)
    )
    return replace(chosen, records=records)


def clear_times() -> None:
    """Delete the times that ``optimize(select="auto")`` keeps on this machine; it measures anew then.

    They are in the folder ``bigain_fx`` of inductor's cache (``TORCHINDUCTOR_CACHE_DIR``).

    Raises:
        InputError: a file cannot be deleted.
    """
    for file in _folder().glob("*.json"):
        if _KEPT.fullmatch(file.name):
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise InputError(f"{file} cannot be deleted: {error.strerror or error}") from error


def stopped_by(error: BaseException) -> BaseException | None:
    """The timeout or interrupt that ``error`` is, or that a compiler has wrapped in it."""
    pending: list[BaseException | None] = [error]
    seen: list[BaseException] = []
    while pending:
        each = pending.pop()
        if each is None or each in seen:
            continue
        if isinstance(each, STOPS) or not isinstance(each, Exception):
            return each
        seen.append(each)
        pending += [getattr(each, "inner_exception", None), each.__cause__, each.__context__]
    return None


def _alike(rewritten: Rewritten, places: Sequence[int]) -> list[list[int]]:
    """``places`` in groups whose attentions cost the same."""
    groups: dict[Any, list[int]] = {}
    for place in places:
        record = rewritten.records[place]
        kind = (record.grid, record.tokens_after, record.action, record.tokens, record.flops)
        groups.setdefault(kind, []).append(place)
    return list(groups.values())


def _cost(dense: GraphModule, alone: GraphModule, compile: Compile, setup: str | None) -> Cost:
    """What the rewrite costs that makes ``alone`` of ``dense``, measured now or earlier."""
    before, after = _changed(dense, alone), _changed(alone, dense)
    device = next(value.device for node in before if isinstance(value := node.meta["val"], Tensor))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    with own_cache():  # whose tag tells operators and kernels
        tag = torch.compiler.config.cache_key_tag
    about = (setup, kinds_of(dense), torch.__version__, tag, name, os.cpu_count(), torch.get_num_threads())
    text = str((about, *(described(part, *boundary(part)) for part in (before, after))))
    file = _folder() / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    if setup is not None and (known := _read(file)):
        return known
    values: dict[str, Any] = {}
    with torch.inference_mode(False), torch.no_grad(), own_cache():
        calls = [_ready(part, module, values, compile) for part, module in ((before, dense), (after, alone))]
        found = Cost(*_spans(calls, device))
    if setup is not None:
        _store(file, json.dumps(asdict(found)))
    return found


def _folder() -> Path:
    return Path(cache_dir()) / "bigain_fx"


def _changed(module: GraphModule, other: GraphModule) -> list[Node]:
    """The calls in ``module`` that ``other`` does not have, or that read something else there."""
    there = {node.name: _call(node) for node in other.graph.nodes}
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    return [node for node in calls if there.get(node.name) != _call(node)]


def _call(node: Node) -> tuple[Any, ...]:
    return node.target, map_arg((node.args, node.kwargs), lambda operand: operand.name)


def _ready(
    nodes: Sequence[Node], module: GraphModule, values: dict[str, Any], compile: Compile
) -> Callable[[], object]:
    """A call of ``nodes``, compiled when first called; ``values`` holds what was made up for inputs, by node."""
    inputs, outputs = boundary(nodes)
    for node in inputs:
        if node.op == "get_attr":
            values[node.name] = operator.attrgetter(str(node.target))(module)
        elif node.name not in values:
            values[node.name] = pytree.tree_map_only(Tensor, _random, node.meta["val"])
    run, arguments = compile(as_function(nodes, inputs, outputs, module)), [values[node.name] for node in inputs]
    return lambda: run(*arguments)


def _random(like: Tensor) -> Tensor:
    """Normal numbers, zeros for integers, in the shape and strides of ``like``."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    flat = torch.zeros(length, dtype=like.dtype, device=like.device)
    return (flat.normal_() if like.is_floating_point() else flat).as_strided(like.shape, like.stride())


def _spans(calls: Sequence[Callable[[], object]], device: torch.device) -> list[Span]:
    wait = synchronizer(device)
    first = sum(map(sum, interleaved(calls, 1, wait)))
    rounds = min(max(ROUNDS[0], int(SECONDS / first)), ROUNDS[1])
    found = [(min(seconds), *statistics.quantiles(seconds, n=4)) for seconds in interleaved(calls, rounds, wait)]
    return [Span(*(1e3 * second for second in spans)) for spans in found]


def _read(file: Path) -> Cost | None:
    """What :func:`_store` kept, if it is there and as this version writes it; what is damaged is measured again."""
    try:
        kept = json.loads(file.read_text())
        return Cost(**{part: _span(**span) for part, span in kept.items()})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def _span(**milliseconds: float) -> Span:
    """A span that can have been measured.

    Raises:
        TypeError, ValueError: it cannot.
    """
    span = Span(**{name: checks.number(name, value) for name, value in milliseconds.items()})
    fastest, *quartiles = astuple(span)
    if not fastest > 0 or fastest > quartiles[0] * (1 + 1e-6) or sorted(quartiles) != quartiles:
        raise ValueError(f"no call takes {span}")
    return span


def _store(file: Path, text: str) -> None:
    """Keep ``text`` for other processes; where that cannot be written, they measure again."""
    temporary = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, file)
    except OSError as error:
        log.info("times are not kept: %s", error)
