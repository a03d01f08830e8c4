"""hardlook audit: who did what, when and why."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from service.client.commands.options import ALL_ANSWERED, HERE, SOME_ERRORS, Chain, Json, Service
from service.client.commands.output import print_json, print_line

After = Annotated[int, Parameter(help="Number of the entry after which to begin.")]


def mount(app: App) -> None:
    """Add the commands."""
    audit = App(name="audit", help="Read, export and check the audit log.")
    audit.command(_list, name="list")
    audit.command(_export, name="export")
    audit.command(_verify, name="verify")
    app.command(audit)


def _list(
    *,
    chain: Chain = "changes",
    after: After = 0,
    collection: Annotated[str | None, Parameter(help="Only this one.")] = None,
    kind: Annotated[str | None, Parameter(help="Only this one, such as exemplar.add.")] = None,
    subject: Annotated[str | None, Parameter(help="Only about this, such as the id of an exemplar.")] = None,
    json: Json = False,
    service: Service = HERE,
) -> None:
    """List entries, oldest first."""
    wanted = {"collection": collection, "kind": kind, "subject": subject}
    with service.client() as client:
        for entry in client.audit.entries(chain=chain, after=after, page_size=1000, **wanted):
            if json:
                print_json(entry)
            else:
                print_line(
                    f"{entry.seq:>8}",
                    entry.time,
                    f"{entry.kind:<18}",
                    entry.collection,
                    entry.subject,
                    entry.actor,
                    entry.reason,
                )


def _export(
    file: Annotated[Path, Parameter(help="New file to write.")],
    *,
    chain: Chain = "changes",
    after: After = 0,
    embeddings: Annotated[
        bool, Parameter(negative=(), help="With what it takes to build the collections anew.")
    ] = False,
    service: Service = HERE,
) -> None:
    """Write the log to a new file, a line of JSON for each entry; hardlook-index audit verify --file checks it."""
    with service.client() as client:
        saved = client.audit.export(file, chain=chain, after=after, embeddings=embeddings)
    print_line(f"wrote {saved.path}", f"{saved.size_bytes} bytes")


def _verify(*, json: Json = False, service: Service = HERE) -> int:
    """Check that the log is whole, and that replaying it gives the collections that serve; exits with 1 if not."""
    with service.client() as client:
        answer = client.audit.verify()
    if json:
        print_json(answer)
    else:
        for state in answer.chains:
            found = f"{len(state.problems)} problems" if state.problems else "intact"
            print_line(f"{state.chain}: {found}, {state.entries} entries, head {state.seq}:{state.hash}")
            for problem in state.problems:
                print_line("  " + problem)
        for collection, same in answer.replayed.items():
            print_line(f"{collection}: {'replayed from its log, the same' if same else 'differs from its log'}")
    return ALL_ANSWERED if answer.sound else SOME_ERRORS
