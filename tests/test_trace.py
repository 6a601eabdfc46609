"""Where a ref may be touched: everywhere that gives the right number, nowhere else."""

import functools
import gc
import threading
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from raising import raises

import refx_eqx as rx


class Scale(rx.Module):
    factor: rx.Param[jax.Array]

    def __call__(self, x):
        return self.factor[...] * x


class Norm(rx.Module):
    mean: rx.BatchStat[jax.Array]

    def __call__(self, x):
        self.mean.value = 0.5 * self.mean.value + 0.5 * x
        return x


def make(value=2.0):
    return Scale(jnp.array(value))


ONE = jnp.array(1.0)


#
# A closure used before and after a write. JAX caches most of these bodies by the function
# object: a body that reads a ref is silently stale when it runs again.
#


def over_jit(f):
    return jax.jit(f)


def over_scan(f):
    def body(carry, _):
        return f(carry), None

    return lambda x: lax.scan(body, x, None, length=1)[0]


def over_cond(f):
    def other(x):
        return x

    return lambda x: lax.cond(x > 0, f, other, x)


def over_while_loop(f):
    def test(carry):
        return carry[0] < 1

    def body(carry):
        return carry[0] + 1, f(carry[1])

    return lambda x: lax.while_loop(test, body, (0, x))[1]


def over_fori_loop(f):
    def body(_, x):
        return f(x)

    return lambda x: lax.fori_loop(0, 1, body, x)


def over_map(f):
    return lambda x: lax.map(f, x[None])[0]


def over_checkpoint(f):
    return jax.checkpoint(f)


def over_custom_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda x: (f(x), None), lambda _, t: (t,))
    return g


def over_vmap(f):
    return lambda x: jax.vmap(f)(x[None])[0]


def over_grad(f):
    # The ref is a constant to it, so the right answer is the value.
    return jax.grad(f)


def over_jvp(f):
    return lambda x: jax.jvp(f, (x,), (x,))[1]


def over_linearize(f):
    return lambda x: jax.linearize(f, x)[1](x)


CLOSURES = [
    over_jit,
    over_scan,
    over_cond,
    over_while_loop,
    over_fori_loop,
    over_map,
    over_checkpoint,
    over_custom_vjp,
    over_vmap,
    over_grad,
    over_jvp,
    over_linearize,
]
RIGHT_EAGERLY = {over_vmap, over_custom_vjp}
RIGHT_INSIDE_JIT = {over_vmap}

by_name = pytest.mark.parametrize("over", CLOSURES, ids=lambda over: over.__name__)


@by_name
def test_a_closure_used_before_and_after_a_write(over):
    model = make(2.0)

    def f(x):
        return model.factor.value * x

    g = over(f)

    def check(right):
        if over in RIGHT_EAGERLY:
            assert g(ONE) == right
        else:
            with raises(
                rx.TraceLevelError,
                match=r"Cannot read ref from different trace level: `Scale.factor` \(coll",
            ):
                g(ONE)

    check(2.0)
    check(2.0)  # whatever is cached by now
    model.factor.value = jnp.array(5.0)
    check(5.0)


@by_name
def test_a_closure_used_before_and_after_a_write_inside_a_lifted_jit(over):
    @rx.filter_jit
    def step(model, x):
        def f(x):
            return model.factor.value * x

        g = over(f)
        before = g(x)
        model.factor.value = model.factor.value + 3.0
        return before, g(x)

    model = make(2.0)
    if over in RIGHT_INSIDE_JIT:
        assert step(model, ONE) == (2.0, 5.0)
        assert step(model, ONE) == (5.0, 8.0)
        assert model.factor.value == 8.0
    else:
        for _ in range(2):
            with raises(
                rx.TraceLevelError,
                match=r"Cannot read ref from different trace level: `Scale.factor` \(coll",
            ):
                step(model, ONE)
        assert model.factor.value == 2.0


@by_name
def test_a_closure_that_takes_the_value_as_an_argument_is_right(over):
    # What the messages advise, for code that is to use plain JAX: pass the value.
    @rx.filter_jit
    def step(model, x):
        def f(pair):
            return pair * pair

        g = over(f)
        before = g(model.factor.value)
        model.factor.value = model.factor.value + 1.0
        return before, g(model.factor.value)

    def plain(w):
        g = over(lambda w: w * w)
        return g(w), g(w + 1.0)

    model = make(2.0)
    assert step(model, ONE) == plain(jnp.array(2.0))
    assert step(model, ONE) == plain(jnp.array(3.0))


