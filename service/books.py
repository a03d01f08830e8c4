"""Books: what of a running service writes to the catalogue."""

from dataclasses import dataclass

from service.candidates import Candidates
from service.editing import Editor
from service.flood import FloodGuard
from service.image_keeping import ImageKeeper
from service.recording import Recorder
from service.webhooks import Webhooks


@dataclass(frozen=True)
class Books:
    """Everything that writes to the catalogue; put together in `service.bookkeeping`.

    Attributes:
        editor: changes collections, and writes for the others.
        recorder: of verdicts.
        candidates: versions that do not serve, and the shadows that run.
        webhooks: who is told of what; None where nobody is.
        flood_guard: notices exemplars that suddenly match too much; None where it is turned off.
        images: keeps small pictures; None where none are kept, as by default.
    """

    editor: Editor
    recorder: Recorder
    candidates: Candidates
    webhooks: Webhooks | None
    flood_guard: FloodGuard | None
    images: ImageKeeper | None = None
