"""What each method of tuning trains: an MLP head on cached embeddings, LoRA on a tower of Linears, or all of a LipSim.

Owns which weights learn, and how they are written and read back. Knows no data and no optimiser.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from offline.errors import PlanError
from offline.finetune.tune_plan import LoraPlan, TunePlan
from perception import load_encoder
from perception.encoders.adapters import MlpHead, adapted_preprocess, save_head
from perception.encoders.tower import TowerEncoder
from perception.preprocess import PreprocessSpec

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "adapter"
HEAD_FILE = "mlp.safetensors"


class Tuned(Protocol):
    """What is trained.

    Attributes:
        network: its parameters that require a gradient are those that learn; the rest stays as it was loaded.
        preprocess: how images become pixels, in training and in what is written.
        on_features: whether `features` takes the encoder's features of images in place of their pixels.
    """

    network: nn.Module
    preprocess: PreprocessSpec
    on_features: bool

    def train(self, learning: bool) -> None:
        """Switch dropout on for an update, and off."""

    def features(self, images: Tensor) -> Tensor:
        """(b, 3, s, s) pixels in [0, 1], or (b, d) features where `on_features`, -> (b, d) un-normalised."""

    def write(self, folder: Path) -> tuple[TowerEncoder, str]:
        """Write what was trained below the run directory.

        Returns:
            The whole encoder, and the name to load it by; '' where it has none but its export's.
        """


class TunedHead:
    """An MLP head on an encoder's un-normalised features; see `Tuned`."""

    on_features = True

    def __init__(self, plan: TunePlan, encoder: TowerEncoder) -> None:
        """Draw the head's weights from torch's global generator.

        Raises:
            PlanError: the encoder's features are not its tower's, so a head behind the tower would miss something.
        """
        if type(encoder).features is not TowerEncoder.features:
            raise PlanError(f"an MLP head does not fit {plan.encoder}, a {type(encoder).__name__}")
        assert plan.mlp is not None  # the plan's own check
        self._encoder_name = plan.encoder
        self.preprocess = adapted_preprocess(encoder.preprocess)
        self.network: nn.Module = MlpHead(encoder.dim, plan.mlp.hidden).to(encoder.device)

    def train(self, learning: bool) -> None:
        """See `Tuned`: there is no dropout."""

    def features(self, images: Tensor) -> Tensor:
        """See `Tuned`."""
        adapted: Tensor = self.network(images)
        return adapted

    def write(self, folder: Path) -> tuple[TowerEncoder, str]:
        """See `Tuned`: the head as published ones are."""
        path = folder / ADAPTER / HEAD_FILE
        save_head(cast(MlpHead, self.network), path)
        name = f"{self._encoder_name}+mlp:{path}"
        return load_encoder(name), name


class TunedLora:
    """LoRA on plain Linears of an encoder's tower; see `Tuned`."""

    on_features = False

    def __init__(self, plan: TunePlan, encoder: TowerEncoder) -> None:
        """Wrap the tower; the adapter's weights come from torch's global generator.

        Raises:
            PlanError: the tower does not become one of plain Linears, or the targets are not such.
        """
        from peft import LoraConfig, get_peft_model

        from offline.finetune.towers import linear_tower, lora_targets

        assert plan.lora is not None  # the plan's own check
        tower = linear_tower(encoder)
        targets = checked_targets(tower, plan.lora) if plan.lora.targets else lora_targets(tower)
        config = LoraConfig(
            r=plan.lora.rank,
            lora_alpha=cast(int, plan.lora.alpha),  # 0.5 as published; PEFT divides it by r
            lora_dropout=plan.lora.dropout,
            bias="none",
            target_modules=targets,
        )
        self._encoder, self._encoder_name = encoder, plan.encoder
        self.preprocess = adapted_preprocess(encoder.preprocess)
        self.network: nn.Module = get_peft_model(cast(Any, tower), config)
        self.train(False)

    def train(self, learning: bool) -> None:
        """See `Tuned`: the adapter's dropout alone, for the encoder is frozen, its drop path and statistics too."""
        self.network.eval()
        for name, module in self.network.named_modules():
            if "lora_dropout" in name:
                module.train(learning)

    def features(self, images: Tensor) -> Tensor:
        """See `Tuned`."""
        mean, std = self._encoder.get_buffer("mean"), self._encoder.get_buffer("std")
        embeddings: Tensor = self.network((images - mean) / std)
        return embeddings

    def write(self, folder: Path) -> tuple[TowerEncoder, str]:
        """See `Tuned`: a PEFT folder; the encoder has it merged."""
        from offline.finetune.towers import save_lora

        save_lora(cast("PeftModel", self.network), self._encoder, folder / ADAPTER, self.preprocess)
        name = f"{self._encoder_name}+lora:{folder / ADAPTER}"
        return load_encoder(name), name


