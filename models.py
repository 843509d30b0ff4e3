"""Classifiers: the papers' teachers and students. Teachers: training, loading, accuracy. torch's settings.

    net = build("lenet5", num_classes=10, channels=1)
    logits = net(x)                                   # x (B, C, 32, 32) -> (B, K)
    logits, features = net(x, return_features=True)   # features (B, D): what the last layer reads

Every network is a `Classifier`: `penultimate(x)` is its body, `classifier` its last linear layer, and `split(layer)`
gives the way from the outputs of an inner layer to the logits. `Own` makes a Classifier of any network that maps images
to logits: build("net.py:Net") calls Net in the file net.py.
AlexNet is that of ZSKD's code [C]; its padding, the places of ReLU and the constants of its LRN are ours [I].
[P] the paper's text, [C] the authors' code, [I] our reading, as in generators.py.
test_dfkd.py holds the parameter counts.

References
    LeNet-5        LeCun et al. 1998, as DAFL has it                     https://arxiv.org/abs/1904.01186
    AlexNet        Krizhevsky et al. 2012, as ZSKD's code adapts it      https://arxiv.org/abs/1905.08114
    ResNet         He et al. 2016, the CIFAR form                        https://arxiv.org/abs/1512.03385
    WRN-d-k        Zagoruyko & Komodakis 2016                            https://arxiv.org/abs/1605.07146
"""

import contextlib
import copy
import ctypes
import functools
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import re
import sys
import tempfile
import textwrap
import time
import traceback
import zlib
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

import torch
import torch.nn.functional as F
from torch import nn

import data


class NetworkError(Exception):
    """A network, or a file of one, cannot be used: the message is one line that says why."""


class Classifier(nn.Module):
    """A body, `penultimate(x)`, and a last linear layer, `classifier`.

    Features and logits are float32. The body is bfloat16 where `bf16` is set on the network.
    """

    bf16 = False
    modelled = "logits"  # the layer that soft-target synthesis models: FC-2 where there is one [P], else the logits [I]

    def forward(self, x, return_features=False):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.penultimate(x)  # (B, D)
        features = features.to(self.classifier.weight.dtype)
        logits = self.classifier(features)  # (B, K)
        return (logits, features) if return_features else logits

    def split(self, layer):
        """A linear layer, and the rest of the network: the function from its outputs (B, D) to the logits (B, K).

        `layer` is "logits", the last layer, or "fc2", the last but one, for networks that have such a layer.
        """
        if layer != "logits":
            raise ValueError(f"{type(self).__name__} has no layer '{layer}'")
        return self.classifier, nn.Identity()


# ---------------------------------------------------------------- LeNet-5


class LeNet5(Classifier):
    """LeNet-5 with widths (6, 16, 120, 84), or half of them; ReLU and max pooling."""

    modelled = "fc2"

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
        if layer == "fc2":
            return self.fc, nn.Sequential(nn.ReLU(), self.classifier)
        return super().split(layer)


# ---------------------------------------------------------------- AlexNet


class LocalResponseNorm(nn.Module):
    """x_i / (1 + 1e-4/5 Σ_j x_j²)^0.75, j over the five channels around i: nn.LocalResponseNorm(5), by a convolution.

    Two to three times as fast, and without avg_pool3d, whose gradient on a GPU differs from run to run.
    """

    def __init__(self, width):
        super().__init__()
        band = torch.ones(width, width).tril(2).triu(-2) * 1e-4 / 5
        self.register_buffer("band", band[..., None, None], persistent=False)

    def forward(self, x):
        return x * (1 + F.conv2d(x.square(), self.band)) ** -0.75  # (B, C, H, W)


class AlexNet(Classifier):
    """AlexNet for 32 x 32 images with ZSKD's widths (48, 128, 192, 192, 128, 512, 256), or half of them."""

    modelled = "fc2"

    def __init__(self, widths, num_classes, channels):
        super().__init__()
        a, b, c, d, e, f, g = widths

        def pool(width):
            return nn.MaxPool2d(3, 2), nn.BatchNorm2d(width)

        self.body = nn.Sequential(
            *(nn.Conv2d(channels, a, 5, padding=2), nn.ReLU(), LocalResponseNorm(a), *pool(a)),  # (B, 48, 15, 15)
            *(nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), LocalResponseNorm(b), *pool(b)),  # (B, 128, 7, 7)
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
        if layer == "fc2":
            return self.body[-4], nn.Sequential(*self.body[-3:], self.classifier)
        return super().split(layer)


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


