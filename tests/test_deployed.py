"""Exported denoisers as their users call them: any way of calling, IO binding, clear refusals, stock pipelines."""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import BaseOutput
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import bigain_fx as bgx
from bigain_fx.calls import CallBinder, flat_tensors
from bigain_fx.deployed import DeployedDenoiser, OrtDenoiser
from bigain_fx.export.interface import Interface, describe
from bigain_fx.export.ports import Port
from bigain_fx.export.session import Session
from bigain_fx.passes.errors import ExportError
from tests.test_pipelines import vae

CONFIG = {"sample_size": 8, "in_channels": 4, "block_out_channels": (8, 16), "time_cond_proj_dim": None,
          "addition_time_embed_dim": 2, "projection_class_embeddings_input_dim": 28, "_name_or_path": "somewhere",
          "norm": object()}  # fmt: skip
CODES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.int64: TensorProto.INT64,
         torch.bool: TensorProto.BOOL}  # fmt: skip
WEIGHT = np.linspace(1, 2, 4, dtype=np.float32).reshape(1, 4, 1, 1)


class Toy(nn.Module):
    """``sample * weight + timestep + mean(text)``, and what a U-Net's ``forward`` is like."""

    def __init__(self) -> None:
        super().__init__()
        self.config = CONFIG

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        mask: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        center: bool = False,
        return_dict: bool = True,
        **extra: Any,
    ) -> Any:
        time = torch.as_tensor(timestep, dtype=sample.dtype).reshape(-1, 1, 1, 1)
        output = (
            sample * torch.from_numpy(WEIGHT).to(sample)
            + time
            + encoder_hidden_states.mean((1, 2))[:, None, None, None]
        )
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)


