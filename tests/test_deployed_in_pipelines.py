"""Exported denoisers in pipelines: sizes and guidance, offloading, copies, and what a fixed graph cannot be told."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from onnx import TensorProto, helper
from torch import nn

import bigain_fx as bgx
from bigain_fx.deployed import DeployedDenoiser, OrtDenoiser, _Graph
from tests.test_deployed import KWARGS, STABLE, Toy, call, interface_of, save, stand_in
from tests.test_pipelines import unet, vae

CALLS = [call(2), call(1), call(4), call(2, side=16)]
"""Guided, unguided, two images, another size."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("toys")
    return [save(folder / f"{number}.onnx", interface_of(kwargs), external=True) for number, kwargs in enumerate(CALLS)]


def pipeline(model: nn.Module) -> Any:
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=vae(), unet=model, scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), **STABLE
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any, side: int = 8, guidance: float = 5.0, **options: Any) -> torch.Tensor:
    given: dict[str, Any] = {"prompt_embeds": torch.ones(1, 5, 16), "height": side, "width": side}
    if guidance > 1:
        given["negative_prompt_embeds"] = torch.zeros(1, 5, 16)
    found = pipe(
        **given, guidance_scale=guidance, num_inference_steps=3, generator=torch.Generator().manual_seed(0),
        output_type="pt", **options,
    ).images  # fmt: skip
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("options", [{}, {"guidance": 1.0}, {"num_images_per_prompt": 2}, {"side": 16}], ids=str)
def test_what_was_exported_is_served(paths: list[Path], options: dict[str, Any]) -> None:
    torch.testing.assert_close(images(pipeline(OrtDenoiser(paths)), **options), images(pipeline(stand_in()), **options))


def test_what_was_not_exported_says_what_was(paths: list[Path]) -> None:
    with pytest.raises(bgx.InputError, match=r"sample has shape \(6, 4, 8, 8\), there are graphs for \(1, 4"):
        images(pipeline(OrtDenoiser(paths)), num_images_per_prompt=3)


def test_the_other_inputs_choose_too(tmp_path: Path) -> None:
    """As where the prompt's length is part of the shape."""
    longer = call(2)
    longer["encoder_hidden_states"] = torch.randn(2, 9, 16)
    both = [save(tmp_path / f"{number}.onnx", interface_of(each)) for number, each in enumerate((call(2), longer))]
    deployed = OrtDenoiser(both)
    for kwargs in (longer, call(2)):
        torch.testing.assert_close(deployed(**kwargs).sample, Toy()(**kwargs).sample)
    with pytest.raises(bgx.InputError, match=r"encoder_hidden_states has shape \(2, 7, 16\), the graph takes \(2, 5"):
        deployed(**{**longer, "encoder_hidden_states": torch.randn(2, 7, 16)})


def offloaded(pipe: Any) -> Any:
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


def grouped(pipe: Any) -> Any:
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    return pipe


def hooks_removed(pipe: Any) -> Any:
    offloaded(pipe).remove_all_hooks()
    return pipe


def sampled_otherwise(pipe: Any) -> Any:
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


def tiled(pipe: Any) -> Any:
    pipe.vae.enable_tiling()
    return pipe


def sliced(pipe: Any) -> Any:
    pipe.enable_attention_slicing()
    return pipe


def moved(pipe: Any) -> Any:
    return pipe.to("cpu", torch.float32)


@pytest.mark.parametrize(
    "change", [offloaded, grouped, hooks_removed, sampled_otherwise, tiled, sliced, moved, copy.deepcopy]
)
def test_what_pipelines_do_to_a_module(paths: list[Path], change: Any) -> None:
    pipe, dense = change(pipeline(OrtDenoiser(paths))), pipeline(stand_in())
    if change in (sampled_otherwise, tiled):
        change(dense)
    expected = images(dense)
    for _ in range(2):  # offloading works after a call too
        torch.testing.assert_close(images(pipe), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        lambda pipe: pipe.fuse_qkv_projections(),
        lambda pipe: pipe.set_ip_adapter_scale(0.5),
        lambda pipe: pipe.unet.set_attn_processor(None),
        lambda pipe: pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn),
        lambda pipe: pipe.unet.enable_cache(None),
        lambda pipe: pipe.unet.add_adapter(None),
        lambda pipe: pipe.unet.save_pretrained("somewhere"),
        lambda pipe: pipe.unet.load_state_dict({}),
        lambda pipe: pipe.to(torch.float16),
        lambda pipe: pipe.unet.to("meta"),
    ],
    ids=range(11),
)
def test_what_a_fixed_graph_cannot_be_told(paths: list[Path], change: Any) -> None:
    pipe = pipeline(OrtDenoiser(paths))
    with pytest.raises(bgx.InputError, match=r"graph|an exported denoiser") as caught:
        change(pipe)
    assert "\n" not in str(caught.value)


