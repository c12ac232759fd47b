"""``as_pairs``: graphs of complex numbers give the same in real ones, or are refused by name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from bigain_fx.capture import capture
from bigain_fx.passes.constants import folded
from bigain_fx.passes.errors import ExportError
from bigain_fx.passes.pairs import as_pairs, pair

X, TURN = torch.randn(2, 6, 8), torch.randn(6, 4, dtype=torch.complex64)
ROWS = torch.tensor([[0, 3, 5], [5, 1, 1]])


class Rotating(nn.Module):
    """Turns pairs of channels by what ``table`` makes of a table that is no buffer, as diffusers' are."""

    def __init__(self, turn: Callable[..., Tensor], buffer: bool = False) -> None:
        super().__init__()
        table = torch.polar(torch.ones(6, 4), torch.arange(24.0).view(6, 4))
        self.turn, self.table = turn, nn.Buffer(table) if buffer else table

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        return self.turn(torch.view_as_complex(x.unflatten(-1, (-1, 2))), self.table, rows)


def real(z: Tensor) -> Tensor:
    return torch.view_as_real(z).flatten(-2)


def picked(table: Tensor, rows: Tensor) -> Tensor:
    return table.expand(2, 6, 4).gather(1, rows[..., None].expand(2, 3, 4))


def in_parts(z: Tensor) -> Tensor:
    left, right = z.split([2, 4], 1)
    return torch.cat([right.flip(2), left.unsqueeze(0)[0].roll(1, 1), (2 * z)[:, 4:]], 1)


def of_angles(z: Tensor) -> Tensor:
    angles = z.real + z.imag
    return torch.polar(torch.full_like(angles, 0.5), angles) * torch.complex(angles, angles)


TURNS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "rotary": lambda z, table, rows: real(z * table),
    "merged": lambda z, table, rows: real(z[:, :3] * picked(table, rows)),
    "padded": lambda z, table, rows: real(z * nn.utils.rnn.pad_sequence([table, table[:4]], batch_first=True)),
    "table of complex arithmetic": lambda z, table, rows: real(z * (table**2).exp().conj().resolve_conj()),
    "real table of a complex one": lambda z, table, rows: z.real * torch.view_as_real(table)[..., 1] * table.abs(),
    "parts": lambda z, table, rows: real(in_parts(z * table)),
    "sums": lambda z, table, rows: real((z + table - 1 + 3 * z.real + z.sum(1, keepdim=True)).mean([0])),
    "weighted sum": lambda z, table, rows: real(torch.add(z, table, alpha=2) - torch.sub(2j, -z)),
    "scaled": lambda z, table, rows: real((3 - 2j) * z / 2 * table.imag / (1 + z.real.abs())),
    "conjugate": lambda z, table, rows: (z * z.conj()).real,
    "chosen": lambda z, table, rows: real(torch.where(z.real > 0, z, table).masked_fill(z.imag > 0, 0.5)),
    "of angles": lambda z, table, rows: real(of_angles(z)),
    "from real": lambda z, table, rows: real(z.real.to(torch.complex64) * table + z.imag),
    "double": lambda z, table, rows: real(z.to(torch.complex128) * table).float(),
}


def as_graph(model: nn.Module, **arguments: Tensor) -> GraphModule:
    return capture(model.eval(), arguments).module


def check_real(module: GraphModule) -> None:
    for node in module.graph.nodes:
        found = node.meta.get("val")
        for value in found if isinstance(found, list | tuple) else [found]:
            assert not isinstance(value, Tensor) or not value.is_complex(), node.format_node()
    assert not any(buffer.is_complex() for buffer in module.buffers())


