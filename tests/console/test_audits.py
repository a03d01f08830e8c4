"""The page of robustness audits: what it says of what is deployed, of damage, and how reports are shown."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from indexer.store import SnapshotStore
from perception.testing import ToyEncoder
from perception.verdict import DecisionPolicy
from service.testing import publish, toy_pools
from tests.console.conftest import Console, StartConsole
from tests.service.audit_folders import FINISHED_S, events, four, lines, plan, report, write

PAGE = "/console/audits"
EVIL = "<script>alert(1)</script>"


def words(text: str) -> str:
    """What a page says, without its tags."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", text)))


def audited(root: Path, name: str = "mine", **changes: Any) -> Path:
    """An audit of the pools that `start_console` serves, by the policy that serves."""
    pools = root / "same"
    if not pools.exists():
        publish(pools, ToyEncoder(), toy_pools())
    noted = {
        "fingerprint": ToyEncoder().fingerprint,
        "gallery_sha256": SnapshotStore(pools, "pools").load(None).to_gallery().sha256,
        "policy_version": DecisionPolicy().version,
        **changes,
    }
    images = [{**one, "fingerprint": noted["fingerprint"]} for one in four()]
    return write(root / "audits" / name, images, metrics=lines(events(**noted)))


@pytest.fixture
def console(start_console: StartConsole, tmp_path: Path) -> Console:
    return start_console(audits=tmp_path / "audits")


def test_an_audit_of_what_is_deployed_is_said_to_fit(console: Console, tmp_path: Path) -> None:
    audited(tmp_path)
    audited(tmp_path, "later", policy_version="vote-1", finished_s=FINISHED_S + 60)
    text = console.visitor("pools:write").page(PAGE)
    said = words(text)
    assert "The newest audit of what is deployed: mine" in said
    assert "Finished 2025-10-09 08:53:20 UTC . It still fits" in said
    assert said.count("✓ yes") >= 4
    assert "50.0 % [ 9.5 %, 90.5 %] of 2" in said.replace("[9.5", "[ 9.5")
    assert "the check black-box for masked gradients did not pass" in said
    assert f'href="{PAGE}/mine/report"' in text
    assert said.index("later") < said.rindex("mine")  # the list is newest first


def test_each_mismatch_is_said_in_words(console: Console, tmp_path: Path) -> None:
    audited(tmp_path, policy_version="vote-1", gallery_sha256="ab" * 32)
    said = words(console.visitor("pools:write").page(PAGE))
    assert "No audit is of what is deployed" in said
    assert "does not fit any more: mine" in said
    assert "The pools are others: audited were abababababab" in said
    assert f"Another policy decides: audited was vote-1, deployed is {DecisionPolicy().version}." in said
    assert "✕ no" in said


def test_no_folder_and_no_audit_are_said(start_console: StartConsole, tmp_path: Path) -> None:
    assert "HARDLOOK_AUDITS" in start_console().visitor("pools:write").page(PAGE)


def test_an_empty_folder_is_said_to_be(console: Console, tmp_path: Path) -> None:
    (tmp_path / "audits").mkdir()
    assert "There is no finished audit" in words(console.visitor("pools:write").page(PAGE))


def test_damage_is_listed_and_nothing_of_it_is_markup(console: Console, tmp_path: Path) -> None:
    asked = plan(systems=[{**plan()["systems"][0], "name": EVIL, "encoder": EVIL}])
    images = [{**one, "system": EVIL} for one in four()]
    content = report(asked, lines(images))
    content["checks"][1]["sentence"] = EVIL
    for row in content["rows"]:
        row["system"] = EVIL
    named = [{**one, "system": EVIL} if "system" in one else one for one in events()]
    files = {"plan": {"audit": asked}, "report": content}
    write(
        tmp_path / "audits" / "evil",
        images,
        metrics=lines(named),
        **{name: json.dumps(value).encode() for name, value in files.items()},
    )
    write(tmp_path / "audits" / "broken", plan=b"{")
    write(tmp_path / "audits" / "a<b")
    text = console.visitor("pools:write").page(PAGE)
    assert EVIL not in text
    assert html.escape(EVIL, quote=False) in text
    assert "no run of an audit: plan.json does not hold what it should" in words(text)
    assert "a?b" in words(text)
    for page in (text, console.visitor("pools:write").page("/console/thresholds")):
        assert EVIL not in page
        assert " style=" not in page
        assert "<script>" not in page.replace("<script src=", "")


def test_a_report_opens_and_can_do_nothing(console: Console, tmp_path: Path) -> None:
    audited(tmp_path)
    visitor = console.visitor("pools:write")
    response = visitor.get(f"{PAGE}/mine/report")
    assert response.content == b"<!DOCTYPE html><title>a report</title>"
    assert response.headers["content-security-policy"].startswith("sandbox; default-src 'none'; ")
    assert response.headers["content-type"].startswith("text/html")
    missing = visitor.get(f"{PAGE}/other/report")
    assert missing.status_code == 404
    assert "There is nothing of that name" in missing.text
    assert visitor.get(f"{PAGE}/..%2fmine/report").status_code == 404


def test_it_takes_the_scope(console: Console, tmp_path: Path) -> None:
    audited(tmp_path)
    for path in (PAGE, f"{PAGE}/mine/report", "/console/thresholds"):
        assert console.visitor().get(path).headers["location"] == "/console/sign-in"
        assert console.visitor("classify", "review").get(path).status_code == 403
