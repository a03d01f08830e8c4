"""Reports from synthetic run directories: what they hold, what they must not do, and that records stay text."""

import base64
import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from offline.audit.examples import neighbor_picture
from offline.audit.figures import Figures, summarise
from offline.audit.plan import AuditPlan
from offline.audit.record import AuditRecord, Judgement, Setting, read_checks, read_records
from offline.audit.report import REPORT_NAME, flattened, write_report
from offline.audit.tables import answers_text, percent
from offline.errors import PlanError, RunError
from perception.verdict import Neighbor
from tests.offline.audit_records import SETTING, check, moderation, plan_for, png, record, write_run

VOID = {"meta", "img", "input", "br"}
EVIL = "<script>alert('x')</script><img src=https://evil.example/a.png onerror=alert(1)>"
CHAIN = ("target-set", "white-box", "square")
NEAR = (Neighbor("u/0.png", "unsafe", 0.9), Neighbor("b/0.png", "buffer", 0.5), Neighbor("s/0.png", "safe", 0.25))


class Page(HTMLParser):
    """A parsed page; refuses tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def images(system: str, kept: int, setting: Setting = SETTING) -> list[AuditRecord]:
    """Four unsafe and two safe images, of which `kept` unsafe ones survive."""
    won = [("target-set", "unsafe"), ("white-box", "safe")]
    survived = [(attack, "unsafe") for attack in CHAIN]
    common: dict[str, Any] = {"system": system, "setting": setting}
    return [
        *(record(f"u{i}", "unsafe", "unsafe", survived if i < kept else won, **common) for i in range(4)),
        record("s0", "safe", "safe", [("target-set", "unsafe")], **common),
        record("s1", "safe", "review", [("target-set", "unsafe")], **common),
    ]


def whole_run(path: Path, **changes: Any) -> Path:
    """Two systems, finished, all checks passed."""
    records = [*images("plain", 0), *images("robust", 3)]
    checks = [check("plain"), check("robust"), check("robust", name="black-box")]
    return write_run(path, moderation(**changes), records, checks, {"plain": 6, "robust": 6})


def sweep() -> tuple[AuditPlan, list[AuditRecord]]:
    plan = moderation(threat=[{"norm": "linf", "eps": ["4/255", "8/255"], "steps": [50, 200]}])
    settings = [Setting("linf", levels / 255, steps) for levels in (4, 8) for steps in (50, 200)]
    kept = dict(zip(settings, (4, 3, 2, 1), strict=True))
    return plan, [one for setting in settings for s in ("plain", "robust") for one in images(s, kept[setting], setting)]


def read(run: Path) -> Page:
    path = write_report(run)
    assert path == run / REPORT_NAME
    return Page(path.read_text("utf8"))


@pytest.mark.parametrize("with_sweep", [False, True])
def test_page_asks_for_nothing_outside_itself(tmp_path: Path, with_sweep: bool) -> None:
    run = write_run(tmp_path, *sweep()) if with_sweep else whole_run(tmp_path)
    page = read(run)
    text = (run / REPORT_NAME).read_text("utf8")
    assert not page.named("script")
    assert not page.named("link")
    assert not page.named("iframe")
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "http://" not in text
    assert "https://" not in text
    (policy,) = [meta["content"] for meta in page.named("meta") if "http-equiv" in meta]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_page_can_be_read_without_eyes(tmp_path: Path) -> None:
    page = read(write_run(tmp_path, *sweep()))
    (html,) = page.named("html")
    assert html["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == levels.count(1) == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))
    assert all(heading["scope"] in ("row", "col") for heading in page.named("th"))
    assert len(page.named("caption")) == len(page.named("table"))
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(identities)) == len(identities)
    charts = [svg for svg in page.named("svg") if svg["class"] == "chart"]
    assert charts
    for svg in charts:
        assert svg["role"] == "img"
        assert set(svg["aria-labelledby"].split()) <= set(identities)
    fills = {rect["fill"] for rect in page.named("rect") if rect["fill"].startswith("url(#")}
    assert fills == {f"url(#{pattern['id']})" for pattern in page.named("pattern")}


def test_page_json_and_csv_say_the_same(tmp_path: Path) -> None:
    run = whole_run(tmp_path, combination=[{"name": "either", "systems": ["plain", "robust"]}])
    page = read(run)
    figures = Figures.load(run / "report.json")
    assert figures == summarise(
        moderation(combination=[{"name": "either", "systems": ["plain", "robust"]}]),
        read_records(run),
        read_checks(run),
    )
    with (run / "report.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(figures.rows) == 6
    for row, line in zip(figures.rows, lines, strict=True):
        assert row.clean is not None
        assert row.robust is not None
        for share in (row.clean, row.robust, row.rounded, *row.after.values()):
            assert percent(share) in page.text
        for version, letters in (("clean", ""), ("attacked", "→ ")):
            assert letters + answers_text(row.answers[version]) in page.text
            assert percent(row.wrong_way[version]) in page.text
        assert (line["system"], line["label"], int(line["n"])) == (row.system, row.label, row.total)
        assert float(line["robust"]) == row.robust.value
        assert float(line["robust_low"]) == pytest.approx(row.robust.interval[0], abs=1e-6)
        assert int(line["answered_unsafe_attacked"]) == row.answers["attacked"].unsafe
        assert float(line["after_white-box"]) == row.after["white-box"].value
    content = json.loads((run / "report.json").read_bytes())
    assert content["plan"] == json.loads((run / "plan.json").read_bytes())["audit"]
    assert [system["fingerprint"] for system in content["identity"]["systems"]] == ["of plain", "of robust"]
    assert content["identity"]["finished"] is True


def test_verdict_says_it_in_one_sentence(tmp_path: Path) -> None:
    page = read(whole_run(tmp_path))
    assert (
        "Under linf 8/255, 200 steps, unsafe images recognised as unsafe go from 100.0 to 0.0 [0.0, 49.0] % for plain "
        "and from 100.0 to 75.0 [30.1, 95.4] % for robust; safe images recognised as safe go from 50.0 to 0.0 "
        "[0.0, 65.8] % for plain and from 50.0 to 0.0 [0.0, 65.8] % for robust; all 3 masking checks passed."
    ) in page.text
    assert "Warning:" not in page.text


def test_verdict_names_the_best_and_the_worst_of_many(tmp_path: Path) -> None:
    names = [f"system {i}" for i in range(6)]
    plan = moderation(system=[{"name": name, "encoder": "toy", "gallery": "pools"} for name in names])
    kept = dict(zip(names, (2, 1, 4, 3, 0, 2), strict=True))
    page = read(write_run(tmp_path, plan, [one for name in names for one in images(name, kept[name])]))
    assert "100.0 [51.0, 100.0] % for system 2 (the best) and from 100.0 to 0.0 [0.0, 49.0] % for system 4" in page.text


def test_everything_that_identifies_the_run_is_there(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "my run")
    page = read(run)
    for path, value in flattened(moderation().as_dict()):
        assert path in page.text
        assert value in page.text
    for words in ("of plain", "of robust", "toy device", '"9.9"', "hardlook-lab report 'my run'", "seed, 0"):
        assert words in page.text
    assert str(tmp_path) not in page.text


def test_what_speaks_against_the_figures_comes_first(tmp_path: Path) -> None:
    square = [record("x", "unsafe", "unsafe", [*((a, "unsafe") for a in CHAIN[:2]), ("square", "safe")])]
    checks = [check(), check(name="black-box", passed=False)]
    page = read(write_run(tmp_path, moderation(), square, checks, {"plain": 2}))
    assert "but 1 of 2 masking checks did not pass, so the true figures may be lower." in page.text
    start, figures = page.text.index("Warning:"), page.text.index("8-bit")
    warnings = page.text[start:figures]
    assert "plain: the masking check 'black-box' did not pass. The finding about black-box of plain." in warnings
    assert "robust: no masking checks have been made" in warnings
    assert "Square took off another 100.0 points" in warnings
    assert "not finished. Attacked images, over all settings: plain: 1 of 2; robust: 0 of ?." in warnings
    assert "In the part of the audit that is done, under linf 8/255" in page.text
    assert "NOT PASSED" in page.text


def test_same_bytes_every_time(tmp_path: Path) -> None:
    run = with_pictures(tmp_path)
    names = (REPORT_NAME, "report.json", "report.csv")
    write_report(run)
    first = [(run / name).read_bytes() for name in names]
    write_report(run)
    assert [(run / name).read_bytes() for name in names] == first
    assert not list(run.glob("*.partial"))


def test_one_record_is_enough(tmp_path: Path) -> None:
    page = read(write_run(tmp_path, moderation(), [record("x", "unsafe", "safe")]))
    assert "No pictures were kept" in page.text
    assert "from 0.0 to 0.0 [0.0, 79.3] % for plain" in page.text
    assert not [svg for svg in page.named("svg") if svg.get("aria-labelledby", "").startswith("curves")]


def with_pictures(run: Path, stem: str = "plain-000", **changes: Any) -> Path:
    """A run with one unsafe example, all of its pictures and two of its three neighbours'."""
    judgement = Judgement("unsafe", True, {}, NEAR)
    one = record("u/x.png", "unsafe", "unsafe", [("white-box", "safe")], updates=17, example=stem)
    after = Judgement("safe", False, {}, NEAR[::-1])
    write_run(run, moderation(), [replace(one, clean=judgement, attacked=after, **changes)])
    folder = run / "examples"
    (folder / "neighbors").mkdir(parents=True)
    for i, part in enumerate(("clean", "attacked", "delta")):
        (folder / f"plain-000-{part}.png").write_bytes(png((i, 0, 0)))
    for i, near in enumerate(NEAR[:2]):
        (folder / neighbor_picture(near.id)).write_bytes(png((0, i, 0)))
    return run


