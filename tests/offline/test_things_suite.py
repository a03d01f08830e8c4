"""`hardlook-lab benchmark things`: from the published layout to figures, clean and attacked, and what is kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offline import cli
from offline.benchmarks import encoded_files
from offline.benchmarks.encoded_files import FileEncoder
from offline.benchmarks.published import published_figure
from offline.errors import DataError, DataMissing, PlanError
from perception.encoder import encode_images
from perception.testing import ToyEncoder, encoded, synthetic_image
from tests.offline.test_odd_one_out_audit import human
from tests.offline.things_revisited_layouts import TABLE, concept, dreamsim_things, things

TOYS = {"toy/0": 0, "toy/1": 1}


class CountingToy(ToyEncoder):
    """Says how many images were encoded, over all instances."""

    seen = 0

    def encode(self, pixels: Tensor) -> Tensor:
        CountingToy.seen += len(pixels)
        return super().encode(pixels)


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    CountingToy.seen = 0
    load = lambda name, **_: CountingToy(seed=TOYS[name])  # noqa: E731
    monkeypatch.setattr("perception.catalogue.load_encoder", load)


def benchmark(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.app(["benchmark", "things", *arguments])
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


def figures(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found = json.loads(path.read_text())["figures"]
    return {(figure["encoder"], figure["name"]): figure for figure in found}


def test_the_accuracy_is_that_of_a_naive_twin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = human(ToyEncoder(), 12, 40)
    things(tmp_path / "things", 12, rows)
    arguments = [word for name in TOYS for word in ("--encoder", name)]
    out = benchmark(capsys, *arguments, "--data", str(tmp_path), "--json", str(tmp_path / "f.json"))
    found = figures(tmp_path / "f.json")
    assert found["toy/0", "clean"]["measured"] == 80.0  # every fifth choice is another than the encoder's
    assert found["toy/0", "clean"]["count"] == 40
    table = encode_images(ToyEncoder(seed=1), [tmp_path / "things/Images" / concept(n) for n in range(1, 13)])
    right = 0
    for i, j, k, choice in rows:
        pairs = [float(table[a - 1] @ table[b - 1]) for a, b in ((j, k), (i, k), (i, j))]
        right += int(np.argmax(pairs)) + 1 == choice
    assert found["toy/1", "clean"]["measured"] == pytest.approx(100 * right / 40)
    assert "| toy/0 | 40 | 80.00 [65.2, 89.5] (-) |" in out
    assert CountingToy.seen == 24  # each of the twelve images once by each encoder


def test_a_limit_takes_the_first_triplets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = things(tmp_path / "here", 12, human(ToyEncoder(), 12, 20))
    for limit, expected in (("4", 100.0), ("5", 80.0)):
        benchmark(
            capsys, "--encoder", "toy/0", "--folder", str(folder), "--limit", limit, "--json", str(tmp_path / "f")
        )
        found = figures(tmp_path / "f")["toy/0", "clean"]
        assert (found["measured"], found["count"]) == (expected, int(limit))


def test_dreamsims_variant_is_a_group_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = dreamsim_things(tmp_path / "d", [("a", "b", "c"), ("c", "b", "a"), ("a", "d", "c")])
    benchmark(
        capsys, "--encoder", "toy/0", "--folder", str(folder), "--variant", "dreamsim", "--json", str(tmp_path / "f")
    )
    (found,) = json.loads((tmp_path / "f").read_text())["figures"]
    assert (found["group"], found["count"], found["published"]) == ("things_dreamsim", 3, None)


def test_attacked_figures_come_from_records_that_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = things(tmp_path / "t", 12, human(ToyEncoder(), 12, 20))
    run = tmp_path / "run"
    asked = ["--encoder", "toy/0", "--folder", str(folder), "--attacked", "10", "--steps", "10", "--run", str(run)]
    benchmark(capsys, *asked, "--json", str(tmp_path / "a"))
    found = figures(tmp_path / "a")
    assert found["toy/0", "clean"]["count"] == 20
    for name in ("linf_4_255", "l2_3"):
        assert found["toy/0", name]["count"] == 10
        assert found["toy/0", name]["measured"] <= 80.0
    records = (run / "attacked/records.jsonl").read_bytes()
    assert (run / "attacked/report.html").is_file()
    seen = CountingToy.seen
    benchmark(capsys, *asked, "--json", str(tmp_path / "b"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (run / "attacked/records.jsonl").read_bytes() == records
    assert CountingToy.seen - seen == 12  # the task's images; nothing is attacked anew, and the clean ones are kept


def test_layouts_are_checked_before_an_encoder_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr("perception.catalogue.load_encoder", refuse)
    with pytest.raises(DataError, match=r"THINGS: .*is not there; expected .*f5rn6"):
        cli.app(["benchmark", "things", "--encoder", "toy/0", "--folder", str(tmp_path)])
    folder = things(tmp_path / "t", 6, [[1, 2, 3, 1], [1, 2, 7, 1]])
    with pytest.raises(DataError, match=f"{Path(TABLE).name}, line 3: image3 .* got '7'"):
        cli.app(["benchmark", "things", "--encoder", "toy/0", "--folder", str(folder)])


class ByDistance(CountingToy):
    """An encoder whose authors compare by distance, though not a tower."""

    metric = "l2"


def test_encoders_that_compare_by_distance_do_so_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perception.catalogue.load_encoder", lambda *_, **__: ByDistance())
    folder = things(tmp_path / "t", 12, human(ToyEncoder(), 12, 20))
    asked = ["--encoder", "toy/0", "--folder", str(folder)]
    benchmark(capsys, *asked, "--json", str(tmp_path / "f"))  # of unit rows distance and cosine order alike
    assert figures(tmp_path / "f")["toy/0", "clean"]["measured"] == 80.0
    with pytest.raises(PlanError, match="by distance"):
        cli.app(["benchmark", "things", *asked, "--attacked", "4", "--run", str(tmp_path / "run")])
    with pytest.raises(PlanError, match="attacked must be"):
        cli.app(["benchmark", "things", *asked, "--attacked", "-4", "--run", str(tmp_path / "run")])


def test_published_figures_stand_beside_measured_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "fare4-convnext_base_w"
    TOYS[name] = 0
    folder = things(tmp_path / "t", 12, human(ToyEncoder(), 12, 20))
    benchmark(capsys, "--encoder", name, "--folder", str(folder), "--json", str(tmp_path / "f"))
    del TOYS[name]
    assert figures(tmp_path / "f")[name, "clean"]["published"] == published_figure(name, "things", "clean")


# --- embeddings of files ---------------------------------------------------------------------------------------------


def pictures(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.png").write_bytes(encoded(synthetic_image(number)))
    return [folder / f"{number}.png" for number in range(count)]


def test_parts_are_kept_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded_files, "PART", 4)
    files, cache = pictures(tmp_path / "p", 10), tmp_path / "cache"
    told: list[tuple[int, int]] = []
    first = FileEncoder(CountingToy(), cache).encode(files, lambda done, total: told.append((done, total)))
    assert told == [(4, 10), (8, 10), (10, 10)]
    assert torch.allclose(first.embeddings, encode_images(ToyEncoder(), files), atol=1e-6)
    assert CountingToy.seen == 10
    parts = sorted(cache.iterdir())
    assert len(parts) == 3
    parts[1].write_bytes(parts[1].read_bytes()[:50])  # damaged
    parts[2].unlink()
    again = FileEncoder(CountingToy(), cache).encode(files)
    assert torch.equal(again.embeddings, first.embeddings)
    assert again.sha256 == first.sha256
    assert CountingToy.seen == 10 + 4 + 2
    files[1].write_bytes(encoded(synthetic_image(99, (50, 40))))
    changed = FileEncoder(CountingToy(), cache).encode(files)
    assert CountingToy.seen == 16 + 4
    assert changed.sha256 != first.sha256
    assert not torch.equal(changed.embeddings[1], first.embeddings[1])
    FileEncoder(CountingToy(seed=1), cache).encode(files)  # another encoder shares nothing
    assert CountingToy.seen == 20 + 10


def test_what_cannot_be_read_ends_it_or_is_left_out(tmp_path: Path) -> None:
    files = pictures(tmp_path / "p", 4)
    files[1].write_bytes(b"no image")
    files[2].unlink()
    with pytest.raises(DataError, match=r"1\.png"):
        FileEncoder(ToyEncoder()).encode(files)
    with pytest.raises(DataMissing, match=r"2\.png"):
        FileEncoder(ToyEncoder()).encode(files[2:])
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        found = FileEncoder(ToyEncoder(), cache, skip_unreadable=True).encode(files)
        assert found.rows.tolist() == [0, 3]
        assert len(found.problems) == 2
        assert len(found.embeddings) == 2
    with pytest.raises(DataError, match="none of 2 can be read"):
        FileEncoder(ToyEncoder(), skip_unreadable=True).encode(files[1:3])
