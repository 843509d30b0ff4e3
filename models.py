"""Classifiers: the teachers and students of the three papers, for 32 x 32 images.

    net = build("lenet5", num_classes=10, channels=1)
    logits = net(x)                                   # x (B, C, 32, 32) -> (B, K)
    logits, features = net(x, return_features=True)   # features (B, D): what the last layer reads

Every network is a `Classifier`: `penultimate(x)` is its body, `classifier` its last linear layer, and `split(layer)` gives
the way from the outputs of an inner layer to the logits.
The LeNets and AlexNets are those of the code that DAFL and ZSKD published [C]; test_dfkd.py holds the parameter counts.

References
    LeNet-5        LeCun et al. 1998, with the widths of DAFL's code     https://arxiv.org/abs/1904.01186
    AlexNet        Krizhevsky et al. 2012, as ZSKD's code adapts it      https://arxiv.org/abs/1905.08114
    ResNet         He et al. 2016, the CIFAR form                        https://arxiv.org/abs/1512.03385
    WRN-d-k        Zagoruyko & Komodakis 2016                            https://arxiv.org/abs/1605.07146
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

NAMES = ("lenet5", "lenet5_half", "alexnet", "alexnet_half", "resnet18", "resnet34", "wrn-40-2", "wrn-16-1")


class Classifier(nn.Module):
    """A body, `penultimate(x)`, and a last linear layer, `classifier`."""

    def forward(self, x, return_features=False):
        features = self.penultimate(x).float()  # (B, D)
        with torch.autocast(x.device.type, enabled=False):  # logits are float32 whatever the body computes in
            logits = self.classifier(features)  # (B, K)
        return (logits, features) if return_features else logits

    def split(self, layer):
        """A linear layer, and the rest of the network: the function from its outputs (B, D) to the logits (B, K).

        `layer` is "logits", the last layer, or "fc2", the last but one, for networks that have such a layer.
        """
        if layer != "logits":
            raise ValueError(f"{type(self).__name__} has no layer '{layer}' whose outputs could be modelled, only 'logits'")
        return self.classifier, nn.Identity()


# ---------------------------------------------------------------- LeNet-5


class LeNet5(Classifier):
    """LeNet-5 with widths (6, 16, 120, 84), or half of them; ReLU and max pooling."""

    def __init__(self, widths, num_classes, channels):
        super().__init__()
        a, b, c, d = widths
        self.conv1 = nn.Conv2d(channels, a, 5)
        self.conv2 = nn.Conv2d(a, b, 5)
        self.conv3 = nn.Conv2d(b, c, 5)
        self.fc = nn.Linear(c, d)
        self.classifier = nn.Linear(d, num_classes)

    def penultimate(self, x):
        x = F.max_pool2d(self.conv1(x), 2).relu()  # (B, 6, 14, 14); pooling first: relu and max commute, 4x less to do
        x = F.max_pool2d(self.conv2(x), 2).relu()  # (B, 16, 5, 5)
        x = self.conv3(x).relu().flatten(1)  # (B, 120)
        return self.fc(x).relu()  # (B, 84)

    def split(self, layer):
        return (self.fc, nn.Sequential(nn.ReLU(), self.classifier)) if layer == "fc2" else super().split(layer)


# ---------------------------------------------------------------- AlexNet


class AlexNet(Classifier):
    """AlexNet for 32 x 32 images with ZSKD's widths (48, 128, 192, 192, 128, 512, 256), or half of them."""

    def __init__(self, widths, num_classes, channels):
        super().__init__()
        a, b, c, d, e, f, g = widths

        def pool(width):
            return nn.MaxPool2d(3, 2), nn.BatchNorm2d(width)

        self.body = nn.Sequential(
            *(nn.Conv2d(channels, a, 5, padding=2), nn.ReLU(), nn.LocalResponseNorm(5), *pool(a)),  # (B, 48, 15, 15)
            *(nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), nn.LocalResponseNorm(5), *pool(b)),  # (B, 128, 7, 7)
            *(nn.Conv2d(b, c, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(c)),
            *(nn.Conv2d(c, d, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(d)),
            *(nn.Conv2d(d, e, 3, padding=1), nn.ReLU(), *pool(e)),  # (B, 128, 3, 3)
            nn.Flatten(),
            *(nn.Linear(e * 9, f), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(f)),
            *(nn.Linear(f, g), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(g)),
        )
        self.classifier = nn.Linear(g, num_classes)

    def penultimate(self, x):
        return self.body(x)  # (B, 256)

    def split(self, layer):
        return (self.body[-4], nn.Sequential(*self.body[-3:], self.classifier)) if layer == "fc2" else super().split(layer)


# ---------------------------------------------------------------- ResNet and WRN


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, each followed by BatchNorm, and a shortcut."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(out)) + self.shortcut(x)).relu()


class PreActivationBlock(nn.Module):
    """WRN's block: BatchNorm and ReLU come before each convolution; a widening shortcut starts after the first ReLU."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x):
        out = self.bn1(x).relu()
        residual = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(self.bn2(self.conv1(out)).relu()) + residual


def stages(block, inputs, widths, depths):
    """One group of blocks per width, halving the resolution at the start of every group but the first."""
    blocks = []
    for i, (width, depth) in enumerate(zip(widths, depths)):
        for j in range(depth):
            blocks.append(block(inputs, width, 2 if i and j == 0 else 1))
            inputs = width
    return nn.Sequential(*blocks)


class ResNet(Classifier):
    """ResNet for small images: 3 x 3 stem, no max pooling. depths (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) ResNet-34."""

    def __init__(self, depths, num_classes, channels):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.blocks = stages(BasicBlock, 64, (64, 128, 256, 512), depths)
        self.classifier = nn.Linear(512, num_classes)

    def penultimate(self, x):
        return self.blocks(self.stem(x)).mean((2, 3))  # (B, 512)


class WRN(Classifier):
    """Wide ResNet of `depth` layers (6 n + 4) and widening factor k."""

    def __init__(self, depth, k, num_classes, channels):
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.blocks = stages(PreActivationBlock, 16, (16 * k, 32 * k, 64 * k), 3 * ((depth - 4) // 6,))
        self.bn = nn.BatchNorm2d(64 * k)
        self.classifier = nn.Linear(64 * k, num_classes)

    def penultimate(self, x):
        return self.bn(self.blocks(self.stem(x))).relu().mean((2, 3))  # (B, 64 k)


# ---------------------------------------------------------------- by name


def build(name, num_classes=10, channels=1):
    """The network called `name`: one of NAMES, or any wrn-D-K with D = 6 n + 4. Raises ValueError for other names."""
    shape = (num_classes, channels)
    if name == "lenet5":
        return LeNet5((6, 16, 120, 84), *shape)
    if name == "lenet5_half":
        return LeNet5((3, 8, 60, 42), *shape)
    if name == "alexnet":
        return AlexNet((48, 128, 192, 192, 128, 512, 256), *shape)
    if name == "alexnet_half":
        return AlexNet((24, 64, 96, 96, 64, 256, 128), *shape)
    if name == "resnet18":
        return ResNet((2, 2, 2, 2), *shape)
    if name == "resnet34":
        return ResNet((3, 4, 6, 3), *shape)
    wrn = re.fullmatch(r"wrn-(\d{1,3})-(\d{1,2})", name)
    if wrn:
        depth, k = map(int, wrn.groups())
        if depth >= 10 and depth % 6 == 4 and k >= 1:
            return WRN(depth, k, *shape)
    raise ValueError(f"unknown network '{name}'; choose from {', '.join(NAMES)}, or any wrn-D-K with D = 10, 16, 22, ...")