def call(batch: int = 2, side: int = 8, dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    return {"sample": torch.randn(batch, 4, side, side, dtype=dtype), "timestep": torch.tensor(5.0),
            "encoder_hidden_states": torch.randn(batch, 5, 16, dtype=dtype), **more}  # fmt: skip


class Defaults(Toy):
    """Gives a tuple unless asked, and has a timestep of its own."""

    def forward(  # type: ignore[override]
        self, sample: Tensor, encoder_hidden_states: Tensor, timestep: float = 7.0, return_dict: bool = False
    ) -> Any:
        return super().forward(sample, timestep, encoder_hidden_states, return_dict=return_dict)


def interface_of(kwargs: dict[str, Any], output: Any = None, model: nn.Module | None = None) -> Interface:
    model = model or Toy()
    arguments, _ = CallBinder(model).bind((), kwargs)
    tensors, spec = pytree.tree_flatten(model(**arguments) if output is None else output)
    return describe(
        model, inspect.signature(model.forward), arguments, spec, tensors, "bigain-tm:0.5", (8, 8),
        {"bigain_fx": "0.1", "torch": "2", "opset": "20"},
    )  # fmt: skip


def save(path: Path, interface: Interface, external: bool = False, metadata: dict[str, str] | None = None) -> Path:
    """The graph of :class:`Toy`; inputs that it does not know are taken and left."""
    sample, text = interface.inputs[0], next(port for port in interface.inputs if port.name == "encoder_hidden_states")
    code = CODES[sample.torch_dtype]
    nodes = [
        helper.make_node("Cast", ["weight"], ["w"], to=code),
        helper.make_node("Mul", ["sample", "w"], ["scaled"]),
        helper.make_node("Cast", ["timestep"], ["cast"], to=code),
        helper.make_node("Reshape", ["cast", "column"], ["time"]),
        helper.make_node("ReduceMean", ["encoder_hidden_states", "axes"], ["mean"], keepdims=0),
        helper.make_node("Reshape", ["mean", "column"], ["offset"]),
        helper.make_node("Add", ["scaled", "time"], ["later"]),
        helper.make_node("Add", ["later", "offset"], [interface.outputs[0].name]),
    ]
    assert text.shape[0] == sample.shape[0]
    values = [
        helper.make_tensor_value_info(port.name, CODES[port.torch_dtype], port.shape)
        for port in interface.inputs + interface.outputs
    ]
    weights = [numpy_helper.from_array(WEIGHT, "weight"), numpy_helper.from_array(np.array([-1, 1, 1, 1]), "column"),
               numpy_helper.from_array(np.array([1, 2]), "axes")]  # fmt: skip
    graph = helper.make_graph(nodes, "toy", values[:-1], values[-1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, interface.to_metadata() if metadata is None else metadata)
    if external:
        set_external_data(model.graph.initializer[0], f"{path.name}.data")
    onnx.save(model, path)
    return path


def toy(folder: Path, kwargs: dict[str, Any] | None = None, **options: Any) -> OrtDenoiser:
    return OrtDenoiser(save(folder / "toy.onnx", interface_of(kwargs or call())), **options)


KWARGS = call()
SAMPLE, TEXT = KWARGS["sample"], KWARGS["encoder_hidden_states"]

CALLS: list[Callable[[nn.Module], Any]] = [
    lambda m: m(SAMPLE, 7, TEXT),
    lambda m: m(SAMPLE, 7.5, TEXT),
    lambda m: m(SAMPLE, np.int64(7), TEXT),
    lambda m: m(SAMPLE, torch.tensor(7), TEXT),
    lambda m: m(SAMPLE, torch.tensor(7.25, dtype=torch.float64), encoder_hidden_states=TEXT),
    lambda m: m(SAMPLE, torch.tensor([7]), TEXT),
    lambda m: m(SAMPLE, torch.tensor([7, 7]), TEXT),
    lambda m: m(encoder_hidden_states=TEXT, timestep=torch.tensor(7, dtype=torch.float16), sample=SAMPLE),
    lambda m: m(SAMPLE, 3, TEXT, None, timestep_cond=None, added_cond_kwargs=None, return_dict=True),
    lambda m: m(SAMPLE, 3, TEXT, added_cond_kwargs={"text_embeds": None}, cross_attention_kwargs={}, center=False),
    lambda m: m(SAMPLE, 3, encoder_hidden_states=TEXT, return_dict=False),
    lambda m: m(SAMPLE, 3, TEXT, None, None, None, None, False, False),
    lambda m: m(SAMPLE.permute(0, 1, 3, 2), 3, TEXT[:, :, torch.arange(15, -1, -1)]),
    lambda m: m(SAMPLE.to(memory_format=torch.channels_last), 3, TEXT.mT.contiguous().mT),
    lambda m: m(torch.randn(1 + SAMPLE.numel())[1:].view_as(SAMPLE), 3, TEXT),
]  # fmt: skip


@pytest.mark.parametrize("make", CALLS, ids=range(len(CALLS)))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_way_of_calling(tmp_path: Path, make: Callable[[nn.Module], Any], mode: Any) -> None:
    deployed = toy(tmp_path)
    with mode():
        torch.manual_seed(1)
        expected = make(Toy())
        torch.manual_seed(1)
        found = make(deployed)
    assert isinstance(found, tuple) == isinstance(expected, tuple)
    torch.testing.assert_close(found[0], expected[0])
    assert not found[0].requires_grad
    assert not found[0].is_inference()


def test_the_output_is_as_diffusers_has_them(tmp_path: Path) -> None:
    output = toy(tmp_path)(**KWARGS)
    assert isinstance(output, BaseOutput)
    assert list(output) == ["sample"]
    assert output.sample is output[0] is output["sample"]
    assert output.to_tuple() == (output.sample,)


def test_each_call_gives_fresh_tensors(tmp_path: Path) -> None:
    deployed, sample = toy(tmp_path), SAMPLE.clone()
    first = deployed(sample, 1, TEXT).sample
    before = first.clone()
    second = deployed(SAMPLE + 1, 2, TEXT).sample
    assert torch.equal(first, before)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(sample, SAMPLE)


@pytest.mark.parametrize("timestep", [torch.tensor([4, 9]), torch.tensor([4.5, 9.5]), 3, torch.tensor([2])], ids=str)
def test_a_timestep_for_each_of_the_batch(tmp_path: Path, timestep: Any) -> None:
    deployed = toy(tmp_path, call(timestep=torch.tensor([1.0, 2.0])))
    torch.testing.assert_close(deployed(SAMPLE, timestep, TEXT).sample, Toy()(SAMPLE, timestep, TEXT).sample)


def test_float16(tmp_path: Path) -> None:
    kwargs = call(dtype=torch.float16)
    deployed = toy(tmp_path, kwargs)
    output = deployed(**kwargs).sample
    assert deployed.dtype == output.dtype == torch.float16
    torch.testing.assert_close(output, Toy()(**kwargs).sample, rtol=3e-3, atol=3e-3)
    with pytest.raises(bgx.InputError, match=r"sample has dtype torch.float32, the graph takes torch.float16; cast it"):
        deployed(SAMPLE, 1, TEXT)


def test_nested_inputs_masks_and_constants(tmp_path: Path) -> None:
    kwargs = call(
        mask=torch.ones(2, 5, dtype=torch.bool), cross_attention_kwargs={"scale": 0.5, "gligen": None}, center=True,
        added_cond_kwargs={"text_embeds": torch.randn(2, 6), "time_ids": torch.randn(2, 6)},
        residuals=[torch.randn(2, 1), torch.randn(2, 2)],
    )  # fmt: skip
    deployed = toy(tmp_path, kwargs)
    arguments, _ = CallBinder(Toy()).bind((), kwargs)
    ports = deployed.interface.inputs
    assert [port.shape for port in ports] == [tuple(tensor.shape) for tensor in flat_tensors(arguments)]
    assert [port.name for port in ports] == [
        "sample", "timestep", "encoder_hidden_states", "mask", "text_embeds", "time_ids", "residuals_0", "residuals_1",
    ]  # fmt: skip
    assert deployed.interface.constants == {"cross_attention_kwargs.scale": 0.5, "center": True}
    expected = Toy()(**kwargs).sample
    for mask in (torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.int32)):
        torch.testing.assert_close(deployed(**{**kwargs, "mask": mask}).sample, expected)
    for change, message in (
        ({"center": False}, "center=False is not what the graph was exported with; .*center=True"),
        ({"cross_attention_kwargs": {"scale": 1.0}}, "cross_attention_kwargs.scale=1.0 is not what"),
        ({"cross_attention_kwargs": None}, "cross_attention_kwargs.scale is missing; .*scale=0.5"),
        ({"mask": None}, "mask is missing; the graph takes sample"),
        ({"added_cond_kwargs": {"time_ids": torch.zeros(2, 6)}}, "added_cond_kwargs.text_embeds is missing"),
    ):
        with pytest.raises(bgx.InputError, match=message):
            deployed(**{**kwargs, **change})


def test_defaults_are_the_originals(tmp_path: Path) -> None:
    interface = interface_of(call(), model=Defaults())
    assert (interface.constants, interface.defaults) == ({}, {"timestep": 7.0, "return_dict": False})
    deployed = OrtDenoiser(save(tmp_path / "toy.onnx", interface))
    for make in (
        lambda m: m(SAMPLE, TEXT),
        lambda m: m(SAMPLE, TEXT, 3),
        lambda m: m(SAMPLE, TEXT, return_dict=True),
        lambda m: m(SAMPLE, TEXT, 3, True),
    ):
        assert isinstance(make(deployed), tuple) == isinstance(make(Defaults()), tuple)
        torch.testing.assert_close(make(deployed)[0], make(Defaults())[0])


def test_names_that_collide_are_joined() -> None:
    kwargs = call(cross_attention_kwargs={"sample": torch.zeros(1)}, added_cond_kwargs={"text": torch.zeros(2)})
    names = [port.name for port in interface_of(kwargs).inputs]
    assert names == ["sample", "timestep", "encoder_hidden_states", "cross_attention_kwargs_sample", "text"]


@dataclass
class Residuals(BaseOutput):
    down: tuple[Tensor, Tensor]
    middle: Tensor


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda a, b, c: Residuals(down=(a, b), middle=c), ["out_down_0", "out_down_1", "out_middle"]),
        (lambda a, b, c: (a, [b, c]), ["out_0", "out_1_0", "out_1_1"]),
        (lambda a, b, c: {"sample": a}, ["out_sample"]),
        (lambda a, b, c: a, ["out_sample"]),
    ],
)  # fmt: skip
def test_outputs_of_every_form(make: Callable[..., Any], names: list[str]) -> None:
    given = make(*torch.arange(3.0))
    interface = interface_of(KWARGS, given)
    assert [port.name for port in interface.outputs] == names
    leaves, _ = pytree.tree_flatten(given)
    built = Interface.from_metadata(interface.to_metadata()).output(leaves)
    assert pytree.tree_leaves(built) == leaves
    assert type(built) is (dict if isinstance(given, dict) else type(given))


