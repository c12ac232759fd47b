"""A compiled graph is called without Dynamo where that changes nothing, and through it everywhere else."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bigain_fx.capture import capture, renew
from bigain_fx.direct import Direct
from bigain_fx.settings import Settings

X, Y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)


class Little(nn.Module):
    """A weight, a buffer and a constant; outputs that are made, made twice, and given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1, 1))
        self.register_buffer("buffer", torch.randn(3, 1, 1))
        self.constant = torch.randn(3, 1, 1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z = x * self.weight + y * self.buffer
        return z, z.sum(), z, x, z.flatten() + self.constant.sum()


class Counted:
    """A backend that runs what it is given, and counts how often it is asked to compile."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: GraphModule, inputs: list[Any]) -> Callable[..., Sequence[Any]]:
        self.compiled += 1
        return graph.forward


def direct(model: nn.Module, *inputs: Tensor) -> tuple[Direct, Counted, list[int]]:
    """``model`` captured for ``inputs`` and called once, its backend, and how often Dynamo is entered from then on."""
    names = ("x", "y")[: len(inputs)]
    backend = Counted()
    made = Direct(capture(model.eval(), dict(zip(names, inputs, strict=True))).module, backend)
    with torch.no_grad():
        made(*inputs)
    entered: list[int] = []
    through = made.through_dynamo

    def watched(*args: Tensor) -> Any:
        entered.append(1)
        return through(*args)

    made.through_dynamo = watched
    return made, backend, entered


def same(found: Sequence[Any], expected: Sequence[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_later_calls_do_without_dynamo() -> None:
    model = Little()
    made, backend, entered = direct(model, X, Y)
    for x, y in ((X, Y), (Y, X), (X * 2, Y)):
        same(made(x, y), model(x, y))
    assert made(X, Y)[3] is X
    assert (backend.compiled, entered) == (1, [])


@torch.no_grad()
def test_what_is_written_into_a_weight_shows() -> None:
    model = Little()
    made, _, entered = direct(model, X, Y)
    model.weight.mul_(2)
    model.buffer.copy_(torch.ones(3, 1, 1))
    same(made(X, Y), model(X, Y))
    assert not entered


@torch.no_grad()
def test_a_renewed_buffer_is_read() -> None:
    model = Little()
    made, _, entered = direct(model, X, Y)
    old, model.buffer = model.buffer, torch.randn(3, 1, 1)
    renew(made._graph, [(old, model.buffer)])
    same(made(X, Y), model(X, Y))
    assert not entered


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


CHANGES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "gradients": lambda: torch.enable_grad(), "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": lambda: default_dtype(torch.float64), "deterministic": deterministic,
    "function mode": Functions, "dispatch mode": Dispatches,
    "stance": lambda: torch.compiler.set_stance("force_eager"), "inference": torch.inference_mode,
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_dynamo_decides_in_another_state_of_torch(change: str) -> None:
    made, _, entered = direct(Little(), X, Y)
    # As any compiled model, it does not run where a mode looks at all operators.
    refused = pytest.raises(RuntimeError, match="mode") if change == "dispatch mode" else nullcontext()
    with refused, CHANGES[change]():
        made(X, Y)
    assert len(entered) == 1


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "strides": lambda t: t.to(memory_format=torch.channels_last), "dtype": lambda t: t.double(),
    "shape": lambda t: t[:1], "gradient": lambda t: t.clone().requires_grad_(),
    "parameter": lambda t: nn.Parameter(t, requires_grad=False), "conjugate": lambda t: torch._neg_view(t),
    "device": lambda t: t.to("meta"),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_dynamo_decides_for_inputs_of_another_kind(kind: str) -> None:
    made, _, entered = direct(Little(), X, Y)
    with nullcontext() if kind != "device" else pytest.raises(Exception, match="device"):
        made(KINDS[kind](X), Y)
    assert len(entered) == 1


@torch.no_grad()
def test_dynamo_decides_for_weights_of_another_kind() -> None:
    model = Little()
    made, backend, entered = direct(model, X, Y)
    model.weight.data = model.weight.data.double()
    for _ in range(2):
        same(made(X, Y), model(X, Y))
    # The new function is called without Dynamo from then on.
    assert (backend.compiled, len(entered)) == (2, 1)


@torch.no_grad()
def test_inputs_that_are_one_tensor_do_not_tell_which_is_which() -> None:
    model = Little()
    made, _, entered = direct(model, X, X)
    same(made(X, Y), model(X, Y))
    assert len(entered) == 1
    same(made(Y, X), model(Y, X))
    assert len(entered) == 1
    same(made(X, X), model(X, X))
    assert len(entered) == 2


class Writes(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x.mul_(2)
        return x + y, x


@torch.no_grad()
def test_an_input_that_is_written_is_written() -> None:
    made, _, entered = direct(Writes(), X.clone(), Y)
    x = X.clone()
    total, written = made(x, Y)
    torch.testing.assert_close(x, 2 * X)
    torch.testing.assert_close(total, 2 * X + Y)
    assert written is x
    # Whether the other input shows the same memory is Dynamo's to guard.
    x = X.clone()
    torch.testing.assert_close(made(x, x.view(2, 3, 4, 4))[0], 4 * X)
    assert len(entered) == 2


@torch.no_grad()
def test_nothing_of_a_call_is_kept() -> None:
    x, y = X.clone(), Y.clone()
    made, _, _ = direct(Little(), x, y)
    outputs = made(x, y)
    held = [weakref.ref(tensor) for tensor in (x, y, *outputs)]
    del x, y, outputs
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


def test_threads_share_a_graph() -> None:
    model = Little().eval()
    backend = Counted()
    made = Direct(capture(model, {"x": X, "y": Y}).module, backend)
    failed: list[BaseException] = []
    start = threading.Barrier(4)

    def calls(scale: float) -> None:
        try:
            with torch.no_grad():
                start.wait()
                for _ in range(50):
                    same(made(X * scale, Y), model(X * scale, Y))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=calls, args=(scale,)) for scale in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert made._shortcut is not None


@torch.no_grad()
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiled_code_is_called_without_dynamo(backend: str) -> None:
    model = Little().eval()
    made = Settings(backend=backend).compile(capture(model, {"x": X, "y": Y}).module)
    same(made(X, Y), model(X, Y))
    made.through_dynamo = None  # type: ignore[assignment]
    same(made(Y, X), model(Y, X))