@by_name
def test_a_closure_that_writes_is_refused(over):
    model = make(2.0)

    def f(x):
        model.factor.value = jnp.array(7.0)
        return x

    g = over(f)
    if over is over_custom_vjp:  # evaluates: a plain call
        assert g(ONE) == 1.0 and model.factor.value == 7.0
        return
    for _ in range(2):
        with raises(
            rx.TraceLevelError,
            match=(
                r"Cannot mutate ref from different trace level: `Scale.factor` \(collection"
                r" 'params'\): it is written inside .*, but was created outside. Pass the "
                r"ref, or the module that holds it, as an argument to a lifted transform"
            ),
        ):
            g(ONE)
    assert model.factor.value == 2.0


def test_closures_are_right_without_jit():
    model = make(2.0)

    def f(x):
        return model.factor.value * x

    with jax.disable_jit():
        for over in (over_jit, over_scan, over_cond, over_while_loop, over_fori_loop):
            g = over(f)
            model.factor.value = jnp.array(2.0)
            assert g(ONE) == 2.0
            model.factor.value = jnp.array(5.0)
            assert g(ONE) == 5.0


def test_lifted_transforms_work_without_jit():
    model, norm = make(2.0), Norm(jnp.array(0.0))

    @rx.filter_jit
    def step(model, norm, x):
        norm(x)
        grads = rx.filter_grad(lambda m: m(x))(model)
        model.factor.value -= grads.factor.value
        return model(x)

    with jax.disable_jit():
        assert step(model, norm, jnp.array(1.0)) == 1.0
    assert norm.mean.value == 0.5
    assert step(model, norm, jnp.array(1.0)) == 0.0


#
# A module of refs as an argument of a plain transform.
#

AS_ARRAY = (
    r"Cannot use ref as an array: `Scale.factor` \(collection 'params'\) was given to JAX "
    r"or NumPy as if it were one.*To pass it to a transform, use the lifted one of the "
    r"same name"
)
STAGED = (
    r"Cannot read ref from different trace level: `Scale.factor` \(collection 'params'\): "
    r"it is used inside a function that JAX stages out .*, which does not carry refs. Use "
    r"the lifted transform"
)
DIFFERENTIATED = (
    r"`Scale.factor` \(collection 'params'\): it is used inside a function that JAX "
    r"differentiates \(grad, vjp, linearize\), which does not carry refs. Use the lifted"
)


def loss(model, x):
    return model(x)


def plain_scan(f):
    def body(model, x):
        return model, f(model, x)

    return lambda model, x: lax.scan(body, model, x[None])


@pytest.mark.parametrize(
    "transform, message",
    [
        (jax.jit, AS_ARRAY),
        (jax.grad, AS_ARRAY),
        (jax.value_and_grad, AS_ARRAY),
        (jax.vmap, AS_ARRAY),
        (jax.checkpoint, AS_ARRAY),
        (plain_scan, AS_ARRAY),
        (lambda f: lambda m, x: lax.cond(True, f, f, m, x), AS_ARRAY),
        (lambda f: lambda m, x: lax.map(lambda m: f(m, x), m), AS_ARRAY),
        (lambda f: lambda m, x: jax.eval_shape(f, m, x), AS_ARRAY),
        (lambda f: lambda m, x: jax.jvp(f, (m, x), (m, x)), AS_ARRAY),
        (eqx.filter_jit, STAGED),
        (eqx.filter_checkpoint, STAGED),
        (lambda f: functools.partial(eqx.filter_eval_shape, f), STAGED),
        (eqx.filter_grad, DIFFERENTIATED),
        (eqx.filter_value_and_grad, DIFFERENTIATED),
        (lambda f: functools.partial(eqx.filter_vjp, f), DIFFERENTIATED),
    ],
)
def test_a_plain_transform_given_a_module_of_refs_raises(transform, message):
    model = make()
    x = jnp.ones(1) if transform is jax.vmap else ONE
    with raises(rx.TraceLevelError, match=message):
        transform(loss)(model, x)
    assert model.factor.value == 2.0


