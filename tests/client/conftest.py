"""Real services on loopback, with and without API keys, and both clients behind one face."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import uvicorn
from torch import Tensor

from perception.encoder import unit_embeddings
from perception.testing import ToyEncoder, encoded
from service.app import create_app
from service.client import AsyncHardlookClient, HardlookClient
from service.key_file import create_key
from service.settings import Scope
from service.startup import load
from service.testing import publish, toy_pools, toy_settings
from service.wire import ClassifyAnswer, PoolsAnswer, SimilarAnswer
from service.wire_explain import ExplainAnswer
from service.wire_reviews import FeedbackAnswer


class ToyText:
    """Prompts as seeded directions."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        seeds = [int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") for prompt in prompts]
        rows = [torch.randn(self.dim, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return unit_embeddings(torch.stack(rows))


class ToyClip(ToyEncoder):
    """A ToyEncoder with a text tower."""

    @property
    def text(self) -> ToyText:
        return ToyText(self.dim)


@contextmanager
def serving(pools: Path, **changes: Any) -> Iterator[str]:
    """The real application over a real socket; its base URL."""
    settings = toy_settings(pools, **changes)
    config = uvicorn.Config(
        create_app(settings, load(settings, ToyClip())),
        port=0,
        loop="asyncio",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, *arguments: Any, **named: Any) -> None:
            await super().startup(*arguments, **named)
            started.set()

    server = Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert started.wait(30)
        yield "http://{}:{}".format(*server.servers[0].sockets[0].getsockname())
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    publish(root, ToyClip(), toy_pools())
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each pool, called safe.png and so on, all in one folder."""
    folder = tmp_path_factory.mktemp("images")
    paths = {}
    for pool, each in toy_pools().items():
        paths[pool] = folder / f"{pool}.png"
        paths[pool].write_bytes(encoded(each[0]))
    return paths


@pytest.fixture(scope="session")
def service(published: Path) -> Iterator[str]:
    with serving(published, max_images_per_request=4) as url:
        yield url


@pytest.fixture
def own(tmp_path: Path) -> Iterator[str]:
    """A service of its own over toy pools, in which everybody may do everything."""
    folder = tmp_path / "pools"
    publish(folder, ToyClip(), toy_pools())
    with serving(folder, anonymous_scopes=("classify", "similar", "admin"), max_images_per_request=4) as url:
        yield url


@dataclass(frozen=True)
class Guarded:
    """A service that wants keys."""

    url: str
    keys: dict[str, str]


@pytest.fixture(scope="session")
def guarded(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    wanted: dict[str, tuple[Scope, str | None]] = {
        "classify": ("classify", None),
        "metrics": ("metrics", None),
        "slow": ("classify", "1/year"),
    }
    keys = {name: create_key(file, name, (scope,), limit, None)[0] for name, (scope, limit) in wanted.items()}
    with serving(published, keys_file=file) as url:
        yield Guarded(url, keys)


class BlockingPart:
    """A part of an AsyncHardlookClient, or what it iterates over, that is asked like that of the other one."""

    def __init__(self, runner: asyncio.Runner, part: Any) -> None:
        self._runner, self._part = runner, part

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._part, name)

        def called(*arguments: Any, **named: Any) -> Any:
            found = method(*arguments, **named)
            return self._runner.run(found) if asyncio.iscoroutine(found) else self._each(found)

        return called

    def _each(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        async def following() -> tuple[Any, ...]:
            try:
                return (await anext(items),)
            except StopAsyncIteration:
                return ()

        while found := self._runner.run(following()):
            yield found[0]


class Blocking:
    """An AsyncHardlookClient that is asked like the other one."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncHardlookClient(*arguments, **named)
        for name in ("collections", "versions", "shadow", "reviews", "images", "jobs", "audit", "curation"):
            setattr(self, name, BlockingPart(self._runner, getattr(self._client, name)))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def feedback(self, *arguments: Any, **named: Any) -> FeedbackAnswer:
        return self._runner.run(self._client.feedback(*arguments, **named))

    def __repr__(self) -> str:
        return repr(self._client)

    def classify(self, *arguments: Any, **named: Any) -> ClassifyAnswer:
        return self._runner.run(self._client.classify(*arguments, **named))

    def similar(self, *arguments: Any, **named: Any) -> SimilarAnswer:
        return self._runner.run(self._client.similar(*arguments, **named))

    def explain(self, *arguments: Any, **named: Any) -> ExplainAnswer:
        return self._runner.run(self._client.explain(*arguments, **named))

    def pools(self) -> PoolsAnswer:
        return self._runner.run(self._client.pools())

    def is_ready(self) -> bool:
        return self._runner.run(self._client.is_ready())

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


Connect = Callable[..., "HardlookClient | Blocking"]


@pytest.fixture(params=[HardlookClient, Blocking], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients of one kind, and closes them."""
    with ExitStack() as stack:

        def make(*arguments: Any, **named: Any) -> HardlookClient | Blocking:
            client: HardlookClient | Blocking = request.param(*arguments, **named)
            stack.callback(client.close)
            return client

        yield make
