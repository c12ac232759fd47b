"""The states that a model was in, and which of them it is in now."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count

from torch import Tensor, nn

from bigain_fx.model_state import ModelState
from bigain_fx.watch import Watch


@dataclass(frozen=True)
class Look:
    """What a look at the model found.

    Attributes:
        number: of the state that it is in.
        state: that state.
        changed: the paths of what changed since the last look.
        known: whether the model was in this state before.
        renewed: buffers that gave way to others of their kind since the model was in this state, as ``(old, new)``.
        kept: all states that the model may come back to, by their facts.
    """

    number: int
    state: ModelState
    changed: list[str]
    known: bool
    renewed: list[tuple[Tensor, Tensor]]
    kept: Mapping[Hashable, tuple[int, ModelState]]

    @property
    def numbers(self) -> set[int]:
        """Of the states in ``kept``."""
        return {number for number, _ in self.kept.values()}


class States:
    """Numbers for the states of a model, by their facts.

    A state is forgotten when the model has no longer all of its weights: nobody goes back to it.

    Attributes:
        inputs: paths of float attributes that are inputs of the graphs, and so no facts.
        tensors: what they are now, by path.
        kept: why other floats that change are constants, by path.

    Args:
        model: the model.
        tensor: makes a tensor of a float.
    """

    def __init__(self, model: nn.Module, tensor: Callable[[float], Tensor]) -> None:
        self._model, self._tensor = model, tensor
        self._known: Mapping[Hashable, tuple[int, ModelState]] = {}
        self._numbers = count()
        self._now: tuple[int, ModelState, Watch] | None = None
        self.inputs: set[str] = set()
        self.tensors: dict[str, Tensor] = {}
        self.kept: dict[str, str] = {}

    def same_kinds(self) -> bool:
        """Return whether tensors have the dtypes, devices and shapes that they had at the last look."""
        return self._now is not None and self._now[1].same_kinds()

    def values(self, paths: Iterable[str]) -> dict[str, Tensor]:
        """Return the floats that are at ``paths`` as they were at the last look, a tensor of its own for each."""
        state = self._now[1] if self._now is not None else None
        return {path: self._tensor(state.number(path)).clone() for path in paths if state and is_float(state, path)}

    def unmoved(self, with_kinds: bool) -> int | None:
        """Return the state of the last look if nothing was written into the model since, else None.

        Args:
            with_kinds: compare dtypes, devices and shapes of tensors too, which leave no trace.
        """
        if (now := self._now) is None or now[2].moved() or (with_kinds and not now[1].same_kinds()):
            return None
        return now[0]

    def look(self) -> Look:
        """Return the state that the model is in; it counts as seen once :meth:`note` was told."""
        if (now := self._now) is not None and now[1].same_objects():
            number, state, watch = now
            if watch.moved():
                self._now = number, state, watch.again()
            return Look(number, state, [], True, [], self._known)
        state = ModelState(self._model)
        key = frozenset((path, fact) for path, fact in state.facts.items() if path not in self.inputs)
        known = key in self._known
        number, before = self._known[key] if known else (next(self._numbers), state)
        weights = state.weights
        kept = {key: (number, state)} | {
            other: (at, then) for other, (at, then) in self._known.items() if other != key and then.weights <= weights
        }
        changed = now[1].differences(state) if now is not None else []
        return Look(number, state, changed, known, before.renewed(state), kept)

    def note(self, found: Look) -> None:
        """Take ``found`` for what the model is, once its graphs are: an interrupt before finds the change once more."""
        if self._now is None or self._now[1] is not found.state:
            state = found.state
            watch = Watch(state)
            self.tensors = {path: self._tensor(state.number(path)) for path in self.inputs if is_float(state, path)}
            self._known, self._now = found.kept, (found.number, state, watch)

    def moving(self) -> set[str]:
        """Return the paths of floats in which alone the state of the last look differs from another one."""
        assert self._now is not None
        number, state, _ = self._now
        for at, other in self._known.values():
            paths = set(state.differences(other)) - self.inputs if at != number else set()
            floats = all(is_float(state, path) and is_float(other, path) and state.place(path) for path in paths)
            if paths and floats:
                return paths - self.kept.keys()
        return set()

    def promote(self, paths: set[str]) -> None:
        """Make inputs of the graphs of these floats; no graph that was made before has them."""
        if not paths <= self.inputs:
            self.inputs |= paths
            self._known, self._now = {}, None


def is_float(state: ModelState, path: str) -> bool:
    """Return whether a float is at ``path`` of ``state``."""
    fact = state.facts.get(path)
    return isinstance(fact, tuple) and fact[0] is float
