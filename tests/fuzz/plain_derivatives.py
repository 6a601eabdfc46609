"""Derivatives in plain Python: those of a pure function from heap to heap, taken by JAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .heap import Heap, is_float
from .interpret import flat, number, seed_vector
from .program import Apply


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
