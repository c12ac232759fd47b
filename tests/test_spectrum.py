"""Spectra by a transform in loops, on waves and noise whose spectrum is known, and in denoisers by hooks."""

from __future__ import annotations

import cmath
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import bigain_fx as bgx
from bigain_fx.embedded import ClassConditional
from bigain_fx.evidence.spectrum import Spectra, figure, measure, radial_power
from tests import oracle
from tests.test_sample import _one_thread, tiny, tiny_unet  # noqa: F401
from tests.toys import C, Toy

Pair = tuple[int, int]
Method = bgx.LaplacianMerge | bgx.ToMe | bgx.BlockPool | bgx.KVDownsample | bgx.ToDo


def radius(down: int, across: int, grid: Pair) -> int:
    """The bin of a coefficient: its length in cycles per token, times the shorter side."""
    frequencies = [min(k, side - k) / side for k, side in zip((down, across), grid, strict=True)]
    return round(math.hypot(*frequencies) * min(grid))


def counts(grid: Pair) -> Counter[int]:
    """How many coefficients each bin holds."""
    return Counter(radius(down, across, grid) for down in range(grid[0]) for across in range(grid[1]))


def naive_power(features: Tensor, grid: Pair) -> list[float]:
    """The mean power of each bin, corners too, coefficient by coefficient."""
    h, w = grid
    values = features.double().tolist()
    total: dict[int, float] = dict.fromkeys(counts(grid), 0.0)
    for ky in range(h):
        for kx in range(w):
            turns = [cmath.exp(-2j * math.pi * (ky * (n // w) / h + kx * (n % w) / w)) for n in range(h * w)]
            for sample in values:
                for channel in zip(*sample, strict=True):
                    found = sum(turn * value for turn, value in zip(turns, channel, strict=True)) / math.sqrt(h * w)
                    total[radius(ky, kx, grid)] += abs(found) ** 2
    columns = features.shape[0] * features.shape[2]
    return [total[bin] / counts(grid)[bin] / columns for bin in sorted(total)]


def wave(grid: Pair, down: int, across: int, amplitude: float = 1.0, phase: float = 0.3) -> Tensor:
    """So many cycles down and across the grid: ``(1, N, 1)`` float64."""
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    turns = down * rows / grid[0] + across * columns / grid[1]
    return amplitude * (2 * math.pi * turns + phase).cos().reshape(1, -1, 1)


@pytest.mark.parametrize("grid", [(4, 4), (5, 6), (7, 3), (4, 12)])
def test_is_the_transform_by_hand_and_keeps_all_energy(grid: Pair) -> None:
    features = torch.randn(2, math.prod(grid), 3, dtype=torch.float64)
    every = radial_power(features, grid, corners=True)
    assert every.tolist() == pytest.approx(naive_power(features, grid))
    assert torch.equal(radial_power(features, grid), every[: min(grid) // 2 + 1])
    energy = sum(power * counts(grid)[bin] for bin, power in enumerate(every.tolist()))
    assert energy == pytest.approx(float(features.square().sum()) / (2 * 3))


@pytest.mark.parametrize(
    ("grid", "down", "across", "bin"),
    [((16, 16), 3, 0, 3), ((16, 16), 0, 5, 5), ((16, 16), 3, 4, 5), ((8, 16), 0, 4, 2), ((8, 16), 2, 0, 2),
     ((8, 16), 2, 4, 3), ((16, 8), 4, 0, 2)],
)  # fmt: skip
def test_a_wave_lands_in_its_bin_with_its_power(grid: Pair, down: int, across: int, bin: int) -> None:
    found = radial_power(wave(grid, down, across, amplitude=3.0), grid)
    expected = [0.0] * (min(grid) // 2 + 1)
    expected[bin] = math.prod(grid) * 3.0**2 / 2 / counts(grid)[bin]  # the mean square of a cosine is a half
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


def test_a_constant_is_in_the_first_bin_alone_and_a_checkerboard_in_a_corner() -> None:
    flat, checks = torch.full((1, 64, 2), -2.5), wave((8, 8), 4, 4, phase=0.0)
    assert radial_power(flat, (8, 8)).tolist() == pytest.approx([64 * 2.5**2, 0, 0, 0, 0], abs=1e-6)
    assert radial_power(checks, (8, 8)).tolist() == pytest.approx([0] * 5, abs=1e-9)
    assert radial_power(checks, (8, 8), corners=True).tolist() == pytest.approx([0] * 6 + [64 / counts((8, 8))[6]])


@pytest.mark.parametrize("grid", [(16, 16), (8, 20)])
def test_white_noise_is_flat(grid: Pair) -> None:
    found = radial_power(2 * torch.randn(256, math.prod(grid), 16), grid)
    assert found.tolist() == pytest.approx([4.0] * len(found), rel=0.1)


def test_works_in_float32_or_float64() -> None:
    features = torch.randn(1, 16, 2, dtype=torch.float64)
    assert radial_power(features, (4, 4)).dtype == torch.float64
    assert radial_power(features.half(), (4, 4)).dtype == torch.float32
    expected = radial_power(features.bfloat16().double(), (4, 4))
    torch.testing.assert_close(radial_power(features.bfloat16(), (4, 4)).double(), expected)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            torch.zeros(1, 10, 2),
            r"features has shape \(1, 10, 2\) and dtype torch.float32; it must be floating, \(B, 12, C\)",
        ),
        (torch.zeros(12, 2), r"features has shape \(12, 2\) and dtype"),
        (torch.zeros(1, 12, 2, dtype=torch.int64), "and dtype torch.int64; it must be floating"),
    ],
)
def test_refuses_what_is_not_of_the_grid(features: Tensor, message: str) -> None:
    with pytest.raises(bgx.InputError, match=message):
        radial_power(features, (3, 4))


def inputs_of(bundle: ClassConditional, first: str) -> Callable[[int], dict[str, Tensor]]:
    """The same image under noise that is different, and more, the later the step."""

    def at(timestep: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(timestep)
        x = torch.linspace(-1, 1, 8).expand(2, 1, 8, 8) + timestep / 500 * torch.randn(2, 1, 8, 8, generator=generator)
        condition = {name: value.detach() for name, value in bundle.condition(torch.tensor([0, 2])).items()}
        return {first: x, "timestep": torch.tensor([timestep, timestep]), **condition}

    return at


def read(model: nn.Module, inputs: Mapping[str, Any], path: str) -> Tensor:
    """What the module at ``path`` of the original is given."""
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = model.get_submodule(path).register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]


def squeezed(method: Method, x: Tensor, metric: Tensor, grid: Pair, timestep: int) -> Tensor:
    """What ``method`` leaves of ``x``, on the whole grid again, by the naive operators."""
    if isinstance(method, bgx.KVDownsample | bgx.ToDo):
        alpha: float | list[float] = method.alpha if not isinstance(method.alpha, bgx.LinearAlpha) else \
            oracle.linear_alpha(timestep, len(x), method.alpha.noisy, method.alpha.clean, 999, 0)  # fmt: skip
        small = oracle.kv_downsample(x, alpha, grid, method.factor)
        block = {token: index for index, of in enumerate(oracle.blocks(grid, method.factor)) for token in of}
        return small[:, [block[token] for token in range(math.prod(grid))]]
    merged = oracle.merged_count(grid, (2, 2), method.ratio)
    if isinstance(method, bgx.BlockPool):
        plan = oracle.pool_plan(metric, grid, (2, 2), merged // 3)
    else:
        drawn = isinstance(method, bgx.ToMe)
        chosen = oracle.random_positions(grid, (2, 2), method.seed) if drawn else None
        plan = oracle.merge_plan(metric, grid, (2, 2), merged, chosen)
    return oracle.unmerge(oracle.merge(x, plan), plan)


METHODS: list[Method] = [
    bgx.LaplacianMerge(0.5), bgx.LaplacianMerge(0.7, scope="block"), bgx.ToMe(0.5, seed=3), bgx.BlockPool(0.5),
    bgx.ToDo(2), bgx.ToDo(3), bgx.KVDownsample(2, 0.9),
    bgx.KVDownsample(2, bgx.LinearAlpha(0.8, 1.2)),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("family", ["dit", "unet"])
def test_measures_what_the_first_attention_reads(family: str, method: Method) -> None:
    dit = family == "dit"
    bundle, grid = (tiny(), (4, 4)) if dit else (tiny_unet(), (8, 8))
    block = "transformer_blocks.0" if dit else "down_blocks.0.attentions.0.transformer_blocks.0"
    at, steps = inputs_of(bundle, "hidden_states" if dit else "sample"), (40, 900)
    found = measure(bundle.model, at, method=method, timesteps=steps)
    assert found.sites[0] == f"{block}.attn1"
    assert len(found.sites) == (1 if dit else 3)
    assert found.timesteps == steps
    assert found.frequencies.tolist() == [bin / grid[0] for bin in range(grid[0] // 2 + 1)]
    assert found.before.shape == found.after.shape == (2, len(found.sites), grid[0] // 2 + 1)
    for index, step in enumerate(steps):
        x = read(bundle.model, at(step), f"{block}.attn1")
        metric = x if dit else read(bundle.model, at(step), f"{block}.norm1")
        left = squeezed(method, x, metric, grid, step)
        expected = [torch.tensor(naive_power(tensor, grid)[: grid[0] // 2 + 1]) for tensor in (x, left)]
        torch.testing.assert_close(found.before[index, 0], expected[0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.after[index, 0], expected[1], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.retention[index, 0], expected[1] / expected[0], rtol=1e-2, atol=1e-4)


def looking(image: Tensor, method: Method, model: nn.Module | None = None) -> Tensor:
    """Retention ``(bins,)`` of ``method`` in a toy that reads ``image`` pixel by pixel."""
    model = model or Toy().eval()
    return measure(model, lambda step: {"image": image}, method=method, timesteps=[0]).retention[0, 0]


def test_merging_three_quarters_of_a_smooth_image_keeps_its_low_frequencies() -> None:
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    turns = (rows * math.tau / 24).cos(), (columns * math.tau / 24).cos(), (columns * math.tau / 24).sin()
    kept = looking(torch.stack(turns)[None], bgx.LaplacianMerge(0.75))
    assert kept[:2].tolist() == pytest.approx([1, 1], abs=0.05)


def test_pooling_every_cell_is_averaging_every_block() -> None:
    image, model = torch.randn(2, 3, 8, 8), Toy().eval()
    pooled = looking(image, bgx.BlockPool(0.75), model)
    torch.testing.assert_close(pooled, looking(image, bgx.KVDownsample(2, 0.0), model))
    assert pooled[-1] < 0.2


def test_a_larger_alpha_keeps_more_high_frequencies() -> None:
    """Of noise, a block's row has the variance V(alpha), which it spreads over the spectrum of a 2x2 square."""
    image, grid = torch.randn(48, 3, 16, 16), (16, 16)
    kept = {alpha: looking(image, bgx.KVDownsample(2, alpha)) for alpha in (0.0, 0.9, 1.2)}
    square = dict.fromkeys(counts(grid), 0.0)
    for down in range(16):
        for across in range(16):
            spread = (2 * math.cos(math.pi * down / 16) * math.cos(math.pi * across / 16)) ** 2
            square[radius(down, across, grid)] += spread / counts(grid)[radius(down, across, grid)]
    for alpha, found in kept.items():
        variance = (alpha + (1 - alpha) / 4) ** 2 + 3 * ((1 - alpha) / 4) ** 2
        expected = [variance * square[bin] for bin in range(1, 9)]  # the first bin holds the mean, which is no noise
        assert found[1:].tolist() == pytest.approx(expected, rel=0.15)
    assert bool((kept[0.0][6:] < kept[0.9][6:]).all())
    assert bool((kept[0.9][6:] < kept[1.2][6:]).all())


class WithClassToken(Toy):
    """A row before those of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.register = nn.Parameter(torch.randn(1, 1, C))

    def tokens(self, image: Tensor) -> Tensor:
        image_tokens = super().tokens(image)
        return torch.cat([self.register.expand(len(image), -1, -1), image_tokens], 1)

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image)[:, 1:]


def two_levels() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=8, attention_head_dim=1, mid_block_type=None,
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": ()}, r"method=\(\) must be one merge, or one downsampling; measure each by itself"),
        ({"method": (bgx.ToMe(0.5), bgx.ToDo(2))}, r"method=\(ToMe\(.*, ToDo\(.*\) must be one merge"),
        ({"timesteps": []}, r"timesteps=\[\] is empty; give one or more"),
        ({"method": bgx.ToMe(0.01)}, r"method=tome:0.01 rewrites attentions on 0 grids \[\]; it must be one"),
        (
            {"method": bgx.ToDo(2, levels=None)},
            r"todo:2:levels=all rewrites attentions on 2 grids \[\(4, 4\), \(8, 8\)\]",
        ),
    ],
)
def test_refuses_what_has_no_one_spectrum(change: dict[str, Any], message: str) -> None:
    at = inputs_of(tiny_unet(), "sample")
    with pytest.raises(bgx.InputError, match=message) as caught:
        measure(two_levels(), at, **({"method": bgx.ToDo(2), "timesteps": [1]} | change))
    assert "\n" not in str(caught.value)


def test_text_beside_the_image_is_refused_for_merges_and_left_out_of_keys() -> None:
    model, image = WithClassToken().eval(), torch.randn(1, 3, 4, 6)
    found = measure(model, lambda step: {"image": image}, method=bgx.ToDo(2), timesteps=[0])
    with torch.no_grad():
        x = model.norm(model.tokens(image))[:, 1:]
    torch.testing.assert_close(found.before[0, 0], radial_power(x, (4, 6)))
    with pytest.raises(bgx.InputError, match="reads 25 rows, not the 4x6 tokens of an image alone"):
        measure(model, lambda step: {"image": image}, method=bgx.ToMe(0.5), timesteps=[0])


def test_the_error_is_the_power_of_the_difference() -> None:
    """Means keep the sum of all tokens, so nothing is lost at frequency 0; what is pooled away is all error."""
    model, image = WithClassToken().eval(), torch.randn(1, 3, 4, 6)
    found = measure(model, lambda step: {"image": image}, method=bgx.KVDownsample(2, 0.0), timesteps=[0])
    with torch.no_grad():
        x = model.norm(model.tokens(image))[:, 1:]
    blocks = x.view(1, 2, 2, 3, 2, -1)
    pooled = blocks.mean((2, 4), keepdim=True).expand_as(blocks).reshape(x.shape)
    torch.testing.assert_close(found.error[0, 0], radial_power(pooled - x, (4, 6)))
    torch.testing.assert_close(found.deviation, found.error / found.before)
    assert float(found.error[0, 0, 0]) < 1e-10 < float(found.error[0, 0, -1])


def spectra(*timesteps: int) -> Spectra:
    before = torch.ones(len(timesteps), 2, 3)
    after = torch.rand(len(timesteps), 2, 3) + 0.1
    error = torch.rand(len(timesteps), 2, 3) + 0.1
    return Spectra(("a", "b"), timesteps, torch.tensor([0, 0.25, 0.5]), before, after, error)


def test_the_figure_has_a_column_a_timestep_and_a_line_a_method() -> None:
    found = {"tome:0.7": spectra(100, 900), "todo:2": spectra(100, 900)}
    drawn = figure(found)
    titles = [f"{what}, timestep {step}" for what in ("left", "error") for step in (100, 900)]
    assert [axis.get_title() for axis in drawn.axes] == titles
    for place, axis in enumerate(drawn.axes):
        level, *lines = axis.get_lines()
        assert set(level.get_ydata()) == {1}
        assert [line.get_label() for line in lines] == list(found)
        for line, of in zip(lines, found.values(), strict=True):
            assert list(line.get_xdata()) == [0, 0.25, 0.5]
            power = (of.after, of.error)[place // 2][place % 2]
            mean = [float(a + b) / 2 for a, b in zip(*(power / of.before[place % 2]), strict=True)]
            assert line.get_ydata() == pytest.approx(mean)
        assert axis.get_yscale() == "log"
        assert axis.get_xlabel() == "frequency, cycles per token"
    assert drawn.axes[0].get_ylabel() == "left / before, mean of attentions"
    assert drawn.axes[2].get_ylabel() == "error / before, mean of attentions"
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == list(found)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, r"spectra have the timesteps \[\]; give one or more, all at the same timesteps"),
        ({"a": spectra(1), "b": spectra(2)}, r"spectra have the timesteps \[\(1,\), \(2,\)\]"),
    ],
)
def test_the_figure_refuses_spectra_that_do_not_line_up(found: dict[str, Spectra], message: str) -> None:
    with pytest.raises(bgx.InputError, match=message):
        figure(found)
