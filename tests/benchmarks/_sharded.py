"""What is called again and again, with arrays that are split over a mesh."""

import dataclasses
import os
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from . import _problems
from ._contenders import AGAIN, BASE, contenders, OURS
from ._harness import clock_here, ratios
from ._problems import Layers, Problem, Updates


_LIMIT = 60.0  # seconds for one piece of work, once it is compiled
_WHO = (BASE, OURS, "eqx.filter_jit")
NAMES = ("10 refs", "100 refs", "1000 refs", "training: transformer")


def prepare() -> None:
    # Eight devices, before JAX has asked for any.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"


def run(name: str, rounds: int, block: float) -> dict[str, float]:
    n_refs, *_ = name.split()
    if n_refs.isdigit():
        problem = _problems.calls(int(n_refs), "all", shape=(2, 4))
    else:
        problem = _problems.with_adam(_problems.transformer())
    axes = (AxisType.Auto,) * 2
    problem = over(jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=axes), problem)
    makers = contenders()
    runs = {name: makers[name](problem) for name in _WHO}
    runs[AGAIN] = makers[BASE](problem)
    return ratios(runs, rounds, block, _LIMIT, clock_here())


def over(mesh: Any, problem: Problem) -> Problem:
    """The problem with its matrices split over a mesh. What is written stays where it is: ours
    sees to that itself, and the others are told."""

    def place(x: jax.Array) -> NamedSharding:
        return NamedSharding(mesh, P("fsdp", "tensor") if x.ndim == 2 else P())

    def make() -> Layers:
        layers = problem.make()
        return [
            {name: jax.device_put(x, place(x)) for name, x in layer.items()}
            for layer in layers
        ]

    def work(layers: Layers, x: jax.Array) -> tuple[jax.Array, Updates]:
        out, updates = problem.work(layers, x)
        stay = lambda x: jax.lax.with_sharding_constraint(x, place(x))
        return out, {where: stay(x) for where, x in updates.items()}

    batch = P("fsdp") if problem.x.ndim else P()
    x = jax.device_put(problem.x, NamedSharding(mesh, batch))
    return dataclasses.replace(problem, make=make, work=work, x=x)
