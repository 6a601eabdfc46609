"""Declared types at run time: in signatures, at construction, in methods, for stacks."""

# A static checker objects to what is wrong on purpose here.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeArguments=false, reportInvalidTypeForm=false
# pyright: reportOptionalMemberAccess=false

import copy
import dataclasses
import importlib
import pickle
import subprocess
import sys
import textwrap
import threading
from typing import Annotated, Generic, NamedTuple, Optional, TypeVar, Union

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import pytest
import typeguard
from beartype import beartype
from beartype.door import die_if_unbearable
from beartype.roar import BeartypeCallHintParamViolation, BeartypeDoorHintViolation
from jaxtyping import Array, Float, Float32, Int, jaxtyped, PRNGKeyArray, PyTree
from raising import message_of, raises

import refx_eqx as rx
from refx_eqx._fields._declared import DeclaredRef


T = TypeVar("T")
BY_NAME = [die_if_unbearable, typeguard.check_type]
VIOLATIONS = (BeartypeDoorHintViolation, typeguard.TypeCheckError)


class Linear(rx.Module):
    weight: rx.Param[Float[Array, "out in"]]
    bias: rx.Param[Float[Array, "out"]] | None = None

    @jaxtyped(typechecker=beartype)
    def __call__(self, x: Float[Array, "in"]) -> Float[Array, "out"]:
        return self.weight.value @ x

    @jaxtyped(typechecker=beartype)
    def wrong_result(self, x: Float[Array, "in"]) -> Float[Array, "out"]:
        return jnp.ones(x.shape[0] + 7)

    @jaxtyped(typechecker=None)
    def looks(self, x):
        return isinstance(x, Float[Array, "in"])


def linear(n_in=3, n_out=2):
    return Linear(jnp.ones((n_out, n_in)), jnp.zeros(n_out))


# In signatures and in `isinstance`.


class Config(NamedTuple):
    size: int


HINTS = [
    (Float[Array, "n"], jnp.ones(2), jnp.ones(2, int)),
    (PRNGKeyArray, jr.key(0), jnp.ones(2)),
    (int, 1, 1.0),
    (str | None, None, 1),
    (Optional[Float[Array, "n"]], None, jnp.ones(())),  # noqa: UP045
    (
        Union[Float[Array, "n"], Int[Array, "n n"]],
        jnp.ones((2, 2), int),
        jnp.ones(3, int),
    ),
    (PyTree[Float[Array, "n"]], {"a": jnp.ones(2)}, {"a": jnp.ones(2, int)}),
    (
        dict[str, Float[Array, "n"]],
        {"a": jnp.ones(2)},
        {"a": jnp.ones(2), "b": jnp.ones(3)},
    ),
    (list[int], [1, 2], [1, "b"]),
    (tuple[int, ...], (1, 2), (1, "b")),
    (tuple[int, str], (1, "a"), (1, 2)),
    (Config, Config(1), 1),
]


@pytest.mark.parametrize(("hint", "right", "wrong"), HINTS, ids=lambda x: "")
def test_isinstance_looks_at_the_value(hint, right, wrong):
    with jaxtyped("context"):
        assert isinstance(rx.Ref(right), rx.Ref[hint])
    with jaxtyped("context"):
        assert not isinstance(rx.Ref(wrong), rx.Ref[hint])
    assert not isinstance(right, rx.Ref[hint])


@pytest.mark.parametrize("check", BY_NAME)
@pytest.mark.parametrize(("hint", "right", "wrong"), HINTS, ids=lambda x: "")
def test_either_checker_looks_at_the_value(check, hint, right, wrong):
    with jaxtyped("context"):
        check(rx.Ref(right), rx.Ref[hint])
    with jaxtyped("context"), pytest.raises(VIOLATIONS):
        check(rx.Ref(wrong), rx.Ref[hint])


@pytest.mark.parametrize(("hint", "right", "wrong"), HINTS, ids=lambda x: "")
def test_a_signature_is_checked(hint, right, wrong):
    @jaxtyped(typechecker=beartype)
    def f(ref: rx.Ref[hint]) -> int:
        return 1

    assert f(rx.Ref(right)) == 1
    with raises(jaxtyping.TypeCheckError, match="'ref'"):
        f(rx.Ref(wrong))


def test_the_axis_names_of_a_call_are_shared():
    @jaxtyped(typechecker=beartype)
    def f(
        a: rx.Param[Float[Array, "n"]], b: Float[Array, "n"]
    ) -> rx.Ref[Float[Array, "n"]]:
        return a

    a = rx.Ref(jnp.ones(2))
    assert f(a, jnp.ones(2)) is a
    with raises(jaxtyping.TypeCheckError, match="n=2"):
        f(a, jnp.ones(3))


# typeguard takes a string inside an annotation for the name of a type.
Row = Float[Array, "n"]
ParamRow = rx.Param[Row]


@jaxtyped(typechecker=None)
@typeguard.typechecked
def under_typeguard(a: ParamRow, b: Row):
    return a


