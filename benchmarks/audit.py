"""An audit against the loop that one would write first, and what folding and compaction each bring.

    python benchmarks/audit.py [--encoder bundled/clean] [--images 64] [--steps 200] [--eps 8/255 4/255] [--json FILE]

`ours` is the audit itself: images that are wrong when clean get no work, APGD goes through the folded twin, those that
are fooled leave the batch, the last step has no gradient, and the encoder that serves judges what came out. `unfolded`
is the same along the encoder's own gradients. `naive` is APGD as a plain loop in the encoder itself: all images, all
steps, a gradient each time, and the verdict of every step kept. All three have the same starts and the same criterion,
and take turns batch by batch, so that the ratios, of CPU seconds, come from one run.

The task is the moderation decision over the bundled demo pools without the buffer, both directions, with 16 targets;
half of the images are safe and held back from the pools, half are unsafe exemplars that are judged without their own
views. Where HARDLOOK_DATA has no images, drawn ones take their place, labelled as the encoder sees them.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offline.attacks.apgd import checkpoints
from offline.audit.moderation import ModerationTask, PoolsDecider, open_moderation
from offline.audit.plan import AuditPlan, ImagesPlan, SystemPlan, ThreatPlan
from offline.audit.record import AuditRecord, Setting
from offline.audit.run import SystemAudit
from offline.audit.task import Item, Task
from offline.data.archives import data_root
from offline.errors import DataMissing
from offline.seeds import mixed_seed
from offline.threat import parse_eps
from perception import load_encoder
from perception.encoder import Encoder
from perception.encoders.tower import TowerEncoder
from perception.gallery import Gallery
from perception.preprocess import to_pixels
from perception.testing import synthetic_image
from perception.verdict import VerdictLabel

POOLS = Path(__file__).parents[1] / "indexer" / "demo"
TARGETS = 16
MOMENTUM, RHO = 0.75, 0.75
WARM_UP = 3
VERDICTS = (VerdictLabel.SAFE, VerdictLabel.UNSAFE)


def main() -> None:
    """Measure, print the ratios and write JSON."""
    parser = argparse.ArgumentParser(description="an audit against the loop that one would write first")
    parser.add_argument("--encoder", default="bundled/clean", choices=[f"bundled/{p.name}" for p in POOLS.iterdir()])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--eps", type=parse_eps, nargs="+", default=[8 / 255])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    plan = plan_of(options)
    encoder = load_encoder(options.encoder)
    if not isinstance(encoder, TowerEncoder):
        raise SystemExit(f"{options.encoder} is no image tower, which is what can be folded")
    task, images = task_of(plan, encoder)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        ours, unfolded = (SystemAudit(plan, plan.systems[0], encoder, task, Path(folder), data_root()) for _ in "ab")
        unfolded.attacker.attacked = encoder
        warm_up(ours, encoder)
        for setting in plan.threats[0].settings(encoder.preprocess.size_px):
            result = {
                "encoder": options.encoder, "images": len(task.items), "of": images, "setting": str(setting),
                "batch": options.batch, "threads": torch.get_num_threads(),
                "machine": platform.processor() or platform.machine(), **measure(ours, unfolded, setting),
            }  # fmt: skip
            results.append(result)
            for name, value in result.items():
                print(f"{name:34} {value}", flush=True)
            print()
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def plan_of(options: argparse.Namespace) -> AuditPlan:
    """The audit: two classes, so that an image is either right or at its attacker's goal."""
    gallery = f"{options.encoder.removeprefix('bundled/')}/pools.safetensors"
    unsafe = options.images // 2
    return AuditPlan(
        task="moderation",
        systems=(SystemPlan(options.encoder.replace("/", " "), options.encoder, gallery=gallery,
                            pools=("safe", "unsafe")),),
        queries=(ImagesPlan("demo", label="safe", limit=options.images - unsafe),
                 ImagesPlan("demo-exemplars", label="unsafe", limit=unsafe, leave_one_out=True)),
        targets=(ImagesPlan("demo", label="safe", limit=TARGETS), ImagesPlan("demo", label="unsafe", limit=TARGETS)),
        threats=(ThreatPlan("linf", tuple(options.eps), options.steps),),
        attacks=("target-set",), square_queries=0, batch=options.batch,
    )  # fmt: skip


def task_of(plan: AuditPlan, encoder: Encoder) -> tuple[Task, str]:
    """The images and how they are judged, and where they come from."""
    try:
        return open_moderation(plan, plan.systems[0], encoder, data_root(), POOLS), "demo task"
    except DataMissing as error:
        print(f"{error}: measuring on drawn images")
    whole = Gallery.load(POOLS / plan.systems[0].gallery)
    whole.require_encoder(encoder.fingerprint)
    parts = [whole.subset(label) for label in VERDICTS]
    ids, labels = (tuple(value for part in parts for value in getattr(part, name)) for name in ("ids", "labels"))
    gallery = Gallery(ids, labels, np.concatenate([part.embeddings for part in parts]), whole.encoder_fingerprint)
    count = sum(images.limit for images in plan.queries)
    pixels = [encoder.preprocess.apply(synthetic_image(seed, (256, 256))) for seed in range(count)]
    decider = PoolsDecider(gallery, plan.systems[0].decision_policy, 1, [()] * count)
    with torch.no_grad():
        seen = [str(label) for label, _, _ in decider.decide(torch.arange(count), encoder.encode(to_pixels(pixels)))]
    items = [Item(label, f"{i}", label, image) for i, (label, image) in enumerate(zip(seen, pixels, strict=True))]
    targets = {label: torch.tensor(part.embeddings[:TARGETS]) for label, part in zip(VERDICTS, parts, strict=True)}
    return ModerationTask(items, decider, targets), "drawn images"


