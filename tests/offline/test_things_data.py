"""THINGS: the published layouts, which rows count, and what malformed ones are called."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from offline.data.things import read_things
from offline.errors import DataError
from tests.offline.things_revisited_layouts import EXTRA, HEADER, TABLE, concept, dreamsim_things, things

ROWS = [[1, 2, 3, 3], [6, 4, 2, 1], [5, 6, 1, 2], [2, 3, 4, 1]]
LIST = "things_first_imgs_idx.txt"


def test_the_table_is_read_to_its_last_row(tmp_path: Path) -> None:
    found = read_things(things(tmp_path / "t", 6, ROWS))
    assert (found.triplets + 1).tolist() == [row[:3] for row in ROWS]
    assert (found.odd + 1).tolist() == [row[3] for row in ROWS]
    assert found.images == tuple(tmp_path / "t" / "Images" / concept(n) for n in range(1, 7))
    assert found.used.tolist() == list(range(6))
    assert len(found) == 4


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 9])
def test_a_limit_takes_the_first_rows(tmp_path: Path, limit: int) -> None:
    found = read_things(things(tmp_path / "t", 6, ROWS), limit=limit)
    assert (found.triplets + 1).tolist() == [row[:3] for row in ROWS][:limit]


def test_images_that_no_row_of_the_limit_needs_may_be_missing(tmp_path: Path) -> None:
    folder = things(tmp_path / "t", 6, ROWS)
    (folder / "Images" / concept(5)).unlink()
    assert read_things(folder, limit=2).used.tolist() == [0, 1, 2, 3, 5]
    with pytest.raises(DataError, match=f"1 of 6 files are missing, e.g. .*{concept(5)}"):
        read_things(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.rstrip("\n"),
        lambda text: text + "\n\n",
        lambda text: "\ufeff" + text,
        lambda text: text.replace("image1\timage2\timage3\tchoice", '"Image_1"\t"Image_2"\t"Image 3"\tCHOICE'),
        lambda text: text.partition("\n")[2],  # no header
        lambda text: "\n".join("\t".join(line.split("\t")[:4]) for line in text.splitlines()),
        lambda text: "\n".join("\t".join(reversed(line.split("\t"))) for line in text.splitlines()),
        lambda text: text.replace("female", "#divers\xe9\u2713"),
    ],
    ids=["crlf", "no-newline", "blank-end", "bom", "names", "no-header", "four-columns", "reversed", "not-ascii"],
)
def test_variants_of_the_table_hold_the_same_rows(tmp_path: Path, change: Callable[[str], str]) -> None:
    folder = things(tmp_path / "t", 6, ROWS)
    (folder / TABLE).write_bytes(change((folder / TABLE).read_text()).encode())
    for limit in (0, 4, 3):
        found = read_things(folder, limit=limit)
        assert (np.c_[found.triplets, found.odd] + 1).tolist() == ROWS[: limit or None]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1\t2\t7\t1", r"line 4: image3 must be a whole number from 1 to 6, got '7'"),
        ("0\t2\t3\t1", r"line 4: image1 .* got '0'"),
        ("1\t-2\t3\t1", r"line 4: image2 .* got '-2'"),
        ("1\t2\t3\t4", r"line 4: choice must be a whole number from 1 to 3, got '4'"),
        ("1\t2\t3\t0", r"line 4: choice .* got '0'"),
        ("1\t2\t3\tleft", r"line 4: choice .* got 'left'"),
        ("1.0\t2\t3\t1", r"line 4: image1 .* got '1\.0'"),
        ("NaN\t2\t3\t1", r"line 4: image1 .* got 'NaN'"),
        ("1\t2\t" + "9" * 30 + "\t1", r"line 4: image3"),
        ("1\t2\t\t1", r"line 4: image3 .* got ''"),
        ("1\t2", r"line 4: expected at least 4 TAB-separated columns, got \['1', '2'\]"),
        ("1,2,3,1", r"line 4: expected at least 4"),
        ("2\t3\t2\t1", r"line 4: expected three different images, got \[2, 3, 2\]"),
    ],
)
def test_a_malformed_row_is_named_with_file_line_and_value(tmp_path: Path, row: str, message: str) -> None:
    folder = things(tmp_path / "t", 6, ROWS)
    lines = (folder / TABLE).read_text().splitlines()
    lines[3] = row
    (folder / TABLE).write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=f"{Path(TABLE).name}, {message}"):
        read_things(folder)
    assert len(read_things(folder, limit=2)) == 2  # what comes before it is sound


def test_every_row_is_checked_the_last_one_too(tmp_path: Path) -> None:
    folder = things(tmp_path / "t", 6, [*ROWS, [1, 2, 9, 1]])
    with pytest.raises(DataError, match="line 6: image3"):
        read_things(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / TABLE).unlink(), r"correctedorder\.csv is not there; expected .*OSF project f5rn6"),
        (
            lambda f: (f / TABLE).write_text("a\tb\n1\t2\n"),
            r"line 1: expected a TAB-separated header .* got \['a', 'b'\]",
        ),
        (
            lambda f: (f / TABLE).write_text(HEADER.replace("\t", ",") + "\n1,2,3,1\n"),
            "line 1: expected a TAB-separated",
        ),
        (lambda f: (f / TABLE).write_text(HEADER + "\n"), "holds no triplet"),
        (lambda f: (f / TABLE).write_text(""), "line 1: expected"),
        (lambda f: (f / LIST).unlink(), f"{LIST} is not there; expected .*1854 paths"),
        (lambda f: (f / LIST).write_text("\n"), "is empty"),
        (lambda f: (f / LIST).write_bytes(b"\xff\xfe\x00"), "cannot be read as text"),
        (lambda f: (f / LIST).write_text("a.jpg\n\nb.jpg\n"), "line 2: expected the path of an image"),
        (lambda f: (f / LIST).write_text("a.jpg\n../b.jpg\n"), r"line 2: names the file '\.\./b\.jpg'"),
        (lambda f: (f / LIST).write_text("a.jpg\nb.jpg\na.jpg\n"), r"lists a\.jpg twice"),
        (
            lambda f: (f / LIST).write_text("a.jpg\nb.jpg\n"),
            "line 2: image3 must be a whole number from 1 to 2, got '3'",
        ),
    ],
)
def test_what_is_missing_or_malformed_is_said(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    folder = things(tmp_path / "t", 6, ROWS)
    spoil(folder)
    with pytest.raises(DataError, match=message):
        read_things(folder)


def test_places_can_be_named(tmp_path: Path) -> None:
    folder = things(tmp_path / "t", 6, ROWS)
    (folder / TABLE).rename(tmp_path / "choices.tsv")
    (folder / LIST).rename(tmp_path / "list.txt")
    (folder / "Images").rename(tmp_path / "pictures")
    found = read_things(
        folder, table=tmp_path / "choices.tsv", image_list=tmp_path / "list.txt", images=tmp_path / "pictures"
    )
    assert len(found) == 4
    assert found.images[0].parent.parent == tmp_path / "pictures"


# --- DreamSim's list -------------------------------------------------------------------------------------------------


def test_dreamsims_list_has_the_odd_one_in_third_place(tmp_path: Path) -> None:
    folder = dreamsim_things(tmp_path / "t", [("a_01b", "b_01b", "c_01b"), ("c_01b", "e", "a_01b")])
    found = read_things(folder, "dreamsim")
    assert [path.name for path in found.images] == ["a_01b.png", "b_01b.png", "c_01b.png", "e.png"]
    assert found.triplets.tolist() == [[0, 1, 2], [2, 3, 0]]
    assert found.odd.tolist() == [2, 2]
    assert len(read_things(folder, "dreamsim", limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b c\na b\n", r"line 2: expected three different names, got 'a b'"),
        ("a b a\n", r"line 1: expected three different"),
        ("a b c d\n", r"line 1: expected three"),
        ("a b ../c\n", "line 1: names the file"),
        ("a b x\n", r"1 of 3 files are missing, e.g. .*x\.png; expected things_valset\.txt"),
        ("", "is empty"),
    ],
)
def test_malformed_lists_are_refused(tmp_path: Path, text: str, message: str) -> None:
    folder = dreamsim_things(tmp_path / "t", [("a", "b", "c")])
    (folder / "things_valset.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_things(folder, "dreamsim")


def test_there_are_two_variants_and_no_negative_limit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'other'"):
        read_things(tmp_path, "other")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="limit"):
        read_things(tmp_path, limit=-1)
    assert len(EXTRA) + 4 == len(HEADER.split("\t"))
