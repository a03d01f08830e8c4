"""hardlook versions and hardlook shadow: name, compare, go back, and try out."""

from typing import Annotated

from cyclopts import App, Parameter

from service.client.commands.options import HERE, POOLS, Collection, Json, Reason, Service
from service.client.commands.output import print_ids, print_json, print_line
from service.wire_collections import DryRunAnswer, ShadowAnswer, VersionAnswer

Version = Annotated[str, Parameter(help="A version of the collection, 16 hex digits.")]


def mount(app: App) -> None:
    """Add the commands."""
    versions = App(name="versions", help="List, name, compare and try out versions, and go back to one.")
    versions.command(_list, name="list")
    versions.command(_publish, name="publish")
    versions.command(_rollback, name="rollback")
    versions.command(_diff, name="diff")
    versions.command(_dry_run, name="dry-run")
    app.command(versions)
    shadow = App(name="shadow", help="Candidates that judge live traffic without being heard.")
    shadow.command(_show, name="show")
    shadow.command(_start, name="start")
    shadow.command(_stop, name="stop")
    app.command(shadow)


def _list(*, collection: Collection = POOLS, json: Json = False, service: Service = HERE) -> None:
    """List what was published, offline or here, and gone back to; newest first."""
    with service.client() as client:
        for item in client.versions.list(collection, page_size=1000):
            if json:
                print_json(item)
            else:
                print_line(
                    item.version,
                    f"{item.revision:>8}",
                    item.time,
                    f"{item.kind:<8}",
                    item.name,
                    item.actor,
                    item.reason,
                )


def _publish(
    name: str, *, collection: Collection = POOLS, reason: Reason = "", json: Json = False, service: Service = HERE
) -> None:
    """Give the present state a name, to come back to.

    Args:
        name: Such as 'before the festival'.
    """
    with service.client() as client:
        _print_state("published", client.versions.publish(collection, name, reason=reason), json)


def _rollback(
    version: Annotated[str | None, Parameter(help="Any version that the collection ever had.")] = None,
    *,
    revision: Annotated[int | None, Parameter(help="In place of a version: the number of a change.")] = None,
    collection: Collection = POOLS,
    reason: Reason = "",
    json: Json = False,
    service: Service = HERE,
) -> None:
    """Make an earlier state the present one: it answers exactly as it did. The state that is left stays a version."""
    to = version if version is not None else revision
    if to is None or (version is not None and revision is not None):
        raise ValueError("give either a version or --revision")
    with service.client() as client:
        _print_state("rolled back", client.versions.rollback(collection, to, reason=reason), json)


def _diff(
    before: Version, after: Version, *, collection: Collection = POOLS, json: Json = False, service: Service = HERE
) -> None:
    """Show what was added, removed, moved and changed from one version to another; of each the first 1000."""
    with service.client() as client:
        answer = client.versions.diff(collection, before, after)
    if json:
        print_json(answer)
        return
    print_ids("added  ", answer.added)
    print_ids("removed", answer.removed)
    for item in answer.moved:
        print_line("moved  ", item.id, f"{item.was} -> {item.now}")
    print_ids("changed", answer.changed)
    print_line(", ".join(f"{n} {kind}" for kind, n in answer.counts.items()))


def _dry_run(
    version: Annotated[str | None, Parameter(help="To try out.")] = None,
    *,
    encoder: Annotated[bool, Parameter(negative=(), help="Try out the candidate encoder of the service.")] = False,
    limit: Annotated[int | None, Parameter(help="Recent verdicts to compare; 10000 by default.")] = None,
    json: Json = False,
    service: Service = HERE,
) -> None:
    """Show how another version of the pools, or the candidate encoder, would have judged recent requests."""
    if (version is None) != encoder:
        raise ValueError("give either a version or --encoder")
    with service.client() as client:
        answer = client.versions.dry_run(version=version, encoder="shadow" if encoder else None, limit=limit)
    if json:
        print_json(answer)
    else:
        _print_dry_run(answer)


def _show(*, json: Json = False, service: Service = HERE) -> None:
    """Show which candidates see the traffic, and how often they disagree."""
    with service.client() as client:
        _print_shadow(client.shadow.show(), json)


def _start(version: Version, *, reason: Reason = "", json: Json = False, service: Service = HERE) -> None:
    """Let a version of the moderation pools judge live traffic without being heard."""
    with service.client() as client:
        _print_shadow(client.shadow.start(version, reason=reason), json)


def _stop(*, json: Json = False, service: Service = HERE) -> None:
    """Let no version see the traffic; a candidate encoder runs as long as the service does."""
    with service.client() as client:
        _print_shadow(client.shadow.stop(), json)


def _print_state(done: str, answer: VersionAnswer, json: bool) -> None:
    if json:
        print_json(answer)
        return
    done = done if answer.changed else "nothing to change"
    print_line(f"{done}: {answer.collection}", answer.version, f"revision {answer.revision}")


def _print_dry_run(answer: DryRunAnswer) -> None:
    for was, row in answer.confusion.items():
        for now, n in row.items():
            print_line(f"{was:<8} -> {now:<8}", n)
    for flip in answer.flips:
        print_line("differs", flip.time, flip.request_id, flip.sha256, f"{flip.was.value} -> {flip.would_be.value}")
    between = "" if answer.interval95 is None else f" ({answer.interval95[0]:.2%} to {answer.interval95[1]:.2%})"
    rate = "" if answer.rate is None else f", {answer.rate:.2%}{between}"
    print_line(f"{answer.candidate}: {answer.changed} of {answer.compared} verdicts would be others{rate}")


def _print_shadow(answer: ShadowAnswer, json: bool) -> None:
    if json:
        print_json(answer)
        return
    if not answer.candidates:
        print_line("no candidate runs")
    for item in answer.candidates:
        rate = "nothing compared" if item.rate is None else f"disagrees on {item.rate:.2%} of {item.compared}"
        print_line(item.candidate, rate, f"{item.dropped} not seen" if item.dropped else None)
