"""2AFC under attack: what is read, judged, attacked and recorded."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from offline.audit.embeddings import BATCH, encode_stream
from offline.audit.figures import summarise
from offline.audit.plan import AuditPlan, plan_from_table
from offline.audit.record import AuditRecord, Judgement, read_checks, read_records
from offline.audit.run import SystemAudit
from offline.audit.task import Item
from offline.audit.two_afc import TwoAfcTask, open_two_afc
from offline.errors import DataError, PlanError
from perception.encoder import unit_embeddings
from perception.errors import NonFiniteEmbedding
from perception.preprocess import to_pixels
from perception.testing import ToyEncoder, synthetic_image
from tests.offline.two_afc_layouts import Row, bapps, nights

WHITE = np.full((3, 2, 2), 255, dtype=np.uint8)


def plan(*queries: dict[str, Any], **values: Any) -> AuditPlan:
    table = {
        "task": "two-afc",
        "system": [{"name": "toy", "encoder": "toy"}],
        "queries": list(queries),
        "threat": [{"norm": "linf", "eps": "8/255", "steps": 5}],
        "square_queries": 20,
    }
    return plan_from_table(table | values)


def task(labels: list[str], left: Tensor, right: Tensor) -> TwoAfcTask:
    items = [Item("s", str(i), label, WHITE) for i, label in enumerate(labels)]
    return TwoAfcTask(items, left, right, {})


def random_task(count: int, seed: int = 0) -> tuple[TwoAfcTask, Tensor]:
    made = torch.Generator().manual_seed(seed)
    left, right, embeddings = (unit_embeddings(torch.randn(count, 5, generator=made)) for _ in range(3))
    labels = ["left" if bit else "right" for bit in (torch.rand(count, generator=made) < 0.5).tolist()]
    return task(labels, left, right), embeddings


def test_the_closer_candidate_is_chosen_and_a_tie_goes_to_the_left() -> None:
    u, v = [1.0, 0.0], [0.0, 1.0]
    judged = task(["left", "left", "right"], torch.tensor([u, v, v]), torch.tensor([v, u, v])).judge(
        torch.arange(3), torch.tensor([u, u, u])
    )
    assert judged == [
        Judgement("left", True, {"margin": 1.0}),
        Judgement("right", False, {"margin": -1.0}),
        Judgement("left", False, {"margin": 0.0}),
    ]


def test_the_criterion_says_what_the_judge_says() -> None:
    audited, embeddings = random_task(200)
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:90]
    judged = audited.judge(rows, embeddings[rows])
    wrong = audited.criterion(rows)(embeddings[rows])
    assert [audited.at_goal(row, j) for row, j in zip(rows.tolist(), judged, strict=True)] == wrong.tolist()
    assert {j.correct for j in judged} == {True, False}
    assert all(
        j.correct is (j.answer == audited.items[row].label) for row, j in zip(rows.tolist(), judged, strict=True)
    )
    assert all((j.scores["margin"] < 0) == (j.answer == "right") for j in judged)
    assert [audited.severity(row, j) for row, j in zip(rows.tolist(), judged, strict=True)] == wrong.float().tolist()
    part = torch.tensor([3, 0])
    assert audited.criterion(rows).rows(part)(embeddings[rows][part]).tolist() == wrong[part].tolist()


@pytest.mark.parametrize("attack", ["two-afc", "square"])
def test_more_of_the_objective_is_less_of_the_right_side(attack: str) -> None:
    audited, embeddings = random_task(40)
    rows = torch.arange(40)
    objective = audited.objective(attack, rows, embeddings)
    at = embeddings.clone().requires_grad_(True)
    before = objective(at)
    before.sum().backward()
    assert at.grad is not None
    moved = unit_embeddings(embeddings + 0.1 * at.grad)
    assert bool((objective(moved) > before).all())
    sign = [1 if item.label == "left" else -1 for item in audited.items]

    def right_by(embeddings: Tensor) -> list[float]:
        margins = [j.scores["margin"] for j in audited.judge(rows, embeddings)]
        return [s * margin for s, margin in zip(sign, margins, strict=True)]

    assert all(b > a for b, a in zip(right_by(embeddings), right_by(moved), strict=True))


def test_what_is_not_finite_or_not_known_is_refused() -> None:
    audited, embeddings = random_task(3)
    embeddings[1, 2] = float("nan")
    with pytest.raises(NonFiniteEmbedding, match=r"\[1\]"):
        audited.judge(torch.arange(3), embeddings)
    with pytest.raises(PlanError, match="'shift'"):
        audited.objective("shift", torch.arange(3), embeddings)


def test_nights_is_read_with_the_encoders_own_preprocessing(tmp_path: Path) -> None:
    nights(tmp_path / "nights", [Row(1, right=1), Row(2, right=0, imagenet=False)], size_px=(64, 32))
    for mode in ("shortest", "squash"):
        encoder = ToyEncoder()
        encoder.preprocess = replace(encoder.preprocess, resize_mode=mode)
        audited = open_two_afc(plan({"kind": "nights", "path": "nights"}), encoder, tmp_path)
        assert [(i.set, i.id, i.label) for i in audited.items] == [
            ("test_imagenet", "1", "right"),
            ("test_no_imagenet", "2", "left"),
        ]
        image = synthetic_image(1, (64, 32))
        resized = image.resize((32, 16) if mode == "shortest" else (16, 16), Image.Resampling.BICUBIC)
        expected = resized.crop((8, 0, 24, 16)) if mode == "shortest" else resized
        assert np.array_equal(audited.items[0].pixels, np.asarray(expected).transpose(2, 0, 1))
        candidates = [encoder.preprocess.apply(synthetic_image(n, (64, 32))) for n in (1, 101, 201)]
        reference, left, right = encoder.encode(to_pixels(candidates)).detach()
        (judged,) = audited.judge(torch.tensor([0]), reference[None])
        assert judged.scores["margin"] == pytest.approx(float(reference @ left - reference @ right), abs=1e-6)


def test_bapps_is_enlarged_bilinearly_whatever_the_encoder_does(tmp_path: Path) -> None:
    bapps(tmp_path / "bapps", [0.2, 0.8])
    encoder = ToyEncoder(size_px=96)
    encoder.preprocess = replace(encoder.preprocess, resize_px=128)
    audited = open_two_afc(plan({"kind": "bapps", "path": "bapps", "limit": 1}), encoder, tmp_path)
    assert [(i.set, i.id, i.label) for i in audited.items] == [
        (split, "000000", "left") for split in ("cnn", "color", "deblur", "frameinterp", "superres", "traditional")
    ]
    enlarged = synthetic_image(0, (64, 64)).resize((96, 96), Image.Resampling.BILINEAR)
    assert np.array_equal(audited.items[0].pixels, np.asarray(enlarged).transpose(2, 0, 1))


def test_bapps_images_that_are_not_square_are_refused(tmp_path: Path) -> None:
    bapps(tmp_path / "bapps", [0.2])
    path = tmp_path / "bapps/2afc/val/cnn/p0/000000.png"
    synthetic_image(1, (64, 60)).save(path)
    with pytest.raises(DataError, match="64 x 60 px"):
        open_two_afc(plan({"kind": "bapps", "path": "bapps"}), ToyEncoder(), tmp_path)


class Jittery(ToyEncoder):
    """Another last bit with every batch, as kernels have it for another size or place."""

    calls = 0

    def encode(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        return unit_embeddings(super().encode(pixels) + 1e-6 * self.calls)


def test_equal_candidates_tie_whatever_their_batch(tmp_path: Path) -> None:
    bapps(tmp_path / "bapps", [0.2, 0.8], equal=1)
    audited = open_two_afc(plan({"kind": "bapps", "path": "bapps"}), Jittery(), tmp_path)
    rows = torch.tensor([i for i, item in enumerate(audited.items) if item.id == "000001"])
    embeddings = unit_embeddings(torch.randn(len(rows), 16, generator=torch.Generator().manual_seed(0)))
    judged = audited.judge(rows, embeddings)
    assert [(j.answer, j.correct, j.scores["margin"]) for j in judged] == [("left", False, 0.0)] * 6


def test_names_of_sets_and_hash_of_the_triplets(tmp_path: Path) -> None:
    nights(tmp_path / "a", [Row(1, right=1), Row(2, right=0)])
    nights(tmp_path / "b", [Row(1, right=1), Row(2, right=1)])
    both = plan({"kind": "nights", "path": "a"}, {"kind": "nights", "path": "b", "name": "again"})
    audited = open_two_afc(both, ToyEncoder(), tmp_path)
    assert [i.set for i in audited.items] == ["test_imagenet"] * 2 + ["again/test_imagenet"] * 2
    alone = [open_two_afc(plan({"kind": "nights", "path": p}), ToyEncoder(), tmp_path).identity for p in "ab"]
    assert alone[0] != alone[1]
    assert open_two_afc(plan({"kind": "nights", "path": "a"}), ToyEncoder(), tmp_path).identity == alone[0]


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ({"kind": "folder", "path": "nights"}, "nights, bapps, got 'folder'"),
        ({"kind": "nights"}, "one path"),
        ({"kind": "nights", "path": ["nights", "nights"]}, "one path"),
        ({"kind": "nights", "path": "nights", "where": {"split": "val"}}, "no where"),
        ({"kind": "nights", "path": "nights", "class_names": "imagenet"}, "class_names"),
    ],
)
def test_plans_that_two_afc_does_not_have(tmp_path: Path, queries: dict[str, Any], message: str) -> None:
    nights(tmp_path / "nights", [Row(1, right=1)])
    with pytest.raises(PlanError, match=message):
        open_two_afc(plan(queries), ToyEncoder(), tmp_path)


def test_a_plan_without_queries_and_ids_that_are_not_unique(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"\[\[queries\]\]"):
        open_two_afc(plan(ground_truth="x.json"), ToyEncoder(), tmp_path)
    nights(tmp_path / "nights", [Row(1, right=1), Row(1, right=1)])
    with pytest.raises(DataError, match="same id"):
        open_two_afc(plan({"kind": "nights", "path": "nights"}), ToyEncoder(), tmp_path)


def test_a_stream_is_encoded_as_one_batch_is() -> None:
    encoder = ToyEncoder()
    images = [encoder.preprocess.apply(synthetic_image(n)) for n in range(BATCH + 3)]
    embeddings, digest = encode_stream(encoder, iter(images))
    assert torch.allclose(embeddings, encoder.encode(to_pixels(images)), atol=1e-6)
    assert not embeddings.is_inference()
    assert digest != encode_stream(encoder, iter(images[:-1]))[1]
    nothing, _ = encode_stream(encoder, iter(()))
    assert nothing.shape == (0, encoder.dim)


def test_an_audit_of_nights_from_files_to_figures(tmp_path: Path) -> None:
    nights(tmp_path / "nights", [Row(n, right=n % 2, imagenet=n % 3 > 0) for n in range(24)])
    asked = plan({"kind": "nights", "path": "nights"}, check_images=4, batch=8)
    encoder = ToyEncoder()
    audited = open_two_afc(asked, encoder, tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    *_, last = SystemAudit(asked, asked.systems[0], encoder, audited, run, tmp_path).run()
    records = read_records(run)
    assert (last.done, last.total) == (len(records), 24)
    assert all(AuditRecord.from_dict(json.loads(json.dumps(asdict(record)))) == record for record in records)
    assert all((record.clean.answer == record.label) is record.clean.correct for record in records)
    rows = summarise(asked, records, read_checks(run)).rows
    assert [(row.set, row.total) for row in rows] == [("", 24), ("test_imagenet", 16), ("test_no_imagenet", 8)]
    whole = rows[0]
    assert whole.clean is not None
    assert whole.robust is not None
    assert whole.clean.right > 0
    assert whole.robust.right < whole.clean.right
    for row in rows:
        assert row.clean is not None
        assert row.robust is not None
        assert row.robust.right <= row.after["two-afc"].right <= row.clean.right