def test_the_axis_names_of_a_call_are_shared_under_typeguard():
    under_typeguard(rx.Ref(jnp.ones(2)), jnp.ones(2))
    with raises(typeguard.TypeCheckError, match='"b"'):
        under_typeguard(rx.Ref(jnp.ones(2)), jnp.ones(3))


def test_beartype_alone_checks_a_signature():
    @beartype
    def f(ref: rx.Ref[Float[Array, "n n"]]):
        return ref

    f(rx.Ref(jnp.ones((2, 2))))
    with pytest.raises(BeartypeCallHintParamViolation):
        f(rx.Ref(jnp.ones(2)))


def test_the_field_of_a_dataclass_is_checked():
    @jaxtyped(typechecker=beartype)
    @dataclasses.dataclass
    class Pair:
        a: rx.Ref[Float[Array, "n"]]
        b: rx.Ref[Float[Array, "n"]]

    Pair(rx.Ref(jnp.ones(2)), rx.Ref(jnp.ones(2)))
    with raises(jaxtyping.TypeCheckError, match="n=2"):
        Pair(rx.Ref(jnp.ones(2)), rx.Ref(jnp.ones(3)))


HOOKED = """
    import jax.numpy as jnp
    import refx_eqx as rx
    from jaxtyping import Array, Float

    class Hooked(rx.Module):
        weight: rx.Param[Float[Array, "out in"]]

        def __call__(self, x: Float[Array, "in"]) -> Float[Array, "out"]:
            return self.weight.value @ x

    def takes(ref: rx.Ref[Float[Array, "n"]]):
        return ref
"""


def test_the_import_hook(tmp_path, monkeypatch):
    name = "hooked_by_jaxtyping"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(HOOKED))
    monkeypatch.syspath_prepend(tmp_path)
    with jaxtyping.install_import_hook(name, "beartype.beartype"):
        module = importlib.import_module(name)
    hooked = module.Hooked(jnp.ones((2, 3)))
    assert hooked(jnp.ones(3)).shape == (2,)
    with raises(jaxtyping.TypeCheckError, match="in=3"):
        hooked(jnp.ones(4))
    with raises(jaxtyping.TypeCheckError, match="'ref'"):
        module.takes(rx.Ref(jnp.ones((2, 2))))
    with raises(rx.RefTypeError, match="Hooked.weight"):
        module.Hooked(jnp.ones(3))


# At construction.


def test_construction_checks_each_field():
    with pytest.raises(rx.RefTypeError) as info:
        Linear(jnp.ones(3))
    assert message_of(info.value) == (
        "`Linear.weight` (collection 'params') is declared `Float[Array, \"out in\"]`, and "
        "cannot hold f32[3]: this array has 1 dimensions, not the 2 expected by the type "
        "hint. Write a value of the declared type, or declare a wider one."
    )


def test_the_fields_of_an_instance_share_axis_names():
    with raises(rx.RefTypeError, match=r"`Linear.bias` .* with out=2, .* f32\[3\]"):
        Linear(jnp.ones((2, 3)), jnp.ones(3))
    Linear(jnp.ones((5, 3)), jnp.ones(5))  # another instance, other sizes


def test_a_failed_construction_declares_nothing():
    weight = rx.Ref(jnp.ones((2, 3)))
    with pytest.raises(rx.RefTypeError):
        Linear(weight, jnp.ones(3))
    weight.value = jnp.ones(7)


def test_construction_inside_of_a_transform_is_checked():
    @rx.filter_jit
    def make(weight):
        return Linear(weight, jnp.ones(7))

    with raises(rx.RefTypeError, match=r"out=2"):
        make(jnp.ones((2, 3)))


def test_the_refs_of_a_lifted_result_are_declared():
    made = rx.filter_jit(lambda x: Linear(x))(jnp.ones((2, 3)))
    with raises(rx.RefTypeError, match=r"Linear.weight.* out=2"):
        made.weight.value = jnp.ones((7, 7))


def test_a_python_scalar_becomes_an_array_of_the_declared_type():
    class Counter(rx.Module):
        uses: rx.Ref[Int[Array, ""]]
        rate: rx.Ref[Float[Array, ""]]

    counter = Counter(0, 1)
    assert isinstance(counter.uses, rx.Ref[Int[Array, ""]])
    assert counter.rate.dtype == jnp.float32 and isinstance(
        counter.rate.value, jax.Array
    )
    counter.rate.value = jnp.array(1.0, jnp.bfloat16)
    counter.rate.value = 2
    assert counter.rate.dtype == jnp.bfloat16 and counter.rate.value == 2
    with raises(rx.RefTypeError, match="Counter.uses"):
        Counter(0.5, 1.0)


def test_a_scalar_type_of_python_keeps_a_python_scalar():
    class Holder(rx.Module):
        number: rx.Ref[float | Float[Array, ""]]

    holder = Holder(1.0)
    holder.number.value = 2.0
    assert type(holder.number.value) is float


