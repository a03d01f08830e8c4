"""What a finished tuning leaves: the adapter as published ones are, the whole encoder, where it comes from, a picture.

Both are loaded again as others will load them, and compared with what was trained.
"""

from pathlib import Path
from typing import Any

import torch

from offline.errors import RunError
from offline.finetune.publish import CURVE, draw_curve, publish_encoder, sha256_of
from offline.finetune.tune_models import ADAPTER, Tuned
from offline.finetune.tune_plan import TunePlan
from offline.runs import RunDirectory
from perception.encoders.tower import TowerEncoder

# Of the largest feature: merged LoRA adds its two products in another order; fp16 rounds each weight, TF32 each factor.
_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}


def publish_tuned(tuned: Tuned, plan: TunePlan, encoder: TowerEncoder, best: dict[str, Any], run: RunDirectory) -> None:
    """Write `adapter/`, `export/` and the curve below the run directory.

    Args:
        tuned: with the weights of the best epoch.
        encoder: what was tuned.
        best: epoch, loss and accuracy, for the provenance.

    Raises:
        CheckpointError: what was written cannot be read back.
        RunError: what was read back is not what was trained.
    """
    exact = _TOLERANCE["fp32" if encoder.device.type == "cpu" else "fp16"]
    whole, name = tuned.write(run.path)
    require_same(tuned, encoder, whole, exact, name or "the tuned network")
    origin = {
        "original_fingerprint": encoder.fingerprint,
        "best": best,
        "adapter_sha256": _hashes(run.path / ADAPTER),
    }
    loaded = publish_encoder(whole, run, plan.method, plan.as_dict(), origin, plan.export_dtype)
    require_same(tuned, encoder, loaded, max(exact, _TOLERANCE[plan.export_dtype]), "the export")
    draw_curve(run.path, run.path / CURVE, f"hinge loss ({plan.reduction} of a batch)")
    run.log(event="tuned", encoder=name or f"local-dir:{run.path / 'export'}", **best)


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir())} if folder.is_dir() else {}


@torch.no_grad()
def require_same(tuned: Tuned, encoder: TowerEncoder, loaded: TowerEncoder, tolerance: float, what: str) -> None:
    """Compare what was trained with what was read back, on two random images.

    Args:
        encoder: what was tuned, whose features a head takes.
        tolerance: largest difference, as a share of the largest feature.
        what: was read back, for the message.

    Raises:
        RunError: they differ by more, or images become other pixels.
    """
    if loaded.preprocess != tuned.preprocess:
        raise RunError(f"{what} takes images by {loaded.preprocess}, it was trained with {tuned.preprocess}")
    size = tuned.preprocess.size_px
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    own = pixels.to(encoder.device)
    trained = tuned.features(encoder.features(own) if tuned.on_features else own).cpu()
    difference = float((trained - loaded.features(pixels).cpu()).abs().max() / trained.abs().max())
    if not difference <= tolerance:
        raise RunError(f"{what} differs from what was trained by {difference:.2g}; at most {tolerance} is rounding")
