"""Cue-conflict images: the published table, malformed ones, decisions by text and by prototypes, and the command."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from offline import cli
from offline.benchmarks.cue_conflict import (
    ARCHIVE,
    CLASSES,
    TEMPLATES,
    CueConflictBenchmark,
    prototype_classifier,
    read_cue_conflict,
    text_classifier,
)
from offline.benchmarks.cue_conflict_picture import draw_shape_bias
from offline.errors import DataError, DataMissing, OfflineError, PlanError
from perception import load_encoder
from perception.errors import CheckpointError
from perception.testing import ToyEncoder, encoded, synthetic_image
from perception.text import TextEncoder
from tests.offline.alignment_layouts import CUE_COLUMNS, colour, cue_row, cue_zip, table_zip

DATA = Path(os.environ.get("HARDLOOK_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / ARCHIVE).is_file(), reason=f"HARDLOOK_DATA has no {ARCHIVE}")
GOOD = cue_row("a.png", "bear", "car", {"bear": 9, "na": 1})


class WordTower(nn.Module):
    """One fixed vector a class; a token is a class's number."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.vectors[tokens]


def class_in(prompts: list[str]) -> Tensor:
    """The longest class name in each prompt."""
    found = [max((c for c in CLASSES if c in prompt), key=len) for prompt in prompts]
    return torch.tensor([CLASSES.index(name) for name in found])


class ReadingEncoder(ToyEncoder):
    """A toy with a text tower that says a picture's own embedding for its class."""

    def __init__(self, pictures: list[bytes]) -> None:
        super().__init__(dim=24)
        from perception import encode_images

        self.text = TextEncoder(WordTower(encode_images(self, list(pictures)).clone()), class_in)


def colours() -> list[bytes]:
    """One distinct colour a class."""
    return [colour(255 - 15 * n, 17 * n, (97 * n) % 256) for n in range(len(CLASSES))]


def conflict_zip(path: Path, seen: list[str], answers: dict[str, int] | None = None) -> Path:
    """Images n of shape class n and texture class n + 1, each drawn in the colour of class `seen[n]`."""
    rows = [
        cue_row(f"{n}.png", CLASSES[n], CLASSES[(n + 1) % len(CLASSES)], answers or {CLASSES[n]: 8, "na": 2})
        for n in range(len(seen))
    ]
    files = {f"{n}.png": colours()[CLASSES.index(name)] for n, name in enumerate(seen)}
    return cue_zip(path, rows, files)


def prototype_folder(root: Path) -> Path:
    for name, data in zip(CLASSES, colours(), strict=True):
        (root / name).mkdir(parents=True)
        for number in range(2):
            (root / name / f"{number}.png").write_bytes(data)
    return root


def test_an_encoder_says_what_it_sees_by_text_and_by_prototypes(tmp_path: Path) -> None:
    seen = [CLASSES[n] for n in (0, 1, 3, 4, 9)]  # two shapes, two textures, one other class
    benchmark = CueConflictBenchmark(conflict_zip(tmp_path / "cues.zip", seen), resamples=50)
    encoder = ReadingEncoder(colours())
    by_text = text_classifier(encoder)
    by_image = prototype_classifier(encoder, prototype_folder(tmp_path / "prototypes"))
    assert by_text.shape == by_image.shape == (16, 24)
    torch.testing.assert_close(by_text, by_image, atol=1e-5, rtol=0)
    for classifier in (by_text, by_image):
        assert benchmark.decide(encoder, classifier) == seen
    figures = benchmark.run(encoder, by_text).figures
    assert figures["shape_bias"].value == 0.5
    assert figures["cue_share"].value == 0.8
    assert figures["human_agreement"].value == pytest.approx(2 * 0.8 / 5)
    assert benchmark.humans().figures["shape_bias"].value == 1.0


def test_images_of_equal_cues_are_left_out(tmp_path: Path) -> None:
    rows = [GOOD, cue_row("b.png", "cat", "cat", {"cat": 10})]
    benchmark = CueConflictBenchmark(cue_zip(tmp_path / "cues.zip", rows), resamples=2)
    assert [image.file for image in benchmark.images] == ["a.png"]
    assert benchmark.left_out == 1
    with pytest.raises(DataError, match="none of 1 images has two cues"):
        CueConflictBenchmark(cue_zip(tmp_path / "same.zip", rows[1:]))


