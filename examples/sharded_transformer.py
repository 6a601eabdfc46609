"""Trains a transformer on a mesh of eight devices, simulated on the CPU.

    python examples/sharded_transformer.py --split both --picture sharded_transformer.png

What to look at:

- The types of the weights name their axes, and `SPLITS` says which axis of the mesh splits
  each name. Data parallel, FSDP and tensor parallel differ in nothing else.
- `make` is compiled with these rules for its result, so no device ever holds all of the
  model, or all of the moments of the optimizer.
- All layers share one feed-forward network: `rx.scan` slices the stack `layers`, and
  `feed_forward` is not in it.
- The step is compiled ahead of time, and the loss is exported. The checkpoint is restored
  on eight devices, on four and on one.
"""

import os


os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import pathlib
import sysconfig
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _run import options, picture, progress
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

import refx_eqx as rx


def normal(key: PRNGKeyArray, *shape: int) -> Array:
    return jr.normal(key, shape) / shape[-1] ** 0.5


class Attention(rx.Module):
    query: rx.Param[Float[Array, "heads embed"]]
    key: rx.Param[Float[Array, "heads embed"]]
    value: rx.Param[Float[Array, "heads embed"]]
    out: rx.Param[Float[Array, "embed heads"]]
    scale: rx.Param[Float[Array, " embed"]]
    n_heads: int = eqx.field(static=True)

    def __init__(self, dim: int, n_heads: int, key: PRNGKeyArray):
        keys = jr.split(key, 4)
        self.query, self.key, self.value, self.out = (
            normal(key, dim, dim) for key in keys
        )
        self.scale = jnp.ones(dim)
        self.n_heads = n_heads

    def __call__(self, x: Float[Array, "batch time embed"]) -> Array:
        x = normalized(x, self.scale)
        query, key, value = (
            (x @ ref.value.T).reshape(*x.shape[:2], self.n_heads, -1)
            for ref in (self.query, self.key, self.value)
        )
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return mixed.reshape(*x.shape[:2], -1) @ self.out.value.T


class FeedForward(rx.Module):
    up: rx.Param[Float[Array, "ffn embed"]]
    down: rx.Param[Float[Array, "embed ffn"]]
    scale: rx.Param[Float[Array, " embed"]]

    def __init__(self, dim: int, key: PRNGKeyArray):
        up, down = jr.split(key)
        self.up, self.down = normal(up, 4 * dim, dim), normal(down, dim, 4 * dim)
        self.scale = jnp.ones(dim)

    def __call__(self, x: Float[Array, "batch time embed"]) -> Array:
        hidden = jax.nn.gelu(normalized(x, self.scale) @ self.up.value.T)
        return hidden @ self.down.value.T


def normalized(x: Array, scale: rx.Ref[Array]) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale.value


class Transformer(rx.Module):
    embed: rx.Param[Float[Array, "vocab embed"]]
    layers: rx.Batched[Attention, "layers"]
    feed_forward: FeedForward
    scale: rx.Param[Float[Array, " embed"]]

    def __init__(self, dim: int, depth: int, n_heads: int, key: PRNGKeyArray):
        key1, key2, key3 = jr.split(key, 3)
        self.embed = normal(key1, 128, dim)
        self.layers = rx.filter_vmap(lambda key: Attention(dim, n_heads, key))(
            jr.split(key2, depth)
        )
        self.feed_forward = FeedForward(dim, key3)
        self.scale = jnp.ones(dim)

    def __call__(self, tokens: Int[Array, "batch time"]) -> Array:
        def step(x: Array, attention: Attention) -> tuple[Array, None]:
            x = x + attention(x)
            return x + self.feed_forward(x), None  # the same one in each layer

        x = self.embed.value[tokens]
        x, _ = rx.scan(rx.filter_checkpoint(step), x, self.layers)
        return normalized(x, self.scale) @ self.embed.value.T


class Split(NamedTuple):
    """How the work is split over the mesh."""

    rules: rx.axis_rules
    batch: P


SPLITS = {
    "data": Split(rx.axis_rules(), P(("fsdp", "tensor"))),
    "fsdp": Split(rx.axis_rules(embed=("fsdp", "tensor")), P(("fsdp", "tensor"))),
    "tensor": Split(rx.axis_rules(heads="tensor", ffn="tensor"), P("fsdp")),
    "both": Split(rx.axis_rules(heads="tensor", ffn="tensor", embed="fsdp"), P("fsdp")),
}


