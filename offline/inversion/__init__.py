"""Inversion: pictures whose embedding under an encoder is that of an image or of a text, and how alike encoders see."""

from offline.inversion.optimiser import Keeper, Optimiser, Reconstruction, Watch
from offline.inversion.plan import InversionPlan
from offline.inversion.problem import Target, search_generator, start_pixels, towards

__all__ = [
    "InversionPlan",
    "Keeper",
    "Optimiser",
    "Reconstruction",
    "Target",
    "Watch",
    "search_generator",
    "start_pixels",
    "towards",
]
