"""What was done to each attention of a denoiser, as a value, as a table, as JSON-ready data."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from bigain_fx.passes.images import as_grids, text_of
from bigain_fx.passes.methods import Method, Methods
from bigain_fx.passes.pipeline import Rewritten, SiteRecord, left_out

log = logging.getLogger("bigain_fx")

REASONS = 3
"""As many are named where a method changed nothing, the most common first."""


@dataclass(frozen=True)
class Report:
    """The outcome of optimizing (or inspecting) one graph.

    Attributes:
        model: class name of the denoiser.
        methods: what was asked for; empty for dense.
        sites: one record per attention, in graph order.
        flops, flops_after: of the whole graph, for the captured batch.
    """

    model: str
    methods: Methods
    sites: tuple[SiteRecord, ...]
    flops: int
    flops_after: int

    @classmethod
    def of(cls, model: str, methods: Methods, rewritten: Rewritten) -> Report:
        """The report of ``rewritten``."""
        return cls(model, methods, rewritten.records, rewritten.flops, rewritten.flops_after)

    @property
    def rewritten(self) -> tuple[SiteRecord, ...]:
        """The sites that were changed."""
        return tuple(site for site in self.sites if site.action != "kept")

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; methods in the text grammar."""
        data = asdict(self)
        return data | {"methods": [str(method) for method in self.methods], "sites": [asdict(s) for s in self.sites]}

    @property
    def columns(self) -> tuple[str, ...]:
        """What :meth:`rows` hold: milliseconds only where ``select="auto"`` measured some."""
        measured = self.saved_ms is not None
        return ("attention", "action", "tokens", "grid", "GFLOPs", *["ms"] * measured, "reason")

    def rows(self) -> Iterable[tuple[str, ...]]:
        """One row of text per attention."""
        for site in self.sites:
            grid = text_of(as_grids(site.grid)) if site.grid else "-"
            tokens = str(site.tokens) if site.tokens == site.tokens_after else f"{site.tokens} -> {site.tokens_after}"
            gflops = f"{site.flops / 1e9:.2f}"
            if site.flops_after != site.flops:
                gflops += f" -> {site.flops_after / 1e9:.2f}"
            ms = "-" if site.ms is None else f"{site.ms:.3g}"
            if site.ms_after != site.ms:
                ms += f" -> {site.ms_after:.3g}"
            times = [ms] if self.saved_ms is not None else []
            yield site.name, site.action, tokens, grid, gflops, *times, site.reason

    @property
    def headline(self) -> str:
        """One line: what, how many, how much."""
        asked = " + ".join(map(str, self.methods)) or "dense"
        change = f"{self.flops / 1e9:.2f}"
        if self.flops_after != self.flops:
            change += f" -> {self.flops_after / 1e9:.2f} ({self.flops_after / self.flops - 1:+.1%})"
        measured = f"; measured {self.saved_ms:.3g} ms less a call" if self.saved_ms is not None else ""
        return (
            f"{self.model}, {asked}: {len(self.rewritten)} of {len(self.sites)} attentions rewritten; GFLOPs {change}"
            + measured
        )

    @property
    def unchanged(self) -> str | None:
        """Which methods changed no attention, and the most common reasons; None where each of them changed some."""
        idle = [method for method in self.methods if not any(method.kind in site.action for site in self.sites)]
        if not idle:
            return None
        meant = [site for site in self.sites if any(_meant(site, method) for method in idle)] or self.sites
        counts = Counter(general(site.reason) for site in meant)
        why = [f"{reason} ({count} of {len(meant)})" for reason, count in counts.most_common(REASONS)]
        return f"{' + '.join(map(str, idle))} changed nothing: {', '.join(why) or 'there is no attention'}"

    @property
    def saved_ms(self) -> float | None:
        """Milliseconds that a call takes less by the times of its attentions; None where they were not measured."""
        saved = [site.ms - site.ms_after for site in self.sites if site.ms is not None and site.ms_after is not None]
        return sum(saved) if saved else None

    def to_markdown(self) -> str:
        """The headline and a table."""
        lines = [self.headline, "", "| " + " | ".join(self.columns) + " |", "| --- " * len(self.columns) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows()]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        lines = [self.headline]
        for row in self.rows():
            name, action, *details, reason = row
            named = [f"{column} {text}" for column, text in zip(self.columns[2:-1], details, strict=True)]
            lines.append(f"  {name}: {', '.join([action, *named])}; {reason}".rstrip("; "))
        return "\n".join(lines)


def _meant(site: SiteRecord, method: Method) -> bool:
    """Whether ``method`` is for an attention like this one: over an image, and not left out."""
    return site.level is not None and left_out(method, site) is None


def general(reason: str) -> str:
    """``reason`` without the numbers of nodes, which differ from attention to attention."""
    return re.sub(r"\b([a-z]\w*?)_\d+\b", r"\1", re.sub(r" \(at \w+\)$", "", reason))


def announce(report: Report) -> None:
    """Log the headline, at WARNING with the reasons where a method changed nothing."""
    if (unchanged := report.unchanged) is None:
        log.info("%s", report.headline)
    else:
        log.warning("%s; %s", report.headline, unchanged)
