"""Both clients against a real service that changes: exemplars, versions, reviews, jobs, the audit log, curation."""

import hashlib
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from indexer.catalog.chain import verify_jsonl
from perception.encoder import encode_images
from perception.testing import encoded, synthetic_image
from service.client import Conflict, HardlookClient, JobUnfinished, NewExemplar, NotFound, ProblemError, Url
from service.client.clients import Wrong
from service.wire import ClassifyItem
from service.wire_jobs import Job, JobItem, JobItemError
from tests.client.conftest import Connect, ToyClip

STRANGE = ["a/b//c d", "\u00e4\u2603\U0001f600", "..", ".", "%2F?#&=+", "../../pools", " ", "-x", "e\u0301"]
PNG = encoded(synthetic_image(4244))
OTHER = encoded(synthetic_image(5000))


@pytest.fixture
def client(own: str) -> Iterator[HardlookClient]:
    with HardlookClient(own) as client:
        yield client


def verdict(client: Any, image: bytes = PNG) -> tuple[str, str]:
    """The verdict and the exemplar that is nearest."""
    [item] = client.classify(image).results
    assert isinstance(item, ClassifyItem)
    return item.verdict.value, item.neighbors[0].id


def test_add_classify_move_roll_back(connect: Connect, own: str, tmp_path: Path) -> None:
    client = connect(own)
    before = verdict(client)
    (tmp_path / "new.png").write_bytes(PNG)
    added = client.collections.add("pools", tmp_path / "new.png", "unsafe", reason="#214", metadata={"a": "b"})
    [item] = added.items
    assert (added.changed, item.id, item.metadata) == (True, hashlib.sha256(PNG).hexdigest()[:16], {"a": "b"})
    assert verdict(client) == ("unsafe", item.id)
    assert not client.collections.add("pools", PNG, "unsafe", metadata={"a": "b"}).changed
    with pytest.raises(Conflict) as refused:
        client.collections.add("pools", PNG, "safe")
    assert refused.value.slug == "exemplar-exists"

    named = client.versions.publish("pools", "with the new one")
    assert named.version == added.version
    moved = client.collections.move("pools", item.id, "safe", reason="a dog")
    assert verdict(client) == ("safe", item.id)
    found = client.versions.diff("pools", added.version, moved.version)
    assert [(each.id, each.was, each.now) for each in found.moved] == [(item.id, "unsafe", "safe")]
    client.collections.disable("pools", item.id, until=datetime.now(UTC) + timedelta(hours=1))
    assert client.collections.exemplar("pools", item.id).item.state == "disabled"
    assert verdict(client) == before
    assert client.collections.enable("pools", item.id).changed
    client.collections.change("pools", item.id, note="looked at", source="report 214")
    assert client.collections.exemplar("pools", item.id).item.note == "looked at"

    assert client.versions.rollback("pools", added.version).version == added.version
    assert verdict(client) == ("unsafe", item.id)
    assert client.versions.rollback("pools", moved.revision, reason="again").version == moved.version
    kinds = [version.kind for version in client.versions.list("pools", page_size=1)]
    assert kinds == ["rollback", "rollback", "publish", "base"]
    client.collections.delete("pools", item.id, reason="gone")
    with pytest.raises(NotFound):
        client.collections.delete("pools", item.id)
    assert verdict(client) == before


def test_ids_may_be_anything(client: HardlookClient) -> None:
    client.collections.create("gallery")
    images = [(id, encoded(synthetic_image(3000 + i))) for i, id in enumerate(STRANGE)]
    for image in images:
        client.collections.add("gallery", image, label="class/\u00e4")
    found = [item.id for item in client.collections.exemplars("gallery", page_size=2)]
    assert sorted(found) == sorted(STRANGE)
    for id in STRANGE:
        assert client.collections.exemplar("gallery", id).item.id == id
        assert client.collections.change("gallery", id, note=id).items[0].note == id
        client.collections.delete("gallery", id, reason=id)
    assert list(client.collections.exemplars("gallery")) == []
    assert len(list(client.collections.exemplars("pools", label="safe"))) == 3
    with pytest.raises(ValueError, match="empty"):
        client.collections.delete("gallery", "")


