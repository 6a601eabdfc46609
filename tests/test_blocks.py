"""A `with` block of `mutable` or `config` ends where it began, wherever it ends."""

import asyncio
import gc
import threading
import weakref

import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float

import refx_eqx as rx
from refx_eqx._core import _trace


class Bias(rx.Module):
    bias: rx.Param[Float[Array, "n"]]


def is_limited():
    ref = rx.Ref(0)
    try:
        ref.value = 1
    except rx.ImmutableError:
        return True
    return False


def is_unchecked():
    try:
        Bias(jnp.ones(2)).bias.value = jnp.ones(3)
    except rx.RefTypeError:
        return False
    return True


KINDS = {
    "mutable": (lambda: rx.mutable("counts"), is_limited),
    "config": (lambda: rx.config(check_types=False), is_unchecked),
}


@pytest.fixture(params=KINDS)
def kind(request):
    block, is_on = KINDS[request.param]

    def suspended():
        with block():
            yield

    async def suspended_async():
        with block():
            yield

    return block, is_on, suspended, suspended_async


def in_thread(fn):
    thread = threading.Thread(target=fn)
    thread.start()
    thread.join()


def test_a_block_that_another_thread_ends(kind):
    _, is_on, suspended, _ = kind
    generator = suspended()
    next(generator)
    assert is_on()
    in_thread(lambda: list(generator))
    assert not is_on()


def test_a_block_that_a_finalizer_ends_in_another_thread(kind):
    _, is_on, suspended, _ = kind
    generator = suspended()
    next(generator)
    cycle = [generator]
    cycle.append(cycle)  # pyright: ignore[reportArgumentType]
    del generator, cycle
    in_thread(gc.collect)
    assert not is_on()


def test_a_block_that_ends_before_the_one_around_it(kind):
    block, is_on, suspended, _ = kind
    outer, inner = suspended(), suspended()
    next(outer)
    next(inner)
    in_thread(lambda: list(outer))
    assert is_on()
    with block():
        in_thread(lambda: list(inner))
        assert is_on()
    assert not is_on()


def test_an_async_generator_that_is_left(kind):
    _, is_on, _, suspended = kind

    async def main():
        async for _ in suspended():
            break
        gc.collect()
        await asyncio.sleep(0.01)  # the event loop closes it in a task of its own
        assert not is_on()

    asyncio.run(main())


def test_an_async_generator_that_a_task_closes(kind):
    _, is_on, _, suspended = kind

    async def main():
        generator = suspended()
        await anext(generator)
        assert is_on()
        await asyncio.create_task(generator.aclose())
        assert not is_on()

    asyncio.run(main())


def test_a_task_made_in_a_block_is_in_it_until_it_ends(kind):
    block, is_on, _, _ = kind

    async def work(ended):
        assert is_on()
        await ended.wait()
        assert not is_on()

    async def main():
        ended = asyncio.Event()
        with block():
            task = asyncio.create_task(work(ended))
            await asyncio.sleep(0)
        ended.set()
        await task

    asyncio.run(main())


def test_after_a_block_that_ended_elsewhere_a_repeated_call_has_a_plan_again():
    ref, seen = rx.Ref(jnp.array(0)), []

    def traced(ref):
        seen.append(None)
        ref.value += 1

    f = rx.filter_jit(traced)

    def suspended():
        with rx.mutable(True):
            yield

    generator = suspended()
    next(generator)
    f(ref)
    in_thread(lambda: list(generator))
    assert _trace.guards.begun()
    f(ref)
    assert not _trace.guards.begun()
    assert ref.value == 2 and len(seen) == 1


def test_a_block_that_ended_elsewhere_keeps_no_value_it_read():
    ref = rx.Ref([jnp.array(0)])
    gone = weakref.ref(ref)

    def suspended():
        with rx.mutable(False):
            assert ref.value
            yield

    generator = suspended()
    next(generator)
    in_thread(lambda: list(generator))
    del generator, ref
    gc.collect()
    assert gone() is None
