"""Cleaning: which copies a page offers to delete, and deleting those that were chosen."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from service.client import NotFound, ProblemError
from service.console.additions import text_of
from service.console.gate import Visit
from service.errors import InvalidParameter
from service.intake import Form
from service.wire_curation import DuplicateGroup

MIN_SIMILARITY = 0.8
DEFAULT_SIMILARITY = 0.95
_COPY, _KEEP = "copy-", "keep-"
# A form has at most 64 fields and 64 KiB; some of both are needed for the rest of it.
_MOST_FIELDS, _MOST_CHARS = 56, 40_000


@dataclass(frozen=True)
class Left:
    """A copy that was not deleted, and why."""

    id: str
    reason: str


def similarity_of(text: str) -> float:
    """The cosine that somebody has typed; the default where it is empty.

    Raises:
        InvalidParameter: it is no number, or none from which exemplars are near-duplicates.
    """
    try:
        value = float(text) if text.strip() else DEFAULT_SIMILARITY
    except ValueError:
        value = math.nan
    if not MIN_SIMILARITY <= value <= 1:
        raise InvalidParameter("min_similarity", f"it must be a number from {MIN_SIMILARITY} to 1")
    return value


def deletable(groups: Sequence[DuplicateGroup]) -> dict[tuple[int, int], str]:
    """Names of the boxes to choose copies with, by the numbers of their group and within it.

    As many as fit into one form, in the order of the list; the others come up when these are done. The first member of
    a group is the one to keep, and has no box.
    """
    names: dict[tuple[int, int], str] = {}
    fields = chars = 0
    for number, group in enumerate(groups):
        fields, chars = fields + 1, chars + _chars(group.members[0].id)
        for position, member in enumerate(group.members[1:], 1):
            fields, chars = fields + 1, chars + _chars(member.id)
            if fields > _MOST_FIELDS or chars > _MOST_CHARS:
                return names
            names[number, position] = f"{_COPY}{number}-{position}"
    return names


async def delete_copies(visit: Visit, collection: str, form: Form) -> list[Left]:
    """Delete the copies that were chosen, each by itself, unless the one to keep is not there any more.

    Args:
        visit: in whose name.
        collection: of the exemplars.
        form: with ids as `copy-GROUP-POSITION` and `keep-GROUP`, a `reason`, and `sure`.

    Returns:
        Those that are still there.

    Raises:
        InvalidParameter: none was chosen, or nobody is sure.
        HardlookError: of the client.
    """
    chosen = _chosen(form.fields)
    if not chosen:
        raise InvalidParameter("copies", "none was chosen")
    if form.fields.get("sure") != "yes":
        raise InvalidParameter("sure", "the box is not ticked")
    reason, left = text_of(form, "reason"), []
    for keep, copies in chosen.items():
        lacking = await _lacking(visit, collection, keep)
        for id in copies:
            problem = "it is the one to keep" if id == keep else lacking
            if not problem:
                problem = await _deleted(visit, collection, id, reason)
            if problem:
                left.append(Left(id, problem))
    return left


def _chosen(fields: Mapping[str, str]) -> dict[str, list[str]]:
    """Ids of copies by that of the one to keep."""
    chosen: dict[str, list[str]] = {}
    for name, id in fields.items():
        if name.startswith(_COPY):
            keep = fields.get(_KEEP + name.removeprefix(_COPY).partition("-")[0])
            if not keep or not id:
                raise InvalidParameter("keep", "it does not say which exemplar is to be kept")
            chosen.setdefault(keep, []).append(id)
    return chosen


async def _lacking(visit: Visit, collection: str, keep: str) -> str:
    """Why copies of this one are needed; empty where they are not."""
    try:
        state = (await visit.client.collections.exemplar(collection, keep)).item.state
    except NotFound:
        return f"{keep!r}, which was to be kept, is not there any more"
    return "" if state == "active" else f"{keep!r}, which was to be kept, is {state}"


async def _deleted(visit: Visit, collection: str, id: str, reason: str) -> str:
    """Why an exemplar is still there; empty where it is not."""
    try:
        await visit.client.collections.delete(collection, id, reason=reason)
    except NotFound:  # somebody else was faster
        return ""
    except ProblemError as error:
        return error.detail
    return ""


def _chars(id: str) -> int:
    return len(quote(id)) + 16
