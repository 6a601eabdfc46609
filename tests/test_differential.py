"""Random programs: under the lifted transforms they give what plain Python gives, or they are
refused for a reason. See `tests/fuzz`.

There is a fixed corpus of seeds, and hypothesis draws more. It draws smaller programs, and
shrinks one that fails.
"""

import collections
import functools

import fuzz.lifted
import fuzz.plain_lanes
import hypothesis
import hypothesis.strategies as st
import jax
import pytest
from fuzz.compare import check, Report
from fuzz.generate import generate, TRANSFORMS
from fuzz.lifted import Lifted
from fuzz.program import (
    Apply,
    Block,
    Mix,
    Name,
    Product,
    Program,
    RefSpec,
    Stack,
    text,
    transforms_of,
    Write,
)

import refx_eqx as rx


# Seeds, each with how deep transforms are nested in its program. The later ones are for
# what is rarely drawn.
SEEDS = [*range(36), 38, 50, 70, 79, 104, 161, 189, 192, 247, 307]
CORPUS = [(seed, 1 + seed % 3) for seed in SEEDS]
CORPUS.append((9200026, 3))  # axes of equal numbers, and of another sharing


@functools.cache
def report_of(seed: int, depth: int) -> Report:
    return check(generate(seed, depth))


@pytest.mark.parametrize("seed, depth", CORPUS)
def test_a_program_gives_what_plain_python_gives_or_is_refused(seed, depth):
    report = report_of(seed, depth)
    program = text(generate(seed, depth))
    assert report.outcome in ("equal", "refused"), f"{program}\n{report.detail}"


@hypothesis.settings(
    max_examples=30,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
@hypothesis.given(
    st.builds(generate, st.randoms(use_true_random=False), st.integers(1, 3))
)
def test_a_program_of_hypothesis_does_too(program):
    hypothesis.note(text(program))
    report = check(program)
    assert report.outcome in ("equal", "refused"), report.detail


def test_most_programs_of_the_corpus_are_not_refused():
    outcomes = collections.Counter(report_of(*key).outcome for key in CORPUS)
    assert outcomes["equal"] > 0.7 * len(CORPUS)


def test_the_corpus_has_every_transform():
    used = {name for key in CORPUS for name in transforms_of(generate(*key).top)}
    assert used >= set(TRANSFORMS)


def test_the_corpus_has_what_is_drawn_seldom():
    of_text = "\n".join(text(generate(*key)) for key in CORPUS)
    # Keys, writes of another type, run-time checks, backward rules that write, other axes,
    # keywords, values that are trees.
    for what in (
        "= normal(split",
        "= normal(count",
        "= normal(peek",
        ".value = weak[",
        ".value = int32[",
        "error_if(",
        "log=True",
        " axes=",
        "array_axes=",
        "out_axis=",
        "keywords=True",
        "= Ref(tree",
        ", typed",
    ):
        assert what in of_text, what


def test_a_seed_gives_the_same_program_each_time():
    assert generate(7) == generate(7)
    assert text(generate(7)) != text(generate(8))


#
# A difference is noticed: these transforms are wrong, each in its own way.
#


def program_of(transform: str, *, inputs: tuple = (), refs: tuple = ("p",)) -> Program:
    """`p.value = sin(p.value * x)`, where `p` is the ref `m`, and `x` the value of `m` or
    the first of the inputs."""
    x = "x" if inputs else "p"
    body = (Write("p", Product(Name("p"), Name(x))),)
    names = ("x",) * len(inputs)
    block = Block(("p",), (), names, (), (), body, (Name("p"),), refs)
    out_refs = tuple(f"r{i}" for i in range(len(refs)))
    top = Apply(
        transform,
        (block,),
        ("m",),
        (),
        inputs,
        "list",
        "function",
        (),
        ("z",),
        out_refs,
    )
    return Program((RefSpec("float", (2,), "params"),), {"m": 0}, {"m": 0}, top, 0)


def by_value(self, s, f):
    run = self.plain_call(s, f)
    return lambda refs, sliced, inputs: run(rx.clone(refs), sliced, inputs)


def without_cache(self, s, f):
    fresh = lambda: rx.filter_jit(lambda *args: f(*args))
    return lambda *args: self.plain_call(s, fresh())(*args)


def untied(self, s, f):
    run = self.plain_call(s, f)

    def call(*args):
        values, out = run(*args)
        return values, rx.clone(out)

    return call


def first_lane(self, s, f):
    def call(refs, sliced, inputs):
        values, out = self.plain_call(s, f)(refs, sliced, [x[0] for x in inputs])
        return [jax.numpy.stack([x] * 3) for x in values], out

    return call


def half_done(self, s, f):
    def call(refs, sliced, inputs):
        self.plain_call(s, f)(refs, sliced, [x[0] for x in inputs])
        raise rx.StructureError("... differs along the mapped axis")

    return call


BY_LANE = (Stack((Name("m"), Mix(Name("m"), Name("x0")), Name("x0")), (2,)),)


@pytest.mark.parametrize(
    "transform, wrong, inputs, kind",
    [
        ("jit", by_value, (), "value"),
        ("jit", without_cache, (), "retraced"),
        ("jit", untied, (), "sharing"),
        ("vmap", first_lane, BY_LANE, "not refused"),
        ("vmap", half_done, BY_LANE, "half done"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_wrong_transform_is_found_out(monkeypatch, transform, wrong, inputs, kind):
    refs = ("p",) if wrong is untied else ()
    program = program_of(transform, inputs=inputs, refs=refs)
    assert check(program).outcome == ("refused" if inputs else "equal")
    monkeypatch.setattr(Lifted, transform, wrong)
    report = check(program)
    assert (report.outcome, report.kind) == ("wrong", kind), report.detail


def of_corpus(pattern: str) -> list[Program]:
    programs = [generate(*key) for key in CORPUS]
    return [program for program in programs if pattern in text(program)]


@pytest.mark.parametrize(
    "pattern, where, name, wrong",
    [
        ("log=True", fuzz.lifted, "logged", lambda log, cotangents: log),
        ("= normal(", fuzz.plain_lanes, "key_of_lane", lambda keys, lane: keys),
        ("error_if(", Lifted, "check", lambda self, x, fails: x),
    ],
    ids=["backward", "keys", "checks"],
)
def test_a_wrong_effect_is_found_out(monkeypatch, pattern, where, name, wrong):
    """Backward rules that write nothing, one key for all lanes, checks that never fail."""
    monkeypatch.setattr(where, name, wrong)
    assert any(check(program).outcome == "wrong" for program in of_corpus(pattern))


def test_a_refusal_without_a_reason_is_found_out(monkeypatch):
    def refuses(self, s, f):
        def call(*args):
            raise rx.StructureError("a step must return the carry")

        return call

    monkeypatch.setattr(Lifted, "jit", refuses)
    report = check(program_of("jit"))
    assert report.kind == "refused without a reason"
