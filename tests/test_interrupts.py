"""An exception at any line of a lifted call: all refs are old, or all are new.

`nox -s interrupts` raises in every line of the package that a call runs, for each kind of
call: the first time the line runs, the last time, and once in between (see `injection.py`).
The suite raises at every 97th of these moments, or as `REFX_INTERRUPT_EVERY` says. JAX runs
many more lines, so both raise at fewer of those.
"""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportOptionalOperand=false, reportArgumentType=false

import os
import signal
import threading
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from injection import Injector, JAX, moments, PACKAGE, runs_of
from jax.sharding import PartitionSpec
from jaxtyping import _storage, Array, Float
from raising import raises

import refx_eqx as rx
from refx_eqx._core import _jax, _trace
from refx_eqx._core._ref import commits
from refx_eqx._fields import _construction


EVERY = int(os.environ.get("REFX_INTERRUPT_EVERY", "97"))

ONE = jnp.array(1.0)
XS = jnp.arange(2.0)


def make():
    return [rx.Ref(jnp.array(float(i)), "params") for i in range(3)]


def step(refs, x):
    for ref in refs:
        ref.value = ref.value + x
    return refs[0].value * x


def scanned(refs):
    def body(refs, x):
        step(refs, x)
        return refs, None

    rx.scan(body, refs, XS)


def looped(refs):
    def body(refs):
        step(refs, ONE)
        return refs

    rx.while_loop(lambda refs: refs[0].value < 1, body, refs)


def mapped(refs):
    rx.filter_vmap(lambda refs, x: step(refs, ONE), in_axes=(None, 0))(refs, XS)


class Typed(rx.Module):
    a: rx.Param[Float[Array, "*s"]]
    b: rx.Param[Float[Array, "*s"]]
    c: rx.Param[Float[Array, ""]] | None = None


@rx.filter_jit
def typed_step(module, x):
    step([module.a, module.b, module.c], x)


def typed(refs):
    with rx.config(check_types=True), rx.mutable("params"):
        typed_step(Typed(*refs), ONE)


@rx.filter_custom_jvp
def with_a_rule(x, *, refs):
    return step(refs, x)


@with_a_rule.def_jvp
def _(primals, tangents, *, refs):
    return with_a_rule(*primals, refs=refs), tangents[0]


@rx.filter_custom_vjp
def with_rules(x, refs):
    return x


@with_rules.def_fwd
def _(perturbed, x, refs):
    return x, None


@with_rules.def_bwd
def _(residuals, grad, perturbed, x, refs):
    step(refs, grad)
    return grad


def optimized(refs):
    optimizer = rx.Optimizer(refs, optax.sgd(1.0))
    optimizer.update(refs, rx.deref([rx.Ref(-ONE, "params") for _ in refs]))


def check(refs):
    with jax.check_tracer_leaks(False):  # `eqx.error_if` leaks one, whoever calls it
        checked(refs, ONE)


def first_check(refs):
    with jax.check_tracer_leaks(False):
        rx.filter_jit(lambda r: eqx.error_if(step(r, ONE), ONE > 1, "too large"))(refs)


def functionalized(refs):
    _, updates = rx.functionalize(step)(*rx.deref((refs, ONE)))
    rx.update_refs((refs, ONE), updates)


def evaluated(refs):
    rx.filter_eval_shape(step, refs, ONE)
    rx.filter_make_jaxpr(step)(refs, ONE)
    jitted(refs, ONE)


def branch(refs):
    step(refs, ONE)
    return ONE


MESH = jax.sharding.Mesh(jax.devices()[:2], ("data",))

jitted = rx.filter_jit(step)
donating = rx.filter_jit(step, donate="refs")
compiled = rx.filter_jit(step, donate="refs").lower(make(), ONE).compile()
checked = rx.filter_jit(
    lambda refs, x: eqx.error_if(step(refs, x), x > 1, "too large"), donate="refs"
)
checkpointed = rx.filter_checkpoint(step)
lifted = rx.lift(jax.jit)(step)