def test_fewer_answers_than_ten_are_fine(tmp_path: Path) -> None:
    path = cue_zip(tmp_path / "cues.zip", [cue_row("a.png", "bear", "car", {"bear": 1})])
    (image,) = read_cue_conflict(path)
    assert (image.row, image.shape, image.texture, dict(image.answers)) == (2, "bear", "car", {"bear": 1})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("b.png", "beer", "car", '{"bear": 10}'), "shape_class is 'beer', expected one of airplane"),
        (("b.png", "bear", "", '{"bear": 10}'), "texture_class is ''"),
        (("b.png", "bear", "car", '{"beer": 10}'), "answer 'beer' is neither a class nor 'na'"),
        (("b.png", "bear", "car", '{"bear": 0}'), "of 1 to 10000 people, got 0"),
        (("b.png", "bear", "car", '{"bear": -3}'), "got -3"),
        (("b.png", "bear", "car", '{"bear": 1e999}'), "got inf"),
        (("b.png", "bear", "car", '{"bear": 10.0}'), r"got 10\.0"),
        (("b.png", "bear", "car", '{"bear": true}'), "got True"),
        (("b.png", "bear", "car", '{"bear": "10"}'), "got '10'"),
        (("b.png", "bear", "car", '{"bear": 1' + "0" * 30 + "}"), "got 1000"),
        (("b.png", "bear", "car", '{"bear": 5, "bear": 5}'), "listed twice"),
        (("b.png", "bear", "car", "{}"), "must be an object"),
        (("b.png", "bear", "car", '["bear"]'), "must be an object"),
        (("b.png", "bear", "car", "null"), "must be an object"),
        (("b.png", "bear", "car", ""), "is no JSON"),
        (("b.png", "bear", "car", "bear"), "is no JSON"),
        (("b.png", "bear", "car", "[" * 100_000), "is no JSON"),
        (("a.png", "bear", "car", '{"bear": 10}'), r"names 'a\.png' a second time"),
        (("c.png", "bear", "car", '{"bear": 10}'), r"names 'c\.png', which the archive lacks"),
        (("b.png", "bear", "car"), "no gaps"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: tuple[str, ...], message: str) -> None:
    picture = encoded(synthetic_image(0))
    path = cue_zip(tmp_path / "cues.zip", [GOOD, row], {"a.png": picture, "b.png": picture})
    with pytest.raises(DataError, match=message) as caught:
        CueConflictBenchmark(path)
    assert "row 3" in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_another_table_is_named_with_what_is_expected(tmp_path: Path) -> None:
    other = table_zip(tmp_path / "other.zip", "labels.csv", ("file", "class"), [("a.png", "bear")])
    with pytest.raises(DataError, match="row 2: has no column shape_class, texture_class, human_responses; expected"):
        read_cue_conflict(other)
    with pytest.raises(DataError, match=r"no readable labels\.csv"):
        read_cue_conflict(table_zip(tmp_path / "no.zip", "groups.csv", CUE_COLUMNS, [GOOD]))
    with pytest.raises(DataError, match="no rows"):
        read_cue_conflict(cue_zip(tmp_path / "empty.zip", []))
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(DataError, match="not a readable zip"):
        read_cue_conflict(tmp_path / "text.zip")
    with pytest.raises(DataMissing):
        read_cue_conflict(tmp_path / "absent.zip")


def test_an_image_that_cannot_be_read_ends_it_and_is_named(tmp_path: Path) -> None:
    benchmark = CueConflictBenchmark(cue_zip(tmp_path / "cues.zip", [GOOD], {"a.png": b"no image"}), resamples=2)
    with pytest.raises(DataError, match=r"labels\.csv, row 2: a\.png cannot be read as an image"):
        benchmark.decide(ToyEncoder(dim=4), torch.eye(16, 4))


@pytest.mark.parametrize("template", ["a photo", "a {} and a {}", "a {x}", "{} {", ""])
def test_other_templates_are_refused(template: str) -> None:
    with pytest.raises(PlanError, match="exactly one"):
        text_classifier(ReadingEncoder(colours()), [template])


def test_an_encoder_without_text_is_refused_and_told_what_to_do() -> None:
    class Mute(ToyEncoder):
        @property
        def text(self) -> TextEncoder:
            raise CheckpointError("toy has no text tower")

    for encoder in (ToyEncoder(), Mute()):
        with pytest.raises(PlanError, match=r"has no text tower.*--prototypes"):
            text_classifier(encoder)


