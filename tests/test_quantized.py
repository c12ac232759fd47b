"""Layers of a quantizer, as of bitsandbytes or GGUF: found, rewritten and called as they are; toys are the oracle."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import bigain_fx as bgx
from bigain_fx.calls import check_inputs
from bigain_fx.quantized import plain_layers
from tests import toys
from tests.test_sites import with_oracle

MERGE, KV = bgx.LaplacianMerge(0.5), bgx.KVDownsample(2, 0.9)


class Packed(nn.Parameter):
    """Bytes in one column, and what makes numbers of them as an attribute, which tracing loses."""

    scale: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, weight: Tensor) -> Packed:
        scale = weight.detach().abs().amax() / 127
        packed = Tensor._make_subclass(cls, (weight.detach() / scale).round().to(torch.int8).reshape(-1, 1), False)
        packed.scale, packed.sizes = scale, weight.shape
        return packed

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return Packed.of(self.numbers(torch.float32))

    def numbers(self, dtype: torch.dtype) -> Tensor:
        return self.view(self.sizes).to(dtype) * self.scale.to(dtype)


class Linear8(nn.Module):
    """A linear layer by its sizes alone, with a bias."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.calls = layer.in_features, layer.out_features, 0
        self.weight, self.bias = Packed.of(layer.weight), layer.bias

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return nn.functional.linear(x, self.weight.numbers(x.dtype), self.bias)


class Conv8(nn.Conv2d):
    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride)  # type: ignore[arg-type]
        self.weight, self.bias = Packed.of(layer.weight), layer.bias

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight.numbers(input.dtype), self.bias)


def quantized(toy: toys.Toy, kind: type[Linear8] = Linear8) -> toys.Toy:
    for name, layer in list(toy.named_children()):
        if isinstance(layer, nn.Linear):
            setattr(toy, name, kind(layer))
        elif isinstance(layer, nn.Conv2d):
            setattr(toy, name, Conv8(layer))
    return toy.eval()


def optimized(toy: nn.Module, *methods: Any, backend: Any = "eager", **options: Any) -> Any:
    return bgx.optimize(toy, kwargs={"image": IMAGE}, method=methods, backend=backend, **options)


IMAGE = toys.image()
TOYS = [toy for toy in toys.REWRITTEN if toy is not toys.Casts]  # which reads the weights itself


