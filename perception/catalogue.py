"""The catalogue of encoders, and `load_encoder`, the one way to get one.

A card (`catalogue/*.toml`) says where a published model's weights are and how it is used; bundled models have their
card beside their weights in `bundled/`. Nothing is ever loaded in place of what was asked for.
"""

import logging
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perception.errors import CheckpointError, HubUnreachable, UnknownEncoder
from perception.preprocess import PreprocessSpec

if TYPE_CHECKING:
    from perception.encoder import Precision
    from perception.encoders.clip import ClipEncoder, ClipParts

BUNDLED = "bundled/"


@dataclass(frozen=True)
class Card:
    """One model of the catalogue.

    Attributes:
        name: what `load_encoder` takes.
        source: 'hf-hub:OWNER/MODEL', or 'local-dir:FOLDER' for bundled models.
        architecture: open_clip's name of the architecture; empty where the folder's configuration says it.
        quick_gelu: activation of OpenAI-derived towers; None leaves it to the configuration.
        preprocess: None leaves it to the configuration.
        table: the whole card: licence, training recipe, published figures.
    """

    name: str
    source: str
    architecture: str
    quick_gelu: bool | None
    preprocess: PreprocessSpec | None
    table: dict[str, Any] = field(hash=False)


def _card(table: dict[str, Any], folder: Path | None = None) -> Card:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.get("preprocess", {}).items()}
    return Card(
        name=table["name"],
        source=f"local-dir:{folder}" if folder else table["source"],
        architecture=table.get("architecture", ""),
        quick_gelu=table.get("quick_gelu"),
        preprocess=PreprocessSpec(**fields) if fields else None,
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


def load_encoder(name: str, *, precision: "Precision" = "fp32", device: str = "cpu") -> "ClipEncoder":
    """Load an encoder by name.

    Args:
        name: a catalogue name ('fare4-convnext_base_w', 'bundled/clean'); 'hf-hub:OWNER/MODEL', optionally with
            '@REVISION'; 'local-dir:FOLDER' in open_clip's format; or 'visual:ARCHITECTURE:FILE' for a visual-only
            state dict, where ARCHITECTURE is a catalogue name or an open_clip architecture.
        precision: of weights and activations, 'fp32' or 'bf16'; part of the fingerprint.
        device: torch device.

    Raises:
        UnknownEncoder: no such name or scheme.
        HubUnreachable: the weights are not in the local cache and the hub did not answer.
        CheckpointError: files absent, corrupt or of another architecture.
    """
    from perception.encoders.clip import build_encoder

    return build_encoder(name, _read_parts(name), precision, device)


def _read_parts(name: str) -> "ClipParts":
    """Resolve a name to a checkpoint taken apart."""
    from perception.encoders.clip import architecture_config, preprocess_of, read_folder, read_visual

    cards = list_encoders()
    scheme, _, rest = name.partition(":")
    if name in cards:
        card = cards[name]
    elif scheme == "hf-hub" and rest:
        # A published model keeps its card's preprocessing when it is named by its hub id.
        model_id = rest.partition("@")[0]
        known = next((c for c in cards.values() if c.source == f"hf-hub:{model_id}"), None)
        card = Card(name, name, "", known.quick_gelu if known else None, known.preprocess if known else None, {})
    elif scheme == "local-dir" and rest:
        card = Card(name, name, "", None, None, {})
    elif scheme == "visual" and rest.count(":") >= 1:
        architecture, _, path = rest.partition(":")
        if architecture in cards and cards[architecture].architecture:
            architecture, spec = cards[architecture].architecture, cards[architecture].preprocess
        else:
            spec = preprocess_of(architecture_config(architecture), {}, architecture)
        return read_visual(architecture, Path(path), spec)
    else:
        raise UnknownEncoder(name, tuple(cards))
    scheme, _, location = card.source.partition(":")
    folder = Path(location) if scheme == "local-dir" else fetch_from_hub(location)
    if not folder.is_dir():
        raise CheckpointError(f"folder not found: {folder}")
    return read_folder(folder, card.preprocess, card.quick_gelu)


def fetch_from_hub(model_id: str) -> Path:
    """Fetch a model's configuration and weights into the hub's local cache.

    Args:
        model_id: 'OWNER/MODEL' or 'OWNER/MODEL@REVISION'.

    Returns:
        The folder that holds them.

    Raises:
        HubUnreachable: not cached, and the hub did not answer or does not have it.
    """
    from huggingface_hub import hf_hub_download

    from perception.encoders.clip import CONFIG_NAME, WEIGHT_NAMES

    repository, _, revision = model_id.partition("@")
    failure: Exception | None = None
    client_log = logging.getLogger("huggingface_hub")
    level = client_log.level
    client_log.setLevel(logging.ERROR)  # it warns of every retry; what it ends in is said once, below
    try:
        config = Path(hf_hub_download(repository, CONFIG_NAME, revision=revision or None))
        for weights in WEIGHT_NAMES:
            try:
                hf_hub_download(repository, weights, revision=revision or None)
                return config.parent
            except Exception as error:
                failure = error
    except Exception as error:  # the hub's client raises its own, its HTTP library's and OSError
        failure = error
    finally:
        client_log.setLevel(level)
    reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0][:200]
    raise HubUnreachable(model_id, f"{type(failure).__name__}: {reason}")