def test_examples_show_pictures_answers_and_neighbours(tmp_path: Path) -> None:
    page = read(with_pictures(tmp_path))
    shown = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.named("img")]
    near = [png((0, 0, 0)), png((0, 1, 0))]
    assert shown == [png((0, 0, 0)), png((2, 0, 0)), png((1, 0, 0)), *near, *near[::-1]]
    assert all(image["alt"] for image in page.named("img"))
    for words in ("answered unsafe when clean, safe when attacked", "Attack that won: white-box", "white-box 17"):
        assert words in page.text
    for words in ("u/0.png (unsafe, 0.900)", "b/0.png (buffer, 0.500)", "s/0.png (safe, 0.250)"):
        assert page.text.count(words) == 2
    assert page.text.count("no picture kept") == 2


def test_what_may_be_unsafe_is_blurred_until_asked_for(tmp_path: Path) -> None:
    page = read(with_pictures(tmp_path / "unsafe"))
    assert all(image.get("class") == "veiled" for image in page.named("img"))
    (box,) = page.named("input")
    assert "checked" not in box
    assert [label["for"] for label in page.named("label")] == [box["id"]]


@pytest.mark.parametrize(
    ("clean", "attacked", "veiled"),
    [("safe", "safe", False), ("safe", "unsafe", True), ("review", "review", True), ("unsafe", "safe", True)],
)
def test_safe_examples_are_blurred_only_where_an_answer_is_not_safe(
    clean: str, attacked: str, veiled: bool, tmp_path: Path
) -> None:
    answers: dict[str, Any] = {
        "clean": Judgement(clean, clean == "safe", {}),
        "attacked": Judgement(attacked, attacked == "safe", {}),
        "rounded": Judgement(attacked, attacked == "safe", {}),
    }
    run = with_pictures(tmp_path, label="safe")
    (kept,) = read_records(run)
    (run / "records.jsonl").unlink()
    (run / "metrics.jsonl").unlink()
    page = read(write_run(run, moderation(), [replace(kept, **answers)]))
    assert len(page.named("img")) == 3
    assert [image.get("class") == "veiled" for image in page.named("img")] == [veiled] * 3
    assert len(page.named("input")) == veiled


