"""Zero-shot classification under attack: classes of several sets, the decision, objectives, and a whole audit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offline.audit.figures import summarise
from offline.audit.plan import AuditPlan, plan_from_table
from offline.audit.record import Judgement, read_checks, read_records
from offline.audit.run import SystemAudit
from offline.audit.task import Item
from offline.audit.zero_shot import ZeroShotTask, open_zero_shot
from offline.errors import PlanError
from offline.objectives import CrossEntropy, Dlr, Margin
from perception import load_encoder
from perception.encoder import unit_embeddings
from perception.errors import NonFiniteEmbedding
from perception.testing import ToyEncoder
from perception.text import TextEncoder, class_embeddings
from tests.offline.data_layouts import folder, mosaic_zip
from tests.offline.test_audit_two_afc import WHITE

CLASSES = ("bee", "cat", "dog", "eel", "fox")


class Letters(nn.Module):
    """Text tower of a toy: a seeded vector for the sum of a prompt's letters, by position."""

    def __init__(self, dim: int, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, dim, generator=torch.Generator().manual_seed(seed)))

    def forward(self, tokens: Tensor) -> Tensor:
        return (tokens.float() / 100).sin() @ self.weight


def letters(prompts: list[str]) -> Tensor:
    return torch.tensor([[17 * ord(letter) for letter in prompt[-16:].rjust(16)] for prompt in prompts])


class ToyClip(ToyEncoder):
    """A toy with a text tower."""

    def __init__(self, text_seed: int = 0) -> None:
        super().__init__()
        self.text = TextEncoder(Letters(self.dim, text_seed), letters)


def plan(*queries: dict[str, Any], **values: Any) -> AuditPlan:
    table = {
        "task": "zero-shot",
        "system": [{"name": "toy", "encoder": "toy"}],
        "queries": list(queries),
        "threat": [{"norm": "linf", "eps": "2/255", "steps": 4}],
        "square_queries": 20,
    }
    return plan_from_table(table | values)


def images(root: Path, classes: tuple[str, ...] = CLASSES, count: int = 3) -> Path:
    return folder(root, [f"{name}/{n}.png" for n in range(count) for name in classes])


def random_task(count: int, classes: int = 6, seed: int = 0) -> tuple[ZeroShotTask, Tensor]:
    made = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=made)
    names = [f"class {i}" for i in range(classes)]
    items = [Item("s", str(i), names[label], WHITE) for i, label in enumerate(labels.tolist())]
    vectors = unit_embeddings(torch.randn(classes, 8, generator=made))
    embeddings = unit_embeddings(vectors[labels] + torch.randn(count, 8, generator=made))
    return ZeroShotTask(items, labels, names, vectors, {}), embeddings


def test_the_margin_is_of_the_logits() -> None:
    items = [Item("s", str(i), name, WHITE) for i, name in enumerate("abc")]
    task = ZeroShotTask(items, torch.tensor([0, 1, 2]), "abc", torch.eye(3), {})
    embedding = torch.tensor([[0.6, 0.8, 0.0]])
    judged = task.judge(torch.tensor([2, 1, 0]), embedding.expand(3, -1))
    assert [(j.answer, j.correct, round(j.scores["margin"], 4)) for j in judged] == [
        ("b", False, -80.0),
        ("b", True, 20.0),
        ("b", False, -20.0),
    ]
    assert [task.severity(row, j) for row, j in zip((2, 1, 0), judged, strict=True)] == [1.0, 0.0, 1.0]
    tie = torch.tensor([[1.0, 1.0, 0.0]]) / 2**0.5
    assert task.judge(torch.tensor([1]), tie) == [Judgement("a", False, {"margin": 0.0})]