@pytest.mark.parametrize("name", TURNS)
@torch.no_grad()
def test_the_same_in_real_numbers(name: str) -> None:
    model = Rotating(TURNS[name])
    module = as_pairs(as_graph(model, x=X, rows=ROWS))
    check_real(module)
    torch.testing.assert_close(module(X, ROWS)[0], model(X, ROWS), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_tables_are_worked_out_beforehand() -> None:
    """Of what depends on no input nothing is left but its value, whole or in two parts."""
    module = as_pairs(as_graph(Rotating(TURNS["table of complex arithmetic"]), x=X, rows=ROWS))
    expected = (model := Rotating(TURNS["rotary"])).table
    expected = (expected**2).exp().conj()
    tables = [node for node in module.graph.nodes if node.op == "get_attr"]
    found = [operator.attrgetter(node.target)(module) for node in tables]
    assert {table.shape for table in found} == {model.table.shape}
    assert any(torch.allclose(table, expected.real) for table in found)
    assert any(torch.allclose(table, expected.imag) for table in found)
    assert len(found) == 2
    kinds = {node.target for node in module.graph.nodes if node.op == "call_function"}
    assert not kinds & {torch.ops.aten.exp.default, torch.ops.aten.pow.Tensor_Scalar}
    whole = as_pairs(as_graph(Rotating(TURNS["real table of a complex one"]), x=X, rows=ROWS))
    assert sum(node.target is torch.ops.aten.mul.Tensor for node in whole.graph.nodes) == 2


class Turned(nn.Module):
    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        return real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn)


@torch.no_grad()
def test_a_complex_input_becomes_pairs() -> None:
    """Lumina-Next takes its rotary table as an argument."""
    module = as_pairs(as_graph(Turned(), x=X, turn=TURN))
    check_real(module)
    expected = Turned()(X, TURN)
    torch.testing.assert_close(module(X, pair(TURN))[0], expected)
    torch.testing.assert_close(module(X, pair(TURN.conj()))[0], Turned()(X, TURN.conj()))
    assert pair(X) is X


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_a_graph_of_real_numbers_is_left_as_it_is() -> None:
    module = as_graph(Plain(), x=X)
    assert as_pairs(module) is module


def kept(z: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    table[0].mul_(z[0, 0])
    return real(z * table)


def written(z: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    z = z * table
    z[:, 0].copy_(table[0])
    return real(z)


def shown(z: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    pairs = torch.view_as_real(table * 2) + z.real[0, 0, 0]
    same = torch.view_as_complex(pairs).contiguous()
    pairs[0].copy_(pairs[1])
    return real(z * same)


def shown_as_real(z: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    z = z * table
    torch.view_as_real(z)[0].copy_(torch.view_as_real(z)[1])
    return real(z)


@pytest.mark.parametrize(
    ("turn", "what"),
    [
        (lambda z, table, rows: real(z.exp() * table), "aten.exp.default"),
        (lambda z, table, rows: real(table / z), "aten.div.Tensor"),
        (lambda z, table, rows: z.angle(), "aten.angle.default"),
        (written, "aten.mul.Tensor"),
        (kept, "table"),
        (shown, "aten.view_as_complex.default"),
        (shown_as_real, "aten.mul.Tensor"),
    ],
)
def test_what_has_no_real_form_is_refused(turn: Any, what: str) -> None:
    model = Rotating(turn, buffer=turn is kept)
    message = f"{what} of complex numbers.* has no form in real ones"
    with pytest.raises(ExportError, match=message):
        as_pairs(as_graph(model, x=X, rows=ROWS))


def test_a_complex_output_is_refused() -> None:
    with pytest.raises(ExportError, match="an output of complex numbers has no form"):
        as_pairs(as_graph(Rotating(lambda z, table, rows: z * table), x=X, rows=ROWS))


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        noise = torch.rand(8)
        ours = torch.linalg.qr(self.weight + 1)[0].exp() * 2
        return x @ ours + torch.linalg.qr(x)[0] @ torch.linalg.qr(self.weight * noise)[0]


@torch.no_grad()
def test_only_what_depends_on_no_input_and_no_chance_is_worked_out() -> None:
    qr = torch.ops.aten.linalg_qr.default
    model, x = Weighted(), torch.randn(2, 8, 8)
    module = folded(as_graph(model, x=x, rows=ROWS), lambda node: node.target is qr)
    assert sum(node.target is qr for node in module.graph.nodes) == 2
    assert not any(node.target is torch.ops.aten.exp.default for node in module.graph.nodes)
    torch.manual_seed(3)
    expected = model(x, ROWS)
    torch.manual_seed(3)
    torch.testing.assert_close(module(x, ROWS)[0], expected)
