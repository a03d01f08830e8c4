"""The published figures on the cards: complete, in one form, and consistent with each other as the tables are."""

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "perception" / "catalogue"
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    path.stem: tomllib.loads(path.read_text("utf8")).get("published", {}) for path in sorted(FOLDER.glob("*.toml"))
}
SPLITS = ("cnn", "color", "deblur", "frameinterp", "superres", "traditional")
TWO_AFC = ("clean", "linf_4_255", "l2_3")
PER_SPLIT = {"nights_imagenet", "nights_no_imagenet", *(f"bapps_{split}" for split in SPLITS)}
ZERO_SHOT = ("clean", "linf_2_255", "linf_4_255")
RETRIEVAL = ("medium_clean", "hard_clean", "medium_linf_4_255", "hard_linf_4_255")
QUERIES = ("nsfw_safe_queries", "nsfw_unsafe_queries")
POOLS = ("safe", "buffer", "unsafe")
JUDGES = ("clip-convnext_base_w", "tecoa4-convnext_base_w", "fare4-convnext_base_w", "dino-vitb16", "fare4-dino-vitb16")
KEYS: dict[str, tuple[str, ...]] = {
    "nights": TWO_AFC,
    "bapps": TWO_AFC,
    **dict.fromkeys(PER_SPLIT, TWO_AFC),
    "things": ("clean",),
    "roxford": RETRIEVAL,
    "rparis": RETRIEVAL,
    **dict.fromkeys(QUERIES, tuple(f"{version}_{pool}" for version in ("clean", "linf_8_255") for pool in POOLS)),
    "nsfw": ("safe_clean", "safe_linf_8_255", "unsafe_clean", "unsafe_linf_8_255"),
    "dangerous_objects": ("safe_clean", "unsafe_clean", "unsafe_linf_8_255"),
    "imagenet": ZERO_SHOT,
    "zero_shot_13": ZERO_SHOT,
    "inversion": JUDGES,
}
# In no table of the paper: variants of the same weights, models of radius 2/255, and a later release of DreamSim.
NOT_IN_THE_PAPER = {
    "dreamsim-ensemble-centred", "lipsim-pretrained-bias", "lipsim-margin0.2-bias", "lipsim-margin0.5-bias",
    "fare2-vit-l-14", "tecoa2-vit-l-14", "dreamsim-dinov2_vitb14",
}  # fmt: skip
IN_THE_PAPER = [name for name in PUBLISHED if name not in NOT_IN_THE_PAPER]
CONVNEXTS = {"clip-convnext_base_w", "fare4-convnext_base_w", "tecoa4-convnext_base_w"}
LORA_CONVNEXTS = {"lora-fare4-convnext_base_w", "lora-tecoa4-convnext_base_w"}
B16 = {"clip-vit-b-16", "fare4-vit-b-16", "tecoa4-vit-b-16"}
LIPSIM = {"lipsim-pretrained", "lipsim-margin0.5"}
DREAMSIM = {"dreamsim-ensemble", "dreamsim-dino_vitb16"}
DINO = {"dino-vitb16", "fare4-dino-vitb16"}
MEASURED_ON = {
    "things": CONVNEXTS | LIPSIM | DREAMSIM | {"lipsim-margin0.2", "r-lpips", "dreamsim-open_clip_vitb32"}
    | {"dreamsim-clip_vitb32", "mlp-tecoa4-convnext_base_w", "lora-tecoa4-convnext_base_w"},
    "roxford": CONVNEXTS | LORA_CONVNEXTS | B16 | LIPSIM | DREAMSIM | DINO | {"r-lpips", "dreamsim-open_clip_vitb32"},
    "nsfw": CONVNEXTS | LORA_CONVNEXTS | B16 | LIPSIM | DREAMSIM | DINO | {"r-lpips"},
    "dangerous_objects": CONVNEXTS | LORA_CONVNEXTS | LIPSIM | DREAMSIM | DINO | {"r-lpips"},
    "inversion": set(JUDGES),
}  # fmt: skip
# Sizes of the two splits of NIGHTS' test set.
NIGHTS_IMAGENET, NIGHTS_OTHER = 1041, 783
# Rounding of two printed figures, each to .1.
ROUNDING = 0.1 + 1e-9
every_card = pytest.mark.parametrize("name", PUBLISHED)
paper_cards = pytest.mark.parametrize("name", IN_THE_PAPER)


