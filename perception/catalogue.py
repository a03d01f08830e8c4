"""The catalogue of encoders, and `load_encoder`, the one way to get one.

A card (`catalogue/*.toml`) says where a published model's weights are and how it is used; bundled models have their
card beside their weights in `bundled/`. Nothing is ever loaded in place of what was asked for.
"""

import logging
import tomllib
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perception.errors import CheckpointError, HubUnreachable, UnknownEncoder
from perception.preprocess import PreprocessSpec

if TYPE_CHECKING:
    from perception.encoder import Precision
    from perception.encoders.clip import ClipParts
    from perception.encoders.dino import DinoParts
    from perception.encoders.tower import TowerEncoder

BUNDLED = "bundled/"


@dataclass(frozen=True)
class Card:
    """One model of the catalogue.

    Attributes:
        name: what `load_encoder` takes.
        source: 'hf-hub:OWNER/MODEL', or 'local-dir:FOLDER' for bundled models.
        family: 'clip' or 'dino'; empty where the files say it.
        architecture: the name of the architecture in open_clip ('clip') or timm ('dino'); empty where the folder's
            configuration says it.
        quick_gelu: activation of OpenAI-derived towers; None leaves it to the configuration.
        preprocess: None leaves it to the configuration.
        text_tower: name of the card whose text tower (and tokenizer) this one shares; empty where it has its own or
            none. A shared one is not stored twice.
        table: the whole card: licence, training recipe, published figures.
    """

    name: str
    source: str
    family: str
    architecture: str
    quick_gelu: bool | None
    preprocess: PreprocessSpec | None
    text_tower: str
    table: dict[str, Any] = field(hash=False)


def _card(table: dict[str, Any], folder: Path | None = None) -> Card:
    shared = table.get("text_tower")  # true and false say whether the model has one
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.get("preprocess", {}).items()}
    return Card(
        name=table["name"],
        source=f"local-dir:{folder}" if folder else table["source"],
        family=table.get("family", ""),
        architecture=table.get("architecture", ""),
        quick_gelu=table.get("quick_gelu"),
        preprocess=PreprocessSpec(**fields) if fields else None,
        text_tower=shared if isinstance(shared, str) else "",
        table=table,
    )


def list_encoders() -> dict[str, Card]:
    """All cards by name: the published models, and the small bundled ones under `bundled/`."""
    root = Path(str(resources.files("perception")))
    cards = [_card(tomllib.loads(p.read_text("utf8"))) for p in sorted((root / "catalogue").glob("*.toml"))]
    cards += [
        _card(tomllib.loads(p.read_text("utf8")), p.parent) for p in sorted((root / "bundled").glob("*/card.toml"))
    ]
    return {card.name: card for card in cards}


def load_encoder(name: str, *, precision: "Precision" = "fp32", device: str = "cpu") -> "TowerEncoder":
    """Load an encoder by name.

    Args:
        name: a catalogue name ('fare4-convnext_base_w', 'bundled/clean'); 'hf-hub:OWNER/MODEL', optionally with
            '@REVISION'; 'local-dir:FOLDER' in open_clip's format, or for DINO in that of `transformers`; or
            'visual:ARCHITECTURE:FILE' for a visual-only state dict, where ARCHITECTURE is a catalogue name or an
            open_clip architecture.
        precision: of weights and activations, 'fp32' or 'bf16'; part of the fingerprint.
        device: torch device.

    Raises:
        UnknownEncoder: no such name or scheme.
        HubUnreachable: the weights are not in the local cache and the hub did not answer.
        CheckpointError: files absent, corrupt or of another architecture.
    """
    return _read_parts(name).build(name, precision, device)


def _read_parts(name: str) -> "ClipParts | DinoParts":
    """Resolve a name to a checkpoint taken apart."""
    cards = list_encoders()
    scheme, _, rest = name.partition(":")
    if name in cards:
        card = cards[name]
    elif scheme == "hf-hub" and rest:
        # A published model keeps its card's preprocessing when it is named by its hub id.
        model_id = rest.partition("@")[0]
        known = next((c for c in cards.values() if c.source == f"hf-hub:{model_id}"), None)
        card = replace(known, name=name, source=name) if known else _card({"name": name, "source": name})
    elif scheme == "local-dir" and rest:
        card = _card({"name": name, "source": name})
    elif scheme == "visual" and rest.count(":") >= 1:
        architecture, _, path = rest.partition(":")
        return _read_visual(architecture, Path(path), cards)
    else:
        raise UnknownEncoder(name, tuple(cards))
    parts = _read_folder(card)
    return _with_text_of(parts, cards, card) if card.text_tower else parts