def test_several_are_added_together_or_not_at_all(client: HardlookClient) -> None:
    embedding = encode_images(ToyClip(), [synthetic_image(6000)]).numpy()[0]
    fingerprint = client.pools().model.fingerprint
    ready = NewExemplar(id="e", label="buffer", embedding=embedding.tolist(), fingerprint=fingerprint)
    with pytest.raises(ProblemError, match=r"items\.1"):
        client.collections.add("pools", [ready, b"no image"], "safe")
    answer = client.collections.add("pools", [ready, ("named", OTHER), PNG], "safe", source="here")
    assert [(item.id, item.label, item.source) for item in answer.items][:2] == [
        ("e", "buffer", ""),
        ("named", "safe", "here"),
    ]
    assert answer.retroactive is not None
    with pytest.raises(TypeError, match="label"):
        client.collections.add("pools", PNG)
    with pytest.raises(ValueError, match="no images"):
        client.collections.add("pools", [], "safe")
    with pytest.raises(ProblemError, match="fetch"):
        client.collections.add("pools", Url("https://example.org/a.png"), "safe")
    with pytest.raises(ValueError, match="timezone"):
        client.collections.disable("pools", "e", until=datetime(2999, 1, 1))  # noqa: DTZ001 - it is refused


def test_suppressed_exemplars_are_no_evidence(client: HardlookClient) -> None:
    client.collections.add("pools", ("wrong", PNG), "unsafe")
    answer = client.collections.suppress("pools", PNG, ["wrong"], min_similarity=0.9, reason="a mistake")
    assert answer.items[0].suppresses == ["wrong"]
    [result] = client.classify(PNG).results
    assert isinstance(result, ClassifyItem)
    assert [item.id for item in result.suppressed] == ["wrong"]


def test_try_out_a_version(client: HardlookClient) -> None:
    before = client.classify(PNG).snapshot.version
    now = client.collections.add("pools", PNG, "unsafe").version
    client.classify(PNG)
    assert client.versions.dry_run(version=before).candidate == f"version {before}"
    assert [c.candidate for c in client.shadow.start(before).candidates] == [f"version {before}"]
    assert client.shadow.show().candidates != []
    assert client.shadow.stop().candidates == []
    assert client.classify(PNG).snapshot.version == now
    with pytest.raises(NotFound):
        client.shadow.start("0" * 16)


def test_from_a_report_to_a_pool(connect: Connect, own: str) -> None:
    client = connect(own)
    ids = []
    for image in (PNG, OTHER):
        answer = client.classify(image)
        kind: Wrong = "false-positive" if verdict(client, image)[0] == "unsafe" else "false-negative"
        ids.append(client.feedback(kind, request_id=answer.request_id, comment="wrong").review_id)
    assert [item.id for item in client.reviews.list(state="open", page_size=1)] == ids
    assert client.reviews.counts()["open"] == 2
    claimed = client.reviews.claim_next(for_s=60)
    assert claimed is not None
    assert (claimed.review.id, claimed.review.state) == (ids[0], "claimed")
    decided = client.reviews.decide(ids[0], "unsafe", reason="shows a weapon", note="n")
    assert decided.review.exemplar_id is not None
    assert verdict(client) == ("unsafe", decided.review.exemplar_id)
    with pytest.raises(Conflict) as taken:
        client.reviews.claim(ids[0])
    assert taken.value.slug == "review-taken"
    assert client.reviews.release(client.reviews.claim(ids[1]).review.id).review.state == "open"
    assert client.reviews.skip(ids[1], reason="cannot tell").review.state == "skipped"
    assert client.reviews.get(ids[1]).review.comment == "wrong"
    assert client.reviews.claim_next() is None
    with pytest.raises(NotFound):
        client.feedback("false-negative", sha256="0" * 64)


