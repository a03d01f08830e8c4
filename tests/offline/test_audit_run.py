"""The audit's runner and its moderation task, on small folders of images with the toy encoder."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from offline.audit.moderation import HeadDecider, ModerationTask, PoolsDecider, open_moderation
from offline.audit.plan import AuditPlan, plan_from_table
from offline.audit.record import AuditRecord, Judgement, Setting, read_checks, read_records
from offline.audit.run import SystemAudit, run_audit
from offline.audit.task import Item
from offline.errors import PlanError, RunError
from offline.jsonlines import JsonLines
from offline.runs import read_events
from perception.encoder import encode_images
from perception.errors import FingerprintMismatch, NonFiniteEmbedding
from perception.gallery import Gallery
from perception.heads import DetectorHead
from perception.preprocess import to_pixels
from perception.testing import ToyEncoder
from perception.verdict import DecisionPolicy, Neighbor, PoolLabel, VerdictLabel

COLORS = {"safe": (70, 130, 70), "buffer": (128, 128, 90), "unsafe": (170, 90, 90)}


def draw(folder: Path, label: str, count: int, seed: int) -> list[str]:
    """Noisy images around a label's colour."""
    (folder / label).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    names = []
    for i in range(count):
        pixels = np.array(COLORS[label]) + rng.normal(0, 40, (16, 16, 3))
        names.append(f"{label}/{seed}-{i}.png")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / names[-1])
    return names


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """queries/, targets/ and pools/, each with a folder a label."""
    root = tmp_path_factory.mktemp("data")
    for i, (name, count) in enumerate((("queries", 5), ("targets", 4), ("pools", 8))):
        for label in COLORS if name == "pools" else ("safe", "unsafe"):
            draw(root / name, label, count, seed=10 * i)
    return root


def pools(data: Path, encoder: ToyEncoder, path: Path) -> Gallery:
    """Export of pools of the images in pools/."""
    names = sorted(str(p.relative_to(data / "pools")) for p in (data / "pools").rglob("*.png"))
    embeddings = encode_images(encoder, [data / "pools" / name for name in names]).numpy()
    gallery = Gallery(tuple(names), tuple(name.split("/")[0] for name in names), embeddings, encoder.fingerprint)
    gallery.save(path)
    return gallery


TABLE: dict[str, Any] = {
    "task": "moderation",
    "batch": 3,
    "square_queries": 8,
    "check_images": 4,
    "system": [{"name": "toy", "encoder": "toy/0", "gallery": "pools.safetensors"}],
    "targets": [{"kind": "folder", "path": f"targets/{x}", "label": x} for x in ("safe", "unsafe")],
    "queries": [{"kind": "folder", "path": f"queries/{x}", "label": x} for x in ("safe", "unsafe")],
    "threat": [{"norm": "linf", "eps": ["3/255", 0.2], "steps": 6}],
}


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a plan would lie: holds the pools of toy/0."""
    path = tmp_path_factory.mktemp("plan")
    pools(data, ToyEncoder(), path / "pools.safetensors")
    return path


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_encoder('toy/N')` gives the toy encoder of seed N."""

    def load(name: str, **_: Any) -> ToyEncoder:
        return ToyEncoder(seed=int(name.split("/")[1]))

    monkeypatch.setattr("perception.catalogue.load_encoder", load)


def plan(**changes: Any) -> AuditPlan:
    return plan_from_table({**TABLE, **changes})


def audit(plan: AuditPlan, data: Path, folder: Path, run: Path) -> list[AuditRecord]:
    list(run_audit(plan, data=data, folder=folder, run=run))
    return read_records(run)


@pytest.mark.usefixtures("toys")
def test_records_are_what_a_naive_auditor_finds(data: Path, folder: Path, tmp_path: Path) -> None:
    records = audit(plan(examples=10), data, folder, tmp_path)
    assert len(records) == 2 * 10
    encoder, gallery = ToyEncoder(), Gallery.load(folder / "pools.safetensors")

    def verdict(pixels: np.ndarray[Any, Any]) -> str:
        with torch.no_grad():
            [embedding] = encoder.encode(to_pixels([pixels]))
        near = [
            Neighbor(i, label, float(torch.from_numpy(e.copy()) @ embedding))
            for i, label, e in zip(gallery.ids, gallery.labels, gallery.embeddings, strict=True)
        ]
        return str(DecisionPolicy().decide(near).label)

    for record in records:
        image = Image.open(data / "queries" / record.set / record.id).convert("RGB")
        pixels = np.asarray(image).transpose(2, 0, 1)
        assert record.clean.answer == verdict(pixels)
        assert record.clean.correct == (record.clean.answer == record.label)
        assert record.distance <= record.eps + 1e-6
        if record.example:
            kept = np.asarray(Image.open(tmp_path / "examples" / f"{record.example}-attacked.png")).transpose(2, 0, 1)
            assert record.rounded.answer == verdict(kept)
            assert abs(kept.astype(int) - pixels).max() <= record.eps * 255 + 0.5 + 1e-6
        names = [r.attack for r in record.rounds]
        assert names == ["target-set", "white-box", "square"][: len(names)]
        assert [r.reached for r in record.rounds[:-1]] == [False] * (len(names) - 1)
        assert bool(record.rounds) == (record.clean.answer in (record.label, "review"))
    assert sum(bool(r.example) for r in records) == 10  # under the first setting alone
    wide = [r for r in records if r.eps == 0.2]
    assert any(r.clean.correct and not r.robust for r in wide)
    assert {len(r.rounds) for r in records} - {0, 1}, "some images should resist the first attack"