@every_card
def test_figures_are_percentages_with_their_table(name: str) -> None:
    for group, figures in PUBLISHED[name].items():
        if name in IN_THE_PAPER:
            assert tuple(figures) == ("table", *KEYS[group])
        assert set(figures) <= {"table", *KEYS[group]}
        assert isinstance(figures["table"], str)
        assert all(isinstance(v, float) and 0 <= v <= 100 for k, v in figures.items() if k != "table")


@pytest.mark.parametrize("name", [name for name, groups in PUBLISHED.items() if "nsfw" in groups])
def test_every_nsfw_query_is_put_into_one_pool(name: str) -> None:
    groups = PUBLISHED[name]
    for label in ("safe", "unsafe"):
        answers = groups[f"nsfw_{label}_queries"]
        for version in ("clean", "linf_8_255"):
            assert sum(answers[f"{version}_{pool}"] for pool in POOLS) == pytest.approx(100, abs=0.25)
            assert answers[f"{version}_{label}"] == groups["nsfw"][f"{label}_{version}"]


@every_card
def test_variants_of_the_same_weights_have_no_figures_of_their_own(name: str) -> None:
    assert bool(PUBLISHED[name]) is not name.endswith(("-bias", "-centred"))


@paper_cards
def test_2afc_figures_are_complete(name: str) -> None:
    assert {"nights", "bapps", *PER_SPLIT} <= PUBLISHED[name].keys()


@pytest.mark.parametrize("group", MEASURED_ON)
def test_other_tables_are_complete(group: str) -> None:
    assert {name for name, groups in PUBLISHED.items() if group in groups} == MEASURED_ON[group]
    if group == "roxford":
        assert {name for name, groups in PUBLISHED.items() if "rparis" in groups} == MEASURED_ON[group]


@paper_cards
@pytest.mark.parametrize("figure", TWO_AFC)
def test_nights_is_the_size_weighted_mean_of_its_splits(name: str, figure: str) -> None:
    groups = PUBLISHED[name]
    both = NIGHTS_IMAGENET * groups["nights_imagenet"][figure] + NIGHTS_OTHER * groups["nights_no_imagenet"][figure]
    assert groups["nights"][figure] == pytest.approx(both / (NIGHTS_IMAGENET + NIGHTS_OTHER), abs=ROUNDING)


@paper_cards
@pytest.mark.parametrize("figure", TWO_AFC)
def test_bapps_is_the_plain_mean_of_its_splits(name: str, figure: str) -> None:
    """Also of the three that other tables print otherwise, of which the cards have what table XV gives."""
    groups = PUBLISHED[name]
    mean = math.fsum(groups[f"bapps_{split}"][figure] for split in SPLITS) / len(SPLITS)
    assert groups["bapps"][figure] == pytest.approx(mean, abs=ROUNDING)


@pytest.mark.parametrize(
    ("name", "figure", "elsewhere"),
    [
        ("lipsim-margin0.2", "linf_4_255", 5.8),
        ("lipsim-margin0.2", "l2_3", 15.1),
        ("lipsim-margin0.5", "linf_4_255", 7.0),
        ("lipsim-margin0.5", "l2_3", 12.3),
        ("dreamsim-clip_vitb32", "clean", 69.9),
    ],
)
def test_what_table_ii_prints_does_not_fit_the_splits(name: str, figure: str, elsewhere: float) -> None:
    """The paper's own conflicts: why the cards do not have those figures (methods, below table II)."""
    groups = PUBLISHED[name]
    mean = math.fsum(groups[f"bapps_{split}"][figure] for split in SPLITS) / len(SPLITS)
    assert abs(elsewhere - mean) > 2 * ROUNDING
    assert groups["bapps"][figure] != elsewhere


