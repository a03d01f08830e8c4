"""Jobs: lists of images that are classified in their own time, and what came of each.

Owns the states of jobs and of their items, so that every item is answered exactly once whatever is killed: an item
waits until the transaction that stores its answer, erases its image and counts it. A process works on a job while it
holds its lease; once that has run out, another may take over. Functions work within a transaction of the caller.
"""

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, cast

from sqlalchemy import ColumnElement, Connection, Row, delete, func, insert, or_, select, update

from indexer.catalog.clock import now, text_of
from indexer.catalog.records import canonical_json
from indexer.catalog.tables import job_items, jobs
from indexer.errors import UnknownJob

JobState = Literal["queued", "running", "done", "cancelled"]
FAILED = "failed"
_WAITING, _CANCELLED = "waiting", "cancelled"  # states of items; those with an answer have its outcome as their state
_OPEN: tuple[JobState, ...] = ("queued", "running")
_INSERTED_AT_A_TIME = 500
_PURGED_AT_A_TIME = 20
_CANDIDATES = 8


@dataclass(frozen=True)
class NewItem:
    """An image of a job: its file, where to fetch it, or why there is none.

    Attributes:
        image_id: the caller's.
        url: where to fetch it; None where the file is there.
        data: the file.
        answer: JSON of an error that is known already; the item is then never worked on.
    """

    image_id: str
    url: str | None = None
    data: bytes | None = field(default=None, repr=False)
    answer: str | None = None


@dataclass(frozen=True)
class Job:
    """A job as it stands.

    Attributes:
        id: 32 hexadecimal digits.
        time: when it was submitted.
        owner: who did.
        state: queued until somebody works on it; done once every item has an answer.
        total: its items.
        done: items with a result.
        failed: items with an error.
        parameters: as submitted.
        finished_at: when it was done or cancelled.
        outcomes: how many items have each result.
    """

    id: str
    time: str
    owner: str
    state: JobState
    total: int
    done: int
    failed: int
    parameters: Mapping[str, Any]
    finished_at: str | None
    outcomes: Mapping[str, int]

    @property
    def waiting(self) -> int:
        """Items that have no answer; in a cancelled job they will never have one."""
        return self.total - self.done - self.failed


@dataclass(frozen=True)
class WaitingItem:
    """An item that is to be answered; see `NewItem`."""

    position: int
    image_id: str
    url: str | None
    data: bytes | None = field(repr=False)


@dataclass(frozen=True)
class Answers:
    """Answers of consecutive items.

    Attributes:
        answers: position and JSON of each, in order.
        more: whether there are more after them, now or later.
    """

    answers: tuple[tuple[int, str], ...]
    more: bool


def new_id() -> str:
    """For a new job; nobody guesses it."""
    return secrets.token_hex(16)


def submit(connection: Connection, id: str, owner: str, items: Sequence[NewItem], parameters: Mapping[str, Any]) -> Job:
    """Store a job under a new id; one whose items all have an answer already is done."""
    at = text_of(now())
    failed = sum(item.answer is not None for item in items)
    ended = failed == len(items)
    connection.execute(
        insert(jobs).values(
            id=id,
            time=at,
            owner=owner,
            state="done" if ended else "queued",
            total=len(items),
            done=0,
            failed=failed,
            parameters=canonical_json(parameters),
            finished_at=at if ended else None,
        )
    )
    rows = [
        {
            "job_id": id,
            "position": position,
            "image_id": item.image_id,
            "url": item.url if item.answer is None else None,
            "data": item.data if item.answer is None else None,
            "state": _WAITING if item.answer is None else FAILED,
            "answer": item.answer,
        }
        for position, item in enumerate(items)
    ]
    for start in range(0, len(rows), _INSERTED_AT_A_TIME):
        connection.execute(insert(job_items), rows[start : start + _INSERTED_AT_A_TIME])
    return get(connection, id)


def get(connection: Connection, id: str, owner: str | None = None) -> Job:
    """A job.

    Args:
        connection: of any transaction.
        id: of the job.
        owner: who asks; None for who may see all.

    Raises:
        UnknownJob: there is none, or it is somebody else's.
    """
    row = connection.execute(select(jobs).where(jobs.c.id == id)).first()
    if row is None or owner not in (None, row.owner):
        raise UnknownJob(id)
    return _jobs_of(connection, [row])[0]


