"""What becomes of an optimized denoiser when its model, its inputs or its place change."""

from __future__ import annotations

import copy
import gc
import io
import json
import logging
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import DDIMScheduler, DiTPipeline, StableDiffusionPipeline, UNet2DConditionModel, attention_backend
from diffusers.hooks import HookRegistry
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import bigain_fx as bgx
from bigain_fx.model_state import ModelState, some
from bigain_fx.watch import Watch
from tests import toys
from tests.test_optimize import SAMPLE, TEXT, dit
from tests.test_pipelines import run, vae

METHOD = ()  # the dense graph: what it must give is what the model gives
IMAGE = toys.image()


class Processor:
    """What diffusers calls an attention processor: a plain object, with attributes that matter."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.options = scale, {"bias": 0.0}

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.scale + self.options["bias"]


class Model(toys.Toy):
    """A toy whose forward reads every kind of thing that a module can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(toys.C))
        self.gain, self.gains, self.flags = 1.0, {"a": 1.0}, [True]
        self.processor = Processor()
        self.plain, self.held = torch.ones(()), {"a": torch.ones(())}

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        y = super().branch(x, metric) * (self.gain * self.gains["a"]) * self.plain * self.held["a"] + self.shift
        return self.processor(y) if self.flags[0] else y


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Warnings of ours since it was last asked."""

    def take() -> list[str]:
        messages = [record.message for record in caplog.records if record.name == "bigain_fx"]
        caplog.clear()
        return messages

    with caplog.at_level(logging.WARNING, "bigain_fx"), torch.no_grad():
        yield take


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None, up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    ).eval()  # fmt: skip


def stable_diffusion() -> Any:
    pipe = StableDiffusionPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, unet=unet(), feature_extractor=None, safety_checker=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --------------------------------------------------------------------- changes of the model


def replaced(module: nn.Module) -> None:
    module.weight = nn.Parameter(module.weight * 2)


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output * 2)


def retyped(m: Model) -> None:
    m.out.__class__ = type("Linear2", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})


def patched(m: Model) -> None:
    forward = m.out.forward
    m.out.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


def assigned(m: Model) -> None:
    m.load_state_dict({name: tensor * 2 for name, tensor in m.state_dict().items()}, assign=True)


CHANGES: dict[str, tuple[Callable[[Model], Any], str]] = {
    "a new parameter": (lambda m: replaced(m.q), "q.weight"),
    "a buffer of another shape": (lambda m: m.register_buffer("shift", torch.ones(1, toys.C)), "shift"),
    "a state dict that is assigned": (assigned, "embed.weight, embed.bias, norm.weight and 9 more"),
    "a parameter less": (lambda m: m.out.register_parameter("bias", None), "out.bias"),
    "another submodule": (lambda m: setattr(m, "out", nn.Linear(toys.C, toys.C)), "out, out.weight, out.bias"),
    "another class": (retyped, "out"),
    "a forward hook": (lambda m: hooked(m.out), "out._forward_hooks"),
    "a forward pre-hook": (lambda m: m.out.register_forward_pre_hook(lambda module, args: (args[0] * 2,)), "out._forw"),
    "a patched forward": (patched, "out.forward"),
    "a number": (lambda m: setattr(m, "gain", 2.0), "gain"),
    "a number in a dict": (lambda m: m.gains.update(a=2.0), "gains.a"),
    "a flag in a list": (lambda m: m.flags.__setitem__(0, False), "flags.0"),
    "another tensor in a dict": (lambda m: m.held.update(a=torch.tensor(2.0)), "held.a"),
    "another plain tensor": (lambda m: setattr(m, "plain", torch.tensor(2.0)), "plain"),
    "another processor": (lambda m: setattr(m, "processor", Processor(2.0)), "processor"),
    "a processor's number": (lambda m: setattr(m.processor, "scale", 2.0), "processor.scale"),
    "a processor's dict": (lambda m: m.processor.options.update(bias=2.0), "processor.options.bias"),
    "another dtype": (lambda m: m.double(), "shift, embed.weight"),
    "gradients": (lambda m: m.q.requires_grad_(False), "q.weight, q.bias"),
}


EXCHANGES = ("a number", "a number in a dict", "a processor's number", "a processor's dict",
             "a new parameter", "a state dict that is assigned", "a parameter less", "another submodule",
             "another tensor in a dict", "another plain tensor")  # fmt: skip
"""After these the model has no longer what the graph holds, or the graph has it as an input from then on."""


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_captured_once_and_said(change: str, said: Callable[[], list[str]]) -> None:
    alter, path = CHANGES[change]
    m, counter = model(), CompileCounter()
    fast = bgx.optimize(m, method=METHOD, backend=counter)
    before = fast(IMAGE)
    assert not said()
    alter(m)
    image = IMAGE.to(m.embed.weight.dtype)
    output = fast(image)
    warning, *others = said()
    assert len(others) == (change in ("another dtype", "a forward hook", "a forward pre-hook"))
    assert warning.startswith(f"Model changed, its graphs are captured anew when next called: {path}")
    torch.testing.assert_close(output, m(image))
    assert torch.equal(output, before) == (change in ("a flag in a list", "gradients"))
    fast(image)
    assert not said()
    assert counter.frame_count == 2
    assert len(fast._graphs) == (1 if change in EXCHANGES else 2)


def scaled_state(m: Model) -> dict[str, Tensor]:
    return {name: tensor * 2 for name, tensor in m.state_dict().items()}


WRITES: dict[str, Callable[[Model], Any]] = {
    "load_state_dict": lambda m: m.load_state_dict(scaled_state(m)),
    "a parameter": lambda m: m.q.weight.mul_(2),
    "data copied, as peft swaps adapters": lambda m: m.q.weight.data.copy_(m.k.weight),
    "data exchanged": lambda m: setattr(m.q.weight, "data", m.q.weight.data * 2),
    "a buffer": lambda m: m.shift.add_(1),
    "a new buffer": lambda m: m.register_buffer("shift", torch.ones(toys.C)),
    "a plain tensor": lambda m: m.plain.mul_(2),
    "a tensor in a dict": lambda m: m.held["a"].fill_(2),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_into_weights_shows_at_once(write: str, said: Callable[[], list[str]]) -> None:
    m = model()
    counter = CompileCounter()
    fast = bgx.optimize(m, method=METHOD, backend=counter)
    before, graph = fast(IMAGE), fast.prepare(IMAGE)
    WRITES[write](m)
    output = fast(IMAGE)
    torch.testing.assert_close(output, m(IMAGE))
    assert not torch.equal(output, before)
    assert fast.prepare(IMAGE) is graph
    assert not said()
    assert counter.frame_count == 1


def test_what_changes_nothing_captures_nothing(said: Callable[[], list[str]]) -> None:
    m, counter = model(), CompileCounter()
    fast = bgx.optimize(m, method=METHOD, backend=counter)
    before = fast(IMAGE)
    m(IMAGE)
    m.eval()
    fast.eval()
    m.gain = float("1.0")
    m.register_state_dict_pre_hook(lambda *args: None)
    m.register_full_backward_hook(lambda *args: None)
    HookRegistry.check_if_exists_or_initialize(m)  # as cache_context() does in every step
    fast.to("cpu").float()
    fast.double()
    fast.float()
    handle = m.out.register_forward_hook(lambda *args: None)
    handle.remove()
    copy.deepcopy(fast)
    assert torch.equal(fast(IMAGE), before)
    assert not said()
    assert counter.frame_count == 1


def test_every_size_is_captured_anew_after_a_change(said: Callable[[], list[str]]) -> None:
    m, counter = model(), CompileCounter()
    fast = bgx.optimize(m, method=METHOD, backend=counter)
    sizes = (toys.image(), toys.image()[:1])
    for image in sizes:
        fast(image)
    said()
    m.gain = 2.0
    for image in sizes * 2:
        torch.testing.assert_close(fast(image), m(image))
    assert len(said()) == 1
    assert counter.frame_count == 4


def test_a_model_put_into_train_mode_is_refused() -> None:
    m = model()
    fast = bgx.optimize(m, (IMAGE,), method=METHOD, backend="eager")
    m.train()
    with pytest.raises(bgx.InputError, match="Model is in train mode"):
        fast(IMAGE)
    fast.eval()
    assert not m.training
    fast(IMAGE)


def test_a_watch_sees_the_last_thing_come_and_go() -> None:
    m = nn.Sequential(nn.Linear(2, 2))
    m[0].extra = values = [1.0]
    state = ModelState(m)
    watch = Watch(state)

    def changed() -> str:
        nonlocal state, watch
        before, moved, same = state, watch.moved(), state.same_objects()
        state = ModelState(m)
        watch = Watch(state)
        paths = before.differences(state)
        assert moved or not paths
        assert same == (not paths)
        return some(paths)

    assert changed() == ""
    values.append(2.0)
    assert changed() == "0.extra.1"
    values.pop()
    assert changed() == "0.extra.1"
    m.append(nn.Identity())
    assert changed().startswith("1")
    m[0].cycle = cycle = {"a": 1}
    cycle["itself"] = cycle  # type: ignore[assignment]
    assert changed() == "0.cycle, 0.cycle.a, 0.cycle.itself"
    assert changed() == ""


# ------------------------------------------------------------------- changes of the inputs


def test_recompiles_are_counted(said: Callable[[], list[str]]) -> None:
    """LoRA swap 0, size change 1, guidance change (batch 2 -> 1) 1, going back 0."""
    m, counter = model(), CompileCounter()
    fast = bgx.optimize(m, method=METHOD, backend=counter)
    image = toys.image()
    counts = []
    for call in (image, image, image[:, :, :, :4], image[:1], image, image[:, :, :, :4]):
        m.q.weight.data.copy_(torch.randn_like(m.q.weight))
        torch.testing.assert_close(fast(call), m(call))
        counts.append(counter.frame_count)
    assert counts == [1, 1, 2, 3, 3, 3]
    assert said() == [
        "Model: new input signature, capturing graph 2: image (2, 3, 4, 4) float32",
        "Model: new input signature, capturing graph 3: image (1, 3, 4, 6) float32",
    ]


def test_a_bucket_of_sizes_is_prepared() -> None:
    fast = bgx.optimize(model(), method=METHOD, backend="eager", on_new_signature="raise")
    with pytest.raises(bgx.InputError, match=r"^image \(2, 3, 4, 6\) float32: not prepared, .* prepared: nothing$"):
        fast(IMAGE)
    one = fast.prepare(IMAGE)
    bucket = fast.prepare(example_inputs=[((IMAGE,), {}), {"image": IMAGE[:1]}, ((IMAGE[:, :, :, :4],), {})])
    assert bucket[0] is one
    assert [prepared.report.sites[0].grid for prepared in bucket] == [(4, 6), (4, 6), (4, 4)]
    for image in (IMAGE, IMAGE[:1], IMAGE[:, :, :, :4]):
        fast(image)
    with pytest.raises(bgx.InputError) as caught:
        fast(IMAGE[:, :, :2])
    assert str(caught.value) == (
        "image (2, 3, 2, 6) float32: not prepared, and on_new_signature='raise'; prepared: image (2, 3, 4, 6) float32; "
        "image (1, 3, 4, 6) float32; image (2, 3, 4, 4) float32"
    )


def test_what_was_prepared_survives_a_change_of_the_model() -> None:
    m = model()
    fast = bgx.optimize(m, (IMAGE,), method=METHOD, backend="eager", on_new_signature="raise")
    m.gain = 2.0
    torch.testing.assert_close(fast(IMAGE), m(IMAGE))
    with pytest.raises(bgx.InputError, match="not prepared"):
        fast(IMAGE[:1])


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {"example_inputs": []}, "example_inputs is empty"),
        ((), {"example_inputs": [IMAGE]}, r"^kwargs=Tensor .* must be a mapping of names to values"),
        ((), {"example_inputs": [(IMAGE, {})]}, r"^args=Tensor .* must be a tuple of the arguments"),
        ((IMAGE,), {"example_inputs": [{"image": IMAGE}]}, "beside other arguments"),
    ],
)
def test_wrong_example_inputs(args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(bgx.InputError, match=message):
        bgx.optimize(model(), method=METHOD, backend="eager").prepare(*args, **kwargs)


def test_the_number_of_graphs_is_bounded(said: Callable[[], list[str]]) -> None:
    fast = bgx.optimize(model(), method=METHOD, backend="eager", max_graphs=2)
    graph = weakref.ref(fast.prepare(IMAGE).run)
    fast.prepare(IMAGE[:1])
    fast(IMAGE)
    said()
    fast(IMAGE[:, :, :2])
    assert said() == [
        "Model: new input signature, capturing graph 3: image (2, 3, 2, 6) float32",
        "Model: dropping a graph, max_graphs=2: image (1, 3, 4, 6) float32",
    ]
    fast(IMAGE)
    assert not said()
    fast(IMAGE[:1])
    fast(IMAGE[:, :, :2])
    assert len(said()) == 4
    gc.collect()
    assert graph() is None
    assert len(fast._graphs) == len(fast._graphs.signatures) == 2


def test_modes_of_the_caller_are_told_apart(said: Callable[[], list[str]]) -> None:
    counter = CompileCounter()
    fast = bgx.optimize(model(), method=METHOD, backend=counter)
    for _ in range(2):
        fast(IMAGE)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fast(IMAGE)
        with attention_backend("_native_math"):
            fast(IMAGE)
    assert [warning.partition("float32, ")[2] for warning in said()] == [
        "autocast on cpu bfloat16",
        "attention backend AttentionBackendName._NATIVE_MATH",
    ]
    assert counter.frame_count == 3


# ---------------------------------------------------------------- in the original's place


def test_it_passes_for_the_original() -> None:
    m = unet()
    fast = bgx.optimize(m, method=METHOD, backend="eager")
    assert isinstance(fast, UNet2DConditionModel)
    assert isinstance(fast, bgx.OptimizedDenoiser)
    assert list(fast.state_dict()) == list(m.state_dict())
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in m.named_modules()]
    assert all(a is b for a, b in zip(fast.parameters(), m.parameters(), strict=True))
    assert fast.get_submodule("down_blocks.0.resnets.0") is m.down_blocks[0].resnets[0]
    assert list(nn.ModuleDict({"unet": fast}).state_dict()) == list(nn.ModuleDict({"unet": m}).state_dict())
    assert fast.load_state_dict({name: tensor + 1 for name, tensor in m.state_dict().items()}).missing_keys == []
    fast.conv_out = nn.Identity()
    assert isinstance(m.conv_out, nn.Identity)
    fast.num_upsamplers = 3
    assert m.num_upsamplers == 3
    fast.remembered = 1
    assert not hasattr(m, "remembered")


@pytest.mark.parametrize("move", ["half", "double", "bfloat16"])
def test_it_moves_with_the_original(move: str, said: Callable[[], list[str]]) -> None:
    m, counter = model(), CompileCounter()
    fast = bgx.optimize(m, method=METHOD, backend=counter)
    fast(IMAGE)
    assert getattr(fast, move)() is fast
    dtype = m.embed.weight.dtype
    assert dtype != torch.float32
    with pytest.raises(bgx.InputError, match=r"\['image'\] has dtype torch.float32"):
        fast(IMAGE)
    for _ in range(2):
        assert fast(IMAGE.to(dtype)).dtype == dtype
    assert fast.to(device="cpu", dtype=torch.float32) is fast
    torch.testing.assert_close(fast(IMAGE), m(IMAGE))
    assert counter.frame_count == 2
    assert fast.cpu() is fast
    nn.ModuleList([fast]).to(torch.float64)
    assert m.embed.weight.dtype == torch.float64
    assert fast.to("meta").original.embed.weight.is_meta


COPIES: dict[str, Callable[[bgx.OptimizedDenoiser], bgx.OptimizedDenoiser]] = {
    "copied": copy.deepcopy,
    "pickled": lambda fast: pickled(fast),
}


def pickled(fast: bgx.OptimizedDenoiser) -> bgx.OptimizedDenoiser:
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    again: bgx.OptimizedDenoiser = torch.load(file, weights_only=False)
    return again


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_independent(how: str) -> None:
    m = dit()
    inputs = {"hidden_states": torch.randn(1, 4, 16, 16)} | dict.fromkeys(
        ("timestep", "class_labels"), torch.ones(1).int()
    )
    method = (bgx.LaplacianMerge(0.5), bgx.KVDownsample(2, bgx.LinearAlpha()))
    fast = bgx.optimize(m, None, inputs, method=method, backend="eager", max_graphs=3)
    before = fast(**inputs).sample
    again = COPIES[how](fast)
    assert type(again) is bgx.OptimizedDenoiser
    assert (again.methods, again._settings) == (fast.methods, fast._settings)
    assert not again._graphs
    assert torch.equal(again(**inputs).sample, before)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert torch.equal(fast(**inputs).sample, before)
    assert not torch.equal(again(**inputs).sample, before)


def test_a_pipeline_saves_the_original_and_loads_it_again(tmp_path: Path) -> None:
    pipe = stable_diffusion()
    pipe.unet = bgx.optimize(pipe.unet, method=METHOD, backend="eager")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    missing = dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor", "image_encoder"))
    again = type(pipe).from_pretrained(tmp_path, local_files_only=True, **missing)
    assert type(again.unet) is UNet2DConditionModel
    torch.testing.assert_close(run(again, 2), run(pipe, 2))


def test_a_pipeline_moves_it_and_casts_it() -> None:
    pipe: Any = DiTPipeline(transformer=dit(1000), vae=vae(), scheduler=stable_diffusion().scheduler)
    pipe.transformer = bgx.optimize(pipe.transformer, method=METHOD, backend="eager")
    pipe.to(torch.float64)
    assert pipe.transformer.original.dtype == pipe.dtype == torch.float64
    assert pipe.components["transformer"] is pipe.transformer


# ----------------------------------------------------------------- hooks and diffusers' own


def test_model_offload_moves_it_as_a_whole(said: Callable[[], list[str]]) -> None:
    """What enable_model_cpu_offload() does to each component; the hook is on ours, and moves the original's weights."""
    m = unet()
    fast = bgx.optimize(m, method=METHOD, backend="eager")
    expected = fast(SAMPLE, 5, TEXT).sample
    _, hook = cpu_offload_with_hook(fast, torch.device("cpu"))
    assert not hasattr(m, "_hf_hook")
    for _ in range(2):
        m.double()  # away and back between calls
        m.float()
        assert torch.equal(fast(SAMPLE, 5, TEXT).sample, expected)
    hook.offload()
    hook.remove()
    assert torch.equal(fast(SAMPLE, 5, TEXT).sample, expected)
    assert len(fast._graphs) == 1
    assert not said()


