"""Which ref is which: a ref inside a transform is equal to the one that it stands for.

The body of a lifted transform runs on inner refs. An inner ref has the hash of the ref
outside that it stands for, and is equal to it while the body runs: so sets, dicts and
predicates that were made outside mean the same inside.

A body is traced once, and its program is then used for other refs of the same structure. A
program must not be used for a ref for which the body would have been told something else.
So a body that asks which ref one of its refs is leaves a note (`Body.asked`), and what was
asked becomes a condition of its program (`Asked`). There are two questions:

- **Is it this one?** By `==`, with a ref that the body was not given.
- **By its hash**: it was looked up in a set or a dict. What is found there is found by `==`,
  so what is to be known is whether it *could* have been found. A ref whose hash no code
  outside has ever asked for is in no set and no dict there, and no more is any other such
  ref.

The answer is the ref itself, if it is one of those that it was compared with, or if its
hash was asked for outside; and else "some other ref": one program is right for all of these.

How the refs of one body are among themselves is a part of the structure, and no question.
"""

from collections.abc import Sequence, Set
from typing import Any, NamedTuple

from .._trees._equality import Identity
from ._errors import describe, TraceLevelError


__tracebackhide__ = True


# The question by hash. The others are the `Identity` of what a ref was compared with.
BY_HASH: Any = "by hash"


def outermost(ref: Any) -> Any:
    """The ref that `ref` stands for, through all bodies: the one with its hash.

    Whoever runs in these bodies has asked for the hash of `ref`.
    """
    return _climb(ref, {BY_HASH})


def is_same(a: Any, b: Any) -> bool:
    """Whether two refs stand for one.

    The inner ref of a body that has ended stands for nothing any more: it is equal only to
    itself.
    """
    while a is not b:
        if a._body is b._body:
            # Two of one body stand for one if one of them is withheld.
            return a._outer is not None and a._outer is b._outer
        if _depth(a) < _depth(b):
            a, b = b, a
        if not a._body.running:
            return False
        _note(a, {Identity(_climb(b))})
        a = a._outer
    return True


def _depth(ref: Any) -> int:
    return 0 if ref._body is None else ref._body.depth


def _climb(ref: Any, asking: Set[Any] = frozenset()) -> Any:
    while ref._body is not None:
        _note(ref, asking)
        ref = ref._outer
    return ref


def _note(ref: Any, asking: Set[Any]) -> None:
    """Notes that the body of an inner ref asks this of it."""
    body, outer = ref._body, ref._outer
    if outer is None:
        raise TraceLevelError(
            f"Cannot tell which ref this is: {describe(ref)} was "
            f"compared or looked up by `{body.name}` in code that JAX runs after the call "
            "(a rule of a custom derivative, a callback), for whichever refs the program "
            "is used. Decide it before the call, and close over the answer."
        )
    if body.running and asking:
        body.asked.setdefault(id(outer), set()).update(asking)


# The number of a ref of a call, and what was asked of it.
Questions = tuple[tuple[int, frozenset[Any]], ...]
# For each question the `Identity` of the ref, or `None` for "some other".
Answers = tuple[Identity | None, ...]


class Asked(NamedTuple):
    """What a body asked of the refs of its call, and what it was told."""

    questions: Questions
    answers: Answers

    def holds_for(self, refs: Sequence[Any]) -> bool:
        """Whether the body would be told the same of these refs."""
        return not self.questions or self.answers == answers_for(self.questions, refs)


NOTHING_ASKED = Asked((), ())


def asked_of(refs: Sequence[Any], notes: dict[int, set[Any]]) -> Asked:
    """What `Body.asked` notes of the refs of a call."""
    if not notes:
        return NOTHING_ASKED
    questions = tuple(
        (i, frozenset(notes[id(ref)])) for i, ref in enumerate(refs) if id(ref) in notes
    )
    return Asked(questions, answers_for(questions, refs))


def answers_for(questions: Questions, refs: Sequence[Any]) -> Answers:
    """What a program that asks these questions depends on: the key that it is kept by."""
    return tuple(_answer(refs[number], asking) for number, asking in questions)


def _answer(ref: Any, asking: frozenset[Any]) -> Identity | None:
    # To choose a program by an answer is to ask.
    identity = Identity(_climb(ref, asking))
    if identity in asking or (BY_HASH in asking and _was_hashed(ref)):
        return identity
    return None


def _was_hashed(ref: Any) -> bool:
    while not ref._hashed and ref._body is not None:
        ref = ref._outer
    return ref._hashed


def _is_alive(asking: Any) -> bool:
    return asking is BY_HASH or asking.recall() is not None


def joined(a: Questions, b: Questions) -> Questions:
    """All that is asked here or there, but of refs that are gone."""
    asking = dict(a)
    for number, more in b:
        asking[number] = asking.get(number, frozenset()) | more
    for number, every in asking.items():
        asking[number] = frozenset(filter(_is_alive, every))
    return tuple(sorted(asking.items(), key=lambda item: item[0]))
