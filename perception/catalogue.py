"""The catalogue of encoders, and `load_encoder`, the one way to get one.

A card (`catalogue/*.toml`) says where a published model's weights are and how it is used; bundled models have their
card beside their weights in `bundled/`. Nothing is ever loaded in place of what was asked for.
"""

import logging
import tomllib
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perception.errors import CheckpointError, HubUnreachable, UnknownEncoder
from perception.preprocess import PreprocessSpec

if TYPE_CHECKING:
    from perception.encoder import Precision
    from perception.encoders.clip import ClipParts
    from perception.encoders.tower import Parts, TowerEncoder

BUNDLED = "bundled/"
FAMILIES = (
    "clip",
    "dreamsim",
    "lipsim",
    "lpips",
    "dino",
)
"""Modules of `perception.encoders`, each with `CONFIG_NAME`, `WEIGHT_NAMES`, `read_folder` and `read_visual`.

A folder is of the first family whose configuration file it holds: that of DINO has the name that all of `transformers`
uses, and comes last.
"""
_ADAPTERS = ("mlp", "lora")


@dataclass(frozen=True)
class Card:
    """One model of the catalogue.

    Attributes:
        name: what `load_encoder` takes.
        source: 'hf-hub:OWNER/MODEL'; 'local-dir:FOLDER' for bundled models; 'file:NAME' for what is published as a file
            or folder of that name, which has to be fetched by hand and named as 'visual:CARD:PATH'.
        family: one of `FAMILIES`; empty where the files say it.
        architecture: the name of the architecture in open_clip ('clip'), timm ('dino') or the family's own module;
            empty where the folder's configuration says it.
        quick_gelu: activation of OpenAI-derived towers; None leaves it to the configuration.
        preprocess: None leaves it to the configuration.
        text_tower: name of the card whose text tower (and tokenizer) this one shares; empty where it has its own or
            none. A shared one is not stored twice.
        base: name of the card that an adapter was made for; empty for whole models.
        adapter: 'mlp' or 'lora' where there is a `base`.
        table: the whole card: licence, training recipe, published figures.
    """

    name: str
    source: str
    family: str
    architecture: str
    quick_gelu: bool | None
    preprocess: PreprocessSpec | None
    text_tower: str
    base: str
    adapter: str
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
        base=table.get("base", ""),
        adapter=table.get("adapter", ""),
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


def card_of(name: str) -> Card | None:
    """The card of the model that a name of `load_encoder` means; None where the catalogue does not know it."""
    cards = list_encoders()
    scheme, _, rest = name.partition(":")
    base, adapter, _ = _split_adapter(name)
    if name in cards:
        return cards[name]
    if adapter:
        of = card_of(base)
        found = (c for c in cards.values() if of is not None and (c.base, c.adapter) == (of.name, adapter))
        return next(found, None)
    if scheme == "visual":
        return cards.get(rest.partition(":")[0])
    # A published model keeps its card when it is named by its hub id.
    source = name.partition("@")[0]
    return next((c for c in cards.values() if scheme == "hf-hub" and c.source == source), None)


def load_encoder(name: str, *, precision: "Precision" = "fp32", device: str = "cpu") -> "TowerEncoder":
    """Load an encoder by name.

    Args:
        name: a catalogue name ('fare4-convnext_base_w', 'bundled/clean'); 'hf-hub:OWNER/MODEL', optionally with
            '@REVISION'; 'local-dir:FOLDER' in a family's own format, such as open_clip's; 'visual:CARD:PATH' for
            weights in the layout in which the model of that card was published, or 'visual:ARCHITECTURE:FILE' for the
            visual state dict of an open_clip architecture; or any of these followed by '+mlp:FILE' or '+lora:FOLDER',
            an adapter that is applied to it.
        precision: of weights and activations, 'fp32' or 'bf16'; part of the fingerprint.
        device: torch device.

    Raises:
        UnknownEncoder: no such name or scheme.
        HubUnreachable: the weights are not in the local cache and the hub did not answer.
        CheckpointError: files absent, corrupt or of another architecture.
    """
    return _read_parts(name).build(name, precision, device)


