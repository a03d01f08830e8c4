"""The moderation suites from the published folders to figures."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offline.audit.record import RECORDS_NAME, read_records
from offline.benchmarks import suite_moderation
from offline.benchmarks.choices import choose, open_folders
from offline.benchmarks.published import Figure
from offline.benchmarks.suite_moderation import Detector, dangerous_objects, detector, nsfw, nsfw_figures
from offline.benchmarks.suites import SuiteRequest
from offline.errors import DataError, DataMissing, PlanError, RunError
from perception.encoder import encode_images
from perception.gallery import Gallery
from tests.offline import published_layouts
from tests.offline.suite_toys import MAKERS, quiet, toys

__all__ = ["toys"]
POOL, QUERIES = 5, 4


@pytest.fixture
def asked(tmp_path: Path, toys: list[str]) -> SuiteRequest:
    published_layouts.nsfw(tmp_path / "data", POOL + QUERIES + suite_moderation.TARGETS)
    return SuiteRequest(("toy/a", "toy/b"), tmp_path / "data", tmp_path / "run", limit=QUERIES, steps=3)


def table(figures: list[Figure]) -> dict[tuple[str, str, str], tuple[float, int]]:
    return {(f.encoder, f.group, f.name): (f.measured, f.count) for f in figures}


def run_of(request: SuiteRequest) -> Path:
    run = request.part("attacked")
    assert run is not None
    return run


def test_nsfw_is_one_nearest_neighbour_over_disjoint_images(asked: SuiteRequest) -> None:
    figures = nsfw(asked, quiet, pool_size=POOL)
    found = table(figures)
    records = read_records(run_of(asked))
    root = asked.folder / "nsfw_dataset_v1"
    for name in asked.encoders:
        gallery = Gallery.load(run_of(asked) / "pools" / f"{name.replace('/', '_')}.safetensors")
        assert [gallery.labels.count(label) for label in ("safe", "buffer", "unsafe")] == [POOL] * 3
        assert {identity.split("/")[0] for identity in gallery.ids} == {"neutral", "sexy", "porn"}
        of = [record for record in records if record.system == name]
        assert len(of) == 2 * QUERIES
        assert not {record.id for record in of} & set(gallery.ids)
        toy = MAKERS[name]()
        nearest = (
            (encode_images(toy, [root / r.id for r in of]) @ torch.from_numpy(gallery.embeddings.copy()).T).argmax(1)
        ).tolist()
        answers = [gallery.labels[i] for i in nearest]
        for label in ("safe", "unsafe"):
            given = [answer for answer, record in zip(answers, of, strict=True) if record.label == label]
            assert found[name, "nsfw", f"{label}_clean"] == (100 * given.count(label) / QUERIES, QUERIES)
            for kind in ("safe", "buffer", "unsafe"):
                key = (name, f"nsfw_{label}_queries", f"clean_{kind}")
                assert found[key] == (100 * given.count(kind) / QUERIES, QUERIES)
            spread = [found[name, f"nsfw_{label}_queries", f"linf_8_255_{k}"][0] for k in ("safe", "buffer", "unsafe")]
            assert sum(spread) == pytest.approx(100)
            assert found[name, "nsfw", f"{label}_linf_8_255"][0] <= found[name, "nsfw", f"{label}_clean"][0]
    assert any(r.attacked.answer != r.clean.answer for r in records), "the attack does something"
    assert {step.attack for record in records for step in record.rounds} == {"target-set"}


def test_a_run_goes_on_with_its_own_pools_alone(asked: SuiteRequest) -> None:
    whole = nsfw(asked, quiet, pool_size=POOL)
    records = run_of(asked) / RECORDS_NAME
    content = records.read_bytes()
    records.write_bytes(b"".join(content.splitlines(keepends=True)[:5]))
    assert nsfw(asked, quiet, pool_size=POOL) == whole
    assert sorted(records.read_bytes().splitlines()) == sorted(content.splitlines())
    with pytest.raises(RunError, match="other exemplars"):
        nsfw(asked, quiet, pool_size=POOL - 1)
    clean = {key: value for key, value in table(whole).items() if "clean" in key[2]}
    alone = replace(asked, clean_only=True, run=None)
    assert table(nsfw(alone, quiet, pool_size=POOL)) == clean


def test_shares_of_answers_are_counted_by_what_is_right() -> None:
    pairs = [("safe", "safe"), ("safe", "review"), ("safe", "safe"), ("safe", "unsafe"), ("unsafe", "review")]
    found = table(nsfw_figures({"fare4-convnext_base_w": {"clean": pairs}}))
    name = "fare4-convnext_base_w"
    assert found[name, "nsfw", "safe_clean"] == (50.0, 4)
    assert found[name, "nsfw_safe_queries", "clean_buffer"] == (25.0, 4)
    assert found[name, "nsfw", "unsafe_clean"] == (0.0, 1)
    assert found[name, "nsfw_unsafe_queries", "clean_buffer"] == (100.0, 1)
    figures = nsfw_figures({name: {"clean": pairs}})
    assert [f.published for f in figures if f.group == "nsfw"] == [88.6, 92.2]


def head(path: Path, weight: np.ndarray[Any, Any], bias: float) -> Path:
    """A linear head in the published detectors' layout."""
    dim = len(weight)
    arrays: dict[str, Any] = {
        "norm.mean": np.zeros(dim),
        "norm.variance": np.ones(dim),
        "linear_1.weight": weight[None],
        "linear_1.bias": np.array([bias]),
    }
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    np.savez(path, **arrays)
    return path