# ---------------------------------------------------------------- networks of one's own


class Own(Classifier):
    """Any network that maps images (B, C, H, W) to logits (B, K), with what the methods ask of a Classifier.

    Its features are what the nn.Linear that is called last reads. Which one that is, and K, are seen in a forward pass
    on a batch of noise. The state dict is that of the network itself: files fit the user's class. Everything stays
    float32.
    """

    def __init__(self, name, net, channels, size):
        super().__init__()
        self.name, self.net = name, net
        net.cpu()
        net.eval()
        half = torch.float16, torch.bfloat16
        for key, value in net.state_dict().items():
            plain = isinstance(value, torch.Tensor) and value.dtype not in half and not value.is_complex()
            if not plain or not value.isfinite().all():
                raise NetworkError(f"{name}: '{key}' in its state dict is no tensor of finite float32 or integers; "
                                   "a buffer stays out of it with persistent=False")  # fmt: skip
        # an error now, not when a file of it is read: a buffer made by expand cannot be loaded
        net.load_state_dict({key: value.clone() for key, value in net.state_dict().items()})
        self.shape = (channels, size, size)
        self.examine()
        self.probe(3)  # it takes batches of any size
        self.train()

    def examine(self):
        """See how many classes it has, which nn.Linear is called last, and whether that one gives the logits.

        `load` calls this again: the weights of a file may change the answer. The pass also renews the `weight` that
        weight_norm and pruning compute only when the layer is called.
        """
        called = []
        keys = {layer: key for key, layer in self.net.named_modules() if isinstance(layer, nn.Linear)}

        def note(layer, x, y):
            called.append((layer, y.clone()))

        with contextlib.ExitStack() as hooks:
            for layer in keys:
                hooks.enter_context(layer.register_forward_hook(note))
            _, logits = self.probe()
        self.classes = logits.shape[1]
        last, y = called[-1] if called else (None, None)
        self.last = keys.get(last)
        self.ends_there = y is not None and torch.equal(y, logits)

    def probe(self, count=2):
        """A batch of noise and its logits. Raises NetworkError if they are no logits, or have no gradient at all."""
        shape = (count, *self.shape)
        device = next(self.parameters(), torch.empty(0)).device
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        try:
            with torch.random.fork_rng(devices=[]):
                logits = self(x)
        except (Exception, SystemExit) as error:
            raise NetworkError(f"{self.name} fails on images {shape}, see --channels, --image-size: "
                               f"{in_one_line(error)}") from None  # fmt: skip
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if not isinstance(found, tuple) or len(found) != 2 or found[0] != count or found[1] < 2:
            raise NetworkError(f"{self.name} gives {found} for images {shape}, not logits ({count}, K)")
        if (logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-4).all():
            raise NetworkError(f"{self.name} gives probabilities, not logits: leave its softmax out")
        if not logits.requires_grad:
            raise NetworkError(f"{self.name} passes no gradient to its images: is there a detach or no_grad in it?")
        return x, logits

    def gradients(self, logits, inputs):
        """d sum(logits) / d inputs, None for those that the logits do not depend on."""
        try:
            return torch.autograd.grad(logits.sum(), inputs, allow_unused=True)
        except (Exception, SystemExit) as error:
            raise NetworkError(f"{self.name} passes no gradient: {in_one_line(error)}") from None

    def check_that_it_teaches(self):
        """Raises NetworkError if it cannot be a teacher: G learns through T's images."""
        self.eval()  # as T is used
        x, logits = self.probe()
        if self.gradients(logits, [x]) == (None,):
            raise NetworkError(f"{self.name} passes no gradient to its images: is there a detach or no_grad in it?")

    def check_that_it_trains(self):
        """Raises NetworkError if it cannot be a student. Its BatchNorms are left as they are."""
        before = copy.deepcopy(self.net.state_dict())  # deepcopy refuses a network that keeps an activation
        self.net.train()
        weights = trained_weights(self)
        for _ in range(2):  # a network that keeps a graph of its first pass fails in the second
            _, logits = self.probe()
            if not weights or all(v is None for v in self.gradients(logits, weights)):
                raise NetworkError(f"{self.name} has no weights that could be trained")
        self.net.load_state_dict(before)

    @property
    def classifier(self):
        return self.net.get_submodule(self.last)

    def forward(self, x, return_features=False):
        # NCHW, because many networks call view(B, -1); a copy, because some change their input in place
        x = x.clone(memory_format=torch.contiguous_format)
        if not return_features:
            return self.answer(x)
        if self.last is None:
            return self.answer(x), None
        read = []

        def note(layer, inputs, named):
            read.append(inputs[0] if inputs else named["input"])

        with self.classifier.register_forward_pre_hook(note, with_kwargs=True):
            return self.answer(x), rows(read[-1], x)

    def answer(self, x):
        try:
            return rows(self.net(x), x)
        except (Exception, SystemExit) as error:
            error.network = self.name  # for `own_failure`
            raise

    def state_dict(self, *args, **more):
        return self.net.state_dict(*args, **more)

    def load_state_dict(self, *args, **more):
        return self.net.load_state_dict(*args, **more)


