"""Collections that change while they serve: what is in them, and what may be done to that."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias

from service.client.calls import Call, given, image_source, json_call, path_of
from service.client.images import Named, Source, each_of, load_image, load_named
from service.client.parts import Item, Items, Part, WayT, ask, asked, listed
from service.wire_collections import (
    AddBody,
    ChangeBody,
    ChangedAnswer,
    CreateBody,
    ExemplarAnswer,
    ExemplarItem,
    ExemplarsAnswer,
    NewExemplar,
    SuppressBody,
    VersionAnswer,
)

Addable: TypeAlias = Source | Named | NewExemplar


class Collections(Part[WayT]):
    """Exemplars of the moderation pools (`pools`) and of galleries. Needs the scope `pools:write`.

    When a method returns, the change is durable and every answer that follows knows it. `reason` is kept in the audit
    log. What is so already is no change: `changed` of the answer is then false.

    All raise ConnectionFailed, AnswerNotUnderstood and ProblemError; ValueError for what no collection takes.
    """

    @asked
    def create(self, collection: str, *, reason: str = "") -> Call[VersionAnswer]:
        """Make an empty gallery."""
        return json_call("POST", "/collections", VersionAnswer, CreateBody(name=collection, reason=reason))

    @listed
    def exemplars(
        self, collection: str, *, label: str | None = None, page_size: int | None = None
    ) -> Items[ExemplarItem]:
        """Iterate over exemplars and suppress items in the order of their ids, disabled ones too.

        Args:
            collection: 'pools', or a gallery.
            label: only of this pool or class.
            page_size: exemplars in one request, at most 1000.
        """
        params = given(label=label, limit=page_size)
        after: str | None = None
        while True:
            page = yield from ask(
                Call(
                    "GET", path_of("collections", collection, "exemplars"), ExemplarsAnswer, params | given(after=after)
                )
            )
            for item in page.items:
                yield Item(item)
            if page.next is None:
                return
            after = page.next

    @asked
    def exemplar(self, collection: str, id: str) -> Call[ExemplarAnswer]:
        """One exemplar or suppress item."""
        return Call("GET", _place(collection, id), ExemplarAnswer)

    @asked
    def add(
        self,
        collection: str,
        items: Addable | Sequence[Addable],
        label: str | None = None,
        *,
        source: str = "",
        metadata: Mapping[str, str] | None = None,
        note: str = "",
        frame: int = 0,
        disabled_until: datetime | None = None,
        reason: str = "",
    ) -> Call[ChangedAnswer]:
        """Add exemplars, all or none. Adding again what is there already changes nothing.

        Args:
            collection: 'pools', or a gallery that is there.
            items: images as of `classify`, where the id of a pair (id, image) becomes that of the exemplar; it is made
                of the hash of the file otherwise. Or `NewExemplar`, which says everything by itself, and can carry an
                embedding in place of an image.
            label: pool or class of the images.
            source: where they are from.
            metadata: of each.
            note: of each.
            frame: which of the examined frames of animations is meant.
            disabled_until: they take part in searches from then on.
            reason: why.

        Raises:
            ImageUnreadable: an image cannot be read here.
        """
        common: dict[str, Any] = {
            "source": source,
            "metadata": dict(metadata or {}),
            "note": note,
            "frame": frame,
            "disabled_until": disabled_until,
        }

        def exemplar(item: Addable, position: int) -> NewExemplar:
            if isinstance(item, NewExemplar):
                return item
            if label is None:
                raise TypeError("images need a label: the pool or class that they are added to")
            image = load_named(item, position, self.carrier.max_image_bytes)
            id = image.id if image.named else None
            return NewExemplar(id=id, label=label, **image_source(image.content), **common)

        exemplars = [exemplar(item, position) for position, item in enumerate(each_of(items))]
        body = AddBody(items=exemplars, reason=reason)
        return json_call("POST", path_of("collections", collection, "exemplars"), ChangedAnswer, body)

    @asked
    def suppress(
        self,
        collection: str,
        image: Source,
        exemplars: Sequence[str],
        *,
        min_similarity: float = 0.95,
        id: str | None = None,
        source: str = "",
        metadata: Mapping[str, str] | None = None,
        note: str = "",
        frame: int = 0,
        reason: str = "",
    ) -> Call[ChangedAnswer]:
        """Say that near an image some exemplars are no evidence: they match it by mistake.

        Args:
            collection: of the exemplars.
            image: that is matched.
            exemplars: ids of those that are no evidence.
            min_similarity: from which on an image is near this one, above 0.
            id: of the suppress item; made of the hash of the file where None.
            source, metadata, note, frame, reason: as of `add`.

        Raises:
            ImageUnreadable: the image cannot be read here.
        """
        body = SuppressBody(
            id=id,
            suppresses=list(exemplars),
            min_similarity=min_similarity,
            source=source,
            metadata=dict(metadata or {}),
            note=note,
            frame=frame,
            reason=reason,
            **image_source(load_image(image, self.carrier.max_image_bytes)),
        )
        return json_call("POST", path_of("collections", collection, "suppressions"), ChangedAnswer, body)

    @asked
    def change(
        self,
        collection: str,
        id: str,
        *,
        label: str | None = None,
        note: str | None = None,
        source: str | None = None,
        metadata: Mapping[str, str] | None = None,
        disabled: bool | None = None,
        disabled_until: datetime | None = None,
        reason: str = "",
    ) -> Call[ChangedAnswer]:
        """Change an exemplar, all that is given or nothing; what is None stays.

        Args:
            collection: of the exemplar.
            id: of the exemplar or suppress item.
            label: pool or class to move it to.
            note: in place of the one that it has.
            source: in place of the one that it has.
            metadata: in place of all that it has.
            disabled: True takes it out of searches, False takes it in again.
            disabled_until: when it takes part again by itself; with `disabled` True.
            reason: why.
        """
        return _change(
            collection,
            id,
            reason,
            label=label,
            note=note,
            source=source,
            metadata=None if metadata is None else dict(metadata),
            disabled=disabled,
            disabled_until=disabled_until,
        )

    @asked
    def move(self, collection: str, id: str, label: str, *, reason: str = "") -> Call[ChangedAnswer]:
        """Put an exemplar into another pool or class."""
        return _change(collection, id, reason, label=label)

    @asked
    def disable(
        self, collection: str, id: str, *, until: datetime | None = None, reason: str = ""
    ) -> Call[ChangedAnswer]:
        """Take an exemplar out of searches: until then, or until it is enabled."""
        return _change(collection, id, reason, disabled=True, disabled_until=until)

    @asked
    def enable(self, collection: str, id: str, *, reason: str = "") -> Call[ChangedAnswer]:
        """Take an exemplar that is disabled or in quarantine into searches again."""
        return _change(collection, id, reason, disabled=False)

    @asked
    def delete(self, collection: str, id: str, *, reason: str = "") -> Call[ChangedAnswer]:
        """Remove an exemplar; versions from before still have it.

        Raises:
            NotFound: there is none; a second deletion says so too, so none is sent by itself.
        """
        params = given(reason=reason or None)
        return Call("DELETE", _place(collection, id), ChangedAnswer, params, repeatable=False)


def _place(collection: str, id: str) -> str:
    return path_of("collections", collection, "exemplars", id)


def _change(collection: str, id: str, reason: str, **changes: Any) -> Call[ChangedAnswer]:
    body = ChangeBody(reason=reason, **given(**changes))
    return json_call("PATCH", _place(collection, id), ChangedAnswer, body)
