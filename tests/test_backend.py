"""The Dynamo backend does what `optimize` does: the same sites, the same numbers, from another capture."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import list_backends, lookup_backend
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache
from torch.fx import GraphModule

import bigain_fx as bgx
from bigain_fx.backend import bigain
from tests import toys
from tests.test_optimize import SAMPLE, TEXT, dit, first, unet
from tests.zoo_named import NAMED

MERGE, SCHEDULE = bgx.LaplacianMerge(0.5), bgx.KVDownsample(2, bgx.LinearAlpha(t_noisy=999, t_clean=0))
STEP, IMAGE = torch.tensor(700.0), toys.image()
DIT = {"hidden_states": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([3, 800]),
       "class_labels": torch.tensor([1, 2])}  # fmt: skip


class Timed(toys.Separate):
    """A toy with a timestep; a number or a tensor."""

    def forward(self, image: Tensor, timestep: Any) -> Tensor:  # type: ignore[override]
        return super().forward(image * timestep)


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return wrapper


class Wrapped(Timed):
    """Its forward takes ``*args`` and ``**kwargs``, as that of many a diffusers class."""

    forward = wrapped(Timed.forward)

    def other(self, *args: Tensor) -> Tensor:
        return super().forward(args[1], args[0])


def timed() -> nn.Module:
    return Timed().eval()


CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[Callable[..., Any]], Any]]] = {
    "unet": (unet, lambda m: m(SAMPLE, STEP, TEXT)),
    "unet, by name": (unet, lambda m: m(SAMPLE, timestep=STEP, encoder_hidden_states=TEXT)),
    "dit": (dit, lambda m: m(**DIT)),
    "toy": (timed, lambda m: m(IMAGE, STEP)),
    "wrapped": (lambda: Wrapped().eval(), lambda m: m(IMAGE, STEP)),
    "wrapped, by name": (lambda: Wrapped().eval(), lambda m: m(timestep=STEP, image=IMAGE)),
}
BOTH = (MERGE, SCHEDULE)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def compiled(model: Callable[..., Any], method: Any, backend: Any = "eager", **options: Any) -> Any:
    given = {"method": method, "backend": backend, **options}
    return torch.compile(model, backend=bigain, fullgraph=True, dynamic=False, options=given)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name == "bigain_fx"]
    caplog.clear()
    return found


@pytest.mark.parametrize(
    ("call", "method"), [*((call, BOTH) for call in CALLS), *(("dit", m) for m in ((), (bgx.ToMe(0.5), bgx.ToDo())))]
)
@torch.no_grad()
def test_it_is_optimize(call: str, method: Any, caplog: pytest.LogCaptureFixture) -> None:
    make, run = CALLS[call]
    model = make()
    with caplog.at_level(logging.DEBUG, "bigain_fx"):
        output = run(compiled(model, method))
        headline, report = messages(caplog)
    fast = bgx.optimize(model, method=method, backend="eager")
    torch.testing.assert_close(first(output), first(run(fast)), atol=1e-5, rtol=0)
    assert type(output) is type(run(model))
    assert headline == fast.report.headline
    assert report == str(fast.report)
    assert torch.equal(first(output), first(run(model))) == (method == ())


@pytest.mark.parametrize("toy", [*toys.REWRITTEN, *(toy for toy, _ in toys.REFUSED if toy is not toys.Dropped)])
@torch.no_grad()
def test_every_layout_is_treated_as_optimize_treats_it(toy: type[toys.Toy], caplog: pytest.LogCaptureFixture) -> None:
    model, image, method = toy().eval(), toys.image(), (MERGE, bgx.KVDownsample(2))
    with caplog.at_level(logging.DEBUG, "bigain_fx"):
        output = compiled(model, method)(image)
        _, report = messages(caplog)
    fast = bgx.optimize(model, method=method, backend="eager")
    torch.testing.assert_close(output, fast(image), atol=1e-5, rtol=0)
    assert report == str(fast.report)
    assert (len(fast.report.rewritten) > 0) == (toy in toys.REWRITTEN)


@torch.no_grad()
def test_the_inner_backend_sees_dynamos_inputs_and_one_graph() -> None:
    seen: list[tuple[GraphModule, list[Any]]] = []

    def inner(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append((gm, inputs))
        return gm.forward

    model = dit()
    compiled(model, bgx.ToMe(0.5), inner)(**DIT)
    ((gm, inputs),) = seen
    nodes = gm.graph.find_nodes(op="placeholder")
    assert [tuple(node.meta["val"].shape) for node in nodes] == [tuple(value.shape) for value in inputs]
    static = [bool(node.meta["tensor_dict"].get("_dynamo_static_input_type")) for node in nodes]
    assert static.count(False) == len(DIT)
    assert static.count(True) == sum(isinstance(value, nn.Parameter) for value in inputs) + 1
    assert [name for name, _ in gm.named_parameters()] == []
    assert [name for name, _ in gm.named_buffers()] == ["bigain_positions_8x8"]


@torch.no_grad()
def test_weights_are_read_at_every_call() -> None:
    model, image = toys.Separate().eval(), toys.image()
    fast = compiled(model, MERGE)

    def check() -> None:
        torch.testing.assert_close(fast(image), bgx.optimize(model, method=MERGE, backend="eager")(image))

    before = fast(image)
    model.embed.bias.add_(1)
    check()
    model.out = nn.Linear(toys.C, toys.C)
    check()
    model.load_state_dict(toys.Separate().state_dict())
    check()
    assert not torch.allclose(fast(image), before)


class Clashing(toys.PositionsAdded):
    """Weights whose names are taken: by a graph module, by one another, by an input."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.image = (nn.Parameter(torch.randn(toys.C)) for _ in range(2))
        self.inner = nn.ParameterDict({"code": self.code.detach().clone()})
        self.inner_code = nn.Parameter(torch.randn(toys.C))

    def tokens(self, image: Tensor) -> Tensor:
        return super().tokens(image) + self.code * self.image + self.inner["code"] * self.inner_code


