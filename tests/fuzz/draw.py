"""What is drawn everywhere in a program: names and expressions. And what is known there."""

import dataclasses
import random
from collections.abc import Mapping
from typing import TypeVar

from .interpret import LANES
from .program import Const, Expr, Mix, Name, Product, Sin, Stack


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of a name of a ref: its type, and what the block outside knows of it.
    `made` says whether the ref was made in this block."""

    dtype: str
    shape: tuple[int, ...]
    collection: str | None
    outside: "Known | None" = None
    made: bool = False

    @property
    def type(self) -> tuple:
        """Only names of one type may stand for one ref."""
        return self.dtype, self.shape

    def inside(self) -> "Known":
        """The same ref, in a block that it is given to."""
        return dataclasses.replace(self, made=False, outside=self)

    def sliced(self, axis: int) -> "Known":
        """A slice of it."""
        shape = list(self.shape)
        del shape[axis]
        return dataclasses.replace(self, shape=tuple(shape))


@dataclasses.dataclass
class Scope:
    """What a statement may name, and where it stands.

    - `refs`, `arrays`: the names;
    - `depth`: how deep transforms may still be nested;
    - `path`: the transforms around it, from the outermost one;
    - `fixed`: the names that a loop must hand on as they are;
    - `broadcast`: the names of refs that lanes share. To write one mostly is refused;
    - `live`: an array that certainly is differentiated, by a transform that brings out what
        a backward rule here writes; `logged`: the arrays whose backward rules write;
    - `checked`: the arrays that are checked when the program runs.
    """

    refs: dict[str, Known]
    arrays: list[str]
    depth: int
    path: tuple[str, ...] = ()
    fixed: frozenset[str] = frozenset()
    broadcast: set[str] = dataclasses.field(default_factory=set)
    live: str | None = None
    logged: list[str] = dataclasses.field(default_factory=list)
    checked: list[str] = dataclasses.field(default_factory=list)

    def of(self, *dtypes: str) -> list[str]:
        """The names of the refs of these dtypes."""
        return [n for n, known in self.refs.items() if known.dtype in dtypes]


class Drawing:
    """Draws from a source of randomness: one with a seed, or one of hypothesis."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.n_names = 0

    def name(self, prefix: str) -> str:
        self.n_names += 1
        return f"{prefix}{self.n_names}"

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, weights: Mapping[T, int]) -> T:
        """One of these, as often as its weight says."""
        return self.rng.choice([x for x, n in weights.items() for _ in range(n)])

    def some(self, names: list[str], p: float) -> list[str]:
        """Each of these with a probability."""
        return [n for n in names if self.chance(p)]

    def expr(self, scope: Scope, depth: int = 2) -> Expr:
        rng = self.rng
        if depth == 0 or self.chance(0.25):
            names = [*scope.refs, *scope.refs, *scope.arrays]
            return Name(rng.choice(names)) if names else Const(0.5)
        kind = rng.randrange(5)
        a = self.expr(scope, depth - 1)
        if kind == 0:
            return Sin(a)
        if kind == 1:
            return Mix(a, Const(round(rng.uniform(-1, 1), 2)))
        b = self.expr(scope, depth - 1)
        return Mix(a, b) if kind < 4 else Product(a, b)

    def stack(self, scope: Scope, axis: int = 0) -> Stack:
        shape = self.rng.choice([(2,), (2,), (), (3,)])
        parts = tuple(self.expr(scope, 1) for _ in range(LANES))
        # Lanes should differ.
        parts = tuple(Mix(part, Const(0.3 * i - 0.4)) for i, part in enumerate(parts))
        return Stack(parts, shape, min(axis, len(shape)))
