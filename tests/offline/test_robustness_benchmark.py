"""The robustness benchmark on a tiny archive with the toy encoder: verdicts, resumption, records and table."""

import csv
import io
import json
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from offline.attacks.apgd import Apgd
from offline.attacks.base import AttackResult
from offline.benchmarks import robustness
from offline.benchmarks.robustness import ARCHIVE, Progress, RobustnessBenchmark, RobustnessPlan
from offline.benchmarks.robustness_records import Accuracy, Record, RecordFile, summarise, table
from offline.errors import PlanError, RunError
from offline.runs import RunDirectory
from offline.threat import ThreatModel
from perception.testing import ToyEncoder, encoded

CLASSES = ("dark", "light", "red")
PLAN = RobustnessPlan(steps=4, batch=3)
EPS_L2 = 3.0 * 16 / 224


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images a class, of which three are queries."""
    root = tmp_path_factory.mktemp("data")
    (root / ARCHIVE).parent.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    with zipfile.ZipFile(root / ARCHIVE, "w") as archive:
        for c, base in enumerate(((60, 60, 60), (200, 200, 200), (200, 60, 60))):
            for i in range(8):
                noise = rng.normal(0, 30, (16, 16, 3))
                image = Image.fromarray((np.array(base) + noise).clip(0, 255).astype(np.uint8))
                name = f"{CLASSES[c]}/{i}.png"
                archive.writestr(name, encoded(image))
                rows.append({"file": name, "class": CLASSES[c], "suggested_split": "bench" if i < 3 else "train"})
        table_text = io.StringIO()
        writer = csv.DictWriter(table_text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        archive.writestr("labels.csv", table_text.getvalue())
    return root


class Constant(ToyEncoder):
    """Every image looks the same."""

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.zeros(len(pixels), dtype=torch.int64), self.dim) + 0 * pixels.sum()


def bench(data: Path, run: Path, plan: RobustnessPlan = PLAN) -> RobustnessBenchmark:
    return RobustnessBenchmark(data, RunDirectory(run, asdict(plan)), plan)


def by_key(records: list[Record]) -> dict[Any, Record]:
    return {(r.fingerprint, r.threat, r.id): r for r in records}


def test_a_constant_encoder_is_as_good_as_guessing_and_cannot_be_moved(data: Path, tmp_path: Path) -> None:
    """All neighbours are equally near, and the first of the gallery is dark."""
    list(bench(data, tmp_path).run(Constant()))
    records = RecordFile(tmp_path / "records.jsonl").read()
    assert len(records) == 2 * 9
    assert all(r.clean_correct == r.robust == (r.label == "dark") for r in records)
    assert {r.similarity for r in records} == {1.0}
    (row,) = summarise(records)
    assert (row.clean.right, row.clean.total) == (3, 9)


def test_records_hold_within_the_threat_and_agree_with_a_naive_twin(data: Path, tmp_path: Path) -> None:
    encoder = ToyEncoder(seed=1)
    plan = replace(PLAN, linf_eps=0.25)
    progress = list(bench(data, tmp_path, plan).run(encoder))
    records = RecordFile(tmp_path / "records.jsonl").read()
    assert {(r.norm, r.eps) for r in records} == {("linf", 0.25), ("l2", EPS_L2)}
    with zipfile.ZipFile(data / ARCHIVE) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith("png"))
        stack = [np.asarray(Image.open(archive.open(name))) for name in names]
    pixels = torch.from_numpy(np.stack(stack)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        embeddings = encoder.encode(pixels)
    is_query = [int(name[-5]) < 3 for name in names]
    gallery = [i for i in range(len(names)) if not is_query[i]]
    for record in records:
        query = embeddings[names.index(record.id)]
        nearest = max(gallery, key=lambda i: float(query @ embeddings[i]))
        assert record.clean_correct == (names[nearest].split("/")[0] == record.label)
        assert record.robust <= record.clean_correct
        assert record.distance <= record.eps + 1e-6
        if not record.clean_correct:
            assert (record.similarity, record.distance) == (1.0, 0.0)  # not attacked
    assert any(r.clean_correct and not r.robust for r in records)
    assert all(r.similarity < 1 for r in records if r.clean_correct)
    assert progress[0] == Progress("toy/1", ThreatModel("linf", 0.25), 0, 9, 0, 0)
    last = progress[-1]
    under_l2 = [r for r in records if r.norm == "l2"]
    assert (last.done, last.total) == (9, 9)
    assert (last.clean, last.robust) == (sum(r.clean_correct for r in under_l2), sum(r.robust for r in under_l2))


def test_a_benchmark_killed_at_any_moment_goes_on_and_ends_the_same(data: Path, tmp_path: Path) -> None:
    encoder = ToyEncoder()
    list(bench(data, tmp_path / "whole").run(encoder))
    whole = RecordFile(tmp_path / "whole/records.jsonl")
    content = whole.path.read_bytes()
    lines = content.splitlines(keepends=True)
    for cut in (0, 10, len(lines[0]), len(b"".join(lines[:3])), len(b"".join(lines[:10])) + 7, len(content) - 1):
        run = tmp_path / f"cut{cut}"
        benchmark = bench(data, run)
        (run / "records.jsonl").write_bytes(content[:cut])
        list(benchmark.run(encoder))
        assert by_key(RecordFile(run / "records.jsonl").read()) == by_key(whole.read())


def test_what_is_done_is_not_done_again(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attacked = []
    original = Apgd.attack

    def counted(self: Apgd, *args: Any, **kwargs: Any) -> AttackResult:
        attacked.append(len(args[3]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Apgd, "attack", counted)
    stream = bench(data, tmp_path).run(ToyEncoder())
    for _ in range(3):  # the beginning and two batches of linf
        progress = next(stream)
    assert progress.done == 6
    assert len(attacked) == 2
    list(bench(data, tmp_path).run(ToyEncoder()))
    assert len(attacked) == 6
    content = (tmp_path / "records.jsonl").read_bytes()
    list(bench(data, tmp_path).run(ToyEncoder()))
    assert len(attacked) == 6
    assert (tmp_path / "records.jsonl").read_bytes() == content
    list(bench(data, tmp_path).run(ToyEncoder(seed=2)))  # another encoder has its own records
    assert len(summarise(RecordFile(tmp_path / "records.jsonl").read())) == 2


def test_a_limit_takes_the_first_of_the_shuffle(data: Path, tmp_path: Path) -> None:
    ids = []
    for limit in (None, 4):
        run = tmp_path / str(limit)
        list(bench(data, run, replace(PLAN, limit=limit)).run(ToyEncoder()))
        ids.append([r.id for r in RecordFile(run / "records.jsonl").read() if r.norm == "linf"])
    assert ids[1] == ids[0][:4]
    assert ids[0] != sorted(ids[0])


def test_another_plan_does_not_go_on_in_the_same_directory(data: Path, tmp_path: Path) -> None:
    bench(data, tmp_path)
    with pytest.raises(RunError, match="another plan"):
        bench(data, tmp_path, replace(PLAN, steps=5))


def test_the_encoder_itself_judges_and_not_the_attack(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attack that boasts: everything is fooled, and nothing was changed."""

    def boast(self: Apgd, encoder: Any, objective: Any, criterion: Any, pixels: Tensor, *_: Any, **__: Any) -> Any:
        n = len(pixels)
        return AttackResult(pixels.clone(), torch.ones(n, dtype=torch.bool), torch.full((n,), 4.0), torch.zeros(n))

    monkeypatch.setattr(Apgd, "attack", boast)
    list(bench(data, tmp_path).run(ToyEncoder()))
    records = RecordFile(tmp_path / "records.jsonl").read()
    assert any(r.clean_correct for r in records)
    assert all(r.robust == r.clean_correct for r in records)


