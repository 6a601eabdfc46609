"""Lanes, steps and loops in plain Python: Python's loops."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr

from .heap import Heap, is_equal, Place, type_of
from .interpret import fit, is_key, keys_like, LANES, number, typed
from .program import Apply


@dataclasses.dataclass
class Slices:
    """What is given in slices: the axis of each ref, by its number in the heap, and that of
    each array, or `None`. And the numbers of the refs with keys, of which each lane or step
    is given its own."""

    refs: dict[int, int]
    arrays: Sequence[int | None]
    keys: Sequence[int]


def part(x: Any, axis: int | None, k: int) -> Any:
    return x if axis is None else jnp.moveaxis(x, axis, 0)[k]


def key_of_lane(keys: Any, k: int) -> Any:
    """The number of the lane is folded in, and before it a number ("lane", in ASCII), so
    that it is no key that a program gets by folding in numbers."""

    def one(key):
        return jr.fold_in(jr.fold_in(key, 0x6C616E65), k)

    of_lane = one if typed(keys).ndim == 0 else jax.vmap(one)
    return keys_like(keys, of_lane(typed(keys)))


class Lanes(Heap):
    def slices(self, s: Apply, closed, refs, sliced, arrays: Sequence) -> Slices:
        axes = s.option("axes") or (0,) * len(sliced)
        of_refs = {x.i: axis for x, axis in zip(sliced, axes) if axis is not None}
        of_arrays = s.option("array_axes")
        closed_over = [x for x in closed[0].values() if self.is_ref(x)]
        same = {ref.i for ref in refs if self.is_same_key(s, ref)}
        keys = [
            ref.i
            for ref in [*refs, *sliced, *closed_over]
            if ref.collection == "rng"
            and ref.i not in same
            and is_key(self.read(ref))
            and ref.i not in of_refs
        ]
        return Slices(
            of_refs,
            (0,) * len(arrays) if of_arrays is None else of_arrays,
            sorted(set(keys)),
        )

    #
    # Lanes.
    #

    def vmap(self, s, closed, refs, sliced, inputs) -> tuple:
        slices = self.slices(s, closed, refs, sliced, inputs)
        return self.lanes(s, closed, refs, sliced, inputs, slices, range(LANES))

    def lanes(
        self, s, closed, refs, sliced, inputs, slices: Slices, which: Sequence[int]
    ) -> tuple:
        start, base = list(self.heap), len(self.heap)
        heaps, results = [], []
        with self.noting_writes() as written:
            for k in which:
                self.heap = list(start)
                for i, axis in slices.refs.items():
                    self.heap[i] = part(start[i], axis, k)
                for i in slices.keys:
                    self.heap[i] = key_of_lane(start[i], k)
                mine = [part(x, a, k) for x, a in zip(inputs, slices.arrays)]
                results.append(self.call(s.blocks[0], closed[0], refs, sliced, mine))
                heaps.append(self.heap)
        self.heap = list(start)
        for i in sorted(x for x in written if x < base):
            ends = [heap[i] for heap in heaps]
            if i in slices.refs:
                self.heap[i] = jnp.stack(ends, slices.refs[i])
                continue
            if i in slices.keys:
                self.heap[i] = ends[0]
                continue
            # Not known to be one value before all lanes have run.
            self.reasons.add("lanes, of one value")
            if not all(is_equal(x, ends[0]) for x in ends):
                self.refuse("lanes")
            self.heap[i] = ends[0]
        axis = s.option("out_axis") or 0
        values = [
            jnp.stack(of_lanes, axis) for of_lanes in zip(*(r[0] for r in results))
        ]
        return values, self.stack_new(base, [out for _, out in results], heaps, axis)

    def stack_new(
        self,
        base: int,
        results: list[tuple[Place, ...]],
        heaps: list[list] | None = None,
        axis: int = 0,
    ) -> list[Place]:
        """The refs that all lanes, or all steps, return: those made in them are stacked.

        `base` is how many refs there were before; `heaps` is that of each lane."""
        heaps = heaps or [self.heap] * len(results)
        made: dict[tuple, Place] = {}
        out = []
        for places in zip(*results):
            numbers = tuple(x.i for x in places)
            if all(i < base for i in numbers):
                if len(set(numbers)) > 1:
                    self.refuse("result")
                out.append(places[0])
                continue
            if numbers not in made:
                ends = [heap[i] for heap, i in zip(heaps, numbers)]
                made[numbers] = self.new(jnp.stack(ends, axis), places[0].collection)
            out.append(made[numbers])
        return out

    #
    # Steps.
    #

    def check_after(self, before: Sequence[Place], after: Sequence[Place]) -> None:
        if [x.i for x in before] != [x.i for x in after]:
            self.refuse("carry")

    def carried(self, run: Callable[[], Any]) -> Any:
        """Runs a step, which must keep the types of the refs that there were before."""
        before = [type_of(x) for x in self.heap]
        result = run()
        if [type_of(x) for x in self.heap[: len(before)]] != before:
            self.refuse("carry type")
        return result

    def steps(self, slices: Slices, order: Sequence[int], step: Callable) -> list:
        """Runs `step(k)` with a slice in each of the refs, and stacks them again."""
        stacks = {i: self.heap[i] for i in slices.refs}
        parts: dict[int, dict] = {i: {} for i in stacks}
        results = {}
        ever_written: set[int] = set()
        for k in order:
            for i, stack in stacks.items():
                self.heap[i] = part(stack, slices.refs[i], k)
            keys = {i: self.heap[i] for i in slices.keys}
            for i, key in keys.items():
                self.heap[i] = key_of_lane(key, k)
            with self.noting_writes() as written:
                results[k] = self.carried(lambda k=k: step(k))
            ever_written |= written
            for i in keys.keys() - written:
                self.heap[i] = keys[i]
            for i in stacks:
                parts[i][k] = self.heap[i]
        for i, axis in slices.refs.items():
            ends = [parts[i][k] for k in range(len(order))]
            is_whole = i not in ever_written
            self.heap[i] = stacks[i] if is_whole else jnp.stack(ends, axis)
        return [results[k] for k in range(len(order))]

    def scan(self, s, closed, refs, sliced, inputs) -> tuple:
        v, *xs = inputs
        base = len(self.heap)
        slices = self.slices(s, closed, refs, sliced, xs)
        carry = [v]

        def step(k):
            given = [carry[0], *(part(x, a, k) for x, a in zip(xs, slices.arrays))]
            (new, *ys), out, after = self.call(
                s.blocks[0], closed[0], refs, sliced, given
            )
            self.check_after(refs, after)
            carry[0] = fit(new, v.shape)
            return ys, out

        order = range(LANES)
        if s.option("reverse"):
            order = order[::-1]
        results = self.steps(slices, order, step)
        ys = [jnp.stack(parts) for parts in zip(*(ys for ys, _ in results))]
        return [carry[0], *ys], self.stack_new(base, [out for _, out in results])

    def map(self, s, closed, refs, sliced, inputs) -> tuple:
        slices = self.slices(s, closed, refs, sliced, inputs)
        if s.option("batch_size") is not None:
            return self.map_in_batches(s, closed, sliced, inputs, slices)
        base = len(self.heap)

        def step(k):
            given = [part(x, a, k) for x, a in zip(inputs, slices.arrays)]
            return self.call(s.blocks[0], closed[0], [], sliced, given)

        results = self.steps(slices, range(LANES), step)
        values = [jnp.stack(parts) for parts in zip(*(v for v, _ in results))]
        return values, self.stack_new(base, [out for _, out in results])

    def map_in_batches(self, s, closed, sliced, inputs, slices: Slices) -> tuple:
        """Batches, one after the other; within one, lanes."""
        base, size = len(self.heap), s.option("batch_size")
        start_of_all = list(self.heap)
        stacks = {i: jnp.moveaxis(self.heap[i], a, 0) for i, a in slices.refs.items()}
        leading = dataclasses.replace(slices, refs=dict.fromkeys(stacks, 0))
        ends: dict[int, list] = {i: [] for i in stacks}
        ever_written: set[int] = set()
        batches = []
        for start in range(0, LANES, size):
            for i, stack in stacks.items():
                self.heap[i] = stack
            which = range(start, min(start + size, LANES))
            others = [i for i in range(base) if i not in stacks]
            before = [type_of(self.heap[i]) for i in others]
            with self.noting_writes() as written:
                values, out = self.lanes(s, closed, [], sliced, inputs, leading, which)
            ever_written |= written
            if [type_of(self.heap[i]) for i in others] != before:
                self.refuse("carry type")
            batches.append((values, out))
            for i in stacks:
                x = self.heap[i]
                # Not written, it is still the whole of it.
                ends[i].append(x if i in written else x[start : start + size])
        for i, axis in slices.refs.items():
            whole = jnp.moveaxis(jnp.concatenate(ends[i]), 0, axis)
            self.heap[i] = whole if i in ever_written else start_of_all[i]
        values = [jnp.concatenate(parts) for parts in zip(*(v for v, _ in batches))]
        made: dict[tuple, Place] = {}
        out = []
        for places in zip(*(out for _, out in batches)):
            numbers = tuple(x.i for x in places)
            if all(i < base for i in numbers):
                out.append(places[0])
                continue
            if numbers not in made:
                whole = jnp.concatenate([self.heap[i] for i in numbers])
                made[numbers] = self.new(whole, places[0].collection)
            out.append(made[numbers])
        return values, out

    def associative_scan(self, s, closed, refs, sliced, inputs) -> tuple:
        base = len(self.heap)
        with self.noting_writes() as written:
            parts, _ = self.call(s.blocks[0], closed[0], [], (), ())
        if any(i < base for i in written):
            self.refuse("write in associative_scan")
        axis = s.option("axis") or 0
        order = range(LANES)[::-1] if s.option("reverse") else range(LANES)
        values = []
        for x, more in zip(inputs, parts):
            x = jnp.moveaxis(x, axis, 0)
            done: dict[int, Any] = {}
            total = None
            for k in order:
                total = x[k] if total is None else total + x[k] + fit(more, ())
                done[k] = total
            values.append(jnp.stack([done[k] for k in range(LANES)], axis))
        return values, []

    def loop(self, s, closed, refs, inputs, order) -> list:
        v = inputs[0]

        def step(i):
            (new,), _, after = self.call(
                s.blocks[0], closed[0], refs, (), [v, jnp.int32(i)]
            )
            self.check_after(refs, after)
            return fit(new, v.shape)

        self.rehearse(lambda: self.carried(lambda: step(0)))
        n = 0
        for i in order():
            v = self.carried(lambda i=i: step(i))
            n += 1
        return [jnp.int32(n), v]

    def fori(self, s, closed, refs, sliced, inputs) -> tuple:
        lower, upper = s.option("bounds")
        _, v = self.loop(s, closed, refs, inputs, lambda: range(lower, upper))
        return [v], []

    def while_(self, s, closed, refs, sliced, inputs) -> tuple:
        def order():
            for i in range(s.option("steps")):
                total = sum((jnp.sum(number(self.heap[r.i])) for r in refs), 0.0)
                if not total < 50.0:
                    return
                yield i

        return self.loop(s, closed, refs, inputs, order), []