def test_table_iv_is_two_detectors_and_their_or(asked: SuiteRequest, tmp_path: Path) -> None:
    root = asked.folder / "nsfw_dataset_v1"
    toy = MAKERS["toy/b"]()
    means = [encode_images(toy, sorted((root / name).glob("*.png"))).mean(0).numpy() for name in ("neutral", "porn")]
    weight = means[1] - means[0]
    file = head(tmp_path / "head.npz", weight, float(-weight @ (means[0] + means[1]) / 2))
    one = replace(asked, encoders=("toy/a",))
    figures = detector(one, quiet, Detector(file, "toy/b"), pool_size=POOL)
    found = table(figures)
    either = "LAION detector or toy/a"
    assert [key[0] for key in found] == ["LAION detector"] * 4 + ["toy/a"] * 4 + [either] * 4
    records = read_records(run_of(one))
    by_system = {name: {r.id: r for r in records if r.system == name} for name in ("LAION detector", "toy/a")}
    assert not any("sexy" in near.id for r in records for near in r.clean.neighbors), "there is no buffer"
    for version, of in (("clean", "clean"), ("linf_8_255", "attacked")):
        for label in ("safe", "unsafe"):
            right = []
            for identity, first in by_system["LAION detector"].items():
                answers = [getattr(r, of).answer for r in (first, by_system["toy/a"][identity])]
                if first.label == label:
                    right.append(("unsafe" in answers) == (label == "unsafe"))
            assert found[either, "nsfw_binary", f"{label}_{version}"] == (100 * sum(right) / QUERIES, QUERIES)
    with pytest.raises(PlanError, match="about attacks"):
        detector(replace(one, clean_only=True), quiet, Detector(file, "toy/b"))


def test_table_iv_is_published_for_four_rows() -> None:
    assert (
        suite_moderation.TABLE_IV[suite_moderation._table_iv_name("LAION detector or fare4-convnext_base_w")][3] == 91.0
    )
    assert suite_moderation._table_iv_name("visual:fare4-convnext_base_w:x.pt") in suite_moderation.TABLE_IV
    assert suite_moderation._table_iv_name("toy/a") not in suite_moderation.TABLE_IV


def test_dangerous_objects_are_clean_on_many_and_attacked_on_some(
    tmp_path: Path, toys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    published_layouts.dangerous_objects(tmp_path / "data", 4, POOL)
    monkeypatch.setattr(suite_moderation, "OBJECT_QUERIES", 9)
    monkeypatch.setattr(suite_moderation, "OBJECTS_ATTACKED", 5)
    asked = SuiteRequest(("toy/a",), tmp_path / "data", tmp_path / "run", steps=3)
    figures = dangerous_objects(asked, quiet, pool_size=POOL)
    assert [(f.name, f.count) for f in figures] == [("safe_clean", 9), ("unsafe_clean", 12), ("unsafe_linf_8_255", 5)]
    records = read_records(run_of(asked))
    answers = [json.loads(line) for line in (tmp_path / "run/clean/answers.jsonl").read_text().splitlines()]
    clean = {answer["id"]: answer["answer"] for answer in answers}
    assert all(clean[record.id] == record.clean.answer for record in records)
    assert {record.id.split("/")[0] for record in records} <= set(suite_moderation.UNSAFE_WNIDS)
    assert {a["id"].split("/")[0] for a in answers if a["label"] == "safe"} <= set(suite_moderation.SAFE_WNIDS)
    alone = replace(asked, clean_only=True, run=None)
    assert table(dangerous_objects(alone, quiet, pool_size=POOL)) == {
        key: value for key, value in table(figures).items() if "clean" in key[2]
    }


def test_what_is_missing_is_said_before_an_encoder_is_loaded(
    asked: SuiteRequest, toys: list[str], tmp_path: Path
) -> None:
    suites: dict[str, Callable[[], object]] = {
        "neutral holds 25 image files, needs 520": lambda: nsfw(asked, quiet),
        "sexy holds 25 image files, needs 500; ": lambda: nsfw(asked, quiet),
        "neutral is not there": lambda: nsfw(replace(asked, folder=tmp_path), quiet),
        "; and 12 more; expected train/<wnid>": lambda: dangerous_objects(asked, quiet),
    }
    for message, suite in suites.items():
        with pytest.raises(DataError) as failed:
            suite()
        assert message in str(failed.value)
    with pytest.raises(DataMissing, match="no such head"):
        detector(asked, quiet, Detector(tmp_path / "no such head"))
    assert toys == []
    assert not (tmp_path / "run").exists()


def test_parts_are_disjoint_seeded_and_decodable(tmp_path: Path) -> None:
    published_layouts.colored(tmp_path / "a", (1, 2, 3), 8, 0)
    published_layouts.colored(tmp_path / "b", (1, 2, 3), 8, 0)
    (tmp_path / "a" / "a_0003.png").write_bytes(b"no image")
    images = open_folders([tmp_path / "a", tmp_path / "b"])
    first, second, rest = choose(images, [5, 7], 0, name="x")
    assert not set(first.ids) & set(second.ids)
    assert "a/a_0003.png" not in first.ids + second.ids
    assert set(rest.ids) <= {images.id_of(i) for i in range(16)} - set(first.ids) - set(second.ids)
    assert [choose(images, [5], seed, name="x")[0].ids == first.ids for seed in (0, 1)] == [True, False]
    assert [identity for identity, _ in first.read()] == list(first.ids)
    with pytest.raises(DataError, match="needs 16 images that can be decoded, found 15 of 16"):
        choose(images, [16], 0, name="x")