@pytest.mark.usefixtures("toys")
def test_an_audit_killed_at_any_moment_ends_with_the_same_bytes(data: Path, folder: Path, tmp_path: Path) -> None:
    audit(plan(), data, folder, tmp_path / "whole")
    content = (tmp_path / "whole/records.jsonl").read_bytes()
    checks = (tmp_path / "whole/checks.jsonl").read_bytes()
    lines = content.splitlines(keepends=True)
    cuts = (0, 10, len(lines[0]), sum(map(len, lines[:4])), sum(map(len, lines[:11])) + 7, len(content) - 1)
    for cut in cuts:
        run = tmp_path / f"cut{cut}"
        for _ in zip(range(2), run_audit(plan(), data=data, folder=folder, run=run), strict=False):
            pass
        (run / "records.jsonl").write_bytes(content[:cut])
        audit(plan(), data, folder, run)
        assert (run / "records.jsonl").read_bytes() == content
        assert (run / "checks.jsonl").read_bytes() == checks


_JOB = """
import sys, tomllib, json
from pathlib import Path
import perception.catalogue
from perception.testing import ToyEncoder
perception.catalogue.load_encoder = lambda name, **_: ToyEncoder(seed=int(name.split("/")[1]))
from offline.audit.plan import plan_from_table
from offline.audit.run import run_audit
table, data, folder, run = json.loads(sys.argv[1]), *map(Path, sys.argv[2:5])
for now in run_audit(plan_from_table(table), data=data, folder=folder, run=run):
    print(now.done, flush=True)
"""


