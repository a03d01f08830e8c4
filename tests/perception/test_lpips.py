"""LPIPS as an encoder: the squared distance of its features is the metric; published and own files; gradients."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception import load_encoder
from perception.encoders import lpips
from perception.encoders.lpips import LpipsEncoder, LpipsNetwork, LpipsParts, published_preprocess, read_visual
from perception.errors import CheckpointError
from perception.preprocess import PreprocessSpec

SIZE = 64
TOY = published_preprocess(SIZE)
CHANNELS = (64, 192, 384, 256, 256)
SLICES = {1: 0, 2: 3, 3: 6, 4: 8, 5: 10}  # published slice: index of its convolution in AlexNet


def alexnet() -> nn.Module:
    """torchvision's AlexNet with random weights."""
    from torchvision.models import alexnet as build

    torch.manual_seed(0)
    model: nn.Module = build(weights=None).eval()
    return model


@pytest.fixture(scope="module")
def trunk() -> dict[str, Tensor]:
    """torchvision's state dict without the classifier's 200 MB, but with names that a reader must leave out."""
    state = {k: v for k, v in alexnet().state_dict().items() if k.startswith("features.")}
    return {**state, "classifier.6.bias": torch.zeros(1000)}


def linear_state(prefix: str = "lin{}.model.1.weight") -> dict[str, Tensor]:
    """LPIPS' own file: weights >= 0, some exactly 0."""
    generator = torch.Generator().manual_seed(1)
    return {
        prefix.format(i): F.relu(torch.randn(1, c, 1, 1, generator=generator) + 0.5) for i, c in enumerate(CHANNELS)
    }


def whole_state(trunk: dict[str, Tensor], *, buffers: bool = True) -> dict[str, Tensor]:
    """A whole network as it is published: R-LPIPS' linear layers come twice; LPIPS has its scaling as buffers."""
    state: dict[str, Tensor] = {}
    for n, i in SLICES.items():
        state |= {f"net.slice{n}.{i}.{kind}": trunk[f"features.{i}.{kind}"] for kind in ("weight", "bias")}
    state |= linear_state() | linear_state("lins.{}.model.1.weight")
    if buffers:
        state["scaling_layer.shift"] = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        state["scaling_layer.scale"] = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    return state


