"""Links: following a chain from entry to entry and noting what does not fit. Knows no database."""

from dataclasses import dataclass

from indexer.catalog.entry import GENESIS, Head

MAX_PROBLEMS = 100


@dataclass(frozen=True)
class Verification:
    """What was found in a chain.

    Attributes:
        n: entries, in their order.
        head: the last of them.
        problems: what is wrong, a sentence each, at most 101; none where the chain is intact.
    """

    n: int
    head: Head
    problems: tuple[str, ...]

    @property
    def intact(self) -> bool:
        """Whether there was no problem."""
        return not self.problems


class Links:
    """One walk along a chain, in constant memory.

    Args:
        before: the number and hash that the first entry must follow; None to take its word for it.
        expected: an entry noted earlier, which must come by.
    """

    def __init__(self, before: Head | None, expected: Head | None) -> None:
        self._last = before
        self._expected = expected
        self._expected_seen = False
        self._n = 0
        self._problems: list[str] = []
        if before is not None:
            if before.seq == 0 and before.hash != GENESIS:
                self.report("the first entry is said to follow another one")
            self._compare(before)

    @property
    def gave_up(self) -> bool:
        """Whether there are so many problems that more would tell nothing."""
        return len(self._problems) > MAX_PROBLEMS

    def report(self, problem: str) -> None:
        """Note a problem."""
        if len(self._problems) == MAX_PROBLEMS:
            problem = f"no further than this, after {MAX_PROBLEMS} problems"
        if not self.gave_up:
            self._problems.append(problem)

    def follow(self, seq: object, prev: str, hash: str, computed: str | None) -> None:
        """Take the next entry.

        Args:
            seq: its number.
            prev, hash: as they are written in it.
            computed: its hash as its text gives it; None where the text is not one that was ever written.
        """
        if type(seq) is not int:
            self.report(f"an entry has the number {seq!r:.100}")
            return
        if self._last is None:
            self._last = Head(seq - 1, prev if seq > 1 else GENESIS)
            self._compare(self._last)
        if seq <= self._last.seq:
            self.report(f"entry {seq} does not belong where it is, after number {self._last.seq}")
            return
        if seq > self._last.seq + 1:
            first, last = self._last.seq + 1, seq - 1
            self.report(f"entry {first} is missing" if first == last else f"entries {first} to {last} are missing")
        elif prev != self._last.hash:
            self.report(f"entry {seq} does not follow the entry before it")
        if hash != computed:
            self.report(f"entry {seq} is not as it was written")
        self._last = Head(seq, hash)
        self._n += 1
        self._compare(self._last)

    def end(self, head: Head | None) -> Verification:
        """Say that nothing follows; `head` is what is said elsewhere to be the end, None where nothing is."""
        last = self._last or Head(0, GENESIS)
        if head is not None and head.seq != last.seq:
            self.report(f"the end is said to be entry {head.seq}, but the last one is {last.seq}")
        elif head is not None and head.hash != last.hash:
            self.report(f"the end is said to have another hash than entry {last.seq} has")
        if self._expected is not None and not self._expected_seen:
            self.report(f"the noted entry {self._expected.seq} is not there; these go on to {last.seq}")
        return self.found()

    def found(self) -> Verification:
        """What has been found so far."""
        return Verification(self._n, self._last or Head(0, GENESIS), tuple(self._problems))

    def _compare(self, present: Head) -> None:
        if self._expected is None or present.seq != self._expected.seq:
            return
        self._expected_seen = True
        if present.hash != self._expected.hash:
            self.report(f"entry {present.seq} is not the one that was noted: it was rewritten")
