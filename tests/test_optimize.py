"""`optimize` as its users call it: any way of calling, any mode, clear refusals."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import bigain_fx as bgx
from tests import toys


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    ).eval()  # fmt: skip


def dit(classes: int = 10) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=16,
        patch_size=2, num_embeds_ada_norm=classes,
    ).eval()  # fmt: skip


SAMPLE, TEXT = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
METHOD = bgx.LaplacianMerge(0.5)

CALLS: list[Callable[[nn.Module], Any]] = [
    lambda m: m(SAMPLE, 7, TEXT),
    lambda m: m(SAMPLE, torch.tensor(7), TEXT),
    lambda m: m(SAMPLE, torch.tensor(7), encoder_hidden_states=TEXT),
    lambda m: m(sample=SAMPLE, timestep=torch.tensor(9), encoder_hidden_states=TEXT, cross_attention_kwargs=None),
    lambda m: m(SAMPLE, 3, TEXT, None, timestep_cond=None, added_cond_kwargs=None, return_dict=True),
    lambda m: m(SAMPLE, 3, encoder_hidden_states=TEXT, return_dict=False)[0],
]


def first(output: Any) -> Tensor:
    tensor: Tensor = output if isinstance(output, Tensor) else output.sample
    return tensor


@torch.no_grad()
def test_every_way_of_calling_is_one_graph() -> None:
    model, counter = unet(), CompileCounter()
    fast = bgx.optimize(model, (SAMPLE, 1, TEXT), method=METHOD, backend=counter)
    same = bgx.optimize(model, method=METHOD, backend="eager")
    for call in CALLS:
        torch.testing.assert_close(first(call(fast)), first(call(same)))
    with torch.inference_mode():
        for call in CALLS:
            call(fast)
    fast(SAMPLE.clone(), 5, TEXT.clone())
    assert counter.frame_count == 1


def test_a_callers_modes_do_not_recompile() -> None:
    counter = CompileCounter()
    fast = bgx.optimize(unet(), method=METHOD, backend=counter)
    fast(SAMPLE, 1, TEXT)
    with torch.no_grad():
        fast(SAMPLE, 2, TEXT)
    with torch.inference_mode():
        output = fast(torch.randn(2, 4, 8, 8), torch.tensor(3), TEXT).sample
    assert not output.requires_grad
    assert counter.frame_count == 1


@torch.no_grad()
def test_output_class_and_attributes_are_the_originals() -> None:
    model = unet()
    fast = bgx.optimize(model, (SAMPLE, 1, TEXT), method=METHOD, backend="eager")
    assert type(fast(SAMPLE, 1, TEXT)) is type(model(SAMPLE, 1, TEXT))
    assert isinstance(fast(SAMPLE, 1, TEXT, return_dict=False), tuple)
    assert (fast.config, fast.dtype, fast.device) == (model.config, model.dtype, model.device)
    assert fast.original is model
    with pytest.raises(AttributeError, match="no_such_thing"):
        fast.no_such_thing  # noqa: B018


@torch.no_grad()
def test_the_original_is_untouched_and_its_weights_are_shared() -> None:
    model = unet()
    before, keys = first(model(SAMPLE, 1, TEXT)), list(model.state_dict())
    fast = bgx.optimize(model, (SAMPLE, 1, TEXT), method=METHOD, backend="eager")
    compressed = first(fast(SAMPLE, 1, TEXT))
    assert torch.equal(first(model(SAMPLE, 1, TEXT)), before)
    assert list(model.state_dict()) == keys
    assert not torch.equal(compressed, before)
    model.conv_out.bias.add_(1)
    torch.testing.assert_close(first(fast(SAMPLE, 1, TEXT)), compressed + 1)


@torch.no_grad()
def test_a_new_signature_is_captured_once_and_said(caplog: pytest.LogCaptureFixture) -> None:
    counter = CompileCounter()
    fast = bgx.optimize(unet(), method=METHOD, backend=counter)
    with caplog.at_level(logging.WARNING, "bigain_fx"):
        fast(SAMPLE, 1, TEXT)
        assert not caplog.records
        for _ in range(2):
            fast(torch.randn(1, 4, 8, 12), 1, TEXT[:1])
    assert [record.message for record in caplog.records] == [
        "UNet2DConditionModel: new input signature, capturing graph 2: sample (1, 4, 8, 12) float32, "
        "timestep () int64, encoder_hidden_states (1, 5, 16) float32"
    ]
    assert fast.report.sites[0].grid == (8, 12)
    assert counter.frame_count == 2


@pytest.mark.parametrize("method", [(), bgx.LaplacianMerge(0), bgx.ToMe(0), bgx.BlockPool(0.01)], ids=str)
@torch.no_grad()
def test_nothing_to_do_is_the_captured_graph_itself(method: Any) -> None:
    model = dit()
    inputs = {"hidden_states": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([3, 8]),
              "class_labels": torch.tensor([1, 2])}  # fmt: skip
    dense = bgx.optimize(model, None, inputs, method=None, backend="eager")
    fast = bgx.optimize(model, None, inputs, method=method, backend="eager")
    assert torch.equal(fast(**inputs).sample, dense(**inputs).sample)
    assert torch.equal(fast(**inputs).sample, model(**inputs).sample)
    assert {site.action for site in fast.report.sites} == {"kept"}
    assert all(site.reason for site in fast.report.sites)


def test_the_report() -> None:
    report = bgx.optimize(unet(), (SAMPLE, 1, TEXT), method=(METHOD, bgx.KVDownsample(2)), backend="eager").report
    assert [(site.name, site.action, site.tokens, site.tokens_after) for site in report.rewritten] == [
        (f"{block}.transformer_blocks.0.attn1", "merge+kv", 64, 32)
        for block in ("down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1")
    ]
    kept = [site for site in report.sites if site.action == "kept"]
    assert len(kept) == 5
    reasons = [("attn2" in site.name) == ("cross-attention" in site.reason) for site in kept]
    assert all(reasons)
    data = report.to_dict()
    assert data["methods"] == ["bigain-td:2:0.9", "bigain-tm:0.5"]
    assert [site["name"] for site in data["sites"]] == [site.name for site in report.sites]
    assert report.flops_after < report.flops
    for site in report.sites:
        assert site.name in str(report)
        assert f"| {site.name} |" in report.to_markdown()
    with pytest.raises(AttributeError):
        report.flops = 1  # type: ignore[misc]


def test_inspect_changes_nothing_and_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = dit()
        args = (torch.randn(1, 4, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    report = bgx.inspect(model, args)
    assert {site.reason for site in report.sites} == {"no method"}
    assert {site.grid for site in report.sites} == {(8, 8)}
    # q, k, v and out: 4 * 64 tokens * 16 * 16; scores and sums: 2 * 64 * 64 * 16. Two operations each.
    assert {site.flops for site in report.sites} == {2 * (4 * 64 * 16 * 16 + 2 * 64 * 64 * 16)}


def breaks(image: Tensor) -> Tensor:
    return image if image.sum() > 0 else -image


class Unexportable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        return breaks(image) * self.scale


def fast_unet() -> nn.Module:
    return bgx.optimize(unet(), (SAMPLE, 1, TEXT), method=METHOD, backend="eager")


SCHEDULE = bgx.KVDownsample(2, bgx.LinearAlpha(t_noisy=999, t_clean=0))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: bgx.optimize(unet().train(), method=METHOD), bgx.InputError, "in train mode; call model.eval"),
        (lambda: bgx.optimize("unet", method=METHOD), bgx.InputError, "model=str is not an nn.Module"),
        (lambda: bgx.optimize(fast_unet(), method=METHOD), bgx.InputError, "already optimized"),
        (lambda: bgx.optimize(unet(), (SAMPLE,), method=METHOD), bgx.InputError, "missing a required argument"),
        (lambda: bgx.optimize(unet(), method=METHOD).report, bgx.InputError, "nothing was captured yet"),
        (lambda: bgx.optimize(unet(), (SAMPLE, 1, TEXT), method=METHOD, grid=(3, 3)), bgx.GridError, "contradicts"),
        (lambda: bgx.optimize(Unexportable().eval(), (SAMPLE,), method=METHOD), bgx.CaptureError, "Unexportable"),
        (lambda: bgx.optimize(toys.Separate().eval(), (toys.image(),), method=SCHEDULE), bgx.RewriteError,
         r"none of the model's inputs \['image'\] is called timestep"),
        (lambda: fast_unet()(SAMPLE.double(), 1, TEXT), bgx.InputError, r"\['sample'\] has dtype torch.float64"),
        (lambda: fast_unet()(SAMPLE.to("meta"), 1, TEXT), bgx.InputError, "is on meta, the weights on cpu"),
        (lambda: fast_unet()(SAMPLE, 1, TEXT, nonsense=1), bgx.InputError, "unexpected keyword argument 'nonsense'"),
        (lambda: fast_unet()(SAMPLE.clone().requires_grad_(), 1, TEXT), bgx.InputError, "requires gradients"),
        (lambda: fast_unet()(SAMPLE.numpy(), 1, TEXT), bgx.InputError, "an input is a ndarray; pass a torch.Tensor"),
        (lambda: fast_unet().train(), bgx.InputError, "cannot train"),
        (lambda: bgx.optimize(torch.compile(unet()), method=METHOD), bgx.InputError, "compiled by torch.compile"),
        (lambda: bgx.optimize(unet(), method=METHOD, max_graphs=0), bgx.InputError, "max_graphs=0 must be a positive"),
        (lambda: bgx.optimize(unet(), method=METHOD, on_new_signature="stop"), bgx.InputError,  # type: ignore[arg-type]
         "on_new_signature='stop' must be 'compile' or 'raise'"),
        (lambda: bgx.optimize(unet(), method=0.7), bgx.MethodError, "method=.*0.7.* must be a LaplacianMerge"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_autocast_is_captured_on_its_own() -> None:
    fast = fast_unet()
    plain = fast(SAMPLE, 1, TEXT).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fast(SAMPLE, 1, TEXT).sample
        assert cast.dtype == torch.bfloat16
        assert len(fast.report.rewritten) == 3
    assert fast(SAMPLE, 1, TEXT).sample.dtype == plain.dtype
    assert (cast.float() - plain).norm() < 0.1 * plain.norm()


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.randn(2, 5, 16))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first + 2 * second + 3 * self.scale


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("given", ["twice", "as a view", "as a buffer"])
def test_one_tensor_in_two_places_is_two_inputs(given: str, backend: str) -> None:
    model = Sum().eval()
    fast = bgx.optimize(model, method=(), backend=backend)
    second = {"twice": TEXT, "as a view": TEXT[:], "as a buffer": model.scale}[given]
    for one, other in ((TEXT, second), (TEXT, torch.randn(2, 5, 16)), (torch.randn(2, 5, 16), TEXT)):
        torch.testing.assert_close(fast(one, other), model(one, other))
