import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from cyclopts import App
from numpy.typing import NDArray

import perception
from indexer import catalog_cli, cli, curation_cli
from indexer.catalog import chain
from indexer.catalog.database import Database
from indexer.catalog.edits import Annotate, Delete, Disable, Move, Publish
from indexer.contents import Contents, Exemplar
from indexer.live.view import View
from indexer.opened import opened_view
from indexer.pool_file import export, read_pool_file, write_pool_file
from indexer.store import SnapshotStore
from perception.testing import ToyEncoder
from tests.indexer.edited import Edited, edited

Make = Callable[..., Contents]
Unit = Callable[..., NDArray[np.float32]]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def run(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in `root`; returns exit code, stdout and stderr."""

    def mounted() -> App:
        app = App(name="hardlook-index")
        catalog_cli.mount(app)
        curation_cli.mount(app)
        return app

    monkeypatch.setattr(cli, "_app", mounted)
    monkeypatch.delenv("HARDLOOK_CATALOG", raising=False)

    def run(*tokens: object) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main([*map(str, tokens), "--root", str(root)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@contextmanager
def lived(root: Path, make_contents: Make, unit: Unit) -> Iterator[Edited]:
    """Pools that were published, then edited."""
    with edited(root) as pools:
        pools.publish(make_contents(n=9))
        pools.apply(pools.add("new", unit(9, 1)[0], "unsafe", "a note"))
        pools.apply(Move("pools", "x001", "safe"), Disable("pools", "x002"))
        pools.apply(Publish("pools", "before the festival"))
        pools.apply(Delete("pools", "x000"), Annotate("pools", "x004", source="elsewhere"))
        yield pools


def test_history(run: Run, root: Path, make_contents: Make, unit: Unit) -> None:
    with lived(root, make_contents, unit):
        code, out, _ = run("history")
        lines = out.splitlines()
        assert code == 0
        kinds = ["version.base", "exemplar.add", "exemplar.move", "exemplar.disable", "version.publish"]
        assert [line.split("  ")[2] for line in lines] == [*kinds, "exemplar.delete", "exemplar.annotate"]
        assert lines[1].split("  ")[3:] == ["test", "pools", "new", "'because'"]
        assert [line.split("  ")[0] for line in run("history", "--limit", 2)[1].splitlines()] == ["6", "7"]
        assert len(run("history", "--kind", "exemplar.add", "exemplar.move")[1].splitlines()) == 2
        assert len(run("history", "--subject", "x002")[1].splitlines()) == 1
        assert run("history", "--collection", "shop")[1] == ""
        [entry] = json.loads(run("history", "--kind", "exemplar.add", "--json")[1])
        assert entry["body"]["records"][0]["note"] == "a note"
        assert run("history", "--chain", "decisions")[1] == ""


def test_nothing_is_made_by_reading(run: Run, root: Path, make_contents: Make) -> None:
    for command in (("history",), ("audit", "verify"), ("versions", "--collection", "pools")):
        code, out, err = run(*command)
        assert (code, out) == (2, "")
        assert err.startswith("error: catalogue sqlite:///")
        assert "there is none" in err
        assert err.count("\n") == 1
    SnapshotStore(root, "pools").publish(make_contents(n=6))
    assert run("duplicates", "--collection", "pools")[0] == 0
    assert not list(root.glob("catalog*"))


def test_the_catalogue_can_be_elsewhere(
    run: Run, root: Path, tmp_path: Path, make_contents: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with edited(elsewhere) as pools:
        pools.create()
    url = f"sqlite:///{elsewhere}/catalog.sqlite3"
    assert "collection.create" in run("history", "--catalog", url)[1]
    monkeypatch.setenv("HARDLOOK_CATALOG", url)
    assert "collection.create" in run("history")[1]


def test_verify(run: Run, root: Path, make_contents: Make, unit: Unit, tmp_path: Path) -> None:
    with lived(root, make_contents, unit):
        code, out, err = run("audit", "verify", "--replay", "--embeddings")
        assert (code, err) == (0, "")
        assert out.splitlines()[0].startswith("changes: intact, 7 entries, head 7:")
        assert out.splitlines()[1].startswith("decisions: intact, 0 entries, head 0:")
        assert out.splitlines()[2] == "pools: replayed from its log, the same"
        head = out.splitlines()[0].rpartition(" ")[2]
        assert run("audit", "verify", "--chain", "changes", "--head", head)[0] == 0
        other = head[:-1] + ("0" if head[-1] != "0" else "1")
        code, out, err = run("audit", "verify", "--chain", "changes", "--head", other, "--json")
        assert code == 1
        assert json.loads(out)["chains"]["changes"]["problems"]
        code, out, err = run("audit", "verify", "--chain", "changes", "--head", other)
        assert (code, out.startswith("changes: 1 problems")) == (1, True)
        assert err.startswith("changes: ")
        assert run("audit", "verify", "--head", head)[0] == 2
        assert run("audit", "verify", "--chain", "changes", "--head", "7")[0] == 2
        file = tmp_path / "log.jsonl"
        assert run("audit", "export", file, "--embeddings")[0] == 0
        assert len(file.read_bytes().splitlines()) == 7
        assert run("audit", "verify", "--file", file)[0] == 0
        code, _, err = run("audit", "export", file)
        assert (code, "is there already" in err) == (2, True)
        file.write_bytes(file.read_bytes().replace(b"because", b"becausf", 1))
        code, out, err = run("audit", "verify", "--file", file)
        assert code == 1
        assert "problems" in out
        assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["log.jsonl"]


def test_verify_finds_what_was_changed(run: Run, root: Path, make_contents: Make, unit: Unit) -> None:
    with lived(root, make_contents, unit) as pools, pools.catalog.database.writing() as connection:
        for name in connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'trigger'").scalars().all():
            connection.exec_driver_sql(f"DROP TRIGGER {name}")
        connection.exec_driver_sql("UPDATE entries SET actor = 'nobody' WHERE seq = 3")
    code, out, err = run("audit", "verify")
    assert code == 1
    assert out.startswith("changes: 1 problems")
    assert err.startswith("changes: entry 3")


def decide(database: Database, times: list[str]) -> None:
    with database.writing() as connection:
        for number, time in enumerate(times):
            chain.append(connection, "decisions", [chain.Draft("decision", "test", subject=str(number))], time=time)


def test_prune(run: Run, root: Path, tmp_path: Path) -> None:
    file = tmp_path / "old.jsonl"
    with edited(root) as pools:
        pools.create()
        decide(pools.catalog.database, [f"2026-11-{day:02d}T12:00:00.000000+00:00" for day in range(1, 11)])
        assert run("audit", "prune", "--before", "2026-11-01", "--export", file)[1] == "nothing is that old\n"
        assert not file.exists()
        code, out, err = run("audit", "prune", "--before", "2026-11-04", "--export", file, "--reason", "30 days")
        assert (code, err) == (0, "")
        assert out.startswith("removed 3 decisions up to 3:")
        assert len(file.read_bytes().splitlines()) == 3
        assert [line.split("  ")[5] for line in run("history", "--chain", "decisions")[1].splitlines()] == [
            str(n) for n in range(3, 10)
        ]
        assert run("audit", "verify")[0] == 0
        assert run("audit", "verify", "--file", file)[0] == 0
        [entry] = json.loads(run("history", "--kind", "audit.prune", "--json")[1])
        assert (entry["reason"], entry["body"]["before"], entry["body"]["entries"]) == ("30 days", 4, 3)
        assert entry["actor"].startswith("hardlook-index")
        code, _, err = run("audit", "prune", "--before", "2026-11-05", "--export", file)
        assert (code, "is there already" in err) == (2, True)
        again = tmp_path / "rest.jsonl"
        assert run("audit", "prune", "--before", "2027-01-01T00:00:00+0000", "--export", again)[0] == 0
        assert len(again.read_bytes().splitlines()) == 7
        assert run("audit", "verify")[0] == 0
        assert run("history", "--chain", "decisions")[1] == ""


def test_versions_diff_and_roll_back(run: Run, root: Path, make_contents: Make, unit: Unit) -> None:
    pools = ("--collection", "pools")
    with lived(root, make_contents, unit) as living:
        staged = living.store.stage(make_contents(n=3))
        code, out, _ = run("versions", *pools)
        based, published, on_disk, present = out.splitlines()
        assert code == 0
        assert based.split("  ")[3] == "version.base"
        assert published.split("  ")[3:] == ["version.publish", "test", "before the festival"]
        assert on_disk == f"{staged}  on disk only"
        assert present == f"present: {living.state.version} at revision 7"
        version = published.split("  ")[0]
        listed = json.loads(run("versions", *pools, "--json")[1])
        assert listed["versions"][1]["version"] == version
        assert listed["present"]["version"] == living.state.version

        found = json.loads(run("diff", version, "present", *pools, "--json")[1])
        assert found == {"added": [], "removed": ["x000"], "moved": [], "changed": ["x004"]}
        out = run("diff", based.split("  ")[0], version, *pools)[1]
        assert out.splitlines() == ["added 1: new", "removed 0", "moved 1: x001 (buffer to safe)", "changed 1: x002"]
        assert run("diff", "1", "4", *pools)[1].startswith("added 1: new")

        code, out, _ = run("rollback-to", version, *pools, "--reason", "wrong")
        assert (code, out) == (0, f"rolled back pools to {version}\n")
        assert run("rollback-to", version, *pools, "--reason", "wrong")[1] == f"nothing to do: pools to {version}\n"
        assert run("diff", version, "present", *pools)[1].splitlines() == [
            "added 0", "removed 0", "moved 0", "changed 0"
        ]  # fmt: skip
        living.catalog.follow()
        assert living.state.version == version
        for bad in ("f" * 16, "99"):
            code, _, err = run("rollback-to", bad, *pools, "--reason", "wrong")
            assert code == 2
            assert "never had" in err
            assert run("diff", bad, "present", *pools)[0] == 2
        assert run("rollback-to", version, *pools)[0] == 2  # a reason is needed


def answers(view: View) -> list[list[object]]:
    return [list(hits) for hits in view.search(view.contents().embeddings, 5)]


def test_compact(run: Run, root: Path, make_contents: Make, unit: Unit) -> None:
    with lived(root, make_contents, unit) as living:
        before = answers(living.view())
        code, out, _ = run("compact", "--collection", "pools", "--reason", "grown")
        living.catalog.follow()
        assert code == 0
        assert out == f"compacted pools to {living.state.version}: 5 changed records, now 2\n"
        assert answers(living.view()) == before
        assert run("compact", "--collection", "pools")[1] == f"nothing to do: pools {living.state.version}\n"
        assert run("compact", "--collection", "shop")[0] == 2


def test_duplicates_and_contradictions(run: Run, root: Path, unit: Unit) -> None:
    rows = unit(3, 3)
    exemplars = [Exemplar(f"e{i}", label) for i, label in enumerate(["safe", "safe", "unsafe"])]
    contents = Contents.arrange("pools", "toy/0", "ab" * 32, exemplars, np.stack([rows[0], rows[0], rows[1]]))
    with edited(root) as pools:
        pools.publish(contents)
        pools.apply(pools.add("wrong", rows[0], "unsafe"))
        code, out, err = run("duplicates", "--collection", "pools")
        assert (code, err) == (0, "")
        assert out.splitlines() == [
            "2 alike in safe", "  keep    1.0000  e0", "  delete  1.0000  e1", "1 groups; 1 exemplars could be deleted"
        ]  # fmt: skip
        assert run("duplicates", "--collection", "pools", "--label", "unsafe")[1].startswith("0 groups")
        found = json.loads(run("duplicates", "--collection", "pools", "--json")[1])
        assert [m["exemplar"]["id"] for m in found["groups"][0]["members"]] == ["e0", "e1"]
        assert run("duplicates", "--collection", "pools", "--min-similarity", "0")[0] == 2
        assert run("duplicates", "--collection", "pools", "--label", "dogs")[0] == 2

        out = run("contradictions")[1]
        assert "unsafe  wrong: look\n" in out
        assert "one of the two is mislabelled" in out
        worst = json.loads(run("contradictions", "--limit", 1, "--json")[1])["contradictions"]
        assert len(worst) == 1
        assert worst[0]["suggestion"] == "look"
        assert ", the first 1 shown" in run("contradictions", "--limit", 1)[1]


class Text:
    """A text tower in which every prompt of a kind has one place."""

    def __init__(self, places: dict[str, NDArray[np.float32]]) -> None:
        self.places = places

    def encode_text(self, prompts: list[str]) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.places[prompt] for prompt in prompts]))


def test_probe(run: Run, root: Path, unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ToyEncoder(dim=12)
    rows = unit(3, 2)
    gallery = Contents.arrange("shop", "toy/0", encoder.fingerprint, [Exemplar("a", ""), Exemplar("b", "")], rows)
    SnapshotStore(root, "shop").publish(gallery)

    def load_encoder(name: str, **options: object) -> ToyEncoder:
        made = ToyEncoder(dim=12, seed=int(name))
        if name == "0":
            object.__setattr__(made, "text", Text({"a photo of a": rows[0], "a photo of b": rows[1]}))
        return made

    monkeypatch.setitem(vars(perception), "load_encoder", load_encoder)
    command = ("probe", "--gallery", "shop", "--text", "a photo of a", "--encoder", "0")
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "1.0000  a  'a photo of a'"
    assert out.splitlines()[-1] == "2 candidates, 0 of them in a pool already"
    pools = Contents.arrange("pools", "toy/0", encoder.fingerprint, [Exemplar("known", "unsafe")], rows[:1])
    SnapshotStore(root, "pools").publish(pools)
    found = json.loads(run(*command, "--not", "a photo of b", "--json")[1])
    assert [c["exemplar"]["id"] for c in found["candidates"]] == ["a"]
    assert found["candidates"][0]["known"] == {"id": "known", "pool": "unsafe", "similarity": pytest.approx(1.0)}
    assert found["candidates"][0]["contrast"] == pytest.approx(1.0 - float(rows[0] @ rows[1]), abs=1e-6)
    assert run(*command[:-1], "1")[0] == 2  # another encoder
    assert run(*command, "-k", "0")[0] == 2
    monkeypatch.setitem(vars(perception), "load_encoder", lambda name, **_: ToyEncoder(dim=12))
    code, _, err = run(*command)
    assert (code, err) == (2, "error: encoder '0' has no text tower\n")


def test_export(run: Run, root: Path, tmp_path: Path, make_contents: Make, unit: Unit) -> None:
    file = tmp_path / "all.pool"
    with lived(root, make_contents, unit) as living:
        source = living.view()
    code, out, _ = run("export-pool", file, "--collection", "pools")
    assert code == 0
    assert f"8 exemplars of pools {source.version}" in out
    assert run("export-pool", tmp_path / "unsafe.pool", "--collection", "pools", "--label", "unsafe")[0] == 0
    assert set(read_pool_file(tmp_path / "unsafe.pool").contents.counts) == {"buffer", "safe", "unsafe"}
    assert run("export-pool", file, "--collection", "shop")[0] == 2


def exported(folder: Path, make_contents: Make, unit: Unit) -> tuple[View, Path]:
    """A view of pools elsewhere, and their pool file."""
    (folder / "there").mkdir()
    with lived(folder / "there", make_contents, unit) as living:
        view = living.view()
    write_pool_file(folder / "all.pool", export(view))
    return view, folder / "all.pool"


def test_import(run: Run, root: Path, tmp_path: Path, make_contents: Make, unit: Unit) -> None:
    source, file = exported(tmp_path, make_contents, unit)
    code, out, err = run("import-pool", file, "--reason", "from a friend")
    assert (code, err) == (0, "")
    assert "imported pools " in out
    with opened_view(root, "", "pools") as view:
        assert list(view.active()) == list(source.active())
        assert view.contents().embeddings.tobytes() == source.contents().embeddings.tobytes()
        noted = view.record("new")
        assert noted is not None
        assert noted.note == "a note"
    assert "nothing to do" in run("import-pool", file)[1]
    assert [e["reason"] for e in json.loads(run("history", "--kind", "pool.import", "--json")[1])] == ["from a friend"]
    with edited(root) as pools:
        pools.apply(Move("pools", "x001", "unsafe"))
    code, _, err = run("import-pool", file)
    assert (code, "has an exemplar 'x001' already" in err) == (2, True)
    assert "nothing to do" in run("import-pool", file, "--on-conflict", "skip")[1]
    assert "imported" in run("import-pool", file, "--on-conflict", "replace")[1]
    assert run("audit", "verify", "--replay")[0] == 0
    file.write_bytes(file.read_bytes()[:-1])
    code, _, err = run("import-pool", file)
    assert (code, "cut off or damaged" in err) == (2, True)


def test_a_large_import_becomes_a_snapshot(
    run: Run, root: Path, tmp_path: Path, make_contents: Make, unit: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexer.pool_import.MOST_EDITS", 3)
    source, file = exported(tmp_path, make_contents, unit)
    with edited(root) as pools:
        pools.publish(make_contents(n=3))
        pools.apply(Delete("pools", "x002"), Disable("pools", "x001"))
    code, _, err = run("import-pool", file, "--on-conflict", "replace")
    assert (code, err) == (0, "")
    with opened_view(root, "", "pools") as view:
        assert view.exemplar("x001").label == "safe"
        assert not view.is_active("x001")
        assert {e.id for e in view.active()} == {e.id for e in source.active()} - {"x001"} | {"x000"}
        assert view.state.base == SnapshotStore(root, "pools").current_version()
    kinds = [e["kind"] for e in json.loads(run("history", "--json")[1])]
    assert kinds.count("version.base") == 2
    assert kinds.count("exemplar.add") == 0
    assert "nothing to do" in run("import-pool", file, "--on-conflict", "replace")[1]
    assert run("audit", "verify", "--replay")[0] == 0


def test_help_needs_no_database() -> None:
    code = "import sys; from indexer import catalog_cli, curation_cli; print('sqlalchemy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
