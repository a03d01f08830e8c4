"""The MLP head on every family: its formula, its published file, and the folder that an export writes."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from perception import load_encoder
from perception.encoders.adapters import MlpEncoder, MlpHead, adapted_preprocess, read_adapted, save_head
from perception.encoders.clip import read_folder
from perception.errors import CheckpointError
from perception.preprocess import PreprocessSpec
from tests.perception.adapter_checkpoints import lora_config, lora_pair, write_clip, write_lora, write_tower

DIMS = {"vit": 24, "convnext": 24, "dino": 24, "bundled": 256}


def head_state(dim: int = 24, hidden: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    shapes = {"fc1.weight": (hidden, dim), "fc1.bias": (hidden,), "fc2.weight": (dim, hidden), "fc2.bias": (dim,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_head(path: Path, state: dict[str, Tensor], prefix: str = "perceptual_model.mlp.") -> Path:
    """Write a head as it was published."""
    torch.save({"state_dict": {prefix + key: values for key, values in state.items()}}, path)
    return path


def base_name(kind: str, folder: Path) -> str:
    return "bundled/clean" if kind == "bundled" else write_tower(folder, kind)


@pytest.mark.parametrize("kind", ["vit", "convnext", "dino", "bundled"])
def test_a_head_is_applied_to_unnormalised_embeddings(kind: str, tmp_path: Path) -> None:
    name = base_name(kind, tmp_path / "base")
    state = head_state(DIMS[kind])
    encoder = load_encoder(f"{name}+mlp:{write_head(tmp_path / 'head.pt', state)}")
    base = load_encoder(name)
    side = base.preprocess.size_px
    pixels = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(2), requires_grad=True)
    embedding = base.features(pixels)
    hidden = (embedding @ state["fc1.weight"].T + state["fc1.bias"]).clamp(min=0)
    expected = hidden @ state["fc2.weight"].T + state["fc2.bias"] + embedding
    found = encoder.features(pixels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.encode(pixels).norm(dim=1), torch.ones(3))
    assert encoder.features(pixels[:1]).shape == (1, DIMS[kind])
    (gradient,) = torch.autograd.grad(found.sum(), pixels)
    assert gradient.abs().sum() > 0
    assert encoder.dim == base.dim
    assert encoder.fingerprint != base.fingerprint
    assert encoder.preprocess == PreprocessSpec(
        side, side, "squash", "bicubic", base.preprocess.mean, base.preprocess.std
    )
    with pytest.raises(CheckpointError, match="no longer lives in a text tower's space"):
        _ = encoder.text


def test_a_head_by_any_of_its_names_is_one_encoder(tmp_path: Path) -> None:
    name, state = write_clip(tmp_path / "base", "vit"), head_state()
    prints = {
        load_encoder(f"{name}+mlp:{write_head(tmp_path / f'{i}.pt', state, prefix)}").fingerprint
        for i, prefix in enumerate(["perceptual_model.mlp.", "mlp.", "", "module.perceptual_model.mlp."])
    }
    save_file(state, tmp_path / "head.safetensors")
    prints.add(load_encoder(f"{name}+mlp:{tmp_path / 'head.safetensors'}").fingerprint)
    head = MlpHead(24, 5)
    head.load_state_dict(state)
    save_head(head, tmp_path / "new" / "ours.safetensors")
    prints.add(load_encoder(f"{name}+mlp:{tmp_path / 'new' / 'ours.safetensors'}").fingerprint)
    assert len(prints) == 1


@pytest.mark.parametrize("kind", ["vit", "convnext", "dino", "bundled"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_export_keeps_its_head(kind: str, precision: str, tmp_path: Path) -> None:
    name = base_name(kind, tmp_path / "base")
    path = write_head(tmp_path / "head.pt", head_state(DIMS[kind]))
    encoder = load_encoder(f"{name}+mlp:{path}", precision=precision)  # type: ignore[arg-type]
    encoder.export(tmp_path / "out")
    back = load_encoder(f"local-dir:{tmp_path / 'out'}", precision=precision)  # type: ignore[arg-type]
    pixels = torch.rand(2, 3, back.preprocess.size_px, back.preprocess.size_px)
    with torch.no_grad():
        assert torch.equal(back.features(pixels), encoder.features(pixels))
    assert back.preprocess == encoder.preprocess
    assert not (tmp_path / "out" / "base.partial").exists()
    if precision == "fp32":
        assert back.fingerprint == encoder.fingerprint


def test_a_trained_copy_is_exported_as_it_is(tmp_path: Path) -> None:
    name = write_clip(tmp_path / "base", "vit")
    origin = load_encoder(f"{name}+mlp:{write_head(tmp_path / 'head.pt', head_state())}")
    student = copy.deepcopy(origin)
    student.visual.requires_grad_(True)
    with torch.no_grad():
        for parameter in student.visual.parameters():
            parameter.mul_(1.1)
    student.export(tmp_path / "out")
    back = load_encoder(f"local-dir:{tmp_path / 'out'}")
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(back.features(pixels), student.features(pixels))
        assert not torch.equal(back.features(pixels), origin.features(pixels))


def test_a_head_on_an_adapted_tower(tmp_path: Path) -> None:
    name = write_clip(tmp_path / "base", "vit")
    lora: dict[str, Tensor] = {}
    for i in range(2):
        lora |= lora_pair(torch.zeros(192, 64), 2, i, f"base_model.model.model.blocks.{i}.attn.qkv")
    folder = write_lora(tmp_path / "lora", lora_config(["qkv"]), lora)
    path = write_head(tmp_path / "head.pt", head_state())
    encoder = load_encoder(f"{name}+lora:{folder}+mlp:{path}")
    encoder.export(tmp_path / "out")
    assert load_encoder(f"local-dir:{tmp_path / 'out'}").fingerprint == encoder.fingerprint
    with pytest.raises(CheckpointError, match="LoRA is for CLIP and DINO without a head"):
        load_encoder(f"{name}+mlp:{path}+lora:{folder}")


def test_a_head_does_not_apply_to_other_weights(tmp_path: Path) -> None:
    name = write_clip(tmp_path / "base", "vit")
    encoder = load_encoder(f"{name}+mlp:{write_head(tmp_path / 'head.pt', head_state())}")
    encoder.export(tmp_path / "out")
    load_encoder(name).export(tmp_path / "out")  # over it, and the head's files stay
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json is not the file that mlp_head\.json is"):
        load_encoder(f"local-dir:{tmp_path / 'out'}")
    (tmp_path / "out" / "mlp_head.json").unlink()
    assert load_encoder(f"local-dir:{tmp_path / 'out'}").fingerprint == load_encoder(name).fingerprint


def test_a_head_without_its_weights_or_with_another_table_is_refused(tmp_path: Path) -> None:
    name = write_clip(tmp_path / "base", "vit")
    load_encoder(f"{name}+mlp:{write_head(tmp_path / 'head.pt', head_state())}").export(tmp_path / "out")
    table = tmp_path / "out" / "mlp_head.json"
    content = json.loads(table.read_text())
    (tmp_path / "out" / "mlp_head.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"weights not found: .*mlp_head\.safetensors"):
        load_encoder(f"local-dir:{tmp_path / 'out'}")
    changes: list[dict[str, Any]] = [{"adapter": "lora"}, {"base_sha256": {}}, {"base_sha256": [1]}]
    for change in changes:
        table.write_text(json.dumps({**content, **change}))
        with pytest.raises(CheckpointError, match="expected adapter 'mlp' and base_sha256"):
            load_encoder(f"local-dir:{tmp_path / 'out'}")
    table.write_text(json.dumps({**content, "base_sha256": {"../base/open_clip_config.json": "0"}}))
    with pytest.raises(CheckpointError, match="is not the file"):
        load_encoder(f"local-dir:{tmp_path / 'out'}")


def test_a_head_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    head = MlpHead(4, 3)
    with torch.no_grad():
        head.fc1.weight.fill_(float("inf"))
    with pytest.raises(CheckpointError, match=r"not finite: perceptual_model\.mlp\.fc1\.weight"):
        save_head(head, tmp_path / "head.safetensors")
    name = write_clip(tmp_path / "base", "vit")
    encoder = load_encoder(f"{name}+mlp:{write_head(tmp_path / 'head.pt', head_state())}")
    assert isinstance(encoder, MlpEncoder)
    with torch.no_grad():
        next(encoder.visual.get_submodule("head").parameters()).fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        encoder.export(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc1.weight": None}, r"fc1\.weight must be \(hidden, 24\), found missing"),
        ({"fc1.weight": torch.zeros(5)}, r"fc1\.weight must be \(hidden, 24\), found \(5,\)"),
        ({"fc1.weight": torch.zeros(0, 24)}, r"fc1\.weight must be \(hidden, 24\), found \(0, 24\)"),
        ({"fc1.weight": torch.zeros(5, 23)}, r"wrong shape 1: fc1\.weight is \(5, 23\), expected \(5, 24\)"),
        ({"fc2.weight": torch.zeros(24, 6)}, r"wrong shape 1: fc2\.weight is \(24, 6\), expected \(24, 5\)"),
        ({"fc2.bias": None}, r"missing 1: fc2\.bias"),
        ({"fc2.bias": torch.full((24,), float("nan"))}, r"not finite: fc2\.bias"),
        ({"fc3.bias": torch.zeros(1)}, r"fc3\.bias is not of an MLP head"),
    ],
)
def test_heads_that_do_not_fit_are_named(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    state = {key: values for key, values in {**head_state(), **change}.items() if values is not None}
    name = write_clip(tmp_path / "base", "vit")
    with pytest.raises(CheckpointError, match=message):
        load_encoder(f"{name}+mlp:{write_head(tmp_path / 'head.pt', state)}")


def test_one_tensor_twice_and_files_of_no_head_are_refused(tmp_path: Path) -> None:
    name = write_clip(tmp_path / "base", "vit")
    torch.save({"mlp.fc1.bias": torch.zeros(5), "fc1.bias": torch.zeros(5)}, tmp_path / "twice.pt")
    for path, message in (
        (tmp_path / "twice.pt", "is not of an MLP head"),
        (tmp_path / "nowhere.pt", "weights not found"),
        (tmp_path / "base" / "open_clip_config.json", "cannot read weights"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_encoder(f"{name}+mlp:{path}")


def test_preprocessing_can_be_given_but_for_the_size(tmp_path: Path) -> None:
    write_clip(tmp_path / "base", "vit")
    parts, path = read_folder(tmp_path / "base"), write_head(tmp_path / "head.pt", head_state())
    spec = PreprocessSpec(32, 40, "shortest", "bilinear")
    assert read_adapted("mlp", parts, path, spec).build("toy", "fp32", "cpu").preprocess == spec
    assert adapted_preprocess(spec) == PreprocessSpec(32, 32, "squash", "bicubic")
    with pytest.raises(CheckpointError, match="size_px=16, and the base takes 32"):
        read_adapted("mlp", parts, path, PreprocessSpec(16, 16))
    with pytest.raises(CheckpointError, match="no kind of adapter 'dora'"):
        read_adapted("dora", parts, path)


def test_an_export_is_never_read_without_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def cached(repository: str, name: str, revision: str | None = None) -> str:
        if not (tmp_path / "out" / name).exists():
            raise OSError(name)
        asked.append(name)
        return str(tmp_path / "out" / name)

    for kind in ("vit", "dino"):
        name = base_name(kind, tmp_path / kind)
        path = write_head(tmp_path / "head.pt", head_state())
        encoder = load_encoder(f"{name}+mlp:{path}")
        encoder.export(tmp_path / "out")
        with monkeypatch.context() as patch:
            patch.setattr(huggingface_hub, "hf_hub_download", cached)
            assert load_encoder("hf-hub:owner/model").fingerprint == encoder.fingerprint
        assert asked[-2:] == ["mlp_head.json", "mlp_head.safetensors"]
        (tmp_path / "out" / "mlp_head.json").unlink()
        with pytest.raises(CheckpointError, match=r"mlp_head\.json"):
            load_encoder(f"local-dir:{tmp_path / 'out'}")
        for file in (tmp_path / "out").iterdir():
            file.unlink()
        with pytest.raises(CheckpointError, match="has an MLP head already"):
            load_encoder(f"{name}+mlp:{path}+mlp:{path}")