def test_the_remedies_of_those_messages_run():
    model = make()
    assert rx.filter_jit(loss)(model, ONE) == 2.0
    assert rx.filter_grad(loss)(model, ONE).factor.value == 1.0
    assert rx.filter_vmap(loss, in_axes=(None, 0))(model, jnp.ones(1))[0] == 2.0
    opened = rx.deref(model)
    assert jax.jit(lambda m, x: rx.reref(m)(x))(opened, ONE) == 2.0
    assert jax.grad(lambda m, x: rx.reref(m)(x))(opened, ONE).factor.value == 1.0
    _, outs = lax.scan(lambda m, x: (m, rx.reref(m)(x)), opened, jnp.ones(3))
    assert outs.tolist() == [2.0, 2.0, 2.0]


def test_a_module_that_is_itself_transformed_raises_or_is_right():
    model = make()
    with raises(rx.TraceLevelError, match=STAGED):
        eqx.filter_jit(model)(ONE)
    with raises(rx.TraceLevelError, match=STAGED):
        jax.jit(model)(ONE)
    with raises(rx.TraceLevelError, match=DIFFERENTIATED):
        jax.grad(model)(ONE)
    assert rx.filter_jit(model)(ONE) == 2.0
    model.factor.value = jnp.array(5.0)
    assert rx.filter_jit(model)(ONE) == 5.0


def test_plain_vmap_reads():
    model = make()
    xs = jnp.arange(3.0)
    assert jax.vmap(model)(xs).tolist() == [0.0, 2.0, 4.0]
    assert jax.vmap(lambda x: model(x))(xs).tolist() == [0.0, 2.0, 4.0]
    assert jax.vmap(jax.vmap(model))(xs[None]).tolist() == [[0.0, 2.0, 4.0]]
    assert eqx.filter_vmap(model)(xs).tolist() == [0.0, 2.0, 4.0]
    assert eqx.filter_vmap(loss, in_axes=(None, 0))(model, xs).tolist() == [
        0.0,
        2.0,
        4.0,
    ]
    assert jnp.vectorize(model)(xs).tolist() == [0.0, 2.0, 4.0]
    model.factor.value = jnp.array(3.0)
    assert jax.vmap(model)(xs).tolist() == [0.0, 3.0, 6.0]


def test_plain_vmap_reads_inside_lifted_transforms():
    model = make()
    xs = jnp.arange(3.0)

    @rx.filter_jit
    @rx.filter_value_and_grad
    def total(model, xs):
        return jnp.sum(jax.vmap(model)(xs))

    value, grads = total(model, xs)
    assert value == 6.0 and grads.factor.value == 3.0


@pytest.mark.parametrize("vmap", [jax.vmap, eqx.filter_vmap])
def test_plain_vmap_does_not_write(vmap):
    norm = Norm(jnp.array(0.0))
    with raises(
        rx.TraceLevelError,
        match=(
            r"Cannot mutate ref from different trace level: `Norm.mean` \(collection "
            r"'batch_stats'\): it is written inside a function under vmap, but was created"
        ),
    ):
        vmap(norm)(jnp.arange(3.0))
    assert norm.mean.value == 0.0


@pytest.mark.parametrize("transform", [jax.grad, over_vmap], ids=["grad", "vmap"])
def test_a_constant_written_inside_is_refused_too(transform):
    # A constant is no tracer: only the trace of the ref tells.
    ref = rx.Ref(jnp.array(0.0))

    def f(x):
        ref.value = jnp.array(1.0)
        return x

    with raises(rx.TraceLevelError, match=r"Cannot mutate ref from different trace"):
        transform(f)(ONE)
    assert ref.value == 0.0


def test_a_tracer_of_an_inner_trace_cannot_be_kept():
    def f(x):
        ref = rx.Ref(x)
        kept = []

        def inner(y):
            kept.append(y)
            return y

        jax.vmap(inner)(x[None])
        with raises(
            rx.TraceLevelError,
            match=(
                r"Cannot mutate ref from different trace level: an unnamed ref \(no "
                r"collection\): the value is a tracer of a function under vmap that is not "
                r"active here. Return the value from that function instead."
            ),
        ):
            ref.value = kept.pop()
        return ref.value

    with jax.check_tracer_leaks(False):
        assert f(ONE) == 1.0
        assert jax.jit(f)(ONE) == 1.0


