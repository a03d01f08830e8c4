"""The multi-view optimiser: a naive twin, what it returns, independence of the batch, and going on after a kill."""

import dataclasses
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from offline.errors import PlanError, RunError
from offline.inversion.augment import DiffAugment, Draws
from offline.inversion.multi_view import MultiViewInversion
from offline.inversion.optimiser import Reconstruction
from offline.inversion.problem import Target, search_generator, start_pixels
from perception.encoder import unit_embeddings
from perception.errors import NonFiniteEmbedding
from perception.testing import ToyEncoder

SIZE_PX = 16
SHORT = MultiViewInversion(steps=25, views=4)
IDS = ("a", "b", "c")


def targets(ids: tuple[str, ...] = IDS) -> list[Target]:
    """Embeddings of random images, which a search can reach but not at once."""
    made = torch.Generator().manual_seed(3)
    drawn = {id: torch.rand(3, SIZE_PX, SIZE_PX, generator=made) for id in IDS}
    return [Target(id, ToyEncoder().encode(drawn[id][None])[0].detach(), None, id) for id in ids]


def search(
    optimiser: MultiViewInversion, ids: tuple[str, ...] = IDS, seed: int = 0, encoder: Any = None, **more: Any
) -> Reconstruction:
    starts = start_pixels(len(ids), SIZE_PX, seed, ids)
    generators = [search_generator(id, seed) for id in ids]
    return optimiser.run(encoder or ToyEncoder(), targets(ids), starts, generators=generators, **more)


def naive(target: Tensor, start: Tensor, drawn: torch.Generator, *, steps: int, views: int, lr: float) -> list[Tensor]:
    """All points of the search, with Adam as in its paper and one view after the other."""
    encoder, x = ToyEncoder().double(), start.double()
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    points = [x]
    for t in range(1, steps + 1):
        at = x.clone().requires_grad_(True)
        draws = Draws.of(views, (SIZE_PX, SIZE_PX), drawn)
        loss = torch.zeros((), dtype=torch.float64)
        for v in range(views):
            one = Draws(*(getattr(draws, field.name)[v : v + 1] for field in dataclasses.fields(draws)))
            view = DiffAugment().apply(at[None], one)
            features = encoder.features(view)[0]
            loss = loss + (1 - features @ target.double() / features.norm()) / views
        (gradient,) = torch.autograd.grad(loss, at)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        x = x - lr * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        x = x.clamp(0, 1)
        points.append(x)
    return points


def test_it_is_adam_over_views_with_a_clamp_after_each_step() -> None:
    optimiser = MultiViewInversion(steps=4, views=3, lr=0.6, judge_every=1)
    target, start = targets(("a",))[0], start_pixels(1, SIZE_PX, 0, ["a"])
    points = naive(target.embedding, start[0], search_generator("a", 0), steps=4, views=3, lr=0.6)
    assert bool(((points[1] == 0) | (points[1] == 1)).any())  # the clamp is reached
    judged = (ToyEncoder().encode(torch.stack(points).float()).detach() @ target.embedding).tolist()
    best = judged.index(max(judged))
    found = search(optimiser, ("a",))
    torch.testing.assert_close(found.pixels[0], points[best].float(), rtol=0, atol=2e-4)
    assert float(found.similarity[0]) == pytest.approx(judged[best], abs=1e-4)


def test_it_finds_pictures_of_a_toy() -> None:
    found = search(MultiViewInversion(steps=120, views=4))
    start = ToyEncoder().encode(start_pixels(3, SIZE_PX, 0, IDS)).detach()
    assert float((start * torch.stack([target.embedding for target in targets()])).sum(1).max()) < 0.5
    assert float(found.similarity.min()) > 0.8
    assert found.pixels.shape == (3, 3, SIZE_PX, SIZE_PX)
    assert float(found.pixels.min()) >= 0
    assert float(found.pixels.max()) <= 1
    assert found.trace.shape == (121, 3)
    assert bool((found.trace[-20:].mean(0) > found.trace[0] + 0.2).all())
    assert not found.pixels.requires_grad