def test_prototypes_need_all_classes_and_no_others(tmp_path: Path) -> None:
    folder = prototype_folder(tmp_path / "prototypes")
    (folder / "zebra").mkdir()
    (folder / "zebra/0.png").write_bytes(colour(1, 2, 3))
    with pytest.raises(DataError, match=r"missing or other: \['zebra'\]"):
        prototype_classifier(ToyEncoder(), folder)
    for name in ("zebra/0.png", "bear/0.png", "bear/1.png"):
        (folder / name).unlink()
    with pytest.raises(DataError, match=r"missing or other: \['bear'\]"):
        prototype_classifier(ToyEncoder(), folder)
    (folder / "bear/0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bear/0\.png cannot be read"):
        prototype_classifier(ToyEncoder(), folder)
    with pytest.raises(DataMissing):
        prototype_classifier(ToyEncoder(), tmp_path / "absent")


def test_the_command_writes_figures_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = conflict_zip(tmp_path / "cues.zip", list(CLASSES))
    json_file, picture = tmp_path / "figures.json", tmp_path / "bias.png"
    arguments = ["benchmark", "cue-conflict", "--archive", str(archive), "--json", str(json_file)]
    encoders = ["--encoder", "bundled/clean", "--encoder", "bundled/fare4"]
    cli.app([*arguments, *encoders, "--picture", str(picture)], result_action="return_value")
    printed = capsys.readouterr().out
    assert all(template in printed for template in TEMPLATES)
    figures = json.loads(json_file.read_text())
    assert [row["observer"] for row in figures["rows"]] == ["humans", "bundled/clean", "bundled/fare4"]
    assert figures["rows"][0]["shape_bias"]["value"] == 1.0
    assert figures["differences_to_first"].keys() == {"bundled/fare4"}
    assert figures["fingerprints"]["bundled/clean"] == load_encoder("bundled/clean").fingerprint
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures_of_equal_figures_are_equal(tmp_path: Path, suffix: str) -> None:
    benchmark = CueConflictBenchmark(conflict_zip(tmp_path / "cues.zip", list(CLASSES)), resamples=20)
    encoder = ReadingEncoder(colours())
    rows = [benchmark.humans(), benchmark.run(encoder, text_classifier(encoder))]
    pictures = [tmp_path / f"{name}{suffix}" for name in ("first", "second")]
    for picture in pictures:
        draw_shape_bias(rows, picture)
    first, second = (picture.read_bytes() for picture in pictures)
    assert first == second
    if suffix == ".svg":
        assert b"toy/0 (1.00)" in first
        assert b"<image" not in first  # nothing but lines and text, and no other file


def test_the_command_refuses_before_it_works(tmp_path: Path) -> None:
    archive = conflict_zip(tmp_path / "cues.zip", list(CLASSES))
    arguments = ["benchmark", "cue-conflict", "--archive", str(archive), "--encoder", "no-such-encoder"]
    for more, message in (
        (["--picture", str(tmp_path / "bias.pdf")], r"\.png or \.svg"),
        (["--picture", str(tmp_path / "absent/bias.png")], "folder of the picture"),
        (["--prototypes", str(tmp_path), "--template", "a {}"], "not both"),
        (["--seed", "-1"], "seed of 0 or more"),
    ):
        with pytest.raises(OfflineError, match=message):
            cli.app([*arguments, *more], result_action="return_value")


@needs_data
def test_people_decide_by_shape_as_published() -> None:
    """Geirhos et al. 2019: a shape bias of 95.9 % over the ten people."""
    benchmark = CueConflictBenchmark(DATA / ARCHIVE, resamples=200)
    people = benchmark.humans()
    assert (len(benchmark.images), benchmark.left_out) == (1200, 0)
    assert (people.by_shape, people.by_texture) == (9236, 398)
    assert people.figures["shape_bias"].value == pytest.approx(0.959, abs=5e-4)
    assert {sum(image.answers.values()) for image in benchmark.images} == {10}
    assert {image.shape for image in benchmark.images} == {image.texture for image in benchmark.images} == set(CLASSES)


@needs_data
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_robust_fine_tuning_raises_the_shape_bias_as_the_readme_says() -> None:
    benchmark = CueConflictBenchmark(DATA / ARCHIVE)
    rows = []
    for name, published in (("bundled/clean", 0.562), ("bundled/tecoa4", 0.696)):
        encoder = load_encoder(name)
        rows.append(benchmark.run(encoder, text_classifier(encoder)))
        assert rows[-1].figures["shape_bias"].value == pytest.approx(published, abs=0.01)
    interval = rows[1].minus(rows[0])["shape_bias"].interval
    assert interval is not None
    assert interval[0] > 0
