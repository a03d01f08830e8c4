"""Listing: exemplars of a collection page by page, with filters that the API has, and some that it has not."""

from dataclasses import dataclass
from typing import Literal

from service.client.calls import Call, given, path_of
from service.client.parts import Awaiting, Part, asked
from service.console.gate import Visit
from service.wire_collections import ExemplarItem, ExemplarsAnswer

State = Literal["active", "disabled", "quarantined"]
SHOWN = 50
"""Exemplars of one page."""
_FETCHED = 200
_MOST_LOOKED_THROUGH = 5_000  # of one page, so that a filter that little fits makes nobody wait for long


@dataclass(frozen=True)
class Wanted:
    """Which exemplars to list.

    Attributes:
        suppress: suppress items, and nothing else; else no suppress items.
        label: only of this one; None for all.
        state: only in this one; None for all.
    """

    suppress: bool = False
    label: str | None = None
    state: State | None = None

    def fits(self, item: ExemplarItem) -> bool:
        """Whether an item is to be listed."""
        return bool(item.suppresses) is self.suppress and self.state in (None, item.state)


@dataclass(frozen=True)
class Listed:
    """One page of a list.

    Attributes:
        items: that fit, in the order of their ids.
        next: where to go on; None at the end.
        looked_through: how many were looked at for it.
        version: of the collection.
    """

    items: tuple[ExemplarItem, ...]
    next: str | None
    looked_through: int
    version: str


class _Exemplars(Part[Awaiting]):
    """What the client iterates over, from any place on."""

    @asked
    def after(self, collection: str, label: str | None, after: str, limit: int) -> Call[ExemplarsAnswer]:
        params = given(label=label, after=after or None, limit=limit)
        return Call("GET", path_of("collections", collection, "exemplars"), ExemplarsAnswer, params)


async def list_exemplars(visit: Visit, collection: str, wanted: Wanted, after: str) -> Listed:
    """List up to `SHOWN` exemplars, behind an id.

    Fewer, and still a `next`, come back where a filter fits so few that looking for more would take too long.

    Raises:
        HardlookError: of the client.
    """
    exemplars = _Exemplars(visit.client.collections.carrier)
    found: list[ExemplarItem] = []
    looked_through = 0
    while True:
        answer = await exemplars.after(collection, "suppress" if wanted.suppress else wanted.label, after, _FETCHED)
        for item in answer.items:
            if len(found) == SHOWN:
                return Listed(tuple(found), after, looked_through, answer.version)
            looked_through += 1
            after = item.id
            if wanted.fits(item):
                found.append(item)
        if answer.next is None or looked_through >= _MOST_LOOKED_THROUGH:
            return Listed(tuple(found), answer.next, looked_through, answer.version)
