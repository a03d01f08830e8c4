"""`hardlook-lab benchmark neighbors`: who is asked, what is found before and after the attack, and how it is shown."""

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from offline import cli
from offline.benchmarks import encoded_files
from offline.benchmarks.neighbors import (
    NeighborsPlan,
    NeighborsRecord,
    neighbors,
    open_neighbors,
    overlap_figures,
)
from offline.benchmarks.neighbors_page import write_grid
from offline.data.files import read_image_file
from offline.errors import DataError, PlanError, RunError
from perception.encoder import encode_images
from perception.preprocess import to_pixels
from perception.testing import ToyEncoder, encoded, synthetic_image
from tests.offline.data_layouts import folder

NAMES = ("toy/0", "toy/1")
PLAN = NeighborsPlan(count=3, k=4, eps=8 / 255, steps=8, batch=2)


class CountingToy(ToyEncoder):
    """Says how many images were encoded, over all instances."""

    seen = 0

    def encode(self, pixels: Tensor) -> Tensor:
        CountingToy.seen += len(pixels)
        return super().encode(pixels)


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    CountingToy.seen = 0
    monkeypatch.setattr("perception.catalogue.load_encoder", lambda name, **_: CountingToy(seed=int(name[-1])))


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    return folder(tmp_path / "gallery", [f"{'ab'[n % 2]}/{n:02d}.png" for n in range(20)])


def silent(task: str, done: int, total: int, text: str) -> None:
    """Progress that nobody sees."""


def test_queries_are_a_seeded_choice_of_what_can_be_read(gallery: Path) -> None:
    asked = open_neighbors(gallery, None, PLAN).asked
    assert len(set(asked)) == 3
    assert asked == open_neighbors(gallery, None, PLAN).asked
    assert asked != open_neighbors(gallery, None, NeighborsPlan(count=3, seed=1)).asked
    (gallery / asked[0]).write_bytes(b"no image")
    again = open_neighbors(gallery, None, PLAN).asked
    assert again[:2] == asked[1:]
    assert asked[0] not in again


def test_a_folder_of_queries_is_asked_as_a_whole_or_in_part(gallery: Path, tmp_path: Path) -> None:
    queries = folder(tmp_path / "queries", ["x.png", "y.png"])
    (queries / "z.png").write_bytes(b"no image")
    assert open_neighbors(gallery, queries, NeighborsPlan(count=0)).asked == ("x.png", "y.png")
    assert len(open_neighbors(gallery, queries, NeighborsPlan(count=1)).asked) == 1
    with pytest.raises(DataError, match="2 images that can be read, 3 were asked"):
        open_neighbors(gallery, queries, NeighborsPlan(count=3))


