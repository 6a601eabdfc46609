"""Several threads: the outcome is that of some order of the calls, or a clear error."""

import concurrent.futures
import contextlib
import threading
import weakref
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from raising import message_of, raises

import refx_eqx as rx
from refx_eqx._calls import _commit
from refx_eqx._core._ref import commits


N_THREADS = 4


def _in_threads(work, n=N_THREADS):
    """Runs `work(i)` in `n` threads at once; the results, or the first exception."""
    barrier = threading.Barrier(n)

    def start(i):
        barrier.wait()
        return work(i)

    with concurrent.futures.ThreadPoolExecutor(n) as pool:
        return list(pool.map(start, range(n)))


def _increment(count):
    count.value += 1
    return count.value


def test_four_threads_times_200_increments_make_800():
    count = rx.Ref(jnp.array(0))
    step = rx.filter_jit(_increment)

    def work(_):
        return [int(step(count)) for _ in range(200)]

    seen = [n for part in _in_threads(work) for n in part]
    assert count.value == 800
    # Every call saw what the one before it, in some order, had left.
    assert sorted(seen) == list(range(1, 801))


def test_two_refs_that_are_written_together_stay_together():
    a, b = rx.Ref(jnp.array(0)), rx.Ref(jnp.array(0))

    @rx.filter_jit
    def step(a, b):
        a.value += 1
        b.value += 2
        return b.value - 2 * a.value

    def work(_):
        return [int(step(a, b)) for _ in range(50)]

    assert all(n == 0 for part in _in_threads(work) for n in part)
    assert (a.value, b.value) == (200, 400)


def test_calls_on_different_refs_do_not_disturb_each_other():
    refs = [rx.Ref(jnp.array(0)) for _ in range(N_THREADS)]
    step = rx.filter_jit(_increment)

    def work(i):
        for _ in range(100):
            step(refs[i])

    _in_threads(work)
    assert [int(ref.value) for ref in refs] == [100] * N_THREADS


def test_a_transform_that_only_reads_sees_one_moment():
    a, b = rx.Ref(jnp.array(0)), rx.Ref(jnp.array(0))

    @rx.filter_jit
    def write(a, b):
        a.value += 1
        b.value += 1

    @rx.filter_jit
    def read(a, b):
        return a.value - b.value

    def work(i):
        if i == 0:
            for _ in range(100):
                write(a, b)
            return []
        return [int(read(a, b)) for _ in range(100)]

    assert all(n == 0 for part in _in_threads(work) for n in part)


@pytest.mark.parametrize("calls_before", [0, 3], ids=["first call", "repeated call"])
def test_a_call_that_meets_half_of_a_write_waits_for_the_rest(calls_before):
    a, b = rx.Ref(jnp.array(0)), rx.Ref(jnp.array(0))
    read = rx.filter_jit(lambda a, b: (a.value, b.value))
    for _ in range(calls_before):
        read(a, b)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        found = []

        def halves():
            yield a, jnp.array(1)
            found.append(pool.submit(read, a, b))
            # It reads, and cannot end before all is written.
            with pytest.raises(concurrent.futures.TimeoutError):
                found[0].result(timeout=0.5)
            yield b, jnp.array(1)

        with commits.lock:
            commits.store(halves())
        assert found[0].result(timeout=30) == (1, 1)


def test_two_threads_trace_at_once():
    def work(i):
        ref = rx.Ref(jnp.zeros(3 + i))
        inside = threading.Event()

        @rx.filter_jit
        def f(ref):
            inside.set()
            meet.wait(timeout=30)  # both are in the middle of their trace here
            ref.value += i
            return ref.shape

        shape = f(ref)
        assert inside.is_set()
        return shape, float(ref.value[0])

    meet = threading.Barrier(2)
    assert _in_threads(work, 2) == [((3,), 0.0), ((4,), 1.0)]


def test_two_threads_trace_the_same_function_at_once():
    meet = threading.Barrier(2)
    count = rx.Ref(jnp.array(0))

    @rx.filter_jit
    def f(count):
        # It breaks if JAX lets only one of them trace.
        with contextlib.suppress(threading.BrokenBarrierError):
            meet.wait(timeout=2)
        count.value += 1

    _in_threads(lambda i: f(count), 2)
    assert count.value == 2


def test_mutable_is_a_matter_of_one_thread():
    guarded, free = rx.Ref(jnp.array(0)), rx.Ref(jnp.array(0))
    entered, written = threading.Event(), threading.Event()

    def work(i):
        if i == 0:
            with rx.mutable(False):
                entered.set()
                assert written.wait(timeout=30)
                with pytest.raises(rx.ImmutableError):
                    rx.filter_jit(_increment)(guarded)
        else:
            assert entered.wait(timeout=30)
            free.value += 1
            rx.filter_jit(_increment)(free)
            written.set()

    _in_threads(work, 2)
    assert guarded.value == 0 and free.value == 2


