"""LPIPS v0.1 on AlexNet, and R-LPIPS, as encoders: the metric flattened to a vector (methods 8.2).

The squared L2 distance between the `features` of two images is their LPIPS distance. Reads the published files and
folders of its own. Knows nothing of search: pools compare unit embeddings, which is not the LPIPS distance.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from perception.encoder import Precision
from perception.encoders.tower import TowerEncoder
from perception.encoders.weights import first_weights, load_strictly, read_json, read_state_dict, write_checkpoint
from perception.errors import CheckpointError
from perception.preprocess import PreprocessSpec

CONFIG_NAME = "lpips_config.json"
WEIGHT_NAMES = ("lpips.safetensors",)
ARCHITECTURES = ("lpips-alex",)
CHANNELS = (64, 192, 384, 256, 256)
"""Of the five layers that are compared."""
_UNIT_EPS = 1e-10
# Published: (x * 2 - 1 - shift) / scale of pixels in [0, 1], so that (1 + shift) / 2 is the mean, scale / 2 the std.
_SCALING = {"scaling_layer.shift": (-0.030, -0.088, -0.188), "scaling_layer.scale": (0.458, 0.448, 0.450)}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Indices in torchvision's `alexnet().features`: of each convolution, and of the ReLU whose output is compared.
_CONVOLUTIONS, _COMPARED = (0, 3, 6, 8, 10), (1, 4, 7, 9, 11)
_WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
# Published names, and the sizes below which AlexNet's windows do not fit.
_TRUNK_KEY = re.compile(r"(?:net\.slice[1-5]|features)\.(\d+)\.(weight|bias)")
_LINEAR_KEY = re.compile(r"(?:lin|lins\.)([0-4])\.model\.[01]\.weight")  # 0 where it was built without dropout
_SMALLEST_PX = 31


class LpipsNetwork(nn.Module):
    """AlexNet's convolutional layers, each position scaled to unit norm and weighted by channel, flattened.

    Attributes:
        size_px: side of the pixels that it takes.
        trunk: named as torchvision's `alexnet().features`.
        linear: five tensors (c,), the weights w_c of LPIPS; those below 0 count as 0, to which LPIPS' training clamps.
    """

    def __init__(self, size_px: int) -> None:
        """Random trunk, from torch's global generator, and uniform weights.

        Raises:
            ValueError: images of fewer than 31 px leave the last layer nothing.
        """
        super().__init__()
        if size_px < _SMALLEST_PX:
            raise ValueError(f"size_px must be at least {_SMALLEST_PX}, got {size_px}")
        self.size_px = size_px
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, kernel_size=3, padding=1), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.linear = nn.ParameterList([nn.Parameter(torch.full((c,), 1 / c)) for c in CHANNELS])

    @property
    def dim(self) -> int:
        """d, the length of an embedding: 484,992 at 224 px."""
        first = (self.size_px - 7) // 4 + 1
        second = (first - 3) // 2 + 1
        third = (second - 3) // 2 + 1
        return sum(c * side**2 for c, side in zip(CHANNELS, (first, second, third, third, third), strict=True))

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed a batch.

        Args:
            pixels: (b, 3, s, s) with s = `size_px`, normalised.

        Returns:
            (b, d), at least float32: sqrt(w_c / (h w)) times the unit features, layer after layer.

        Raises:
            ValueError: pixels of another shape.
        """
        if tuple(pixels.shape[1:]) != (3, self.size_px, self.size_px):
            raise ValueError(f"pixels must be (b, 3, {self.size_px}, {self.size_px}), got {tuple(pixels.shape)}")
        layers: list[Tensor] = []
        x = pixels
        for i, module in enumerate(self.trunk):
            x = module(x)
            if i in _COMPARED:
                layers.append(self._weighted_units(x, self.linear[len(layers)]))
        return torch.cat(layers, dim=1)

    @staticmethod
    def _weighted_units(features: Tensor, weights: Tensor) -> Tensor:
        """(b, c, h, w) features -> (b, c * h * w)."""
        wide = features if features.dtype == torch.float64 else features.float()
        # Unlike the square root of a sum, its gradient at 0 is 0: a position where no channel fires is common.
        norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        positive = weights > 0
        area = features.shape[2] * features.shape[3]
        roots = torch.where(positive, (torch.where(positive, weights, 1.0).to(wide.dtype) / area).sqrt(), 0.0)
        weighted: Tensor = wide * (roots.view(-1, 1, 1) / (norms + _UNIT_EPS))
        return weighted.flatten(1)