def test_a_tracer_in_a_nested_value_is_noticed():
    ref = rx.Ref({"a": jnp.array(0.0)})
    kept = []
    with jax.check_tracer_leaks(False):
        jax.jit(lambda x: kept.append(x))(ONE)
    with raises(rx.TraceLevelError, match=r"the value is a tracer of"):
        ref.value = {"a": kept.pop()}
    assert ref.value["a"] == 0.0


def test_refs_may_be_made_and_used_inside_any_transform():
    def f(x):
        ref = rx.Ref(x)
        ref.value = ref.value * 2
        ref[...] += 1.0
        return ref.value

    for over in CLOSURES:
        if over in (over_grad, over_jvp, over_linearize):
            assert over(f)(ONE) == 2.0
        else:
            assert over(f)(ONE) == 3.0


#
# Refs that outlive their trace, and names that go around the boundary.
#


@pytest.mark.parametrize("over", [over_jit, over_vmap, over_grad, over_scan])
def test_a_ref_that_outlives_its_trace_raises(over):
    kept = []

    def f(x):
        kept.append(rx.Ref(x, "cache"))
        return x

    with jax.check_tracer_leaks(False):
        over(f)(ONE)
        ref = kept.pop()
        touches = [
            lambda: ref.value,
            lambda: ref[...],
            lambda: rx.deref(ref),
            lambda: rx.snapshot([ref]),
            lambda: rx.filter_jit(lambda r: r.value)(ref),
            lambda: jax.vmap(lambda x: ref.value * x)(jnp.ones(2)),
        ]
        for touch in touches:
            with raises(
                rx.TraceLevelError,
                match=r"Cannot read ref .*\(collection 'cache'\): it (was created inside a transform|belongs to a trace)",
            ):
                touch()
        with raises(
            rx.TraceLevelError,
            match=r"Cannot mutate ref .*\(collection 'cache'\): it (was created inside a transform|belongs to a trace)",
        ):
            ref.value = jnp.array(0.0)
        assert isinstance(repr(ref), str)  # a debugger may still show it


def test_a_ref_that_is_returned_is_right():
    # What the message of a ref that outlives its trace advises.
    @rx.filter_jit
    def f(x):
        return rx.Ref(x * 2, "cache")

    assert f(ONE).value == 2.0


@pytest.mark.parametrize("name", ["filter_jit", "filter_vmap", "filter_checkpoint"])
def test_a_ref_that_a_plain_transform_returned_needs_the_lifted_one(name):
    xs = jnp.ones(3)
    with jax.check_tracer_leaks(False):
        scale = getattr(eqx, name)(Scale)(xs)
        with raises(
            rx.TraceLevelError, match="lifted transform.*do not carry refs out"
        ):
            scale.factor.value  # noqa: B018
    assert (getattr(rx, name)(Scale)(xs).factor.value == xs).all()


def test_a_global_is_refused_in_a_lifted_jit():
    @rx.filter_jit
    def f(x):
        return GLOBAL(x)

    @rx.filter_jit
    def write(x):
        GLOBAL.factor.value = x

    with raises(
        rx.TraceLevelError,
        match=(
            r"`Scale.factor` \(collection 'params'\): it is used inside the body of "
            r"`filter_jit`, but was not passed in: refs reached through a global "
            r"name, .* are not carried. Pass the ref, or the module that holds it"
        ),
    ):
        f(ONE)
    with raises(
        rx.TraceLevelError,
        match=r"it is written inside the body of `filter_jit`, but was created outside",
    ):
        write(ONE)
    assert GLOBAL.factor.value == 2.0
    assert rx.filter_jit(loss)(GLOBAL, ONE) == 2.0  # the remedy


