"""Table VII: equal to a naive twin for encoders of any sizes, with intervals, baselines, text, JSON and CSV."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from offline.benchmarks.published import published_figure
from offline.errors import PlanError, RunError
from offline.inversion import InversionPlan
from offline.inversion import table as table_module
from offline.inversion.finished import FinishedRun
from offline.inversion.run import invert_with
from offline.inversion.sources import ImageSources
from offline.inversion.table import cross_table, judged_by, published_cosine, resized
from perception.errors import FingerprintMismatch, UnknownEncoder
from perception.testing import ToyEncoder
from tests.offline.inversion_toys import sources, toys

NAMES = ("toy/0", "toy/1")


def named(encoder: ToyEncoder, name: str) -> ToyEncoder:
    encoder.name = name
    return encoder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inversions") / "run"
    invert_with(toys(0, 1), InversionPlan(NAMES, steps=5, seeds=(0, 7)), sources(4), path)
    return path


def twin(run: Path, generator: int, judge: ToyEncoder, *, eight_bit: bool = False) -> NDArray[np.float64]:
    """(images, seeds) cosines, from the files alone and with Pillow's own way through the sizes."""
    from safetensors.torch import load_file

    def embedded(pixels: Tensor) -> Tensor:
        size = (judge.preprocess.size_px,) * 2
        if pixels.shape[-2:] != size:
            pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        with torch.no_grad():
            return judge.encode(pixels)[0]

    found = []
    for source in sources(4).images:
        view = ToyEncoder(seed=generator).preprocess.apply(source.image)
        original = embedded(torch.from_numpy(view)[None].float() / 255)
        for seed in (0, 7):
            name = run / "reconstructions" / f"toy-{generator}" / f"{source.id.replace(' ', '-')}-{seed}"
            pixels = load_file(f"{name}.safetensors")["pixels"][None]
            if eight_bit:
                with Image.open(f"{name}.png") as picture:
                    pixels = torch.from_numpy(np.array(picture).transpose(2, 0, 1))[None].float() / 255
            found.append(float(original @ embedded(pixels)))
    return np.array(found).reshape(4, 2)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_the_table_is_that_of_a_naive_twin(run: Path, eight_bit: bool) -> None:
    judges = [*toys(1, 0), named(ToyEncoder(dim=5, seed=3, size_px=24), "larger"), named(ToyEncoder(size_px=9), "9")]
    found = judged_by(judges, FinishedRun.read(run), eight_bit=eight_bit, resamples=50)
    assert (found.generators, found.evaluators) == (NAMES, ("toy/1", "toy/0", "larger", "9"))
    assert (found.images, found.seeds, found.eight_bit) == (4, (0, 7), eight_bit)
    for i in range(2):
        for j, judge in enumerate(judges):
            expected = twin(run, i, judge, eight_bit=eight_bit)
            assert found.cosines[i, j] == pytest.approx(expected, abs=1e-6)
            cell = found.cells[4 * i + j]
            assert (cell.generator, cell.evaluator) == (NAMES[i], judge.name)
            assert cell.mean.value == pytest.approx(expected.mean(), abs=1e-6)
            assert cell.published is None
            assert cell.mean.interval is not None
            assert expected.mean(axis=1).min() - 1e-6 <= cell.mean.interval[0] <= cell.mean.interval[1] <= 1


def test_the_diagonal_is_what_the_run_found(run: Path) -> None:
    found = judged_by(toys(0, 1), FinishedRun.read(run))
    records = json.loads((run / "results.json").read_text())["reconstructions"]
    for i, name in enumerate(NAMES):
        own = [record["similarity"] for record in records if record["encoder"] == name]
        assert found.cosines[i, i].mean() == pytest.approx(np.mean(own), abs=2e-6)


def test_two_different_originals_are_the_zero_of_the_rescaled_table(run: Path) -> None:
    judges = toys(0, 1)
    found = judged_by(judges, FinishedRun.read(run), resamples=50)
    for j, judge in enumerate(judges):
        # The squares are those that the first encoder saw; toys of one size see the same.
        rows = [target.embedding for target in sources(4).targets(judge)]
        pairs = [float(a @ b) for i, a in enumerate(rows) for k, b in enumerate(rows) if i != k]
        baseline = found.baselines[judge.name]
        assert baseline is not None
        assert baseline == pytest.approx(np.mean(pairs), abs=1e-6)
        for i in range(2):
            cell = found.cells[2 * i + j]
            assert cell.rescaled is not None
            assert cell.mean.value is not None
            assert cell.rescaled.value == pytest.approx((cell.mean.value - baseline) / (1 - baseline), abs=1e-9)


def test_contrasts_are_paired_by_image(run: Path) -> None:
    found = judged_by(toys(0, 1), FinishedRun.read(run), resamples=200)
    (contrast,) = found.contrasts
    assert (contrast.generator, contrast.evaluator) == NAMES
    by_image = found.cosines[0, 1].mean(axis=1) - found.cosines[1, 0].mean(axis=1)
    assert contrast.difference.value == pytest.approx(by_image.mean(), abs=1e-9)
    assert contrast.difference.interval is not None
    assert by_image.min() <= contrast.difference.interval[0] <= contrast.difference.interval[1] <= by_image.max()
    assert judged_by(toys(0), FinishedRun.read(run)).contrasts == ()


