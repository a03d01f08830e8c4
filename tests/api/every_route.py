"""One request for each route, which a prepared service answers well."""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.testclient import TestClient

from perception.testing import encoded, synthetic_image
from service.app import create_app
from service.settings import Settings
from service.testing import toy_pools

Route = tuple[str, str]
Headers = Mapping[str, str]
NOBODY: Headers = {}
ROUTES: list[Route] = [
    (method.upper(), path)
    for path, operations in create_app(Settings()).openapi()["paths"].items()
    for method in operations
]
# What a caller must be allowed; None where any scope will do.
GUARDED: Mapping[str, str | None] = {
    "/classify": "classify",
    "/similar": "similar",
    "/explain": "review",
    "/pools": None,
    "/metrics": "metrics",
    "/v1/moderations": "classify",
    "/adapters/pict-rs": "classify",
    "/collections": "pools:write",
    "/collections/{name}/exemplars": "pools:write",
    "/collections/{name}/exemplars/{id}": "pools:write",
    "/collections/{name}/suppressions": "pools:write",
    "/collections/{name}/versions": "pools:write",
    "/collections/{name}/rollback": "pools:write",
    "/collections/{name}/diff": "pools:write",
    "/collections/{name}/dry-run": "pools:write",
    "/collections/{name}/duplicates": "pools:write",
    "/collections/{name}/contradictions": "pools:write",
    "/collections/{name}/probes": "pools:write",
    "/collections/{name}/file": "pools:write",
    "/shadow": "pools:write",
    "/audit": "admin",
    "/audit/export": "admin",
    "/audit/verify": "admin",
    "/images/{sha256}": "review",
    "/audits": "pools:write",
    "/audits/{id}/report": "pools:write",
    "/audits/{id}/replay": "pools:write",
    "/reviews": "review",
    "/reviews/{id}": "review",
    "/reviews/{id}/claim": "review",
    "/reviews/{id}/release": "review",
    "/reviews/{id}/decide": "review",
    "/reviews/{id}/skip": "review",
    "/feedback": "classify",
    "/jobs": "classify",
    "/jobs/{id}": "classify",
    "/jobs/{id}/results": "classify",
}
# Scopes that do as well as the one above.
ALSO: Mapping[str, set[str]] = {"/images/{sha256}": {"pools:write"}}
PROBES = {"/livez", "/healthz", "/startupz", "/readyz"}
# Routes whose requests count against the caller's rate limit.
LIMITED: set[Route] = {
    ("POST", "/classify"),
    ("POST", "/similar"),
    ("POST", "/explain"),
    ("GET", "/pools"),
    ("POST", "/v1/moderations"),
    ("POST", "/adapters/pict-rs"),
    ("POST", "/collections/{name}/exemplars"),
    ("GET", "/collections/{name}/duplicates"),
    ("GET", "/collections/{name}/contradictions"),
    ("POST", "/collections/{name}/probes"),
    ("GET", "/collections/{name}/file"),
    ("POST", "/collections/{name}/file"),
    ("POST", "/feedback"),
    ("POST", "/jobs"),
}
PNG = encoded(synthetic_image(1))
PNG64 = base64.b64encode(PNG).decode()


@dataclass(frozen=True)
class Sample:
    """A request: the path with its parameters filled in, and what else goes with it."""

    path: str
    request: Mapping[str, Any] = field(default_factory=dict)
    status: int = 200

    def send(self, client: TestClient, method: str, **headers: str) -> Any:
        """Send it with further headers."""
        return client.request(
            method, self.path, **{**self.request, "headers": {**self.request.get("headers", {}), **headers}}
        )


