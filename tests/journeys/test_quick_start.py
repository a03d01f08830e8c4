"""The quick start, typed line by line into one shell: every command succeeds, and shows what the page shows."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "quick-start.md"
# Too long for a test, or already so where it runs: what is run in their place.
STAND_INS = {"make setup": "make --dry-run setup", ". .venv/bin/activate": ":"}
PORT = "8000"  # of the page
END = "end-of-command"


def typed() -> list[tuple[str, list[str]]]:
    """Commands of the page in their order, each with the lines that it is said to answer."""
    commands: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```", PAGE.read_text("utf8"), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                commands.append((line[2:], []))
            else:
                commands[-1][1].append(line)
    return commands


def pattern(shown: str) -> str:
    """A shown line as a pattern, in which `...` stands for anything."""
    return ".*".join(re.escape(part.strip()) for part in shown.split("..."))


def answers(shell: "subprocess.Popen[str]", command: str) -> tuple[int, str]:
    """Type a command; its exit status, and what it wrote."""
    keyboard, screen = shell.stdin, shell.stdout
    assert keyboard is not None
    assert screen is not None
    keyboard.write(f"{command}\necho {END} $?\n")
    keyboard.flush()
    written = []
    for line in screen:
        before, mark, status = line.partition(f"{END} ")
        written.append(before)
        if mark:
            return int(status), "".join(written)
    raise AssertionError(f"the shell ended at: {command}\n{''.join(written)}")


def test_there_are_commands_and_stand_ins_for_commands_of_the_page() -> None:
    commands = [command for command, _ in typed()]
    assert len(commands) > 20
    assert set(STAND_INS) <= set(commands)


def test_a_shown_line_is_a_pattern() -> None:
    assert re.search(pattern("unsafe       ...portrait.jpg"), "unsafe       0.2269  a/portrait.jpg")
    assert not re.search(pattern("safe  ...cat.jpg"), "review  0.1  cat.png")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_line_works_and_shows_what_it_says(tmp_path: Path) -> None:
    """In a folder that looks like a checkout, on a free port."""
    for name in ("Makefile", "docs", "perception", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("HARDLOOK_")}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}", "HARDLOOK_PORT": port}
    shell = subprocess.Popen(
        ["bash", "--norc"], cwd=tmp_path, env=environment | {"OMP_NUM_THREADS": "1"}, text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        for command, shown in typed():
            status, written = answers(shell, STAND_INS.get(command, command).replace(PORT, port))
            assert status == 0, f"{command}\n{written}"
            for line in shown:
                assert re.search(pattern(line), written), f"{command}\n{line}\nis not in\n{written}"
    finally:
        os.killpg(shell.pid, signal.SIGKILL)  # with the service that it may have started
        shell.communicate()
