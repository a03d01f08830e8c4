"""One small service over ToyEncoder, with pools, a gallery and a text tower, for all tests of the HTTP surface."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor

from perception.encoder import unit_embeddings
from perception.testing import ToyEncoder, encoded, synthetic_image
from service.app import create_app
from service.engine import ServingEncoder
from service.settings import Settings
from service.startup import load
from service.testing import publish, toy_pools, toy_settings

Start = Callable[..., TestClient]
Serve = Callable[..., TestClient]


class ToyText:
    """Prompts as seeded directions."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        rows = []
        for prompt in prompts:
            seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")
            rows.append(torch.randn(self.dim, generator=torch.Generator().manual_seed(seed)))
        return unit_embeddings(torch.stack(rows))


class ToyClip(ToyEncoder):
    """A ToyEncoder with a text tower."""

    @property
    def text(self) -> ToyText:
        return ToyText(self.dim)


@pytest.fixture(scope="session")
def encoder() -> ToyClip:
    return ToyClip()


@pytest.fixture(scope="session")
def pool_images() -> dict[str, list[Image.Image]]:
    return toy_pools(per_pool=4)


@pytest.fixture(scope="session")
def gallery_images() -> list[Image.Image]:
    return [synthetic_image(1000 + i) for i in range(5)]


@pytest.fixture(scope="session")
def root(
    tmp_path_factory: pytest.TempPathFactory,
    encoder: ToyClip,
    pool_images: dict[str, list[Image.Image]],
    gallery_images: list[Image.Image],
) -> Path:
    folder = tmp_path_factory.mktemp("published")
    publish(folder, encoder, pool_images)
    publish(folder, encoder, {"landmark": gallery_images}, collection="landmarks")
    return folder


@pytest.fixture(scope="session")
def client(root: Path, encoder: ToyClip) -> Iterator[TestClient]:
    settings = toy_settings(
        root, max_image_bytes=200_000, max_body_bytes=500_000, max_pixels=100_000, max_images_per_request=6
    )
    with served(settings, encoder) as client:
        yield client


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a service over ToyEncoder with settings of its own."""
    with _starting(tmp_path) as started:
        yield started


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts a service over published toy pools, in which everybody may do everything."""
    with _starting(tmp_path, anonymous_scopes=("admin",)) as started:
        yield started


@contextmanager
def served(settings: Settings, encoder: ServingEncoder) -> Iterator[TestClient]:
    """A service in this process."""
    with closing(load(settings, encoder)) as loaded:
        app = create_app(settings, loaded)
        with TestClient(app, raise_server_exceptions=False) as client:
            yield client


@contextmanager
def _starting(root: Path, **defaults: Any) -> Iterator[Start]:
    encoder = ToyEncoder()
    publish(root, encoder, toy_pools())
    with ExitStack() as stack:
        yield lambda **changes: stack.enter_context(served(toy_settings(root, **{**defaults, **changes}), encoder))


@pytest.fixture(scope="session")
def unsafe_png(pool_images: dict[str, list[Image.Image]]) -> bytes:
    return encoded(pool_images["unsafe"][0])
