"""The audit log: read it, export it, check it."""

from pathlib import Path
from typing import Literal

from service.client.calls import Call, Saved, file_call, given
from service.client.parts import Item, Items, Part, WayT, ask, asked, listed
from service.wire_audit import AuditAnswer, AuditEntry, VerifyAnswer

Chain = Literal["changes", "decisions"]
_NDJSON = "application/x-ndjson"


class Audit(Part[WayT]):
    """What was done, by whom, and why; and every verdict. Needs the scope `admin`.

    All raise ConnectionFailed, AnswerNotUnderstood and ProblemError.
    """

    @listed
    def entries(
        self,
        *,
        chain: Chain = "changes",
        after: int = 0,
        collection: str | None = None,
        kind: str | None = None,
        subject: str | None = None,
        page_size: int | None = None,
    ) -> Items[AuditEntry]:
        """Iterate over entries, oldest first.

        Args:
            chain: changes, or the decisions on images.
            after: number of the entry after which to begin.
            collection: only of this one.
            kind: only of this one, such as 'exemplar.add'.
            subject: only about this, such as the id of an exemplar.
            page_size: entries in one request, at most 1000.
        """
        wanted = given(chain=chain, collection=collection, kind=kind, subject=subject, limit=page_size)
        while True:
            page = yield from ask(Call("GET", "/audit", AuditAnswer, wanted | {"after": after}))
            for entry in page.entries:
                yield Item(entry)
            if page.next is None:
                return
            after = page.next

    @asked
    def export(self, path: Path, *, chain: Chain = "changes", after: int = 0, embeddings: bool = False) -> Call[Saved]:
        """Write the log to a new file, a line of JSON for each entry.

        The file is there when it is whole. `hardlook-index audit verify --file` checks it.

        Args:
            path: of the file.
            chain: changes, or the decisions on images.
            after: number of the entry after which to begin.
            embeddings: with what it takes to build the collections anew.

        Raises:
            OSError: the file is there already, or cannot be written.
        """
        params = given(chain=chain, after=after, embeddings=embeddings or None)
        return file_call("/audit/export", Path(path), _NDJSON, params)

    @asked
    def verify(self) -> Call[VerifyAnswer]:
        """Whether the log is whole, and whether replaying it gives the collections that serve."""
        return Call("POST", "/audit/verify", VerifyAnswer)
