"""Layers whose parameters carry optimizer tags: matrices decay, biases do not."""

from __future__ import annotations

from torch import Tensor, nn

from nexus_scale.kernels.linear import linear
from nexus_scale.models.layers.tags import KeepsTags, tag_param


class Linear(KeepsTags, nn.Linear):
    """y = x W^T + b over the last dim."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, lr_multiplier: float = 1.0):
        super().__init__(in_features, out_features, bias=bias)
        tag_param(self.weight, decay=True, lr_multiplier=lr_multiplier)
        if bias:
            tag_param(self.bias, decay=False, lr_multiplier=lr_multiplier)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def reset_parameters(self) -> None:
        """Nothing: networks initialise themselves in `init_weights`, once."""


class Conv2d(KeepsTags, nn.Conv2d):
    """A convolution that keeps height and width (odd kernel, zero padding), or divides them by its stride, rounded up.

    `padding`: zeros on each side; half the kernel unless given.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
    ):
        assert kernel_size % 2 == 1, kernel_size
        around = kernel_size // 2 if padding is None else padding
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=around)
        tag_param(self.weight, decay=True)
        assert self.bias is not None
        tag_param(self.bias, decay=False)

    def reset_parameters(self) -> None:
        """Nothing: networks initialise themselves in `init_weights`, once."""
