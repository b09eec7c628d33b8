"""Whose reign it is. Terms fence dispatchers: what belongs to an older term is not believed."""

from __future__ import annotations

from adapt.protocol.ids import Term


class Reign:
    """The term of one dispatcher: above every term of its predecessors that it or any peer knows of."""

    def __init__(self) -> None:
        self.term = Term(0)

    def begin(self, persisted: int) -> Term:
        """Start a reign after the highest term that was written down."""
        self.term = Term(max(self.term, persisted) + 1)
        return self.term

    def hello(self, highest_term: int, *, has_met_us: bool = True) -> bool:
        """A peer names the highest term it has met.

        Args:
            has_met_us: whether this reign has ever welcomed the peer. If not, and it has met our very term, then that was another reign
                of the same number, forgotten since: its answers must not be taken for answers to us.

        Returns:
            Whether our term had to be raised above it, because what we had written down was lost: every session ends.
        """
        if highest_term < self.term or (highest_term == self.term and has_met_us):
            return False
        self.term = Term(highest_term + 1)
        return True