def test_the_similarity_is_that_of_the_plain_picture_that_is_returned() -> None:
    found = search(SHORT)
    again = (ToyEncoder().encode(found.pixels) * torch.stack([t.embedding for t in targets()])).sum(1)
    torch.testing.assert_close(found.similarity, again.detach())


def test_the_best_of_those_that_were_judged_is_returned() -> None:
    seen: list[Tensor] = []

    class Judging(ToyEncoder):
        def encode(self, pixels: Tensor) -> Tensor:
            if len(pixels) == 1:
                seen.append((super().encode(pixels)[0] @ targets(("a",))[0].embedding).detach())
            return super().encode(pixels)

    # A rate that throws the picture from one corner of the box to the other.
    found = search(MultiViewInversion(steps=23, views=4, lr=5.0, judge_every=5), ("a",), encoder=Judging())
    assert len(seen) == 6  # 0, 5, 10, 15, 20 and 23
    assert float(found.similarity[0]) == float(max(seen))
    assert float(max(seen)) > float(seen[-1])


def test_the_watch_sees_each_update_and_never_falls() -> None:
    told: list[tuple[int, tuple[int, ...], list[float]]] = []
    found = search(SHORT, watch=lambda *now: told.append((now[0], tuple(now[1].shape), now[2].tolist())))
    assert [update for update, *_ in told] == list(range(26))
    assert {shape for _, shape, _ in told} == {(3, 3, SIZE_PX, SIZE_PX)}
    for before, after in pairwise(told):
        assert all(low <= high for low, high in zip(before[2], after[2], strict=True))
    assert told[-1][2] == found.similarity.tolist()


def test_equal_seeds_give_equal_bits_and_others_do_not() -> None:
    first, again, other = search(SHORT), search(SHORT), search(SHORT, seed=1)
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.trace, again.trace)
    assert not torch.equal(first.pixels, other.pixels)


def test_a_picture_does_not_depend_on_the_rest_of_the_batch() -> None:
    together = search(SHORT)
    turned = search(SHORT, ("c", "a", "b"))
    for row, id in enumerate(IDS):
        alone = search(SHORT, (id,))
        assert torch.equal(alone.pixels[0], together.pixels[row])
        assert torch.equal(alone.trace[:, 0], together.trace[:, row])
        assert torch.equal(turned.pixels[(row + 1) % 3], together.pixels[row])


def test_two_pictures_of_one_target_differ_by_what_they_draw_alone() -> None:
    start = start_pixels(1, SIZE_PX, 0, ["a"]).expand(2, -1, -1, -1)
    pair = targets(("a", "a"))
    same = [search_generator("a", 0), search_generator("a", 0)]
    found = SHORT.run(ToyEncoder(), pair, start, generators=same)
    assert torch.equal(found.pixels[0], found.pixels[1])
    found = SHORT.run(ToyEncoder(), pair, start, generators=[search_generator("a", 0), search_generator("a", 1)])
    assert not torch.equal(found.pixels[0], found.pixels[1])


@pytest.mark.parametrize(
    "changes", [{"noise": 0.05}, {"weight_decay": 0.5}, {"policy": ("color",)}, {"views": 5}, {"lr": 0.05}]
)
def test_each_option_changes_what_comes_out(changes: dict[str, Any]) -> None:
    changed = search(dataclasses.replace(SHORT, **changes))
    assert not torch.equal(changed.pixels, search(SHORT).pixels)
    assert not torch.equal(changed.trace, search(SHORT).trace)


def test_decay_pulls_towards_black_and_noise_is_no_part_of_the_picture() -> None:
    assert float(search(dataclasses.replace(SHORT, weight_decay=1.0)).pixels.mean()) < float(
        search(SHORT).pixels.mean()
    )
    noisy = dataclasses.replace(SHORT, noise=10.0, judge_every=100)
    start = start_pixels(3, SIZE_PX, 0, IDS)
    one_step = search(dataclasses.replace(noisy, steps=1))
    assert float((one_step.pixels - start).abs().max()) <= SHORT.lr * 1.001


