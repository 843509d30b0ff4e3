"""Data sets: `glyphs`, drawn here; MNIST, Fashion-MNIST, SVHN, CIFAR-10 and -100, read from files or downloaded.

    real = load("mnist", "datasets")                   # images uint8 (N, C, 32, 32), labels int64 (N,)
    x = normalise(real.test_images, INFO["mnist"])     # float32, zero mean and unit variance per channel

Only teacher training, the `kd` upper bound and evaluation are given images. Distillation knows `INFO` and nothing else.
Every malformed file raises DataError with one line that names the file and says what to do. Files out, at the end:
tensors, tables and pictures, each there whole or not at all.
"""

import base64
import contextlib
import csv
import functools
import gzip
import hashlib
import html
import http.client
import io
import itertools
import json
import math
import os
import platform
import re
import statistics
import struct
import subprocess
import tempfile
import urllib.parse
import urllib.request
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
import torch
import torch.nn.functional as F


class DataError(Exception):
    """A file cannot be used: the message is one line that says which one and what to do."""


class Info(NamedTuple):
    """What distillation may know of a data set: the shape of the problem and the normalisation, no image."""

    classes: int
    channels: int
    mean: tuple
    std: tuple
    mirror: bool = False  # whether an image flipped left to right is as good an example of its class
    size: int = 32  # of the square images


class Data(NamedTuple):
    train_images: torch.Tensor  # (N, C, 32, 32) uint8
    train_labels: torch.Tensor  # (N,) int64
    test_images: torch.Tensor
    test_labels: torch.Tensor


INFO = {
    "glyphs": Info(10, 1, (0.168,), (0.282,)),
    "mnist": Info(10, 1, (0.1307,), (0.3081,)),
    "fashion-mnist": Info(10, 1, (0.2860,), (0.3530,)),
    "svhn": Info(10, 3, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "cifar10": Info(10, 3, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), mirror=True),
    "cifar100": Info(100, 3, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), mirror=True),
}


def load(name, data_dir="datasets"):
    """The data set `name`; its files are looked for in, and downloaded to, a folder of its own in `data_dir`."""
    if name == "glyphs":
        arrays = glyphs(20_000, seed=0) + glyphs(4_000, seed=1)
    elif name == "svhn":
        arrays = svhn(Path(data_dir) / name)
    elif name in CIFAR:
        arrays = cifar(name, Path(data_dir) / CIFAR[name].folder)
    else:
        arrays = idx_data_set(name, Path(data_dir) / name)
    train_x, train_y, test_x, test_y = arrays
    return Data(to_32x32(train_x), torch.from_numpy(train_y).long(), to_32x32(test_x), torch.from_numpy(test_y).long())


def to_32x32(images):
    """uint8 array (N, 28, 28) or (N, 3, 32, 32) -> uint8 tensor (N, C, 32, 32).

    Bilinear where the size differs, as the papers' code resizes MNIST for LeNet-5.
    """
    if images.shape[1:] == (3, 32, 32):
        return torch.from_numpy(images)
    chunks = torch.from_numpy(images).unsqueeze(1).split(4096)
    return torch.cat([F.interpolate(c.float(), size=32, mode="bilinear").round_().byte() for c in chunks])


def normalise(images, info):
    """uint8 images (B, C, H, W) -> float32 with the mean and standard deviation of an Info taken out."""
    mean, std = mean_and_std(info, images.device)
    return (images / 255 - mean) / std


@functools.cache  # a copy to the GPU for every batch would make the CPU wait
def mean_and_std(info, device):
    """Mean and standard deviation per channel of an Info: (C, 1, 1) each."""
    return tuple(torch.tensor(v, device=device).view(-1, 1, 1) for v in (info.mean, info.std))


def pixel_range(info, device):
    """What black and white become under an Info's normalisation: (C, 1, 1) each."""
    mean, std = mean_and_std(info, device)
    return -mean / std, (1 - mean) / std


