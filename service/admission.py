"""Admission: a bound on the requests in progress, so that their bodies cannot fill the memory."""

from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import Overloaded


class Admission:
    """Admits a fixed number of requests at a time, and refuses instead of queueing.

    Args:
        limit: how many.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._active = 0
        self._worked = False

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Hold a place.

        Raises:
            Overloaded: there is none.
        """
        if self._active >= self._limit:
            raise Overloaded("requests", self._limit)
        self._active += 1
        self._worked = True
        try:
            yield
        finally:
            self._active -= 1

    def idle_since_work(self) -> bool:
        """Whether no request is in progress, and one was since this last was true."""
        if self._active or not self._worked:
            return False
        self._worked = False
        return True
