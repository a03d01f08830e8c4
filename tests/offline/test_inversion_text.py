"""`hardlook-lab invert text`: targets, who is refused, who recognises what, and the command from end to end."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offline.cli_inversion import invert
from offline.data.files import read_image_file
from offline.errors import PlanError, RunError
from offline.inversion.multi_view import MultiViewInversion
from offline.inversion.store import Store
from offline.inversion.texts import (
    Recognition,
    TextPlan,
    TextSources,
    cross_table,
    invert_texts,
    recognise,
    require_text_towers,
)
from perception.encoder import unit_embeddings
from perception.errors import CheckpointError
from perception.preprocess import to_pixels
from perception.testing import ToyEncoder

NAMES = ("toy/0", "toy/1")
TEXTS = ("red barn", "grey wolf", "blue sea")
SOURCES = TextSources(TEXTS, "a photo of a {}")
PLAN = TextPlan(NAMES, steps=12, seeds=(0, 1), batch=4)


class ToyText:
    """Embeds a prompt as the toy embeds a picture that the prompt seeds, so that pictures of texts exist."""

    def __init__(self, encoder: "TextToy") -> None:
        self.encoder = encoder
        self.asked: list[str] = []

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        self.asked += prompts
        return torch.cat([self.encoder.encode(drawing(prompt)) for prompt in prompts]).detach()


def drawing(prompt: str) -> Tensor:
    seed = sum(ord(c) * 31**i for i, c in enumerate(prompt.casefold())) % 2**31
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).round()


class TextToy(ToyEncoder):
    """A toy with a text tower; an odd seed takes larger pictures."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed, size_px=16 if seed % 2 == 0 else 24)
        self.text = ToyText(self)