CALLS = {
    "filter_jit": lambda refs: jitted(refs, ONE),
    "a first filter_jit": lambda refs: rx.filter_jit(lambda r: step(r, ONE))(refs),
    "donate": lambda refs: donating(refs, ONE),
    "compiled": lambda refs: compiled(refs, ONE),
    "a run-time check": check,
    "filter_grad": lambda refs: rx.filter_grad(step)(refs, ONE),
    "filter_jvp": lambda refs: rx.filter_jvp(step, (refs, ONE), (None, ONE)),
    "filter_vjp": lambda refs: rx.filter_vjp(step, refs, ONE),
    "filter_hessian": lambda refs: rx.filter_hessian(step)(refs, ONE),
    "filter_custom_jvp": lambda refs: rx.filter_grad(with_a_rule)(ONE, refs=refs),
    "filter_custom_vjp": lambda refs: rx.filter_grad(with_rules)(ONE, refs),
    "filter_vmap": mapped,
    "filter_checkpoint": lambda refs: checkpointed(refs, ONE),
    "scan": scanned,
    "map": lambda refs: rx.map(lambda x: step(refs, 0.5), XS),
    "while_loop": looped,
    "fori_loop": lambda refs: rx.fori_loop(
        0, 1, lambda i, r: (step(r, ONE), r)[1], refs
    ),
    "cond": lambda refs: rx.cond(True, step, step, refs, ONE),
    "switch": lambda refs: rx.switch(1, [branch, branch, branch], refs),
    "lift": lambda refs: lifted(refs, ONE),
    "functionalize": functionalized,
    "nested": lambda refs: rx.filter_jit(rx.filter_grad(step))(refs, ONE),
    "update_refs": lambda refs: rx.update_refs(
        refs, [jnp.array(i + 1.0) for i in range(3)]
    ),
    "load_state_dict": lambda refs: rx.load_state_dict(
        refs, {str(i): jnp.array(i + 1.0) for i in range(3)}
    ),
    "Optimizer": optimized,
    "typed": typed,
    "filter_linearize": lambda refs: rx.filter_linearize(step, refs, ONE),
    "filter_jacfwd": lambda refs: rx.filter_jacfwd(step)(refs, ONE),
    "filter_jacrev": lambda refs: rx.filter_jacrev(step)(refs, ONE),
    "filter_closure_convert": lambda refs: rx.filter_closure_convert(step, refs, ONE)(
        refs, ONE
    ),
    "filter_shard_map": lambda refs: rx.filter_shard_map(
        branch, mesh=MESH, in_specs=PartitionSpec(), out_specs=PartitionSpec()
    )(refs),
    "evaluated": evaluated,
    "capture": lambda refs: rx.capture(step)(refs, ONE),
    "a first donate": lambda refs: rx.filter_jit(
        lambda refs: step(refs, ONE), donate="refs"
    )(refs),
    "a first compiled": lambda refs: (
        rx.filter_jit(lambda refs: step(refs, ONE)).lower(refs).compile()(refs)
    ),
    "a first run-time check": first_check,
    "a first filter_checkpoint": lambda refs: rx.filter_checkpoint(
        lambda refs: step(refs, ONE)
    )(refs),
    "a first cond": lambda refs: rx.cond(True, lambda r: step(r, ONE), branch, refs),
    "a first lift": lambda refs: rx.lift(jax.jit)(lambda r: step(r, ONE))(refs),
    "a first nested": lambda refs: rx.filter_jit(
        rx.filter_grad(lambda refs, x: step(refs, x))
    )(refs, ONE),
}


def values(refs):
    gone = _jax.is_deleted
    return [None if gone(ref.value) else float(ref.value) for ref in refs]


def is_clean():
    state = _trace.thread.state
    clean = not state.bodies and not state.calls and not _construction._here.logs
    clean = clean and not _trace.guards.running() and not rx.config._here.running()
    clean = clean and not _storage._has_shape_memo()  # of jaxtyping
    return clean and _jax.is_evaluating() and not commits.lock.locked()


FIRST = [name for name in CALLS if name.startswith("a first ")]
OLD = [0.0, 1.0, 2.0]
NEW = [1.0, 2.0, 3.0]


def learn(name, refs):
    """A plan for these very refs, without a write."""
    if name == "filter_jit":
        jitted(refs, jnp.array(0.0))
        jitted(refs, jnp.array(0.0))


