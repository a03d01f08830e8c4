"""Reviews: the queue of images that a person should look at.

Owns the life of an item. An item is `open` until somebody claims it for a while, decides it or skips it:

    open     -> claimed, decided, skipped
    claimed  -> open (released, or the claim has run out), claimed again by the same person, decided, skipped
    skipped  -> claimed, decided, or open when the image is reported again
    decided  -> nothing: what was decided stays

Whoever loses a race finds out: each step is one UPDATE that names the states which it may leave. There is one
undecided item an image. The queue is bounded, and what a program put there makes room for what people report.

The embedding of an undecided item is kept with it, so that deciding can put it into a pool without the image; it goes
when the item is decided, and is never that of an exemplar. Knows nothing of pools or of HTTP.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, and_, delete, func, insert, or_, select, update

from indexer.catalog import clock
from indexer.catalog.chain import DECISIONS
from indexer.catalog.clock import text_of
from indexer.catalog.records import canonical_json, embedding_bytes, embedding_from
from indexer.catalog.review_items import (
    ORIGINS,
    STATES,
    Choice,
    Embedding,
    Item,
    NewItem,
    Origin,
    State,
    embedding_name,
    is_id,
    is_in,
    item_of,
    new_id,
    time_of,
)
from indexer.catalog.tables import chains, embeddings, reviews
from indexer.errors import ContentsError, ReviewTaken, UnknownReview

__all__ = [
    "ORIGINS",
    "STATES",
    "Choice",
    "Embedding",
    "Item",
    "NewItem",
    "Origin",
    "State",
    "claim",
    "counts",
    "decide",
    "embedding_of",
    "get",
    "list_items",
    "open_items",
    "release",
    "skip",
]

_FROM_PEOPLE: tuple[Origin, ...] = ("false-positive", "false-negative")
_GIVES_WAY: tuple[Origin, ...] = ("verdict", "retroactive")
_UNDECIDED: tuple[State, ...] = ("open", "claimed", "skipped")
_IMAGES_AT_A_TIME = 500  # SQLite has a limit of parameters
Rows = Mapping[str, Any]  # by the hash of the image


def open_items(
    connection: Connection, items: Sequence[NewItem], *, limit: int, at: datetime | None = None
) -> list[str | None]:
    """Put images into the queue, or note that they came again.

    An image that has an undecided item gets no second one; what a person reports replaces the reason of the item, and
    opens it again where it was skipped. One whose `review` verdict was dismissed stays dismissed until a person
    reports it. Where the queue is full, the oldest unclaimed items that a program opened give way.

    Args:
        connection: of a transaction that writes. It takes the lock of the log of decisions, so that two processes do
            not open two items for one image; whoever also needs that of the log of changes takes that one first.
        items: to open, in their order.
        limit: undecided items that there may be.
        at: the time; now where None.

    Returns:
        For each its item's id; None where the queue is full of what cannot give way.
    """
    at = at or clock.now()
    connection.execute(select(chains.c.name).where(chains.c.name == DECISIONS).with_for_update())
    undecided, dismissed = _present(connection, {item.image_sha256 for item in items})
    ids: list[str | None] = [None] * len(items)
    fresh: dict[str, list[int]] = {}  # positions of the images that have no item
    for position, item in enumerate(items):
        image = item.image_sha256
        row = undecided.get(image) or (None if item.origin in _FROM_PEOPLE else dismissed.get(image))
        if row is None:
            fresh.setdefault(image, []).append(position)
        else:
            ids[position] = _seen_again(connection, row, item)
    if fresh:
        room = _make_room(connection, len(fresh), limit, at)
        new = [([items[position] for position in positions], positions) for positions in fresh.values()]
        by_people = [any(item.origin in _FROM_PEOPLE for item in same) for same, _ in new]
        # Where there is not room for all: what people report, then the newest.
        chosen = sorted(sorted(range(len(new)), key=lambda at: (not by_people[at], -at))[: max(0, room)])
        made = _insert(connection, [new[at][0] for at in chosen], at)
        for at_new, id in zip(chosen, made, strict=True):
            for position in new[at_new][1]:
                ids[position] = id
    return ids


def get(connection: Connection, id: str, *, at: datetime | None = None) -> Item:
    """One item.

    Raises:
        UnknownReview: there is none of that id.
    """
    row = None
    if is_id(id):
        row = connection.execute(select(reviews).where(reviews.c.id == id)).first()
    if row is None:
        raise UnknownReview(id)
    return item_of(row, at or clock.now())


def embedding_of(connection: Connection, id: str) -> Embedding:
    """The embedding (d,) of an undecided item.

    Raises:
        UnknownReview: there is no item of that id.
        ReviewTaken: it is decided.
        ContentsError: its embedding is damaged.
    """
    item = get(connection, id)
    query = select(reviews.c.embedding_sha256, embeddings.c.data)
    row = connection.execute(
        query.join(embeddings, embeddings.c.sha256 == reviews.c.embedding_sha256).where(reviews.c.id == id)
    ).first()
    if row is None:
        raise ReviewTaken(id, _why_not(item))
    data = bytes(row.data)
    if embedding_name(id, data) != row.embedding_sha256:
        raise ContentsError(f"the embedding of review {id!r} is damaged")
    return embedding_from(data)


def list_items(
    connection: Connection,
    *,
    state: State | None = None,
    origin: Origin | None = None,
    after: str = "",
    limit: int = 100,
    at: datetime | None = None,
) -> list[Item]:
    """Items, the oldest first.

    Args:
        connection: of a transaction.
        state, origin: only of these; any where None.
        after: id of the last item of the page before, which need not be there any more; empty for the first page.
        limit: the most.
        at: the time; now where None.

    Raises:
        UnknownReview: `after` cannot be an id.
    """
    at = at or clock.now()
    query = select(reviews)
    if state is not None:
        query = query.where(is_in(state, at))
    if origin is not None:
        query = query.where(reviews.c.origin == origin)
    if after:
        time = text_of(time_of(after))
        query = query.where(or_(reviews.c.time > time, and_(reviews.c.time == time, reviews.c.id > after)))
    rows = connection.execute(query.order_by(reviews.c.time, reviews.c.id).limit(limit))
    return [item_of(row, at) for row in rows]


def counts(connection: Connection, *, at: datetime | None = None) -> dict[State, int]:
    """Items by state."""
    at = at or clock.now()
    query = select(func.count()).select_from(reviews)
    return {state: connection.execute(query.where(is_in(state, at))).scalar_one() for state in STATES}


def claim(connection: Connection, id: str, who: str, for_s: float, *, at: datetime | None = None) -> Item:
    """Have an item to oneself for some seconds, or for some more; of several that ask at once one gets it.

    Raises:
        UnknownReview: there is none of that id.
        ReviewTaken: somebody else has it, or it is decided.
    """
    at = at or clock.now()
    until = text_of(at + timedelta(seconds=for_s))
    return _step(connection, id, who, at, state="claimed", claimed_by=who, claimed_until=until)


def release(connection: Connection, id: str, who: str, *, at: datetime | None = None) -> Item:
    """Give back what one has claimed; nothing changes where nobody has it. Errors are those of `claim`."""
    at = at or clock.now()
    item = get(connection, id, at=at)
    if item.state in ("open", "skipped"):
        return item
    return _step(connection, id, who, at, state="open", claimed_by=None, claimed_until=None)


def skip(connection: Connection, id: str, who: str, *, at: datetime | None = None) -> Item:
    """Leave an item undecided and out of the way. Errors are those of `claim`."""
    return _step(connection, id, who, at or clock.now(), state="skipped", claimed_by=None, claimed_until=None)


def decide(
    connection: Connection, id: str, who: str, decision: Choice, exemplar_id: str | None, *, at: datetime | None = None
) -> Item:
    """Close an item for good; its embedding goes.

    Args:
        connection: of a transaction that writes; in the same one, the exemplar is put into the pool.
        id: of the item.
        who: decides. Without a claim it takes that nobody else has one.
        decision: the pool that the image now is an exemplar of, or 'dismiss'.
        exemplar_id: of that exemplar; None where none came of it.
        at: the time; now where None.

    Errors are those of `claim`.
    """
    at = at or clock.now()
    values = {"decided_by": who, "decided_at": text_of(at), "decision": decision, "exemplar_id": exemplar_id}
    item = _step(connection, id, who, at, state="decided", claimed_by=None, claimed_until=None, **values)
    name = select(reviews.c.embedding_sha256).where(reviews.c.id == id).scalar_subquery()
    connection.execute(delete(embeddings).where(embeddings.c.sha256 == name))
    return item


def _step(connection: Connection, id: str, who: str, at: datetime, **values: Any) -> Item:
    """Change an undecided item that nobody else has."""
    if not is_id(id):
        raise UnknownReview(id)
    mine = and_(reviews.c.state == "claimed", reviews.c.claimed_by == who)
    free = or_(is_in("open", at), reviews.c.state == "skipped", mine)
    if connection.execute(update(reviews).where(reviews.c.id == id, free).values(**values)).rowcount != 1:
        raise ReviewTaken(id, _why_not(get(connection, id, at=at)))
    return get(connection, id, at=at)


def _why_not(item: Item) -> str:
    if item.state == "decided":
        return f"it was decided by {item.decided_by}: {item.decision}"
    if item.state == "claimed" and item.claimed_until is not None:
        return f"{item.claimed_by} has it until {text_of(item.claimed_until)}"
    return "it has changed meanwhile"


def _present(connection: Connection, images: Collection[str]) -> tuple[Rows, Rows]:
    """The undecided items of some images, and their newest dismissed ones; locked, so that nobody decides meanwhile."""
    undecided: dict[str, Any] = {}
    dismissed: dict[str, Any] = {}
    wanted = sorted(images)
    for start in range(0, len(wanted), _IMAGES_AT_A_TIME):
        query = select(reviews.c.id, reviews.c.image_sha256, reviews.c.state, reviews.c.origin, reviews.c.decision)
        query = query.where(reviews.c.image_sha256.in_(wanted[start : start + _IMAGES_AT_A_TIME]))
        for row in connection.execute(query.order_by(reviews.c.id).with_for_update()):
            if row.state in _UNDECIDED:
                undecided[row.image_sha256] = row
            elif row.decision == "dismiss":
                dismissed[row.image_sha256] = row
    return undecided, dismissed


def _seen_again(connection: Connection, row: Any, item: NewItem) -> str:
    """Bring the item that an image has already up to date."""
    values: dict[str, Any] = {}
    if item.origin in _FROM_PEOPLE and row.state == "skipped":
        values["state"] = "open"
    if item.origin in _FROM_PEOPLE and row.origin not in _FROM_PEOPLE:
        values |= {"origin": item.origin, "comment": item.comment, "reporter": item.reporter}
    connection.execute(update(reviews).where(reviews.c.id == row.id).values(seen=reviews.c.seen + 1, **values))
    return str(row.id)


def _make_room(connection: Connection, wanted: int, limit: int, at: datetime) -> int:
    """Remove the oldest unclaimed items of programs, as many as are in the way; returns how many more there may be."""
    counted = select(func.count()).select_from(reviews).where(reviews.c.state.in_(_UNDECIDED))
    room: int = limit - connection.execute(counted).scalar_one()
    gives_way = and_(or_(is_in("open", at), reviews.c.state == "skipped"), reviews.c.origin.in_(_GIVES_WAY))
    query = select(reviews.c.id, reviews.c.embedding_sha256).where(gives_way).order_by(reviews.c.time, reviews.c.id)
    for row in connection.execute(query.limit(max(0, wanted - room))).all():
        # Somebody may have claimed it since it was read.
        if connection.execute(delete(reviews).where(reviews.c.id == row.id, gives_way)).rowcount:
            connection.execute(delete(embeddings).where(embeddings.c.sha256 == row.embedding_sha256))
            room += 1
    return room


def _insert(connection: Connection, groups: Sequence[Sequence[NewItem]], at: datetime) -> list[str]:
    """Open an item for each group of what is about one image; their ids."""
    rows: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    for position, group in enumerate(groups):
        item = next((item for item in group if item.origin in _FROM_PEOPLE), group[0])
        data = embedding_bytes(item.embedding)
        time = at + timedelta(microseconds=position)  # pages are in the order of times
        id = new_id(time)
        name = embedding_name(id, data)
        kept.append({"sha256": name, "dim": len(item.embedding), "data": data})
        rows.append(
            {
                "id": id,
                "time": text_of(time),
                "origin": item.origin,
                "state": "open",
                "collection": item.collection,
                "image_sha256": item.image_sha256,
                "embedding_sha256": name,
                "verdict": str(item.verdict),
                "evidence": canonical_json(item.evidence),
                "comment": item.comment,
                "request_id": item.request_id,
                "reporter": item.reporter,
                "seen": len(group),
            }
        )
    if rows:
        connection.execute(insert(embeddings), kept)
        connection.execute(insert(reviews), rows)
    return [row["id"] for row in rows]
