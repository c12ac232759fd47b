"""Schedules of alpha: a value, like the methods that hold them."""

from __future__ import annotations

from dataclasses import dataclass

from bigain_fx.passes import checks
from bigain_fx.passes.errors import MethodError


@dataclass(frozen=True)
class LinearAlpha:
    """Alpha of :class:`KVDownsample`, linear in the timestep and clamped outside (paper, IE-KVD).

    Attributes:
        noisy, clean: alpha at ``t_noisy`` and at ``t_clean``.
        t_noisy, t_clean: the ends, in the units in which the model takes its timestep, such as 999 and 0; Flux, for
            one, takes t / 1000. None for both: the units of the model's family, filled in before a graph is rewritten.
    """

    noisy: float = 0.8
    clean: float = 1.2
    t_noisy: float | None = None
    t_clean: float | None = None

    def __post_init__(self) -> None:
        if (self.t_noisy is None) != (self.t_clean is None):
            raise MethodError(f"t_noisy={self.t_noisy!r}, t_clean={self.t_clean!r}: give both ends, or neither")
        for name in ("noisy", "clean") if self.t_noisy is None else ("noisy", "clean", "t_noisy", "t_clean"):
            object.__setattr__(self, name, checks.number(name, getattr(self, name), error=MethodError))
        if self.t_noisy is None:
            return
        if self.t_noisy == self.t_clean:
            raise MethodError(f"t_noisy={self.t_noisy!r} equals t_clean: the two ends of the schedule must differ")

    @property
    def ends(self) -> tuple[float, float, float, float]:
        """``noisy, clean, t_noisy, t_clean``, as floats.

        Raises:
            MethodError: the units of the timestep were not given.
        """
        if self.t_noisy is None or self.t_clean is None:
            raise MethodError("t_noisy=None: name both ends in the model's timestep units, such as 999 and 0")
        return float(self.noisy), float(self.clean), float(self.t_noisy), float(self.t_clean)
