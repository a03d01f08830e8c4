"""DiffAugment: random views of an image through which a gradient flows (Zhao et al. 2020; methods 6.10).

Owns the draws and the maps that they are parameters of. Pixels of a view may leave [0, 1], as in the reference: they
are what a gradient is taken through, never shown. The order of a policy is that in which its maps are applied.
"""

from dataclasses import dataclass, field
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from offline.errors import PlanError

POLICIES = ("color", "translation", "resize", "cutout")
"""'resize' is that of the CLIPAG notebook, from which the multi-view inversion comes; the others are DiffAugment's."""

PAPERS_POLICY = ("color", "translation", "cutout")
SHIFT_SHARE, CUTOUT_SHARE = 1 / 8, 1 / 2
RESIZES = (0.8, 1.2)


@dataclass(frozen=True)
class Draws:
    """The parameters of v views; those of policies that are not asked for are drawn all the same.

    So a view's brightness does not depend on whether it is cut out as well.

    Attributes:
        brightness: (v,) in [-0.5, 0.5), added to all values.
        saturation: (v,) in [0, 2), times the distance from a pixel's mean over its channels.
        contrast: (v,) in [0.5, 1.5), times the distance from the image's mean.
        down, right: (v,) int64, shifts in pixels, each up to 1/8 of the size either way.
        scale: (v,) in [0.8, 1.2), of both sides.
        row, column: (v,) int64, centre of the square that is cut out; may lie on the image's edge.
    """

    brightness: Tensor
    saturation: Tensor
    contrast: Tensor
    down: Tensor
    right: Tensor
    scale: Tensor
    row: Tensor
    column: Tensor

    @classmethod
    def of(cls, views: int, size_px: tuple[int, int], generator: torch.Generator) -> Self:
        """Draw for so many views of an image of `(height, width)`; on the generator's device."""

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(views, generator=generator, device=generator.device)

        def integer(low: int, high: int) -> Tensor:
            return torch.randint(low, high + 1, (views,), generator=generator, device=generator.device)

        shifts = [_rounded(side, SHIFT_SHARE) for side in size_px]
        cut = [_rounded(side, CUTOUT_SHARE) for side in size_px]
        # One more place for an even square, whose centre lies between two pixels, as in the reference.
        last = [side - cut_px % 2 for side, cut_px in zip(size_px, cut, strict=True)]
        return cls(
            brightness=uniform(-0.5, 0.5),
            saturation=uniform(0, 2),
            contrast=uniform(0.5, 1.5),
            down=integer(-shifts[0], shifts[0]),
            right=integer(-shifts[1], shifts[1]),
            scale=uniform(*RESIZES),
            row=integer(0, last[0]),
            column=integer(0, last[1]),
        )


@dataclass(frozen=True)
class DiffAugment:
    """Draws views of an image, each for itself.

    Attributes:
        policy: of `POLICIES`, in the order in which they are applied.
    """

    policy: tuple[str, ...] = field(default=PAPERS_POLICY)

    def __post_init__(self) -> None:
        """Check the policy.

        Raises:
            PlanError: it is empty, or names an augmentation twice or one that there is not.
        """
        if not self.policy:
            raise PlanError(f"a policy of views needs at least one of {', '.join(POLICIES)}, got none")
        for name in self.policy:
            if name not in POLICIES:
                raise PlanError(f"no augmentation is called {name!r}: a policy is made of {', '.join(POLICIES)}")
        if len(set(self.policy)) < len(self.policy):
            raise PlanError(f"a policy names each augmentation once, got {','.join(self.policy)}")

    @classmethod
    def parse(cls, policy: str) -> Self:
        """Read a policy as the reference writes it, 'color,translation,cutout'.

        Raises:
            PlanError: see the class.
        """
        return cls(tuple(name.strip() for name in policy.split(","))) if policy.strip() else cls(())

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Augment views, each with draws of its own.

        Args:
            pixels: (v, 3, h, w) floats.
            generator: of the draws; on any device.

        Returns:
            (v, 3, h, w), differentiable with respect to `pixels`; may leave [0, 1].
        """
        height, width = pixels.shape[-2:]
        return self.apply(pixels, Draws.of(len(pixels), (height, width), generator))

    def apply(self, pixels: Tensor, draws: Draws) -> Tensor:
        """Augment (v, 3, h, w) by parameters that are given."""
        for name in self.policy:
            if name == "color":
                pixels = brighten(pixels, draws.brightness)
                pixels = saturate(pixels, draws.saturation)
                pixels = contrast(pixels, draws.contrast)
            elif name == "translation":
                pixels = translate(pixels, draws.down, draws.right)
            elif name == "resize":
                pixels = resize(pixels, draws.scale)
            else:
                pixels = cut_out(pixels, draws.row, draws.column)
        return pixels


def brighten(pixels: Tensor, shifts: Tensor) -> Tensor:
    """Add (v,) to all values of (v, 3, h, w)."""
    return pixels + _each(shifts, pixels)


def saturate(pixels: Tensor, factors: Tensor) -> Tensor:
    """Scale each pixel's distance from the mean of its three channels by (v,): 0 is grey, 1 changes nothing."""
    grey = pixels.mean(dim=1, keepdim=True)
    return grey + (pixels - grey) * _each(factors, pixels)


