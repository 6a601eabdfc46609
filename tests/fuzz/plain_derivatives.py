"""Derivatives in plain Python: those of a pure function from heap to heap, taken by JAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .heap import Backward, Heap, is_float
from .interpret import flat, logged, number, seed_vector
from .program import Apply


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """`x`, with its derivative times a factor."""
    if not is_float(x):
        return x
    fixed = jax.lax.stop_gradient(x)
    return fixed + factor * (x - fixed)


class Derivatives(Heap):
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
        where = [i for i in self.distinct(wanted) if is_float(self.heap[i])]
        if not where:
            self.refuse("nothing to differentiate")
        function, found = self.pure(s, closed, where, inputs, [])
        found["params"] = refs

        # The calls in it are not part of another derivative around it.
        outer, was_rehearsal = self.backward, self.is_rehearsal

        def loss(at, zeros):
            self.backward, self.is_rehearsal = Backward(zeros), False
            try:
                values, heap = function(at, [])
                backward = self.backward
            finally:
                self.backward, self.is_rehearsal = outer, was_rehearsal
            found["backward"] = backward
            return jnp.sum(number(values[0])), (values, heap, backward.outs)

        with_grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        at = [self.heap[i] for i in where]
        (value, (values, heap, outs)), (grads, of_outs) = with_grad(at, None)
        if outs:
            zeros = jax.tree.map(jnp.zeros_like, outs)
            (value, (values, heap, _)), (grads, of_outs) = with_grad(at, zeros)
        self.heap = heap
        backward = found["backward"]
        for seen in self.writes:
            seen |= backward.seen
        for i, cotangents in reversed(list(zip(backward.logs, of_outs or []))):
            self.heap[i] = logged(self.heap[i], cotangents)
        return value, flat(grads), values, found["out"]

    def custom(self, s, closed, refs, sliced, inputs) -> tuple:
        """With the derivative times a factor, and none of what is written."""
        base = len(self.heap)
        *refs, log = refs if s.option("log") else [*refs, None]
        with self.noting_writes() as written:
            values, out = self.call(s.blocks[0], closed[0], refs, sliced, inputs)
        for i, x in enumerate(self.heap):
            if (i in written or i >= base) and is_float(x):
                self.heap[i] = jax.lax.stop_gradient(x)
        values = [scaled(x, s.option("factor")) for x in values]
        if log is not None and self.backward is not None:
            values = self.logged_call(values, log.i, self.backward)
        return values, out

    custom_jvp = custom_vjp = custom

    def logged_call(self, values: list, log: int, backward: Backward) -> list:
        backward.seen.add(log)
        if self.is_rehearsal:
            return values
        floats = [x for x in values if is_float(x)]
        if backward.zeros is not None:
            added = zip(floats, backward.zeros[len(backward.logs)])
            new = iter([x + zero for x, zero in added])
            values = [next(new) if is_float(x) else x for x in values]
        backward.outs.append(floats)
        backward.logs.append(log)
        return values

    def grad(self, s, closed, refs, sliced, inputs) -> tuple:
        _, grads, values, out = self.grad_parts(s, closed, refs, sliced, inputs)
        return [grads, *values], out

    def value_and_grad(self, s, closed, refs, sliced, inputs) -> tuple:
        value, grads, values, out = self.grad_parts(s, closed, refs, sliced, inputs)
        return [value, grads, *values], out

    def _all_floats(self, refs, inputs) -> tuple[list[int], list[int]]:
        where = [i for i in self.distinct(refs) if is_float(self.heap[i])]
        which = [k for k, x in enumerate(inputs) if is_float(x)]
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
            if ref.i not in seen and is_float(x):
                tangents.append(seed_vector(x, k))
            seen.add(ref.i)
        of_inputs = [seed_vector(x, k) for k, x in enumerate(inputs) if is_float(x)]
        return tangents, of_inputs

    def jvp(self, s, closed, refs, sliced, inputs) -> tuple:
        where, which = self._all_floats(refs, inputs)
        function, found = self.pure(s, closed, where, inputs, which)
        found["params"] = refs

        def everything(at, some):
            values, heap = function(at, some)
            of_refs = [heap[i] for i in self.distinct(found["out"])]
            of_refs = [x for x in of_refs if is_float(x)]
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
        where = [i for i in self.distinct(refs) if is_float(self.heap[i])]
        if not where:
            self.refuse("nothing to differentiate")
        if len({self.heap[i].dtype for i in where}) > 1:
            # JAX's own limit, where types are not promoted: it stacks the basis vectors.
            if s.transform != "jacrev":
                self.refuse("precisions of a Jacobian")
            transform = jax.jacrev
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
