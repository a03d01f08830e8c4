"""Towers to train LoRA adapters on: equal to an encoder's own, with every attention made of plain Linears.

PEFT is wrong on `nn.MultiheadAttention`: it applies the change of `out_proj` twice, and merges in place under threads
(dependency notes, finding 1). So open_clip's ViTs are converted to timm's, whose `qkv`, `proj`, `fc1` and `fc2` are
Linears. Owns that conversion and the adapter folder; `perception.encoders.lora` reads the folder back.
"""

import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from offline.errors import PlanError
from perception.encoders.clip import ClipEncoder
from perception.encoders.dino import DinoEncoder
from perception.encoders.lora import write_notes
from perception.encoders.tower import TowerEncoder
from perception.preprocess import PreprocessSpec

if TYPE_CHECKING:
    from peft import PeftModel

MAX_DIFFERENCE = 1e-5
"""Largest absolute difference of a converted tower's embeddings, relative to the largest coordinate if that is > 1."""


def linear_tower(encoder: TowerEncoder) -> nn.Module:
    """A copy of an encoder's tower on whose `lora_targets` PEFT's LoRA is right.

    open_clip's ViTs are converted to timm's with timm's own converter; DINO towers and timm trunks are taken as they
    are. LayerNorm eps and activation are the encoder's.

    Args:
        encoder: a CLIP or DINO encoder in fp32, without an MLP head.

    Returns:
        Pixels (b, 3, h, w), normalised by the encoder's mean and std -> un-normalised embeddings (b, d); float32, in
        eval mode, frozen.

    Raises:
        PlanError: another kind of encoder, bf16, or a ViT that does not convert to within `MAX_DIFFERENCE`.
    """
    if not isinstance(encoder, ClipEncoder | DinoEncoder):
        raise PlanError(f"LoRA is trained on CLIP and DINO towers, and {encoder.name} is a {type(encoder).__name__}")
    if encoder.precision != "fp32":
        raise PlanError(f"LoRA is trained in fp32, and {encoder.name} was loaded in {encoder.precision}")
    if hasattr(encoder.visual, "class_embedding"):  # open_clip's own ViT; all else comes from timm
        tower = _timm_vit(encoder)
        _require_equal(encoder, tower)
    else:
        tower = copy.deepcopy(encoder.visual)
    return tower.to(encoder.device).eval().requires_grad_(False)


def lora_targets(tower: nn.Module) -> list[str]:
    """`target_modules` for PEFT's LoraConfig, as published adapters have them (methods 1.4).

    Args:
        tower: from `linear_tower`.

    Returns:
        `["qkv"]` for ViTs; for ConvNeXt the full names of all `*.mlp.fc1` and `*.mlp.fc2`.

    Raises:
        PlanError: the tower has neither as plain Linears, or it has an `nn.MultiheadAttention`.
    """
    if any(isinstance(m, nn.MultiheadAttention) for m in tower.modules()):
        raise PlanError("PEFT is wrong on nn.MultiheadAttention: take the tower from linear_tower")
    linears = [name for name, module in tower.named_modules() if type(module) is nn.Linear]
    if any(name.endswith("attn.qkv") for name in linears):
        return ["qkv"]
    feed_forward = [name for name in linears if name.endswith(("mlp.fc1", "mlp.fc2"))]
    if not feed_forward:
        raise PlanError(
            "LoRA needs plain Linears named qkv (ViT, DINO) or mlp.fc1 and mlp.fc2 (ConvNeXt; some small ones have "
            "convolutions there), and the tower has none; an MLP head fits any encoder"
        )
    return feed_forward


def save_lora(
    model: "PeftModel", encoder: TowerEncoder, folder: Path, preprocess: PreprocessSpec | None = None
) -> None:
    """Write a trained adapter as a PEFT folder, with what `+lora:FOLDER` has to know about its training.

    Args:
        model: `get_peft_model` of `linear_tower(encoder)`.
        encoder: the one that was adapted.
        folder: made where it does not exist.
        preprocess: of the images in training; None means `perception.encoders.adapters.adapted_preprocess`.
    """
    model.save_pretrained(str(folder), safe_serialization=True)
    eps = {m.eps for name, m in model.named_modules() if isinstance(m, nn.LayerNorm) and ".norm_pre" not in name}
    quick = any(type(m).__name__ == "QuickGELU" for m in model.modules())
    vit = isinstance(encoder, ClipEncoder) and len(eps) == 1 and hasattr(encoder.visual, "transformer")
    write_notes(
        folder, layer_norm_eps=eps.pop() if vit else None, quick_gelu=quick if vit else None, preprocess=preprocess
    )


def _timm_vit(encoder: TowerEncoder) -> nn.Module:
    """open_clip's ViT as timm's, by timm's `checkpoint_filter_fn`."""
    from open_clip.transformer import QuickGELU as OpenClipQuickGELU
    from timm.layers import QuickGELU
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    visual: Any = encoder.visual
    activations = {nn.GELU: nn.GELU, OpenClipQuickGELU: QuickGELU}
    try:
        first = visual.transformer.resblocks[0]
        tower = VisionTransformer(
            img_size=visual.image_size,
            patch_size=visual.patch_size,
            num_classes=encoder.dim,
            embed_dim=visual.conv1.out_channels,
            depth=len(visual.transformer.resblocks),
            num_heads=first.attn.num_heads,
            mlp_ratio=(first.mlp.c_fc.out_features + 0.5) / visual.conv1.out_channels,  # timm rounds the product down
            pre_norm=True,
            weight_init="skip",
            norm_layer=partial(nn.LayerNorm, eps=first.ln_1.eps),
            act_layer=activations[type(first.mlp.gelu)],
        )
        tower.norm_pre.eps = visual.ln_pre.eps
        tower.norm.eps = visual.ln_post.eps
        tower.load_state_dict(checkpoint_filter_fn({f"visual.{k}": v for k, v in visual.state_dict().items()}, tower))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise PlanError(f"{encoder.name}: its ViT has no equal among timm's: {str(error).splitlines()[0]}") from error
    return tower


def _require_equal(encoder: TowerEncoder, tower: nn.Module) -> None:
    side = encoder.preprocess.size_px
    probe = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(encoder.device)
    with torch.no_grad():
        expected = encoder.visual(probe)
        difference = float((tower.to(encoder.device).eval()(probe) - expected).abs().max())
    if not difference <= MAX_DIFFERENCE * max(1.0, float(expected.abs().max())):
        raise PlanError(f"{encoder.name}: its ViT and timm's differ by {difference:.1e} on a probe")