def test_inheritance():
    class Scaled(Linear):
        scale: rx.Param[Float[Array, "out"]] = None

    with raises(rx.RefTypeError, match=r"`Scaled.scale` .*out=2"):
        Scaled(jnp.ones((2, 3)), None, jnp.ones(3))
    scaled = Scaled(jnp.ones((2, 3)), None, jnp.ones(2))
    with raises(rx.RefTypeError, match=r"`Scaled.weight`"):
        scaled.weight.value = jnp.ones((3, 3))


def test_generics():
    class Box(rx.Module, Generic[T]):
        content: rx.Param[T]
        weight: rx.Param[Float[Array, "n"]]

    box = Box[int](1, jnp.ones(2))
    box.content.value = "anything"
    with raises(rx.RefTypeError, match="Box.weight"):
        box.weight.value = jnp.ones(3)


def test_a_bound_of_a_type_variable_is_kept():
    N = TypeVar("N", bound=int)

    class Box(rx.Module, Generic[N]):
        content: rx.Ref[N]

    Box(1).content.value = 2
    with raises(rx.RefTypeError, match="Box.content"):
        Box("a")


def test_abstract_fields():
    class Abstract(rx.Module):
        weight: eqx.AbstractVar[rx.Ref[Float[Array, "n"]]]

    class Concrete(Abstract):
        weight: rx.Param[Float[Array, "n"]]

    with raises(rx.RefTypeError, match="Concrete.weight"):
        Concrete(jnp.ones((2, 2)))


def test_string_annotations():
    namespace = {}
    source = """
        from __future__ import annotations
        import refx_eqx as rx
        from jaxtyping import Array, Float

        class Late(rx.Module):
            weight: rx.Param[Float[Array, "n"]]
            bias: rx.Param[Float[Array, "n"]] | None
    """
    code = compile(textwrap.dedent(source), "late.py", "exec")
    module = sys.modules[__name__]
    exec(code, namespace | {"__name__": module.__name__, "out": namespace}, namespace)
    Late = namespace["Late"]
    Late(jnp.ones(2), None)
    with raises(rx.RefTypeError, match=r"`Late.bias` .*n=2"):
        Late(jnp.ones(2), jnp.ones(3))


def test_a_tuple_of_refs():
    class Stack(rx.Module):
        layers: tuple[rx.Param[Float[Array, "n"]], ...]

    shared = rx.Ref(jnp.ones(2))
    stack = Stack((jnp.ones(2), shared))
    assert stack.layers[1] is shared and shared.collection == "params"
    assert stack.layers[0].name == "Stack.layers[0]"
    with raises(rx.RefTypeError, match=r"`Stack.layers\[1\]` .*n=2.* f32\[3\]"):
        Stack((jnp.ones(2), jnp.ones(3)))
    with raises(rx.RefTypeError, match="`Stack.layers` is declared a tuple"):
        Stack([jnp.ones(2)])


def test_a_tuple_of_refs_of_several_types():
    class Pair(rx.Module):
        both: tuple[rx.Param[Float[Array, "n"]], rx.Ref[int]]

    pair = Pair((jnp.ones(2), 3))
    with raises(rx.RefTypeError, match=r"`Pair.both\[1\]` .*`int`"):
        pair.both[1].value = "a"
    with raises(rx.RefTypeError, match="a tuple of 2 items"):
        Pair((jnp.ones(2),))


def test_a_dict_of_lists_of_refs():
    class Bank(rx.Module):
        rows: dict[str, list[rx.Param[Float[Array, "n"]]]]

    bank = Bank({"a": [jnp.ones(2)], "b": []})
    assert bank.rows["a"][0].collection == "params"
    with raises(rx.RefTypeError, match=r"`Bank.rows\['a'\]\[0\]`"):
        bank.rows["a"][0].value = jnp.ones(3)


def test_a_list_that_is_filled_in_init_holds_refs():
    class Grown(rx.Module):
        rows: list[rx.Param[Float[Array, "n"]]]

        def __init__(self, first):
            self.rows = []
            self.rows.append(first)

    grown = Grown(jnp.ones(2))
    assert (
        grown.rows[0].collection == "params" and grown.rows[0].name == "Grown.rows[0]"
    )
    with raises(rx.RefTypeError, match=r"`Grown.rows\[0\]`"):
        Grown("a")


def test_a_ref_of_another_class_is_refused():
    class Special(rx.Ref):
        pass

    class Holder(rx.Module):
        ref: Special[Float[Array, "n"]]

    assert type(Holder(jnp.ones(2)).ref) is Special
    with raises(rx.RefTypeError, match=r"`Holder.ref` is declared a `Special`"):
        Holder(rx.Ref(jnp.ones(2)))


def test_the_arrays_beside_refs_share_the_names():
    class Mixed(rx.Module):
        weight: rx.Param[Float[Array, "n"]]
        mask: Float[Array, "n"]

    Mixed(jnp.ones(2), jnp.ones(2))
    Mixed(jnp.ones(2), None)  # what is no array is left to Equinox
    with raises(rx.RefTypeError, match=r"`Mixed\.\w+` .*n=3"):
        Mixed(jnp.ones(2), jnp.ones(3))
    with raises(rx.RefTypeError, match=r"`Mixed.mask` is declared .* i32\[2\]"):
        Mixed(jnp.ones(2), jnp.ones(2, int))


