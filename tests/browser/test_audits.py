"""Robustness and thresholds in a browser: a real audit of what is served, its report, and a policy tried on it."""

from pathlib import Path

import pytest
from playwright.sync_api import expect

from indexer.store import SnapshotStore
from offline.audit.plan import plan_from_table
from offline.audit.report import write_report
from offline.audit.run import run_audit
from perception.testing import encoded, synthetic_image
from service.demo import ENCODER
from tests.browser.conftest import Served, Visitors, axe, screenshot

SETTINGS = {"audits": "audits"}  # in the folder of the service


@pytest.fixture(scope="module", autouse=True)
def audited(served: Served) -> Path:
    """A small audit of the pools that are served, by synthetic images, some of which are called what they are not."""
    folder = served.folder
    for i in range(20):
        label = ("safe", "unsafe")[i % 2]
        (folder / "queries" / label).mkdir(parents=True, exist_ok=True)
        (folder / "queries" / label / f"{i}.png").write_bytes(encoded(synthetic_image(i, (96, 96))))
    SnapshotStore(folder / "pools", "pools").load(None).to_gallery().save(folder / "pools.safetensors")
    plan = plan_from_table(
        {
            "task": "moderation",
            "attacks": ["white-box"],
            "square_queries": 0,
            "check_images": 2,
            "examples": 1,
            "system": [{"name": "FARE", "encoder": ENCODER, "gallery": "pools.safetensors"}],
            "queries": [{"kind": "folder", "path": f"queries/{x}", "label": x} for x in ("safe", "unsafe")],
            "threat": [{"norm": "linf", "eps": ["2/255", "8/255"], "steps": 3}],
        }
    )
    run = folder / "audits" / "quick"
    list(run_audit(plan, data=folder, folder=folder, run=run))
    write_report(run)
    return run


def test_the_newest_audit_fits_and_its_report_opens(visit: Visitors) -> None:
    page = visit("ops", "/console/audits")
    expect(page.get_by_role("heading", name="The newest audit of what is deployed: quick")).to_be_visible()
    expect(page.get_by_text("It still fits")).to_be_visible()
    assert axe(page) == []
    screenshot(page, "audits")
    page.get_by_role("link", name="Read the whole report").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Robustness audit")
    expect(page.locator("table").first).to_be_visible()
    assert page.locator("img").count()
    screenshot(page, "audit-report")


def test_a_policy_is_tried(visit: Visitors) -> None:
    page = visit("ops", "/console/thresholds")
    expect(page.get_by_label("Least margin for safe")).to_have_value("0")
    page.get_by_label("Least margin for safe").fill("0.05")
    page.get_by_role("button", name="Try").click()
    expect(page.get_by_text("HARDLOOK_POLICY_MIN_MARGIN=0.05")).to_be_visible()
    expect(page.get_by_role("img", name="Unsafe images called safe")).to_be_visible()
    page.locator("summary", has_text="All points").click()
    assert axe(page) == []
    screenshot(page, "thresholds")
    page.get_by_label("Voters (k)").fill("9")
    page.get_by_label("vote of the k nearest").check()
    visit.forgive("status of 400")
    page.get_by_role("button", name="Try").click()
    expect(page.get_by_role("alert")).to_contain_text("5 neighbours of each pool")
    assert axe(page) == []
    screenshot(page, "thresholds-refused")


def test_it_reads_the_same_without_scripts_and_in_the_dark(visit: Visitors) -> None:
    page = visit("ops", "/console/thresholds?min_margin=0.1", scripts=False, scheme="dark")
    expect(page.get_by_text("HARDLOOK_POLICY_MIN_MARGIN=0.1")).to_be_visible()
    screenshot(page, "thresholds-dark")
    page = visit("ops", "/console/audits", scheme="dark")
    assert axe(page) == []
    screenshot(page, "audits-dark")


def test_an_exemplar_that_is_added_ends_the_fit(visit: Visitors, served: Served) -> None:
    added = served.server.client.delete(
        "/collections/pools/exemplars/" + first_exemplar(served),
        params={"reason": "a try"},
        headers=served.headers("ops"),
    )
    assert added.status_code == 200, added.text
    page = visit("ops", "/console/audits")
    expect(page.get_by_role("heading", name="No audit is of what is deployed")).to_be_visible()
    expect(page.get_by_text("1 exemplar was deleted").first).to_be_visible()
    assert axe(page) == []
    screenshot(page, "audits-not-fitting")


def first_exemplar(served: Served) -> str:
    answer = served.server.client.get(
        "/collections/pools/exemplars", params={"limit": 1}, headers=served.headers("ops")
    )
    return str(answer.json()["items"][0]["id"])
