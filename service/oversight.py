"""Oversight: what follows from verdicts after they were recorded. Webhooks hear of them, and floods are stopped."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from datetime import timedelta

from sqlalchemy import Connection

from indexer.catalog import chain
from indexer.catalog.clock import now, parse_time
from indexer.catalog.edits import Disable, Note
from indexer.catalog.entry import Entry
from indexer.catalog.ledger import CHANGES
from indexer.catalog.records import embedding_sha256
from indexer.catalog.reviews import NewItem, open_items
from indexer.catalog.traffic import Decision
from indexer.contents import POOLS
from indexer.errors import IndexerError
from perception.verdict import PoolLabel, VerdictLabel
from service.editing import Editor
from service.flood import Flood
from service.published import Published
from service.webhook_file import EventType
from service.webhooks import Event, Webhooks

FLOOD_GUARD = "flood-guard"
LATELY = timedelta(hours=24)
# Not exemplar.release: whoever lets an exemplar out of quarantine has looked at it.
_ARRIVALS = ("exemplar.add", "exemplar.move", "exemplar.enable", "pool.import")
_EVENTS: dict[VerdictLabel, EventType] = {
    VerdictLabel.UNSAFE: "verdict.unsafe",
    VerdictLabel.REVIEW: "verdict.review",
}
_log = logging.getLogger("hardlook.oversight")


class Oversight:
    """Acts on what was recorded.

    Args:
        editor: of the catalogue.
        published: the collections.
        webhooks: told; None where nobody is.
        max_reviews: undecided items that the review queue may have.
        quarantined: called for each exemplar that was taken out of searches.
    """

    def __init__(
        self,
        editor: Editor,
        published: Published,
        webhooks: Webhooks | None,
        max_reviews: int,
        quarantined: Callable[[], object],
    ) -> None:
        self._editor, self._published, self._webhooks = editor, published, webhooks
        self._max_reviews, self._quarantined = max_reviews, quarantined

    def is_new(self, id: str) -> bool:
        """Whether an exemplar of the moderation pools was added, moved or enabled within the last day."""
        with self._editor.catalog.database.reading() as connection:
            found = chain.read(
                connection, CHANGES, collection=POOLS, subject=id, kinds=_ARRIVALS, newest_first=True, limit=1
            )
        return bool(found) and parse_time(found[0].time) > now() - LATELY

    def searched(self) -> int:
        """How many exemplars the moderation pools have."""
        view = self._published.snapshots.get(POOLS)
        return 0 if view is None else len(view)

    def tell(self, connection: Connection, decisions: Sequence[Decision]) -> None:
        """Tell webhooks of verdicts that somebody may have to act on, in the transaction that records them."""
        if self._webhooks is not None:
            events = [
                Event(kind, _told(decision))
                for decision in decisions
                if (kind := _EVENTS.get(decision.verdict)) is not None and self._webhooks.wanted(kind)
            ]
            self._webhooks.enqueue(connection, events)

    async def on_flood(self, flood: Flood) -> None:
        """Take an exemplar that suddenly decides too much out of searches, and ask a person to look at it.

        One that has been there for long and is not of the safe pool stays: its rise may be a wave of what it is there
        to catch, and without it that would pass. A person is asked all the same.
        """
        view = self._published.snapshots.get(POOLS)
        if view is None:
            return
        id, webhooks = flood.exemplar_id, self._webhooks
        reason = f"it decided {flood.matches} kinds of the last {flood.decisions} images"
        try:
            exemplar, embedding = view.exemplar(id), await asyncio.to_thread(view.embedding, id)
            item = NewItem(
                origin="flood",
                collection=POOLS,
                # Without its file, the embedding tells one item from another.
                image_sha256=exemplar.sha256 or embedding_sha256(embedding),
                embedding=embedding,
                verdict=_VERDICTS[exemplar.label],
                evidence={"exemplar": id, "matches": flood.matches, "decisions": flood.decisions, "new": flood.new},
                request_id="",
                reporter=FLOOD_GUARD,
                comment=reason,
            )

            stays = not flood.new and exemplar.label != PoolLabel.SAFE
            data = {"collection": POOLS, "exemplar": id, "label": exemplar.label, "reason": reason, "stays": stays}

            def report(connection: Connection, entry: Entry | None) -> None:
                if entry is None:
                    return
                open_items(connection, [item], limit=self._max_reviews)
                if webhooks is not None:
                    webhooks.enqueue(connection, [Event("exemplar.quarantined", data)])

            edit = Note(POOLS, "flood.report", id, data) if stays else Disable(POOLS, id, by="quarantine")
            [outcome] = await self._editor.apply([edit], actor=FLOOD_GUARD, reason=reason, also=report)
        except IndexerError as error:
            _log.error("exemplar %r should be in quarantine and is not: %s", id, error)
            return
        if outcome.entry is not None:
            _log.warning("exemplar %r %s: %s", id, "is to be looked at" if stays else "is in quarantine", reason)
            if not stays:
                self._quarantined()


_VERDICTS = {"safe": VerdictLabel.SAFE, "buffer": VerdictLabel.REVIEW, "unsafe": VerdictLabel.UNSAFE}


def _told(decision: Decision) -> dict[str, object]:
    """A verdict as webhooks hear of it."""
    return {
        "request_id": decision.request_id,
        "image_id": decision.image_id,
        "sha256": decision.sha256,
        "caller": decision.caller,
        "route": decision.route,
        **decision.evidence,
    }
