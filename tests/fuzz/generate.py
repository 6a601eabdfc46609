"""A random program for a seed."""

import dataclasses
import random
from typing import Any

from .calls import Call, TRANSFORMS, weights
from .draw import Drawing, Known, Scope
from .program import (
    Apply,
    Block,
    Count,
    Draw,
    Fit,
    Let,
    Mix,
    Name,
    New,
    Program,
    RefSpec,
    Retype,
    SetPart,
    Statement,
    Swap,
    Tie,
    Write,
    WriteIfSame,
)


__all__ = ["generate", "TRANSFORMS"]

SHAPES: list[tuple[int, ...]] = [(2,), (2,), (), (3, 2), (2, 3), (3,), (3, 3)]
COLLECTIONS = ["params", "params", "stats", None]


class Generator(Drawing):
    def program(self, depth: int) -> Program:
        rng = self.rng
        # What a loose ref may become. Not all of these in one program: whether a weakly
        # typed value is converted depends on what else may be written.
        self.dtypes = rng.choice([("float64", "weak"), ("float64", "float32", "int32")])
        pool = [self.spec(i) for i in range(rng.randint(2, 5))]
        places = {f"m{i}": i for i in range(len(pool))}
        for i in range(len(pool), len(pool) + rng.randint(0, 2)):
            places[f"m{i}"] = rng.randrange(len(pool))
        # Another sharing of the same types.
        again = {
            name: rng.choice([k for k in range(len(pool)) if pool[k] == pool[i]])
            for name, i in places.items()
        }
        refs = {
            name: Known(pool[i].dtype, pool[i].shape, pool[i].collection)
            for name, i in places.items()
        }
        top = self.call(Scope(refs, ["x0"], depth), is_top=True)
        return Program(tuple(pool), places, again, top, rng.randrange(1000))

    def spec(self, i: int) -> RefSpec:
        """A ref that there is at first. The first one is a float."""
        rng = self.rng
        kind = rng.random() if i else 1.0
        if kind < 0.25:
            collection = "rng" if self.chance(0.3) else "counts"
            return RefSpec("int", rng.choice([(), (), (3,)]), collection)
        if kind < 0.34:
            return RefSpec("loose", (2,), "loose")
        if kind < 0.46:
            return RefSpec("log", (), "log")
        if kind < 0.55:
            return RefSpec("key", rng.choice([(), (), (3,)]), "rng")
        if kind < 0.6:
            return RefSpec("raw", rng.choice([(2,), (2,), (3, 2)]), "rng")
        shape = rng.choice(SHAPES) if i else (2,)
        collection = "layers" if shape[:1] == (3,) else rng.choice(COLLECTIONS)
        is_tree = bool(i) and self.chance(0.15)
        return RefSpec("tree" if is_tree else "float", shape, collection)

    def call(self, scope: Scope, *, is_top: bool = False) -> Apply:
        of = weights(scope.path, scope)
        return Call(self, scope, self.pick(of), is_top).draw()

    def block(
        self,
        scope: Scope,
        block: Block,
        n_values: int,
        returned: tuple[str, ...] | None,
        largest: int,
    ) -> Block:
        """The block with a body, of `largest` statements at most, and a result. What
        `scope` knows of the names is true at the end then."""
        first: list[Statement] = []
        if block.params and scope.live == block.params[0]:
            # What it is now: the ref may be written.
            scope.live = self.name("y")
            scope.arrays.append(scope.live)
            first = [Let(scope.live, Name(block.params[0]))]
        body = [self.statement(scope) for _ in range(self.rng.randint(1, largest))]
        values = [self.expr(scope) for _ in range(n_values)]
        for name in scope.logged:
            # So that it has a cotangent.
            values[:1] = [Mix(Name(name), e) for e in values[:1]]
        values = [
            Fit(e, self.rng.choice([(2,), ()])) if self.chance(0.5) else e
            for e in values
        ]
        if returned is None:
            returned = tuple(self.some(list(scope.refs), 0.25)[:3])
        return dataclasses.replace(
            block, body=(*first, *body), values=tuple(values), refs=returned
        )

    #
    # Statements. Each of these is `None` if there is no ref for it.
    #

    def statement(self, scope: Scope) -> Statement:
        if scope.depth > 0 and self.chance(0.45):
            return self.call(scope)
        # A broadcast ref is written seldom: mostly that is refused.
        writable = [
            n for n in scope.refs if n not in scope.broadcast or self.chance(0.3)
        ]
        for _ in range(3):
            statement = self.pick(STATEMENTS)(self, scope, writable)
            if statement is not None:
                return statement
        return self.let(scope, writable)

    def let(self, scope: Scope, writable: list[str]) -> Statement:
        e = self.expr(scope)
        name = self.name("y")
        scope.arrays.append(name)
        return Let(name, e)

    def write(self, scope: Scope, writable: list[str]) -> Statement | None:
        floats = [n for n in scope.of("float", "tree", "log") if n in writable]
        return Write(self.rng.choice(floats), self.expr(scope)) if floats else None

    def count(self, scope: Scope, writable: list[str]) -> Statement | None:
        # Lanes count alike, so a broadcast counter is written too.
        ints = scope.of("int")
        if not ints or ("associative_scan" in scope.path and self.chance(0.9)):
            return None
        a = self.rng.choice(ints)
        by: Any = self.rng.randint(1, 3)
        if a in writable and self.chance(0.2):
            by = self.rng.choice(ints)
        return Count(a, by)

    def set_part(self, scope: Scope, writable: list[str]) -> Statement | None:
        floats = [n for n in scope.of("float", "tree") if n in writable]
        shaped = [n for n in floats if scope.refs[n].shape]
        return SetPart(self.rng.choice(shaped), self.expr(scope, 1)) if shaped else None

    def retype(self, scope: Scope, writable: list[str]) -> Statement | None:
        loose = [n for n in scope.of("loose") if n in writable]
        if not loose:
            return None
        dtype = self.rng.choice(self.dtypes)
        shape = self.rng.choice([(2,), (2,), (), (3, 2)])
        shape = () if dtype == "weak" else shape
        return Retype(self.rng.choice(loose), self.expr(scope), shape, dtype)

    def draw(self, scope: Scope, writable: list[str]) -> Statement | None:
        # Each lane has its own key, so a broadcast one is written too.
        types = [("key", ()), ("raw", (2,))]
        keys = [n for n, known in scope.refs.items() if known.type in types]
        counters = [n for n in scope.of("int") if not scope.refs[n].shape]
        if not keys:
            return None
        how = "count" if counters and self.chance(0.6) else "split"
        # Below an `associative_scan` a write is refused.
        if self.chance(0.9 if "associative_scan" in scope.path else 0.3):
            how = "peek"
        counter = self.rng.choice(counters) if how == "count" else None
        name, key = self.name("d"), self.rng.choice(keys)
        scope.arrays.append(name)
        return Draw(name, key, counter, how, self.rng.choice([(2,), ()]))

    def new(self, scope: Scope, writable: list[str]) -> Statement:
        name = self.name("n")
        shape = self.rng.choice([(2,), (), (3,), (3, 2), (2, 3)])
        collection = self.rng.choice(COLLECTIONS)
        collection = "layers" if shape[:1] == (3,) else collection
        e = Fit(self.expr(scope), shape)
        scope.refs[name] = Known("float", shape, collection, None, True)
        return New(name, e, collection)

    def rename(self, scope: Scope, writable: list[str]) -> Statement | None:
        refs = scope.refs
        pairs = [
            (a, b)
            for a in refs
            for b in refs
            if a != b
            and refs[a].type == refs[b].type
            and (not {a, b} & scope.fixed or self.chance(0.15))
            and (a in scope.broadcast) == (b in scope.broadcast)
        ]
        if not pairs:
            return None
        a, b = self.rng.choice(pairs)
        if self.chance(0.5):
            refs[a], refs[b] = refs[b], refs[a]
            return Swap(a, b)
        refs[a] = refs[b]
        return Tie(a, b)

    def write_if_same(self, scope: Scope, writable: list[str]) -> Statement | None:
        floats = [n for n in scope.of("float") if n in writable]
        if not floats:
            return None
        a, b = self.rng.choice(floats), self.rng.choice(list(scope.refs))
        return WriteIfSame(a, b, self.expr(scope))


# How often each statement is drawn.
STATEMENTS = {
    Generator.write: 40,
    Generator.count: 18,
    Generator.set_part: 8,
    Generator.retype: 16,
    Generator.draw: 25,
    Generator.new: 8,
    Generator.rename: 10,
    Generator.write_if_same: 4,
    Generator.let: 12,
}


def generate(source: int | random.Random, depth: int = 3) -> Program:
    """The program of a seed, or of what hypothesis draws."""
    rng = source if isinstance(source, random.Random) else random.Random(source)
    return Generator(rng).program(depth)
