"""LipSim as an encoder: the network's shape, published and own files, the bias dimension, training, precision."""

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perception import load_encoder
from perception.encoders import lipsim
from perception.encoders.lipsim import (
    ARCHITECTURES,
    LipsimConfig,
    LipsimEncoder,
    LipsimNetwork,
    LipsimParts,
    preprocess_of,
    read_visual,
)
from perception.encoders.weights import read_state_dict
from perception.errors import CheckpointError
from perception.preprocess import PreprocessSpec

TOY = LipsimConfig(
    image_size=16, channels=5, depth=3, inner_channels=2, pools=(2, 2), dense_layers=2, dense_width=7, dim=12
)


@pytest.fixture(autouse=True)
def toy_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the published architecture's name to a toy: full-size weights are 250 MB."""
    monkeypatch.setitem(ARCHITECTURES, "lipsim-toy", TOY)
    monkeypatch.setitem(ARCHITECTURES, "lipsim-toy+bias", replace(TOY, bias_dim=True))


def pixels(count: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def published_state(seed: int = 0, *, alias: bool = True) -> dict[str, Tensor]:
    """Random weights by the published names and shapes, each twice."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(TOY.depth):
        shapes |= {f"convs.{i}.kernel": (2, 5, 3, 3), f"convs.{i}.bias": (1, 2, 1, 1), f"convs.{i}.q": (2,)}
    for i in range(1, TOY.dense_layers + 1):
        shapes |= {f"linear.{i}.weight": (7, 80), f"linear.{i}.bias": (1, 7), f"linear.{i}.q": (7,)}
    own = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    copies = {n.replace("convs.", "base.1.").replace("linear.", "base.2."): t for n, t in own.items()}
    return {f"module.model.{n}": t for n, t in {**own, **(copies if alias else {})}.items()}


def write(path: Path, state: dict[str, Tensor]) -> Path:
    """As the published trainer saves it, optimizer and all."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    torch.save(
        {
            "epoch": 0, "global_step": 435, "model_state_dict": state, "optimizer_state_dict": optimizer.state_dict(),
        },
        path,
    )  # fmt: skip
    return path


def encoder_of(config: LipsimConfig = TOY, precision: Any = "fp32", seed: int = 0) -> LipsimEncoder:
    torch.manual_seed(seed)
    parts = LipsimParts(config, preprocess_of(config), LipsimNetwork(config).state_dict(), "test")
    return parts.build("test", precision, "cpu")


