"""Audits of defended systems: verdicts through the defence, attackers who know of it and who do not, and its cost."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offline.attacks.adaptive import Adaptive, Through
from offline.attacks.apgd import Apgd
from offline.attacks.square import Square
from offline.attacks.targeted import Targeted
from offline.audit.attacker import Attacker, defended, measured_cost
from offline.audit.calibrate import calibrate
from offline.audit.defenses import QUANTILES, defenses
from offline.audit.masking import masking_checks
from offline.audit.moderation import open_moderation
from offline.audit.plan import AuditPlan, DefensePlan, plan_from_table
from offline.audit.record import read_checks, read_records
from offline.audit.report import REPORT_NAME, Run, write_report
from offline.audit.run import run_audit
from offline.errors import PlanError, RunError
from offline.jsonlines import JsonLines
from offline.runs import read_events
from offline.threat import ThreatModel
from perception.counterattack import Counterattack, CounterattackSettings
from perception.encoder import Encoder
from perception.errors import CheckpointError
from perception.gallery import Gallery
from perception.preprocess import to_pixels
from perception.testing import ToyEncoder
from perception.verdict import DecisionPolicy, Neighbor
from tests.offline.audit_records import record, write_run
from tests.offline.test_audit_run import TABLE, data, folder, toys

__all__ = ["data", "folder", "toys"]  # fixtures
DEFENSE = {"kind": "ttc", "eps": "8/255", "threshold": 0.05, "original": "toy/1"}
CHECKS = ["gradients", "loss-rises", "large-eps", "pgd-not-stronger", "black-box"]


def system(name: str, defense: dict[str, Any] | None) -> dict[str, Any]:
    [toy] = TABLE["system"]
    return {**toy, "name": name, **({} if defense is None else {"defense": defense})}


SYSTEMS = [
    system("plain", None),
    system("unaware", {**DEFENSE, "attacker": "unaware"}),
    system("adaptive", {**DEFENSE, "attacker": "adaptive", "eot": 2}),
]


def plan(**changes: Any) -> AuditPlan:
    changed = {"system": SYSTEMS, "threat": [{"norm": "linf", "eps": "8/255", "steps": 4}], **changes}
    return plan_from_table({**TABLE, **changed})


def settle(run: Path, asked: AuditPlan, data: Path, folder: Path) -> None:
    list(run_audit(asked, data=data, folder=folder, run=run))


@pytest.fixture(scope="module")
def finished(data: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perception.catalogue.load_encoder", lambda name, **_: ToyEncoder(seed=int(name[-1])))
        settle(run, plan(), data, folder)
    return run


def a_defense(original: int | None = 1) -> Counterattack:
    """What DEFENSE means."""
    other = None if original is None else ToyEncoder(seed=original)
    asked = CounterattackSettings(eps=8 / 255, threshold=0.05)
    return Counterattack(ToyEncoder(), asked, seed=b"noise of an audit, seed 0", original=other)


# --- the run ---------------------------------------------------------------------------------------------------------


def test_verdicts_are_through_the_defence(data: Path, folder: Path, finished: Path) -> None:
    gallery, asked = Gallery.load(folder / "pools.safetensors"), plan()
    task = open_moderation(asked, asked.systems[0], ToyEncoder(), data, folder)
    images = {(item.set, item.id): to_pixels([item.pixels]) for item in task.items}
    exemplars = torch.from_numpy(gallery.embeddings.copy())
    encoders: dict[str, Encoder] = {"plain": ToyEncoder(), "unaware": a_defense(), "adaptive": a_defense()}
    records = read_records(finished)
    assert {r.system for r in records} == set(encoders)
    for r in records:
        with torch.no_grad():
            [embedding] = encoders[r.system].encode(images[r.set, r.id])
        similarities = (exemplars @ embedding).tolist()
        near = [Neighbor(*found) for found in zip(gallery.ids, gallery.labels, similarities, strict=True)]
        assert r.clean.answer == str(DecisionPolicy().decide(near).label)
        assert r.fingerprint == ToyEncoder().fingerprint
        assert r.distance <= 8 / 255 + 1e-6
        assert ("tau" in r.clean.scores) == (r.system != "plain")
        if r.system != "plain":
            tau = float(a_defense().defend(images[r.set, r.id]).tau)
            assert r.clean.scores["tau"] == pytest.approx(tau, abs=1e-5)
            assert "tau" in r.attacked.scores
    taus = [r.clean.scores["tau"] for r in records if r.system == "unaware"]
    assert min(taus) < 0.05 < max(taus), "the gate should go either way here"


@pytest.mark.usefixtures("toys")
def test_a_run_is_repeated_to_the_byte_and_resumed(data: Path, folder: Path, finished: Path, tmp_path: Path) -> None:
    content, checks = ((finished / name).read_bytes() for name in ("records.jsonl", "checks.jsonl"))
    lines = content.splitlines(keepends=True)
    for _ in zip(range(2), run_audit(plan(), data=data, folder=folder, run=tmp_path), strict=False):
        pass
    (tmp_path / "records.jsonl").write_bytes(content[: sum(map(len, lines[:24])) + 7])  # within the last system
    settle(tmp_path, plan(), data, folder)
    assert (tmp_path / "records.jsonl").read_bytes() == content
    assert (tmp_path / "checks.jsonl").read_bytes() == checks
    assert len(read_events(tmp_path, "cost")) == 2  # measured once a defended system


@pytest.mark.usefixtures("toys")
def test_the_defence_is_part_of_what_is_audited(data: Path, folder: Path, finished: Path) -> None:
    events = {event["system"]: event for event in read_events(finished, "system")}
    assert "defense" not in events["plain"]
    assert events["unaware"]["defense"] == events["adaptive"]["defense"] == a_defense().defense
    assert events["unaware"]["attacker"] == "unaware"
    assert events["adaptive"]["original_fingerprint"] == ToyEncoder(seed=1).fingerprint
    with pytest.raises(RunError, match="another plan"):
        settle(finished, plan(system=[system("plain", DEFENSE)]), data, folder)


@pytest.mark.usefixtures("toys")
def test_another_original_under_the_same_name_is_refused(
    data: Path, folder: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "perception.catalogue.load_encoder", lambda name, **_: ToyEncoder(seed=2 if name == "toy/1" else 0)
    )
    with pytest.raises(RunError, match="was begun with defense 'ttc-"):
        settle(finished, plan(), data, folder)


def test_masking_checks_are_made_of_every_system(finished: Path) -> None:
    checks = read_checks(finished)
    assert [(c.system, c.name) for c in checks] == [(s["name"], name) for s in SYSTEMS for name in CHECKS]
    assert all(c.passed for c in checks if c.system == "plain")


# --- who attacks -----------------------------------------------------------------------------------------------------


def attacker(kind: str | None) -> Attacker:
    asked = plan(system=[system("s", None if kind is None else {"kind": "ttc", "attacker": kind})])
    [of] = asked.systems
    return Attacker.of(asked, of, defended(of, ToyEncoder()))


def test_each_attacker_asks_what_it_may_know() -> None:
    threat = ThreatModel("linf", 8 / 255)
    objective, criterion = object(), object()

    def asked(kind: str | None, name: str) -> tuple[Any, Any, Any]:
        who = attacker(kind)
        problem = who.problem(name, objective, criterion, threat, None)  # type: ignore[arg-type]
        return who, problem, type(who.attack(name, 5))

    for name in ("white-box", "square"):
        who, problem, attack = asked(None, name)
        assert problem.encoder is who.attacked is who.encoder
        assert problem.criterion is criterion
        assert attack is (Square if name == "square" else Apgd)
    who, problem, attack = asked("unaware", "white-box")
    assert problem.encoder is who.attacked is who.encoder.encoder
    assert (problem.criterion, attack) == (None, Apgd)
    who, problem, attack = asked("adaptive", "white-box")
    assert problem.encoder is who.encoder.encoder
    assert problem.criterion is criterion
    assert attack is Adaptive
    found = who.attack("apgd-t", 5)
    assert isinstance(found, Adaptive)
    assert isinstance(found.inner, Targeted)
    assert found.knowledge.settings == CounterattackSettings()
    for kind in ("unaware", "adaptive"):
        who, problem, attack = asked(kind, "square")
        assert problem.encoder is who.encoder  # the defence itself, noise and all
        assert (problem.criterion, attack) == (criterion, Square)


def test_the_adaptive_attacker_is_checked_on_its_way_through(data: Path, folder: Path) -> None:
    who = attacker("adaptive")
    task = open_moderation(plan(), plan().systems[0], ToyEncoder(), data, folder)
    rows = torch.arange(6)
    pixels = to_pixels([item.pixels for item in task.items[:6]])
    clean = ToyEncoder().encode(pixels).detach()
    along, black_box = (task.objective(name, rows, clean) for name in ("target-set", "square"))
    subject = who.subject(along, black_box, task.criterion(rows), pixels, ThreatModel("linf", 8 / 255))
    assert isinstance(subject.attacked, Through)
    assert subject.encoder is who.encoder
    assert not subject.stops
    embeddings = subject.attacked.encode(pixels)
    assert torch.equal(embeddings, subject.attacked.encode(pixels))  # what changes by chance cannot be compared
    assert subject.objective(embeddings).shape == subject.objective(clean).shape == (6,)
    assert len(list(masking_checks(subject, steps=3, queries=5, seed=0))) == 5


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "magic"}, "defense.kind"),
        ({"eps": "300/255"}, "eps must be in"),
        ({"steps": 0}, "defense.steps"),
        ({"beta": -1.0}, "beta must be finite and not negative"),
        ({"threshold": -0.5}, "threshold must be finite and not negative"),
        ({"eot": 0}, "defense.eot"),
        ({"attacker": "lazy"}, "defense.attacker"),
        ({"noise": 3}, "defense.noise"),
    ],
)
def test_impossible_defences_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(system=[system("s", {**DEFENSE, **changes})])


def test_plans() -> None:
    assert DefensePlan("ttc").settings == CounterattackSettings()
    asked = plan()
    values = asked.as_dict()
    assert "defense" not in values["systems"][0]
    assert values["systems"][1]["defense"]["eps"] == 8 / 255
    with pytest.raises(PlanError, match="bf16_gradients are not for systems with a defense"):
        plan(bf16_gradients=True)
    assert plan(bf16_gradients=True, system=[SYSTEMS[0]]).bf16_gradients


class NoFeatures:
    name = "other"

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1)


def test_what_cannot_be_defended_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    of = plan().systems[1]
    with pytest.raises(PlanError, match="'unaware': a defence needs the features of its encoder, other has none"):
        defended(of, NoFeatures())  # type: ignore[arg-type]
    monkeypatch.setattr("perception.catalogue.load_encoder", lambda name, **_: ToyEncoder(seed=1, size_px=32))
    with pytest.raises(CheckpointError, match="takes images of 32 px"):
        defended(of, ToyEncoder())


def test_calibration_takes_no_defended_system(finished: Path) -> None:
    with pytest.raises(PlanError, match="'adaptive' was audited behind a defence"):
        calibrate(finished, "adaptive", max_false_negative=0.5, max_false_positive=0.5)


# --- what is said of it ----------------------------------------------------------------------------------------------


def test_cost_is_measured_both_ways(data: Path, folder: Path) -> None:
    task = open_moderation(plan(), plan().systems[0], ToyEncoder(), data, folder)
    found = measured_cost(a_defense(), [item.pixels for item in task.items])
    assert found["images"] == 10
    assert found["ratio"] == pytest.approx(found["defended_ms"] / found["plain_ms"], rel=0.2)
    expected = a_defense().defend(to_pixels([item.pixels for item in task.items])).countered.float().mean()
    assert found["countered"] == pytest.approx(float(expected), abs=1e-4)


def test_gates_are_counted_from_records_alone() -> None:
    asked = plan(system=SYSTEMS[:2])
    made = []
    for i in range(5):
        one = record(str(i), "safe", "safe", system="unaware")
        clean, attacked = (replace(one.clean, scores={"tau": tau}) for tau in (0.01 * i, 0.02 * i))
        made.append(replace(one, clean=clean, attacked=attacked))
    [found] = defenses(asked, made, [{"system": "unaware", "plain_ms": 1.0, "defended_ms": 7.0, "ratio": 7.0}])
    assert found.cost == {"plain_ms": 1.0, "defended_ms": 7.0, "ratio": 7.0}
    clean_gate, attacked_gate = found.gates
    assert (clean_gate.setting, clean_gate.images, clean_gate.countered) == (None, 5, 1.0)
    assert clean_gate.quantiles[QUANTILES.index(0.5)] == 0.02
    assert (attacked_gate.setting, attacked_gate.countered) == (made[0].setting, 0.6)  # 0, 0.02, 0.04 of 0.05
    [unmeasured] = defenses(asked, [], [])
    assert (unmeasured.gates, unmeasured.cost) == ((), {})


def test_the_report_shows_attacker_cost_and_gate(finished: Path) -> None:
    text = write_report(finished).read_text("utf8")
    read = Run.read(finished)
    assert [defense.system for defense in read.defenses] == ["unaware", "adaptive"]
    for defense in read.defenses:
        assert f"{defense.system}: ttc, {defense.plan.attacker} attacker" in text
        assert f"{defense.cost['ratio']:.1f} times as long" in " ".join(text.split())
    assert "mitigation and no guarantee" in text
    values = json.loads((finished / "report.json").read_text())["identity"]["defenses"]
    assert [v["system"] for v in values] == ["unaware", "adaptive"]
    assert values[0]["gates"][0]["images"] == 10


def test_a_report_without_defences_says_nothing_of_them(tmp_path: Path) -> None:
    asked = plan(system=[SYSTEMS[0]])
    [setting] = asked.threats[0].settings(16)
    write_run(tmp_path, asked, [record("1", "safe", "safe", system="plain", setting=setting)])
    assert "Defences" not in (write_report(tmp_path).parent / REPORT_NAME).read_text("utf8")


def test_records_with_tau_survive_their_file(finished: Path, tmp_path: Path) -> None:
    records = read_records(finished)
    JsonLines(tmp_path / "records.jsonl").append([asdict(r) for r in records])
    assert read_records(tmp_path) == records
