"""A random call of a transform: which refs it is given, what its blocks return, and so on."""

import dataclasses
from collections.abc import Callable
from typing import Any, TYPE_CHECKING

from .draw import Known, Scope
from .interpret import LANES
from .program import Apply, Block, Checked, Expr, Fit, Mix, Name


if TYPE_CHECKING:
    from .generate import Generator


STYLES = ["list", "dict", "module", "nested"]
HOWS = ["function", "function", "one cell", "method", "module"]


class Call:
    """A call of a transform, while it is drawn.

    - `passed`, `sliced`: the names of the refs that are arguments, and of those that are
        given in slices, with their `axes`; `rest`: those that may be closed over;
    - `inputs`: the arrays that are arguments, and `bound`: their names inside;
    - `n_values`: how many arrays each block returns.
    """

    def __init__(self, gen: "Generator", scope: Scope, name: str, is_top: bool):
        self.gen, self.rng = gen, gen.rng
        self.scope = scope
        self.name, self.kind = name, TRANSFORMS[name]
        self.is_top = is_top
        self.options: dict[str, Any] = {}
        self.passed: list[str] = []
        self.sliced: list[str] = []
        # The axis of each of `sliced`.
        self.axes: list[int | None] = []
        self.rest: list[str] = []
        self.inputs: list[Expr] = []
        self.bound: list[str] = []
        # A ref that a backward rule writes. It is the last argument.
        self.log: str | None = None
        # Whether one is written in it.
        self.has_log = False
        self.has_check = False
        self.n_values = self.rng.randint(1, 2)
        self.n_blocks = 1

    def draw(self) -> Apply:
        self.choose_refs()
        self.kind.draw(self)
        if self.gen.chance(0.2):
            self.options["wrapped"] = self.rng.choice(["jit", "checkpoint"])
        blocks, outs = self.blocks()
        return self.finish(blocks, outs)

    #
    # Refs.
    #

    def choose_refs(self) -> None:
        refs, chance = self.scope.refs, self.gen.chance
        if self.kind.slices:
            self.choose_slices()
        # Two names may be one ref, so leave out all of the type of one that is sliced.
        types = {refs[n].type for n in self.sliced}
        self.rest = [
            n
            for n in refs
            if n not in self.sliced
            and (refs[n].type not in types or chance(0.15))
            and not (
                self.options.get("by_collection") and refs[n].collection == "layers"
            )
        ]
        passed = self.gen.some(self.rest, 0.6) if self.kind.passes else []
        if self.kind.derivative:
            floats = self.scope.of("float")
            if not set(floats) & set(passed):
                passed.append(self.rng.choice(floats))
        if passed and chance(0.15):
            passed.append(self.rng.choice(passed))
        self.passed = passed[:6]
        if self.kind.slices and not self.options.get("by_collection"):
            self.choose_axes()

    def choose_slices(self) -> None:
        refs = self.scope.refs
        stacked = [n for n in refs if LANES in refs[n].shape]
        self.sliced = self.gen.some(stacked, 0.6)[:4]
        if self.name == "vmap" and self.gen.chance(0.4):
            # All of them, or one would be met with two axes.
            self.options["by_collection"] = True
            layers = [n for n in stacked if refs[n].collection == "layers"]
            self.sliced = [n for n in layers if refs[n].shape[0] == LANES][:4]
        self.axes = [0] * len(self.sliced)

    def choose_axes(self) -> None:
        """An axis for each type, as two names of one type may be one ref."""
        refs, chance = self.scope.refs, self.gen.chance
        of_type: dict[tuple, int] = {}
        for k, name in enumerate(self.sliced):
            shape = refs[name].shape
            fits = [i for i, n in enumerate(shape) if n == LANES]
            axis = self.rng.choice(fits)
            axis = axis - len(shape) if chance(0.2) else axis
            if not chance(0.1):
                axis = of_type.setdefault(refs[name].type, axis)
            self.axes[k] = axis
        # Among what is sliced there may be refs that are not.
        for name in self.gen.some(self.rest, 0.1)[:2]:
            self.sliced.append(name)
            self.axes.append(None)
        if any(axis != 0 for axis in self.axes):
            self.options["axes"] = tuple(self.axes)

    #
    # What else the transforms take. Each of these is in the table below.
    #

    def take(self, e: Expr) -> None:
        self.inputs.append(e)
        self.bound.append(self.gen.name("x"))

    def take_any(self) -> None:
        for _ in range(self.rng.randint(0, 2)):
            self.take(self.gen.expr(self.scope, 1))

    def draw_call(self) -> None:
        self.take_any()
        self.options["keywords"] = self.gen.chance(0.2)
        if self.name == "jit" and self.is_top and self.gen.chance(0.3):
            self.options["donate"] = "refs"

    def draw_grad(self) -> None:
        self.take_any()
        self.options["keywords"] = self.gen.chance(0.2)
        refs = self.scope.refs
        of = {refs[n].collection for n in self.passed if refs[n].dtype == "float"}
        of -= {None}
        if of and self.gen.chance(0.4):
            self.options["wrt"] = self.rng.choice(sorted(map(str, of)))
        # One that is differentiated comes first.
        self.passed.sort(key=lambda n: not self.differentiates(n))

    def differentiates(self, name: str) -> bool:
        known = self.scope.refs[name]
        wrt = self.options.get("wrt", known.collection)
        return known.dtype == "float" and known.collection == wrt

    def draw_custom(self) -> None:
        scope = self.scope
        self.options["factor"] = self.rng.choice([2.0, -0.5])
        # The rules have no derivative with respect to what they close over.
        if derivatives(scope.path):
            self.rest = []
        self.passed = [n for n in self.passed if scope.refs[n].dtype != "log"]
        logs = scope.of("log")
        if self.name == "custom_vjp" and scope.live and logs:
            self.log = self.rng.choice(logs)
            self.options["log"] = self.has_log = True
            # Without a derivative by its argument, the rule would not run.
            self.take(Mix(Name(scope.live), self.gen.expr(scope, 1)))
        self.take_any()

    def draw_associative(self) -> None:
        stacks = [self.gen.stack(self.scope) for _ in range(self.n_values)]
        if self.gen.chance(0.3):
            # The last one. (Not -1, which JAX does not take together with `reverse`.)
            axis = len(stacks[0].shape)
            stacks = [dataclasses.replace(stacks[0], axis=axis)]
            self.options["axis"] = axis
        self.inputs += stacks
        self.n_values = len(stacks)
        if self.gen.chance(0.3):
            self.options["reverse"] = True

    def take_carry(self) -> None:
        self.take(Fit(self.gen.expr(self.scope, 1), self.rng.choice([(2,), ()])))

    def take_stacks(self) -> None:
        """At least one thing that has a size, or the size itself."""
        axes: list[int | None] = []
        is_sized = any(axis is not None for axis in self.axes)
        if self.gen.chance(0.8) or (self.name == "map" and not is_sized):
            stack = self.gen.stack(self.scope, int(self.gen.chance(0.3)))
            self.take(stack)
            axes.append(stack.axis)
        elif not is_sized:
            self.options["sized"] = True
        if self.gen.chance(0.15):
            self.take(self.gen.expr(self.scope, 1))
            axes.append(None)
        if any(axis != 0 for axis in axes):
            self.options["array_axes"] = tuple(axes)
        if self.name == "vmap" and self.gen.chance(0.25):
            self.options["out_axis"] = -1
        if self.name == "vmap" and self.gen.chance(0.25):
            self.options["same_rng"] = True

    def draw_map(self) -> None:
        self.take_stacks()
        if self.gen.chance(0.4):
            self.options["batch_size"] = self.rng.randint(1, 3)

    def draw_scan(self) -> None:
        self.take_carry()
        self.take_stacks()
        if self.gen.chance(0.25):
            self.options["reverse"] = True

    def take_carry_and_count(self) -> None:
        self.take_carry()
        self.bound.append(self.gen.name("i"))
        self.n_values = 1

    def draw_fori(self) -> None:
        self.take_carry_and_count()
        lower = self.rng.randint(0, 2)
        self.options["bounds"] = (lower, lower + self.rng.choice([0, 1, 2, 3, 3]))

    def draw_while(self) -> None:
        self.take_carry_and_count()
        self.options["steps"] = self.rng.randint(0, 3)

    def draw_branches(self) -> None:
        is_cond = self.name == "cond"
        ints = self.scope.of("int")
        pred = self.gen.expr(self.scope, 1)
        if ints and not is_cond and self.gen.chance(0.6):
            pred = Name(self.rng.choice(ints))
        # Not bound: the branches are not given it.
        self.inputs.append(pred)
        if is_cond:
            self.options["threshold"] = round(self.rng.uniform(-0.5, 0.5), 3)
        if self.gen.chance(0.7):
            self.take(Fit(self.gen.expr(self.scope, 1), (2,)))
        self.n_values = self.rng.randint(0, 2)
        self.n_blocks = 2 if is_cond else self.rng.randint(2, 3)

    #
    # Blocks.
    #

    def blocks(self) -> tuple[list[Block], list[Known]]:
        """The blocks, and what is known of the refs that the last one returns."""
        refs, gen = self.scope.refs, self.gen
        params = {gen.name("p"): refs[n].inside() for n in self.passed}
        slices = {
            gen.name("s"): known if axis is None else known.sliced(axis)
            for known, axis in zip((refs[n].inside() for n in self.sliced), self.axes)
        }
        # Names that are closed over by one branch and not by another.
        chance = 0.25 if self.kind.passes else 0.6
        # What is sliced and closed over as well is withheld, which plain Python is not: the
        # tests of axes have that.
        mapped = {refs[n].type for n, k in zip(self.sliced, self.axes) if k is not None}
        rest = [n for n in self.rest if refs[n].type not in mapped]
        closed_of = [gen.some(rest, chance)[:4] for _ in range(self.n_blocks)]
        kept_of = [self.kept() for _ in range(self.n_blocks)]
        blocks: list[Block] = []
        returned = None if self.kind.returns_refs else ()
        outs: list[Known] = []
        for closed, kept in zip(closed_of, kept_of):
            if self.n_blocks > 1:
                returned = self.returned_by_branch(list(params), blocks)
            inner = self.scope_of_block(params, slices, closed, kept)
            block = gen.block(
                inner,
                Block(
                    params=tuple(params),
                    sliced=tuple(slices),
                    inputs=tuple(self.bound),
                    closed=tuple(closed),
                    kept=tuple(kept),
                    body=(),
                    values=(),
                    refs=(),
                    loops=self.kind.loops,
                ),
                self.n_values,
                returned,
                largest=max(2, self.scope.depth + (self.n_blocks == 1)),
            )
            if self.n_blocks > 1:
                # Branches must agree on the shapes.
                values = [e.a if isinstance(e, Fit) else e for e in block.values]
                fitted = tuple(Fit(e, (2,)) for e in values)
                block = dataclasses.replace(block, values=fitted)
            self.has_log |= self.kind.brings_out and bool(inner.logged)
            if self.is_top and self.name == "jit":
                block = self.checked_top(block, inner)
            elif self.scope.path == ("jit",) and self.name in CHECKED:
                block = self.checked(block, inner)
            outs = [inner.refs[n] for n in block.refs]
            blocks.append(block)
        return blocks, outs

    def checked(self, block: Block, inner: Scope) -> Block:
        """Sometimes, the last value is checked when it runs."""
        if not block.values or not self.gen.chance(0.2):
            return block
        largest = round(self.rng.uniform(-0.2, 2.0), 2)
        *values, last = block.values
        self.has_check = True
        return dataclasses.replace(block, values=(*values, Checked(last, largest)))

    def checked_top(self, block: Block, inner: Scope) -> Block:
        """A check runs only if what it checks is returned, so that is done here."""
        more = tuple(map(Name, inner.checked))
        self.n_values += len(more)
        block = dataclasses.replace(block, values=(*block.values, *more))
        return self.checked(block, inner)

    def kept(self) -> list[str]:
        scope = self.scope
        if self.name in CUSTOM:
            # JAX keeps the rules with what it traced, and takes a tracer that they close
            # over for a leak.
            return []
        kept = self.gen.some(scope.arrays, 0.3)
        if self.kind.brings_out and scope.live and scope.live not in kept:
            kept.append(scope.live)
        return kept

    def live(self, params: list[str]) -> str | None:
        """As that of `Scope`. Of a derivative, it is the param that is differentiated."""
        if self.kind.brings_out:
            return self.scope.live
        if self.name not in ("grad", "value_and_grad") or derivatives(self.scope.path):
            return None
        return params[0] if self.differentiates(self.passed[0]) else None

    def returned_by_branch(self, params: list[str], before: list[Block]) -> tuple:
        """Mostly, all branches return the same refs."""
        if not before:
            return tuple(self.gen.some(params, 0.3))
        out = before[-1].refs
        return out[::-1] if out and self.gen.chance(0.2) else out

    def scope_of_block(
        self, params: dict, slices: dict, closed: list[str], kept: list[str]
    ) -> Scope:
        own = {n: self.scope.refs[n].inside() for n in closed} | params
        outer = self.scope.broadcast
        if self.name == "vmap" or self.options.get("batch_size"):
            whole = {s for s, axis in zip(slices, self.axes) if axis is None}
            broadcast = set(own) | whole
        elif self.name == "associative_scan":
            # There a write is refused.
            broadcast = set(own)
        else:
            # What a vmap further out broadcasts, under its names inside.
            inside = [*zip(params, self.passed), *zip(slices, self.sliced)]
            broadcast = {p for p, n in inside if n in outer} | (outer & set(closed))
        return Scope(
            own | slices,
            [*kept, *self.bound],
            self.scope.depth - 1,
            (*self.scope.path, self.name),
            frozenset(params) if self.kind.loops else frozenset(),
            broadcast,
            self.live(list(params)),
        )

    #
    # What comes out.
    #

    def known_outside(self, known: Known) -> Known:
        if known.outside is not None:
            return known.outside
        if self.kind.slices:
            shape = (LANES, *known.shape)
            if self.options.get("out_axis"):
                shape = (*known.shape, LANES)
            return dataclasses.replace(known, shape=shape)
        return known

    def finish(self, blocks: list[Block], outs: list[Known]) -> Apply:
        gen, scope = self.gen, self.scope
        out_refs = {gen.name("r"): self.known_outside(known) for known in outs}
        n_out = self.kind.n_out
        n_out = self.n_values + self.kind.extra if n_out is None else n_out
        out_values = [gen.name("z") for _ in range(n_out)]
        if self.has_log and out_values:
            scope.logged.append(out_values[0])
        if self.has_check:
            scope.checked.append(out_values[-1])
        scope.refs.update(out_refs)
        # What comes out may be a broadcast ref again.
        if scope.broadcast:
            scope.broadcast |= {n for n, known in out_refs.items() if not known.made}
        scope.arrays.extend(out_values)
        return Apply(
            self.name,
            tuple(blocks),
            (*self.passed, self.log) if self.log else tuple(self.passed),
            tuple(self.sliced),
            tuple(self.inputs),
            self.rng.choice(STYLES),
            self.rng.choice(HOWS),
            tuple(self.options.items()),
            tuple(out_values),
            tuple(out_refs),
        )


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the calls of a transform are like.

    - `weight`: how often it is drawn;
    - `draw`: draws its inputs and options;
    - `derivative`: "reverse" or "forward", if it differentiates;
    - `passes`: whether refs are arguments; `slices`: whether some are given in slices, and
        what is made comes out stacked; `loops`: whether a step hands on its refs;
    - `returns_refs`: whether refs can be returned;
    - `brings_out`: whether what a backward rule inside writes comes out of it, if it comes
        out of what is around it. By lane it would have to be one value;
    - `extra`: how many arrays come out besides those that the block returns; `n_out`: how
        many, whatever it returns.
    """

    weight: int
    draw: Callable[[Call], None]
    derivative: str = ""
    passes: bool = True
    slices: bool = False
    loops: bool = False
    returns_refs: bool = True
    brings_out: bool = False
    extra: int = 0
    n_out: int | None = None


TRANSFORMS = {
    "jit": Kind(4, Call.draw_call, brings_out=True),
    "checkpoint": Kind(3, Call.draw_call, brings_out=True),
    "grad": Kind(3, Call.draw_grad, "reverse", extra=1),
    "value_and_grad": Kind(2, Call.draw_grad, "reverse", extra=2),
    "vjp": Kind(2, Call.take_any, "reverse", extra=1),
    "jvp": Kind(2, Call.take_any, "forward", extra=1),
    "linearize": Kind(2, Call.take_any, "reverse", extra=1),
    "jacfwd": Kind(1, Call.take_any, "forward", n_out=1),
    "jacrev": Kind(1, Call.take_any, "reverse", n_out=1),
    "hessian": Kind(1, Call.take_any, "reverse", returns_refs=False, n_out=1),
    "vmap": Kind(4, Call.take_stacks, slices=True),
    "scan": Kind(4, Call.draw_scan, slices=True, loops=True, brings_out=True),
    "map": Kind(2, Call.draw_map, passes=False, slices=True),
    "fori": Kind(3, Call.draw_fori, loops=True, returns_refs=False, brings_out=True),
    "while_": Kind(2, Call.draw_while, loops=True, returns_refs=False, extra=1),
    "cond": Kind(3, Call.draw_branches, brings_out=True),
    "switch": Kind(2, Call.draw_branches, brings_out=True),
    "associative_scan": Kind(
        2, Call.draw_associative, passes=False, returns_refs=False
    ),
    "custom_jvp": Kind(2, Call.draw_custom),
    "custom_vjp": Kind(3, Call.draw_custom),
    "closure_convert": Kind(2, Call.take_any),
    "lift": Kind(1, Call.take_any),
    # At the top only: no transform at all.
    "plain_call": Kind(0, Call.draw_call),
}


CUSTOM = {"custom_jvp", "custom_vjp"}


# What may hold a check: where it runs, and how often, is as in plain Python. (Under vmap
# both branches of a cond run.)
CHECKED = {"jit", "checkpoint", "vmap", "map", "grad", "value_and_grad"}


def derivatives(path: tuple[str, ...]) -> list[str]:
    """The transforms around a statement that differentiate."""
    return [name for name in path if TRANSFORMS[name].derivative]


def weights(path: tuple[str, ...], scope: Scope) -> dict[str, int]:
    """How often each transform is drawn beneath those of `path`."""
    found = {name: kind.weight for name, kind in TRANSFORMS.items()}
    around = derivatives(path)
    kinds = {TRANSFORMS[name].derivative for name in around}
    if not path:
        found["jit"], found["plain_call"] = 8, 1
    if "reverse" in kinds:
        found["while_"] = 0
    if len(around) > 1 or "hessian" in around:
        # The rules are true to the first derivative only.
        found["custom_jvp"] = found["custom_vjp"] = 0
    if around and ("forward" in kinds or {"linearize", "custom_jvp"} & set(path)):
        # By JAX, it has no forward mode.
        found["custom_vjp"] = 0
    if scope.of("log") and not around:
        found["grad"] = 10
    if scope.of("log") and scope.live:
        found["custom_vjp"] = 15
    for name, kind in TRANSFORMS.items():
        if not kind.derivative:
            continue
        if around:
            # Derivatives of derivatives take long.
            matrix = name in ("jacfwd", "jacrev", "hessian")
            found[name] = 0 if matrix else 1
        if not scope.of("float"):
            found[name] = 0
    return found
