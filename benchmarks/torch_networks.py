"""The library's networks in PyTorch, block by block: the peer trains the same ones.

Blocks, their order and their parameters are those of ``fdg_jax.models.resnet`` and
``fdg_jax.models.wide_resnet``. ReLUs overwrite their input where autograd allows it.
"""

import re

import torch
from torch import nn
from torch.nn import functional as F

_BASIC, _BOTTLENECK = "basic", "bottleneck"
_LARGE = {
    18: ((2, 2, 2, 2), _BASIC),
    50: ((3, 4, 6, 3), _BOTTLENECK),
    101: ((3, 4, 23, 3), _BOTTLENECK),
}


def create(name: str, num_classes: int) -> list[nn.Module]:
    """Returns the blocks of a network, stem first and head last.

    Args:
        name: "resnet20", "wrn16_4", ...; as ``fdg_jax.models.create`` takes it.
        num_classes: number of logits.

    Raises:
        ValueError: the name is unknown.
    """
    if match := re.fullmatch(r"wrn(\d+)_(\d+)", name):
        depth, width = map(int, match.groups())
        if depth > 4 and depth % 6 == 4 and width > 0:
            return _wide_resnet(depth, width, num_classes)
    if match := re.fullmatch(r"resnet(\d+)", name):
        depth = int(match[1])
        if depth in _LARGE or (depth > 2 and depth % 6 == 2):
            return _resnet(depth, num_classes)
    raise ValueError(f"unknown network {name!r}; say resnet<depth> or wrn<depth>_<n>")


def _conv(in_channels, out_channels, size=3, stride=1, *, bias=False):
    padding = (size - 1) // 2
    return nn.Conv2d(in_channels, out_channels, size, stride, padding, bias=bias)


def _conv_norm(in_channels, out_channels, size=3, stride=1):
    conv = _conv(in_channels, out_channels, size, stride)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class Stem(nn.Module):
    """3x3 convolution, BatchNorm, ReLU."""

    def __init__(self, out_channels: int):
        super().__init__()
        self.layer = _conv_norm(3, out_channels)

    def forward(self, x):
        return F.relu(self.layer(x), inplace=True)


class PadShortcut(nn.Module):
    """Every stride-th pixel; new channels are zeros, half before and half after."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.padding = (out_channels - in_channels) // 2

    def forward(self, x):
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.padding, self.padding))


class ResidualBlock(nn.Module):
    """``relu(branch(x) + shortcut(x))``."""

    def __init__(self, in_channels: int, convs: list, projected: bool):
        """Builds the layers.

        Args:
            in_channels: channels of the input.
            convs: of the branch, each (kernel size, channels, stride).
            projected: whether a shortcut that changes shape is a 1x1 convolution.
        """
        super().__init__()
        self.branch = nn.ModuleList()
        channels, total_stride = in_channels, 1
        for size, width, stride in convs:
            self.branch.append(_conv_norm(channels, width, size, stride))
            channels, total_stride = width, total_stride * stride
        if channels == in_channels and total_stride == 1:
            self.shortcut = nn.Identity()
        elif projected:
            self.shortcut = _conv_norm(in_channels, channels, 1, total_stride)
        else:
            self.shortcut = PadShortcut(in_channels, channels, total_stride)

    def forward(self, x):
        y = x
        for layer in self.branch[:-1]:
            y = F.relu(layer(y), inplace=True)
        return F.relu(self.branch[-1](y) + self.shortcut(x), inplace=True)


class WideBlock(nn.Module):
    """``branch(x) + shortcut(x)``, BatchNorm and ReLU before each convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, out_channels, bias=True)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv(out_channels, out_channels, stride=stride, bias=True)
        if in_channels == out_channels and stride == 1:
            self.shortcut = nn.Identity()
        else:
            self.shortcut = _conv(in_channels, out_channels, 1, stride, bias=True)

    def forward(self, x):
        y = self.conv1(F.relu(self.norm1(x), inplace=True))
        y = self.conv2(F.relu(self.norm2(y), inplace=True))
        return y + self.shortcut(x)


class Head(nn.Module):
    """Global average pooling, then a linear layer; BatchNorm and ReLU first in WRN."""

    def __init__(self, in_channels: int, num_classes: int, *, norm: bool):
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels) if norm else None
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, x):
        if self.norm is not None:
            x = F.relu(self.norm(x), inplace=True)
        logits = self.linear(x.mean((2, 3)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _wide_resnet(depth, width, num_classes):
    channels = 16
    blocks = [_conv(3, channels, bias=True)]
    for group in range(3):
        for position in range((depth - 4) // 6):
            stride = 2 if group > 0 and position == 0 else 1
            blocks.append(WideBlock(channels, 16 * width * 2**group, stride))
            channels = 16 * width * 2**group
    return [*blocks, Head(channels, num_classes, norm=True)]


def _resnet(depth, num_classes):
    channels, (counts, kind) = 64, _LARGE.get(depth, (None, _BASIC))
    if depth not in _LARGE:
        channels, counts = 16, 3 * ((depth - 2) // 6,)
    first_width = channels
    blocks = [Stem(channels)]
    for group, count in enumerate(counts):
        width = first_width * 2**group
        for position in range(count):
            stride = 2 if group > 0 and position == 0 else 1
            convs = [(3, width, stride), (3, width, 1)]
            if kind == _BOTTLENECK:
                convs = [(1, width, 1), (3, width, stride), (1, 4 * width, 1)]
            blocks.append(ResidualBlock(channels, convs, depth in _LARGE))
            channels = convs[-1][1]
    return [*blocks, Head(channels, num_classes, norm=False)]
