"""Board, alerts and the page for operators name metrics that exist, with labels that they have."""

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from service.problems import _HTTP_SLUGS, KINDS
from service.telemetry import Metrics, Stage

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
BOARD: dict[str, Any] = json.loads((DOCKER / "grafana/dashboards/hardlook.json").read_text("utf8"))
ALERTS: dict[str, Any] = yaml.safe_load((DOCKER / "prometheus/alerts.yml").read_text("utf8"))
# Of Prometheus itself, and what it adds to every series.
OWN = {"up": frozenset[str]()}
ADDED = {"job", "instance"}
METRIC = re.compile(r"(?<![\w\"/.$])((?:hardlook|process|python)_\w+|up)\b")


def all_metrics() -> Metrics:
    """Metrics in which every series has appeared."""
    metrics = Metrics()
    metrics.request("/classify", "POST", 200, 0.1)
    metrics.problem("overloaded")
    metrics.verdict("safe", "safe", 0.1)
    metrics.coarse_answer()
    metrics.batch(2, 0.1)
    metrics.decoder_replaced("died")
    metrics.fetched("ok")
    metrics.watch_queue("encoder", lambda: 1, 2)
    metrics.watch_snapshots(lambda: [("pools", "v", datetime.now(UTC), {"safe": 1})])
    metrics.watch_state(lambda: "ready")
    metrics.recorded("recorded", 1)
    metrics.shadowed("version 4b1f0c9d2e8a7356", "safe->unsafe")
    metrics.webhook("receiver", "delivered")
    metrics.quarantined()
    metrics.kept_images("kept", 1)
    metrics.watch_catalog(lambda: 1, {"changes": lambda: 0})
    metrics.build_info("1", "m", "f", "fp32", "p")
    return metrics


def exported() -> dict[str, frozenset[str]]:
    """Every sample that a scrape may bring, with its labels."""
    text = all_metrics().render()[0].decode()
    return {s.name: frozenset(s.labels) for family in text_string_to_metric_families(text) for s in family.samples}


EXPORTED = exported() | OWN


