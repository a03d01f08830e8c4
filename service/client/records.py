"""What a run writes: one JSON line for each image, to a file that a later run goes on with, or to stdout."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service.client.errors import AnswerNotUnderstood, ConnectionFailed, HardlookError, ProblemError
from service.wire import ClassifyAnswer, ClassifyItem, Problem, SimilarAnswer, SimilarItem
from service.wire_collections import ChangedAnswer
from service.wire_jobs import JobItem, JobItemError

Record = dict[str, Any]
_CLIENT_TYPE = "urn:hardlook:client:"


class OutputUnusable(Exception):
    """The output file is not one of ours, or another run writes to it."""


def verdict_record(path: str, answer: ClassifyAnswer, item: ClassifyItem) -> Record:
    """The line of one verdict, with the versions that it was made by."""
    return {"path": path, **_verdict(item), **_versions(answer)}


def similar_record(path: str | None, answer: SimilarAnswer, item: SimilarItem) -> Record:
    """The line of one search; `path` is None for a text."""
    neighbors = [neighbor.model_dump(mode="json") for neighbor in item.neighbors]
    return {"path": path, "status": "ok", "neighbors": neighbors, "detail": item.detail, **_versions(answer)}


def addition_record(path: str, answer: ChangedAnswer) -> Record:
    """The line of an image that is an exemplar now, or was one already."""
    [item] = answer.items
    caught = answer.retroactive
    return {
        "path": path,
        "status": "ok",
        "outcome": "added" if answer.changed else "present",
        "id": item.id,
        "label": item.label,
        "collection": answer.collection,
        "version": answer.version,
        "revision": answer.revision,
        "would_have_changed": None if caught is None else caught.changed,
        "request_id": answer.request_id,
    }


def job_record(item: JobItem | JobItemError) -> Record:
    """The line of one image of a job; its id in the job takes the place of a path."""
    job = {"position": item.position}
    if isinstance(item, JobItemError):
        return problem_record(item.id, item.error) | job
    return {
        "path": item.id,
        **_verdict(item),
        "model": item.model,
        "snapshot": item.snapshot.version,
        "policy": item.policy,
        "request_id": item.request_id,
        **job,
    }


def problem_record(path: str | None, problem: Problem) -> Record:
    """The line of an image that the service could not answer."""
    return {"path": path, "status": "error", "error": problem.model_dump(mode="json")}


def error_record(path: str | None, error: HardlookError) -> Record:
    """The line of an image that has no answer."""
    if isinstance(error, ProblemError):
        return problem_record(path, error.problem)
    if isinstance(error, ConnectionFailed):
        slug, title = "no-answer", "The service did not answer"
    elif isinstance(error, AnswerNotUnderstood):
        slug, title = "answer-not-understood", "The answer is none of this service's"
    else:
        slug, title = "unreadable", "The image cannot be read"
    return {
        "path": path,
        "status": "error",
        "error": {"type": _CLIENT_TYPE + slug, "title": title, "detail": str(error)},
    }


def _verdict(item: ClassifyItem) -> Record:
    return {
        "status": "ok",
        "verdict": item.verdict.value,
        "pool": item.pool.value if item.pool else None,
        "margin": item.margin,
        "reason": item.reason,
        "detail": item.detail,
    }


def _versions(answer: ClassifyAnswer | SimilarAnswer) -> Record:
    return {
        "model": answer.model.fingerprint,
        "snapshot": answer.snapshot.version,
        "policy": answer.policy.version,
        "request_id": answer.request_id,
    }


class Answered:
    """The paths that an output file has an answer for: 16 bytes of a hash each, so that a million fit in memory."""

    def __init__(self, flagged_verdicts: Collection[str]) -> None:
        self._flagged_verdicts = flagged_verdicts
        self._paths: set[bytes] = set()
        self._flagged: set[bytes] = set()

    def add(self, record: Record) -> None:
        """Note one line; lines of errors are asked again."""
        path = record["path"]
        if record["status"] == "ok" and path is not None:
            self._paths.add(_digest(path))
            if record.get("verdict") in self._flagged_verdicts:
                self._flagged.add(_digest(path))

    def __contains__(self, path: str) -> bool:
        return _digest(path) in self._paths

    def flagged(self, path: str) -> bool:
        """Whether its verdict is one of those asked about."""
        return _digest(path) in self._flagged


def _digest(path: str) -> bytes:
    return hashlib.blake2b(path.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@contextmanager
def appended(path: Path, note: Callable[[Record], None]) -> Iterator[Callable[[Record], None]]:
    """Open an output file to go on with it; no other run may have it open.

    A last line that a kill cut off gives way. Every line is handed to the system before the next image's.

    Args:
        path: made where it does not exist.
        note: called with every line that is already there.

    Yields:
        Appends one record.

    Raises:
        OutputUnusable: a line is not a record: the file is something else, and stays as it is.
        OSError: the file cannot be opened or written.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputUnusable(f"{path} is being written by another run") from error
        finished_bytes = _read_records(path, note)
        file.truncate(finished_bytes)
        file.seek(finished_bytes)

        def append(record: Record) -> None:
            line = memoryview(json_line(record).encode())
            while line:
                line = line[file.write(line) :]

        yield append


def _read_records(path: Path, note: Callable[[Record], None]) -> int:
    finished_bytes = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                if not b'{"path":'.startswith(line[:8]):
                    raise OutputUnusable(f"{path}, line {number}: not a line of this command; nothing was changed")
                break
            try:
                record = json.loads(line)
                if not isinstance(record["path"], str | None) or record["status"] not in ("ok", "error"):
                    raise ValueError("no path or status")
                note(record)
            except (ValueError, TypeError, KeyError) as error:
                raise OutputUnusable(
                    f"{path}, line {number}: not a line of this command; nothing was changed"
                ) from error
            finished_bytes += len(line)
    return finished_bytes


def json_line(record: Record) -> str:
    """One line, in ASCII: a name of undecodable bytes survives, and nothing in it can steer a terminal."""
    return json.dumps(record, allow_nan=False) + "\n"


def table_line(record: Record) -> str:
    """One line for a person: what became of the path, or a line for each neighbour."""
    path = printable(record["path"] or "")
    if record["status"] == "error":
        error = record["error"]
        return f"error                {path}: {printable(error['title'])}: {printable(error['detail'])}\n"
    if "verdict" in record:
        margin = "" if record["margin"] is None else f"{record['margin']:.4f}"
        return f"{record['verdict']:<8} {margin:>10}  {path}\n"
    if "outcome" in record:
        changed = record["would_have_changed"]
        caught = f"  would have changed {changed} recent verdicts" if changed else ""
        return f"{record['outcome']:<8} {printable(record['label']):<8} {printable(record['id'])}\t{path}{caught}\n"
    return "".join(
        f"{near['similarity']:>7.4f}  {printable(near['pool']):<10} {printable(near['id'])}\t{path}\n"
        for near in record["neighbors"]
    )


def printable(text: str) -> str:
    """Text without anything that a terminal would obey or an output could not encode."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
