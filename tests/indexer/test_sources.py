import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from indexer.contents import Kind
from indexer.errors import InvalidLabel, ManifestError, SourceError
from indexer.sources import FolderSource, ManifestSource, Skipped, Source, SourceItem, TarSource
from perception.errors import ImageTooLarge


def items(source: Iterable[SourceItem | Skipped]) -> list[SourceItem]:
    return [entry for entry in source if isinstance(entry, SourceItem)]


def skipped(source: Iterable[SourceItem | Skipped]) -> list[tuple[str, str]]:
    return [(entry.id, entry.message) for entry in source if isinstance(entry, Skipped)]


def labels(source: Iterable[SourceItem | Skipped]) -> dict[str, str]:
    return {item.id: item.label for item in items(source)}


def write(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


class TestFolder:
    def test_ids_labels_and_bytes_in_name_order(self, tmp_path: Path) -> None:
        write(tmp_path, "unsafe/b.png", "safe/z/deep/a.png", "safe/a.png", "safe/.hidden", "safe-no-folder.txt")
        source = FolderSource(tmp_path, "pools")
        assert labels(source) == {
            "safe/.hidden": "safe",
            "safe/a.png": "safe",
            "safe/z/deep/a.png": "safe",
            "unsafe/b.png": "unsafe",
        }
        assert [item.id for item in items(source)] == sorted(labels(source))
        assert [item.read() for item in items(source)] == [item.id.encode() for item in items(source)]
        assert skipped(source) == [("safe-no-folder.txt", "the file is in no pool's folder")]
        assert source.count() == 5

    def test_labels_of_a_gallery_are_the_whole_sub_folder(self, tmp_path: Path) -> None:
        write(tmp_path, "top.png", "animals/cats/a.png", "animals/b.png")
        assert labels(FolderSource(tmp_path, "gallery")) == {
            "animals/b.png": "animals",
            "animals/cats/a.png": "animals/cats",
            "top.png": "",
        }

    @pytest.mark.parametrize("name", ["Unsafe", "neutral", "safe "])
    def test_a_misspelt_pool_is_an_error(self, tmp_path: Path, name: str) -> None:
        write(tmp_path, "safe/a.png", f"{name}/b.png")
        with pytest.raises(InvalidLabel) as caught:
            FolderSource(tmp_path, "pools")
        assert caught.value.label == name

    def test_links_are_followed_within_the_folder_alone(self, tmp_path: Path) -> None:
        write(tmp_path, "outside.png", "root/safe/a.png", "root-twin/x.png")
        safe = tmp_path / "root" / "safe"
        (safe / "inside").symlink_to("a.png")
        (safe / "out").symlink_to("../../outside.png")
        (safe / "out-absolute").symlink_to(tmp_path / "outside.png")
        (safe / "out-twin").symlink_to("../../root-twin/x.png")
        (safe / "broken").symlink_to("nothing")
        (safe / "loop").symlink_to("loop")
        (safe / "up").symlink_to("..")
        source = FolderSource(tmp_path / "root", "pools")
        assert set(labels(source)) == {"safe/a.png", "safe/inside"}
        reasons = dict(skipped(source))
        assert set(reasons) == {f"safe/{n}" for n in ("out", "out-absolute", "out-twin", "broken", "loop", "up")}
        assert reasons["safe/out"] == reasons["safe/out-twin"] == "symbolic link out of the folder"
        assert reasons["safe/up"] == "symbolic link to a folder"

    def test_a_linked_root_is_fine(self, tmp_path: Path) -> None:
        write(tmp_path, "root/safe/a.png")
        (tmp_path / "root" / "safe" / "b.png").symlink_to("a.png")
        (tmp_path / "link").symlink_to("root")
        assert set(labels(FolderSource(tmp_path / "link", "pools"))) == {"safe/a.png", "safe/b.png"}

    def test_pipes_are_skipped_not_waited_for(self, tmp_path: Path) -> None:
        write(tmp_path, "safe/a.png")
        os.mkfifo(tmp_path / "safe" / "pipe")
        assert skipped(FolderSource(tmp_path, "pools")) == [("safe/pipe", "not a regular file")]
        late = items(FolderSource(tmp_path, "pools"))[0]
        (tmp_path / "safe" / "a.png").unlink()
        os.mkfifo(tmp_path / "safe" / "a.png")  # became a pipe after it was listed
        with pytest.raises(OSError, match="not a regular file"):
            late.read()

    def test_large_files_are_not_read(self, tmp_path: Path) -> None:
        write(tmp_path, "safe/a.png")
        with (tmp_path / "safe" / "huge.png").open("wb") as file:
            file.truncate(1 << 40)
        small, huge = items(FolderSource(tmp_path, "pools", max_bytes=10))
        assert small.read() == b"safe/a.png"
        with pytest.raises(ImageTooLarge, match="1099511627776 bytes, the limit is 10"):
            huge.read()

    def test_names_that_are_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "safe" / os.fsdecode(b"caf\xe9\n.png")
        path.parent.mkdir()
        path.write_bytes(b"x")
        (item,) = items(FolderSource(tmp_path, "pools"))
        assert item.id == "safe/caf\\xe9\n.png"
        assert item.read() == b"x"

    def test_a_tree_deeper_than_the_stack(self, tmp_path: Path) -> None:
        here = os.open(tmp_path, os.O_RDONLY)
        for _ in range(1100):
            os.mkdir("d", dir_fd=here)
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(here)
        write(tmp_path, "e.png")
        try:
            assert set(labels(FolderSource(tmp_path, "gallery"))) == {"e.png"}
        finally:  # pytest removes old folders by recursion
            subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)

    def test_an_absent_folder_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="cannot be listed"):
            FolderSource(tmp_path / "absent", "pools")