def test_text_json_and_csv_say_the_same(run: Path) -> None:
    found = judged_by(toys(0, 1), FinishedRun.read(run), resamples=50)
    lines = found.as_text().splitlines()
    assert lines[0] == "| reconstructed by | toy/0 | toy/1 |"
    assert f"{found.cells[0].mean.value:.3f} [" in lines[2]
    assert "4 images, seeds 0, 7; exact values." in found.as_text()
    as_json = json.loads(json.dumps(found.as_dict()))
    rows = list(csv.DictReader(io.StringIO(found.as_csv())))
    assert len(rows) == len(as_json["cells"]) == 4
    for row, cell, own in zip(rows, as_json["cells"], found.cells, strict=True):
        assert (row["generator"], row["evaluator"]) == (cell["generator"], cell["evaluator"])
        assert float(row["mean"]) == pytest.approx(own.mean.value, abs=1e-6)
        assert cell["value"] == pytest.approx(own.mean.value, abs=1e-4)
        assert (row["images"], row["seeds"], row["published"], cell["published"]) == ("4", "2", "", None)


def test_one_image_has_no_other_to_compare_with(tmp_path: Path) -> None:
    invert_with(toys(0), InversionPlan(("toy/0",), steps=2), ImageSources(sources(1).images), tmp_path)
    found = judged_by(toys(0), FinishedRun.read(tmp_path), resamples=10)
    assert found.baselines == {"toy/0": None}
    assert found.cells[0].rescaled is None
    assert "1 image, seed 0" in found.as_text()
    assert "on one scale" not in found.as_text()


class Blind(ToyEncoder):
    """Sees the same in all pictures."""

    def encode(self, pixels: Tensor) -> Tensor:
        return super().encode(pixels * 0)


def test_a_judge_that_sees_no_difference_is_not_rescaled(run: Path) -> None:
    found = judged_by([named(Blind(), "blind"), *toys(0)], FinishedRun.read(run), resamples=10)
    assert found.cells[0].mean.value == pytest.approx(1)
    assert found.cells[0].rescaled is None
    assert found.cells[1].rescaled is not None
    assert "| toy/0 | - |" in found.as_text()


def test_pictures_of_the_judges_size_are_not_touched() -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert resized(pixels, 16) is pixels
    small = resized(pixels, 8)
    for row, picture in zip(small, pixels, strict=True):
        for ours, channel in zip(row, picture, strict=True):
            expected = Image.fromarray(channel.numpy()).resize((8, 8), Image.Resampling.BICUBIC)
            assert ours.numpy() == pytest.approx(np.asarray(expected).clip(0, 1), abs=1e-5)
    assert float(resized(pixels.round(), 40).amin()) >= 0


def test_another_encoder_of_the_same_name_is_refused(run: Path) -> None:
    with pytest.raises(FingerprintMismatch, match="toy/0"):
        judged_by([named(ToyEncoder(seed=9), "toy/0")], FinishedRun.read(run))


def test_judges_are_looked_up_before_anything_is_judged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "judged_by", lambda *_, **__: pytest.fail("judged"))
    with pytest.raises(UnknownEncoder):
        cross_table(run, ["bundled/clean", "nonsense"])
    for names in ([], ["bundled/clean", "bundled/clean"]):
        with pytest.raises(PlanError, match="one or several different encoders"):
            cross_table(run, names)
    with pytest.raises(PlanError, match="2 resamples or more"):
        cross_table(run, ["bundled/clean"], resamples=1)


def test_what_is_no_finished_run_of_images_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run directory"):
        FinishedRun.read(tmp_path)
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(RunError, match="not that of an inversion"):
        FinishedRun.read(tmp_path)
    plan = json.loads((run / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "invert": "text"}))
    with pytest.raises(RunError, match="inversion of texts"):
        FinishedRun.read(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(RunError, match="not finished"):
        FinishedRun.read(tmp_path)
    results = json.loads((run / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**results, "reconstructions": results["reconstructions"][1:]}))
    with pytest.raises(RunError, match="lacks 1 of 16"):
        FinishedRun.read(tmp_path)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    invert_with(toys(0), InversionPlan(("toy/0",), steps=2), sources(2), tmp_path)
    (tmp_path / "reconstructions" / "toy-0" / "image-1.png-0.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match=r"image-1\.png-0\.safetensors is not there or damaged"):
        judged_by(toys(0), FinishedRun.read(tmp_path))
    judged_by(toys(0), FinishedRun.read(tmp_path), eight_bit=True)  # the PNG is whole
    (tmp_path / "originals" / "toy-0" / "image-0.png.png").unlink()
    with pytest.raises(RunError, match=r"image-0\.png\.png is not there or damaged"):
        judged_by(toys(0), FinishedRun.read(tmp_path), eight_bit=True)


def test_published_cosines_are_those_of_the_cards_by_whatever_name() -> None:
    for generator, evaluator in (("clip-convnext_base_w", "dino-vitb16"), ("bundled/clean", "bundled/fare4")):
        assert published_cosine(generator, evaluator) == published_figure(generator, "inversion", evaluator)
    assert published_cosine("clip-convnext_base_w", "local-dir:somewhere") is None
    assert published_cosine("local-dir:somewhere", "clip-convnext_base_w") is None