@pytest.mark.parametrize(("merge", "kv"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", TOYS, ids=lambda kind: kind.__name__)
def test_a_toy_of_quantized_layers_equals_its_oracle(kind: type[toys.Toy], merge: bool, kv: bool) -> None:
    toy = quantized(kind())
    fast = optimized(toy, *[MERGE] * merge, *[KV] * kv)
    (record,) = fast.report.sites
    assert record.action == ("+".join(["merge"] * merge + ["kv"] * kv) or "kept")
    torch.testing.assert_close(fast(IMAGE), with_oracle(toy, IMAGE, merge, kv), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [toys.Separate, toys.FusedProjection])
def test_compiled_it_is_one_graph(kind: type[toys.Toy]) -> None:
    toy, counter = quantized(kind()), CompileCounter()
    expected = optimized(toy, MERGE, KV)(IMAGE)
    fast = optimized(toy, MERGE, KV, backend=counter)
    torch.testing.assert_close(fast(IMAGE), expected)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_under_inductor() -> None:
    toy = quantized(toys.Separate())
    expected = optimized(toy, MERGE)(IMAGE)
    torch.testing.assert_close(optimized(toy, MERGE, backend="inductor")(IMAGE), expected, rtol=1e-3, atol=1e-4)


def test_a_fused_layer_runs_once_for_each_input() -> None:
    """Its weight cannot be cut into rows: what comes out of it is."""
    toy = quantized(toys.FusedProjection())
    fast = optimized(toy, KV)
    called = toy.qkv.calls  # type: ignore[union-attr]
    fast(IMAGE)
    assert toy.qkv.calls == called + 2  # type: ignore[union-attr]


def state(module: nn.Module) -> dict[str, Any]:
    held = {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
    return {name: value for name, value in held.items() if name != "calls"}


def test_a_capture_leaves_model_and_graphs_alone() -> None:
    """A graph of the model may be at work in another thread meanwhile."""
    toy = quantized(toys.Separate())
    toy.q.register_forward_hook(lambda module, args, output: None)
    fast = optimized(toy, MERGE)
    graph, expected = fast.prepare(image=IMAGE).graph, fast(IMAGE)
    layers = list(toy.modules())
    before = list(map(state, layers))
    with plain_layers(toy), torch.no_grad():
        assert toy.q not in layers
        assert list(map(state, layers[1:])) == before[1:]
        torch.testing.assert_close(graph(IMAGE)[0], expected)
    assert list(toy.modules()) == layers
    assert list(map(state, layers)) == before
    assert fast.state_dict().keys() == toy.state_dict().keys()
    assert [id(weight) for weight in fast.parameters()] == [id(weight) for weight in toy.parameters()]


def test_a_layer_is_called_as_it_is_now(caplog: pytest.LogCaptureFixture) -> None:
    """What becomes of it between two calls is no change of the graph; another in its place is."""
    toy, seen = quantized(toys.Separate()), []
    fast = optimized(toy, MERGE)
    with torch.no_grad():
        fast(IMAGE)
        toy.q.weight.scale = toy.q.weight.scale * 3  # type: ignore[union-attr]
        toy.k.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
        images = fast(IMAGE)
        assert seen == [(2, toys.N // 2, toys.C)]
        torch.testing.assert_close(images, optimized(toy, MERGE)(IMAGE))
        assert not [record for record in caplog.records if record.name == "bigain_fx"]
        with caplog.at_level(logging.WARNING, "bigain_fx"):
            toy.v = Linear8(nn.Linear(toys.C, toys.C))  # type: ignore[assignment]
            torch.testing.assert_close(fast(IMAGE), optimized(toy, MERGE)(IMAGE))
    assert "v" in caplog.text


def test_copies_and_dtypes() -> None:
    toy = quantized(toys.Separate())
    fast = optimized(toy, MERGE)
    expected = fast(IMAGE)
    torch.testing.assert_close(copy.deepcopy(fast)(IMAGE), expected)
    for name in ("norm", "embed", "q", "k", "v", "out"):
        for tensor in getattr(toy, name).parameters():
            if tensor.is_floating_point():
                tensor.data = tensor.data.double()
    assert fast(IMAGE.double()).dtype == torch.float64


class Wide(Linear8):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()  # type: ignore[no-any-return]


class Short(Linear8):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :8]  # type: ignore[no-any-return]


class Tagged(Tensor):
    pass


class Tagging(Linear8):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).as_subclass(Tagged)  # type: ignore[no-any-return]


class Broken(Linear8):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("call .cuda() first\nor else")


class Untraceable(nn.Linear):
    """Its weight is plain, and its forward cannot be traced."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * float(self.weight.abs().max())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Wide, r"q \(Wide of tests\) gives \(1, 1, 16\) torch.float64 for \(1, 1, 16\) torch.float32, where"),
        (Short, r"q \(Short of tests\) gives \(1, 1, 8\) torch.float32 for \(1, 1, 16\) torch.float32, where"),
        (Tagging, r"q \(Tagging of tests\) gives the type Tagged of tests, where"),
        (Broken, r"q \(Broken of tests\) does not run: call \.cuda\(\) first"),
        (
            Untraceable,
            r"cannot capture Separate: .*; a layer that computes in its own way is q \(Untraceable of tests\)",
        ),
    ],
)
def test_what_is_no_plain_layer_is_named(kind: type[Linear8], reason: str) -> None:
    toy = quantized(toys.Separate(), kind)
    with pytest.raises(bgx.CaptureError, match=reason) as caught:
        optimized(toy, MERGE)
    assert "\n" not in str(caught.value)


class Within(toys.Toy):
    """One layer is called under an autocast of its own."""

    device, enabled = "cuda", False

    def branch(self, x: Tensor, metric: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.enabled):
            x = x + self.out(x)
        return super().branch(x, x)


class WithinCast(Within):
    device, enabled = "cpu", True


def test_contexts() -> None:
    toy = quantized(Within())
    torch.testing.assert_close(optimized(toy, MERGE)(IMAGE), with_oracle(toy, IMAGE, True, False), rtol=1e-4, atol=1e-5)
    with pytest.raises(bgx.CaptureError, match=r"out \(Linear8 of tests\) runs under an autocast of its own"):
        optimized(quantized(WithinCast()))


@pytest.mark.parametrize("select", ["all", "auto"])
def test_select_measures_the_layers(select: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (record,) = optimized(quantized(toys.Separate()), MERGE, select=select).report.sites
    assert "not measured" not in record.reason
    assert (record.ms is not None) == (select == "auto")


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_files_are_refused(suffix: str, tmp_path: Path) -> None:
    export: Any = {".onnx": bgx.export_onnx, ".pt2": bgx.export_package}[suffix]
    with pytest.raises(bgx.ExportError, match=r"embed \(Conv8 of tests\) is quantized") as caught:
        export(quantized(toys.Separate()), (IMAGE,), tmp_path / f"toy{suffix}", method=MERGE)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_float8_is_no_dtype_to_compute_in() -> None:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with torch.no_grad():
        check_inputs(layer, {"x": torch.ones(2)})
        with pytest.raises(bgx.InputError, match=r"the weights torch\.float32"):
            check_inputs(layer, {"x": torch.ones(2).double()})
