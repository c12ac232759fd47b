"""Sampling from a class-conditional denoiser, in calls of one fixed batch shape."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bigain_fx.embedded import ClassConditional
from bigain_fx.passes import checks
from bigain_fx.passes.errors import InputError


def predict(
    denoiser: Callable[..., Any],
    condition: Callable[[Tensor], Mapping[str, Any]],
    x: Tensor,
    timesteps: Tensor,
    labels: Tensor,
    *,
    batch: int,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    """Call ``denoiser`` on any number of rows, ``batch`` at a time; the last call is padded, its padding dropped.

    Every call has the same shapes, timesteps included: one compiled graph serves sampling and classification.

    Args:
        denoiser: a diffusers denoiser, or what :func:`bigain_fx.optimize` made of it.
        condition: the keyword arguments of the denoiser for ``(batch,)`` int64 labels.
        x: ``(n, C, ...)``, in the dtype and on the device of the weights.
        timesteps: ``(n,)``.
        labels: ``(n,)`` int64.
        batch: rows of each call.
        progress: called after each of the ``ceil(n / batch)`` calls.

    Returns:
        ``(n, C, ...)``; a learned variance is dropped.

    Raises:
        InputError: ``batch`` is no number of rows.
    """
    checks.integer("batch", batch, least=1, most=checks.MANY)
    channels = x.shape[1]
    outputs = []
    for start in range(0, len(x), batch):
        rows = torch.arange(start, start + batch, device=x.device).clamp_(max=len(x) - 1)
        with torch.no_grad():
            given = condition(labels[rows])
            output: Tensor = denoiser(x[rows], timestep=timesteps[rows], **given, return_dict=False)[0]
        outputs.append(output[: len(x) - start, :channels])
        if progress is not None:
            progress()
    return torch.cat(outputs)


def sample(
    denoiser: nn.Module,
    bundle: ClassConditional,
    labels: Tensor,
    *,
    steps: int,
    guidance: float | None,
    noise: Tensor,
    batch: int,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    """Generate one image per label with the bundle's scheduler; the same noise gives every denoiser the same start.

    Args:
        denoiser: ``bundle.model``, or what :func:`bigain_fx.optimize` made of it.
        bundle: its scheduler (DDIM for the embedded denoisers) is copied, never changed.
        labels: ``(n,)`` int64 classes.
        steps: denoising steps.
        guidance: scale of classifier-free guidance against the class ``bundle.num_classes``; None and 1 are without,
            at half the calls.
        noise: ``(n, C, H, W)`` standard normal, in the dtype and on the device of the weights.
        batch: rows of each denoiser call; of ``2 n`` rows a step with guidance, ``n`` without.
        progress: called after each denoiser call.

    Returns:
        ``(n, C, H, W)`` latents, or images, of about [-1, 1].

    Raises:
        InputError: ``steps`` or ``batch`` out of range, ``noise`` of another shape, or a label that is no class.
    """
    trained = bundle.scheduler.config.num_train_timesteps
    checks.integer("steps", steps, least=1, most=trained, right=f"an integer from 1 to the scheduler's {trained}")
    checks.integer("batch", batch, least=1, most=checks.MANY)
    if guidance is not None:
        checks.number("guidance", guidance, right="a finite number, or None")
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype != torch.int64:
        raise InputError(f"{checks.told('labels', labels)} must be a tensor (n,) int64")
    expected = (len(labels), *bundle.sample_shape)
    if not isinstance(noise, Tensor) or tuple(noise.shape) != expected:
        shape = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
        raise InputError(f"noise has shape {shape}; it must be {expected}, one latent per label")
    if not all(0 <= label < bundle.num_classes for label in labels.tolist()):
        raise InputError(f"labels={labels.tolist()} must be classes from 0 to {bundle.num_classes - 1}")
    scheduler = copy.deepcopy(bundle.scheduler)
    scheduler.set_timesteps(steps)
    guided = guidance is not None and guidance != 1
    conditions = torch.cat([labels, torch.full_like(labels, bundle.num_classes)]) if guided else labels
    x: Tensor = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        rows = scheduler.scale_model_input(x, t)
        rows = torch.cat([rows, rows]) if guided else rows
        timesteps = torch.full((len(rows),), int(t), device=x.device)
        output = predict(denoiser, bundle.condition, rows, timesteps, conditions, batch=batch, progress=progress)
        if guidance is not None and guided:
            conditional, unconditional = output.chunk(2)
            output = unconditional + guidance * (conditional - unconditional)
        x = scheduler.step(output, t, x).prev_sample
    return x