def test_hooks_that_no_graph_can_hold_are_refused() -> None:
    m = unet()
    fast = bgx.optimize(m, method=METHOD, backend="eager")
    expected = fast(SAMPLE, 5, TEXT).sample
    cpu_offload(fast, torch.device("cpu"))
    with pytest.raises(bgx.InputError, match=r"has accelerate's AlignDevicesHook at conv_in, which no graph can hold"):
        fast(SAMPLE, 5, TEXT)
    remove_hook_from_module(fast, recurse=True)
    torch.testing.assert_close(fast(SAMPLE, 5, TEXT).sample, expected)

    fast.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(bgx.InputError, match=r"has diffusers' 'group_offloading' at conv_in, which no graph can hold"):
        fast(SAMPLE, 5, TEXT)

    hooked, _ = cpu_offload_with_hook(unet(), torch.device("cpu"))
    with pytest.raises(
        bgx.InputError, match=r"has accelerate's CpuOffload, which no graph .* enable_model_cpu_offload"
    ):
        bgx.optimize(hooked, method=METHOD)


def test_a_hook_that_moves_no_weights_is_captured() -> None:
    m = model()
    expected = m(IMAGE)
    add_hook_to_module(m, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert torch.equal(m(IMAGE), expected)


DIFFUSERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "fused projections": (lambda pipe: pipe.fuse_qkv_projections(), "attn1.fused_projections"),
    "processors": (lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()), "attn1.processor"),
    "FreeU": (lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.1, 1.2), "up_blocks.0.s1"),
}


