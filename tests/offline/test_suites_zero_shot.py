"""Zero-shot suites from the published shards and folders to figures."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from offline.audit.plan import plan_of_run
from offline.audit.record import RECORDS_NAME, read_records
from offline.benchmarks import suite_zero_shot
from offline.benchmarks.intervals import Accuracy
from offline.benchmarks.native_resolution import NativeResolution
from offline.benchmarks.suite_zero_shot import imagenet, zero_shot, zero_shot_figures
from offline.benchmarks.suites import SuiteRequest
from offline.benchmarks.zero_shot_sets import THIRTEEN, Prompts, open_imagenet, open_set, open_sets
from offline.errors import DataError, PlanError
from perception.preprocess import to_pixels
from perception.testing import ToyEncoder, encoded, synthetic_image
from perception.text import class_embeddings
from tests.offline.published_layouts import PROMPTS, WORDS, shards
from tests.offline.published_layouts import imagenet as imagenet_tree
from tests.offline.suite_toys import MAKERS, quiet, toys
from tests.offline.test_suites_two_afc import table

__all__ = ["toys"]
SETS = {spec.short: spec for spec in THIRTEEN}


@pytest.fixture
def asked(tmp_path: Path, toys: list[str]) -> SuiteRequest:
    for name in ("cifar10", "cars"):
        shards(tmp_path / "data", SETS[name])
    shards(tmp_path / "data", SETS["pcam"], words=WORDS[:2])
    return SuiteRequest(("toy/large",), tmp_path / "data", tmp_path / "run", steps=2)


def right_by_hand(folder: Path, name: str) -> list[bool]:
    """The classifier by its definition, on the pictures that `shards` drew: the clean answers by key."""
    toy, spec = MAKERS[name](), SETS["cars"]
    words = (folder / spec.folders[0] / "classnames.txt").read_text().split()
    templates = [template.replace("{c}", "{}") for template in PROMPTS]
    classes = class_embeddings(toy.text, words, templates)
    right = []
    for n in range(15):
        picture = synthetic_image(7 * (n % 5) + n // 5 % 2, (48, 40))
        embedding = toy.encode(to_pixels([toy.preprocess.apply(picture)])).detach()
        right.append(int((embedding @ classes.T).argmax()) == n % 5)
    return right


def test_sets_from_shards_to_their_average(asked: SuiteRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_zero_shot, "ATTACKED", 4)
    figures = zero_shot(asked, quiet)
    found = table(figures)
    name = "toy/large"
    by_hand = right_by_hand(asked.folder, name)
    assert found[name, "zero_shot_cars", "clean"] == pytest.approx((100 * sum(by_hand) / 15, 15))
    assert 0 < sum(by_hand) < 15
    assert [found[name, f"zero_shot_{s}", "linf_4_255"][1] for s in ("cifar10", "cars", "pcam")] == [4, 4, 4]
    for key in ("clean", "linf_2_255", "linf_4_255"):
        parts = [found[name, f"zero_shot_{short}", key][0] for short in ("cifar10", "cars", "pcam")]
        assert found[name, "zero_shot_average_of_3", key][0] == pytest.approx(sum(parts) / 3)
    assert not any(f.published is not None or f.flagged for f in figures)
    chains = {}
    for short in ("cifar10", "pcam"):
        run = asked.part(short, "attacked")
        assert run is not None
        chains[short] = plan_of_run(run).chain
    assert chains == {"cifar10": ("apgd-ce", "apgd-t"), "pcam": ("apgd-ce",)}, "two classes have no targets"
    again = replace(asked, run=asked.part("again"))
    assert zero_shot(again, quiet, sets=["pcam"])[3:] == [f for f in figures if f.group == "zero_shot_pcam"]


def test_a_killed_run_goes_on_to_the_same_bytes(asked: SuiteRequest) -> None:
    one = replace(asked, limit=4)
    whole = zero_shot(one, quiet, sets=["cars"])
    run = one.part("cars", "attacked")
    assert run is not None
    content = (run / RECORDS_NAME).read_bytes()
    (run / RECORDS_NAME).write_bytes(b"".join(content.splitlines(keepends=True)[:3]))
    assert zero_shot(one, quiet, sets=["cars"]) == whole
    assert (run / RECORDS_NAME).read_bytes() == content


def test_small_images_are_attacked_at_their_own_size(asked: SuiteRequest) -> None:
    zero_shot(replace(asked, limit=3), quiet, sets=["cifar10"])
    toy = MAKERS["toy/large"]()
    run = asked.part("cifar10", "attacked")
    assert run is not None
    view = NativeResolution(toy, 32)  # type: ignore[arg-type]
    assert {record.fingerprint for record in read_records(run)} == {view.fingerprint}


def test_the_enlargement_is_bicubic_and_has_gradients() -> None:
    toy = ToyEncoder(size_px=48)
    view = NativeResolution(toy, 32)  # type: ignore[arg-type]
    assert (view.preprocess.size_px, view.preprocess.resize_px, view.dim) == (32, 32, toy.dim)
    assert view.fingerprint != toy.fingerprint != NativeResolution(toy, 24).fingerprint  # type: ignore[arg-type]
    image = synthetic_image(3, (32, 32))
    assert np.array_equal(view.preprocess.apply(image), np.asarray(image).transpose(2, 0, 1)), "as it is"
    pixels = to_pixels([view.preprocess.apply(image)]).requires_grad_(True)
    # Pillow's own enlargement, a channel at a time and without rounding to 8 bits.
    channels = [Image.fromarray(channel) for channel in pixels[0].detach().numpy()]
    larger = [np.asarray(channel.resize((48, 48), Image.Resampling.BICUBIC)) for channel in channels]
    by_pillow = torch.from_numpy(np.stack(larger))[None]
    embedding = view.encode(pixels)
    assert torch.allclose(embedding, toy.encode(by_pillow), atol=1e-5)
    embedding[0, 0].backward()
    assert pixels.grad is not None
    assert bool((pixels.grad != 0).any())
    step = 1e-3 * pixels.grad.sign()
    assert view.encode(pixels + step)[0, 0] > embedding[0, 0]


def test_folders_and_prompt_files_do_as_well(tmp_path: Path, toys: list[str]) -> None:
    for n in range(6):
        path = tmp_path / "data" / "pets" / "test" / ("Pug_Dog", "1")[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(synthetic_image(n)))
    (tmp_path / "names.json").write_text(json.dumps({"pets": ["pug dog", "cat", "eel"], "cars": ["a"]}))
    (tmp_path / "templates.json").write_text(json.dumps({"pets": ["a photo of a {c}, a type of pet."]}))
    files = [tmp_path / "names.json", tmp_path / "templates.json"]
    opened = open_set(tmp_path / "data" / "pets", SETS["pets"], Prompts.load(files))
    assert opened.class_names == ("pug dog", "cat", "eel")
    assert opened.templates == ("a photo of a {}, a type of pet.",)
    labels = [int(opened.labels[opened.images.read(i).label]) for i in range(6)]
    assert labels == [1, 1, 1, 0, 0, 0]
    asked = SuiteRequest(("toy/a",), tmp_path / "data", clean_only=True)
    figures = zero_shot(asked, quiet, prompts=files)
    assert [(f.group, f.count) for f in figures] == [("zero_shot_average_of_1", 6), ("zero_shot_pets", 6)]


def test_the_average_is_published_for_all_thirteen_alone() -> None:
    measured = {
        spec.short: {"fare4-convnext_base_w": {"clean": Accuracy(i, 12), "linf_2_255": Accuracy(0, 10 + i)}}
        for i, spec in enumerate(THIRTEEN)
    }
    average = zero_shot_figures(measured)[:2]
    assert [(f.group, f.name, f.published, f.count) for f in average] == [
        ("zero_shot_13", "clean", 60.2, 156),
        ("zero_shot_13", "linf_2_255", 44.1, 130 + 78),
    ]
    assert average[0].measured == pytest.approx(50.0)
    assert average[1].flagged
    del measured["pcam"]
    assert all(f.published is None for f in zero_shot_figures(measured))
    assert zero_shot_figures(measured)[0].group == "zero_shot_average_of_12"


def test_there_are_thirteen_sets_with_the_published_numbers_of_prompts() -> None:
    assert len(SETS) == 13
    assert sum(spec.templates for spec in THIRTEEN) == 18 * 2 + 2 + 8 + 34 + 1 + 1 + 8 + 3 + 2 + 2 + 80 * 2
    assert {spec.short: spec.native_px for spec in THIRTEEN if spec.native_px} == {
        "cifar10": 32,
        "cifar100": 32,
        "stl10": 96,
    }


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("classnames.txt", None, "lacks classnames.txt"),
        ("zeroshot_classification_templates.txt", None, "lacks zeroshot_classification_templates.txt"),
        ("zeroshot_classification_templates.txt", b"a photo of a {}.\n", "must hold {c} once"),
        ("zeroshot_classification_templates.txt", b"{c} and {0}\n", "must hold {c} once"),
        ("classnames.txt", b"bee\ncat\n", "'2' is none of 2 classes"),
        ("classnames.txt", b"\xff\xfe", "cannot be read"),
        ("test/nshards.txt", b"3\n", "says 3, missing: 2.tar"),
        ("test/nshards.txt", b"many\n", "says many"),
        ("test/1.tar", b"no tar", "files cannot be used, e.g. 1.tar"),
        ("test/1.tar", None, "says 2, missing: 1.tar"),
    ],
)
def test_malformed_sets_are_refused_before_an_encoder_is_loaded(
    tmp_path: Path, toys: list[str], file: str, content: bytes | None, message: str
) -> None:
    path = shards(tmp_path, SETS["cars"]) / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as failed:
        zero_shot(SuiteRequest(("toy/a",), tmp_path, clean_only=True), quiet)
    assert message in str(failed.value)
    assert "download the data sets wds_*" in str(failed.value)
    assert toys == []


def test_missing_sets_and_unknown_ones(tmp_path: Path, toys: list[str]) -> None:
    request = SuiteRequest(("toy/a",), tmp_path, clean_only=True)
    with pytest.raises(DataError, match="lacks wds_vtab-cifar10, wds_vtab-cifar100"):
        zero_shot(request, quiet)
    shards(tmp_path, SETS["cars"])
    assert len(open_sets(tmp_path, THIRTEEN, Prompts({}, {}), all_of_them=False)) == 1
    with pytest.raises(DataError, match="lacks wds_stl10"):
        zero_shot(request, quiet, sets=["cars", "stl10"])
    with pytest.raises(PlanError, match="got mnist"):
        zero_shot(request, quiet, sets=["mnist"])
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(DataError, match=r"object of \{set:"):
        zero_shot(request, quiet, prompts=[tmp_path / "x.json"])


def test_imagenet_is_a_thousand_folders(tmp_path: Path, toys: list[str]) -> None:
    imagenet_tree(tmp_path / "data")
    opened = open_imagenet(tmp_path / "data")
    assert (len(opened.images), len(opened.templates), opened.class_names[0]) == (1000, 80, "tench")
    asked = SuiteRequest(("toy/a",), tmp_path / "data", clean_only=True, limit=20)
    (figure,) = imagenet(asked, quiet)
    assert (figure.group, figure.name, figure.count) == ("imagenet", "clean", 20)
    (tmp_path / "data/val/n10000007").rename(tmp_path / "gone")
    toys.clear()
    with pytest.raises(DataError, match=r"exactly 1000 classes.*; expected val/<wnid>"):
        imagenet(asked, quiet)
    with pytest.raises(DataError, match=r"not found: .*val"):
        imagenet(replace(asked, folder=tmp_path), quiet)
    assert toys == []
