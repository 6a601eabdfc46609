"""Random histories: many calls of the same lifted functions, and what happens between them.

A program of `generate.py` is called twice. A history tries what is kept from call to call:
plans, compiled programs, donated buffers. It is a series of steps on a few models that share
refs: a call, a write, a copy, a change of a list, a failure. It happens in two worlds of one
seed, with lifted functions and in plain Python, and after each step both must have the same
values and the same sharing.
"""

import contextlib
import copy
import gc
import pickle
import random
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import refx_eqx as rx

from .functions import Failure, FUNCTIONS, Node, places, Weight, write


# A name, and how often it is drawn.
STEPS = {
    "call": 10,
    "call_closure": 2,
    "write": 2,
    "write_in_place": 1,
    "append": 1,
    "pop": 1,
    "put": 1,
    "drop": 1,
    "share": 2,
    "clone": 1,
    "copy": 1,
    "keep": 1,
    "restore": 1,
    "rebind": 1,
}


class World:
    """The models of one history, and what is done to them.

    Two worlds of one seed draw the same steps, as long as they are of the same structure.
    """

    def __init__(self, seed: int, lifted: bool):
        self.lifted = lifted
        self.draw = random.Random(seed)
        shared = [self.new_ref("params"), self.new_ref("state")]
        self.models = [self.new_node(shared), self.new_node(shared)]
        self.kept = [(rx.snapshot(self.models[0]), rx.state_dict(self.models[0]))]
        model = self.models[0]

        def rebind(new: Node) -> None:
            nonlocal model
            model = new

        def closure(x: Any) -> Any:
            return write(model, x)

        self.rebind_closure = rebind
        self.closure = rx.filter_jit(closure) if lifted else closure
        # What is closed over, to be put back where it fails in plain Python.
        self.closed_over = lambda: model

    def step(self) -> tuple[str, Any]:
        """Does something. Its name, and what came of it."""
        name = self.draw.choices([*STEPS], [*STEPS.values()])[0]
        return name, getattr(self, name)()

    def state(self, result: Any) -> list[Any]:
        """All that can be seen of this world: two of equal state have equal numbers, and
        the same sharing."""
        numbers: dict[rx.Ref, int] = {}
        seen = []
        trees = (self.models, self.closed_over(), self.kept, result)
        for leaf in jax.tree.leaves(trees):
            if isinstance(leaf, rx.Ref):
                is_new = leaf not in numbers
                seen.append(numbers.setdefault(leaf, len(numbers)))
                if is_new:
                    leaves, treedef = jax.tree.flatten(leaf.value)
                    seen += [str(treedef), leaf.collection, *map(_numbers, leaves)]
            else:
                seen.append(_numbers(leaf))
        return seen

    # What is drawn.

    def new_value(self, collection: Any) -> Any:
        n = self.draw.randint(0, 4)
        if collection == "params":
            return jnp.array(float(n))
        kinds: list[Callable[[], Any]] = [
            lambda: jnp.array(n),
            lambda: jnp.full(2, float(n)),
            lambda: float(n),
            lambda: n,
            lambda: np.full(2, n, np.float32),
            lambda: jnp.full((), n, jnp.bfloat16),
            lambda: {"x": jnp.array(float(n)), "mode": "ab"[: 1 + n % 2]},
            lambda: (jnp.array(1.0), jnp.array(n)),
            lambda: Weight(jnp.array(float(n)), 1 - 2 * (n % 2)),
            lambda: None,
            lambda: n > 2,
        ]
        return self.draw.choice(kinds)()

    def new_ref(self, collection: Any = None) -> rx.Ref:
        collection = collection or self.draw.choice(["params", "state"])
        return rx.Ref(self.new_value(collection), collection)

    def new_node(self, refs: list[rx.Ref]) -> Node:
        return Node(
            refs[0],
            [self.new_ref("state")],
            {"a": refs[-1]},
            None,
            self.draw.choice([1, 2]),
        )

    def new_part(self) -> Any:
        match self.draw.randrange(3):
            case 0:
                return self.new_node([self.any_ref(), self.any_ref()])
            case 1:
                return self.new_ref()
            case _:
                return self.any_ref()

    def any_ref(self, collection: Any = None) -> rx.Ref:
        refs = dict.fromkeys(ref for ref, _ in places(self.models))
        return self.draw.choice([r for r in refs if collection in (None, r.collection)])

    def any_model(self) -> Node:
        return self.draw.choice(self.models)

    # The steps.

    def call(self) -> Any:
        lifted, plain = FUNCTIONS[self.draw.choice([*FUNCTIONS])]
        tree: Any = self.any_model()
        if self.draw.random() < 0.3:
            tree = [tree, self.any_model()]
        return self._run(lifted if self.lifted else plain, tree, self._x())

    def call_closure(self) -> Any:
        return self._run(self.closure, self._x())

    def _x(self) -> Any:
        return self.draw.choice([1.0, jnp.array(2.0), jnp.array(3)])

    def _run(self, fn: Callable, *args: Any) -> Any:
        # Not in the lifted world: a buffer that is held is not donated.
        trees = [] if self.lifted else [self.models, self.closed_over()]
        before = [(ref, ref.value) for ref, _ in places(trees)]
        flag = self.draw.choice(
            [
                *[contextlib.nullcontext] * 6,
                lambda: rx.mutable("state"),
                lambda: rx.config(check_types=False),
                lambda: jax.default_matmul_precision("float32"),
            ]
        )
        try:
            with flag():
                return jax.block_until_ready(fn(*args))
        except (Failure, rx.ImmutableError, eqx.EquinoxRuntimeError) as e:
            for ref, value in before:  # a failed call changes nothing
                ref.value = value
            return type(e).__name__

    def write(self) -> None:
        ref = self.any_ref()
        ref.value = self.new_value(ref.collection)

    def write_in_place(self) -> None:
        value = self.any_ref("state").value
        if isinstance(value, dict):
            value["x"] = jnp.array(7.0)

    def append(self) -> None:
        items = self.any_model().items
        if len(items) < 3:
            items.append(self.new_part())

    def pop(self) -> None:
        items = self.any_model().items
        if len(items) > 1:
            items.pop()

    def put(self) -> None:
        self.any_model().named[self.draw.choice("abc")] = self.new_part()

    def drop(self) -> None:
        named = self.any_model().named
        if len(named) > 1:
            named.popitem()

    def share(self) -> None:
        i = self.draw.randrange(len(self.models))
        model, part = self.models[i], self.new_part()
        where = lambda node: node.ref if isinstance(part, rx.Ref) else node.child
        is_leaf = lambda x: x is None
        self.models[i] = eqx.tree_at(where, model, part, is_leaf=is_leaf)

    def clone(self) -> None:
        self.models.append(rx.clone(self.any_model()))
        if len(self.models) > 3:
            del self.models[self.draw.randrange(3)]
            gc.collect(0)

    def copy(self) -> None:
        i = self.draw.randrange(len(self.models))
        make = self.draw.choice(
            [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
        )
        self.models[i] = make(self.models[i])

    def keep(self) -> None:
        model = self.any_model()
        self.kept = [*self.kept[-1:], (rx.snapshot(model), rx.state_dict(model))]

    def restore(self) -> Any:
        plain, by_name = self.draw.choice(self.kept)
        write = self.draw.choice(
            [
                lambda model: rx.update_refs(model, plain),
                lambda model: rx.load_state_dict(model, by_name, strict=False),
            ]
        )
        try:
            write(self.any_model())
        except rx.RefError as e:
            return type(e).__name__

    def rebind(self) -> None:
        self.rebind_closure(self.any_model())


def _numbers(leaf: Any) -> Any:
    if isinstance(leaf, str):
        return leaf
    # Not its type: a number of Python is one until a call writes it, and so takes another.
    array = np.asarray(leaf, np.float64)
    return array.shape, array.tobytes()


def run_history(seed: int, steps: int = 40) -> tuple[str | None, list[str]]:
    """Runs one history. What differed, if anything, and what was done."""
    lifted, plain = World(seed, True), World(seed, False)
    done = []
    for _ in range(steps):
        name, expected = plain.step()
        done.append(name)
        try:
            _, result = lifted.step()
            expected, found = plain.state(expected), lifted.state(result)
        except Exception as e:
            return f"{type(e).__name__}: {e}", done
        if expected != found:
            pairs = zip(expected, found)
            at = next((pair for pair in pairs if pair[0] != pair[1]), "the length")
            return f"expected and found: {at}", done
    return None, done
