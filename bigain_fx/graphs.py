"""The graphs of a denoiser: which of them a call takes, and when there must be another."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from bigain_fx import families
from bigain_fx.calls import check_gradients, described, flat_tensors, signature_of
from bigain_fx.capture import renew, value_read
from bigain_fx.model_state import some
from bigain_fx.numbers import Numbers
from bigain_fx.passes.errors import CaptureError, InputError
from bigain_fx.passes.images import Hint
from bigain_fx.passes.methods import Methods
from bigain_fx.prepare import Prepared, prepare
from bigain_fx.report import Report, announce
from bigain_fx.settings import Settings
from bigain_fx.states import States
from bigain_fx.torch_internals import one_at_a_time

log = logging.getLogger("bigain_fx")

Key = tuple[Any, ...]


class _Slot:
    """One graph, and when it was used last."""

    def __init__(self, prepared: Prepared, used: int) -> None:
        self.prepared, self.used = prepared, used


class Graphs:
    """Keeps one graph for each state of ``model`` and signature of inputs, and makes those that are not there.

    Attributes:
        slots: the graphs, by the number of a state, and a signature.
        signatures: all that were captured, in words.
        latest: the graph that was asked for last.
    """

    def __init__(self, model: nn.Module, methods: Methods, settings: Settings) -> None:
        self._model, self._methods, self._settings = model, methods, settings
        self._read_grid = families.GridReader()
        self._numbers = Numbers(model)
        self._states = States(model, self._numbers.tensor)
        self._state: int | None = None
        self._clock = count(1)
        self.slots: dict[Key, _Slot] = {}
        self.signatures: dict[Key, str] = {}
        self.latest: Prepared | None = None

    def __len__(self) -> int:
        return len(self.slots)

    def ready(
        self, arguments: Mapping[str, Any], *, expected: bool = False, look: bool = False
    ) -> tuple[Prepared, list[Tensor]]:
        """Return the graph for these arguments, captured if it is not there, and its inputs.

        Args:
            arguments: canonical keyword arguments.
            expected: capture only what was captured once.
            look: at everything, the dtypes, devices and shapes of weights too, which Dynamo guards else.
        """
        arguments = self._numbers.as_inputs(arguments)
        grid = families.grid_for(self._settings.grid, arguments, self._read_grid(arguments))
        signature = (signature_of(arguments), grid.grid)
        state = None if look else self._states.unmoved(with_kinds=self._settings.backend == "eager")
        slot = self.slots.get((state, signature))
        if slot is None:
            with one_at_a_time():
                slot, arguments = self._found_or_made(arguments, signature, grid, expected)
        elif torch.is_grad_enabled():
            check_gradients(arguments)
        slot.used = next(self._clock)
        self.latest = prepared = slot.prepared
        return prepared, [*flat_tensors(arguments), *map(self._states.tensors.__getitem__, prepared.numbers)]

    def _found_or_made(
        self, arguments: Mapping[str, Any], signature: Key, grid: families.Reading, expected: bool
    ) -> tuple[_Slot, Mapping[str, Any]]:
        """Return the graph for these arguments, and these, with another float as a tensor perhaps."""
        state = self._look()
        if slot := self.slots.get((state, signature)):
            if torch.is_grad_enabled():
                check_gradients(arguments)
            return slot, arguments
        inputs = described(arguments, grid.grid)
        if signature not in self.signatures and expected:
            prepared = "; ".join(self.signatures.values()) or "nothing"
            raise InputError(f"{inputs}: not prepared, and on_new_signature='raise'; prepared: {prepared}")
        if signature not in self.signatures and self.signatures:
            log.warning("%s: new input signature, capturing graph %d: %s", self._name, len(self.signatures) + 1, inputs)
        if grid.reason:
            log.warning("%s: %s", self._name, grid.reason)
        captured, arguments = self._capture_numbers(arguments, grid.grid)
        announce(captured.report)
        signature = (signature_of(arguments), grid.grid)
        state = self._look(captured=True)  # where a first call filled something in, the model is in another state
        slot = self.slots[state, signature] = _Slot(captured, next(self._clock))
        self.signatures[signature] = self.signatures.pop(signature, described(arguments, grid.grid))
        self._drop_oldest()
        return slot, arguments

    def _capture_numbers(self, arguments: Mapping[str, Any], grid: Hint | None) -> tuple[Prepared, Mapping[str, Any]]:
        """Capture with the floats that change from call to call as inputs, if the graph allows that."""
        given, held = self._numbers.moving(arguments, signature_of), self._states.moving()
        if given or held:
            as_inputs = self._numbers.as_inputs(arguments, given)
            try:
                captured = self._made(as_inputs, grid, held, arguments)
                if read := value_read(captured.graph.graph):
                    raise CaptureError(f"forward makes a number of the tensor {read}")
            except CaptureError as error:
                paths = sorted(given | held)
                log.warning("%s: each value of %s is a graph of its own: %s", self._name, some(paths), error)
                self._numbers.kept |= dict.fromkeys(given, str(error))
                self._states.kept |= dict.fromkeys(held, str(error))
            else:
                self._numbers.promote(given)
                self._states.promote(held)
                return captured, as_inputs
        return self._made(arguments, grid), arguments

    def _drop_oldest(self) -> None:
        """Keep ``max_graphs`` graphs, and as many signatures."""
        while len(self.slots) > self._settings.max_graphs:
            oldest = min(self.slots, key=lambda key: self.slots[key].used)
            del self.slots[oldest]
            log.warning("%s: dropping a graph, max_graphs=%d: %s", self._name, self._settings.max_graphs,
                        self.signatures[oldest[1]])  # fmt: skip
        held = {inputs for _, inputs in self.slots}
        for inputs in [inputs for inputs in self.signatures if inputs not in held]:
            if len(self.signatures) > self._settings.max_graphs:
                del self.signatures[inputs]

    def _look(self, captured: bool = False) -> int:
        """Return the number of the state that the model is in, and make its graphs the ones that are used."""
        found = self._states.look()
        if captured and found.changed:
            # What a first call fills in is there for later ones: it changes none of the graphs that were made without.
            last = self._state
            self.slots = {
                (found.number if state == last else state, key): slot for (state, key), slot in self.slots.items()
            }
        for (state, _), slot in self.slots.items():
            if state == found.number:
                renew(slot.prepared.graph, found.renewed)
        if found.changed and not captured and self.slots:
            if found.known:
                log.info("%s is as it was once, and its graphs are there: %s", self._name, some(found.changed))
            else:
                log.warning("%s changed, its graphs are captured anew when next called: %s", self._name,
                            some(found.changed))  # fmt: skip
        self.slots = {key: slot for key, slot in self.slots.items() if key[0] in found.numbers}
        self._states.note(found)
        self._state = found.number
        return found.number

    def _made(
        self,
        arguments: Mapping[str, Any],
        grid: Hint | None,
        more: Iterable[str] = (),
        plain: Mapping[str, Any] | None = None,
    ) -> Prepared:
        numbers = self._states.values({*self._states.inputs, *more})
        return prepare(self._model, self._methods, self._settings, arguments, grid, numbers, self._check_kinds, plain)

    def _check_kinds(self) -> None:
        """Refuse to compile a graph again for weights that are not what it was captured with."""
        if not self._states.same_kinds():
            raise InputError(f"weights of {self._name} have other dtypes, devices or shapes than when it was captured")

    def inspect(self, arguments: Mapping[str, Any]) -> Report:
        """Return what would be done for these arguments; nothing is kept, and nothing is logged of it."""
        grid = families.grid_for(self._settings.grid, arguments, self._read_grid(arguments))
        with one_at_a_time():
            return self._made(arguments, grid.grid).report

    @property
    def _name(self) -> str:
        return type(self._model).__name__