def _read_visual(architecture: str, path: Path, cards: dict[str, Card]) -> "ClipParts | DinoParts":
    """Read a visual-only state dict for a catalogue name or an open_clip architecture."""
    from perception.encoders import clip, dino

    card = cards.get(architecture)
    if card is None or not card.architecture:
        spec = clip.preprocess_of(clip.architecture_config(architecture), {}, architecture)
        return clip.read_visual(architecture, path, spec)
    read = dino.read_visual if card.family == "dino" else clip.read_visual
    return read(card.architecture, path, card.preprocess)


def _read_folder(card: Card) -> "ClipParts | DinoParts":
    """Read a card's folder as what its configuration file says that it is, fetched if need be."""
    from perception.encoders import clip, dino

    scheme, _, location = card.source.partition(":")
    folder = Path(location) if scheme == "local-dir" else fetch_from_hub(location, card.family)
    if not folder.is_dir():
        raise CheckpointError(f"folder not found: {folder}")
    # Repositories of open_clip often hold the configuration for `transformers` too.
    if (folder / clip.CONFIG_NAME).is_file():
        return clip.read_folder(folder, card.preprocess, card.quick_gelu)
    if (folder / dino.CONFIG_NAME).is_file():
        return dino.read_folder(folder, card.preprocess)
    raise CheckpointError(f"{folder} holds neither {clip.CONFIG_NAME} nor {dino.CONFIG_NAME}")


def _with_text_of(parts: "ClipParts | DinoParts", cards: dict[str, Card], card: Card) -> "ClipParts":
    """Give a visual-only CLIP checkpoint the text tower that its card names."""
    from perception.encoders.clip import ClipParts

    if card.text_tower not in cards:
        raise CheckpointError(f"the card of {card.name} shares the text tower of {card.text_tower}, which has no card")
    donor = _read_folder(cards[card.text_tower])
    if not isinstance(parts, ClipParts) or not isinstance(donor, ClipParts):
        raise CheckpointError(f"{card.name} cannot share the text tower of {card.text_tower}: both must be CLIP models")
    return parts.with_text_of(donor)


def fetch_from_hub(model_id: str, family: str = "") -> Path:
    """Fetch a model's configuration and weights into the hub's local cache.

    Args:
        model_id: 'OWNER/MODEL' or 'OWNER/MODEL@REVISION'.
        family: whose file names to ask for; empty asks for each family's in turn.

    Returns:
        The folder that holds them.

    Raises:
        HubUnreachable: not cached, and the hub did not answer or does not have it.
    """
    from huggingface_hub import hf_hub_download

    from perception.encoders import clip, dino

    layouts = {"clip": (clip.CONFIG_NAME, clip.WEIGHT_NAMES), "dino": (dino.CONFIG_NAME, dino.WEIGHT_NAMES)}
    repository, _, revision = model_id.partition("@")
    failures: list[Exception] = []

    def fetch(*names: str) -> Path | None:
        """The first of some files that can be had."""
        for name in names:
            try:
                return Path(hf_hub_download(repository, name, revision=revision or None))
            except Exception as error:  # the hub's client raises its own, its HTTP library's and OSError
                failures.append(error)
        return None

    client_log = logging.getLogger("huggingface_hub")
    level = client_log.level
    client_log.setLevel(logging.ERROR)  # it warns of every retry; what it ends in is said once, below
    try:
        for config_name, weight_names in [layouts[family]] if family else layouts.values():
            if fetch(config_name):
                weights = fetch(*weight_names)
                if weights:
                    return weights.parent
                break
    finally:
        client_log.setLevel(level)
    reason = (str(failures[-1]).strip().splitlines() or [type(failures[-1]).__name__])[0][:200]
    raise HubUnreachable(model_id, f"{type(failures[-1]).__name__}: {reason}")
