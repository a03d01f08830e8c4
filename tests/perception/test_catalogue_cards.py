"""The cards of published encoders say what their sources say, in one form; their figures have a module of their own."""

import importlib.util
import json
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from perception import load_encoder
from perception.catalogue import card_of
from perception.encoders import dreamsim, lipsim, lpips
from perception.encoders.dino import ARCHITECTURES
from perception.errors import CheckpointError
from perception.preprocess import PreprocessSpec

FOLDER = Path(__file__).parents[2] / "perception" / "catalogue"
CARDS: dict[str, dict[str, Any]] = {
    path.stem: tomllib.loads(path.read_text("utf8")) for path in sorted(FOLDER.glob("*.toml"))
}
REQUIRED = {
    "name": str, "family": str, "title": str, "source": str, "embed_dim": int, "text_tower": bool, "licence": str,
    "training": dict,
}  # fmt: skip
FROM_HUB = {"architecture": str, "visual_checkpoint": list, "preprocess": dict}
FROM_FILE = {"get": str}
RECIPE = {
    "eps": str, "norm": str, "data": str, "initial_weights": str, "loss": str, "clean_weight": float,
    "inner_attack": str, "inner_steps": int, "inner_step_size": str, "inner_momentum": float, "inner_start": str,
    "image_size_px": int, "augmentation": str, "steps": int, "batch_size": int, "optimizer": str, "betas": list,
    "lr": float, "weight_decay": float, "warmup_steps": int, "schedule": str, "precision": str, "seed": int,
}  # fmt: skip
EMBED_DIM = {
    "ViT-B-32": 512, "ViT-B-16": 512, "convnext_base_w": 640, "ViT-L-14-quickgelu": 768, "vit_base_patch16_224": 768,
    "vit_base_patch14_dinov2": 768,
}  # fmt: skip
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FILES = [name for name, card in CARDS.items() if card["source"].startswith("file:")]
HUB = [name for name in CARDS if name not in FILES]
ADAPTERS = [name for name in FILES if "base" in CARDS[name]]
every_card = pytest.mark.parametrize("name", CARDS)
hub_cards = pytest.mark.parametrize("name", HUB)
file_cards = pytest.mark.parametrize("name", FILES)
adapter_cards = pytest.mark.parametrize("name", ADAPTERS)
clip_cards = pytest.mark.parametrize("name", [name for name in HUB if CARDS[name]["family"] == "clip"])
dino_cards = pytest.mark.parametrize("name", [name for name in HUB if CARDS[name]["family"] == "dino"])
robust_cards = pytest.mark.parametrize("name", [name for name in HUB if CARDS[name]["training"]["method"] != "none"])


def test_all_published_encoders_have_a_card() -> None:
    towers = ("vit-b-32", "vit-b-16", "convnext_base_w")
    expected = {f"{kind}-{tower}" for kind in ("clip", "fare4", "tecoa4") for tower in towers}
    expected |= {f"{kind}-vit-l-14" for kind in ("clip", "fare2", "fare4", "tecoa2", "tecoa4")}
    expected |= {"dino-vitb16", "dinov2-vitb14", "fare4-dino-vitb16", "r-lpips"}
    expected |= {
        f"{kind}-{method}4-{t}" for kind in ("mlp", "lora") for method in ("fare", "tecoa") for t in towers[1:]
    }
    expected |= {f"dreamsim-{kind}" for kind in ("ensemble", "ensemble-centred", "dino_vitb16", "clip_vitb32")}
    expected |= {"dreamsim-open_clip_vitb32", "dreamsim-dinov2_vitb14"}
    expected |= {f"lipsim-{kind}{bias}" for kind in ("pretrained", "margin0.2", "margin0.5") for bias in ("", "-bias")}
    assert set(CARDS) == expected


@every_card
def test_card_has_the_required_fields(name: str) -> None:
    card = CARDS[name]
    required = REQUIRED | (FROM_FILE if name in FILES else FROM_HUB)
    if name in ADAPTERS:
        required |= {"base": str, "adapter": str}
    elif name in FILES:
        required |= {"architecture": str}
    elif card["family"] == "clip":  # no other family has towers of two activations
        required |= {"quick_gelu": bool}
    found = {key: type(value) for key, value in card.items() if key != "published"}
    assert found == required
    assert card["text_tower"] is (card["family"] == "clip" and name in HUB)
    assert card["name"] == name == name.lower()
    assert all(file.endswith(".pt") for file in card.get("visual_checkpoint", []))
    assert card["training"]["method"]


