"""Commands that the documentation tells people to type are commands that there are."""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cyclopts import App

import indexer.cli
import offline.cli
import service.cli
import service.client.cli

ROOT = Path(__file__).parents[1]
APPS: dict[str, Callable[[], App]] = {
    "hardlook": service.client.cli._app,
    "hardlook-index": indexer.cli._app,
    "hardlook-lab": lambda: offline.cli.app,
    "hardlook-serve": service.cli._app,
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What a shell would put in the place of a substitution, and what a page leaves open, in the form that is asked for.
VALUE = "value"
OPEN = {"9f2c...": "9f" * 32, "4711:9f2c...": "4711:" + "9f" * 32}
PUNCTUATION = re.compile(r"[();<>|&]+")


def blocks(page: Path) -> Iterator[str]:
    """Lines of a page that a person types: all of a block of shell, those after `$` of a console."""
    text = page.read_text("utf8")
    for kind, block in re.findall(r"^ *```(sh|console)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        joined = re.sub(r"\\\n\s*", " ", block)
        for line in joined.splitlines():
            if "hardlook" not in line:
                continue
            if kind == "sh":
                yield line.strip()
            elif line.strip().startswith("$ "):
                yield line.strip().removeprefix("$ ")


def commands(line: str) -> Iterator[list[str]]:
    """The words of each command of ours in a line, with those in pipes, substitutions and behind launchers."""
    while found := re.search(r"\$\(([^()]*)\)", line):
        yield from commands(found[1])
        line = line[: found.start()] + VALUE + line[found.end() :]
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.wordchars += ":,{}@%+$[]!"
    words: list[str] = []
    skipped = False  # the file of a redirection
    for token in [*lexer, ";"]:
        if not PUNCTUATION.fullmatch(token):
            if not skipped:
                words.append(token)
            skipped = False
            continue
        skipped = bool(set("<>") & set(token))
        if skipped:
            words = words[:-1] if words[-1:] == ["2"] else words
        else:
            yield from ours(words)
            words = []


def ours(words: list[str]) -> Iterator[list[str]]:
    """The command of ours that words start, if they do: behind variables, torchrun and xargs too."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[:1] == ["torchrun"]:
        words = words[words.index("--") + 1 :]
    if words[:1] == ["xargs"]:
        words = [*words[1:], VALUE]
    if words and words[0] in APPS:
        yield [OPEN.get(word, word) for word in words]


def documented() -> list[tuple[str, list[str]]]:
    """(page, words of a command) of all pages."""
    return [
        (page.relative_to(ROOT).as_posix(), words)
        for page in PAGES
        for line in blocks(page)
        for words in commands(line)
    ]


@pytest.mark.parametrize(
    ("page", "words"), documented(), ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_it_is_understood(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARDLOOK_KEYS_FILE", "keys.json")  # docs/security.md exports it before it types the rest
    command, *tokens = words
    APPS[command]().parse_args(tokens, exit_on_error=False, print_error=False)


@pytest.mark.parametrize(
    "page", ["README.md", "docs/quick-start.md", "docs/training.md", "docs/auditing.md", "docs/pools.md"]
)
def test_there_are_such_commands(page: str) -> None:
    assert sum(found == page for found, _ in documented()) >= 4


def test_all_of_a_line_is_looked_at() -> None:
    line = "A=1 hardlook pools 2> log & (hardlook ready --wait 1 && ls) | xargs hardlook jobs show  # hardlook nonsense"
    assert list(commands(line)) == [
        ["hardlook", "pools"], ["hardlook", "ready", "--wait", "1"], ["hardlook", "jobs", "show", VALUE]
    ]  # fmt: skip
    inner = 'hardlook reviews decide $(hardlook reviews list | cut -c -32) safe --reason "a (person), not it"'
    assert list(commands(inner)) == [
        ["hardlook", "reviews", "list"],
        ["hardlook", "reviews", "decide", VALUE, "safe", "--reason", "a (person), not it"],
    ]


# --- in running text -------------------------------------------------------------------------------------------------


def spans(page: Path) -> Iterator[list[str]]:
    """Inline code that starts with a command of ours, such as `hardlook-lab audit --gate`."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text("utf8"), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", text):
        words = re.split(r"[\s\[\]]+", code.strip())
        if words[0] in APPS:
            yield words


def options_of(app: App) -> set[str]:
    """Every option of a command, or of what is called without one."""
    command = app.default_command
    names = {"--help", "--version"}
    if command is not None:
        names |= {name for argument in app.assemble_argument_collection() for name in argument.names}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_options_in_running_text_exist(page: Path) -> None:
    unknown = []
    for command, *words in spans(page):
        app = APPS[command]()
        while words and not words[0].startswith("-") and words[0] in list(app):
            app = app[words.pop(0)]
        known = options_of(app)
        options = [word.rstrip(".,;:") for word in words if word.startswith("--")]
        unknown += [f"{command}: {option}" for option in options if option.partition("=")[0] not in known]
    assert unknown == []
