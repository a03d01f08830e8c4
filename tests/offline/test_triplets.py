"""The sample triplets: distances by either metric, choices without a verdict, and archives that lack one."""

import json
import math
import os
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offline import cli
from offline.benchmarks.triplets import ARCHIVE, TRIPLETS, TripletBenchmark, TripletDistances, distances
from offline.data.examples import LIMITS
from offline.errors import DataError, DataMissing
from perception.testing import ToyEncoder, encoded, synthetic_image
from tests.offline.alignment_layouts import colour

DATA = Path(os.environ.get("HARDLOOK_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / ARCHIVE).is_file(), reason=f"HARDLOOK_DATA has no {ARCHIVE}")


class ColourEncoder(ToyEncoder):
    """The mean colour of an image, which is both its embedding and its feature."""

    def __init__(self, metric: str = "cosine") -> None:
        super().__init__()
        self.metric = metric

    def features(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3))

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.normalize(self.features(pixels), dim=1)


def triplet_zip(path: Path, **pictures: bytes) -> Path:
    """All six images, of which those that are given by their file's stem replace synthetic ones."""
    with zipfile.ZipFile(path, "w") as archive:
        for number, file in enumerate(sum(TRIPLETS.values(), ())):
            archive.writestr(file, pictures.get(Path(file).stem, encoded(synthetic_image(number))))
    return path


def test_closed_forms_of_both_metrics(tmp_path: Path) -> None:
    red, bright, green = colour(102, 0, 0), colour(204, 0, 0), colour(0, 102, 0)
    benchmark = TripletBenchmark(triplet_zip(tmp_path / "t.zip", ex_ref=red, ex_p0=green, ex_p1=bright))
    cosine, _ = benchmark.run(ColourEncoder())
    assert (cosine.triplet, cosine.distance, cosine.choice) == ("lpips", "cosine", 1)
    assert (cosine.d0, cosine.d1) == pytest.approx((1.0, 0.0), abs=1e-3)  # sqrt(1 - cosine) is coarse at 0
    squared, _ = benchmark.run(ColourEncoder("l2"))
    assert (squared.distance, squared.choice) == ("l2", 1)
    assert (squared.d0, squared.d1) == pytest.approx((2 * 0.4**2, 0.4**2), rel=1e-5)


def test_a_tie_is_no_choice() -> None:
    same = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4), torch.ones(3, 4, 4)]) + 0.1
    for metric in ("cosine", "l2"):
        d0, d1 = distances(ColourEncoder(), same, metric)
        row = TripletDistances("e", "lpips", "cosine", d0, d1)
        assert row.choice is None
        assert row.as_dict()["choice"] is None


def test_order_of_the_candidates_is_that_of_the_files(tmp_path: Path) -> None:
    near, far = colour(100, 4, 0), colour(0, 100, 0)
    red = colour(100, 0, 0)
    _, row = TripletBenchmark(triplet_zip(tmp_path / "a.zip", ref_1=red, img_a_1=near, img_b_1=far)).run(
        ColourEncoder()
    )
    assert (row.triplet, row.choice) == ("dreamsim", 0)
    assert row.d0 == pytest.approx(math.sqrt(1 - 100 / math.hypot(100, 4)), rel=1e-3)


def test_other_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataMissing):
        TripletBenchmark(tmp_path / "absent.zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("README.txt", "nothing")
    with pytest.raises(DataError, match=r"lpips_example/ex_ref\.png is not in the archive"):
        TripletBenchmark(tmp_path / "other.zip")
    with pytest.raises(DataError, match=r"img_b_1\.jpg cannot be read as an image"):
        TripletBenchmark(triplet_zip(tmp_path / "broken.zip", img_b_1=b"no image"))
    damaged = bytearray(triplet_zip(tmp_path / "whole.zip").read_bytes())
    damaged[60:80] = bytes(20)  # within the first picture, so that its checksum fails
    (tmp_path / "damaged.zip").write_bytes(damaged)
    with pytest.raises(DataError, match=r"ex_ref\.png cannot be read"):
        TripletBenchmark(tmp_path / "damaged.zip")


@needs_data
def test_the_command_prints_distances_without_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["benchmark", "triplets", "--data", str(DATA), "--encoder", "bundled/clean"]
    cli.app([*command, "--json", str(tmp_path / "f.json")], result_action="return_value")
    printed = capsys.readouterr().out
    assert "there is no right answer" in printed
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [row["triplet"] for row in rows] == ["lpips", "dreamsim"]
    for row in rows:
        assert 0 < row["d0"] < math.sqrt(2)
        assert row["choice"] == int(row["d1"] < row["d0"])
        assert f"{row['d0']:.4f} | {row['d1']:.4f} | {row['choice']} |" in printed


def test_a_member_over_the_limit_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(TRIPLETS["lpips"][0], bytes(LIMITS.max_bytes + 1))
    with pytest.raises(DataError, match=r"ex_ref\.png cannot be read as an image: image too large"):
        TripletBenchmark(path)
