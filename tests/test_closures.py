"""What a function closes over is carried together with its arguments."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from raising import raises

import refx_eqx as rx


class Scale(rx.Module):
    factor: rx.Param[jax.Array]
    calls: rx.Ref[jax.Array] = rx.field(collection="counts")

    def __call__(self, x):
        self.calls.value += 1
        return self.factor[...] * x


def make(value=2.0):
    return Scale(jnp.array(value), jnp.array(0))


ONE = jnp.array(1.0)
XS = jnp.arange(3.0)


def jitted(fn):
    return rx.filter_jit(fn)(ONE)


def differentiated(fn):
    return rx.filter_grad(fn)(ONE)


def vectorised(fn):
    # The refs of a closure are broadcast, so they are written with one value for all.
    return rx.filter_vmap(fn)(jnp.ones(2))[0]


@pytest.mark.parametrize("call", [jitted, differentiated, vectorised])
def test_a_closure_reads_and_writes(call):
    model = make()

    def f(x):
        return model(x)

    assert call(f) == 2.0
    assert model.calls.value == 1
    model.factor.value = jnp.array(5.0)
    assert call(f) == 5.0
    assert model.calls.value == 2


@pytest.mark.parametrize("call", [jitted, differentiated, vectorised])
def test_a_bound_method_and_a_module_read_and_write(call):
    model = make()
    assert call(model) == 2.0
    assert call(model.__call__) == 2.0
    model.factor.value = jnp.array(5.0)
    assert call(model) == 5.0
    assert call(model.__call__) == 5.0
    assert model.calls.value == 4


@pytest.mark.parametrize("call", [jitted, differentiated, vectorised])
def test_a_partial_reads_and_writes(call):
    model = make()

    def f(model, x, *, power):
        return model(x) * power

    for partial in (functools.partial, eqx.Partial):
        before = model.calls.value
        assert call(partial(f, model, power=3.0)) == 6.0
        assert model.calls.value == before + 1


def test_a_write_seen_by_a_cached_program_is_not_stale(trace_counter):
    ref = rx.Ref(jnp.array(1.0))

    counted = trace_counter(lambda x: ref.value * x)
    g = rx.filter_jit(counted)
    for value in (1.0, 2.0, 3.0):
        ref.value = jnp.array(value)
        assert g(ONE) == value
    assert counted.counter.count == 1


def test_nested_functions():
    ref = rx.Ref(jnp.array(1.0))

    def outer():
        def middle():
            def inner(x):
                ref.value += x
                return ref.value

            return inner

        return middle()

    inner = outer()

    def f(x):
        return inner(x) + inner(x)

    assert rx.filter_jit(f)(ONE) == 5.0
    assert ref.value == 3.0
    assert rx.filter_jit(f)(ONE) == 9.0
    assert ref.value == 5.0


def test_a_function_made_inside_of_the_body():
    ref = rx.Ref(jnp.array(1.0))

    @rx.filter_jit
    def f(x):
        def inner():
            ref.value += x

        inner()
        return ref.value

    assert f(ONE) == 2.0
    assert ref.value == 2.0


def test_a_recursive_function():
    ref = rx.Ref(jnp.array(0))

    def count(n):
        ref.value += 1
        return 1 if n == 0 else count(n - 1) + 1

    assert rx.filter_jit(count)(4) == 5
    assert ref.value == 5
    assert rx.filter_jit(count)(4) == 5
    assert ref.value == 10


def test_mutually_recursive_functions():
    evens, odds = rx.Ref(jnp.array(0)), rx.Ref(jnp.array(0))

    def is_even(n):
        evens.value += 1
        return True if n == 0 else is_odd(n - 1)

    def is_odd(n):
        odds.value += 1
        return False if n == 0 else is_even(n - 1)

    for k in (1, 2):
        assert rx.filter_jit(is_even)(4) is True
        assert (evens.value, odds.value) == (3 * k, 2 * k)
    assert rx.filter_jit(is_odd)(4) is False
    assert (evens.value, odds.value) == (8, 7)


def test_a_recursive_function_without_refs():
    def factorial(n):
        return 1 if n == 0 else n * factorial(n - 1)

    assert rx.filter_jit(factorial)(5) == 120


def test_decorated_functions():
    ref = rx.Ref(jnp.array(0))

    def twice(fn):
        @functools.wraps(fn)
        def wrapper(*args):
            return fn(fn(*args))

        return wrapper

    @rx.filter_jit
    @twice
    def add(x):
        ref.value += 1
        return x + ref.value

    assert add(jnp.array(0)) == 3
    assert ref.value == 2


def test_a_function_as_an_argument():
    ref = rx.Ref(jnp.array(0))

    def count(x):
        ref.value += 1
        return x * ref.value

    @rx.filter_jit
    def apply(fn, x):
        return fn(x) + fn(x)

    assert apply(count, jnp.array(1)) == 3
    assert ref.value == 2
    assert apply(count, jnp.array(1)) == 7
    assert ref.value == 4


def test_a_function_in_a_tree_of_arguments():
    ref = rx.Ref(jnp.array(0))

    def count():
        ref.value += 1

    class Holder(eqx.Module):
        fn: object

    @rx.filter_jit
    def apply(holder, tree):
        holder.fn()
        tree["fns"][0]()

    apply(Holder(count), {"fns": [count]})
    assert ref.value == 2


def test_a_bound_method_as_an_argument():
    model = make()
    out = rx.filter_jit(lambda method, x: method(x))(model.__call__, ONE)
    assert out == 2.0
    assert model.calls.value == 1


def test_a_ref_that_is_both_argument_and_closure_is_one_ref():
    ref = rx.Ref(jnp.array(1.0), "params")

    def f(same, x):
        assert same is ref
        same.value += x
        return ref.value

    assert rx.filter_jit(f)(ref, ONE) == 2.0
    assert ref.value == 2.0


def test_a_gradient_flows_to_what_is_both_argument_and_closure():
    # In a loss that uses the outer name of its model the gradient is not lost.
    model = make()

    def loss(_, x):
        return model(x)

    assert rx.filter_grad(loss)(model, ONE).factor.value == 1.0


def test_sharing_is_kept_between_two_closures():
    a, b = rx.Ref(jnp.array(0)), rx.Ref(jnp.array(10))

    def f():
        a.value += 1
        return a, b

    def g():
        a.value += b.value
        return a

    @rx.filter_jit
    def both(f, g):
        x, y = f()
        assert g() is x and y is not x
        return x

    assert both(f, g) is a
    assert a.value == 11


def test_another_sharing_is_another_program(trace_counter):
    def make_pair(a, b):
        return lambda: a.value, lambda: b.value

    counted = trace_counter(lambda f, g: f() + g())
    lifted = rx.filter_jit(counted)
    a, b = rx.Ref(jnp.array(1)), rx.Ref(jnp.array(2))
    assert lifted(*make_pair(a, b)) == 3
    assert lifted(*make_pair(b, a)) == 3
    assert counted.counter.count == 1
    assert lifted(*make_pair(a, a)) == 2
    assert counted.counter.count == 2


def test_closures_that_are_made_anew_are_not_traced_again(trace_counter):
    traces = 0

    def make_step(ref):
        def step(x):
            nonlocal traces
            traces += 1
            ref.value += x
            return ref.value

        return step

    @rx.filter_jit
    def run(step, x):
        return step(x)

    refs = [rx.Ref(jnp.array(float(i))) for i in range(3)]
    for ref in refs:
        run(make_step(ref), ONE)
    assert [float(ref.value) for ref in refs] == [1.0, 2.0, 3.0]
    assert traces == 1


def test_nonlocal_works_on_cells_without_refs():
    ref = rx.Ref(jnp.array(0))
    traces = 0
    note = None

    @rx.filter_jit
    def f(x):
        nonlocal traces, note
        traces += 1
        note = f"trace {traces}"
        ref.value += 1
        return x

    f(ONE)
    f(ONE)
    assert (traces, note) == (1, "trace 1")
    f(jnp.ones(3))
    assert (traces, note) == (2, "trace 2")
    assert ref.value == 3


def test_a_cell_without_refs_is_read_as_it_is_when_traced():
    scale = 2.0

    def f(x):
        return scale * x

    assert rx.filter_jit(f)(ONE) == 2.0


def test_a_plain_list_in_a_closure_can_be_appended_to():
    seen = []

    @rx.filter_jit
    def f(x):
        seen.append(x.shape)
        return x

    f(ONE)
    f(ONE)
    assert seen == [()]


@pytest.mark.parametrize("call", [jitted, differentiated, vectorised])
def test_rebinding_a_cell_that_holds_refs_is_refused(call):
    ref = rx.Ref(jnp.array(1.0))
    original = ref

    def f(x):
        nonlocal ref
        ref = rx.Ref(x)
        return ref.value

    with raises(
        rx.StructureError,
        match=(
            r"cannot carry back a change of structure: the function changed the callable, "
            r"or what it closes over, in place .*Put changing state into a `rx.Ref`"
        ),
    ):
        call(f)
    assert ref is original and ref.value == 1.0


def test_changing_a_container_of_refs_in_a_closure_is_refused():
    refs = [rx.Ref(jnp.array(1.0))]

    @rx.filter_jit
    def f(x):
        refs.append(rx.Ref(x))

    with raises(rx.StructureError, match=r"cannot carry back a change of structure"):
        f(ONE)
    assert len(refs) == 1

    @rx.filter_jit
    def g(x):  # the remedy: write the ref, return the new tree
        refs[0].value += x
        return [*refs, rx.Ref(x)]

    out = g(ONE)
    assert out[0] is refs[0] and refs[0].value == 2.0 and out[1].value == 1.0


def test_rebinding_outside_is_seen_by_the_next_call():
    ref = rx.Ref(jnp.array(1.0))

    @rx.filter_jit
    def f(x):
        return ref.value * x

    assert f(ONE) == 1.0
    ref = rx.Ref(jnp.array(5.0))
    assert f(ONE) == 5.0


def test_a_cell_that_is_not_filled_yet():
    @rx.filter_jit
    def f(x):
        return later.value * x

    with raises(NameError, match="later"):
        f(ONE)
    later = rx.Ref(jnp.array(3.0))
    assert f(ONE) == 3.0


def test_defaults_and_names_of_a_closure_are_kept():
    ref = rx.Ref(jnp.array(1.0))
    seen = []

    def f(x, scale=2.0, *, shift=1.0):
        seen.append(f.__name__)
        return ref.value * x * scale + shift

    assert rx.filter_jit(f)(ONE) == 3.0
    assert rx.filter_jit(f)(ONE, shift=0.0) == 2.0
    assert rx.filter_jit(f).__name__ == "f"
    assert seen == ["f", "f"]


def test_a_closure_that_is_returned_holds_the_refs_of_the_caller():
    ref = rx.Ref(jnp.array(1.0))

    @rx.filter_jit
    def f(x):
        def add(y):
            ref.value += y
            return ref.value

        return add

    add = f(ONE)
    assert add(jnp.array(2.0)) == 3.0
    assert ref.value == 3.0


def test_a_failed_call_leaves_a_closure_as_it_was():
    ref = rx.Ref(jnp.array(1.0))

    @rx.filter_jit
    def f(x):
        ref.value += x
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        f(ONE)
    assert ref.value == 1.0


def test_lifted_functions_inside_lifted_functions_carry_closures():
    model = make()

    @rx.filter_value_and_grad
    def loss(x):
        return model(x)

    @rx.filter_jit
    def step(x):
        return loss(x)

    value, grad = step(ONE)
    assert (value, grad) == (2.0, 2.0)
    assert model.calls.value == 1


def test_a_lifted_function_as_an_argument_carries_its_closure():
    model = make()
    inner = rx.filter_jit(lambda x: model(x))
    assert rx.filter_jit(lambda f, x: f(x))(inner, ONE) == 2.0
    assert model.calls.value == 1


class Plain:
    """Not a pytree: what it holds cannot be seen."""

    shared = rx.Ref(jnp.array(2.0))

    def __init__(self):
        self.model = make()

    def step(self, x):
        return self.model(x)

    def of_the_class(self, x):
        return self.shared.value * x


class Static(eqx.Module):
    model: Scale = eqx.field(static=True)

    def __call__(self, x):
        return self.model(x)


def with_an_attribute(x):
    return with_an_attribute.model(x)  # pyright: ignore[reportFunctionMemberAccess]


with_an_attribute.model = make()  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.parametrize(
    "call",
    [
        lambda: rx.filter_jit(Plain().step)(ONE),
        lambda: rx.filter_jit(Plain().of_the_class)(ONE),
        lambda: rx.filter_jit(lambda plain, x: plain.step(x))(Plain(), ONE),
        lambda: rx.filter_jit(Static(make()))(ONE),
        lambda: rx.filter_jit(with_an_attribute)(ONE),
    ],
    ids=["self", "class", "argument", "static field", "function attribute"],
)
def test_what_cannot_be_seen_is_named_with_the_remedy(call):
    text = (
        r"a class, a static field, an attribute of a function or a plain Python object "
        r"\(`self`\) are not carried. Pass the ref, or the module that holds it, as an "
        r"argument. A plain object is not a pytree: make it an `rx.Module`, or pass its"
    )
    with raises(rx.TraceLevelError, match=text):
        call()


def test_a_ref_in_a_container_that_is_no_pytree_is_not_carried():
    ref = rx.Ref(ONE)
    cyclic, mixed = [ref], {1: ref, "a": 2}
    cyclic.append(cyclic)  # type: ignore[arg-type]
    text = "pass its contents; nor is a list that holds itself, or a dict whose keys cannot"
    for read in (lambda: cyclic[0].value, lambda: mixed[1].value):  # type: ignore
        with raises(rx.TraceLevelError, match=text):
            rx.filter_jit(read)()
    (held,) = cyclic[:1]  # the remedy
    assert rx.filter_jit(lambda: held.value)() == 1.0


def test_the_remedies_for_a_plain_object_run():
    plain = Plain()
    assert rx.filter_jit(lambda model, x: model(x))(plain.model, ONE) == 2.0

    class Trainer(rx.Module):
        model: Scale

        def step(self, x):
            return self.model(x)

    assert rx.filter_jit(Trainer(plain.model).step)(ONE) == 2.0
    assert plain.model.calls.value == 2


def test_a_third_party_transform_is_given_a_snapshot_or_a_dag():
    model = make()

    def third_party(log_density, *args):
        return jax.jit(jax.grad(log_density))(*args)

    text = r"make `rx.snapshot\(model\)` outside it, to read with `\[\.\.\.\]`, or pass"
    with raises(rx.TraceLevelError, match=text):
        third_party(lambda x: model.factor[...] * x, ONE)
    plain = rx.snapshot(model)
    assert third_party(lambda x: plain.factor * x, ONE) == 2.0
    assert third_party(lambda x, dag: dag.value(x), ONE, rx.Dag(model)) == 2.0


def test_refs_in_default_arguments_are_carried(trace_counter):
    ref, count = rx.Ref(jnp.array(1.0), "params"), rx.Ref(jnp.array(0))

    def f(x, hidden=ref, *, uses=[count]):  # noqa: B006
        uses[0].value += 1
        return hidden.value * x

    counted = trace_counter(f)
    lifted = rx.filter_jit(counted)
    for value in (1.0, 2.0, 3.0):
        ref.value = jnp.array(value)
        assert lifted(ONE) == value
    assert count.value == 3 and counted.counter.count == 1
    assert rx.filter_jit(f)(ONE, rx.Ref(jnp.array(7.0))) == 7.0
    assert rx.filter_grad(lambda same, x: f(x))(ref, ONE).value == 1.0
    assert f.__defaults__ == (ref,) and f.__kwdefaults__ == {"uses": [count]}


def test_the_idiom_of_functions_made_in_a_loop():
    refs = [rx.Ref(jnp.array(float(i))) for i in range(3)]
    fns = [lambda x, ref=ref: ref.value * x for ref in refs]
    run = rx.filter_jit(lambda fns, x: [fn(x) for fn in fns])
    assert run(fns, ONE) == [0.0, 1.0, 2.0]
    refs[1].value = jnp.array(5.0)
    assert run(fns, ONE) == [0.0, 5.0, 2.0]
    assert rx.scan(lambda c, x, ref=refs[2]: (c + ref.value * x, None), ONE, XS)[0] == 7


GLOBAL = make()


def read_global(x):
    return GLOBAL.factor.value * x


def test_a_module_level_global_is_refused_with_the_remedy():
    with raises(
        rx.TraceLevelError,
        match=(
            r"`Scale.factor` \(collection 'params'\): it is used inside the body of "
            r"`filter_jit`, but was not passed in: refs reached through a global "
            r"name, .* are not carried. Pass the ref, or the module that holds it, as an arg"
        ),
    ):
        rx.filter_jit(read_global)(ONE)
    assert rx.filter_jit(lambda model, x: model(x))(GLOBAL, ONE) == 2.0


def test_a_global_function_reached_by_closure_is_refused_too():
    fn = read_global
    with raises(rx.TraceLevelError, match=r"through a global name, .* are not carried"):
        rx.filter_jit(lambda x: fn(x))(ONE)


def test_a_cell_that_is_bound_to_something_else_makes_another_program():
    ref, scale, array = rx.Ref(jnp.array(1.0)), 2.0, jnp.array(1.0)
    traces = 0

    @rx.filter_jit
    def f(x):
        nonlocal traces
        traces += 1
        return ref.value * scale * array * x

    x = jnp.array(1.0)
    assert [float(f(x)) for _ in range(4)] == [2.0] * 4 and traces == 1
    scale = 3.0
    assert [float(f(x)) for _ in range(4)] == [3.0] * 4 and traces == 2
    scale = 2.0
    assert [float(f(x)) for _ in range(4)] == [2.0] * 4 and traces == 2
    array = jnp.array(5.0)
    assert [float(f(x)) for _ in range(4)] == [10.0] * 4 and traces == 3


def test_a_cell_of_a_function_that_is_passed_is_part_of_the_program():
    scale = 2.0

    def g(x):
        return x * scale

    apply = rx.filter_jit(lambda g, x: g(x))
    x = jnp.array(1.0)
    assert [float(apply(g, x)) for _ in range(4)] == [2.0] * 4
    scale = 5.0
    assert [float(apply(g, x)) for _ in range(4)] == [5.0] * 4


def test_a_scan_sees_a_cell_that_was_bound_to_something_else():
    scale = 2.0

    def step(carry, x):
        return carry * scale, x

    xs = jnp.zeros(2)
    assert rx.scan(step, jnp.array(1.0), xs)[0] == 4.0
    scale = 3.0
    assert rx.scan(step, jnp.array(1.0), xs)[0] == 9.0


def test_a_function_that_carries_refs_keeps_its_attributes():
    ref = rx.Ref(jnp.array(2.0))

    def f(x):
        """Says so."""
        return ref.value * f.scale * x, f.__doc__, f.__name__

    f.scale = 3.0  # pyright: ignore[reportFunctionMemberAccess]
    out, doc, name = rx.filter_jit(f)(jnp.array(1.0))
    assert (float(out), doc, name) == (6.0, "Says so.", "f")


@pytest.mark.parametrize("call", [jitted, vectorised])
def test_a_closure_that_is_returned_holds_the_arrays_of_the_trace_too(call):
    ref = rx.Ref(jnp.array(2.0))

    def f(x):
        twice = x * 2

        def g(y, *, once=x):
            return ref.value * twice + once + y

        return g

    make_g = rx.filter_jit(f)
    for value in (1.0, 3.0):
        g = make_g(jnp.array(value))
        assert g(ONE) == 5 * value + 1
        assert rx.filter_jit(g)(ONE) == 5 * value + 1
    ref.value = jnp.array(0.0)
    assert g(ONE) == 4.0


def test_a_closure_over_nothing_but_arrays_of_the_trace_is_returned():
    g, bound = rx.filter_jit(
        lambda x: ((lambda y: x + y), {"fn": functools.partial(max, x)})
    )(ONE)
    assert g(ONE) == 2.0
    assert bound["fn"](jnp.array(0.0)) == 1.0


def test_an_auxiliary_result_may_be_a_closure_over_arrays():
    ref = rx.Ref(jnp.array(2.0))

    def loss(ref, x):
        inside = ref.value * x
        return inside, lambda: inside + ref.value

    (_, aux), _ = rx.filter_value_and_grad(loss, has_aux=True)(ref, ONE)
    assert aux() == 4.0


def test_what_is_no_pytree_may_be_closed_over():
    ref = rx.Ref(jnp.array(2.0))
    mixed = {0: jnp.array(3.0), "x": jnp.array(4.0)}
    cycle: list = [1]
    cycle.append(cycle)

    @rx.filter_jit
    def f(x):
        ref.value += 1
        return ref.value * mixed[0] * mixed["x"] * x + len(cycle)

    assert [float(f(ONE)) for _ in range(3)] == [38.0, 50.0, 62.0]


def test_a_container_that_holds_itself_is_refused_as_an_argument():
    cycle: dict = {"ref": rx.Ref(ONE)}
    cycle["again"] = [(cycle,)]
    calls = (
        lambda: rx.filter_jit(lambda x: x)(cycle),
        lambda: rx.filter_grad(lambda x: x)(cycle),
        lambda: rx.scan(lambda c, x: (c, x), cycle, XS),
        lambda: rx.deref(cycle),
    )
    for call in calls:
        with raises(rx.StructureError, match="A dict holds itself.*Remove the cycle"):
            call()
    cycle["again"] = [(cycle["ref"], cycle["ref"])]  # the remedy: shared, but no cycle
    assert rx.filter_jit(lambda tree: tree["again"][0][1].value)(cycle) == 1.0


def test_a_consumed_state_may_be_closed_over():
    ref = rx.Ref(ONE)
    norm, old = eqx.nn.make_with_state(eqx.nn.StateIndex)(ONE)
    new = old.set(norm, jnp.array(2.0))

    @rx.filter_jit
    def f(x):
        try:
            old.get(norm)
        except ValueError:
            return ref.value * x * new.get(norm)

    assert f(ONE) == 2.0
