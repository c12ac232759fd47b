"""Zero-shot classification by a denoiser: the class whose condition leaves the smallest denoising error.

Li et al., *Your Diffusion Model is Secretly a Zero-Shot Classifier*, ICCV 2023 (``docs/operators.md``,
"Classification"). Compression loses the classes' small differences in error first, which is what BiGain is measured by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bigain_fx.families import Units, timestep_units
from bigain_fx.noising import Noising
from bigain_fx.passes import checks
from bigain_fx.passes.errors import InputError
from bigain_fx.sample import predict


@dataclass(frozen=True, eq=False)
class Classification:
    """The denoising errors of n images under each class, and what follows from them.

    Attributes:
        errors: ``(n, classes)`` float64, the mean squared error averaged over the pairs that the class has seen.
        pairs: ``(n, classes)`` int64, how many those are: fewer for a class that was dropped early.
        calls: denoiser calls made.
    """

    errors: Tensor
    pairs: Tensor
    calls: int

    @property
    def ranked(self) -> Tensor:
        """``(n, classes)`` int64, the classes of each image: those of most pairs first, then by error."""
        most = self.pairs.max()
        by_error = self.errors.argsort(dim=1, stable=True)
        return by_error.gather(1, (most - self.pairs).gather(1, by_error).argsort(dim=1, stable=True))

    @property
    def predicted(self) -> Tensor:
        """``(n,)`` int64, the class of smallest error."""
        return self.ranked[:, 0]

    @property
    def runner_up(self) -> Tensor:
        """``(n,)`` int64, the class that came second."""
        return self.ranked[:, 1]

    @property
    def margin(self) -> Tensor:
        """``(n,)`` float64, by how much the runner-up's error is larger."""
        best = self.errors.gather(1, self.ranked[:, :2])
        return best[:, 1] - best[:, 0]


