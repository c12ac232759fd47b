"""What docs/compatibility.md says, row by row: a row names its test, a test has its row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    StableDiffusionPAGPipeline,
)
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

import bigain_fx as bgx
from tests import pipes
from tests.pipes import BY_NAME, Pipe, built, optimized, run
from tests.quantizers import QUANTIZERS
from tests.test_more_pipelines import Graphs, check_closer, check_images, check_rewritten
from tests.test_more_pipelines import graphs as graphs

METHOD = (bgx.LaplacianMerge(0.5), bgx.KVDownsample(2))
ROOT = Path(__file__).parent.parent
Change = Callable[[Any], object]  # of a pipeline
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def denoiser(case: Pipe, pipe: Any) -> Any:
    (part,) = case.sites
    return getattr(pipe, part)


def changed(case: Pipe, change: Change) -> Any:
    pipe = built(case)
    change(pipe)
    return pipe


def check(name: str, change: Change, graphs: Graphs, *, rewritten: bool = True) -> None:
    """Changed after a call: exact without a method, captured once more. Changed before: a method finds its sites."""
    case = BY_NAME[name]
    expected = run(case, changed(case, change))
    after = optimized(case, built(case), ())
    run(case, after)
    graphs.new()
    change(after)
    torch.testing.assert_close(run(case, after), expected, atol=1e-4, rtol=0)
    assert graphs.new() == 1
    compressed = optimized(case, changed(case, change), METHOD)
    images = run(case, compressed)
    sites = tuple(site.name for site in denoiser(case, compressed).report.rewritten)
    if rewritten:
        check_images(images, expected)
        assert sites == next(iter(case.sites.values()))
    else:
        torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
        assert sites == ()


@pytest.fixture(autouse=True)
def _active_backend() -> Iterator[None]:
    """``set_attention_backend`` sets the backend of every model of the process."""
    active = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(active)


OF_DIFFUSERS: dict[str, tuple[str, Change]] = {
    "FreeU": ("sd", lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)),
    "fuse_qkv_projections, U-Net": ("sd", lambda pipe: pipe.fuse_qkv_projections(vae=False)),
    "fuse_qkv_projections, SD3": ("sd3", lambda pipe: pipe.transformer.fuse_qkv_projections()),
    "fuse_qkv_projections, Flux": ("flux", lambda pipe: pipe.transformer.fuse_qkv_projections()),
    "set_attn_processor": ("sd", lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0())),
    "set_attention_backend native": ("flux", lambda pipe: pipe.transformer.set_attention_backend("native")),
    "set_attention_backend _native_math": ("flux", lambda pipe: pipe.transformer.set_attention_backend("_native_math")),
}


@pytest.mark.parametrize("what", OF_DIFFUSERS)
def test_of_diffusers(what: str, graphs: Graphs) -> None:
    check(*OF_DIFFUSERS[what], graphs)


SPELLED_OUT: dict[str, Change] = {
    "AttnProcessor": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
    "enable_attention_slicing": lambda pipe: pipe.enable_attention_slicing(1),
}


@pytest.mark.parametrize("what", SPELLED_OUT)
def test_attention_without_sdpa_is_kept(what: str, graphs: Graphs) -> None:
    check("sd", SPELLED_OUT[what], graphs, rewritten=False)


def test_flex_attention_is_refused() -> None:
    case = BY_NAME["flux"]
    pipe = optimized(case, built(case), METHOD)
    pipe.transformer.set_attention_backend("flex")
    with pytest.raises(bgx.CaptureError, match=r"torch\.export left a call of") as caught:
        run(case, pipe)
    assert "\n" not in str(caught.value)


CACHES: dict[str, Callable[[Any], object]] = {
    "FirstBlockCache": lambda pipe: FirstBlockCacheConfig(threshold=0.1),
    "PyramidAttentionBroadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe._current_timestep
    ),
}
HOOKS: dict[str, Change] = {
    **{name: lambda pipe, make=make: pipe.transformer.enable_cache(make(pipe)) for name, make in CACHES.items()},
    "enable_group_offload": lambda pipe: pipe.transformer.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level"
    ),
}


@pytest.mark.parametrize("when", ["before", "after a call"])
@pytest.mark.parametrize("what", HOOKS)
def test_hooks_that_decide_at_every_call_are_refused(what: str, when: str) -> None:
    case = BY_NAME["flux"]
    pipe = built(case)
    if when == "before":
        HOOKS[what](pipe)
        with pytest.raises(bgx.InputError, match="which no graph can hold") as caught:
            optimized(case, pipe, METHOD)
    else:
        optimized(case, pipe, METHOD)
        run(case, pipe)
        HOOKS[what](pipe)
        with pytest.raises(bgx.InputError, match="which no graph can hold") as caught:
            run(case, pipe)
    assert "\n" not in str(caught.value)


def quantized(config: str) -> Change:
    quantization = pytest.importorskip("torchao.quantization")

    def change(pipe: Any) -> None:
        model: nn.Module = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        quantization.quantize_(getattr(model, "original", model), getattr(quantization, config)())

    return change


QUANTIZATIONS = ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]


@pytest.mark.parametrize("name", ["dit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd", "flux"))])
@pytest.mark.parametrize("config", QUANTIZATIONS)
def test_torchao(config: str, name: str, graphs: Graphs) -> None:
    case, change = BY_NAME[name], quantized(config)
    assert not torch.equal(run(case, changed(case, change)), run(case, built(case))), "nothing was quantized"
    check(name, change, graphs)


@pytest.mark.slow
@pytest.mark.parametrize("config", QUANTIZATIONS)
def test_torchao_under_inductor(config: str) -> None:
    case, change = BY_NAME["dit"], quantized(config)
    expected = run(case, optimized(case, changed(case, change), METHOD))
    pipe = optimized(case, changed(case, change), METHOD, backend="inductor")
    found = run(case, pipe)
    check_rewritten(case, pipe)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)
    check_closer(found, expected, run(case, changed(case, change)))


@pytest.mark.parametrize("config", QUANTIZATIONS)
def test_torchao_is_no_onnx(config: str, tmp_path: Path) -> None:
    model = changed(BY_NAME["dit"], quantized(config)).transformer
    with pytest.raises(bgx.ExportError, match=r"linear_1\.weight \(\w+ of torchao\) is quantized") as caught:
        bgx.export_onnx(model, (), tmp_path / "dit.onnx", kwargs=CALL, method=METHOD)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_torchao_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = changed(BY_NAME["dit"], quantized(QUANTIZATIONS[0])).transformer
    fast = bgx.optimize(model, kwargs=CALL, method=METHOD, select="auto", backend="eager")
    assert all(site.ms is not None for site in fast.report.sites)


@pytest.mark.slow
def test_torchao_in_a_package(tmp_path: Path) -> None:
    model = changed(BY_NAME["dit"], quantized(QUANTIZATIONS[0])).transformer
    expected = bgx.optimize(model, kwargs=CALL, method=METHOD, backend="eager")(**CALL).sample
    bgx.export_package(model, (), tmp_path / "dit.pt2", kwargs=CALL, method=METHOD)
    torch.testing.assert_close(bgx.load_package(tmp_path / "dit.pt2")(**CALL).sample, expected, atol=1e-3, rtol=1e-3)


def wide_dit(quantizer: str | None, adapter: bool) -> DiTTransformer2DModel:
    """Of 64 channels, which every quantizer takes."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=1, sample_size=16,
        num_embeds_ada_norm=1000,
    ).eval().requires_grad_(False)  # fmt: skip
    if quantizer:
        QUANTIZERS[quantizer](model)
    if adapter:
        torch.manual_seed(1)
        peft = pytest.importorskip("peft")
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False), model)
    return model.eval()