def test_a_size_that_is_a_static_field():
    class Sized(rx.Module):
        size: int = eqx.field(static=True)
        weight: rx.Param[Float[Array, "{self.size} {self.size}+1"]]

    sized = Sized(2, jnp.ones((2, 3)))
    with raises(rx.RefTypeError, match=r"self.size=2"):
        sized.weight.value = jnp.ones((3, 4))
    sized.weight.value = jnp.zeros((2, 3))
    with raises(rx.RefTypeError, match=r"`Sized.weight`.* with self.size=2, and"):
        Sized(2, jnp.ones((2, 2)))


def test_a_size_in_a_list_of_the_instance():
    class Sized(rx.Module):
        sizes: list[int]
        weight: rx.Param[Float[Array, "{self.sizes[0]} {len(self.sizes)}"]]

    sized = Sized([3, 4], jnp.ones((3, 2)))
    with raises(rx.RefTypeError, match=r"with self.sizes=\(3, 4\), and"):
        sized.weight.value = jnp.ones((4, 2))
    sized.weight.value = jnp.zeros((3, 2))
    with raises(rx.RefTypeError, match=r"with self.sizes=\(3, 4\), and"):
        Sized([3, 4], jnp.ones((4, 2)))


def test_a_size_that_is_an_array_is_checked_when_the_instance_is_made():
    class Sized(rx.Module):
        size: jax.Array
        weight: rx.Param[Float[Array, "{self.size}"]]

    sized = Sized(jnp.array(3), jnp.ones(3))
    with raises(rx.RefTypeError, match=r"existing value of \{self.size\}=3"):
        Sized(jnp.array(3), jnp.ones(2))
    # An array has no hash, so the name is not bound for later writes; the rank is.
    sized.weight.value = jnp.ones(4)
    with raises(rx.RefTypeError, match="2 dimensions, not the 1 expected"):
        sized.weight.value = jnp.ones((4, 4))


def test_a_bare_module_has_no_instance_to_ask_for_a_size():
    class Sized(eqx.Module):
        size: int
        weight: rx.Param[Float[Array, "{self.size} n"]] = rx.field()

    sized = Sized(3, jnp.ones((3, 2)))
    sized.weight.value = jnp.zeros((3, 2))
    assert sized.weight.value.sum() == 0.0


def test_variadic_names_are_bound():
    class Normal(rx.Module):
        mean: rx.Ref[Float[Array, "*batch d"]]
        scale: rx.Ref[Float[Array, "*batch d"]]

    normal = Normal(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4)))
    with raises(rx.RefTypeError, match=r"d=4, batch=\(2, 3\)"):
        normal.mean.value = jnp.ones((3, 4))


def test_more_axes_that_the_type_allows_are_no_stack():
    class Either(rx.Module):
        w: rx.Param[Float[Array, "n m"] | Float[Array, "m"]]

    either = Either(jnp.ones((5, 2)))
    either.w.value = jnp.ones(2)
    with raises(rx.RefTypeError, match=r"with m=2, n=5.* for other sizes, make a new"):
        either.w.value = jnp.ones((7, 2))
    with raises(
        rx.RefTypeError, match=r"f32\[4,5,2\]\. A write keeps the number of axes"
    ):
        either.w.value = jnp.ones((4, 5, 2))
    either.w.value = jnp.ones((5, 2))


def test_a_pytree_is_held_to_its_structure():
    class State(rx.Module):
        a: rx.Ref[PyTree[Float[Array, "?n"], "T"]]
        b: rx.Ref[PyTree[Float[Array, "?n"], "T"]]

    tree = {"x": jnp.ones(2), "y": jnp.ones(3)}
    state = State(tree, tree)
    state.a.value = {"x": jnp.zeros(2), "y": jnp.zeros(3)}
    with raises(rx.RefTypeError, match="State.a"):
        state.a.value = {"x": jnp.ones(2)}
    with raises(rx.RefTypeError, match="State.a"):
        state.a.value = {"x": jnp.ones(2), "y": jnp.ones(2)}


def test_a_bare_equinox_module_checks_each_ref():
    class Bare(eqx.Module):
        weight: rx.Ref[Float[Array, "n n"]] = rx.field(collection="params")

    bare = Bare(jnp.ones((2, 2)))
    with raises(rx.RefTypeError, match=r"`Bare.weight` .*n=2"):
        bare.weight.value = jnp.ones((3, 3))
    with raises(rx.RefTypeError, match="Bare.weight"):
        Bare(jnp.ones((2, 3)))


def test_every_field_that_holds_a_ref_declares_its_type():
    class Loose(rx.Module):
        ref: rx.Ref[Float[Array, "..."]]

    class Strict(rx.Module):
        ref: rx.Ref[Float32[Array, "n"]]

    loose = Loose(jnp.ones(2))
    loose.ref.value = jnp.ones(3)
    Strict(loose.ref)
    with raises(rx.RefTypeError, match='`Float32.Array, "n".` with n=3'):
        loose.ref.value = jnp.ones(2)


