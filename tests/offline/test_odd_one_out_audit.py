"""Odd-one-out under attack: who is perturbed, what is judged, raised and recorded, and an audit from its files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offline.audit.figures import summarise
from offline.audit.odd_one_out import OddOneOutTask, Triples, open_odd_one_out
from offline.audit.plan import AuditPlan, plan_from_table
from offline.audit.record import Judgement, read_checks, read_records
from offline.audit.report import write_report
from offline.audit.run import SystemAudit, run_audit
from offline.audit.task import Item
from offline.errors import DataError, PlanError
from perception.encoder import unit_embeddings
from perception.errors import NonFiniteEmbedding
from perception.testing import ToyEncoder, synthetic_image
from tests.offline.things_revisited_layouts import dreamsim_things, things

ROWS = [[1, 2, 3, 3], [6, 4, 2, 1], [5, 6, 1, 2], [2, 3, 4, 1]]
WHITE = np.full((3, 2, 2), 255, dtype=np.uint8)


def plan(*queries: dict[str, Any], **values: Any) -> AuditPlan:
    table = {
        "task": "odd-one-out",
        "system": [{"name": "toy", "encoder": "toy"}],
        "queries": list(queries) or [{"kind": "things", "path": "t"}],
        "threat": [{"norm": "linf", "eps": "8/255", "steps": 5}],
        "square_queries": 20,
    }
    return plan_from_table(table | values)


def random_task(count: int, images: int = 30) -> tuple[OddOneOutTask, Tensor, Tensor]:
    """A task, its table of embeddings, and those of the perturbed images."""
    made = torch.Generator().manual_seed(0)
    embeddings = unit_embeddings(torch.randn(images, 5, generator=made))
    triplets = torch.stack([torch.randperm(images, generator=made)[:3] for _ in range(count)])
    odd = torch.randint(3, (count,), generator=made)
    items = [Item("s", str(i), str(place + 1), WHITE) for i, place in enumerate(odd.tolist())]
    task = OddOneOutTask(items, embeddings, triplets, odd, {})
    perturbed = triplets[torch.arange(count), torch.where(odd == 0, 1, 0)]
    return task, embeddings, embeddings[perturbed]


def test_similarities_stand_by_the_image_that_their_pair_leaves_out() -> None:
    table = unit_embeddings(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]))
    triplets = torch.tensor([[0, 1, 2]] * 3)
    triples = Triples.of(table, triplets, torch.tensor([0, 1, 2]))
    assert triples.perturbed.tolist() == [1, 0, 0]  # the first that is not odd
    gram = table @ table.T
    expected = torch.stack([gram[1, 2], gram[0, 2], gram[0, 1]])
    assert torch.allclose(triples.similarities(table[[1, 0, 0]]), expected.expand(3, 3))


def test_judge_criterion_and_objective_agree_with_a_naive_twin() -> None:
    task, table, embeddings = random_task(200)
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:90]
    judged = task.judge(rows, embeddings[rows])
    wrong = task.criterion(rows)(embeddings[rows])
    losses = task.objective("odd-one-out", rows, embeddings[rows])(embeddings[rows])
    for place, row in enumerate(rows.tolist()):
        i, j, k = table[task._triplets[row]].double()
        similarities = [float(j @ k), float(i @ k), float(i @ j)]
        human = int(task.items[row].label) - 1
        chosen = int(np.argmax(similarities))
        assert judged[place].answer == str(chosen + 1)
        assert judged[place].correct is (chosen == human)
        others = [s for place, s in enumerate(similarities) if place != human]
        assert judged[place].scores["margin"] == pytest.approx(similarities[human] - max(others), abs=1e-6)
        assert float(losses[place]) == pytest.approx(np.log(np.exp(similarities).sum()) - similarities[human], abs=1e-5)
        assert bool(wrong[place]) is task.at_goal(row, judged[place]) is (chosen != human)
        assert task.severity(row, judged[place]) == float(chosen != human)
    part = torch.tensor([3, 0])
    assert task.criterion(rows).rows(part)(embeddings[rows][part]).tolist() == wrong[part].tolist()
    objective = task.objective("square", rows, embeddings[rows]).rows(part)
    assert objective(embeddings[rows][part]).tolist() == pytest.approx(losses[part].tolist())
    assert {j.correct for j in judged} == {True, False}


def test_more_of_the_objective_is_less_of_peoples_choice() -> None:
    task, _, embeddings = random_task(40)
    rows = torch.arange(40)
    at = embeddings.clone().requires_grad_(True)
    before = task.objective("odd-one-out", rows, embeddings)(at)
    before.sum().backward()
    assert at.grad is not None
    moved = unit_embeddings(embeddings + 0.05 * at.grad)
    assert bool((task.objective("odd-one-out", rows, embeddings)(moved) > before).all())


def test_ties_go_to_the_first_image_as_in_the_rule() -> None:
    table = torch.tensor([[1.0, 0.0]] * 3)
    items = [Item("s", str(i), label, WHITE) for i, label in enumerate("123")]
    task = OddOneOutTask(items, table, torch.tensor([[0, 1, 2]] * 3), torch.tensor([0, 1, 2]), {})
    judged = task.judge(torch.arange(3), table)
    assert judged == [Judgement("1", place == 0, {"margin": 0.0}) for place in range(3)]


def test_what_is_not_finite_or_not_known_is_refused() -> None:
    task, _, embeddings = random_task(3)
    embeddings[1, 2] = float("nan")
    with pytest.raises(NonFiniteEmbedding, match=r"\[1\]"):
        task.judge(torch.arange(3), embeddings)
    with pytest.raises(PlanError, match="'shift'"):
        task.objective("shift", torch.arange(3), embeddings)


def test_the_first_image_of_peoples_pair_is_perturbed(tmp_path: Path) -> None:
    things(tmp_path / "t", 6, ROWS)
    encoder = ToyEncoder()
    task = open_odd_one_out(plan(), encoder, tmp_path)
    assert [(item.set, item.id, item.label) for item in task.items] == [
        ("things", str(number), str(row[3])) for number, row in enumerate(ROWS, 1)
    ]
    from offline.data.files import read_image_file
    from tests.offline.things_revisited_layouts import concept

    for item, image in zip(task.items, (1, 4, 5, 3), strict=True):
        expected = encoder.preprocess.apply(read_image_file(tmp_path / "t/Images" / concept(image)))
        assert np.array_equal(item.pixels, expected)


def test_dreamsims_list_and_the_first_of_the_table(tmp_path: Path) -> None:
    dreamsim_things(tmp_path / "d", [("a", "b", "c"), ("c", "b", "a")])
    asked = plan({"kind": "things-dreamsim", "path": "d", "name": "valset"})
    task = open_odd_one_out(asked, ToyEncoder(), tmp_path)
    assert [(item.set, item.id, item.label) for item in task.items] == [("valset", "1", "3"), ("valset", "2", "3")]
    things(tmp_path / "t", 6, ROWS)
    of_all = open_odd_one_out(plan(), ToyEncoder(), tmp_path)
    some = open_odd_one_out(plan({"kind": "things", "path": "t", "limit": 3}), ToyEncoder(), tmp_path)
    assert [item.id for item in some.items] == ["1", "2", "3"]
    assert of_all.identity != some.identity


@pytest.mark.parametrize(
    "queries",
    [
        [{"kind": "folder", "path": "t"}],
        [{"kind": "things"}],
        [{"kind": "things", "path": ["t", "t"]}],
        [{"kind": "things", "path": "t", "where": {"a": "b"}}],
        [{"kind": "things", "path": "t"}, {"kind": "things", "path": "t", "name": "again"}],
    ],
)
def test_plans_that_it_does_not_have(tmp_path: Path, queries: list[dict[str, Any]]) -> None:
    things(tmp_path / "t", 6, ROWS)
    with pytest.raises(PlanError, match="'things' or 'things-dreamsim'"):
        open_odd_one_out(plan(*queries), ToyEncoder(), tmp_path)


def test_encoders_that_compare_by_distance_and_absent_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not there; expected"):
        open_odd_one_out(plan(), ToyEncoder(), tmp_path)
    things(tmp_path / "t", 6, ROWS)
    encoder = ToyEncoder()
    encoder.metric = "l2"  # type: ignore[assignment]
    with pytest.raises(PlanError, match="by distance"):
        open_odd_one_out(plan(), encoder, tmp_path)
    with pytest.raises(PlanError, match="attacks of task"):
        plan(attacks=["two-afc"])


def human(encoder: ToyEncoder, concepts: int, count: int) -> list[list[int]]:
    """Rows whose choice is the encoder's own for most, and not for every fifth."""
    from offline.data.examples import first_view
    from perception.preprocess import to_pixels
    from perception.testing import encoded

    drawn = [first_view(encoded(synthetic_image(n), "JPEG", quality=95)) for n in range(1, concepts + 1)]
    table = encoder.encode(to_pixels([encoder.preprocess.apply(image) for image in drawn])).detach()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        i, j, k = rng.permutation(concepts)[:3].tolist()
        similarities = [table[j] @ table[k], table[i] @ table[k], table[i] @ table[j]]
        odd = int(np.argmax([float(s) for s in similarities]))
        rows.append([i + 1, j + 1, k + 1, (odd + (number % 5 == 4)) % 3 + 1])
    return rows


