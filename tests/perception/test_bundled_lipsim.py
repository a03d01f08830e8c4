"""The bundled LipSim: what ships is what its card says, its constant holds, and its demo pools give certificates."""

import hashlib
import tomllib
from pathlib import Path

import torch

import perception
from perception import DecisionPolicy, Gallery, Neighbor, load_encoder
from perception.certificates import feature_bound
from perception.certified_decision import Surroundings, decision_radius
from perception.encoder import open_image
from perception.encoders.lipsim import LipsimEncoder
from perception.preprocess import to_pixels
from perception.testing import benign_hits

NAME = "bundled/lipsim"
FOLDER = Path(perception.__file__).parent / NAME
POOLS = FOLDER.parents[2] / "indexer" / "demo" / "lipsim" / "pools.safetensors"


def test_card_names_the_weights_and_their_terms() -> None:
    card = tomllib.loads((FOLDER / "card.toml").read_text())
    assert card["sha256"] == hashlib.sha256((FOLDER / "lipsim.safetensors").read_bytes()).hexdigest()
    assert "non-commercial" in card["licence"]
    assert (FOLDER / "CARD.md").is_file()


def test_no_pair_is_further_apart_in_features_than_in_pixels() -> None:
    encoder = load_encoder(NAME)
    assert isinstance(encoder, LipsimEncoder)
    assert encoder.lipschitz == 1.0
    assert encoder.bias_dim
    generator = torch.Generator().manual_seed(0)
    network = encoder.visual.double()
    pixels = torch.rand(64, 3, 64, 64, generator=generator, dtype=torch.float64)
    for scale in (1e-3, 0.1, 1.0):
        others = (pixels + scale * torch.randn(pixels.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
        with torch.no_grad():
            moved = (network(others) - network(pixels)).norm(dim=1)
        assert bool((moved <= (1 + 1e-5) * (others - pixels).flatten(1).norm(dim=1)).all())


def test_a_test_hit_is_certified_over_the_demo_pools() -> None:
    encoder, gallery, policy = load_encoder(NAME), Gallery.load(POOLS), DecisionPolicy()
    gallery.require_encoder(encoder.fingerprint, "the demo pools")
    bound = feature_bound(encoder)
    assert bound is not None
    for hit in benign_hits():
        pixels = to_pixels([encoder.preprocess.apply(open_image(hit.file))])
        with torch.no_grad():
            features = encoder.features(pixels)[0].numpy()
        similarities = gallery.embeddings @ (features / (features**2).sum() ** 0.5)
        order = (-similarities).argsort()
        near = [Neighbor(gallery.ids[i], gallery.labels[i], float(similarities[i])) for i in order]
        verdict = policy.decide(near)
        assert verdict.pool == hit.pool
        around = Surroundings.of(near, gallery.embeddings[order], len(near), None)
        radius = decision_radius(features, around, policy, bound)
        assert radius is not None
        assert 0 < radius < 64 * 64 * 3