def test_tree_at_gives_a_ref_its_own_type():
    other = linear(5, 4)
    changed = eqx.tree_at(lambda m: m.weight, linear(), other.weight)
    with raises(rx.RefTypeError, match="out=4"):
        changed.weight.value = jnp.ones((2, 3))


# Copies.


@pytest.mark.parametrize(
    "duplicate",
    [rx.clone, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["clone", "deepcopy", "pickle"],
)
def test_a_copy_keeps_the_declared_type(duplicate):
    model = linear()
    twin = duplicate(model)
    assert twin.weight._declared == model.weight._declared
    assert hash(twin.weight._declared) == hash(model.weight._declared)


def test_a_ref_of_a_local_class_can_be_pickled():
    class Local(rx.Module):
        weight: rx.Param[Float[Array, "n"]]

    ref = pickle.loads(pickle.dumps(Local(jnp.ones(2)).weight))
    assert ref.name == "Local.weight"
    ref.value = jnp.ones((3, 3))  # the class is not to be found, so it declares nothing


# Methods.


def test_a_method_knows_the_names_of_its_fields():
    model = linear()
    assert model(jnp.ones(3)).shape == (2,)
    with raises(jaxtyping.TypeCheckError, match="in=3"):
        model(jnp.ones(4))
    with raises(jaxtyping.TypeCheckError, match="return value"):
        model.wrong_result(jnp.ones(3))
    assert model.looks(jnp.ones(3)) and not model.looks(jnp.ones(4))


class UnderTypeguard(rx.Module):
    weight: rx.Param[Float[Array, "n"]]

    @jaxtyped(typechecker=None)
    @typeguard.typechecked
    def __call__(self, x: Row):
        return self.weight.value * x


def test_a_method_knows_the_names_under_typeguard():
    UnderTypeguard(jnp.ones(2))(jnp.ones(2))
    with raises(typeguard.TypeCheckError, match='"x"'):
        UnderTypeguard(jnp.ones(2))(jnp.ones(3))


def test_a_method_knows_the_names_inside_of_transforms():
    model = linear()
    stack = rx.filter_vmap(lambda _: linear())(jnp.arange(4))

    def call(model, x):
        return model(x)

    for good in (
        lambda: rx.filter_jit(call)(model, jnp.ones(3)),
        lambda: rx.filter_vmap(call, in_axes=(0, None))(stack, jnp.ones(3)),
        lambda: rx.filter_vmap(call, in_axes=(None, 0))(model, jnp.ones((4, 3))),
        lambda: rx.filter_grad(lambda m, x: jnp.sum(m(x)))(model, jnp.ones(3)),
        lambda: eqx.filter_jit(lambda o, x: rx.reref(o)(x))(
            rx.deref(model), jnp.ones(3)
        ),
    ):
        good()
    with raises(jaxtyping.TypeCheckError, match="in=3"):
        rx.filter_jit(call)(model, jnp.ones(4))
    with raises(jaxtyping.TypeCheckError, match="in=3"):
        rx.filter_vmap(call, in_axes=(0, None))(stack, jnp.ones(4))


def test_a_function_does_not_know_the_names_of_its_arguments():
    @jaxtyped(typechecker=beartype)
    def f(model: Linear, x: Float[Array, "in"]):
        return x

    f(linear(), jnp.ones(9))


def test_a_name_that_the_refs_disagree_on_is_free():
    changed = eqx.tree_at(lambda m: m.weight, linear(), linear(5, 4).weight)
    assert changed(jnp.ones(5)).shape == (4,)


def test_a_weight_that_is_tied_in_binds_no_names_of_its_former_owner():
    class Embedding(rx.Module):
        weight: rx.Param[Float[Array, "vocab dim"]]

    embedding = Embedding(jnp.ones((5, 3)))
    head = Linear(embedding.weight)
    assert head(jnp.ones(3)).shape == (5,)
    with raises(jaxtyping.TypeCheckError, match="in=3"):
        head(jnp.ones(4))


def test_a_method_runs_inside_of_init():
    class Model(rx.Module):
        weight: rx.Param[Float[Array, "n"]]

        @jaxtyped(typechecker=beartype)
        def __init__(self, n: int):
            self.weight = self.make(jnp.ones(n))

        @jaxtyped(typechecker=beartype)
        def make(self, x: Float[Array, "n"]) -> Float[Array, "n"]:
            return x

    assert Model(3).weight.shape == (3,)


def test_a_name_is_free_in_the_methods_if_its_ref_is_replaced():
    class Model(rx.Module):
        weight: rx.Param[Float[Array, "out in"]]
        bias: rx.Param[Float[Array, "out"]]

        @jaxtyped(typechecker=beartype)
        def sizes(
            self, x: Float[Array, "in"], y: Float[Array, "out"]
        ) -> tuple[int, int]:
            return len(x), len(y)

    model = Model(jnp.ones((2, 3)), jnp.ones(2))
    with raises(jaxtyping.TypeCheckError, match="parameter 'x'"):
        model.sizes(jnp.ones(5), jnp.ones(2))
    replaced = eqx.tree_at(lambda m: m.weight, model, jnp.ones((2, 3)))
    assert replaced.sizes(jnp.ones(5), jnp.ones(2)) == (5, 2)
    with raises(jaxtyping.TypeCheckError, match="parameter 'y'"):
        replaced.sizes(jnp.ones(5), jnp.ones(4))


def test_an_instance_may_be_checked_again():
    model = linear()
    before = model.weight._declared
    model.__check_init__()
    assert model.weight._declared == before


# Stacks.


def test_batched_accepts_a_stack_and_rejects_a_plain_module():
    stack = rx.filter_vmap(lambda _: linear())(jnp.arange(4))
    assert isinstance(stack, rx.Batched[Linear, "n"])
    assert not isinstance(linear(), rx.Batched[Linear, "n"])
    assert not isinstance(jnp.ones(3), rx.Batched[Linear, "n"])
    assert not isinstance(stack, rx.Batched[Linear, "n m"])
    assert isinstance(stack, rx.Batched[Linear, "4"])
    assert not isinstance(stack, rx.Batched[Linear, "5"])


def test_batched_binds_its_name():
    @jaxtyped(typechecker=beartype)
    def f(stack: rx.Batched[Linear, "n"], xs: Float[Array, "n in"]):
        return xs

    stack = rx.filter_vmap(lambda _: linear())(jnp.arange(4))
    f(stack, jnp.ones((4, 3)))
    with raises(jaxtyping.TypeCheckError, match="n=4"):
        f(stack, jnp.ones((5, 3)))
    with raises(jaxtyping.TypeCheckError, match="'stack'"):
        f(linear(), jnp.ones((4, 3)))


def test_batched_nests():
    inner = rx.Batched[Linear, "n"]
    stack = rx.filter_vmap(lambda _: linear())(jnp.arange(4))
    stacks = rx.filter_vmap(lambda _: rx.filter_vmap(lambda _: linear())(jnp.arange(4)))
    stacks = stacks(jnp.arange(2))
    assert isinstance(stacks, rx.Batched[inner, "m"])
    assert isinstance(stacks, rx.Batched[Linear, "2 4"])
    assert not isinstance(stacks, inner)
    assert not isinstance(stack, rx.Batched[inner, "m"])


def test_batched_along_another_axis():
    stack = rx.filter_vmap(lambda _: linear(), out_axes=eqx.if_array(-1))(jnp.arange(4))
    assert isinstance(stack, rx.Batched[Linear, "4"])


def test_arrays_of_several_sizes_are_stacked_along_the_axis_that_they_share():
    class Table(rx.Module):
        columns: rx.Ref[dict[str, Float[Array, "_"]]]

    make = lambda x: Table({"a": x * jnp.ones(3), "b": x * jnp.ones(2)})
    stack = rx.filter_vmap(make, out_axes=1)(jnp.arange(4.0))
    stack.columns.value = {"a": jnp.zeros((3, 4)), "b": jnp.zeros((2, 4))}
    for rows, found in ((4, r"\(4,\) and \(5,\)"), (5, r"\(5,\)")):
        wrong = {"a": jnp.zeros((3, rows)), "b": jnp.zeros((2, 5))}
        with raises(rx.RefTypeError, match=rf"stack are {found} instead of \(4,\)"):
            stack.columns.value = wrong


def test_batched_as_a_field():
    class Deep(rx.Module):
        layers: rx.Batched[Linear, "depth"]
        scale: rx.Param[Float[Array, "depth"]]

    stack = rx.filter_vmap(lambda _: linear())(jnp.arange(4))
    Deep(stack, jnp.ones(4))
    with raises(rx.RefTypeError, match=r"`Deep.scale` .*depth=4"):
        Deep(stack, jnp.ones(3))
    with raises(
        rx.RefTypeError, match=r"`Deep.layers` .*: no array in it is stacked along one"
    ):
        Deep(linear(), jnp.ones(4))


def test_a_part_of_a_stack_may_be_one_for_all():
    class Block(rx.Module):
        own: Linear
        shared: Linear

    class Deep(rx.Module):
        blocks: rx.Batched[Block, "depth"]

    make = rx.filter_vmap(lambda shared, _: Block(linear(), shared), in_axes=(None, 0))
    shared = linear()
    deep = Deep(make(shared, jnp.arange(4)))
    assert deep.blocks.shared.weight is shared.weight
    one_for_all = rx.axes({rx.path("shared.**"): None}, default=0)
    shapes = []

    def step(_, block):
        shapes.append((block.own.weight.shape, block.shared.weight.shape))
        return None, None

    rx.scan(step, None, deep.blocks, in_axes=one_for_all)
    assert set(shapes) == {(shared.weight.shape,) * 2}
    # As many axes as the stack has, or none.
    partly = Block(
        rx.filter_vmap(lambda _: make(shared, jnp.arange(4)).own)(jnp.arange(2)),
        rx.filter_vmap(lambda _: linear())(jnp.arange(2)),
    )
    assert not isinstance(partly, rx.Batched[Block, "a b"])
    assert not isinstance(Block(linear(), shared), rx.Batched[Block, "a"])


def test_what_is_one_for_all_is_not_known_of_modules_that_declare_nothing():
    class Deep(rx.Module):
        blocks: rx.Batched[tuple, "depth"]
        shared: eqx.nn.Linear | None = None

    stack = rx.filter_vmap(lambda key: rx.nn.Linear(3, 2, key=key))(
        jr.split(jr.key(0), 4)
    )
    shared = rx.nn.Linear(3, 2, key=jr.key(0))
    text = r"different sizes, 4 of `.*` and 2 of `.*`: .* hold the array in a field next to"
    with raises(rx.RefTypeError, match=text):
        Deep((stack, shared))
    assert Deep((stack,), shared).shared is shared  # the remedy


def test_batched_of_modules_that_declare_nothing_goes_by_leading_axes():
    keys = jr.split(jr.key(0), 4)
    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 2, key=key))(keys)
    assert isinstance(stack, rx.Batched[eqx.nn.Linear, "4"])
    assert not isinstance(stack, rx.Batched[eqx.nn.Linear, "5"])


