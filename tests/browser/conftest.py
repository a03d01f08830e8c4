"""A running service, browsers that visit its console, and what every visit is checked for.

A module's tests share one service over the bundled encoder and the demo pools, with the settings that the module names
in `SETTINGS`. They share nothing with other modules. Where there is no Chromium they are skipped: it comes from the
system's packages (Debian: `apt-get install chromium`), and nothing is fetched.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Response, expect, sync_playwright

from service.demo import ENCODER, publish_pools
from service.settings import Scope
from tests.journeys.servers import Server, running
from tests.service.key_files import make

PICTURES = Path(__file__).parents[2] / "build" / "screenshots"
_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# As root in a container it has no sandbox; the rest keeps it from calling home.
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
_SERIOUS = ("serious", "critical")
# Slow machines are slow; a wait that is met ends at once.
_PATIENCE_MS = 30_000
KEYS: dict[str, tuple[Scope, ...]] = {
    "ops": ("classify", "similar", "pools:write", "review"),
    "reviewer": ("classify", "review"),
    "uploader": ("classify",),
    "admin": ("admin",),
}
Scheme = Literal["light", "dark"]
Visit = Callable[..., Page]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder drives a browser."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.timeout(300))
            if _CHROMIUM is None:
                item.add_marker(pytest.mark.skip(reason="needs Chromium; Debian: apt-get install chromium"))


@dataclass(frozen=True)
class Served:
    """A service with a console.

    Attributes:
        url: without a slash at the end.
        keys: API keys by the names of `KEYS`.
        server: the process, and an HTTP client of its API.
        folder: of its pools, keys and log.
    """

    url: str
    keys: dict[str, str]
    server: Server
    folder: Path

    def headers(self, name: str) -> dict[str, str]:
        """For calls of the API in the name of a key."""
        return {"X-API-Key": self.keys[name]}


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The module's service."""
    folder = tmp_path_factory.mktemp("console")
    publish_pools(folder / "pools")
    keys = {name: make(folder / "keys.json", name, scopes) for name, scopes in KEYS.items()}
    settings = {"keys_file": folder / "keys.json", "encoder": ENCODER, **getattr(request.module, "SETTINGS", {})}
    command = ("-c", "from service.cli import main; main([])")
    with running(folder / "pools", folder, command=command, **settings) as server:
        yield Served(str(server.client.base_url).rstrip("/"), keys, server, folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The module's browser: it ends with the module, since its event loop would be in the way of other tests."""
    expect.set_options(timeout=_PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=list(_ARGUMENTS))
        yield browser
        browser.close()


@dataclass
class _Watch:
    """What went wrong on the pages of one test."""

    forgiven: tuple[str, ...] = ()
    found: list[str] = field(default_factory=list)

    def attach(self, page: Page) -> None:
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.found.append(f"script error: {error}"))
        page.on("response", self._response)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.found.append(f"{message.type} in the browser's console: {message.text}")

    def _response(self, response: Response) -> None:
        if response.status >= 500:
            self.found.append(f"status {response.status} of {response.url}")

    @property
    def unforgiven(self) -> list[str]:
        return [line for line in self.found if not any(part in line for part in self.forgiven)]


@dataclass
class Visitors:
    """Browsers of a test, each signed in as somebody.

    Attributes:
        served: the service that they visit.
        browser: that they are windows of.
    """

    served: Served
    browser: Browser
    watch: _Watch = field(default_factory=_Watch)
    contexts: list[BrowserContext] = field(default_factory=list)

    def __call__(
        self,
        name: str | None = "ops",
        path: str = "/console",
        *,
        scheme: Scheme = "light",
        scripts: bool = True,
        **options: Any,
    ) -> Page:
        """A page in a browser of its own.

        Args:
            name: of the key to sign in with, of `KEYS`; None not to sign in.
            path: to open then.
            scheme: light or dark.
            scripts: whether the browser runs JavaScript.
            options: of Playwright's `new_context`.
        """
        options = {"viewport": {"width": 1280, "height": 900}, **options}
        context = self.browser.new_context(
            base_url=self.served.url, color_scheme=scheme, java_script_enabled=scripts, **options
        )
        self.contexts.append(context)
        context.set_default_timeout(_PATIENCE_MS)
        page = context.new_page()
        self.watch.attach(page)
        if name is not None:
            sign_in(page, self.served.keys[name])
        page.goto(path)
        return page

    def forgive(self, *parts: str) -> None:
        """Expect messages of the browser that have one of these parts, such as of a refusal that is tested."""
        self.watch.forgiven += parts


@pytest.fixture
def visit(served: Served, browser: Browser) -> Iterator[Visitors]:
    """Opens pages; afterwards none of them may have had an error."""
    visitors = Visitors(served, browser)
    yield visitors
    for context in visitors.contexts:
        context.close()
    assert visitors.watch.unforgiven == []


def sign_in(page: Page, key: str) -> None:
    """Fill in the form and send it."""
    page.goto("/console/sign-in")
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(lambda url: not url.endswith("/console/sign-in"))


def screenshot(page: Page, name: str) -> Path:
    """Save what the page looks like, all of it, as build/screenshots/<name>.png."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    path = PICTURES / f"{name}.png"
    # Else Playwright leaves an empty style= on inputs, which the page's policy refuses when htmx copies it.
    page.screenshot(path=path, full_page=True, caret="initial")
    return path


def axe(page: Page) -> list[str]:
    """Serious and critical violations that axe-core finds on the page, in words; there should be none."""
    page.evaluate(resources.files("axe_playwright_python").joinpath("axe.min.js").read_text("utf8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{violation['id']} ({violation['impact']}): {violation['help']}: "
        + "; ".join(str(node["html"])[:200] for node in violation["nodes"])
        for violation in found["violations"]
        if violation["impact"] in _SERIOUS
    ]
