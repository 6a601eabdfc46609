"""`Optimizer`: any Optax transformation on a model of refs, in place.

`_trained.py` explains what Optax sees of a model, and why. Each array of Optax's state is
in its own ref, and the rest of the state is unchanged. So `filter_jit` carries it like a
model, on its fast path.
"""

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TYPE_CHECKING, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._core._errors import MismatchError, StructureError
from ._core._nodes import is_traced_in_ref
from ._core._ref import declare, Ref
from ._fields._axis_names import NO_NAMES
from ._fields._bound import BoundType
from ._fields._declared import DeclaredRef
from ._fields._following import followed, Following
from ._fields._module import Module
from ._filters._as_refs import snapshot
from ._filters._check import also_in_functions, remedy_for
from ._filters._filters import FilterLike
from ._filters._select import choose, leaves_with_paths
from ._filters._update import aligned, aligned_leaves, check_and_write, not_aligned
from ._trained import as_weak_as, made_for_another, Trained, with_update
from ._trees._cells import is_lookup
from ._trees._paths import key_text, path_text


if TYPE_CHECKING:
    import optax

T = TypeVar("T")


class Optimizer(Module):
    """An Optax optimizer with its state in refs: a step updates model and state in place.

    !!! Example

        ```python
        import jax.numpy as jnp
        import optax
        import refx_eqx as rx

        class Line(rx.Module):
            slope: rx.Param[float]

            def __call__(self, x):
                return self.slope.value * x

        def loss(model, x, y):
            return jnp.mean((model(x) - y) ** 2)

        @rx.filter_jit(donate="refs")
        def step(model, optimizer, x, y):
            value, grads = rx.filter_value_and_grad(loss, wrt="params")(model, x, y)
            optimizer.update(model, grads)
            return value

        model = Line(0.0)
        optimizer = rx.Optimizer(model, optax.sgd(0.1, momentum=0.5))
        x = jnp.arange(3.0)
        for _ in range(50):
            value = step(model, optimizer, x, 2 * x)
        assert value < 1e-3 and abs(model.slope.value - 2) < 1e-3
        assert list(rx.state_dict(optimizer)) == ["opt_state.0.trace.slope"]
        ```

    It works wherever refs do: as an argument or in a closure, under `filter_jit`, `scan` or
    `filter_vmap` (an ensemble of models, each with an optimizer).

    **What Optax sees** is `rx.state_dict(model, wrt)`: a flat dict with one array for each
    selected ref, keyed by its first place. So a tied weight has one slot and counts once in
    a global norm, and refs that are not selected are absent. (JAX sorts the keys of a dict,
    so such a sum may differ from one over the model in the last bit.) For masks and labels
    use [`refx_eqx.param_mask`][] and [`refx_eqx.param_labels`][].

    **Its state** is the attribute `opt_state`: Optax's state, with a ref of collection
    `"opt_state"` for each array. So a learning rate of `optax.inject_hyperparams` can be
    read and set as `optimizer.opt_state.hyperparams["learning_rate"].value`.

    **Arguments:**

    - `model`: any tree of refs.
    - `tx`: an Optax transformation.
    - `wrt`: any filter, which selects the refs to train. As in [`refx_eqx.filter_grad`][],
        their floating-point and complex arrays are trained.

    **Raises:**

    - `TypeError`: if `tx` is not an Optax transformation.
    - `StructureError`: if `wrt` selects no ref to train, or an array outside refs.
    """

    opt_state: Any
    tx: "optax.GradientTransformation"
    wrt: Any
    _names: tuple[str, ...] = eqx.field(static=True)

    def __init__(
        self,
        model: PyTree,
        tx: "optax.GradientTransformation",
        *,
        wrt: FilterLike = "params",
    ):
        if not hasattr(tx, "init"):
            raise TypeError(
                f"`rx.Optimizer`: `tx` must be an Optax transformation, but was given {tx!r}. "
                "Pass the result of one of Optax's functions, such as `optax.adam(1e-3)`."
            )
        trained = Trained(model, wrt)
        self.tx = tx
        self.wrt = wrt
        self.opt_state = _in_slots(tx.init(trained.values), trained)
        self._names = tuple(trained.refs)

    def update(self, model: PyTree, grads: PyTree, /, **extra: Any) -> dict[str, Any]:
        """Makes one step: updates the model and the state of the optimizer.

        Everything is computed and checked first: if anything fails, nothing has changed.

        **Arguments:**

        - `model`: the model that the optimizer was made for, or a copy of it.
        - `grads`: its gradients, as [`refx_eqx.filter_grad`][] returns them, or any other
            tree aligned with the model (see [`refx_eqx.update_refs`][]). Gradients of refs
            that `wrt` does not select are ignored.
        - `**extra`: other arguments of the transformation, such as `value=` for
            `optax.contrib.reduce_on_plateau`. Arguments about parameters in Optax are about
            the model here: `grad=` has the form of `grads`; `value_fn=` and `obj_fn=` are
            functions of a model, and `grad_fn=` returns gradients of one. They are called
            with copies of the model, so their writes are dropped.

        **Returns:**

        The added updates, by name.

        **Raises:**

        - `StructureError`: if a gradient is missing or has another shape, or if the model
            does not have the names, or the shapes of the slots, that the optimizer was made
            for.
        - `RefTypeError`: if a new value breaks the declared type of its ref.
        - `TraceLevelError`, `ImmutableError`: if a ref cannot be written here.
        """
        trained = Trained(model, self.wrt)
        trained.check_names(self._names)
        gradients = trained.by_name(grads, "gradients")
        _check_in_slots(self.opt_state)
        _check_shapes(self.opt_state, trained)
        tx = _taking_extra(self.tx) if extra else self.tx
        for name, translate in _TRANSLATIONS.items():
            if extra.get(name) is not None:
                extra[name] = translate(trained, extra[name])
        updates: Any
        updates, opt_state = tx.update(
            gradients, snapshot(self.opt_state), trained.values, **extra
        )
        check_and_write(
            [*trained.writes(updates), *_writes_to_slots(self.opt_state, opt_state)]
        )
        return updates