def test_lora_onto_an_exported_denoiser(paths: list[Path]) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = unet()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="a")
    weights = {f"unet.{key}": value for key, value in get_peft_model_state_dict(model, adapter_name="a").items()}
    with pytest.raises(bgx.InputError, match=r"OrtDenoiser has no 'load_lora_adapter': it is a fixed graph"):
        pipeline(OrtDenoiser(paths)).load_lora_weights(weights)


def test_a_saved_pipeline_is_loaded_with_the_denoiser_beside_it(paths: list[Path], tmp_path: Path) -> None:
    """diffusers says that it cannot save it, and saves the rest."""
    pipe = pipeline(OrtDenoiser(paths))
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "unet").exists()
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    again = StableDiffusionPipeline.from_pretrained(tmp_path, unet=OrtDenoiser(paths), **absent)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(images(again), images(pipe))


def test_missing_attributes_are_still_missing(paths: list[Path]) -> None:
    deployed = OrtDenoiser(paths)
    assert not hasattr(deployed, "peft_config")
    assert getattr(deployed, "_orig_mod", 3) == 3


def test_copies_share_the_graphs(paths: list[Path]) -> None:
    deployed = OrtDenoiser(paths)
    for made in (copy.copy(deployed), copy.deepcopy(deployed)):
        assert all(mine is its for mine, its in zip(deployed._graphs, made._graphs, strict=True))
        torch.testing.assert_close(made(**KWARGS).sample, deployed(**KWARGS).sample)
        made.extra = 3
        assert not hasattr(deployed, "extra")


def test_pickled_it_is_its_files(paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(paths[0].parent)
    deployed = OrtDenoiser([path.name for path in paths])
    content = pickle.dumps(deployed)
    assert len(content) < 2000
    monkeypatch.chdir(tmp_path)
    torch.testing.assert_close(pickle.loads(content)(**KWARGS).sample, deployed(**KWARGS).sample)
    with_options = OrtDenoiser(paths, session_options=onnxruntime.SessionOptions())
    with pytest.raises(bgx.InputError, match="with session_options cannot be pickled; open its file anew"):
        pickle.dumps(with_options)


def test_offloaded_from_an_accelerator_it_stays(caplog: pytest.LogCaptureFixture) -> None:
    """No accelerator here: the meta device stands in for one."""
    interface = interface_of(KWARGS)
    deployed = DeployedDenoiser([_Graph(interface, list)], torch.device("meta"), None)
    with caplog.at_level(logging.WARNING, logger="bigain_fx"):
        for _ in range(2):
            assert deployed.to("meta")._apply(lambda tensor: torch.empty(0, dtype=tensor.dtype)) is deployed
    assert [record.message for record in caplog.records] == [
        "an exported denoiser stays on meta, where its graph is compiled for: what offloads it frees nothing"
    ]
    assert (deployed.device, next(deployed.parameters()).device) == (torch.device("meta"),) * 2
    with pytest.raises(bgx.InputError, match=r"cannot become torch.float16"):
        deployed._apply(lambda tensor: torch.empty(0, dtype=torch.float16))


def wide(path: Path, batch: int) -> Path:
    """Two layers of 16 MB each; all files of a folder share one file of weights."""
    kwargs = {"sample": torch.randn(batch, 2048)}
    interface = interface_of(kwargs, kwargs["sample"], Plain())
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, (batch, 2048)) for name in ("sample", "out_sample")
    ]
    nodes = [helper.make_node("MatMul", ["sample", "a"], ["hidden"]),
             helper.make_node("Relu", ["hidden"], ["positive"]),
             helper.make_node("MatMul", ["positive", "b"], ["out_sample"])]  # fmt: skip
    weights = [TensorProto(name=name, dims=(2048, 2048), data_type=TensorProto.FLOAT) for name in ("a", "b")]
    for number, tensor in enumerate(weights):
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights"), ("offset", str(number * 2**24)), ("length", str(2**24))):
            tensor.external_data.add(key=key, value=value)
    graph = helper.make_graph(nodes, "wide", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, interface.to_metadata())
    path.write_bytes(model.SerializeToString())
    return path


class Plain(nn.Module):
    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample


def anonymous() -> float:
    """Memory of this process that is no page of a file, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_weights_are_in_memory_once(tmp_path: Path) -> None:
    """Of 32 MB for two sizes no copy is made: what is in memory are the pages of their one file."""
    weights = torch.randn(2, 2048, 2048)
    weights.numpy().tofile(tmp_path / "weights")
    files = [wide(tmp_path / f"{batch}.onnx", batch) for batch in (1, 2)]
    OrtDenoiser(files[0], providers=["CPUExecutionProvider"])
    before = anonymous()
    denoiser = OrtDenoiser(files, providers=["CPUExecutionProvider"])
    assert anonymous() - before < 8
    for batch in (1, 2):
        sample = torch.randn(batch, 2048)
        torch.testing.assert_close(denoiser(sample), torch.relu(sample @ weights[0]) @ weights[1], rtol=1e-3, atol=1e-2)
    assert anonymous() - before < 8
