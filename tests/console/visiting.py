"""What tests of pages about images send, and how they read what comes back."""

import html
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perception.testing import encoded, synthetic_image
from service.testing import publish, toy_pools, toy_settings
from tests.api.conftest import ToyClip, served
from tests.console.conftest import Console
from tests.service.key_files import key_of

PNG = encoded(synthetic_image(4244))
HOSTILE = "<script>alert(1)</script>'><img src=x onerror=alert(2)>\u202egnp.exe"


@contextmanager
def shared_console(folder: Path, **settings: Any) -> Iterator[Console]:
    """A service over toy pools in a folder, for several tests."""
    encoder = ToyClip()
    publish(folder, encoder, toy_pools())
    key_of(folder, "metrics")  # so that there is a file
    with served(toy_settings(folder, keys_file=folder / "keys.json", **settings), encoder) as client:
        yield Console(client, folder)


def upload(data: bytes = PNG, name: str = "a.png") -> dict[str, tuple[str, bytes, str]]:
    """A file that was chosen."""
    return {"image": (name, data, "image/png")}


def asked(console: Console, data: bytes = PNG) -> dict[str, Any]:
    """The whole answer of the API to an image."""
    response = console.client.post("/classify", files=upload(data), headers={"X-API-Key": console.key("classify")})
    assert response.status_code == 200, response.text
    return dict(response.json())


def reason_of(console: Console, kind: str) -> str:
    """That the newest entry of a kind in the audit log has."""
    response = console.client.get(f"/audit?kind={kind}&limit=1000", headers={"X-API-Key": console.key("admin")})
    return str(response.json()["entries"][-1]["reason"])


def in_words(text: str) -> str:
    """What a page says."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())
