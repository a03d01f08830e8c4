"""The output file: goes on where it stopped, gives way by at most the cut-off line, and spoils nothing of others."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.client.records import Answered, OutputUnusable, Record, appended, json_line, printable, table_line


def ok(path: str, verdict: str = "safe") -> Record:
    return {"path": path, "status": "ok", "verdict": verdict, "margin": None}


def noted(path: Path) -> list[str | None]:
    records: list[Record] = []
    with appended(path, records.append):
        pass
    return [record["path"] for record in records]


@given(cut=st.integers(0, 200), names=st.lists(st.text(min_size=1), min_size=1, max_size=4))
def test_a_cut_anywhere_costs_at_most_one_line(
    tmp_path_factory: pytest.TempPathFactory, cut: int, names: list[str]
) -> None:
    file = tmp_path_factory.mktemp("cut") / "out.jsonl"
    whole = "".join(json_line(ok(name)) for name in names).encode()
    file.write_bytes(whole[: len(whole) - cut] if cut else whole)
    records: list[Record] = []
    with appended(file, records.append) as append:
        append(ok("new"))
    finished = file.read_bytes()[: len(whole) - cut if cut else None].count(b"\n")
    lines = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert [line["path"] for line in lines] == [*names[: len(records)], "new"]
    assert len(records) in (finished, max(0, finished - 1), len(lines) - 1)


@pytest.mark.parametrize(
    "content", [b"\x89PNG\r\n\x1a\n", b"some notes\n", b'{"path": 1, "status": "ok"}\n', b"[]\n", b'{"a": 1}\n', b"x"]
)
def test_another_file_stays_as_it_is(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "other"
    file.write_bytes(json_line(ok("a")).encode() + content)
    before = file.read_bytes()
    with pytest.raises(OutputUnusable, match="line 2: not a line of this command"), appended(file, lambda _: None):
        pass
    assert file.read_bytes() == before


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    with (
        appended(file, lambda _: None) as append,
        pytest.raises(OutputUnusable, match="another run"),
        appended(file, lambda _: None),
    ):
        pass
    with appended(file, lambda _: None) as append:
        append(ok("a"))
    assert noted(file) == ["a"]


def test_answers_are_kept_and_errors_are_asked_again() -> None:
    answered = Answered({"unsafe"})
    odd = "a\udcff"
    for record in (ok("a"), ok(odd, "unsafe"), {"path": "c", "status": "error"}, {"path": None, "status": "ok"}):
        answered.add(record)
    assert [path in answered for path in ("a", odd, "c", "d")] == [True, True, False, False]
    assert [answered.flagged(path) for path in ("a", odd, "c")] == [False, True, False]


def test_names_of_any_bytes_survive_the_file(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    with appended(file, lambda _: None) as append:
        append(ok("a\udcff\n\x1b[31m\u2028"))
    assert noted(file) == ["a\udcff\n\x1b[31m\u2028"]
    assert file.read_bytes().isascii()


@given(st.text())
def test_nothing_printed_can_steer_a_terminal(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()
    for record in (ok(text), {"path": text, "status": "error", "error": {"title": text, "detail": text}}):
        line = table_line(record)
        assert line.count("\n") == 1
        assert "\x1b" not in line