@pytest.mark.parametrize("axes", ["...", "*n", "a *n"])
def test_an_axis_of_batched_stands_for_one(axes):
    with raises(ValueError, match="must stand for one axis"):
        rx.Batched[Linear, axes]


def test_batched_takes_a_type_and_axes():
    with raises(TypeError, match=r'rx.Batched\[Linear, "n"\]'):
        rx.Batched[Linear]


# While tracing, and what it costs.


def test_a_write_is_checked_while_tracing_and_only_then(trace_counter, monkeypatch):
    from refx_eqx._fields import _bound

    model = linear()
    checked = trace_counter(_bound.BoundType.checked)
    monkeypatch.setattr(_bound.BoundType, "checked", checked)

    @rx.filter_jit
    def step(model, x):
        model.weight.value = model.weight.value * x

    step(model, jnp.array(2.0))
    while_tracing = checked.counter.count
    assert while_tracing > 0
    for _ in range(3):
        step(model, jnp.array(2.0))
    assert checked.counter.count == while_tracing


def test_equal_declarations_share_a_compiled_program(trace_counter):
    counted = trace_counter(lambda model, x: model.weight.value @ x)
    step = rx.filter_jit(counted)
    for _ in range(3):
        step(linear(), jnp.ones(3))
    assert counted.counter.count == 1


