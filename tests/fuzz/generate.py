"""A random program for a seed."""

import dataclasses
import random
from typing import Any

from .interpret import LANES
from .program import (
    Apply,
    Block,
    Const,
    Count,
    Expr,
    Fit,
    Let,
    Mix,
    Name,
    New,
    Product,
    Program,
    RefSpec,
    SetPart,
    Sin,
    Stack,
    Statement,
    Swap,
    Tie,
    Write,
    WriteIfSame,
)


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of a name of a ref: its type, and that of the ref outside, if it stands
    for a slice. `made` says whether the ref was made in this block."""

    dtype: str
    shape: tuple[int, ...]
    collection: str | None
    whole: "Known | None" = None
    made: bool = False


SHAPES: list[tuple[int, ...]] = [(2,), (2,), (), (3, 2), (3,), (3, 3)]
COLLECTIONS = ["params", "params", "stats", None]
STYLES = ["list", "dict", "module", "nested"]
HOWS = ["function", "function", "one cell", "method", "module"]

# How often each transform is drawn.
TRANSFORMS = {
    "jit": 4,
    "checkpoint": 3,
    "grad": 3,
    "value_and_grad": 2,
    "vjp": 2,
    "jvp": 2,
    "linearize": 2,
    "jacfwd": 1,
    "jacrev": 1,
    "hessian": 1,
    "vmap": 4,
    "scan": 4,
    "map": 2,
    "fori": 3,
    "while_": 2,
    "cond": 3,
    "switch": 2,
}
REVERSE = {"grad", "value_and_grad", "vjp", "jacrev", "hessian", "linearize"}
DIFFERENTIATES = REVERSE | {"jvp", "jacfwd"}


class Generator:
    def __init__(self, seed: int, depth: int = 3):
        self.rng = random.Random(seed)
        self.seed = seed
        self.depth = depth
        self.n_names = 0

    def name(self, prefix: str) -> str:
        self.n_names += 1
        return f"{prefix}{self.n_names}"

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def program(self) -> Program:
        rng = self.rng
        pool = []
        for i in range(rng.randint(2, 5)):
            kind = rng.random()
            if kind < 0.25 and i:
                pool.append(RefSpec("int", rng.choice([(), (), (3,)]), "counts"))
            else:
                shape = rng.choice(SHAPES) if i else (2,)
                collection = "layers" if shape[:1] == (3,) else rng.choice(COLLECTIONS)
                pool.append(RefSpec("float", shape, collection))
        pool = [
            dataclasses.replace(x, collection="layers") if x.shape[:1] == (3,) else x
            for x in pool
        ]
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
        top = self.apply(refs, ["x0"], self.depth, frozenset(), top=True)
        return Program(tuple(pool), places, again, top, self.seed)

    #
    # Expressions.
    #

    def expr(self, refs: dict, arrays: list[str], depth: int = 2) -> Expr:
        rng = self.rng
        if depth == 0 or self.chance(0.25):
            names = [*refs, *refs, *arrays]
            return Name(rng.choice(names)) if names else Const(0.5)
        kind = rng.randrange(5)
        a = self.expr(refs, arrays, depth - 1)
        if kind == 0:
            return Sin(a)
        if kind == 1:
            return Mix(a, Const(round(rng.uniform(-1, 1), 2)))
        b = self.expr(refs, arrays, depth - 1)
        return Mix(a, b) if kind < 4 else Product(a, b)

    def stack(self, refs: dict, arrays: list[str]) -> Expr:
        shape = self.rng.choice([(2,), (2,), (), (3,)])
        parts = tuple(self.expr(refs, arrays, 1) for _ in range(LANES))
        # Lanes should differ.
        parts = tuple(Mix(part, Const(0.3 * i - 0.4)) for i, part in enumerate(parts))
        return Stack(parts, shape)

    #
    # Statements. `fixed` are the names that a loop must hand on as they are.
    #

    def statement(
        self,
        refs: dict,
        arrays: list[str],
        depth: int,
        inside: frozenset,
        fixed: set,
        broadcast: set,
    ) -> list[Statement]:
        rng = self.rng
        if depth and self.chance(0.45):
            return [self.apply(refs, arrays, depth, inside, broadcast=broadcast)]
        # A broadcast ref is written seldom: mostly that is refused.
        writable = [n for n in refs if n not in broadcast or self.chance(0.3)]
        floats = [n for n in writable if refs[n].dtype == "float"]
        ints = [n for n in refs if refs[n].dtype == "int"]
        kind = rng.random()
        if kind < 0.40 and floats:
            return [Write(rng.choice(floats), self.expr(refs, arrays))]
        if kind < 0.58 and ints:
            a = rng.choice(ints)
            by: Any = rng.randint(1, 3)
            if self.chance(0.2) and a in writable:
                by = rng.choice(ints)
            return [Count(a, by)]
        if kind < 0.66 and floats:
            shaped = [n for n in floats if refs[n].shape]
            if shaped:
                return [SetPart(rng.choice(shaped), self.expr(refs, arrays, 1))]
        if kind < 0.74:
            name = self.name("n")
            collection = rng.choice(COLLECTIONS)
            shape = rng.choice([(2,), (), (3,), (3, 2)])
            e = Fit(self.expr(refs, arrays), shape)
            if shape[:1] == (3,):
                collection = "layers"
            refs[name] = Known("float", shape, collection, None, True)
            return [New(name, e, collection)]
        if kind < 0.84:
            pairs = [
                (a, b)
                for a in refs
                for b in refs
                if a != b
                and (refs[a].dtype, refs[a].shape) == (refs[b].dtype, refs[b].shape)
                and (not {a, b} & fixed or self.chance(0.15))
                and (a in broadcast) == (b in broadcast)
            ]
            if pairs:
                a, b = rng.choice(pairs)
                if self.chance(0.5):
                    refs[a], refs[b] = refs[b], refs[a]
                    return [Swap(a, b)]
                refs[a] = refs[b]
                return [Tie(a, b)]
        if kind < 0.88 and floats:
            a, b = rng.choice(floats), rng.choice(list(refs))
            return [WriteIfSame(a, b, self.expr(refs, arrays))]
        e = self.expr(refs, arrays)
        name = self.name("y")
        arrays.append(name)
        return [Let(name, e)]

    def block(
        self,
        params: dict,
        sliced: dict,
        inputs: list[str],
        outer: dict,
        closed: list[str],
        kept: list[str],
        depth: int,
        inside: frozenset,
        *,
        broadcast: bool = False,
        outer_broadcast: frozenset = frozenset(),
        n_values: int = 1,
        loops: bool = False,
        out: list[str] | None = None,
        size: int = 3,
    ) -> tuple[Block, dict]:
        refs = {
            n: dataclasses.replace(outer[n], made=False, whole=None) for n in closed
        }
        refs |= params
        own = dict(refs)
        refs |= sliced
        arrays = [*kept, *inputs]
        # What may not be written with a value by lane.
        shared = set(own) if broadcast else set(outer_broadcast) & set(own)
        fixed = set(params) if loops else set()
        body: list[Statement] = []
        for _ in range(self.rng.randint(1, size)):
            body += self.statement(refs, arrays, depth - 1, inside, fixed, shared)
        values = [self.expr(refs, arrays) for _ in range(n_values)]
        values = [
            Fit(e, self.rng.choice([(2,), ()])) if self.chance(0.5) else e
            for e in values
        ]
        if out is None:
            out = [n for n in refs if self.chance(0.25)][:3]
        return (
            Block(
                tuple(params),
                tuple(sliced),
                tuple(inputs),
                tuple(closed),
                tuple(kept),
                tuple(body),
                tuple(values),
                tuple(out),
                loops,
            ),
            refs,
        )

    #
    # Transforms.
    #

    def apply(
        self,
        refs: dict,
        arrays: list[str],
        depth: int,
        inside: frozenset,
        *,
        top: bool = False,
        broadcast: set | frozenset = frozenset(),
    ) -> Apply:
        rng = self.rng
        weights = dict(TRANSFORMS)
        if inside & REVERSE:
            del weights["while_"]
        if inside & DIFFERENTIATES:
            # Derivatives of derivatives take long.
            for name in ("jacfwd", "jacrev", "hessian"):
                del weights[name]
            for name in DIFFERENTIATES & set(weights):
                weights[name] = 1
        if top:
            weights["jit"], weights["plain_call"] = 8, 1
        (kind,) = rng.choices(list(weights), list(weights.values()))
        if kind in DIFFERENTIATES and not any(
            r.dtype == "float" for r in refs.values()
        ):
            kind = "jit"
        below = inside | {kind}

        names = list(refs)
        stacked = [n for n in names if refs[n].shape[:1] == (LANES,)]
        takes_slices = kind in ("vmap", "scan", "map")
        sliced = [n for n in stacked if self.chance(0.6)] if takes_slices else []
        options: dict[str, Any] = {}
        if kind == "vmap" and self.chance(0.4):
            options["by_collection"] = True
            sliced = [n for n in stacked if refs[n].collection == "layers"]
        is_sliced = set(sliced)
        # Two names may be one ref, so leave out all of the type of one that is sliced.
        types = {(refs[n].dtype, refs[n].shape) for n in sliced}
        rest = [
            n
            for n in names
            if n not in is_sliced
            and ((refs[n].dtype, refs[n].shape) not in types or self.chance(0.15))
            and not (options.get("by_collection") and refs[n].collection == "layers")
        ]
        passed = [n for n in rest if self.chance(0.6)]
        if kind == "map":
            passed = []
        if kind in DIFFERENTIATES and not any(refs[n].dtype == "float" for n in passed):
            passed.append(rng.choice([n for n in names if refs[n].dtype == "float"]))
        if self.chance(0.15) and passed:
            passed.append(rng.choice(passed))
        passed, sliced = passed[:6], sliced[:4]
        if options.get("by_collection"):
            rest = [n for n in rest if refs[n].collection != "layers"]
        chance = 0.25 if kind != "map" else 0.6
        n_blocks = {"cond": 2, "switch": rng.randint(2, 3)}.get(kind, 1)
        closed_of = [
            [n for n in rest if self.chance(chance)][:4] for _ in range(n_blocks)
        ]
        kept_of = [[n for n in arrays if self.chance(0.3)] for _ in range(n_blocks)]

        inner = lambda n: dataclasses.replace(refs[n], made=False, whole=None)
        params = {self.name("p"): inner(n) for n in passed}
        slices = {
            self.name("s"): dataclasses.replace(
                refs[n], shape=refs[n].shape[1:], made=False, whole=refs[n]
            )
            for n in sliced
        }

        inputs: list[Expr] = []
        bound: list[str] = []

        def take(e: Expr) -> None:
            inputs.append(e)
            bound.append(self.name("x"))

        loops = kind in ("scan", "fori", "while_")
        n_values = rng.randint(1, 2)
        if kind in ("scan", "fori", "while_"):
            take(Fit(self.expr(refs, arrays, 1), rng.choice([(2,), ()])))
            n_values = rng.randint(1, 2) if kind == "scan" else 1
            if kind != "scan":
                bound.append(self.name("i"))
        if takes_slices:
            if self.chance(0.8):
                take(self.stack(refs, arrays))
            if not sliced and len(inputs) == (kind == "scan"):
                if kind == "map":
                    take(self.stack(refs, arrays))
                else:
                    options["sized"] = True
        if kind in ("cond", "switch"):
            ints = [n for n in names if refs[n].dtype == "int"]
            pred = self.expr(refs, arrays, 1)
            if ints and kind == "switch" and self.chance(0.6):
                pred = Name(rng.choice(ints))
            inputs.append(pred)
            if kind == "cond":
                options["threshold"] = round(rng.uniform(-0.5, 0.5), 3)
            if self.chance(0.7):
                take(Fit(self.expr(refs, arrays, 1), (2,)))
            n_values = rng.randint(0, 2)
        if not (takes_slices or loops or kind in ("cond", "switch")):
            for _ in range(rng.randint(0, 2)):
                take(self.expr(refs, arrays, 1))

        if kind in ("grad", "value_and_grad"):
            of = {refs[n].collection for n in passed if refs[n].dtype == "float"}
            of -= {None}
            if of and self.chance(0.4):
                options["wrt"] = rng.choice(sorted(of))
        if kind == "scan" and self.chance(0.25):
            options["reverse"] = True
        if kind == "map" and self.chance(0.4):
            options["batch_size"] = rng.randint(1, 3)
        if kind == "fori":
            lower = rng.randint(0, 2)
            options["bounds"] = (lower, lower + rng.choice([0, 1, 2, 3, 3]))
        if kind == "while_":
            options["steps"] = rng.randint(0, 3)

        if self.chance(0.2):
            options["wrapped"] = rng.choice(["jit", "checkpoint"])
        if top and kind == "jit" and self.chance(0.3):
            options["donate"] = "refs"

        by_lane = kind == "vmap" or bool(options.get("batch_size"))
        size = max(2, depth + (1 if n_blocks == 1 else 0))
        blocks: list[Block] = []
        out: list[str] | None = [] if kind in ("fori", "while_", "hessian") else None
        outs: list[Known] = []
        for closed, kept in zip(closed_of, kept_of):
            if n_blocks > 1:
                # Mostly, all branches return the same refs.
                out = [n for n in params if self.chance(0.3)] if not blocks else out
                if blocks and out and self.chance(0.2):
                    out = out[::-1]
            block, after = self.block(
                params,
                slices,
                bound,
                refs,
                closed,
                kept,
                depth,
                below,
                broadcast=by_lane,
                outer_broadcast=self._inner_broadcast(
                    broadcast, passed, params, closed
                ),
                n_values=n_values,
                loops=loops,
                out=out,
                size=size,
            )
            if n_blocks > 1:
                fitted = [(e.a if isinstance(e, Fit) else e) for e in block.values]
                block = dataclasses.replace(
                    block, values=tuple(Fit(e, (2,)) for e in fitted)
                )
                # A name that is tied to another ref is not the same ref in all branches.
                outs = [after[n] for n in block.refs]
            else:
                outs = [after[n] for n in block.refs]
            blocks.append(block)

        stacks = kind in ("vmap", "scan", "map")
        out_refs = {}
        for known in outs:
            if known.whole is not None:
                new = dataclasses.replace(known.whole)
            elif known.made:
                shape = (LANES, *known.shape) if stacks else known.shape
                new = dataclasses.replace(known, shape=shape)
            else:
                new = dataclasses.replace(known)
            out_refs[self.name("r")] = new
        extra = {
            "value_and_grad": 2,
            "grad": 1,
            "vjp": 1,
            "jvp": 1,
            "linearize": 1,
            "while_": 1,
        }.get(kind, 0)
        n_out = n_values + extra
        if kind in ("jacfwd", "jacrev", "hessian"):
            n_out = 1
        out_values = [self.name("z") for _ in range(n_out)]
        refs.update(out_refs)
        if isinstance(broadcast, set):
            # What comes out may be a broadcast ref again.
            broadcast |= {n for n, k in out_refs.items() if not k.made}
        arrays.extend(out_values)
        return Apply(
            kind,
            tuple(blocks),
            tuple(passed),
            tuple(sliced),
            tuple(inputs),
            rng.choice(STYLES),
            rng.choice(HOWS),
            tuple(options.items()),
            tuple(out_values),
            tuple(out_refs),
        )

    def _inner_broadcast(
        self, broadcast: Any, passed: list[str], params: dict, closed: list[str]
    ) -> frozenset:
        """What is broadcast by a vmap outside, under its names inside."""
        inner = {p for p, n in zip(params, passed) if n in broadcast}
        return frozenset(inner | (set(broadcast) & set(closed)))


def generate(seed: int, depth: int = 3) -> Program:
    return Generator(seed, depth).program()
