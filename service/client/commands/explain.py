"""hardlook explain: why an image has its verdict, for a person."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from service.client.commands.options import HERE, Json, Service
from service.client.commands.output import print_json, print_line
from service.client.images import URL_SCHEMES, Url
from service.wire_explain import AttributionItem, ExplainAnswer

_SIGNS = 0.15
"""Share of the strongest cell from which a cell has a sign in the text map; from three times that a stronger one."""

Image = Annotated[str, Parameter(help="File or URL.")]
Against = Annotated[list[str] | None, Parameter(negative=(), help="Id of an exemplar to compare it with; up to two.")]
Decision = Annotated[bool, Parameter(negative=(), help="The decision alone, without attributions.")]


def mount(app: App) -> None:
    """Add the command."""
    app.command(_explain, name="explain")


def _explain(
    image: Image,
    *,
    against: Against = None,
    decision_only: Decision = False,
    json: Json = False,
    service: Service = HERE,
) -> None:
    """Say why an image has its verdict, and which parts of it make it similar to exemplars."""
    source = Url(image) if image.lower().startswith(URL_SCHEMES) else Path(image)
    with service.client() as client:
        answer = client.explain(source, against or (), attribute=not decision_only)
    if json:
        print_json(answer)
    else:
        _print(answer)


def _print(answer: ExplainAnswer) -> None:
    result, decision = answer.result, answer.decision
    print_line(result.id, result.verdict.value)
    print_line(result.reason)
    for standing in decision.pools:
        best = standing.best
        votes = None if standing.votes is None else f"votes {standing.votes}"
        if best is None:
            print_line("pool", standing.pool.value, "no exemplar", votes)
        else:
            print_line("pool", standing.pool.value, f"{best.similarity:.4f}", best.id, votes)
    for fact in decision.what_would_change:
        print_line("-", fact)
    if answer.undefended and answer.attributions:
        print_line("the attributions are of the encoder without its defence")
    for attribution in answer.attributions:
        _print_attribution(attribution)


def _print_attribution(found: AttributionItem) -> None:
    print_line(
        f"{found.similarity:.4f} to {found.exemplar} ({found.label}), grey {found.baseline_similarity:.4f}, "
        f"error {found.completeness_error:.4f} after {found.steps} steps"
    )
    for title, cells in (("more similar by", found.supporting), ("less similar by", found.opposing)):
        for cell in cells:
            print_line(title, f"{abs(cell.value):.4f}", cell.text)
    strongest = max((abs(value) for row in found.grid for value in row), default=0.0)
    for row in found.grid:
        print_line(" ".join(_sign(value, strongest) for value in row))


def _sign(value: float, strongest: float) -> str:
    """One character: + and # make the image more similar, - and = less; a dot for next to nothing."""
    share = abs(value) / strongest if strongest else 0.0
    if share < _SIGNS:
        return "."
    if share < 3 * _SIGNS:
        return "+" if value > 0 else "-"
    return "#" if value > 0 else "="
