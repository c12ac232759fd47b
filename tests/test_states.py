"""What a call must notice in the model, what capture must leave as it was; threads, forks and interrupts."""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor

import bigain_fx as bgx
from bigain_fx import capture as capturing
from bigain_fx import graphs, states
from bigain_fx.model_state import ModelState
from bigain_fx.settings import Settings
from bigain_fx.torch_internals import one_at_a_time
from bigain_fx.watch import Watch
from tests import toys
from tests.test_lifecycle import IMAGE, Model, Processor, model

METHOD = bgx.LaplacianMerge(0.5)


@pytest.fixture(autouse=True)
def _no_gradients(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with torch.no_grad(), caplog.at_level(logging.WARNING, "bigain_fx"):
        yield


def made(kind: type[nn.Module], *args: Any) -> Any:
    torch.manual_seed(0)
    return kind(*args).eval()


# --------------------------------------------------------------------------- back to a state


SWITCHES: dict[str, tuple[Callable[[Model], Any], Callable[[Model], Any]]] = {
    "a flag": (lambda m: m.flags.__setitem__(0, False), lambda m: m.flags.__setitem__(0, True)),
    "a dict's items": (lambda m: m.gains.update(b=1.0), lambda m: m.gains.pop("b", None)),
    "a processor": (lambda m: setattr(m, "processor", OTHER), lambda m: setattr(m, "processor", FIRST)),
    "a dtype": (lambda m: m.double(), lambda m: m.float()),
    "gradients": (lambda m: m.q.requires_grad_(False), lambda m: m.q.requires_grad_(True)),
}
FIRST, OTHER = Processor(1.0), Processor(2.0)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_state_that_comes_back_has_its_graph(switch: str, caplog: pytest.LogCaptureFixture) -> None:
    m, counter = model(), CompileCounter()
    m.processor = FIRST
    fast = bgx.optimize(m, method=(), backend=counter)
    for there in (False, True, False, True, False):
        SWITCHES[switch][not there](m)
        image = IMAGE.to(m.embed.weight.dtype)
        torch.testing.assert_close(fast(image), m(image))
    assert counter.frame_count == len(fast._graphs) == 2
    assert len([record for record in caplog.records if "captured anew" in record.message]) == 1


def test_graphs_of_weights_that_are_gone_are_dropped() -> None:
    m = model()
    fast = bgx.optimize(m, (IMAGE,), method=(), backend="eager")
    m.flags[0] = False
    fast(IMAGE)
    assert len(fast._graphs) == 2
    m.q.weight = nn.Parameter(m.q.weight * 2)
    torch.testing.assert_close(fast(IMAGE), m(IMAGE))
    assert len(fast._graphs) == 1


def test_what_is_written_without_being_changed_is_compared_from_then_on() -> None:
    m = model()
    state = ModelState(m)
    watch = Watch(state)
    m.gain = float("1.0")
    assert watch.moved()
    assert state.same_objects()
    watch = watch.again()
    m.weight_of_nothing = 1
    del m.weight_of_nothing
    assert not watch.moved()
    m.gain = 2.0
    assert watch.moved()
    assert not state.same_objects()


@pytest.mark.parametrize(("before", "after"), [(0.0, -0.0), (1.0, True), (0.0, 0)])
def test_constants_that_are_equal_but_not_the_same(before: Any, after: Any) -> None:
    class Dividing(toys.Separate):
        def __init__(self) -> None:
            super().__init__()
            self.value = before

        def forward(self, image: Tensor, value: Any = before) -> Tensor:  # type: ignore[override]
            told = torch.full((), float(value)).reciprocal() + torch.full((), float(self.value)).reciprocal()
            return super().forward(image) + told * isinstance(value, bool) + told.clamp(-1, 1)

    m = made(Dividing)
    fast = bgx.optimize(m, method=(), backend="eager")
    for value, attribute in ((before, before), (after, before), (before, after), (after, after)):
        m.value = attribute
        assert torch.equal(fast(IMAGE, value).nan_to_num(7), m(IMAGE, value).nan_to_num(7))


def test_nan_is_one_constant() -> None:
    m = made(Scaled)
    fast = bgx.optimize(m, method=(), backend="eager")
    for _ in range(3):
        fast(IMAGE, scale=float("nan"))
    assert len(fast._graphs) == 1


# ------------------------------------------------------------------------------ moving floats


class Scaled(Model):
    def forward(self, image: Tensor, scale: float = 1.0, options: Any = None, limit: float = 0.0) -> Tensor:  # type: ignore[override]
        image = image + 1 if limit > 3 else image
        return super().forward(image) * scale + (options or {}).get("shift", 0.0)


ARGUMENTS: dict[str, Callable[[float], dict[str, Any]]] = {
    "an argument": lambda value: {"scale": value},
    "an argument, from its default on": lambda value: {"scale": 1.0 if value == 0.1 else value},
    "in a dict": lambda value: {"options": {"shift": value}},
}


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("method", [(), METHOD])
def test_a_float_argument_is_an_input_from_its_second_value_on(argument: str, method: Any) -> None:
    m, counter = made(Scaled), CompileCounter()
    fast, dense = (bgx.optimize(m, method=method, backend=backend) for backend in (counter, "eager"))
    for value in (0.1, 0.2, 1.0, 0.0, -0.5, 0.1):
        call = ARGUMENTS[argument](value)
        torch.testing.assert_close(fast(IMAGE, **call), dense(IMAGE, **call))
        if not method:
            torch.testing.assert_close(dense(IMAGE, **call), m(IMAGE, **call))
        alone = bgx.optimize(m, method=method, backend="eager")
        torch.testing.assert_close(alone(IMAGE, **call), dense(IMAGE, **call))
    assert counter.frame_count == 2


ATTRIBUTES: dict[str, Callable[[Model, float], Any]] = {
    "of the model": lambda m, value: setattr(m, "gain", value),
    "in a dict": lambda m, value: m.gains.update(a=value),
    "of a processor": lambda m, value: setattr(m.processor, "scale", value),
    "in a processor's dict": lambda m, value: m.processor.options.update(bias=value),
}


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_float_attribute_is_an_input_from_its_second_value_on(attribute: str) -> None:
    m, counter = model(), CompileCounter()
    fast = bgx.optimize(m, method=(), backend=counter)
    for value in (0.1, 0.2, 0.3, 0.0, 0.1):
        ATTRIBUTES[attribute](m, value)
        torch.testing.assert_close(fast(IMAGE), m(IMAGE))
    assert counter.frame_count == 2
    assert type(m.gain) is float


def test_a_float_that_was_an_input_may_go_and_come_back() -> None:
    """As the scale of a LoRA does, that is unloaded and loaded again."""
    m, first, other = model(), Processor(), nn.Identity()
    m.processor = first
    fast = bgx.optimize(m, method=(), backend="eager")
    for value in (0.1, 0.2, 0.3):
        first.scale = value
        torch.testing.assert_close(fast(IMAGE), m(IMAGE))
    for processor in (other, first, other, first):
        m.__dict__.pop("processor", None)
        m._modules.pop("processor", None)
        m.processor = processor  # type: ignore[assignment]
        torch.testing.assert_close(fast(IMAGE), m(IMAGE))
    first.scale = 0.4
    torch.testing.assert_close(fast(IMAGE), m(IMAGE))
    assert len(fast._graphs) == 2


def test_a_float_that_decides_stays_a_constant_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    m = made(Scaled)
    fast = bgx.optimize(m, method=(), backend="eager")
    for limit in (1.0, 2.0, 4.0, 2.0):
        torch.testing.assert_close(fast(IMAGE, limit=limit), m(IMAGE, limit=limit))
    assert len(fast._graphs) == 3
    (said,) = [record.message for record in caplog.records if "is a graph of its own" in record.message]
    assert said.startswith("Scaled: each value of limit is a graph of its own: torch.export cannot capture Scaled")


class Particular(Model):
    """Does something else with a tensor than with a number, quietly."""

    def __init__(self) -> None:
        super().__init__()
        self.gain_of, self.pair = 1.0, (1.0, 2.0)

    def forward(self, image: Tensor, scale: float = 0.5) -> Tensor:  # type: ignore[override]
        if isinstance(scale, float):
            image = image * scale
        gain = self.gain_of if isinstance(self.gain_of, float) else 3.0
        return super().forward(image) * gain * self.pair[0]


@pytest.mark.parametrize("what", ["argument", "attribute", "in a tuple"])
def test_a_float_that_is_no_input_of_what_the_model_does_stays_a_constant(what: str) -> None:
    m = made(Particular)
    fast = bgx.optimize(m, method=(), backend="eager")
    for value in (0.25, 0.75, 0.5, 0.25):
        call = {"scale": value} if what == "argument" else {}
        if what == "attribute":
            m.gain_of = value
        elif what == "in a tuple":
            m.pair = (value, 2.0)
        torch.testing.assert_close(fast(IMAGE, **call), m(IMAGE, **call))
    assert len(fast._graphs) == 3


# ------------------------------------------------------------------- what capture leaves behind


class Table(toys.Separate):
    """Fills in what it needs at the first call, and more for a larger image, in a plain object: a rotary table, say."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Processor()
        self.table.rows = None  # type: ignore[attr-defined]
        self.sizes: dict[int, Tensor] = {}

    def forward(self, image: Tensor) -> Tensor:
        rows: Any = self.table.rows  # type: ignore[attr-defined]
        if rows is None or len(rows[0]) < image.shape[2]:
            rows = self.table.rows = [torch.arange(image.shape[2]) / 10 + part for part in range(2)]  # type: ignore[attr-defined]
        if image.shape[3] not in self.sizes:
            self.sizes[image.shape[3]] = torch.arange(image.shape[3]) / 5
        return super().forward(image + sum(rows)[: image.shape[2], None] + self.sizes[image.shape[3]])


def test_a_table_that_the_first_call_fills_in_is_real() -> None:
    m, fresh, images = made(Table), made(Table), (IMAGE, torch.cat([IMAGE, IMAGE], 2), IMAGE[:, :, :, :4])
    fast = bgx.optimize(m, method=(), backend="eager")
    for image in (*images, *images):
        torch.testing.assert_close(fast(image), fresh(image))
        torch.testing.assert_close(m(image), fresh(image))
    assert len(fast._graphs) == 3
    assert not any(isinstance(each, FakeTensor) for each in (*m.table.rows, *m.sizes.values()))


@functools.lru_cache
def shifts(rows: int) -> Tensor:
    return torch.arange(rows) / 10


class Cached(toys.Separate):
    """Has what it needs from caches: one of its file, one of its class."""

    @functools.lru_cache  # noqa: B019
    def columns(self, count: int) -> Tensor:
        return torch.arange(count) / 5

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image + shifts(image.shape[2])[:, None] + self.columns(image.shape[3]))


def test_caches_hold_nothing_of_a_capture() -> None:
    shifts.cache_clear()
    m = made(Cached)
    fast = bgx.optimize(m, (IMAGE,), method=(), backend="eager")
    torch.testing.assert_close(m(IMAGE), fast(IMAGE))
    assert type(shifts(IMAGE.shape[2])) is type(m.columns(IMAGE.shape[3])) is Tensor


class Store(Processor):
    """Keeps what it sees, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.store = 0, list[Tensor]()

    def __call__(self, x: Tensor) -> Tensor:
        self.step += 1
        self.store.append(x)
        return super().__call__(x) / self.step


def test_a_processor_that_counts_is_refused_and_left_as_it_was() -> None:
    m = model()
    m.processor = processor = Store()
    with pytest.raises(
        bgx.CaptureError, match=r"Model cannot be captured: processor\.(step|store\.0) changes at every"
    ):
        bgx.optimize(m, (IMAGE,), method=())
    assert (processor.step, processor.store) == (0, [])
    m(IMAGE)
    assert type(processor.store[0]) is Tensor


def test_forward_hooks_are_named(caplog: pytest.LogCaptureFixture) -> None:
    m = model()
    m.out.register_forward_hook(lambda module, args, output: output * 2)
    m.k.register_forward_pre_hook(lambda module, args: None)
    torch.testing.assert_close(bgx.optimize(m, method=(), backend="eager")(IMAGE), m(IMAGE))
    assert [record.message for record in caplog.records] == [
        "Model: forward hooks are part of its graph, and are not called again: k, out"
    ]


class Failing(Model):
    """Raises at one of the places that forward comes by, while it is captured."""

    where, error = -1, RuntimeError

    def forward(self, image: Tensor) -> Tensor:
        self.gains["a"], self.seen = self.gains["a"] + 0, torch.zeros(2)
        for place in range(3):
            if place == self.where and isinstance(self.q.weight, FakeTensor | nn.Parameter) and _captures():
                raise self.error
        return super().forward(image)


def _captures() -> bool:
    return torch._guards.detect_fake_mode() is not None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["in forward", "in export", "behind it", "in the rewrite"])