@pytest.mark.parametrize(
    ("values", "message"),
    [({"k": 20}, "more images"), ({"count": 0}, "how many"), ({"k": 0}, "k, steps"), ({"eps": -1.0}, "eps|radius")],
)
def test_impossible_requests_are_refused(gallery: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        open_neighbors(gallery, None, NeighborsPlan(**values))


def test_missing_and_empty_folders_are_named_with_what_is_expected(gallery: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for bad in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(DataError, match=r"gallery: .*expected a folder of image files.*MS-COCO"):
            open_neighbors(bad, None, PLAN)
        with pytest.raises(DataError, match="queries: "):
            open_neighbors(gallery, bad, PLAN)


def test_neighbours_are_those_of_a_naive_twin_and_never_the_query(gallery: Path, tmp_path: Path) -> None:
    images = open_neighbors(gallery, None, PLAN)
    records = neighbors(NAMES, images, PLAN, tmp_path / "run", silent)
    assert [(r.encoder, r.query) for r in records] == [(name, query) for name in NAMES for query in images.asked]
    files = sorted(gallery.rglob("*.png"))
    for record in records:
        encoder = ToyEncoder(seed=int(record.encoder[-1]))
        table = encode_images(encoder, files)
        ids = [file.relative_to(gallery).as_posix() for file in files]
        query = table[ids.index(record.query)]
        order = sorted((i for i in range(20) if ids[i] != record.query), key=lambda i: -float(table[i] @ query))
        assert [near.id for near in record.clean] == [ids[i] for i in order[:4]]
        assert [n.similarity for n in record.clean] == pytest.approx(
            [float(table[i] @ query) for i in order[:4]], abs=1e-5
        )
        # The 8-bit picture of the attacked query is that image within half a level: the same neighbours but for ties.
        seen = read_image_file(tmp_path / "run/pictures" / f"{record.pictures}-attacked.png")
        delta = np.asarray(seen, dtype=int).transpose(2, 0, 1) - encoder.preprocess.apply(
            read_image_file(gallery / record.query)
        ).astype(int)
        assert np.abs(delta).max() == 8
        attacked = encoder.encode(to_pixels([encoder.preprocess.apply(seen)]))[0].detach()
        for near in record.attacked:
            assert near.similarity == pytest.approx(float(table[ids.index(near.id)] @ attacked), abs=0.02)
        assert record.query not in {near.id for near in record.attacked}
        assert record.distance == pytest.approx(8 / 255, abs=1e-6)
        assert float(query @ attacked) < 0.999


def test_the_overlap_is_the_share_that_both_have(gallery: Path, tmp_path: Path) -> None:
    records = neighbors(NAMES, open_neighbors(gallery, None, PLAN), PLAN, tmp_path / "run", silent)
    for record in records:
        both = {near.id for near in record.clean} & {near.id for near in record.attacked}
        assert record.overlap == len(both) / 4
    found = overlap_figures(records)
    assert [(f.encoder, f.name, f.count, f.published) for f in found] == [(n, "overlap_at_4", 3, None) for n in NAMES]
    for figure in found:
        mean = np.mean([record.overlap for record in records if record.encoder == figure.encoder])
        assert figure.measured == pytest.approx(100 * mean)
    tiny = NeighborsPlan(count=3, k=4, eps=1e-9, steps=2)
    unmoved = neighbors(NAMES[:1], open_neighbors(gallery, None, tiny), tiny, tmp_path / "other", silent)
    assert [record.overlap for record in unmoved] == [1.0] * 3


def test_a_run_goes_on_to_the_same_bytes_and_encoders_may_join(
    gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded_files, "PART", 8)
    images, run = open_neighbors(gallery, None, PLAN), tmp_path / "run"
    neighbors(NAMES[:1], images, PLAN, run, silent)
    first = (run / "records.jsonl").read_bytes()
    told: list[tuple[str, int, int]] = []
    neighbors(NAMES, images, PLAN, run, lambda task, done, total, text: told.append((task, done, total)))
    whole = (run / "records.jsonl").read_bytes()
    assert whole.startswith(first)
    assert told[-1] == ("toy/1, queries", 3, 3)
    assert ("toy/0, gallery", 20, 20) in told
    lines = whole.splitlines(keepends=True)
    (run / "records.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:30])
    sorted((run / "gallery").iterdir())[-1].unlink()
    records = neighbors(NAMES, images, PLAN, run, silent)
    assert (run / "records.jsonl").read_bytes() == whole
    assert [NeighborsRecord.from_dict(json.loads(line)) for line in lines] == records
    seen = CountingToy.seen
    neighbors(NAMES, images, PLAN, run, silent)
    assert CountingToy.seen == seen


def test_a_run_of_something_else_is_refused(gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, run = open_neighbors(gallery, None, PLAN), tmp_path / "run"
    neighbors(NAMES[:1], images, PLAN, run, silent)
    other = NeighborsPlan(count=3, k=3)
    with pytest.raises(RunError, match="another plan"):
        neighbors(NAMES[:1], open_neighbors(gallery, None, other), other, run, silent)
    (gallery / "a/00.png").write_bytes(encoded(synthetic_image(77)))
    with pytest.raises(RunError, match="other weights or images"):
        neighbors(NAMES[:1], images, PLAN, run, silent)
    monkeypatch.setattr("perception.catalogue.load_encoder", lambda *_, **__: ToyEncoder(seed=5))
    with pytest.raises(RunError, match="other weights or images"):
        neighbors(NAMES[:1], images, PLAN, run, silent)
    with pytest.raises(PlanError, match="each once"):
        neighbors(["toy/0", "toy/0"], images, PLAN, run, silent)
    (run / "records.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match=r"records\.jsonl, line 1"):
        neighbors(NAMES[:1], images, PLAN, run, silent)


def test_unreadable_images_of_the_gallery_are_left_out_and_listed(gallery: Path, tmp_path: Path) -> None:
    (gallery / "a/00.png").write_bytes(b"no image")
    images = open_neighbors(gallery, None, PLAN)
    records = neighbors(NAMES[:1], images, PLAN, tmp_path / "run", silent)
    assert "a/00.png" not in {near.id for record in records for near in (*record.clean, *record.attacked)}
    assert "00.png" in (tmp_path / "run/metrics.jsonl").read_text()


# --- pictures --------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_grid_and_a_page(
    gallery: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = tmp_path / "queries"
    evil = "<img src=x onerror=alert(1)> & ü.png"
    folder(queries, [evil, "plain.png"])
    arguments = [word for name in NAMES for word in ("--encoder", name)]
    with pytest.raises(SystemExit) as ended:
        cli.app(["benchmark", "neighbors", *arguments, "--gallery", str(gallery), "--queries", str(queries), "--k", "3",
                 "--steps", "4", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "f")])  # fmt: skip
    assert ended.value.code in (0, None)
    assert "neighbors overlap_at_3" in capsys.readouterr().out
    grid = read_image_file(tmp_path / "out/grid.png")
    assert grid.width > grid.height * 0.3
    assert len({tuple(pixel) for pixel in np.asarray(grid).reshape(-1, 3)[::97].tolist()}) > 50
    text = (tmp_path / "out/grid.html").read_text()
    assert text.count("<img ") == 2 * 2 * 2 * 4  # queries, encoders, versions, and the query with three neighbours
    assert "<img src=x" not in text
    assert html.escape(evil) in text
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', text)) == {"data:"}
    assert "default-src 'none'" in text
    found = json.loads((tmp_path / "f").read_text())["figures"]
    for figure in found:
        assert f"{figure['measured']:.1f}" in text
    records = map(json.loads, (tmp_path / "out/records.jsonl").read_text().splitlines())
    assert [record["query"] for record in records].count(evil) == 2


def test_what_is_kept_is_marked_and_what_is_not_is_not(gallery: Path, tmp_path: Path) -> None:
    images, run = open_neighbors(gallery, None, PLAN), tmp_path / "run"
    records = neighbors(NAMES[:1], images, PLAN, run, silent)
    png, page = write_grid(records, images, PLAN, run)
    marks = page.read_text().count(", kept<br>")
    assert marks == sum(2 * len(record.kept) for record in records)
    pixels = np.asarray(Image.fromarray(np.asarray(read_image_file(png))))
    blue = (pixels == np.array([0x00, 0x72, 0xB2])).all(axis=2).sum()
    frame = 112 * 112 - 104 * 104  # four px on each side
    assert blue >= marks * frame
    assert blue < (marks + 1) * frame
    before = page.read_bytes(), png.read_bytes()
    write_grid(records, images, PLAN, run)
    assert (page.read_bytes(), png.read_bytes()) == before
