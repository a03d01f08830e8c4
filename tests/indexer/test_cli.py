import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

import perception
from indexer.cli import main
from indexer.contents import Contents
from indexer.snapshot import write_snapshot
from indexer.store import SnapshotStore
from perception.errors import UnknownEncoder
from perception.gallery import Gallery
from perception.testing import ToyEncoder

Make = Callable[..., Contents]
WriteImages = Callable[..., Path]
BUILD = ("build", "--encoder", "toy", "--root", "{root}", "--collection", "pools")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Replaces the loader; returns what it was called with."""
    calls: list[dict[str, object]] = []

    def load_encoder(name: str, **options: object) -> ToyEncoder:
        calls.append({"name": name, **options})
        if name == "absent":
            raise UnknownEncoder(name, ("toy",))
        return ToyEncoder()

    monkeypatch.setitem(vars(perception), "load_encoder", load_encoder)
    return calls


@pytest.fixture
def run(root: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command; '{root}' is replaced. Returns exit code, stdout and stderr."""

    def run(*tokens: object) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(token).replace("{root}", str(root)) for token in tokens])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


Run = Callable[..., tuple[int, str, str]]


def test_build_from_a_folder(run: Run, root: Path, write_images: WriteImages, loaded: list[dict[str, object]]) -> None:
    folder = write_images(3)
    (folder / "safe" / "bad.png").write_bytes(b"")
    code, out, _ = run(*BUILD, "--from-folder", folder, "--precision", "bf16", "--device", "cuda", "--batch-size", 2)
    version = SnapshotStore(root, "pools").current_version()
    assert code == 0
    assert f"published pools {version}: buffer 0, safe 3, unsafe 3" in out
    assert "skipped 1 of 7: UnsupportedFormat 1" in out
    report = root / ".builds" / "pools" / "report.csv"
    assert str(report) in out
    assert "safe/bad.png" in report.read_text()
    assert not (root / ".builds" / "pools" / "parts").exists()
    assert loaded == [{"name": "toy", "precision": "bf16", "device": "cuda"}]
    assert SnapshotStore(root, "pools").load(ToyEncoder().fingerprint).encoder_name == "toy/0"


