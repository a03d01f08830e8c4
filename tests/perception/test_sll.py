"""SLL layers: the vectors of methods 9.2, naive twins, degenerate weights, and a kept `t` that is never stale."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.encoders.sll import SllConv2d, SllLinear

DOUBLE = torch.float64


def dense(weight: list[list[float]], bias: list[float], q: list[float]) -> SllLinear:
    layer = SllLinear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
        layer.q.copy_(torch.tensor(q).log())
    return layer


def convolution(kernel: Tensor, bias: Tensor) -> SllConv2d:
    layer = SllConv2d(kernel.shape[1], kernel.shape[0], kernel.shape[-1]).to(kernel.dtype)
    with torch.no_grad():
        layer.kernel.copy_(kernel)
        layer.bias.copy_(bias)
    return layer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def test_dense_vector() -> None:
    layer = dense([[1, 2], [0, -1]], [0.5, -0.25], [1, 2]).requires_grad_(False)
    torch.testing.assert_close(layer.scales(), torch.tensor([1 / 9, 1 / 2]))
    x = torch.tensor([[1.0, 1.0], [0.0, -1.0]])
    y = layer(x)
    torch.testing.assert_close(y, torch.tensor([[0.2222222, -0.5555556], [0.0, -0.25]]))
    assert float((x[0] - x[1]).norm()) == pytest.approx(5**0.5)
    assert float((y[0] - y[1]).norm()) == pytest.approx(0.3778186, abs=1e-7)
    linear_part = torch.eye(2) - 2 * layer.weight.T @ torch.diag(layer.scales()) @ layer.weight
    assert float(torch.linalg.matrix_norm(linear_part, 2)) == pytest.approx(1)


def test_convolution_vector() -> None:
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[0, 0, 1, 1] = kernel[0, 0, 1, 2] = 1
    layer = convolution(kernel, torch.zeros(1)).requires_grad_(False)
    assert float(layer.scales()) == 0.25
    delta, expected = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    delta[0, 0, 1, 1] = 1
    expected[0, 0, 1, 0] = expected[0, 0, 1, 2] = -0.5
    assert torch.equal(layer(delta), expected)
    # The linear part, where every unit fires, as a matrix of 16 x 16.
    layer.bias.fill_(1e3)
    basis = torch.eye(16).view(16, 1, 4, 4)
    linear_part = (layer(basis) - layer(torch.zeros(1, 1, 4, 4))).view(16, 16)
    assert float(torch.linalg.matrix_norm(linear_part, 2)) == pytest.approx(0.939693, abs=1e-4)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_convolution_is_the_dense_layer_of_its_matrix(kernel_size: int) -> None:
    layer = convolution(random(2, 3, kernel_size, kernel_size), random(2, seed=1))
    size, channels, inner = 6, 3, 2
    basis = torch.eye(channels * size * size, dtype=DOUBLE).view(-1, channels, size, size)
    matrix = F.conv2d(basis, layer.kernel, padding=kernel_size // 2).flatten(1).T  # (inner * 36, channels * 36)
    t = layer.scales().repeat_interleave(size * size)
    bias = layer.bias.repeat_interleave(size * size)
    x = random(4, channels, size, size, seed=2)
    naive = x.flatten(1) - 2 * (t * F.relu(x.flatten(1) @ matrix.T + bias)) @ matrix
    torch.testing.assert_close(layer(x).flatten(1), naive)
    # What makes it 1-Lipschitz: W W^T <= diag(t)^-1; in the middle of a large image the row sums are those of |W W^T|.
    gram, t = (matrix @ matrix.T).detach(), t.detach()
    assert float(torch.linalg.eigvalsh(torch.diag(1 / t) - gram).min()) > -1e-9
    middle = (size // 2 - 1) * size + size // 2 - 1
    if kernel_size < 5:
        sums = gram.abs().sum(dim=1).view(inner, -1)[:, middle]
        torch.testing.assert_close(1 / layer.scales().detach(), sums)


def test_convolution_scales_are_those_of_the_published_autocorrelation() -> None:
    kernel = random(4, 3, 3, 3)
    layer = convolution(kernel, torch.zeros(4, dtype=DOUBLE))
    published = 1 / F.conv2d(kernel, kernel, padding=2).abs().sum(dim=(1, 2, 3))
    torch.testing.assert_close(layer.scales(), published)
    layer.get_buffer("q").normal_()  # as published, and without effect
    torch.testing.assert_close(layer.scales(), published)
    assert {name for name, _ in layer.named_parameters()} == {"kernel", "bias"}


@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0, 500.0])
def test_dense_condition_holds_for_any_q(spread: float) -> None:
    layer = SllLinear(8, 6).double()
    with torch.no_grad():
        layer.weight.copy_(random(6, 8))
        layer.q.copy_(random(6, seed=1) * spread)
    layer.requires_grad_(False)
    t = layer.scales()
    assert bool(torch.isfinite(t).all())
    # W W^T <= diag(t)^-1, in a form that does not suffer from a `t` of 1e-20.
    scaled = t.sqrt()[:, None] * (layer.weight @ layer.weight.T) * t.sqrt()
    assert float(torch.linalg.eigvalsh(scaled).max()) <= 1 + 1e-9
    if spread == 1.0:
        q = layer.q.exp()
        gram = [[float((a @ b).abs()) for b in layer.weight] for a in layer.weight]
        naive = [1 / sum(gram[i][j] * float(q[j] / q[i]) for j in range(6)) for i in range(6)]
        torch.testing.assert_close(t, torch.tensor(naive, dtype=DOUBLE))


@pytest.mark.parametrize("make", [lambda: SllConv2d(3, 4), lambda: SllLinear(12, 4)], ids=["conv", "dense"])
@pytest.mark.parametrize(
    "kind", ["zero", "zero row", "equal rows", "opposite rows", "tiny", "one tiny row", "one small row", "large"]
)
def test_degenerate_weights_keep_values_and_gradients_finite(make: Callable[[], nn.Module], kind: str) -> None:
    torch.manual_seed(0)
    layer = make()
    weight = next(layer.parameters())
    with torch.no_grad():
        if kind == "zero":
            weight.zero_()
        elif kind == "zero row":
            weight[1].zero_()
        elif kind.endswith("rows"):
            weight[1] = weight[0] if kind.startswith("equal") else -weight[0]
        elif kind.startswith("one"):
            weight[1] *= 1e-25 if "tiny" in kind else 1e-4
        else:
            weight.mul_({"tiny": 1e-25, "large": 1e6}[kind])
    shape = (5, 3, 6, 6) if isinstance(layer, SllConv2d) else (5, 12)
    x = torch.rand(shape, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert bool(torch.isfinite(y).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in [x, *layer.parameters()] if p.grad is not None)
    x, y = x.detach(), y.detach()
    ratios = (y[1:] - y[:-1]).flatten(1).norm(dim=1) / (x[1:] - x[:-1]).flatten(1).norm(dim=1)
    assert float(ratios.max()) <= 1 + 1e-5
    if kind in ("zero", "tiny"):
        assert torch.equal(y, x)  # no direction to reflect in


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    for layer, shape in ((SllConv2d(2, 3).double(), (2, 2, 4, 4)), (SllLinear(5, 3).double(), (2, 5))):
        x = torch.rand(shape, dtype=DOUBLE, requires_grad=True)
        names = [name for name, _ in layer.named_parameters()]
        parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]

        def call(x: Tensor, *values: Tensor, layer: nn.Module = layer, names: list[str] = names) -> Tensor:
            result: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
            return result

        assert torch.autograd.gradcheck(call, (x, *parameters))


CHANGES: dict[str, Callable[[SllLinear], object]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "one value": lambda layer: layer.weight[3, 4].add_(0.5),
    "through data": lambda layer: layer.weight.data.mul_(2),
    "through numpy": lambda layer: layer.weight.numpy().__imul__(2),
    "new data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
    "new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 2, requires_grad=False)),
    "swapped rows": lambda layer: layer.weight.data.copy_(layer.weight.data.flip(0)),
    "q": lambda layer: layer.q.data.add_(torch.arange(6.0)),
    "state dict": lambda layer: layer.load_state_dict(SllLinear(8, 6).state_dict()),
    "double": lambda layer: layer.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_kept_scales_follow_every_change_of_the_weights(change: Callable[[SllLinear], object]) -> None:
    torch.manual_seed(0)
    layer = SllLinear(8, 6).eval().requires_grad_(False)
    x = torch.rand(2, 8)
    before = layer(x)
    change(layer)
    x = x.to(layer.weight.dtype)
    fresh = SllLinear(8, 6).to(layer.weight.dtype)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), fresh.requires_grad_(False)(x))
    assert not torch.equal(layer(x).float(), before)


def test_scales_are_computed_once_while_the_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, compute = SllLinear(8, 6), SllLinear.scales
    calls: list[SllLinear] = []

    def counted(self: SllLinear) -> Tensor:
        calls.append(self)
        return compute(self)

    monkeypatch.setattr(SllLinear, "scales", counted)
    x = torch.rand(2, 8)
    with torch.inference_mode():
        first = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), first)
    assert len(calls) == 1
    layer(x).sum().backward()  # learning: not from what was kept
    assert len(calls) == 2
    assert all(p.grad is not None for p in layer.parameters())
    layer.requires_grad_(False)
    # An attack on a frozen layer, whose first call was in inference mode.
    pixels = x.clone().requires_grad_()
    layer(pixels).square().sum().backward()
    assert len(calls) == 2
    assert pixels.grad is not None
    assert bool(pixels.grad.any())
    twin = copy.deepcopy(layer)
    twin.weight.mul_(3)
    assert not torch.equal(twin(x), layer(x))
    assert torch.equal(layer(x), first)


def test_training_steps_change_what_a_kept_layer_answers() -> None:
    torch.manual_seed(0)
    layer, x = SllLinear(8, 6), torch.rand(4, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(3):
        with torch.no_grad():
            kept = layer(x)
        learning = layer(x)
        assert torch.equal(kept, learning)
        optimizer.zero_grad()
        learning.square().sum().backward()
        optimizer.step()


def test_bfloat16_scales_are_computed_in_float32() -> None:
    torch.manual_seed(0)
    for layer in (SllConv2d(3, 4), SllLinear(12, 40)):
        rounded = copy.deepcopy(layer).bfloat16()
        exact = copy.deepcopy(rounded).float()
        assert rounded.scales().dtype == torch.float32
        assert torch.equal(rounded.scales(), exact.scales())
        x = torch.rand(2, 3, 6, 6) if isinstance(layer, SllConv2d) else torch.rand(2, 12)
        assert rounded(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SllConv2d(3, 4, 2), "kernel_size must be odd, got 2"),
        (lambda: SllConv2d(0, 4), "channels must be positive, got 0"),
        (lambda: SllConv2d(3, -1), "inner_channels must be positive, got -1"),
        (lambda: SllLinear(0, 4), "features must be positive, got 0"),
        (lambda: SllLinear(3, 0), "inner_features must be positive, got 0"),
    ],
)
def test_impossible_sizes_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