def chosen(runs, every=EVERY):
    """The moments to raise at: each `every`-th, and some of a planned call, which runs few
    lines."""
    all_of_them = moments(runs)
    stride = max(1, min(every, len(all_of_them) // 5))
    return all_of_them[stride // 2 :: stride]


def check_all_or_nothing(name, root, every):
    call = CALLS[name]
    for _ in range(3):  # and later by a plan, where there is one
        refs = make()
        call(refs)
        assert values(refs) == NEW
    refs = make()
    learn(name, refs)
    runs = runs_of(lambda: call(refs), root)
    broken_off, unseen, wrong = 0, 0, []
    for line, n in chosen(runs, every):
        refs = make()
        learn(name, refs)
        injector = Injector(line, n)
        if injector.run(lambda: call(refs)):
            broken_off += 1
            allowed = OLD, NEW
        else:
            allowed = (NEW,)
            unseen += injector.came
        if not is_clean():
            wrong.append((str(injector), "not clean"))
            _trace.thread.state = _trace.ThreadState()
        if values(refs) not in allowed:
            wrong.append((str(injector), values(refs)))
        refs = make()
        call(refs)
        assert values(refs) == NEW, str(injector)
    print(f"{name}: {len(runs)} lines, broken off {broken_off} times, {unseen} unseen")
    assert broken_off > 0 and not wrong


@pytest.mark.parametrize("name", CALLS)
def test_an_exception_at_a_line_changes_all_or_nothing(name):
    check_all_or_nothing(name, PACKAGE, EVERY)


@pytest.mark.parametrize("name", ["filter_grad", "scan", "while_loop", *FIRST])
def test_an_exception_inside_jax_changes_all_or_nothing(name):
    check_all_or_nothing(name, JAX, 13 * EVERY)


def test_an_exception_at_a_line_while_a_module_is_made_leaves_its_refs():
    def new():
        return [rx.Ref(1.0), rx.Ref(2.0)]

    def state(refs):
        return [(r.collection, r.name, bool(r._declared), r.value) for r in refs]

    broken_off, refs, before = 0, new(), state(new())
    for line, n in chosen(runs_of(lambda: Typed(*refs))):
        refs = new()
        injector = Injector(line, n)
        assert injector.run(lambda: Typed(*refs)) == injector.came
        assert is_clean() and (state(refs) == before or not injector.came), injector
        broken_off += injector.came
    refs = new()
    Typed(*refs)
    assert broken_off > 0 and state(refs)[1][:3] == ("params", "Typed.b", True)


def increment(refs):
    for ref in refs:
        ref.value = ref.value + 1


LOOPS = {
    "filter_jit": rx.filter_jit(increment),
    "donate": rx.filter_jit(increment, donate="refs"),
    "update_refs": lambda refs: rx.update_refs(refs, [r.value + 1 for r in refs]),
    "cond": lambda refs: rx.cond(True, increment, increment, refs),
    "filter_vmap": rx.filter_vmap(increment, in_axes=None, axis_size=2),
}


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals"
)
@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
# Under them JAX has no fast path, and in Python it may lose what a donating call returned.
@jax.check_tracer_leaks(False)
def test_a_real_signal_changes_all_or_nothing(name):
    refs = [rx.Ref(jnp.array(0.0)) for _ in range(50)]
    call = LOOPS[name]
    for _ in range(3):
        call(refs)
    before = signal.getsignal(signal.SIGALRM)

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    hits, end = 0, time.monotonic() + 10
    try:
        while hits < 100 and time.monotonic() < end:
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + hits * 1e-5)
                # Not for longer: it may have come where Python ignores it.
                soon = time.monotonic() + 0.05
                while time.monotonic() < soon:
                    call(refs)
            except (KeyboardInterrupt, ValueError):
                # What comes in an `__eq__` that JAX calls, it makes a `ValueError`.
                hits += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            # JAX 0.12 has none while an operation begins or ends, and a signal then leaves it so.
            _jax.trace_ctx.set_trace(_jax.eval_trace)
            assert is_clean()
            assert len(set(values(refs))) == 1 and None not in values(refs)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert hits > 10
    then = values(refs)[0]
    call(refs)
    assert values(refs) == [then + 1] * 50


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize(
    "transform", [rx.filter_jit, rx.filter_grad, rx.filter_vmap, rx.filter_checkpoint]
)
def test_an_error_in_the_function_changes_nothing(transform, error):
    refs = make()
    failing = True

    def run(x):
        step(refs, ONE)
        if failing:
            raise error
        return x

    xs = XS if transform is rx.filter_vmap else ONE
    with pytest.raises(error):
        transform(run)(xs)
    assert values(refs) == OLD and is_clean()
    failing = False
    transform(run)(xs)
    assert values(refs) == NEW


def check_fails(x):
    return eqx.error_if(x, x > 0, "too much")


def callback_fails(x):
    def fail(x):
        raise MemoryError("too much")

    return jax.pure_callback(fail, x, x, vmap_method="sequential")


def failing(fails):
    def run(refs, x):
        return fails(step(refs, x))

    return run


def failing_rule(run):
    custom = rx.filter_custom_jvp(lambda x, *, refs: run(refs, x))
    custom.def_jvp(lambda primals, _, *, refs: (run(refs, *primals),) * 2)
    return custom


FAILING = {
    "filter_jit": lambda run, refs: rx.filter_jit(run)(refs, ONE),
    "filter_grad": lambda run, refs: rx.filter_grad(lambda x: x * run(refs, ONE))(ONE),
    "filter_vmap": lambda run, refs: rx.filter_vmap(run, in_axes=None, axis_size=2)(
        refs, ONE
    ),
    "filter_checkpoint": lambda run, refs: rx.filter_checkpoint(run)(refs, ONE),
    "filter_custom_jvp": lambda run, refs: failing_rule(run)(ONE, refs=refs),
    "scan": lambda run, refs: rx.scan(lambda c, x: (c, run(refs, ONE)), None, XS),
    "while_loop": lambda run, refs: rx.while_loop(
        lambda x: x < 2, lambda x: x + 1 + 0 * run(refs, ONE), ONE
    ),
    "cond": lambda run, refs: rx.cond(True, run, run, refs, ONE),
    "lift": lambda run, refs: rx.lift(jax.jit)(run)(refs, ONE),
}


@pytest.mark.parametrize("fails", [check_fails, callback_fails])
@pytest.mark.parametrize("name", FAILING)
@pytest.mark.parametrize("wrap", [lambda f: f, rx.filter_jit], ids=["eager", "jit"])
@jax.check_tracer_leaks(False)  # `eqx.error_if` leaks one, whoever calls it
def test_what_fails_at_run_time_changes_nothing(wrap, name, fails):
    refs, run = make(), failing(fails)
    with raises(Exception, match="too much"):
        wrap(lambda refs: FAILING[name](run, refs))(refs)
    assert values(refs) == OLD and is_clean()
