"""Two processes over `jax.distributed` train one model: they get what one process gets."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType
from training_of_processes import batches, loss, make, optimizer_of

import refx_eqx as rx


HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have left their results."""
    folder = tmp_path_factory.mktemp("processes")
    port = free_port()
    env = {k: v for k, v in os.environ.items() if k != "JAX_CHECK_TRACER_LEAKS"}
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    logs = [open(folder / f"log{i}", "w+") for i in range(2)]  # noqa: SIM115
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                HERE / "multiprocess_worker.py",
                str(i),
                str(port),
                folder,
            ],
            env=env | {"PYTHONPATH": path},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for i, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = []
    for log in logs:
        log.seek(0)
        texts.append(log.read()[-3000:])
        log.close()
    assert codes == [0, 0], "\n".join(texts)
    return folder


def train_alone():
    model = make()
    optimizer = optimizer_of(model)

    @rx.filter_jit
    def train(x, y):
        value, grads = rx.filter_value_and_grad(loss, wrt="params")(model, x, y)
        optimizer.update(model, grads)
        return value

    *rest, last = batches()
    losses = [train(x, y) for x, y in (*rest, last)]
    train(*last)
    return model, optimizer, np.array(losses)


def test_two_processes_train_as_one(folder):
    result = np.load(folder / "result.npz")
    model, _, losses = train_alone()
    np.testing.assert_allclose(result["losses"], losses, rtol=1e-5)
    assert losses[-1] < losses[0] / 2
    np.testing.assert_allclose(result["weight"], model.weight.value, rtol=1e-5)
    assert result["count"] == model.count.value == 6


def test_a_step_is_compiled_once_and_reuses_donated_buffers(folder):
    result = np.load(folder / "result.npz")
    assert result["traces"] == 1 and result["reused"]


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (2, 2)], ids=str)
def test_what_both_save_is_restored_on_another_mesh(folder, shape):
    expected, expected_optimizer, _ = train_alone()
    model = make()
    optimizer = optimizer_of(model)
    mesh = jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rules = rx.axis_rules(out=("tensor", "fsdp"))
    rx.filter_shard((model, optimizer), rules.shardings((model, optimizer), mesh))
    targets = jax.tree.map(
        ocp.utils.to_shape_dtype_struct, rx.state_dict((model, optimizer))
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder / "checkpoint", targets)
    rx.load_state_dict((model, optimizer), restored)
    shards = model.weight.value.addressable_shards
    assert {shard.data.shape for shard in shards} == {(8 // (shape[0] * shape[1]), 3)}
    saved = rx.state_dict((expected, expected_optimizer))
    for name, value in rx.state_dict((model, optimizer)).items():
        np.testing.assert_allclose(value, saved[name], rtol=1e-5, atol=1e-6)