class TestManifest:
    def source(self, tmp_path: Path, text: str, kind: Kind = "pools") -> ManifestSource:
        path = tmp_path / "list.csv"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        return ManifestSource(path, kind)

    def test_columns(self, tmp_path: Path) -> None:
        write(tmp_path, "a.png", "sub/b.png")
        text = f'\ufeffpath,who,label,id\r\na.png,"Müller, J.",safe,1\r\n\r\n{tmp_path}/sub/b.png,,unsafe,2\r\n'
        source = self.source(tmp_path, text)
        first, second = items(source)
        assert (first.id, first.label, first.source, first.metadata) == ("1", "safe", "a.png", {"who": "Müller, J."})
        assert (second.id, second.label, second.read()) == ("2", "unsafe", b"sub/b.png")
        assert source.count() == 2

    def test_the_path_is_the_id_where_there_is_no_other(self, tmp_path: Path) -> None:
        (item,) = items(self.source(tmp_path, "label,path\ncat,x/y.png\n", "gallery"))
        assert (item.id, item.label, item.metadata) == ("x/y.png", "cat", {})
        with pytest.raises(FileNotFoundError):
            item.read()

    @pytest.mark.parametrize(
        ("text", "line", "reason"),
        [
            ("", 1, "column path, label missing"),
            ("path\na.png\n", 1, "column label missing; found: path"),
            ("path,label,path\n", 1, "occurs twice"),
            ("path,label\na.png,safe\nb.png,\n", 3, "the label is empty"),
            ("path,label\n,safe\n", 2, "the path is empty"),
            ("path,label,id\na.png,safe,\n", 2, "the id is empty"),
            ("path,label\na.png,safe\nb.png,Safe\n", 3, "label 'Safe' is not one of safe, buffer, unsafe"),
            ("path,label\na.png\n", 2, "1 cells, the header has 2"),
            ("path,label\na.png,safe,more\n", 2, "3 cells, the header has 2"),
            ("path,label\na.png,safe\na.png,unsafe\n", 3, "id 'a.png' is already on line 2"),
            ('path,label\n"a.png"x,safe\n', 2, "expected after"),
            ('path,label\n"a.png,safe\n', 2, "unexpected end"),
            ("path,label\n" + "a" * 200_000 + ",safe\n", 2, "field larger"),
        ],
    )
    def test_a_wrong_line_is_named(self, tmp_path: Path, text: str, line: int, reason: str) -> None:
        with pytest.raises(ManifestError, match=reason) as caught:
            self.source(tmp_path, text)
        assert caught.value.line == line
        assert f"list.csv: line {line}: " in str(caught.value)

    def test_galleries_take_any_label(self, tmp_path: Path) -> None:
        assert labels(self.source(tmp_path, "path,label\na,neutral\n", "gallery")) == {"a": "neutral"}

    def test_unreadable_lists(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="cannot be read"):
            ManifestSource(tmp_path / "absent.csv", "pools")
        with pytest.raises(SourceError, match="is not UTF-8"):
            self.source(tmp_path, "path,label\n\udce9,safe\n")

    def test_hostile_paths_fail_when_read(self, tmp_path: Path) -> None:
        for path in ("/dev/zero", "a\0b", ".", "x" * 5000):
            (item,) = items(self.source(tmp_path, f"path,label\n{path},safe\n"))
            with pytest.raises((OSError, ValueError)):
                item.read()


Members = list[tuple[str, bytes | tarfile.TarInfo]]


