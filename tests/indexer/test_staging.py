from collections.abc import Callable
from pathlib import Path

import pytest

from indexer.contents import Contents, Exemplar
from indexer.errors import ContentsError, DuplicateId, InvalidLabel, SourceError
from indexer.snapshot import Snapshot, write_snapshot
from indexer.staging import read_details, stage_gallery
from perception.gallery import Gallery

Make = Callable[..., Contents]


@pytest.mark.parametrize("collection", ["pools", "shop"])
def test_export_and_import_make_the_same_version(make_contents: Make, tmp_path: Path, collection: str) -> None:
    contents = make_contents(collection)
    folder = write_snapshot(contents, tmp_path)
    contents.to_gallery().save(tmp_path / "gallery.safetensors")
    staged = stage_gallery(
        Gallery.load(tmp_path / "gallery.safetensors"),
        collection=collection,
        encoder_name=contents.encoder_name,
        details=read_details(folder / "exemplars.jsonl"),
    )
    assert Snapshot.of(staged).version == folder.name


def test_without_details_only_labels_are_known(make_contents: Make) -> None:
    staged = stage_gallery(make_contents().to_gallery(), collection="pools", encoder_name="toy/0")
    assert staged.exemplars[0] == Exemplar("x001", "buffer")
    assert len(staged.exemplars) == 30


def test_details_may_lack_ids_but_not_contradict(make_contents: Make) -> None:
    gallery = make_contents().to_gallery()

    def stage(*details: Exemplar) -> Contents:
        return stage_gallery(
            gallery, collection="pools", encoder_name="toy/0", details={detail.id: detail for detail in details}
        )

    known = Exemplar("x001", "buffer", source="here")
    assert stage(known).exemplars[0] == known
    with pytest.raises(ContentsError, match="1 ids that the gallery does not have, such as 'nobody'"):
        stage(Exemplar("nobody", "safe"))
    with pytest.raises(ContentsError, match="'x001' has the label 'buffer' in the gallery, 'safe' in the details"):
        stage(Exemplar("x001", "safe"))


def test_a_gallery_of_classes_is_no_moderation_collection(make_contents: Make) -> None:
    with pytest.raises(InvalidLabel):
        stage_gallery(make_contents("shop").to_gallery(), collection="pools", encoder_name="toy/0")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"id": "b"}',
        '{"id": 1, "label": "safe"}',
        '{"id": "", "label": "safe"}',
        '{"id": "b", "label": "safe", "sha256": "x"}',
        '{"id": "b", "label": "safe", "metadata": {"n": 1}}',
        '{"id": "b\\ud800", "label": "safe"}',
        "",
    ],
)
def test_a_wrong_line_of_details_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "details.jsonl"
    path.write_text('{"id": "a", "label": "safe"}\n' + line + "\n")
    with pytest.raises(SourceError, match=r"details.jsonl: line 2: "):
        read_details(path)


def test_unreadable_details(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        read_details(tmp_path / "absent")
    (tmp_path / "twice").write_text('{"id": "a", "label": "safe"}\n' * 2)
    with pytest.raises(DuplicateId):
        read_details(tmp_path / "twice")
