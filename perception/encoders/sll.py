"""SDP-based Lipschitz layers (SLL): residual layers that are 1-Lipschitz in L2 whatever their weights are.

Each layer is `x - 2 W^T diag(t) relu(W x + b)`, and `t` is computed from W so that `W W^T <= diag(t)^-1`, which makes
it 1-Lipschitz (methods 8.1). The bound is one of exact arithmetic: in float32 two nearby inputs may show a ratio above
1 by what rounding adds, and the TF32 convolutions of a GPU (`torch.backends.cudnn.allow_tf32`) add more. Knows nothing
of images or files.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of rows with a norm below 1e-8, whose `t` a gradient in float32 could not square. Any smaller `t` keeps the bound, so
# such a row does nothing: the published code does the same with rows that are exactly zero.
_SMALLEST_ROW_SUM = 1e-16
# Any positive q keeps the bound. Within these limits q_j / q_i stays finite in float32.
_LARGEST_LOG_Q = 30.0


class SllConv2d(nn.Module):
    """Convolutional SLL of stride 1 with zero padding; keeps the shape.

    Published layers hold a `q`, but in the code that trained them it cancels: `q` is 1 here, too (methods 8.1).

    Attributes:
        kernel: (inner, channels, k, k), k odd.
        bias: (inner,).
        q: (inner,) zeros, the logarithm of 1; a buffer that is there for the layout's sake.
    """

    def __init__(self, channels: int, inner_channels: int, kernel_size: int = 3) -> None:
        """Random weights, from torch's global generator.

        Raises:
            ValueError: a size is not positive, or `kernel_size` is even.
        """
        super().__init__()
        _require_positive(channels=channels, inner_channels=inner_channels, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.kernel = nn.Parameter(torch.empty(inner_channels, channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(inner_channels))
        self.register_buffer("q", torch.zeros(inner_channels))
        _initialise(self.kernel, self.bias)

    def scales(self) -> Tensor:
        """`t`: (inner,), at least float32; one over the sum of |K * K|, the autocorrelation, of each row.

        The sum bounds a row of `W W^T` at any position; zero padding only takes terms away.
        """
        kernel = _at_least_float32(self.kernel)
        # A product of matrices, not a convolution, which on a GPU would round `t` to TF32.
        size = int(kernel.shape[-1])  # under a tracer sizes are tensors
        shifted = F.unfold(kernel, size, padding=size - 1)
        autocorrelation = kernel.flatten(1) @ shifted
        return _inverse(autocorrelation.abs().sum(dim=(0, 2)))

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, h, w) -> the same shape."""
        padding = self.kernel.shape[-1] // 2
        inner = F.relu(F.conv2d(x, self.kernel, self.bias, padding=padding))
        scales = (2 * self.scales()).to(inner.dtype).view(-1, 1, 1)
        return x - F.conv_transpose2d(scales * inner, self.kernel, padding=padding)


class SllLinear(nn.Module):
    """Dense SLL; keeps the shape.

    Frozen or without gradients, `t` is kept from call to call, beside a copy of the weights it belongs to: a product of
    a large matrix with itself costs more than the layer. The copy is compared with the weights at every call, so a `t`
    of other weights is never used, however they were changed.

    Attributes:
        weight: (inner, features).
        bias: (inner,).
        q: (inner,), a logarithm; values beyond 30 count as 30, those below -30 as -30, which keeps the bound.
    """

    def __init__(self, features: int, inner_features: int) -> None:
        """Random weights, from torch's global generator; `q` starts as 1.

        Raises:
            ValueError: a size is not positive.
        """
        super().__init__()
        _require_positive(features=features, inner_features=inner_features)
        self.weight = nn.Parameter(torch.empty(inner_features, features))
        self.bias = nn.Parameter(torch.empty(inner_features))
        self.q = nn.Parameter(torch.zeros(inner_features))
        _initialise(self.weight, self.bias)
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    def scales(self) -> Tensor:
        """`t`: (inner,), at least float32; t_i = 1 / sum_j |W W^T|_ij q_j / q_i (methods 8.1)."""
        weight, q = _at_least_float32(self.weight), _at_least_float32(self.q).clamp(-_LARGEST_LOG_Q, _LARGEST_LOG_Q)
        ratios = (q - q[:, None]).exp()  # q_j / q_i at [i, j]
        return _inverse(((weight @ weight.T).abs() * ratios).sum(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, features) -> the same shape."""
        learns = torch.is_grad_enabled() and (self.weight.requires_grad or self.q.requires_grad)
        scales = self.scales() if learns else self._kept_scales()
        inner = F.relu(F.linear(x, self.weight, self.bias))
        return x - F.linear((2 * scales).to(inner.dtype) * inner, self.weight.T)

    def _kept_scales(self) -> Tensor:
        kept = self._kept  # one read and one write: other threads see a whole triple
        if kept is None or not _same(kept[0], self.weight) or not _same(kept[1], self.q):
            # What was made in inference mode could not take part in an attack's gradient later.
            with torch.inference_mode(False), torch.no_grad():
                self._kept = kept = (self.weight.clone(), self.q.clone(), self.scales().clone())
        return kept[2]


def _same(kept: Tensor, now: Tensor) -> bool:
    alike = (kept.device, kept.dtype, kept.shape) == (now.device, now.dtype, now.shape)
    return alike and torch.equal(kept, now)


def _inverse(row_sums: Tensor) -> Tensor:
    """1 / row_sums, and 0, with a gradient of 0, where a row is too small to have an inverse."""
    alive = row_sums > _SMALLEST_ROW_SUM
    return torch.where(alive, 1 / torch.where(alive, row_sums, 1.0), 0.0)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _initialise(weight: Tensor, bias: Tensor) -> None:
    nn.init.xavier_normal_(weight)
    bound = 1 / math.sqrt(weight[0].numel())
    nn.init.uniform_(bias, -bound, bound)


def _require_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")