def cropped_and_mirrored(images):
    """Each image at a random place of itself with a border of 4 zeros, half of them mirrored: for training on photos.

    uint8 (B, C, 32, 32) -> the same shape.
    """
    b, device = len(images), images.device
    padded = F.pad(images, (4, 4, 4, 4))
    rows, columns = torch.randint(9, (2, b, 1), device=device) + torch.arange(32, device=device)  # (B, 32) each
    columns = torch.where(torch.rand(b, 1, device=device) < 0.5, columns, columns.flip(1))
    each = torch.arange(b, device=device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


# ---------------------------------------------------------------- glyphs: digits drawn from strokes


def arc(x, y, rx, ry, start, stop, points):
    """Points on an ellipse around (x, y) from angle `start` to `stop`, in degrees clockwise from the right."""
    angle = np.radians(np.linspace(start, stop, points))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


# The pen's path for each digit in the unit square, y downwards; every path is one stroke.
STROKES = (
    arc(0.5, 0.5, 0.27, 0.4, -90, 270, 13),  # 0
    np.array([(0.33, 0.27), (0.52, 0.1), (0.52, 0.5), (0.52, 0.9)]),  # 1
    np.concatenate([arc(0.5, 0.34, 0.26, 0.24, 180, 380, 8), [(0.24, 0.9), (0.78, 0.9)]]),  # 2
    np.concatenate([arc(0.46, 0.3, 0.26, 0.2, 200, 450, 7), arc(0.46, 0.7, 0.3, 0.2, -90, 160, 7)[1:]]),  # 3
    np.array([(0.64, 0.9), (0.64, 0.5), (0.64, 0.1), (0.2, 0.62), (0.5, 0.62), (0.84, 0.62)]),  # 4
    np.concatenate([[(0.74, 0.1), (0.32, 0.1), (0.28, 0.46)], arc(0.46, 0.64, 0.28, 0.26, -125, 140, 8)]),  # 5
    np.concatenate([[(0.66, 0.1), (0.4, 0.3)], arc(0.5, 0.66, 0.25, 0.24, -160, 210, 10)]),  # 6
    np.array([(0.2, 0.12), (0.5, 0.12), (0.8, 0.12), (0.6, 0.5), (0.42, 0.9)]),  # 7
    np.concatenate([arc(0.5, 0.3, 0.21, 0.2, 90, -270, 8), arc(0.5, 0.7, 0.25, 0.2, -90, 270, 8)[1:]]),  # 8
    np.concatenate([arc(0.5, 0.33, 0.24, 0.23, 20, -340, 10), [(0.72, 0.5), (0.6, 0.9)]]),  # 9
)


def glyphs(count, seed):
    """`count` grey 28 x 28 images of handwritten-looking digits and their labels: uint8 (N, 28, 28), int64 (N,).

    The points of a digit's stroke are displaced, then turned, scaled, sheared and shifted, all at random; a pixel is
    bright if the stroke passes within the pen's width. Deterministic by seed.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 10)
    images = np.empty((count, 28, 28), np.uint8)
    for digit, stroke in enumerate(STROKES):
        for index in np.array_split(np.flatnonzero(labels == digit), max(1, count // 1000)):  # chunks fit the cache
            images[index] = draw(stroke, len(index), rng)
    return images, labels


def draw(stroke, n, rng):
    """`n` images of one stroke, (P, 2) points in the unit square -> uint8 (n, 28, 28)."""
    scale = 21 * rng.uniform(0.8, 1.15, (n, 1, 2))
    angle, shear = np.radians(rng.uniform(-20, 20, n)), rng.uniform(-0.3, 0.3, n)
    rotation = np.stack([np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)], 1).reshape(n, 2, 2)
    points = (stroke - 0.5 + rng.normal(0, 0.047, (n, len(stroke), 2))) * scale
    points[..., 0] += shear[:, None] * points[..., 1]
    points = points @ rotation + 13.5 + rng.uniform(-2.5, 2.5, (n, 1, 2))
    radius, ink = rng.uniform(1.0, 2.0, (n, 1, 1)), rng.uniform(0.8, 1, (n, 1, 1))
    grey = ink * np.clip(radius + 0.5 - stroke_distance(points.astype(np.float32)), 0, 1)
    return (255 * np.clip(grey + rng.normal(0, 0.08, grey.shape), 0, 1)).astype(np.uint8)


def stroke_distance(points):
    """Distance of each pixel of a 28 x 28 image to a polyline, in pixels: points (n, P, 2) -> (n, 28, 28).

    For a segment from a along d, the nearest point to pixel p is a + t d, t = clip((p - a).d / |d|^2, 0, 1), and
    |p - a - t d|^2 = |p - a|^2 - t (2 (p - a).d - t |d|^2).
    """
    pixel = np.arange(28, dtype=np.float32)
    squared = np.full((len(points), 28, 28), np.inf, np.float32)
    for a, b in zip(points[:, :-1].swapaxes(0, 1), points[:, 1:].swapaxes(0, 1)):  # each (n, 2)
        d = b - a
        length = (d * d).sum(1)[:, None, None] + 1e-9
        px, py = pixel - a[:, :1], pixel - a[:, 1:]  # (n, 28) each: p - a along columns and along rows
        dot = (px * d[:, :1])[:, None, :] + (py * d[:, 1:])[:, :, None]  # (n, 28, 28)
        t = np.clip(dot / length, 0, 1)
        np.minimum(squared, (px * px)[:, None, :] + (py * py)[:, :, None] - t * (2 * dot - t * length), out=squared)
    return np.sqrt(np.maximum(squared, 0))


# ---------------------------------------------------------------- test images of one's own: .npz

NPZ_LIMIT = 2**31  # bytes


def test_set(path, info):
    """The arrays `images`, uint8 (N, C, H, W) or (N, H, W, C), and `labels` of a .npz file: (N, C, H, W) and (N,)."""
    with opened(path, NPZ_LIMIT) as file:
        try:
            held = np.load(file, allow_pickle=False)
            if sum(member.file_size for member in held.zip.infolist()) > NPZ_LIMIT:  # few compressed bytes may be many
                raise ValueError(f"more than {NPZ_LIMIT} bytes")
            images, labels = held["images"], held["labels"]
            if not isinstance(images, np.ndarray) or not isinstance(labels, np.ndarray):  # bytes without a header
                raise ValueError("no arrays")
        except Exception as error:  # numpy raises whatever the damaged bytes lead to
            raise DataError(f"{path}: no plain arrays images and labels can be read ({' '.join(str(error).split())}); "
                            f"write it with np.savez(FILE, images=..., labels=...)") from None  # fmt: skip
    first, last = (info.channels, info.size, info.size), (info.size, info.size, info.channels)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] not in (first, last):
        raise DataError(f"{path}: images is {images.dtype} {images.shape}, expected uint8 (N, {str(first)[1:]} or "
                        f"(N, {str(last)[1:]}; see --channels, --image-size")  # fmt: skip
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(f"{path}: labels is {labels.dtype} {labels.shape}, expected whole numbers (N,)")
    check_labels(path, images, labels, info.classes)
    if images.shape[1:] != first:
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


# ---------------------------------------------------------------- MNIST and Fashion-MNIST: four IDX files

# File name -> SHA-256 of the gzipped file, see `download`.
IDX_FILES = {
    "mnist": {
        "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
}
MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "https://azureopendatastorage.blob.core.windows.net/mnist/",
    ),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
    "svhn": ("http://ufldl.stanford.edu/housenumbers/",),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/",),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/",),
}
IDX_LIMIT = 60_000 * 28 * 28 + 2**20  # bytes; with room for the header, and for what gzip adds


def idx_data_set(name, folder):
    """Training images, training labels, test images, test labels from the four IDX files in `folder`."""
    arrays = []
    for file, checksum in IDX_FILES[name].items():
        path = folder / (file if (folder / file).exists() else f"{file}.gz")
        if not path.exists():
            download(path, [mirror + path.name for mirror in MIRRORS[name]], checksum)
        arrays.append(parse_idx(path, read(path, IDX_LIMIT), 3 if "images" in file else 1))
        if len(arrays) % 2 == 0:
            check_labels(path, *arrays[-2:], INFO[name].classes)
    return arrays


@contextlib.contextmanager
def opened(path, limit):
    """A file of at most `limit` bytes, opened for reading; what goes wrong while it is read becomes a DataError."""
    try:
        if not path.is_file() or path.stat().st_size > limit:  # a pipe would be waited for
            raise DataError(f"{path}: no file, or one of more than {limit} bytes; put the right file there")
        with path.open("rb") as file:
            yield file
    except (zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: damaged or truncated compressed file ({error}); delete it and run again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def read(path, limit):
    """The content of a file, at most `limit` bytes; decompressed if its name ends in .gz."""
    with opened(path, limit) as file:
        content = (gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file).read(limit + 1)
        if len(content) > limit:
            raise zlib.error(f"it holds more than {limit} bytes")
        return content


def parse_idx(path, content, dimensions):
    """An IDX file of unsigned bytes: 0, 0, 8, the number of dimensions, each as a big-endian uint32, the elements."""
    magic, header = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    if content[:4] != magic:
        raise DataError(f"{path}: begins with {content[:4].hex() or 'nothing'}, expected {magic.hex()} (IDX, "
                        f"unsigned bytes, {dimensions} dimensions); put the right file there")  # fmt: skip
    shape = tuple(np.frombuffer(content[4:header].ljust(header - 4, b"\0"), ">u4").tolist())
    expected = header + math.prod(shape)
    if len(content) != expected:
        raise DataError(f"{path}: {len(content)} bytes, expected {expected} for {shape}; delete it and run again")
    if dimensions == 3 and shape[1:] != (28, 28):
        raise DataError(f"{path}: images of {shape[1]} x {shape[2]}, expected 28 x 28; put the right file there")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def check_labels(path, images, labels, classes):
    if len(images) != len(labels) or not len(labels):
        raise DataError(f"{path}: {len(labels)} labels for {len(images)} images; put files there that belong together")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise DataError(f"{path}: label {wrong[0]}, expected 0 to {classes - 1}; put the right file there")


# ---------------------------------------------------------------- CIFAR: records of label bytes and 3072 pixels


class Cifar(NamedTuple):
    folder: str
    archive: str
    checksum: str
    train: tuple
    test: tuple
    records: int  # in a file, at most
    label_bytes: int  # the last of them is the label; CIFAR-100's first is a coarse one


CIFAR = {
    "cifar10": Cifar("cifar-10-batches-bin", "cifar-10-binary.tar.gz",
                     "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                     tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",), 10_000, 1),
    "cifar100": Cifar("cifar-100-binary", "cifar-100-binary.tar.gz",
                      "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
                      ("train.bin",), ("test.bin",), 50_000, 2),
}  # fmt: skip


def cifar(name, folder):
    """Training images, training labels, test images, test labels from the files in `folder`, or from the archive there.

    The archive is read where it is; nothing is unpacked.
    """
    known, names = CIFAR[name], CIFAR[name].train + CIFAR[name].test
    size = known.label_bytes + 3072
    missing = [file for file in names if not (folder / file).exists()]
    if not missing:
        held = {file: read(folder / file, known.records * size) for file in names}
    else:
        archive = folder / known.archive
        if len(missing) < len(names):
            print(f"note: no {missing[0]} in {folder}; all is read from the archive", flush=True)
        if not archive.exists():
            download(archive, [mirror + known.archive for mirror in MIRRORS[name]], known.checksum)
        held = members(archive, read(archive, 60_000 * size + 2**20), names)  # and 1 MiB for all else in it
        compare_with_published(archive, known.checksum)
    arrays = []
    for files in (known.train, known.test):
        parts = [parse_cifar(folder / file, held[file], known, INFO[name].classes) for file in files]
        arrays += map(np.concatenate, zip(*parts))
    return arrays


def members(archive, content, names):
    """Name -> content of the files of these names in a tar archive; of a path there, only the last part counts.

    tarfile is not used: a hostile archive can make it loop for ever (CVE-2025-8194) or fill the memory.
    A header of 512 bytes has the name at 0, the size in octal digits at 124, the type at 156; content is padded to 512.
    """
    content, held, at = memoryview(content), {}, 0
    while at + 512 <= len(content) and content[at]:  # a header of zeros is the end
        name, digits, kind = struct.unpack_from("100s24x12s20xc", content, at)
        try:
            size = 0 if kind in b"123456" else int(digits.strip(b"\0 ") or b"0", 8)  # links and folders have no content
        except ValueError:
            size = -1
        begin = at + 512
        if not 0 <= size <= len(content) - begin:
            raise DataError(f"{archive}: damaged archive, header at byte {at} of it; delete it and run again")
        file = name.split(b"\0")[0].split(b"/")[-1].decode("latin-1")
        if kind in b"0\0" and file in names:
            held[file] = content[begin : begin + size]
        at = begin + 512 * -(-size // 512)
    missing = [file for file in names if file not in held]
    if missing:
        raise DataError(f"{archive}: no {missing[0]} in it; delete it and run again")
    return held


def parse_cifar(path, content, known, classes):
    """A file of CIFAR's binary form: images (N, 3, 32, 32) and labels (N,)."""
    size = known.label_bytes + 3072
    if not 0 < len(content) <= known.records * size or len(content) % size:
        raise DataError(f"{path}: {len(content)} bytes, expected a multiple of {size} up to {known.records * size}; "
                        f"delete it and run again")  # fmt: skip
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    images, labels = records[:, known.label_bytes :].reshape(-1, 3, 32, 32), records[:, known.label_bytes - 1]
    check_labels(path, images, labels, classes)
    return images, labels


# ---------------------------------------------------------------- SVHN: MATLAB 5 files

SVHN_FILES = {
    "train_32x32.mat": "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
    "test_32x32.mat": "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
}
SVHN_LIMITS = {"X": 100_000 * 3072, "y": 100_000}  # values
# The types of a MATLAB 5 element as numpy calls them; 14 is a matrix, 15 a compressed one.
MAT_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
# The classes of a matrix that are no plain numbers.
MAT_CLASSES = {1: "a cell array", 2: "a struct", 3: "an object", 4: "text", 5: "sparse"}


def svhn(folder):
    """Training images, training labels, test images, test labels; the digit 0 is stored as 10."""
    arrays = []
    for file, checksum in SVHN_FILES.items():
        path = folder / file
        if not path.exists():
            download(path, [mirror + file for mirror in MIRRORS["svhn"]], checksum)
        held = parse_mat(path)
        if len(held) < 2:
            raise DataError(f"{path}: no {'y' if 'X' in held else 'X'} in it; put the right file there")
        labels, images = held["y"], held["X"].reshape(-1, 3, 32, 32)
        images = np.ascontiguousarray(images.swapaxes(2, 3))  # in MATLAB, a column's pixels lie together
        if not np.isin(labels, np.arange(1, 11)).all():
            raise DataError(f"{path}: labels from {labels.min():g} to {labels.max():g}, expected 1 to 10; "
                            f"put the right file there")  # fmt: skip
        labels = labels.astype(np.int64) % 10
        check_labels(path, images, labels, 10)
        compare_with_published(path, checksum)
        arrays += [images, labels]
    return arrays


def parse_mat(path):
    """The values of X and y in a MATLAB 5 file, flat. It has a header of 128 bytes, then elements, some compressed."""
    held = {}
    with opened(path, 2**29) as file:
        content = memoryview(file.read())
        header, end = bytes(content[:520]), len(content)
        if header.startswith(b"MATLAB 7.3") or b"\x89HDF\r\n\x1a\n" in (header[:8], header[512:]):
            raise DataError(f"{path}: a MATLAB 7.3 file, which is HDF5; save it with -v6 or -v7")
        order = {b"IM": "<", b"MI": ">"}.get(header[126:128])
        if order is None:
            raise DataError(f"{path}: byte 126 holds {header[126:128].hex() or 'nothing'}, "
                            f"expected 494d or 4d49 (MATLAB 5); put the right file there")  # fmt: skip
        for kind, size, begin in itertools.islice(mat_elements(content, order, 128), 1000):
            if begin + size > end:
                raise DataError(f"{path}: ends at byte {end}, expected {begin + size}; delete it and run again")
            if kind in (14, 15):
                mat_variable(path, functools.partial(matrix, content[begin - 8 : begin + size], kind), order, held)
    return held


def mat_elements(content, order, at):
    """Yield (type, size, place) of the elements that follow each other from `at` on.

    A tag is type and size, 4 bytes each; a short element has both in the first 4 bytes, 2 each, and its content in the
    others. Elements begin at multiples of 8 but for those behind compressed ones.
    """
    while at + 8 <= len(content):
        kind, size = struct.unpack_from(order + "II", content, at)
        begin = at + 8
        if kind >> 16:
            kind, size, begin = kind & 0xFFFF, kind >> 16, at + 4
        yield kind, size, begin
        at = begin + size if kind == 15 else at + 8 * -(-(begin + size - at) // 8)


def matrix(element, kind, limit):
    """The first `limit` bytes of an element of type 14, its tag included, or of what one of type 15 holds."""
    return zlib.decompressobj().decompress(element[8:], limit) if kind == 15 else element[:limit]


def mat_variable(path, first_bytes, order, held):
    """Put the values of a matrix into `held` if it is X or y; of every other, only the first bytes are looked at."""
    head = first_bytes(256)
    parts = list(itertools.islice(mat_elements(head, order, 8), 4))  # flags, dimensions, name, values
    if len(parts) < 3:
        return
    flags, shape, name = (bytes(head[begin : begin + size]) for _, size, begin in parts[:3])
    name, shape = name.decode("latin-1"), np.frombuffer(shape[: len(shape) // 4 * 4], order + "u4").tolist()
    if name not in SVHN_LIMITS or name in held:
        return
    kind, size, begin = parts[3] if len(parts) > 3 else (0, 0, 0)
    flags, count = int.from_bytes(flags[:4], "little" if order == "<" else "big"), math.prod(shape)
    dtype = np.dtype(order + MAT_TYPES.get(kind, "V1"))
    what = "complex" if flags & 0x800 else MAT_CLASSES.get(flags & 0xFF)
    fits = dtype == np.uint8 and len(shape) == 4 and shape[:3] == [32, 32, 3] if name == "X" else kind in MAT_TYPES
    if what or not fits or not 0 < count <= SVHN_LIMITS[name] or size != count * dtype.itemsize:
        what = what or f"{dtype.name} {tuple(shape)} in {size} bytes"
        raise DataError(f"{path}: {name} is {what}, expected X uint8 (32, 32, 3, N) and y (N, 1), "
                        f"N at most {SVHN_LIMITS['y']}; put the right file there")  # fmt: skip
    content = first_bytes(begin + size + 8)
    if not begin + size <= len(content) < begin + size + 8:  # a multiple of 8
        raise DataError(f"{path}: {name} ends early or late; delete it and run again")
    held[name] = np.frombuffer(content, dtype, count, begin)


# ---------------------------------------------------------------- downloads


def download(path, urls, checksum):
    """Fetch `path` from the first url that serves the right content; it appears under its name only when whole.

    The checksum is the SHA-256 of the file as it is served; tensorflow-datasets lists the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    problems = []
    for url in urls:
        try:
            print(f"downloading {url}", flush=True)
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read(2**28)  # more than any of the files has
            if hashlib.sha256(content).hexdigest() != checksum:
                raise ValueError("wrong checksum")
        except (OSError, http.client.HTTPException, ValueError) as error:
            problems.append(f"{urllib.parse.urlsplit(url).netloc}: {getattr(error, 'reason', error)}")
        else:
            write(path, content)  # a full disk is no fault of the server's
            return
    raise DataError(f"no {path} and no download ({'; '.join(problems)}); get {path.name} elsewhere and put it into "
                    f"{path.parent}, or name the folder above it with --data-dir")  # fmt: skip


def compare_with_published(path, checksum):
    """Say so if a file that was found is not the one that `download` would fetch; it may be right all the same."""
    if hashlib.sha256(np.memmap(path, mode="r")).hexdigest() != checksum:
        print(f"note: {path}: not the published file (its SHA-256 differs); read all the same", flush=True)


# ---------------------------------------------------------------- files out: whole, or not at all


def write(path, content):
    """Write a file so that it is there whole or not at all, after a power cut too. A link stays a link."""
    target = Path(os.path.realpath(path))  # path.resolve() would raise a RuntimeError where links go round
    part = target.with_name(f"{target.name}.{platform.node()}.{os.getpid()}.part")  # others may be after the same file
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else the new name may reach the disk before the content
        os.replace(part, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, this fails, too, and would hide why
            part.unlink()


def save(path, tensors):
    """torch.save any structure of tensors and plain values; `load_tensors` reads it."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write(path, buffer.getbuffer())  # no copy


def load_tensors(path):
    """What torch.save wrote to `path`: tensors and plain values only, no pickled code is run."""
    with path.open("rb") as file:  # an OSError, if it cannot be read
        try:
            if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():  # torch.load does not look at checksums
                raise ValueError("a wrong checksum")
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, about kinds of files that it then refuses
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # torch.load raises whatever the damaged bytes lead to
            raise DataError(f"{path}: not a PyTorch file of plain tensors, or a damaged one; a teacher's "
                            "is made by torch.save(net.state_dict(), FILE)") from None  # fmt: skip


def same_form(a, b):
    """Whether all that is in `a`, nested dicts, lists and tensors, is in `b` with the same types and shapes."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() <= b.keys() and all(same_form(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same_form, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and (a.shape, a.dtype, a.layout) == (b.shape, b.dtype, b.layout)
    return type(a) is type(b)


@contextlib.contextmanager
def claimed(out, files, resume):
    """Make the run's folder, see that it can be written, and hold it: two runs at once would mix their files."""
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()
    lock = os.open(out, os.O_RDONLY) if fcntl else None
    try:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out}: another run is at work there; begin elsewhere, with --out DIR") from None
        except OSError as error:  # a file system without locks
            raise OSError(error.errno, error.strerror, str(out)) from None
        resumable = (out / "checkpoint.pt").is_file()
        if any((out / name).is_file() for name in files) and not (resume and resumable):
            advice = "--resume goes on with it" if resumable else "it has no checkpoint.pt to go on from"
            raise DataError(f"{out}: holds an earlier run; {advice}, --out DIR begins elsewhere")
        for name in (*files, "transfer/*.pt"):
            for part in out.glob(f"{name}.*.part"):  # a run was killed while it wrote
                part.unlink()
        yield
    finally:
        if fcntl:
            os.close(lock)


def csv_rows(rows):
    """Dicts as the bytes of a CSV file: a column for every key of any row, in order of first appearance."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(key for row in rows for key in row))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def png(images, columns=8):
    """Images in [0, 1], (N, C, H, W), as the bytes of one PNG picture with a grid of them; grey unless C is 3."""
    if images.shape[1] not in (1, 3):
        images = images[:, :1]
    n, channels, height, width = images.shape
    columns = min(columns, n)
    grid = images[: n // columns * columns].unflatten(0, (-1, columns))  # (rows, columns, C, H, W)
    pixels = (grid.permute(0, 3, 1, 4, 2) * 255).round().byte().reshape(-1, columns * width * channels)
    lines = F.pad(pixels, (1, 0)).numpy().tobytes()  # each line begins with its filter type, 0

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", columns * width, len(pixels), 8, 0 if channels == 1 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def svg_samples(pictures, count=32):
    """The upper `count` pixel lines of pictures that `png` wrote, [(name, path), ...], as one SVG with their names."""
    parts, y, widest = [], 4, 0
    left = 8 + 7 * max(len(name) for name, _ in pictures)
    for name, path in pictures:
        if not path.exists():
            raise DataError(f"{path}: no such picture; the run's command with --resume makes it, unless it was "
                            "--method noise, which has none")  # fmt: skip
        content = read(path, 2**26)
        try:
            width, height, _, colour = struct.unpack(">IIBB", content[16:26])
            height, channels = min(height, count), {0: 1, 2: 3}[colour]
            if not (height > 0 and 0 < width <= 2**15):  # what would be unpacked
                raise ValueError
            lines = zlib.decompressobj().decompress(content[41:], height * (1 + width * channels))  # as `png` writes
            pixels = torch.frombuffer(bytearray(lines), dtype=torch.uint8).view(height, -1)[:, 1:]
            row = png(pixels.reshape(1, height, width, channels).permute(0, 3, 1, 2) / 255)
        except (KeyError, RuntimeError, ValueError, struct.error, zlib.error):
            raise DataError(f"{path}: no samples of this program in it; make the run again") from None
        parts.append(f'<text x="4" y="{y + height / 2 + 4:.0f}">{html.escape(name)}</text><image x="{left}" y="{y}" '
                     f'width="{width}" height="{height}" '
                     f'href="data:image/png;base64,{base64.b64encode(row).decode()}"/>')  # fmt: skip
        y, widest = y + height + 4, max(widest, width)
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + widest + 4} {y}" font-family="sans-serif" '
            'font-size="12"><rect width="100%" height="100%" fill="white"/>')  # fmt: skip
    return "\n".join([head, *parts, "</svg>\n"]).encode(errors="replace")


def ticks(low, high):
    """Round numbers from low to high for an axis, two to six of them."""
    steps = (digit * 10.0**power for power in range(-9, 16) for digit in (1, 2, 5))
    step = next(step for step in steps if (high - low) / step < 6)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def svg_curves(runs, x_label="student step"):
    """Curves in percent, [(name, [(x, y), ...]), ...], as the bytes of one SVG picture.

    Equal names share one colour and one label.
    The vertical axis begins at the lowest y of the runs' second halves: what is below it, a run's beginning, is cut.
    """
    last = max(run[-1][0] for _, run in runs)
    top = max(y for _, run in runs for _, y in run)
    bottom = min(y for _, run in runs for _, y in run[len(run) // 2 :])
    bottom -= max(top - bottom, 0.1) / 10
    width, height = 640, 360
    colours = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000", "#999"
    styles = itertools.cycle(itertools.product(("none", "6 3"), colours))  # the second eight are dashed

    def right(x):
        return 50 + (width - 60) * x / (last or 1)

    def down(y):
        return 20 + (height - 50) * (top - y) / (top - bottom)

    def label(x, y, text, more=""):
        return f'<text x="{x}" y="{y}" {more}text-anchor="end">{html.escape(text)}</text>'

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
             'font-size="12">', '<rect width="100%" height="100%" fill="white"/>',
             f'<clipPath id="axes"><rect x="50" y="15" width="{width - 55}" height="{height - 45}"/></clipPath>',
             f'<path d="M50 20V{height - 30}H{width - 10}" fill="none" stroke="#888"/>',
             label(width - 10, height - 2, x_label)]  # fmt: skip
    for y in ticks(bottom, top):
        parts.append(f'<path d="M50 {down(y):.1f}H{width - 10}" stroke="#ddd"/>')
        parts.append(label(45, f"{down(y) + 4:.1f}", f"{y:.10g} %"))
    parts += [label(f"{right(x) + 4:.1f}", height - 15, f"{x:.10g}") for x in ticks(0, last)]
    groups = dict(zip(dict.fromkeys(name for name, _ in runs), styles))
    for name, run in runs:
        points = " ".join(f"{right(x):.1f},{down(y):.1f}" for x, y in run)
        dash, colour = groups[name]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-dasharray="{dash}" '
                     'stroke-width="1.5" clip-path="url(#axes)"/>')  # fmt: skip
    halo = 'paint-order="stroke" stroke="white" stroke-width="3"'  # a curve may pass there
    for i, (name, (dash, colour)) in enumerate(groups.items(), 1):
        text = name if dash == "none" else f"{name} - -"
        parts.append(label(width - 14, height - 40 - 16 * (len(groups) - i), text, f'fill="{colour}" {halo} '))
    return "\n".join([*parts, "</svg>\n"]).encode(errors="replace")


def git_commit():
    """This program's commit, with "-dirty" where its files were changed since; None outside its repository."""
    git, file = ["git", "-C", str(Path(__file__).parent)], Path(__file__).name
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", file], capture_output=True, check=True)
        command = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------- finished runs, as a table

FIGURES = ("teacher_accuracy", "accuracy_last", "accuracy_max", "accuracy_mean", "accuracy_variance")
MAY_DIFFER = {"seed", "teacher_seed", "teacher_crc", "threads", "device"}  # between the runs of one row
RESULTS = "run | teacher | student | each seed | minutes | stored kB"  # of synthetic images, or of the memory
ROBUSTNESS = "run | maximum | μ | σ² | μ, second half | σ², second half"
SAMPLES = "run | difference within a class | agreement, fresh images | deviation of L_oh | of L_ie"
IMAGES = {"diversity": 3, "agreement_fresh": 1, "L_oh deviation": 4, "L_ie deviation": 4}  # and their decimals


class Finished(NamedTuple):
    figures: dict
    curve: list  # [(step, minutes, accuracy), ...]
    settings: dict


def finished(folder):
    """A finished run, from its result.json and metrics.csv."""
    damaged = DataError(f"{folder}: metrics.csv or result.json is damaged; the run's command with --resume writes them")
    try:
        rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines(), strict=True))
        measured = [row for row in rows if row["accuracy"]]
        curve = [(int(row["step"]), float(row["seconds"]) / 60, float(row["accuracy"])) for row in measured]
        result = json.loads((folder / "result.json").read_text())
        settings = dict(**result["args"])
        figures = {key: float(result[key]) for key in (*FIGURES, "seconds", "steps") if curve}
        figures["stored"] = float(result["replay_bytes"]) + float((result.get("transfer_set") or {}).get("bytes", 0))
        for key in ("diversity", "agreement_fresh"):
            if result.get(key) is not None:  # kd has no synthetic images
                figures[key] = float(result[key])
        trained = [row for row in rows if row.get("stage") == "generator"]  # before S: RDSKD
        if len(trained) > 3:
            for key in ("L_oh", "L_ie"):
                figures[f"{key} deviation"] = statistics.stdev(float(row[key]) for row in trained[len(trained) // 2 :])
    except (FileNotFoundError, NotADirectoryError):
        if (Path(folder) / "checkpoint.pt").exists():
            raise DataError(f"{folder}: the run is not finished; its command with --resume goes on") from None
        raise DataError(f"{folder}: no finished run there, a folder with metrics.csv and result.json") from None
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError, csv.Error):
        raise damaged from None
    if not rows or any(None in row or None in row.values() for row in rows):  # a row of another length
        raise damaged
    if not curve:
        raise DataError(f"{folder}: the run was not evaluated, it has no accuracies")
    sound = all(0 <= a <= 100 and 0 <= step < 2**53 and 0 <= minutes < 2**53 for step, minutes, a in curve)
    if not sound or not all(0 <= figure < 2**53 for figure in figures.values()) or curve[-1][0] != figures["steps"]:
        raise damaged
    return Finished(figures, curve, settings)


def without_seed(folder):
    """The name that runs which differ in the seed share: they end in -0, -1, ..."""
    return re.sub(r"-\d+$", "", Path(folder).absolute().name)


def check_seeds(runs):
    """The runs of a row, {folder: settings}, must share what may not differ, and no seed may count twice."""
    seen = {}
    first, expected = next(iter(runs.items()))
    for folder, settings in runs.items():
        for key in sorted((expected.keys() | settings.keys()) - MAY_DIFFER):
            if expected.get(key) != settings.get(key):
                raise DataError(f"{first} and {folder}: their names differ in the seed alone, the runs in {key!r}")
        seeds = str([settings.get(key) for key in ("seed", "teacher_seed")])
        if seeds in seen:
            raise DataError(f"{seen[seeds]} and {folder}: the same run twice, with the same seeds; give one of them")
        seen[seeds] = folder


def results_table(folders):
    """Three tables in Markdown, with a row for each group of runs that differ in the seed only: means over the seeds.

    The first has the last step's student, the second what PRE-DFKD reports of all evaluations. The third is about the
    synthetic images, and how much L_oh and L_ie of an RDSKD generator vary in the second half of its training.
    """
    groups = {}
    for folder in map(Path, dict.fromkeys(folders)):
        groups.setdefault(without_seed(folder), {})[folder] = finished(folder)
    results, robustness, samples = [], [], []
    for name, group in groups.items():
        check_seeds({folder: run.settings for folder, run in group.items()})
        runs = list(group.values())
        known = set.intersection(*(set(run.figures) for run in runs))
        mean = {key: statistics.fmean(run.figures[key] for run in runs) for key in known}
        last = [run.figures["accuracy_last"] for run in runs]
        deviation = f" ± {statistics.stdev(last):.2f}" if len(last) > 1 else ""
        halves = [[accuracy for *_, accuracy in run.curve[len(run.curve) // 2 :]] for run in runs]
        results.append([
            name, f"{mean['teacher_accuracy']:.2f}", f"{mean['accuracy_last']:.2f}{deviation}",
            ", ".join(f"{v:.2f}" for v in last), f"{mean['seconds'] / 60:.1f}", f"{mean['stored'] / 1000:.0f}",
        ])  # fmt: skip
        robustness.append([
            name, f"{mean['accuracy_max']:.2f}", f"{mean['accuracy_mean']:.2f}", f"{mean['accuracy_variance']:.2f}",
            f"{statistics.fmean(map(statistics.fmean, halves)):.2f}",
            f"{statistics.fmean(map(statistics.pvariance, halves)):.3f}",
        ])  # fmt: skip
        cells = [f"{mean[key]:.{digits}f}" if key in mean else "–" for key, digits in IMAGES.items()]
        samples.append([name, *cells])
    tables = (RESULTS, results), (ROBUSTNESS, robustness), (SAMPLES, samples)
    return "\n\n".join(markdown(*table) for table in tables)


def markdown(headings, rows):
    lines = [f"| {headings} |", "|---" * (headings.count("|") + 1) + "|"]
    for name, *figures in rows:  # a folder may be called anything
        cells = [" ".join(name.split()).replace("|", "\\|"), *figures]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
