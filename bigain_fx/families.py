"""What differs between families of denoisers: the units of the timestep, and the inputs that tell the token grid.

Both are read from the sources of the pipelines of diffusers 0.42, family by family. Nothing else in this project knows
one denoiser from another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from bigain_fx.passes.alpha import LinearAlpha
from bigain_fx.passes.checks import told
from bigain_fx.passes.errors import GridError, InputError, MethodError, first_line
from bigain_fx.passes.images import Grid, Grids, Hint, as_grids, as_hint, tokens_on
from bigain_fx.passes.methods import KVDownsample, Method, Methods

GridHint = Hint | Sequence[Grid] | Callable[[Mapping[str, Any]], Hint | Sequence[Grid] | None] | None
Units = tuple[float, float]
STEPS: Units = (999, 0)
FRACTION: Units = (0.999, 0)
REVERSED: Units = (0.001, 1)
REVERSED_STEPS: Units = (1, 1000)


def _sana(config: Any) -> Units:
    """Sprint, which alone embeds the guidance scale, takes the noise level; the others scaled steps."""
    if getattr(config, "guidance_embeds", False):
        return FRACTION
    scale = getattr(config, "timestep_scale", 1)
    return STEPS[0] * scale, STEPS[1] * scale


UNITS: Mapping[str, Units | Callable[[Any], Units]] = {
    **dict.fromkeys((
        "UNet2DModel", "UNet2DConditionModel", "UNet3DConditionModel", "UNetMotionModel", "UNetControlNetXSModel",
        "I2VGenXLUNet", "Kandinsky3UNet", "DreamLiteUNetModel", "AudioLDM2UNet2DConditionModel",
        "ControlNetModel", "ControlNetUnionModel", "SparseControlNetModel",
        "DiTTransformer2DModel", "PixArtTransformer2DModel", "LatteTransformer3DModel", "HunyuanDiT2DModel",
        "HunyuanDiT2DControlNetModel", "SD3Transformer2DModel", "SD3ControlNetModel", "CogView3PlusTransformer2DModel",
        "CogView4Transformer2DModel", "CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel",
        "AllegroTransformer3DModel", "AnyFlowTransformer3DModel", "AnyFlowFARTransformer3DModel",
        "BriaTransformer2DModel", "BriaFiboTransformer2DModel", "ChronoEditTransformer3DModel",
        "EasyAnimateTransformer3DModel", "ErnieImageTransformer2DModel", "GlmImageTransformer2DModel",
        "HeliosTransformer3DModel", "HiDreamImageTransformer2DModel", "HunyuanImageTransformer2DModel",
        "HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel", "HunyuanVideoFramepackTransformer3DModel",
        "JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel", "Kandinsky5Transformer3DModel",
        "Kandinsky6Transformer3DModel", "Kandinsky6SRTransformer3DModel", "LTXVideoTransformer3DModel",
        "LTX2VideoTransformer3DModel", "MotifVideoTransformer3DModel", "SanaControlNetModel",
        "SanaVideoTransformer3DModel", "SanaWMTransformer3DModel", "SkyReelsV2Transformer3DModel",
        "WanTransformer3DModel", "WanAnimateTransformer3DModel", "WanVACETransformer3DModel",
    ), STEPS),
    **dict.fromkeys((
        "FluxTransformer2DModel", "FluxControlNetModel", "Flux2Transformer2DModel", "Flux3Transformer2DModel",
        "ChromaTransformer2DModel", "QwenImageTransformer2DModel", "QwenImage21Transformer2DModel",
        "QwenImageControlNetModel", "AuraFlowTransformer2DModel", "BriaFibo2Transformer2DModel",
        "Krea2Transformer2DModel", "LongCatImageTransformer2DModel", "NucleusMoEImageTransformer2DModel",
        "OvisImageTransformer2DModel", "PRXTransformer2DModel",
    ), FRACTION),
    **dict.fromkeys((
        "LuminaNextDiT2DModel", "Lumina2Transformer2DModel", "ZImageTransformer2DModel", "ZImageControlNetModel",
        "Ideogram4Transformer2DModel",
    ), REVERSED),
    "MochiTransformer3DModel": REVERSED_STEPS,
    "SanaTransformer2DModel": _sana,
}  # fmt: skip
"""The timestep input at the noisiest of 1,000 steps and at the clean end, by the class of the denoiser.

