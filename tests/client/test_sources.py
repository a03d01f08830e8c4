"""Which images a command line means, whatever lies in the folders and lists."""

import io
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.client.images import Url
from service.client.sources import Found, Sources


def found(*paths: str | Path, lists: tuple[str | Path, ...] = (), stdin: bytes = b"") -> list[Found]:
    return list(Sources([str(path) for path in paths], [str(path) for path in lists], io.BytesIO(stdin)))


def test_folders_are_walked_in_order_for_images(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.JPEG", "b/c/0.gif", "a.webp", "notes.txt", "png", "z.avif", "b/.hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    names = [str(Path(each.path).relative_to(tmp_path)) for each in found(tmp_path)]
    assert sorted(names) == sorted(["a.webp", "z.avif", "b/.hidden.png", "b/1.JPEG", "b/2.png", "b/c/0.gif", "png"])
    assert names == [str(Path(each.path).relative_to(tmp_path)) for each in found(tmp_path)]
    assert [name for name in names if name.startswith("b/")] == ["b/.hidden.png", "b/1.JPEG", "b/2.png", "b/c/0.gif"]


def test_loops_are_not_walked_and_links_to_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "real.png").touch()
    (tmp_path / "link.png").symlink_to("real.png")
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "broken.png").symlink_to("nowhere")
    sources = Sources([str(tmp_path)], [])
    assert [Path(each.path).name for each in sources] == ["broken.png", "link.png", "real.png", "self.png"]
    assert sources.linked_folders == 1
    assert [Path(each.path).name for each in found(tmp_path / "loop")][-1] == "self.png"


def test_nothing_special_is_opened_or_left_out(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.png"))
        assert [Path(each.path).name for each in found(tmp_path)] == ["pipe.png", "s.png"]


def test_a_folder_that_vanishes_is_an_error_in_its_place(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    walk = iter(Sources([str(tmp_path)], []))
    first = next(walk)
    (tmp_path / "b/1.png").unlink()
    (tmp_path / "b").rmdir()
    [gone] = list(walk)
    assert first.path == str(tmp_path / "a/1.png")
    assert (gone.path, gone.source) == (str(tmp_path / "b"), None)
    assert "the folder cannot be read" in str(gone.error)


def test_named_files_are_taken_whatever_they_are_called(tmp_path: Path) -> None:
    [file, url, missing, long] = found(tmp_path / "a.txt", "HTTPS://a/b", "missing", "https://" + "a" * 3000)
    assert (file.source, url.source, missing.source) == (tmp_path / "a.txt", Url("HTTPS://a/b"), Path("missing"))
    assert "2048" in str(long.error)


def test_lists_of_lines(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.png\r\n\nhttps://a/b\n# no comment\nlast")
    paths = [each.path for each in found(lists=(tmp_path / "list.txt", "-"), stdin=b"x\ny\n")]
    assert paths == ["a.png", "https://a/b", "# no comment", "last", "x", "y"]


@given(st.lists(st.binary(min_size=1, max_size=30).filter(lambda name: not set(name) & set(b"\n\r\0"))))
def test_names_of_any_bytes_come_through_a_list(names: list[bytes]) -> None:
    names = [name for name in names if not name.lower().startswith((b"http", b"\xef\xbb\xbf"))]
    paths = [each.path for each in found(lists=("-",), stdin=b"\n".join(names))]
    assert [os.fsencode(path) for path in paths] == names


def test_csv(tmp_path: Path) -> None:
    table = tmp_path / "list.CSV"
    table.write_text('name,url,path\nx,https://a/1,\ny,,"b,1.png"\nz,,\nw,https://a/2,c.png\n')
    assert [each.path for each in found(lists=(table,))] == ["https://a/1", "b,1.png", "c.png"]
    table.write_text("file\na.png\n")
    [error] = found(lists=(table,))
    assert "column path or url" in str(error.error)


@pytest.mark.parametrize(
    ("content", "before", "reason"),
    [(None, 0, "No such file"), (b"a\n" + b"x" * 70_000, 1, "line 2 has 65536 bytes or more")],
)
def test_a_list_that_ends_early_is_an_error_after_what_was_read(
    tmp_path: Path, content: bytes | None, before: int, reason: str
) -> None:
    if content is not None:
        (tmp_path / "list").write_bytes(content)
    *read, error = found(lists=(tmp_path / "list",))
    assert len(read) == before
    assert reason in str(error.error)
