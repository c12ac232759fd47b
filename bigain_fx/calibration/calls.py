"""The calls that a calibration compares: keyword arguments of the denoiser, one timestep each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bigain_fx.passes.checks import told
from bigain_fx.passes.errors import InputError
from bigain_fx.passes.kv import TIMESTEP_INPUTS

Call = Mapping[str, Any]


def step_of(call: Call) -> float:
    """The timestep of ``call``.

    Raises:
        InputError: it has none, or several.
    """
    value = next((call[name] for name in TIMESTEP_INPUTS if name in call), None)
    if value is None:
        raise InputError(f"a call has no {' or '.join(TIMESTEP_INPUTS)} among {', '.join(call)}")
    try:
        distinct = torch.as_tensor(value).double().unique().tolist()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"a call has the timestep {told('value', value)}; give a number or a tensor") from error
    if len(distinct) == 1 and not math.isfinite(distinct[0]):
        raise InputError(f"a call has the timestep {distinct[0]}; give a finite one")
    if len(distinct) != 1:
        raise InputError(f"a call has the timesteps {distinct[:5]}; give one for all of its samples")
    return float(distinct[0])


def output_of(denoiser: Any, call: Call) -> Tensor:
    """What ``denoiser`` answers, float32."""
    output: Tensor = denoiser(**{**call, "return_dict": False})[0]
    return output.float()
