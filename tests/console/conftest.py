"""The console over toy pools, visited without a browser: as one that runs no scripts would."""

import html
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

from service.console.gate import FORM_TOKEN
from service.settings import Scope
from service.testing import publish, toy_pools, toy_settings
from tests.api.conftest import ToyClip, served
from tests.service.key_files import key_of

_TOKEN = re.compile(rf'name="{FORM_TOKEN}" value="([^"]+)"')
_SIGN_IN = "/console/sign-in"


@dataclass
class Visitor:
    """Somebody's browser.

    Attributes:
        client: with their cookies; follows no redirects.
    """

    client: TestClient

    def get(self, path: str, **params: Any) -> Response:
        """Open a page."""
        return self.client.get(path, params=params or None, follow_redirects=False)

    def page(self, path: str, **params: Any) -> str:
        """The text of a page that must be there."""
        response = self.get(path, **params)
        assert response.status_code == 200, response.text
        return response.text

    @property
    def token(self) -> str:
        """Of the forms of this session."""
        return html.unescape(_TOKEN.findall(self.page(_SIGN_IN))[-1])

    def post(
        self,
        path: str,
        fields: Mapping[str, str] | None = None,
        files: Mapping[str, tuple[str, bytes, str]] | None = None,
        **options: Any,
    ) -> Response:
        """Send a form with its token; a redirect is not followed."""
        data = {FORM_TOKEN: self.token, **(fields or {})}
        return self.client.post(path, data=data, files=files, follow_redirects=False, **options)

    def sent(self, path: str, fields: Mapping[str, str] | None = None, **options: Any) -> str:
        """Send a form that must be taken, and open the page that it leads to."""
        response = self.post(path, fields, **options)
        assert response.status_code == 303, response.text
        return self.page(response.headers["location"])


@dataclass(frozen=True)
class Console:
    """A service with a console, in this process.

    Attributes:
        client: of its API, without a key.
        folder: of its pools and keys.
    """

    client: TestClient
    folder: Path

    def key(self, *scopes: Scope, **changes: Any) -> str:
        """A new API key, which the service knows at once."""
        key = key_of(self.folder, *scopes, **changes)
        self.client.app.state.runtime.keys.reload_if_changed()  # type: ignore[attr-defined]
        return key

    def visitor(self, *scopes: Scope) -> Visitor:
        """Somebody who has signed in with a key of these scopes; without any, nobody has signed in."""
        # The application runs already: this client must not start it anew.
        visitor = Visitor(TestClient(self.client.app, raise_server_exceptions=False))
        visitor.client.portal = self.client.portal  # one event loop: that of the decoders
        if scopes:
            response = visitor.post(_SIGN_IN, {"key": self.key(*scopes)})
            assert response.status_code == 303, response.text
        return visitor


StartConsole = Callable[..., Console]


@pytest.fixture
def start_console(tmp_path: Path) -> Iterator[StartConsole]:
    """Starts a service over toy pools and a key file, with settings of its own."""
    encoder = ToyClip()
    publish(tmp_path, encoder, toy_pools())
    with ExitStack() as stack:

        def start(**changes: Any) -> Console:
            key_of(tmp_path, "metrics")  # so that there is a file
            settings = toy_settings(tmp_path, **{"keys_file": tmp_path / "keys.json", **changes})
            return Console(stack.enter_context(served(settings, encoder)), tmp_path)

        yield start


@pytest.fixture
def console(start_console: StartConsole) -> Console:
    """A service with the usual settings."""
    return start_console()