def _gradients_of(trained: Trained, grad_fn: Callable[..., Any]) -> Callable[..., Any]:
    of_values = trained.of_values(grad_fn)

    def gradients(values: Any, *args: Any, **kwargs: Any) -> Any:
        return trained.by_name(of_values(values, *args, **kwargs), "gradients")

    return gradients


# The extra arguments that are about parameters in Optax, but about the model here.
_TRANSLATIONS: dict[str, Callable[[Trained, Any], Any]] = {
    "grad": lambda trained, grad: trained.by_name(grad, "gradients"),
    "value_fn": Trained.of_values,
    "obj_fn": Trained.of_values,
    "grad_fn": _gradients_of,
}


def _taking_extra(tx: Any) -> Any:
    """The transformation, ignoring extra arguments it does not use, as in `optax.chain`."""
    import optax

    # `optax.MultiSteps` is not one, but already takes them.
    is_plain = isinstance(tx, optax.GradientTransformation)
    return optax.with_extra_args_support(tx) if is_plain else tx


# A slot holds an array, so a number written to it, such as a learning rate, becomes an
# array of the same dtype, and the compiled step stays valid.
_SLOT = BoundType(DeclaredRef(Optimizer, "opt_state", 0, jax.Array), NO_NAMES)


def _in_slots(opt_state: Any, trained: Trained) -> Any:
    """Optax's state, with each array in a ref."""
    weights = trained.followed()

    def slot(path: tuple, leaf: Any) -> Any:
        if not is_traced_in_ref(leaf):
            return leaf
        # A copy: the array may also be held by Optax or a parameter, and a slot is donated.
        ref = Ref(jnp.array(leaf), "opt_state")
        ref._name = f"Optimizer.opt_state{jtu.keystr(path)}"
        declare(ref, _type_of_slot(path, leaf, weights))
        return ref

    return jtu.tree_map_with_path(slot, opt_state)


def _check_in_slots(opt_state: Any) -> None:
    """Checks for assignments to a mapping in Optax's state, which would remove a ref."""
    for path, leaf in jtu.tree_leaves_with_path(opt_state):
        if not isinstance(leaf, Ref) and is_traced_in_ref(leaf):
            place = f"opt_state{jtu.keystr(path)}"
            raise StructureError(
                f"The optimizer cannot step: `{place}` was a ref, but is {leaf!r} now. "
                "Make a new optimizer; to change a number in its state, write the ref: "
                f"`optimizer.{place}.value = ...`."
            )


