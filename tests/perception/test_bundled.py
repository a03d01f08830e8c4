"""The bundled encoders: what is shipped is what the card says, and it does what the demo promises."""

import hashlib
import tomllib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import perception
from perception import Gallery, encode_images, list_encoders, load_encoder
from perception.encoder import open_image
from perception.encoders.clip import ClipEncoder
from perception.testing import benign_hits, encoded, synthetic_image

ROOT = Path(perception.__file__).parent
BUNDLED = [name for name, card in list_encoders().items() if name.startswith("bundled/") and card.family != "lipsim"]
DEMO = ROOT.parent / "indexer" / "demo"


@pytest.fixture(scope="module", params=BUNDLED)
def encoder(request: pytest.FixtureRequest) -> ClipEncoder:
    loaded = load_encoder(request.param)
    assert isinstance(loaded, ClipEncoder)
    return loaded


def folder_of(encoder: ClipEncoder) -> Path:
    return ROOT / encoder.name


def test_there_is_one() -> None:
    assert "bundled/clean" in BUNDLED


def test_card_names_the_weights_and_their_terms(encoder: ClipEncoder) -> None:
    card = tomllib.loads((folder_of(encoder) / "card.toml").read_text())
    weights = (folder_of(encoder) / "open_clip_model.safetensors").read_bytes()
    assert card["sha256"] == hashlib.sha256(weights).hexdigest()
    assert "non-commercial" in card["licence"]
    assert {"caltech101_1nn", "grocery_loo_1nn", "tiny_imagenet_zero_shot"} <= card["measured"].keys()
    assert card["measured"]["command"].startswith("hardlook-lab benchmark embedding")


def test_a_shared_text_tower_is_not_shipped_twice(encoder: ClipEncoder) -> None:
    shared = list_encoders()[encoder.name].text_tower
    with safe_open(folder_of(encoder) / "open_clip_model.safetensors", framework="pt") as weights:
        assert all(key.startswith("visual.") for key in weights.keys()) is bool(shared)  # noqa: SIM118
    if shared:
        prompts = ["a photo of a dog", "a harbour at night"]
        donor = load_encoder(shared)
        torch.testing.assert_close(encoder.text.encode_text(prompts), donor.text.encode_text(prompts), atol=0, rtol=0)


def test_open_clip_itself_loads_it_and_agrees(encoder: ClipEncoder, tmp_path: Path) -> None:
    folder = folder_of(encoder)
    if list_encoders()[encoder.name].text_tower:  # open_clip wants all in one folder
        folder = tmp_path / "whole"
        encoder.export(folder)
    reference = open_clip.create_model(f"local-dir:{folder}").eval()
    size = encoder.preprocess.size_px
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a photo of a dog"])
    with torch.no_grad():
        images = reference.encode_image(pixels * 2 - 1, normalize=True)
        texts = reference.encode_text(tokens, normalize=True)
        torch.testing.assert_close(encoder.encode(pixels), images, atol=1e-5, rtol=0)
        torch.testing.assert_close(encoder.text.encode_text(["a photo of a dog"]), texts, atol=1e-5, rtol=0)


def test_an_image_has_one_embedding_whatever_its_batch(encoder: ClipEncoder) -> None:
    images = [synthetic_image(i, (200, 150)) for i in range(13)]
    together = encode_images(encoder, list(images), batch_size=13)
    for size in (1, 2, 5):
        cosine = (together * encode_images(encoder, list(images), batch_size=size)).sum(1)
        assert cosine.min() >= 0.99999


def test_words_nobody_taught_it_say_nothing(encoder: ClipEncoder) -> None:
    with torch.inference_mode():
        known, other = encoder.text.encode_text(["a photo of a dog", "a photo of a xylograph"])
    assert float(known @ other) < 0.99


def variants(image: Image.Image) -> dict[str, bytes]:
    """Re-encoded and resized, as people make them."""
    w, h = image.size
    return {
        "jpeg30": encoded(image, "JPEG", quality=30),
        "webp40": encoded(image, "WEBP", quality=40),
        "avif": encoded(image, "AVIF", quality=50),
        "gif": encoded(image, "GIF"),
        "third": encoded(image.resize((w // 3, h // 3), Image.Resampling.BICUBIC)),
        "double": encoded(image.resize((w * 2, h * 2), Image.Resampling.BILINEAR), "JPEG"),
        "wider": encoded(image.resize((w * 5 // 4, h), Image.Resampling.BICUBIC), "JPEG"),
    }


@pytest.mark.parametrize("hit", benign_hits(), ids=lambda hit: hit.id)
def test_benign_hits_hit_in_every_guise(encoder: ClipEncoder, hit: perception.testing.BenignHit) -> None:
    gallery = Gallery.load(DEMO / encoder.name.removeprefix("bundled/") / "pools.safetensors")
    gallery.require_encoder(encoder.fingerprint)
    files = {"as shipped": hit.file, **variants(open_image(hit.file))}
    rows = encode_images(encoder, list(files.values())).numpy()
    nearest = np.argmax(rows @ gallery.embeddings.T, axis=1)
    assert {name: gallery.ids[j] for name, j in zip(files, nearest, strict=True)} == dict.fromkeys(files, hit.id)
    assert gallery.labels[gallery.ids.index(hit.id)] == hit.pool