@pytest.mark.parametrize("transform", [rx.filter_jit, rx.filter_vmap])
def test_a_global_that_is_returned_untouched_is_refused(transform):
    with raises(rx.TraceLevelError, match="cannot return `Scale.factor`.*Pass"):
        transform(lambda x: (x, GLOBAL.factor))(jnp.ones(2))
    axes = (
        {} if transform is rx.filter_jit else {"in_axes": (0, None), "out_axes": None}
    )
    returned = transform(lambda x, ref: ref, **axes)(jnp.ones(2), GLOBAL.factor)
    assert returned is GLOBAL.factor


def test_a_global_may_be_read_where_nothing_is_cached():
    assert rx.filter_vmap(lambda x: GLOBAL(x))(jnp.ones(2)).tolist() == [2.0, 2.0]
    assert rx.filter_grad(lambda x: GLOBAL(x))(ONE) == 2.0


def over_mesh(f):
    mesh = jax.make_mesh((1,), ("x",))
    return rx.filter_shard_map(f, mesh=mesh, in_specs=jax.P(), out_specs=jax.P())


def test_a_global_that_a_shard_reaches_raises():
    for touch in (
        lambda x: GLOBAL(x),
        lambda x: setattr(GLOBAL.factor, "value", x),
    ):
        with raises(rx.TraceLevelError, match=r"body of `filter_shard_map`"):
            over_mesh(touch)(ONE)
    assert GLOBAL.factor.value == 2.0
    assert over_mesh(loss)(GLOBAL, ONE) == 2.0  # the remedy


def test_the_outer_name_of_what_is_carried_raises():
    # In a loss that uses the outer name of the model, its gradient would be zero.
    def wrong(model, x):
        return GLOBAL(x)

    transforms = {
        "filter_grad": rx.filter_grad,
        "filter_value_and_grad": rx.filter_value_and_grad,
        "filter_jit": rx.filter_jit,
        "filter_shard_map": over_mesh,
    }
    for name, lifted in transforms.items():
        with raises(
            rx.TraceLevelError,
            match=(
                rf"Cannot read ref .*: `{name}` carries this ref: its function has "
                rf"an inner ref for it.*Use the ref that `{name}` passes to the function"
            ),
        ):
            lifted(wrong)(GLOBAL, ONE)
    assert rx.filter_grad(loss)(GLOBAL, ONE).factor.value == 1.0  # the remedy

    def writes(model, x):
        GLOBAL.factor.value = x
        return x

    with raises(rx.TraceLevelError, match=r"Cannot mutate ref .*carries this ref"):
        rx.filter_grad(writes)(GLOBAL, ONE)
    assert GLOBAL.factor.value == 2.0


def test_the_outer_name_raises_in_a_nested_transform_too():
    def body(model, x):
        return rx.filter_vmap(lambda x: GLOBAL(x))(x[None])[0]

    with raises(rx.TraceLevelError, match=r"`filter_grad` carries this ref"):
        rx.filter_grad(body)(GLOBAL, ONE)


def test_the_inner_name_can_be_read_in_a_nested_transform():
    def body(model, x):
        return rx.filter_vmap(lambda x: model(x))(x[None])[0]

    assert rx.filter_grad(body)(make(), ONE).factor.value == 1.0


def test_a_body_that_raises_leaves_no_mark():
    model = make()

    def fails(model):
        raise ZeroDivisionError

    vmap = rx.filter_vmap(in_axes=None, axis_size=2)
    for lifted in (rx.filter_jit, rx.filter_grad, vmap, over_mesh):
        with pytest.raises(ZeroDivisionError):
            lifted(fails)(model)
        model.factor.value = model.factor.value + 1.0
    assert model.factor.value == 6.0


def test_deref_clone_and_dag_obey_the_rule():
    model = make()
    for touch in (
        rx.deref,
        rx.clone,
        rx.snapshot,
        lambda m: jax.tree.leaves(rx.Dag(m)),
    ):

        def f(x, touch=touch):
            touch(model)
            return x

        with raises(rx.TraceLevelError, match=STAGED):
            jax.jit(f)(ONE)


def test_structure_can_be_asked_for_anywhere():
    model = make()

    @jax.jit
    def f(x):
        assert model.factor.collection == "params"
        assert model.factor.name == "Scale.factor"
        assert rx.aliases(model) == {model.factor: ("factor",)}
        assert repr(model.factor) == 'Ref(weak_f32[], "params")'
        rx.filter_spec(model, "params")
        return x

    f(ONE)


