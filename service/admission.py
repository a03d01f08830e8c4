"""Admission: which requests are worked on. What could not be answered in time is refused at once, not queued.

Two bounds: on the requests in progress, so that their bodies cannot fill the memory, and on the images in progress, so
that each is answered within its deadline. The second follows the pace at which images have been answered of late
(Little's law: what waits, times the time for one, is how long the last of them waits), whatever limits that pace.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.errors import Overloaded, WaitTooLong

# Of the deadline that images in progress may fill; the rest is for what varies.
_FILL = 0.7
_REMEMBERED = 64


class Pace:
    """How long one image takes, with all others in progress beside it: the mean over the latest ones.

    Args:
        first_s: what is assumed before the first one; 0 where nothing is known.
        clock: in seconds.
    """

    def __init__(self, first_s: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._gaps_s: deque[float] = deque([first_s], maxlen=_REMEMBERED)
        self._busy_since_s: float | None = None

    @property
    def seconds_per_image(self) -> float:
        """The mean over the latest ones."""
        return sum(self._gaps_s) / len(self._gaps_s)

    def busy(self) -> None:
        """Work is there: time counts from now, if it did not already."""
        if self._busy_since_s is None:
            self._busy_since_s = self._clock()

    def idle(self) -> None:
        """No work is there: time does not count until there is some again."""
        self._busy_since_s = None

    def answered(self) -> None:
        """One image was answered."""
        if self._busy_since_s is not None:
            now_s = self._clock()
            self._gaps_s.append(now_s - self._busy_since_s)
            self._busy_since_s = now_s


class Admission:
    """Admits requests, and refuses instead of queueing.

    Args:
        max_requests: the most requests in progress.
        deadline_s: within which the last image in progress is expected to be answered.
        pace_s: seconds for an image among many, assumed before any was answered; 0 where nothing is known.
        clock: in seconds.
    """

    def __init__(
        self,
        max_requests: int,
        deadline_s: float,
        pace_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_requests, self._deadline_s = max_requests, deadline_s
        self._pace = Pace(pace_s, clock)
        self._requests, self._images = 0, 0
        self._worked = False

    @property
    def requests(self) -> int:
        """How many requests are in progress."""
        return self._requests

    @property
    def images(self) -> int:
        """How many images are in progress."""
        return self._images

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Hold a place for a request.

        Raises:
            Overloaded: there is none.
            WaitTooLong: not one more image would be answered in time, so its body need not be read.
        """
        self.require_room()
        self._requests += 1
        self._worked = True
        try:
            yield
        finally:
            self._requests -= 1

    def require_room(self) -> None:
        """Return where a request would be let in now; errors are those of `enter`."""
        if self._requests >= self._max_requests:
            raise Overloaded("requests", self._max_requests)
        self._require_time(1)

    @contextmanager
    def work_on(self, images: int) -> Iterator[None]:
        """Hold places for the images (or the text) of a request whose body has arrived.

        Raises:
            WaitTooLong: they would not all be answered in time.
        """
        self._require_time(images)
        self._images += images
        self._pace.busy()
        try:
            yield
        finally:
            self._images -= images
            if not self._images:
                self._pace.idle()

    def answered(self) -> None:
        """An image has its answer, a verdict or an error, and the pace follows.

        Not to be called for what was refused for lack of room or time, or given up by its caller: that is quick, and
        says nothing of the pace.
        """
        self._pace.answered()

    def _require_time(self, images: int) -> None:
        """A request is always admitted when nothing is in progress: however slow, nobody would be served faster."""
        expected_s = (self._images + images) * self._pace.seconds_per_image
        if self._images and expected_s > _FILL * self._deadline_s:
            raise WaitTooLong(expected_s, self._deadline_s)

    def idle_since_work(self) -> bool:
        """Whether no request is in progress, and one was since this last was true."""
        if self._requests or not self._worked:
            return False
        self._worked = False
        return True
