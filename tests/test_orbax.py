"""Orbax, through its own API: it saves what `state_dict` gives, and what it restores,
`load_state_dict` writes."""

import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from raising import raises

import refx_eqx as rx


def make(value=0.0):
    shared = rx.Ref(jnp.arange(8.0) + value, "params")
    return {
        "encoder": shared,
        "decoder": shared,
        "scale": rx.Ref(jnp.full(2, value, jnp.bfloat16), "params"),
        "key": rx.Ref(jr.key(int(value)), "rng"),
        "step": rx.Ref(int(value), "counts"),
        "rate": rx.Ref(value / 2, "counts"),
    }


def values_of(tree):
    values = rx.state_dict(tree)
    values["key"] = jr.key_data(values["key"])
    return {name: np.asarray(value).tolist() for name, value in values.items()}


def save(manager, step, tree):
    manager.save(step, args=ocp.args.StandardSave(rx.state_dict(tree)))


def restore(manager, tree):
    args = ocp.args.StandardRestore(rx.state_dict(tree))
    rx.load_state_dict(tree, manager.restore(manager.latest_step(), args=args))


def test_a_manager_saves_in_the_background_and_keeps_the_last(tmp_path):
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=True
    )
    add_one = rx.filter_jit(_add_one, donate="refs")
    tree = make()
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for step in range(4):
            save(manager, step, tree)
            add_one(tree["encoder"])  # while the save goes on
        manager.wait_until_finished()
        assert manager.all_steps() == [2, 3]
        other = make(5.0)
        restore(manager, other)
    assert other["encoder"] is other["decoder"]
    assert other["encoder"].value.tolist() == (np.arange(8.0) + 3).tolist()
    assert values_of(other) == values_of(make()) | {
        "decoder": other["encoder"].value.tolist()
    }
    assert type(other["step"].value) is int and type(other["rate"].value) is float


def _add_one(ref):
    ref.value += 1


@pytest.mark.parametrize("n_from, n_to", [(4, 2), (1, 4), (4, 1)])
def test_what_was_saved_on_some_devices_is_restored_on_others(tmp_path, n_from, n_to):
    def spread(tree, n):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:n]), ("x",))
        sharding = NamedSharding(mesh, PartitionSpec("x"))
        tree["encoder"].value = jax.device_put(tree["encoder"].value, sharding)
        return sharding

    tree, other = make(1.0), make()
    spread(tree, n_from)
    sharding = spread(other, n_to)
    with ocp.CheckpointManager(tmp_path) as manager:
        save(manager, 0, tree)
        manager.wait_until_finished()
        restore(manager, other)
    assert values_of(other) == values_of(tree)
    assert other["encoder"].value.sharding == sharding


def test_what_does_not_fit_changes_nothing(tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:
        save(manager, 0, make(1.0))
        manager.wait_until_finished()
        restored = manager.restore(0, args=ocp.args.StandardRestore())
    tree = make()
    tree["scale"] = rx.Ref(jnp.zeros(3, jnp.bfloat16), "params")
    before = values_of(tree)
    with raises(rx.StructureError, match="at `scale` holds bf16"):
        rx.load_state_dict(tree, restored)
    assert values_of(tree) == before


def test_a_save_that_is_killed_leaves_the_one_before(tmp_path):
    code = """
        import os, signal, sys
        import jax.numpy as jnp
        import orbax.checkpoint as ocp
        import refx_eqx as rx
        tree = {"w": rx.Ref(jnp.zeros(30_000_000))}
        manager = ocp.CheckpointManager(sys.argv[1])
        manager.save(0, args=ocp.args.StandardSave(rx.state_dict(tree)))
        manager.wait_until_finished()
        tree["w"].value += 1
        manager.save(1, args=ocp.args.StandardSave(rx.state_dict(tree)))
        os.kill(os.getpid(), signal.SIGKILL)  # in the background it is not done yet
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    tree = {"w": rx.Ref(jnp.ones(30_000_000))}
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() == 0
        restore(manager, tree)
        assert not tree["w"].value.any()
        save(manager, 1, tree)
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == [0, 1]
