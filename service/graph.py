"""The encoder as one graph: a batch goes through it without Python, and so without Python's lock.

PyTorch takes the lock again after every operation. While a service answers hundreds of requests beside it, an encoder
of three hundred operations waits for it three hundred times a batch (decision 012 has figures). A graph runs the same
kernels on the same weights; it is used only where its embeddings equal the encoder's own to the last bit.
"""

import logging
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perception.encoder import unit_embeddings
from perception.encoders.tower import PRECISIONS, TowerEncoder
from service.engine import ServingEncoder

_log = logging.getLogger("hardlook.graph")


class GraphEncoder:
    """A tower encoder that runs as a graph; everything else is the tower's.

    Args:
        tower: of which the weights are shared.
        graph: (b, 3, h, w) pixels in [0, 1] -> (b, d) features.
    """

    def __init__(self, tower: TowerEncoder, graph: torch.jit.ScriptModule) -> None:
        self._tower, self._graph = tower, graph
        self.name, self.dim, self.fingerprint = tower.name, tower.dim, tower.fingerprint
        self.preprocess, self.precision, self.device = tower.preprocess, tower.precision, tower.device
        self.lipschitz, self.bias_dim = tower.lipschitz, tower.bias_dim

    @property
    def tower(self) -> TowerEncoder:
        """The encoder itself, of the same weights, which is differentiable."""
        return self._tower

    @property
    def text(self) -> object:
        """See `TowerEncoder.text`; its errors are passed on."""
        return self._tower.text

    def features(self, pixels: Tensor) -> Tensor:
        """See `TowerEncoder.features`; not differentiable."""
        # Otherwise the first batches of each size would be used to find other kernels, with other bits.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            found: Tensor = self._graph(pixels)
        return found

    def encode(self, pixels: Tensor) -> Tensor:
        """See `perception.encoder.Encoder.encode`; not differentiable."""
        return unit_embeddings(self.features(pixels))


class _Features(nn.Module):
    """What `TowerEncoder.features` computes, without the rest of an encoder, of which a tracer asks too much."""

    mean: Tensor
    std: Tensor

    def __init__(self, tower: TowerEncoder) -> None:
        super().__init__()
        self.visual, self.dtype = tower.visual, PRECISIONS[tower.precision]
        self.register_buffer("mean", tower.get_buffer("mean"))
        self.register_buffer("std", tower.get_buffer("std"))

    def forward(self, pixels: Tensor) -> Tensor:
        """(b, 3, h, w) in [0, 1] -> (b, d) float32."""
        features: Tensor = self.visual(((pixels.to(self.mean.device) - self.mean) / self.std).to(self.dtype))
        return features.float()


def as_graph(encoder: ServingEncoder, batches: Sequence[int]) -> ServingEncoder:
    """The same encoder as a graph; the encoder itself, and a line in the log, where that is not possible.

    Args:
        encoder: any; only towers have a graph.
        batches: sizes of batches for which the graph must give the same bits.
    """
    if not isinstance(encoder, TowerEncoder):
        return encoder
    size_px = encoder.preprocess.size_px
    generator = torch.Generator().manual_seed(0)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # Deprecated, and without a successor that runs outside Python and needs no compiler at the start.
            warnings.simplefilter("ignore")
            example = torch.rand(2, 3, size_px, size_px, generator=generator)
            graph = torch.jit.trace(_Features(encoder), example, check_trace=False)
        found = GraphEncoder(encoder, graph)
        with torch.inference_mode():
            for batch in sorted(set(batches)):
                pixels = torch.rand(batch, 3, size_px, size_px, generator=generator)
                if not torch.equal(found.encode(pixels), encoder.encode(pixels)):
                    _log.warning("the graph of %s differs from it, and is not used", encoder.name)
                    return encoder
    except Exception as error:  # whatever an architecture does that a graph cannot hold
        _log.warning("no graph of %s: %s", encoder.name, str(error).partition("\n")[0][:200])
        return encoder
    return found