def test_an_audit_that_is_shot_goes_on(data: Path, folder: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a batch, in a process of its own."""
    table = {**TABLE, "threat": [{"norm": "l2", "eps": 20.0, "steps": 40}]}

    def start(run: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _JOB, json.dumps(table), *map(str, (data, folder, run))]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    with start(tmp_path / "whole") as whole:
        whole.communicate()
    with start(tmp_path / "shot") as shot:
        assert shot.stdout is not None
        assert [shot.stdout.readline() for _ in range(3)]
        shot.send_signal(signal.SIGKILL)
    with start(tmp_path / "shot") as again:
        again.communicate()
    assert again.returncode == 0
    for name in ("records.jsonl", "checks.jsonl"):
        assert (tmp_path / "shot" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(read_records(tmp_path / "shot")) == 10


@pytest.mark.usefixtures("toys")
def test_a_run_goes_on_with_the_same_pools_alone(data: Path, folder: Path, tmp_path: Path) -> None:
    for _ in zip(range(2), run_audit(plan(), data=data, folder=folder, run=tmp_path / "run"), strict=False):
        pass
    smaller = Gallery.load(folder / "pools.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    Gallery(smaller.ids[1:], smaller.labels[1:], smaller.embeddings[1:], smaller.encoder_fingerprint).save(
        other / "pools.safetensors"
    )
    with pytest.raises(RunError, match="gallery_sha256"):
        audit(plan(), data, other, tmp_path / "run")
    with pytest.raises(RunError, match="another plan"):
        audit(plan(seed=1), data, folder, tmp_path / "run")


@pytest.mark.usefixtures("toys")
def test_pools_of_another_encoder_are_refused(data: Path, folder: Path, tmp_path: Path) -> None:
    system = {"name": "toy", "encoder": "toy/1", "gallery": "pools.safetensors"}
    with pytest.raises(FingerprintMismatch):
        audit(plan(system=[system]), data, folder, tmp_path)


@pytest.mark.usefixtures("toys")
def test_all_is_checked_and_noted(data: Path, folder: Path, tmp_path: Path) -> None:
    audit(plan(), data, folder, tmp_path)
    assert {check.name for check in read_checks(tmp_path)} >= {"gradients", "loss-rises", "large-eps"}
    [session], [system] = read_events(tmp_path, "session"), read_events(tmp_path, "system")
    assert session["versions"]["torch"] == torch.__version__.split("+")[0] or session["versions"]["torch"]
    assert system["fingerprint"] == ToyEncoder().fingerprint
    assert system["gallery_sha256"] == Gallery.load(folder / "pools.safetensors").sha256
    assert system["policy_version"] == DecisionPolicy().version


def test_queries_must_not_be_exemplars_unless_left_out(data: Path, folder: Path) -> None:
    in_pools = {"kind": "folder", "path": "pools", "label": "unsafe"}
    encoder = ToyEncoder()
    [system] = plan().systems
    with pytest.raises(PlanError, match="leave_one_out"):
        open_moderation(plan(queries=[in_pools]), system, encoder, data, folder)
    task = open_moderation(plan(queries=[{**in_pools, "leave_one_out": True}]), system, encoder, data, folder)
    rows = torch.arange(len(task.items))
    with torch.no_grad():
        embeddings = encoder.encode(to_pixels([item.pixels for item in task.items]))
    for item, judged in zip(task.items, task.judge(rows, embeddings), strict=True):
        assert item.id not in [n.id for n in judged.neighbors]
    objective = task.objective("white-box", rows, embeddings)
    full = torch.from_numpy(Gallery.load(folder / "pools.safetensors").embeddings.copy())
    ids, labels = (getattr(Gallery.load(folder / "pools.safetensors"), name) for name in ("ids", "labels"))
    for i, item in enumerate(task.items):
        best = {
            pool: max(
                float(embeddings[i] @ full[j]) for j in range(len(ids)) if labels[j] == pool and ids[j] != item.id
            )
            for pool in ("safe", "unsafe")
        }
        assert float(objective(embeddings)[i]) == pytest.approx(best["safe"] - best["unsafe"], abs=1e-6)
        [narrowed] = objective.rows(torch.tensor([i]))(embeddings[i : i + 1])
        assert float(narrowed) == pytest.approx(best["safe"] - best["unsafe"], abs=1e-6)


def test_targets_do_not_take_part_as_queries(data: Path, folder: Path) -> None:
    targets = [{"kind": "folder", "path": f"queries/{x}", "label": x, "limit": 2} for x in ("safe", "unsafe")]
    task = open_moderation(plan(targets=targets), plan().systems[0], ToyEncoder(), data, folder)
    assert len(task.items) == 6


def test_without_a_buffer_nothing_is_answered_by_it(data: Path, folder: Path) -> None:
    [system] = plan().systems
    task = open_moderation(plan(), replace(system, pools=("safe", "unsafe")), ToyEncoder(), data, folder)
    assert isinstance(task.decider, PoolsDecider)
    assert set(task.decider.gallery.labels) == {"safe", "unsafe"}


@given(st.integers(0, 10_000), st.sampled_from(["nearest", "vote"]), st.floats(0, 0.5), st.floats(0, 0.5))
def test_the_decision_is_the_policys_own(seed: int, rule: Any, margin: float, similarity: float) -> None:
    """Against a twin that hands every exemplar of the pools to `decide`."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(12, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = tuple(str(list(PoolLabel)[i % 3]) for i in range(12))
    gallery = Gallery(tuple(map(str, range(12))), labels, vectors, "x")
    policy = DecisionPolicy(rule, 3, similarity, margin)
    queries = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(5, 4)).astype(np.float32)))
    decider = PoolsDecider(gallery, policy, 2, [()] * 5)
    for query, (label, scores, _) in zip(queries, decider.decide(torch.arange(5), queries), strict=True):
        everyone = [Neighbor(str(i), labels[i], float(query @ torch.from_numpy(vectors[i].copy()))) for i in range(12)]
        expected = policy.decide(everyone)
        assert label == expected.label
        assert scores["margin"] == pytest.approx(expected.margin, abs=1e-6)


def head_task(threshold: float = 0.5) -> ModerationTask:
    state = {
        "norm.mean": torch.zeros(16),
        "norm.variance": torch.ones(16),
        "linear_1.weight": torch.eye(16)[:1] * 8,
        "linear_1.bias": torch.zeros(1),
    }
    pixels = np.zeros((3, 16, 16), np.uint8)
    items = [Item("q", str(i), label, pixels) for i, label in enumerate(("safe", "unsafe"))]
    targets = {VerdictLabel.SAFE: -torch.eye(16)[:1], VerdictLabel.UNSAFE: torch.eye(16)[:1]}
    return ModerationTask(items, HeadDecider(DetectorHead(state), threshold), targets)