def naive_features(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The published network in plain products of matrices, from the published tensors."""

    def tensor(name: str) -> Tensor:
        return state[f"module.model.{name}"].double()

    x = torch.cat([x.double(), torch.zeros(len(x), 2, 16, 16, dtype=torch.float64)], dim=1)
    for i in range(3):
        kernel = tensor(f"convs.{i}.kernel")
        sums = F.conv2d(kernel, kernel, padding=2).abs().sum(dim=(1, 2, 3))  # without q
        fired = F.relu(F.conv2d(x, kernel, padding=1) + tensor(f"convs.{i}.bias"))
        x = x - 2 * F.conv_transpose2d(fired / sums.view(-1, 1, 1), kernel, padding=1)
    for _ in range(2):
        x = x.view(len(x), 5, x.shape[2] // 2, 2, x.shape[3] // 2, 2).sum(dim=(3, 5)) / 2
    x = x.reshape(len(x), 80)
    for i in (1, 2):
        weight, q = tensor(f"linear.{i}.weight"), tensor(f"linear.{i}.q").exp()
        t = 1 / ((weight @ weight.T).abs() @ q / q)
        x = x - 2 * (t * F.relu(x @ weight.T + tensor(f"linear.{i}.bias"))) @ weight
    return x[:, :12]


def test_published_checkpoint_gives_the_published_embedding(tmp_path: Path) -> None:
    state = published_state()
    encoder = read_visual("lipsim-toy", write(tmp_path / "model.ckpt-435", state)).build("x", "fp32", "cpu")
    features = encoder.features(pixels())
    torch.testing.assert_close(features.double(), naive_features(state, pixels()), atol=1e-5, rtol=1e-5)
    assert encoder.dim == features.shape[1] == 12
    assert encoder.lipschitz == 1.0
    assert (encoder.metric, encoder.precision) == ("cosine", "fp32")
    assert encoder.preprocess == PreprocessSpec(16, 16, "squash", "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    with pytest.raises(CheckpointError, match="has no text tower"):
        _ = encoder.text


def test_q_of_convolutions_is_read_and_has_no_effect(tmp_path: Path) -> None:
    state = published_state()
    first = read_visual("lipsim-toy", write(tmp_path / "a", state)).build("x", "fp32", "cpu")
    for name in state:
        if "convs" in name or "base.1" in name:
            state[name] = state[name] + 1 if name.endswith(".q") else state[name]
    same = read_visual("lipsim-toy", write(tmp_path / "b", state)).build("x", "fp32", "cpu")
    assert same.fingerprint == first.fingerprint
    for name in list(state):
        if name.endswith((".convs.1.q", ".base.1.1.q")):
            state[name] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"wrong shape 1: convs\.1\.q is \(3,\), expected \(2,\)"):
        read_visual("lipsim-toy", write(tmp_path / "c", state)).build("x", "fp32", "cpu")


def test_one_copy_of_a_tensor_is_enough_and_two_must_agree(tmp_path: Path) -> None:
    both = read_visual("lipsim-toy", write(tmp_path / "a", published_state())).build("x", "fp32", "cpu")
    single = published_state(alias=False)
    one = read_visual("lipsim-toy", write(tmp_path / "b", single)).build("x", "fp32", "cpu")
    assert one.fingerprint == both.fingerprint
    torch.save({k.removeprefix("module."): v for k, v in single.items()}, tmp_path / "bare.pt")
    assert read_visual("lipsim-toy", tmp_path / "bare.pt").build("x", "fp32", "cpu").fingerprint == one.fingerprint
    state = published_state()
    state["module.model.base.2.1.weight"] = state["module.model.base.2.1.weight"] + 1e-3
    with pytest.raises(CheckpointError, match=r"linear\.1\.weight and its copy model\.base\.2\.1\.weight differ"):
        read_visual("lipsim-toy", write(tmp_path / "c", state))


def test_model_state_dict_is_unwrapped_and_nothing_else_taken(tmp_path: Path) -> None:
    state = read_state_dict(write(tmp_path / "model.ckpt-1", published_state(alias=False)))
    assert sorted(state)[0] == "model.convs.0.bias"
    assert len(state) == 15


def test_misfits_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it has 3 convolutions \(2, 5, 3, 3\).*expected 20 convolutions"):
        read_visual("lipsim-small", write(tmp_path / "a", published_state())).build("x", "fp32", "cpu")
    with pytest.raises(CheckpointError, match=r"no LipSim architecture 'lipsim-tiny'; there are lipsim-small"):
        read_visual("lipsim-tiny", tmp_path / "a")
    with pytest.raises(CheckpointError, match="weights not found"):
        read_visual("lipsim-toy", tmp_path / "absent")
    state = {k: v for k, v in published_state().items() if not k.endswith("1.2.bias")}
    del state["module.model.convs.2.bias"]
    with pytest.raises(CheckpointError, match=r"missing 1: convs\.2\.bias"):
        read_visual("lipsim-toy", write(tmp_path / "b", state)).build("x", "fp32", "cpu")
    state = published_state(alias=False)
    state["module.model.linear.2.weight"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite: linear\.2\.weight"):
        read_visual("lipsim-toy", write(tmp_path / "c", state)).build("x", "fp32", "cpu")
    other = PreprocessSpec(8, 8, "squash")
    with pytest.raises(CheckpointError, match="size_px=8 is not the network's 16"):
        read_visual("lipsim-toy", write(tmp_path / "d", published_state()), other).build("x", "fp32", "cpu")


def test_bias_dimension_is_an_explicit_choice_on_the_same_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "model.ckpt-435", published_state())
    plain = read_visual("lipsim-toy", path).build("x", "fp32", "cpu")
    biased = read_visual("lipsim-toy+bias", path).build("x", "fp32", "cpu")
    features = biased.features(pixels())
    assert biased.dim == features.shape[1] == plain.dim + 1
    assert torch.equal(features[:, :-1], plain.features(pixels()))
    assert torch.equal(features[:, -1], torch.ones(3))
    assert bool((features.norm(dim=1) >= 1).all())
    assert biased.lipschitz == plain.lipschitz == 1.0
    assert biased.fingerprint != plain.fingerprint


@pytest.mark.parametrize(("card", "dim"), [("lipsim-margin0.5", 12), ("lipsim-margin0.5-bias", 13)])
def test_a_card_and_its_file_are_a_name(card: str, dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "lipsim-small", TOY)
    monkeypatch.setitem(ARCHITECTURES, "lipsim-small+bias", replace(TOY, bias_dim=True))
    name = f"visual:{card}:{write(tmp_path / 'model.ckpt-435', published_state())}"
    encoder = load_encoder(name)
    assert (encoder.name, encoder.dim, encoder.lipschitz) == (name, dim, 1.0)
    with pytest.raises(CheckpointError, match=r"published as model\.ckpt-435, which has to be fetched by hand"):
        load_encoder(card)


@pytest.mark.parametrize("name", ["lipsim-small", "lipsim-small+bias"])
def test_published_architecture_has_the_published_size(name: str) -> None:
    with torch.device("meta"):
        network = LipsimNetwork(ARCHITECTURES[name])
        output = network(torch.empty(2, 3, 224, 224))
    # 20 convolutions of 5 rows and 7 dense layers of 1024 rows, each with its bias and q: ~63.28M (methods 8.1).
    expected = 20 * (5 * 45 * 9 + 2 * 5) + 7 * (1024 * 8820 + 2 * 1024)
    assert sum(t.numel() for t in network.state_dict().values()) == expected == 63_276_796
    assert output.shape == (2, 1793 if name.endswith("bias") else 1792)
    assert ARCHITECTURES[name].dense_features == 8820


def test_larger_architectures() -> None:
    sizes = {n: (c.depth, c.channels, c.dense_layers, c.dense_width) for n, c in ARCHITECTURES.items()}
    assert sizes["lipsim-medium"] == (30, 60, 10, 2048)
    assert sizes["lipsim-large"] == (50, 90, 10, 2048)
    assert sizes["lipsim-xlarge"] == (70, 120, 15, 2048)


@pytest.mark.parametrize("bias_dim", [False, True])
def test_a_trained_copy_is_exported_as_it_is(bias_dim: bool, tmp_path: Path) -> None:
    origin = encoder_of(replace(TOY, bias_dim=bias_dim))
    before = origin.features(pixels())
    student = copy.deepcopy(origin)
    student.visual.requires_grad_(True)
    optimizer = torch.optim.SGD(student.visual.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        student(pixels()).square().sum().backward()
        assert all(p.grad is not None for p in student.visual.parameters())
        optimizer.step()
    assert torch.equal(origin.features(pixels()), before)
    student.export(tmp_path / "out")
    back = load_encoder(f"local-dir:{tmp_path / 'out'}")
    assert isinstance(back, LipsimEncoder)
    with torch.no_grad():
        assert torch.equal(back.features(pixels()), student.features(pixels()))
        assert not torch.equal(back.features(pixels()), before)
    assert (back.dim, back.preprocess, back.lipschitz) == (origin.dim, origin.preprocess, 1.0)
    assert not any(p.requires_grad for p in back.parameters())
    origin.export(tmp_path / "same")
    assert load_encoder(f"local-dir:{tmp_path / 'same'}").fingerprint == origin.fingerprint


def test_own_preprocessing_survives_and_can_be_overridden(tmp_path: Path) -> None:
    spec = PreprocessSpec(16, 20, "shortest", "bilinear", (0.5, 0.25, 0.5), (0.5, 0.5, 0.1))
    encoder = LipsimParts(TOY, spec, LipsimNetwork(TOY).state_dict(), "test").build("x", "fp32", "cpu")
    assert encoder.lipschitz == 10.0
    encoder.export(tmp_path)
    assert load_encoder(f"local-dir:{tmp_path}").preprocess == spec
    assert lipsim.read_folder(tmp_path, preprocess_of(TOY)).preprocess == preprocess_of(TOY)


def test_bfloat16_serves_and_proves_nothing() -> None:
    encoder, exact = encoder_of(precision="bf16"), encoder_of()
    assert encoder.lipschitz is None
    served = encoder.encode(pixels())
    assert served.dtype == torch.float32
    assert float((served * exact.encode(pixels())).sum(dim=1).min().detach()) > 0.99


def test_gradients_reach_the_pixels_in_any_memory_format() -> None:
    encoder, x = encoder_of(), pixels().requires_grad_()
    with torch.inference_mode():
        first = encoder.encode(pixels())
    encoder.encode(x)[:, 0].sum().backward()
    assert x.grad is not None
    assert bool(x.grad.flatten(1).any(dim=1).all())
    striped = pixels().to(memory_format=torch.channels_last)
    torch.testing.assert_close(encoder.encode(striped), first.clone())


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 3, 16, 8), (1, 3, 32, 32)])
def test_pixels_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pixels must be \(b, 3, 16, 16\)"):
        encoder_of().features(torch.rand(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth must be a positive integer, got 0"),
        ({"depth": -3}, "depth must be a positive integer, got -3"),
        ({"channels": 2.5}, r"channels must be a positive integer, got 2\.5"),
        ({"dense_width": True}, "dense_width must be a positive integer, got True"),
        ({"image_size": "16"}, "image_size must be a positive integer, got '16'"),
        ({"channels": 2}, "channels must be at least the 3 of an image, got 2"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"image_size": 18}, "image_size=18 is no multiple of 4, the pools' product"),
        ({"pools": [2, 0]}, r"pools\[1\] must be a positive integer, got 0"),
        ({"pools": 4}, "pools must be a tuple of integers, got 4"),
        ({"dim": 81}, "dim=81 is more than the 80 coordinates of the dense layers"),
        ({"bias_dim": 1}, "bias_dim must be true or false, got 1"),
        ({"width": 3}, "unexpected keyword argument 'width'"),
        ({"depth": 4}, "it has 3 convolutions .* expected 4 convolutions"),
        ({"dense_width": 10**12}, r"dense layers \(7, 80\), expected .* dense layers \(1000000000000, 80\)"),
        ({"pools": [2]}, r"dense layers \(7, 80\), expected .* dense layers \(7, 320\)"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    encoder_of().export(tmp_path)
    table = json.loads((tmp_path / lipsim.CONFIG_NAME).read_text())
    table["network"] |= change
    (tmp_path / lipsim.CONFIG_NAME).write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=message):
        load_encoder(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "expected 'network' and 'preprocess', got nothing"),
        ({"network": [1]}, "expected 'network' and 'preprocess', got network"),
        ({"network": asdict(TOY), "teacher": 1}, "got network, teacher"),
        ({"network": asdict(TOY), "preprocess": {"size_px": 16}}, "not understood"),
        ({"network": asdict(TOY), "preprocess": "squash"}, "not understood"),
    ],
)
def test_folders_that_are_not_understood_are_refused(table: dict[str, Any], message: str, tmp_path: Path) -> None:
    encoder_of().export(tmp_path)
    (tmp_path / lipsim.CONFIG_NAME).write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=message):
        load_encoder(f"local-dir:{tmp_path}")
