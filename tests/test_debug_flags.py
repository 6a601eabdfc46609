"""JAX's debug flags mean under every transform what they mean in JAX, and outlive a call."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportAttributeAccessIssue=false

import logging
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax._src import api

import refx_eqx as rx


def _vmap(f, ref, x):
    # All lanes write one value.
    return rx.filter_vmap(lambda ref, x, _: f(ref, x), in_axes=(None, None, 0))(
        ref, x, jnp.arange(2)
    )


def _custom_jvp(f, ref, x):
    @rx.filter_custom_jvp
    def g(x, *, ref):
        return f(ref, x)

    g.def_jvp(lambda primals, tangents, *, ref: (g(primals[0], ref=ref), tangents[0]))
    return rx.filter_grad(lambda x, ref: g(x, ref=ref))(x, ref)


def _custom_vjp(f, ref, x):
    @rx.filter_custom_vjp
    def g(x, ref):
        return f(ref, x)

    g.def_fwd(lambda perturbed, x, ref: (f(ref, x), None))
    g.def_bwd(lambda residuals, grad, perturbed, x, ref: grad)
    return rx.filter_grad(lambda x, ref: g(x, ref))(x, ref)


def _backward_write(f, ref, x):
    @rx.filter_custom_vjp
    def g(x, ref):
        return x

    def bwd(residuals, grad, perturbed, x, ref):
        f(ref, x)
        return grad

    g.def_fwd(lambda perturbed, x, ref: (x, None))
    g.def_bwd(bwd)
    return rx.filter_grad(lambda x, ref: g(x, ref))(x, ref)


def _scan(f, ref, x):
    return rx.scan(lambda ref, x: (ref, f(ref, x)), ref, x[None])


def _while(f, ref, x):
    def body(carry):
        i, x, ref = carry
        f(ref, x)
        return i + 1, x, ref

    return rx.while_loop(lambda carry: carry[0] < 1, body, (0, x, ref))


def _fori(f, ref, x):
    def body(i, carry):
        f(*carry)
        return carry

    return rx.fori_loop(0, 1, body, (ref, x))


# Each calls `f(ref, x)` under a transform, once; and by it, writes `ref`.
TRANSFORMS: dict[str, Callable] = {
    "filter_jit": lambda f, ref, x: rx.filter_jit(f)(ref, x),
    "filter_jit, donating": lambda f, ref, x: rx.filter_jit(f, donate="refs")(ref, x),
    "filter_grad": lambda f, ref, x: rx.filter_grad(lambda x, ref: f(ref, x))(x, ref),
    "filter_jvp": lambda f, ref, x: rx.filter_jvp(f, (ref, x), (None, jnp.array(1.0))),
    "filter_vjp": lambda f, ref, x: rx.filter_vjp(lambda x, ref: f(ref, x), x, ref),
    "filter_linearize": lambda f, ref, x: rx.filter_linearize(f, ref, x),
    "filter_jacfwd": lambda f, ref, x: rx.filter_jacfwd(lambda x, r: f(r, x))(x, ref),
    "filter_jacrev": lambda f, ref, x: rx.filter_jacrev(lambda x, r: f(r, x))(x, ref),
    "filter_hessian": lambda f, ref, x: rx.filter_hessian(lambda x, r: f(r, x))(x, ref),
    "filter_vmap": _vmap,
    "filter_shard_map": lambda f, ref, x: rx.filter_shard_map(
        f, mesh=jax.make_mesh((1,), ("x",)), in_specs=jax.P(), out_specs=jax.P()
    )(ref, x),
    "filter_checkpoint": lambda f, ref, x: rx.filter_checkpoint(f)(ref, x),
    "filter_grad of filter_checkpoint": lambda f, ref, x: rx.filter_grad(
        rx.filter_checkpoint(lambda x, ref: f(ref, x))
    )(x, ref),
    "filter_closure_convert": lambda f, ref, x: rx.filter_closure_convert(f, ref, x)(
        ref, x
    ),
    "filter_custom_jvp": _custom_jvp,
    "filter_custom_vjp": _custom_vjp,
    "a backward rule": _backward_write,
    "lift": lambda f, ref, x: rx.lift(jax.jit)(f)(ref, x),
    "scan": _scan,
    "while_loop": _while,
    "fori_loop": _fori,
    "map": lambda f, ref, x: rx.map(lambda x: f(ref, x), x[None]),
    "map in batches": lambda f, ref, x: rx.map(
        lambda x: (f(ref, ref.value), x)[1], x[None], batch_size=1
    ),
    "cond": lambda f, ref, x: rx.cond(True, f, lambda ref, x: x, ref, x),
    "switch": lambda f, ref, x: rx.switch(1, [lambda ref, x: x, f], ref, x),
}

all_transforms = pytest.mark.parametrize("name", TRANSFORMS)


def log(ref, x):
    ref.value = jax.lax.stop_gradient(jnp.log(x))
    return ref.value * x


@pytest.fixture(params=["jax_debug_nans", "jax_debug_infs"])
def flag(request):
    jax.config.update(request.param, True)
    # What ran before in this thread may have left JAX's hook off for good: a split of a key
    # of "rbg", outside all transforms, does.
    api._post_hook_state.set_local(api._nan_check_posthook)
    yield request.param
    jax.config.update(request.param, False)
    api._post_hook_state.set_local(None)


def bad_input(flag: str) -> jax.Array:
    return jnp.array(-1.0 if flag == "jax_debug_nans" else 0.0)


@pytest.fixture
def fast_path():
    """Under its leak checks JAX has none."""
    before = jax.config.jax_check_tracer_leaks
    jax.config.update("jax_check_tracer_leaks", False)
    yield
    jax.config.update("jax_check_tracer_leaks", before)
    # On it, JAX 0.10 does not look for NaNs in what `jax.checkpoint` runs outside of `jit`.
    jax.clear_caches()


@all_transforms
def test_a_transform_leaves_the_checks_for_nans_on(name, flag, fast_path):
    compiled = jax.jit(jnp.log)
    for _ in range(3):
        compiled(jnp.array(2.0))
    TRANSFORMS[name](log, rx.Ref(jnp.array(1.0)), jnp.array(2.0))
    assert jax.config._read(flag)
    with pytest.raises(FloatingPointError):
        compiled(bad_input(flag))


@all_transforms
def test_a_nan_inside_is_reported_and_changes_nothing(name, flag):
    if name == "map in batches":
        ref = rx.Ref(bad_input(flag))
    else:
        ref = rx.Ref(jnp.array(1.0))
    before = ref.value
    run = TRANSFORMS[name]
    for _ in range(3):
        with pytest.raises(FloatingPointError):
            run(log, ref, bad_input(flag))
        assert ref.value is before
    ref.value = jnp.array(2.0)
    run(log, ref, jnp.array(2.0))
    assert jnp.allclose(ref.value, jnp.log(2.0))


@pytest.mark.parametrize("donate", ["none", "refs", "all"])
def test_a_nan_in_a_repeated_call_is_reported_and_changes_nothing(donate, flag):
    ref = rx.Ref(jnp.array(4.0))

    @rx.filter_jit(donate=donate)
    def step(ref, x):
        ref.value = ref.value + jnp.log(x)

    for _ in range(4):  # traced, planned, planned again
        step(ref, jnp.array(1.0))
    before = ref.value
    with pytest.raises(FloatingPointError):
        step(ref, bad_input(flag))
    assert ref.value is before and ref.value == 4.0
    step(ref, jnp.array(1.0))
    assert ref.value == 4.0


@all_transforms
def test_what_jax_lets_pass_passes(name, flag):
    # `jnp.var` works with NaNs inside, and switches the check off for that.
    def f(ref, x):
        ref.value = jax.lax.stop_gradient(jnp.var(jnp.stack([x, x + 1])))
        return ref.value * x

    ref = rx.Ref(jnp.array(1.0))
    TRANSFORMS[name](f, ref, jnp.array(2.0))
    assert jnp.allclose(ref.value, 0.25)


@all_transforms
def test_no_flag_of_jax_is_changed(name):
    def flags():
        names = [x for x in jax.config.values if "debug" in x or "check" in x]
        names += ["jax_disable_jit", "jax_log_compiles", "jax_traceback_filtering"]
        return {name: jax.config._read(name) for name in names}

    before = flags()
    assert "jax_debug_nans" in before and "jax_check_tracer_leaks" in before
    with jax.debug_nans(True), jax.checking_leaks():
        inside = jax.config.jax_debug_nans, jax.config.jax_check_tracer_leaks
        TRANSFORMS[name](log, rx.Ref(jnp.array(1.0)), jnp.array(2.0))
        assert inside == (
            jax.config.jax_debug_nans,
            jax.config.jax_check_tracer_leaks,
        )
        assert inside == (True, True)
    assert flags() == before


def test_compilations_are_logged(caplog):
    def f(ref, x):
        ref.value += x

    ref, x = rx.Ref(jnp.array(1.0)), jnp.array(2.0)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        rx.filter_jit(f)(ref, x)
        assert any("Compiling jit(" in x.getMessage() for x in caplog.records)
        caplog.clear()
        rx.filter_jit(f)(ref, x)  # the same program
        assert caplog.records == []


def test_a_leak_is_found_as_by_equinox():
    class Kept:
        x = None

    def leak(x):
        Kept.x = x
        return x * 2

    def raised(run) -> type:
        with pytest.raises(Exception) as info:
            run()
        Kept.x = None
        return info.type

    ref = rx.Ref(jnp.array(1.0))
    with jax.checking_leaks():
        equinox = raised(lambda: eqx.filter_jit(leak)(jnp.array(1.0)))
        ours = raised(lambda: rx.filter_jit(lambda ref: leak(ref.value))(ref))
    assert ours is equinox
    assert ref.value == 1.0