def test_the_interface_survives_the_file(tmp_path: Path) -> None:
    interface = interface_of(call(center=True))
    loaded = OrtDenoiser(save(tmp_path / "toy.onnx", interface)).interface
    assert loaded == interface
    assert loaded.config["block_out_channels"] == [8, 16]
    assert not {"_name_or_path", "norm"} & set(loaded.config)
    metadata = interface.to_metadata()
    assert (metadata["method"], metadata["grid"], metadata["opset"]) == ("bigain-tm:0.5", "8x8", "20")
    assert Interface.from_metadata(replace(interface, grid=None).to_metadata()).grid is None


BAD_CALLS: list[tuple[Callable[[DeployedDenoiser], Any], str]] = [
    (lambda m: m(SAMPLE[:1], 1, TEXT),
     r"sample has shape \(1, 4, 8, 8\), the graph takes \(2, 4, 8, 8\); it is static: export another size with"),
    (lambda m: m(SAMPLE, 1, TEXT[:, :3]),
     r"encoder_hidden_states has shape \(2, 3, 16\), the graph takes \(2, 5, 16\)"),
    (lambda m: m(SAMPLE.double(), 1, TEXT), "sample has dtype torch.float64, the graph takes torch.float32; cast it"),
    (lambda m: m(SAMPLE.to("meta"), 1, TEXT), "sample is on meta, the graph runs on cpu; move it there"),
    (lambda m: m(SAMPLE.numpy(), 1, TEXT), r"sample is a ndarray; give a torch.Tensor \(2, 4, 8, 8\) float32"),
    (lambda m: m(SAMPLE, 1), r"encoder_hidden_states is missing; the graph takes sample \(2, 4, 8, 8\) float32, time"),
    (lambda m: m(timestep=1, encoder_hidden_states=TEXT), "sample is missing"),
    (lambda m: m(SAMPLE, "1", TEXT), "timestep is a str; give a number or a torch.Tensor"),
    (lambda m: m(SAMPLE, torch.tensor([1, 2]), TEXT), r"timestep has shape \(2,\), the graph takes \(\) or one value"),
    (lambda m: m(SAMPLE, torch.tensor([]), TEXT), r"timestep has shape \(0,\), the graph takes \(\) or one value"),
    (lambda m: m(SAMPLE, torch.ones(1, 1), TEXT), r"timestep has shape \(1, 1\), the graph takes \(\) or one value"),
    (lambda m: m(SAMPLE, 1, TEXT, torch.ones(2)), "mask is a tensor that the graph was exported without; it takes"),
    (lambda m: m(SAMPLE, 1, TEXT, added_cond_kwargs={"time_ids": TEXT}), "added_cond_kwargs.time_ids is a tensor that"),
    (lambda m: m(SAMPLE, 1, TEXT, center=True), "center=True is not what the graph was exported with; it takes sample"),
    (lambda m: m(SAMPLE, 1, TEXT, cross_attention_kwargs={"scale": 2.0}), "cross_attention_kwargs.scale=2.0 is no"),
    (lambda m: m(SAMPLE, 1, TEXT, np.ones(3)), "mask, a ndarray, is not what the graph was exported with"),
    (lambda m: m(SAMPLE, 1, TEXT, nonsense=3), "nonsense=3 is not what the graph was exported with"),
    (lambda m: m(SAMPLE, 1, TEXT, sample=SAMPLE), "sample is given twice"),
    (lambda m: m(*range(10)), "10 arguments by position; Toy takes sample, timestep, encoder_hidden_states"),
    (lambda m: m(SAMPLE.clone().requires_grad_(), 1, TEXT), "sample requires gradients, .*; detach it"),
    (lambda m: m.train(), "cannot train"),
    (lambda m: m.half(), "stays torch.float32 on cpu, it cannot become torch.float16 on cpu"),
    (lambda m: m.to("meta"), "cannot become torch.float32 on meta"),
    (lambda m: m.to("cpu", torch.bfloat16), "cannot become torch.bfloat16 on cpu"),
    (lambda m: nn.Sequential(m).double(), "cannot become torch.float64"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_a_bad_call_is_one_line(tmp_path: Path, make: Callable[[DeployedDenoiser], Any], message: str) -> None:
    with pytest.raises(bgx.InputError, match=message) as caught:
        make(toy(tmp_path))
    assert "\n" not in str(caught.value)


def test_what_changes_nothing_is_allowed(tmp_path: Path) -> None:
    deployed = toy(tmp_path)
    assert deployed.to("cpu").to(torch.float32).to("cpu", torch.float32).float().eval() is deployed
    assert deployed.to(memory_format=torch.channels_last) is deployed
    with torch.no_grad():
        deployed(SAMPLE.clone().requires_grad_(), 1, TEXT)


def test_several_sizes(tmp_path: Path) -> None:
    sizes = [call(), call(side=16), call(batch=1)]
    paths = [save(tmp_path / f"{index}.onnx", interface_of(kwargs)) for index, kwargs in enumerate(sizes)]
    deployed = OrtDenoiser(paths)
    for kwargs in sizes:
        torch.testing.assert_close(deployed(**kwargs).sample, Toy()(**kwargs).sample)
    known = r"there are graphs for \(1, 4, 8, 8\) or \(2, 4, 8, 8\) or \(2, 4, 16, 16\)"
    with pytest.raises(bgx.InputError, match=rf"sample has shape \(3, 4, 8, 8\), {known}; export .*example_inputs="):
        deployed(**call(batch=3))
    with pytest.raises(bgx.InputError, match="sample is missing"):
        deployed()
    with pytest.raises(bgx.InputError, match="two graphs for one size"):
        OrtDenoiser([paths[0], paths[0]])
    with pytest.raises(bgx.InputError, match="path is empty"):
        OrtDenoiser([])
    other = save(tmp_path / "other.onnx", replace(interface_of(sizes[1]), method="dense"))
    with pytest.raises(ExportError, match=r"other.onnx is of another model, method or weights than .*0.onnx"):
        OrtDenoiser([paths[0], other])


def test_what_pipelines_read(tmp_path: Path) -> None:
    deployed = toy(tmp_path)
    assert deployed.config.sample_size == deployed.config["sample_size"] == deployed.sample_size == 8
    assert deployed.config.time_cond_proj_dim is None
    assert not hasattr(deployed.config, "_diffusers_version")
    assert deployed.add_embedding.linear_1.in_features == 28
    assert (deployed.dtype, deployed.device) == (torch.float32, torch.device("cpu"))
    assert not deployed.training
    assert not hasattr(deployed, "encoder_hid_proj")
    assert [(each.numel(), each.dtype) for each in deployed.parameters()] == [(0, torch.float32)]
    with deployed.cache_context("cond"):
        deployed(**KWARGS)
    assert "Toy, bigain-tm:0.5, [(2, 4, 8, 8)], cpu" in repr(deployed)
    plain = OrtDenoiser(save(tmp_path / "plain.onnx", replace(deployed.interface, config={})))
    assert not hasattr(plain, "add_embedding")


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


STABLE = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None,
          "requires_safety_checker": False}  # fmt: skip
PROMPT = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}


