"""Zero-shot classification by a denoiser: the class whose condition leaves the smallest denoising error.

Li et al., *Your Diffusion Model is Secretly a Zero-Shot Classifier*, ICCV 2023: the plain loop, all pairs for all
classes. Compression loses the classes' small differences in error first, which is what BiGain is measured by.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigain_fx.embedded import ClassConditional
from bigain_fx.passes.errors import InputError
from bigain_fx.sample import predict


@dataclass(frozen=True, eq=False)
class Classification:
    """The denoising errors of n images under each class, and what follows from them.

    Attributes:
        errors: ``(n, classes)`` float64, the mean squared error averaged over the pairs.
        calls: denoiser calls made.
    """

    errors: Tensor
    calls: int

    @property
    def predicted(self) -> Tensor:
        """``(n,)`` int64, the class of smallest error."""
        return self.errors.argmin(dim=1)

    @property
    def margin(self) -> Tensor:
        """``(n,)`` float64, by how much the runner-up's error is larger."""
        best = self.errors.topk(2, dim=1, largest=False).values
        return best[:, 1] - best[:, 0]


def draw_pairs(bundle: ClassConditional, pairs: int, seed: int, image: int) -> tuple[Tensor, Tensor]:
    """The pairs ``(timesteps (pairs,) int64, noise (pairs, C, H, W) float32)`` of image number ``image``, on the CPU.

    Timesteps are uniform over the scheduler's training steps. The draw depends on nothing else: the pairs of an image
    are the same for every class, denoiser, method, batch size and device.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + image)
    timesteps = torch.randint(bundle.scheduler.config.num_train_timesteps, (pairs,), generator=generator)
    return timesteps, torch.randn((pairs, *bundle.sample_shape), generator=generator)


def classify(
    denoiser: nn.Module,
    bundle: ClassConditional,
    images: Tensor,
    *,
    pairs: int,
    batch: int,
    seed: int = 0,
    progress: Callable[[], object] | None = None,
) -> Classification:
    """Classify ``images`` by the denoising error of ``denoiser`` under each class, without guidance.

    It takes ``ceil(n * pairs * classes / batch)`` denoiser calls of one shape, and the memory of one of them: noise is
    drawn image by image, as the batches reach it.

    Args:
        denoiser: ``bundle.model``, or what :func:`bigain_fx.optimize` made of it.
        bundle: how a class becomes a condition, how an image is noised, what the denoiser predicts.
        images: ``(n, C, H, W)`` clean latents, in the dtype and on the device of the weights.
        pairs: (timestep, noise) pairs for each image; see :func:`draw_pairs`.
        batch: rows of each denoiser call, filled across classes, pairs and images; the last call is padded.
        seed: of the pairs.
        progress: called after each denoiser call.

    Raises:
        InputError: ``pairs`` or ``batch`` below 1, images of another shape, or a scheduler whose denoiser predicts
            something other than epsilon or v.
    """
    if pairs < 1 or batch < 1:
        raise InputError(f"pairs={pairs!r} and batch={batch!r} must both be at least 1")
    if images.ndim != 4 or tuple(images.shape[1:]) != bundle.sample_shape:
        raise InputError(f"images have shape {tuple(images.shape)}; they must be {('n', *bundle.sample_shape)}")
    prediction = bundle.scheduler.config.get("prediction_type")
    if prediction not in ("epsilon", "v_prediction"):
        raise InputError(f"prediction_type={prediction!r} of the scheduler must be 'epsilon' or 'v_prediction'")
    of_image = pairs * bundle.num_classes
    total = len(images) * of_image
    errors = torch.zeros(len(images) * bundle.num_classes, dtype=torch.float64)
    drawn: dict[int, tuple[Tensor, Tensor]] = {}
    for start in range(0, total, batch):
        items = torch.arange(start, min(start + batch, total))
        image, pair, label = items // of_image, items // bundle.num_classes % pairs, items % bundle.num_classes
        chosen = list(zip(image.tolist(), pair.tolist(), strict=True))
        drawn = {i: drawn[i] if i in drawn else draw_pairs(bundle, pairs, seed, i) for i in {i for i, _ in chosen}}
        timesteps = torch.stack([drawn[i][0][p] for i, p in chosen]).to(images.device)
        noise = torch.stack([drawn[i][1][p] for i, p in chosen]).to(images)
        clean = images[image.to(images.device)]
        noisy = bundle.scheduler.add_noise(clean, noise, timesteps)
        target = _target(bundle.scheduler, prediction, clean, noise, timesteps)
        output = predict(denoiser, bundle, noisy, timesteps, label.to(images.device), batch=batch, progress=progress)
        squared = (output.float() - target.float()).square().flatten(1).mean(1).double().cpu()
        errors.index_add_(0, image * bundle.num_classes + label, squared / pairs)
    return Classification(errors.view(len(images), bundle.num_classes), math.ceil(total / batch))


def _target(scheduler: Any, prediction: str, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    if prediction == "epsilon":
        return noise
    velocity: Tensor = scheduler.get_velocity(clean, noise, timesteps)
    return velocity


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion (95 % by default), within [0, 1] and honest at small ``total``."""
    share, denominator = correct / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / denominator
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / denominator
    return max(0.0, centre - half), min(1.0, centre + half)