def test_names_of_pictures_lead_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "secret-clean.png").write_bytes(png((9, 9, 9)))
    page = read(with_pictures(tmp_path / "run", example="../../secret"))
    assert base64.b64encode(png((9, 9, 9))).decode() not in str(page.tags)
    assert page.text.count("no picture kept") == 5


def test_what_is_no_picture_is_not_shown(tmp_path: Path) -> None:
    run = with_pictures(tmp_path)
    (run / "examples" / "plain-000-clean.png").write_text(EVIL)
    (run / "examples" / "plain-000-delta.png").unlink()
    page = read(run)
    assert page.text.count("no picture kept") == 4


def test_records_are_text_and_never_markup(tmp_path: Path) -> None:
    near = (Neighbor(EVIL, EVIL, 0.5),)
    one = replace(
        record(EVIL, "unsafe", "unsafe", [("white-box", "safe")], set=EVIL, winner=EVIL, example=EVIL),
        attacked=Judgement("safe", False, {EVIL: 1.0}, near),
        clean=Judgement("unsafe", True, {}, near),
    )
    found = replace(check(passed=False), name=EVIL, sentence=EVIL)
    queries = [{"kind": "demo", "label": "unsafe", "name": name} for name in (EVIL, f"{EVIL} 2")]
    plan = moderation(queries=queries)
    run = write_run(tmp_path, plan, [one, replace(one, set=f"{EVIL} 2")], [found])
    with (run / "metrics.jsonl").open("a") as log:
        event = {"event": "system", "time_s": 0, "system": "plain", "items": 2, EVIL: EVIL}
        log.write(json.dumps(event) + "\n")
    page = read(run)
    assert not page.named("script")
    assert not page.named("img")
    assert page.text.count("alert('x')") >= 8


