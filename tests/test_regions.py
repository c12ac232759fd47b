"""Operators as regions: the same numbers, one piece of code for each shape."""

from __future__ import annotations

import hashlib
import inspect
import operator
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import bigain_fx as bgx
from bigain_fx.calls import CallBinder, flat_tensors
from bigain_fx.capture import capture
from bigain_fx.passes import ops
from bigain_fx.passes.destinations import RULES
from bigain_fx.passes.methods import normalize
from bigain_fx.passes.pipeline import rewrite
from bigain_fx.passes.surgery import BRANCH
from bigain_fx.regions import as_regions
from tests import toys

ATEN = torch.ops.aten
IMAGE = toys.image()
OPS = Path(ops.__file__).parent
METHODS = {
    "merge": bgx.LaplacianMerge(0.5, levels=None),
    "tome": bgx.ToMe(0.5, levels=None),
    "batch": bgx.LaplacianMerge(0.5, levels=None, align="batch"),
    "both": (bgx.LaplacianMerge(0.5, levels=None), bgx.KVDownsample(2, levels=None)),
}


class Twice(nn.Module):
    """Two attentions of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = toys.Separate(), toys.Separate()

    def forward(self, image: Tensor) -> Tensor:
        return self.first(image) + self.second(image)


def compiled(model: nn.Module, method: object, found: list[torch.fx.GraphModule]) -> Tensor:
    """The output of the optimized ``model``; the graphs that reach the compiler go into ``found``."""

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        found.append(graph)
        return graph

    output: Tensor = bgx.optimize(model, (IMAGE,), method=method, backend=keep)(IMAGE)
    return output


@pytest.mark.parametrize("name", METHODS)
def test_the_same_numbers_from_one_region_for_each_shape(name: str) -> None:
    torch.manual_seed(0)
    model, found = Twice().eval(), []
    expected = bgx.optimize(model, (IMAGE,), method=METHODS[name], backend="eager")(IMAGE)
    torch.testing.assert_close(compiled(model, METHODS[name], found), expected)
    calls = [node for node in found[0].graph.nodes if node.target is torch.ops.higher_order.invoke_subgraph]
    assert len(calls) == 4  # a plan and a mean for each attention
    assert len({call.args[1] for call in calls}) == 2


def test_every_shape_has_a_region_of_its_own() -> None:
    """One marked function that meets more than eight shapes is an error in torch."""
    torch.manual_seed(0)
    model, regions = toys.Separate().eval(), set()
    for batch in range(1, 11):
        arguments, _ = CallBinder(model).bind((toys.image(batch),), {})
        module = rewrite(capture(model, arguments).module, normalize(METHODS["merge"])).module
        (before,) = module(*flat_tensors(arguments))
        targets = {node.target for node in module.graph.nodes}
        as_regions(module)
        regions |= {node.target for node in module.graph.nodes} - targets
        assert torch.equal(module(*flat_tensors(arguments))[0], before)
    assert len(regions) == 20


@pytest.mark.parametrize("kernels", ["", " kernels-cuda"])
@pytest.mark.parametrize("through", ["optimize", "backend"])
def test_compiled_code_is_cached_under_the_source_of_the_operators(
    through: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's key names the operators of a graph; it does not read what they decompose to."""
    monkeypatch.setenv("BIGAIN_TRITON", "1" if kernels else "0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tags: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        tags.append(torch.compiler.config.cache_key_tag)
        return graph

    model = toys.Separate().eval()
    with torch.compiler.config.patch(cache_key_tag="mine"), torch.no_grad():
        if through == "optimize":
            bgx.optimize(model, (IMAGE,), method=METHODS["merge"], backend=keep)(IMAGE)
        else:
            options = {"method": METHODS["merge"], "backend": keep}
            torch.compile(model, backend="bigain", dynamic=False, options=options)(IMAGE)
        assert torch.compiler.config.cache_key_tag == "mine"
    rules = [Path(inspect.getfile(rule)) for _, rule in sorted(RULES.items())]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in [*sorted(OPS.glob("*.py")), *rules])).hexdigest()
    assert tags == [f"mine bigain-fx {digest}{kernels}"]


@pytest.mark.parametrize("name", METHODS)
def test_the_branch_on_merged_tokens_is_in_the_region(name: str) -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    arguments, _ = CallBinder(model).bind((IMAGE,), {})
    module = rewrite(capture(model, arguments).module, normalize(METHODS[name])).module
    (before,) = module(*flat_tensors(arguments))
    as_regions(module)
    assert torch.equal(module(*flat_tensors(arguments))[0], before)
    targets = [node.target for node in module.graph.nodes]
    assert torch.ops.aten.scaled_dot_product_attention.default not in targets
    assert targets.count(torch.ops.bigain.unmerge.default) == 2


def test_a_write_between_the_nodes_of_a_branch_is_never_moved() -> None:
    """It depends on the branch; what reads the memory after it does not, and would be left ahead of it."""
    root = nn.Module()
    root.register_buffer("memory", torch.zeros(3))
    graph = torch.fx.Graph()
    x, memory, aten = graph.placeholder("x"), graph.get_attr("memory"), torch.ops.aten
    first = graph.call_function(aten.mul.Tensor, (x, 2))
    graph.call_function(aten.copy_.default, (memory, first))
    read = graph.call_function(aten.add.Tensor, (memory, 0))
    last = graph.call_function(aten.mul.Tensor, (first, 3))
    graph.output(graph.call_function(aten.add.Tensor, (last, read)))
    for node in graph.nodes:
        node.meta["val"] = torch.zeros(3)
    first.meta[BRANCH] = last.meta[BRANCH] = "merge"
    module = torch.fx.GraphModule(root, graph)
    as_regions(module)
    assert torch.equal(module(torch.ones(3)), torch.full((3,), 8.0))