@torch.no_grad()
def test_names_that_are_taken() -> None:
    model, image = Clashing().eval(), toys.image()
    # torch.export refuses a weight called "code": the dense model has to be the judge.
    torch.testing.assert_close(compiled(model, ())(image), model(image))
    assert not torch.allclose(compiled(model, MERGE)(image), model(image))


METHODS = [MERGE, bgx.LaplacianMerge(0.25), bgx.ToMe(0.5), bgx.ToMe(0.5, seed=1), bgx.KVDownsample(2), bgx.ToDo(), ()]


@torch.no_grad()
def test_dynamo_keeps_the_methods_apart() -> None:
    model, image, count = toys.Separate().eval(), toys.image(), 0

    def inner(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return gm.forward

    fast = {method: compiled(model, method, inner) for method in METHODS}
    for _ in range(2):
        outputs = [fast[method](image) for method in METHODS]
        for method, output in zip(METHODS, outputs, strict=True):
            torch.testing.assert_close(output, bgx.optimize(model, method=method, backend="eager")(image))
    assert count == len(METHODS)
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    torch.testing.assert_close(compiled(model, bgx.ToDo(), inner)(image), outputs[METHODS.index(bgx.ToDo())])
    assert count == len(METHODS), "equal options share their code"


@pytest.mark.slow
@torch.no_grad()
def test_inductors_caches_keep_the_methods_apart() -> None:
    model, image = toys.Separate().eval(), toys.image()
    # Of one shape each: a merge of 12 tokens, with random destinations of two seeds, and with elected ones.
    methods = [bgx.ToMe(0.5), bgx.ToMe(0.5, seed=1), MERGE]
    with fresh_cache(), inductor_config.patch(fx_graph_cache=True, fx_graph_remote_cache=False):
        for repeat in range(2):
            counters.clear()
            for method in methods:
                torch._dynamo.reset()
                output = compiled(model, method, "inductor")(image)
                expected = bgx.optimize(model, method=method, backend="eager")(image)
                torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
            if repeat:
                hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
                assert hits >= len(methods), "nothing was cached: the test shows nothing"


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_modes(mode: Callable[[], Any], backend: str) -> None:
    model = timed()
    with mode():
        output = compiled(model, BOTH, backend)(IMAGE, STEP)
        expected = bgx.optimize(model, method=BOTH, backend="eager")(IMAGE, STEP)
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected)


@torch.no_grad()
def test_a_grid_hint_and_functions_around_the_model(caplog: pytest.LogCaptureFixture) -> None:
    model = toys.Separate().eval()

    def step(image: Tensor) -> Tensor:
        return 2 * model.branch(image, image)

    tokens = torch.randn(2, 24, toys.C)
    with caplog.at_level(logging.INFO, "bigain_fx"):
        blind, seeing = compiled(step, MERGE)(tokens), compiled(step, MERGE, grid=(4, 6))(tokens)
        assert ["0 of 1" in line for line in messages(caplog)] == [True, False]
    assert torch.equal(blind, step(tokens))
    assert not torch.equal(seeing, blind)


@torch.no_grad()
def test_a_second_size_is_its_own_graph(caplog: pytest.LogCaptureFixture) -> None:
    model, large = toys.Separate().eval(), torch.randn(2, 3, 8, 6)
    fast = compiled(model, MERGE)
    with caplog.at_level(logging.INFO, "bigain_fx"):
        fast(toys.image())
        output = fast(large)
        assert len(messages(caplog)) == 2
    torch.testing.assert_close(output, bgx.optimize(model, method=MERGE, backend="eager")(large))


