"""`capture`: returns the outputs of the layers of a model, without changing their classes.

1. Each submodule is replaced with an instance of a subclass that names its output, by a
    primitive that is an identity. So the model may do anything with a layer, including
    `jax.vmap`, which puts the mapped axis in front.
2. The function is traced, and its jaxpr evaluated by hand. Named values are recorded, and
    something may be added to them: this gives the gradient of a layer's output.
"""

import functools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.interpreters import ad, batching, mlir

from ._core._errors import CarryError, StructureError
from ._core._jax import ClosedJaxpr
from ._core._ref import Ref
from ._fields._referenced import plain_class, subclass_of
from ._transforms._lift import lift
from ._trees._cells import is_lookup
from ._trees._paths import key_text


def capture(
    fn: Callable[..., Any],
    *,
    where: Callable[[eqx.Module], bool] = lambda module: True,
    add: dict[str, tuple[Any, ...]] | None = None,
) -> Callable[..., tuple[Any, dict[str, tuple[Any, ...]]]]:
    """Makes a function also return the outputs of the layers of its model.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import jax.numpy as jnp
        import refx_eqx as rx

        mlp = eqx.nn.MLP(3, 1, 8, depth=1, key=jax.random.key(0))
        model = rx.snapshot(rx.as_refs(mlp, "params"))
        x = jnp.ones(3)

        def loss(model, x):
            return jnp.sum(model(x) ** 2)

        out, seen = rx.capture(loss)(model, x)
        assert seen["layers.0"][0].shape == (8,)  # the first call of the first layer

        # The gradient with respect to the output of each layer.
        zeros = jax.tree.map(jnp.zeros_like, seen)
        grads = rx.filter_grad(lambda zeros: rx.capture(loss, add=zeros)(model, x)[0])(zeros)
        assert jnp.allclose(grads["layers.1"][0], 2 * seen["layers.1"][0])
        ```

    It works under the lifted transforms, and with models that use them, or those of JAX.
    The outputs of a layer under `vmap` have the mapped axis in front, and those of a layer
    called in a `scan` or a `map` have a leading axis for the steps (in front of a mapped one);
    so do those of each block of a stack. Refs are carried as by every lifted transform. The function is traced at each
    call: wrap the call in [`refx_eqx.filter_jit`][].

    **Arguments:**

    - `fn`: a model, or a function whose first argument is one. Traced.
    - `where`: a function of a submodule, which says whether to capture it. Submodules that
        are not callable are never captured.
    - `add`: values to add to the outputs: a dict like the returned one.

    **Returns:**

    A function of the same arguments, which returns the result and a dict. The dict maps the
    path of each called submodule to a tuple with, for each call in order, the arrays of its
    output.

    **Raises:**

    When the function is called:

    - `StructureError`: if a submodule is called where its output cannot be returned: in the
        body of a `while_loop`, a branch of a `cond`, a function with a custom derivative
        rule; or if `add` does not match the calls.
    - `TypeError`: if `fn` is not a module, and there is no positional argument; or if `add`
        is not a mapping.
    """
    if add is not None and not isinstance(add, Mapping):
        raise TypeError(
            f"`rx.capture`: `add` must be a dict like the one that is returned, but is "
            f"{eqx.tree_pformat(add)}."
        )

    @functools.wraps(fn, updated=())
    def capturing(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, tuple[Any, ...]]]:
        tags = _Tags({} if add is None else add)
        function: Any = fn
        if isinstance(fn, eqx.Module):
            function = _renamed(fn, where)
        elif not args:
            raise TypeError(
                "`rx.capture`: the layers of the first argument are captured, but there "
                "is none. Pass the model as the first positional argument."
            )
        else:
            model, *others = args
            args = (_renamed(model, where), *others)
        out = lift(tags.transform)(function)(*args, **kwargs)
        return out, tags.seen()

    return capturing


# 1. Names


_structures: list[Any] = []


