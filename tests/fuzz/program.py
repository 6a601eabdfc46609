"""What a program is: plain data, which both interpretations read.

A program is one transform, applied to a block. A block is a list of statements, which may
apply transforms in turn. Names stand for refs and for arrays; an array that is needed in
another shape is averaged and broadcast, so that any expression may stand anywhere.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Name:
    """An array, or the value of a ref."""

    name: str


@dataclasses.dataclass(frozen=True)
class Const:
    value: float


@dataclasses.dataclass(frozen=True)
class Sin:
    a: Any


@dataclasses.dataclass(frozen=True)
class Mix:
    """`0.5 * a + 0.25 * b`, in the shape of `a`."""

    a: Any
    b: Any


@dataclasses.dataclass(frozen=True)
class Product:
    """`sin(a * b)`, in the shape of `a`."""

    a: Any
    b: Any


@dataclasses.dataclass(frozen=True)
class Fit:
    a: Any
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Stack:
    """Three arrays of one shape, stacked."""

    parts: tuple
    shape: tuple[int, ...]
    axis: int = 0


@dataclasses.dataclass(frozen=True)
class Checked:
    """`a`, if its sum is at most `largest`; else the call fails when it runs."""

    a: Any
    largest: float


Expr = Checked | Name | Const | Sin | Mix | Product | Fit | Stack


@dataclasses.dataclass(frozen=True)
class Write:
    ref: str
    value: Expr


@dataclasses.dataclass(frozen=True)
class Count:
    """`ref.value += by`; `by` is a number, or the name of another counter."""

    ref: str
    by: int | str


@dataclasses.dataclass(frozen=True)
class SetPart:
    """`ref[0] = value`"""

    ref: str
    value: Expr


@dataclasses.dataclass(frozen=True)
class Retype:
    """`ref.value = value`, of another shape and dtype. A `"weak"` one is a number."""

    ref: str
    value: Expr
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Draw:
    """`name = normal(key)`, for a key that the ref `key` gives.

    - `how`: "split" it and keep one half; "count" with the ref `counter`, as a stream of
        `Rngs` does; or "peek", and write nothing.
    """

    name: str
    key: str
    counter: str | None
    how: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Let:
    name: str
    value: Expr


@dataclasses.dataclass(frozen=True)
class New:
    """A new ref."""

    name: str
    value: Expr
    collection: str | None


@dataclasses.dataclass(frozen=True)
class Swap:
    """Two names of refs swap what they stand for."""

    a: str
    b: str


@dataclasses.dataclass(frozen=True)
class Tie:
    """From here on, `a` is the ref that `b` is."""

    a: str
    b: str


@dataclasses.dataclass(frozen=True)
class WriteIfSame:
    """What a program does may depend on what is shared."""

    a: str
    b: str
    value: Expr


@dataclasses.dataclass(frozen=True)
class Block:
    """A function.

    - `params`, `sliced`: its names for the refs that it is given, and for those that it is
        given in slices;
    - `inputs`: its names for the arrays that it is given;
    - `closed`, `kept`: the names of refs and arrays that it closes over;
    - `values`, `refs`: what it returns;
    - `loops`: whether it also returns its `params`, as a step of a loop does.
    """

    params: tuple[str, ...]
    sliced: tuple[str, ...]
    inputs: tuple[str, ...]
    closed: tuple[str, ...]
    kept: tuple[str, ...]
    body: tuple
    values: tuple
    refs: tuple[str, ...]
    loops: bool = False


@dataclasses.dataclass(frozen=True)
class Apply:
    """A transform of one block, or of several branches, called at once.

    - `style`: of the tree in which the refs are passed;
    - `how`: whether the block is a function, a method of a module, or a module;
    - `out_values`, `out_refs`: the names of what comes out.
    """

    transform: str
    blocks: tuple[Block, ...]
    refs: tuple[str, ...]
    sliced: tuple[str, ...]
    inputs: tuple
    style: str
    how: str
    options: tuple[tuple[str, Any], ...]
    out_values: tuple[str, ...]
    out_refs: tuple[str, ...]

    def option(self, name: str) -> Any:
        return dict(self.options).get(name)


Statement = (
    Write
    | Count
    | SetPart
    | Retype
    | Draw
    | Let
    | New
    | Swap
    | Tie
    | WriteIfSame
    | Apply
)


@dataclasses.dataclass(frozen=True)
class RefSpec:
    """- `dtype`: "float" or "int"; "tree", a float in a dict, which is the value of the ref;
    "loose", a float that may be given another shape and dtype; "key" or "raw", a key for
    random numbers; "log", a float that backward rules write."""

    dtype: str
    shape: tuple[int, ...]
    collection: str | None


@dataclasses.dataclass(frozen=True)
class Program:
    """- `pool`: the refs that there are at first;
    - `places`: a number in the pool for each name. Two of a number are a tie;
    - `again`: other places, for a call with another sharing;
    - `top`: what is called;
    - `seed`: of the values. The refs of every other one have declared types.
    """

    pool: tuple[RefSpec, ...]
    places: dict[str, int]
    again: dict[str, int]
    top: Apply
    seed: int

    @property
    def is_typed(self) -> bool:
        return self.seed % 2 == 1


def has_checks(s: Apply) -> bool:
    """Whether something in it may fail when it runs."""
    return any(
        any(isinstance(e, Checked) for e in block.values)
        or any(isinstance(x, Apply) and has_checks(x) for x in block.body)
        for block in s.blocks
    )


def transforms_of(s: Apply) -> list[str]:
    """The names of all transforms in it."""
    inner = [
        name
        for block in s.blocks
        for statement in block.body
        if isinstance(statement, Apply)
        for name in transforms_of(statement)
    ]
    return [s.transform, *inner]


def text(program: Program) -> str:
    """The program, in a text like Python."""
    typed = ", typed" if program.is_typed else ""
    lines = [f"# values of seed {program.seed}{typed}"]
    for i, spec in enumerate(program.pool):
        names = [n for n, k in program.places.items() if k == i]
        lines.append(
            f"{' = '.join(names) or '_'} = Ref({spec.dtype}{list(spec.shape)}, "
            f"{spec.collection!r})"
        )
    lines.append(f"# later: {program.again}")
    _apply(program.top, "", lines)
    return "\n".join(lines)


def _expr(e: Expr) -> str:
    match e:
        case Name(name):
            return name
        case Const(value):
            return str(value)
        case Checked(a, largest):
            return f"error_if({_expr(a)}, sum > {largest})"
        case Sin(a):
            return f"sin({_expr(a)})"
        case Mix(a, b):
            return f"mix({_expr(a)}, {_expr(b)})"
        case Product(a, b):
            return f"sin({_expr(a)} * {_expr(b)})"
        case Fit(a, shape):
            return f"fit({_expr(a)}, {shape})"
        case Stack(parts, _, axis):
            return f"stack({', '.join(map(_expr, parts))}, axis={axis})"


def _apply(s: Apply, pad: str, lines: list[str]) -> None:
    names = []
    for block in s.blocks:
        name = f"f{len(lines)}"
        names.append(name)
        given = [*block.params, *(f"{n}[:]" for n in block.sliced), *block.inputs]
        over = f"  # closes over {block.closed + block.kept}" if block.closed else ""
        lines.append(f"{pad}def {name}({', '.join(given)}):{over}")
        for inner in block.body:
            _statement(inner, pad + "    ", lines)
        out = [*map(_expr, block.values), *(f"ref {n}" for n in block.refs)]
        after = ["params"] if block.loops else []
        lines.append(f"{pad}    return {', '.join(out + after)}")
    given = [*s.refs, *(f"{n}[:]" for n in s.sliced), *map(_expr, s.inputs)]
    out = [*s.out_values, *(f"ref {n}" for n in s.out_refs)]
    options = "".join(f", {k}={v!r}" for k, v in s.options)
    lines.append(
        f"{pad}{', '.join(out) or '_'} = {s.transform}[{s.how}, {s.style}{options}]"
        f"({', '.join(names)})({', '.join(given)})"
    )


def _statement(s: Statement, pad: str, lines: list[str]) -> None:
    match s:
        case Apply():
            _apply(s, pad, lines)
        case Write(ref, value):
            lines.append(f"{pad}{ref}.value = {_expr(value)}")
        case Count(ref, by):
            lines.append(f"{pad}{ref}.value += {by}")
        case SetPart(ref, value):
            lines.append(f"{pad}{ref}[0] = {_expr(value)}")
        case Retype(ref, value, shape, dtype):
            lines.append(f"{pad}{ref}.value = {dtype}{list(shape)}({_expr(value)})")
        case Draw(name, key, counter, how, shape):
            of = f"{key}, {counter}" if counter else key
            lines.append(f"{pad}{name} = normal({how}({of}), {shape})")
        case Let(name, value):
            lines.append(f"{pad}{name} = {_expr(value)}")
        case New(name, value, collection):
            lines.append(f"{pad}{name} = Ref({_expr(value)}, {collection!r})")
        case Swap(a, b):
            lines.append(f"{pad}{a}, {b} = {b}, {a}")
        case Tie(a, b):
            lines.append(f"{pad}{a} = {b}")
        case WriteIfSame(a, b, value):
            lines.append(f"{pad}if {a} is {b}: {a}.value = {_expr(value)}")
