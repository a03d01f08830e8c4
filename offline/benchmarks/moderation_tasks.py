"""Moderation tasks of chosen images: pools that are built here, queries, and what the grey-box attacker knows.

The judge is the one that serves: `offline.audit.moderation` with the 1-NN rule of the paper (methods 6.5 to 6.7).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from offline.audit.embeddings import encode_stream
from offline.audit.moderation import Decider, HeadDecider, ModerationTask, PoolsDecider
from offline.audit.plan import AuditPlan, SystemPlan
from offline.audit.run import Opener
from offline.audit.task import Item, Task
from offline.benchmarks.choices import Choice
from offline.benchmarks.suites import CHUNK, Chunk
from offline.errors import RunError
from perception.encoder import Encoder
from perception.encoders.tower import TowerEncoder
from perception.gallery import Gallery
from perception.heads import Head, load_head
from perception.verdict import DecisionPolicy, PoolLabel, VerdictLabel

GALLERIES = "pools"


@dataclass(frozen=True, eq=False)
class ModerationImages:
    """Which image plays which part; no image plays two.

    Attributes:
        pools: the exemplars.
        queries: by what is right; those that are attacked, where there is an attack.
        targets: by label, images that an attacker towards it knows.
    """

    pools: Mapping[PoolLabel, Choice]
    queries: Mapping[VerdictLabel, Choice]
    targets: Mapping[VerdictLabel, Choice]


def opener(images: ModerationImages, run: Path) -> Opener:
    """What opens the task for an audit; galleries are kept in `run`, so that a run goes on with the same bits."""

    def open_task(plan: AuditPlan, system: SystemPlan, encoder: TowerEncoder) -> tuple[Encoder, Task]:
        items = [item for label, choice in images.queries.items() for item in _items(choice, label, encoder)]
        targets = {label: _embeddings(choice, encoder) for label, choice in images.targets.items()}
        if system.head:
            head = load_head(Path(system.head))
            head.require_encoder(encoder)
            return encoder, ModerationTask(items, _head_decider(head, system, targets), targets)
        gallery = pool_gallery(encoder, images.pools, run / GALLERIES / f"{_file_name(system.name)}.safetensors")
        return encoder, ModerationTask(items, _pools_decider(gallery, plan.neighbors, len(items)), targets)

    return open_task


def chunks(images: ModerationImages, queries: Mapping[VerdictLabel, Choice], run: Path | None) -> list[Chunk]:
    """Queries for clean answers; each encoder's gallery is built once, and kept in `run` if there is one."""
    galleries: dict[str, Gallery] = {}

    def read(label: VerdictLabel, part: Choice, encoder: TowerEncoder) -> tuple[Encoder, Task]:
        if encoder.fingerprint not in galleries:
            path = run / GALLERIES / f"clean-{encoder.fingerprint[:16]}.safetensors" if run is not None else None
            galleries.clear()  # encoders come one after the other
            galleries[encoder.fingerprint] = pool_gallery(encoder, images.pools, path)
        items = list(_items(part, label, encoder))
        decider: Decider = _pools_decider(galleries[encoder.fingerprint], 1, len(items))
        return encoder, ModerationTask(items, decider, {})

    found = []
    for label, choice in queries.items():
        for start in range(0, len(choice), CHUNK):
            part = choice.part(start, start + CHUNK)
            found.append(Chunk(tuple((str(label), identity) for identity in part.ids), partial(read, label, part)))
    return found


def pool_gallery(encoder: TowerEncoder, pools: Mapping[PoolLabel, Choice], path: Path | None) -> Gallery:
    """Encode the exemplars, or read what an earlier session has kept.

    Raises:
        FingerprintMismatch: the file was made by another encoder.
        RunError: the file holds other exemplars.
        GalleryError: the file is damaged.
        NonFiniteEmbedding: an exemplar has no embedding.
    """
    ids = tuple(identity for choice in pools.values() for identity in choice.ids)
    if path is not None and path.exists():
        kept = Gallery.load(path)
        kept.require_encoder(encoder.fingerprint, f"gallery {path}")
        if kept.ids != ids:
            raise RunError(f"{path} holds other exemplars: choose another --run folder")
        return kept
    labels = tuple(str(label) for label, choice in pools.items() for _ in choice.ids)
    embeddings = torch.cat([_embeddings(choice, encoder) for choice in pools.values()])
    gallery = Gallery(ids, labels, embeddings.cpu().numpy(), encoder.fingerprint)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        gallery.save(path)
    return gallery


def _items(choice: Choice, label: VerdictLabel, encoder: Encoder) -> Iterable[Item]:
    for identity, image in choice.read():
        yield Item(str(label), identity, str(label), encoder.preprocess.apply(image))


def _embeddings(choice: Choice, encoder: Encoder) -> Tensor:
    return encode_stream(encoder, (encoder.preprocess.apply(image) for _, image in choice.read()))[0]


def _pools_decider(gallery: Gallery, neighbors: int, items: int) -> PoolsDecider:
    nothing: Sequence[Sequence[int]] = [()] * items
    return PoolsDecider(gallery, DecisionPolicy(), neighbors, nothing)


def _head_decider(head: Head, system: SystemPlan, targets: Mapping[VerdictLabel, Tensor]) -> HeadDecider:
    device = next(iter(targets.values())).device
    return HeadDecider(head.to(device), system.threshold)


def _file_name(name: str) -> str:
    return name.replace("/", "_")