def test_donating_threads_with_a_lock_are_right():
    state, lock = rx.Ref(jnp.zeros(10)), threading.Lock()

    @rx.filter_jit(donate="refs")
    def step(state):
        state.value += 1.0

    def work(_):
        for _ in range(50):
            with lock:
                step(state)

    _in_threads(work)
    assert jnp.array_equal(state.value, jnp.full(10, 200.0))


def test_an_eager_write_meanwhile_is_not_lost():
    ref, inside, go_on = rx.Ref(jnp.array(1)), threading.Event(), threading.Event()

    @rx.filter_jit
    def double(ref):
        inside.set()
        assert go_on.wait(timeout=30)
        ref.value *= 2

    def work(i):
        if i == 0:
            double(ref)
        else:
            assert inside.wait(timeout=30)
            ref.value = jnp.array(10)
            go_on.set()

    _in_threads(work, 2)
    assert ref.value == 20


def test_a_call_that_is_always_disturbed_gives_up_and_writes_nothing(monkeypatch):
    monkeypatch.setattr(_commit, "_MAX_TRIES", 3)
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    ref, tries, is_busy = rx.Ref(jnp.array(0)), 0, True
    outer: Any = weakref.ref(ref)  # which is not carried

    def write_meanwhile(_):
        nonlocal tries
        tries += 1
        outer().value = jnp.array(tries)

    @rx.filter_grad
    def double(x, inner):
        if is_busy:
            _in_threads(write_meanwhile, 1)
        inner.value *= 2
        return x

    with raises(
        rx.ConcurrencyError, match="Serialize the calls of several threads with a lock"
    ):
        double(jnp.array(1.0), ref)
    assert tries == 3 and ref.value == 3
    is_busy = False
    double(jnp.array(1.0), ref)
    assert ref.value == 6


_FLOAT = jax.ShapeDtypeStruct((), jnp.float32)
_CALLBACKS = {
    "debug": lambda f, x: jax.debug.callback(f, x),
    "io": lambda f, x: jax.experimental.io_callback(f, _FLOAT, x, ordered=True),
    "pure": lambda f, x: jax.pure_callback(f, _FLOAT, x),
    "filter_pure": lambda f, x: rx.filter_pure_callback(
        f, x, result_shape_dtypes=_FLOAT
    ),
}


@pytest.mark.parametrize("donate", ["none", "refs"])
@pytest.mark.parametrize("kind", _CALLBACKS)
@pytest.mark.parametrize("from_call", [0, 3], ids=["at first", "of a plan"])
def test_a_callback_that_writes_a_ref_of_its_call_is_not_run_forever(
    kind, donate, from_call, monkeypatch
):
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    ref, times, is_writing = rx.Ref(jnp.array(0.0), "state"), 0, False
    outer: Any = weakref.ref(ref)  # which is not carried

    def write(x):
        nonlocal times
        times += 1
        if is_writing:
            outer().value = jnp.array(7.0)
        return x

    @rx.filter_jit(donate=donate)
    def step(ref):
        out = _CALLBACKS[kind](write, ref.value)
        ref.value = (ref.value if out is None else out) + 1

    for _ in range(from_call):
        step(ref)
    times, is_writing = 0, True
    with raises(
        rx.ConcurrencyError,
        match=r"step` gave up: whenever it ran, an unnamed ref \(collection 'state'\) was "
        r"written meanwhile, by a callback in it or by another thread\. Let a callback "
        r"return the value, and write it in the function: `ref\.value = "
        r"jax\.pure_callback\(\.\.\.\)`",
    ):
        step(ref)
    assert times == 2 and ref.value == 7.0

    @rx.filter_jit
    def remedied(ref):
        ref.value = jax.pure_callback(lambda: np.float32(7.0), _FLOAT)
        ref.value += 1

    remedied(ref)
    assert ref.value == 8.0


def test_donating_threads_are_right_or_refused():
    state = rx.Ref(jnp.zeros(1000))

    @rx.filter_jit(donate="refs")
    def step(state):
        state.value += 1.0

    def work(_):
        done = 0
        for _ in range(50):
            try:
                step(state)
                done += 1
            except rx.ConcurrencyError as e:
                assert "donated" in message_of(e)
        return done

    done = sum(_in_threads(work))
    assert done >= 1
    assert jnp.array_equal(state.value, jnp.full(1000, float(done)))
