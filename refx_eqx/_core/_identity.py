"""Identity of refs: a ref inside a transform is equal to the ref it stands for.

The body of a lifted transform runs on inner refs. An inner ref has the hash of the outer
ref it stands for, and is equal to it while the body runs: so sets, dicts and predicates
made outside mean the same inside.

A body is traced once, and its program is then used for other refs of the same structure. A
program must not be used for a ref for which the body would have got another answer. So when
a body asks for the identity of one of its refs, this is noted (`Body.asked`), and becomes a
condition of its program (`Asked`). There are two questions:

- **Is it this ref?** Asked by `==`, with a ref that the body was not given.
- **By its hash**: it was looked up in a set or a dict. A match there also goes through
    `==`, so we only need to know whether it *could* be found. A ref that no outside code
    has ever hashed is in no set or dict there; neither is any other such ref.

The answer is the ref itself, if it is one of the refs it was compared with, or if it was
hashed outside; otherwise "some other ref", and one program is right for all of these.

Comparisons among the refs of one body are part of the structure, and not a question.
"""

from collections.abc import Sequence, Set
from typing import Any, NamedTuple

from .._trees._equality import Identity
from ._errors import describe, TraceLevelError


# The question by hash. The others are the `Identity` of a ref that was compared with.
BY_HASH: Any = "by hash"


def outermost(ref: Any) -> Any:
    """The ref that `ref` stands for, through all bodies. It has the same hash.

    Records in these bodies that the hash of `ref` was asked for.
    """
    return _climb(ref, {BY_HASH})


def is_same(a: Any, b: Any) -> bool:
    """Whether two refs stand for the same ref.

    The inner ref of a body that has ended no longer stands for another: it equals only
    itself.
    """
    while a is not b:
        if a._body is b._body:
            # Two refs of one body can stand for the same ref if one of them is withheld.
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
    """Notes that the body of an inner ref asks this question."""
    body, outer = ref._body, ref._outer
    if outer is None:
        raise TraceLevelError(
            f"Cannot tell which ref this is: {describe(ref)} was compared or looked up by "
            f"`{body.name}` in code that JAX runs after the call (a rule of a custom "
            "derivative, a callback), for any refs that the program is used with. Compare "
            "before the call, and close over the result."
        )
    if body.running and asking:
        body.asked.setdefault(id(outer), set()).update(asking)


# The number of a ref of a call, and what was asked about it.
Questions = tuple[tuple[int, frozenset[Any]], ...]
# The answer to each question: the `Identity` of the ref, or `None` for "some other".
Answers = tuple[Identity | None, ...]


class Asked(NamedTuple):
    """What a body asked about the refs of its call, and the answers."""

    questions: Questions
    answers: Answers

    def holds_for(self, refs: Sequence[Any]) -> bool:
        """Whether the body would get the same answers for these refs."""
        return not self.questions or self.answers == answers_for(self.questions, refs)


NOTHING_ASKED = Asked((), ())


def asked_of(refs: Sequence[Any], notes: dict[int, set[Any]]) -> Asked:
    """The notes of `Body.asked` about the refs of a call."""
    if not notes:
        return NOTHING_ASKED
    questions = tuple(
        (i, frozenset(notes[id(ref)])) for i, ref in enumerate(refs) if id(ref) in notes
    )
    return Asked(questions, answers_for(questions, refs))


def answers_for(questions: Questions, refs: Sequence[Any]) -> Answers:
    """The answers that a program with these questions depends on: its cache key."""
    return tuple(_answer(refs[number], asking) for number, asking in questions)


def _answer(ref: Any, asking: frozenset[Any]) -> Identity | None:
    # Choosing a program by an answer counts as asking.
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
    """The questions of both, except about refs that are gone."""
    asking = dict(a)
    for number, more in b:
        asking[number] = asking.get(number, frozenset()) | more
    for number, every in asking.items():
        asking[number] = frozenset(filter(_is_alive, every))
    return tuple(sorted(asking.items(), key=lambda item: item[0]))
