"""One program, run both ways."""

import dataclasses
import re
import traceback
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import refx_eqx as rx

from .heap import Failed, Place, Refused
from .interpret import Env, FLOAT, is_key, is_typed_key, LANES, raw
from .lifted import Lifted
from .plain import Plain
from .program import has_checks, Program


@dataclasses.dataclass
class Report:
    """- `outcome`: "equal", "refused", "invalid" (the program has no meaning in plain Python
        either, by a fault of the generator) or "wrong";
    - `kind`: of the refusal, or what is wrong;
    - `detail`: the message."""

    outcome: str
    kind: str = ""
    detail: str = ""


class Wrong(Exception):
    """The two interpretations differ."""


# What a refusal says, and the reason for it in plain Python.
REFUSALS = [
    ("differs along the mapped axis", "lanes"),
    ("met .* with two axes", "two axes"),
    ("the results differ at", "branches"),
    ("the branches must agree", "branches"),
    ("a step must return", "carry"),
    ("a step must keep its shape and dtype", "carry type"),
    ("It may only read, because the number", "write in associative_scan"),
    ("found nothing to differentiate", "nothing to differentiate"),
]

# Transforms that do not trace again on a second call.
STAGED = {
    "jit",
    "checkpoint",
    "scan",
    "map",
    "fori",
    "while_",
    "cond",
    "switch",
    "associative_scan",
}


def initial(program: Program, round_: int) -> tuple[list[Any], Any]:
    rng = np.random.default_rng([program.seed, round_])
    values = []
    for spec in program.pool:
        if spec.dtype == "int":
            values.append(jnp.asarray(rng.integers(0, 4, spec.shape), jnp.int32))
        elif spec.dtype in ("key", "raw"):
            key = jr.key(int(rng.integers(0, 1000)))
            keys = jr.split(key, LANES) if LANES in spec.shape else key
            values.append(keys if spec.dtype == "key" else jr.key_data(keys))
        else:
            values.append(jnp.asarray(rng.uniform(-1, 1, spec.shape), FLOAT))
    return values, jnp.asarray(rng.uniform(-1, 1, (2,)), FLOAT)


def changed(value: Any) -> Any:
    """Another value of the same type."""
    if is_key(value):
        new = raw(value) + jnp.uint32(1)
        return jr.wrap_key_data(new) if is_typed_key(value) else new
    return value + 2 if value.dtype == jnp.int32 else 0.5 * value + 0.1


def check(program: Program) -> Report:
    """Runs a program several times, in both ways: twice, after a write from outside, and
    with another sharing."""
    session = _Session(program)
    # `eqx.error_if` leaks a tracer, whoever calls it.
    leaks = jax.check_tracer_leaks.value and not has_checks(program.top)
    try:
        with jax.enable_x64(True), jax.check_tracer_leaks(leaks):
            session.run()
    except _Refusal as e:
        return Report("refused", e.kind, str(e.error))
    except Wrong as e:
        return Report("wrong", str(e).split(":")[0], str(e))
    except _Invalid as e:
        return Report("invalid", str(e).split("\n")[0], str(e))
    return Report("equal")


class _Refusal(Exception):
    def __init__(self, kind: str, error: Exception):
        self.kind = kind
        self.error = error


class _Invalid(Exception):
    pass


