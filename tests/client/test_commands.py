"""The commands that change a service, each against a real one: what they print, and their exit codes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from indexer.catalog.chain import verify_jsonl
from perception.testing import encoded, synthetic_image
from service.client.cli import main
from service.client.commands.options import ALL_ANSWERED, NOT_DONE, SOME_ERRORS, VERDICT_FOUND
from tests.client.conftest import Guarded
from tests.client.scripted import pools, problem, response, scripted

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(own: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command against a service of its own: exit code, stdout, stderr."""
    monkeypatch.setenv("HARDLOOK_URL", own)
    monkeypatch.delenv("HARDLOOK_API_KEY", raising=False)

    def run(*tokens: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(token) for token in tokens])
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.out, printed.err

    return run


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images and a file that is none."""
    folder = tmp_path / "new"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.png").write_bytes(encoded(synthetic_image(4000 + i)))
    (folder / "bad.png").write_bytes(b"no image")
    return folder


def test_exemplars(run: Run, folder: Path, tmp_path: Path) -> None:
    add = ("exemplars", "add", folder, "--label", "unsafe", "--metadata", "a=b", "--reason", "#214")
    code, out, err = run(*add)
    assert (code, err) == (SOME_ERRORS, "2 added, 1 errors\n")
    added = {Path(record["path"]).name: record for record in lines(out)}
    assert added["bad.png"]["error"]["type"] == "urn:hardlook:problem:unsupported-format"
    id = added["0.png"]["id"]
    assert added["0.png"]["label"] == "unsafe"
    (folder / "bad.png").unlink()
    (folder / "again.png").write_bytes((folder / "0.png").read_bytes())
    assert run(*add, "--format", "table")[::2] == (ALL_ANSWERED, "3 present\n")
    assert run("classify", folder / "0.png", "--fail-on", "unsafe")[0] == VERDICT_FOUND

    [shown] = lines(run("exemplars", "show", id, "--json")[1])
    assert shown["item"]["metadata"] == {"a": "b"}
    assert run("exemplars", "move", id, "safe", "--reason", "a dog")[1].startswith(f"safe      active       {id}")
    assert "nothing to change: pools" in run("exemplars", "move", id, "safe")[1]
    assert run("classify", folder / "0.png", "--fail-on", "unsafe")[0] == ALL_ANSWERED
    assert "disabled" in run("exemplars", "disable", id, "--until", "2999-01-01")[1]
    assert "disabled until:  2999-01-01T00:00:00.000000+00:00" in run("exemplars", "show", id)[1]
    assert "active" in run("exemplars", "enable", id)[1]
    assert run("exemplars", "note", id, "looked at", "--source", "report")[0] == ALL_ANSWERED
    assert "note:  looked at" in run("exemplars", "show", id)[1]
    assert run("exemplars", "delete", id, "--reason", "gone")[0] == ALL_ANSWERED
    assert [line.split()[2] for line in run("exemplars", "list", "--label", "safe")[1].splitlines()] == [
        f"safe-{i}" for i in range(3)
    ]
    assert len(lines(run("exemplars", "list", "--json")[1])) == 10

    code, out, _ = run("suppress", folder / "1.png", "unsafe-0", "--min-similarity", 0.9, "--json")
    assert (code, lines(out)[0]["items"][0]["suppresses"]) == (ALL_ANSWERED, ["unsafe-0"])


def test_what_exemplars_refuse(run: Run, folder: Path, tmp_path: Path) -> None:
    image = folder / "0.png"
    add = ("exemplars", "add", image, "--label")
    for tokens, reason in [
        ((*add, "good"), "no such label"),
        ((*add, "safe", "--collection", "none"), "no published gallery"),
        ((*add, "safe", "--metadata", "x"), "NAME=VALUE"),
        ((*add, "safe", "--id", "x", "--list", "-"), "--id is for one image"),
        (("exemplars", "add", folder, "--label", "safe", "--id", "x"), "--id is for one image"),
        (("exemplars", "add", "--label", "safe"), "name files"),
        (("exemplars", "add", image), "label"),
        ((*add, "safe", "--concurrency", 0), "--concurrency"),
        ((*add, "safe", "--frame", -1), "frame"),
        (("exemplars", "show", "none"), "404"),
        (("exemplars", "note", "safe-0"), "give a note"),
        (("exemplars", "move", "safe-0"), "label"),
        (("suppress", image, "safe-0", "--min-similarity", 2), "min_similarity: Input should be less"),
        (("suppress", tmp_path / "none", "safe-0"), "No such file"),
        (("suppress", image), "suppresses"),
    ]:
        code, out, err = run(*tokens)
        assert (code, out) == (NOT_DONE, ""), tokens
        assert reason in err, tokens
        assert err.splitlines()[-1].startswith("hardlook: ")
    assert run(*add, "safe", "--id", "x/y")[0] == ALL_ANSWERED
    assert run(*add, "safe", "--id", "x/y")[2] == "1 present\n"
    assert run(*add, "unsafe", "--id", "x/y")[::2] == (SOME_ERRORS, "1 errors\n")
    assert run("exemplars", "delete", "x/y")[0] == ALL_ANSWERED
    assert run(*add, "unsafe")[0] == ALL_ANSWERED
    code, out, _ = run(*add, "safe")
    assert (code, lines(out)[0]["error"]["type"]) == (SOME_ERRORS, "urn:hardlook:problem:exemplar-exists")


def test_versions_and_shadow(run: Run, folder: Path) -> None:
    [published] = lines(run("versions", "publish", "before", "--reason", "r", "--json")[1])
    before = published["version"]
    [changed] = lines(run("exemplars", "move", "safe-0", "unsafe", "--json")[1])
    after = changed["version"]
    out = run("versions", "diff", before, after)[1]
    assert "moved    safe-0  safe -> unsafe\n" in out
    assert "1 moved" in out
    assert run("classify", folder / "0.png")[0] == ALL_ANSWERED
    assert f"version {before}: " in run("versions", "dry-run", before)[1]
    assert lines(run("versions", "dry-run", before, "--limit", 5, "--json")[1])[0]["changed"] == 0
    assert f"version {before}" in run("shadow", "start", before, "--reason", "r")[1]
    assert lines(run("shadow", "show", "--json")[1])[0]["candidates"] != []
    assert run("shadow", "stop")[1] == "no candidate runs\n"
    assert f"rolled back: pools  {before}" in run("versions", "rollback", before)[1]
    assert after in run("versions", "rollback", "--revision", changed["revision"])[1]
    kinds = [line.split()[3] for line in run("versions", "list")[1].splitlines()]
    assert kinds == ["rollback", "rollback", "publish", "base"]
    for tokens in (
        ("versions", "rollback"),
        ("versions", "rollback", before, "--revision", 1),
        ("versions", "dry-run"),
        ("versions", "dry-run", before, "--encoder"),
        ("versions", "dry-run", "--encoder"),
        ("versions", "publish", " "),
        ("shadow", "start", "0" * 16),
    ):
        assert run(*tokens)[0] == NOT_DONE


def test_reviews(run: Run, folder: Path) -> None:
    for name in ("0.png", "1.png"):
        [record] = lines(run("classify", folder / name)[1])
        kind = "false-positive" if record["verdict"] == "unsafe" else "false-negative"
        code, out, _ = run("feedback", kind, "--request-id", record["request_id"], "--comment", "w\u009brong")
        assert code == ALL_ANSWERED
        assert out.startswith("review ")
    ids = [line.split()[0] for line in run("reviews", "list")[1].splitlines()]
    assert "w\\x9brong" in run("reviews", "list")[1]
    assert run("reviews", "claim", "--for-s", 60)[1].split()[:2] == [ids[0], "claimed"]
    code, out, _ = run("reviews", "decide", ids[0], "unsafe", "--reason", "a weapon", "--note", "n")
    assert code == ALL_ANSWERED
    assert "decided: pools" in out
    assert run("classify", folder / "0.png", "--fail-on", "unsafe")[0] == VERDICT_FOUND
    assert run("reviews", "claim", ids[0])[0] == NOT_DONE
    assert run("reviews", "claim", ids[1], "--origin", "flood")[0] == NOT_DONE
    assert lines(run("reviews", "claim", ids[1], "--json")[1])[0]["review"]["id"] == ids[1]
    assert run("reviews", "release", ids[1])[1].split()[1] == "open"
    assert run("reviews", "skip", ids[1], "--reason", "no idea")[1].split()[1] == "skipped"
    assert run("reviews", "show", ids[1])[1].split()[1] == "skipped"
    assert run("reviews", "claim")[:2] == (SOME_ERRORS, "nothing is open\n")
    assert len(lines(run("reviews", "list", "--state", "all", "--json")[1])) == 2
    assert run("reviews", "decide", ids[1], "maybe")[0] == NOT_DONE
    assert run("feedback", "false-positive")[0] == NOT_DONE


def test_jobs(run: Run, folder: Path, tmp_path: Path) -> None:
    (folder / "link.png").symlink_to("nowhere")
    code, out, err = run("jobs", "submit", folder, "--per-job", 2)
    ids = out.split()
    assert (code, len(ids), "No such file" in err) == (SOME_ERRORS, 2, True)
    code, out, err = run("jobs", "results", *ids, "--wait", "--fail-on", "safe,review,unsafe")
    records = {Path(record["path"]).name: record for record in lines(out)}
    assert (code, set(records)) == (VERDICT_FOUND, {"0.png", "1.png", "bad.png"})
    assert records["bad.png"]["error"]["type"] == "urn:hardlook:problem:unsupported-format"
    assert records["0.png"].keys() - {"position"} == lines(run("classify", folder / "0.png")[1])[0].keys()
    assert "1 errors" in err
    assert run("jobs", "wait", *ids)[0] == SOME_ERRORS
    assert [line.split()[0] for line in run("jobs", "list")[1].splitlines()] == ids[::-1]
    assert lines(run("jobs", "show", ids[0], "--json")[1])[0]["state"] == "done"
    assert run("jobs", "cancel", ids[0])[1].split()[1] == "done"
    [job] = lines(run("jobs", "submit", folder / "0.png", "--json")[1])
    assert run("jobs", "wait", job["id"], "--max-wait", 60)[0] == ALL_ANSWERED
    assert run("jobs", "results", job["id"], "--format", "table")[0] == ALL_ANSWERED
    for tokens in (
        ("submit",),
        ("wait",),
        ("results",),
        ("cancel",),
        ("show", "none"),
        ("submit", folder, "--per-job", 0),
    ):
        assert run("jobs", *tokens)[0] == NOT_DONE


def test_audit(run: Run, tmp_path: Path) -> None:
    run("exemplars", "move", "safe-0", "unsafe", "--reason", "be\u202ecause")
    assert "be\\u202ecause" in run("audit", "list", "--kind", "exemplar.move")[1]
    entries = lines(run("audit", "list", "--json")[1])
    file = tmp_path / "audit.jsonl"
    assert run("audit", "export", file, "--embeddings")[0] == ALL_ANSWERED
    with file.open("rb") as exported:
        checked = verify_jsonl(exported)
    assert (checked.intact, checked.n) == (True, len(entries))
    code, out, _ = run("audit", "verify")
    assert code == ALL_ANSWERED
    assert f"changes: intact, {len(entries)} entries, head {len(entries)}:{entries[-1]['hash']}" in out
    assert "pools: replayed from its log, the same" in out
    assert lines(run("audit", "verify", "--json")[1])[0]["sound"]
    assert "File exists" in run("audit", "export", file)[2]


def test_1_a_log_that_is_not_whole() -> None:
    state = {"chain": "changes", "entries": 2, "seq": 2, "hash": "0", "problems": ["entry 1 was changed"]}
    body = {"request_id": "r", "sound": False, "chains": [state], "replayed": {"pools": False}}
    reply = response(200, json.dumps(body).encode())
    with scripted(**{"audit/verify": [reply]}) as server, pytest.raises(SystemExit) as ended:
        main(["audit", "verify", "--url", server.url])
    assert ended.value.code == SOME_ERRORS


def test_collections(run: Run, folder: Path, tmp_path: Path) -> None:
    assert "created: shop" in run("collections", "create", "shop")[1]
    assert "there already" in run("collections", "create", "shop")[1]
    for id in ("a", "b"):
        run("exemplars", "add", folder / "0.png", "--label", "shown", "--collection", "shop", "--id", id)
    out = run("collections", "duplicates", "shop", "--min-similarity", 0.99)[1]
    assert out.startswith("2 alike in shown\n  keep")
    assert "1 of 1 groups  shop" in out
    run("exemplars", "add", folder / "0.png", "--label", "safe", "--id", "a")
    run("exemplars", "add", folder / "0.png", "--label", "unsafe", "--id", "b")
    assert "contradictions  pools" in run("collections", "contradictions")[1]
    code, out, _ = run("collections", "probe", "a dog", "--collection", "shop", "--not", "a cat", "--json")
    assert (code, lines(out)[0]["collection"]) == (ALL_ANSWERED, "shop")
    assert run("collections", "probe", "--collection", "shop")[0] == NOT_DONE
    file = tmp_path / "shop.bin"
    assert run("collections", "export", "shop", file)[1] == f"wrote {file}  {file.stat().st_size} bytes\n"
    assert "2 exemplars in the file" in run("collections", "import", "other", file, "--reason", "moved")[1]
    assert "nothing to change" in run("collections", "import", "other", file, "--on-conflict", "skip")[1]
    assert run("collections", "import", "other", folder / "bad.png")[0] == NOT_DONE


def test_2_a_key_without_the_scope(guarded: Guarded, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARDLOOK_API_KEY", guarded.keys["classify"])
    code, out, err = run("exemplars", "list", "--url", guarded.url)
    assert (code, out, "403" in err, err.count("\n")) == (NOT_DONE, "", True, 1)


def test_2_additions_end_at_the_first_answer_that_all_would_get(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = {"collections/pools/exemplars": [problem(409, "editing-disabled")]}
    with scripted(pools=[pools()], **replies) as server, pytest.raises(SystemExit) as ended:
        main(["exemplars", "add", str(folder), "--label", "safe", "--url", server.url, "--concurrency", "1"])
    assert (ended.value.code, len(server.of("/collections/pools/exemplars"))) == (NOT_DONE, 1)
    assert "broken off: no images" in capsys.readouterr().err
