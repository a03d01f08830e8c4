"""A fine-tuning step against the bare network: what the loop costs beyond the forwards and backwards it cannot avoid.

    python benchmarks/finetune_step.py [--encoder bundled/clean] [--batch 32] [--steps 3] [--json FILE]

A step with ten attack steps is 11 forwards and 11 backwards of the trained network. The bare rate is measured in the
same run, on the same images and alternating with the steps: ten forwards with the gradient of the pixels, in eval mode,
and one with the gradient of the weights, in train mode (`bare`), or eleven with both gradients (`bare_full`). A step
also runs the original encoder once, draws starts, projects, reads and decodes its images, and updates the weights.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from offline.finetune.loop import Finetuning
from offline.finetune.plan import FinetunePlan, SourcePlan
from perception.testing import synthetic_image

ATTACK_STEPS = 10


def bare(training: Finetuning, pixels: Tensor, full: bool) -> float:
    """Seconds of the network's own work for one step on `pixels` (b, 3, h, w)."""
    tower = training.student
    began = time.perf_counter()
    for _ in range(ATTACK_STEPS):
        tower.eval().visual.requires_grad_(full)
        tower(pixels.clone().requires_grad_(True)).square().sum().backward()
    tower.train().visual.requires_grad_(True)
    tower(pixels.clone().requires_grad_(full)).square().sum().backward()
    if pixels.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    training.optimizer.zero_grad(set_to_none=True)
    return seconds


def main() -> None:
    """Measure, print the ratios and write JSON."""
    parser = argparse.ArgumentParser(description="a fine-tuning step against the bare network")
    parser.add_argument("--encoder", default="bundled/clean")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(64):
            synthetic_image(i, (256, 256)).save(Path(folder) / f"{i:02}.jpg", quality=90)
        plan = FinetunePlan(
            encoder=options.encoder, method="fare", train=(SourcePlan("folder", (folder,)),), steps=options.steps + 1,
            warmup_steps=0, batch_size=options.batch, attack_steps=ATTACK_STEPS, attack_chunk=options.chunk,
        )  # fmt: skip
        training = Finetuning(plan, Path(folder), Accelerator())
        size = training.original.preprocess.size_px
        pixels = torch.rand(options.batch, 3, size, size, device=training.accelerator.device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        times: dict[str, list[float]] = {"step": [], "bare": [], "bare_full": []}
        began = time.perf_counter()
        for number, batch in enumerate(training.reader().stream(0, plan.steps, 0)):
            training.step(number, batch)
            times["step"].append(time.perf_counter() - began)
            for name, full in (("bare", False), ("bare_full", True)):
                times[name].append(bare(training, pixels, full))
            began = time.perf_counter()
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first warms up
    result = {
        "encoder": options.encoder, "batch": options.batch, "device": str(training.accelerator.device),
        "machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
        "folded_batch_norm": training.attacked is not training.student,
        **{f"{name}_s": round(value, 4) for name, value in seconds.items()},
        "step_throughput_of_bare": round(seconds["bare"] / seconds["step"], 3),
        "step_throughput_of_bare_full": round(seconds["bare_full"] / seconds["step"], 3),
    }  # fmt: skip
    for name, value in result.items():
        print(f"{name:30} {value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
