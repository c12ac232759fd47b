"""What was done to each attention of a denoiser, as a value, as a table, as JSON-ready data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from bigain_fx.passes.methods import Methods
from bigain_fx.passes.pipeline import Rewritten, SiteRecord


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

    def rows(self) -> Iterable[tuple[str, ...]]:
        """One row of text per attention: name, action, tokens, grid, GFLOPs, reason."""
        for site in self.sites:
            grid = f"{site.grid[0]}x{site.grid[1]}" if site.grid else "-"
            tokens = str(site.tokens) if site.tokens == site.tokens_after else f"{site.tokens} -> {site.tokens_after}"
            gflops = f"{site.flops / 1e9:.2f}"
            if site.flops_after != site.flops:
                gflops += f" -> {site.flops_after / 1e9:.2f}"
            yield site.name, site.action, tokens, grid, gflops, site.reason

    @property
    def headline(self) -> str:
        """One line: what, how many, how much."""
        asked = " + ".join(map(str, self.methods)) or "dense"
        change = f"{self.flops / 1e9:.2f}"
        if self.flops_after != self.flops:
            change += f" -> {self.flops_after / 1e9:.2f} ({self.flops_after / self.flops - 1:+.1%})"
        return (
            f"{self.model}, {asked}: {len(self.rewritten)} of {len(self.sites)} attentions rewritten; GFLOPs {change}"
        )

    def to_markdown(self) -> str:
        """The headline and a table."""
        lines = [self.headline, "", "| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows()]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        lines = [self.headline]
        for name, action, tokens, grid, gflops, reason in self.rows():
            lines.append(f"  {name}: {action}, tokens {tokens}, grid {grid}, GFLOPs {gflops}; {reason}".rstrip("; "))
        return "\n".join(lines)


COLUMNS = ("attention", "action", "tokens", "grid", "GFLOPs", "reason")
