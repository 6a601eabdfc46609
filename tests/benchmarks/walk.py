"""The walk of one array through the first call of three transforms: how many files of the package
it enters, and how often it changes from one file to another.

    python -m tests.benchmarks.walk
"""

import itertools
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp

import refx_eqx as rx


ROOT = os.path.dirname(rx.__file__)
SHAPE = (7, 11)


def holds_it(x: Any, depth: int = 4) -> bool:
    """Whether this is the array, or a list, a node or a ref with it."""
    if isinstance(x, jax.Array):
        return x.shape[-2:] == SHAPE
    if depth == 0:
        return False
    if type(x) is dict:
        x = list(x.values())
    if type(x) is rx.Ref:
        x = [getattr(x, "_value", None)]  # without the rule of traces
    if type(x) is rx.Value:
        x = [getattr(x, "value", None)]
    if type(x).__name__ in ("Call", "Outcome"):
        return True
    return type(x) in (list, tuple) and any(holds_it(y, depth - 1) for y in x)


def walk(call: Callable[[], Any]) -> list[str]:
    """The file of each function of the package that is given the array, in order."""
    files: list[str] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(ROOT):
            if any(map(holds_it, list(frame.f_locals.values()))):
                files.append(os.path.relpath(file, ROOT))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return files


def main() -> None:
    def loss(model: Any) -> jax.Array:
        return model["w"][...].sum()

    def step(total: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return total + loss(layer), None

    model = {"w": rx.Ref(jnp.ones(SHAPE), "params")}
    layers = {"w": rx.Ref(jnp.ones((3, *SHAPE)), "params")}
    walks = {
        "filter_jit": lambda: rx.filter_jit(loss)(model),
        "scan": lambda: rx.scan(step, jnp.array(0.0), layers),
        "filter_grad": lambda: rx.filter_grad(loss)(model),
    }
    for name, call in walks.items():
        files = walk(call)
        changes = sum(a != b for a, b in itertools.pairwise(files))
        print(f"| `{name}` | {len(set(files))} | {changes} |")


if __name__ == "__main__":
    main()