def test_what_an_annotation_says_is_worked_out_once(trace_counter, monkeypatch):
    from refx_eqx._fields._annotation import Annotation

    read = trace_counter(Annotation.declared)
    monkeypatch.setattr(Annotation, "declared", read)

    class Model(rx.Module):
        weight: rx.Param[Float[Array, "n"]]

    once = read.counter.count
    assert once > 0
    for n in range(3):
        Model(jnp.ones(n))
    assert read.counter.count == once


# The switch.


def test_the_switch_turns_all_checks_off():
    model = linear()
    with rx.config(check_types=False):
        model.weight.value = jnp.ones((7, 7))
        Linear(jnp.ones(3)).weight.value = 5
        rx.reref(rx.deref(model))
    with pytest.raises(rx.RefTypeError):
        linear().weight.value = jnp.ones((7, 7))


def test_the_switch_is_of_one_thread():
    seen = []
    with rx.config(check_types=False):
        thread = threading.Thread(target=lambda: seen.append(rx.config.check_types))
        thread.start()
        thread.join()
        assert not rx.config.check_types
    assert seen == [True] and rx.config.check_types
    assert repr(rx.config) == "rx.config(check_types=True)"


def test_the_switch_ends_with_its_block():
    with pytest.raises(KeyError), rx.config(check_types=False):
        with rx.config(check_types=True):
            assert rx.config.check_types
        assert not rx.config.check_types
        raise KeyError
    assert rx.config.check_types


def test_the_switch_for_the_whole_program():
    rx.config.check_types = False
    try:
        Linear(jnp.ones(3))
    finally:
        rx.config.check_types = True
    with pytest.raises(rx.RefTypeError):
        Linear(jnp.ones(3))


