"""Data sets: `glyphs`, drawn here, and MNIST, downloaded or read from files; checked, parsed, normalised.

    data = load("mnist", "datasets")        # images uint8 (N, C, 32, 32), labels int64 (N,)
    x = normalise(data.test_images, "mnist")  # float32, zero mean and unit variance per channel

Only teacher training, the `kd` upper bound and evaluation are given images. Distillation knows `INFO` and nothing else.
Every malformed file raises DataError with one line that names the file and says what to do.
"""

import gzip
import hashlib
import http.client
import os
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


class DataError(Exception):
    """A data set cannot be had: the message says which file is wrong and what to do."""


class Info(NamedTuple):
    """What distillation may know of a data set: the shape of the problem and the normalisation, no image."""

    classes: int
    channels: int
    mean: tuple
    std: tuple
    mirror: bool = False  # whether an image flipped left to right is as good an example of its class


class Data(NamedTuple):
    train_images: torch.Tensor  # (N, C, 32, 32) uint8
    train_labels: torch.Tensor  # (N,) int64
    test_images: torch.Tensor
    test_labels: torch.Tensor


INFO = {
    "glyphs": Info(10, 1, (0.168,), (0.282,)),
    "mnist": Info(10, 1, (0.1307,), (0.3081,)),
}


def load(name, data_dir="datasets"):
    """The data set `name`; files are looked for in, and downloaded to, the folder `data_dir`/`name`."""
    if name == "glyphs":
        arrays = glyphs(20_000, seed=0) + glyphs(4_000, seed=1)
    else:
        arrays = idx_data_set(name, Path(data_dir) / name)
    images, labels = arrays[0::2], arrays[1::2]
    (train_x, test_x), (train_y, test_y) = map(to_32x32, images), map(torch.from_numpy, labels)
    return Data(train_x, train_y, test_x, test_y)


def to_32x32(images):
    """uint8 array (N, 28, 28) -> uint8 tensor (N, 1, 32, 32), bilinear: the papers resize MNIST for LeNet-5 [C]."""
    chunks = torch.from_numpy(images).unsqueeze(1).split(4096)
    return torch.cat([F.interpolate(c.float(), size=32, mode="bilinear").round_().byte() for c in chunks])


def normalise(images, name):
    """uint8 images (B, C, H, W) -> float32 with the mean and standard deviation of data set `name` taken out."""
    mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (INFO[name].mean, INFO[name].std))
    return (images / 255 - mean) / std


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


# ---------------------------------------------------------------- MNIST: four IDX files

# File name -> SHA-256 of its decompressed content: mirrors compress the same content differently.
IDX_FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "https://azureopendatastorage.blob.core.windows.net/mnist/",
    ),
}


def idx_data_set(name, folder):
    """Training images, training labels, test images, test labels from the four IDX files in `folder`."""
    arrays = []
    for file, sha256 in IDX_FILES.items():
        path = next((p for p in (folder / file, folder / f"{file}.gz") if p.exists()), None)
        if path is None:
            path = folder / f"{file}.gz"
            download(path, [mirror + path.name for mirror in MIRRORS[name]], sha256)
        arrays.append(parse_idx(path, read(path), 3 if "images" in file else 1))
        if len(arrays) % 2 == 0:
            check_labels(path, *arrays[-2:], INFO[name].classes)
    arrays[1::2] = [labels.astype(np.int64) for labels in arrays[1::2]]
    return arrays


def read(path):
    """The content of a file, decompressed if its name ends in .gz."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged or truncated gzip file ({error}); delete it and run again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def parse_idx(path, content, dimensions):
    """An IDX file of unsigned bytes: 0, 0, 8, the number of dimensions, each as a big-endian uint32, the elements."""
    magic, header = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    if content[:4] != magic:
        raise DataError(f"{path}: begins with {content[:4].hex() or 'nothing'}, expected {magic.hex()} (IDX, "
                        f"unsigned bytes, {dimensions} dimensions); put the right file there")  # fmt: skip
    shape = tuple(np.frombuffer(content[4:header].ljust(header - 4, b"\0"), ">u4").tolist())
    expected = header + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise DataError(f"{path}: {len(content)} bytes, expected {expected} for {shape}; delete it and run again")
    if dimensions == 3 and shape[1:] != (28, 28):
        raise DataError(f"{path}: images of {shape[1]} x {shape[2]}, expected 28 x 28; put the right file there")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def check_labels(path, images, labels, classes):
    if len(images) != len(labels) or not len(labels):
        raise DataError(f"{path}: {len(labels)} labels for {len(images)} images; put files there that belong together")
    if labels.max() >= classes:
        raise DataError(f"{path}: label {labels.max()}, expected 0 to {classes - 1}; put the right file there")


# ---------------------------------------------------------------- downloads


def download(path, urls, sha256):
    """Fetch `path` from the first url that serves the right content; it appears under its name only when whole."""
    part = path.with_name(f"{path.name}.part")
    problems = []
    for url in urls:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            print(f"downloading {url}", flush=True)
            with urllib.request.urlopen(url, timeout=30) as response:
                part.write_bytes(response.read())
            content = gzip.decompress(part.read_bytes())
            if hashlib.sha256(content).hexdigest() != sha256:
                raise ValueError("wrong checksum")
            os.replace(part, path)
            return
        except (urllib.error.URLError, http.client.HTTPException, EOFError, zlib.error, ValueError) as error:
            problems.append(f"{urllib.request.urlparse(url).netloc}: {getattr(error, 'reason', error)}")
        except OSError as error:
            problems.append(str(error))
        finally:
            part.unlink(missing_ok=True)
    raise DataError(f"no {path} and no download ({'; '.join(problems)}); get {path.name} elsewhere and put it into "
                    f"{path.parent}, or name the folder above it with --data-dir")  # fmt: skip
