"""`hardlook-lab benchmark roxford|rparis`: the vector of methods 6.4 from a pickle and files to the figures."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from offline import cli
from offline.benchmarks.retrieval import GroundTruth, RevisitedQuery
from offline.data.revisited import default_folder, open_revisited_folder
from offline.errors import DataError, PlanError, RunError
from perception.testing import ToyEncoder
from tests.offline.things_revisited_layouts import EASY, HARD, JUNK, MEDIUM_AP, QUERIES, entry, revisited

EASY_AP, HARD_AP = 25.0, 100 * (2 + 1 / 2 + 2 / 3) / 4
NAMES = {"roxford": "roxford5k", "rparis": "rparis6k"}
loaded: list[str] = []


class CountingToy(ToyEncoder):
    """Says how many images were encoded, over all instances."""

    seen = 0

    def encode(self, pixels: Tensor) -> Tensor:
        CountingToy.seen += len(pixels)
        return super().encode(pixels)


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded.clear()

    def load(name: str, **_: object) -> ToyEncoder:
        loaded.append(name)
        return CountingToy(dim=64, seed=int(name[-1]))

    monkeypatch.setattr("perception.catalogue.load_encoder", load)


def benchmark(suite: str, *arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.app(["benchmark", suite, "--encoder", "toy/0", *arguments])
    assert ended.value.code in (0, None)


def figures(path: Path) -> dict[str, float]:
    return {figure["name"]: figure["measured"] for figure in json.loads(path.read_text())["figures"]}


@pytest.mark.parametrize("suite", ["roxford", "rparis"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_the_vector_comes_out_of_the_published_layout(tmp_path: Path, suite: str, protocol: int) -> None:
    revisited(tmp_path / NAMES[suite], NAMES[suite], protocol=protocol)
    benchmark(suite, "--data", str(tmp_path), "--clean-only", "--json", str(tmp_path / "f"))
    found = json.loads((tmp_path / "f").read_text())["figures"]
    assert {figure["group"] for figure in found} == {suite}
    assert {figure["count"] for figure in found} == {1}  # the query without positives is skipped, not counted as 0
    assert figures(tmp_path / "f") == pytest.approx(
        {"easy_clean": EASY_AP, "medium_clean": 100 * MEDIUM_AP, "hard_clean": HARD_AP}, abs=1e-4
    )


def test_without_the_crop_the_ranking_is_another(tmp_path: Path) -> None:
    folder = revisited(tmp_path / "r")
    asked = ["--folder", str(folder), "--clean-only", "--json", str(tmp_path / "f")]
    benchmark("roxford", *asked, "--no-crop")
    whole = figures(tmp_path / "f")["medium_clean"]
    benchmark("roxford", *asked)
    assert figures(tmp_path / "f")["medium_clean"] == pytest.approx(100 * MEDIUM_AP, abs=1e-4)
    assert abs(whole - 100 * MEDIUM_AP) > 1


def test_attacked_figures_come_from_records_that_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offline.benchmarks.suite_revisited.CHECK_IMAGES", 1)
    folder, run = revisited(tmp_path / "r"), tmp_path / "run"
    asked = ["--encoder", "toy/1", "--folder", str(folder), "--steps", "10", "--run", str(run)]
    benchmark("roxford", *asked, "--json", str(tmp_path / "a"))
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "a").read_text())["figures"]
    assert [f["encoder"] for f in found] == ["toy/0"] * 6 + ["toy/1"] * 6
    of_first = {f["name"]: f["measured"] for f in found[:6]}
    assert of_first["medium_clean"] == pytest.approx(100 * MEDIUM_AP, abs=1e-3)
    for figure in found[3:6] + found[9:]:
        assert figure["name"].endswith("_linf_4_255")
    assert of_first["medium_linf_4_255"] <= of_first["medium_clean"]
    assert "roxford medium_linf_4_255" in out
    records = (run / "attacked/records.jsonl").read_bytes()
    first = json.loads(records.splitlines()[0])
    assert (first["eps"], first["steps"], first["distance"]) == (
        pytest.approx(4 / 255),
        10,
        pytest.approx(4 / 255, abs=1e-6),
    )
    assert first["rounds"][0]["objective"] > 0.01
    assert first["attacked"]["neighbors"][0]["similarity"] < first["clean"]["neighbors"][0]["similarity"] - 0.005
    assert (run / "attacked/report.html").is_file()
    seen = CountingToy.seen
    benchmark("roxford", *asked, "--json", str(tmp_path / "b"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert CountingToy.seen == seen  # the database is kept, and nothing is attacked anew
    (run / "attacked/records.jsonl").write_bytes(records[: len(records) // 2])
    benchmark("roxford", *asked, "--json", str(tmp_path / "b"))
    assert (run / "attacked/records.jsonl").read_bytes() == records
    with pytest.raises(RunError, match="another plan"):
        cli.app(["benchmark", "roxford", "--encoder", "toy/0", "--encoder", "toy/1", "--folder", str(folder),
                 "--steps", "11", "--run", str(run)])  # fmt: skip


def test_a_limit_takes_the_first_queries(tmp_path: Path) -> None:
    folder = revisited(tmp_path / "r")
    benchmark("roxford", "--folder", str(folder), "--clean-only", "--limit", "1", "--json", str(tmp_path / "f"))
    assert figures(tmp_path / "f")["medium_clean"] == pytest.approx(100 * MEDIUM_AP, abs=1e-3)


def test_an_attack_without_a_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="--run DIR, or --clean-only"):
        cli.app(["benchmark", "roxford", "--encoder", "toy/0", "--folder", str(tmp_path)])


# --- the layout ------------------------------------------------------------------------------------------------------


def truth_of(folder: Path) -> dict[str, Any]:
    truth: dict[str, Any] = pickle.loads((folder / "gnd_roxford5k.pkl").read_bytes())  # noqa: S301  # written here
    return truth


def with_query(**values: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        truth = truth_of(folder)
        truth["gnd"][0] |= values
        (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth, 2))

    return spoil


def with_truth(**values: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth_of(folder) | values, 2))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "gnd_roxford5k.pkl").unlink(), r"gnd_roxford5k\.pkl is not there; expected .*revisitop"),
        (lambda f: (f / f"jpg/{QUERIES[1]}.jpg").unlink(), rf"1 of 12 files are missing, e.g. .*{QUERIES[1]}\.jpg"),
        (lambda f: (f / "jpg").rename(f / "images"), r"12 of 12 files are missing.*jpg/<name>\.jpg"),
        (lambda f: (f / "gnd_roxford5k.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR."), "'os system'"),
        (lambda f: (f / "gnd_roxford5k.pkl").write_bytes(pickle.dumps([1])), "holds a list, expected a dict"),
        (with_truth(imlist=["../x"] * 10), "names in imlist are not unique"),
        (with_truth(imlist=[f"../{n}" for n in range(10)]), "which is not below"),
        (with_truth(imlist=[], qimlist=[], gnd=[]), "has 0 images and 0 queries"),
        (with_truth(qimlist=[QUERIES[0]]), "zip"),
        (with_query(easy=np.array([10])), "integers below 10"),
        (with_query(easy=np.array([1.0])), "easy of .* must be a list of rows"),
        (with_query(hard=np.array([[2], [3]])), "hard of"),
        (with_query(junk=np.array([1])), "listed twice"),
        (with_query(bbx=np.array([1.0, 2.0, 3.0])), "bbx of"),
        (with_query(bbx=None), "TypeError"),
    ],
)
def test_what_is_missing_or_malformed_is_said_before_an_encoder_is_loaded(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = revisited(tmp_path / "r")
    spoil(folder)
    with pytest.raises(DataError, match=message):
        cli.app(["benchmark", "roxford", "--encoder", "toy/0", "--folder", str(folder), "--clean-only"])
    assert loaded == []


def test_rows_and_boxes_may_be_lists_or_arrays(tmp_path: Path) -> None:
    expected = RevisitedQuery(QUERIES[0], (96.0, 96.0, 192.0, 192.0), frozenset(EASY), frozenset(HARD), frozenset(JUNK))
    for place, arrays in enumerate((True, False)):
        folder = revisited(tmp_path / str(place), arrays=arrays)
        assert GroundTruth.load(folder / "gnd_roxford5k.pkl").queries[0] == expected
    with_query(bbx=np.array([96.0, 96.0, 192.0, 192.0]), easy=np.array([1], dtype="u2"), hard=(2, 3))(folder)
    assert GroundTruth.load(folder / "gnd_roxford5k.pkl").queries[0] == expected
    truth = truth_of(revisited(tmp_path / "json", arrays=False))
    (folder / "gnd_roxford5k.pkl").unlink()
    (folder / "gnd_roxford5k.json").write_text(json.dumps(truth))
    found = open_revisited_folder("roxford", folder)
    assert (found.ground_truth_name, found.truth.queries[0]) == ("gnd_roxford5k.json", expected)
    assert isinstance(entry([0.0], [], [], [])["easy"], np.ndarray)


def test_the_set_is_looked_for_by_either_name(tmp_path: Path) -> None:
    assert default_folder("roxford", tmp_path) == tmp_path / "roxford"
    (tmp_path / "roxford5k").mkdir()
    assert default_folder("roxford", tmp_path) == tmp_path / "roxford5k"
    with pytest.raises(DataError, match="'oxford'"):
        open_revisited_folder("oxford", tmp_path)  # type: ignore[arg-type]