def test_the_switch_of_jaxtyping_is_honoured(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert not rx.config.check_types
    Linear(jnp.ones(3)).weight.value = jnp.ones(4)


@pytest.mark.parametrize(
    ("value", "printed"),
    [("0", "False"), ("true", "True"), ("maybe", "REFX_CHECK_TYPES=0")],
)
def test_the_environment_variable(value, printed):
    code = "import refx_eqx as rx; print(rx.config.check_types)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"REFX_CHECK_TYPES": value, "JAX_PLATFORMS": "cpu", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert printed in done.stdout + done.stderr


def test_what_was_written_unchecked_is_checked_at_the_next_write():
    class Linear(rx.Module):
        weight: rx.Param[Float[Array, "out in"]]

    linear = Linear(jnp.ones((2, 3)))
    wrong = jnp.ones(5)
    with rx.config(check_types=False):
        linear.weight.value = wrong
    for _ in range(2):
        with raises(rx.RefTypeError, match=r"declared .* and cannot hold f32\[5\]"):
            linear.weight.value = wrong
        with raises(rx.RefTypeError, match=r"cannot hold f32\[5\]"):
            linear.weight.value += 1.0
        with raises(rx.RefTypeError, match=r"cannot hold f32\[5\]"):
            rx.clone(linear)
    linear.weight.value = 2 * jnp.ones((2, 3))  # what is right is taken
    linear.weight.value += 1.0
    assert rx.clone(linear).weight[0, 0] == 3.0


def test_a_write_leaves_no_scope_of_names_behind():
    from jaxtyping import _storage

    class Pair(rx.Module):
        first: rx.Param[Float[Array, "n"]]

    pair = Pair(jnp.ones(2))
    with pytest.raises(rx.RefTypeError):
        pair.first.value = jnp.ones(3)
    pair.first.value = jnp.zeros(2)
    assert not vars(_storage._shape_storage).get("memo_stack")


def test_what_stands_beside_a_type_in_annotated_says_nothing():
    class Model(rx.Module):
        scale: rx.Ref[Annotated[Float[Array, "n"], "the scale"]]

    model = Model(jnp.ones(2))
    with raises(rx.RefTypeError, match=r"cannot hold f32\[2,2\]"):
        model.scale.value = jnp.ones((2, 2))
    model.scale.value = jnp.zeros(2)


def test_a_bare_module_is_not_checked_where_checks_are_off():
    class Bare(eqx.Module):
        w: rx.Param[Float[Array, "n"]] = rx.field()

    with raises(rx.RefTypeError, match=r"cannot hold f32\[2,2\]"):
        Bare(jnp.ones((2, 2)))
    with rx.config(check_types=False):
        assert Bare(jnp.ones((2, 2))).w.shape == (2, 2)


class Ends(rx.Module):
    ends: tuple[rx.Param[Float[Array, "n"]], rx.Param[Float[Array, "m"]]]


def test_each_ref_of_a_tuple_keeps_its_own_type_in_a_pickle():
    first, last = pickle.loads(pickle.dumps(Ends((jnp.ones(2), jnp.ones(3))))).ends
    first.value, last.value = jnp.zeros(2), jnp.zeros(3)
    for ref, n in [(first, 3), (last, 2)]:
        with raises(rx.RefTypeError, match=r"`Ends.ends\[.*cannot hold"):
            ref.value = jnp.zeros(n)


def test_an_instance_of_sizes_that_are_known_is_not_checked_again(monkeypatch):
    class Known(rx.Module):
        first: rx.Param[Float[Array, "n"]]
        second: rx.Param[Float[Array, "n"]]

    checked, check = [], DeclaredRef.check

    def counted(self, *args):
        checked.append(self)
        check(self, *args)

    monkeypatch.setattr(DeclaredRef, "check", counted)
    for n, expected in [(2, 2), (2, 2), (3, 4), (2, 4), (3, 4)]:
        known = Known(jnp.zeros(n), jnp.zeros(n))
        assert len(checked) == expected
        with raises(rx.RefTypeError, match=f"n={n}"):
            known.first.value = jnp.zeros(5)


def test_methods_bind_no_names_where_checks_are_off():
    class Scale(rx.Module):
        by: rx.Param[Float[Array, "n"]]

        @jaxtyped(typechecker=beartype)
        def __call__(self, x: Float[Array, "n"]):
            return x

    scale = Scale(jnp.ones(2))
    with pytest.raises(jaxtyping.TypeCheckError):
        scale(jnp.ones(3))
    with rx.config(check_types=False):
        assert scale(jnp.ones(3)).shape == (3,)


@pytest.mark.parametrize(
    "unchecked, value",
    [
        (jnp.ones(7), jnp.ones(7)),
        (jnp.ones(7), jnp.ones(7, int)),
        (jnp.ones(2, int), jnp.ones(2, int)),
    ],
)
def test_after_a_write_without_checks_no_remedy_goes_by_what_was_written(
    unchecked, value
):
    class Bias(rx.Module):
        bias: rx.Param[Float[Array, "n"]]

    made = Bias(jnp.ones(2))
    with rx.config(check_types=False):
        made.bias.value = unchecked
    with raises(rx.RefTypeError, match=r"for other sizes, make a new module\.$"):
        made.bias.value = value
    made.bias.value = jnp.zeros(2)
    with raises(rx.RefTypeError, match=r"Convert it: `value\.astype\(ref\.dtype\)`"):
        made.bias.value = jnp.ones(2, int)
    made.bias.value = jnp.ones(2, int).astype(made.bias.dtype)
