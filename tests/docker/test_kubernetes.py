"""The example for Kubernetes agrees with the service and with the image that it runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.app import create_app
from service.settings import Settings, read_settings

ROOT = Path(__file__).parents[2]
OBJECTS: dict[str, dict[str, Any]] = {
    found["kind"]: found for found in yaml.safe_load_all((ROOT / "docker/kubernetes.yml").read_text("utf8"))
}
POD: dict[str, Any] = OBJECTS["Deployment"]["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text("utf8")


def environment() -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in CONTAINER["env"]}


def test_objects_select_the_same_pods() -> None:
    assert set(OBJECTS) == {"Deployment", "Service", "PodDisruptionBudget"}
    labels = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert OBJECTS["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert OBJECTS["Service"]["spec"]["selector"] == labels
    assert OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert OBJECTS["PodDisruptionBudget"]["spec"]["minAvailable"] < OBJECTS["Deployment"]["spec"]["replicas"]


def test_probes_ask_routes_that_exist() -> None:
    paths = create_app(Settings()).openapi()["paths"]
    asked = {name: CONTAINER[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert asked == {"startupProbe": "/startupz", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    assert set(asked.values()) <= set(paths)
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert {CONTAINER[name]["httpGet"]["port"] for name in asked} <= set(ports)
    assert OBJECTS["Service"]["spec"]["ports"][0]["targetPort"] in ports
    assert f"EXPOSE {ports['http']}" in DOCKERFILE


def test_settings_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    settings = read_settings(environment())
    assert settings.keys_file is not None
    assert str(settings.keys_file.parent) in {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    waits_s = settings.shutdown_delay_s + settings.deadline_s + 1 + 5
    assert POD["terminationGracePeriodSeconds"] > waits_s
    gibibytes = int(CONTAINER["resources"]["limits"]["memory"].removesuffix("Gi"))
    bodies_and_decoders = (
        settings.max_requests * settings.max_body_bytes + settings.decode_workers * settings.decode_memory_bytes
    )
    assert gibibytes * 2**30 > bodies_and_decoders + 2 * 2**30  # the encoder and its libraries


def test_the_pod_is_confined() -> None:
    pod, container = POD["securityContext"], CONTAINER["securityContext"]
    user = re.search(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    assert user is not None
    assert (pod["runAsUser"], pod["runAsGroup"]) == (int(user[1]), int(user[2]))
    assert pod["runAsNonRoot"] is True
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["readOnlyRootFilesystem"] is True
    assert container["allowPrivilegeEscalation"] is False
    assert container["capabilities"] == {"drop": ["ALL"]}
    assert POD["automountServiceAccountToken"] is False


def test_every_mount_has_a_volume_and_the_image_its_folders() -> None:
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in POD["volumes"]}
    assert {"/tmp", "/data/models", "/data/pools"} <= set(mounts.values())


def test_the_image_has_a_version() -> None:
    assert re.search(r":\d+\.\d+\.\d+$", CONTAINER["image"])