def test_a_numpy_value_obeys_the_rule_too():
    ref = rx.Ref(np.ones(2, np.float32))
    f = jax.jit(lambda x: x + ref.value)
    with raises(rx.TraceLevelError, match=r"an unnamed ref \(no collection\): it is"):
        f(jnp.ones(2))
    with raises(rx.TraceLevelError, match=r"Cannot read ref"):
        jax.jit(lambda x: x + ref.shape[0])(1)


def test_shard_map_is_named_in_the_message():
    model = make()
    mesh = jax.make_mesh((1,), ("x",))
    mapped = jax.shard_map(
        lambda x: model(x), mesh=mesh, in_specs=jax.P(), out_specs=jax.P()
    )
    with raises(rx.TraceLevelError, match=r"used inside a function under shard_map,"):
        mapped(ONE)
    assert over_mesh(model)(ONE) == 2.0


def test_ensure_compile_time_eval_does_not_go_round_the_rule():
    model = make()

    def f(model, x):
        with jax.ensure_compile_time_eval():
            return x + model.factor.value

    with raises(rx.TraceLevelError, match=STAGED):
        jax.jit(functools.partial(f, model))(ONE)
    lifted = rx.filter_jit(f)
    assert lifted(model, ONE) == 3.0
    model.factor.value = jnp.array(5.0)
    assert lifted(model, ONE) == 6.0


@pytest.mark.parametrize(
    "transform",
    [
        rx.filter_jit,
        rx.filter_grad,
        functools.partial(rx.filter_vmap, in_axes=(None, None), axis_size=1),
    ],
)
def test_a_callback_may_not_read_an_inner_ref_and_the_remedy_works(transform):
    seen = []

    def run(show):
        @transform
        def fn(x, model):
            show(model.factor)
            return model(x)

        # JAX hands on what a callback raises, or its text in an error of its own.
        with jax.check_tracer_leaks(False):
            jax.block_until_ready(fn(ONE, make()))
            jax.effects_barrier()

    remedy = r"give a callback the value: `jax.debug.callback\(fn, ref.value\)`"
    with raises(Exception, match=remedy):
        run(lambda ref: jax.debug.callback(lambda: seen.append(ref.value)))
    assert not seen
    run(lambda ref: jax.debug.callback(seen.append, ref.value))
    assert seen[0] == 2.0


def test_a_callback_reads_the_present_value():
    model = make()

    def read(x):
        return np.asarray(model.factor.value) * x

    @jax.jit
    def f(x):
        return jax.pure_callback(read, jax.ShapeDtypeStruct((), jnp.float32), x)

    assert f(ONE) == 2.0
    model.factor.value = jnp.array(5.0)
    assert f(ONE) == 5.0


#
# Threads and memory
#


def test_each_thread_has_its_own_traces():
    model = make()
    inside, done = threading.Event(), threading.Event()
    seen = []

    def other():
        inside.wait(10)
        try:
            seen.append(float(model.factor.value))
            model.factor.value = jnp.array(3.0)
        except rx.TraceLevelError as e:
            seen.append(e)
        done.set()

    def body(model):
        inside.set()
        assert done.wait(10)
        return model(ONE)

    thread = threading.Thread(target=other)
    thread.start()
    # The other thread writes during the call, so the call starts again.
    assert rx.filter_jit(body)(model) == 3.0
    thread.join()
    assert seen == [2.0]


def test_threads_that_count_lose_nothing():
    count = rx.Ref(jnp.array(0))

    @rx.filter_jit
    def add(count):
        count.value += 1

    add(count)
    threads = [
        threading.Thread(target=lambda: [add(count) for _ in range(25)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count.value == 101


def test_a_ref_does_not_keep_its_trace_alive():
    # `conftest.py` runs every test under JAX's leak checks; so this call alone checks it.
    made = []

    @jax.jit
    def f(x):
        ref = rx.Ref(x)
        made.append(weakref.ref(ref))
        return ref.value

    f(ONE)
    gc.collect()
    assert made[0]() is None


GLOBAL = make()


@pytest.fixture(autouse=True)
def _fresh_global():
    yield
    assert GLOBAL.factor.value == 2.0