@pytest.mark.parametrize("pipeline", [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline])
def test_in_a_stock_pipeline(tmp_path: Path, pipeline: Any) -> None:
    image = {"image": torch.zeros(1, 3, 8, 8)} if "Img2Img" in pipeline.__name__ else {"height": 8, "width": 8}
    embeds = {"prompt_embeds": torch.randn(1, 5, 16), "negative_prompt_embeds": torch.randn(1, 5, 16)}
    found = []
    for model in (stand_in(), toy(tmp_path)):
        pipe = quiet(pipeline(vae=vae(), unet=model, scheduler=DDIMScheduler(clip_sample=False), **STABLE))
        pipe.to("cpu")
        found.append(pipe(**PROMPT, **image, **embeds, generator=torch.Generator().manual_seed(0)).images)
    assert (found[1] - found[0]).norm() < 1e-4 * found[0].norm()


def test_in_a_stock_sdxl_pipeline(tmp_path: Path) -> None:
    added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)}
    pipe = quiet(StableDiffusionXLPipeline(
        vae=vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, add_watermarker=False,
        unet=toy(tmp_path, call(added_cond_kwargs=added)), scheduler=DDIMScheduler(clip_sample=False),
    ))  # fmt: skip
    images = pipe(
        **PROMPT, height=8, width=8, prompt_embeds=torch.randn(1, 5, 16), negative_prompt_embeds=torch.randn(1, 5, 16),
        pooled_prompt_embeds=torch.randn(1, 16), negative_pooled_prompt_embeds=torch.randn(1, 16),
    ).images  # fmt: skip
    assert images.shape == (1, 4, 8, 8)