def samples(
    version: str = "0" * 16,
    review: str = "0" * 32,
    job: str = "0" * 32,
    seen: str = "0" * 64,
    pool_file: bytes = b"",
) -> dict[Route, Sample]:
    """A request for each route.

    Args:
        version: one that the pools have.
        review: of an item of the queue.
        job: of a job.
        seen: sha256 of an image that was just found safe.
        pool_file: of the pools.
    """
    pools, item, one = "/collections/pools", f"/reviews/{review}", f"/jobs/{job}"
    new = {"id": "new", "label": "unsafe", "data": PNG64}
    suppress = {"id": "taken-away", "suppresses": ["safe-0"], "data": PNG64}
    return {
        **_always_the_same(),
        ("GET", "/images/{sha256}"): Sample(f"/images/{seen}", status=404),  # none is kept
        ("POST", "/collections"): Sample("/collections", {"json": {"name": "landmarks"}}),
        ("GET", "/collections/{name}/exemplars"): Sample(f"{pools}/exemplars"),
        ("POST", "/collections/{name}/exemplars"): Sample(f"{pools}/exemplars", {"json": {"items": [new]}}),
        ("GET", "/collections/{name}/exemplars/{id}"): Sample(f"{pools}/exemplars/safe-0"),
        ("PATCH", "/collections/{name}/exemplars/{id}"): Sample(f"{pools}/exemplars/safe-0", {"json": {"note": "a"}}),
        ("DELETE", "/collections/{name}/exemplars/{id}"): Sample(f"{pools}/exemplars/safe-1?reason=gone"),
        ("POST", "/collections/{name}/suppressions"): Sample(f"{pools}/suppressions", {"json": suppress}),
        ("GET", "/collections/{name}/versions"): Sample(f"{pools}/versions"),
        ("POST", "/collections/{name}/versions"): Sample(f"{pools}/versions", {"json": {"name": "a name"}}),
        ("POST", "/collections/{name}/rollback"): Sample(f"{pools}/rollback", {"json": {"version": version}}),
        ("GET", "/collections/{name}/diff"): Sample(f"{pools}/diff?before={version}&after={version}"),
        ("POST", "/collections/{name}/dry-run"): Sample(f"{pools}/dry-run", {"json": {"version": version}}),
        ("GET", "/collections/{name}/duplicates"): Sample(f"{pools}/duplicates"),
        ("GET", "/collections/{name}/contradictions"): Sample(f"{pools}/contradictions"),
        ("POST", "/collections/{name}/probes"): Sample(f"{pools}/probes", {"json": {"prompts": ["a dog"]}}),
        ("GET", "/collections/{name}/file"): Sample(f"{pools}/file"),
        ("POST", "/collections/{name}/file"): Sample(f"{pools}/file?on_conflict=skip", {"content": pool_file}),
        ("PUT", "/shadow"): Sample("/shadow", {"json": {"version": version}}),
        ("POST", "/reviews/{id}/claim"): Sample(f"{item}/claim", {"json": {"for_s": 5}}),
        ("POST", "/reviews/{id}/release"): Sample(f"{item}/release"),
        ("POST", "/reviews/{id}/skip"): Sample(f"{item}/skip", {"json": {"reason": "I cannot tell"}}),
        ("POST", "/reviews/{id}/decide"): Sample(f"{item}/decide", {"json": {"label": "dismiss"}}),
        ("GET", "/reviews/{id}"): Sample(item),
        ("POST", "/feedback"): Sample("/feedback", {"json": {"kind": "false-negative", "sha256": seen}}),
        ("POST", "/jobs"): Sample("/jobs", {"json": {"images": [{"data": PNG64}]}}, 202),
        ("GET", "/jobs/{id}"): Sample(one),
        ("DELETE", "/jobs/{id}"): Sample(one),
        ("GET", "/jobs/{id}/results"): Sample(f"{one}/results"),
        **{
            (method, path): Sample(path)
            for method, path in ROUTES
            if "{" not in path and (method in ("GET", "DELETE") or path == "/audit/verify")
        },
    }


def _always_the_same() -> dict[Route, Sample]:
    """Those that need nothing to be there."""
    image = {"content": PNG, "headers": {"content-type": "image/png"}}
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG64}"}}
    return {
        ("POST", "/classify"): Sample("/classify", image),
        ("POST", "/similar"): Sample("/similar", image),
        ("POST", "/explain"): Sample("/explain", image),
        # No audits are there: what the routes say of one is in test_audit_runs.
        ("GET", "/audits/{id}/report"): Sample("/audits/demo/report", status=404),
        ("POST", "/audits/{id}/replay"): Sample("/audits/demo/replay", {"json": {"system": "demo"}}, 404),
        ("POST", "/v1/moderations"): Sample("/v1/moderations", {"json": {"input": [part]}}),
        ("POST", "/adapters/pict-rs"): Sample("/adapters/pict-rs?review=accept", image),
    }


def prepared(client: TestClient, caller: Headers = NOBODY, editor: Headers = NOBODY) -> dict[Route, Sample]:
    """Make what the requests are about: a job, an item to review, a verdict to report.

    Args:
        client: of a running service.
        caller: headers of one who may classify.
        editor: headers of one who may change pools.
    """

    def reported(label: str, kind: str) -> str:
        data = encoded(toy_pools()[label][2])
        answer = client.post("/classify", content=data, headers={**caller, "content-type": "image/png"})
        assert answer.json()["results"][0]["verdict"] == label
        sha256 = hashlib.sha256(data).hexdigest()
        if kind:
            report = client.post("/feedback", json={"kind": kind, "sha256": sha256}, headers=caller)
            assert report.status_code == 200, report.text
            return str(report.json()["review_id"])
        return sha256

    collections = client.get("/pools", headers=caller).json()["collections"]
    [version] = [found["version"] for found in collections if found["name"] == "pools"]
    job = client.post("/jobs", json={"images": [{"data": PNG64}]}, headers=caller).json()["job"]["id"]
    pool_file = client.get("/collections/pools/file", headers=editor).content
    return samples(version, reported("unsafe", "false-positive"), job, reported("safe", ""), pool_file)