def _read_parts(name: str) -> "Parts":
    """Resolve a name to a checkpoint taken apart."""
    cards = list_encoders()
    base, adapter, path = _split_adapter(name)
    scheme, _, rest = name.partition(":")
    if adapter:
        from perception.encoders.adapters import read_adapted

        return read_adapted(adapter, _read_parts(base), Path(path))
    if name in cards:
        card = cards[name]
    elif scheme == "hf-hub" and rest:
        known = card_of(name)
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


def _split_adapter(name: str) -> tuple[str, str, str]:
    """'BASE+mlp:FILE' as (BASE, 'mlp', FILE); the last adapter of several; ('', '', '') for a name without one."""
    at, adapter = max((name.rfind(f"+{adapter}:"), adapter) for adapter in _ADAPTERS)
    return (name[:at], adapter, name[at + len(adapter) + 2 :]) if at > 0 else ("", "", "")


def _read_visual(architecture: str, path: Path, cards: dict[str, Card]) -> "Parts":
    """Read published weights for a card, or a visual-only state dict for an open_clip architecture."""
    from perception.encoders import clip

    card = cards.get(architecture)
    if card is not None and card.adapter:
        from perception.encoders.adapters import read_adapted

        return read_adapted(card.adapter, _read_parts(card.base), path, card.preprocess)
    if card is None or not card.architecture:
        spec = clip.preprocess_of(clip.architecture_config(architecture), {}, architecture)
        return clip.read_visual(architecture, path, spec)
    parts: Parts = import_module(f"perception.encoders.{card.family}").read_visual(
        card.architecture, path, card.preprocess
    )
    return parts


def _read_folder(card: Card) -> "Parts":
    """Read a card's folder as what its configuration file says that it is, fetched if need be."""
    scheme, _, location = card.source.partition(":")
    if scheme == "file":
        how = card.table.get("get", "")
        raise CheckpointError(
            f"{card.name} is published as {location}, which has to be fetched by hand{f' ({how})' if how else ''} and "
            f"named as 'visual:{card.name}:PATH'"
        )
    folder = Path(location) if scheme == "local-dir" else fetch_from_hub(location, card.family)
    if not folder.is_dir():
        raise CheckpointError(f"folder not found: {folder}")
    from perception.encoders import adapters
    from perception.encoders.weights import read_json

    modules = {name: import_module(f"perception.encoders.{name}") for name in FAMILIES}
    for name, module in modules.items():
        if (folder / module.CONFIG_NAME).is_file():
            read = partial(module.read_folder, quick_gelu=card.quick_gelu) if name == "clip" else module.read_folder
            parts: Parts = read(folder, card.preprocess)
            has_head = (folder / adapters.CONFIG_NAME).is_file() or adapters.MARK in read_json(
                folder / module.CONFIG_NAME
            )
            return adapters.with_exported_head(parts, folder) if has_head else parts
    raise CheckpointError(f"{folder} holds none of {', '.join(m.CONFIG_NAME for m in modules.values())}")


def _with_text_of(parts: "Parts", cards: dict[str, Card], card: Card) -> "ClipParts":
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

    from perception.encoders import adapters, clip, dino
    from perception.encoders.weights import read_json

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
            if config := fetch(config_name):
                wanted: list[tuple[str, ...]] = [weight_names]
                if adapters.MARK in read_json(config):
                    wanted += [(adapters.CONFIG_NAME,), (adapters.WEIGHTS_NAME,)]
                if all(fetch(*names) for names in wanted):
                    return config.parent
                break
    finally:
        client_log.setLevel(level)
    reason = (str(failures[-1]).strip().splitlines() or [type(failures[-1]).__name__])[0][:200]
    raise HubUnreachable(model_id, f"{type(failures[-1]).__name__}: {reason}")
