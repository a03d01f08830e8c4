"""Test help that ships with the product: small published pools, and settings of a service that answers from them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from indexer.contents import POOLS, Contents, Exemplar
from indexer.store import SnapshotStore
from perception.encoder import Encoder, encode_images
from perception.testing import synthetic_image
from service.settings import Settings


def toy_pools(per_pool: int = 3) -> dict[str, list[Image.Image]]:
    """Synthetic images by pool; image i of a pool has the id '<pool>-<i>' when published."""
    return {
        pool: [synthetic_image(100 * number + i) for i in range(per_pool)]
        for number, pool in enumerate(("safe", "buffer", "unsafe"))
    }


def publish(root: Path, encoder: Encoder, images: Mapping[str, Sequence[Image.Image]], collection: str = POOLS) -> str:
    """Encode images by label and publish them below `root` as a collection; returns the version."""
    exemplars = [
        Exemplar(f"{label}-{i}", label, source=f"synthetic/{label}/{i}.png", metadata={"seed": str(i)})
        for label, group in images.items()
        for i in range(len(group))
    ]
    embeddings = encode_images(encoder, [image for group in images.values() for image in group]).numpy()
    contents = Contents.arrange(collection, encoder.name, encoder.fingerprint, exemplars, embeddings)
    return SnapshotStore(root, collection).publish(contents)


def toy_settings(pools: Path, **changes: Any) -> Settings:
    """Settings for one small service in a test."""
    return Settings(**{"pools": pools, "decode_workers": 1, "pools_reload_s": 0.05, "port": 0, **changes})


def decode_processes(parent_pid: int) -> frozenset[int]:
    """Process ids of the decoding workers that a process has."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                command = (folder / "cmdline").read_bytes()
            except OSError:  # it ended meanwhile
                continue
            if parent == parent_pid and b"service.decode_worker" in command:
                found.add(int(folder.name))
    return frozenset(found)
