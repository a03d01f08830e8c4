"""Provenance: what the service runs with is in the audit log, so that a decision can be made again a year later.

Owns what of settings, policy, model and keys is written down, and when: at the start and where something has changed.
"""

import logging
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection

from indexer.catalog import chain
from indexer.catalog.edits import Note
from indexer.catalog.ledger import CHANGES
from service.editing import Editor
from service.key_file import KeyRecord
from service.settings import Settings
from service.wire import Model, Policy

ACTOR = "hardlook-serve"
_log = logging.getLogger("hardlook.provenance")
# What names secrets or files of this machine is said to be set, and no more.
_HIDDEN = (
    "audits",
    "catalog",
    "catalog_password_file",
    "console_secret_file",
    "images",
    "keys_file",
    "webhooks_file",
    "policy_file",
    "pools",
    "shadow_pools",
    "ttc_seed_file",
)
# What makes no difference to what is answered.
_UNTOLD = ("host", "port", "log_level")


def described_settings(settings: Settings) -> dict[str, Any]:
    """The settings, without secrets and without what is this machine's alone."""
    found = settings.model_dump(mode="json", exclude=set(_UNTOLD))
    return {name: bool(value) if name in _HIDDEN else value for name, value in found.items()}


async def write_down(
    editor: Editor, settings: Settings, model: Model, policy: Policy, keys: Iterable[KeyRecord]
) -> None:
    """Log what the service runs with, as far as it is not what was logged last. Errors are those of `Editor.apply`."""
    await _note(editor, "settings.set", "settings", described_settings(settings))
    await _note(editor, "model.set", model.fingerprint, model.model_dump(mode="json"))
    await _note(editor, "policy.set", policy.version, policy.model_dump(mode="json"))
    await write_down_keys(editor, keys)


async def write_down_keys(editor: Editor, keys: Iterable[KeyRecord]) -> None:
    """Log which keys are in force, where that has changed. Errors are those of `Editor.apply`."""
    held = {
        key.id: {"name": key.name, "scopes": sorted(key.scopes), "state": key.state(datetime.now(UTC))} for key in keys
    }
    await _note(editor, "keys.change", "keys", {"keys": held})


async def _note(editor: Editor, kind: str, subject: str, body: Mapping[str, Any]) -> None:
    def last(connection: Connection) -> Any:
        found = chain.read(connection, CHANGES, kinds=(kind,), newest_first=True, limit=1)
        return found[0].body if found else None

    before = await editor.read(last)
    if before == body:
        return
    changed = sorted(name for name in body if not isinstance(before, Mapping) or before.get(name) != body[name])
    reason = f"changed: {', '.join(changed)}" if before is not None else "as it is at the start"
    await editor.apply([Note("", kind, subject, body)], actor=ACTOR, reason=reason)
    _log.info("%s is in the audit log: %s", kind, reason)