def rows(y, x):
    """y (B, K) for images x; of one image, a network that calls squeeze() gives (K,)."""
    return y[None] if x.shape[0] == 1 and isinstance(y, torch.Tensor) and y.dim() == 1 else y


def in_one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def own_failure(error):
    """One line on an error that a network of one's own raised in its forward pass; None for other errors."""
    name = getattr(error, "network", None)
    if name is None:
        return None
    file = Path(name.rpartition(":")[0]).resolve()
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    return f"{name} fails{f' in line {lines[-1]}' if lines else ''}: {in_one_line(error)}"


FOLDERS = {Path(__file__).resolve().parent}  # of our modules, and of the users' files


def home(name):
    """The folder in which the module or package `name`, imported before, lies; None for one without a file."""
    module = sys.modules.get(name)
    where = next(iter(getattr(module, "__path__", ())), None) or getattr(module, "__file__", None)
    return Path(where).parent if where else None


@contextlib.contextmanager
def imports_from_beside(path):
    """Meanwhile imports find what lies beside the file `path`, not a module of the same name from elsewhere.

    Modules of such names, ours or those of another network's file, are put aside: teacher and student may each have a
    utils.py.
    """
    folder = str(path.parent)
    beside = {entry.stem for entry in path.parent.iterdir() if entry.suffix == ".py" or entry.is_dir()} - {"__main__"}
    foreign = {name for name in beside if home(name) in FOLDERS - {path.parent}}
    hidden = {key: held for key, held in sys.modules.items() if key.partition(".")[0] in foreign}
    for key in hidden:
        del sys.modules[key]
    FOLDERS.add(path.parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)  # for what it imports later
        sys.modules.update(hidden)


@functools.cache
def module_of(path):
    """The Python file `path`, run once."""
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with imports_from_beside(path):
        spec.loader.exec_module(module)
    return module


def own(name, num_classes, channels, size):
    """The network that FILE.py:NAME gives, called with num_classes and channels where its signature names them.

    Without a number of classes (None), it is called without one.
    """
    file, _, attribute = name.rpartition(":")
    path = Path(os.path.realpath(file))  # Path.resolve fails on a link to itself
    if path.suffix != ".py" or not path.is_file():
        raise NetworkError(f"{name}: no Python file {file}; give FILE.py:NAME")
    call_mkl()  # before the user's code does
    try:
        make = getattr(module_of(path), attribute, None)
    except (Exception, SystemExit) as error:
        raise NetworkError(f"{file} cannot be imported: {in_one_line(error)}") from None
    if not callable(make):
        raise NetworkError(f"{file} has no function or class {attribute}")
    try:
        takes = inspect.signature(make).parameters
        given = dict(num_classes=num_classes, channels=channels)
        with imports_from_beside(path):
            net = make(**{key: value for key, value in given.items() if key in takes and value is not None})
    except (Exception, SystemExit) as error:
        raise NetworkError(f"{name} cannot be called, see --num-classes, --channels: {in_one_line(error)}") from None
    if not isinstance(net, nn.Module):
        raise NetworkError(f"{name} gives a {type(net).__name__}, not a torch.nn.Module")
    try:
        net = Own(name, net, channels, size)
    except NetworkError:
        raise
    except (Exception, SystemExit) as error:  # lazy weights, weights on no device, what the user's train() raises
        raise NetworkError(f"{name} cannot be used: {in_one_line(error)}") from None
    if num_classes not in (None, net.classes):
        raise NetworkError(f"{name} gives {net.classes} classes, not {num_classes}")
    return net