def test_classes_and_ids_with_markup_in_other_tasks(tmp_path: Path) -> None:
    one = record("x", EVIL, EVIL, [("apgd-ce", "dog")], example="plain-0")
    page = read(write_run(tmp_path, plan_for("zero-shot", queries=[{"kind": "folder", "name": EVIL}]), [one]))
    assert "right answers go from 100.0 to 0.0" in page.text
    assert not page.named("script")


def test_file_names_that_are_no_text_are_shown_all_the_same(tmp_path: Path) -> None:
    one = record("caf\udce9.png", "unsafe", "safe", example="plain-0")
    page = read(write_run(tmp_path, moderation(), [one]))
    assert "caf\\udce9.png" in page.text


def test_sweeps_have_curves_by_radius_and_by_steps(tmp_path: Path) -> None:
    page = read(write_run(tmp_path, *sweep()))
    titles = [words for words in page.words if words.startswith("Unsafe images answered unsafe by")]
    assert list(dict.fromkeys(titles)) == [
        "Unsafe images answered unsafe by radius, linf, 50 steps",
        "Unsafe images answered unsafe by radius, linf, 200 steps",
        "Unsafe images answered unsafe by steps, linf 4/255",
        "Unsafe images answered unsafe by steps, linf 8/255",
    ]
    curves = [words for words in page.words if words.startswith("plain: 100 at 0, 75 at 0.01569, 25 at 0.03137;")]
    assert len(curves) == 1
    assert sum(words.startswith("plain: 100 at 0, 50 at 50, 25 at 200;") for words in page.words) == 1


def test_bars_show_clean_and_attacked_verdicts(tmp_path: Path) -> None:
    page = read(whole_run(tmp_path))
    assert (
        "plain: unsafe images (n = 4), clean: safe 0.0 %, review 0.0 %, unsafe 100.0 %; "
        "plain: unsafe images (n = 4), attacked: safe 100.0 %, review 0.0 %, unsafe 0.0 %; "
        "robust: safe images (n = 2), clean: safe 50.0 %, review 50.0 %, unsafe 0.0 %; "
    ) in page.text


def test_a_system_is_what_the_run_was_begun_with(tmp_path: Path) -> None:
    run = whole_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"event": "system", "time_s": 9, "system": "plain", "items": 600}) + "\n")
    write_report(run)
    identity = json.loads((run / "report.json").read_bytes())["identity"]
    assert identity["progress"][0] == {"system": "plain", "done": 6, "total": 6}


def test_objective_by_updates_has_a_curve_a_system(tmp_path: Path) -> None:
    def traced(system: str, last: float) -> AuditRecord:
        one = record("x", "unsafe", "unsafe", [("target-set", "unsafe")], system=system)
        return replace(one, rounds=(replace(one.rounds[0], trace=((0, -1.0), (10, last))),))

    page = read(write_run(tmp_path, moderation(), [traced("plain", 0.5), traced("robust", 0.25)]))
    assert "plain (1 images): -1 at 0, 0.5 at 10; robust (1 images): -1 at 0, 0.25 at 10" in page.text


def test_rankings_have_means(tmp_path: Path) -> None:
    def ranking(value: float) -> Judgement:
        return Judgement("", None, {"ap_hard": value})

    one = record("q", "", "", [("shift", "")], set="folder", example="plain-0")
    one = replace(one, clean=ranking(0.5), attacked=ranking(0.25), rounded=ranking(0.25))
    page = read(write_run(tmp_path, plan_for("retrieval"), [one], items={"plain": 1}))
    assert "mean ap hard goes from 50.0 to 25.0 [25.0, 25.0] % for plain" in page.text
    assert "answered a ranking when clean" in page.text


def test_damaged_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no audit plan"):
        write_report(tmp_path)
    run = write_run(tmp_path / "empty", moderation(), [])
    with pytest.raises(RunError, match="no audit records"):
        write_report(run)
    for line in ("{", "{}", '{"event": "system", "system": "plain"}', '{"event": "system", "system": 1, "items": 1}'):
        run = whole_run(tmp_path / str(len(line)))
        with (run / "metrics.jsonl").open("a") as log:
            log.write(line + "\n")
        with pytest.raises(RunError, match="damaged"):
            write_report(run)