@every_card
def test_an_attack_never_helps(name: str) -> None:
    """Within one table, the more an attacker may do the lower the figure: catches transposed columns."""
    for group, figures in PUBLISHED[name].items():
        values = [v for k, v in figures.items() if k != "table"]
        if group in (*QUERIES, "inversion"):
            continue  # the shares of the right pool are those of "nsfw"; inversion is no attack
        if group == "nsfw":
            assert values[0] > values[1]
            # The one exception is in the paper: clean unsafe queries of this encoder go to the safe pool.
            assert values[2] > values[3] or name == "tecoa4-vit-b-16"
        elif group == "dangerous_objects":
            assert values[1] > values[2]
        elif group in ("roxford", "rparis"):
            medium, hard, *attacked = values
            assert medium > hard
            assert attacked[0] > attacked[1]
            assert medium > attacked[0]
            assert hard > attacked[1]
        elif len(values) == 3 and group.startswith(("nights", "bapps")):
            assert values[0] > max(values[1:])
        else:
            assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("name", "group", "figure", "value"),
    [
        ("fare4-convnext_base_w", "nights", "linf_4_255", 74.3),
        ("fare4-convnext_base_w", "nights_imagenet", "linf_4_255", 78.3),
        ("fare4-convnext_base_w", "nights_no_imagenet", "linf_4_255", 69.1),
        ("fare4-convnext_base_w", "nsfw", "unsafe_linf_8_255", 75.0),
        ("clip-convnext_base_w", "nsfw", "unsafe_linf_8_255", 4.2),
        ("dreamsim-ensemble", "nsfw", "unsafe_linf_8_255", 5.4),
        ("lipsim-margin0.5", "nsfw", "unsafe_linf_8_255", 26.2),
        ("r-lpips", "nsfw", "unsafe_linf_8_255", 35.2),
        ("tecoa4-vit-b-32", "nights", "l2_3", 79.7),
        ("tecoa4-vit-l-14", "bapps", "linf_4_255", 21.5),
        ("tecoa4-vit-l-14", "bapps_superres", "l2_3", 10.2),
        ("fare4-vit-b-16", "imagenet", "linf_2_255", 38.9),
        ("fare4-convnext_base_w", "zero_shot_13", "linf_4_255", 28.41),
        ("fare2-vit-l-14", "zero_shot_13", "linf_4_255", 20.5),
        ("fare4-dino-vitb16", "nights", "l2_3", 73.2),
        ("fare4-dino-vitb16", "nsfw", "unsafe_linf_8_255", 67.1),
        ("dinov2-vitb14", "bapps", "clean", 67.2),
        ("dreamsim-dinov2_vitb14", "nights", "clean", 95.0),
        ("lipsim-margin0.5", "bapps", "linf_4_255", 5.8),
        ("lipsim-margin0.2", "nights", "l2_3", 46.6),
        ("mlp-tecoa4-convnext_base_w", "nights", "clean", 94.5),
        ("mlp-fare4-vit-b-16", "bapps_color", "clean", 71.4),
        ("lora-tecoa4-convnext_base_w", "nights", "linf_4_255", 87.2),
        ("lora-fare4-vit-b-16", "bapps_traditional", "l2_3", 27.9),
        ("tecoa4-convnext_base_w", "dangerous_objects", "unsafe_linf_8_255", 87.4),
        ("lora-fare4-convnext_base_w", "dangerous_objects", "safe_clean", 68.0),
        ("fare4-convnext_base_w", "roxford", "hard_linf_4_255", 10.1),
        ("tecoa4-vit-b-16", "rparis", "medium_linf_4_255", 49.8),
        ("lora-tecoa4-convnext_base_w", "things", "clean", 49.9),
    ],
)
def test_published_figure(name: str, group: str, figure: str, value: float) -> None:
    assert PUBLISHED[name][group][figure] == value