def stand_in() -> nn.Module:
    """The torch toy with what a pipeline reads of a U-Net."""
    model: Any = Toy()
    model.config = SimpleNamespace(**CONFIG)
    model.dtype, model.device = torch.float32, torch.device("cpu")
    return model  # type: ignore[no-any-return]


def edited(**changes: Any) -> dict[str, str]:
    """The metadata of a good file, with a part of its interface changed."""
    metadata = interface_of(KWARGS).to_metadata()
    return {**metadata, "interface": json.dumps({**json.loads(metadata["interface"]), **changes})}


PORT = {"name": "a", "path": ["a"], "shape": [1], "dtype": "float32"}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "not made by bigain-fx: no interface in the metadata"),
        ({"interface": "{}"}, "not made by bigain-fx"),
        ({"interface": "{", "bigain_fx": "0"}, "malformed .JSONDecodeError"),
        ({"interface": "[]", "bigain_fx": "0"}, "malformed .TypeError"),
        (edited(format=9), "malformed .*format 9, this bigain-fx reads 1"),
        (edited(inputs=[]), "malformed .*must be there"),
        (edited(inputs=[PORT, PORT]), "malformed .*each under its own name"),
        (edited(inputs=[PORT, {**PORT, "name": "b"}]), "malformed .*each its own"),
        (edited(inputs=[{**PORT, "path": []}]), "malformed"),
        (edited(inputs=[{**PORT, "dtype": "load"}]), "malformed .*no tensor is"),
        (edited(inputs=[{**PORT, "shape": [-1]}]), "malformed .*no tensor is"),
        (edited(inputs=[{**PORT, "shape": ["b"]}]), "malformed .*no tensor is"),
        (edited(inputs=[{**PORT, "path": [[]]}]), "malformed .*no path is"),
        (edited(outputs=[{**PORT, "path": ["import os"]}]), "malformed .*names of fields"),
        (edited(outputs=[PORT, {**PORT, "name": "b"}]), "malformed .*not the paths of an output"),
        (edited(outputs=[PORT, {**PORT, "name": "b", "path": [0]}]), "malformed .*names of fields"),
        (edited(outputs=[{**PORT, "path": ["class"]}]), "malformed .*names of fields"),
        (edited(versions=["ort"]), "malformed .KeyError"),
        ({key: value for key, value in edited().items() if key != "method"}, "malformed .KeyError"),
        ({**edited(), "grid": "8"}, "malformed .GridError"),
        (edited(inputs=[PORT]), r"the graph has \[\('sample'.*, its metadata says \[\('a'"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_ours(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    path = save(tmp_path / "toy.onnx", interface_of(KWARGS), metadata=metadata)
    with pytest.raises(ExportError, match=message) as caught:
        OrtDenoiser(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def damage(kind: str, path: Path) -> None:
    data = path.with_name(f"{path.name}.data")
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(b"no model at all")
    elif kind == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "bad graph":
        model = onnx.load(path)
        model.graph.node[0].op_type = "NoSuchOperator"
        onnx.save(model, path)
    elif kind == "no data":
        data.unlink()
    elif kind == "short data":
        os.truncate(data, data.stat().st_size - 1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "toy.onnx is not there"),
        ("empty", "toy.onnx holds no graph; it is cut short, or no ONNX file"),
        ("noise", "toy.onnx is cut short, or no ONNX file"),
        ("cut", "toy.onnx is cut short, or no ONNX file"),
        ("bad graph", "ONNX Runtime cannot load .*toy.onnx: .*NoSuchOperator"),
        ("no data", r"toy.onnx has its weights in .*toy.onnx.data \(\d+ bytes\), which is not there"),
        ("short data", r"toy.onnx has its weights in .*toy.onnx.data: \d+ bytes, but \d+ are there"),
    ],
)
def test_a_damaged_file(tmp_path: Path, kind: str, message: str) -> None:
    path = save(tmp_path / "toy.onnx", interface_of(KWARGS), external=True)
    OrtDenoiser(path)
    damage(kind, path)
    with pytest.raises(ExportError, match=message) as caught:
        OrtDenoiser(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("providers", "message"),
    [
        (["CUDAExecutionProvider"], r"provider CUDAExecutionProvider is not in this onnxruntime, .*onnxruntime-gpu"),
        (
            [("CUDAExecutionProvider", {"device_id": 0}), "CPUExecutionProvider"],
            "provider CUDAExecutionProvider is not",
        ),
        (["NoProvider"], r"provider NoProvider is not in this onnxruntime, which has \[.*'CPUExecutionProvider'\]$"),
        ([], "providers is empty"),
        ([("CPUExecutionProvider", 3)], "providers=.*CPUExecutionProvider"),
    ],
)
def test_a_provider_that_is_not_to_be_had(tmp_path: Path, providers: Any, message: str) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(bgx.InputError, match=message):
        toy(tmp_path, providers=providers)


def test_a_provider_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself only logs it, and runs on the CPU."""
    path, real = save(tmp_path / "toy.onnx", interface_of(KWARGS)), onnxruntime.InferenceSession

    def dropping(path: str, providers: Sequence[str], **options: Any) -> Any:
        return real(path, providers=[name for name in providers if name == "CPUExecutionProvider"], **options)

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", dropping)
    with pytest.raises(
        bgx.InputError, match=r"provider CUDAExecutionProvider did not start, only \['CPUExecutionProvide"
    ):
        OrtDenoiser(path, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(bgx.InputError, match="provider CUDAExecutionProvider did not start"):
        OrtDenoiser(path)


AZURE = "AzureExecutionProvider"  # takes no node of ours
needs_azure = pytest.mark.skipif(AZURE not in onnxruntime.get_available_providers(), reason="a build for GPUs")


@needs_azure
def test_strict_refuses_nodes_that_are_left_to_the_cpu(tmp_path: Path) -> None:
    torch.testing.assert_close(toy(tmp_path, providers=[AZURE])(**KWARGS).sample, Toy()(**KWARGS).sample)
    with pytest.raises(ExportError, match=r"cannot load .*toy.onnx with strict=True: .*assigned to the default CPU EP"):
        toy(tmp_path, providers=[AZURE], strict=True)


@pytest.mark.parametrize("providers", [None, ["CPUExecutionProvider"], [AZURE, ("CPUExecutionProvider", {})]])
def test_strict_on_the_cpu_is_a_contradiction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, providers: Any) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [AZURE, "CPUExecutionProvider"])
    with pytest.raises(bgx.InputError, match=r"strict=True leaves nothing to the CPU, .*CPUExecutionProvider.*CUDA"):
        toy(tmp_path, providers=providers, strict=True)


@needs_azure
def test_copies_are_as_strict_and_the_options_stay_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen, key = onnxruntime.InferenceSession, list[str](), "session.disable_cpu_ep_fallback"

    def lenient(path: str, sess_options: Any, **others: Any) -> Any:
        seen.append(sess_options.get_session_config_entry(key))
        sess_options.add_session_config_entry(key, "0")
        return real(path, sess_options=sess_options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", lenient)
    deployed = toy(tmp_path, providers=[AZURE], strict=True)
    for copied in (copy.copy(deployed), copy.deepcopy(deployed)):
        pickle.loads(pickle.dumps(copied))
    assert seen == ["1"] * 3
    options = onnxruntime.SessionOptions()
    toy(tmp_path, providers=[AZURE], session_options=options, strict=True)
    assert seen == ["1"] * 4
    assert options.get_session_config_entry(key) == "0"


def test_strict_asks_for_cuda_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime refuses the CPU beside it, even as the last."""
    asked: list[Any] = []

    def starting(path: str, providers: Any, **others: Any) -> Any:
        asked.append(providers)
        raise RuntimeError("no device here")

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", starting)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for strict in (True, False):
        with pytest.raises(ExportError, match="no device here"):
            toy(tmp_path, strict=strict)
    assert asked == [["CUDAExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]]


@pytest.mark.parametrize("module", ["onnxruntime", "onnx"])
def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    path = save(tmp_path / "toy.onnx", interface_of(KWARGS))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(bgx.InputError, match=rf"{module} is not installed; pip install 'bigain-fx\[onnx\]'"):
        OrtDenoiser(path)


def test_session_options(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    deployed = toy(tmp_path, providers=["CPUExecutionProvider"], session_options=options)
    torch.testing.assert_close(deployed(**KWARGS).sample, Toy()(**KWARGS).sample)
    assert (tmp_path / "optimized.onnx").is_file()


def test_io_binding_copies_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(save(tmp_path / "toy.onnx", interface_of(KWARGS)))
    bound: list[int] = []
    real = onnxruntime.IOBinding.bind_input
    monkeypatch.setattr(onnxruntime.IOBinding, "bind_input", lambda *args: (bound.append(args[-1]), real(*args)))
    inputs = [SAMPLE, torch.tensor(2.0), TEXT]
    (output,) = session.run(inputs, [((2, 4, 8, 8), torch.float32)])
    assert bound == [tensor.data_ptr() for tensor in inputs]
    torch.testing.assert_close(output, Toy()(SAMPLE, 2, TEXT).sample)
    bound.clear()
    # A slice of a batch may start where vector loads cannot; it is the one input that is copied.
    sliced = torch.cat([SAMPLE.new_zeros(1), SAMPLE.flatten()])[1:].view_as(SAMPLE)
    session.run([sliced, *inputs[1:]], [((2, 4, 8, 8), torch.float32)])
    assert bound[0] % 16 == 0
    assert bound[1:] == [tensor.data_ptr() for tensor in inputs[1:]]


class Other(nn.Module):
    def forward(self, sample: Tensor, when: Any = None, **extra: Any) -> Any:
        return (sample, extra)


@pytest.mark.parametrize(
    ("arguments", "output", "message"),
    [
        ({"sample": SAMPLE, "when": torch.float32}, (SAMPLE,), "when is a dtype, which no file can hold"),
        (
            {"sample": SAMPLE.to(torch.float8_e5m2)},
            (SAMPLE,),
            "sample has dtype torch.float8_e5m2, which cannot be exported",
        ),
        ({"sample": SAMPLE}, (SAMPLE, None), "Other must take and give tensors"),
        ({"when": 3}, (SAMPLE,), "Other must take and give tensors"),
    ],
)
def test_what_cannot_be_described(arguments: Any, output: Any, message: str) -> None:
    tensors, spec = pytree.tree_flatten(output)
    with pytest.raises(ExportError, match=message):
        describe(Other(), inspect.signature(Other.forward), arguments, spec, tensors, "dense", None, {"bigain_fx": "0"})


def test_a_bool_mask_is_no_float_mask() -> None:
    """True keeps a token, 1.0 is added to its score: a cast would change the answer in silence."""
    port = Port("mask", ("mask",), (2,), "float32")
    assert port.bring(torch.tensor([0, 1]), torch.device("cpu")).tolist() == [0.0, 1.0]
    with pytest.raises(bgx.InputError, match=r"mask has dtype torch.bool, the graph takes torch.float32"):
        port.bring(torch.tensor([True, False]), torch.device("cpu"))


def test_complex_numbers_pass_as_pairs() -> None:
    value = torch.randn(3, 2, dtype=torch.complex64)
    port = Port.of("turn", ("turn",), value)
    assert (port.shape, port.dtype) == ((3, 2, 2), "float32")
    for given in (value, value.conj()):
        brought = port.bring(given, torch.device("cpu"))
        assert torch.equal(torch.view_as_complex(brought), given.resolve_conj())
    with pytest.raises(bgx.InputError, match=r"turn has dtype torch.float64, the graph takes torch.float32"):
        port.bring(value.to(torch.complex128), torch.device("cpu"))
    with pytest.raises(bgx.InputError, match=r"turn has shape \(2, 2, 2\), the graph takes \(3, 2, 2\)"):
        port.bring(value[:2], torch.device("cpu"))
