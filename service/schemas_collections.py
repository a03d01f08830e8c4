"""Conversions from the values of the catalogue to what goes over the wire.

That is in `service.wire_collections` and `service.wire_audit`.
"""

from typing import Any

from indexer.catalog.clock import now, text_of
from indexer.catalog.entry import Entry
from indexer.catalog.records import Record
from indexer.catalog.state import State
from indexer.contents import Exemplar
from indexer.dry_run import DryRun
from indexer.live.view import View
from service import wire_collections as wire
from service.wire_audit import AuditEntry


def exemplar_item(exemplar: Exemplar, record: Record | None) -> wire.ExemplarItem:
    """An exemplar; `record` is None for one that nobody has changed since its snapshot was built."""
    disabled = record.disabled if record is not None and record.disabled and record.disabled.holds(now()) else None
    by = {"operator": "disabled", "quarantine": "quarantined"}
    return wire.ExemplarItem(
        id=exemplar.id,
        label=exemplar.label,
        sha256=exemplar.sha256,
        source=exemplar.source,
        metadata=dict(exemplar.metadata),
        note=record.note if record else "",
        state="active" if disabled is None else by[disabled.by],
        disabled_until=text_of(disabled.until) if disabled and disabled.until else None,
        suppresses=list(record.suppresses) if record else [],
        min_similarity=record.min_similarity if record else None,
    )


def item_of(view: View, id: str) -> wire.ExemplarItem:
    """An exemplar, or suppress item, of a view; UnknownExemplar where there is none."""
    record = view.record(id)
    return exemplar_item(view.exemplar(id) if record is None else record.exemplar, record)


def audit_entry(entry: Entry) -> AuditEntry:
    """One entry of the audit log."""
    return AuditEntry(**entry.to_json())


def version_item(entry: Entry) -> wire.VersionItem:
    """An entry of the log that made, named or went back to a version."""
    kind = entry.kind.removeprefix("version.")
    return wire.VersionItem(
        version=entry.body["version"],
        revision=entry.body["revision"],
        time=entry.time,
        kind=kind,
        name=entry.body.get("name", ""),
        actor=entry.actor,
        reason=entry.reason,
    )


def state_fields(state: State | View) -> dict[str, Any]:
    """Where a collection is."""
    return {"collection": state.collection, "version": state.version, "revision": state.revision}


def dry_run_answer(request_id: str, candidate: str, found: DryRun) -> wire.DryRunAnswer:
    """How a candidate would have judged recent traffic."""
    return wire.DryRunAnswer(
        request_id=request_id,
        candidate=candidate,
        compared=found.n,
        changed=found.flips_total,
        rate=found.disagreement,
        interval95=found.interval95,
        confusion={str(was): {str(now): n for now, n in row.items()} for was, row in found.confusion.items()},
        flips=[
            wire.FlipItem(
                request_id=flip.seen.request_id,
                sha256=flip.seen.sha256,
                time=text_of(flip.seen.time),
                was=flip.present,
                would_be=flip.candidate,
            )
            for flip in found.flips
        ],
    )
