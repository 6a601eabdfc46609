"""One of two processes that train one model together. See `test_multiprocess.py`.

python multiprocess_worker.py PROCESS PORT FOLDER
"""

import os
import sys


process, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax


jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    f"127.0.0.1:{port}", num_processes=2, process_id=process, initialization_timeout=60
)

import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from training_of_processes import batches, loss, make, optimizer_of

import refx_eqx as rx


assert jax.process_count() == 2 and jax.device_count() == 4

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
model = make()
# Split over both processes: the first axis of each weight.
rx.filter_shard(model, rx.axis_rules(out="data").shardings(model, mesh))
assert not model.weight.value.is_fully_addressable
optimizer = optimizer_of(model)
traces = 0


def train(model, optimizer, x, y):
    global traces
    traces += 1
    value, grads = rx.filter_value_and_grad(loss, wrt="params")(model, x, y)
    optimizer.update(model, grads)
    return value


train = rx.filter_jit(train, donate="refs")


def whole(local: np.ndarray) -> jax.Array:
    """The batch of all processes, from the half that this one has."""
    sharding = NamedSharding(mesh, P("data"))
    return jax.make_array_from_process_local_data(sharding, local)


def mine(batch: np.ndarray) -> np.ndarray:
    return np.split(batch, 2)[process]


def pointers(ref: rx.Ref) -> set[int]:
    return {x.data.unsafe_buffer_pointer() for x in ref.value.addressable_shards}


every = list(batches())
losses = [
    float(train(model, optimizer, whole(mine(x)), whole(mine(y)))) for x, y in every
]
x, y = every[-1]
before = pointers(model.weight)
train(model, optimizer, whole(mine(x)), whole(mine(y)))
reused = pointers(model.weight) == before
assert model.weight.value.sharding == NamedSharding(mesh, P("data"))

with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(f"{folder}/checkpoint", rx.state_dict((model, optimizer)))

gathered = multihost_utils.process_allgather(
    {"weight": model.weight.value, "count": model.count.value}, tiled=True
)
if process == 0:
    np.savez(
        f"{folder}/result.npz",
        losses=np.array([float(x) for x in losses]),
        traces=traces,
        reused=reused,
        **gathered,
    )