@hub_cards
def test_a_card_of_the_hub_names_owner_and_model(name: str) -> None:
    assert CARDS[name]["source"].startswith("hf-hub:")
    assert CARDS[name]["source"].count("/") == 1


@file_cards
def test_what_is_no_hub_model_says_how_to_get_it(name: str) -> None:
    card = CARDS[name]
    assert "//" not in card["get"]
    with pytest.raises(CheckpointError) as caught:
        load_encoder(name)
    for part in (card["source"].removeprefix("file:"), card["get"], f"visual:{name}:PATH"):
        assert part in str(caught.value)
    found = card_of(f"visual:{name}:some/path")
    assert found is not None
    assert found.name == name


@file_cards
def test_dimensions_are_those_of_the_reader(name: str) -> None:
    card = CARDS[name]
    if card["family"] == "lipsim":
        config = lipsim.ARCHITECTURES[card["architecture"]]
        expected = config.dim + config.bias_dim
        assert config.bias_dim is name.endswith("-bias")
    elif card["family"] == "lpips":
        assert card["architecture"] in lpips.ARCHITECTURES
        expected = lpips.LpipsNetwork(224).dim
    elif card["family"] == "dreamsim":
        assert card["architecture"] in dreamsim.ARCHITECTURES
        assert card["architecture"] == name.removeprefix("dreamsim-")
        branches = {"dino_vitb16": 768, "dinov2_vitb14": 768, "clip_vitb32": 512, "open_clip_vitb32": 512}
        expected = branches.get(card["architecture"], 768 + 512 + 512)
    else:
        expected = CARDS[card["base"]]["embed_dim"]
    assert card["embed_dim"] == expected


@adapter_cards
def test_an_adapter_names_its_base(name: str) -> None:
    card = CARDS[name]
    assert name == f"{card['adapter']}-{card['base']}"
    assert card["family"] == CARDS[card["base"]]["family"]
    assert card["training"]["initial_weights"] == card["base"]
    # Published beside the base's own file, whose name it has.
    (of_base,) = CARDS[card["base"]]["visual_checkpoint"]
    file = of_base if card["adapter"] == "mlp" else of_base.removesuffix("-eps4.pt")
    assert card["source"] == f"file:{card['adapter']}-{file}"
    found = card_of(f"{card['base']}+{card['adapter']}:some/path")
    assert found is not None
    assert found.name == name


@clip_cards
def test_architecture_is_the_one_that_open_clip_has(name: str) -> None:
    card = CARDS[name]
    spec = importlib.util.find_spec("open_clip")  # finds it without the ten seconds of importing it
    assert spec is not None
    assert spec.origin is not None
    config = json.loads((Path(spec.origin).parent / "model_configs" / f"{card['architecture']}.json").read_text())
    assert card["embed_dim"] == config["embed_dim"] == EMBED_DIM[card["architecture"]]
    assert card["quick_gelu"] is config.get("quick_gelu", False)


@dino_cards
def test_architecture_is_the_one_that_the_dino_reader_has(name: str) -> None:
    card = CARDS[name]
    assert card["embed_dim"] == ARCHITECTURES[card["architecture"]].hidden_size == EMBED_DIM[card["architecture"]]


@clip_cards
def test_quick_gelu_follows_the_origin_of_the_weights(name: str) -> None:
    card = CARDS[name]
    origin = card["training"].get("initial_weights", card["source"])
    assert card["quick_gelu"] is (".openai" in origin)
    assert card["quick_gelu"] is not ("laion2B" in origin)


@hub_cards
def test_preprocessing(name: str) -> None:
    card = CARDS[name]
    spec = PreprocessSpec(**card["preprocess"])
    crops = card["architecture"].startswith("convnext") or card["family"] == "dino"
    assert (spec.size_px, spec.resize_px) == (224, 256 if crops else 224)
    default = PreprocessSpec(size_px=224, resize_px=224)
    expected = IMAGENET if card["family"] == "dino" else (default.mean, default.std)
    assert (tuple(spec.mean), tuple(spec.std)) == expected
    assert (spec.resize_mode, spec.interpolation) == ("shortest", "bicubic")


@robust_cards
def test_recipe(name: str) -> None:
    card = CARDS[name]
    recipe = card["training"]
    assert {key: type(value) for key, value in recipe.items()} == {"method": str, **RECIPE}
    assert f"{recipe['method'].lower()}{Fraction(recipe['eps']) * 255}" == name.partition("-")[0]
    tower = name.partition("-")[2]
    clean = tower if card["family"] == "dino" else f"clip-{tower}"
    assert recipe["initial_weights"] == CARDS[clean]["source"]
    assert card["architecture"] == CARDS[clean]["architecture"]
