"""The audit plans that ship can be read, and ask for what their comments say."""

import tomllib
from pathlib import Path

import pytest
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

import offline
from offline.audit.plan import AuditPlan, plan_from_table
from perception import list_encoders

FOLDER = Path(offline.__file__).parent / "configs"
CONFIGS = sorted(FOLDER.glob("audit_*.toml"))


def read(name: str) -> AuditPlan:
    return plan_from_table(tomllib.loads((FOLDER / name).read_text("utf8")))


def test_there_are_plans_for_all_tasks() -> None:
    assert {read(path.name).task for path in CONFIGS} == {
        "moderation",
        "retrieval",
        "two-afc",
        "odd-one-out",
        "zero-shot",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_plan_is_read_and_names_known_encoders(path: Path) -> None:
    plan = read(path.name)
    assert {system.encoder for system in plan.systems} <= set(list_encoders())
    head = path.read_text("utf8").split("\n\n")[0]
    assert f"hardlook-lab audit offline/configs/{path.name} --run runs/" in path.read_text("utf8")
    assert head.startswith("# ")


@pytest.mark.parametrize("name", ["audit_nights.toml", "audit_bapps.toml"])
def test_two_afc_is_attacked_as_in_the_paper(name: str) -> None:
    (nights,) = (threat for threat in read(name).threats if threat.norm == "linf")
    (l2,) = (threat for threat in read(name).threats if threat.norm == "l2")
    assert (nights.eps, nights.steps) == (4 / 255, 100)
    assert (l2.settings(224)[0].eps, l2.steps) == (3.0, 100)


def test_imagenet_has_the_prompts_of_its_table() -> None:
    assert list(read("audit_zero_shot_imagenet.toml").templates) == [t("{}") for t in OPENAI_IMAGENET_TEMPLATES]