def list_jobs(connection: Connection, owner: str | None, *, limit: int, before: str | None = None) -> list[Job]:
    """Jobs, newest first.

    Args:
        connection: of any transaction.
        owner: whose; None for all.
        limit: the most.
        before: id of the job to go on after; None to begin with the newest.

    Raises:
        UnknownJob: `before` is none that the owner has.
    """
    query = select(jobs).order_by(jobs.c.time.desc(), jobs.c.id.desc()).limit(limit)
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    if before is not None:
        last = get(connection, before, owner)
        same_time = (jobs.c.time == last.time) & (jobs.c.id < last.id)
        query = query.where(or_(jobs.c.time < last.time, same_time))
    return _jobs_of(connection, connection.execute(query).all())


def open_jobs(connection: Connection) -> int:
    """How many jobs wait or run."""
    return int(connection.execute(select(func.count()).select_from(jobs).where(jobs.c.state.in_(_OPEN))).scalar_one())


def waiting_bytes(connection: Connection) -> int:
    """Bytes of the image files that are kept for items which wait."""
    query = (
        select(func.coalesce(func.sum(func.length(job_items.c.data)), 0))
        .join(jobs, jobs.c.id == job_items.c.job_id)
        .where(jobs.c.state.in_(_OPEN), job_items.c.state == _WAITING)
    )
    return int(connection.execute(query).scalar_one())


def claim(connection: Connection, by: str, lease_s: float) -> Job | None:
    """Take the lease of an unfinished job that nobody holds.

    Those that nobody has worked on go first, then the one that was released longest ago: jobs take turns.

    Args:
        connection: of a transaction that writes.
        by: the process that takes it.
        lease_s: how long it holds unless renewed.

    Returns:
        The job; None where there is none.
    """
    free = _free(text_of(now()))
    order = (func.coalesce(jobs.c.lease_until, ""), jobs.c.time, jobs.c.id)
    query = select(jobs.c.id).where(jobs.c.state.in_(_OPEN), free).order_by(*order).limit(_CANDIDATES)
    for id in connection.execute(query).scalars().all():
        taken = connection.execute(
            update(jobs)
            .where(jobs.c.id == id, jobs.c.state.in_(_OPEN), free)  # again: another replica may have been quicker
            .values(state="running", lease_by=by, lease_until=_in(lease_s))
        )
        if taken.rowcount:
            return get(connection, id)
    return None


def renew(connection: Connection, id: str, by: str, lease_s: float) -> bool:
    """Hold a lease for longer; whether it was still held, and the job is still to be worked on."""
    held = (jobs.c.id == id, jobs.c.lease_by == by, jobs.c.state.in_(_OPEN))
    return bool(connection.execute(update(jobs).where(*held).values(lease_until=_in(lease_s))).rowcount)


def release(connection: Connection, id: str, by: str) -> None:
    """Give a lease back, where it is still held; the job is then the last of those that wait for their turn."""
    mine = (jobs.c.id == id, jobs.c.lease_by == by)
    connection.execute(update(jobs).where(*mine).values(lease_by=None, lease_until=text_of(now())))


def waiting(connection: Connection, id: str, limit: int, skipping: Collection[int] = ()) -> list[int]:
    """Positions of the first items that wait, besides some."""
    query = (
        select(job_items.c.position)
        .where(job_items.c.job_id == id, job_items.c.state == _WAITING)
        .order_by(job_items.c.position)
        .limit(limit + len(skipping))
    )
    return [position for position in connection.execute(query).scalars() if position not in skipping][:limit]


def waiting_item(connection: Connection, id: str, position: int) -> WaitingItem | None:
    """An item with its image; None where it waits no longer."""
    where = (job_items.c.job_id == id, job_items.c.position == position, job_items.c.state == _WAITING)
    row = connection.execute(select(job_items).where(*where)).first()
    return None if row is None else WaitingItem(row.position, row.image_id, row.url, row.data)


