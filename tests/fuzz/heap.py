"""Refs in plain Python: a ref is a number in a heap, which is a list of values."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .interpret import Env, Interpreter, raw
from .program import Apply


class Place:
    """A ref: a number in the heap."""

    __slots__ = ("collection", "i")

    def __init__(self, i: int, collection: str | None):
        self.i = i
        self.collection = collection


# The axis of a key that all lanes have as it is.
SAME = "same"


class Refused(Exception):
    """Here the meaning of plain Python cannot be carried: the library must refuse it."""


class Failed(Exception):
    """A check failed."""


@dataclasses.dataclass
class Backward:
    """The calls of functions with a backward rule that writes a log, under a derivative.

    A rule needs the cotangents of what its call returned. They are the derivative by an
    array of zeros that is added to it.

    - `zeros`: for each call; `None` as long as it is not known which calls there are;
    - `outs`: what each call returned, and `logs`: the number of the log that it writes;
    - `seen`: the logs of all calls that there may be.
    """

    zeros: list | None = None
    outs: list = dataclasses.field(default_factory=list)
    logs: list[int] = dataclasses.field(default_factory=list)
    seen: set[int] = dataclasses.field(default_factory=set)


def is_float(x: jax.Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def is_equal(a: jax.Array, b: jax.Array) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = raw(a), raw(b)
    return a is b or bool(jnp.all((a == b) | ((a != a) & (b != b))))


def type_of(x: jax.Array) -> tuple:
    return x.shape, x.dtype


class Heap(Interpreter):
    """- `heap`: the value of each ref;
    - `reasons`: why the library may refuse the program, though plain Python has a meaning.
    """

    def __init__(self):
        self.heap: list[jax.Array] = []
        self.reasons: set[str] = set()
        # The refs that are written, for each `noting_writes` around.
        self.writes: list[set[int]] = []
        self.backward: Backward | None = None
        self.is_rehearsal = False

    def is_ref(self, x):
        return isinstance(x, Place)

    def read(self, ref):
        return self.heap[ref.i]

    def write(self, ref, value):
        for seen in self.writes:
            seen.add(ref.i)
        self.heap[ref.i] = value

    def set_first(self, ref, value):
        self.write(ref, self.read(ref).at[0].set(value))

    def check(self, x, fails):
        if fails:
            raise Failed
        return x

    @contextlib.contextmanager
    def noting_writes(self) -> Iterator[set[int]]:
        """The refs that are written meanwhile, by a body that is only rehearsed too: a
        branch that was not taken, a step of a loop that ends before the first."""
        written: set[int] = set()
        self.writes.append(written)
        try:
            yield written
        finally:
            self.writes.pop()

    def new(self, value, collection):
        self.heap.append(value)
        return Place(len(self.heap) - 1, collection)

    def is_same(self, a, b):
        return a.i == b.i

    def refuse(self, reason: str) -> None:
        self.reasons.add(reason)
        raise Refused(reason)

    def is_same_key(self, s: Apply, ref: Place) -> bool:
        """Whether it was asked for that all lanes have the key of `ref` as it is."""
        return bool(s.option("same_rng")) and ref.collection == "rng"

    def apply(self, s: Apply, env: Env) -> tuple[list, list]:
        refs = [env[name] for name in s.refs]
        sliced = [env[name] for name in s.sliced]
        inputs = [self.value(e, env) for e in s.inputs]
        closed = [
            {n: env[n] for n in (*block.closed, *block.kept)} for block in s.blocks
        ]
        # A ref has one axis, whatever the names for it. What is closed over says nothing.
        axes = s.option("axes") or (0,) * len(sliced)
        found: dict[int, Any] = {}
        of_refs = [SAME if self.is_same_key(s, ref) else None for ref in refs]
        for ref, axis in zip([*refs, *sliced], [*of_refs, *axes]):
            if isinstance(axis, int) and axis < 0:  # the last of one axis is its first
                axis += jnp.ndim(self.heap[ref.i])
            if found.setdefault(ref.i, axis) != axis:
                self.refuse("two axes")
        values, out = getattr(self, s.transform)(s, closed, refs, sliced, inputs)
        return list(values), list(out)

    #
    # What a body would do, where it does not run: it is traced all the same.
    #

    def rehearse(self, run: Callable[[], Any]) -> Any:
        """Runs, and undoes it. Only the reasons for a refusal stay."""
        heap, before = list(self.heap), self.is_rehearsal
        self.is_rehearsal = True
        try:
            return run()
        except (Refused, Failed):
            return None
        finally:
            self.heap, self.is_rehearsal = heap, before

    def distinct(self, refs: Sequence[Place]) -> list[int]:
        return list(dict.fromkeys(ref.i for ref in refs))