# ---------------------------------------------------------------- by name

SIZES = {  # the class; LeNet's and AlexNet's widths, ResNet's depths
    "lenet5": (LeNet5, (6, 16, 120, 84)), "lenet5_half": (LeNet5, (3, 8, 60, 42)),
    "alexnet": (AlexNet, (48, 128, 192, 192, 128, 512, 256)), "alexnet_half": (AlexNet, (24, 64, 96, 96, 64, 256, 128)),
    "resnet18": (ResNet, (2, 2, 2, 2)), "resnet34": (ResNet, (3, 4, 6, 3)),
}  # fmt: skip
NAMES = (*SIZES, "wrn-40-2", "wrn-16-1")


def build(name, num_classes=10, channels=1, size=32):
    """The network called `name`: one of NAMES, any wrn-D-K with D = 6 n + 4, or FILE.py:NAME for images of this size.

    Raises ValueError for other names, NetworkError for a file that gives no such network.
    """
    if ":" in name:
        return own(name, num_classes, channels, size)
    if name in SIZES:
        kind, sizes = SIZES[name]
        return kind(sizes, num_classes, channels)
    wrn = re.fullmatch(r"wrn-(\d{1,3})-(\d{1,2})", name)
    if wrn:
        depth, k = map(int, wrn.groups())
        if depth >= 10 and depth % 6 == 4 and k >= 1:
            return WRN(depth, k, num_classes, channels)
    raise ValueError(f"unknown network '{name}'; choose from {', '.join(NAMES)}, any wrn-D-K with D = 10, 16, 22, ..., "
                     "FILE.py:NAME")  # fmt: skip


def on_device(name, info, device, precision):
    """The network called `name` for such data. LeNets stay float32: they are too small to gain from less."""
    net = build(name, info.classes, info.channels, info.size)
    if isinstance(net, Own):
        return net.to(device)
    net.to(device, memory_format=torch.channels_last)
    net.bf16 = precision == "bf16" and not isinstance(net, LeNet5)
    return net


def tried(name, info):
    """Build the network `name` only to check that it takes such images -> the network, with its `classes`.

    Raises ValueError or NetworkError, with one line that says why it does not.
    """
    if ":" in name:
        return build(name, info.classes, info.channels, info.size)
    with torch.device("meta"):  # no memory, however large the network
        net = build(name, info.classes or 10, info.channels).eval()
        net.classes = net.classifier.out_features
        try:
            net.penultimate(torch.zeros(2, info.channels, info.size, info.size))
        except RuntimeError as error:
            raise NetworkError(f"{name} takes no images of {info.size} x {info.size}: {in_one_line(error)}") from None
    return net


def exported(net, info):
    """The network as the bytes of a .pt2 file that takes batches of any size; torch.export.load reads it."""
    net, buffer = getattr(net, "net", net), io.BytesIO()
    x = torch.zeros(2, info.channels, info.size, info.size)
    logging.disable()  # torch prints whole graphs before it raises
    try:
        with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            net.eval()  # it returns nothing in some networks
            net(x.to(next(net.parameters()).device))  # one that keeps an activation with a gradient cannot be copied
            net = copy.deepcopy(net).to("cpu", memory_format=torch.contiguous_format)
            net.bf16 = False
            program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            torch.export.save(program, buffer)
    except Exception as error:  # torch cannot copy and trace every network
        raise NetworkError(f"the student cannot be exported: {in_one_line(error)}") from None
    finally:
        logging.disable(logging.NOTSET)
    return buffer.getbuffer()