class _Session:
    def __init__(self, program: Program):
        self.program = program
        self.plain, self.lifted = Plain(), Lifted(program.is_typed)
        # The ref for each number in the heap of the plain one, and the other way.
        self.refs: dict[int, rx.Ref] = {}
        self.numbers: dict[int, int] = {}
        self.seen: list[tuple[Place, rx.Ref]] = []
        # The sharing and the types that there was a call with.
        self.staged: set[tuple] = set()

    def know(self, place: Place, ref: rx.Ref, where: str) -> None:
        number = self.numbers.setdefault(id(ref), place.i)
        other = self.refs.setdefault(place.i, ref)
        if number != place.i or other is not ref:
            raise Wrong(f"sharing: {where} is another ref than in plain Python")
        self.seen.append((place, ref))

    def envs(self, places: dict[str, int], pool: list) -> tuple[Env, Env]:
        plain: Env = {n: pool[i][0] for n, i in places.items()}
        lifted: Env = {n: pool[i][1] for n, i in places.items()}
        return plain, lifted

    def make_pool(self, values: list[Any]) -> list[tuple[Place, rx.Ref]]:
        pool = []
        for i, (spec, value) in enumerate(zip(self.program.pool, values)):
            place = self.plain.new(value, spec.collection)
            # A copy: the lifted one may be donated.
            ref = self.lifted.first(spec, jnp.array(value, copy=True))
            self.know(place, ref, f"pool {i}")
            pool.append((place, ref))
        return pool

    def run(self) -> None:
        program, top = self.program, self.program.top
        values, first_x = initial(program, 0)
        pool = self.make_pool(values)
        plain_env, lifted_env = self.envs(program.places, pool)
        plain_env["x0"] = lifted_env["x0"] = first_x
        made = self.lifted.make(top, lifted_env)

        def call(which: str, pool: list, x: Any, places: dict[str, int]) -> None:
            plain_env, lifted_env = self.envs(places, pool)
            plain_env["x0"] = lifted_env["x0"] = x
            # What is staged is traced once for each sharing, and for the types of its refs.
            sharing = tuple(places.items())
            values = [self.lifted.read(ref) for _, ref in pool]
            key = sharing, tuple(map(jax.typeof, values))
            traces = dict(self.lifted.traces)
            self.both(made, plain_env, lifted_env, which)
            is_staged = top.transform in STAGED or top.option("wrapped")
            if is_staged and key in self.staged:
                if self.lifted.traces != traces:
                    raise Wrong(f"retraced: {which}, {top.transform}")
            self.staged.add(key)

        call("first call", pool, first_x, program.places)
        call("second call", pool, first_x, program.places)

        for place, ref in pool:
            new = changed(self.plain.read(place))
            self.lifted.write(ref, jnp.array(new, copy=True))
            self.plain.write(place, new)
        # Where the function closes over the array, it is bound to what it was.
        is_kept = any(block.kept for block in top.blocks)
        x = first_x if is_kept else initial(program, 1)[1]
        call("call after a write", pool, x, program.places)

        if any(block.closed for block in top.blocks):
            return
        values, _ = initial(program, 2)
        pool = self.make_pool(values)
        call("call with new refs", pool, first_x, program.places)
        call("call with other refs", pool, first_x, program.again)

    def both(self, made: Any, plain_env: Env, lifted_env: Env, which: str) -> None:
        """Calls the program both ways, and compares all there is to see."""
        before = list(self.plain.heap)
        expected = self.run_plain(dict(plain_env))
        found = self.run_lifted(made, dict(lifted_env), expected, which)
        if isinstance(expected, Refused):
            raise Wrong(f"not refused: {which}: {expected}")
        if isinstance(expected, Failed):
            if found is not None:
                raise Wrong(f"not failed: {which}")
            self.plain.heap = before
            return
        if found is None:
            raise Wrong(f"failed: {which}, and not in plain Python")
        (values, places), (out, refs) = expected, found
        for i, (a, b) in enumerate(zip(values, out, strict=True)):
            compare(a, b, f"value {i} of {which}")
        for i, (place, ref) in enumerate(zip(places, refs, strict=True)):
            self.know(place, ref, f"ref {i} of {which}")
        for place, ref in self.seen:
            found = self.lifted.read(ref)
            compare(self.plain.heap[place.i], found, f"ref {place.i} after {which}")
            if ref.collection != place.collection:
                raise Wrong(f"collection: of ref {place.i} after {which}")

    def run_plain(self, env: Env) -> tuple[list, list] | Refused | Failed:
        self.plain.reasons.clear()
        result: Any = None
        try:
            # Without checks of JAX, which take time: plain Python is not what is tested.
            with jax.check_tracer_leaks(False):
                result = self.plain.apply(self.program.top, env)
        except (Refused, Failed) as e:
            return e
        except Exception as e:
            if "branches" in self.plain.reasons:
                # A name stands for a ref of another type than in the other branch.
                return Refused("branches")
            raise _Invalid(f"{type(e).__name__}: {e}\n{traceback.format_exc()}") from e
        return result

    def run_lifted(
        self, made: Any, env: Env, expected: Any, which: str
    ) -> tuple[list, list] | None:
        """`None` if a check failed."""
        top = self.program.top
        before = {i: self.lifted.read(ref) for i, ref in self.refs.items()}
        try:
            return self.lifted.call_made(made, top, env)
        except eqx.EquinoxRuntimeError as e:
            self.check_nothing_done(before, which, e)
            return None
        except rx.RefError as e:
            self.check_nothing_done(before, which, e)
            raise _Refusal(self.reason_for(e, expected), e) from e
        except Exception as e:
            reason = "precisions of a Jacobian"
            if isinstance(e, jax.dtypes.TypePromotionError):
                if reason in self.plain.reasons:
                    self.check_nothing_done(before, which, e)
                    raise _Refusal(reason, e) from e
            text = "".join(traceback.format_exception(e))
            raise Wrong(f"raised {type(e).__name__}: {which}: {e}\n{text}") from e

    def check_nothing_done(self, before: dict, which: str, e: Exception) -> None:
        if self.program.top.transform != "plain_call":
            for i, ref in self.refs.items():
                if self.lifted.read(ref) is not before[i]:
                    raise Wrong(f"half done: {which}, after {e}") from e

    def reason_for(self, error: rx.RefError, expected: Any) -> str:
        """Why the library was right to refuse the program."""
        reasons = self.plain.reasons
        for pattern, reason in REFUSALS:
            if re.search(pattern, error.args[0], re.DOTALL):
                if isinstance(expected, Refused):
                    return reason
                if reason in reasons:
                    return f"{reason}, in what is only traced"
                if f"{reason}, of one value" in reasons:
                    return f"{reason}, of one value"
                raise Wrong(f"refused without a reason: {reason}: {error}") from error
        raise Wrong(f"refused: {type(error).__name__}: {error}") from error


def compare(expected: Any, found: Any, where: str) -> None:
    if not isinstance(found, jax.Array):
        raise Wrong(f"type: {where}: {found!r} is no array")
    if expected.shape != found.shape or expected.dtype != found.dtype:
        raise Wrong(
            f"type: {where}: {found.dtype}{found.shape}, and in plain Python "
            f"{expected.dtype}{expected.shape}"
        )
    expected, found = raw(expected), raw(found)
    if not np.allclose(expected, found, rtol=1e-8, atol=1e-10, equal_nan=True):
        raise Wrong(f"value: {where}: {found}, and in plain Python {expected}")