torch.manual_seed(2)
CALL = {
    "hidden_states": torch.randn(2, 4, 16, 16),
    "timestep": torch.tensor([500, 300]),
    "class_labels": torch.tensor([1, 2]),
}


@cache
def wide_dits(quantizer: str | None, adapter: bool) -> tuple[Tensor, Tensor, Any]:
    """What the dense model gives, what the compressed one does, and its report."""
    model = wide_dit(quantizer, adapter)
    fast = bgx.optimize(wide_dit(quantizer, adapter), method=METHOD, backend="eager")
    with torch.no_grad():
        return model(**CALL).sample, fast(**CALL).sample, fast.report


@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["alone", "LoRA"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_quantizers_of_layers(quantizer: str, adapter: bool, caplog: pytest.LogCaptureFixture) -> None:
    dense, compressed, report = wide_dits(quantizer, adapter)
    float_dense, float_compressed, float_report = wide_dits(None, adapter)
    assert not torch.equal(dense, float_dense), "nothing was quantized"
    assert report.sites == float_report.sites
    assert len(report.rewritten) == 1
    assert (compressed - float_compressed).norm() < 2 * (dense - float_dense).norm()
    fast = bgx.optimize(wide_dit(quantizer, adapter), method=(), backend="eager")
    for _ in range(3):
        torch.testing.assert_close(fast(**CALL).sample, dense)
    assert "captured anew" not in caplog.text


def by_layers(name: str) -> Change:
    def change(pipe: Any) -> None:
        model: nn.Module = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        QUANTIZERS[name](getattr(model, "original", model))

    return change


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "sd", "flux"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_quantizers_of_layers_in_pipelines(quantizer: str, name: str, graphs: Graphs) -> None:
    case, change = BY_NAME[name], by_layers(quantizer)
    assert not torch.equal(run(case, changed(case, change)), run(case, built(case))), "nothing was quantized"
    check(name, change, graphs)


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_quantizers_of_layers_under_inductor(quantizer: str) -> None:
    case, change = BY_NAME["dit"], by_layers(quantizer)
    expected = run(case, optimized(case, changed(case, change), METHOD))
    pipe = optimized(case, changed(case, change), METHOD, backend="inductor")
    found = run(case, pipe)
    check_rewritten(case, pipe)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)
    check_closer(found, expected, run(case, changed(case, change)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_compile_modes(mode: str) -> None:
    """On a CPU; CUDA graphs and Triton templates need a GPU."""
    case = BY_NAME["dit"]
    torch._dynamo.reset()
    dense, expected = run(case, built(case)), run(case, optimized(case, built(case), METHOD))
    pipe = built(case)
    pipe.transformer = bgx.optimize(pipe.transformer, method=METHOD, mode=mode)
    for _ in range(2):
        images = run(case, pipe)
        torch.testing.assert_close(images, expected, atol=1e-2, rtol=0)
        check_closer(images, expected, dense)
    check_rewritten(case, pipe)


def lora(seed: int) -> dict[str, Tensor]:
    """Rank 2, random, as ``load_lora_weights`` takes it."""
    peft = pytest.importorskip("peft")
    model = built(BY_NAME["sd"]).unet
    torch.manual_seed(seed)
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False))
    return {f"unet.{name}": tensor for name, tensor in peft.utils.get_peft_model_state_dict(model).items()}