def tar(path: Path, members: Members, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            member = tarfile.TarInfo(name) if isinstance(content, bytes) else content
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                archive.addfile(member)
    return path


def special(name: str, kind: bytes, target: str = "") -> tuple[str, tarfile.TarInfo]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return name, member


class TestTar:
    def test_samples_in_webdataset_layout(self, tmp_path: Path) -> None:
        metadata = {"label": "buffer", "n": 3, "who": "Ü", "box": [1, 2]}
        members: Members = [
            ("d/001.jpg", b"one"),
            ("d/001.cls", b"safe\n"),
            ("d/001.txt", "Käse".encode()),
            ("d/002.json", json.dumps(metadata).encode()),
            ("d/002.PNG", b"two"),
            ("d/003.json", json.dumps(metadata).encode()),
            ("d/003.cls", b"unsafe"),
            ("d/003.webp", b"three"),
            ("d/003.gif", b"four"),
        ]
        source = TarSource([tar(tmp_path / "s-0.tar", members)], "pools")
        found = items(source)
        assert [(i.id, i.label, i.read()) for i in found] == [
            ("s-0.tar/d/001.jpg", "safe", b"one"),
            ("s-0.tar/d/002.PNG", "buffer", b"two"),
            ("s-0.tar/d/003.webp", "unsafe", b"three"),
            ("s-0.tar/d/003.gif", "unsafe", b"four"),
        ]
        assert found[0].metadata == {"text": "Käse"}
        assert found[1].metadata == found[2].metadata == {"n": "3", "who": "Ü", "box": "[1, 2]"}
        assert skipped(source) == []

    @pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
    def test_several_shards_compressed_or_not(self, tmp_path: Path, mode: str) -> None:
        shards = [tar(tmp_path / f"{i}.tar", [("safe/0.png", b"%d" % i)], mode) for i in range(2)]
        assert [(i.id, i.read()) for i in items(TarSource(shards, "pools"))] == [
            ("0.tar/safe/0.png", b"0"),
            ("1.tar/safe/0.png", b"1"),
        ]

    def test_the_folder_is_the_label_where_there_is_no_other(self, tmp_path: Path) -> None:
        path = tar(tmp_path / "s.tar", [("unsafe/deep/a.png", b""), ("b.png", b"")])
        assert labels(TarSource([path], "pools")) == {"s.tar/unsafe/deep/a.png": "unsafe"}
        assert skipped(TarSource([path], "pools")) == [
            ("s.tar/b.png", "sample 'b': label '' is not one of safe, buffer, unsafe")
        ]
        assert labels(TarSource([path], "gallery")) == {"s.tar/unsafe/deep/a.png": "unsafe/deep", "s.tar/b.png": ""}

    def test_hostile_members_are_listed(self, tmp_path: Path) -> None:
        members: Members = [
            ("safe/a.png", b"a"),
            ("safe/code.pyd", b"cos\nsystem\n(S'echo'\ntR."),
            ("safe/b.pickle", b"x"),
            special("safe/link.png", tarfile.SYMTYPE, "/etc/passwd"),
            special("safe/hard.png", tarfile.LNKTYPE, "safe/a.png"),
            special("safe/device.png", tarfile.CHRTYPE),
            special("safe/pipe.png", tarfile.FIFOTYPE),
            special("safe/folder", tarfile.DIRTYPE),
            ("../../safe/up.png", b"up"),
            ("/safe/absolute.png", b"absolute"),
            ("safe/huge.png", bytes(101)),
            ("safe/c.png", b"c"),
            ("safe/c.txt", b"x" * 70_000),
        ]
        source = TarSource([tar(tmp_path / "s.tar", members)], "pools", max_bytes=100)
        assert labels(source) == {"s.tar/safe/a.png": "safe", "s.tar/safe/c.png": "safe"}
        assert [id.removeprefix("s.tar/") for id, _ in skipped(source)] == [
            "safe/code.pyd",
            "safe/b.pickle",
            "safe/link.png",
            "safe/hard.png",
            "safe/device.png",
            "safe/pipe.png",
            "../../safe/up.png",
            "/safe/absolute.png",
            "safe/huge.png",
            "safe/c.txt",
        ]
        assert "101 bytes, the limit is 100" in dict(skipped(source))["s.tar/safe/huge.png"]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["s.tar"]

    @pytest.mark.parametrize(
        ("extension", "content"),
        [
            ("json", b"{"),
            ("json", b"[1]"),
            ("json", b"\xff"),
            ("json", b"[" * 60_000),
            ("json", b'{"label": 1}'),
            ("cls", b"\xff"),
            ("cls", b""),
            ("txt", b"\xff"),
        ],
    )
    def test_an_image_whose_label_cannot_be_read_is_skipped(
        self, tmp_path: Path, extension: str, content: bytes
    ) -> None:
        path = tar(tmp_path / "s.tar", [("safe/a.png", b"a"), (f"safe/a.{extension}", content), ("safe/b.png", b"b")])
        source = TarSource([path], "pools")
        assert set(labels(source)) == {"s.tar/safe/b.png"}
        assert [id for id, _ in skipped(source)] == ["s.tar/safe/a.png"]

    def test_a_shard_cut_anywhere_yields_what_is_whole_and_reports_the_rest(self, tmp_path: Path) -> None:
        names = [f"safe/{i}.png" for i in range(4)]
        whole = tar(tmp_path / "s.tar", [(name, name.encode() * 100) for name in names]).read_bytes()
        header, content, padded = 512, 1000, 1024
        for cut in range(0, 4 * (header + padded) + 1, 128):
            (tmp_path / "s.tar").write_bytes(whole[:cut])
            source = TarSource([tmp_path / "s.tar"], "pools")
            found = items(source)
            assert [i.id.removeprefix("s.tar/") for i in found] == names[: len(found)]
            assert all(i.read() == i.id.removeprefix("s.tar/").encode() * 100 for i in found)
            assert len(found) == sum(cut >= i * (header + padded) + header + content for i in range(4))
            ((id, reason),) = skipped(source)
            assert id == "s.tar/"
            assert "the rest of the shard cannot be read" in reason

    def test_a_broken_header_in_the_middle_is_reported(self, tmp_path: Path) -> None:
        data = bytearray(tar(tmp_path / "s.tar", [(f"safe/{i}.png", b"x") for i in range(4)]).read_bytes())
        data[2048 + 5] ^= 0xFF
        (tmp_path / "s.tar").write_bytes(data)
        source = TarSource([tmp_path / "s.tar"], "pools")
        assert len(items(source)) == 2
        assert len(skipped(source)) == 1

    @pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
    def test_a_damaged_compressed_shard_is_reported_and_the_next_one_read(self, tmp_path: Path, mode: str) -> None:
        members: Members = [(f"safe/{i}.png", os.urandom(5000)) for i in range(50)]
        good = tar(tmp_path / "good.tar", members)
        bad = tar(tmp_path / "bad.tar", members, mode)
        data = bad.read_bytes()
        for broken in (bytes(50) + data[50:], data[:100], data[: len(data) // 2]):
            bad.write_bytes(broken)
            source = TarSource([bad, good], "pools")
            assert len([id for id in labels(source) if id.startswith("good.tar")]) == 50
            assert [id for id, _ in skipped(source)] == ["bad.tar/"]

    @pytest.mark.parametrize("data", [b"", b"not a tar at all", bytes(100), os.urandom(5000)])
    def test_what_is_no_tar_is_reported(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "s.tar").write_bytes(data)
        assert [id for id, _ in skipped(TarSource([tmp_path / "s.tar"], "pools"))] == ["s.tar/"]

    def test_a_shard_has_to_be_there_once(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="is not a file"):
            TarSource([tmp_path / "absent.tar"], "pools")
        (tmp_path / "d").mkdir()
        shards = [tar(folder / "s.tar", []) for folder in (tmp_path, tmp_path / "d")]
        with pytest.raises(SourceError, match="same name"):
            TarSource(shards, "pools")


def test_every_source_tells_itself_apart(tmp_path: Path) -> None:
    write(tmp_path, "f/safe/a.png", "g/safe/a.png")
    (tmp_path / "list.csv").write_text("path,label\nf/safe/a.png,safe\n")
    sources: list[Source] = [
        FolderSource(tmp_path / "f", "pools"),
        FolderSource(tmp_path / "g", "pools"),
        ManifestSource(tmp_path / "list.csv", "pools"),
        TarSource([tar(tmp_path / "s.tar", [("safe/a.png", b"a")])], "pools"),
    ]
    assert len({source.identity for source in sources}) == 4
    assert [source.count() for source in sources] == [1, 1, 1, None]
    for source in sources:
        assert [entry.key for entry in source] == [entry.key for entry in source]


def test_an_entry_changes_with_its_file_and_its_label(tmp_path: Path) -> None:
    write(tmp_path, "safe/a.png", "safe/b.png")
    before = {item.id: item.key for item in items(FolderSource(tmp_path, "pools"))}
    (tmp_path / "safe" / "a.png").write_bytes(b"another")
    after = {item.id: item.key for item in items(FolderSource(tmp_path, "pools"))}
    assert before["safe/a.png"] != after["safe/a.png"]
    assert before["safe/b.png"] == after["safe/b.png"]
    keys = set()
    for row in ("safe,x", "unsafe,x", "safe,y"):
        (tmp_path / "list.csv").write_text(f"path,label,who\nsafe/a.png,{row}\n")
        keys |= {item.key for item in items(ManifestSource(tmp_path / "list.csv", "pools"))}
    assert len(keys) == 3
