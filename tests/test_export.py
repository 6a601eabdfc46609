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
from raising import raises

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


class Frozen(rx.Ref):
    pass


def scale(tree, x):
    tree["a"].value = tree["a"].value * x
    return tree["b"], tree["c"].value


def make_tree():
    a = rx.Ref(jnp.array([1.0, 2.0]), "params")
    return {"a": a, "b": a, "c": Frozen(jnp.array(5.0), ("stats", 1))}


def test_a_program_of_derefed_trees_is_serialized_and_runs_in_another_process(tmp_path):
    args = (make_tree(), jnp.array(3.0))
    derefed = rx.deref(args)
    exported = jax.export.export(jax.jit(rx.functionalize(scale)))(*derefed)
    (tmp_path / "program").write_bytes(exported.serialize())
    again = jax.export.deserialize((tmp_path / "program").read_bytes())
    assert again.in_tree == exported.in_tree and again.out_tree == exported.out_tree
    rx.update_refs(args, again.call(*derefed)[1])
    assert args[0]["b"].value.tolist() == [3.0, 6.0]

    printed = _run(
        """
        import sys

        sys.path.insert(0, sys.argv[2])
        import jax.export
        import jax.numpy as jnp
        import refx_eqx as rx
        from test_export import make_tree

        data = open(f"{sys.argv[1]}/program", "rb").read()
        args = (make_tree(), jnp.array(3.0))
        (shared, _), updates = jax.export.deserialize(data).call(*rx.deref(args))
        rx.update_refs(args, updates)
        print(shared.value.tolist(), args[0]["b"].value.tolist())
        """,
        str(tmp_path),
        os.path.dirname(__file__),
    )
    assert printed.strip() == f"{[3.0, 6.0]} {[3.0, 6.0]}"


def test_a_dag_and_what_is_not_there_are_serialized():
    dag = rx.Dag(make_tree())
    first = jax.export.export(jax.jit(lambda dag: dag.value["a"].value))(dag)
    again = jax.export.deserialize(first.serialize())
    assert again.call(dag).tolist() == [1.0, 2.0]

    parts = rx.deref(rx.partition(make_tree(), "params")[0])
    exported = jax.export.export(jax.jit(lambda tree: tree))(parts)
    out = jax.export.deserialize(exported.serialize()).call(parts)
    assert out["c"] is rx.NOTHING and rx.reref(out["a"])[...].tolist() == [1.0, 2.0]


def test_what_has_no_form_in_a_file_is_refused_by_name():
    class Local(rx.Ref):
        pass

    for ref, match in (
        (
            rx.Ref(jnp.ones(1), frozenset("a")),
            r"frozenset.*Name a collection by a string",
        ),
        (
            Local(jnp.ones(1), "params"),
            r"Local, cannot be found.*top level of a module",
        ),
    ):
        exported = jax.export.export(jax.jit(lambda x: x))(rx.deref(ref))
        with raises(rx.StructureError, match=match):
            exported.serialize()
    tuple_of_texts = rx.deref(rx.Ref(jnp.ones(1), ("a", "b")))
    jax.export.export(jax.jit(lambda x: x))(tuple_of_texts).serialize()


def test_a_class_of_refs_that_is_gone_is_named(monkeypatch):
    ref = rx.deref(Frozen(jnp.ones(1), "params"))
    data = jax.export.export(jax.jit(lambda x: x))(ref).serialize()
    monkeypatch.delattr(sys.modules[__name__], "Frozen")
    with raises(rx.StructureError, match=r"Frozen` is not a ref class. Keep"):
        jax.export.deserialize(data)
