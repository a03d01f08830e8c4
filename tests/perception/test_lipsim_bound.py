"""The Lipschitz constant of LipSim on pairs of images that are chosen to break it (methods 8.1).

Networks are trained to stretch distances as far as they can, so that a wrong `t` or pooling would show.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perception.encoders.lipsim import LipsimConfig, LipsimEncoder, LipsimNetwork, LipsimParts, preprocess_of
from perception.encoders.sll import SllConv2d, SllLinear
from perception.preprocess import PreprocessSpec

LIMIT = 1 + 1e-5
CONFIG = LipsimConfig(
    image_size=8, channels=5, depth=2, inner_channels=4, pools=(2,), dense_layers=2, dense_width=24, dim=80
)
Network = Callable[[Tensor], Tensor]


def norms(x: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return lengths


def ratios(network: Network, x: Tensor, y: Tensor) -> Tensor:
    return norms(network(x) - network(y)) / norms(x - y)


def badly_scaled(seed: int, scale: float, config: LipsimConfig = CONFIG) -> LipsimNetwork:
    """Random weights whose rows differ in length by orders of magnitude, biases and q likewise; in float64."""
    generator = torch.Generator().manual_seed(seed)
    network = LipsimNetwork(config).double().requires_grad_(False)
    for name, parameter in network.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith(("kernel", "weight")):
            rows = torch.randn((len(values), *[1] * (values.ndim - 1)), generator=generator, dtype=torch.float64)
            values *= scale * (2 * rows).exp()
        parameter.copy_(values * scale if name.endswith("bias") else values)
    return network


def reflecting(config: LipsimConfig = CONFIG) -> LipsimNetwork:
    """One row a layer, of one pixel, that always fires: each layer is a reflection, which uses its `t` up entirely."""
    network = badly_scaled(7, 1.0, config)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            parameter.fill_(100)
        elif name.endswith(("kernel", "weight")):
            row = F.normalize(parameter[0].sum(dim=(1, 2)) if parameter.ndim == 4 else parameter[0], dim=0)
            parameter.zero_()
            (parameter[0, :, 1, 1] if parameter.ndim == 4 else parameter[0]).copy_(row)
    return network


def stretched(seed: int, config: LipsimConfig = CONFIG, steps: int = 150) -> LipsimNetwork:
    """Weights trained, together with some pairs, to make the pairs' ratio as large as it can be; in float64."""
    torch.manual_seed(seed)
    network = LipsimNetwork(config).double()
    x, y = (torch.rand(8, 3, config.image_size, config.image_size, dtype=torch.float64) for _ in range(2))
    optimizer = torch.optim.Adam([*network.parameters(), x.requires_grad_(), y.requires_grad_()], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        (-ratios(network, x, y).log().mean()).backward()
        optimizer.step()
    return network.requires_grad_(False)


trained = cache(stretched)


def steepest(network: Network, x: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Unit directions in which the network stretches most at `x`: power iteration on J^T J."""
    v = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    for _ in range(steps):
        v = v / norms(v).clamp(min=1e-30).view(-1, 1, 1, 1)
        jv = (network(x + 1e-5 * v) - network(x - 1e-5 * v)) / 2e-5
        at = x.clone().requires_grad_()
        (v,) = torch.autograd.grad((network(at) * jv).sum(), at)
    return v / norms(v).clamp(min=1e-30).view(-1, 1, 1, 1)


def ascended(network: Network, x: Tensor, y: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Pairs moved along the gradient of their ratio, within [0, 1]."""
    for i in range(steps):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        gradients = torch.autograd.grad(ratios(network, x, y).log().sum(), (x, y))
        size = 0.5 * (1 - i / steps) * norms(x - y).detach()
        x, y = (
            (p + g * (size / norms(g).clamp(min=1e-30)).view(-1, 1, 1, 1)).clamp(0, 1)
            for p, g in zip((x, y), gradients, strict=True)
        )
    return x.detach(), y.detach()


def pairs(network: Network, count: int, config: LipsimConfig = CONFIG) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Five kinds of pairs of images in [0, 1], `count` of each, in float64."""
    generator = torch.Generator().manual_seed(0)

    def images() -> Tensor:
        shape = (count, 3, config.image_size, config.image_size)
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    x = images()
    yield "far", x, images()
    radii = 10 ** (-4 * torch.rand(count, 1, 1, 1, generator=generator, dtype=torch.float64))
    yield "near", x, (x + radii * (images() - 0.5)).clamp(0, 1)
    v = steepest(network, x, 10, generator)
    yield "steepest, near", x, (x + 1e-3 * v).clamp(0, 1)
    yield "steepest, far", x, (x + 0.5 * v).clamp(0, 1)
    yield "ascended", *ascended(network, x, images(), 6)


def largest(network: Network, count: int, config: LipsimConfig = CONFIG) -> dict[str, float]:
    """The largest ratio of each kind of pair."""
    return {kind: float(ratios(network, x, y).max()) for kind, x, y in pairs(network, count, config)}


def test_ten_thousand_pairs_never_exceed_the_constant() -> None:
    found = [largest(network, 250) for network in (trained(0), trained(1), trained(2), reflecting())]
    found += [largest(badly_scaled(seed, scale), 250) for seed, scale in enumerate((1e-3, 1.0, 10.0, 1e3))]
    assert max(max(kinds.values()) for kinds in found) <= LIMIT
    # The pairs are worth something: some come within a thousandth of the constant.
    assert max(kinds["steepest, near"] for kinds in found) > 0.999
    assert max(kinds["ascended"] for kinds in found) > 0.99


def longer_steps(layer: type[SllConv2d] | type[SllLinear]) -> Callable[[pytest.MonkeyPatch], None]:
    def change(patch: pytest.MonkeyPatch) -> None:
        right = layer.scales
        patch.setattr(layer, "scales", lambda self: 1.05 * right(self))

    return change


def without_neighbours(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SllConv2d, "scales", lambda self: 1 / (self.kernel.square().sum(dim=(1, 2, 3)) + 1e-9))


def without_other_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SllLinear, "scales", lambda self: 1 / (self.weight.square().sum(dim=1) + 1e-9))


def plain_sums(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.nn.AvgPool2d, "forward", lambda self, x: 4 * F.avg_pool2d(x, self.kernel_size))


WRONG = {
    "longer steps of convolutions": longer_steps(SllConv2d),
    "longer steps of dense layers": longer_steps(SllLinear),
    "no autocorrelation": without_neighbours,
    "rows taken for orthogonal": without_other_rows,
    "sums not divided": plain_sums,
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_the_pairs_find_what_breaks_the_bound(
    change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    assert max(max(largest(network, 50).values()) for network in (reflecting(), stretched(0, steps=100))) > LIMIT


def test_unit_embeddings_keep_the_constant_with_the_bias_dimension_alone() -> None:
    plain = trained(0)
    biased = LipsimNetwork(replace(CONFIG, bias_dim=True)).double().requires_grad_(False)
    biased.load_state_dict(plain.state_dict())

    def unit(network: Network, shift: Tensor | float) -> Network:
        return lambda x: F.normalize(network(x) - shift, dim=1)

    # Features move so that they vanish at mid-grey: around it, |features| < 1 without the constant coordinate.
    generator = torch.Generator().manual_seed(1)
    grey = torch.full((1, 3, CONFIG.image_size, CONFIG.image_size), 0.5, dtype=torch.float64)
    x, y = grey + 0.05 * (torch.rand((2, 2000, *grey.shape[1:]), generator=generator, dtype=torch.float64) - 0.5)
    at_grey = plain(grey)
    assert float(ratios(unit(plain, at_grey), x, y).max()) > 1.5
    found = float(ratios(unit(biased, F.pad(at_grey, (0, 1))), x, y).max())
    assert 0.5 < found <= LIMIT
    assert max(largest(unit(biased, 0.0), 100).values()) <= LIMIT
    assert max(largest(unit(biased, F.pad(at_grey, (0, 1))), 100).values()) <= LIMIT


def test_pooling_keeps_the_norm_of_constants_and_is_orthonormal() -> None:
    network = LipsimNetwork(replace(CONFIG, pools=(4, 2), dim=5))
    for pool in list(network.convs)[CONFIG.depth :]:
        constant = torch.full((1, 2, 8, 8), 0.7)
        assert float(pool(constant).norm()) == pytest.approx(float(constant.norm()))
        basis = torch.eye(64).view(64, 1, 8, 8)
        matrix = pool(basis).flatten(1).T
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)))


@pytest.mark.parametrize("std", [(1.0, 1.0, 1.0), (0.5, 0.25, 1.0)])
def test_an_encoder_says_its_constant_and_keeps_it(std: tuple[float, float, float]) -> None:
    network = trained(1)
    spec = PreprocessSpec(8, 8, "squash", mean=(0.5, 0.0, 0.0), std=std)
    parts = LipsimParts(CONFIG, spec, network.state_dict(), "test")
    encoder = parts.build("test", "fp32", "cpu")
    assert isinstance(encoder, LipsimEncoder)
    assert encoder.lipschitz == 1 / min(std)

    def exact(x: Tensor) -> Tensor:
        embeddings: Tensor = network((x - encoder.get_buffer("mean")) / encoder.get_buffer("std"))
        return embeddings

    found = largest(exact, 200)
    assert 0.9 * encoder.lipschitz < max(found.values()) <= LIMIT * encoder.lipschitz
    # What is served is float32, whose rounding shows in near pairs alone.
    for kind, x, y in pairs(exact, 200):
        if kind in ("far", "ascended", "steepest, far"):
            apart = norms(x - y) > 0.3
            assert float(ratios(encoder.features, x.float(), y.float())[apart].max()) <= LIMIT * encoder.lipschitz
    assert parts.build("test", "bf16", "cpu").lipschitz is None
    assert preprocess_of(CONFIG).std == (1.0, 1.0, 1.0)
