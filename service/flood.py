"""The flood guard: notices an exemplar that suddenly decides too much.

An exemplar that should never have been added, such as a blank picture in the unsafe pool, decides about images that
have nothing in common. It is reported once, and whoever is told takes it out of searches. Since that takes evidence
away, it must not be possible to bring it about with copies of one image: the guard counts kinds of images, not files.
Knows no pools, no database and no HTTP.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Embedding = NDArray[np.float32]
SUDDEN = 4.0  # times its share of before, or the share of an average exemplar
NEAR = 0.95  # cosine from which two images are of one kind
_MAX_CENTRES = 256  # of kinds that are recognised again, of one exemplar


@dataclass(frozen=True)
class Flood:
    """An exemplar that suddenly decides too much.

    Attributes:
        exemplar_id: which.
        matches: kinds of images that it decided among the last `decisions`.
        decisions: that were looked at.
        new: whether it was added, moved or enabled lately; else it is one that used to decide much less, which may also
            mean that the traffic has changed.
    """

    exemplar_id: str
    matches: int
    decisions: int
    new: bool


class FloodGuard:
    """Counts what each exemplar decides.

    The rule. Of the last `window` decisions, the present window, and the `window` before them, the earlier one, the
    guard counts for each exemplar the kinds of images that it decided. Its share is that number divided by `window`.
    It is a flood when all of this holds:

    - it decided at least `least` kinds of images in the present window;
    - its share is more than `share`, and more than 4 / n, where n exemplars are searched: in a pool of five each
      decides about a fifth, and none of them is at fault;
    - it is sudden: either `is_new` says that the exemplar was added, moved or enabled lately, or its share is at least
      4 times that of the earlier window, which must have been full. Exemplars that have always matched much, and those
      of a service that has just started, are no floods.

    An exemplar is reported once, again only after both windows have forgotten it, and never after it was excused.

    A kind of image is one image and its near-duplicates: those with a cosine of at least 0.95 to it. Counting files,
    or even requests, would let anybody have an unsafe exemplar removed by sending a hundred altered copies of a picture
    that it catches; and a picture that goes round is no reason to doubt the exemplar that catches it. So the guard
    looks at embeddings. Per exemplar it recognises 256 kinds again; whatever is near none of those, once there are so
    many, counts as a kind of its own.

    A decision costs one product of at most 256 x d, whatever came before. Memory: at most room for 4 x `window`
    embeddings, with a window of 1,000 and d = 640 10 MB. Thread-safe.

    Args:
        window: decisions in a window, at least 1.
        least: kinds of images, at least 1.
        share: in [0, 1]; 0 turns the guard off, and so does 1.
        is_new: whether an exemplar was added, moved or enabled lately, by whomever; it is asked only about
            exemplars that decide too much, with no lock held.
        searched: how many exemplars are searched at present.
    """

    def __init__(
        self, window: int, least: int, share: float, is_new: Callable[[str], bool], searched: Callable[[], int]
    ) -> None:
        if window < 1 or least < 1:
            raise ValueError(f"window and least must be at least 1, got {window} and {least}")
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share must be in [0, 1], got {share}")
        self._window, self._least, self._share = window, least, share
        self._is_new, self._searched = is_new, searched
        self._lock = threading.Lock()
        self._present: deque[tuple[str, int]] = deque()
        self._earlier: deque[tuple[str, int]] = deque()
        self._exemplars: dict[str, _Tally] = {}
        self._excused: set[str] = set()

    def observe(self, exemplar_id: str, embedding: Embedding) -> Flood | None:
        """Take note of a decision.

        Args:
            exemplar_id: that decided; empty where none did.
            embedding: (d,) of unit norm, of the image.

        Returns:
            The flood that this one made, if it did.
        """
        if not self._share:
            return None
        with self._lock:
            kinds = self._count(exemplar_id, embedding)
            earlier = len(self._exemplars[exemplar_id].earlier) if exemplar_id else 0
            full = len(self._earlier) == self._window
            reported = bool(exemplar_id) and self._exemplars[exemplar_id].reported
            reported = reported or exemplar_id in self._excused
        if reported or kinds < self._least or kinds <= self._too_much():
            return None
        new = self._is_new(exemplar_id)
        if not new and not (full and kinds >= SUDDEN * earlier):
            return None
        with self._lock:
            tally = self._exemplars.get(exemplar_id)
            if tally is None or tally.reported:  # another thread was quicker
                return None
            tally.reported = True
            return Flood(exemplar_id, kinds, len(self._present), new)

    def excuse(self, exemplar_id: str) -> None:
        """Never report an exemplar: somebody has looked at it and says that it is right to decide so much."""
        with self._lock:
            self._excused.add(exemplar_id)

    def _too_much(self) -> float:
        return max(self._share, SUDDEN / max(1, self._searched())) * self._window

    def _count(self, exemplar_id: str, embedding: Embedding) -> int:
        """Move both windows on by one decision; the kinds of images that its exemplar decided in the present one."""
        kind = 0
        if exemplar_id:
            tally = self._exemplars.setdefault(exemplar_id, _Tally())
            kind = tally.kind_of(embedding)
            tally.present[kind] += 1
        self._present.append((exemplar_id, kind))
        if len(self._present) > self._window:
            passed_id, passed = self._present.popleft()
            self._earlier.append((passed_id, passed))
            if passed_id:
                self._exemplars[passed_id].grow_old(passed)
        if len(self._earlier) > self._window:
            forgotten_id, forgotten = self._earlier.popleft()
            if forgotten_id and self._exemplars[forgotten_id].forget(forgotten):
                del self._exemplars[forgotten_id]
        return len(self._exemplars[exemplar_id].present) if exemplar_id else 0


@dataclass(eq=False)
class _Tally:
    """What one exemplar decided, by kind of image.

    Attributes:
        present, earlier: decisions of each kind in the windows.
        reported: whether it was.
    """

    present: Counter[int] = field(default_factory=Counter)
    earlier: Counter[int] = field(default_factory=Counter)
    reported: bool = False
    _centres: Embedding = field(default_factory=lambda: np.empty((0, 0), np.float32))  # of the first rows, the kinds
    _kinds: list[int] = field(default_factory=list)  # of each row that is in use
    _next: int = 0

    def kind_of(self, embedding: Embedding) -> int:
        """The number of the kind that an image is of; a new one where it is near none that is known."""
        used = len(self._kinds)
        if used:
            cosines = self._centres[:used] @ embedding
            nearest = int(np.argmax(cosines))
            if cosines[nearest] >= NEAR:
                return self._kinds[nearest]
        self._next += 1
        if used < _MAX_CENTRES:
            if used == len(self._centres):
                grown = np.zeros((min(max(1, 2 * used), _MAX_CENTRES), len(embedding)), np.float32)
                grown[:used] = self._centres[:used] if used else 0.0
                self._centres = grown
            self._centres[used] = embedding
            self._kinds.append(self._next)
        return self._next

    def grow_old(self, kind: int) -> None:
        """One decision passes from the present window into the earlier one."""
        _take(self.present, kind)
        self.earlier[kind] += 1

    def forget(self, kind: int) -> bool:
        """One decision leaves the earlier window; whether nothing is left of the exemplar."""
        _take(self.earlier, kind)
        if kind not in self.earlier and kind not in self.present and kind in self._kinds:
            row, last = self._kinds.index(kind), len(self._kinds) - 1
            self._centres[row], self._kinds[row] = self._centres[last], self._kinds[last]
            self._kinds.pop()
        return not self.present and not self.earlier


def _take(counts: Counter[int], kind: int) -> None:
    counts[kind] -= 1
    if not counts[kind]:
        del counts[kind]
