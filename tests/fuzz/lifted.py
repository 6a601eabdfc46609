"""The interpretation with the transforms of this library."""

# What is wrong on purpose here, or made at run time, is wrong to a static checker too.
# pyright: reportInvalidTypeForm=false

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float64, Int32, Key, UInt32

import refx_eqx as rx

from .interpret import (
    choice,
    Env,
    fit,
    flat,
    FLOAT,
    Interpreter,
    LANES,
    logged,
    number,
    pack,
    seed_vector,
    test,
    unpack,
)
from .program import Apply, Block, RefSpec


class Holder(rx.Module):
    """A block as a module: what a function would close over is in a field."""

    closed: Any
    kept: Any
    block: Any = eqx.field(static=True)
    style: str = eqx.field(static=True)
    machine: Any = eqx.field(static=True)

    def method(self, refs: Any, sliced: Any, inputs: Any) -> Any:
        closed = {**self.closed, **self.kept}
        return self.machine.body(self.block, closed, self.style, refs, sliced, inputs)

    __call__ = method


KINDS = {"float": Float64, "log": Float64, "int": Int32, "key": Key, "raw": UInt32}


@functools.cache
def typed_field(kind: str, axes: str) -> type:
    """A module with one field: a ref that is declared to hold an array with these axes."""

    class Typed(rx.Module):
        ref: rx.Ref[KINDS[kind][Array, axes]]

    return Typed