def test_a_capture_that_fails_leaves_the_model_as_it_was(
    where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    m, expected = made(Failing), model()(IMAGE)
    fast = bgx.optimize(m, method=METHOD, backend="eager")
    before, weights = dict(vars(m)), dict(m.named_parameters())

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        if where == "in forward":
            patch.setattr(Failing, "where", 1)
            patch.setattr(Failing, "error", error)
        elif where == "in export":
            whole = torch.export.export

            def half(mod: nn.Module, *args: Any, **kwargs: Any) -> Any:
                mod.q._parameters["weight"] = None
                mod.processor.options["bias"] = 1.0  # type: ignore[union-attr]
                whole(mod, *args, **kwargs)
                raise error

            patch.setattr(torch.export, "export", half)
        elif where == "behind it":
            patch.setattr(capturing, "put_back", fail)
        else:
            patch.setattr(Settings, "rewrite", fail)
        with pytest.raises((bgx.CaptureError, error)):
            fast(IMAGE)
    after = {name: value for name, value in vars(m).items() if name != "seen"}
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert all(weight is weights[name] for name, weight in m.named_parameters())
    assert m.processor.options == {"bias": 0.0}
    assert torch.equal(m(IMAGE), expected)
    assert type(fast(IMAGE)) is Tensor


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("ModelState", "a flag"),
        ("Watch", "a flag"),
        ("ModelState", "a buffer"),
        ("Watch", "a buffer"),
        ("renew", "a buffer"),
    ],
)
def test_an_interrupt_while_a_change_is_noticed_loses_nothing(
    where: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = model()
    fast = bgx.optimize(m, (IMAGE,), method=(), backend="eager")
    if change == "a flag":
        m.flags[0] = False
    else:
        m.shift = torch.ones(toys.C)

    def interrupt(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(graphs if where == "renew" else states, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fast(IMAGE)
    torch.testing.assert_close(fast(IMAGE), m(IMAGE))


# -------------------------------------------------------------------------------- signatures


class Branching(toys.Separate):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) + (1.0 if image.is_contiguous() else 2.0)


def test_strides_are_part_of_the_signature() -> None:
    m, counter = made(Branching), CompileCounter()
    fast = bgx.optimize(m, method=(), backend=counter)
    for image in (IMAGE, IMAGE.to(memory_format=torch.channels_last), IMAGE.mT.contiguous().mT, IMAGE):
        torch.testing.assert_close(fast(image), m(image))
    assert counter.frame_count == len(fast._graphs) == 3


def test_strides_of_a_single_sample_do_not_matter() -> None:
    fast = bgx.optimize(made(Branching), method=(), backend="eager")
    for image in (IMAGE[:1], IMAGE[1:], IMAGE[::2]):
        fast(image)
    assert len(fast._graphs) == 1


def test_sparse_inputs_are_refused() -> None:
    fast = bgx.optimize(model(), method=(), backend="eager")
    with pytest.raises(bgx.InputError, match=r"an input of shape \(2, 3, 4, 6\) is torch.sparse_coo; pass a dense one"):
        fast(IMAGE.to_sparse())


# --------------------------------------------------------------- threads, forks and compilers


@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))]
)
@pytest.mark.parametrize("shared", ["one denoiser", "two of one model", "two models"])
def test_eight_threads_and_three_sizes(shared: str, backend: str) -> None:
    models = [made(toys.Separate), made(toys.Separate)]
    if shared == "two of one model":
        models[1] = models[0]
    images = [torch.randn(1, 3, 4 + 2 * size, 6, generator=torch.Generator().manual_seed(size)) for size in range(3)]
    alone = bgx.optimize(made(toys.Separate), method=METHOD, backend="eager")
    expected = [alone(image) for image in images]
    fast = [bgx.optimize(each, method=METHOD, backend=backend) for each in models]
    fast = fast[:1] if shared == "one denoiser" else fast

    def work(index: int) -> list[Tensor]:
        with torch.no_grad():
            return [fast[index % len(fast)](images[(index + call) % 3]) for call in range(6)]

    with ThreadPoolExecutor(8) as pool:
        for index, outputs in enumerate(pool.map(work, range(8))):
            for call, output in enumerate(outputs):
                torch.testing.assert_close(output, expected[(index + call) % 3])
    assert [len(each._graphs) for each in fast] == [3] * len(fast)
    assert not any(isinstance(weight, FakeTensor) for each in models for weight in each.parameters())