class LpipsEncoder(TowerEncoder):
    """LPIPS or R-LPIPS in service; it has no text tower.

    `encode` scales `features` to unit norm for pools, which alters the order of neighbours a little: the norm of
    `features` differs from image to image. Embeddings are long (484,992 at 224 px: 1.9 MB an image, 19 GB for 10,000),
    so a pool in FAISS is possible and dear; the metric is for benchmarks, which compare `features` of few images.
    """

    metric: ClassVar[Literal["cosine", "l2"]] = "l2"

    def __init__(self, name: str, parts: "LpipsParts", precision: Precision, device: str) -> None:
        network = parts.build_visual()
        super().__init__(
            name,
            network,
            architecture={"family": "lpips", "trunk": "alexnet"},
            dim=network.dim,
            preprocess=parts.preprocess,
            precision=precision,
            device=device,
        )

    def export(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write lpips_config.json, and lpips.safetensors in the published names; see `TowerEncoder.export`.

        Weights w_c below 0, to which training here may lead, are written as 0, as which they count.
        """
        own, state = self.visual.state_dict(), {}
        for layer, index in enumerate(_CONVOLUTIONS):
            for kind in ("weight", "bias"):
                state[f"net.slice{layer + 1}.{index}.{kind}"] = own[f"trunk.{index}.{kind}"]
            state[f"lin{layer}.model.1.weight"] = own[f"linear.{layer}"].clamp(min=0).view(1, -1, 1, 1)
        table = {"architecture": ARCHITECTURES[0], "preprocess": self.preprocess.as_dict()}
        write_checkpoint(folder, (CONFIG_NAME, table), (WEIGHT_NAMES[0], state), dtype)


@dataclass(frozen=True)
class LpipsParts:
    """A checkpoint taken apart.

    Attributes:
        preprocess: how images become pixels; `size_px` decides the length of an embedding.
        visual_state: the network's state dict.
        origin: path or id, for messages.
    """

    preprocess: PreprocessSpec
    visual_state: Mapping[str, Tensor]
    origin: str

    def __deepcopy__(self, memo: dict[int, Any]) -> "LpipsParts":
        """Itself: it is frozen, and nothing writes to its tensors."""
        return self

    def build(self, name: str, precision: Precision, device: str) -> LpipsEncoder:
        """Assemble the encoder; see `perception.load_encoder`.

        Raises:
            CheckpointError: see `build_visual`.
        """
        return LpipsEncoder(name, self, precision, device)

    def build_visual(self) -> LpipsNetwork:
        """Build the network and load it strictly, in fp32.

        Raises:
            CheckpointError: names or shapes that do not fit, a negative weight w_c, or images that are too small.
        """
        try:
            network = LpipsNetwork(self.preprocess.size_px)
        except ValueError as error:
            raise CheckpointError(f"{self.origin}: {error}") from error
        load_strictly(network, self.visual_state, f"{self.origin}: visual tower")
        for layer, weights in enumerate(network.linear):
            # Training clamps them to >= 0. With a negative one there is no vector whose distances are the metric's.
            least = float(weights.detach().min())
            if least < 0:
                raise CheckpointError(f"{self.origin}: linear layer {layer} must have weights >= 0, got {least:g}")
        return network


def read_folder(folder: Path, preprocess: PreprocessSpec | None = None) -> LpipsParts:
    """Read what `LpipsEncoder.export` wrote.

    Args:
        folder: holds lpips_config.json and lpips.safetensors.
        preprocess: overrides what the configuration says.

    Raises:
        CheckpointError: a file is absent or corrupt, or the configuration is not understood.
    """
    path, table = folder / CONFIG_NAME, read_json(folder / CONFIG_NAME)
    if table.keys() != {"architecture", "preprocess"}:
        raise CheckpointError(f"{path}: expected 'architecture' and 'preprocess', got {', '.join(sorted(table))}")
    _require_architecture(table["architecture"])
    try:
        own: Mapping[str, Any] = table["preprocess"]
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in own.items()}
        spec = preprocess or PreprocessSpec(**fields)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: preprocessing not understood: {error}") from error
    return LpipsParts(spec, _network_state([first_weights(folder, WEIGHT_NAMES)], str(folder)), str(folder))


def read_visual(architecture: str, path: Path, preprocess: PreprocessSpec | None = None) -> LpipsParts:
    """Read published weights.

    Args:
        architecture: 'lpips-alex'.
        path: the state dict of a whole LPIPS network, as R-LPIPS is published (`latest_net_linf_ref.pth`); or a folder
            of two files, since LPIPS publishes its linear layers alone: those (`alex.pth`, `lin0.model.1.weight` and so
            on), and the AlexNet of torchvision, whose `classifier.*` is left out.
        preprocess: overrides the default: see `published_preprocess`.

    Raises:
        CheckpointError: unknown architecture, half of a network, or two copies of a tensor that differ; see
            `read_state_dict`.
    """
    _require_architecture(architecture)
    files = sorted(p for p in path.iterdir() if p.suffix in _WEIGHT_FILES) if path.is_dir() else [path]
    if not files:
        raise CheckpointError(f"{path} holds no weight files ({', '.join(_WEIGHT_FILES)})")
    state = _network_state((read_state_dict(p) for p in files), str(path))
    for kind, prefix in (("an AlexNet trunk", "trunk."), ("linear layers", "linear.")):
        if not any(key.startswith(prefix) for key in state):
            raise CheckpointError(
                f"{path} holds no {kind.removeprefix('an ')}: name either the file of a whole LPIPS network, or a "
                "folder with LPIPS' linear layers and torchvision's AlexNet"
            )
    return LpipsParts(preprocess or published_preprocess(), state, str(path))


def published_preprocess(size_px: int = 224) -> PreprocessSpec:
    """The published evaluation's: a resize that ignores the aspect ratio, and LPIPS' own scaling (methods 1.3, 8.2)."""
    return PreprocessSpec(size_px, size_px, "squash", "bicubic", mean=_MEAN, std=_STD)


def _require_architecture(architecture: object) -> None:
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"no LPIPS architecture {architecture!r}; there are {', '.join(ARCHITECTURES)}")


def _network_state(states: Iterable[Mapping[str, Tensor]], origin: str) -> dict[str, Tensor]:
    """Our names and shapes for published tensors, some of which a file holds twice."""
    network: dict[str, Tensor] = {}
    for key, tensor in (item for state in states for item in state.items()):
        if key.startswith("classifier."):
            continue
        if key in _SCALING:
            _require_scaling(key, tensor, origin)
            continue
        name, value = key, tensor
        if match := _TRUNK_KEY.fullmatch(key):
            name = f"trunk.{match[1]}.{match[2]}"
        elif match := _LINEAR_KEY.fullmatch(key):
            name = f"linear.{match[1]}"
            value = tensor.flatten() if tensor.ndim == 4 and tensor.numel() == tensor.shape[1] else tensor
        if name in network and not torch.equal(network[name], value):
            raise CheckpointError(f"{origin} holds two tensors that should be one: {name} and its copy {key} differ")
        network[name] = value
    return network


def _require_scaling(key: str, tensor: Tensor, origin: str) -> None:
    """Refuse another scaling than that of v0.1, which is part of the preprocessing here."""
    if tensor.numel() != 3 or not torch.allclose(tensor.flatten().float(), torch.tensor(_SCALING[key])):
        found = [round(float(v), 6) for v in tensor.flatten()[:4]]
        raise CheckpointError(f"{origin}: {key} must be {list(_SCALING[key])}, as in v0.1, got {found}")