class TunedLipsim:
    """All weights of a 1-Lipschitz network, which it stays; see `Tuned`."""

    on_features = False

    def __init__(self, plan: TunePlan, encoder: TowerEncoder) -> None:
        """Copy the network.

        Raises:
            PlanError: no Lipschitz constant of the encoder is proven.
        """
        if encoder.lipschitz is None:
            raise PlanError(f"lipsim-hinge tunes a network of known Lipschitz constant, and {plan.encoder} has none")
        self.preprocess = encoder.preprocess
        self._student = copy.deepcopy(encoder)
        self.network: nn.Module = self._student.visual.requires_grad_(True)

    def train(self, learning: bool) -> None:
        """See `Tuned`: there is no dropout."""

    def features(self, images: Tensor) -> Tensor:
        """See `Tuned`."""
        return self._student.features(images)

    def write(self, folder: Path) -> tuple[TowerEncoder, str]:
        """See `Tuned`: nothing beside the export."""
        return copy.deepcopy(self._student).eval().requires_grad_(False), ""


def tuned_by(plan: TunePlan, encoder: TowerEncoder) -> Tuned:
    """What a plan trains on an encoder; see the classes."""
    kinds: dict[str, type[TunedHead | TunedLora | TunedLipsim]]
    kinds = {"mlp": TunedHead, "lora": TunedLora, "lipsim-hinge": TunedLipsim}
    return kinds[plan.method](plan, encoder)


def checked_targets(tower: nn.Module, plan: LoraPlan) -> list[str]:
    """The targets of a plan, each of which names plain Linears of the tower and nothing else.

    Args:
        tower: any; one with an nn.MultiheadAttention is refused whatever the targets.

    Raises:
        PlanError: a target names no module, or one that is no plain Linear, or attention is nn.MultiheadAttention.
    """
    if any(isinstance(module, nn.MultiheadAttention) for module in tower.modules()):
        raise PlanError("LoRA is not trained on nn.MultiheadAttention, on which PEFT is wrong: use linear_tower")
    modules = dict(tower.named_modules())
    for target in plan.targets:
        found = {name: m for name, m in modules.items() if name == target or name.endswith(f".{target}")}
        kinds = sorted({type(m).__name__ for m in found.values()})
        if kinds != ["Linear"]:
            raise PlanError(f"lora.targets must name plain Linears; {target!r} names {', '.join(kinds) or 'nothing'}")
    return list(plan.targets)


def learning_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def put_back(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Overwrite parameters in place.

    Raises:
        ValueError: the names or shapes are not theirs.
    """
    if parameters.keys() != tensors.keys() or any(parameters[n].shape != t.shape for n, t in tensors.items()):
        raise ValueError(f"{_shown(list(tensors))} are not the {_shown(list(parameters))} of this network")
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def _shown(names: Sequence[str]) -> str:
    return f"{len(names)} tensors {', '.join(names[:2])}, ..."
