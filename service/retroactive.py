"""Retroactive matching: an exemplar was added; which of the recent requests would have been answered otherwise?"""

import asyncio
import time
from collections.abc import Sequence

from indexer.catalog.clock import text_of
from indexer.catalog.edits import Add, Note
from indexer.catalog.traffic import recent
from indexer.live.view import View
from indexer.retroactive import RetroactiveMatches, catch
from service.runtime import Runtime
from service.webhooks import Event
from service.wire_collections import CaughtItem, Retroactive

_LISTED = 100
_SETTLE_S = 0.2
_LOOK_S = 0.3
_ADDITIONS = 20  # of one request that are looked at: each costs a pass over recent traffic


async def retroactive_of(
    runtime: Runtime, before: View | None, additions: Sequence[Add], actor: str, request_id: str
) -> Retroactive | None:
    """What exemplars of the moderation pools would have changed, in the answer and in the audit log.

    Args:
        runtime: of the service.
        before: the pools without the additions; None where there were none, so that nothing was answered.
        additions: that were made.
        actor, request_id: of whoever made them.

    Returns:
        None where nothing is kept of recent traffic.
    """
    if before is None or not runtime.settings.traffic_kept:
        return None
    editor, after = runtime.require_editor(), runtime.published.pools()
    await runtime.settle(_SETTLE_S)  # what was answered a moment ago counts too

    kept = runtime.settings.traffic_kept
    seen = await editor.read(
        lambda connection: recent(connection, encoder_fingerprint=after.encoder_fingerprint, limit=kept)
    )

    # Each recent request that may have changed is searched for again, which takes longer the larger the pools are: the
    # addition counts already, and whoever made it should not wait long for this.
    until_s = time.monotonic() + _LOOK_S

    def look() -> list[RetroactiveMatches]:
        return [
            catch(
                seen,
                edit.embedding,
                runtime.rule,
                before,
                after,
                limit=_LISTED,
                enough=lambda: time.monotonic() > until_s,
            )
            for edit in additions[:_ADDITIONS]
        ]

    return await _told(runtime, await asyncio.to_thread(look), additions, actor, request_id)


async def _told(
    runtime: Runtime, found: Sequence[RetroactiveMatches], additions: Sequence[Add], actor: str, request_id: str
) -> Retroactive:
    """The matches as they are answered; where there are any, the log and webhooks have them too."""
    caught = {(match.seen.request_id, match.seen.sha256): match for matches in found for match in matches.caught}
    items = [
        CaughtItem(
            request_id=match.seen.request_id,
            sha256=match.seen.sha256,
            time=text_of(match.seen.time),
            similarity=match.similarity,
            was=match.seen.verdict,
            would_be=match.after,
        )
        for match in sorted(caught.values(), key=lambda match: -match.similarity)
    ]
    if items:
        body = {
            "exemplars": [edit.exemplar.id for edit in additions[:_ADDITIONS]],
            "changed": len(items),
            "requests": [item.request_id for item in items[:_LISTED]],
        }
        await runtime.require_editor().apply(
            [Note(additions[0].collection, "retroactive.match", additions[0].exemplar.id, body)],
            actor=actor,
            reason="recent requests that the addition would have changed",
            request_id=request_id,
            also=runtime.telling(Event("retroactive.match", {**body, "request_id": request_id})),
        )
    return Retroactive(
        compared=max(matches.recent for matches in found),
        changed=len(items),
        requests=items[:_LISTED],
        complete=len(additions) <= _ADDITIONS and all(matches.complete for matches in found),
    )