A pipeline passes its scheduler's step ``t`` (999 to 0), ``t / 1000``, ``1 - t / 1000`` or ``1000 - t``. Not here are
families whose pipelines disagree, or whose units hang on the scheduler alone: Cosmos, OmniGen, Stable Video Diffusion.
"""


def resolve(methods: Methods, model: nn.Module | None) -> Methods:
    """Fill in the ends of every :class:`LinearAlpha` that names none, in the units of the family of ``model``.

    Raises:
        MethodError: there is one, and the family is not in :data:`UNITS`.
    """
    return tuple(_resolve(method, model) for method in methods)


def _resolve(method: Method, model: nn.Module | None) -> Method:
    if not isinstance(method, KVDownsample) or not isinstance(method.alpha, LinearAlpha):
        return method
    if method.alpha.t_noisy is not None:
        return method
    units = timestep_units(model)
    if units is None:
        family = "the model" if model is None else type(model).__name__
        raise MethodError(
            f"alpha={method.alpha!r}: the units in which {family} takes its timestep are not known; name them, as in "
            "LinearAlpha(t_noisy=999, t_clean=0)"
        )
    return replace(method, alpha=replace(method.alpha, t_noisy=units[0], t_clean=units[1]))


def timestep_units(model: object) -> Units | None:
    """The timestep input of ``model`` at the noisiest of 1,000 steps and at the clean end; None if not known."""
    names = [kind.__name__ for kind in type(model).__mro__]
    known = next((UNITS[name] for name in names if name in UNITS), None)
    return known(getattr(model, "config", None)) if callable(known) else known


@dataclass(frozen=True)
class Reading:
    """What the inputs tell of the images in one sequence of tokens.

    Attributes:
        grid: ``(rows, columns)`` of the image, or those of each; None where they do not tell.
        reason: why an input that should tell it does not.
        starts: where images or frames begin among the tokens, if that is all that they tell.
    """

    grid: Hint | None = None
    reason: str = ""
    starts: tuple[int, ...] = ()


class GridReader:
    """Reads the ``(rows, columns)`` of the image tokens from the inputs of one call, one pair for each image.

    Two inputs tell it: ``img_ids``, ``(N, 3)`` or more columns, or ``(B, N, ...)``, the second and third columns being
    row and column, and the others the same for all tokens of an image; and ``img_shapes``, ``(frames, rows, columns)``
    of the images of each sample. To read ids is to wait for their device: they are read once for each tensor, and again
    if it was written to. Tensors made in inference mode do not tell whether they were, and are read every time.
    """

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()

    def __call__(self, arguments: Mapping[str, Any]) -> Reading:
        """The grid of the canonical keyword arguments of one call."""
        if isinstance(ids := arguments.get("img_ids"), Tensor):
            if ids.is_inference():
                return _read_ids(ids)
            version, reading = self._known.get(ids, (None, Reading()))
            if version != ids._version:
                reading = _read_ids(ids)
                self._known[ids] = ids._version, reading
            return reading  # type: ignore[no-any-return]
        shapes = arguments.get("img_shapes")
        return _read_shapes(shapes) if isinstance(shapes, list | tuple) and shapes else Reading()


def _read_ids(ids: Tensor) -> Reading:
    if ids.is_meta or ids.ndim not in (2, 3) or ids.shape[-1] < 3 or not ids.numel():
        where = "on the meta device" if ids.is_meta else f"of shape {tuple(ids.shape)}"
        return Reading(reason=f"img_ids is {where}, which tells no grid; pass grid=")
    rows_of = ids.detach().double().cpu().reshape(-1, *ids.shape[-2:])
    one = rows_of[0]
    kept = [column for column in range(one.shape[1]) if column not in (1, 2)]
    other = (rows_of[:, 1:, kept] != rows_of[:, :-1, kept]).any(-1)
    images = _starts(other)
    told = _starts(other | (rows_of[:, 1:, 1] < rows_of[:, :-1, 1]))
    if not torch.equal(rows_of, one.expand_as(rows_of)):
        return Reading(None, "img_ids differs from sample to sample; pass grid=", told)
    grids = [_grid_of(image) for image in one.tensor_split(images[1:])]
    if all(grids):
        return Reading(as_hint(tuple(grid for grid in grids if grid)))
    of = "each image or frame" if len(grids) > 1 else "the image"
    reason = f"img_ids does not run through {of} in rows of equal columns, one after another; pass grid="
    return Reading(None, reason, told)


def _starts(new: Tensor) -> tuple[int, ...]:
    """The first token, and those that ``new (B, N - 1)`` marks in any sample."""
    return (0, *(new.any(0).nonzero().flatten() + 1).tolist())


def _grid_of(ids: Tensor) -> Grid | None:
    """The grid of one image with these ``ids (N, columns)``, if they run through its rows."""
    row, column = ids[:, 1], ids[:, 2]
    width = int((row == row[0]).long().cumprod(0).sum())
    if len(ids) % width:
        return None
    rows, columns = row.view(-1, width), column.view(-1, width)
    product = (rows == rows[:, :1]).all() and (columns == columns[:1]).all()
    ordered = (rows[:, 0].diff() > 0).all() and (columns[0].diff() > 0).all()
    return (len(ids) // width, width) if product and ordered else None


def _read_shapes(shapes: Sequence[Any]) -> Reading:
    """From ``[(frames, rows, columns), ...]``, one for each sample, or lists of them, one for each image."""
    try:
        samples = [
            [(int(frames), int(rows), int(columns)) for frames, rows, columns in _images(sample)] for sample in shapes
        ]
    except (TypeError, ValueError, IndexError):
        return Reading(reason=f"img_shapes={shapes!r} is not (frames, rows, columns) for each image; pass grid=")
    pictures = [[grid for frames, *grid in sample for _ in range(frames)] for sample in samples]
    told = {start for sample in pictures for start in [0, *accumulate(rows * columns for rows, columns in sample)][:-1]}
    starts = tuple(sorted(told))
    if any(sample != samples[0] for sample in samples):
        return Reading(None, "img_shapes differs from sample to sample; pass grid=", starts)
    if any(frames != 1 for frames, _, _ in samples[0]):
        return Reading(None, "img_shapes names frames of a video; pass grid=, one for each, if they are images", starts)
    return Reading(as_hint(tuple((rows, columns) for _, rows, columns in samples[0])))


def _images(sample: Any) -> Sequence[Any]:
    return (sample,) if isinstance(sample[0], int) else sample


def grid_for(hint: GridHint, arguments: Mapping[str, Any], read: Reading) -> Reading:
    """The grids that the caller gives, or a function of the arguments; else what was ``read``.

    Raises:
        GridError: what the caller gives is no pair nor a list of pairs, contradicts the inputs, is for a video, or
            raises an error.
    """
    given = _ask(hint, arguments) if callable(hint) else hint
    if given is None:
        return read
    grids = as_grids(given)
    frames = arguments.get("num_frames")
    if isinstance(frames, int) and frames > 1:
        raise GridError(
            f"grid={given!r}: the tokens are those of num_frames={frames}; a grid is one image, not a video"
        )
    if against := _against(grids, read):
        ask = "" if read.grid else "; give the grid of each"
        raise GridError(f"grid={given!r} contradicts the inputs, {against}{ask}")
    return Reading(as_hint(grids))


def _against(grids: Grids, read: Reading) -> str:
    """What ``read`` tells against ``grids``, if anything."""
    if read.grid not in (None, as_hint(grids)):
        return f"whose grid is {read.grid}"
    starts = (0, *accumulate(rows * columns for rows, columns in grids[:-1]))
    if len(read.starts) > 1 and read.starts != starts:
        more = " and so on" if len(read.starts) > 4 else ""
        return f"whose images or frames begin at the tokens {list(read.starts[:4])}{more}"
    return ""


def built_in(grids: Sequence[Hint], read: Reading) -> Hint:
    """Return the one of ``grids``, of fixed graphs of equal shapes, that the inputs tell.

    Raises:
        InputError: they split the tokens into other images or rows, or do not tell which of several it is.
    """
    against = {grid: _against(as_grids(grid), read) if _is_of_all(as_grids(grid), read) else "" for grid in grids}
    fitting = [grid for grid, contradiction in against.items() if not contradiction]
    if len(fitting) == 1:
        return fitting[0]
    made = " or ".join(map(str, grids))
    if fitting:
        raise InputError(f"there are graphs for the grids {made}, and these inputs do not tell which: {read.reason}")
    raise InputError(
        f"the graph is made for the grid {made}, not for these inputs, {against[grids[0]]}; export that grid too"
    )


def _is_of_all(grids: Grids, read: Reading) -> bool:
    """Whether ``grids`` are of all tokens that were read: a graph may have found that of a part, such as a frame."""
    tokens = tokens_on(grids)
    return tokens_on(as_grids(read.grid)) == tokens if read.grid else read.starts[-1:] < (tokens,)


def _ask(hint: Callable[[Mapping[str, Any]], Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return hint(arguments)
    except Exception as error:
        raise GridError(f"{told('grid', hint)} raises {type(error).__name__}: {first_line(error)}") from error


def attention_backend() -> object:
    """The backend that diffusers' attention takes where nothing else was chosen; None without diffusers."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    return getattr(getattr(dispatch, "_AttentionBackendRegistry", None), "_active_backend", None)
