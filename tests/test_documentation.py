"""Documentation that keeps up: links lead somewhere, nothing is orphaned, and what is named is there.

That every setting, route, command, metric and problem is named is tested in tests/test_architecture.py,
tests/api/test_openapi.py and tests/docker/test_monitoring.py; here are the ways back.
"""

import ast
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from starlette.routing import Route

from service import problems
from service.app import create_app
from service.client import HardlookClient
from service.settings import _FOREIGN, Settings, variable
from tests.test_documented_commands import blocks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README, INDEX = ROOT / "README.md", DOCS / "index.md"
PAGES = [README, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md")), *sorted(DOCS.rglob("*.md"))]
CARDS = sorted((ROOT / "perception" / "bundled").glob("*/CARD.md"))
GUIDES = [page for page in sorted(DOCS.glob("*.md")) if page != INDEX]
SVG = "{http://www.w3.org/2000/svg}"
LEAST_TEXT_PX = 12


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text("utf8"), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> Iterator[str]:
    """Targets of links and pictures that are in the repository."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    for target in re.findall(r"\]\(<?([^)\s>]+)>?\)", text):
        if not re.match(r"[a-z]+:", target):
            yield unquote(target)


def anchors(page: Path) -> set[str]:
    """Names of the headings, as web sites make them: lower case, hyphens for spaces, nothing else but words."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def mentioned(pattern: str) -> dict[str, set[str]]:
    """What matches in each page, changes of the past left out."""
    found = {name_of(page): set(re.findall(pattern, page.read_text("utf8"))) for page in PAGES}
    del found["CHANGELOG.md"]
    return {page: names for page, names in found.items() if names}


# --- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        if not goal.exists() or (anchor and anchor not in anchors(goal)):
            broken.append(target)
    assert broken == []


def test_links_and_anchors_are_recognised(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `name`: what, and why\n[a](b.md#c) ![p](<d.svg>) [w](https://e.org) `[x](y)`\n```\n[z](z)\n```\n"
    )
    assert list(links(page)) == ["b.md#c", "d.svg"]
    assert anchors(page) == {"a-name-what-and-why"}


def reachable(start: Path) -> set[Path]:
    """Files that links lead to from a page, and on from there; a link to a folder leads to all in it."""
    found, pending = {start}, [start]
    while pending:
        page = pending.pop()
        for target in links(page) if page.suffix == ".md" else ():
            goal = (page.parent / target.partition("#")[0]).resolve() if target.partition("#")[0] else page
            new = {goal, *(goal.iterdir() if goal.is_dir() else ())} - found
            found |= new
            pending += [path for path in new if path.is_file()]
    return found


def test_no_page_is_orphaned() -> None:
    wanted = (".md", ".py", ".toml", ".svg", ".png")
    files = {path for path in DOCS.rglob("*") if path.is_file() and path.suffix in wanted}
    assert sorted(map(name_of, files - reachable(README) - reachable(INDEX))) == []


def test_the_readme_leads_to_the_map() -> None:
    assert "docs/index.md" in set(links(README))


def test_the_map_names_every_guide() -> None:
    named = {(DOCS / target.partition("#")[0]).resolve() for target in links(INDEX)}
    assert sorted(map(name_of, set(GUIDES) - named)) == []


def test_files_in_backquotes_exist() -> None:
    """Paths such as `offline/audit/plan.py`, and patterns such as `offline/configs/audit_*.toml`."""
    pattern = r"`((?:perception|indexer|service|offline|docker|tests|benchmarks|docs)/[\w./*-]+)`"
    missing = [
        f"{page}: {name}"
        for page, names in mentioned(pattern).items()
        if not page.startswith("docs/decisions/")  # which tell of what was
        for name in sorted(names)
        if not any(ROOT.glob(name.rstrip("/")))
    ]
    assert missing == []


# --- what is named is there ------------------------------------------------------------------------------------------


def test_settings_that_are_named_exist() -> None:
    known = {variable(field) for field in Settings.model_fields} | set(_FOREIGN)
    unknown = [
        f"{page}: {name}"
        for page, names in mentioned(r"\bHARDLOOK_[A-Z0-9_]+").items()
        for name in sorted(names)
        if name not in known and not (name.endswith("_") and any(each.startswith(name) for each in known))
    ]
    assert unknown == []


def test_problems_that_are_listed_exist() -> None:
    """In the tables of problems: a type, a status, and so on."""
    known = {(kind.slug, kind.status) for kind in problems.KINDS.values()}
    known |= {(slug, status) for status, slug in problems._HTTP_SLUGS.items()}
    known |= {(kind.slug, kind.status) for kind in vars(problems).values() if isinstance(kind, problems.ProblemKind)}
    # Those that a route makes by itself, in the schemas of its answers.
    sources = "".join(path.read_text("utf8") for path in sorted((ROOT / "service").glob("schemas*.py")))
    elsewhere = set(re.findall(r"\{TYPE_PREFIX\}([a-z-]+)", sources))
    for page in ("api.md", "fetching.md"):
        listed = re.findall(r"^\| `([a-z-]+)` \| (\d{3}) \|", (DOCS / page).read_text("utf8"), re.MULTILINE)
        assert listed
        unknown = [found for found in listed if (found[0], int(found[1])) not in known and found[0] not in elsewhere]
        assert unknown == [], page


METRIC = r"\bhardlook_[a-z][a-z_]*[a-z]\b"


def test_metrics_that_are_named_exist() -> None:
    from service.telemetry import Metrics

    known = set(re.findall(rf"^# TYPE ({METRIC}) ", Metrics().render()[0].decode(), re.MULTILINE))
    assert len(known) > 20
    unknown = [
        f"{page}: {name}"
        for page, names in mentioned(METRIC).items()
        for name in sorted(names - {"hardlook_console"})  # a cookie
        if re.sub(r"_(bucket|sum|count)$", "", name) not in known
    ]
    assert unknown == []


def paths_of_routes() -> set[str]:
    """Templates of all routes of the API, and of the console, which its description leaves out."""
    from service.console.pages import ROUTERS

    console = {route.path for router in ROUTERS for route in router.routes if isinstance(route, Route)}
    return console | set(create_app(Settings()).openapi()["paths"])


def is_path_of(path: str, templates: set[str]) -> bool:
    """Whether a path, with names in braces or examples for what is variable, is one of a template."""
    return any(re.fullmatch(re.sub(r"\{[^}]*\}", "[^/]+", template), path) for template in templates)


def test_routes_that_are_named_exist() -> None:
    known = paths_of_routes() | {"/openapi.json"}
    named = mentioned(r"(?:GET|POST|PUT|PATCH|DELETE) (/[\w{}/-]*(?:\.json)?)")
    assert named
    assert [
        f"{page}: {path}" for page, paths in named.items() for path in sorted(paths) if not is_path_of(path, known)
    ] == []


def test_a_route_that_is_not_there_is_recognised() -> None:
    assert is_path_of("/collections/pools/diff", {"/collections/{name}/diff"})
    assert not is_path_of("/collections/pools/dif", {"/collections/{name}/diff"})


# --- the console -----------------------------------------------------------------------------------------------------


def console_pages() -> set[str]:
    """Paths of the console that a browser opens, without what belongs to one item or file."""
    from service.console.rendering import PLACES

    return {place.path for place in PLACES} | {"/console", "/console/sign-in"}


def test_every_page_of_the_console_is_described() -> None:
    from service.console.rendering import PLACES

    text = (DOCS / "console.md").read_text("utf8")
    assert [path for path in sorted(console_pages()) if f"`{path}`" not in text] == []
    assert [place.name for place in PLACES if f"**{place.name}**" not in text] == []


def test_pages_of_the_console_that_are_named_exist() -> None:
    known = paths_of_routes() | console_pages()
    named = set(re.findall(r"`(/console[\w/{}-]*)`", (DOCS / "console.md").read_text("utf8")))
    assert [path for path in sorted(named) if not is_path_of(path, known)] == []


def test_the_keys_of_the_review_queue_are_described() -> None:
    """As the page's own list has them."""
    page = (ROOT / "service" / "console" / "templates" / "review.html").read_text("utf8")
    keys = re.findall(r"<dt><kbd>(.)</kbd></dt>", page)
    assert len(keys) >= 8
    text = (DOCS / "console.md").read_text("utf8")
    assert [key for key in keys if f"| `{key}` |" not in text] == []


# --- pictures and examples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("picture", sorted((DOCS / "pictures").rglob("*.svg")), ids=name_of)
def test_drawn_pictures_can_be_read_by_everybody(picture: Path) -> None:
    """With a title and a description, on a background of its own, in letters that are large enough."""
    root = ElementTree.parse(picture).getroot()
    labels = [root.find(f"{SVG}{tag}") for tag in ("title", "desc")]
    assert all(label is not None and (label.text or "").strip() for label in labels)
    first = root.find(f"{SVG}rect")
    assert first is not None
    assert first.get("fill") not in (None, "none")
    sizes = [float(element.get("font-size", "inf")) for element in root.iter()]
    assert min(sizes) >= LEAST_TEXT_PX
    assert root.find(f".//{SVG}script") is None


def test_pictures_say_what_they_show() -> None:
    unnamed = [name_of(page) for page in PAGES if re.search(r"!\[\s*\]\(", prose(page))]
    assert unnamed == []


def examples(kind: str) -> list[tuple[str, str]]:
    """(page, text) of every block of code of a kind."""
    return [
        (name_of(page), block)
        for page in PAGES
        for block in re.findall(rf"^```{kind}\n(.*?)^```", page.read_text("utf8"), re.MULTILINE | re.DOTALL)
    ]


@pytest.mark.parametrize(("page", "code"), examples("python"))
def test_python_examples_are_python_and_import_what_there_is(page: str, code: str) -> None:
    ours = ("perception", "indexer", "service", "offline")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ours:
            module = importlib.import_module(node.module or "")
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize(("page", "text"), examples("toml"))
def test_toml_examples_are_toml_and_plans_are_plans(page: str, text: str) -> None:
    from offline.audit.plan import plan_from_table

    table = tomllib.loads(text)
    if "task" in table:
        plan_from_table(table)


def test_blocks_of_shell_are_found() -> None:
    assert sum(1 for _ in blocks(DOCS / "quick-start.md")) > 10


# --- routes by example -----------------------------------------------------------------------------------------------

API = (DOCS / "api.md").read_text("utf8")
NOT_OF_THE_CLIENT = {"/v1/moderations", "/adapters/pict-rs", "/metrics", "/livez", "/healthz", "/startupz"}


def operations() -> list[tuple[str, str]]:
    paths = create_app(Settings()).openapi()["paths"]
    return sorted((method.upper(), path) for path, item in paths.items() for method in item)


def curled() -> set[tuple[str, str]]:
    """Method and path, with its examples in it, of every curl in docs/api.md."""
    shell = "\n".join(re.findall(r"^```sh\n(.*?)^```", API, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    for name, value in re.findall(r"\b([A-Z])=(http\S+)", shell):
        shell = shell.replace(f"${name}", value)
    found = set()
    for line in re.findall(r"\bcurl (.*)", shell):
        url = re.search(r"http://127\.0\.0\.1:8000([^\s'\"?]*)", line)
        assert url, line
        asked = re.search(r"-X (\w+)", line)
        sends = re.search(r"(?:^|\s)(?:-d|-F|--data\S*)\s", line)
        found.add((asked[1] if asked else "POST" if sends else "GET", url[1]))
    return found


def test_every_route_has_a_curl() -> None:
    found = curled()
    missing = [
        (method, path)
        for method, path in operations()
        if not any(method == with_method and is_path_of(url, {path}) for with_method, url in found)
    ]
    assert missing == []


def python_rows() -> dict[str, list[str]]:
    """Calls of the Python client by route, from the table of docs/api.md."""
    table = API.partition("## Every route from Python")[2].partition("\n## ")[0]
    rows: dict[str, list[str]] = {}
    for line in table.splitlines():
        cells = line.split(" | ")
        if len(cells) == 2 and cells[0].startswith("| `"):
            for route in re.findall(r"`([^`]+)`", cells[0]):
                rows.setdefault(route, []).extend(re.findall(r"`([^`]+)`", cells[1]))
    return rows


def test_every_route_has_a_python_example() -> None:
    rows = python_rows()
    wanted = {f"{method} {path}" for method, path in operations() if path not in NOT_OF_THE_CLIENT}
    assert wanted - set(rows) == set()
    assert [route for route, calls in rows.items() if not calls] == []


@pytest.mark.parametrize("call", sorted({call for calls in python_rows().values() for call in calls}))
def test_python_examples_are_calls_that_the_client_takes(call: str) -> None:
    """Their names and arguments: the method is there, and takes what it is given."""
    found = ast.parse(call, mode="eval").body
    assert isinstance(found, ast.Call)
    path = ast.unparse(found.func).split(".")
    assert path[0] == "client"
    with HardlookClient("http://127.0.0.1:1") as client:
        method: Any = client
        for name in path[1:]:
            method = getattr(method, name)
        inspect.signature(method).bind(*found.args, **{keyword.arg or "": keyword.value for keyword in found.keywords})