def test_build_from_a_manifest_and_from_shards(run: Run, root: Path, write_images: WriteImages, tmp_path: Path) -> None:
    folder = write_images(2, labels=("cat",))
    (folder / "list.csv").write_text("path,label\ncat/000.png,cat\ncat/001.png,other\n")
    arguments = ("build", "--encoder", "toy", "--root", root, "--collection", "shop")
    assert run(*arguments, "--from-manifest", folder / "list.csv")[0] == 0
    assert SnapshotStore(root, "shop").load(None).counts == {"cat": 1, "other": 1}
    shards = []
    for i in range(2):
        shards.append(tmp_path / f"{i}.tar")
        with tarfile.open(shards[-1], "w") as archive:
            data = (folder / "cat" / f"00{i}.png").read_bytes()
            member = tarfile.TarInfo(f"x/{i}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert run(*arguments, "--from-tar", *shards)[0] == 0
    assert SnapshotStore(root, "shop").load(None).counts == {"x": 2}


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [
        ((*BUILD,), "give exactly one of --from-folder, --from-manifest, --from-tar; got 0"),
        ((*BUILD, "--from-folder", "{root}/empty", "--from-tar", "{root}/s.tar"), "s.tar: is not a file"),
        ((*BUILD, "--from-folder", "{root}/absent"), "cannot be listed"),
        ((*BUILD, "--from-folder", "{root}/empty", "--precision", "fp8"), "fp8"),
        ((*BUILD, "--from-folder", "{root}/empty", "--batch-size", "0"), "batch_size must be at least 1"),
        ((*BUILD, "--from-folder", "{root}/empty"), "none of 0 entries"),
        (
            (
                "build",
                "--encoder",
                "absent",
                "--root",
                "{root}",
                "--collection",
                "pools",
                "--from-folder",
                "{root}/empty",
            ),
            "unknown encoder 'absent'",
        ),
        (("build", "--root", "{root}"), "--encoder"),
        (("rollback", "--root", "{root}", "--collection", "shop"), "unknown collection 'shop'"),
        (("rollback", "--root", "{root}", "--collection", "../x"), "invalid collection name"),
        (("stats", "--root", "{root}", "--collection", "shop"), "unknown collection 'shop'"),
        (("verify", "--root", "{root}", "--collection", "shop"), "unknown collection 'shop'"),
        (("list", "--root", "{root}/absent"), "cannot be listed"),
        (("import", "{root}/absent", "--root", "{root}", "--collection", "shop", "--encoder-name", "toy"), "absent"),
        (("publish", "{root}/absent", "--root", "{root}", "--collection", "shop"), "cannot be read"),
        (("nonsense",), "nonsense"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(run: Run, root: Path, tokens: tuple[str, ...], complaint: str) -> None:
    (root / "empty").mkdir(parents=True)
    code, out, err = run(*tokens)
    assert code == 2
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert complaint in line
    assert "Traceback" not in err


def test_errors_of_the_operating_system(run: Run, root: Path, make_contents: Make, tmp_path: Path) -> None:
    make_contents("shop").to_gallery().save(tmp_path / "gallery")
    root.write_text("a file where a folder should be")
    code, _, err = run("import", tmp_path / "gallery", "--root", root, "--collection", "shop", "--encoder-name", "x")
    assert code == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_an_interrupt_says_how_to_go_on(run: Run, write_images: WriteImages, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("indexer.build.build", interrupted)
    code, _, err = run(*BUILD, "--from-folder", write_images(1))
    assert code == 130
    assert "the same command goes on" in err


def test_import_export_and_back(run: Run, root: Path, make_contents: Make, tmp_path: Path) -> None:
    contents = make_contents()
    folder = write_snapshot(contents, tmp_path)
    contents.to_gallery().save(tmp_path / "in.safetensors")
    arguments = ("--root", root, "--collection", "pools")
    importing = ("import", tmp_path / "in.safetensors", *arguments, "--encoder-name", "toy/0")
    code, out, _ = run(*importing, "--details", folder / "exemplars.jsonl")
    assert (code, out) == (0, f"published pools {folder.name}: buffer 10, safe 10, unsafe 10\n")
    assert run("export", tmp_path / "out.safetensors", *arguments)[0] == 0
    assert Gallery.load(tmp_path / "out.safetensors").sha256 == contents.to_gallery().sha256
    assert run(*importing)[0] == 0  # without details: another version
    assert SnapshotStore(root, "pools").current_version() != folder.name
    code, out, _ = run("rollback", *arguments)
    assert (code, out) == (0, f"rolled back pools to {folder.name}\n")
    assert run("rollback", *arguments)[0] == 2
    assert run("publish", folder, *arguments)[0] == 0


def test_verify_stats_and_list(run: Run, root: Path, make_contents: Make) -> None:
    pools, shop = SnapshotStore(root, "pools"), SnapshotStore(root, "shop")
    pools.publish(make_contents(seed=1))
    version, other = pools.publish(make_contents(seed=2)), shop.publish(make_contents("shop"))
    assert run("verify", "--root", root) == (0, "pools: sound\nshop: sound\n", "")
    code, out, _ = run("stats", "--root", root, "--collection", "pools")
    assert code == 0
    for expected in (version, "one of 2", "toy/0", "ab" * 32, "buffer 10, safe 10, unsafe 10", "0 images under more"):
        assert expected in out
    code, out, _ = run("list", "--root", root)
    assert [line.split()[:3] for line in out.splitlines()] == [["pools", "pools", version], ["shop", "gallery", other]]
    damaged = root / "pools" / "versions" / version / "vectors.safetensors"
    damaged.write_bytes(b"x")
    code, out, err = run("verify", "--root", root)
    assert (code, out) == (2, "pools: 1 problems\nshop: sound\n")
    assert str(damaged) in err
    assert run("verify", "--root", root, "--collection", "shop")[0] == 0
    assert run("stats", "--root", root, "--collection", "pools")[0] == 2
    (root / "pools" / "CURRENT").write_text("x")
    code, out, _ = run("list", "--root", root)
    assert code == 0
    assert "damaged" in out
    assert other in out


def test_stats_counts_images_under_two_labels(run: Run, root: Path, write_images: WriteImages) -> None:
    folder = write_images(2)
    (folder / "unsafe" / "copy.png").write_bytes((folder / "safe" / "000.png").read_bytes())
    assert run(*BUILD, "--from-folder", folder)[0] == 0
    assert "conflicts    1 images under more than one label" in run("stats", "--root", root, "--collection", "pools")[1]


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys, indexer.cli\n"
        "try: indexer.cli.main(['--help'])\n"
        "finally: assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for command in ("build", "import", "publish", "rollback", "verify", "export", "stats", "list"):
        assert command in done.stdout
