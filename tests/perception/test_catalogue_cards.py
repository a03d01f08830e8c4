"""The cards of published encoders say what their sources say, in one form."""

import importlib.util
import json
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from perception.encoders.dino import ARCHITECTURES
from perception.preprocess import PreprocessSpec

FOLDER = Path(__file__).parents[2] / "perception" / "catalogue"
CARDS: dict[str, dict[str, Any]] = {
    path.stem: tomllib.loads(path.read_text("utf8")) for path in sorted(FOLDER.glob("*.toml"))
}
REQUIRED = {
    "name": str, "family": str, "title": str, "source": str, "architecture": str, "quick_gelu": bool,
    "embed_dim": int, "text_tower": bool, "visual_checkpoint": list, "licence": str, "preprocess": dict,
    "training": dict, "published": dict,
}  # fmt: skip
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
FIGURES = {
    "nights": {"table", "clean", "linf_4_255", "l2_3"},
    "bapps": {"table", "clean", "linf_4_255", "l2_3"},
    "imagenet": {"table", "clean", "linf_2_255", "linf_4_255"},
    "zero_shot_13": {"table", "clean", "linf_2_255", "linf_4_255"},
    "nsfw": {"table", "safe_clean", "safe_linf_8_255", "unsafe_clean", "unsafe_linf_8_255"},
}
CLIP = [name for name, card in CARDS.items() if card["family"] == "clip"]
every_card = pytest.mark.parametrize("name", CARDS)
clip_cards = pytest.mark.parametrize("name", CLIP)
dino_cards = pytest.mark.parametrize("name", [name for name in CARDS if name not in CLIP])
robust_cards = pytest.mark.parametrize("name", [n for n, card in CARDS.items() if card["training"]["method"] != "none"])


def test_all_published_encoders_have_a_card() -> None:
    towers = ("vit-b-32", "vit-b-16", "convnext_base_w")
    expected = {f"{kind}-{tower}" for kind in ("clip", "fare4", "tecoa4") for tower in towers}
    expected |= {f"{kind}-vit-l-14" for kind in ("clip", "fare2", "fare4", "tecoa2", "tecoa4")}
    expected |= {"dino-vitb16", "dinov2-vitb14", "fare4-dino-vitb16"}
    assert set(CARDS) == expected


@every_card
def test_card_has_the_required_fields(name: str) -> None:
    card = CARDS[name]
    assert card["family"] in ("clip", "dino")
    # DINO's towers have one activation, and no text tower.
    required = {k: v for k, v in REQUIRED.items() if k != "quick_gelu" or card["family"] == "clip"}
    assert {key: type(value) for key, value in card.items()} == required
    assert card["text_tower"] is (card["family"] == "clip")
    assert card["name"] == name == name.lower()
    assert card["source"].startswith("hf-hub:")
    assert card["source"].count("/") == 1
    assert all(file.endswith(".pt") for file in card["visual_checkpoint"])


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


@every_card
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


@every_card
def test_published_figures_are_percentages_with_their_table(name: str) -> None:
    published = CARDS[name]["published"]
    assert published
    for group, figures in published.items():
        assert set(figures) == FIGURES[group]
        assert isinstance(figures["table"], str)
        assert all(isinstance(v, float) and 0 <= v <= 100 for k, v in figures.items() if k != "table")


@every_card
def test_an_attack_never_helps(name: str) -> None:
    """Within one table, the more an attacker may do the lower the accuracy: catches transposed columns."""
    for group, figures in CARDS[name]["published"].items():
        values = [v for k, v in figures.items() if k != "table"]
        if group == "nsfw":
            assert values[0] > values[1]
            # The one exception is in the paper: clean unsafe queries of this encoder go to the safe pool.
            assert values[2] > values[3] or name == "tecoa4-vit-b-16"
        elif group in ("nights", "bapps"):
            assert values[0] > max(values[1:])
        else:
            assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("name", "group", "figure", "value"),
    [
        ("fare4-convnext_base_w", "nights", "linf_4_255", 74.3),
        ("fare4-convnext_base_w", "nsfw", "unsafe_linf_8_255", 75.0),
        ("clip-convnext_base_w", "nsfw", "unsafe_linf_8_255", 4.2),
        ("tecoa4-vit-b-32", "nights", "l2_3", 79.7),
        ("tecoa4-vit-l-14", "bapps", "linf_4_255", 21.5),
        ("fare4-vit-b-16", "imagenet", "linf_2_255", 38.9),
        ("fare2-vit-l-14", "zero_shot_13", "linf_4_255", 20.5),
        ("fare4-dino-vitb16", "nights", "l2_3", 73.2),
        ("fare4-dino-vitb16", "nsfw", "unsafe_linf_8_255", 67.1),
        ("dinov2-vitb14", "bapps", "clean", 67.2),
    ],
)
def test_published_figure(name: str, group: str, figure: str, value: float) -> None:
    assert CARDS[name]["published"][group][figure] == value
