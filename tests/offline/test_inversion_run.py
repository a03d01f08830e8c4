"""A run of inversions: what it leaves behind, judged anew, the same after a kill, and visible while it runs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from offline.attacks.base import Attacked
from offline.errors import PlanError, RunError
from offline.inversion import InversionPlan, Keeper, Reconstruction, Target, Watch, start_pixels
from offline.inversion import run as inversion_run
from offline.inversion.preview import Preview
from offline.inversion.run import Results, invert_with
from offline.inversion.shown import describe
from offline.inversion.sources import ImageSources
from offline.inversion.store import Store, to_array, to_picture
from offline.runs import read_events
from offline.threat import ThreatModel
from perception.preprocess import to_pixels
from tests.offline.inversion_toys import sources, toys

PLAN = InversionPlan(("toy/0", "toy/1"), steps=6, seeds=(0, 1), batch=4)
UNSTEADY = {"metrics.jsonl", "preview.png"}  # times, and what was drawn when


def run(path: Path, plan: InversionPlan = PLAN, of: ImageSources | None = None, **options: Any) -> Results:
    seeds = [int(name.removeprefix("toy/")) for name in plan.encoders]
    return invert_with(toys(*seeds), plan, of or sources(), path, **options)


def contents(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file() and file.name not in UNSTEADY)
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def test_each_reconstruction_is_judged_anew_and_kept(tmp_path: Path) -> None:
    found = run(tmp_path / "run")
    store = Store(tmp_path / "run", PLAN.encoders, sources().ids)
    expected = [(name, id, seed) for name in PLAN.encoders for seed in (0, 1) for id in sources().ids]
    assert [(record.encoder, record.target, record.seed) for record in found.records] == expected
    for record in found.records:
        (encoder,) = toys(int(record.encoder.removeprefix("toy/")))
        target = next(t for t in sources().targets(encoder) if t.id == record.target)
        start = start_pixels(1, 16, record.seed, [record.target])
        pixels = store.pixels(record.encoder, record.target, record.seed)[None]
        picture = store.picture(record.encoder, record.target, record.seed)
        assert picture.tobytes() == to_picture(pixels[0]).tobytes()
        eight_bit = to_pixels([to_array(picture)])
        assert float((eight_bit - pixels).abs().max()) <= 0.5 / 255 + 1e-6
        with torch.no_grad():
            seen = [float(encoder.encode(x)[0] @ target.embedding) for x in (start, pixels, eight_bit)]
        assert [record.start_similarity, record.similarity, record.similarity_8bit] == pytest.approx(seen, abs=2e-6)
        assert record.similarity > record.start_similarity
        assert record.radius is not None
        assert record.radius == pytest.approx(100 * 16 / 224)
        assert record.distance == pytest.approx(float((pixels - start).double().norm()), abs=1e-5)
        assert record.distance <= record.radius * (1 + 1e-6)
        assert target.picture is not None
        assert store.original(record.encoder, record.target).tobytes() == target.picture.tobytes()
    with Image.open(tmp_path / "run" / "grid.png") as grid:
        assert grid.width > 5 * 112
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written == found.as_dict()
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_seeds_differ_and_the_words_say_what_came_out(tmp_path: Path) -> None:
    found = run(tmp_path / "run")
    folder = tmp_path / "run" / "reconstructions" / "toy-0"
    assert (folder / "image-0.png-0.png").read_bytes() != (folder / "image-0.png-1.png").read_bytes()
    words = describe(found)
    mean = sum(r.similarity for r in found.records if r.encoder == "toy/1") / 6
    assert f"{mean:.3f} found" in words
    assert "l2 radius 7.143 at its own size" in words


class Killed(Exception):
    pass


def killed_after(updates: int) -> Callable[[str, int, int, str], None]:
    count = 0

    def show(*_: object) -> None:
        nonlocal count
        count += 1
        if count > updates:
            raise Killed

    return show


@pytest.mark.parametrize("keep_every_s", [0.0, 1e9], ids=["within a batch", "between batches"])
@pytest.mark.parametrize("updates", [0, 3, 8, 20])
def test_a_run_goes_on_after_a_kill_to_the_same_bytes(tmp_path: Path, updates: int, keep_every_s: float) -> None:
    run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", show=killed_after(updates), keep_every_s=keep_every_s)
    resumed: list[int] = []
    run(tmp_path / "killed", keep_every_s=keep_every_s, show=lambda _, done, total, text: resumed.append(done))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    if keep_every_s == 0 and updates == 20:
        assert len(resumed) < 4 * 7  # it did not begin anew


def test_a_finished_run_is_not_repeated_and_lost_files_are_made_again(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run(path)
    before = contents(path)
    run(path)
    assert len(read_events(path, "batch")) == 4
    (path / "reconstructions" / "toy-0" / "image-1.png-0.png").unlink()
    with (path / "records.jsonl").open("a") as file:
        file.write('{"encoder": "toy')  # what a kill leaves
    run(path)
    assert len(read_events(path, "batch")) == 5
    after = contents(path)
    assert {name: after[name] for name in before if name != "records.jsonl"} == {
        name: data for name, data in before.items() if name != "records.jsonl"
    }


def test_a_reconstruction_does_not_depend_on_what_else_is_in_the_run(tmp_path: Path) -> None:
    run(tmp_path / "all")
    of = ImageSources(sources().images[1:2])
    run(tmp_path / "one", InversionPlan(("toy/1",), steps=6, seeds=(1,), batch=1), of)
    name = "reconstructions/toy-1/image-1.png-1.safetensors"
    assert contents(tmp_path / "one")[name] == contents(tmp_path / "all")[name]


@pytest.mark.parametrize(
    "other",
    [
        InversionPlan(("toy/0", "toy/1"), steps=7, seeds=(0, 1), batch=4),
        InversionPlan(("toy/0", "toy/1"), steps=6, seeds=(0,), batch=4),
        InversionPlan(("toy/0", "toy/1"), steps=6, seeds=(0, 1), batch=4, radius=2.0),
        InversionPlan(("toy/1", "toy/0"), steps=6, seeds=(0, 1), batch=4),
    ],
)
def test_the_directory_of_another_plan_is_refused(tmp_path: Path, other: InversionPlan) -> None:
    run(tmp_path)
    with pytest.raises(RunError, match="another plan"):
        run(tmp_path, other)


def test_other_images_of_the_same_names_are_another_plan(tmp_path: Path) -> None:
    run(tmp_path)
    images = sources(4).images
    renamed = type(images[0])(images[0].id, images[3].image)
    with pytest.raises(RunError, match="another plan"):
        run(tmp_path, of=ImageSources((renamed, *images[1:3])))


def test_damaged_records_are_refused(tmp_path: Path) -> None:
    run(tmp_path)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    (tmp_path / "records.jsonl").write_text("\n".join(['{"encoder": 3}', *lines[1:]]) + "\n")
    with pytest.raises(RunError, match="line 1: not a record"):
        run(tmp_path)


def test_the_encoders_are_those_of_the_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="the plan is for"):
        invert_with(toys(0), PLAN, sources(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class Careless:
    """An optimiser that returns its starts, moved."""

    moved: float
    eps: float | None
    steps: int = 1

    def ball(self, size_px: int) -> ThreatModel | None:
        return None if self.eps is None else ThreatModel("l2", self.eps)

    def settings(self) -> dict[str, Any]:
        return {}

    def run(
        self,
        encoder: Attacked,
        targets: Sequence[Target],
        starts: Tensor,
        *,
        generators: Sequence[torch.Generator],
        watch: Watch | None = None,
        keeper: Keeper | None = None,
    ) -> Reconstruction:
        return Reconstruction(starts + self.moved, torch.ones(len(starts)), torch.ones(2, len(starts)))


@pytest.mark.parametrize(
    ("optimiser", "message"),
    [
        (Careless(0.1, 0.5), "left its threat model"),
        (Careless(0.6, None), r"left \[0, 1\]"),
        (Careless(float("nan"), None), r"left \[0, 1\]"),
    ],
)
def test_what_left_the_ball_or_the_box_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimiser: Careless, message: str
) -> None:
    monkeypatch.setattr(InversionPlan, "make_optimiser", lambda plan: optimiser)
    with pytest.raises(RunError, match=message):
        run(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_the_optimiser_claims_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InversionPlan, "make_optimiser", lambda plan: Careless(0.0, None))
    for record in run(tmp_path).records:
        assert record.similarity == record.start_similarity
        assert record.radius is None
        assert record.distance == 0


def test_a_preview_is_there_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        inversion_run, "Preview", lambda store, encoders, seeds: Preview(store, encoders, seeds, every_s=0, clock=clock)
    )
    seen: set[bytes] = set()

    def look(*_: object) -> None:
        preview = tmp_path / "preview.png"
        seen.add(preview.read_bytes())
        with Image.open(preview) as picture:
            picture.load()  # whole at any time

    run(tmp_path, show=look)
    assert len(seen) > 10


def clock() -> float:
    """A clock on which nothing takes time."""
    return 0.0


def test_a_preview_is_drawn_when_it_is_time_and_takes_a_small_share_of_it(tmp_path: Path) -> None:
    now = [0.0]
    drawn: list[float] = []

    class Slow(Preview):
        def draw(self, current: set[str]) -> None:
            drawn.append(now[0])
            now[0] += 0.5  # it takes half a second
            super().draw(current)

    preview = Slow(Store(tmp_path, ["toy/0"], ["a"]), ["toy/0"], [0], clock=lambda: now[0])
    preview.show_targets([Target("a", torch.eye(4)[0], None, "some words")])
    for update in range(40):
        preview.watch([("toy/0", "a", 0)], update, start_pixels(1, 16, 0, ["a"]), torch.zeros(1))
        now[0] += 0.5
    assert drawn == [0.0, 10.5]  # 0.5 s of drawing is a twentieth of 10 s
    assert (tmp_path / "preview.png").is_file()


def test_a_preview_of_a_long_run_shows_the_rows_at_work(tmp_path: Path) -> None:
    preview = Preview(Store(tmp_path, ["toy/0"], []), ["toy/0"], [0])
    images = sources(20).images
    preview.show_targets([Target(str(i), torch.eye(4)[0], image.image, str(i)) for i, image in enumerate(images)])
    heights = {}
    for current in ("0", "19"):
        preview.draw({current})
        with Image.open(tmp_path / "preview.png") as picture:
            heights[current] = (picture.height, picture.tobytes())
    assert heights["0"][0] == heights["19"][0]
    assert heights["0"][1] != heights["19"][1]
    preview.draw_grid()
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.height > 1.5 * heights["0"][0]  # all 20 rows