def test_a_job_from_images_to_results(connect: Connect, own: str, images: dict[str, Path]) -> None:
    client = connect(own)
    job = client.jobs.submit([*images.values(), ("bad", b"no image")], k=1).job
    assert (job.total, job.state) == (4, "queued")
    seen: list[Job] = []
    done = client.jobs.wait(job.id, timeout_s=60, progress=seen.append).job
    assert (done.state, done.done, done.failed) == ("done", 3, 1)
    assert seen[-1] == done
    results = list(client.jobs.results(job.id, page_size=1))
    assert [result.id for result in results] == ["safe.png", "buffer.png", "unsafe.png", "bad"]
    assert isinstance(results[3], JobItemError)
    assert [r.verdict.value for r in results if isinstance(r, JobItem)] == ["safe", "review", "unsafe"]
    again = list(client.jobs.run([images["unsafe"], PNG]))
    assert [result.position for result in again] == [0, 1]
    assert [each.total for each in client.jobs.list(page_size=1)] == [2, 4]
    assert client.jobs.cancel(job.id).job.state == "done"
    assert client.jobs.get(job.id).job == done
    with pytest.raises(NotFound):
        client.jobs.wait("0" * 32)


def test_the_log_is_exported_whole_and_checked(connect: Connect, own: str, tmp_path: Path) -> None:
    client = connect(own)
    client.collections.add("pools", PNG, "unsafe", reason="because")
    client.collections.move("pools", "safe-0", "buffer")
    entries = list(client.audit.entries(page_size=1))
    assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
    [added] = client.audit.entries(kind="exemplar.add", collection="pools")
    assert (added.reason, added.actor) == ("because", "anonymous")
    file = tmp_path / "audit.jsonl"
    saved = client.audit.export(file, embeddings=True)
    assert (saved.path, saved.size_bytes) == (file, file.stat().st_size)
    with file.open("rb") as lines:
        checked = verify_jsonl(lines)
    assert (checked.intact, checked.n, checked.head.hash) == (True, len(entries), entries[-1].hash)
    answer = client.audit.verify()
    assert answer.sound
    assert answer.chains[0].hash == entries[-1].hash
    with pytest.raises(FileExistsError):
        client.audit.export(file)
    with pytest.raises(FileNotFoundError):
        client.audit.export(tmp_path / "none" / "file")
    with pytest.raises(ProblemError):
        client.audit.export(tmp_path / "other", after=-1)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["audit.jsonl"]


def test_collections_are_looked_through_and_taken_elsewhere(client: HardlookClient, tmp_path: Path) -> None:
    client.collections.add("pools", [("one", PNG)], "safe")
    client.collections.add("pools", [("two", PNG)], "safe")
    client.collections.add("pools", [("three", PNG)], "unsafe")
    [group] = client.curation.duplicates("pools", min_similarity=0.9999, limit=10).groups
    assert {member.id for member in group.members} == {"one", "two"}
    assert "three" in {item.id for item in client.curation.contradictions().items}
    probed = client.curation.probe("pools", "a dog", negatives=["a cat"], k=3)
    assert {item.prompt for item in probed.items} <= {"a dog"}
    file = tmp_path / "pools.bin"
    client.collections.create("shop")
    client.collections.add("shop", [PNG, OTHER], "shown")
    saved = client.curation.export_file("shop", file, label="shown")
    assert saved.size_bytes == file.stat().st_size
    taken = client.curation.import_file("elsewhere", file, reason="moved")
    assert (taken.changed, taken.exemplars) == (True, 2)
    assert not client.curation.import_file("elsewhere", file, on_conflict="skip").changed
    with pytest.raises(ProblemError) as refused:
        client.curation.import_file("elsewhere", Path(__file__))
    assert refused.value.slug == "invalid-pool-file"


def test_waiting_for_a_job_ends(connect: Connect, own: str) -> None:
    """With a job that somebody else ends, and one whose time is over at the first poll."""
    client = connect(own)
    job = client.jobs.submit([encoded(synthetic_image(7000 + i)) for i in range(30)]).job
    with pytest.raises(JobUnfinished) as unfinished:
        client.jobs.wait(job.id, timeout_s=0.0)
    assert unfinished.value.job.id == job.id
    other = threading.Thread(target=lambda: connect(own).jobs.cancel(job.id))
    other.start()
    assert client.jobs.wait(job.id).job.state in ("cancelled", "done")
    other.join()
    results = list(client.jobs.results(job.id, wait=True))
    assert [result.position for result in results] == list(range(len(results)))