class DiffusionClassifier:
    """Classifies images by the denoising error of ``denoiser`` under each class, without guidance.

    Classes are dropped in rounds: after ``n_samples[i]`` pairs of timestep and noise the ``to_keep[i]`` best go on. The
    pairs of an image are the same for every class, denoiser, method, batch size and device. All calls have one shape,
    so that a compiled denoiser is compiled once.

    Args:
        denoiser: takes the latents, ``timestep=``, the conditions, ``inputs`` and ``return_dict=False``: a diffusers
            denoiser, or what :func:`bigain_fx.optimize`, :class:`bigain_fx.OrtDenoiser` or
            :func:`bigain_fx.load_package` make of one. A learned variance is dropped.
        scheduler: the diffusers scheduler of the model; it says how latents are noised, and what is predicted:
            ``epsilon``, ``v_prediction``, or the velocity of a flow. It is not changed.
        conditions: keyword arguments of the denoiser, whose tensors have one row per class; mappings within
            (``added_cond_kwargs``) are followed.
        inputs: further keyword arguments, the same in every call (``img_ids``, or a guidance scale of ``batch`` rows).
        n_samples: pairs for each class that is still in play, in all, round by round; ascending.
        to_keep: how many classes are left after each round; descending to 1.
        batch: rows of each call, filled across images, pairs and classes; the last call of a round is padded.
        seed: of the pairs.
        units: the timestep input at the noisiest of the training steps and at the clean end, such as ``(999, 0)``;
            None: those of the denoiser's family.

    Raises:
        InputError: a value that is out of range, conditions with different numbers of rows, units that are not known,
            or a scheduler whose model predicts something else.
    """

    def __init__(
        self,
        denoiser: Callable[..., Any],
        scheduler: Any,
        conditions: Mapping[str, Any],
        *,
        inputs: Mapping[str, Any] | None = None,
        n_samples: Sequence[int] = (5, 20),
        to_keep: Sequence[int] = (5, 1),
        batch: int = 16,
        seed: int = 0,
        units: Units | None = None,
    ) -> None:
        if not callable(denoiser):
            raise InputError(f"{checks.told('denoiser', denoiser)} must be a denoiser, which is called")
        self.denoiser, self.conditions = denoiser, checks.keywords("conditions", conditions)
        self.inputs = {} if inputs is None else dict(checks.keywords("inputs", inputs))
        self.classes = _count(conditions)
        self.n_samples, self.to_keep = check_rounds(n_samples, to_keep)
        self.batch = checks.integer("batch", batch, least=1, most=checks.MANY)
        self.seed = checks.integer("seed", seed, least=-checks.SEED, most=checks.SEED)
        model = getattr(denoiser, "original", denoiser)
        known = timestep_units(model) if units is None else _check_units(units)
        if known is None:
            raise InputError(
                f"units=None: those in which {type(model).__name__} takes its timestep are not known; name them, as in "
                "units=(999, 0)"
            )
        self.noising = Noising(scheduler, known)

    def draw_pairs(self, shape: Sequence[int], image: int) -> tuple[Tensor, Tensor]:
        """The pairs ``(steps (pairs,) int64, noise (pairs, *shape) float32)`` of image number ``image``, on the CPU.

        Steps are uniform over the training steps. The draw depends on the seed, ``n_samples[-1]`` and the arguments.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + image)
        pairs = self.n_samples[-1]
        steps = torch.randint(self.noising.steps, (pairs,), generator=generator)
        return steps, torch.randn((pairs, *shape), generator=generator)

    def __call__(
        self, latents: Tensor, *, first: int = 0, progress: Callable[[], object] | None = None
    ) -> Classification:
        """Classify ``latents (n, ...)``, clean, in the dtype and on the device of the weights.

        Args:
            latents: what the denoiser takes: latents of :func:`encode`, or images in [-1, 1] if it works on pixels.
            first: the number of the first image, which decides on its pairs; the others follow.
            progress: called after each denoiser call.

        Raises:
            InputError: latents that are none, or not finite; or whose errors are not, as where float16 overflows.
        """
        _check_latents(latents)
        checks.integer("first", first, least=0, most=checks.SEED)
        checks.function("progress", progress)
        n = len(latents)
        total = torch.zeros(n, self.classes, dtype=torch.float64)
        seen = torch.zeros(n, self.classes, dtype=torch.int64)
        left = torch.arange(self.classes).expand(n, -1)
        calls = done = 0
        for samples, keep in zip(self.n_samples, self.to_keep, strict=True):
            calls += self._round(latents, first, range(done, samples), left, total, progress)
            seen.scatter_(1, left, samples)
            if len(wrong := (~total.isfinite()).nonzero()):
                image, label = wrong[0].tolist()
                raise InputError(f"latents[{image}]: what the denoiser answers for class {label} is not finite")
            order = total.gather(1, left).argsort(dim=1, stable=True)
            left = left.gather(1, order)[:, :keep]
            done = samples
        return Classification(total / seen, seen, calls)

    def _round(self, latents: Tensor, first: int, pairs: range, left: Tensor, total: Tensor, progress: Any) -> int:
        """Add the squared errors of ``pairs`` for the classes ``left (n, k)`` to ``total``; return the calls made."""
        kept = left.shape[1]
        items = len(latents) * len(pairs) * kept
        drawn: dict[int, tuple[Tensor, Tensor]] = {}
        for start in range(0, items, self.batch):
            item = torch.arange(start, min(start + self.batch, items))
            image, pair = item // (len(pairs) * kept), pairs.start + item // kept % len(pairs)
            label = left[image, item % kept]
            chosen = list(zip(image.tolist(), pair.tolist(), strict=True))
            drawn = {
                i: drawn[i] if i in drawn else self.draw_pairs(latents.shape[1:], first + i)
                for i in {i for i, _ in chosen}
            }
            steps = torch.stack([drawn[i][0][p] for i, p in chosen]).to(latents.device)
            noise = torch.stack([drawn[i][1][p] for i, p in chosen]).to(latents)
            clean = latents[image.to(latents.device)]
            noisy, target, timesteps = self.noising(clean, noise, steps)
            output = predict(
                self.denoiser, self._condition, noisy, timesteps, label.to(latents.device), batch=self.batch,
                progress=progress,
            )  # fmt: skip
            squared = (output.float() - target.float()).square().flatten(1).mean(1).double().cpu()
            total.index_put_((image, label), squared, accumulate=True)
        return math.ceil(items / self.batch)

    def _condition(self, labels: Tensor) -> dict[str, Any]:
        return _rows(self.conditions, labels) | self.inputs


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> Tensor:
    """Latents ``(n, c, h, w)`` of ``images (n, 3, H, W)`` in [-1, 1] by a diffusers autoencoder, for its denoiser.

    The mode of its distribution is taken, so that the same image always has the same latent.
    """
    config = vae.config
    latents: Tensor = (
        vae.encode(images).latent_dist.mode() - (config.get("shift_factor") or 0)
    ) * config.scaling_factor
    return latents


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion (95 % by default), within [0, 1] and honest at small ``total``."""
    checks.integer("total", total, least=1)
    checks.integer("correct", correct, least=0, most=total)
    share, denominator = correct / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / denominator
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / denominator
    return max(0.0, centre - half), min(1.0, centre + half)