def warm_up(audit: SystemAudit, encoder: TowerEncoder) -> None:
    """Let both networks allocate what they need."""
    pixels = to_pixels([item.pixels for item in audit.task.items[: audit.plan.batch]])
    for network in (encoder, audit.attacker.attacked):
        for _ in range(WARM_UP):
            network.encode(pixels.clone().requires_grad_(True)).sum().backward()


def measure(ours: SystemAudit, unfolded: SystemAudit, setting: Setting) -> dict[str, float | int]:
    """Attack all images in three ways, in turns, and compare."""
    threat = ours.plan.threats[0]
    records: list[AuditRecord] = []

    def audited(rows: Tensor, number: int) -> list[bool]:
        found = ours.batch(rows, threat, setting, number)
        records.extend(found)
        return [record.robust is True for record in found]

    ways: dict[str, Callable[[Tensor, int], list[bool]]] = {
        "naive": lambda rows, number: naive(ours, rows, setting, number),
        "unfolded": lambda rows, number: [r.robust is True for r in unfolded.batch(rows, threat, setting, number)],
        "ours": audited,
    }
    seconds, robust = dict.fromkeys(ways, 0.0), {name: list[bool]() for name in ways}
    for number, rows in enumerate(ours.batches):
        for name, way in ways.items():
            began = time.process_time()  # which other work on the machine disturbs less than the time on the wall
            robust[name] += way(rows, number)
            seconds[name] += time.process_time() - began
    return figures(records, seconds, robust, setting.steps)


def figures(
    records: list[AuditRecord], seconds: dict[str, float], robust: dict[str, list[bool]], steps: int
) -> dict[str, float | int]:
    """The comparison, by name; `steps_saved_...` are shares of all images' steps."""
    count, attacked = len(records), [record for record in records if record.clean.correct]
    done = sum(round_.updates for record in attacked for round_ in record.rounds)
    rate = {name: count / value for name, value in seconds.items()}
    return {
        **{f"{name}_images_per_cpu_s": round(value, 3) for name, value in rate.items()},
        "ours_over_naive": round(rate["ours"] / rate["naive"], 3),
        "unfolded_over_naive": round(rate["unfolded"] / rate["naive"], 3),
        "folding_alone": round(rate["ours"] / rate["unfolded"], 3),
        "clean_accuracy": round(len(attacked) / count, 4),
        **{f"robust_accuracy_{name}": round(sum(values) / count, 4) for name, values in robust.items()},
        "same_verdict_as_naive": sum(a == b for a, b in zip(robust["ours"], robust["naive"], strict=True)),
        "steps_saved_wrong_when_clean": round(1 - len(attacked) / count, 4),
        "steps_saved_by_compaction": round((len(attacked) * steps - done) / (count * steps), 4),
    }


def naive(audit: SystemAudit, rows: Tensor, setting: Setting, number: int) -> list[bool]:
    """Which images are right when clean and after every step of a plain APGD, as AutoAttack counts."""
    task, encoder, threat = audit.task, audit.encoder, setting.threat
    pixels = to_pixels([task.items[row].pixels for row in rows.tolist()])
    with torch.no_grad():
        clean = encoder.encode(pixels)
    objective, fooled = task.objective("target-set", rows, clean), task.criterion(rows)
    assert fooled is not None  # it is a decision
    stands = ~fooled(clean)
    x = previous = starts(pixels, stands, setting, mixed_seed(audit.plan.seed, number, 0, bits=32))
    step = torch.full((len(pixels), 1, 1, 1), 2 * setting.eps)
    best, best_value, best_gradient = x, torch.full((len(pixels),), -torch.inf), torch.zeros_like(x)
    value, gradient = best_value, best_gradient
    rises, reduced, at_check = torch.zeros(len(pixels)), torch.ones(len(pixels), dtype=torch.bool), best_value
    checks = dict(checkpoints(setting.steps))
    for update in range(setting.steps + 1):
        if update:
            a = 1.0 if update == 1 else MOMENTUM
            ahead = threat.project(x + step * gradient.sign(), pixels)
            x, previous = threat.project(x + a * (ahead - x) + (1 - a) * (x - previous), pixels), x
        at = x.detach().requires_grad_(True)
        embeddings = encoder.encode(at)
        values = objective(embeddings)
        (gradient,) = torch.autograd.grad(values.sum(), at)
        stands &= ~fooled(embeddings.detach())
        rises, value = rises + (values.detach() > value), values.detach()
        better = value > best_value
        best, best_gradient = (torch.where(better.view(-1, 1, 1, 1), new, old)
                               for new, old in ((x, best), (gradient, best_gradient)))  # fmt: skip
        best_value = best_value.maximum(value)
        if not update:
            rises, at_check = torch.zeros(len(pixels)), value
        if update in checks:
            stalled = (rises <= RHO * checks[update]) | (~reduced & (at_check >= best_value))
            rises, reduced, at_check = torch.zeros(len(pixels)), stalled, best_value
            there = stalled.view(-1, 1, 1, 1)
            step = torch.where(there, step / 2, step)
            x, gradient = torch.where(there, best, x), torch.where(there, best_gradient, gradient)
    return list(map(bool, stands))


def starts(pixels: Tensor, right: Tensor, setting: Setting, seed: int) -> Tensor:
    """The audit's starts for the images that are right when clean, others for the rest."""
    drawn = setting.threat.boundary_start(pixels, torch.Generator().manual_seed(0))
    drawn[right] = setting.threat.boundary_start(pixels[right], torch.Generator().manual_seed(seed))
    return drawn


if __name__ == "__main__":
    main()