# ---------------------------------------------------------------- optimisers, and a step as a CUDA graph


def trained_weights(net):
    return [p for p in net.parameters() if p.requires_grad]  # some networks hold fixed ones


def adam(net, lr):
    return torch.optim.Adam(trained_weights(net), lr, fused=True)


def sgd(net, lr, nesterov=False):
    return torch.optim.SGD(trained_weights(net), lr, momentum=0.9, weight_decay=5e-4, nesterov=nesterov)


def student_optimiser(student, kind, lr, decay, steps, every, drops):
    """Adam or SGD for S, and its rate over the steps: constant, a half cosine down to 0, one cycle, or in drops.

    kind "adam" or "sgd"; decay "none", "cosine" (it moves once in `every` steps), "cycle" or "drops" (each to a tenth,
    after so many steps).

    The cycle warms up. Without it units die: at RDSKD's default rate of 0.01, two fifths of LeNet-5-half's last
    convolution (with it one fifth); at DAFL's 0.1 of SGD, 98 % of ResNet-18's last block after 60 steps (with it none).
    torch's cycle moves the momentum (Adam: beta_1) as well, from 0.95 to 0.85 and back.
    """
    optimiser = sgd(student, lr) if kind == "sgd" else adam(student, lr)
    if decay == "cycle":
        return optimiser, torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, steps, pct_start=0.15)
    if decay == "drops":
        return optimiser, torch.optim.lr_scheduler.MultiStepLR(optimiser, drops)
    factor = {
        "cosine": lambda step: (1 + math.cos(math.pi * (step - step % every) / steps)) / 2,
        "none": lambda step: 1.0,
    }[decay]
    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def as_cuda_graph(gradients, weights):
    """f(x) -> gradients(x), a loss, with the weights' `grad` set: the same function as one CUDA graph. For a GPU.

    Small networks leave a GPU waiting while their many kernels are started one by one. A graph starts all of them at
    once: the same kernels, the same bits. Three calls go without it, in which cuDNN and cuBLAS set themselves up; the
    fourth records it. Images of another shape go without it. The graph keeps its memory beside what all else needs.
    It is recorded on the current stream. A step of G on S's logits may still hold S's weights there; a graph on another
    stream would have to wait for that one, and recording would fail. CUDA's default stream can record nothing: all goes
    without a graph there. `set_up_torch` chooses another.
    """
    if torch.cuda.current_stream() == torch.cuda.default_stream():
        return gradients
    graph, calls, held = torch.cuda.CUDAGraph(), 0, None

    def f(x):
        nonlocal calls, held
        calls += 1
        if calls <= 3 or held and x.shape != held[0].shape:
            return gradients(x)
        if not held:
            x_held = x.clone()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                L = gradients(x_held)
            held = x_held, L, [weight.grad for weight in weights]
        x_held, L, grads = held
        x_held.copy_(x)
        graph.replay()
        for weight, grad in zip(weights, grads):
            weight.grad = grad
        return L.clone()  # the next call computes in the place of L

    return f


# ---------------------------------------------------------------- teachers: trained here once, or given

TEACHER_BATCH = 128


def teacher_lr(name):
    return 3e-3 if name.startswith("lenet5") else 0.1


