"""Retrieval under attack: average precisions of methods 6.4, what is left out, cropping, and a whole audit."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from offline.audit.figures import summarise
from offline.audit.plan import AuditPlan, plan_from_table
from offline.audit.record import read_checks, read_records
from offline.audit.retrieval import (
    AP,
    Question,
    RetrievalTask,
    SearchedGallery,
    Wanted,
    crop_to,
    open_retrieval,
)
from offline.audit.run import SystemAudit
from offline.audit.task import Item
from offline.errors import DataError, DataMissing, OfflineError, PlanError
from offline.objectives import EmbeddingShift
from perception.encoder import unit_embeddings
from perception.errors import NonFiniteEmbedding
from perception.preprocess import to_pixels
from perception.testing import ToyEncoder, encoded, synthetic_image
from tests.offline.data_layouts import folder, labelled_zip
from tests.offline.test_audit_two_afc import WHITE

# Methods 6.4: the ranking, without and with its junk.
RANKING = [7, 3, 5, 1, 9, 2, 0, 4, 6, 8]


def plan(**values: Any) -> AuditPlan:
    table = {
        "task": "retrieval",
        "system": [{"name": "toy", "encoder": "toy"}],
        "queries": [],
        "threat": [{"norm": "linf", "eps": "8/255", "steps": 5}],
        "square_queries": 20,
    }
    return plan_from_table(table | values)


def by_folder(gallery: str, queries: str, **values: Any) -> AuditPlan:
    return plan(gallery=[{"kind": "folder", "path": gallery}], queries=[{"kind": "folder", "path": queries}], **values)


def task_of(gallery: Tensor, questions: list[Question], *, measured_by: str = AP, neighbors: int = 3) -> RetrievalTask:
    items = [Item("s", str(i), "", WHITE) for i in range(len(questions))]
    rows = range(len(gallery))
    searched = SearchedGallery([f"g{i}" for i in rows], [f"pool{i % 2}" for i in rows], gallery, "hash")
    return RetrievalTask(items, questions, searched, measured_by=measured_by, neighbors=neighbors)


def ranked_as(ranking: list[int]) -> tuple[Tensor, Tensor]:
    """A query and a gallery of unit vectors that it ranks so."""
    angles = torch.empty(len(ranking))
    angles[torch.tensor(ranking)] = torch.arange(1, len(ranking) + 1) / 10
    return torch.tensor([[1.0, 0.0]]), torch.stack([angles.cos(), angles.sin()], dim=1)


def revisited(root: Path, gallery: int = 10, **gnd: Any) -> AuditPlan:
    """A revisited set of drawn images in `root`, with two queries of which the second has no positives."""
    images = [f"place_{n:03d}" for n in range(gallery)]
    queries = ["asked_000", "asked_001"]
    (root / "jpg").mkdir()
    for number, name in enumerate([*images, *queries]):
        (root / f"jpg/{name}.jpg").write_bytes(encoded(synthetic_image(number), "JPEG"))
    first = {"bbx": [4.0, 2.0, 30.4, 25.6], "easy": [1], "hard": [2, 3], "junk": [7, 9]} | gnd
    second = {"bbx": [-5.0, -5.0, 500.0, 500.0], "easy": [], "hard": [], "junk": [0]}
    truth = {"imlist": images, "qimlist": queries, "gnd": [first, second]}
    (root / "gnd_small.json").write_text(json.dumps(truth))
    return plan(ground_truth="gnd_small.json", image_folder="jpg")


def test_average_precisions_of_the_fact_sheet() -> None:
    query, gallery = ranked_as(RANKING)
    scores = {
        "ap_easy": Wanted(frozenset({1}), frozenset({7, 9, 2, 3})),
        "ap_medium": Wanted(frozenset({1, 2, 3}), frozenset({7, 9})),
        "ap_hard": Wanted(frozenset({2, 3}), frozenset({7, 9, 1})),
        "with_junk": Wanted(frozenset({1, 2, 3})),
        "nothing": Wanted(frozenset(), frozenset({4})),
    }
    task = task_of(gallery, [Question(scores)], measured_by="ap_medium", neighbors=4)
    (judged,) = task.judge(torch.tensor([0]), query)
    # Rank 1 of 5, 1; ranks 0, 2 and 3; ranks 0 and 2; ranks 1, 3 and 5.
    assert judged.scores == pytest.approx(
        {"ap_easy": (0 + 1 / 2) / 2, "ap_medium": 0.763889, "ap_hard": (2 + 1 / 2 + 2 / 3) / 4, "with_junk": 0.372222},
        abs=1e-6,
    )
    assert (judged.answer, judged.correct) == ("", None)
    assert [(n.id, n.pool) for n in judged.neighbors] == [
        ("g7", "pool1"),
        ("g3", "pool1"),
        ("g5", "pool1"),
        ("g1", "pool1"),
    ]
    assert [n.similarity for n in judged.neighbors] == pytest.approx(np.cos([0.1, 0.2, 0.3, 0.4]), abs=1e-6)
    assert task.severity(0, judged) == pytest.approx(1 - 0.763889, abs=1e-6)
    assert not task.at_goal(0, judged)
    assert task.criterion(torch.tensor([0])) is None


def _naive(similarities: list[float], classes: list[int], label: int, own: set[int]) -> float | None:
    """Average precision by its words: pairs of precision just before and at each positive, of what is left."""
    order = sorted((i for i in range(len(classes)) if i not in own), key=lambda i: (-similarities[i], i))
    positives = [i for i in order if classes[i] == label]
    total = 0.0
    for position, i in enumerate(order):
        if classes[i] == label:
            before = sum(classes[j] == label for j in order[:position])
            total += ((before / position if position else 1.0) + (before + 1) / (position + 1)) / 2
    return total / len(positives) if positives else None


def test_rankings_of_classes_agree_with_a_naive_twin() -> None:
    made = torch.Generator().manual_seed(0)
    gallery, embeddings = (unit_embeddings(torch.randn(n, 6, generator=made)) for n in (40, 25))
    gallery[7] = gallery[3]
    classes = torch.randint(0, 5, (40,), generator=made).tolist()
    labels = torch.randint(0, 6, (25,), generator=made).tolist()
    owns = [{i} if i % 3 == 0 else set() for i in range(25)]
    questions = [
        Question({AP: Wanted(frozenset(i for i, of in enumerate(classes) if of == y) - own, own)}, frozenset(own))
        for y, own in zip(labels, owns, strict=True)
    ]
    judged = task_of(gallery, questions, neighbors=50).judge(torch.arange(25), embeddings)
    similarities = (embeddings @ gallery.T).tolist()
    assert any(AP not in j.scores for j in judged)
    for i, one in enumerate(judged):
        expected = _naive(similarities[i], classes, labels[i], owns[i])
        assert one.scores == ({} if expected is None else {AP: pytest.approx(expected)})
        order = torch.tensor(similarities[i]).argsort(descending=True, stable=True).tolist()
        assert [n.id for n in one.neighbors] == [f"g{j}" for j in order if j not in owns[i]]


def test_a_query_with_nothing_to_find_is_left_alone() -> None:
    query, gallery = ranked_as(RANKING)
    task = task_of(gallery, [Question({AP: Wanted(frozenset())}), Question({AP: Wanted(frozenset({7}))})])
    nothing, found = task.judge(torch.tensor([0, 1]), query.expand(2, -1))
    assert nothing.scores == {}
    assert (task.severity(0, nothing), task.at_goal(0, nothing)) == (0.0, True)
    assert (found.scores, task.severity(1, found), task.at_goal(1, found)) == ({AP: 1.0}, 0.0, False)
    with pytest.raises(DataError, match="none of 1 queries"):
        task_of(gallery, [Question({AP: Wanted(frozenset())})])


@pytest.mark.parametrize("attack", ["shift", "square"])
def test_the_farthest_embedding_has_the_worst_ranking(attack: str) -> None:
    made = torch.Generator().manual_seed(1)
    gallery = unit_embeddings(torch.randn(30, 8, generator=made))
    clean = unit_embeddings(gallery[:5] + 0.1 * torch.randn(5, 8, generator=made))
    task = task_of(gallery, [Question({AP: Wanted(frozenset({i}))}) for i in range(5)])
    objective = task.objective(attack, torch.arange(5), clean)
    assert isinstance(objective, EmbeddingShift)
    assert objective.needs_random_start
    assert objective(-clean).tolist() == pytest.approx([4.0] * 5)
    before, after = (task.judge(torch.arange(5), e) for e in (clean, -clean))
    assert [j.scores[AP] for j in before] == [1.0] * 5
    assert all(j.scores[AP] < 0.05 for j in after)
    assert all(task.severity(i, a) > task.severity(i, b) for i, (a, b) in enumerate(zip(after, before, strict=True)))


def test_what_is_not_finite_or_not_known_is_refused() -> None:
    query, gallery = ranked_as(RANKING)
    task = task_of(gallery, [Question({AP: Wanted(frozenset({7}))})])
    with pytest.raises(NonFiniteEmbedding, match=r"\[0\]"):
        task.judge(torch.tensor([0]), query * float("nan"))
    with pytest.raises(PlanError, match="'apgd-ce'"):
        task.objective("apgd-ce", torch.tensor([0]), query)


def test_the_same_image_is_left_out_and_a_copy_is_not(tmp_path: Path) -> None:
    files = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    folder(tmp_path / "a", files)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    encoder = ToyEncoder()
    for queries, others in (("a", 3), ("copy/../a", 3), ("copy", 4)):
        task = open_retrieval(by_folder("a", queries, neighbors=9), encoder, tmp_path)
        assert [(i.set, i.id, i.label) for i in task.items] == [
            ("folder", name, name.partition("/")[0]) for name in files
        ]
        embeddings = encoder.encode(to_pixels([i.pixels for i in task.items])).detach()
        for item, judged in zip(task.items, task.judge(torch.arange(4), embeddings), strict=True):
            assert len(judged.neighbors) == others
            assert (item.id in {n.id for n in judged.neighbors}) is (others == 4)
            assert {n.pool for n in judged.neighbors} == {"cat", "dog"}
            i, own = files.index(item.id), {files.index(item.id)} if others == 3 else set()
            similarities = (embeddings[i] @ embeddings.T).tolist()
            assert judged.scores[AP] == pytest.approx(_naive(similarities, [0, 0, 1, 1], i // 2, own))


def test_rows_of_one_archive_are_queries_and_gallery(tmp_path: Path) -> None:
    rows = [{"file": f"{n}.png", "class": "cat" if n % 2 else "dog", "split": "ab"[n % 3 > 0]} for n in range(12)]
    labelled_zip(tmp_path / "x.zip", rows)
    source = {"kind": "labelled-zip", "path": "x.zip"}
    asked = plan(
        gallery=[source | {"name": "one"}, source | {"name": "two", "where": {"split": "b"}}],
        queries=[source | {"where": {"split": "a"}, "name": "q"}],
        neighbors=99,
    )
    encoder = ToyEncoder()
    task = open_retrieval(asked, encoder, tmp_path)
    embeddings = encoder.encode(to_pixels([i.pixels for i in task.items])).detach()
    for item, judged in zip(task.items, task.judge(torch.arange(len(task.items)), embeddings), strict=True):
        ids = [n.id for n in judged.neighbors]
        assert len(ids) == 12 + 8 - 1
        assert f"one/{item.id}" not in ids
        assert {i.partition("/")[0] for i in ids} == {"one", "two"}
    twice = plan(gallery=[source, source], queries=[source | {"name": "q"}])
    with pytest.raises(PlanError, match="different names"):
        open_retrieval(twice, encoder, tmp_path)


def test_the_hash_is_of_the_gallery(tmp_path: Path) -> None:
    folder(tmp_path / "a", ["cat/0.png", "cat/1.png", "dog/0.png"])
    known = open_retrieval(by_folder("a", "a"), ToyEncoder(), tmp_path).identity
    assert open_retrieval(by_folder("a", "a"), ToyEncoder(), tmp_path).identity == known
    (tmp_path / "a/dog/0.png").write_bytes(encoded(synthetic_image(99)))
    assert open_retrieval(by_folder("a", "a"), ToyEncoder(), tmp_path).identity != known


def test_a_revisited_set_from_files_to_scores(tmp_path: Path) -> None:
    asked = revisited(tmp_path)
    encoder = ToyEncoder()
    task = open_retrieval(asked, encoder, tmp_path)
    assert [(i.set, i.id, i.label) for i in task.items] == [
        ("gnd_small", "asked_000", ""),
        ("gnd_small", "asked_001", ""),
    ]
    embeddings = encoder.encode(to_pixels([i.pixels for i in task.items])).detach()
    first, second = task.judge(torch.arange(2), embeddings)
    assert set(first.scores) == {"ap_easy", "ap_medium", "ap_hard"}
    assert second.scores == {}
    assert task.at_goal(1, second)
    assert {n.pool for n in first.neighbors} == {"gallery"}
    photos = [Image.open(tmp_path / f"jpg/place_{n:03d}.jpg").convert("RGB") for n in range(10)]
    gallery = encoder.encode(to_pixels([encoder.preprocess.apply(p) for p in photos])).detach()
    nearest = (gallery @ embeddings[0]).argsort(descending=True)
    assert [n.id for n in first.neighbors] == [f"place_{i:03d}" for i in nearest[:5].tolist()]


@pytest.mark.parametrize("crop", [True, False])
def test_queries_are_cropped_to_their_boxes(tmp_path: Path, crop: bool) -> None:
    asked = revisited(tmp_path)
    asked = plan(ground_truth=asked.ground_truth, image_folder="jpg", crop_queries=crop)
    encoder = ToyEncoder()
    first, second = open_retrieval(asked, encoder, tmp_path).items
    for item, box in ((first, (4, 2, 30, 26)), (second, (0, 0, 48, 40))):
        photo = Image.open(tmp_path / f"jpg/{item.id}.jpg").convert("RGB")
        shown = photo.crop(box) if crop else photo
        assert np.array_equal(item.pixels, encoder.preprocess.apply(shown))


def test_a_box_beside_the_image_is_refused() -> None:
    image = synthetic_image(0)
    assert crop_to(image, (-3.0, 10.4, 100.0, 20.6), "x").size == (48, 11)
    with pytest.raises(DataError, match="holds no pixel of an image of 48 x 40 px"):
        crop_to(image, (48.0, 0.0, 60.0, 10.0), "x")


def _second_query_like_the_first(truth: dict[str, Any]) -> None:
    truth["qimlist"][1] = truth["qimlist"][0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t["imlist"].append("place_099"), DataError, r"1 of 13 files are missing, e\.g\. .*place_099\.jpg"),
        (lambda t: t["imlist"].append("../secret"), DataError, r"'\.\./secret\.jpg', which is not below"),
        (_second_query_like_the_first, DataError, "two queries have the same name"),
        (lambda t: t.pop("gnd"), DataError, "is no ground truth"),
        (lambda t: t["gnd"].pop(0) and t["qimlist"].pop(0), DataError, "none of 1 queries"),
        (lambda t: t["gnd"][0].update(bbx=[900, 900, 901, 901]), DataError, "holds no pixel"),
    ],
)
def test_a_damaged_revisited_set_is_named(tmp_path: Path, change: Any, error: type[OfflineError], message: str) -> None:
    asked = revisited(tmp_path)
    path = tmp_path / "gnd_small.json"
    truth = json.loads(path.read_text())
    change(truth)
    path.write_text(json.dumps(truth))
    with pytest.raises(error, match=message):
        open_retrieval(asked, ToyEncoder(), tmp_path)


def test_plans_that_retrieval_does_not_have(tmp_path: Path) -> None:
    folder(tmp_path / "a", ["cat/0.png", "cat/1.png", "loose.png"])
    some = [{"kind": "folder", "path": "a"}]
    for values in (
        {"queries": some},
        {"queries": some, "gallery": some, "image_folder": "jpg"},
        {"ground_truth": "x.json", "image_folder": "jpg", "queries": some},
        {"ground_truth": "x.json", "image_folder": "jpg", "gallery": some},
        {"ground_truth": "x.json"},
    ):
        with pytest.raises(PlanError, match="retrieval"):
            open_retrieval(plan(**values), ToyEncoder(), tmp_path)
    with pytest.raises(DataMissing, match=r"x\.json"):
        open_retrieval(plan(ground_truth="x.json", image_folder="jpg"), ToyEncoder(), tmp_path)
    with pytest.raises(PlanError, match=r"'loose\.png' of 'folder' has no class"):
        open_retrieval(by_folder("a", "a"), ToyEncoder(), tmp_path)


def test_an_image_without_a_class_is_a_distractor(tmp_path: Path) -> None:
    folder(tmp_path / "a", ["cat/0.png", "cat/1.png", "loose.png"])
    folder(tmp_path / "q", ["cat/7.png"])
    encoder = ToyEncoder()
    task = open_retrieval(by_folder("a", "q"), encoder, tmp_path)
    (judged,) = task.judge(torch.tensor([0]), encoder.encode(to_pixels([task.items[0].pixels])))
    assert {(n.id, n.pool) for n in judged.neighbors} == {
        ("cat/0.png", "cat"),
        ("cat/1.png", "cat"),
        ("loose.png", "gallery"),
    }


def test_an_audit_from_files_to_figures(tmp_path: Path) -> None:
    folder(tmp_path / "a", [f"{name}/{n}.png" for n in range(5) for name in ("cat", "dog", "eel")])
    asked = by_folder("a", "a", batch=8, check_images=4)
    encoder = ToyEncoder()
    task = open_retrieval(asked, encoder, tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    *_, last = SystemAudit(asked, asked.systems[0], encoder, task, run, tmp_path).run()
    records = read_records(run)
    assert last.done == len(records) == 15
    assert all(record.robust is None for record in records)
    assert all(record.attacked.scores[AP] <= record.clean.scores[AP] for record in records)
    (row,) = summarise(asked, records, read_checks(run)).rows
    assert row.means[AP]["attacked"].value < row.means[AP]["clean"].value


def test_a_revisited_audit_counts_the_queries_that_can_be_answered(tmp_path: Path) -> None:
    asked = revisited(tmp_path)
    encoder = ToyEncoder()
    run = tmp_path / "run"
    run.mkdir()
    list(SystemAudit(asked, asked.systems[0], encoder, open_retrieval(asked, encoder, tmp_path), run, tmp_path).run())
    (row,) = summarise(asked, read_records(run), read_checks(run)).rows
    assert {name: means["clean"].total for name, means in row.means.items()} == {
        "ap_easy": 1,
        "ap_hard": 1,
        "ap_medium": 1,
    }
    assert row.means["ap_medium"]["attacked"].value <= row.means["ap_medium"]["clean"].value
