"""What a `with` block turns on for its thread and `asyncio` task, until it ends.

It may end elsewhere: another thread drains the generator that is suspended in it, a task of
the event loop closes an async generator, or a finalizer does. None of them can change the
context variable where the block began. So the variable only says which blocks began here;
each block itself knows whether it has ended.
"""

import contextvars
from collections.abc import Callable
from typing import Generic, TypeVar


class Block:
    """One `with` block. At its end, set `ended`: where it began, it is forgotten when someone
    looks."""

    __slots__ = ("ended",)

    def __init__(self):
        self.ended = False


B = TypeVar("B", bound=Block)


class Blocks(Generic[B]):
    """The blocks of one kind.

    - `begun()`: those that began in this context, outermost first. Quick, for whoever looks
        often: some of them may have ended.
    """

    __slots__ = ("_here", "begun")

    begun: Callable[[], tuple[B, ...]]

    def __init__(self, name: str):
        # A thread starts without any; an `asyncio` task with those of its creator.
        self._here: contextvars.ContextVar[tuple[B, ...]]
        self._here = contextvars.ContextVar(name, default=())
        self.begun = self._here.get

    def running(self) -> tuple[B, ...]:
        """Those of `begun` that have not ended. The others are forgotten."""
        blocks = self.begun()
        if any(block.ended for block in blocks):
            blocks = tuple(block for block in blocks if not block.ended)
            self._here.set(blocks)
        return blocks

    def begin(self, block: B) -> None:
        self._here.set((*self.running(), block))
