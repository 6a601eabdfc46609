"""Loops as Python runs them, step by step: what `jax.disable_jit` asks for.

Then nothing is staged, and a step sees arrays that can be printed, and decided on by `if`.
A step may write other refs than the one before.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu

from .._core import _trace
from .._core._call import Opened
from .._core._errors import StructureError
from .._core._structure import arrays_of, held, inside_of, Outcome
from ._control_flow import check_inside
from ._layout import replaced


__tracebackhide__ = True


class PythonLoop:
    """A loop that runs in Python.

    - `arrays`: those of the call, as the last step left them.

    **Arguments:**

    - `bare`: which of them are the carry. A step returns them first.
    - `sliced`: the numbers of the refs that are not carried from step to step.
    """

    def __init__(
        self,
        opened: Opened,
        arrays: list[Any],
        bare: range,
        name: str,
        sliced: set[int] | None = None,
    ):
        self.arrays = list(arrays)
        self._opened = opened
        self._bare = bare
        self._name = name
        self._sliced = sliced or set()
        self._written: set[int] = set()
        self._steps: list[tuple[list[Any], Outcome]] = []

    def step(self, run: Callable[[list[Any]], Outcome], arrays: list[Any]) -> None:
        """One step, on these arrays: those of the loop, but for what is sliced."""
        opened, outcome = self._opened, run(arrays)
        outcome = Outcome(*arrays_of(outcome), outcome.info)
        self.arrays = replaced(self.arrays, self._bare, outcome.out)
        for number, new in outcome.updates.items():
            if number not in self._sliced:
                check_inside(opened, number, inside_of(new), self._name)
                span = range(*opened.spans[number])
                self.arrays = replaced(self.arrays, span, jtu.tree_leaves(new))
        self._check_result(outcome)
        self._written |= outcome.updates.keys()
        self._steps.append((arrays, outcome))

    def _check_result(self, outcome: Outcome) -> None:
        if not self._steps:
            return
        info, first = outcome.info, self._steps[0][1].info
        if info.result != first.result or info.carried != first.carried:
            raise StructureError(
                f"`{self._name}`: each step must return the same structure, static values "
                "and refs. What is not an array cannot depend on the step: make it one."
            )

    @property
    def has_run(self) -> bool:
        return bool(self._steps)

    def outcome(self, reverse: bool = False) -> Outcome:
        """What the loop did. There was a step."""
        steps = self._steps[::-1] if reverse else self._steps
        n = len(self._bare)
        rest = zip(*(outcome.out[n:] for _, outcome in steps))
        out = [*(self.arrays[i] for i in self._bare), *map(jnp.stack, rest)]
        updates = {}
        for number in sorted(self._written):
            if number in self._sliced:
                each = [
                    outcome.updates.get(number, self._before(number, arrays))
                    for arrays, outcome in steps
                ]
                updates[number] = jtu.tree_map(lambda *x: jnp.stack(x), *each)
            else:
                updates[number] = self._before(number, self.arrays)
        return Outcome(out, updates, steps[0][1].info)

    def _before(self, number: int, arrays: list[Any]) -> Any:
        """The value of a ref, as these arrays have it."""
        inside = self._opened.structure.slots[number].inside
        return held(inside, arrays[slice(*self._opened.spans[number])])


def runs_in_python(*decided_on: Any) -> bool:
    """Whether loops and branches run in Python here: under `jax.disable_jit`, if what they
    decide on is known."""
    return _trace.is_jit_disabled() and all(map(_trace.is_concrete, decided_on))
