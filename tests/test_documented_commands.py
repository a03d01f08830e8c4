"""Commands that the documentation tells people to type are commands that there are."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from cyclopts import App

import indexer.cli
import service.cli
import service.client.cli

ROOT = Path(__file__).parents[1]
APPS: dict[str, Callable[[], App]] = {
    "hardlook": service.client.cli._app,
    "hardlook-index": indexer.cli._app,
    "hardlook-serve": service.cli._app,
}
PAGES = ("docs/pools.md", "docs/integrations.md")


def documented() -> list[tuple[str, str]]:
    """(page, command) of every line in a block of shell."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text("utf8"), re.MULTILINE | re.DOTALL):
            found += [(page, line) for line in block.splitlines() if line.strip()]
    return found


@pytest.mark.parametrize(("page", "line"), documented())
def test_it_is_understood(page: str, line: str) -> None:
    words = shlex.split(line.partition(" > ")[0], comments=True)
    while "=" in words[0]:
        words.pop(0)  # a variable
    command, *tokens = words
    assert command in APPS, page
    tokens = [token.replace("9f2c...", "9f" * 32) for token in tokens]
    APPS[command]().parse_args(tokens, exit_on_error=False, print_error=False)


def test_there_are_such_lines() -> None:
    assert len(documented()) > 20
