"""The interpretation in plain Python: no transform of this library, and no ref.

A ref is a number in a heap, which is a list of values. Jit and checkpoint are calls, loops
are loops, a branch is an `if`, and vmap is a loop over lanes, each of which starts from the
same heap. A derivative is that of a pure function from heap to heap, taken by JAX.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .interpret import (
    choice,
    Env,
    fit,
    flat,
    Interpreter,
    LANES,
    number,
    seed_vector,
    test,
)
from .program import Apply


class Place:
    """A ref: a number in the heap."""

    __slots__ = ("collection", "i")

    def __init__(self, i: int, collection: str | None):
        self.i = i
        self.collection = collection


class Refused(Exception):
    """Here the meaning of plain Python cannot be carried: the library must refuse it."""


def _is_float(x: jax.Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def _is_equal(a: jax.Array, b: jax.Array) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a is b or bool(jnp.all((a == b) | ((a != a) & (b != b))))


class Plain(Interpreter):
    """- `heap`: the value of each ref;
    - `reasons`: why the library may refuse the program, though plain Python has a meaning.
    """

    def __init__(self):
        self.heap: list[jax.Array] = []
        self.reasons: set[str] = set()
        # What a body may write is found by running it, also where it would not run.
        self.writes: list[set[int]] = []

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

    def new(self, value, collection):
        self.heap.append(value)
        return Place(len(self.heap) - 1, collection)

    def is_same(self, a, b):
        return a.i == b.i

    def refuse(self, reason: str) -> None:
        self.reasons.add(reason)
        raise Refused(reason)

    def apply(self, s: Apply, env: Env) -> tuple[list, list]:
        refs = [env[name] for name in s.refs]
        sliced = [env[name] for name in s.sliced]
        inputs = [self.value(e, env) for e in s.inputs]
        closed = [
            {n: env[n] for n in (*block.closed, *block.kept)} for block in s.blocks
        ]
        # A slice of a ref has another name than the ref.
        numbers = {x.i for x in sliced}
        others = [*refs, *(env[n] for block in s.blocks for n in block.closed)]
        if any(x.i in numbers for x in others):
            self.refuse("two axes")
        values, out = getattr(self, s.transform)(s, closed, refs, sliced, inputs)
        return list(values), list(out)

    def straight(self, s: Apply, closed, refs, sliced, inputs) -> tuple:
        return self.call(s.blocks[0], closed[0], refs, sliced, inputs)

    plain_call = jit = checkpoint = straight

    #
    # What a body would do, where it does not run: it is traced all the same.
    #

    def rehearse(self, run: Callable[[], Any]) -> Any:
        """Runs, and undoes it. Only the reasons for a refusal stay."""
        heap = list(self.heap)
        try:
            return run()
        except Refused:
            return None
        finally:
            self.heap = heap

    #
    # Derivatives.
    #

    def _distinct(self, refs: Sequence[Place]) -> list[int]:
        return list(dict.fromkeys(ref.i for ref in refs))

    def pure(
        self, s: Apply, closed, where: list[int], inputs: list, which: list[int]
    ) -> tuple[Callable, dict]:
        """From the values at `where` in the heap, and the inputs at `which`, to
        `(values, heap)`; and a dict for the refs of the result."""
        found: dict[str, Any] = {}

        def function(at: list, some: list) -> tuple[tuple, list]:
            heap = self.heap
            self.heap = list(heap)
            try:
                for i, x in zip(where, at):
                    self.heap[i] = x
                given = list(inputs)
                for i, x in zip(which, some):
                    given[i] = x
                params = found["params"]
                values, out = self.call(s.blocks[0], closed[0], params, (), given)
                found["out"] = out
                return values, self.heap
            finally:
                self.heap = heap

        return function, found

    def grad_parts(self, s, closed, refs, sliced, inputs) -> tuple:
        wrt = s.option("wrt")
        wanted = [ref for ref in refs if wrt is None or ref.collection == wrt]
        where = [i for i in self._distinct(wanted) if _is_float(self.heap[i])]
        if not where:
            self.refuse("nothing to differentiate")
        function, found = self.pure(s, closed, where, inputs, [])
        found["params"] = refs

        def loss(at):
            values, heap = function(at, [])
            return jnp.sum(number(values[0])), (values, heap)

        both = jax.value_and_grad(loss, has_aux=True)([self.heap[i] for i in where])
        (value, (values, self.heap)), grads = both
        return value, flat(grads), values, found["out"]

    def grad(self, s, closed, refs, sliced, inputs) -> tuple:
        _, grads, values, out = self.grad_parts(s, closed, refs, sliced, inputs)
        return [grads, *values], out

    def value_and_grad(self, s, closed, refs, sliced, inputs) -> tuple:
        value, grads, values, out = self.grad_parts(s, closed, refs, sliced, inputs)
        return [value, grads, *values], out

    def _all_floats(self, refs, inputs) -> tuple[list[int], list[int]]:
        where = [i for i in self._distinct(refs) if _is_float(self.heap[i])]
        which = [k for k, x in enumerate(inputs) if _is_float(x)]
        return where, which

    def _floats_of(self, s, closed, refs, inputs) -> tuple:
        where, which = self._all_floats(refs, inputs)
        function, found = self.pure(s, closed, where, inputs, which)
        found["params"] = refs

        def floats(at, some):
            values, heap = function(at, some)
            return tuple(map(number, values)), heap

        primals = [self.heap[i] for i in where], [inputs[k] for k in which]
        return floats, found, primals

    def vjp(self, s, closed, refs, sliced, inputs) -> tuple:
        floats, found, primals = self._floats_of(s, closed, refs, inputs)
        out, pullback, self.heap = jax.vjp(floats, *primals, has_aux=True)
        of_refs, of_inputs = pullback(
            tuple(seed_vector(x, k) for k, x in enumerate(out))
        )
        return [flat([*of_refs, *of_inputs]), *out], found["out"]

    def _tangents(self, refs, inputs) -> tuple[list, list]:
        seen, tangents = set(), []
        for k, ref in enumerate(refs):
            x = self.heap[ref.i]
            if ref.i not in seen and _is_float(x):
                tangents.append(seed_vector(x, k))
            seen.add(ref.i)
        of_inputs = [seed_vector(x, k) for k, x in enumerate(inputs) if _is_float(x)]
        return tangents, of_inputs

    def jvp(self, s, closed, refs, sliced, inputs) -> tuple:
        where, which = self._all_floats(refs, inputs)
        function, found = self.pure(s, closed, where, inputs, which)
        found["params"] = refs

        def everything(at, some):
            values, heap = function(at, some)
            of_refs = [heap[i] for i in self._distinct(found["out"])]
            of_refs = [x for x in of_refs if _is_float(x)]
            return [*map(number, values), *of_refs], (values, heap)

        primals = [self.heap[i] for i in where], [inputs[k] for k in which]
        _, tangents, (values, self.heap) = jax.jvp(
            everything, primals, self._tangents(refs, inputs), has_aux=True
        )
        return [flat(tangents), *values], found["out"]

    def linearize(self, s, closed, refs, sliced, inputs) -> tuple:
        floats, found, primals = self._floats_of(s, closed, refs, inputs)
        tangents = self._tangents(refs, inputs)
        out, of_out, self.heap = jax.jvp(floats, primals, tangents, has_aux=True)
        return [flat(of_out), *out], found["out"]

    def _matrix(self, s, closed, refs, inputs, transform) -> tuple:
        where = [i for i in self._distinct(refs) if _is_float(self.heap[i])]
        if not where:
            self.refuse("nothing to differentiate")
        function, found = self.pure(s, closed, where, inputs, [])
        found["params"] = refs

        def floats(at):
            values, heap = function(at, [])
            if transform is jax.hessian:
                return jnp.sum(number(values[0])), heap
            return tuple(map(number, values)), heap

        matrix, heap = transform(floats, has_aux=True)([self.heap[i] for i in where])
        self.heap = heap
        out = () if transform is jax.hessian else found["out"]
        return [flat(jax.tree.leaves(matrix))], out

    def jacfwd(self, s, closed, refs, sliced, inputs) -> tuple:
        return self._matrix(s, closed, refs, inputs, jax.jacrev)

    def jacrev(self, s, closed, refs, sliced, inputs) -> tuple:
        return self._matrix(s, closed, refs, inputs, jax.jacfwd)

    def hessian(self, s, closed, refs, sliced, inputs) -> tuple:
        return self._matrix(s, closed, refs, inputs, jax.hessian)

    #
    # Lanes and loops.
    #

    def vmap(self, s, closed, refs, sliced, inputs) -> tuple:
        return self.lanes(s, closed, refs, sliced, inputs, range(LANES))

    def lanes(self, s, closed, refs, sliced, inputs, which: Sequence[int]) -> tuple:
        start, base = list(self.heap), len(self.heap)
        mapped = self._distinct(sliced)
        heaps, results = [], []
        self.writes.append(set())
        try:
            for k in which:
                self.heap = list(start)
                for i in mapped:
                    self.heap[i] = start[i][k]
                mine = [x[k] for x in inputs]
                results.append(self.call(s.blocks[0], closed[0], refs, sliced, mine))
                heaps.append(self.heap)
        finally:
            written = self.writes.pop()
        self.heap = list(start)
        for i in range(base):
            ends = [heap[i] for heap in heaps]
            if i in mapped:
                self.heap[i] = start[i]
                if i in written:
                    self.heap[i] = jnp.stack(ends)
            elif i in written:
                # Not known to be one value before all lanes have run.
                self.reasons.add("lanes, of one value")
                if not all(_is_equal(x, ends[0]) for x in ends):
                    self.refuse("lanes")
                self.heap[i] = ends[0]
        values = [jnp.stack(of_lanes) for of_lanes in zip(*(r[0] for r in results))]
        return values, self.stack_new(base, [out for _, out in results], heaps)

    def check_after(self, before: Sequence[Place], after: Sequence[Place]) -> None:
        if [x.i for x in before] != [x.i for x in after]:
            self.refuse("carry")

    def stack_new(
        self,
        base: int,
        results: list[tuple[Place, ...]],
        heaps: list[list] | None = None,
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
                made[numbers] = self.new(jnp.stack(ends), places[0].collection)
            out.append(made[numbers])
        return out

    def steps(self, s, sliced, order: Sequence[int], step: Callable) -> list:
        """Runs `step(k)` with a slice in each of the refs of `sliced`, and stacks them."""
        stacks = {i: self.heap[i] for i in self._distinct(sliced)}
        parts: dict[int, dict] = {i: {} for i in stacks}
        results = {}
        for k in order:
            for i, stack in stacks.items():
                self.heap[i] = stack[k]
            results[k] = step(k)
            for i in stacks:
                parts[i][k] = self.heap[i]
        for i in stacks:
            self.heap[i] = jnp.stack([parts[i][k] for k in range(len(order))])
        return [results[k] for k in range(len(order))]

    def scan(self, s, closed, refs, sliced, inputs) -> tuple:
        v, *xs = inputs
        base = len(self.heap)
        carry = [v]

        def step(k):
            given = [carry[0], *(x[k] for x in xs)]
            (new, *ys), out, after = self.call(
                s.blocks[0], closed[0], refs, sliced, given
            )
            self.check_after(refs, after)
            carry[0] = fit(new, v.shape)
            return ys, out

        order = range(LANES)
        results = self.steps(
            s, sliced, order[::-1] if s.option("reverse") else order, step
        )
        ys = [jnp.stack(parts) for parts in zip(*(ys for ys, _ in results))]
        return [carry[0], *ys], self.stack_new(base, [out for _, out in results])

    def map(self, s, closed, refs, sliced, inputs) -> tuple:
        base, size = len(self.heap), s.option("batch_size")
        if size is None:

            def step(k):
                given = [x[k] for x in inputs]
                return self.call(s.blocks[0], closed[0], [], sliced, given)

            results = self.steps(s, sliced, range(LANES), step)
            values = [jnp.stack(parts) for parts in zip(*(v for v, _ in results))]
            return values, self.stack_new(base, [out for _, out in results])
        # Batches, one after the other; within one, lanes.
        mapped = self._distinct(sliced)
        stacks = [self.heap[i] for i in mapped]
        ends: list[list] = [[] for _ in mapped]
        batches = []
        for start in range(0, LANES, size):
            for i, stack in zip(mapped, stacks):
                self.heap[i] = stack
            which = range(start, min(start + size, LANES))
            values, out = self.lanes(s, closed, [], sliced, inputs, which)
            batches.append((values, out))
            for i, end in zip(mapped, ends):
                x = self.heap[i]
                # Not written, it is still the whole of it.
                end.append(x[start : start + size] if len(x) == LANES else x)
        for i, end in zip(mapped, ends):
            self.heap[i] = jnp.concatenate(end)
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

    def _loop(self, s, closed, refs, inputs, order) -> list:
        v = inputs[0]

        def step(i):
            (new,), _, after = self.call(
                s.blocks[0], closed[0], refs, (), [v, jnp.int32(i)]
            )
            self.check_after(refs, after)
            return fit(new, v.shape)

        self.rehearse(lambda: step(0))
        n = 0
        for i in order():
            v = step(i)
            n += 1
        return [jnp.int32(n), v]

    def fori(self, s, closed, refs, sliced, inputs) -> tuple:
        lower, upper = s.option("bounds")
        _, v = self._loop(s, closed, refs, inputs, lambda: range(lower, upper))
        return [v], []

    def while_(self, s, closed, refs, sliced, inputs) -> tuple:
        def order():
            for i in range(s.option("steps")):
                total = sum((jnp.sum(number(self.heap[r.i])) for r in refs), 0.0)
                if not total < 50.0:
                    return
                yield i

        return self._loop(s, closed, refs, inputs, order), []

    #
    # Branches.
    #

    def branch(self, s, closed, refs, inputs, chosen: int) -> tuple:
        base = len(self.heap)
        seen = []
        for block, mine in zip(s.blocks, closed):

            def run() -> list:
                values, out = self.call(block, mine, refs, (), inputs)
                types: list = [(x.shape, x.dtype) for x in values]
                first: dict[int, int] = {}
                for k, ref in enumerate(out):
                    same = first.setdefault(ref.i, k)
                    new = same, ref.collection, self.read(ref).shape
                    types.append(ref.i if ref.i < base else new)
                return types

            result = self.rehearse(run)
            if result is not None:
                seen.append(result)
        if any(x != seen[0] for x in seen):
            self.reasons.add("branches")
        return self.call(s.blocks[chosen], closed[chosen], refs, (), inputs)

    def cond(self, s, closed, refs, sliced, inputs) -> tuple:
        pred, *rest = inputs
        chosen = 0 if test(pred, s.option("threshold")) else 1
        return self.branch(s, closed, refs, rest, chosen)

    def switch(self, s, closed, refs, sliced, inputs) -> tuple:
        index, *rest = inputs
        return self.branch(s, closed, refs, rest, int(choice(index, len(s.blocks))))