@pytest.mark.parametrize("change", DIFFUSERS)
def test_what_diffusers_changes_is_captured_once_and_said(change: str, said: Callable[[], list[str]]) -> None:
    alter, path = DIFFUSERS[change]
    pipe = stable_diffusion()
    pipe.unet = fast = bgx.optimize(pipe.unet, method=METHOD, backend="eager")
    run(pipe, 1)
    alter(pipe)
    found = run(pipe, 2)
    (warning,) = said()
    assert path in warning
    pipe.unet = fast.original
    torch.testing.assert_close(found, run(pipe, 2))


@pytest.mark.slow
def test_a_lora_scale_stays_a_constant_of_the_signature(said: Callable[[], list[str]]) -> None:
    """peft asks whether it is 1, which no graph can; the warning says so, once."""
    m, counter = unet(), CompileCounter()
    fast = bgx.optimize(m, method=METHOD, backend=counter)
    for adapters in (0, 1):
        before = counter.frame_count
        for scale in (0.5, 0.25, 0.75, 0.5):
            output = fast(SAMPLE, 5, TEXT, cross_attention_kwargs={"scale": scale}).sample
            expected = m(SAMPLE, 5, TEXT, cross_attention_kwargs={"scale": scale}).sample
            torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
        assert counter.frame_count - before == 3
        reasons = [warning for warning in said() if "cross_attention_kwargs.scale is a graph of its own" in warning]
        assert len(reasons) == 1 - adapters
        pytest.importorskip("peft")
        m.load_lora_adapter(lora(m, 1), prefix="unet", adapter_name=f"after {adapters}")


