"""What is compiled outlives the process: `jax.export`, and JAX's persistent cache."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import refx_eqx as rx


class Counting(rx.Module):
    weight: rx.Param[Float[Array, "out in"]]
    calls: rx.Ref[Array] = rx.field(collection="counts")

    def __init__(self):
        self.weight = jnp.arange(6.0).reshape(2, 3)
        self.calls = jnp.array(0, jnp.int32)

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        self.calls.value = self.calls.value + jnp.array(1, jnp.int32)
        return self.weight.value @ x


def _run(code: str, *args: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_CHECK_TRACER_LEAKS": "0", **env},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_functionalized_call_is_exported_and_runs_without_the_library(tmp_path):
    model = Counting()
    args = rx.deref((model, jnp.ones(3)))
    leaves, treedef = jax.tree.flatten(args)

    def flat(*leaves):
        out, updates = rx.functionalize(Counting.__call__)(
            *jax.tree.unflatten(treedef, leaves)
        )
        return jax.tree.leaves((out, updates))

    exported = jax.export.export(jax.jit(flat))(*leaves)
    (tmp_path / "program").write_bytes(exported.serialize())
    np.savez(tmp_path / "inputs.npz", *map(np.asarray, leaves))
    printed = _run(
        """
        import sys
        import jax.export
        import numpy as np

        folder = sys.argv[1]
        program = jax.export.deserialize(open(f"{folder}/program", "rb").read())
        inputs = np.load(f"{folder}/inputs.npz")
        out, calls = program.call(*(inputs[name] for name in inputs.files))
        assert "refx_eqx" not in sys.modules and "equinox" not in sys.modules
        print(out.tolist(), calls.tolist())
        """,
        str(tmp_path),
    )
    assert printed.strip() == f"{[3.0, 12.0]} {1}"
    assert model.calls.value == 0


def test_the_persistent_compilation_cache_is_hit_by_the_next_process(tmp_path):
    code = """
    import sys
    import jax
    import jax.monitoring
    import jax.numpy as jnp
    import refx_eqx as rx

    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))

    def step(model, x):
        model["w"].value = model["w"].value * x
        return model["w"].value.sum()

    model = {"w": rx.Ref(jnp.ones(3), "params")}
    assert rx.filter_jit(step, donate="refs")(model, jnp.array(2.0)) == 6.0
    print(sum(name.endswith("cache_hits") for name in events))
    """
    env = dict(
        JAX_COMPILATION_CACHE_DIR=str(tmp_path),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )
    first, second = (int(_run(code, **env)) for _ in range(2))
    assert first == 0
    assert second > 0