def expressions() -> Iterator[tuple[str, str]]:
    """Where an expression stands, and the expression."""
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for panel in BOARD["panels"]:
        for target in panel.get("targets", []):
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for annotation in BOARD["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


EXPRESSIONS = dict(expressions())


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_expressions_name_metrics_and_labels_that_exist(where: str) -> None:
    expression = EXPRESSIONS[where]
    bare = re.sub(r'"[^"]*"', '""', expression)
    names = METRIC.findall(re.sub(r"(by|on|group_left) \([^)]*\)", "", bare))
    assert names
    assert set(names) <= set(EXPORTED)
    known = set().union(*(EXPORTED[name] for name in names)) | ADDED
    for labels in re.findall(r"(?:by|on) \(([^)]*)\)", bare):
        assert {label.strip() for label in labels.split(",") if label.strip()} <= known
    for name, selector in re.findall(r"(\w+)\{([^}]*)\}", bare):
        assert set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", selector)) <= EXPORTED[name] | ADDED
    if "_bucket" in expression and "histogram_quantile" in expression:
        assert re.search(r"by \([^)]*\ble\b", expression)
    assert expression.count("(") == expression.count(")")


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_counters_are_read_as_rates(where: str) -> None:
    """The value of a counter says how long ago the process started."""
    expression = EXPRESSIONS[where]
    for name in re.findall(r"\w+(?:_total|_bucket|_sum|_count)\b", expression):
        assert re.search(rf"(rate|increase)\({name}(\{{[^}}]*\}})?\[", expression), name


def test_values_of_labels_exist() -> None:
    text = "\n".join(EXPRESSIONS.values())
    slugs = {kind.slug for kind in KINDS.values()} | set(_HTTP_SLUGS.values())
    types = {value for found in re.findall(r'\btype=~?"([^"]*)"', text) for value in found.split("|")}
    assert types
    assert types <= slugs
    states = set(re.findall(r'\bstate="(\w+)"', text))
    assert states <= {"starting", "ready", "draining", "broken"}
    from service.app import create_app
    from service.settings import Settings

    routes = {value for found in re.findall(r'\broute=~?"([^"]*)"', text) for value in found.split("|")}
    assert routes <= set(create_app(Settings()).openapi()["paths"])


def test_labels_of_legends_exist() -> None:
    for panel in BOARD["panels"]:
        for target in panel.get("targets", []):
            kept = re.search(r"by \(([^)]*)\)", target["expr"])
            labels = {label.strip() for label in kept[1].split(",")} if kept else ADDED
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels | {"le"}, panel["title"]


def test_every_panel_has_data_a_place_and_a_title() -> None:
    panels = BOARD["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["title"]
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["type"] == "row" or panel["targets"]


def test_the_board_shows_every_metric_of_ours() -> None:
    shown = " ".join(target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", []))
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in EXPORTED if name.startswith("hardlook_")}
    assert [family for family in sorted(families) if family not in shown] == []


def test_data_source_is_the_one_that_is_provisioned() -> None:
    sources = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text("utf8"))
    [source] = sources["datasources"]
    found = [json.dumps(value) for value in values_of(BOARD, "datasource")]
    assert set(found) == {json.dumps({"type": source["type"], "uid": source["uid"]})}
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf8"))["services"]
    assert source["url"] == "http://prometheus:9090"
    assert "127.0.0.1:9090:9090" in compose["prometheus"]["ports"]


def values_of(tree: Any, key: str) -> Iterator[Any]:
    """What stands under a key, anywhere."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            else:
                yield from values_of(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from values_of(value, key)


def test_board_is_found_where_it_is_mounted() -> None:
    [provider] = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/hardlook.yml").read_text("utf8"))[
        "providers"
    ]
    grafana = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf8"))["services"]["grafana"]
    mounts = dict(volume.removesuffix(":ro").split(":") for volume in grafana["volumes"])
    folder = provider["options"]["path"]
    assert mounts["./docker/grafana/dashboards"] == folder
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{folder}/hardlook.json"
    assert mounts["./docker/grafana/provisioning"] == "/etc/grafana/provisioning"


def test_prometheus_asks_the_service() -> None:
    from service.app import create_app
    from service.settings import Settings

    config = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text("utf8"))
    [job, _] = config["scrape_configs"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf8"))["services"]
    assert job["job_name"] == "hardlook"
    assert job["static_configs"] == [{"targets": ["hardlook:8000"]}]
    assert "hardlook" in compose
    assert job["metrics_path"] in create_app(Settings()).openapi()["paths"]
    assert all((DOCKER / "prometheus" / name).is_file() for name in config["rule_files"])
    [flag] = [flag for flag in compose["prometheus"]["command"] if flag.startswith("--config.file")]
    assert flag == "--config.file=/etc/prometheus/prometheus.yml"
    assert "./docker/prometheus:/etc/prometheus:ro" in compose["prometheus"]["volumes"]


def test_every_alert_says_what_and_how_bad() -> None:
    rules = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 10
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"]


def test_every_metric_is_documented_and_nothing_else() -> None:
    text = (ROOT / "docs/operations.md").read_text("utf8")
    table = re.findall(r"^\| `(hardlook_\w+)` \| (\w+) \|([^|]*)\|", text, re.MULTILINE)
    body = all_metrics().render()[0].decode()
    types = dict(re.findall(r"^# TYPE (hardlook_\w+) (\w+)$", body, re.MULTILINE))
    assert {name: kind for name, kind, _ in table} == types
    for name, _, labels in table:
        samples = {found for found in EXPORTED if re.fullmatch(rf"{name}(_bucket)?", found)}
        own = set().union(*(EXPORTED[found] for found in samples)) - {"le"}
        assert set(re.findall(r"`(\w+)`", labels)) == own, name
    assert [stage for stage in get_args(Stage) if f"`{stage}`" not in text] == []
    for rule in (rule for group in ALERTS["groups"] for rule in group["rules"]):
        assert set(METRIC.findall(rule["expr"])) & set(EXPORTED)
