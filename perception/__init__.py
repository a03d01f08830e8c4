"""What service, indexer and offline must agree on to the bit: pixels, embeddings, similarities and verdicts.

    from perception import load_encoder
    encoder = load_encoder("bundled/fare4")
    print(encoder.similarity("a.jpg", "b.jpg"))

Names are imported on first use, so that a decoding worker which needs only Pillow does not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perception.catalogue import Card, list_encoders, load_encoder
    from perception.encoder import Encoder, encode_images, image_similarity
    from perception.errors import ImageError, PerceptionError
    from perception.gallery import Gallery
    from perception.image import DecodedImage, Frame, ImageLimits, decode
    from perception.preprocess import PreprocessSpec, to_pixels
    from perception.similarity import cosine_similarity, pseudo_distance, two_afc_choice
    from perception.verdict import DecisionPolicy, Neighbor, PoolLabel, Verdict, VerdictLabel

_HOMES = {
    "catalogue": ("Card", "list_encoders", "load_encoder"),
    "encoder": ("Encoder", "encode_images", "image_similarity"),
    "errors": ("ImageError", "PerceptionError"),
    "gallery": ("Gallery",),
    "image": ("DecodedImage", "Frame", "ImageLimits", "decode"),
    "preprocess": ("PreprocessSpec", "to_pixels"),
    "similarity": ("cosine_similarity", "pseudo_distance", "two_afc_choice"),
    "verdict": ("DecisionPolicy", "Neighbor", "PoolLabel", "Verdict", "VerdictLabel"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Card",
    "DecisionPolicy",
    "DecodedImage",
    "Encoder",
    "Frame",
    "Gallery",
    "ImageError",
    "ImageLimits",
    "Neighbor",
    "PerceptionError",
    "PoolLabel",
    "PreprocessSpec",
    "Verdict",
    "VerdictLabel",
    "cosine_similarity",
    "decode",
    "encode_images",
    "image_similarity",
    "list_encoders",
    "load_encoder",
    "pseudo_distance",
    "to_pixels",
    "two_afc_choice",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'perception' has no attribute {name!r}")
    return getattr(import_module(f"perception.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
