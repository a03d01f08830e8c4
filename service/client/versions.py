"""Versions of collections: list, name, compare, go back, and try them out on traffic."""

from typing import Literal

from service.client.calls import Call, given, json_call, path_of
from service.client.parts import Item, Items, Part, WayT, ask, asked, listed
from service.wire_collections import (
    DiffAnswer,
    DryRunAnswer,
    DryRunBody,
    PublishBody,
    RollbackBody,
    ShadowAnswer,
    ShadowBody,
    VersionAnswer,
    VersionItem,
    VersionsAnswer,
)


class Versions(Part[WayT]):
    """Every state of a collection has a version. Needs the scope `pools:write`.

    All raise ConnectionFailed, AnswerNotUnderstood and ProblemError; ValueError for what no service takes.
    """

    @listed
    def list(self, collection: str, *, page_size: int | None = None) -> Items[VersionItem]:
        """Iterate over what was published, offline or here, and gone back to; newest first."""
        params = given(limit=page_size)
        before: int | None = None
        while True:
            page = yield from ask(
                Call(
                    "GET", path_of("collections", collection, "versions"), VersionsAnswer, params | given(before=before)
                )
            )
            for item in page.versions:
                yield Item(item)
            if page.next is None:
                return
            before = page.next

    @asked
    def publish(self, collection: str, name: str, *, reason: str = "") -> Call[VersionAnswer]:
        """Give the present state a name. It is not sent again where it may have been heard: it would count twice."""
        body = PublishBody(name=name, reason=reason)
        return json_call("POST", path_of("collections", collection, "versions"), VersionAnswer, body, repeatable=False)

    @asked
    def rollback(self, collection: str, to: str | int, *, reason: str = "") -> Call[VersionAnswer]:
        """Make an earlier state the present one.

        Args:
            collection: that goes back.
            to: a version that it ever had, or a revision.
            reason: why.

        Raises:
            Conflict: it never had that version.
        """
        goal = {"revision": to} if isinstance(to, int) else {"version": to}
        body = RollbackBody.model_validate({"reason": reason, **goal})
        return json_call("POST", path_of("collections", collection, "rollback"), VersionAnswer, body)

    @asked
    def diff(self, collection: str, before: str, after: str) -> Call[DiffAnswer]:
        """What was added, removed, moved and changed from one version to another."""
        params = {"before": before, "after": after}
        return Call("GET", path_of("collections", collection, "diff"), DiffAnswer, params)

    @asked
    def dry_run(
        self,
        *,
        version: str | None = None,
        encoder: Literal["shadow"] | None = None,
        collection: str = "pools",
        limit: int | None = None,
    ) -> Call[DryRunAnswer]:
        """How another version of the pools, or the candidate encoder, would have judged recent requests.

        Args:
            version: to try out; not together with `encoder`.
            encoder: 'shadow' for the candidate encoder of the service.
            collection: whose version; only the moderation pools judge.
            limit: recent verdicts to compare, newest first.
        """
        body = DryRunBody.model_validate(given(version=version, encoder=encoder, limit=limit))
        return json_call("POST", path_of("collections", collection, "dry-run"), DryRunAnswer, body)


class Shadow(Part[WayT]):
    """Candidates that judge live traffic without being heard. Needs the scope `pools:write`."""

    @asked
    def show(self) -> Call[ShadowAnswer]:
        """Which run, and how often they disagree."""
        return Call("GET", "/shadow", ShadowAnswer)

    @asked
    def start(self, version: str, *, reason: str = "") -> Call[ShadowAnswer]:
        """Let a version of the moderation pools see the traffic, in place of the one that may do so now.

        It is not sent again where it may have been heard: counting would begin anew.
        """
        return json_call("PUT", "/shadow", ShadowAnswer, ShadowBody(version=version, reason=reason), repeatable=False)

    @asked
    def stop(self) -> Call[ShadowAnswer]:
        """Let no version see the traffic; a candidate encoder runs as long as the service does."""
        return Call("DELETE", "/shadow", ShadowAnswer)