SIZES = ((4, 6), (8, 6), (8, 8), (4, 6), (8, 8))


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_each_size_has_a_graph_whatever_dynamic_is(dynamic: bool | None, backend: str) -> None:
    model, count = toys.Separate().eval(), 0

    def inner(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal count
        count += 1
        nodes = gm.graph.find_nodes(op="placeholder")
        assert len(inputs) == len(nodes), "a graph takes what it is shown"
        sizes = [size for node in nodes if isinstance(node.meta["val"], Tensor) for size in node.meta["val"].shape]
        assert all(type(size) is int for size in sizes)
        run: Callable[..., Any] = lookup_backend(backend)(gm, inputs)
        return run

    fast = torch.compile(model, backend=bigain, dynamic=dynamic, options={"method": MERGE, "backend": inner})
    for size in SIZES:
        image = torch.randn(2, 5, 16, 16)[:, 1:4, : size[0], : size[1]]  # within a larger one: strides, an offset
        torch.testing.assert_close(fast(image), bgx.optimize(model, method=MERGE, backend="eager")(image))
    assert count == len(set(SIZES)) or dynamic


@pytest.mark.slow
@torch.no_grad()
def test_a_second_size_by_inductor() -> None:
    model = toys.Separate().eval()
    fast = torch.compile(model, backend=bigain, options={"method": MERGE})
    for size in SIZES[:3]:
        image = torch.randn(2, 3, *size)
        expected = bgx.optimize(model, method=MERGE, backend="eager")(image)
        torch.testing.assert_close(fast(image), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize(("numbers", "said"), [((7, 8, 9, 7), 2), ((0.5, 0.25, 0.125, 0.5), 0)])
@torch.no_grad()
def test_numbers_that_change(
    dynamic: bool | None, numbers: tuple[float, ...], said: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = timed()
    fast = torch.compile(model, backend=bigain, dynamic=dynamic, options={"method": MERGE, "backend": "aot_eager"})
    for number in numbers:
        expected = bgx.optimize(model, method=MERGE, backend="eager")(IMAGE, number)
        torch.testing.assert_close(fast(IMAGE, number), expected, atol=1e-5, rtol=1e-5)
    warnings = [line for line in messages(caplog) if "timestep changes from call to call" in line]
    assert len(warnings) == (said if dynamic is None else 0)


@torch.no_grad()
def test_graph_breaks_are_only_more_graphs() -> None:
    model, image = toys.Separate().eval(), toys.image()

    def step(image: Tensor) -> Tensor:
        output: Tensor = model(image)
        torch._dynamo.graph_break()
        ones = torch.ones(3, 1, 1)
        torch._dynamo.graph_break()
        return output + ones.sum()

    fast = torch.compile(step, backend=bigain, dynamic=False, options={"method": MERGE, "backend": "eager"})
    torch.testing.assert_close(fast(image), bgx.optimize(model, method=MERGE, backend="eager")(image) + 3)


def frozen() -> nn.Module:
    return timed().requires_grad_(False)


def unbacked() -> None:
    image = torch.randn(2, 3, 8, 6)
    torch._dynamo.decorators.mark_unbacked(image, 2)
    plain(image, options={"method": MERGE, "backend": "eager"})


def marked() -> None:
    image = torch.randn(2, 3, 8, 6)
    torch._dynamo.mark_dynamic(image, 2)
    plain(image, options={"method": MERGE, "backend": "eager"})


def without_gradients(function: Callable[..., Any], *args: Any) -> Any:
    with torch.no_grad():
        return function(*args)


def plain(image: Tensor | None = None, **options: Any) -> Any:
    fast = torch.compile(toys.Separate().eval(), backend=bigain, **options)
    return without_gradients(fast, toys.image() if image is None else image)


def misnamed(image: Tensor, when: Tensor) -> Any:
    return MISNAMED(image, when)


MISNAMED = timed()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (plain, bgx.MethodError, r"no method; write torch.compile\(model, backend='bigain', dynamic=False, options="),
        (lambda: plain(mode="max-autotune"), bgx.MethodError, "options has no method; write"),
        (lambda: plain(options={"grid": (4, 6)}), bgx.MethodError, "options has no method; write"),
        (lambda: plain(options={"method": 0.7}), bgx.MethodError, "method=0.7 must be a LaplacianMerge"),
        (lambda: plain(options={"metod": MERGE}), bgx.InputError, "has 'metod'; the backend 'bigain' takes method, gr"),
        (lambda: plain(options={"method": MERGE, "backend": "nil"}), bgx.InputError, "backend='nil' is not known"),
        (lambda: plain(options={"method": MERGE, "backend": 3}), bgx.InputError, "backend=3 must be a name"),
        (lambda: plain(options={"method": MERGE, "mode": "fast"}), bgx.InputError, "mode='fast'.*should be one of"),
        (lambda: plain(options={"method": MERGE, "mode": "max-autotune", "backend": "eager"}), bgx.InputError,
         "mode='max-autotune': backend='eager' has none"),
        (lambda: plain(options={"method": MERGE, "backend": "bigain"}), bgx.InputError, "is what rewrites the graph"),
        (lambda: plain(options={"method": MERGE, "backend": bigain}), bgx.InputError, "is what rewrites the graph"),
        (lambda: plain(options={"method": MERGE, "grid": (3, 3)}), bgx.GridError, r"grid=\(3, 3\) contradicts"),
        (lambda: plain(options={"method": MERGE, "grid": lambda _: (4, 6)}), bgx.InputError, "grid=.* is a function"),
        (lambda: plain(options={"method": MERGE, "grid": 64}), bgx.GridError, "grid=64 must be two positive integers"),
        (lambda: plain(options={"method": iter([MERGE])}), bgx.MethodError, "read only once.*give a list"),
        (lambda: plain(options={"method": SCHEDULE}), bgx.RewriteError, r"inputs \['image'\] is called timestep"),
        (unbacked, bgx.InputError, r"image has the symbolic shape \(.*u\d+.*\); call .* dynamic=False"),
        (marked, bgx.InputError, "image is marked as dynamic, and 'bigain' compiles for one size; leave mark_dynamic"),
        (lambda: without_gradients(compiled(timed(), SCHEDULE), IMAGE, 7), bgx.RewriteError,
         r"\['image'\] is called timestep.*pass it as a tensor"),
        (lambda: without_gradients(compiled(misnamed, SCHEDULE), IMAGE, STEP), bgx.RewriteError,
         r"\['image', 'when'\] is called timestep"),
        (lambda: without_gradients(compiled(Wrapped().eval().other, SCHEDULE), STEP, IMAGE), bgx.RewriteError,
         r"\['args_0', 'args_1'\] is called timestep"),
        (lambda: without_gradients(compiled(timed().train(), MERGE), IMAGE, STEP), bgx.InputError,
         "Timed is in train mode; call model.eval"),
        (lambda: compiled(timed(), MERGE)(IMAGE, STEP), bgx.InputError, "embed_weight requires gradients.*no_grad"),
        (lambda: compiled(frozen(), MERGE)(IMAGE.clone().requires_grad_(), STEP), bgx.InputError,
         "image requires gradients.*no_grad"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        make()
    refusal = caught.value.inner_exception
    assert type(refusal) is error, refusal
    with pytest.raises(error, match=message):
        raise refusal
    assert "\n" not in str(refusal)


def test_gradients_are_refused_when_they_are_first_asked_for() -> None:
    model, image = toys.Separate().eval(), toys.image()
    fast = compiled(model, MERGE)
    with torch.no_grad():
        fast(image)
    with pytest.raises(BackendCompilerFailed, match="requires gradients"):
        fast(image)


def test_frozen_weights_need_no_mode() -> None:
    model = frozen()
    output = compiled(model, MERGE)(IMAGE, STEP)
    torch.testing.assert_close(output, bgx.optimize(model, method=MERGE, backend="eager")(IMAGE, STEP))
    assert not output.requires_grad


@pytest.mark.skipif(
    "bigain" not in list_backends(), reason="the entry point is registered when the package is installed"
)
@torch.no_grad()
def test_the_name_is_registered() -> None:
    model, image = toys.Separate().eval(), toys.image()
    fast = torch.compile(model, backend="bigain", dynamic=False, options={"method": MERGE, "backend": "eager"})
    torch.testing.assert_close(fast(image), bgx.optimize(model, method=MERGE, backend="eager")(image))


def test_a_grid_beside_img_ids_is_refused() -> None:
    """Dynamo guards no values: 8x12 and 12x8 tokens would share a graph."""
    case = next(case for case in NAMED if case.name == "flux")
    model, inputs = case.build(), case.inputs()
    refused = compiled(model, MERGE, grid=case.sites[0].grid)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=r"img_ids tells the grid.*use bigain_fx.optimize"):
        refused(**inputs)


def test_nothing_rewritten_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    case = next(case for case in NAMED if case.name == "flux")
    with torch.no_grad(), caplog.at_level(logging.INFO, "bigain_fx"):
        compiled(case.build(), MERGE)(**case.inputs())
    assert [record.levelname for record in caplog.records if record.name == "bigain_fx"] == ["WARNING"]