def test_two_classes_of_one_name_are_told_by_their_index() -> None:
    items = [Item("s", "0", "crane", WHITE), Item("s", "1", "crane", WHITE)]
    task = ZeroShotTask(items, torch.tensor([0, 1]), ["crane", "crane"], torch.eye(2), {})
    judged = task.judge(torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert [(j.answer, j.correct, task.at_goal(row, j)) for row, j in enumerate(judged)] == [
        ("crane", True, False),
        ("crane", False, True),
    ]


def test_the_criterion_says_what_the_judge_says() -> None:
    task, embeddings = random_task(300)
    rows = torch.randperm(300, generator=torch.Generator().manual_seed(1))[:120]
    judged = task.judge(rows, embeddings[rows])
    wrong = task.criterion(rows)(embeddings[rows])
    assert [task.at_goal(row, j) for row, j in zip(rows.tolist(), judged, strict=True)] == wrong.tolist()
    assert [j.correct for j in judged] == (~wrong).tolist()
    assert {j.correct for j in judged} == {True, False}
    assert all((j.scores["margin"] > 0) == j.correct for j in judged)
    part = torch.tensor([7, 0, 3])
    assert task.criterion(rows).rows(part)(embeddings[rows][part]).tolist() == wrong[part].tolist()


@pytest.mark.parametrize(("attack", "kind"), [("apgd-ce", CrossEntropy), ("apgd-t", Dlr), ("square", Margin)])
def test_more_of_the_objective_is_less_of_the_right_class(attack: str, kind: type) -> None:
    task, embeddings = random_task(30)
    rows = torch.arange(30)
    objective = task.objective(attack, rows, embeddings)
    assert isinstance(objective, kind)
    classes = task.criterion(rows).class_embeddings
    assert classes is not None
    labels = torch.tensor([int(item.label.removeprefix("class ")) for item in task.items])
    right = classes[labels]
    for turn in range(1, len(classes)):
        other = classes[(labels + turn) % len(classes)].clone().requires_grad_(True)
        value = objective(other)
        assert bool((value > objective(right)).all())
        assert task.criterion(rows)(other).all()
        before, after = (task.judge(rows, e) for e in (right, other))
        assert all(a.scores["margin"] < 0 < b.scores["margin"] for a, b in zip(after, before, strict=True))
        value.sum().backward()
        assert other.grad is not None
        assert bool(torch.isfinite(other.grad).all())


def test_what_is_not_finite_or_not_known_is_refused() -> None:
    task, embeddings = random_task(3)
    embeddings[2, 0] = float("inf")
    with pytest.raises(NonFiniteEmbedding, match=r"\[2\]"):
        task.judge(torch.arange(3), embeddings)
    with pytest.raises(PlanError, match="'two-afc'"):
        task.objective("two-afc", torch.arange(3), embeddings)


def test_classes_of_several_sets_are_one_list(tmp_path: Path) -> None:
    images(tmp_path / "a", ("bee", "cat", "dog"))
    images(tmp_path / "b", ("dog", "Eel", "fox"))
    encoder = ToyClip()
    both = plan({"kind": "folder", "path": "a", "name": "a"}, {"kind": "folder", "path": "b", "name": "b"})
    task = open_zero_shot(both, encoder, tmp_path)
    assert [(i.set, i.id, i.label) for i in task.items] == [
        *(("a", f"{name}/{n}.png", name) for name in ("bee", "cat", "dog") for n in range(3)),
        *(("b", f"{name}/{n}.png", name) for name in ("Eel", "dog", "fox") for n in range(3)),
    ]
    words = ["bee", "cat", "dog", "Eel", "fox"]
    vectors = class_embeddings(encoder.text, words, ["a photo of a {}"])
    for row, item in enumerate(task.items):
        label = words.index(item.label)
        (judged,) = task.judge(torch.tensor([row]), vectors[label][None])
        others = [float(vectors[label] @ vectors[i]) for i in range(5) if i != label]
        assert judged.answer == item.label
        assert judged.scores["margin"] == pytest.approx(100 * (1 - max(others)), abs=1e-3)


def test_two_classes_of_one_name_in_a_mosaic(tmp_path: Path) -> None:
    birds = {"n01": ("crane", 2), "n02": ("crane, derrick", 2), "n03": ("owl", 1), "n04": ("emu", 1)}
    mosaic_zip(tmp_path / "birds.zip", birds)
    encoder = ToyClip()
    task = open_zero_shot(plan({"kind": "mosaic", "path": "birds.zip"}), encoder, tmp_path)
    assert [i.label for i in task.items] == ["crane", "crane", "crane (2)", "crane (2)", "owl", "emu"]
    crane = class_embeddings(encoder.text, ["crane"], ["a photo of a {}"]).clone()
    judged = task.judge(torch.arange(4), crane.expand(4, -1))
    assert [(j.answer, j.correct) for j in judged] == [("crane", True)] * 2 + [("crane", False)] * 2
    other = {"kind": "mosaic", "path": "other.zip", "name": "other"}
    mosaic_zip(tmp_path / "other.zip", {"n02": ("crane, derrick", 2), "n05": ("ant", 1)})
    with pytest.raises(PlanError, match="2 and 1 classes 'crane'"):
        open_zero_shot(plan({"kind": "mosaic", "path": "birds.zip"}, other), encoder, tmp_path)


def test_the_classifier_is_part_of_the_identity(tmp_path: Path) -> None:
    images(tmp_path / "a")
    asked = plan({"kind": "folder", "path": "a"})
    known = open_zero_shot(asked, ToyClip(), tmp_path).identity
    assert open_zero_shot(asked, ToyClip(), tmp_path).identity == known
    assert open_zero_shot(asked, ToyClip(text_seed=1), tmp_path).identity != known
    assert open_zero_shot(replace(asked, templates=("a {}",)), ToyClip(), tmp_path).identity != known


def test_what_cannot_be_classified_is_refused(tmp_path: Path) -> None:
    images(tmp_path / "a")
    with pytest.raises(PlanError, match=r"text tower, toy/0 has none"):
        open_zero_shot(plan({"kind": "folder", "path": "a"}), ToyEncoder(), tmp_path)
    images(tmp_path / "few", ("bee", "cat"))
    with pytest.raises(PlanError, match="at least 4 classes, got 2"):
        open_zero_shot(plan({"kind": "folder", "path": "few"}), ToyClip(), tmp_path)
    two = open_zero_shot(plan({"kind": "folder", "path": "few"}, attacks=["apgd-ce"]), ToyClip(), tmp_path)
    assert len(two.items) == 6
    folder(tmp_path / "a", ["loose.png"])
    with pytest.raises(PlanError, match=r"'loose\.png' of 'folder' has no class"):
        open_zero_shot(plan({"kind": "folder", "path": "a"}), ToyClip(), tmp_path)
    with pytest.raises(PlanError, match="at least 4 classes, got 0"):
        open_zero_shot(plan(ground_truth="x.json"), ToyClip(), tmp_path)


def test_an_audit_from_files_to_figures(tmp_path: Path) -> None:
    images(tmp_path / "a", count=6)
    encoder = ToyClip()
    asked = plan({"kind": "folder", "path": "a"}, batch=16, check_images=4)
    opened = open_zero_shot(asked, encoder, tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    *_, last = SystemAudit(asked, asked.systems[0], encoder, opened, run, tmp_path).run()
    records = read_records(run)
    assert last.done == len(records) == 30
    (row,) = summarise(asked, records, read_checks(run)).rows
    assert row.clean is not None
    assert row.robust is not None
    assert row.clean.right > 0
    assert row.robust.right <= row.after["apgd-t"].right <= row.after["apgd-ce"].right <= row.clean.right
    assert row.robust.right < row.clean.right
    for record in records:
        assert (record.clean.correct, record.winner == "none") in ((True, True), (True, False), (False, True))
        assert all(step.attack in ("apgd-ce", "apgd-t", "square") for step in record.rounds)


def test_a_real_text_tower(tmp_path: Path) -> None:
    images(tmp_path / "a", ("cat", "dog", "red_car", "tree"), count=1)
    encoder = load_encoder("bundled/clean")
    asked = plan({"kind": "folder", "path": "a"}, templates=["a photo of a {}", "{}"])
    task = open_zero_shot(asked, encoder, tmp_path)
    vectors = class_embeddings(encoder.text, ["cat", "dog", "red car", "tree"], asked.templates)
    judged = task.judge(torch.arange(4), vectors)
    assert [(j.answer, j.correct) for j in judged] == [(name, True) for name in ("cat", "dog", "red car", "tree")]
    pixels = torch.from_numpy(task.items[0].pixels)[None].float().div(255).requires_grad_(True)
    embeddings = encoder.encode(pixels)
    task.objective("apgd-ce", torch.tensor([0]), embeddings.detach())(embeddings).sum().backward()
    assert pixels.grad is not None
    assert float(pixels.grad.abs().sum()) > 0