@pytest.fixture(scope="module")
def encoder(trunk: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> LpipsEncoder:
    path = tmp_path_factory.mktemp("lpips") / "latest_net_linf_ref.pth"
    torch.save(whole_state(trunk, buffers=False), path)
    return read_visual("lpips-alex", path, TOY).build("toy", "fp32", "cpu")


def images(count: int = 3, seed: int = 0, size: int = SIZE) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def naive_distance(trunk: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """LPIPS as it is written down, layer by layer, in float64 (methods 8.2)."""
    model: Any = alexnet().double()
    total = torch.zeros(len(x), dtype=torch.float64)
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(3, 1, 1)
    pair = [((image.double() * 2 - 1) - shift) / scale for image in (x, y)]
    weights = list(linear_state().values())
    with torch.no_grad():
        for i, module in enumerate(model.features[:12]):
            pair = [module(image) for image in pair]
            if i in (1, 4, 7, 9, 11):
                units = [f / (f.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for f in pair]
                weighted = weights.pop(0).double() * (units[0] - units[1]).square()
                total += weighted.sum(dim=1).mean(dim=(1, 2))
    return total


def test_squared_distance_of_features_is_lpips(encoder: LpipsEncoder, trunk: dict[str, Tensor]) -> None:
    x = images()
    for y in (images(seed=1), x + 0.02 * images(seed=2), x.flip(3)):
        expected = naive_distance(trunk, x, y.clamp(0, 1))
        found = (encoder.features(x) - encoder.features(y.clamp(0, 1))).square().sum(dim=1)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)
    assert float((encoder.features(x) - encoder.features(x)).abs().max()) == 0
    assert encoder.metric == "l2"
    assert encoder.lipschitz is None


def test_mean_and_std_are_the_published_scaling() -> None:
    spec = published_preprocess()
    assert (spec.size_px, spec.resize_px, spec.resize_mode, spec.interpolation) == (224, 224, "squash", "bicubic")
    for mean, std, shift, scale in zip(
        spec.mean, spec.std, (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450), strict=True
    ):
        assert mean == pytest.approx((1 + shift) / 2)
        assert std == pytest.approx(scale / 2)


@pytest.mark.parametrize("size", [31, 32, 63, 64, 65, 224])
def test_dim_is_what_comes_out(size: int) -> None:
    network = LpipsNetwork(size).requires_grad_(False)
    assert network(images(1, size=size)).shape == (1, network.dim)
    if size == 224:
        assert network.dim == 484_992
    with pytest.raises(ValueError, match=rf"pixels must be \(b, 3, {size}, {size}\)"):
        network(images(1, size=size + 8))


def test_encode_gives_unit_rows(encoder: LpipsEncoder) -> None:
    units, features = encoder.encode(images()), encoder.features(images())
    assert units.shape == (3, encoder.dim)
    torch.testing.assert_close(units.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(units * features.norm(dim=1, keepdim=True), features)


def test_all_published_layouts_give_one_network(
    encoder: LpipsEncoder, trunk: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(whole_state(trunk), tmp_path / "lpips.pth")
    folder = tmp_path / "two files"
    folder.mkdir()
    torch.save(linear_state(), folder / "alex.pth")
    torch.save(trunk, folder / "alexnet-owt-7be5be79.pth")
    (folder / "README").write_text("not a weight file")
    undropped = tmp_path / "undropped.pth"
    torch.save(
        {**whole_state(trunk), **{k.replace("model.1", "model.0"): v for k, v in linear_state().items()}}, undropped
    )
    for path in (tmp_path / "lpips.pth", folder, undropped):
        other = read_visual("lpips-alex", path, TOY).build("x", "fp32", "cpu")
        assert other.fingerprint == encoder.fingerprint
    assert read_visual("lpips-alex", folder).preprocess == published_preprocess()


def test_a_card_and_its_file_are_a_name(trunk: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(whole_state(trunk, buffers=False), tmp_path / "latest_net_linf_ref.pth")
    encoder = load_encoder(f"visual:r-lpips:{tmp_path / 'latest_net_linf_ref.pth'}")
    assert isinstance(encoder, LpipsEncoder)
    assert (encoder.dim, encoder.preprocess) == (484_992, published_preprocess())


def test_half_a_network_is_refused(trunk: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(linear_state(), tmp_path / "alex.pth")
    for path in (tmp_path / "alex.pth", tmp_path):
        with pytest.raises(CheckpointError, match="holds no AlexNet trunk: name either the file of a whole"):
            read_visual("lpips-alex", path)
    torch.save(trunk, tmp_path / "alex.pth")
    with pytest.raises(CheckpointError, match="holds no linear layers"):
        read_visual("lpips-alex", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no weight files \(\.pth, \.pt, \.bin, \.safetensors\)"):
        read_visual("lpips-alex", tmp_path / "empty")
    with pytest.raises(CheckpointError, match="weights not found"):
        read_visual("lpips-alex", tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="no LPIPS architecture 'lpips-vgg'; there are lpips-alex"):
        read_visual("lpips-vgg", tmp_path)


def spoilt(name: str, value: Tensor) -> dict[str, Tensor]:
    return {name: value, name.replace("lin", "lins."): value} if name.startswith("lin") else {name: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoilt("lin1.model.1.weight", -torch.ones(1, 192, 1, 1)), "linear layer 1 must have weights >= 0, got -1"),
        (spoilt("lin1.model.1.weight", torch.ones(1, 64, 1, 1)), r"linear\.1 is \(64,\), expected \(192,\)"),
        (spoilt("lin4.model.1.weight", torch.full((1, 256, 1, 1), torch.inf)), r"not finite: linear\.4"),
        (
            {"lins.2.model.1.weight": torch.ones(1, 384, 1, 1)},
            r"linear\.2 and its copy lins\.2\.model\.1\.weight differ",
        ),
        ({"net.slice6.12.weight": torch.ones(3)}, r"unexpected 1: net\.slice6\.12\.weight"),
        (
            {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)},
            r"scaling_layer\.shift must be \[-0\.03, -0\.088, -0\.188\]",
        ),
        ({"scaling_layer.scale": torch.ones(2)}, r"scaling_layer\.scale must be .*, as in v0\.1, got \[1\.0, 1\.0\]"),
    ],
)
def test_what_does_not_fit_is_named(
    change: dict[str, Tensor], message: str, trunk: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save({**whole_state(trunk), **change}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=message):
        read_visual("lpips-alex", tmp_path / "net.pth", TOY).build("x", "fp32", "cpu")


def test_missing_tensors_and_small_images_are_named(trunk: dict[str, Tensor], tmp_path: Path) -> None:
    state = whole_state(trunk)
    del state["net.slice3.6.bias"]
    torch.save(state, tmp_path / "net.pth")
    parts = read_visual("lpips-alex", tmp_path / "net.pth", TOY)
    with pytest.raises(CheckpointError, match=r"missing 1: trunk\.6\.bias"):
        parts.build("x", "fp32", "cpu")
    small = LpipsParts(published_preprocess(30), parts.visual_state, "net")
    with pytest.raises(CheckpointError, match="net: size_px must be at least 31, got 30"):
        small.build("x", "fp32", "cpu")


def test_gradients_are_finite_where_nothing_fires(encoder: LpipsEncoder) -> None:
    dead = copy.deepcopy(encoder)
    with torch.no_grad():
        dead.visual.get_parameter("trunk.3.bias").fill_(-1e3)  # the second layer and what follows see zeros
        dead.visual.get_parameter("trunk.6.bias").fill_(0.0)
    dead.visual.requires_grad_(True)
    x = images().requires_grad_()
    (dead.features(x) - dead.features(images(seed=1))).square().sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
    assert bool(x.grad.any())
    assert all(bool(torch.isfinite(p.grad).all()) for p in dead.visual.parameters() if p.grad is not None)


def test_gradients_follow_the_distance(encoder: LpipsEncoder) -> None:
    x = images(1)
    # At x itself the distance is at its minimum: no direction.
    at = x.clone().requires_grad_()
    (encoder.features(at) - encoder.features(x).detach()).square().sum().backward()
    assert at.grad is not None
    assert float(at.grad.abs().max()) == 0
    start = (x + 0.1 * (images(1, seed=1) - 0.5)).clamp(0, 1).requires_grad_()
    distance = (encoder.features(start) - encoder.features(x).detach()).square().sum()
    distance.backward()
    assert start.grad is not None
    closer = start.detach() - 0.01 * start.grad / start.grad.norm()
    assert float((encoder.features(closer) - encoder.features(x)).square().sum().detach()) < float(distance.detach())


def test_weights_that_training_pushes_below_zero_count_as_zero(encoder: LpipsEncoder, tmp_path: Path) -> None:
    student = copy.deepcopy(encoder)
    student.visual.requires_grad_(True)
    linear: Tensor = student.visual.get_parameter("linear.0")
    with torch.no_grad():
        linear[:5] = -0.25
        linear[5] = 0.0
    student(images()).square().sum().backward()
    assert linear.grad is not None
    assert bool(torch.isfinite(linear.grad).all())
    student.export(tmp_path)
    back = load_encoder(f"local-dir:{tmp_path}")
    assert isinstance(back, LpipsEncoder)
    with torch.no_grad():
        assert torch.equal(back.features(images()), student.features(images()))
        assert float(back.features(images())[:, : 5 * 15 * 15].abs().max()) == 0
    assert float(back.visual.get_parameter("linear.0").min()) == 0


def test_export_is_in_the_published_names_and_comes_back(
    encoder: LpipsEncoder, trunk: dict[str, Tensor], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    encoder.export(tmp_path)
    written, published = load_file(tmp_path / "lpips.safetensors"), whole_state(trunk, buffers=False)
    assert written.keys() == {k for k in published if not k.startswith("lins.")}
    assert all(torch.equal(written[k], published[k]) for k in written)
    back = load_encoder(f"local-dir:{tmp_path}")
    assert (back.fingerprint, back.dim, back.preprocess) == (encoder.fingerprint, encoder.dim, TOY)
    assert lpips.read_folder(tmp_path, published_preprocess()).preprocess.size_px == 224
    half = load_encoder(f"local-dir:{tmp_path}", precision="bf16")
    assert float((half.encode(images()) * encoder.encode(images())).sum(dim=1).min()) > 0.98


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "expected 'architecture' and 'preprocess'"),
        ({"architecture": "lpips-alex", "preprocess": TOY.as_dict(), "eps": 1}, "got architecture, eps, preprocess"),
        ({"architecture": "lpips-squeeze", "preprocess": TOY.as_dict()}, "no LPIPS architecture 'lpips-squeeze'"),
        ({"architecture": ["lpips-alex"], "preprocess": TOY.as_dict()}, "no LPIPS architecture"),
        ({"architecture": "lpips-alex", "preprocess": {"size": 64}}, "preprocessing not understood"),
        ({"architecture": "lpips-alex", "preprocess": [64]}, "preprocessing not understood"),
        ({"architecture": "lpips-alex", "preprocess": {**TOY.as_dict(), "std": [1, 1, 0]}}, "std must be positive"),
    ],
)
def test_folders_that_are_not_understood_are_refused(
    table: dict[str, Any], message: str, encoder: LpipsEncoder, tmp_path: Path
) -> None:
    encoder.export(tmp_path)
    (tmp_path / lpips.CONFIG_NAME).write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=message):
        load_encoder(f"local-dir:{tmp_path}")


def test_own_preprocessing_decides_the_length(encoder: LpipsEncoder) -> None:
    spec = PreprocessSpec(32, 40, "shortest", "bilinear")
    parts = LpipsParts(spec, encoder.visual.state_dict(), "test")
    assert parts.build("x", "fp32", "cpu").dim == LpipsNetwork(32).dim
