"""Pools that change while they serve: nothing acknowledged is lost or half done, no answer mixes two states."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from indexer.catalog.clock import now, parse_time
from indexer.catalog.database import Database
from indexer.catalog.ledger import Catalog
from indexer.catalog.state import Stamp
from indexer.live.collection import LiveCollection
from indexer.live.view import View
from perception.encoder import encode_images
from perception.testing import ToyEncoder, encoded, synthetic_image
from service.testing import publish, toy_pools
from tests.journeys.servers import Server, running

ENCODER = ToyEncoder()
STAMP = Stamp(ENCODER.name, ENCODER.fingerprint, ENCODER.dim)
EXEMPLARS = "/collections/pools/exemplars"
AT_ONCE = 200
EDITORS, CLASSIFIERS = 10, 20
POOLS = ("safe", "buffer", "unsafe")
SETTINGS: dict[str, Any] = {"anonymous_scopes": "admin", "max_requests": 2 * AT_ONCE, "decode_workers": 1}


def item(id: str, label: str, seed: int) -> dict[str, Any]:
    row = np.random.default_rng(seed).normal(size=ENCODER.dim)
    embedding = (row / np.linalg.norm(row)).astype(np.float32).tolist()
    return {"id": id, "label": label, "embedding": embedding, "fingerprint": ENCODER.fingerprint}


@contextmanager
def opened(url: str, root: Path) -> Iterator[Catalog]:
    with closing(Database.open(url)) as database:
        yield Catalog(database, root)


def listed(client: httpx.Client) -> dict[str, dict[str, Any]]:
    """Every exemplar of the pools by id."""
    found: dict[str, dict[str, Any]] = {}
    after: str | None = ""
    while after is not None:
        page = client.get(EXEMPLARS, params={"after": after, "limit": 1000}).json()
        found.update((exemplar["id"], exemplar) for exemplar in page["items"])
        after = page["next"]
    return found


def add_until_killed(server: Server, round_: int) -> tuple[set[str], set[str]]:
    """200 additions at once, and a kill -9 in the middle; ids that were acknowledged, and all that were asked for."""
    acknowledged: set[str] = set()
    asked = {f"r{round_}-{n}" for n in range(AT_ONCE)}
    limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
    enough = threading.Event()
    random_ = random.Random(round_)

    with httpx.Client(base_url=server.client.base_url, timeout=60, trust_env=False, limits=limits) as client:

        def add(id: str) -> None:
            try:
                response = client.post(EXEMPLARS, json={"items": [item(id, "safe", hash(id) % 2**32)], "reason": "r"})
            except httpx.TransportError:
                return
            assert response.status_code == 200, response.text
            assert response.json()["items"][0]["id"] == id
            acknowledged.add(id)
            if len(acknowledged) >= threshold:
                enough.set()

        threshold = random_.randint(1, AT_ONCE - 1)
        with ThreadPoolExecutor(AT_ONCE) as threads:
            for id in asked:
                threads.submit(add, id)
            enough.wait(60)
            time.sleep(random_.uniform(0, 0.03))
            assert server.process is not None
            server.process.kill()
            server.process.wait()
    return acknowledged, asked


def kill_again_and_again(rounds: int, url: str, root: Path, log: Path) -> None:
    publish(root, ENCODER, toy_pools())
    known = {f"{pool}-{n}" for pool in POOLS for n in range(3)}
    acknowledged: set[str] = set()
    asked: set[str] = set()
    cut = 0
    for round_ in range(rounds):
        with running(root, log, catalog=url, **SETTINGS) as server:
            assert acknowledged <= listed(server.client).keys() - known <= asked
            verified = server.client.post("/audit/verify").json()
            assert verified["sound"], verified
            new, wanted = add_until_killed(server, round_)
            acknowledged |= new
            asked |= wanted
            cut += len(new) < AT_ONCE
    with running(root, log, catalog=url, **SETTINGS) as server:  # the last kill's restart
        there = listed(server.client).keys() - known
        assert acknowledged <= there <= asked
        assert server.client.post("/audit/verify").json()["sound"]
    with opened(url, root) as catalog:
        assert catalog.replayed("pools") == catalog.state("pools")
    assert cut > 0, "every addition was acknowledged before the kill: it came too late to show anything"
    print(f"{rounds} kills: {len(acknowledged)} additions acknowledged, {len(there)} there, {cut} rounds cut short")


@pytest.mark.slow
def test_a_kill_loses_nothing_that_was_acknowledged(catalog_url: str, tmp_path: Path) -> None:
    kill_again_and_again(3, catalog_url, tmp_path / "pools", tmp_path)


@pytest.mark.load
@pytest.mark.timeout(3600)
def test_fifty_kills_lose_nothing_that_was_acknowledged(catalog_url: str, tmp_path: Path) -> None:
    kill_again_and_again(50, catalog_url, tmp_path / "pools", tmp_path)


class Editing:
    """One editor: a random walk over exemplars of its own, and what they must be at the end."""

    def __init__(self, number: int) -> None:
        self.number, self.random = number, random.Random(number)
        self.expected: dict[str, tuple[str, str, str]] = {}
        self.made = 0

    def step(self, client: httpx.Client) -> None:
        ids = sorted(self.expected)
        action = self.random.choice(("add", "add", "move", "disable", "enable", "note", "delete") if ids else ("add",))
        if action == "add":
            id, label = f"e{self.number}-{self.made}", self.random.choice(POOLS)
            answer = client.post(EXEMPLARS, json={"items": [item(id, label, 1000 * self.number + self.made)]})
            self.expected[id] = (label, "active", "")
        else:
            id = self.random.choice(ids)
            label, state, note = self.expected[id]
            if action == "delete":
                answer = client.delete(f"{EXEMPLARS}/{id}")
                del self.expected[id]
            else:
                label = self.random.choice(POOLS) if action == "move" else label
                state = {"disable": "disabled", "enable": "active"}.get(action, state)
                note = f"note {self.made}" if action == "note" else note
                change = {"label": label, "note": note, "disabled": state == "disabled"}
                answer = client.patch(f"{EXEMPLARS}/{id}", json=change)
                self.expected[id] = (label, state, note)
        assert answer.status_code == 200, answer.text
        self.made += 1


def edit_and_classify(seconds: float, url: str, root: Path, log: Path) -> None:
    publish(root, ENCODER, toy_pools())
    pictures = [synthetic_image(seed) for seed in range(40)]
    files = [encoded(picture) for picture in pictures]
    editors = [Editing(number) for number in range(EDITORS)]
    answers: list[tuple[int, dict[str, Any]]] = []
    failures: list[str] = []
    stop = threading.Event()

    def repeat(step: Callable[[httpx.Client], None], base_url: httpx.URL) -> None:
        with httpx.Client(base_url=base_url, timeout=60, trust_env=False) as client:
            while not stop.is_set() and not failures:
                try:
                    step(client)
                except BaseException as error:
                    failures.append(repr(error)[:500])

    def classify(client: httpx.Client) -> None:
        number = random.randrange(len(files))
        response = client.post("/classify", content=files[number], headers={"content-type": "image/png"})
        assert response.status_code == 200, response.text
        answers.append((number, response.json()))

    with running(root, log, catalog=url, compact_after=100, **SETTINGS) as server:
        base_url = server.client.base_url
        steps = [editor.step for editor in editors] + [classify] * CLASSIFIERS
        threads = [threading.Thread(target=repeat, args=(step, base_url)) for step in steps]
        for thread in threads:
            thread.start()
        stop.wait(seconds)
        stop.set()
        for thread in threads:
            thread.join()
        assert not failures, failures
        found = listed(server.client)
        assert server.client.post("/audit/verify").json()["sound"]
    expected = {id: value for editor in editors for id, value in editor.expected.items()}
    present = {id: (e["label"], e["state"], e["note"]) for id, e in found.items() if id.startswith("e")}
    assert present == expected
    embeddings = encode_images(ENCODER, pictures)
    with opened(url, root) as catalog:
        assert catalog.replayed("pools") == catalog.state("pools")
        revisions = check_answers(catalog, root, answers, embeddings.numpy())
    made = sum(editor.made for editor in editors)
    print(f"{seconds:.0f} s: {made} edits, {len(answers)} answers of {revisions} revisions, no error, none mixed")


def check_answers(
    catalog: Catalog, root: Path, answers: list[tuple[int, dict[str, Any]]], embeddings: np.ndarray[Any, Any]
) -> int:
    """Each answer is what the state that it names answers; how many states answered."""
    live = LiveCollection(root, "pools", STAMP.fingerprint, STAMP.name, STAMP.dim)
    by_revision: dict[int, list[tuple[int, dict[str, Any]]]] = {}
    for number, answer in answers:
        by_revision.setdefault(answer["snapshot"]["revision"], []).append((number, answer))
    every = sorted(by_revision)
    for revision in every[:: max(1, len(every) // 200)]:
        state = catalog.state_at("pools", revision)
        at = parse_time(state.changed_at) if state.changed_at else now()
        view: View = live.view_of(state, catalog.embeddings, at)
        for number, answer in by_revision[revision]:
            assert answer["snapshot"]["version"] == state.version
            [evidence] = view.evidence(embeddings[number : number + 1], 3)
            neighbors = sorted(evidence.neighbors, key=lambda neighbor: -neighbor.similarity)
            shown = answer["results"][0]["neighbors"]
            assert {n["id"] for n in shown} == {n.id for n in neighbors}
            assert {n["id"]: n["pool"] for n in shown} == {n.id: n.pool for n in neighbors}
            wanted = [n.similarity for n in neighbors]
            assert [n["similarity"] for n in shown] == pytest.approx(wanted, abs=1e-5)
    return len(every)


@pytest.mark.slow
def test_ten_edit_and_twenty_classify_at_once(catalog_url: str, tmp_path: Path) -> None:
    edit_and_classify(5.0, catalog_url, tmp_path / "pools", tmp_path)


@pytest.mark.load
@pytest.mark.timeout(900)
def test_ten_edit_and_twenty_classify_for_two_minutes(catalog_url: str, tmp_path: Path) -> None:
    edit_and_classify(120.0, catalog_url, tmp_path / "pools", tmp_path)
