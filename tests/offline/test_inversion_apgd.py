"""Feature inversion by APGD: a closed form, APGD itself as a twin, each picture for itself, going on after a kill."""

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from offline.attacks.apgd import Apgd
from offline.errors import PlanError, RunError
from offline.inversion import Reconstruction, Target, start_pixels, towards
from offline.inversion.apgd import ApgdInversion
from perception.errors import NonFiniteEmbedding
from perception.testing import ToyEncoder
from tests.offline.inversion_toys import LinearEncoder, generators, targets


@pytest.mark.parametrize("radius", [0.005, 0.01, 0.02])
def test_it_comes_as_close_as_the_ball_allows(radius: float) -> None:
    """In the plane of a = A (z0 - .5) and t, a ball of radius r < |a| turns a by asin(r / |a|) and no further."""
    encoder, wanted = LinearEncoder(), targets(4, dim=6)
    starts = start_pixels(4, 8, 0, [target.id for target in wanted]).double()
    features, t = encoder.features(starts), torch.stack([target.embedding for target in wanted]).double()
    lengths = features.norm(dim=1)
    angles = ((features * t).sum(dim=1) / lengths / t.norm(dim=1)).acos()
    turns = (radius / lengths).asin()
    assert bool((turns < angles).all())  # else the best is 1, and the closed form another
    found = ApgdInversion(steps=200, radius=radius).run(encoder, wanted, starts, generators=generators(4))
    assert found.similarity == pytest.approx((angles - turns).cos().numpy(), abs=1e-4)
    assert bool(ApgdInversion(radius=radius).ball(8).contains(found.pixels, starts).all())


def test_a_target_within_reach_is_reached() -> None:
    wanted = targets(3)
    starts = start_pixels(3, 16, 0, ["a", "b", "c"])
    found = ApgdInversion(steps=300).run(ToyEncoder(), wanted, starts, generators=generators(3))
    assert bool((found.similarity > 0.999).all())
    assert bool(((found.pixels >= 0) & (found.pixels <= 1)).all())


def test_the_embedding_distance_of_the_paper_and_the_cosine_are_one_objective() -> None:
    wanted = targets(5)
    embeddings = torch.stack([target.embedding for target in targets(5, seed=1)])
    distance = (embeddings - torch.stack([target.embedding for target in wanted])).square().sum(dim=1)
    torch.testing.assert_close(towards(wanted, "cpu")(embeddings), 1 - distance / 2)


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_it_is_the_apgd_of_the_attacks_with_a_first_step_of_twice_the_radius(steps: int) -> None:
    encoder, wanted = ToyEncoder(), targets(1)
    starts = start_pixels(1, 16, 3, ["a"])
    optimiser = ApgdInversion(steps=steps, radius=2.0)
    found = optimiser.run(encoder, wanted, starts, generators=generators(1))
    twin = Apgd(steps=steps, start="clean", alpha=2.0).attack(
        encoder, towards(wanted, "cpu"), None, starts, optimiser.ball(16), generator=torch.Generator()
    )
    assert torch.equal(found.pixels, twin.adversarial)
    assert torch.equal(found.similarity, twin.objective)


def test_the_radius_is_scaled_with_the_side_unless_it_is_given() -> None:
    assert ApgdInversion().ball(224).eps == 100
    assert ApgdInversion().ball(128).eps == pytest.approx(100 * 128 / 224)
    assert ApgdInversion(radius=100).ball(128).eps == 100
    assert ApgdInversion().ball(128).norm == "l2"
    assert ApgdInversion().settings()["alpha"] == 2.0


def test_the_trace_is_of_the_points_and_ends_no_higher_than_the_best() -> None:
    encoder, wanted = ToyEncoder(), targets(2)
    starts = start_pixels(2, 16, 0, ["a", "b"])
    seen: list[tuple[int, Tensor, Tensor]] = []
    found = ApgdInversion(steps=12, radius=1.0).run(
        encoder,
        wanted,
        starts,
        generators=generators(2),
        watch=lambda update, pixels, best: seen.append((update, pixels.clone(), best.clone())),
    )
    assert found.trace.shape == (13, 2)
    torch.testing.assert_close(found.trace[0], towards(wanted, "cpu")(encoder.encode(starts)).detach())
    torch.testing.assert_close(found.trace.amax(dim=0), found.similarity)
    assert [update for update, _, _ in seen] == list(range(13))
    for update, pixels, best in seen:
        torch.testing.assert_close(best, found.trace[: update + 1].amax(dim=0))
        torch.testing.assert_close(best, towards(wanted, "cpu")(encoder.encode(pixels)).detach())
    assert torch.equal(seen[0][1], starts)