class Lifted(Interpreter):
    """- `traces` counts how often each block was run by Python;
    - `is_typed`: whether refs are those of fields that declare their types."""

    def __init__(self, is_typed: bool = False):
        self.traces: dict[int, int] = {}
        self.is_typed = is_typed

    def first(self, spec: RefSpec, value: Any) -> rx.Ref:
        """A ref that there is at first."""
        if spec.dtype == "tree":
            value = {"x": value, "kind": "tree"}
        ref = rx.Ref(value, spec.collection)
        if not self.is_typed or spec.dtype not in KINDS:
            return ref
        # Of a stack, the type of one layer is declared.
        is_stack = spec.collection == "layers"
        shape = spec.shape[1:] if is_stack else spec.shape
        field = typed_field(spec.dtype, " ".join(map(str, shape)))
        return rx.filter_vmap(field)(ref).ref if is_stack else field(ref).ref

    def is_ref(self, x):
        return isinstance(x, rx.Ref)

    def read(self, ref):
        tree = ref.value
        return tree["x"] if isinstance(tree, dict) else tree

    def write(self, ref, value):
        is_tree = isinstance(ref.value, dict)
        ref.value = {**ref.value, "x": value} if is_tree else value

    def set_first(self, ref, value):
        if isinstance(ref.value, dict):
            ref.value["x"] = self.read(ref).at[0].set(value)
        else:
            ref[0] = value

    def draw(self, s, env):
        if s.counter is None:
            return super().draw(s, env)
        # A stream, as `Rngs` has: of a key, and of how many were drawn of it.
        stream = eqx.tree_at(
            lambda stream: (stream.key, stream.count),
            rx.Rngs(0).default,
            (env[s.key], env[s.counter]),
        )
        env[s.name] = jr.normal(stream(), s.shape, FLOAT)

    def check(self, x, fails):
        return eqx.error_if(x, fails, "a check of the program")

    def new(self, value, collection):
        ref = rx.Ref(value, collection)
        return typed_field("float", "...")(ref).ref if self.is_typed else ref

    def is_same(self, a, b):
        return a is b

    def apply(self, s, env):
        return self.call_made(self.make(s, env), s, env)

    def call_made(self, made: Callable, s: Apply, env: Env) -> tuple:
        refs = [env[name] for name in s.refs]
        sliced = [env[name] for name in s.sliced]
        inputs = tuple(self.value(e, env) for e in s.inputs)
        values, out = made(refs, sliced, inputs)
        return list(values), list(out)

    def body(self, block, closed, style, refs, sliced, inputs) -> Any:
        self.traces[id(block)] = self.traces.get(id(block), 0) + 1
        return self.call(
            block, closed, unpack(refs, style), unpack(sliced, style), inputs
        )

    def function(self, block: Block, s: Apply, env: Env) -> Callable:
        closed = {name: env[name] for name in block.closed}
        kept = {name: env[name] for name in block.kept}
        style = s.style
        if s.how in ("method", "module"):
            holder = Holder(closed, kept, block, style, self)
            return holder.method if s.how == "method" else holder
        if s.how == "one cell":
            both = {**closed, **kept}

            def fn(refs: Any, sliced: Any, inputs: Any) -> Any:
                return self.body(block, both, style, refs, sliced, inputs)

        else:

            def fn(refs: Any, sliced: Any, inputs: Any) -> Any:
                return self.body(block, closed | kept, style, refs, sliced, inputs)

        return fn

    def make(self, s: Apply, env: Env) -> Callable[[list, list, tuple], tuple]:
        """The transformed function, from refs, refs to slice, and arrays."""
        fns = [self.function(block, s, env) for block in s.blocks]
        wrap = {
            None: lambda f: f,
            "jit": rx.filter_jit,
            "checkpoint": rx.filter_checkpoint,
        }
        fns = [wrap[s.option("wrapped")](f) for f in fns]
        return getattr(self, s.transform)(s, *fns)

    def plain_call(self, s: Apply, f: Callable) -> Callable:
        p = s.style
        if s.option("keywords"):
            return lambda refs, sliced, inputs: f(
                pack(refs, p), inputs=inputs, sliced=pack(sliced, p)
            )
        return lambda refs, sliced, inputs: f(pack(refs, p), pack(sliced, p), inputs)

    def jit(self, s: Apply, f: Callable) -> Callable:
        donate = s.option("donate") or "none"
        return self.plain_call(s, rx.filter_jit(f, donate=donate))

    def checkpoint(self, s: Apply, f: Callable) -> Callable:
        return self.plain_call(s, rx.filter_checkpoint(f))

    def lift(self, s: Apply, f: Callable) -> Callable:
        # (Not that of Equinox, which keeps the tracers that a function closes over.)
        return self.plain_call(s, rx.lift(jax.jit)(f))

    def closure_convert(self, s: Apply, f: Callable) -> Callable:
        def convert(*args):
            return rx.filter_closure_convert(f, *args)(*args)

        return self.plain_call(s, convert)

    def _grad(self, s: Apply, f: Callable) -> Callable:
        def loss(refs, sliced, inputs):
            values, out = f(refs, sliced, inputs)
            return jnp.sum(number(values[0])), (values, out)

        return loss

    def grad(self, s: Apply, f: Callable) -> Callable:
        loss = self._grad(s, f)
        g = self.plain_call(s, rx.filter_grad(loss, has_aux=True, wrt=s.option("wrt")))

        def run(refs, sliced, inputs):
            grads, (values, out) = g(refs, sliced, inputs)
            return [flat(jax.tree.leaves(grads)), *values], out

        return run

    def value_and_grad(self, s: Apply, f: Callable) -> Callable:
        loss = self._grad(s, f)
        g = rx.filter_value_and_grad(loss, has_aux=True, wrt=s.option("wrt"))
        g = self.plain_call(s, g)

        def run(refs, sliced, inputs):
            (value, (values, out)), grads = g(refs, sliced, inputs)
            return [value, flat(jax.tree.leaves(grads)), *values], out

        return run

    def _floats(self, s: Apply, f: Callable) -> Callable:
        """`f` as a function that returns floating-point arrays, and refs as well."""

        def floats(refs, inputs):
            values, out = f(refs, pack([], s.style), inputs)
            return tuple(map(number, values)), out

        return floats

    def custom_jvp(self, s: Apply, f: Callable) -> Callable:
        g = rx.filter_custom_jvp(f)

        @g.def_jvp
        def rule(primals: Any, tangents: Any) -> Any:
            # The rule writes what the function does, once.
            out, (of_values, of_refs) = rx.filter_jvp(f, primals, tangents)
            scaled = tuple(
                None if t is None else s.option("factor") * t for t in of_values
            )
            return out, (scaled, jax.tree.map(lambda t: None, of_refs))

        del rule
        return self.plain_call(s, g)

    def custom_vjp(self, s: Apply, f: Callable) -> Callable:
        def whole(arg, log):
            refs, inputs = arg
            return f(refs, pack([], s.style), inputs)

        g = rx.filter_custom_vjp(whole)

        @g.def_fwd
        def fwd(perturbed: Any, arg: Any, log: Any) -> Any:
            def floats(arg):
                values, out = whole(arg, log)
                return tuple(map(number, values)), (values, out)

            _, pullback, (values, out) = rx.filter_vjp(floats, arg, has_aux=True)
            return (values, out), (pullback, values)

        @g.def_bwd
        def bwd(residuals: Any, grad: Any, perturbed: Any, arg: Any, log: Any) -> Any:
            pullback, values = residuals
            given = [
                jnp.zeros_like(number(x)) if t is None else t
                for t, x in zip(grad[0], values)
            ]
            if log is not None:
                log.value = logged(log.value, given)
            (of_arg,) = pullback(tuple(s.option("factor") * t for t in given))
            return of_arg

        del fwd, bwd

        def run(refs, sliced, inputs):
            *refs, log = refs if s.option("log") else [*refs, None]
            return g((pack(refs, s.style), inputs), log)

        return run

    def vjp(self, s: Apply, f: Callable) -> Callable:
        floats = self._floats(s, f)

        def run(refs, sliced, inputs):
            out, pullback, aux = rx.filter_vjp(
                floats, pack(refs, s.style), inputs, has_aux=True
            )
            cotangents = tuple(seed_vector(x, k) for k, x in enumerate(out))
            return [flat(jax.tree.leaves(pullback(cotangents))), *out], aux

        return run

    def _tangents(self, s: Apply, refs: list, inputs: tuple) -> tuple:
        seen, tangents = set(), []
        for k, ref in enumerate(refs):
            is_first = id(ref) not in seen
            x = self.read(ref)
            is_float = jnp.issubdtype(x.dtype, jnp.floating)
            tangent = seed_vector(x, k) if is_first and is_float else None
            is_tree = tangent is not None and isinstance(ref.value, dict)
            tangents.append({**ref.value, "x": tangent} if is_tree else tangent)
            seen.add(id(ref))
        of_inputs = tuple(
            seed_vector(x, k) if jnp.issubdtype(x.dtype, jnp.floating) else None
            for k, x in enumerate(inputs)
        )
        return pack(tangents, s.style), of_inputs

    def jvp(self, s: Apply, f: Callable) -> Callable:
        def whole(refs, inputs):
            return f(refs, pack([], s.style), inputs)

        def run(refs, sliced, inputs):
            (values, out), (of_values, of_refs) = rx.filter_jvp(
                whole, (pack(refs, s.style), inputs), self._tangents(s, refs, inputs)
            )
            zeros = lambda t, x: jnp.zeros_like(x) if t is None else t
            found = [zeros(t, number(x)) for t, x in zip(of_values, values)]
            for node, ref in zip(of_refs, out):
                x = self.read(ref)
                if isinstance(node, rx.Value) and jnp.issubdtype(x.dtype, jnp.floating):
                    is_tree = isinstance(ref.value, dict)
                    found.append(zeros(node.value["x"] if is_tree else node.value, x))
            return [flat(found), *values], out

        return run

    def linearize(self, s: Apply, f: Callable) -> Callable:
        floats = self._floats(s, f)

        def run(refs, sliced, inputs):
            tangents = self._tangents(s, refs, inputs)
            out, pushforward, aux = rx.filter_linearize(
                floats, pack(refs, s.style), inputs, has_aux=True
            )
            return [flat(jax.tree.leaves(pushforward(*tangents))), *out], aux

        return run

    def _matrix(self, s: Apply, f: Callable, transform: Callable) -> Callable:
        floats = self._floats(s, f)
        if transform is rx.filter_hessian:
            one = lambda refs, inputs: jnp.sum(floats(refs, inputs)[0][0])
            with_aux = lambda refs, inputs: (one(refs, inputs), ())
        else:
            with_aux = floats
        g = transform(with_aux, has_aux=True)

        def run(refs, sliced, inputs):
            matrix, aux = g(pack(refs, s.style), inputs)
            return [flat(jax.tree.leaves(matrix))], aux

        return run

    def jacfwd(self, s: Apply, f: Callable) -> Callable:
        return self._matrix(s, f, rx.filter_jacfwd)

    def jacrev(self, s: Apply, f: Callable) -> Callable:
        return self._matrix(s, f, rx.filter_jacrev)

    def hessian(self, s: Apply, f: Callable) -> Callable:
        return self._matrix(s, f, rx.filter_hessian)

    def _axes(self, s: Apply) -> tuple[Any, Any]:
        """Of the refs that are sliced, and of the arrays: a prefix of the tree of each."""
        axes = s.option("axes")
        of_arrays = s.option("array_axes")
        return (
            0 if axes is None else pack(axes, s.style),
            0 if of_arrays is None else of_arrays,
        )

    def vmap(self, s: Apply, f: Callable) -> Callable:
        options: Any = {"axis_size": LANES if s.option("sized") else None}
        if s.option("out_axis") is not None:
            options["out_axes"] = s.option("out_axis")
        of_refs, of_arrays = self._axes(s)
        if not s.option("by_collection"):
            same = rx.axes(rng=None, default=None)
            in_axes = (same if s.option("same_rng") else None, of_refs, of_arrays)
            return self.plain_call(s, rx.filter_vmap(f, in_axes=in_axes, **options))

        # All refs in one tree: their collection tells which are sliced.
        def one_tree(refs, inputs):
            plain, sliced = refs
            return f(plain, sliced, inputs)

        same = {"rng": None} if s.option("same_rng") else {}
        axes = rx.axes(layers=0, default=None, **same)
        g = rx.filter_vmap(one_tree, in_axes=(axes, of_arrays), **options)
        p = s.style
        return lambda refs, sliced, inputs: g((pack(refs, p), pack(sliced, p)), inputs)

    def scan(self, s: Apply, f: Callable) -> Callable:
        p = s.style

        def step(carry, x):
            (refs, v), (sliced, inputs) = carry, x
            (new, *ys), out, after = f(refs, sliced, (v, *inputs))
            return (pack(after, p), fit(new, v.shape)), (ys, out)

        def run(refs, sliced, inputs):
            v, *xs = inputs
            (_, v), (ys, out) = rx.scan(
                step,
                (pack(refs, p), v),
                (pack(sliced, p), tuple(xs)),
                LANES if s.option("sized") else None,
                bool(s.option("reverse")),
                in_axes=self._axes(s),
            )
            return [v, *ys], out

        return run

    def map(self, s: Apply, f: Callable) -> Callable:
        def step(x):
            sliced, inputs = x
            return f(pack([], s.style), sliced, inputs)

        def run(refs, sliced, inputs):
            xs = pack(sliced, s.style), inputs
            return rx.map(
                step, xs, batch_size=s.option("batch_size"), in_axes=self._axes(s)
            )

        return run

    def associative_scan(self, s: Apply, f: Callable) -> Callable:
        def combine(a, b):
            parts, _ = f(pack([], s.style), pack([], s.style), ())
            return tuple(x + y + fit(more, ()) for x, y, more in zip(a, b, parts))

        def run(refs, sliced, inputs):
            axis = s.option("axis") or 0
            reverse = bool(s.option("reverse"))
            return rx.associative_scan(combine, inputs, reverse, axis), []

        return run

    def fori(self, s: Apply, f: Callable) -> Callable:
        p = s.style

        def body(i, carry):
            refs, v = carry
            (new,), _, after = f(refs, pack([], p), (v, i))
            return pack(after, p), fit(new, v.shape)

        def run(refs, sliced, inputs):
            lower, upper = s.option("bounds")
            carry = pack(refs, p), inputs[0]
            _, v = rx.fori_loop(lower, upper, body, carry)
            return [v], []

        return run

    def while_(self, s: Apply, f: Callable) -> Callable:
        p, n = s.style, s.option("steps")

        def test_fn(carry):
            refs, i, _ = carry
            values = map(self.read, unpack(refs, p))
            total = sum((jnp.sum(number(x)) for x in values), 0.0)
            return (i < n) & (total < 50.0)

        def body(carry):
            refs, i, v = carry
            (new,), _, after = f(refs, pack([], p), (v, i))
            return pack(after, p), i + 1, fit(new, v.shape)

        def run(refs, sliced, inputs):
            carry = pack(refs, p), jnp.int32(0), inputs[0]
            _, i, v = rx.while_loop(test_fn, body, carry)
            return [i, v], []

        return run

    def cond(self, s: Apply, f: Callable, g: Callable) -> Callable:
        p = s.style

        def run(refs, sliced, inputs):
            pred, *rest = inputs
            pred = test(pred, s.option("threshold"))
            return rx.cond(pred, f, g, pack(refs, p), pack([], p), tuple(rest))

        return run

    def switch(self, s: Apply, *fns: Callable) -> Callable:
        p = s.style

        def run(refs, sliced, inputs):
            index, *rest = inputs
            index = choice(index, len(fns))
            return rx.switch(index, fns, pack(refs, p), pack([], p), tuple(rest))

        return run