def loaded(weights: dict[str, Tensor], **options: Any) -> Change:
    return lambda pipe: pipe.load_lora_weights(dict(weights), adapter_name="x", **options)


def test_lora(graphs: Graphs) -> None:
    check("sd", loaded(lora(1)), graphs)


@pytest.mark.slow
def test_lora_steps_are_counted(graphs: Graphs) -> None:
    """A hot swap is no new graph; loading, a scale, fusing and unloading are one each."""
    case, first, second = BY_NAME["sd"], lora(1), lora(2)
    dense, pipe = built(case), optimized(case, built(case), ())
    original = run(case, pipe)
    assert graphs.new() == 1
    steps: dict[str, tuple[int, Change]] = {
        "load": (1, loaded(first)),
        "hot swap": (0, loaded(second, hotswap=True)),
        "scale": (1, lambda pipe: pipe.set_adapters("x", 0.5)),
        "fuse": (1, lambda pipe: pipe.fuse_lora()),
        "unfuse": (1, lambda pipe: pipe.unfuse_lora()),
        "unload": (1, lambda pipe: pipe.unload_lora_weights()),
    }
    previous = original
    for name, (count, change) in steps.items():
        change(dense)
        change(pipe)
        expected, found = run(case, dense), run(case, pipe)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert graphs.new() == count, name
        assert torch.allclose(found, previous, atol=1e-3) == (name in ("fuse", "unfuse")), name
        previous = found
    torch.testing.assert_close(previous, original, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_switching_between_loras_captures_each_once(graphs: Graphs) -> None:
    case = BY_NAME["sd"]
    dense, pipe = built(case), optimized(case, built(case), ())
    for each in (dense, pipe):
        for name, seed in {"a": 1, "b": 2}.items():
            each.load_lora_weights(lora(seed), adapter_name=name)
    images = []
    for name, new in (("a", 1), ("b", 1), ("a", 0), ("b", 0), ("a", 0)):
        for each in (dense, pipe):
            each.set_adapters(name)
        images.append(run(case, pipe))
        torch.testing.assert_close(images[-1], run(case, dense), atol=1e-4, rtol=0)
        assert graphs.new() == new, name
    assert torch.equal(images[0], images[2])
    assert not torch.allclose(images[0], images[1], atol=1e-3)


@pytest.mark.slow
def test_the_scale_of_an_adapter_is_an_input_from_its_second_value_on(graphs: Graphs) -> None:
    case, weights = BY_NAME["sd"], lora(1)
    dense, pipe = built(case), optimized(case, built(case), ())
    for each in (dense, pipe):
        loaded(weights)(each)
    for scale, new in {1.0: 1, 0.5: 1, 0.25: 0, 0.0: 0, 0.75: 0}.items():
        for each in (dense, pipe):
            each.set_adapters("x", scale)
        torch.testing.assert_close(run(case, pipe), run(case, dense), atol=1e-4, rtol=0)
        assert graphs.new() == new, scale


def test_perturbed_attention_guidance_on_and_off(graphs: Graphs) -> None:
    """The pipeline sets processors before its steps, and puts the others back after them."""
    case = BY_NAME["sd"]

    def perturbed(pipe: Any) -> Any:
        made = StableDiffusionPAGPipeline(**pipe.components, pag_applied_layers="mid", requires_safety_checker=False)
        return pipes.quiet(made)

    dense, pipe = perturbed(built(case)), perturbed(optimized(case, built(case), ()))
    images = []
    for scale, new in ((0.0, 1), (3.0, 1), (0.0, 0), (3.0, 0), (2.0, 0)):
        images.append(run(case, pipe, pag_scale=scale))
        torch.testing.assert_close(images[-1], run(case, dense, pag_scale=scale), atol=1e-4, rtol=0)
        assert graphs.new() == new, scale
    assert torch.equal(images[1], images[3])
    assert not torch.allclose(images[0], images[1], atol=1e-3)


def ip_adapter(pipe: Any) -> None:
    """A random one, of one image token for each of 16 features, as ``load_ip_adapter`` reads it from a file."""
    generator = torch.Generator().manual_seed(1)
    crossed = [name for name in pipe.unet.attn_processors if "attn2" in name]
    weights: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for index, name in enumerate(crossed):
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for part in ("to_k_ip", "to_v_ip"):
            weights["ip_adapter"][f"{2 * index + 1}.{part}.weight"] = torch.randn(width, 16, generator=generator)
    weights["image_proj"] = {
        "proj.weight": torch.randn(64, 16, generator=generator), "proj.bias": torch.zeros(64),
        "norm.weight": torch.ones(16), "norm.bias": torch.zeros(16),
    }  # fmt: skip
    pipe.unet._load_ip_adapter_weights([weights])


@pytest.mark.slow
def test_each_scale_of_an_ip_adapter_is_a_graph(graphs: Graphs) -> None:
    """diffusers asks whether it is 0, which no graph can."""
    case, image = BY_NAME["sd"], pipes.normal(2, 1, 16, seed=3)
    dense, pipe = built(case), optimized(case, built(case), ())
    run(case, pipe)
    graphs.new()
    for each in (dense, pipe):
        ip_adapter(each)
    images = []
    for scale, new in ((1.0, 1), (0.5, 1), (0.25, 1), (0.0, 1), (1.0, 0), (0.5, 0), (0.0, 0)):
        for each in (dense, pipe):
            each.set_ip_adapter_scale(scale)
        images.append(run(case, pipe, ip_adapter_image_embeds=[image]))
        expected = run(case, dense, ip_adapter_image_embeds=[image])
        torch.testing.assert_close(images[-1], expected, atol=1e-4, rtol=0)
        assert graphs.new() == new, scale
    assert not torch.allclose(images[0], images[1], atol=1e-3)
    said = [record.getMessage() for record in graphs.caplog.records if "is a graph of its own" in record.getMessage()]
    assert len(said) == 1
    assert "processor.scale.0" in said[0]


def attentions_of(pipe: Any) -> list[tuple[nn.ModuleList, int]]:
    blocks = [pipe.unet.down_blocks[0].attentions, pipe.unet.up_blocks[1].attentions]
    return [(held, index) for held in blocks for index in range(len(held))]


def one_by_one(places: list[tuple[nn.ModuleList, int]], method: Any, grid: Any = None) -> None:
    """Optimize modules of a model in their places."""
    for held, index in places:
        held[index] = bgx.optimize(held[index], method=method, backend="eager", grid=grid)


def deep_cache(pipe: Any) -> None:
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()


def test_deepcache_over_optimized_attentions() -> None:
    case, options = BY_NAME["sd"], {"steps": 4}
    expected = run(case, changed(case, deep_cache), **options)
    assert (expected - run(case, built(case), **options)).abs().max() > 1e-3, "nothing was cached"
    for method in ((), METHOD):
        pipe = built(case)
        one_by_one(attentions_of(pipe), method)
        deep_cache(pipe)
        images = run(case, pipe, **options)
        if method:
            check_images(images, expected)
            assert all(held[index].report.rewritten for held, index in attentions_of(pipe))
        else:
            torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


def test_deepcache_in_an_optimized_unet_is_refused() -> None:
    case = BY_NAME["sd"]
    pipe = changed(case, deep_cache)
    with pytest.raises(bgx.InputError, match="can only be given by position") as caught:
        run(case, optimized(case, pipe, METHOD))
    assert "\n" not in str(caught.value)


def cache_dit(pipe: Any) -> None:
    """Over the blocks of a PixArt; ``check_forward_pattern`` reads signatures, which ours need not have."""
    package = pytest.importorskip("cache_dit")
    config = package.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=10.0
    )
    adapter = package.BlockAdapter(
        pipe=pipe, transformer=pipe.transformer, blocks=pipe.transformer.transformer_blocks,
        forward_pattern=package.ForwardPattern.Pattern_3, check_forward_pattern=False,
    )  # fmt: skip
    package.enable_cache(adapter, cache_config=config)


