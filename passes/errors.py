"""The errors of the project, one per stage. Each message is one line: the argument, its value, what would be right."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of someone else's error, short enough to be quoted in one of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class BigainError(Exception):
    """Base of every error that bigain-fx raises on purpose."""


class MethodError(BigainError, ValueError):
    """A method, or a combination of methods, that cannot be: a ratio above its cap, two merges at once."""


class GridError(BigainError, ValueError):
    """A grid hint that does not fit the attention it is for."""


class RewriteError(BigainError, RuntimeError):
    """A graph that cannot carry a method: for example no timestep input for an alpha schedule."""


class CaptureError(BigainError, RuntimeError):
    """A model that ``torch.export`` cannot capture; the cause is chained."""


class InputError(BigainError, ValueError):
    """Arguments that the denoiser cannot be called with, or optimized for."""


class ExportError(BigainError, RuntimeError):
    """A graph that cannot be exported, or an exported file that is wrong, cut short or not one of ours."""