def train(name, real, info, epochs, seed, precision, checkpoint, show):
    """A teacher trained by cross-entropy on the real training images, over one learning-rate cycle; frozen.

    LeNets by Adam; the larger networks by SGD with Nesterov's momentum. Where images may be mirrored, they are also
    cropped at random. After each epoch all is saved in the file `checkpoint`, from which a stopped training goes on.
    show(line, keep) prints a line of progress.
    """
    device = real.train_images.device
    torch.manual_seed(seed)
    net, lr = on_device(name, info, device, precision), teacher_lr(name)
    optimiser = adam(net, lr) if name.startswith("lenet5") else sgd(net, lr, nesterov=True)
    count = len(real.train_labels)
    per_epoch = max(1, count // TEACHER_BATCH)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, epochs * per_epoch)
    first, parts = 0, (net, optimiser, cycle)
    if checkpoint.exists():
        try:
            saved = data.load_tensors(checkpoint)
            first = saved["epochs"]
            restore(zip(parts, saved["parts"], strict=True), saved["random"], device)
        except (data.DataError, LookupError, TypeError, ValueError):
            raise NetworkError(f"{checkpoint}: no half-trained teacher of this program; delete it") from None
    begun = shown = time.perf_counter()
    for epoch in range(first, epochs):
        order = torch.randperm(count)[: per_epoch * TEACHER_BATCH].to(device)
        for step, index in enumerate(order.split(TEACHER_BATCH), start=1):
            x = real.train_images[index]
            if info.mirror:
                x = data.cropped_and_mirrored(x)
            loss = F.cross_entropy(net(data.normalise(x, info)), real.train_labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            cycle.step()
            now = time.perf_counter()
            if step == per_epoch or now - shown > 15:
                shown, done = now, epoch + step / per_epoch
                eta = clock((now - begun) / (done - first) * (epochs - done))
                show(f"teacher    {done:.4g}/{epochs} epochs  loss {loss.item():.4g}  eta {eta}", step == per_epoch)
        state = [part.state_dict() for part in parts]
        data.save(checkpoint, dict(epochs=epoch + 1, parts=state, random=random_state(device)))
    return net.eval().requires_grad_(False)


def trained(folder, dataset, name, real, info, epochs, seed, precision, show):
    """The teacher for these settings: from the folder where trained ones are kept, or trained now."""
    device, threads = real.train_images.device.type, torch.get_num_threads()
    images_and_labels = zlib.crc32(real.train_labels.cpu().numpy(), zlib.crc32(real.train_images.cpu().numpy()))
    settings = dict(
        dataset=dataset, data=images_and_labels, arch=name, epochs=epochs, lr=teacher_lr(name), batch=TEACHER_BATCH,
        seed=seed, precision=precision, device=device, threads=threads, torch=str(torch.__version__),
    )  # fmt: skip
    path = folder / f"{dataset}-{name}-{zlib.crc32(json.dumps(settings).encode()):08x}.pt"
    if path.exists():
        print(f"teacher    {name}, trained before: {path}")
        try:
            return load(path, name, info, device, precision)
        except (data.DataError, NetworkError):
            raise NetworkError(f"{path}: damaged; delete it, and the teacher is trained again") from None
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # an error now, if nothing can be written there
    half = path.with_suffix(".training")
    net = train(name, real, info, epochs, seed, precision, half, show)
    data.save(path, {key: value.cpu() for key, value in net.state_dict().items()})
    half.unlink(missing_ok=True)
    print(f"teacher    {name}, saved for later runs: {path}")
    return net


PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # DataParallel's, torch.compile's, those of training frameworks


def load(path, name, info, device, precision):
    """The frozen teacher whose state dict is in the file `path`; NetworkError says in one line why it does not fit."""
    state = data.load_tensors(path)
    for key in ("state_dict", "model_state_dict", "model", "net"):  # as training scripts save it, beside other things
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    plain = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not plain or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise NetworkError(f"{path}: no state dict; save one with torch.save(net.state_dict(), FILE)")
    net = on_device(name, info, device, precision)
    known = net.state_dict()
    for prefix in PREFIXES * 2:  # two of them may stand there, in either order
        if not state.keys() & known.keys() and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.is_meta:
            raise NetworkError(f"{path}: '{key}' is sparse, quantised, complex or without values; save plain tensors")
        if key in known and known[key].is_floating_point() and not value.is_floating_point():
            raise NetworkError(f"{path}: '{key}' holds {value.dtype}, no weights; save the network in float32")
    try:
        net.load_state_dict(state)
    except Exception as error:  # torch's is a headline and a line for each difference; an own network's is anything
        reason = " ".join(str(error).splitlines()[1:2]).strip() or in_one_line(error)
        shape = f"{name} with {info.classes} classes and {info.channels} channels"
        reason = textwrap.shorten(reason, 160, placeholder=" ...")
        flags = "--teacher-arch" + ("" if isinstance(net, Own) else "; --dataset, or --num-classes and --channels")
        raise NetworkError(f"{path}: does not fit {shape}; see {flags}: {reason}") from None
    for key, value in net.state_dict().items():  # in the precision of the network
        if not value.isfinite().all():
            raise NetworkError(f"{path}: '{key}' holds NaN or infinity; train the teacher again")
    net.eval().requires_grad_(False)
    if isinstance(net, Own):
        net.examine()
    return net


# ---------------------------------------------------------------- measuring, saving, restoring


@torch.no_grad()
def accuracy(net, images, labels, info):
    """Percent of the uint8 images that `net` classifies as labelled; the network's mode is kept."""
    training = net.training
    net.eval()
    right = 0
    batch = 2000 * 32**2 // info.size**2
    for x, y in zip(images.split(batch), labels.split(batch)):
        right += (net(data.normalise(x, info)).argmax(1) == y).sum()
    net.train(training)
    return 100 * right.item() / len(labels)


def crc(net):
    """A checksum of all that the network has learned."""
    return zlib.crc32(b"".join(v.cpu().numpy().tobytes() for v in net.state_dict().values()))


def fast_bf16(device):
    """Whether the processor multiplies bfloat16 matrices in hardware; elsewhere bf16 is slower than float32."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def random_state(device):
    cuda = torch.cuda.get_rng_state() if torch.device(device).type == "cuda" else None
    return dict(cpu=torch.get_rng_state(), cuda=cuda)


def restore(pairs, random, device):
    """Give each part, a tensor or what has a state_dict, the state saved beside it; then set the random state.

    ValueError where a state does not fit: torch's schedules and optimisers would take anything.
    """
    try:
        for part, state in pairs:
            tensor = isinstance(part, torch.Tensor)
            if not data.same_form(part if tensor else part.state_dict(), state):
                raise ValueError("a state of another form")
            if tensor:
                part.copy_(state)
            else:
                part.load_state_dict(state)
        torch.set_rng_state(random["cpu"])
        if torch.device(device).type == "cuda":
            torch.cuda.set_rng_state(random["cuda"])
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(str(error)) from None


def clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


# ---------------------------------------------------------------- the process


def set_up_torch(threads, device="cpu"):
    """Set torch's options for the whole process: threads, memory, determinism; on a GPU the stream, too."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    call_mkl()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    if device == "cuda" and torch.cuda.current_stream() == torch.cuda.default_stream():
        torch.cuda.set_stream(torch.cuda.Stream())  # the default one records no CUDA graph, see `as_cuda_graph`
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32: what may be coarser computes in bfloat16
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time and changes no result
    if threads > 1 and cores_in_use() + threads > os.cpu_count() + 0.5:
        print("note: other processes keep the cores busy; runs side by side are faster with --threads 1 each")


def keep_freed_memory():
    """Let the process keep the memory that it frees, and use it again.

    By itself, glibc gives large tensors back to the system, which must clear new pages at every step. That takes a
    fifth of the time. Other C libraries have no such switch.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)


def call_mkl():
    """Call the functions of MKL that networks use most, once each, on one thread.

    MKL chooses the kernel of a function at its first call. Two threads that make this call together may get different
    kernels, and results then differ in the last bits from one process to the next. 16 numbers take one thread.
    """
    for function in (torch.tanh, torch.exp, torch.log, torch.sqrt, torch.sin, torch.cos, torch.erf):
        function(torch.ones(16))


def cores_in_use():
    """How many cores other processes use just now, measured while this one sleeps; 0 where the system does not say.

    os.getloadavg would be shorter, but for a minute it counts what this user ran before.
    """

    def idle_and_all():
        ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return ticks[3] + ticks[4], sum(ticks)

    try:
        idle_before, all_before = idle_and_all()
        time.sleep(0.2)
        idle, total = idle_and_all()
        return os.cpu_count() * (1 - (idle - idle_before) / (total - all_before))
    except (OSError, ValueError, IndexError, ZeroDivisionError):
        return 0


def peak_memory(device):
    """The most memory that this process held, on the GPU where it computed there."""
    if device == "cuda":
        return f"{torch.cuda.max_memory_reserved() / 2**30:.2f} GiB of the GPU's"
    if not resource:
        return "unknown"
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.2f} GiB"
