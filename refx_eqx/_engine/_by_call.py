"""Caches by call: keyed by the structure of the call, and by the identity of its refs as far as
it matters."""

import sys
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from .._calls._call import Call
from .._core._identity import Answers, answers_for, Asked, joined, Questions
from .._core._ref import commits, Ref
from ._flat import program_key


T = TypeVar("T")


class ByCall(Generic[T]):
    """A cache by the structure of a call, and by its refs as far as the body asked about
    their identity (see `_core/_identity.py`)."""

    def __init__(self):
        self._kept: dict[Hashable, _ByRefs[T]] = {}

    def get(self, derefed: Call, make: Callable[[Call], T]) -> T:
        """The entry for this call, made if necessary."""
        # The key of a static leaf may be its `id`, which Python reuses once the leaf is
        # gone, so its entry is dropped then.
        structure = program_key(derefed)
        by_refs = self._kept.get(structure)
        if by_refs is None:
            by_refs = self._new(structure, derefed.structure.mortal())
        key = answers_for(by_refs.questions, derefed.refs)
        found = by_refs.kept.get(key)
        if found is None:
            found = by_refs.put(key, make(derefed))
        return found[0]

    def _new(self, key: Hashable, mortal: list[Any]) -> "_ByRefs[T]":
        mine = weakref.ref(self)

        def forget(_: Any, exits: Callable[[], bool] = sys.is_finalizing) -> None:
            # At exit modules are emptied, and keys can no longer be compared.
            alive = None if exits() else mine()
            if alive is not None:
                alive._kept.pop(key, None)

        guards = [weakref.ref(x, forget) for x in mortal]
        by_refs = self._kept[key] = _ByRefs(guards)
        return by_refs

    def note(self, derefed: Call, traced: T) -> Asked:
        """Notes that the entry `traced` was traced for a call: from now on, what the body
        asked about its refs is part of the key."""
        asked = derefed.identities()
        by_refs = self._kept.get(program_key(derefed))
        if by_refs is not None:  # if a static leaf is gone, no call has this key
            by_refs.learn(asked.questions, derefed.refs, traced)
        return asked


class _ByRefs(Generic[T]):
    """The entries for one structure, by the answers to some questions.

    `guards` forget it when a static leaf of the structure is gone."""

    def __init__(self, guards: list[weakref.ref]):
        self._guards = guards
        self.questions: Questions = ()
        # With the guards that drop it when its refs are gone.
        self.kept: dict[Answers, tuple[T, list[weakref.ref]]] = {}

    def put(self, key: Answers, what: T) -> tuple[T, list[weakref.ref]]:
        mine = weakref.ref(self)

        def forget(_: Any) -> None:
            by_refs = mine()
            if by_refs is not None:
                by_refs.kept.pop(key, None)

        refs = [weakref.ref(x.recall(), forget) for x in key if x is not None]
        entry = self.kept[key] = what, refs
        return entry

    def learn(self, asked: Questions, refs: list[Ref], traced: T) -> None:
        """Notes that `traced` was traced for these refs, and asked these questions."""
        before = [number for number, _ in self.questions]
        questions = joined(self.questions, asked)
        key = answers_for(questions, refs)
        known = self.kept.get(key)
        if questions == self.questions and known is not None and known[0] is traced:
            return
        # Existing entries did not ask the new questions, so they are right for all other
        # refs.
        old = list(self.kept.items())
        self.questions, self.kept = questions, {}
        for answers, (what, _) in old:
            told = dict(zip(before, answers))
            if what is not traced:
                self.put(tuple(told.get(number) for number, _ in questions), what)
        self.put(key, traced)
        commits.restructured += 1  # plans must check again
