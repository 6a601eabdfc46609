"""Every test runs under JAX's leak checks and strict promotion, on several CPU devices."""

import functools
import os
import types
from typing import Any


# Before JAX starts a backend.
os.environ.setdefault("JAX_CHECK_TRACER_LEAKS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import equinox as eqx
import jax
import pytest
from jax._src import config, dispatch


jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def _keep_programs_of_operations() -> None:
    # Under the leak check, JAX 0.10 compiles an operation outside of `jit` anew each time
    # it is called. (JAX 0.12 does not.) Here, it uses the cache that it goes around.
    uncached = dispatch.xla_primitive_callable
    if isinstance(uncached, types.FunctionType):

        @functools.wraps(uncached)
        def cached(*args: Any, **kwargs: Any) -> Any:
            cache = uncached.cache_info.__self__
            return cache(config.trace_context(), *args, **kwargs)

        dispatch.xla_primitive_callable = cached


_keep_programs_of_operations()


@pytest.fixture(autouse=True, scope="module")
def _clear_caches():
    # Compiled programs add up over a long suite.
    yield
    jax.clear_caches()
    eqx.clear_caches()


@pytest.fixture
def trace_counter():
    """Counts how often a function runs in Python: once for each trace of it.

    `counter = trace_counter(f)` is a function that calls `f`; `counter.count` is the count.
    """

    class Counter:
        def __init__(self, fn):
            self.fn = fn
            self.count = 0

    def make(fn):
        counter = Counter(fn)

        def counted(*args, **kwargs):
            counter.count += 1
            return fn(*args, **kwargs)

        counted.counter = counter
        return counted

    return make
