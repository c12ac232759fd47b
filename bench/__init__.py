"""Benchmarks: a denoiser dense, compressed, and as fast as compressing could be, timed side by side."""

from __future__ import annotations

from bigain_fx.passes.errors import BigainError


class BenchError(BigainError, RuntimeError):
    """A benchmark that cannot be run, or whose numbers would mean nothing."""
