"""`hardlook-lab pretrain`: trains the small bundled CLIP (image and text tower in open_clip's own format).

Two phases, both short enough for two CPU cores:

1. image: the tower starts from the ImageNet teacher's weights and learns, at its own image size and padding, the
   principal components of the teacher's standardised features: `loss = 1 - cos(f(view), target)`.
2. text: with the image tower locked (as in LiT), the text tower learns to meet the images' embeddings from class names
   and captions: `CE(image -> name) + name_weight * CE(name -> images) + caption_weight * CE(captions, both ways)`.

The image space is thus the teacher's, which knows 1,000 classes, and not bent to the few that are named here. Owns the
recipe. Every random choice is a function of (seed, step), so a resumed run is the run that was killed.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from offline.data.training import SOURCES, Source, TextBank, augment, epoch_indices, load_sources, to_signed
from offline.errors import PlanError
from offline.finetune.schedule import warmup_cosine
from offline.finetune.teacher import load_teacher, restore_batch_norm
from offline.runs import RunDirectory, adam_tensors, restore_adam
from perception.encoders.clip import write_open_clip_folder
from perception.preprocess import PreprocessSpec

TEACHER_FILE = "weights/mobilenet_v2_1.0_224_quant.tflite"


@dataclass(frozen=True)
class PretrainPlan:
    """Everything that decides the result of a pretraining run (sizes in px, rates per step)."""

    seed: int
    embed_dim: int
    image_size_px: int
    teacher_size_px: int
    text_width: int
    text_layers: int
    text_heads: int
    context_length: int
    image_steps: int
    image_lr: float
    image_batch: dict[str, int]
    min_crop_area: float
    text_steps: int
    text_lr: float
    text_batch_named: int
    text_batch_captions: int
    name_weight: float
    caption_weight: float
    label_smoothing: float
    weight_decay: float
    warmup_steps: int
    checkpoint_every: int
    log_every: int

    @property
    def steps(self) -> int:
        """Steps of both phases."""
        return self.image_steps + self.text_steps


def plan_from_table(table: dict[str, Any]) -> PretrainPlan:
    """Build the plan from a parsed TOML table.

    Raises:
        PlanError: a key is unknown or missing.
    """
    try:
        return PretrainPlan(**table)
    except TypeError as error:
        raise PlanError(f"pretraining plan: {error}") from error


def model_config(plan: PretrainPlan) -> dict[str, Any]:
    """The `model_cfg` of open_clip_config.json."""
    return {
        "embed_dim": plan.embed_dim,
        "vision_cfg": {
            "timm_model_name": "mobilenetv2_100",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "timm_proj_bias": True,
            "image_size": plan.image_size_px,
        },
        "text_cfg": {
            "context_length": plan.context_length,
            "vocab_size": 49408,
            "width": plan.text_width,
            "heads": plan.text_heads,
            "layers": plan.text_layers,
        },
    }


@torch.no_grad()
def encode_sources(network: nn.Module, sources: dict[str, Source], size_px: int, path: Path) -> dict[str, Tensor]:
    """Run a network over the upright centre view of every image; kept in `path`, so that it happens once.

    Returns:
        By source name (n, d) float32.
    """
    if path.exists():
        return {name: rows.float() for name, rows in load_file(path).items()}
    encoded: dict[str, Tensor] = {}
    for name, source in sources.items():
        began, rows = time.time(), []
        for start in range(0, len(source.images), 64):
            rows.append(network(to_signed(source.images[start : start + 64], size_px)).half())
        encoded[name] = torch.cat(rows)
        print(f"{path.stem}: {len(encoded[name])} {name} in {time.time() - began:.0f} s", flush=True)
    partial = path.with_suffix(".partial")
    save_file(encoded, partial)
    partial.rename(path)
    return {name: rows.float() for name, rows in encoded.items()}


@dataclass(frozen=True)
class TargetSpace:
    """Principal components of the teacher's standardised features.

    Attributes:
        weight: (embed_dim, 1280); bias: (embed_dim,). `weight @ feature + bias` is the target's direction.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, features: Tensor, embed_dim: int) -> "TargetSpace":
        """Fit on (n, 1280) features."""
        mean, std = features.mean(0), features.std(0) + 1e-3
        sample = ((features - mean) / std)[:: max(1, len(features) // 8192)]
        _, _, components = torch.linalg.svd(sample, full_matrices=False)
        weight = components[:embed_dim] / std
        return cls(weight, -weight @ mean)

    def __call__(self, features: Tensor) -> Tensor:
        """(n, 1280) -> (n, embed_dim) of unit norm."""
        return F.normalize(features @ self.weight.T + self.bias, dim=-1)


class Pretraining:
    """The state of one run: the model, its targets and the optimizer of each phase."""

    def __init__(self, plan: PretrainPlan, data: Path, run: RunDirectory) -> None:
        from open_clip.model import CLIP

        self.plan, self.run = plan, run
        teacher = load_teacher(data / TEACHER_FILE).to(memory_format=torch.channels_last)
        self.sources, classes = load_sources(data)
        self.texts = TextBank(classes, self.sources["scenes"].captions, plan.context_length)
        taught = encode_sources(teacher, self.sources, plan.teacher_size_px, run.path / "teacher.safetensors")
        space = TargetSpace.fit(torch.cat([taught[name] for name in SOURCES]), plan.embed_dim)
        self.targets = {name: space(rows) for name, rows in taught.items()}
        torch.manual_seed(plan.seed)
        self.model: Any = CLIP(**model_config(plan))
        trunk, projection = self.model.visual.trunk, self.model.visual.head.proj
        trunk.load_state_dict(teacher.state_dict())
        photos = [
            s.images[:: max(1, len(s.images) // 96)]
            for s in self.sources.values()
            if s.captions or len(s.images) < 4000
        ]
        restore_batch_norm(trunk.eval(), to_signed(np.concatenate(photos), plan.image_size_px))
        with torch.no_grad():
            projection.weight.copy_(space.weight)
            projection.bias.copy_(space.bias)
        self.model.visual.to(memory_format=torch.channels_last)
        visual = list(self.model.visual.parameters())
        locked = {id(p) for p in visual}
        text = [p for p in self.model.parameters() if id(p) not in locked]
        self.optimizers = {"image": self._adamw(visual, plan.image_lr), "text": self._adamw(text, plan.text_lr)}
        self.embeddings: dict[str, Tensor] | None = None

    def _adamw(self, parameters: list[nn.Parameter], peak: float) -> torch.optim.AdamW:
        decayed, plain = ([p for p in parameters if (p.ndim >= 2) is decays] for decays in (True, False))
        groups = [{"params": decayed, "weight_decay": self.plan.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))

    def step(self, step: int) -> dict[str, float]:
        """Do update `step` (0-based, counted over both phases) and return its losses."""
        plan = self.plan
        if step < plan.image_steps:
            phase, within, steps, peak = "image", step, plan.image_steps, plan.image_lr
        else:
            phase, within, steps, peak = "text", step - plan.image_steps, plan.text_steps, plan.text_lr
        optimizer, rng = self.optimizers[phase], np.random.default_rng([plan.seed, 7, step])
        for group in optimizer.param_groups:
            group["lr"] = peak * warmup_cosine(within, steps, plan.warmup_steps)
        loss, figures = self._image_loss(within, rng) if phase == "image" else self._text_loss(within, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        return {"loss": loss.item(), **figures}

    def _image_loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        views, targets = [], []
        for stream, name in enumerate(SOURCES):
            source = self.sources[name]
            indices = epoch_indices(len(source.images), self.plan.image_batch[name], step, self.plan.seed, stream)
            views.append(augment(source.images[indices], self.plan.image_size_px, self.plan.min_crop_area, rng))
            targets.append(self.targets[name][indices])
        pixels = torch.cat(views).contiguous(memory_format=torch.channels_last)
        embeddings = F.normalize(self.model.visual.train()(pixels), dim=-1)
        return (1 - (embeddings * torch.cat(targets)).sum(-1)).mean(), {}

    def _text_loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        plan = self.plan
        if self.embeddings is None:
            path = self.run.path / "embeddings.safetensors"
            encoded = encode_sources(self.model.visual.eval(), self.sources, plan.image_size_px, path)
            self.embeddings = {name: F.normalize(rows, dim=-1) for name, rows in encoded.items()}
        # Objects are few and tiles many: a third of the named images are objects.
        named, labels = [], []
        for stream, name, batch in (
            (0, "tiles", 2 * plan.text_batch_named // 3),
            (1, "objects", plan.text_batch_named // 3),
        ):
            indices = epoch_indices(len(self.sources[name].labels), batch, step, plan.seed, stream)
            named.append(self.embeddings[name][indices])
            labels.append(self.sources[name].labels[indices])
        images, label = torch.cat(named), torch.cat(labels)
        scenes = epoch_indices(len(self.embeddings["scenes"]), plan.text_batch_captions, step, plan.seed, 2)
        tokens = torch.cat([self.texts.class_prompts(rng), self.texts.scene_captions(scenes, rng)])
        texts = F.normalize(self.model.encode_text(tokens), dim=-1)
        class_texts, captions = texts[: -len(scenes)], texts[-len(scenes) :]
        scale = self.model.logit_scale.clamp(max=math.log(100)).exp()
        scene_images = self.embeddings["scenes"][scenes]
        everything = torch.cat([scene_images, images])
        # Texts look for their images among all of them, named or captioned: else some images end up near every text.
        logits = scale * images @ class_texts.T
        class_loss = F.cross_entropy(logits, label, label_smoothing=plan.label_smoothing)
        present = label.unique()
        wanted = torch.cat([torch.zeros(len(present), len(scenes)), (label == present[:, None]).float()], dim=1)
        by_name = F.cross_entropy(scale * class_texts[present] @ everything.T, wanted / wanted.sum(1, keepdim=True))
        target = torch.arange(len(scenes))
        by_scene = F.cross_entropy(scale * scene_images @ captions.T, target)
        by_caption = F.cross_entropy(scale * captions @ everything.T, target)
        caption_loss = (by_scene + by_caption) / 2
        accuracy = logits.argmax(1).eq(label).float().mean().item()
        figures = {"class_loss": class_loss.item(), "caption_loss": caption_loss.item(), "class_accuracy": accuracy}
        return class_loss + plan.name_weight * by_name + plan.caption_weight * caption_loss, figures

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name."""
        flat = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for phase, optimizer in self.optimizers.items():
            flat |= {f"{phase}.{name}": tensor for name, tensor in adam_tensors(optimizer).items()}
        return flat

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` took out."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.model.load_state_dict(under("model."))
        for phase, optimizer in self.optimizers.items():
            restore_adam(optimizer, under(f"{phase}."))

    def export(self, folder: Path) -> None:
        """Write the model as open_clip's `local-dir:` format: fp16 safetensors and open_clip_config.json.

        Rows of the token embedding that no training text used hold nothing but their random start: they are written
        as zeros, so that an unknown word says nothing rather than something arbitrary.
        """
        state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        unused = torch.ones(len(state["token_embedding.weight"]), dtype=torch.bool)
        unused[self.texts.used_tokens()] = False
        state["token_embedding.weight"][unused] = 0
        size_px = self.plan.image_size_px
        spec = PreprocessSpec(size_px, size_px, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        write_open_clip_folder(folder, model_config(self.plan), spec, state, torch.float16)


def pretrain(
    plan: PretrainPlan, data: Path, run_path: Path, stop_after: int | None = None
) -> Iterator[tuple[int, dict[str, float]]]:
    """Run or resume a pretraining; yields `(steps done, losses)` after each update.

    Args:
        data: the folder with train/ and weights/.
        run_path: run directory; holds the checkpoint and, at the end, the encoder in `export/`.
        stop_after: leave after this many steps of the whole plan, with a checkpoint.

    Raises:
        DataMissing, CheckpointError, RunError: see there.
    """
    run = RunDirectory(run_path, asdict(plan))
    training = Pretraining(plan, data, run)
    start, checkpoint = 0, run.load_checkpoint()
    if checkpoint is not None:
        tensors, state = checkpoint
        training.restore(tensors)
        start = state["step"]
        run.log(event="resumed", step=start)
    last = min(plan.steps, stop_after or plan.steps)
    for step in range(start, last):
        began = time.perf_counter()
        losses = training.step(step)
        done = step + 1
        if done % plan.log_every == 0:
            run.log(event="step", step=done, step_s=round(time.perf_counter() - began, 3), **losses)
        if done % plan.checkpoint_every == 0 or done in (last, plan.image_steps):
            run.save_checkpoint(training.tensors(), {"step": done})
        yield done, losses
    if last == plan.steps:
        training.export(run.path / "export")
        run.log(event="exported")