def _check_shapes(opt_state: Any, trained: Trained) -> None:
    """Checks that each slot with the shape of its weight still has it: Optax would
    broadcast."""
    weights = dict(jtu.tree_leaves_with_path(trained.values))
    for path, slot in jtu.tree_leaves_with_path(opt_state):
        if not isinstance(slot, Ref) or followed(slot) is None:
            continue
        known = dict(_at_end_of(path, weights))
        found, shapes = jnp.shape(slot.value), [*map(jnp.shape, known.values())]
        if shapes and found not in shapes:
            (name, *_), weight = known.popitem()
            raise made_for_another(
                f"{trained.which(name.key)}, has the shape {jnp.shape(weight)}, but "
                f"`opt_state{jtu.keystr(path)}` has {found}"
            )


def _at_end_of(path: tuple, weights: dict[tuple, T]) -> Iterator[tuple[tuple, T]]:
    """The weights whose places a place in Optax's state ends with. Optax keeps the state
    of each weight by name."""
    ends = (path[i:] for i in reversed(range(len(path))))
    return ((end, weights[end]) for end in ends if end in weights)


def _type_of_slot(
    path: tuple, leaf: Any, weights: dict[tuple, tuple[Any, Following]]
) -> BoundType:
    """An array with the shape of its weight is sharded like it."""
    for _, (weight, following) in _at_end_of(path, weights):
        if jnp.shape(weight) == jnp.shape(leaf):
            return following
    return _SLOT


def _writes_to_slots(slots: Any, opt_state: Any) -> list[tuple[Ref, Any]]:
    """The writes that turn the state into `opt_state`.

    **Raises:**

    - `StructureError`: if it has another structure, or arrays of other shapes.
    """
    leaves, treedef = jtu.tree_flatten_with_path(slots)
    new_leaves, new_treedef = jtu.tree_flatten(opt_state)
    if new_treedef != treedef:
        raise MismatchError(
            "Cannot update the optimizer: its transformation returned a state of another "
            f"structure, {new_treedef}, instead of {treedef}. `update` must return a state "
            "like that of `init`; for another transformation, make another `rx.Optimizer`."
        )
    writes = []
    for (path, slot), new in zip(leaves, new_leaves):
        if isinstance(slot, Ref):
            old = slot.value
            if jnp.shape(old) != jnp.shape(new):
                raise MismatchError(
                    f"Cannot update the optimizer: at {path_text(path)} of its state is "
                    f"{eqx.tree_pformat(old)}, but the transformation returned "
                    f"{eqx.tree_pformat(new)}. `update` must return a state like that of "
                    "`init`; for another transformation, make another `rx.Optimizer`."
                )
            writes.append((slot, as_weak_as(old, new)))
        elif slot is not new and slot != new:
            raise MismatchError(
                f"Cannot update the optimizer: at {path_text(path)} of its state is "
                f"{slot!r}, which is not an array, but the transformation returned "
                f"{new!r}. Only arrays can change from step to step."
            )
    return writes


def param_mask(
    model: PyTree, filter: FilterLike, *, wrt: FilterLike = "params"
) -> dict[str, bool]:
    """Converts a filter to an Optax mask, for an [`refx_eqx.Optimizer`][].

    !!! Example

        ```python
        import jax.numpy as jnp
        import optax
        import refx_eqx as rx

        model = {"weight": rx.Ref(jnp.ones(2), "params"), "bias": rx.Ref(jnp.ones(2), "params")}
        mask = rx.param_mask(model, ~rx.path("**.bias"))
        assert mask == {"weight": True, "bias": False}

        optimizer = rx.Optimizer(model, optax.add_decayed_weights(-0.1, mask=mask))
        optimizer.update(model, {"weight": jnp.zeros(2), "bias": jnp.zeros(2)})
        assert (model["weight"].value < 1).all() and (model["bias"].value == 1).all()
        ```

    **Arguments:**

    - `model`, `wrt`: those of the optimizer.
    - `filter`: any filter.

    **Returns:**

    For each trained ref, by name, whether the filter selects it.

    **Raises:**

    - `StructureError`: whenever `rx.Optimizer(model, tx, wrt=wrt)` raises it, and if the
        filter selects a ref at one of its places and not at another.
    """
    return param_labels(model, {True: filter, False: True}, wrt=wrt)  # type: ignore