def _renamed(model: Any, where: Callable[[eqx.Module], bool]) -> Any:
    """The model, with submodules that name their outputs."""

    def visit(node: Any, path: tuple[str, ...]) -> Any:
        if isinstance(node, Ref) or is_lookup(node):
            return node
        children, treedef = jtu.tree_flatten_with_path(
            node, is_leaf=lambda x: x is not node
        )
        if children and not children[0][0]:  # an empty path: `node` is a leaf
            return node
        new = [visit(x, (*path, *map(key_text, keys))) for keys, x in children]
        out = jtu.tree_unflatten(treedef, new)
        if path and isinstance(node, eqx.Module) and callable(node) and where(node):
            named = object.__new__(_naming(type(node), ".".join(path)))
            vars(named).update(vars(out))
            return named
        return out

    return visit(model, ())


@functools.lru_cache(maxsize=4096)  # equal structures do not retrace
def _naming(cls: type, path: str) -> type:
    plain = plain_class(cls)
    if plain is not None:  # below the class whose methods see the values of refs
        return subclass_of(_naming(plain, path))

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = super(naming, self).__call__(*args, **kwargs)
        arrays, rest = eqx.partition(out, eqx.is_array)
        leaves, structure = jtu.tree_flatten(arrays)
        if structure not in _structures:
            _structures.append(structure)
        number = _structures.index(structure)
        named = [
            _named.bind(leaf, name=f"{number}:{i}:{path}")
            for i, leaf in enumerate(leaves)
        ]
        return eqx.combine(jtu.tree_unflatten(structure, named), rest)

    members = {
        "__call__": __call__,
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
    }
    naming: Any = type(cls)(cls.__name__, (cls,), members)
    return naming


# Not the primitive of `jax.ad_checkpoint.checkpoint_name`: that leaves a mapped axis where the
# layer has it, which depends on its arithmetic.
_named = jex.core.Primitive("refx_eqx_named")
_named.def_impl(lambda x, *, name: x)
_named.def_abstract_eval(lambda aval, *, name: aval)
mlir.register_lowering(_named, lambda ctx, x, *, name: [x])


def _named_with_tangent(primals: Any, tangents: Any, *, name: str) -> tuple[Any, Any]:
    return _named.bind(*primals, name=name), tangents[0]


def _named_with_axis(args: Any, axes: Any, *, name: str) -> tuple[Any, int]:
    return _named.bind(jnp.moveaxis(args[0], axes[0], 0), name=name), 0


ad.primitive_jvps[_named] = _named_with_tangent
batching.primitive_batchers[_named] = _named_with_axis


# 2. Evaluation

_INLINED = ("jit", "pjit", "checkpoint", "remat2", "closed_call", "core_call")


class _Tags:
    """The named values seen, and the values to add, while a jaxpr is evaluated."""

    def __init__(self, add: dict[str, tuple[Any, ...]]):
        self._noted: list[tuple[str, Any]] = []
        self._add: defaultdict[str, deque[Any]] = defaultdict(deque)
        for path, calls in add.items():
            for value in calls:
                for i, leaf in enumerate(jtu.tree_leaves(value)):
                    self._add[f"{i}:{path}"].append(leaf)

    def transform(self, fn: Callable) -> Callable:
        def evaluated(*args: Any, **kwargs: Any) -> Any:
            jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
            leaves = jtu.tree_leaves((args, kwargs))
            added = iter([self._next(name) for name in _names(jaxpr.jaxpr)])
            noted, outs = _evaluate(jaxpr.jaxpr, jaxpr.consts, leaves, added)
            self._noted = noted
            left = [path for path, values in self._add.items() if values]
            if left:
                raise StructureError(
                    "`rx.capture`: `add` has more than there are calls for "
                    f"`{left[0].partition(':')[2]}`. Pass a dict like the one that is "
                    "returned without it, for the same arguments."
                )
            return jtu.tree_unflatten(jtu.tree_structure(shapes), outs)

        return evaluated

    def _next(self, name: str) -> Any:
        values = self._add[name.partition(":")[2]]
        return values.popleft() if values else None

    def seen(self) -> dict[str, tuple[Any, ...]]:
        calls: dict[str, list[tuple[Any, list[Any]]]] = {}
        for name, value in self._noted:
            number, i, path = name.split(":", 2)
            if i == "0":
                calls.setdefault(path, []).append((_structures[int(number)], []))
            calls[path][-1][1].append(value)
        return {
            path: tuple(
                jtu.tree_unflatten(structure, xs) for structure, xs in all_calls
            )
            for path, all_calls in calls.items()
        }


def _name_in(eqn: Any) -> str | None:
    return eqn.params["name"] if eqn.primitive is _named else None


