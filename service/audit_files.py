"""Audit files: what of a run directory of `hardlook-lab audit` the service reads, as docs/auditing.md describes it.

The folder is written by another program, perhaps at this moment, perhaps on another machine: links are not followed,
every file has a limit, and what does not fit the format is an error that says so. Knows nothing of what is deployed.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, BinaryIO, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, ValidationError

from perception.policy_file import Norm
from perception.verdict import Neighbor

MIB = 1024 * 1024
PLAN, EVENTS, RECORDS, CHECKS = "plan.json", "metrics.jsonl", "records.jsonl", "checks.jsonl"
REPORT, PAGE = "report.json", "report.html"
FILES = (PLAN, EVENTS, RECORDS, CHECKS, REPORT, PAGE)
LIMITS_BYTES = MappingProxyType(
    {PLAN: 4 * MIB, EVENTS: 16 * MIB, RECORDS: 128 * MIB, CHECKS: 16 * MIB, REPORT: 64 * MIB, PAGE: 64 * MIB}
)
"""Of each file; a larger one is not read."""
MAX_LINE_BYTES = 4 * MIB
_CHUNK_BYTES = MIB
_FIRST_REASONS = 3
FileT = TypeVar("FileT", bound=BaseModel)
Name = Annotated[str, Field(min_length=1, max_length=200)]
Positive = Annotated[int, Field(ge=1)]


class RunDamaged(ValueError):
    """A file of a run directory cannot be read as what it should be.

    Attributes:
        file: its name.
        reason: for a person.
    """

    def __init__(self, file: str, reason: str) -> None:
        self.file, self.reason = file, reason
        super().__init__(f"{file} {reason}")


class FileMissing(RunDamaged):
    """A file of a run directory is not there; perhaps not yet."""


class _Part(BaseModel):
    """A part of a file: what is not read here is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class PlannedPolicy(_Part):
    """The parameters of a decision policy."""

    rule: Literal["nearest", "vote"] = "nearest"
    k: int = 5
    min_similarity: FiniteFloat = -1.0
    min_margin: FiniteFloat = 0.0
    min_margin_unsafe: FiniteFloat = 0.0


class PlannedDefense(_Part):
    """What a system did to an image before it encoded it."""

    kind: str
    attacker: str = "adaptive"
    original: str = ""
    eps: FiniteFloat
    steps: int
    step_size: FiniteFloat
    beta: FiniteFloat
    threshold: FiniteFloat


class PlannedSystem(_Part):
    """Who was asked."""

    name: Name
    encoder: str
    precision: str = "fp32"
    gallery: str = ""
    pools: tuple[str, ...] = ()
    policy: PlannedPolicy | None = None
    policy_file: str = ""
    head: str = ""
    defense: PlannedDefense | None = None


class PlannedThreat(_Part):
    """How images were attacked: every radius with every number of steps."""

    norm: Norm
    eps: FiniteFloat | tuple[FiniteFloat, ...]
    steps: Positive | tuple[Positive, ...]


class Plan(_Part):
    """What was asked."""

    task: str
    systems: Annotated[tuple[PlannedSystem, ...], Field(min_length=1, max_length=1000)]
    threats: Annotated[tuple[PlannedThreat, ...], Field(min_length=1)]
    neighbors: Positive = 5


class PlanFile(_Part):
    """plan.json; that of another job has no `audit`."""

    audit: Plan


class Event(_Part):
    """A line of metrics.jsonl."""

    event: str
    time_s: FiniteFloat


class SystemEvent(_Part):
    """What the run noted of a system before its first image."""

    system: Name
    encoder: str
    precision: str
    fingerprint: str
    items: NonNegativeInt
    gallery_sha256: str | None = None
    policy_version: str | None = None
    original_fingerprint: str | None = None


class ShareEntry(_Part):
    """A share of right answers; its value and interval follow from it."""

    right: NonNegativeInt
    total: Positive


class MeanEntry(_Part):
    """A mean over queries with its bootstrap 95 % interval."""

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    total: Positive


class AnswersEntry(_Part):
    """How often each verdict was given."""

    safe: NonNegativeInt
    review: NonNegativeInt
    unsafe: NonNegativeInt


class SettingEntry(_Part):
    """How images were attacked."""

    norm: Norm
    eps: FiniteFloat
    steps: Positive


class RowEntry(_Part):
    """The figures of one system, setting and kind of images."""

    system: Name
    setting: SettingEntry
    label: str
    set: str
    total: Positive
    clean: ShareEntry | None = None
    robust: ShareEntry | None = None
    answers: dict[str, AnswersEntry] = Field(default_factory=dict)
    means: dict[str, dict[str, MeanEntry]] = Field(default_factory=dict)