def test_an_attack_that_leaves_its_ball_is_an_error(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cheat(self: Apgd, encoder: Any, objective: Any, criterion: Any, pixels: Tensor, *_: Any, **__: Any) -> Any:
        n = len(pixels)
        return AttackResult(1 - pixels, torch.ones(n, dtype=torch.bool), torch.full((n,), 4.0), torch.zeros(n))

    monkeypatch.setattr(Apgd, "attack", cheat)
    with pytest.raises(RunError, match="left its threat model"):
        list(bench(data, tmp_path).run(ToyEncoder()))
    assert RecordFile(tmp_path / "records.jsonl").read() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"linf_eps": -1.0}, "eps must be finite and not negative, got -1.0"),
        ({"l2_eps_at_224": float("nan")}, "eps must be finite"),
    ],
)
def test_an_impossible_plan_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        replace(PLAN, **change)


def test_encoders_are_loaded_by_name_one_after_the_other(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perception.load_encoder", lambda name, device: ToyEncoder(seed=int(name)), raising=False)
    progress = list(robustness.run_robustness(["3", "4"], data=data, run=tmp_path, plan=PLAN))
    assert list(dict.fromkeys(p.encoder for p in progress)) == ["toy/3", "toy/4"]
    assert [row.encoder for row in summarise(RecordFile(tmp_path / "records.jsonl").read())] == ["toy/3", "toy/4"]


# --- records and table -----------------------------------------------------------------------------------------------


def record(query: int, *, norm: Any = "linf", clean: bool = True, robust: bool = True, encoder: str = "a") -> Record:
    eps = 4 / 255 if norm == "linf" else 12 / 7
    return Record(encoder, f"f-{encoder}", norm, eps, f"q{query}", "cat", clean, robust, 0.5, 0.01)


def test_the_table_follows_from_the_records() -> None:
    records = [
        *(record(i, robust=i < 2) for i in range(4)),
        *(record(i, norm="l2", robust=False, clean=i != 3) for i in range(4)),
        record(0, encoder="b", clean=False, robust=False),
        record(3, robust=True),  # judged again: the last verdict holds
        record(3, norm="l2", robust=True),
    ]
    a, b = summarise(records)
    assert (a.clean, list(a.robust.values())) == (Accuracy(4, 4), [Accuracy(3, 4), Accuracy(1, 4)])
    assert (b.clean, list(b.robust.values())) == (Accuracy(0, 1), [Accuracy(0, 1)])
    text = table([a, b]).splitlines()
    assert text[0] == "| encoder | clean | linf | l2 |"
    assert text[2].startswith(
        "| a | 100.0 [51.0, 100.0] of 4 | 75.0 [30.1, 95.4] of 4, eps 4/255 | 25.0 [4.6, 69.9] of 4"
    )
    assert text[2].endswith("eps 1.714 |")
    assert text[3].endswith("| not measured |")
    assert a.as_dict()["robust"][0] == {
        "norm": "linf", "eps": 4 / 255, "right": 3, "total": 4, "value": 0.75, "interval95": [0.3006, 0.9544],
    }  # fmt: skip


@pytest.mark.parametrize(("right", "total"), [(0, 10), (10, 10), (3, 10), (512, 1025)])
def test_wilson_bounds_are_where_the_score_test_turns(right: int, total: int) -> None:
    """The interval's ends are the shares p0 for which |p - p0| is 1.96 of their own standard errors."""
    p = right / total
    for p0 in Accuracy(right, total).interval:
        assert abs(p - p0) == pytest.approx(1.959964 * (p0 * (1 - p0) / total) ** 0.5, rel=1e-6, abs=1e-7)
    low, high = Accuracy(right, total).interval
    assert 0 <= low <= p <= high <= 1
    assert high - low > 0


def test_records_come_back_and_an_unfinished_line_gives_way(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    assert file.read() == []
    file.append([record(0), record(1)])
    with file.path.open("ab") as torn:
        torn.write(b'{"encoder": "a')
    assert file.read() == [record(0), record(1)]
    file.append([record(2)])
    assert file.read() == [record(0), record(1), record(2)]


@pytest.mark.parametrize(
    "change", [{"robust": 1}, {"distance": "far"}, {"distance": float("nan")}, {"eps": -1.0}, {"extra": 1}]
)
def test_a_damaged_record_is_named_by_its_line(tmp_path: Path, change: dict[str, Any]) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.append([record(0)])
    with file.path.open("a") as lines:
        lines.write(json.dumps(asdict(record(1)) | change) + "\n")
    with pytest.raises(RunError, match="line 2"):
        file.read()