def _jaxprs_of(eqn: Any) -> list[Any]:
    leaves = jtu.tree_leaves(
        eqn.params,
        is_leaf=lambda x: isinstance(x, (jex.core.Jaxpr, ClosedJaxpr)),
    )
    jaxprs = [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in leaves]
    return [x for x in jaxprs if isinstance(x, jex.core.Jaxpr)]


def _names(jaxpr: Any) -> Iterator[str]:
    """The names in a jaxpr, in evaluation order."""
    for eqn in jaxpr.eqns:
        name = _name_in(eqn)
        if name is not None:
            yield name
        for inner in _jaxprs_of(eqn):
            yield from _names(inner)


def _evaluate(
    jaxpr: Any, consts: list[Any], args: list[Any], added: Iterator[Any]
) -> tuple[list[tuple[str, Any]], list[Any]]:
    """Evaluates a jaxpr. Returns the named values, with their names, and the results.

    `added` has, for each name in order, the value to add, or `None`.
    """
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))
    noted: list[tuple[str, Any]] = []

    def read(var: Any) -> Any:
        return var.val if isinstance(var, jex.core.Literal) else values[var]

    for eqn in jaxpr.eqns:
        inputs = [read(var) for var in eqn.invars]
        name, kind = _name_in(eqn), eqn.primitive.name
        if name is not None:
            extra = next(added)
            outs = inputs if extra is None else [inputs[0] + extra]
            noted.append((name, outs[0]))
        elif not any(True for inner in _jaxprs_of(eqn) for _ in _names(inner)):
            params = eqn.primitive.get_bind_params(eqn.params)
            # A pair before JAX 0.10.2.
            functions, params = params if isinstance(params, tuple) else ((), params)
            with eqn.ctx.manager:
                outs = eqn.primitive.bind(*functions, *inputs, **params)
            outs = outs if eqn.primitive.multiple_results else [outs]
        elif kind in _INLINED:
            (body,) = [x for k, x in eqn.params.items() if k in ("jaxpr", "call_jaxpr")]
            closed = isinstance(body, ClosedJaxpr)
            with eqn.ctx.manager:
                inner, outs = _evaluate(
                    body.jaxpr if closed else body,
                    body.consts if closed else [],
                    inputs,
                    added,
                )
            noted += inner
        elif kind == "scan":
            with eqn.ctx.manager:
                inner, outs = _evaluate_scan(eqn, inputs, added)
            noted += inner
        else:
            path = next(n for x in _jaxprs_of(eqn) for n in _names(x)).split(":", 2)[-1]
            raise CarryError(
                f"`rx.capture`: `{path}` is called inside `{kind}`, which cannot return "
                "its output. Leave it out: `rx.capture(fn, where=lambda module: ...)`."
            )
        values.update(zip(eqn.outvars, outs))
    return noted, [read(var) for var in jaxpr.outvars]


def _evaluate_scan(
    eqn: Any, inputs: list[Any], added: Iterator[Any]
) -> tuple[list[tuple[str, Any]], list[Any]]:
    """A scan whose steps also return named values. Recorded and added values have a leading
    axis for the steps."""
    closed = eqn.params["jaxpr"]
    body, consts = closed.jaxpr, closed.consts
    # Sliced and stacked values have one more axis outside. (The parameters also say so, but
    # differently in JAX 0.12 than in 0.10.)
    rank = lambda variables: [len(var.aval.shape) for var in variables]
    n_xs = sum(a > b for a, b in zip(rank(eqn.invars), rank(body.invars)))
    n_carry = sum(a == b for a, b in zip(rank(eqn.outvars), rank(body.outvars)))
    n_consts = len(inputs) - n_carry - n_xs
    fixed, init = inputs[:n_consts], inputs[n_consts : n_consts + n_carry]
    names = list(_names(body))

    def step(carry: list[Any], xs: Any) -> tuple[list[Any], Any]:
        sliced, extra = xs
        noted, outs = _evaluate(body, consts, [*fixed, *carry, *sliced], iter(extra))
        return outs[:n_carry], (outs[n_carry:], [value for _, value in noted])

    xs = inputs[n_consts + n_carry :], [next(added) for _ in names]
    how = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    carry, (ys, values) = jax.lax.scan(step, init, xs, **how)
    return list(zip(names, values)), [*carry, *ys]
