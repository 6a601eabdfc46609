"""The interpretation in plain Python: no transform of this library, and no ref.

Jit and checkpoint are calls, loops are loops, a branch is an `if`, and vmap is a loop over
lanes, each of which starts from the same heap. A derivative is that of a pure function from
heap to heap.
"""

from .heap import type_of
from .interpret import choice, test
from .plain_derivatives import Derivatives
from .plain_lanes import Lanes
from .program import Apply


class Plain(Derivatives, Lanes):
    def straight(self, s: Apply, closed, refs, sliced, inputs) -> tuple:
        return self.call(s.blocks[0], closed[0], refs, sliced, inputs)

    plain_call = jit = checkpoint = lift = closure_convert = straight

    def branch(self, s, closed, refs, inputs, chosen: int) -> tuple:
        base = len(self.heap)
        seen = []
        for block, mine in zip(s.blocks, closed):

            def run() -> list:
                values, out = self.call(block, mine, refs, (), inputs)
                types: list = [(x.shape, x.dtype) for x in values]
                first: dict[int, int] = {}
                for k, ref in enumerate(out):
                    same = first.setdefault(ref.i, k)
                    new = same, ref.collection, self.read(ref).shape
                    types.append(ref.i if ref.i < base else new)
                # And what is in the refs that there were.
                return types + [type_of(x) for x in self.heap[:base]]

            result = self.rehearse(run)
            if result is not None:
                seen.append(result)
        if any(x != seen[0] for x in seen):
            self.reasons.add("branches")
        return self.call(s.blocks[chosen], closed[chosen], refs, (), inputs)

    def cond(self, s, closed, refs, sliced, inputs) -> tuple:
        pred, *rest = inputs
        chosen = 0 if test(pred, s.option("threshold")) else 1
        return self.branch(s, closed, refs, rest, chosen)

    def switch(self, s, closed, refs, sliced, inputs) -> tuple:
        index, *rest = inputs
        return self.branch(s, closed, refs, rest, int(choice(index, len(s.blocks))))