def check_rounds(n_samples: Sequence[int], to_keep: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The rounds of a classification, as plain tuples.

    Raises:
        InputError: they are no integers, do not ascend and descend, or are not as many.
    """
    n_samples = checks.integers("n_samples", n_samples, right="integers, one for each round, such as (5, 20)")
    to_keep = checks.integers("to_keep", to_keep, right="integers, one for each round, such as (5, 1)")
    ascending = all(a < b for a, b in pairwise((0, *n_samples)))
    descending = all(a > b for a, b in pairwise(to_keep)) and to_keep[-1:] == (1,)
    if not ascending or not descending or len(n_samples) != len(to_keep):
        raise InputError(
            f"n_samples={n_samples} must ascend from 1 or more, and to_keep={to_keep} descend to 1, one for each round"
        )
    checks.integer("n_samples", n_samples[-1], least=1, most=checks.MANY)
    return n_samples, to_keep


def _check_units(units: Any) -> Units:
    right = "two different numbers, the timestep at the noisiest and at the clean end, such as (999, 0)"
    if not isinstance(units, tuple | list) or len(units) != 2:
        raise InputError(f"{checks.told('units', units)} must be {right}")
    noisy, clean = (checks.number("units", end, right=right) for end in units)
    if noisy == clean:
        raise InputError(f"{checks.told('units', units)} must be {right}")
    return noisy, clean


def _check_latents(latents: Any) -> None:
    if not isinstance(latents, Tensor) or latents.ndim < 3 or not len(latents) or not latents.is_floating_point():
        shape = f"{latents.dtype} {tuple(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
        raise InputError(f"latents are {shape}; they must be a floating tensor (n, ...), n at least 1")
    if not latents.isfinite().all():
        image = int((~latents.flatten(1).isfinite()).any(1).nonzero()[0])
        raise InputError(f"latents[{image}] is not finite: it holds NaN or infinity")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for value in tree.values() for leaf in (_tensors(value) if isinstance(value, Mapping) else [value])]


def _count(conditions: Mapping[str, Any]) -> int:
    leaves = _tensors(conditions)
    counts = {len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in leaves}
    count = counts.pop() if len(counts) == 1 else None
    if count is None or count < 2:
        shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]
        raise InputError(
            f"conditions have shapes {shapes}; all must be tensors with one row for each of two or more classes"
        )
    return count


def _rows(tree: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
    return {
        name: _rows(value, index) if isinstance(value, Mapping) else value.to(index.device)[index]
        for name, value in tree.items()
    }
