"""The ImageNet MobileNetV2 teacher: reads the published quantised `.tflite` file into a timm network.

Owns the mapping from TensorFlow Lite convolutions to timm's `mobilenetv2_100`. Knows nothing of losses or data.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perception.errors import CheckpointError

TEACHER_FEATURES = 1280


def _dequantise(values: np.ndarray[Any, Any], parameters: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Return `scale * (values - zero_point)` as float32 (per-tensor affine quantisation)."""
    if len(parameters["scales"]) != 1:
        raise CheckpointError("teacher: per-channel quantisation is not a layout this reader knows")
    scale, zero = float(parameters["scales"][0]), int(parameters["zero_points"][0])
    return ((values.astype(np.int64) - zero) * scale).astype(np.float32)


def read_tflite_convolutions(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Read every convolution of a quantised MobileNet `.tflite` in execution order.

    Returns:
        One `(weight, bias)` a convolution: weight `(out, in, kh, kw)` or `(channels, 1, kh, kw)` for depthwise, bias
        `(out,)`, both float32 and dequantised; batch normalisation is already folded in by the converter.

    Raises:
        CheckpointError: the file is absent, is not TensorFlow Lite, or the reader package is not installed.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise CheckpointError("the teacher needs the extra 'pretrain': pip install 'hardlook[pretrain]'") from error
    if not path.is_file():
        raise CheckpointError(f"teacher weights not found: {path}")
    try:
        interpreter = Interpreter(str(path), experimental_preserve_all_tensors=True)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"teacher weights unreadable: {path}: {error}") from error
    details = {d["index"]: d for d in interpreter.get_tensor_details()}

    def constant(index: int) -> np.ndarray[Any, Any]:
        return _dequantise(interpreter.get_tensor(index), details[index]["quantization_parameters"])

    convolutions = []
    for operation in interpreter._get_ops_details():
        if operation["op_name"] not in {"CONV_2D", "DEPTHWISE_CONV_2D"}:
            continue
        _, weight_index, bias_index = (int(i) for i in operation["inputs"])
        # Lite stores (out, kh, kw, in); a depthwise kernel is (1, kh, kw, channels).
        order = (0, 3, 1, 2) if operation["op_name"] == "CONV_2D" else (3, 0, 1, 2)
        weight = torch.from_numpy(constant(weight_index).transpose(order).copy())
        convolutions.append((weight, torch.from_numpy(constant(bias_index))))
    return convolutions


def load_teacher(path: Path) -> nn.Module:
    """Build timm's `mobilenetv2_100` (no classifier) from the published ImageNet weights.

    The network takes `(b, 3, h, w)` pixels scaled to [-1, 1] and returns `(b, 1280)` pooled features. Batch
    normalisation layers are left as a pure bias; `restore_batch_norm` turns them into trainable ones.

    Raises:
        CheckpointError: the file does not hold the convolutions of MobileNetV2 1.0.
    """
    import timm

    network: nn.Module = timm.create_model("mobilenetv2_100", num_classes=0, pad_type="same")
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    published = read_tflite_convolutions(path)[: len(layers)]
    if len(published) != len(layers):
        raise CheckpointError(f"teacher has {len(published)} convolutions, MobileNetV2 needs {len(layers)}: {path}")
    with torch.no_grad():
        for layer, norm, (weight, bias) in zip(layers, norms, published, strict=True):
            if layer.weight.shape != weight.shape:
                raise CheckpointError(f"teacher: kernel {tuple(weight.shape)}, expected {tuple(layer.weight.shape)}")
            layer.weight.copy_(weight)
            norm.weight.fill_(float(np.sqrt(1.0 + norm.eps)))
            norm.bias.copy_(bias)
    return network.eval()


@torch.no_grad()
def restore_batch_norm(network: nn.Module, pixels: Tensor) -> None:
    """Give folded batch normalisations the statistics of `pixels`, without changing what the network computes.

    Args:
        network: as `load_teacher` returns it.
        pixels: `(b, 3, h, w)` scaled to [-1, 1]; a few hundred images of the training set.
    """
    inputs: dict[nn.BatchNorm2d, Tensor] = {}
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    hooks = [m.register_forward_pre_hook(lambda module, args: inputs.__setitem__(module, args[0])) for m in norms]
    network(pixels)
    for hook in hooks:
        hook.remove()
    for norm in norms:
        values = inputs[norm]
        mean, var = values.mean(dim=(0, 2, 3)), values.var(dim=(0, 2, 3), unbiased=False)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        norm.weight.copy_(torch.sqrt(var + norm.eps))
        norm.bias.add_(mean)