def finish_item(connection: Connection, id: str, position: int, outcome: str, answer: str) -> Job | None:
    """Store the answer of an item that waits, and erase its image; one that does not wait stays as it is.

    Args:
        connection: of a transaction that writes.
        id: of the job.
        position: of the item.
        outcome: FAILED, or a word of at most 16 characters for results of its kind, such as a verdict.
        answer: JSON.

    Returns:
        The job, where it is done with this item.
    """
    # Whoever changes items holds their job's row, always first: no two wait for each other.
    job = connection.execute(select(jobs).where(jobs.c.id == id).with_for_update()).first()
    if job is None or job.state not in _OPEN:
        return None
    item = (job_items.c.job_id == id, job_items.c.position == position, job_items.c.state == _WAITING)
    stored = connection.execute(
        update(job_items).where(*item).values(state=outcome, answer=answer, url=None, data=None)
    )
    if not stored.rowcount:
        return None
    values: dict[str, object] = {"failed": job.failed + 1} if outcome == FAILED else {"done": job.done + 1}
    ended = job.done + job.failed + 1 == job.total
    if ended:
        values |= {"state": "done", "finished_at": text_of(now()), "lease_by": None, "lease_until": None}
    connection.execute(update(jobs).where(jobs.c.id == id).values(**values))
    return get(connection, id) if ended else None


def cancel(connection: Connection, id: str, owner: str | None = None) -> Job:
    """End a job and erase the images that wait; answers stay. One that has ended stays as it is.

    Raises:
        UnknownJob: as `get`.
    """
    get(connection, id, owner)
    ended = connection.execute(
        update(jobs)
        .where(jobs.c.id == id, jobs.c.state.in_(_OPEN))
        .values(state="cancelled", finished_at=text_of(now()), lease_by=None, lease_until=None)
    )
    if ended.rowcount:
        connection.execute(
            update(job_items)
            .where(job_items.c.job_id == id, job_items.c.state == _WAITING)
            .values(state=_CANCELLED, url=None, data=None)
        )
    return get(connection, id)


def answers(connection: Connection, id: str, *, after: int, limit: int, max_chars: int) -> Answers:
    """Answers in the order of the items, up to the first that still waits: who goes on from the last misses none.

    Args:
        connection: of any transaction.
        id: of the job.
        after: position after which to begin; -1 for the first.
        limit: the most.
        max_chars: of all answers together, unless a single one has more.
    """
    later = (job_items.c.job_id == id, job_items.c.position > after, job_items.c.state != _CANCELLED)
    sizes = connection.execute(
        select(job_items.c.position, job_items.c.state, func.length(job_items.c.answer).label("chars"))
        .where(*later)
        .order_by(job_items.c.position)
        .limit(limit + 1)
    ).all()
    last, chars, more = after, 0, False
    for count, row in enumerate(sizes):
        chars += row.chars or 0
        if row.state == _WAITING or count == limit or (count and chars > max_chars):
            more = True
            break
        last = row.position
    found = connection.execute(
        select(job_items.c.position, job_items.c.answer)
        .where(*later, job_items.c.position <= last)
        .order_by(job_items.c.position)
    )
    return Answers(tuple((row.position, row.answer) for row in found), more)


def purge(connection: Connection, older_than_s: float) -> int:
    """Erase some of the jobs that ended longer ago, with their answers; how many."""
    old = select(jobs.c.id).where(jobs.c.finished_at < _in(-older_than_s)).limit(_PURGED_AT_A_TIME)
    ids = connection.execute(old).scalars().all()
    connection.execute(delete(job_items).where(job_items.c.job_id.in_(ids)))
    connection.execute(delete(jobs).where(jobs.c.id.in_(ids)))
    return len(ids)


def _jobs_of(connection: Connection, rows: Sequence[Row[Any]]) -> list[Job]:
    counted = connection.execute(
        select(job_items.c.job_id, job_items.c.state, func.count())
        .where(job_items.c.job_id.in_([row.id for row in rows]))
        .group_by(job_items.c.job_id, job_items.c.state)
    )
    outcomes: dict[str, dict[str, int]] = {}
    for job_id, state, count in counted:
        if state not in (_WAITING, _CANCELLED, FAILED):
            outcomes.setdefault(job_id, {})[state] = count
    return [
        Job(
            row.id,
            row.time,
            row.owner,
            cast(JobState, row.state),
            row.total,
            row.done,
            row.failed,
            json.loads(row.parameters),
            row.finished_at,
            outcomes.get(row.id, {}),
        )
        for row in rows
    ]


def _free(at: str) -> ColumnElement[bool]:
    return or_(jobs.c.lease_until.is_(None), jobs.c.lease_until <= at)


def _in(seconds: float) -> str:
    return text_of(now() + timedelta(seconds=seconds))