def test_cache_dit_over_optimized_blocks() -> None:
    case, options = BY_NAME["pixart"], {"steps": 6}
    expected = run(case, changed(case, cache_dit), **options)
    assert (expected - run(case, built(case), **options)).abs().max() > 1e-3, "nothing was cached"
    for method in ((), METHOD):
        pipe = built(case)
        blocks = pipe.transformer.transformer_blocks
        one_by_one([(blocks, index) for index in range(len(blocks))], method, grid=(8, 8))
        cache_dit(pipe)
        images = run(case, pipe, **options)
        if method:
            check_images(images, expected)
            assert all(block.report.rewritten for block in blocks)
        else:
            torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


def test_a_cached_dit_is_refused() -> None:
    case = BY_NAME["pixart"]
    pipe = changed(case, cache_dit)
    with pytest.raises(bgx.CaptureError, match="cannot capture PixArtTransformer2DModel") as caught:
        run(case, optimized(case, pipe, METHOD))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_blocks_one_by_one_are_the_whole() -> None:
    """Captured on its own, a block is compressed as it is in its model."""
    case = BY_NAME["dit"]
    for method in (*METHOD, METHOD):
        pipe = built(case)
        blocks = pipe.transformer.transformer_blocks
        one_by_one([(blocks, index) for index in range(len(blocks))], method, grid=(8, 8))
        torch.testing.assert_close(
            run(case, pipe), run(case, optimized(case, built(case), method)), atol=1e-4, rtol=0
        )  # fmt: skip


def names_of_tests(file: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)\(", (Path(__file__).parent / file).read_text(), re.MULTILINE))


def test_the_table_and_the_tests_name_one_another() -> None:
    """A test without a file is one of these two files; every one of this file has its row."""
    page = (ROOT / "docs" / "compatibility.md").read_text()
    here, beside = names_of_tests("test_compatibility.py"), names_of_tests("test_more_pipelines.py")
    named = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", page)
    assert not [(file, name) for file, name in named if name not in (names_of_tests(file) if file else here | beside)]
    assert all("table" in name for name in here - {name for _, name in named})


def test_every_row_of_the_table_names_its_test_or_says_why_not() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    tables = [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)]
    rows = [row for header, _, *rows in tables if header.endswith("| test |") for row in rows]
    assert len(rows) > 50
    assert not [row for row in rows if "`test_" not in row and "not run" not in row and "no test" not in row]