def param_labels(
    model: PyTree, filters: Mapping[Hashable, FilterLike], *, wrt: FilterLike = "params"
) -> dict[str, Hashable]:
    """Converts filters to labels for `optax.partition`, for an [`refx_eqx.Optimizer`][].

    !!! Example

        ```python
        import jax.numpy as jnp
        import optax
        import refx_eqx as rx

        model = {"encoder": [rx.Ref(1.0, "params")], "head": rx.Ref(1.0, "params")}
        labels = rx.param_labels(model, {"slow": rx.path("encoder.**"), "fast": True})
        assert labels == {"encoder.0": "slow", "head": "fast"}

        tx = optax.partition({"slow": optax.sgd(0.1), "fast": optax.sgd(1.0)}, labels)
        optimizer = rx.Optimizer(model, tx)
        optimizer.update(model, {"encoder": [1.0], "head": 1.0})
        assert model["encoder"][0].value == 0.9 and model["head"].value == 0.0
        ```

    **Arguments:**

    - `model`, `wrt`: those of the optimizer.
    - `filters`: for each label, any filter. A ref gets the label of the first filter that
        selects it; use `True` as the last to select the rest.

    **Returns:**

    The label of each trained ref, by name.

    **Raises:**

    - `StructureError`: if no filter selects a trained ref; whenever `rx.Optimizer(model,
        tx, wrt=wrt)` raises it; and if a filter selects a ref at one of its places and not
        at another.
    - `TypeError`: if `filters` is not a mapping.
    """
    if not isinstance(filters, Mapping):
        raise TypeError(
            f"`rx.param_labels` was given filters={filters!r}: give a mapping from label to "
            'filter, such as `{"slow": rx.path("encoder.**"), "fast": True}`.'
        )
    trained = Trained(model, wrt)
    pairs, _ = leaves_with_paths(model)
    chosen = choose(pairs, *filters.values())
    answers = {id(leaf): answer for (_, leaf), answer in zip(pairs, chosen)}
    names = [*filters, None]
    labels = {name: names[answers[id(ref)]] for name, ref in trained.refs.items()}
    unlabeled = [
        trained.which(name)
        for name, ref in trained.refs.items()
        if answers[id(ref)] == len(filters)
    ]
    if unlabeled:
        raise StructureError(
            f"`rx.param_labels`: no filter selects {'; '.join(unlabeled)}. Add a label for "
            "the rest, with the filter `True`, as the last."
        )
    return labels


def apply_updates(model: PyTree, updates: PyTree) -> None:
    """As `optax.apply_updates`, in place: adds updates to the refs of a model. For use with
    a manually kept optimizer state.

    !!! Example

        ```python
        import equinox as eqx
        import jax.numpy as jnp
        import optax
        import refx_eqx as rx

        model = {"w": rx.Ref(jnp.array(2.0), "params"), "n": rx.Ref(jnp.array(0), "counts")}
        tx = optax.sgd(0.25)
        params = eqx.filter(rx.deref(model), rx.filter_spec(model, "params"))
        opt_state = tx.init(params)

        grads = rx.filter_grad(lambda model: model["w"].value ** 2, wrt="params")(model)
        updates, opt_state = tx.update(grads, opt_state, params)
        rx.apply_updates(model, updates)
        assert model["w"].value == 1.0
        ```

    **Arguments:**

    - `model`: a tree of refs.
    - `updates`: a tree aligned with it, as for [`refx_eqx.update_refs`][]. A ref keeps its
        dtype, as in Optax.

    **Raises:**

    - `StructureError`: if the structures differ, if an update has another shape than the
        array it is added to, or if there is one for an array outside refs. Then nothing is
        written.
    - `RefTypeError`: if a new value breaks the declared type of its ref.
    - `TraceLevelError`, `ImmutableError`: if a ref cannot be written here.
    """
    failure = "Cannot apply the updates"
    writes: dict[int, tuple[Ref, Any]] = {}
    for ref, update, where in aligned(model, updates, failure, "updates"):
        writes[id(ref)] = ref, with_update(ref, ref.value, update, f"at {where}")
    error = functools.partial(not_aligned, failure, "updates")
    for path, leaf, update in aligned_leaves(model, updates, error):
        if not isinstance(leaf, Ref) and jtu.tree_leaves(update, is_leaf=is_lookup):
            _, in_functions = also_in_functions(model)
            remedy = remedy_for(tuple(map(key_text, path)), in_functions)
            raise StructureError(
                f"{failure}: there is one for {eqx.tree_pformat(leaf)} at "
                f"{path_text(path)}, which is not in a ref, so it cannot be updated in "
                f"place. {remedy} Or exclude it from the gradients: "
                '`rx.filter_grad(loss, wrt="params")`.'
            )
    check_and_write(list(writes.values()))
