"""Prompt look-up decoding: what followed the same tokens before may follow them again.

The last tokens of a row are looked for earlier in it, and the tokens that followed them there are
proposed. The engine checks several tokens in one pass, which costs little more than one, because
reading the weights takes most of the time. A proposed token is accepted only if the row chooses it
anyway. The pass adds up attention in another order, so its numbers differ by rounding, and in rare
cases a token does. As in github.com/apoorvumang/prompt-lookup-decoding.
"""

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that must have occurred before
FEWEST, MOST = 3, 7  # tokens that are proposed at once
PATIENCE = 64  # tokens until the next attempt, at most


class Lookup:
    """Proposes tokens for one row, as long as some of them are accepted.

    After a proposal of which nothing was accepted, it waits: 1 token, then 2, 4, ... A text that
    does not repeat itself so costs a few attempts.
    """

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # tokens -> index of what followed them last
        self._known = 0  # tokens of the row in the table
        self._wait, self._next_wait = 0, 1
        self._count = FEWEST

    def propose(self, row: Sequence[int], limit: int) -> list[int]:
        """Return tokens that may follow a row; often none.

        Args:
            row: ids so far: those of the last call, and more.
            limit: number of tokens, at most.
        """
        self._read(row)
        if self._wait > 0:
            self._wait -= 1
            return []
        for size in range(LONGEST, SHORTEST - 1, -1):
            place = self._after.get(tuple(row[-size:]))
            if place is not None:
                return list(row[place : place + min(limit, self._count)])
        return []

    def learn(self, proposed: int, accepted: int) -> None:
        """Take note of how many tokens of a proposal were accepted."""
        if accepted:
            self._wait, self._next_wait = 0, 1
            self._count = MOST if accepted == proposed else FEWEST
        else:
            self._wait, self._next_wait = self._next_wait, min(2 * self._next_wait, PATIENCE)
            self._count = FEWEST

    def _read(self, row: Sequence[int]) -> None:
        """Add the row's new tokens to the table; nothing follows the last one yet."""
        for end in range(max(self._known, SHORTEST), len(row)):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(row[end - size : end])] = end
        self._known = len(row)