def test_a_picture_does_not_depend_on_the_others_of_its_batch() -> None:
    wanted, ids = targets(5), [f"t{i}" for i in range(5)]
    starts = start_pixels(5, 16, 0, ids)
    optimiser = ApgdInversion(steps=30)
    together = optimiser.run(ToyEncoder(), wanted, starts, generators=generators(5))
    for i in (0, 3):
        alone = optimiser.run(ToyEncoder(), [wanted[i]], starts[i : i + 1], generators=generators(1))
        assert torch.equal(alone.pixels[0], together.pixels[i])
        assert torch.equal(alone.trace[:, 0], together.trace[:, i])


class Memory:
    """Keeps the state of one update, and gives it back."""

    def __init__(self, at: int) -> None:
        self.at, self.kept = at, dict[str, Tensor]()

    def restored(self) -> tuple[int, dict[str, Tensor]] | None:
        return (self.at, self.kept) if self.kept else None

    def offer(self, update: int, state: Callable[[], Mapping[str, Tensor]]) -> None:
        if update == self.at:
            self.kept = {name: tensor.clone() for name, tensor in state().items()}


@pytest.mark.parametrize("at", [0, 1, 10, 39])
def test_it_goes_on_from_a_kept_state_to_the_same_bits(at: int) -> None:
    wanted, starts = targets(3), start_pixels(3, 16, 0, ["a", "b", "c"])

    def run(keeper: Memory | None) -> Reconstruction:
        # 40 steps have checkpoints of the step size before and after all these updates.
        return ApgdInversion(steps=40, radius=3.0).run(
            ToyEncoder(), wanted, starts, generators=generators(3), keeper=keeper
        )

    keeper = Memory(at)
    first, resumed, undisturbed = run(keeper), run(keeper), run(None)
    assert keeper.kept
    for found in (first, resumed):
        assert torch.equal(found.pixels, undisturbed.pixels)
        assert torch.equal(found.trace, undisturbed.trace)
        assert torch.equal(found.similarity, undisturbed.similarity)


def test_a_state_of_another_batch_is_refused() -> None:
    keeper = Memory(2)
    starts = start_pixels(3, 16, 0, ["a", "b", "c"])
    ApgdInversion(steps=5).run(ToyEncoder(), targets(3), starts, generators=generators(3), keeper=keeper)
    with pytest.raises(RunError, match="does not hold the state"):
        ApgdInversion(steps=5).run(ToyEncoder(), targets(2), starts[:2], generators=generators(2), keeper=keeper)


class Spoiled(ToyEncoder):
    """Cannot embed pictures as grey as its starts are."""

    def encode(self, pixels: Tensor) -> Tensor:
        if bool((pixels[:, :, 0, 0] == 0.5).all()):
            raise NonFiniteEmbedding((0,))
        return super().encode(pixels)


def test_the_row_that_cannot_be_embedded_is_named() -> None:
    starts = start_pixels(3, 16, 0, ["a", "b", "c"])
    starts[1] = 0.5
    with pytest.raises(NonFiniteEmbedding) as caught:
        ApgdInversion(steps=2).run(Spoiled(), targets(3), starts, generators=generators(3))
    assert caught.value.rows == (1,)


def test_an_objective_that_is_not_finite_ends_it() -> None:
    class Broken(ToyEncoder):
        def encode(self, pixels: Tensor) -> Tensor:
            return super().encode(pixels) * math.nan

    with pytest.raises(RunError, match="not finite"):
        ApgdInversion(steps=2).run(Broken(), targets(1), start_pixels(1, 16, 0, ["a"]), generators=generators(1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"radius": 0.0}, "radius must be positive and finite, got 0.0"),
        ({"radius": math.inf}, "radius must be positive and finite, got inf"),
        ({"alpha": math.nan}, "alpha must be positive and finite, got nan"),
    ],
)
def test_impossible_values_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ApgdInversion(**wrong)  # type: ignore[arg-type]


def test_a_target_is_a_unit_vector() -> None:
    for embedding in (torch.zeros(4), torch.ones(4), torch.full((4,), math.nan), torch.eye(4)):
        with pytest.raises(PlanError, match="not a finite vector of unit norm"):
            Target("a", embedding, None, "a")
    with pytest.raises(PlanError, match="needs an id"):
        Target("", torch.eye(4)[0], None, "a")