def lora(of: nn.Module, seed: int, rank: int = 2) -> dict[str, Tensor]:
    """A LoRA for the query projections, as a diffusers state dict."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in of.named_modules():
        if name.endswith("to_q"):
            state[f"unet.{name}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator)
            state[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator)
    return state


@pytest.mark.slow
@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("padded", [False, True])
def test_lora(padded: bool, backend: str | None, said: Callable[[], list[str]]) -> None:
    """Hot swaps show at once; whatever else changes which adapters there are, or how much of them, is captured anew."""
    pytest.importorskip("peft")
    pipe = stable_diffusion()
    m = pipe.unet
    counter: Any = CompileCounterWithBackend(backend) if backend else CompileCounter()
    pipe.unet = fast = bgx.optimize(m, method=METHOD, backend=counter, max_graphs=20)

    def call(recompiles: int, **kwargs: Any) -> None:
        count = counter.frame_count
        for _ in range(2):
            output = fast(SAMPLE, 5, TEXT, **kwargs).sample
        torch.testing.assert_close(output, m(SAMPLE, 5, TEXT, **kwargs).sample, rtol=1e-3, atol=1e-3)
        assert counter.frame_count - count == recompiles == len(said()) + (count == 0)

    def swap(seed: int, rank: int) -> None:
        fast.load_lora_adapter(lora(m, seed, rank), prefix="unet", adapter_name="a", hotswap=True)

    if padded:
        fast.enable_lora_hotswap(target_rank=4)
    call(1)
    pipe.load_lora_weights(lora(m, 1), adapter_name="a")
    call(1)
    swap(2, rank=2)
    call(0)
    swap(3, rank=4)
    call(0 if padded else 1)
    if padded:  # peft's scales are then tensors
        with pytest.raises(bgx.CaptureError, match=r"for the scale of a LoRA, call set_adapters\(\) instead"):
            fast(SAMPLE, 5, TEXT, cross_attention_kwargs={"scale": 0.5})
        said()
    else:
        call(1, cross_attention_kwargs={"scale": 0.5})
    call(0)
    if backend:
        return
    pipe.load_lora_weights(lora(m, 4), adapter_name="b")
    call(1)
    pipe.set_adapters(["a", "b"], [0.5, 0.25])
    call(1)
    pipe.disable_lora()
    call(1)
    pipe.enable_lora()
    call(0)
    pipe.fuse_lora()
    call(1)
    pipe.unfuse_lora()
    call(1)
    pipe.unload_lora_weights()
    call(1)


class Counting(Model):
    """Counts its calls, in a buffer or in a plain tensor."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.count = nn.Buffer(torch.zeros(2)) if buffer else torch.zeros(2)

    def forward(self, image: Tensor) -> Tensor:
        self.count[0].add_(1)
        return super().forward(image) + self.count[0]


