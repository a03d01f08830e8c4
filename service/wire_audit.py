"""What goes over the wire about the audit log.

As light as `service.wire`, and for the same readers.
"""

from typing import Any, Literal

from pydantic import Field

from service.wire import _REQUEST_ID, Answer, Request
from service.wire_collections import PAGE, Asked, Page


class AuditQuery(Request):
    """Query of the audit log."""

    chain: Literal["changes", "decisions"] = Field("changes", description="Changes, or verdicts.")
    after: int = Field(0, ge=0, le=2**53, description="The `next` of the page before.")
    limit: Page = PAGE
    collection: Asked | None = Field(None, description="Only these.")
    kind: Asked | None = Field(None, description="Only these.", examples=["exemplar.add"])
    subject: Asked | None = Field(None, description="Only these, such as an exemplar's id.")


class ExportQuery(Request):
    """Query of the export of the audit log."""

    chain: Literal["changes", "decisions"] = Field("changes", description="Changes, or verdicts.")
    after: int = Field(0, ge=0, le=2**53, description="Entries from the one behind this number on.")
    embeddings: bool = Field(False, description="With what it takes to build the collections anew.")


class AuditEntry(Answer):
    """One entry of the audit log."""

    chain: Literal["changes", "decisions"]
    seq: int
    time: str
    kind: str = Field(examples=["exemplar.add"])
    actor: str
    reason: str
    request_id: str
    collection: str
    subject: str
    body: dict[str, Any]
    prev: str
    hash: str


class AuditAnswer(Answer):
    """A page of the audit log, oldest first."""

    request_id: str = Field(examples=[_REQUEST_ID])
    entries: list[AuditEntry]
    next: int | None = Field(description="Give it as `after` for the next page; null at the end.")


class ChainState(Answer):
    """What a check of one chain found."""

    chain: Literal["changes", "decisions"]
    entries: int
    seq: int = Field(description="Of the last entry.")
    hash: str = Field(description="Of the last entry; note it elsewhere to prove later that nothing before changed.")
    problems: list[str]


class VerifyAnswer(Answer):
    """Whether the audit log is whole, and whether replaying it gives the collections that serve."""

    request_id: str = Field(examples=[_REQUEST_ID])
    sound: bool
    chains: list[ChainState]
    replayed: dict[str, bool] = Field(description="By collection.")