class Mute(ToyEncoder):
    """A toy whose checkpoint is visual-only, as a CLIP's may be."""

    def __init__(self) -> None:
        super().__init__(seed=7)
        self.name = "toy/mute"

    @property
    def text(self) -> ToyText:
        raise CheckpointError("toy/mute has no text tower")


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were loaded; 'toy/mute' and 'toy/wordless' have no text tower."""
    names: list[str] = []

    def load(name: str, **_: Any) -> ToyEncoder:
        names.append(name)
        if name == "toy/mute":
            return Mute()
        toy = ToyEncoder(seed=9) if name == "toy/wordless" else TextToy(int(name[-1]))
        toy.name = name
        return toy

    monkeypatch.setattr("perception.catalogue.load_encoder", load)
    return names


def command(run: Path, *words: str, texts: Sequence[str] = TEXTS, encoders: Sequence[str] = NAMES) -> None:
    named = [word for encoder in encoders for word in ("--encoder", encoder)]
    said = [word for text in texts for word in ("--text", text)]
    with pytest.raises(SystemExit) as ended:
        invert(["text", *named, *said, "--run", str(run), *words])
    assert ended.value.code in (0, None)


# --- targets ---------------------------------------------------------------------------------------------------------


def test_targets_are_the_unit_embeddings_of_the_prompts() -> None:
    toy = TextToy()
    targets = SOURCES.targets(toy)
    assert [target.id for target in targets] == list(TEXTS) == list(SOURCES.ids)
    assert toy.text.asked == [target.label for target in targets] == [f"a photo of a {text}" for text in TEXTS]
    for target, text in zip(targets, TEXTS, strict=True):
        assert target.picture is None
        assert torch.equal(target.embedding, toy.encode(drawing(f"a photo of a {text}"))[0])
        assert float(target.embedding.norm()) == pytest.approx(1, abs=1e-6)
    assert SOURCES.kind == "text"
    assert SOURCES.as_dict() == {"texts": list(TEXTS), "template": "a photo of a {}"}


def test_braces_in_a_text_are_only_braces() -> None:
    assert TextSources(("{0} {x!r}",), "say {}: {now}").prompts == ("say {0} {x!r}: {now}",)


@pytest.mark.parametrize(
    ("texts", "template", "message"),
    [
        ((), "{}", "at least one text"),
        (("",), "{}", "blank, got ''"),
        (("dog", " \t"), "{}", "blank"),
        (("dog", "cat", "dog"), "{}", "'dog' is given twice"),
        (("a dog", " a  dog"), "{}", "given twice"),
        (("dog",), "a photo", "exactly one"),
        (("dog",), "{} or {}", "exactly one"),
        (("do\udc80g",), "{}", "Unicode"),
    ],
)
def test_texts_that_are_none_are_refused(texts: tuple[str, ...], template: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        TextSources(texts, template)


def test_texts_that_a_tower_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    sources = TextSources(("red barn", "Red Barn"))  # the toy does not look at the case, as CLIP's tokenizer
    with pytest.raises(PlanError, match=r"toy/0 reads 'red barn' and 'Red Barn' as the same text"):
        invert_texts(PLAN, sources, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_encoders_without_a_text_tower_are_all_named_before_any_work(tmp_path: Path) -> None:
    names = ("toy/0", "toy/mute", "toy/wordless")
    with pytest.raises(PlanError, match=r"2 of 3 have none: toy/mute .*no text tower; toy/wordless .*no text tower"):
        invert_texts(dataclasses.replace(PLAN, encoders=names), SOURCES, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    require_text_towers(NAMES, SOURCES, precision="fp32", device="cpu")


# --- the plan --------------------------------------------------------------------------------------------------------


def test_a_plan_makes_the_optimiser_that_is_asked_for() -> None:
    plan = TextPlan(
        NAMES, optimiser="multi-view", views=5, lr=0.02, policy="color,resize", noise=0.01, weight_decay=0.1
    )
    assert plan.make_optimiser() == MultiViewInversion(1000, 5, 0.02, ("color", "resize"), 0.01, 0.1)
    assert plan.as_dict()["optimiser"]["views"] == 5
    assert TextPlan(NAMES, optimiser="multi-view").make_optimiser() == MultiViewInversion()
    assert PLAN.as_dict()["optimiser"]["name"] == "apgd"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"views": 4}, "views is a setting of the multi-view optimiser"),
        ({"lr": 0.1}, "lr is a setting"),
        ({"policy": "color"}, "policy is a setting"),
        ({"optimiser": "multi-view", "views": 0}, "views must be at least 1, got 0"),
        ({"optimiser": "multi-view", "lr": 0.0}, "lr must be positive"),
        ({"optimiser": "multi-view", "lr": float("nan")}, "lr must be positive and finite, got nan"),
        ({"optimiser": "multi-view", "noise": float("nan")}, "noise must be finite"),
        ({"optimiser": "multi-view", "policy": "colour"}, "'colour'"),
        ({"optimiser": "multi-view", "policy": ""}, "at least one of"),
        ({"optimiser": "multi-view", "radius": 3.0}, "no radius"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"seeds": (1, 1)}, "seeds must be"),
        ({"encoders": ()}, "encoders must be"),
        ({"radius": float("nan")}, "radius must be"),
    ],
)
def test_impossible_plans_are_refused_with_what_is_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        dataclasses.replace(PLAN, **values)


# --- recognition -----------------------------------------------------------------------------------------------------


def test_recognitions_are_those_of_a_naive_twin(tmp_path: Path) -> None:
    found = invert_texts(PLAN, SOURCES, tmp_path)
    assert len(found.results.records) == 2 * 2 * 3
    assert len(found.recognitions) == 2 * len(found.results.records)
    store = Store(tmp_path, NAMES, TEXTS)
    for seen in found.recognitions:
        judge = TextToy(int(seen.judge[-1]))
        picture = store.picture(seen.encoder, seen.text, seen.seed)
        embedding = judge.encode(to_pixels([judge.preprocess.apply(picture)]))[0].detach()
        by_text = {text: float(judge.text.encode_text([f"a photo of a {text}"])[0] @ embedding) for text in TEXTS}
        assert seen.similarity == pytest.approx(by_text[seen.text], abs=1e-5)
        assert seen.nearest == max(by_text, key=by_text.__getitem__)
        assert seen.rank == sorted(by_text.values(), reverse=True).index(by_text[seen.text]) + 1
        if seen.judge == seen.encoder:
            record = next(
                r
                for r in found.results.records
                if (r.encoder, r.target, r.seed) == (seen.encoder, seen.text, seen.seed)
            )
            assert seen.similarity == pytest.approx(record.similarity_8bit, abs=1e-5)
    own = [entry for entry in found.cross if entry.encoder == entry.judge]
    assert {(entry.count, entry.recognised) for entry in own} == {(6, 6)}
    assert min(entry.similarity for entry in own) > 0.5


def test_the_cross_table_is_the_mean_over_texts_and_seeds() -> None:
    def seen(encoder: str, judge: str, similarity: float, rank: int) -> Recognition:
        return Recognition(encoder, "x", 0, judge, similarity, rank, "x")

    recognitions = [seen("a", "a", 0.8, 1), seen("a", "a", 0.6, 2), seen("a", "b", 0.1, 3), seen("a", "b", 0.3, 3)]
    recognitions += [seen("b", "a", 0.5, 1), seen("b", "b", 0.9, 1)]
    table = {(entry.encoder, entry.judge): entry for entry in cross_table(recognitions, ("a", "b"))}
    assert list(table) == [("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")]
    assert (table["a", "a"].similarity, table["a", "a"].recognised, table["a", "a"].mean_rank) == (0.7, 1, 1.5)
    assert (table["a", "b"].similarity, table["a", "b"].recognised, table["a", "b"].mean_rank) == (0.2, 0, 3.0)
    assert (table["b", "a"].count, table["b", "a"].recognised) == (1, 1)


def test_a_tie_counts_against_the_text(tmp_path: Path) -> None:
    """A judge that sees nothing in a picture recognises nothing."""
    invert_texts(dataclasses.replace(PLAN, seeds=(0,), steps=2), SOURCES, tmp_path)

    class Blind(TextToy):
        def encode(self, pixels: Tensor) -> Tensor:
            return unit_embeddings(torch.ones(len(pixels), 3))

    class Names:
        def encode_text(self, prompts: Sequence[str]) -> Tensor:
            return torch.eye(3)[[[f"a photo of a {text}" for text in TEXTS].index(prompt) for prompt in prompts]]

    blind = Blind()
    object.__setattr__(blind, "text", Names())
    record = SimpleNamespace(encoder="toy/0", target=TEXTS[1], seed=0)
    (seen,) = recognise([record], SOURCES, Store(tmp_path, NAMES, TEXTS), blind)  # type: ignore[list-item]
    assert seen.rank == 3
    assert seen.similarity == pytest.approx(3**-0.5, abs=1e-6)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [("--steps", "6"), ("--optimiser", "multi-view", "--steps", "6", "--views", "2", "--lr", "0.05")]
)
def test_the_command_writes_grid_results_and_cross_table(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, figures = tmp_path / "run", tmp_path / "figures.json"
    command(run, *words, "--seed", "0", "--seed", "3", "--template", "a photo of a {}", "--json", str(figures))
    printed = capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert results == json.loads(figures.read_text())
    assert results["invert"] == "text"
    assert results["texts"] == list(TEXTS)
    assert len(results["reconstructions"]) == 12
    assert {(r["encoder"], r["judge"]) for r in results["recognitions"]} == {(a, b) for a in NAMES for b in NAMES}
    assert [(c["encoder"], c["judge"]) for c in results["cross"]] == [(a, b) for a in NAMES for b in NAMES]
    for entry in results["cross"]:
        assert f"{entry['similarity']:.3f}  {entry['recognised']} of 6" in printed
    grid = np.asarray(read_image_file(run / "grid.png"))
    cell, gap = 112, 8
    assert grid.shape[1] == gap + 5 * (cell + gap)  # the texts, and encoders times seeds
    assert grid.shape[0] > 3 * cell
    rows = grid.reshape(-1, 3)
    assert len(np.unique(rows, axis=0)) > 100


def test_a_finished_run_is_only_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = invert_texts(PLAN, SOURCES, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    content = (tmp_path / "results.json").read_bytes()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("searched again")

    monkeypatch.setattr("offline.inversion.apgd.ApgdInversion.run", never)
    again = invert_texts(PLAN, SOURCES, tmp_path)
    assert again == first
    assert (tmp_path / "results.json").read_bytes() == content
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(RunError, match="another plan"):
        invert_texts(PLAN, TextSources(TEXTS), tmp_path)


def test_a_killed_multi_view_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = TextPlan(NAMES[:1], optimiser="multi-view", steps=10, views=2, noise=0.01)
    invert_texts(plan, SOURCES, tmp_path / "whole")
    from offline.inversion import run as running

    class Killed(Exception):
        pass

    saved = running._BatchKeeper.offer
    updates: list[int] = []

    def offer(self: Any, update: int, state: Any) -> None:
        updates.append(update)
        self._every_s = 0.0
        saved(self, update, state)
        if len(updates) == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(running._BatchKeeper, "offer", offer)
        with pytest.raises(Killed):
            invert_texts(plan, SOURCES, tmp_path / "killed")
        invert_texts(plan, SOURCES, tmp_path / "killed")
    assert updates == list(range(10))  # none of the first five twice
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").rglob("*.safetensors")}
    killed = {path.name: path.read_bytes() for path in (tmp_path / "killed").rglob("*.safetensors")}
    reconstructions = [name for name in whole if name != "checkpoint.safetensors"]
    assert len(reconstructions) == 3
    assert {name: killed[name] for name in reconstructions} == {name: whole[name] for name in reconstructions}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--optimiser", "multi-view", "--views", "0"), "views must be at least 1"),
        (("--optimiser", "multi-view", "--lr", "nan"), "lr must be positive"),
        (("--optimiser", "multi-view", "--policy", "flip"), "no augmentation is called 'flip'"),
        (("--views", "3"), "setting of the multi-view"),
        (("--template", "no place"), "exactly one"),
        (("--text", "red barn"), "given twice"),
        (("--text", ""), "blank"),
        (("--encoder", "toy/mute"), "toy/mute cannot read text"),
    ],
)
def test_the_command_refuses_before_it_makes_a_run(words: tuple[str, ...], error: str, tmp_path: Path) -> None:
    named = [word for name in NAMES for word in ("--encoder", name)]
    said = [word for text in TEXTS for word in ("--text", text)]
    with pytest.raises(PlanError, match=error):
        invert(["text", *named, *said, "--run", str(tmp_path / "run"), *words])
    assert not (tmp_path / "run").exists()