def test_an_error_in_the_compiler_leaves_it_usable() -> None:
    fails = [KeyboardInterrupt, RuntimeError]

    def backend(graph: Any, inputs: Any) -> Any:
        if fails:
            raise fails.pop()
        return graph

    m = model()
    fast = bgx.optimize(m, method=(), backend=backend)
    with pytest.raises(Exception, match="RuntimeError"):
        fast(IMAGE)
    with pytest.raises(KeyboardInterrupt):
        fast(IMAGE)
    torch.testing.assert_close(fast(IMAGE), m(IMAGE))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are of POSIX")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_fork_while_another_thread_captures() -> None:
    bgx.optimize(model(), (IMAGE,), method=(), backend="eager")
    begun = threading.Event()

    def capture() -> None:
        with one_at_a_time():
            begun.set()
            time.sleep(0.3)

    thread = threading.Thread(target=capture)
    thread.start()
    begun.wait()
    child = os.fork()
    if not child:
        signal.alarm(10)
        with one_at_a_time():
            os._exit(0)
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_torch_compile_around_it() -> None:
    m = model()
    fast = bgx.optimize(m, method=(), backend="eager")
    compiled = torch.compile(fast, backend="eager")
    for image in (IMAGE, IMAGE, IMAGE[:1]):
        torch.testing.assert_close(compiled(image), m(image))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"mode": "reduce-overhead"}, True),
        ({"mode": "max-autotune"}, True),
        ({"mode": "max-autotune-no-cudagraphs"}, False),
        ({"options": {"triton.cudagraphs": True}}, True),
        ({"backend": "eager"}, False),
    ],
)
def test_outputs_of_cuda_graphs_outlive_the_next_call(settings: dict[str, Any], expected: bool) -> None:
    """The memory that every call writes to, as a CUDA graph does, is not what the caller gets."""
    fast = bgx.optimize(model(), method=(), **{"backend": "inductor", **settings})
    assert fast._settings.has_cuda_graphs == expected
    if not expected:
        return
    fast.prepare(IMAGE)
    memory = torch.zeros_like(IMAGE)
    (slot,) = fast._graphs.slots.values()
    slot.prepared = replace(slot.prepared, run=lambda *inputs: [memory.add_(1)])
    first, second = fast(IMAGE), fast(IMAGE)
    assert first.unique().tolist() == [1.0]
    assert second.unique().tolist() == [2.0]


def test_the_cheap_look_is_there_in_this_torch() -> None:
    watch = Watch(ModelState(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    assert not watch.moved()