def contrast(pixels: Tensor, factors: Tensor) -> Tensor:
    """Scale the distance of all values from the image's mean by (v,): 1 changes nothing."""
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (pixels - mean) * _each(factors, pixels)


def translate(pixels: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Shift (v, 3, h, w) by (v,) whole pixels each way; what comes in is zero."""
    views = zip(pixels.unbind(), down.tolist(), right.tolist(), strict=True)
    return torch.stack([F.pad(view, (x, -x, y, -y)) for view, y, x in views])  # a negative frame cuts


def resize(pixels: Tensor, scales: Tensor) -> Tensor:
    """Scale both sides by (v,) around the centre, bilinearly.

    What becomes smaller gets a frame of zeros, what becomes larger is cut. Sizes and frames are rounded towards zero,
    as in the CLIPAG notebook, where a whole batch shares one scale.
    """
    height, width = pixels.shape[-2:]
    resized = []
    for view, scale in zip(pixels.unbind(), scales.tolist(), strict=True):
        size = (max(int(scale * height), 1), max(int(scale * width), 1))
        scaled = F.interpolate(view[None], size=size, mode="bilinear", align_corners=False)[0]
        rows, columns = height - size[0], width - size[1]
        top, left = int(rows / 2), int(columns / 2)
        resized.append(F.pad(scaled, (left, columns - left, top, rows - top)))  # a negative frame cuts
    return torch.stack(resized)


def cut_out(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Set a square of half the side around (v,) centres to zero; what of it lies outside the image is lost.

    A square of s pixels around r holds the rows `r - s // 2` to `r - s // 2 + s - 1`: all of it is in the image for the
    centres in between, half of each side at the edges, so that between 1/16 and 1/4 of the image goes.
    """
    height, width = pixels.shape[-2:]
    in_rows = _inside(rows.to(pixels.device), height)
    in_columns = _inside(columns.to(pixels.device), width)
    hidden = in_rows[:, :, None] & in_columns[:, None, :]
    return pixels * (~hidden)[:, None].to(pixels.dtype)


def _inside(centres: Tensor, side: int) -> Tensor:
    """(v, side) bool, which rows or columns are cut out."""
    size = _rounded(side, CUTOUT_SHARE)
    first = centres[:, None] - size // 2
    at = torch.arange(side, device=centres.device)[None]
    return (at >= first) & (at < first + size)


def _rounded(side: int, share: float) -> int:
    """A share of a side in whole pixels, rounded as the reference does."""
    return int(side * share + 0.5)


def _each(of_views: Tensor, pixels: Tensor) -> Tensor:
    """(v,) on the device and in the type of (v, 3, h, w), to be combined with it."""
    return of_views.to(pixels).view(-1, 1, 1, 1)