def test_an_encoder_without_a_gradient_leaves_the_start() -> None:
    class Detached(ToyEncoder):
        def encode(self, pixels: Tensor) -> Tensor:
            return super().encode(pixels).detach()

    assert torch.equal(search(SHORT, encoder=Detached()).pixels, start_pixels(3, SIZE_PX, 0, IDS))


# --- going on --------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """What a kill is in a test."""


class Kept:
    """A keeper in memory that copies what it is offered, and may end the search."""

    def __init__(self, last: int = 10**9) -> None:
        self.last, self.kept = last, None
        self.offered: list[int] = []

    kept: tuple[int, dict[str, Tensor]] | None

    def restored(self) -> tuple[int, dict[str, Tensor]] | None:
        return self.kept

    def offer(self, update: int, state: Callable[[], Mapping[str, Tensor]]) -> None:
        self.offered.append(update)
        self.kept = update, {name: tensor.detach().cpu().clone() for name, tensor in state().items()}
        if update == self.last:
            raise Killed


@pytest.mark.parametrize("killed_after", [0, 1, 13, 24])
def test_a_killed_search_goes_on_to_the_same_bits(killed_after: int) -> None:
    optimiser = dataclasses.replace(SHORT, noise=0.01, weight_decay=0.01)
    whole = search(optimiser)
    keeper = Kept(killed_after)
    with pytest.raises(Killed):
        search(optimiser, keeper=keeper)
    keeper.last = 10**9
    told: list[int] = []
    found = search(optimiser, keeper=keeper, watch=lambda update, *_: told.append(update))
    assert told == list(range(killed_after + 1, 26))
    assert torch.equal(found.pixels, whole.pixels)
    assert torch.equal(found.similarity, whole.similarity)
    assert torch.equal(found.trace, whole.trace)


def test_the_state_of_another_search_is_refused() -> None:
    keeper = Kept(3)
    with pytest.raises(Killed):
        search(SHORT, ("a", "b"), keeper=keeper)
    with pytest.raises(RunError, match="row 2 is not of this search"):
        search(SHORT, keeper=keeper)
    with pytest.raises(RunError, match="trace of shape"):
        search(dataclasses.replace(SHORT, steps=30), ("a", "b"), keeper=keeper)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("views", 0),
        ("views", -1),
        ("judge_every", 0),
        ("lr", 0.0),
        ("lr", -0.1),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("noise", -0.01),
        ("noise", float("nan")),
        ("weight_decay", -1.0),
        ("weight_decay", float("inf")),
        ("policy", ("flip",)),
        ("policy", ()),
    ],
)
def test_impossible_settings_are_refused_with_their_name(name: str, value: Any) -> None:
    with pytest.raises(PlanError, match="flip|at least one" if name == "policy" else f"^{name} must be"):
        dataclasses.replace(SHORT, **{name: value})


def test_the_published_settings_are_the_defaults_and_settings_say_all() -> None:
    settings = MultiViewInversion().settings()
    assert (settings["steps"], settings["views"], settings["lr"]) == (1000, 32, 0.1)
    assert settings["policy"] == ["color", "translation", "cutout"]
    assert settings.keys() == {field.name for field in dataclasses.fields(MultiViewInversion)}
    assert MultiViewInversion().ball(224) is None


def test_what_is_not_finite_ends_the_search_and_names_the_row() -> None:
    class Broken(ToyEncoder):
        def encode(self, pixels: Tensor) -> Tensor:
            features = self.features(pixels)
            return unit_embeddings(features * (torch.nan if self.calls() else 1.0))

        count = 0

        def calls(self) -> bool:
            Broken.count += 1
            return Broken.count > 3  # row 0 is judged and looked at, row 1 is judged

    with pytest.raises(NonFiniteEmbedding) as raised:
        search(SHORT, encoder=Broken())
    assert raised.value.rows == (1,)

    class Unnormalised(ToyEncoder):
        def encode(self, pixels: Tensor) -> Tensor:
            return super().encode(pixels) * torch.inf

    with pytest.raises(RunError, match=r"row 0 is not finite"):
        search(SHORT, encoder=Unnormalised())