def mesh_of(n_data: int, n_tensor: int) -> Mesh:
    devices = np.array(jax.devices()[: n_data * n_tensor]).reshape(n_data, n_tensor)
    return Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def loss_fn(model: Transformer, batch: Int[Array, "batch length"]) -> Array:
    logits = model(batch[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return jnp.mean(losses)


def train_step(model: Transformer, optimizer: rx.Optimizer, batch: Array) -> Array:
    loss, grads = rx.filter_value_and_grad(loss_fn, wrt="params")(model, batch)
    optimizer.update(model, grads)
    return loss


def make(
    key: PRNGKeyArray, dim: int, depth: int, n_heads: int
) -> tuple[Transformer, rx.Optimizer]:
    model = Transformer(dim, depth, n_heads, key)
    return model, rx.Optimizer(model, optax.adam(3e-3))


def batches(steps: int, size: int, length: int, seed: int) -> Iterator[np.ndarray]:
    """Pieces of the source of Python's standard library."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(file.read_bytes() for file in sorted(folder.glob("[a-d]*.py")))
    tokens = np.frombuffer(text, np.uint8).astype(np.int32) % 128
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        starts = rng.integers(0, len(tokens) - length - 1, size)
        yield np.stack([tokens[start : start + length + 1] for start in starts])


class Run(NamedTuple):
    """A model on a mesh, and its training."""

    model: Transformer
    optimizer: rx.Optimizer
    losses: list[float]
    memory: Any


def train(split: Split, mesh: Mesh, sizes: tuple, data: list[np.ndarray]) -> Run:
    with jax.set_mesh(mesh):
        sharded = rx.filter_jit(make, out_shardings=split.rules)
        model, optimizer = sharded(jr.key(0), *sizes)
    place = lambda batch: jax.device_put(batch, NamedSharding(mesh, split.batch))
    jitted: Any = rx.filter_jit(train_step, donate="refs")
    step = jitted.lower(model, optimizer, place(data[0])).compile()
    # Wait for each step: with many in flight, the threads in which XLA simulates the devices
    # (jaxlib 0.10) may wait for each other.
    losses = []
    with progress(len(data)) as report:
        for batch in data:
            losses.append(float(step(model, optimizer, place(batch))))
            report(f"{mesh.size} devices, loss {losses[-1]:.3f}")
    return Run(model, optimizer, losses, step.memory_analysis())


def restore(
    path: pathlib.Path, split: Split, mesh: Mesh, sizes: tuple
) -> tuple[Transformer, rx.Optimizer]:
    """The model and the optimizer in a file. Each device reads only its own part."""
    restored = rx.filter_eval_shape(make, jr.key(0), *sizes)  # only shapes
    rx.filter_shard(restored, split.rules.shardings(restored, mesh))
    rx.load(path, restored)
    return restored


def exported(model: Transformer, batch: Array) -> bytearray:
    """The loss as a program on arrays, for a process that has only JAX."""
    leaves, treedef = jax.tree.flatten(rx.deref((model, batch)))

    def of_arrays(*leaves: Array) -> Array:
        return rx.functionalize(loss_fn)(*treedef.unflatten(leaves))[0]

    return jax.export.export(jax.jit(of_arrays))(*leaves).serialize()


def plot(path: pathlib.Path, run: Run, whole: Run) -> None:
    with picture(path) as (curves, parts):
        curves.plot(run.losses, label="eight devices")
        curves.plot(whole.losses, "--", label="one device")
        curves.set_xlabel("step")
        curves.set_ylabel("loss, nats a character")
        curves.legend()
        up = run.model.feed_forward.up.value
        held_by = np.zeros(up.shape)
        for device, part in up.sharding.devices_indices_map(up.shape).items():
            held_by[part] = device.id
        parts.imshow(held_by, cmap="tab10", vmin=0, vmax=9, aspect="auto")
        parts.set_title("Which device holds which part of feed_forward.up")
        parts.set_xlabel("embed")
        parts.set_ylabel("ffn")


def main() -> None:
    args = options(__doc__, split="both", steps=100, dim=128, depth=4)
    split, sizes = SPLITS[args.split], (args.dim, args.depth, 4)
    mesh, alone = mesh_of(2, 4), mesh_of(1, 1)
    data = list(batches(args.steps + 1, size=16, length=64, seed=args.seed))
    data, held_out = data[:-1], data[-1]

    run = train(split, mesh, sizes, data)
    print(rx.tabulate(run.model))
    print(
        f"one step needs {run.memory.temp_size_in_bytes:,} bytes on each device, and "
        f"{run.memory.argument_size_in_bytes:,} for its arguments"
    )
    print(f"loss: {run.losses[0]:.3f} at first, {run.losses[-1]:.3f} at the end")
    whole = train(split, alone, sizes, data)
    difference = max(abs(a - b) for a, b in zip(run.losses, whole.losses))
    print(f"the losses on one device differ by at most {difference:.1e}")

    evaluate = rx.filter_jit(loss_fn)
    place = lambda batch, mesh: jax.device_put(batch, NamedSharding(mesh, split.batch))
    expected = float(evaluate(run.model, place(held_out, mesh)))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.safetensors")
        rx.save(path, (run.model, run.optimizer))
        for other in (mesh, mesh_of(2, 2), alone):
            model, _ = restore(path, split, other, sizes)
            off = abs(float(evaluate(model, place(held_out, other))) - expected)
            print(f"restored on a mesh of {other.size}: the loss differs by {off:.1e}")
    program = exported(run.model, place(held_out, mesh))
    leaves = jax.tree.leaves(rx.deref((run.model, place(held_out, mesh))))
    off = abs(float(jax.export.deserialize(program).call(*leaves)) - expected)
    print(f"exported: {len(program):,} bytes; the loss differs by {off:.1e}")
    if args.picture:
        plot(args.picture, run, whole)


if __name__ == "__main__":
    main()