def test_a_detector_head_decides_by_its_threshold_and_is_attacked_along_its_logit() -> None:
    rows = torch.arange(2)
    embeddings = torch.nn.functional.normalize(torch.tensor([[0.1, 1.0], [0.1, 1.0]]))
    embeddings = torch.cat([embeddings, torch.zeros(2, 14)], dim=1)
    probability = 1 / (1 + np.exp(-8 * float(embeddings[0, 0])))
    judged = head_task().judge(rows, embeddings)
    assert [j.answer for j in judged] == ["unsafe", "unsafe"]
    assert judged[0].scores["probability"] == pytest.approx(probability, abs=1e-5)
    assert [j.answer for j in head_task(probability + 1e-3).judge(rows, embeddings)] == ["safe", "safe"]
    objective = head_task().objective("white-box", rows, embeddings)
    logit = 8 * float(embeddings[0, 0])
    torch.testing.assert_close(objective(embeddings), torch.tensor([logit, -logit]))
    task = head_task()
    assert [task.at_goal(i, j) for i, j in enumerate(judged)] == [True, False]
    assert task.severity(0, judged[0]) > task.severity(1, judged[1])


def test_severity_orders_right_review_and_the_attackers_goal() -> None:
    task = head_task()
    answers = [("safe", 0.4), ("safe", 0.1), ("review", 0.3), ("unsafe", 0.01), ("unsafe", 0.3)]
    found = [task.severity(0, Judgement(a, a == "safe", {"margin": m})) for a, m in answers]
    assert found == sorted(found)
    assert len(set(found)) == len(found)


def test_among_reviews_the_one_nearest_to_the_goal_is_worst() -> None:
    """As under a policy that is never content, by which thresholds are calibrated."""
    task = head_task()

    def review(safe: float, unsafe: float) -> float:
        near = sorted((Neighbor("a", "safe", safe), Neighbor("b", "unsafe", unsafe)), key=lambda n: -n.similarity)
        return task.severity(0, Judgement("review", False, {"margin": abs(safe - unsafe)}, tuple(near)))

    assert review(0.9, 0.1) < review(0.5, 0.4) < review(0.4, 0.5) < review(0.1, 0.9)


def test_what_is_not_finite_is_never_judged() -> None:
    with pytest.raises(NonFiniteEmbedding):
        head_task().judge(torch.arange(2), torch.full((2, 16), torch.nan))


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    judged = Judgement("safe", True, {"margin": 0.1}, (Neighbor("a", "safe", 0.5),))
    from offline.audit.record import Round

    record = AuditRecord(
        "s", "f", "linf", 4 / 255, 200, "q", "i", "safe", judged, judged, judged,
        (Round("target-set", 3, 0.5, True, "unsafe", False, ((0, 0.1), (3, 0.5))),), "target-set", 0.01, "",
    )  # fmt: skip
    lines = JsonLines(tmp_path / "records.jsonl")
    lines.append([asdict(record)])
    assert read_records(tmp_path) == [record]
    assert record.setting == Setting("linf", 4 / 255, 200)
    assert str(record.setting) == "linf 4/255, 200 steps"


class Drifting(ToyEncoder):
    """Changes its mind about an image by nothing: used to count passes with gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[tuple[int, bool]] = []

    def encode(self, pixels: Tensor) -> Tensor:
        self.passes.append((len(pixels), torch.is_grad_enabled()))
        return super().encode(pixels)


def test_no_work_is_done_for_what_is_at_its_goal(data: Path, folder: Path, tmp_path: Path) -> None:
    """Every query is labelled with the opposite: all are at the goal before any attack."""
    swapped = [{"kind": "folder", "path": f"pools/{x}", "label": y, "leave_one_out": True, "name": x} for x, y in
               (("safe", "unsafe"), ("unsafe", "safe"))]  # fmt: skip
    encoder = Drifting()
    asked = plan(queries=swapped)
    [system] = asked.systems
    task = open_moderation(asked, system, encoder, data, folder)
    auditor = SystemAudit(asked, system, encoder, task, tmp_path, data)
    encoder.passes.clear()
    records = [r for i, rows in enumerate(auditor.batches)
               for r in auditor.batch(rows, asked.threats[0], Setting("linf", 0.1, 5), i)]  # fmt: skip
    at_goal = [r for r in records if r.clean.answer not in (r.label, "review")]
    assert len(at_goal) > len(records) / 2
    assert all(r.rounds == () and r.winner == "none" and r.distance == 0 for r in at_goal)
    with_gradients = sum(count for count, gradient in encoder.passes if gradient)
    others = [r for r in records if r not in at_goal]
    assert with_gradients <= 2 * 5 * len(others)  # two gradient attacks of five steps