def test_what_forward_writes_must_be_a_buffer() -> None:
    m = Counting(buffer=True).eval()
    fast = bgx.optimize(m, method=METHOD, backend="eager")
    torch.testing.assert_close(fast(IMAGE) + 1, fast(IMAGE))
    assert m.count[0] == 2
    with pytest.raises(
        bgx.CaptureError, match=r"forward of Counting writes into a tensor that is no buffer \(aten.add_"
    ):
        bgx.optimize(Counting(buffer=False).eval(), (IMAGE,), method=METHOD)


@pytest.mark.slow
def test_writes_and_changes_under_inductor(said: Callable[[], list[str]]) -> None:
    m, counter = model(), CompileCounterWithBackend("inductor")
    fast = bgx.optimize(m, method=METHOD, backend=counter)
    fast(IMAGE)
    for write in WRITES.values():
        write(m)
        torch.testing.assert_close(fast(IMAGE), m(IMAGE), rtol=1e-4, atol=1e-3)
    assert counter.frame_count == 1
    CHANGES["another processor"][0](m)
    CHANGES["a new parameter"][0](m)
    for _ in range(2):
        torch.testing.assert_close(fast(IMAGE), m(IMAGE), rtol=1e-4, atol=1e-3)
    assert counter.frame_count == 2
    assert len(said()) == 1


def test_threads_share_it() -> None:
    """Each call runs the graph of its own inputs, whoever captures or calls beside it."""
    torch.manual_seed(0)
    model = toys.Separate().eval()
    images = [torch.randn(1, 3, 4 + 2 * (index % 4), 6) for index in range(64)]
    alone = bgx.optimize(model, method=bgx.LaplacianMerge(0.5), backend="eager")
    expected = [alone(image) for image in images]
    shared = bgx.optimize(model, method=bgx.LaplacianMerge(0.5), backend="eager")
    with ThreadPoolExecutor(8) as pool:
        for output, value in zip(pool.map(shared, images), expected, strict=True):
            assert torch.equal(output, value)


def test_a_list_is_given_back_as_it_is() -> None:
    class Listing(toys.Separate):
        def forward(self, image: Tensor, return_dict: bool = True) -> list[Tensor]:  # type: ignore[override]
            return [super().forward(image)]

    fast = bgx.optimize(Listing().eval(), method=bgx.LaplacianMerge(0.5), backend="eager")
    assert isinstance(fast(toys.image(), return_dict=False), list)
