"""A process that is killed in the middle of a save loses nothing that was saved before, and
a program resumed from its file does what it would have done without a break."""

import os
import pathlib
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest

import refx_eqx as rx


TRAIN = """
import importlib, pathlib, sys, time
import jax, jax.numpy as jnp, jax.random as jr, numpy as np, optax
import refx_eqx as rx

path, last, fatal, point, call = sys.argv[1:]
path, last, fatal, call = pathlib.Path(path), int(last), int(fatal), int(call)


def stop_at(point, call):
    # Says so and waits, instead of the nth call of a function: for a signal to come.
    module, name = point.split(":")
    module = importlib.import_module(module)
    function, calls = getattr(module, name), []

    def stopping(*args):
        calls.append(args)
        if len(calls) == call:
            print("ready", flush=True)
            time.sleep(600)
        return function(*args)

    setattr(module, name, stopping)


class Model(rx.Module):
    embed: rx.Param[jax.Array]
    unembed: rx.Param[jax.Array]
    mean: rx.BatchStat[jax.Array]
    rngs: rx.Rngs

    def __init__(self, seed):
        self.rngs = rx.Rngs(seed)
        self.embed = jr.normal(self.rngs.default(), (40, 100))
        self.unembed = self.embed
        self.mean = jnp.zeros(100)

    def __call__(self, x):
        x = x @ self.embed[...]
        self.mean.value = 0.9 * self.mean.value + 0.1 * jnp.mean(x, 0)
        x = jnp.where(jr.bernoulli(self.rngs.default(), 0.9, x.shape), x - self.mean.value, 0.0)
        return x @ self.unembed[...].T


tx = optax.adamw(optax.cosine_decay_schedule(1e-2, 20))


@rx.filter_jit
def step(state):
    model = state["model"]
    x = jr.normal(model.rngs.default(), (8, 40))
    grads = rx.filter_grad(lambda model: jnp.mean((model(x) - x) ** 2), wrt="params")(model)
    state["optimizer"].update(model, grads)
    state["step"].value += 1


model = Model(0)
optimizer = rx.Optimizer(model, tx)
state = {"model": model, "optimizer": optimizer, "step": rx.Ref(0, "counts")}
if path.exists():
    rx.load(path, state)
while state["step"].value < last:
    step(state)
    if int(state["step"].value) == fatal:
        stop_at(point, call)
    rx.save(path, state)
print(int(state["step"].value))
"""


def start(path: pathlib.Path, last: int, fatal: int = -1, point=":", call=0):
    command = [sys.executable, "-c", TRAIN, path, last, fatal, point, call]
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def run(*args) -> str:
    process = start(*args)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return out


@pytest.mark.parametrize(
    "point, call, step",
    [
        ("numpy:ascontiguousarray", 3, 2),  # some of the arrays are written
        ("os:replace", 1, 2),  # all are, and flushed
        ("os:fsync", 2, 3),  # the new file has its name, and the folder is not flushed
    ],
)
def test_a_killed_save_loses_nothing_and_the_run_goes_on_bit_by_bit(
    tmp_path, whole_run, point, call, step
):
    path = tmp_path / "state.safetensors"
    process = start(path, 5, 3, point, call)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    process.stdout.close()

    assert len(os.listdir(tmp_path)) == (2 if step == 2 else 1)
    steps = {"step": rx.Ref(0)}
    rx.load(path, steps, strict=False)
    assert steps["step"].value == step

    assert run(path, 5) == "5\n"
    assert os.listdir(tmp_path) == [path.name]  # what the killed save left is gone
    assert path.read_bytes() == whole_run


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> bytes:
    """The file of a run that nothing interrupts."""
    path = tmp_path_factory.mktemp("whole") / "state.safetensors"
    assert run(path, 5) == "5\n"
    state = {"model": {"embed": rx.Ref(jnp.zeros((40, 100)))}, "step": rx.Ref(0)}
    rx.load(path, state, strict=False)
    assert state["step"].value == 5 and jnp.any(state["model"]["embed"].value)
    return path.read_bytes()
