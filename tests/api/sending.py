"""What tests of collections send, in few words."""

import base64
from typing import Any

from fastapi.testclient import TestClient

from perception.testing import encoded, synthetic_image

EXEMPLARS = "/collections/pools/exemplars"


IMAGE: dict[str, Any] = {"content": encoded(synthetic_image(1)), "headers": {"content-type": "image/png"}}


def send(client: TestClient, method: str, path: str, **headers: str) -> Any:
    """A request with these headers, and an image where it has a body."""
    request = IMAGE if method == "POST" else {"headers": {}}
    return client.request(method, path, **{**request, "headers": {**request["headers"], **headers}})


def exemplar(id: str, label: str, data: bytes, **more: Any) -> dict[str, Any]:
    """One that is to be added."""
    return {"id": id, "label": label, "data": base64.b64encode(data).decode(), **more}


def added(client: TestClient, *items: dict[str, Any], reason: str = "") -> dict[str, Any]:
    """Add exemplars to the pools."""
    response = client.post(EXEMPLARS, json={"items": list(items), "reason": reason})
    assert response.status_code == 200, response.text
    return dict(response.json())


def classify(client: TestClient, data: bytes) -> dict[str, Any]:
    """The whole answer to one image."""
    response = client.post("/classify", content=data, headers={"content-type": "image/png"})
    assert response.status_code == 200, response.text
    return dict(response.json())


def verdict(client: TestClient, data: bytes) -> tuple[str, str]:
    """The verdict, and the exemplar that is nearest."""
    [item] = classify(client, data)["results"]
    return item["verdict"], item["neighbors"][0]["id"]