def test_an_audit_from_files_to_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    things(tmp_path / "t", 12, human(ToyEncoder(), 12, 20))
    asked = plan(check_images=4, batch=8)
    monkeypatch.setattr("perception.catalogue.load_encoder", lambda *_, **__: ToyEncoder())
    run = tmp_path / "run"
    *_, last = run_audit(asked, data=tmp_path, folder=tmp_path, run=run)
    records = read_records(run)
    assert (last.done, last.total, last.clean) == (20, 20, 16)
    (row,) = [row for row in summarise(asked, records, read_checks(run)).rows if not row.set]
    assert row.clean is not None
    assert row.robust is not None
    assert row.clean.right == 16
    assert row.robust.right < 16
    assert row.after["odd-one-out"].right >= row.robust.right
    write_report(run)
    assert "odd one out" in (run / "report.html").read_text()
    before = (run / "records.jsonl").read_bytes()
    cut = before[: before.rindex(b"\n", 0, -1) - 20]
    (run / "records.jsonl").write_bytes(cut)
    list(run_audit(asked, data=tmp_path, folder=tmp_path, run=run))
    assert (run / "records.jsonl").read_bytes() == before
    assert json.loads(before.splitlines()[0])["label"] in "123"


def test_the_perturbation_is_what_fools(tmp_path: Path) -> None:
    """A radius of nearly 0 leaves the clean answers, and one of 1 leaves none that the pictures can change."""
    things(tmp_path / "t", 12, human(ToyEncoder(), 12, 20))
    found = {}
    for eps in (1e-9, 0.5):
        asked = plan(check_images=2)
        asked = replace(asked, threats=(replace(asked.threats[0], eps=eps, steps=20, square_queries=0),))
        run = tmp_path / f"run{eps}"
        run.mkdir()
        encoder = ToyEncoder()
        task = open_odd_one_out(asked, encoder, tmp_path)
        *_, last = SystemAudit(asked, asked.systems[0], encoder, task, run, tmp_path).run()
        found[eps] = last.robust
    assert found == {1e-9: 16, 0.5: 0}
