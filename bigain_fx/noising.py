"""How a scheduler's model was trained: what it is given at a step, and what it is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigain_fx.families import Units
from bigain_fx.passes import checks
from bigain_fx.passes.errors import InputError

PREDICTIONS = ("epsilon", "v_prediction", "flow_prediction")


class Noising:
    """Noise clean latents as the model of ``scheduler`` saw them in training.

    With ``s`` the share of the signal and ``n`` that of the noise at a step, the model sees ``s * clean + n * noise``.
    It predicts the noise (epsilon), ``s * noise - n * clean`` (v, Salimans and Ho 2022), or the velocity
    ``noise - clean`` of a flow (Lipman et al. 2023), whose timestep is its share of noise; if that runs the other way,
    from noise at 0 to the image, so does the velocity.

    Args:
        scheduler: of diffusers; it is not changed, and what was set for inference does not matter.
        units: the timestep input at the noisiest of the training steps and at the clean end.

    Raises:
        InputError: the model of the scheduler predicts something else.
    """

    def __init__(self, scheduler: Any, units: Units) -> None:
        config: Any = getattr(scheduler, "config", None)
        if not hasattr(config, "num_train_timesteps"):
            raise InputError(f"{checks.told('scheduler', scheduler)} must be the diffusers scheduler of the model")
        self.steps: int = config.num_train_timesteps
        self.units = units
        alphas = getattr(scheduler, "alphas_cumprod", None)
        self.prediction = config.get("prediction_type", "flow_prediction" if alphas is None else "epsilon")
        if self.prediction not in PREDICTIONS:
            raise InputError(f"prediction_type={self.prediction!r} of the scheduler must be one of {PREDICTIONS}")
        if self.prediction == "flow_prediction":
            # As made, before set_timesteps: the share of noise at every training step, the noisiest first.
            share = type(scheduler).from_config(config).sigmas[: self.steps].flip(0).double()
            self._signal, self._noise, self._time = 1 - share, share, share * self.steps
        else:
            cumulative = alphas.double()  # type: ignore[union-attr]
            self._signal, self._noise = cumulative.sqrt(), (1 - cumulative).sqrt()
            self._time = torch.arange(self.steps).double()

    def __call__(self, clean: Tensor, noise: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the model is given, what it should answer, and its timestep input.

        Args:
            clean, noise: ``(B, ...)``, of one dtype.
            steps: ``(B,)`` int64 from 0 (clean) to ``steps - 1``.

        Returns:
            Noisy latents and targets, shaped as ``clean`` and in its dtype; timesteps ``(B,)``, int64 where the model
            counts its steps in whole numbers, else float32.
        """
        signal, spread, time = (table.to(steps.device)[steps] for table in (self._signal, self._noise, self._time))
        signal, spread = (share.view(-1, *[1] * (clean.ndim - 1)).to(clean.dtype) for share in (signal, spread))
        noisy = signal * clean + spread * noise
        target = noise
        if self.prediction == "v_prediction":
            target = signal * noise - spread * clean
        elif self.prediction == "flow_prediction":
            target = noise - clean if self.units[0] > self.units[1] else clean - noise
        return noisy, target, self._timesteps(time)

    def _timesteps(self, time: Tensor) -> Tensor:
        noisy, clean = self.units
        timesteps = clean + (noisy - clean) * time / (self.steps - 1)
        whole = self.prediction != "flow_prediction" and (noisy, clean) == (self.steps - 1, 0)
        return timesteps.round().long() if whole else timesteps.float()