def test_weights_that_share_memory_stay_out_of_regions() -> None:
    """Torch refuses such inputs of a region when it compiles."""
    torch.manual_seed(0)
    model, found = Twice().eval(), []
    for attention in (model.first, model.second):
        attention.k.weight.data = attention.q.weight.data
    expected = bgx.optimize(model, (IMAGE,), method=METHODS["merge"], backend="eager")(IMAGE)
    torch.testing.assert_close(compiled(model, METHODS["merge"], found), expected)
    calls = [node for node in found[0].graph.nodes if node.target is torch.ops.higher_order.invoke_subgraph]
    assert len(calls) == 2  # the plans


class TwoGrids(nn.Module):
    """Two attentions whose tokens are of the same shape, on grids of 4 x 6 and 6 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = toys.Separate(), toys.Separate()

    def forward(self, image: Tensor) -> Tensor:
        sides = [image, image.transpose(-1, -2), image.flip(-1), image.flip(-1).transpose(-1, -2)]
        return sum(attention(side) for side in sides for attention in (self.first, self.second))  # type: ignore[return-value]


@pytest.mark.parametrize("name", METHODS)
def test_equal_inputs_and_other_literals_are_another_region(name: str) -> None:
    torch.manual_seed(0)
    model, found = TwoGrids().eval(), []
    expected = bgx.optimize(model, (IMAGE,), method=METHODS[name], backend="eager")(IMAGE)
    torch.testing.assert_close(compiled(model, METHODS[name], found), expected)
    calls = [node for node in found[0].graph.nodes if node.target is torch.ops.higher_order.invoke_subgraph]
    # The plan knows the grid, and so does the downsampling; what runs on merged tokens does not.
    assert len({call.args[1] for call in calls}) == (4 if name == "both" else 3)


VIEWS: dict[str, Callable[[torch.fx.Graph, torch.fx.Node], torch.fx.Node]] = {
    "slice": lambda graph, x: graph.call_function(ATEN.slice.Tensor, (x, 1, 2, 4)),
    "its clone": lambda graph, x: graph.call_function(ATEN.clone.default, (VIEWS["slice"](graph, x),)),
    "a view of it": lambda graph, x: graph.call_function(ATEN.unsqueeze.default, (VIEWS["slice"](graph, x), 0)),
    "chunk": lambda graph, x: graph.call_function(
        operator.getitem, (graph.call_function(ATEN.chunk.default, (x, 2, 1)), 1)
    ),
}


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_what_begins_inside_memory_is_taken_outside_of_its_region(kind: str, inside: bool, last: bool) -> None:
    """Wherever the view stands among the nodes, and whether or not the region needs it as well."""
    graph = torch.fx.Graph()
    whole = graph.call_function(ATEN.mul.Tensor, (graph.placeholder("x"), 2))
    if last:
        other = graph.call_function(ATEN.cos.default, (whole,))
    view = VIEWS[kind](graph, whole)
    if not last:
        other = graph.call_function(ATEN.cos.default, (view if inside else whole,))
    elif inside:
        other = graph.call_function(ATEN.mul.Tensor, (other, graph.call_function(ATEN.sum.default, (view,))))
    branch = [node for node in graph.nodes if node.op == "call_function"]
    graph.output((graph.call_function(ATEN.sin.default, (view,)), other))
    module, image = torch.fx.GraphModule(nn.Module(), graph), torch.randn(1, 4)
    FakeTensorProp(module).propagate(image)
    for node in branch:
        node.meta[BRANCH] = "merge"
    expected = module(image)
    as_regions(module)
    torch.testing.assert_close(module(image), expected)
    (call,) = (node for node in module.graph.nodes if node.name.startswith("region"))
    assert all(each.storage_offset() == 0 for each in call.target(image))
    targets = {node.target for node in module.graph.nodes}
    assert (ATEN.chunk.default if kind == "chunk" else ATEN.slice.Tensor) in targets
    assert (ATEN.clone.default in targets) == (kind == "its clone")


@pytest.mark.slow
def test_text_behind_the_image_leaves_a_region_as_it_is() -> None:
    """It begins inside the memory of the attention's result, and inductor counts that offset twice where a region is
    called twice."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=16,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 16, 16), "encoder_hidden_states": torch.randn(1, 7, 16),
        "pooled_projections": torch.randn(1, 16), "timestep": torch.tensor([500.0]), "return_dict": False,
    }  # fmt: skip
    expected = bgx.optimize(model, kwargs=inputs, method=METHODS["merge"], backend="eager")(**inputs)
    fast = bgx.optimize(model, kwargs=inputs, method=METHODS["merge"])
    assert not fast.prepare(**inputs).graph.graph.find_nodes(
        op="call_function", target=ATEN.scaled_dot_product_attention.default
    ), "all are in regions"
    torch.testing.assert_close(fast(**inputs), expected)