class CheckEntry(_Part):
    """One check for masked gradients."""

    system: str
    name: str
    passed: bool
    sentence: str


class Identity(_Part):
    """What a report says of the run that it was made from."""

    finished: bool
    records_sha256: str


class ReportFile(_Part):
    """report.json."""

    format: Literal["hardlook-audit-figures-1"]
    task: str
    rows: Annotated[tuple[RowEntry, ...], Field(min_length=1)]
    checks: tuple[CheckEntry, ...]
    plan: Plan
    identity: Identity


class Evidence(_Part):
    """What was found near one version of an image."""

    neighbors: tuple[Neighbor, ...]


class RecordLine(_Part):
    """A line of records.jsonl, less what a replay has no use for."""

    system: str
    fingerprint: str
    norm: Norm
    eps: FiniteFloat
    steps: Positive
    set: str
    id: str
    label: str
    clean: Evidence
    attacked: Evidence


@contextmanager
def opened_folder(path: Path) -> Iterator[int]:
    """A descriptor of a folder that is no link itself; its files are opened through it, whatever becomes of the path.

    Raises:
        OSError: there is no such folder.
    """
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield folder
    finally:
        os.close(folder)


@contextmanager
def opened_file(folder: int, name: str) -> Iterator[BinaryIO]:
    """A plain file of a folder, to be read.

    Raises:
        FileMissing: there is none of that name.
        RunDamaged: it is no plain file, has more bytes than it may have, or cannot be read.
    """
    try:
        # Without blocking: a pipe in the place of a file would wait for somebody who writes to it.
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        raise FileMissing(name, "is missing") from None
    except OSError as error:
        raise RunDamaged(name, f"cannot be opened: {error.strerror}; links are not followed") from error
    with os.fdopen(file, "rb") as stream:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise RunDamaged(name, "is no plain file")
        if status.st_size > LIMITS_BYTES[name]:
            raise RunDamaged(name, f"has {status.st_size} bytes, the limit is {LIMITS_BYTES[name]}")
        try:
            yield stream
        except OSError as error:
            raise RunDamaged(name, f"cannot be read: {error.strerror}") from error


def read_bytes(folder: int, name: str) -> bytes:
    """All of a file; errors are those of `opened_file`."""
    with opened_file(folder, name) as file:
        content = file.read(LIMITS_BYTES[name] + 1)
    if len(content) > LIMITS_BYTES[name]:  # it has grown since it was looked at
        raise RunDamaged(name, f"has more than {LIMITS_BYTES[name]} bytes, which is the limit")
    return content


def read_model(folder: int, name: str, model: type[FileT]) -> FileT:
    """A file that is one JSON value.

    Raises:
        FileMissing, RunDamaged: it is not there, or not that.
    """
    return parsed(name, read_bytes(folder, name), model)


def finished_lines(folder: int, name: str) -> Iterator[tuple[int, bytes]]:
    """Lines of a file and their numbers, from 1; an unfinished last one is being written, and passed over.

    Raises:
        FileMissing, RunDamaged: it is not there, a line has more than `MAX_LINE_BYTES`, or `opened_file` fails.
    """
    left = LIMITS_BYTES[name]
    with opened_file(folder, name) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number, left = number + 1, left - len(line)
            if len(line) > MAX_LINE_BYTES:
                raise RunDamaged(name, f"has a line {number} of more than {MAX_LINE_BYTES} bytes, which is the limit")
            if left < 0:
                raise RunDamaged(name, f"has more than {LIMITS_BYTES[name]} bytes, which is the limit")
            if line.endswith(b"\n"):
                yield number, line


def parsed(name: str, content: bytes, model: type[FileT]) -> FileT:
    """JSON as a model.

    Raises:
        RunDamaged: it is none; names the file and the first things that are wrong.
    """
    try:
        return model.model_validate_json(_of_characters(content))
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False, include_context=False)
        reasons = [
            f"{'.'.join(map(str, part['loc']))}: {part['msg']}" if part["loc"] else part["msg"]
            for part in wrong[:_FIRST_REASONS]
        ]
        raise RunDamaged(name, f"does not hold what it should: {'; '.join(reasons)}"[:500]) from None


def _of_characters(content: bytes) -> bytes:
    """JSON without halves of characters, which ids have that were file names in no encoding; they stay different."""
    if b"\\ud" not in content and b"\\uD" not in content:
        return content
    try:
        return json.dumps(json.loads(content), ensure_ascii=False).encode("utf-8", "xmlcharrefreplace")
    except (ValueError, RecursionError):
        return content


def sha256_of(folder: int, name: str) -> str:
    """Of a file's bytes; errors are those of `opened_file`."""
    digest = hashlib.sha256()
    with opened_file(folder, name) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
