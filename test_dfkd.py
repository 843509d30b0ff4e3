"""The tests: mathematics, behaviour, bad input (./run.sh test), and the benchmark (./run.sh bench)."""

import argparse
import ast
import base64
import contextlib
import copy
import csv
import functools
import gzip
import hashlib
import io
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import weakref
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import dfkd
import generators as g
import models
import replay

HERE = Path(__file__).parent
GLYPHS = data.INFO["glyphs"]
GENERATORS = ("rdskd", "pre", "dafl", "mskd")  # the methods with a generator
SYNTHESES = ("soft-target", "zskd", "deepinversion")  # the methods that optimise images


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def glyphs_are_drawn_once():
    with pytest.MonkeyPatch.context() as patch:
        drawn = data.load("glyphs")
        drawn = drawn._replace(test_images=drawn.test_images[:1000], test_labels=drawn.test_labels[:1000])
        load = data.load
        patch.setattr(data, "load", lambda name, *folder: drawn if name == "glyphs" else load(name, *folder))
        yield drawn


@pytest.fixture(scope="session", autouse=True)
def networks_are_tried_once():
    """Trying the networks takes most of dfkd.parse's time. Those of the user's files are new ones each time."""
    with pytest.MonkeyPatch.context() as patch:
        first, again = models.tried, functools.cache(models.tried)
        patch.setattr(models, "tried", lambda name, info: (first if ":" in name else again)(name, info))
        yield


@pytest.fixture
def spy(monkeypatch):
    """spy(module, name) -> a list to which each call of this function adds all its arguments, and its result."""

    def watch(module, name):
        calls, function = [], getattr(module, name)

        def noted(*args, **more):
            calls.append(((*args, *more.values()), function(*args, **more)))
            return calls[-1][1]

        monkeypatch.setattr(module, name, noted)
        return calls

    return watch


# ---------------------------------------------------------------- the losses, against formulas written out in float64


def softmax(t):
    e = np.exp(t - t.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def one_hot(t):
    return -np.log(softmax(t).max(1)).mean()


def entropy(t):
    p = softmax(t).mean(0)
    return (p * np.log(p)).sum()


def ratio(x, y):
    """The distance of the halves of y over that of the halves of x."""
    return np.linalg.norm(y[len(y) // 2 :] - y[: len(y) // 2]) / np.linalg.norm(x[len(x) // 2 :] - x[: len(x) // 2])


def kl(p, q):
    return (p * np.log(p / q)).sum(1).mean()


def js(s, t):
    p, q = softmax(s / 3), softmax(t / 3)
    return 1 - kl(p, (p + q) / 2) / 2 - kl(q, (p + q) / 2) / 2


@pytest.fixture(params=[1.0, 8.0], ids=["soft", "sharp"])
def batch(request):
    """Images, latents, features, teacher's and student's logits of 6 samples, float64."""
    shapes = dict(x=(6, 2, 5, 5), z=(6, 4), f=(6, 7), t=(6, 3), s=(6, 3))
    return {k: torch.randn(v, dtype=torch.float64) * (request.param if k in "ts" else 1) for k, v in shapes.items()}


def test_losses_equal_their_formulas(batch):
    x, z, f, t, s = batch.values()
    X, Z, f_, t_, s_ = (v.numpy() for v in batch.values())
    y = softmax(s_)
    L_ds, L_ms = 1 / (1 / ratio(X, softmax(t_)) + 1e-20), 1 / (1 / ratio(X, Z) + 1e-5)
    classes = one_hot(t_) + 5 * entropy(t_) / math.log(10)
    pairs = {
        "L_oh": (g.one_hot_loss(t), one_hot(t_)),
        "L_ie": (g.information_entropy_loss(t), entropy(t_)),
        "L_a": (g.activation_loss(f), -np.abs(f_).mean()),
        "L_ds": (g.diversity_seeking_loss(x, t), L_ds),
        "rdskd": (g.rdskd_loss(x, t, (0.3, -0.7)), math.exp(one_hot(t_) - 0.3) + math.exp(entropy(t_) + 0.7) + L_ds),
        "dafl": (g.dafl_loss(t, f, 1, 5, 0.1), classes - 0.1 * np.abs(f_).mean()),
        "mskd": (g.mskd_loss(x, z, t, 1, 5, 0.1), classes + 0.1 * L_ms),
        "L_ms": (g.mode_seeking_loss(x, z), L_ms),
        "L_kd": (g.distillation_loss(s, t, 4.0), 16 * kl(softmax(t_ / 4), softmax(s_ / 4))),
        "L1": (g.logit_distance_loss(s, t), np.abs(s_ - t_).mean()),
        "L_js": (g.js_disagreement_loss(s, t), js(s_, t_)),
        "soft target": (g.soft_target_loss(t, s.softmax(1), 20), -(y * np.log(softmax(t_ / 20))).sum(1).mean()),
        "batch norm": (
            g.batch_norm_loss(x, torch.tensor([0.1, 0.2]), torch.tensor([1.0, 2.0])),
            np.linalg.norm(X.mean((0, 2, 3)) - [0.1, 0.2]) + np.linalg.norm(X.var((0, 2, 3)) - [1, 2]),
        ),
    }
    for name, (ours, formula) in pairs.items():
        assert ours.shape == () and ours.item() == pytest.approx(formula, rel=1e-6), name


def test_losses_have_the_right_gradients(batch):
    x, z, f, t, s = (v.requires_grad_() for v in batch.values())
    for loss, inputs in [
        (lambda x, t: g.rdskd_loss(x, t, (0.3, -0.7)), (x, t)),
        (lambda t, f: g.dafl_loss(t, f, 1, 5, 0.1), (t, f)),
        (g.mode_seeking_loss, (x, z)),
        (lambda s: g.js_disagreement_loss(s, t), (s,)),
        (lambda s, t: g.distillation_loss(s, t, 4.0), (s, t)),
        (g.total_variation, (x,)),
        (lambda x: g.batch_norm_loss(x, torch.tensor([0.1, 0.2]), torch.tensor([1.0, 2.0])), (x,)),
    ]:
        assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)
    assert torch.autograd.grad(g.js_disagreement_loss(s, t), t, allow_unused=True) == (None,)  # the teacher is detached


def test_the_batch_norm_loss_has_further_derivatives_and_works_with_torch_func(batch):
    x, loss = batch["x"].requires_grad_(), lambda x: g.batch_norm_loss(x, torch.zeros(2), torch.ones(2))
    assert torch.autograd.gradgradcheck(loss, x, fast_mode=True)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), torch.autograd.grad(loss(x), x)[0])


@pytest.mark.parametrize("classes", [2, 10])
def test_closed_forms(classes):
    uniform, certain = torch.zeros(8, classes), 200 * torch.eye(classes)
    for t in (uniform, certain):
        assert g.information_entropy_loss(t).item() == pytest.approx(-math.log(classes), rel=1e-6)
    assert g.one_hot_loss(uniform).item() == pytest.approx(math.log(classes)) and g.one_hot_loss(certain) == 0
    assert g.js_disagreement_loss(certain, certain).item() == pytest.approx(1)
    assert g.js_disagreement_loss(certain, certain.roll(1, 0)).item() == pytest.approx(1 - math.log(2), rel=1e-5)
    x = torch.tensor([[0.0, 1], [0, 3]])  # differences: horizontal 1, 3; vertical 0, 2; on the diagonals 3, -1
    assert g.total_variation(x[None, None]).item() == pytest.approx(math.sqrt(10) + 2 + 3 + 1)


@pytest.mark.parametrize("low", [-500.0, -1e30, -math.inf])
def test_a_class_without_mass_gives_no_nan(low):
    t = torch.tensor([[500.0, 0, low]]).repeat(4, 1).requires_grad_()
    loss = g.information_entropy_loss(t)
    loss.backward()
    assert loss.item() == 0 and t.grad.isfinite().all()


@pytest.mark.parametrize("loss", [g.diversity_seeking_loss, g.mode_seeking_loss])
def test_diversity_takes_odd_batches_and_identical_halves(loss):
    x, t = torch.randn(7, 1, 4, 4), torch.randn(7, 3)
    assert loss(x, t) == loss(x[:6], t[:6])
    assert loss(2 * x, t).item() == pytest.approx(loss(x, t).item() / 2, rel=1e-3)  # distance is rewarded
    for other in (0.0, 1.0):
        x = torch.randn(3, 1, 4, 4).repeat(2, 1, 1, 1).requires_grad_()
        t = (torch.randn(3, 3).repeat(2, 1) + other * torch.randn(6, 3)).requires_grad_()
        value = loss(x, t)
        value.backward()
        assert value.isfinite() and x.grad.isfinite().all() and t.grad.isfinite().all()


def test_weight_similarities():
    weight = torch.tensor([[1.0, 0], [2, 0], [0, 3], [-1, 0]])
    cosines = torch.tensor([[1.0, 1, 0, -1], [1, 1, 0, -1], [0, 0, 1, 0], [-1, -1, 0, 1]])
    assert torch.allclose(g.weight_correlation(weight), cosines)
    scaled = torch.tensor([[1.0, 1, 0.5, 0], [1, 1, 0.5, 0], [0, 0, 1, 0], [0, 0, 0.5, 1]])
    assert torch.allclose(g.dirichlet_concentrations(weight), scaled)
    R = g.weight_correlation(torch.randn(12, 5))
    assert torch.equal(R, R.T) and torch.equal(R.diagonal(), torch.ones(12))
    assert torch.linalg.eigvalsh(R.double()).min() > -1e-6
    assert not g.dirichlet_concentrations(weight[[0, 0, 1]]).any()  # all classes alike: 0, not 0/0
    assert g.rescaled(torch.ones(2, 1, 4, 4), 0.5, 0.25).isfinite().all()


def test_vae_losses_equal_their_formulas():
    x, x_hat, t, t_hat, mu, log_var = (torch.randn(4, n, dtype=torch.float64) for n in (9, 9, 3, 3, 5, 5))
    L_rec = (x - x_hat).abs().mean() + (t - t_hat).abs().mean()
    assert replay.reconstruction_loss(x, x_hat, t, t_hat).item() == pytest.approx(L_rec.item())
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mu, (log_var / 2).exp()), normal(0.0, 1.0)).sum(1).mean()
    assert replay.kl_divergence(mu, log_var).item() == pytest.approx(kl.item())
    assert replay.vae_loss(L_rec, mu, log_var).item() == pytest.approx((L_rec + 1e-5 * kl).item(), rel=1e-12)
    z, t_ = mu.numpy(), t.numpy()
    balance = one_hot(t_) + 5 * entropy(t_) / math.log(10) + ((z.var(0, ddof=1) - 1) ** 2).mean()
    balance += (z.mean(0) ** 2).mean()
    assert replay.latent_balance_loss(mu, t).item() == pytest.approx(balance)


# ---------------------------------------------------------------- images optimised against a teacher


def test_sampled_features_have_the_modelled_covariance():
    weight = torch.randn(6, 4)  # more units than inputs: R is singular
    h = g.feature_distribution(weight, sigma=1.5).sample((100_000,))
    assert torch.allclose(h.T.cov(), 1.5**2 * g.weight_correlation(weight), atol=0.05)
    assert h.mean(0).abs().max() < 0.03
    rest = nn.Linear(6, 3).requires_grad_(False)
    y = g.soft_labels(weight, rest, 1.5, 4.0, 50_000)
    assert torch.allclose(y.mean(0), (rest(h) / 4).softmax(1).mean(0), atol=0.01) and y.shape == (50_000, 3)


@pytest.mark.parametrize("name, layer", [
    ("lenet5", "fc2"), ("lenet5_half", "logits"), ("alexnet", "fc2"), ("wrn-16-1", "logits"),
])  # fmt: skip
def test_networks_split_in_two(name, layer):
    net = models.build(name).eval()
    linear, rest = net.split(layer)
    outputs = []
    with torch.no_grad():
        linear.register_forward_hook(lambda m, inputs, output: outputs.append(output))
        logits = net(torch.randn(2, 1, 32, 32))
        assert torch.allclose(rest(outputs[0]), logits, atol=1e-6)
    assert (linear is net.classifier) == (layer == "logits")
    with pytest.raises(ValueError, match="no layer 'fc3'"):
        net.split("fc3")


def test_sigma_makes_the_teacher_as_sure_as_asked():
    weight, last = torch.randn(20, 30), nn.Linear(20, 10).requires_grad_(False)
    rest = nn.Sequential(nn.ReLU(), last)
    sigma = g.feature_scale(weight, rest, L_oh=0.3)
    h = g.feature_distribution(weight, sigma).sample((20_000,))
    assert float(g.one_hot_loss(rest(h))) == pytest.approx(0.3, abs=0.02)
    assert g.feature_scale(weight, rest, L_oh=0.1) > sigma
    last.bias.zero_()
    before = g.feature_scale(weight, rest, L_oh=0.3)
    last.weight.mul_(2)
    assert g.feature_scale(weight, rest, L_oh=0.3) == pytest.approx(before / 2, rel=1e-4)  # the unit cancels
    with pytest.raises(ValueError, match="no sigma"):
        g.feature_scale(weight, lambda h: 0 * h, L_oh=0.3)  # never sure


def test_dirichlet_targets():
    weight, k = torch.randn(10, 6), torch.arange(20_000) % 10
    y = g.dirichlet_targets(weight, k, torch.tensor([1.0, 0.1]).repeat_interleave(10_000))
    assert torch.allclose(y.sum(1), torch.ones(len(y)), atol=1e-5) and (y >= 0).all()
    smooth, sharp = y[:10_000], y[10_000:]
    assert sharp.max(1).values.mean() > smooth.max(1).values.mean() + 0.2
    c = g.dirichlet_concentrations(weight) + 1e-4
    mean = torch.stack([smooth[k[:10_000] == j].mean(0) for j in range(10)])
    assert torch.allclose(mean, c / c.sum(1, keepdim=True), atol=0.03)


def test_constants_of_the_distributions(spy):
    made = spy(g, "Dirichlet")
    weight = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    g.dirichlet_targets(weight, torch.tensor([0, 0]), torch.tensor([1.0, 0.1]))
    expected = torch.tensor([[1.0001, 0.5001, 0.0001], [0.1001, 0.0501, 0.0001]])
    assert torch.allclose(made[0][1].concentration, expected, rtol=1e-3)
    R = g.feature_distribution(weight, 2.0).covariance_matrix
    assert torch.allclose(R.diagonal(), torch.tensor(4.0004), atol=1e-5)


def test_augmentation_moves_images_a_little():
    x = torch.zeros(2000, 1, 32, 32)
    x[:, :, 15:17, 15:17] = 1
    y = g.augmented(x, mirror=False)
    rows = (y.sum((1, 3)) * (torch.arange(32) - 15.5)).sum(1) / y.sum((1, 2, 3))
    assert y.shape == x.shape and 2.1 < rows.std() < 2.6 and 4 < rows.abs().max() < 6.5  # 4 pixels, turned, over scale
    assert y.mean() / x.mean() == pytest.approx(1, abs=0.1)
    left = torch.zeros(2000, 3, 32, 32)
    left[..., :16] = 1
    assert g.augmented(left, mirror=False)[..., 2].mean() > 0.95
    assert 0.4 < g.augmented(left, mirror=True)[..., 2].mean() < 0.6


@pytest.mark.parametrize("mirror, degrees", [(False, 20), (True, 20), (False, 45)])
def test_augmentation_turns_scales_and_shifts(spy, mirror, degrees):
    grids = spy(F, "affine_grid")
    g.augmented(torch.zeros(4000, 1, 8, 8), mirror, degrees)
    (theta, *_), _ = grids[0]
    A, shift = theta.split((2, 1), 2)
    scale = A[:, :, 1].norm(dim=1)
    A = A / scale[:, None, None]
    assert torch.allclose(A.mT @ A, torch.eye(2).expand_as(A), atol=1e-5)  # a rotation, or a mirrored one
    angle = torch.atan2(-A[:, 0, 1], A[:, 1, 1]).rad2deg()
    for values, low, high in ((angle, -degrees, degrees), (scale, 0.8, 1.2), (shift, -0.25, 0.25)):
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
    assert 0.45 < (torch.linalg.det(A) < 0).float().mean() < 0.55 if mirror else (torch.linalg.det(A) > 0).all()


def test_images_are_mixed_in_pairs():
    mixtures = g.mixed(torch.eye(2000, dtype=torch.float64).view(2000, 2000, 1, 1)).flatten(1)
    a = mixtures.diagonal()
    assert torch.allclose(mixtures.sum(1), torch.ones(2000, dtype=torch.float64)) and (mixtures > 0).sum(1).max() == 2
    assert ((mixtures - a.diag() > 0).sum(0) <= 1).all()  # each image is the other one of one pair
    a = a.sort().values
    assert (a - torch.linspace(0, 1, 2000)).abs().max() < 0.04  # Kolmogorov-Smirnov


def test_rolls_go_up_to_two_pixels_round_the_edge():
    x = torch.arange(64.0).view(1, 1, 8, 8)
    rolls = {x.roll((i, j), (2, 3)).numpy().tobytes() for i in range(-2, 3) for j in range(-2, 3)}
    assert {g.rolled(x).numpy().tobytes() for _ in range(400)} == rolls


def test_smooth_noise_is_weak_and_smooth():
    x = g.smooth_noise(2000, 1)
    assert x.std().item() == pytest.approx(0.34, rel=0.03) and x.mean().item() == pytest.approx(0, abs=0.01)
    for a, b in ((x[..., 1:], x[..., :-1]), (x[..., 1:, :], x[..., :-1, :])):
        assert (a - b).std() < x.std() / 2


def test_batch_norm_hooks_leave_nothing_behind():
    net, x = models.build("wrn-16-1").eval(), torch.randn(8, 1, 32, 32)
    before = net(x)
    logits, collected = g.batch_norm_inputs(net, x)
    assert torch.equal(logits, before)
    with pytest.raises(RuntimeError):
        g.batch_norm_inputs(net, x[:, :0])
    assert [layer for layer, _ in collected] == [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert g.batch_norm_prior([(net.bn, torch.randn(2, 64, 3, 3, dtype=torch.double))]).dtype == torch.double
    h = torch.randn(2, 64, 3, 3).bfloat16().requires_grad_()
    exact = h.detach().float().requires_grad_()
    losses = [g.batch_norm_prior([(net.bn, v)]) for v in (h, exact)]
    sum(losses).backward()
    assert losses[0] == losses[1] and torch.equal(h.grad, exact.grad.bfloat16())
    assert not any(m._forward_pre_hooks for m in net.modules())
    on_several_gpus = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(net, nn.BatchNorm1d(10)).eval())
    again = g.batch_norm_inputs(on_several_gpus, x)[1]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(again, collected, strict=True))
    named = nn.Sequential(nn.BatchNorm2d(1))
    named.forward = lambda x: named[0](input=x)
    ((layer, h),) = g.batch_norm_inputs(named, x)[1]
    assert layer is named[0] and h is x


def test_the_batch_norm_term_is_zero_for_the_statistics_that_a_network_has_seen():
    net, x = models.build("wrn-16-1"), torch.randn(8, 1, 32, 32)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
    net(x)
    net.eval()
    logits, seen = g.batch_norm_inputs(net, x)
    _, unseen = g.batch_norm_inputs(net, 2 * x + 1)
    y = torch.zeros(8, dtype=torch.long)

    def loss(collected, a_f):
        return g.deepinversion_loss(x, logits, y, collected, 0.5, 0.25, a_f).item()

    base = F.cross_entropy(logits, y) + 0.5 * g.total_variation(x) + 0.25 * x.square().sum().sqrt()
    assert loss([], 10.0) == pytest.approx(base.item(), rel=1e-5)
    assert loss(seen, 1.0) - loss(seen, 0.0) < 0.1 * (loss(unseen, 1.0) - loss(unseen, 0.0))  # running_var is unbiased


def test_synthesis_finds_the_minimum_and_keeps_its_terms():
    target, start, reports = torch.randn(6, 1, 4, 4), torch.zeros(6, 1, 4, 4), []

    def run(steps, images=slice(None), **more):
        return g.synthesise(lambda x: ((x - target[images]) ** 2).mean(), start[images], steps, 0.05, **more)

    x, L = run(400, report=lambda step, loss: reports.append((step, loss)))
    assert torch.allclose(x, target, atol=0.01) and L < 1e-4 and not start.any() and not x.requires_grad
    assert [step for step, _ in reports] == list(range(50, 401, 50)) and reports[0][1] > 100 * reports[-1][1]
    small, large = run(20, slice(2), factor=2e-6)[0], run(20, factor=6e-6)[0]  # so small that Adam's eps counts
    assert torch.allclose(small, large[:2], atol=1e-5) and not torch.allclose(small, run(20, slice(2))[0], atol=1e-2)
    assert run(60, constrain=lambda x: x.clamp(max=0.5))[0].max() == 0.5
    run(2000, settle=0.01, report=lambda step, loss: reports.append((step, loss)))
    assert 100 < reports[-1][0] < 500  # an early end


def test_synthesis_settles_by_its_rule():
    def taken(values):
        values, steps = iter(values), []
        g.synthesise(lambda x: 0 * x.sum() + next(values), torch.zeros(1, 1, 1, 1), 2000, 0.1, settle=0.01,
                     report=lambda step, loss: steps.append(step))  # fmt: skip
        return steps[-1]

    assert taken(1.0 + i // 50 for i in range(2000)) == 150  # at the earliest
    assert taken(100 + 0.5 ** (i // 50) for i in range(2000)) == 400  # 1 % of the decrease so far, not of the loss


@pytest.mark.parametrize("method, factor, least, alike", [
    ("soft-target", 5, 0.65, 0.9), ("zskd", 2, 0.8, 0.85), ("deepinversion", 5, 0.9, 0.75),
])  # fmt: skip
def test_images_are_optimised_towards_their_targets(teacher_file, watch, monkeypatch, method, factor, least, alike):
    """Half of ZSKD's targets are nearly one-hot at tau = 20: logits beyond what the range of pixels can cause.
    Soft targets between two classes do not survive every augmentation."""
    teacher, seen, synthesise = models.load(teacher_file, "lenet5", GLYPHS, "cpu", "fp32"), {}, g.synthesise

    def spied(objective, images, *rest):
        x, L = synthesise(objective, images, *rest)
        seen.update(before=objective(torch.randn_like(x)), after=objective(x))
        return x, L

    monkeypatch.setattr(g, "synthesise", spied)
    teacher.requires_grad_(True)  # its weights get no gradient all the same
    flags = "--sigma 6 --temperature 20" if method == "soft-target" else ""
    steps = 100 if method == "deepinversion" else 250
    flags += f" --images 48 --image-batch 48 --image-steps {steps} --steps 1"
    record, _ = watch(f"--method {method} {flags}", teacher)
    stored = torch.load(record.out / "transfer" / "0.pt", weights_only=True)
    x, y, t = stored["images"].float(), stored["labels"], teacher(stored["images"].float())
    scale = 20**2 if method == "soft-target" else 1  # of CE, whose least value is H(y); other terms are small here
    lowest = -scale * torch.xlogy(y, y).sum(1).mean()
    assert seen["after"] - lowest < (seen["before"] - lowest) / factor
    assert x.shape == (48, 1, 32, 32) and all(p.grad is None for p in teacher.parameters())
    assert (t.argmax(1) == y.argmax(1)).float().mean() > least
    assert torch.corrcoef(torch.stack([(t / 20).softmax(1).flatten(), y.flatten()]))[0, 1] > alike


def test_rdskd_without_a_term_and_without_its_penalty():
    x, t, reference = torch.randn(8, 1, 4, 4), 3 * torch.randn(8, 5), torch.tensor([0.3, -0.7])
    L_oh, L_ie, L_ds = g.one_hot_loss(t), g.information_entropy_loss(t), g.diversity_seeking_loss(x, t)
    for terms, L_G in ((("ie", "ds"), (L_ie + 0.7).exp() + L_ds), (("oh", "ds"), (L_oh - 0.3).exp() + L_ds),
                       (("oh", "ie"), (L_oh - 0.3).exp() + (L_ie + 0.7).exp())):  # fmt: skip
        assert g.rdskd_loss(x, t, reference, terms) == pytest.approx(L_G)
    plain_sum = g.rdskd_loss(x, t, reference, penalty=torch.clone)
    assert plain_sum == pytest.approx(L_oh - 0.3 + L_ie + 0.7 + L_ds)


def test_diversity_within_classes():
    x = torch.randn(7, 3, 4, 4)
    t = F.one_hot(torch.tensor([0, 0, 0, 1, 1, 1, 2]), 3).float()
    pairs = [[(x[i] - x[j]).square().mean() for i in c for j in c if i != j] for c in ((0, 1, 2), (3, 4, 5))]
    expected = (3 * sum(pairs[0]) / 6 + 3 * sum(pairs[1]) / 6) / 7
    assert g.diversity_within_classes(x, t) == pytest.approx(expected.sqrt())


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("layer, plain", [
    (g.UpsampleConv2d, lambda x, conv: F.conv2d(F.interpolate(x, scale_factor=2.0), conv.weight, padding=1)),
    (g.NarrowConv2d, lambda x, conv: F.conv2d(x, conv.weight, conv.bias, padding=1)),
])  # fmt: skip
def test_our_convolutions_are_plain_ones(layer, plain):
    conv, x = layer(5, 3).double(), torch.randn(2, 5, 7, 6, dtype=torch.float64, requires_grad=True)
    a, b = conv(x), plain(x, conv)
    direction = torch.randn_like(b)
    gradients = (torch.autograd.grad(y, (x, conv.weight), direction) for y in (a, b))
    for a, b in [(a, b), *zip(*gradients)]:
        assert torch.allclose(a, b, atol=1e-12)


def test_frozen_generator_gives_the_images_of_eval_mode():
    G = g.Generator(7, 3, 12, width=6).double()
    for p in G.parameters():
        nn.init.normal_(p)
    for _ in range(3):
        G(1 + 2 * torch.randn(20, 7).double())  # statistics unlike those of a new network
    z, state = torch.randn(9, 7).double(), copy.deepcopy(G.state_dict())
    frozen = g.frozen(G)
    assert not torch.allclose(frozen(z), G(z))  # G is in train mode still, and its statistics move; the copy's stay
    G.load_state_dict(state)
    assert torch.allclose(frozen(z), G.eval()(z), atol=1e-12)
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("channels", [1, 3])
def test_generator_makes_normalised_images(channels):
    x = g.Generator(10, channels, image_size=16, width=8)(torch.randn(32, 10))
    assert x.shape == (32, channels, 16, 16)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(channels), atol=1e-5)
    assert torch.allclose(x.var((0, 2, 3), correction=0), torch.ones(channels), atol=1e-2)


def test_generator_parameters_and_spectral_norm():
    count = sum(p.numel() for p in g.Generator(100, 1).parameters())
    assert count == 101 * 8192 + 2 * 128 + 128 * 1152 + 2 * 128 + 64 * 1152 + 2 * 64 + 577
    with pytest.raises(ValueError, match="multiple of 4"):
        g.Generator(10, 3, image_size=30)
    G = g.Generator(10, 3, width=8, spectral_norm=True).eval()
    for conv in (G.conv1, G.conv2, G.conv3):
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1, rel=0.1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_power_iteration_has_the_order_of_torchs_older_spectral_norm():
    theirs, x = nn.Conv2d(3, 4, 3, bias=False).double(), torch.zeros(1, 3, 5, 5).double()
    W = theirs.weight.detach().clone()
    nn.utils.spectral_norm(theirs)
    ours = g.SpectralNorm(W)
    ours.u, ours.v = theirs.weight_u.clone(), theirs.weight_v.clone()
    for _ in range(3):
        theirs(x)
        assert torch.allclose(ours(W), theirs.weight, rtol=1e-12)
    u = ours.eval().u.clone()
    assert torch.equal(ours(W), ours(W)) and torch.equal(ours.u, u)  # no step in eval mode


PARAMETERS = {  # papers.md: WRN 2.24 M, 0.18 M
    "lenet5": 61_706, "lenet5_half": 15_738, "alexnet": 1_659_178, "alexnet_half": 417_434,
    "resnet18": 11_173_962, "resnet34": 21_282_122, "wrn-40-2": 2_243_546, "wrn-16-1": 175_066,
}  # fmt: skip


@pytest.mark.parametrize("name", models.NAMES)
def test_networks(name):
    channels = 1 if "lenet" in name else 3
    net = models.build(name, 10, channels)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    logits, features = net(torch.randn(2, channels, 32, 32), return_features=True)
    assert logits.shape == (2, 10) and features.shape == (2, net.classifier.in_features)
    assert torch.equal(logits, net.classifier(features))
    logits.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_lenet_is_the_published_one():
    net, plain = models.build("lenet5"), nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 120, 5), nn.ReLU(), nn.Flatten(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip
    plain.load_state_dict(dict(zip(plain.state_dict(), net.state_dict().values(), strict=True)))
    x = torch.randn(8, 1, 32, 32)
    assert torch.allclose(plain(x), net(x), atol=1e-6)


def test_alexnets_order():
    order = [type(layer).__name__ for layer in models.build("alexnet").body]
    conv, pool = ["Conv2d", "ReLU"], ["MaxPool2d", "BatchNorm2d"]
    fc = ["Linear", "ReLU", "Dropout", "BatchNorm1d"]
    convolutions = 2 * [*conv, "LocalResponseNorm", *pool] + 2 * [*conv, "BatchNorm2d"] + [*conv, *pool]
    assert order == [*convolutions, "Flatten", *fc, *fc]
    assert [layer.p for layer in models.build("alexnet").body if isinstance(layer, nn.Dropout)] == [0.5, 0.5]


@pytest.mark.parametrize("width", [3, 4, 48])  # fewer channels than the five that are summed, and more
def test_local_response_norm(width):
    x = 100 * torch.randn(2, width, 7, 6, dtype=torch.double)  # large: squares of 1 hardly change the sum
    x.requires_grad_()
    ours, plain = models.LocalResponseNorm(width).double(), nn.LocalResponseNorm(5)
    assert not ours.state_dict() and torch.allclose(ours(x), plain(x), rtol=1e-6)
    gradients = [torch.autograd.grad((f(x) * torch.arange(6)).sum(), x)[0] for f in (ours, plain)]
    assert torch.allclose(*gradients, rtol=1e-6, atol=1e-6)


def test_blocks_and_resolutions():
    x = torch.randn(2, 4, 8, 8)
    for outputs, stride in ((4, 1), (6, 2)):
        b = models.PreActivationBlock(4, outputs, stride).eval()
        a = b.bn1(x).relu()
        expected = b.conv2(b.bn2(b.conv1(a)).relu()) + (x if outputs == 4 else b.shortcut(a))
        assert torch.allclose(b(x), expected, atol=1e-6)
        b = models.BasicBlock(4, outputs, stride).eval()
        expected = (b.bn2(b.conv2(b.bn1(b.conv1(x)).relu())) + b.shortcut(x)).relu()
        assert torch.allclose(b(x), expected, atol=1e-6)
    for name, sides in (("wrn-10-1", [32, 16, 8]), ("resnet18", [32, 16, 8, 4])):
        net, seen = models.build(name, 10, 3).eval(), []
        for block in net.blocks:
            block.register_forward_hook(lambda block, x, y: seen.append(y.shape[-1]))
        assert (net.penultimate(torch.randn(2, 3, 32, 32)) >= 0).all()
        assert list(dict.fromkeys(seen)) == sides


def test_lenets_stay_float32():
    kept = {name: models.on_device(name, GLYPHS, "cpu", "bf16").bf16 for name in ("lenet5", "lenet5_half", "wrn-10-1")}
    assert kept == {"lenet5": False, "lenet5_half": False, "wrn-10-1": True}


def test_accuracy_is_measured_in_eval_mode_and_changes_nothing():
    net, x = models.build("wrn-10-1"), torch.randint(256, (50, 1, 32, 32), dtype=torch.uint8)
    y, before = copy.deepcopy(net).eval()(data.normalise(x, GLYPHS)).argmax(1), copy.deepcopy(net.state_dict())
    assert models.accuracy(net, x, y, GLYPHS._replace(size=256)) == 100 and net.training  # in batches of 31
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert models.accuracy(net, x, (y + 1) % 10, GLYPHS) == 0


SMALL = "--method pre --device cpu --precision fp32 --latent 6 --width 8"
NETWORKS = {  # make a network as the program does, and what it reads
    "generator": (lambda: dfkd.image_generator(GLYPHS, dfkd.parse(SMALL.split()), True)[0], (8, 6)),
    "encoder": (lambda: replay.Encoder(6, 1, width=8), (8, 1, 32, 32)),
    "classifier": (lambda: models.on_device("wrn-10-1", GLYPHS, "cpu", "fp32"), (8, 1, 32, 32)),
}


def output(net, x):
    """What a network computes, in one tensor, without a trace in it; features come last."""
    with torch.no_grad():
        y = copy.deepcopy(net)(x, *[True] * isinstance(net, models.Classifier))
    return y if isinstance(y, torch.Tensor) else torch.cat(y, 1)


@pytest.mark.parametrize("make, shape", NETWORKS.values(), ids=NETWORKS)
def test_networks_keep_their_precision(make, shape):
    net, x = make(), torch.randn(shape)
    fp32 = output(net, x)
    net.bf16 = True
    bf16, rounding = output(net, x), (output(net, x) - fp32).abs().mean() / fp32.std()
    assert fp32.dtype == bf16.dtype == torch.float32 and 0 < rounding < 0.05
    net.bf16 = False
    fp64 = output(net.double(), x.double())
    assert fp64.dtype == torch.float64 and torch.allclose(fp64.float(), fp32, atol=1e-4)
    for part in (fp64[:, :1], fp64[:, -1:]):
        assert not torch.equal(part, part.float().double())  # no float32 on the way


def test_the_spectral_norm_is_computed_without_autocast():
    G, autocast = g.Generator(6, 1, width=8, spectral_norm=True), []
    G.bf16 = True
    for conv in (G.conv1, G.conv2, G.conv3):
        norm = conv.parametrizations.weight[0]
        norm.register_forward_hook(lambda norm, inputs, weight: autocast.append(torch.is_autocast_enabled("cpu")))
    G(torch.randn(8, 6))
    assert autocast == [False] * 3


def test_the_second_argument_of_the_authors_batch_norms_is_eps():
    G, E = g.Generator(6, 1, width=8), replay.Encoder(6, 1, width=8)
    assert [bn.eps for bn in (G.bn1, G.bn2, G.bn3, G.bn4)] == [1e-5, 0.8, 0.8, 1e-5]
    assert [bn.eps for bn in (E.bn1, E.bn2, E.bn3)] == [0.8, 0.8, 1e-5]


def test_the_encoder_divides_each_column_by_its_norm():
    E, x = replay.Encoder(6, 2, width=8).eval(), torch.randn(4, 2, 32, 32)
    columns, rows = torch.rand(4, 2, 1, 32) + 0.5, torch.rand(4, 2, 32, 1) + 0.5
    assert torch.allclose(output(E, columns * x), output(E, x), atol=1e-5)
    assert not torch.allclose(output(E, rows * x), output(E, x), atol=1e-3)


def test_the_encoder_is_the_authors_network():
    E, x, half = replay.Encoder(6, 2, width=8), torch.randn(4, 2, 32, 32), nn.Upsample(scale_factor=0.5)
    plain = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, 0.8), nn.LeakyReLU(0.2),
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8, 0.8), nn.LeakyReLU(0.2), half,
        nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), half, nn.Flatten(),
    )  # fmt: skip
    for layer, ours in zip((m for m in plain if m.state_dict()), E.children()):  # without the two heads
        layer.load_state_dict(ours.state_dict())
    h = plain(x / x.norm(dim=2, keepdim=True))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(E(x), (E.mu(h), E.log_var(h)), strict=True))


def test_pres_networks_begin_with_small_uniform_weights_and_no_biases(watch):
    started = {method: watch(f"--method {method} --replay vae", rounds=0)[0].kept for method in ("pre", "dafl")}
    M, G = started["pre"]["memory"].vae, started["pre"]["G"]
    for layer in (*M.modules(), *G.modules()):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            parametrised = hasattr(layer, "parametrizations")
            w = (layer.parametrizations.weight.original if parametrised else layer.weight).detach()
            assert w.abs().max() <= 0.08 and w.std() == pytest.approx(0.16 / math.sqrt(12), rel=0.2)
            assert layer.bias is None or not layer.bias.any()
    assert started["dafl"]["G"].linear.weight.abs().max() > 0.08 and started["dafl"]["G"].linear.bias.any()
    assert hasattr(G.conv1, "parametrizations") and not hasattr(started["dafl"]["G"].conv1, "parametrizations")


# ---------------------------------------------------------------- the loops, step for step, on the authors' traces


TRACES = os.environ.get("DFKD_TRACES")
AUTHORS_NAMES = {  # of the layers, in the files of traces
    "l1.0": "linear", "conv_blocks1.0": "conv1", "conv_blocks2.0": "conv2", "conv_blocks2.3": "conv3",
    "conv_blocks3.0": "conv3",
}  # fmt: skip
AUTHORS_ENCODER = {
    "conv_blocks0.0": "conv1", "conv_blocks1.0": "conv2", "conv_blocks2.0": "conv3", "fc_mu": "mu", "fc_var": "log_var",
}  # fmt: skip


class TwoLayers(nn.Module):
    """f = relu(W1 x), t = W2 f: the teachers and students of the traces."""

    def __init__(self, W1, W2):
        super().__init__()
        self.W1, self.W2 = nn.Parameter(W1), nn.Parameter(W2)

    def forward(self, x, return_features=False):
        f = (x.flatten(1) @ self.W1.T).relu()
        return (f @ self.W2.T, f) if return_features else f @ self.W2.T


class Recorder:
    """Stands in for dfkd.Run: walks through a loop's rounds, or the first `rounds`, and keeps what it logs."""

    def __init__(self, out=None, rounds=None):
        self.out, self.rounds, self.stage = out, rounds, None
        self.logged, self.kept, self.facts = {}, {}, {}

    def keep(self, **parts):
        self.kept = parts

    def log(self, **terms):
        for name, value in terms.items():
            self.logged.setdefault((self.stage, name), []).append(value.item())

    def tell(self, text):
        pass

    def steps(self, stage, count, each=1):
        self.stage = stage
        yield from range(-(-count // each) if self.rounds is None else self.rounds)


PRE_LISTS = ("pre_generator_L_G", "pre_generator_L_js", "pre_L_kd", "pre_memory_L_vae")
TRACED = {  # flags, with the lengths of the file's lists; the lists of losses
    "rdskd": ("--generator-steps {rdskd_generator_L_G} --steps {rdskd_student_L_kd} --temperature 10",
              (*(f"rdskd_generator_{L}" for L in ("L_oh", "L_ie", "L_ds", "L_G")), "rdskd_student_L_kd")),
    "dafl": ("--steps {dafl_L_kd} --student-steps 1 --temperature 1 --loss-weights 1 5 0.1",
             ("dafl_L_G", "dafl_L_kd")),
    "pre": ("--steps {pre_L_kd} --student-steps {each} --loss-weights 1 5 0.1 --latent-lr 0.02 "
            "--memory-latent {memory_latent} --memory-width {memory_width}", PRE_LISTS),
}  # fmt: skip


def epoch_of(L_oh, L_ie, L_ds, L_G):
    """Iterations of an epoch, which the file does not name: with them, L_G is what its terms make it."""

    def fits(epoch):
        expected = []
        for s, (oh, ie, ds) in enumerate(zip(L_oh, L_ie, L_ds)):
            last = s - 1 - (s - 2) % epoch  # the last second iteration of an epoch
            oh_before, ie_before = (L_oh[last], L_ie[last]) if s > 1 else (0, 0)
            expected.append(math.exp(oh - oh_before) + math.exp(ie - ie_before) + ds)
        return L_G == pytest.approx(expected, rel=1e-9)

    return next(filter(fits, range(2, len(L_G) + 2)))


@pytest.mark.skipif(not TRACES, reason="DFKD_TRACES names no file of the authors' traces")
@pytest.mark.parametrize("method", TRACED)
def test_trace(monkeypatch, method):
    """The loop in float64 on the authors' weights and draws shows the losses of the authors' code.

    PRE-DFKD's trace comes from that code with the text's L_js in it.
    """
    held = {k: torch.from_numpy(v).double() for k, v in np.load(TRACES).items()}
    names = (k.rpartition("_") for k in held if k.startswith(method) and "_draw_" in k)
    names = sorted(names, key=lambda name: (name[0], int(name[2])))  # 99 before 100
    draws = [held["".join(name)] for name in names]
    if not any(name.startswith(method) for name in held):
        pytest.skip(f"{TRACES} has no trace of {method}")
    batch, latent = draws[-1 if method == "rdskd" else 0].shape  # RDSKD begins with half batches

    def weight_of(name):
        return held.get(f"{name}.weight", held.get(f"{name}.weight_orig"))

    def set_weights(net, prefix, names):
        for theirs, ours in names.items():
            weight = weight_of(prefix + theirs)
            if weight is None:
                continue
            layer = net.get_submodule(ours)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            if hasattr(layer, "parametrizations"):  # the power iteration starts at the exact singular vectors
                normalised = layer.parametrizations.weight
                normalised.original, normalised[0] = nn.Parameter(weight.clone()), g.SpectralNorm(weight)
            else:
                layer.weight = nn.Parameter(weight.clone())

    def randn(rows, *_, generator=None, **more):
        taken = [draws.pop(0)]
        while sum(map(len, taken)) < rows:  # RDSKD's code draws a batch in two halves
            taken.append(draws.pop(0))
        return torch.cat(taken)

    def build_generator(*args, build=dfkd.image_generator, **more):
        G, _ = build(*args, **more)
        set_weights(G, f"{method}_G.", AUTHORS_NAMES)
        return G, models.adam(G, 1e-3)

    def build_memory(*args, build=dfkd.replay_memory):
        memory = build(*args)
        if memory:
            set_weights(memory.vae.decoder, f"{method}_M.", AUTHORS_NAMES)
            set_weights(memory.vae.encoder, f"{method}_E.", AUTHORS_ENCODER)
            memory.optimiser = models.adam(memory.vae, 0.02 / 40)
        return memory

    def two_layers(who):
        return TwoLayers(*(held.get(f"{who}_{W}", held.get(f"{method}_student_{W}")) for W in ("W1", "W2")))

    flags, lists = TRACED[method]
    layers = [w for name in AUTHORS_NAMES if (w := weight_of(f"{method}_G.{name}")) is not None]
    width, channels = len(layers[1]), len(layers[-1])
    size = 4 * math.isqrt(len(layers[0]) // width)
    info = data.Info(len(held[f"{method}_teacher_W2"]), channels, (0.5,) * channels, (0.25,) * channels, size=size)
    fixed = f"--batch {batch} --latent {latent} --width {width} --precision fp32 --device cpu --generator-lr 1e-3"
    fixed += " --student-optimiser adam --student-lr 2e-3 --student-decay none --ours"
    lengths = {name: len(values) for name, values in held.items()}
    each = lengths.get("pre_L_kd", 0) // lengths.get("pre_generator_L_G", 1)
    flags = flags.format(**lengths, each=each, memory_latent=lengths.get("pre_E.fc_mu.weight"),
                         memory_width=lengths.get("pre_M.conv_blocks1.0.weight"))  # fmt: skip
    args = dfkd.parse(f"--method {method} {fixed} {flags}".split())
    teacher, student = two_layers(f"{method}_teacher").requires_grad_(False), two_layers(f"{method}_student")
    recorder = Recorder()
    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(torch, "randn_like", lambda x: randn(len(x)))
    monkeypatch.setattr(dfkd, "image_generator", build_generator)
    monkeypatch.setattr(dfkd, "replay_memory", build_memory)
    if method == "rdskd":
        monkeypatch.setattr(dfkd, "EPOCH", epoch_of(*(held[name].tolist() for name in lists[:4])))
    torch.set_default_dtype(torch.float64)
    try:
        dfkd.LOOPS[method](teacher, student, info, args, recorder)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not draws, "draws that the loop did not make"
    logged = {term: values for (_, term), values in recorder.logged.items()}
    for name in lists:
        ours, theirs = logged[name[name.index("L_") :]], held[name].tolist()
        assert ours == pytest.approx(theirs, rel=1e-9), name


# ---------------------------------------------------------------- the loops: the order of their steps


class Event(NamedTuple):
    """A forward pass of T, S, G, M (the decoder) or VAE; or a step of S or G, without x."""

    stage: str
    who: str
    training: bool = False
    x: torch.Tensor = None
    y: torch.Tensor = None


@pytest.fixture
def watch(monkeypatch, tmp_path):
    """watch(flags) runs a loop on small networks -> its record, and all that happened in order."""

    def run(flags, teacher=None, rounds=None, info=GLYPHS):
        events, record = [], Recorder(tmp_path, rounds)

        def watched(who, net):
            def note(net, x, y):
                y = y[0] if isinstance(y, tuple) else y
                events.append(Event(record.stage, who, net.training, x[0].detach().clone(), y.detach()))

            net.register_forward_hook(note)
            return net

        def build_generator(*args, build=dfkd.image_generator, **more):
            G, optimiser = build(*args, **more)
            return watched("G", G), optimiser

        def build_memory(*args, build=dfkd.replay_memory):
            memory = build(*args)
            if isinstance(memory, replay.PseudoReplay):
                watched("M", memory.vae.decoder)
                watched("VAE", memory.vae)
            return memory

        def minimise(loss, optimiser, minimise=dfkd.minimise):
            minimise(loss, optimiser)
            events.append(Event(record.stage, "step of G"))

        def student_step(*all, build=dfkd.student_step):
            step = build(*all)

            def noted(x):
                L = step(x)
                events.append(Event(record.stage, "step of S"))
                return L

            return noted

        method = flags.split()[1]
        shape = "--batch 16" + " --image-batch 8" * (method in SYNTHESES)
        shape += " --latent 4 --width 4" * (method in GENERATORS)
        vae = "vae" in flags or method == "pre" and "none" not in flags
        shape += " --memory-width 4 --memory-latent 4" if vae else ""
        args = dfkd.parse(f"--device cpu --precision fp32 {shape} {flags}".split())
        if teacher is None:
            teacher = models.LeNet5((2, 3, 5, 8), 10, 1).eval().requires_grad_(False)
        student = models.LeNet5((2, 2, 4, 6), 10, 1)
        with monkeypatch.context() as patch:
            patch.setattr(dfkd, "image_generator", build_generator)
            patch.setattr(dfkd, "replay_memory", build_memory)
            patch.setattr(dfkd, "minimise", minimise)
            patch.setattr(dfkd, "student_step", student_step)
            dfkd.LOOPS[args.method](watched("T", teacher), watched("S", student), info, args, record)
        return record, events

    return run


PRE = "--method pre --student-steps 6 --steps 12"  # two rounds


def test_rdskd_takes_its_reference_in_the_second_iteration_of_an_epoch(watch, monkeypatch):
    monkeypatch.setattr(dfkd, "EPOCH", 5)
    references, rdskd_loss = [], g.rdskd_loss
    noted = lambda x, t, ref, *more: references.append(ref.tolist()) or rdskd_loss(x, t, ref, *more)  # noqa: E731
    monkeypatch.setattr(g, "rdskd_loss", noted)
    record, _ = watch("--method rdskd --generator-steps 13 --steps 1")
    seen = list(zip(record.logged["generator", "L_oh"], record.logged["generator", "L_ie"]))
    assert references == [[0, 0], [0, 0], *[list(seen[1])] * 5, *[list(seen[6])] * 5, list(seen[11])]


def test_rdskd_keeps_its_reference_in_the_precision_of_g(monkeypatch):
    def in_float64(*args, build=dfkd.image_generator):
        G, optimiser = build(*args)
        return G.double(), optimiser

    monkeypatch.setattr(dfkd, "image_generator", in_float64)
    args = dfkd.parse("--batch 4 --latent 4 --width 4 --device cpu --precision fp32 --ours".split())
    record = Recorder(rounds=2)
    dfkd.rdskd(*(models.LeNet5((2, 2, 4, 6), 10, 1).double() for _ in "TS"), GLYPHS, args, record)
    seen = [record.logged["generator", name][1] for name in ("L_oh", "L_ie")]
    assert record.kept["reference"].tolist() == seen  # equal: not rounded to float32


def test_rdskd_trains_its_generator_and_then_freezes_it(watch):
    record, events = watch("--method rdskd --generator-steps 3 --steps 4")
    modes = [(e.stage, e.training) for e in events if e.who == "G"]
    assert modes == 3 * [("generator", True)] + 4 * [("student", False)]
    assert [e.who for e in events if "step" in e.who] == 3 * ["step of G"] + 4 * ["step of S"]
    latents = [e.x for e in events if e.who == "G"]
    assert len({z.numpy().tobytes() for z in latents}) == 7  # fresh ones each time
    record.fresh()
    assert [e.training for e in events if e.who == "G"][7:] == 8 * [False]  # S is compared on what it learned from


def test_rdskds_memory_learns_in_the_first_stage_and_speaks_in_the_second(watch):
    _, events = watch("--method rdskd --replay vae --generator-steps 3 --steps 2")
    assert [(e.stage, len(e.x)) for e in events if e.who == "VAE"] == [("generator", n) for n in (8, 10, 10)]
    assert [len(e.x) for e in events if e.who == "S"] == [18, 18]


def test_a_step_is_on_its_own_gradient_and_moves_only_what_the_optimiser_holds():
    w, other = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))
    optimiser = torch.optim.SGD([w], 0.1)
    for _ in range(2):
        dfkd.minimise(w * other, optimiser)
    assert w.item() == pytest.approx(0.8) and other.grad is None


def test_rdskds_flags_reach_its_objective(watch):
    logged = watch("--method rdskd --generator-steps 2 --steps 1 --terms oh ds --penalty sum")[0].logged
    L_G, L_oh, L_ds = (np.array(logged["generator", name]) for name in ("L_G", "L_oh", "L_ds"))
    assert np.allclose(L_G, L_oh + L_ds)  # the references are 0 still


@pytest.mark.parametrize("method, novel", [("pre", [16]), ("dafl --replay vae", [])])
@pytest.mark.parametrize("steps, learned", [(6, 4), (3, 3)])
def test_four_steps_of_the_memory_a_round(watch, method, novel, steps, learned):
    _, events = watch(f"--method {method} --student-steps {steps} --steps {2 * steps}")
    story = [e.who for e in events if "step" in e.who or e.who == "VAE"]
    assert story == 2 * ["step of G", *learned * ["step of S", "VAE"], *(steps - learned) * ["step of S"]]
    assert [len(e.x) for e in events if e.who == "S"] == 2 * [*novel, *steps * [18]]
    assert [len(e.x) for e in events if e.who == "VAE"] == learned * [8] + learned * [8 + 2]


def test_half_of_an_odd_batch_is_rounded_up(watch):
    _, events = watch("--method pre --batch 15 --student-steps 1 --steps 1")
    assert [len(e.x) for e in events if e.who == "VAE"] == [8]


def test_pre_shows_memory_samples_beside_novel_ones_and_its_memory_learns_half_of_the_novel_ones(watch):
    _, events = watch(f"{PRE} --ours range")  # with augment, S sees them turned
    novel = [e.y for e in events if e.who == "G"]
    assert len({x.numpy().tobytes() for x in novel}) == 14  # G's own batch is not used again
    seen = [e.x[:16] for e in events if e.who == "S"]
    assert all(torch.equal(a, b) for a, b in zip(novel, seen, strict=True))
    for i in (i for i, e in enumerate(events) if e.who == "VAE"):
        seen = [e.x for e in events[:i] if e.who == "S"][-1]
        assert torch.equal(events[i].x[:8], seen[:8])


def test_pres_decoder_is_in_eval_mode_for_the_student_only(watch):
    _, events = watch(PRE)
    for_student, first_own, own = [False, False], [True], [True, True, True]
    first, second = 4 * (for_student + first_own), 4 * (for_student + own)
    assert [e.training for e in events if e.who == "M"] == first + 2 * for_student + second + 2 * for_student
    assert all(e.training for e in events if e.who == "G")


@pytest.mark.parametrize("method", ["rdskd --generator-steps 1", "dafl", "zskd --images 8 --image-steps 1", "noise"])
def test_students_learn_at_the_temperature_that_is_given(watch, method):
    record, events = watch(f"--method {method} --temperature 3 --steps 5")
    pairs = [(s.y, t.y) for s, t in zip(events, events[1:]) if (s.stage, s.who, t.who) == ("student", "S", "T")]
    assert record.logged["student", "L_kd"] == pytest.approx([g.distillation_loss(*pair, 3.0).item() for pair in pairs])
    assert len(pairs) == 5


@pytest.mark.parametrize("method", ["zskd", "soft-target"])
def test_labels_and_images_are_made_at_the_temperature_that_is_given(watch, spy, method):
    losses, drawn = spy(g, "soft_target_loss"), spy(g, "soft_labels")
    watch(f"--method {method} --images 8 --image-steps 1 --steps 1 --temperature 7")
    assert {tau for (*_, tau), _ in losses} == {7} and all(tau == 7 for (_, _, _, tau, _), _ in drawn)


def test_pres_student_minimises_the_distance_of_the_logits(watch):
    record, events = watch(PRE)
    pairs = [(s, t) for s, t in zip(events, events[1:]) if (s.who, t.who) == ("S", "T") and len(s.x) == 18]
    assert len(pairs) == 12 and all(torch.equal(s.x, t.x) for s, t in pairs)
    assert record.logged["student", "L_kd"] == pytest.approx([(s.y - t.y).abs().mean().item() for s, t in pairs])


@pytest.mark.parametrize("method", ["dafl", "mskd"])
def test_the_first_student_step_sees_the_batch_of_the_generators_step(watch, method):
    _, events = watch(f"--method {method} --student-steps 2 --steps 4 --ours range")  # with augment, S sees it turned
    story = ["G", "T", "step of G", "S", "T", "step of S", "G", "S", "T", "step of S"]
    assert [e.who for e in events] == 2 * story and all(e.training for e in events if e.who == "G")
    for turn in (events[:10], events[10:]):
        assert torch.equal(turn[0].y, turn[3].x) and torch.equal(turn[0].y, turn[1].x)  # before G moved
        assert torch.equal(turn[6].y, turn[7].x) and not torch.equal(turn[0].y, turn[6].y)


@pytest.mark.parametrize("method, third, more", [("dafl", "L_a", ()), ("mskd", "L_ms", ()), ("pre", "L_a", ("L_js",))])
def test_the_generators_objective_is_the_sum_of_its_terms(watch, method, third, more):
    logged = watch(f"--method {method} --student-steps 2 --steps 4 --loss-weights 2 3 5")[0].logged
    L_G, L_oh, L_ie, L_3, *more = (logged["student", name] for name in ("L_G", "L_oh", "L_ie", third, *more))
    total = 2 * np.array(L_oh) + 3 * np.array(L_ie) + 5 * np.array(L_3) + sum(map(np.array, more))
    assert np.allclose(L_G, total, rtol=1e-5) and -1 <= min(L_ie) <= max(L_ie) <= 0  # log10: of 10 classes, -1 at least


@pytest.mark.parametrize("method, weights", [
    *((m, w) for m in ("dafl", "mskd") for w in ("1 0 0", "0 1 0", "0 0 1")), ("pre", "0 0 0"),
])  # fmt: skip
def test_each_term_moves_the_generator(watch, method, weights):
    made = []
    for rounds in (0, 1):
        torch.manual_seed(0)
        flags = f"--method {method} --steps 1 --student-steps 1 --loss-weights {weights}"
        made.append(watch(flags, rounds=rounds)[0].kept["G"].linear.weight.detach())
    assert not torch.equal(*made)


def test_soft_targets_objective_is_the_sum_of_its_terms(watch, monkeypatch):
    monkeypatch.setattr(g, "synthesise", lambda objective, x, *rest: (x, objective(x)))
    logged = watch("--method soft-target --images 8 --steps 1 --ours --loss-weights 3")[0].logged
    L_x, L_ce, L_a = (logged["images", name][0] for name in ("L_x", "L_ce", "L_a"))
    assert L_x == pytest.approx(L_ce + 3 * L_a)


@pytest.mark.parametrize("balanced, teacher_term", [(True, True), (False, True), (True, False)])
def test_the_decoder_learns_the_balance_of_what_it_rehearses(balanced, teacher_term):
    T = models.LeNet5((2, 3, 5, 8), 10, 1).eval().requires_grad_(False)
    memory = replay.PseudoReplay(replay.VAE(4, 1, width=4), 1e-3, 0.02, teacher_term, balanced)
    vae, novel, got = copy.deepcopy(memory.vae), torch.randn(16, 1, 32, 32), {}

    def step():
        got.update({name: p.grad.clone() for name, p in memory.vae.named_parameters()})

    memory.optimiser.step = step
    torch.manual_seed(1)
    memory.learn(novel, T, rehearse=True)
    torch.manual_seed(1)
    z = torch.randn(2, 4, requires_grad=True)  # B/8
    L_balance = replay.latent_balance_loss(z, T(vae.decoder(z))) if balanced else 0 * vae.decoder.linear.weight.sum()
    moved = z.detach()
    if balanced:
        moved = moved - 0.02 * torch.autograd.grad(L_balance, z, retain_graph=True)[0].sign()  # Adam's first step
    x = torch.cat([novel[:8], vae.decoder(moved).detach()])
    x_hat, mu, log_var = vae(x)
    L_rec = replay.reconstruction_loss(x, x_hat, T(x), T(x_hat)) if teacher_term else (x - x_hat).abs().mean()
    L_vae = replay.vae_loss(L_rec, mu, log_var)
    (L_vae + L_balance).backward()
    for name, p in vae.named_parameters():
        assert torch.allclose(got[name], p.grad, rtol=1e-3, atol=1e-5), name


def test_the_memory_leaves_no_gradient_in_generator_or_teacher():
    T, G = models.LeNet5((2, 3, 5, 8), 10, 1).eval(), g.Generator(4, 1, width=4)
    memory = replay.PseudoReplay(replay.VAE(4, 1, width=4), 1e-3, 0.02)
    novel = G(torch.randn(16, 4))
    memory.learn(novel, T, rehearse=True)
    assert all(p.grad is None for p in [*T.parameters(), *G.parameters()])


def test_deepinversion_rolls_before_every_step_and_has_the_weights_that_are_given(watch, spy):
    rolls, losses = spy(g, "rolled"), spy(g, "deepinversion_loss")
    _, events = watch("--method deepinversion --images 16 --image-steps 5 --steps 1 --loss-weights 2 3 5")
    assert all(weights == [2, 3, 5] for (_, _, _, _, *weights), _ in losses)
    seen = [e.x for e in events if e.who == "T" and e.stage == "images"]
    assert len(rolls) == 10 and all(any(torch.equal(x, roll) for x in seen) for _, roll in rolls)


@pytest.mark.parametrize("method", ["zskd", "deepinversion"])
def test_the_classes_of_a_whole_set_are_balanced(watch, method):
    record, _ = watch(f"--method {method} --images 45 --image-batch 8 --image-steps 1 --steps 1")
    files = (record.out / "transfer").iterdir()
    classes = torch.cat([torch.load(path, weights_only=True)["intended"] for path in files])
    assert sorted(classes.bincount(minlength=10).tolist()) == 5 * [4] + 5 * [5]


def test_zskd_has_both_betas_for_every_class(watch, spy):
    drawn = spy(g, "dirichlet_targets")
    watch("--method zskd --images 40 --image-batch 8 --image-steps 1 --steps 1")
    _, classes, beta = (torch.cat(parts) for parts in zip(*(args for args, _ in drawn)))
    assert all(sorted(beta[classes == k].tolist()) == pytest.approx([0.1, 0.1, 1, 1]) for k in range(10))


@pytest.mark.parametrize("mirror, mix", [(False, False), (True, False), (False, True)])
def test_what_a_student_sees_of_a_transfer_set(watch, spy, mirror, mix):
    calls, mixed, info = spy(g, "augmented"), spy(g, "mixed"), GLYPHS._replace(mirror=mirror)
    ours = "--ours augment mix" if mix else "--ours augment"
    _, events = watch(f"--method zskd --images 16 --image-steps 1 --steps 12 {ours}", info=info)
    seen = [e.x for e in events if e.stage == "student" and e.who in "ST"]
    assert len(calls) == 2 + 12 and all(more == [mirror] for (_, *more), _ in calls)  # 20 degrees
    assert len(mixed) == 12 * mix and all(args[0] is call[1] for (args, _), call in zip(mixed, calls[2:]))
    shown = [x for _, x in (mixed or calls[2:])]
    assert all(torch.equal(x, shown[i // 2]) for i, x in enumerate(seen)) and len(seen) == 24  # S and T
    assert len(torch.cat([x for (x, _), _ in calls[2:]]).unique(dim=0)) == 16  # of every file


@pytest.mark.parametrize("method, drawn", [("zskd", "dirichlet_targets"), ("soft-target", "soft_labels")])
def test_a_transfer_set_holds_the_labels_that_were_drawn(watch, spy, method, drawn):
    drawn = spy(g, drawn)
    record, _ = watch(f"--method {method} --images 16 --image-steps 1 --steps 1")
    stored = [torch.load(record.out / "transfer" / f"{i}.pt", weights_only=True)["labels"] for i in (0, 8)]
    assert all(torch.equal(y, labels) for y, (_, labels) in zip(stored, drawn))


@pytest.mark.parametrize("images, batches", [(12, [12, 12]), (150, [120, 30, 100])])  # the last to measure agreement
def test_no_batch_of_images_is_larger_than_it_must_be(watch, spy, images, batches):
    made = spy(g, "synthesise")
    record, _ = watch(f"--method zskd --images {images} --image-batch 120 --image-steps 1 --steps 1")
    assert len(record.fresh()[0]) == batches[-1] and [len(x) for (_, x, *_), _ in made] == batches


def test_noise_is_gaussian(watch):
    _, events = watch("--method noise --steps 2")
    seen = [e.x for e in events if e.who == "T"]
    std, mean = torch.std_mean(torch.stack(seen))
    assert len(seen) == 2 and mean.item() == pytest.approx(0, abs=0.03) and std.item() == pytest.approx(1, abs=0.03)


@pytest.fixture
def begun(watch, monkeypatch):
    """begun(flags) runs a loop up to its first batch of images -> what it begins with, what it is constrained to, and
    which of --ours are at work."""

    def run(flags):
        batches = []

        def synthesise(objective, x, steps, lr, constrain, settle, factor, report):
            augmented = []
            assert (steps, lr, settle) in ((2, 0.125, 0), (2, 0.125, 0.01))
            with monkeypatch.context() as patch:
                patch.setattr(g, "augmented", lambda x, mirror: augmented.append(x) or x)
                patch.setattr(g, "soft_target_loss", lambda *_: torch.tensor(1.0))
                L = objective(x).item()
            zeros = torch.zeros_like(x)
            at_work = dict(
                smooth=(x[..., 1:] - x[..., :-1]).std() < x.std() / 2,
                range=constrain is not None and torch.equal(constrain(zeros), zeros),
                settle=settle == 0.01, augment=augmented, scale=L > 300, sum=factor == len(x),
            )  # fmt: skip
            batches.append((x, constrain, {name for name, found in at_work.items() if found}))
            return x, torch.tensor(L)

        with monkeypatch.context() as patch:
            patch.setattr(g, "synthesise", synthesise)
            watch(f"{flags} --image-steps 2 --image-lr 0.125 --images 16 --steps 1")
        return batches[0]

    return run


OF_IMAGES = [name for name in dfkd.OURS if name != "mix"]  # which is of S


@pytest.mark.parametrize("method, ours", [
    ("soft-target", set(OF_IMAGES)), ("zskd", set(OF_IMAGES) - {"scale"}),
    ("deepinversion", {"smooth", "range", "settle", "sum"}),
])  # fmt: skip
def test_nothing_of_ours_is_in_the_papers_synthesis_of_images(begun, method, ours):
    mean, std = GLYPHS.mean[0], GLYPHS.std[0]
    assert begun(f"--method {method}")[2] == ours
    x, constrain, at_work = begun(f"--method {method} --schedule paper")
    assert at_work == set()
    if method == "zskd":  # U[0, 1], min-max rescaled after every step
        pixels, free = x * std + mean, 7 * torch.randn(8, 1, 32, 32)
        assert 0 <= pixels.min() < 0.01 and 0.99 < pixels.max() <= 1
        assert pixels.std() == pytest.approx(math.sqrt(1 / 12), rel=0.05)
        pixels = constrain(free) * std + mean
        assert torch.allclose(pixels, (free - free.min()) / (free.max() - free.min()), atol=1e-5)
    else:
        assert constrain is None and x.mean() == pytest.approx(0, abs=0.05) and x.std() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("name", OF_IMAGES)
def test_each_of_ours_acts_by_itself(begun, name):
    x, constrain, at_work = begun(f"--method soft-target --schedule paper --ours {name}")
    assert at_work == {name}
    if name == "range":
        pixels = constrain(9 * torch.randn(8, 1, 32, 32)) * GLYPHS.std[0] + GLYPHS.mean[0]
        assert pixels.min() == pytest.approx(0, abs=1e-6) and pixels.max() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("flags", [
    "rdskd --generator-steps 2 --steps 1", "dafl --steps 1", "mskd --steps 1", "pre --replay none --steps 1",
    "dafl --replay bank --bank-size 9 --steps 10",
])  # fmt: skip
def test_with_augment_both_networks_see_the_same_augmented_images_where_the_student_learns(watch, monkeypatch, flags):
    monkeypatch.setattr(g, "augmented", lambda x, mirror, degrees: x + 55 * mirror + degrees + torch.randn(()))
    for ours, added in (("range augment", 100), ("range", 0)):
        events = watch(f"--method {flags} --ours {ours}", info=GLYPHS._replace(mirror=True))[1]
        assert any(e.who == "step of G" for e in events)
        ends = [i for i, e in enumerate(events) if e.who == "step of S"]
        assert ends and all(torch.equal(events[i - 2].x, events[i - 1].x) for i in ends)
        seen = {id(events[i - back]) for i in ends for back in (1, 2)}
        for e in events:
            if e.who in ("T", "S"):  # what G and the memory learn from is left alone
                assert (e.x.flatten(1).mean(1) - added * (id(e) in seen)).abs().max() < 10


@pytest.mark.parametrize("flags, kept", [("", True), ("--ours", False), ("--schedule paper --batch 8", False)])
def test_generators_keep_to_the_range_of_pixels(flags, kept):
    sizes = "--width 8 --memory-width 8 --latent 9 --memory-latent 9 --device cpu"
    args = dfkd.parse(f"--method pre {flags} {sizes}".split())
    for info in (GLYPHS, data.Info(7, 2, (0.1, 0.8), (0.3, 0.2), size=28)):
        G, memory = dfkd.image_generator(info, args)[0], dfkd.replay_memory(info, args)
        low, high = data.normalise(torch.tensor([0, 255])[:, None, None, None], info)
        for net in (G, g.frozen(G), memory.vae.decoder):
            x = net(100 * torch.randn(64, 9))
            assert ((low <= x) & (x <= high)).all() == kept


def test_flags_reach_what_they_name():
    flags = "--device cpu --method pre --generator-lr 0.5 --memory-lr 0.25 --no-teacher-term"
    args = dfkd.parse(f"{flags} --latent-lr 0.125".split())
    memory = dfkd.replay_memory(GLYPHS, args)
    assert dfkd.image_generator(GLYPHS, args)[1].param_groups[0]["lr"] == 0.5
    assert memory.optimiser.param_groups[0]["lr"] == 0.25
    assert (memory.latent_lr, memory.teacher_term, memory.balanced) == (0.125, False, True)
    assert not dfkd.replay_memory(GLYPHS, dfkd.parse(f"{flags} --no-balanced".split())).balanced
    for precision in ("fp32", "bf16"):
        args = dfkd.parse(f"{flags} --precision {precision}".split())
        G, vae = dfkd.image_generator(GLYPHS, args)[0], dfkd.replay_memory(GLYPHS, args).vae
        assert [net.bf16 for net in (G, vae.encoder, vae.decoder)] == 3 * [precision == "bf16"]
    args, T = dfkd.parse("--method soft-target --device cpu --layer logits --sigma 3".split()), models.build("lenet5")
    layer, linear, _, sigma = dfkd.feature_model(T, args)
    assert (layer, linear, sigma) == ("logits", T.classifier, 3)
    nn.init.constant_(T.classifier.weight, torch.nan)
    with pytest.raises(dfkd.RunError, match=r"--layer logits --sigma 3\.0: "):
        dfkd.feature_model(T, args)


def test_where_a_run_goes_and_how_it_computes_unless_told(monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(models, "fast_bf16", lambda device, fast=fast: fast)
        args = dfkd.parse("--method pre --dataset mnist --seed 3 --device cpu".split())
        assert args.out == "runs/mnist-pre-3" and args.precision == ("bf16" if fast else "fp32")


def test_the_automatic_sigma_is_as_documented(teacher_file):
    T = models.load(teacher_file, "lenet5", GLYPHS, "cpu", "fp32")
    layer, linear, rest, sigma = dfkd.feature_model(T, dfkd.parse("--method soft-target --device cpu".split()))
    h = g.feature_distribution(linear.weight, sigma).sample((20_000,))
    assert layer == "fc2" and float(g.one_hot_loss(rest(h))) == pytest.approx(0.2, abs=0.02)


# ---------------------------------------------------------------- replay


def test_reparametrisation_samples_its_distribution():
    mu, log_var = torch.tensor([1.0, -2.0]).repeat(20_000, 1), torch.tensor([0.0, 2.0]).repeat(20_000, 1)
    z = replay.reparametrise(mu, log_var)
    assert torch.allclose(z.mean(0), mu[0], atol=0.1) and torch.allclose(z.var(0).log(), log_var[0], atol=0.1)


def test_vae_shapes_and_size():
    for channels in (1, 3):
        vae = replay.VAE(10, channels, image_size=16, width=8)
        x_hat, mu, log_var = vae(torch.randn(4, channels, 16, 16))
        assert x_hat.shape == (4, channels, 16, 16) and mu.shape == log_var.shape == (4, 10)
    args, file = dfkd.parse("--method pre --dataset cifar10 --device cpu".split()), io.BytesIO()
    memory = dfkd.replay_memory(data.INFO["cifar10"], args)
    torch.save(memory.vae.state_dict(), file)
    assert memory.bytes() == pytest.approx(len(file.getvalue()), rel=0.05) and memory.bytes() < 2.1e6  # the paper's


def test_balanced_inference_balances():
    M, T = g.Generator(10, 1, width=8), models.build("lenet5").eval().requires_grad_(False)
    z = torch.randn(64, 10)
    moved, L_balance = replay.balanced_latents(z, M, T, 0.05)
    assert L_balance.item() == pytest.approx(replay.latent_balance_loss(z, T(M(z))).item(), rel=1e-4)
    before, after = (T(M(v)) for v in (z, moved))
    assert replay.latent_balance_loss(moved, after) < replay.latent_balance_loss(z, before)
    assert (moved - z).abs().max().item() == pytest.approx(0.05, rel=1e-3)  # Adam's first step is lr sign(gradient)
    T.classifier.weight *= 20  # a teacher that is sure, mostly of class 0
    T.classifier.bias += 4 * F.one_hot(torch.tensor(0), 10) - T(M(z)).mean(0).detach()
    skewed = T(M(z))
    for _ in range(20):
        z, _ = replay.balanced_latents(z, M, T, 0.05)
    assert g.information_entropy_loss(T(M(z))) < g.information_entropy_loss(skewed) - 0.1  # the entropy has risen
    assert all(p.grad is None for p in M.parameters())


def test_pseudo_replay_learns_its_images(glyphs_are_drawn_once):
    T = models.build("lenet5").eval().requires_grad_(False)
    memory = replay.PseudoReplay(replay.VAE(8, 1, width=8), 5e-3, 0.02)
    novel = data.normalise(glyphs_are_drawn_once.train_images[:32], GLYPHS)
    losses = [memory.learn(novel, T, rehearse=step > 0)["L_vae"].item() for step in range(25)]
    assert losses[-1] < 0.8 * losses[0]
    x = memory.recall(16, T)
    assert x.shape == (16, 1, 32, 32) and not x.requires_grad


def test_the_bank_is_bounded_and_draws_uniformly():
    bank = replay.Bank(10, 1, image_size=4)
    for i in range(1, 40):
        bank.learn(torch.full((24, 1, 4, 4), float(i)), None, rehearse=True)  # stores 3
        assert bank.filled == min(3 * i, 10) and bank.bytes() == min(3 * i, 10) * 16 * 4
    assert bank.images.min() > 4  # all of the first ones were replaced
    bank.images[:] = torch.arange(10.0).view(10, 1, 1, 1)
    counts = bank.recall(10_000, None)[:, 0, 0, 0].long().bincount(minlength=10)
    assert counts.min() > 850 and counts.max() < 1150


def test_the_bank_recalls_only_what_it_has_stored():
    bank = replay.Bank(100, 1, image_size=4)
    bank.learn(torch.ones(24, 1, 4, 4), None, rehearse=False)
    assert bank.recall(50, None).eq(1).all()
    bank = replay.Bank(2, 1, image_size=4)
    bank.learn(torch.ones(80, 1, 4, 4), None, rehearse=False)  # B/8 is more than it holds
    assert bank.images.eq(1).all() and bank.filled == 2


# ---------------------------------------------------------------- data sets


def test_glyphs_are_balanced_normalised_and_drawn_by_seed():
    (x, y), (again, _), (other, _) = (data.glyphs(2_000, seed) for seed in (0, 0, 1))
    assert x.shape == (2_000, 28, 28) and x.dtype == np.uint8 and (np.bincount(y, minlength=10) == 200).all()
    assert np.array_equal(x, again) and not np.array_equal(x, other)
    x = data.normalise(data.to_32x32(x), GLYPHS)
    assert x.mean().item() == pytest.approx(0, abs=0.02) and x.std().item() == pytest.approx(1, abs=0.02)


def test_glyphs_look_like_their_labels():
    x, y = data.glyphs(1000, 0)
    mean = np.stack([x[y == digit].mean(0) for digit in range(10)])
    middle = mean[:, 12:16, 12:16].mean((1, 2))
    assert middle[0] < 50 < 100 < middle[1]  # a hole, a stroke
    upper, lower = mean[:, 6:14].mean((1, 2)), mean[:, 14:22].mean((1, 2))
    assert lower[6] > 1.1 * upper[6] and upper[9] > 1.1 * lower[9]  # where the loop is


def test_a_linear_classifier_does_not_solve_glyphs():
    x, y = data.glyphs(6_000, 0)
    test_x, test_y = data.glyphs(2_000, 1)
    A = np.c_[x.reshape(len(x), -1) / 255.0, np.ones(len(x))]
    weight = np.linalg.solve(A.T @ A + 10 * np.eye(A.shape[1]), A.T @ np.eye(10)[y])  # ridge regression
    right = (np.c_[test_x.reshape(len(test_x), -1) / 255.0, np.ones(len(test_x))] @ weight).argmax(1) == test_y
    assert 0.6 < right.mean() < 0.93


def test_stroke_distance():
    distance = data.stroke_distance(np.array([[[5, 10], [15, 10], [15, 20]]], np.float32))[0]  # (x, y), so [y, x] below
    assert distance[10, 8] == 0 and distance[13, 8] == 3 and distance[10, 1] == 4
    assert distance[17, 18] == 3 and distance[24, 18] == pytest.approx(5)


def test_images_are_normalised_and_resized():
    x = data.to_32x32(np.full((2, 28, 28), 51, np.uint8))
    assert x.shape == (2, 1, 32, 32) and (x == 51).all() and x.dtype == torch.uint8
    info = data.Info(10, 1, (0.1307,), (0.3081,))
    assert torch.allclose(data.normalise(x, info), torch.tensor((0.2 - 0.1307) / 0.3081))
    assert data.mean_and_std(info, x.device) is data.mean_and_std(data.INFO["mnist"], x.device)  # made once


def test_resizing_is_bilinear_and_rounds():
    ramp = np.broadcast_to(9 * np.arange(28, dtype=np.uint8), (1, 28, 28)).copy()
    between = 9 * ((np.arange(1, 31) + 0.5) * 28 / 32 - 0.5)
    assert np.array_equal(data.to_32x32(ramp)[0, 0, 5, 1:31], np.round(between))


def test_what_is_known_of_the_data_sets():
    known = {  # papers.md
        "mnist": ((0.1307,), (0.3081,)), "fashion-mnist": ((0.2860,), (0.3530,)),
        "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    }  # fmt: skip
    assert {name: (info.mean, info.std) for name, info in data.INFO.items() if name != "glyphs"} == known
    assert [name for name, info in data.INFO.items() if info.mirror] == ["cifar10", "cifar100"]


def test_crops_and_mirror_images():
    x = torch.arange(1, 33 * 32 - 31).remainder(255).byte().view(1, 1, 32, 32).repeat(500, 3, 1, 1)
    y = data.cropped_and_mirrored(x)
    assert y.shape == x.shape and y.dtype == torch.uint8
    padded = F.pad(x[0], (4, 4, 4, 4))
    crops = {padded[:, i : i + 32, j : j + 32].numpy().tobytes(): (i, j) for i in range(9) for j in range(9)}
    plain, mirrored = ([crops.get(image.contiguous().numpy().tobytes()) for image in v] for v in (y, y.flip(3)))
    assert all((a is None) != (b is None) for a, b in zip(plain, mirrored))
    assert len({*plain, *mirrored}) > 75 and 200 < sum(a is None for a in plain) < 300


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_files(folder, files):
    """Make a folder with these files, {name: content}."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def random_bytes(seed, below, *shape):
    return np.random.default_rng(seed).integers(0, below, shape, np.uint8)


MNIST = {  # a small data set: two plain files and two gzipped ones
    "train-images-idx3-ubyte": idx(random_bytes(0, 256, 30, 28, 28)),
    "train-labels-idx1-ubyte.gz": gzip.compress(idx(random_bytes(1, 10, 30))),
    "t10k-images-idx3-ubyte": idx(random_bytes(2, 256, 20, 28, 28)),
    "t10k-labels-idx1-ubyte.gz": gzip.compress(idx(random_bytes(3, 10, 20))),
}


@pytest.mark.parametrize("name", data.IDX_FILES)
def test_idx_files_are_read(tmp_path, name):
    write_files(tmp_path / name, MNIST)
    real = data.load(name, tmp_path)
    pixels = np.frombuffer(MNIST["t10k-images-idx3-ubyte"][16:], np.uint8).reshape(20, 28, 28).copy()
    assert torch.equal(real.test_images, data.to_32x32(pixels)) and real.train_images.shape == (30, 1, 32, 32)
    labels = gzip.decompress(MNIST["train-labels-idx1-ubyte.gz"])[8:]
    assert real.train_labels.tolist() == list(labels) and real.train_labels.dtype == torch.int64


def test_a_gzip_file_may_have_several_parts(tmp_path):
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(b"") + gzip.compress(b"abc") + bytes(70_000) + gzip.compress(b"def") + bytes(9))
    assert data.read(path, 20_000_000) == b"abcdef"
    path.write_bytes(gzip.compress(bytes(1001)))
    assert data.read(path, 1001) == bytes(1001)
    with pytest.raises(data.DataError, match="holds more than 1000 bytes"):
        data.read(path, 1000)


def cifar_files(name):
    known, files = data.CIFAR[name], {}
    for seed, file in enumerate(known.train + known.test):
        files[file] = np.c_[random_bytes(seed, 10, 5, known.label_bytes), random_bytes(seed, 256, 5, 3072)].tobytes()
    return files


def tar_header(name, size, kind=tarfile.REGTYPE):
    header = tarfile.TarInfo(name)
    header.size, header.type = size, kind
    return header.tobuf(tarfile.GNU_FORMAT)  # the one that can say a negative size


def tar(files, first=b"", last=b""):
    """A tar archive with members {name: content}, and other entries in front of and behind them."""
    parts = [tar_header(name, len(content)) + content + bytes(-len(content) % 512) for name, content in files.items()]
    return b"".join([first, *parts, last, bytes(1024)])


@pytest.mark.parametrize("name", data.CIFAR)
@pytest.mark.parametrize("packed", [False, True], ids=["files", "archive"])
def test_cifar_files_are_read(tmp_path, name, packed, capsys):
    known, files = data.CIFAR[name], cifar_files(name)
    hostile = {f"../../{known.folder}/{file}": content for file, content in files.items()}  # leads nowhere
    others = tar_header(known.test[0], 3, tarfile.LNKTYPE)  # has no content, nor has a folder
    others += tar_header("a comment", 700, tarfile.XHDTYPE) + tar_header(known.test[0], 512) + bytes(512)
    others += tar_header("folder", 3, tarfile.DIRTYPE)
    archive = {known.archive: gzip.compress(tar(hostile, first=others, last=others))}
    write_files(tmp_path / known.folder, archive if packed else files)
    real = data.load(name, tmp_path)
    for images, labels, names in ((*real[:2], known.train), (*real[2:], known.test)):
        records = np.frombuffer(b"".join(files[file] for file in names), np.uint8).reshape(5 * len(names), -1)
        assert labels.tolist() == records[:, known.label_bytes - 1].tolist()
        assert np.array_equal(images.numpy(), records[:, known.label_bytes :].reshape(-1, 3, 32, 32))
    assert len(list((tmp_path / known.folder).iterdir())) == (1 if packed else len(files))
    shown = capsys.readouterr().out
    assert ("not the published file" in shown) == packed and shown.count("\n") == packed


@pytest.mark.parametrize("name, file", [("cifar10", 10_000 * 3073), ("cifar100", 50_000 * 3074)])
@pytest.mark.parametrize("packed", [False, True], ids=["files", "archive"])
def test_the_published_cifar_files_are_not_too_large(tmp_path, spy, name, file, packed):
    known, files, reads = data.CIFAR[name], cifar_files(name), spy(data, "read")
    write_files(tmp_path / known.folder, {known.archive: gzip.compress(tar(files))} if packed else files)
    data.load(name, tmp_path)
    assert len(reads) > 0
    assert all(limit >= (60_000 * (known.label_bytes + 3072) if packed else file) for (_, limit), _ in reads)


def test_a_file_of_cifar_100_holds_50_000_images():
    _, labels = data.parse_cifar(Path("train.bin"), bytes(50_000 * 3074), data.CIFAR["cifar100"], 100)
    assert len(labels) == 50_000


def test_a_file_of_cifars_that_is_missing_beside_the_others_is_named(tmp_path, capsys):
    files = {ARCHIVE: gzip.compress(tar(CIFAR), 1)} | {name: CIFAR[name] for name in CIFAR if name != "test_batch.bin"}
    write_files(tmp_path / data.CIFAR["cifar10"].folder, files)
    assert len(data.load("cifar10", tmp_path).test_labels) == 5
    assert "no test_batch.bin in" in capsys.readouterr().out


def mat_header(order):
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(order + "H", 0x100) + (b"IM" if order == "<" else b"MI")


def mat_element(order, kind, content, short=False):
    if short:
        tag = struct.pack(order + "I", len(content) << 16 | kind)
        return tag + content.ljust(4, b"\0")
    return struct.pack(order + "II", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def mat_matrix(order, name, array, kind, compressed, flags=9):
    """A MATLAB 5 element that holds `array`, which is stored as type `kind` whatever its class, in `flags`."""
    body = mat_element(order, 6, struct.pack(order + "II", flags, 0))
    body += mat_element(order, 5, np.array(array.shape, order + "i4").tobytes())
    body += mat_element(order, 1, name.encode(), short=True)
    body += mat_element(order, kind, array.astype(order + data.MAT_TYPES[kind]).tobytes("F"))
    matrix = mat_element(order, 14, body)
    packed = zlib.compress(matrix)
    return struct.pack(order + "II", 15, len(packed)) + packed if compressed else matrix


def svhn_file(order="<", compressed=True, n=7, labels=None, more=b"", X_flags=9, y_flags=6):
    rng = np.random.default_rng(n)
    X = rng.integers(0, 256, (32, 32, 3, n), np.uint8)
    y = rng.integers(1, 11, (n, 1)) if labels is None else np.array(labels).reshape(-1, 1)
    first, last = mat_matrix(order, "X", X, 2, compressed, X_flags), mat_matrix(order, "y", y, 9, compressed, y_flags)
    return X, y, mat_header(order) + first + more + last


@pytest.mark.parametrize("order", "<>", ids=["little-endian", "big-endian"])
@pytest.mark.parametrize("compressed", [True, False], ids=["compressed", "plain"])
def test_svhn_files_are_read(tmp_path, order, compressed, capsys, spy):
    opened = spy(data, "opened")
    other = mat_element(order, 14, mat_element(order, 6, bytes(8)))  # without values
    for flags in (5, 1, 0x806, 99):  # sparse, a cell array, complex, unknown
        other += mat_matrix(order, "Z", np.zeros((9, 9)), 9, compressed, flags)
    other += mat_matrix(order, "X", np.zeros((9, 9)), 9, compressed)  # the first X counts
    made = {file: svhn_file(order, compressed, n, more=other) for file, n in zip(data.SVHN_FILES, (9, 4))}
    write_files(tmp_path / "svhn", {file: content for file, (_, _, content) in made.items()})
    real = data.load("svhn", tmp_path)
    X, y, _ = made["test_32x32.mat"]
    assert real.train_images.shape == (9, 3, 32, 32)
    assert np.array_equal(real.test_images.numpy(), X.transpose(3, 2, 0, 1))
    assert real.test_labels.tolist() == [0 if v == 10 else v for v in y.flatten()]
    assert len(opened) > 0 and all(limit > 183e6 for (_, limit), _ in opened)  # the published one has 182 MB
    assert capsys.readouterr().out.count("not the published file") == 2


def test_other_variables_are_not_inflated(tmp_path, spy):
    other, inflated = mat_matrix("<", "Z", np.zeros(3_000_000), 9, True), spy(data, "matrix")
    (tmp_path / "file.mat").write_bytes(svhn_file(more=other)[2])
    assert len(data.parse_mat(tmp_path / "file.mat")["y"]) == 7
    assert sum(len(content) for _, content in inflated) < 7 * 3080 + 2000


def plain(old, new):
    """A plain file of seven images with one number, or pair of them, replaced by another."""
    content, old, new = svhn_file(labels=[1] * 7, compressed=False)[2], np.array(old, "<i4"), np.array(new, "<i4")
    assert old.tobytes() in content
    return content.replace(old.tobytes(), new.tobytes(), 1)


def repacked(n):
    """A compressed file of seven images whose X says that they are `n`."""
    content = plain(7, n)
    X = content[128 : 192 + 7 * 3072].replace(struct.pack("<I", 7 * 3072), struct.pack("<I", n % 2**20 * 3072))
    packed = zlib.compress(X)
    return content[:128] + struct.pack("<II", 15, len(packed)) + packed


CIFAR = cifar_files("cifar10")
ARCHIVE = data.CIFAR["cifar10"].archive
SVHN = svhn_file()[2]
FILES = {  # kind: a data set, its files, the one that is damaged
    "IDX": ("mnist", MNIST, "t10k-images-idx3-ubyte"),
    "IDX.gz": ("mnist", MNIST, "t10k-labels-idx1-ubyte.gz"),
    "CIFAR": ("cifar10", CIFAR, "test_batch.bin"),
    "CIFAR archive": ("cifar10", {ARCHIVE: gzip.compress(tar(CIFAR), 1)}, ARCHIVE),
    "MATLAB": ("svhn", dict.fromkeys(data.SVHN_FILES, SVHN), "test_32x32.mat"),
    "MATLAB plain": ("svhn", dict.fromkeys(data.SVHN_FILES, svhn_file(compressed=False)[2]), "test_32x32.mat"),
}
DAMAGE = {  # kind: {what is wrong: (the damage or the damaged content, the message)}
    "IDX": {
        "far too large": (lambda b: b[:4] + b"\xff" * 12, "bytes, expected 79228162458924105385300197391"),
        "wrong magic": (lambda b: b"\0\0\x0d" + b[3:], "expected 00000803"),
        "labels for images": (idx(np.zeros(20, np.uint8)), "expected 00000803"),
        "truncated": (lambda b: b[:-1], "bytes, expected"),
        "too long": (lambda b: b + b"x", "bytes, expected"),
        "half a header": (lambda b: b[:7], "bytes, expected"),
        "empty": (b"", "nothing"),
        "other size": (idx(np.zeros((20, 14, 14), np.uint8)), "28 x 28"),
        "other length": (idx(np.zeros((19, 28, 28), np.uint8)), "20 labels for 19 images"),
        "no images": (idx(np.zeros((0, 28, 28), np.uint8)), "20 labels for 0 images"),
    },
    "IDX.gz": {
        "truncated": (lambda b: b[:-9], "truncated compressed file .Compressed file ended"),
        "no gzip": (b"<html>not found</html>", "Not a gzipped file"),
        "damaged": (lambda b: b[:12] + bytes([b[12] ^ 255]) + b[13:], "truncated compressed file"),
        "wrong checksum": (lambda b: b[:-8] + bytes([b[-8] ^ 1]) + b[-7:], "CRC check failed"),
        "more behind it": (lambda b: b + b"more", "Not a gzipped file"),
        "far too long": (lambda b: gzip.compress(bytes(data.IDX_LIMIT + 1), 1), "holds more than 48088576 bytes"),
        "label out of range": (gzip.compress(idx(np.full(20, 10, np.uint8))), "label 10"),
    },
    "CIFAR": {
        "truncated": (lambda b: b[:-1], "15364 bytes, expected a multiple of 3073"),
        "empty": (b"", "0 bytes"),
        "too long": (lambda b: b * 2001, "no file, or one of more than 30730000 bytes"),
        "label out of range": (lambda b: b[:3073] + b"\x0a" + b[3074:], "label 10, expected 0 to 9"),
    },
    "CIFAR archive": {
        **{name: (gzip.compress(content, 1), message) for name, content, message in [
            ("truncated", tar(CIFAR)[:-9999], "header at byte 81920"),
            ("empty", bytes(1024), "no data_batch_1.bin"),
            ("an empty file", tar({**CIFAR, "test_batch.bin": b""}), "test_batch.bin: 0 bytes"),
            ("too long a file", tar({**CIFAR, "test_batch.bin": bytes(30_733_073)}), "3073 up to 30730000"),
            ("backwards", tar(CIFAR, tar_header("a", 0), tar_header("b", -512)), "header at byte 98816"),
            ("backwards in octal", tar_header("a", 0).replace(b"00000000000", b"-0000001000", 1), "header at byte 0"),
            ("2^63 bytes", tar(CIFAR, tar_header("a", 2**63)), "header at byte 0"),
            *((f"2^40 bytes of type {kind}", tar(CIFAR, tar_header("a", 2**40, kind)), "header at byte 0")
              for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE)),
        ]},
        "no archive": (b"<html>", "damaged or truncated compressed file"),
        "truncated gzip": (lambda b: b[:-1], "damaged or truncated compressed file .Compressed file ended"),
        "wrong checksum": (lambda b: b[:-8] + bytes(8), "CRC check failed"),
    },
    "MATLAB": {
        "no MATLAB file": (b"<html>", "expected 494d or 4d49"),
        "MATLAB 7.3": (b"MATLAB 7.3 MAT-file, Platform".ljust(126) + b"IM" + bytes(400), "save it with -v6 or -v7"),
        "HDF5": (lambda b: b[:512] + b"\x89HDF\r\n\x1a\n", "save it with -v6 or -v7"),
        "truncated": (lambda b: b[:-30], "ends at byte"),
        "damaged": (lambda b: b[:300] + bytes(8) + b[308:], "damaged or truncated compressed file"),
        "label out of range": (svhn_file(labels=[1, 2, 3, 4, 5, 6, 11])[2], "labels from 1 to 11, expected 1 to 10"),
        "labels that are no numbers": (svhn_file(labels=[1, 2, 3, np.nan, 5, 6, 7])[2], "labels from nan"),
        "other length": (svhn_file(labels=[1, 2])[2], "2 labels for 7 images"),
        "no labels": (svhn_file(labels=[])[2], "y is float64 .0, 1. in 0 bytes, expected"),
        "no X": (lambda b: b[:128], "no X in it"),
        "too many elements": (lambda b: b[:128] + bytes(8000) + b[128:], "no X in it"),
        "X sparse": (svhn_file(X_flags=5)[2], "X is sparse, expected X uint8"),
        "X a cell array": (svhn_file(X_flags=1)[2], "X is a cell array, expected"),
        "y text": (svhn_file(y_flags=4)[2], "y is text, expected"),
        "y complex": (svhn_file(y_flags=0x806)[2], "y is complex, expected"),
        "fewer images than said": (repacked(90_000), "X ends early or late"),
        "more images than said": (repacked(6), "X ends early or late"),
        "too many images": (repacked(100_001), "N at most 100000"),
        "-1 images": (repacked(-1), "N at most 100000"),
    },
    "MATLAB plain": {
        "no y": (lambda b: b[: 192 + 7 * 3072], "no y in it"),
        "X of other numbers": (plain([2, 7 * 3072], [3, 7 * 3072]), "X is int16"),
        "X of no numbers": (plain([2, 7 * 3072], [99, 7 * 3072]), "X is void8"),
        "y of no numbers": (plain([9, 56], [14, 7]), "y is void8"),
        "shape and values differ": (plain(7, 6), "X is uint8 .32, 32, 3, 6. in 21504 bytes"),
        "half a value": (plain([9, 56], [9, 55]), "in 55 bytes"),
    },
}  # fmt: skip


def laid_out(kind, tmp_path):
    """Write the files of a data set -> its name, the path of the file that will be damaged."""
    name, files, damaged = FILES[kind]
    folder = tmp_path / (data.CIFAR[name].folder if name in data.CIFAR else name)
    write_files(folder, files)
    return name, folder / damaged


@pytest.mark.parametrize("kind, wrong", [(kind, wrong) for kind, cases in DAMAGE.items() for wrong in cases])
def test_damaged_files_are_refused(tmp_path, kind, wrong):
    name, path = laid_out(kind, tmp_path)
    damage, message = DAMAGE[kind][wrong]
    path.write_bytes(damage(path.read_bytes()) if callable(damage) else damage)
    with pytest.raises(data.DataError, match=message) as error:
        data.load(name, tmp_path)
    place = path.parent if kind == "CIFAR archive" else path.with_name(path.name.split("-")[0])  # images or labels
    assert str(error.value).startswith(str(place)) and "\n" not in str(error.value)


NO_FILES = {"folder": Path.mkdir, "pipe": os.mkfifo, "huge": lambda path: (path.touch(), os.truncate(path, 2**40))}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_is_not_read(tmp_path, kind, make):
    name, path = laid_out(kind, tmp_path)
    path.unlink()
    make(path)
    with pytest.raises(data.DataError, match=f"{path.name}: no file, or one of more than .* bytes"):
        data.load(name, tmp_path)


CHANGES = [struct.pack(order + "i", n) for order in "<>" for n in (-1, 0, 7, 2**16, 2**24, 2**30)]
CHANGES += b'nan inf -inf -1 1e999 1e308 9223372036854775808 " \0 \xff , \n [ ] { } null true [[[[[[[['.split(b" ")


def garbled(content, rng):
    """One to three changes, a third of them in the first 200 bytes."""
    for _ in range(rng.integers(1, 4)):
        at = rng.integers(rng.choice([min(200, len(content)), len(content), len(content)]) + 1)
        length = rng.integers(1, rng.choice([10, 600]))
        front, some, rest = content[:at], content[at : at + length], content[at + length :]
        flipped = bytes(byte ^ 1 << rng.integers(8) for byte in some[:1]) + some[1:]
        noise, word = rng.bytes(length), CHANGES[rng.integers(len(CHANGES))]
        put_in = (noise + some, word + some, some + some)
        in_place = (flipped, noise, word, word + some[len(word) :], b"")
        end_is_cut_off = rng.random() < 0.1
        content = front if end_is_cut_off else front + (*put_in, *in_place)[rng.integers(8)] + rest
    return content


def refusals(count, attempt, errors, named):
    """The share of attempts that end in one of the errors, with one line that names the file."""
    refused, rng, count = 0, np.random.default_rng(0), count * int(os.environ.get("DFKD_FUZZ", 1))
    for _ in range(count):
        try:
            attempt(rng)
        except errors as error:
            refused += 1
            assert "\n" not in str(error) and str(named) in str(error)
    return refused / count


def inside(change, content):
    """Change what is compressed: a gzip file, or the first element of a MATLAB file, at byte 128."""
    if content[:2] == b"\x1f\x8b":
        return gzip.compress(change(gzip.decompress(content)), 1)
    (size,) = struct.unpack_from("<I", content, 132)
    packed = zlib.compress(change(zlib.decompress(content[136 : 136 + size])), 1)
    return content[:128] + struct.pack("<II", 15, len(packed)) + packed + content[136 + size :]


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_read_or_refused(tmp_path, kind):
    """Data or a DataError of one line, whatever the damage; what is compressed is damaged outside or inside."""
    name, path = laid_out(kind, tmp_path)
    content = path.read_bytes()

    def attempt(rng):
        within = kind in ("IDX.gz", "CIFAR archive", "MATLAB") and rng.random() < 2 / 3
        path.write_bytes(inside(lambda b: garbled(b, rng), content) if within else garbled(content, rng))
        assert len(data.load(name, tmp_path).test_labels)

    assert 1 / 6 < refusals(60, attempt, data.DataError, path.parent) < 1


@pytest.mark.parametrize("kind", ["IDX.gz", "CIFAR archive", "MATLAB"])
def test_files_that_are_not_there_are_downloaded(tmp_path, monkeypatch, kind):
    (tmp_path / "served").mkdir()
    name, checksums = laid_out(kind, tmp_path / "served")[0], []

    def download(path, urls, checksum):
        assert urls and all(re.fullmatch(f"https?://.*/{path.name}", url) for url in urls)
        path.parent.mkdir(parents=True, exist_ok=True)
        served = tmp_path / "served" / path.relative_to(tmp_path / "new")
        path.write_bytes(served.read_bytes() if served.exists() else gzip.compress(served.with_suffix("").read_bytes()))
        checksums.append(checksum)

    monkeypatch.setattr(data, "download", download)
    for new, served in zip(data.load(name, tmp_path / "new"), data.load(name, tmp_path / "served")):
        assert torch.equal(new, served)
    files = [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert len(set(checksums)) == len(files) == {"IDX.gz": 4, "CIFAR archive": 1, "MATLAB": 2}[kind]


def test_downloads_are_checked_and_whole(tmp_path, capsys, monkeypatch):
    content = idx(np.arange(5, dtype=np.uint8))
    whole = gzip.compress(content)
    right = hashlib.sha256(whole).hexdigest()
    served = tmp_path / "served"
    write_files(served, {"bad": gzip.compress(b"other"), "cut": whole[:-5], "good": whole})
    bad, cut, good, nowhere = ((served / name).as_uri() for name in ("bad", "cut", "good", "nowhere"))
    path = tmp_path / "new" / "labels.gz"
    with pytest.raises(data.DataError, match="wrong checksum.*--data-dir"):
        data.download(path, [bad, cut, nowhere, "http://a:port/labels.gz"], right)  # none looks for a network
    assert list(path.parent.iterdir()) == []
    data.download(path, [bad, cut, good], right)
    assert data.read(path, 100) == content and list(path.parent.iterdir()) == [path]
    with pytest.raises(NotADirectoryError, match="good"):  # no server's fault
        data.download(served / "good" / "new" / "labels.gz", [good], right)
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(data, "write", Mock(side_effect=full))
    with pytest.raises(OSError, match="No space left"):
        data.download(path, [good, good], right)
    assert data.write.call_count == 1
    capsys.readouterr()
    data.compare_with_published(path, right)
    assert capsys.readouterr().out == ""


def test_downloads_may_be_large_and_have_a_time_limit(tmp_path, monkeypatch):
    asked = []

    class Response(io.BytesIO):
        def read(self, count):
            asked.append(count)
            return b""

    monkeypatch.setattr(data.urllib.request, "urlopen", lambda url, timeout: Response())
    with pytest.raises(data.DataError):
        data.download(tmp_path / "a", ["http://a/a"], "")
    assert asked[0] > 183e6


def test_two_processes_may_write_the_same_file(tmp_path, monkeypatch):
    replace = os.replace

    def interrupted(part, path):  # by another process, which writes it from beginning to end
        with monkeypatch.context() as other:
            other.setattr(os, "replace", replace)
            other.setattr(os, "getpid", lambda: 0)
            data.write(path, b"theirs")
        replace(part, path)

    monkeypatch.setattr(os, "replace", interrupted)
    data.write(tmp_path / "file", b"ours")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"ours"]


def test_a_link_stays_a_link_when_it_is_written(tmp_path):
    (tmp_path / "link").symlink_to("file")
    data.write(tmp_path / "link", b"ours")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"ours"
    (tmp_path / "loop").symlink_to("loop")
    data.write(tmp_path / "loop", b"ours")  # to itself: nothing to keep
    assert (tmp_path / "loop").read_bytes() == b"ours"


def test_a_write_is_synced_and_a_failed_one_leaves_the_earlier_file(tmp_path, monkeypatch):
    synced, path = [], tmp_path / "file"
    errors = {2: OSError(28, "No space left on device")}

    def fsync(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        if len(synced) in errors:
            raise errors[len(synced)]

    monkeypatch.setattr(os, "fsync", fsync)
    data.write(path, b"earlier")
    assert synced == [path.stat().st_ino]
    with pytest.raises(OSError, match="No space left on device: '.*file'"):
        data.write(path, b"later")
    with monkeypatch.context() as read_only:
        for name in ("open", "unlink"):
            read_only.setattr(Path, name, Mock(side_effect=OSError(30, "Read-only file system", "part")))
        with pytest.raises(OSError, match="Read-only file system: '.*file'"):
            data.write(path, b"later")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"earlier")]


def test_tensors_are_saved_and_loaded(tmp_path):
    path, saved = tmp_path / "x.pt", dict(step=3, x=[torch.arange(3), None], rate=0.5)
    data.save(path, saved)
    loaded = data.load_tensors(path)
    assert loaded["x"][0].tolist() == [0, 1, 2] and {**loaded, "x": 0} == {**saved, "x": 0}
    for content in (path.read_bytes()[:-100], b"", b"<html>"):
        path.write_bytes(content)
        with pytest.raises(data.DataError, match="x.pt: not a PyTorch file of plain tensors"):
            data.load_tensors(path)
    with pytest.raises(FileNotFoundError):
        data.load_tensors(tmp_path / "y.pt")


def test_csv_has_a_column_for_every_key():
    content = data.csv_rows([dict(step=1, L_G=0.5), dict(step=2, accuracy=None, L_S=3)]).decode()
    assert content.split() == ["step,L_G,accuracy,L_S", "1,0.5,,", "2,,,3"]


def pixels_of(png):
    """A picture that data.png made, (lines, 3 or 1 times its width), its chunks checked."""
    at, chunks = 8, {}
    while at < len(png):
        (size,), kind = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        chunks[kind] = png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size]) == (zlib.crc32(kind + chunks[kind]),)
        at += 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    height = struct.unpack(">I", chunks[b"IHDR"][4:8])[0]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert (lines[:, 0] == 0).all()  # filter type
    return lines[:, 1:]


def test_png_holds_the_images():
    x = torch.rand(4, 3, 2, 5)
    grid = torch.from_numpy(pixels_of(data.png(x, columns=2)).copy()).view(2, 2, 2, 5, 3)
    grid = grid.permute(0, 2, 4, 1, 3)  # (row, column, C, H, W)
    assert torch.equal(grid.flatten(0, 1), (x * 255).round().byte())
    width_and_height = data.png(x[:3])[16:24]  # few images have one row
    assert width_and_height == struct.pack(">II", 15, 2)


def test_curves_share_colours_and_labels():
    runs = [("<a>", [(10, 20.0), (20, 90.0), (40, 100.0)]), ("b", [(40, 50.0)]), ("<a>", [(20, 85.0)])]
    picture = ElementTree.fromstring(data.svg_curves(runs, "T queries"))
    lines = picture.findall("{*}polyline")
    assert [len(line.get("points").split()) for line in lines] == [3, 1, 1]
    assert lines[0].get("points").split()[-1] == "630.0,20.0"  # the highest at the last step: the upper right corner
    assert lines[0].get("stroke") == lines[2].get("stroke") != lines[1].get("stroke")
    texts = [e.text for e in picture.findall("{*}text")]
    assert texts == ["T queries", *(f"{y} %" for y in range(50, 101, 10)), "0", "10", "20", "30", "40", "<a>", "b"]


def test_each_of_many_curves_has_a_look_of_its_own():
    names = [f"run {i:02d}" for i in range(16)]
    picture = ElementTree.fromstring(data.svg_curves([(name, [(0, 50.0), (1, 60.0)]) for name in names]))
    looks = [(line.get("stroke"), line.get("stroke-dasharray")) for line in picture.findall("{*}polyline")]
    assert len(set(looks)) == 16 and looks[0] == ("#0072b2", "none") and looks[8] == ("#0072b2", "6 3")
    labels = [e for e in picture.findall("{*}text") if e.text.startswith("run")]
    assert [e.text for e in labels] == names[:8] + [f"{name} - -" for name in names[8:]]
    assert [float(e.get("y")) for e in labels] == sorted(float(e.get("y")) for e in labels)  # from the top down
    assert [e.get("fill") for e in labels] == [colour for colour, _ in looks]


@pytest.mark.parametrize("low, high", [(0, 0), (97.0, 99.2), (0, 7.53), (-4, 100), (0, 2**53), (50, 50.02)])
def test_the_ticks_of_an_axis_are_few_and_within_it(low, high):
    found = data.ticks(low, high)
    assert 2 - (low == high) <= len(found) <= 6 and all(low <= x <= high * (1 + 1e-9) for x in found)


def test_samples_of_runs_in_one_picture(tmp_path):
    x = torch.rand(16, 3, 4, 5)
    (tmp_path / "samples.png").write_bytes(data.png(x))
    picture = ElementTree.fromstring(data.svg_samples([("<a>", tmp_path / "samples.png")] * 2, count=4))
    assert [e.text for e in picture.findall("{*}text")] == ["<a>", "<a>"]
    for image in picture.findall("{*}image"):
        assert base64.b64decode(image.get("href").partition(",")[2]) == data.png(x[:8])  # the first of two rows
    (tmp_path / "low.png").write_bytes(data.png(x[:4, :, :3]))
    pictures = [("a", tmp_path / "samples.png"), ("a long name", tmp_path / "low.png")]
    picture = ElementTree.fromstring(data.svg_samples(pictures, count=4))
    assert [image.get("height") for image in picture.findall("{*}image")] == ["4", "3"]
    assert picture.get("viewBox") == f"0 0 {8 + 7 * 11 + 40 + 4} {4 + 8 + 7}"
    wide, flat = (data.png(x).replace(struct.pack(">II", 40, 8), struct.pack(">II", *size)) for size in
                  ((2**32 - 1, 8), (40, 0)))  # fmt: skip
    for damaged in (b"", b"no PNG" * 10, data.png(x)[:50], wide, flat):
        (tmp_path / "samples.png").write_bytes(damaged)
        with pytest.raises(data.DataError, match="samples.png"):
            data.svg_samples([("a", tmp_path / "samples.png")], count=4)


@pytest.mark.parametrize("run", [[(0, 0.0)], [(7, 50.0)], [(1, 50.0), (2, 50.0)], [(5, 100.0)] * 3])
def test_curves_of_few_points_are_drawn(run):
    (line,) = ElementTree.fromstring(data.svg_curves([("a", run)])).findall("{*}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    assert len(points) == len(run) and all(50 <= x <= 630 and 20 <= y <= 330 for x, y in points)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory):
    """Where the session's runs find their teacher."""
    folder = tmp_path_factory.mktemp("teachers")
    args = dfkd.parse(f"--device cpu --precision fp32 --threads 1 --teacher-dir {folder}".split())
    models.set_up_torch(args.threads)
    dfkd.get_teacher(args, GLYPHS, data.load("glyphs"))
    return folder


@pytest.fixture(scope="session")
def teacher_file(teacher_dir):
    return next(teacher_dir.iterdir())


def small(flags):
    """The flags of a small run; those given come last and count."""
    shape = "--steps 12 --eval-every 4 --batch 16 --precision fp32 --device cpu --threads 1"
    method = (re.findall(r"--method (\S+)", flags) or ["rdskd"])[-1]
    if method in GENERATORS:
        shape += " --width 8 --latent 10" + " --generator-steps 6" * (method == "rdskd")
    if method in SYNTHESES:
        shape += " --images 24 --image-batch 9 --image-steps 4"
    return f"{shape} {flags}".split()


@pytest.fixture
def command(teacher_dir, tmp_path):
    """command(out, flags) runs it with evaluations -> its exit code."""
    return lambda out, flags="": dfkd.main(small(f"--teacher-dir {teacher_dir} --out {tmp_path / out} {flags}"))


@pytest.fixture(scope="session")
def blind(teacher_file):
    """blind(folder, flags) runs it without evaluations -> its exit code."""
    return lambda folder, flags="": dfkd.main(small(f"--teacher {teacher_file} --no-eval --out {folder} {flags}"))


def bare_run(folder, flags=""):
    """The record of a run whose loop can begin, and its student."""
    args = dfkd.parse(small(f"--teacher {dfkd.__file__} --no-eval --out {folder} {flags}"))
    run, net = dfkd.Run(args, GLYPHS), nn.Linear(1, 1)
    run.begin(net, lambda: None)
    run.keep(S=net)
    return run, net


def one_line(text):
    assert text.startswith("dfkd.py: ") and text.count("\n") == 1 and "Traceback" not in text
    return text


@pytest.fixture
def failure(capsys):
    """failure(code, run, ...) calls run(...), which must end with this exit code -> its one line."""

    def call(code, run, *args):
        capsys.readouterr()
        try:
            assert run(*args) == code
        except SystemExit as exit:
            assert exit.code == code
        return one_line(capsys.readouterr().err)

    return call


@pytest.fixture
def refused(blind, failure):
    """refused(folder, flags) runs it without evaluations; it must end with an error -> its one line."""
    return functools.partial(failure, 1, blind)


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def outcome(folder):
    """What a run must reproduce: its student bit by bit, result and curve but for the seconds, and picture."""
    result, rows, picture = result_of(folder), rows_of(folder), folder / "samples.png"
    for timed in (result, *rows):
        timed.pop("seconds")
    student = torch.load(folder / "student.pt", weights_only=True)
    return student, result, rows, picture.exists() and picture.read_bytes()


def assert_same(a, b):
    (student_a, *a), (student_b, *b) = outcome(a), outcome(b)
    assert a == b
    assert student_a.keys() == student_b.keys()
    assert all(torch.equal(student_a[k], student_b[k]) for k in student_a)


def test_the_whole_command(command, tmp_path, capsys):
    assert command("a") == 0
    printed, out = capsys.readouterr().out, tmp_path / "a"
    for part in ("schedule   --replay none  --batch 16 ", "eta", "teacher  lenet5", "variance"):
        assert part in printed
    assert {p.name for p in out.iterdir()} == set(dfkd.FILES) - {"transfer"}
    result = result_of(out)
    fields = """method dataset teacher student seed steps teacher_accuracy accuracy_last accuracy_max accuracy_mean
        accuracy_variance agreement_fresh classes_fresh classes agreement_memory diversity replay_bytes transfer_set
        seconds args torch_version git_commit"""
    assert list(result) == fields.split()
    curve = [float(row["accuracy"]) for row in rows_of(out) if row["accuracy"]]
    assert len(curve) == 3 and result["accuracy_last"] == curve[-1] and result["accuracy_max"] == max(curve)
    assert result["accuracy_mean"] == pytest.approx(np.mean(curve))
    assert result["accuracy_variance"] == pytest.approx(np.var(curve))
    assert 97 <= result["teacher_accuracy"] <= 99.7
    models.build("lenet5_half").load_state_dict(torch.load(out / "student.pt", weights_only=True))
    picture = (out / "samples.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", picture[16:24]) == (256, 256)

    assert command("b") == 0
    assert_same(out, tmp_path / "b")
    assert command("c", "--seed 1") == 0
    assert outcome(out)[2] != outcome(tmp_path / "c")[2]


def test_the_help_has_every_flag():
    text = dfkd.parser().format_help()
    assert all(flag in text for action in dfkd.parser()._actions for flag in action.option_strings)


def test_an_export_that_could_not_be_written_is_refused_at_once(failure, monkeypatch, tmp_path):
    monkeypatch.setattr(dfkd, "distil", None)
    teacher, folder = tmp_path / "teacher.pt2", tmp_path / "folder.pt2"
    torch.save(LENET, teacher)
    folder.mkdir()
    for path, reason in ((teacher, "is the teacher's file"), (folder, "give a FILE.pt2")):
        assert reason in failure(2, dfkd.main, ["--teacher", str(teacher), "--export", str(path)])
    (tmp_path / "link.pt2").symlink_to(teacher)
    assert "the teacher's" in failure(2, dfkd.main, f"--teacher {teacher} --export {tmp_path}/link.pt2".split())


def test_there_are_no_figures_of_images_that_are_nan(command, tmp_path, capsys):
    flags = "--method dafl --steps 1 --student-steps 1 --generator-lr 1e30"
    assert command("a", flags) == 0
    result, printed = result_of(tmp_path / "a"), capsys.readouterr().out
    assert result["agreement_fresh"] is None and result["diversity"] is None
    assert "note: the generator or the memory became NaN" in printed and "agrees" not in printed
    assert dfkd.main(["--table", str(tmp_path / "a")]) == 0


def test_a_finished_run_can_still_be_exported(command, tmp_path):
    assert command("a", "--method noise") == 0
    assert command("a", f"--method noise --resume --export {tmp_path}/student.pt2") == 0
    assert (tmp_path / "student.pt2").exists()


def test_samples_are_pixels(command, tmp_path, glyphs_are_drawn_once):
    assert command("a", "--method kd") == 0
    x = glyphs_are_drawn_once.train_images[:64].view(8, 8, 32, 32).transpose(1, 2).reshape(256, 256)
    assert np.abs(pixels_of((tmp_path / "a" / "samples.png").read_bytes()) - x.numpy().astype(int)).max() <= 1


def test_the_last_accuracy_is_the_result(command, tmp_path, monkeypatch, glyphs_are_drawn_once):
    values = iter((99.0, 50.0, 70.0, 60.0))  # the teacher's, three of the student's: the last is not the best
    measured = []
    monkeypatch.setattr(models, "accuracy", lambda net, *on: measured.append(on[:2]) or next(values))
    assert command("a") == 0
    assert all(torch.equal(a, b) for on in measured for a, b in zip(on, glyphs_are_drawn_once[2:], strict=True))
    result = result_of(tmp_path / "a")
    expected = dict(teacher_accuracy=99, accuracy_last=60, accuracy_max=70, accuracy_mean=60, accuracy_variance=200 / 3)
    assert {key: result[key] for key in expected} == pytest.approx(expected)


@pytest.fixture(scope="session")
def made_data_sets(tmp_path_factory):
    """A folder with glyphs in the files of three data sets; those of CIFAR-100 in the colours of its 100 classes."""
    folder = tmp_path_factory.mktemp("datasets")
    sets = dict(train=data.glyphs(1280, seed=2), t10k=data.glyphs(300, seed=3))
    idx_files, hundred, digits = {}, {}, {}
    for part, (images, labels) in sets.items():
        idx_files[f"{part}-images-idx3-ubyte"] = idx(images)
        idx_files[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(idx(labels.astype(np.uint8)))
        colour = np.arange(len(labels)) % 10
        shades = np.stack([25 * colour, 225 - 25 * colour, 25 * (colour % 2)], 1).astype(np.uint8)
        grey = np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None]
        rgb = np.maximum(grey, shades[:, :, None, None])
        records = np.c_[labels, 10 * labels + colour, rgb.reshape(len(rgb), -1)].astype(np.uint8)
        hundred["train.bin" if part == "train" else "test.bin"] = records.tobytes()
        X, y = rgb.transpose(2, 3, 1, 0), np.where(labels == 0, 10, labels)[:, None]
        digits["train_32x32.mat" if part == "train" else "test_32x32.mat"] = (
            mat_header("<") + mat_matrix("<", "X", X, 2, True) + mat_matrix("<", "y", y, 9, True, 6)
        )
    write_files(folder / "fashion-mnist", idx_files)
    write_files(folder / data.CIFAR["cifar100"].folder, hundred)
    write_files(folder / "svhn", digits)
    return folder


@pytest.mark.parametrize("name, least, arch", [
    ("fashion-mnist", 50, "lenet5"), ("svhn", 50, "lenet5"), ("cifar100", 4, "wrn-10-1"),
])  # fmt: skip
def test_the_whole_command_on_the_files_of_a_data_set(made_data_sets, tmp_path, monkeypatch, capsys, name, least, arch):
    flags = f"--dataset {name} --data-dir {made_data_sets} --teacher-arch {arch} --student-arch {arch}"
    flags += f" --teacher-epochs 6 --teacher-dir {tmp_path / 'teachers'} --out {tmp_path / 'a'} --eval-every 12"
    assert dfkd.main(small(flags)) == 0
    result = result_of(tmp_path / "a")
    assert result["dataset"] == name and result["teacher_accuracy"] > least  # chance is 10, for cifar100 1
    assert result["agreement_fresh"] is not None and (tmp_path / "a" / "samples.png").exists()
    monkeypatch.setattr(data, "load", None)  # a finished run needs nothing
    monkeypatch.setattr(data, "git_commit", lambda: "later")
    assert dfkd.main(small(f"{flags} --resume --data-dir elsewhere --teacher-dir elsewhere")) == 0
    said = capsys.readouterr().out
    assert "nothing is left to do" in said and "goes on with" not in said
    assert result_of(tmp_path / "a") == result
    monkeypatch.undo()
    picture = tmp_path / "a" / "samples.png"
    drawn = picture.read_bytes()
    picture.unlink()
    assert dfkd.main(small(f"{flags} --resume")) == 0
    assert picture.read_bytes() == drawn
    (tmp_path / "a" / "student.pt").unlink()
    assert dfkd.main(small(f"{flags} --resume")) == 0 and (tmp_path / "a" / "student.pt").exists()


def test_a_run_that_trains_its_teacher_is_the_run_that_finds_it(made_data_sets, tmp_path):
    flags = f"--dataset fashion-mnist --data-dir {made_data_sets} --teacher-epochs 1 --teacher-dir {tmp_path}/teachers"
    for out in "ab":
        assert dfkd.main(small(f"{flags} --out {tmp_path / out}")) == 0
    assert_same(tmp_path / "a", tmp_path / "b")


def test_an_earlier_run_is_neither_mixed_nor_lost(blind, refused, tmp_path):
    assert blind(tmp_path) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "checkpoint.pt.host.1.part").write_bytes(b"half")  # of a killed run
    (tmp_path / "transfer").mkdir()
    (tmp_path / "transfer" / "0.pt.host.1.part").write_bytes(b"half")
    (tmp_path / "films.part").write_bytes(b"none of ours")
    assert re.search("--resume .*--out", refused(tmp_path, "--seed 1"))
    torch.save({}, tmp_path.parent / "other.pt")
    refused(tmp_path, f"--resume --teacher {tmp_path.parent / 'other.pt'}")  # a run that cannot begin
    with data.claimed(tmp_path, dfkd.FILES, resume=True):
        assert "another run" in refused(tmp_path, "--resume")
    assert blind(tmp_path, "--resume") == 0
    for path, content in before.items():
        assert path.name == "result.json" or path.read_bytes() == content  # that has the seconds in it
    assert [path.name for path in tmp_path.rglob("*.part")] == ["films.part"]


VAE = "--replay vae --memory-width 4 --memory-latent 8"
TERMS = {"rdskd": {"L_ds"}, "pre": {"L_a", "L_js", "L_kd"}, "dafl": {"L_a", "L_kd"}, "mskd": {"L_ms", "L_kd"}}
WRITTEN = [(m, replay) for m in ("rdskd", "pre", "dafl") for replay in ("none", "vae", "bank")]
WRITTEN += [("mskd", "none"), *((m, None) for m in (*SYNTHESES, "noise"))]  # mskd is dafl's loop


@pytest.mark.parametrize("method, memory", WRITTEN)
def test_every_term_of_every_stage_is_written(blind, tmp_path, method, memory):
    replays = {"none": "--replay none", "vae": VAE, "bank": "--replay bank --bank-size 5", None: ""}
    assert blind(tmp_path, f"--method {method} {replays[memory]}") == 0
    written = {}
    for row in rows_of(tmp_path):
        stage, *_ = (row.pop(name) for name in ("stage", "step", "accuracy", "seconds"))
        assert all(math.isfinite(float(value)) for value in row.values() if value)
        written.setdefault(stage, set()).update(name for name, value in row.items() if value)
    expected = {"student": {"L_kd"}}
    if method in GENERATORS:
        vae = {"L_vae", "L_rec", "L_kl", "L_balance"} if memory == "vae" else set()
        stage = "generator" if method == "rdskd" else "student"
        expected[stage] = {"L_G", "L_oh", "L_ie", *TERMS[method], *vae}
    elif method in SYNTHESES:
        terms = {"soft-target": {"L_ce", "L_a"}, "zskd": set(), "deepinversion": {"L_ce", "L_tv", "L_bn"}}[method]
        expected["images"] = {"L_x", "agreement", "strayed", *terms}
    assert written == expected
    size = {"bank": 5 * 32 * 32 * 4, "vae": sum(v.nbytes for v in replay.VAE(8, 1, width=4).state_dict().values())}
    result, saved = result_of(tmp_path), torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert result["replay_bytes"] == size.get(memory, 0)
    assert saved["parts"]["decay_S"]["last_epoch"] == result["steps"]  # the rate moves at every step


def test_means_of_the_losses_are_written(tmp_path):
    run, net = bare_run(tmp_path)
    for turn in run.steps("student", 8):
        run.log(L_kd=torch.tensor(float(turn)))
    assert [float(row["L_kd"]) for row in rows_of(tmp_path)] == [1.5, 5.5]
    nn.init.constant_(net.weight, torch.nan)
    with pytest.raises(dfkd.RunError, match="the student became NaN in its last steps"):
        run.finish(None)
    assert not (tmp_path / "result.json").exists()


def test_the_generators_stage_has_twenty_rows(tmp_path):
    run, _ = bare_run(tmp_path)
    for _ in run.steps("generator", 40):
        pass
    assert [row["step"] for row in run.rows] == list(range(2, 41, 2))


@pytest.mark.parametrize("method, least", [
    ("rdskd --generator-steps 80", 30), (f"pre {VAE} --student-steps 5 --steps 100", 25),
    ("mskd --student-steps 5", 25), ("soft-target", 25), ("zskd", 25), ("deepinversion", 25), ("kd", 80),
    ("noise --steps 300", 50),
])  # fmt: skip
def test_students_learn(command, tmp_path, method, least, capsys):
    shape = "--batch 32 --student-lr 5e-3 --steps 150 --eval-every 150"
    shape += " --images 200 --image-batch 50 --image-steps 50" if method in SYNTHESES else ""
    assert command("a", f"{shape} --method {method}") == 0
    result = result_of(tmp_path / "a")
    noise = "noise" in method  # S learns T's answers to it; an S that always gives the same has up to 39 % of them
    assert result["agreement_fresh" if noise else "accuracy_last"] > least  # chance is 10
    if method in SYNTHESES:
        made = result["transfer_set"]
        assert made["images"] == 200 and made["bytes"] == 200 * 32 * 32 * 2
        assert made["agreement"] > (0.7 if method == "soft-target" else 0.9)  # soft targets lie between classes
        assert (made["strayed"] > 0) == (method == "zskd")
        stored = [torch.load(tmp_path / "a" / "transfer" / f"{i}.pt", weights_only=True) for i in (0, 50, 100, 150)]
        assert all(s["images"].shape == (50, 1, 32, 32) and s["images"].dtype == torch.float16 for s in stored)
        printed = capsys.readouterr().out
        assert ("BatchNorm" in printed) == (method == "deepinversion")
        assert f"puts {100 * made['agreement']:.1f} % of them" in printed


def test_without_evaluation_no_data_set_is_touched(blind, command, teacher_file, tmp_path, monkeypatch):
    assert command("seen", f"--teacher {teacher_file}") == 0
    monkeypatch.setattr(data, "load", None)
    monkeypatch.setattr(data, "glyphs", None)
    assert blind(tmp_path / "unseen") == 0
    seen, unseen = outcome(tmp_path / "seen"), outcome(tmp_path / "unseen")
    assert unseen[1]["accuracy_last"] is None and unseen[1]["teacher_accuracy"] is None
    assert all(torch.equal(seen[0][k], unseen[0][k]) for k in seen[0])


@pytest.mark.parametrize("method", ["pre", "soft-target", "deepinversion"])
def test_a_teacher_of_ones_own(tmp_path, monkeypatch, method):
    torch.save(models.build("wrn-10-1", 7, 2).state_dict(), tmp_path / "own.pt")
    monkeypatch.setattr(data, "load", None)
    flags = "--num-classes 7 --channels 2 --teacher-arch wrn-10-1 --student-arch wrn-16-1 --batch 8 --steps 3"
    flags += " --memory-width 8 --student-steps 3" if method == "pre" else " --images 16 --image-steps 2"
    run = small(f"--method {method} --teacher {tmp_path}/own.pt {flags} --precision bf16 --out {tmp_path}/run")
    assert dfkd.main(run) == 0
    result, picture = result_of(tmp_path / "run"), (tmp_path / "run" / "samples.png").read_bytes()
    assert picture[24:26] == bytes([8, 0])  # of two channels, the first in grey
    assert result["dataset"] == "own" and result["accuracy_last"] is None
    student = torch.load(tmp_path / "run" / "student.pt", weights_only=True)
    assert student["classifier.bias"].shape == (7,) and student["stem.weight"].shape[1] == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
@pytest.mark.parametrize("flags", [
    "--method rdskd --replay bank --ours range augment", "--method pre", "--method kd", "--method zskd",
    "--method soft-target",
    "--method deepinversion --teacher-arch wrn-10-1 --student-arch wrn-10-1", "--method pre --teacher-arch alexnet",
])  # fmt: skip
def test_on_a_gpu(tmp_path, flags, capsys):
    """It trains a teacher, repeats itself and goes on after Ctrl-C; grid_sample's gradient has no fixed order there."""

    def run(out):
        teacher = f"--teacher-epochs 1 --teacher-dir {tmp_path / 'teachers'}"
        return dfkd.main(small(f"{flags} {teacher} --device cuda --precision auto --out {tmp_path / out} --resume"))

    assert run("first") == 0
    printed, free = capsys.readouterr().out, any(name in flags for name in ("soft-target", "zskd"))
    assert "of the GPU's" in printed and ("does not give the same bits" in printed) == free
    with backward_passes() as calls:
        assert run("a") == 0
    with backward_passes(until=2 * len(calls) // 3):  # behind a checkpoint
        assert run("b") == 130
    assert run("b") == 0
    a, b = (torch.load(tmp_path / out / "student.pt", weights_only=True) for out in "ab")
    assert free or all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
@pytest.mark.parametrize("arch, channels, bf16", [
    ("lenet5", 1, False), ("resnet18", 3, True), ("wrn-10-1", 3, True), ("alexnet_half", 3, True),
])  # fmt: skip
def test_a_cuda_graph_gives_the_very_same_student(arch, channels, bf16, monkeypatch):
    """With BatchNorms and dropout, G's steps and evaluations between those of S, once a batch of another size."""
    models.set_up_torch(1, "cuda")
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    info, states, losses = data.Info(10, channels, (0.5,) * channels, (0.3,) * channels), [], []
    for fast in (False, True):
        torch.manual_seed(0)
        teacher, student = (models.on_device(arch, info, "cuda", "bf16" if bf16 else "fp32") for _ in "TS")
        teacher.eval().requires_grad_(False)
        args = dfkd.parse(f"--device {'cuda' if fast else 'cpu'} --steps 9".split())
        optimiser, decay = dfkd.student_optimiser(student, args)
        step = dfkd.student_step(lambda x: g.distillation_loss(student(x), teacher(x), 10), optimiser, decay, args)
        losses.append([])
        for i in range(9):
            x = torch.randn(8 if i == 6 else 16, channels, 32, 32, device="cuda", requires_grad=True)
            L_js = student(x).sum()  # it lives on while S steps, as PRE-DFKD's does
            L_js.backward(inputs=[x])
            if i == 5:
                student.eval()(x.detach())
                student.train()
            losses[-1].append(step(x.detach()))
        states.append(student.state_dict())
    assert len(replays) == 5  # not in the first three steps, nor where the size differs
    assert torch.equal(*map(torch.stack, losses)) and len(set(map(float, losses[1]))) == 9
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("device, teacher, student, stream, replays", [
    ("cuda", "lenet5", "lenet5_half", 1, 3), ("cuda", "lenet5", "lenet5_half", 0, 0),
    ("cuda", "net.py:net", "lenet5_half", 1, 0), ("cuda", "lenet5", "net.py:net", 1, 0),
    ("cpu", "lenet5", "lenet5_half", 1, 0),
])  # fmt: skip
def test_when_a_cuda_graph_is_recorded_and_replayed(monkeypatch, device, teacher, student, stream, replays):
    """A stand-in for it: replay() computes again, in the place of what was recorded. 0 is CUDA's default stream."""
    w, calls, seen = nn.Parameter(torch.tensor(3.0)), [], []

    def loss(x):
        seen.append((x, w * x.sum()))
        return seen[-1][1]

    @contextlib.contextmanager
    def record(graph, stream):
        yield
        graph.x, graph.L, graph.g = seen[-1][0], seen[-1][1].detach(), w.grad

    class Graph:
        def replay(self):
            calls.append(self)
            self.L.copy_(w.detach() * self.x.sum())
            self.g.copy_(self.x.sum())

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: 0)
    optimiser = torch.optim.SGD([w], 1.0)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.5)
    args = argparse.Namespace(device=device, teacher_arch=teacher, student_arch=student)
    step, sizes = dfkd.student_step(loss, optimiser, decay, args), (1, 1, 1, 1, 2, 1, 1)
    losses = [step(torch.full((n,), i + 1.0)) for i, n in enumerate(sizes)]
    weight, expected = 3.0, []
    for i, n in enumerate(sizes):
        expected.append(weight * (i + 1) * n)
        weight -= 0.5**i * (i + 1) * n
    assert torch.stack(losses).tolist() == expected and w.item() == weight and len(calls) == replays


@pytest.mark.parametrize("flags, device, same", [
    ("--method zskd", "cuda", False), ("--method zskd", "cpu", True), ("--method zskd --ours range", "cuda", True),
    ("--method deepinversion --ours augment", "cuda", False), ("--method rdskd --ours augment", "cuda", True),
])  # fmt: skip
def test_which_runs_give_the_same_bits_again(flags, device, same):
    args = dfkd.parse(flags.split())
    args.device = device
    assert dfkd.repeatable(args) == same


# ---------------------------------------------------------------- runs that are interrupted


@contextlib.contextmanager
def backward_passes(until=None, kind=signal.SIGINT):
    """Count the backward passes, or replays of one, with which every step of a network or an image begins.

    After so many, a signal.
    """
    calls = []

    def counting(function):
        def counted(*args, **more):
            if len(calls) == until:
                assert signal.getsignal(kind) is signal.default_int_handler  # else it would end these tests
                signal.raise_signal(kind)
            calls.append(1)
            function(*args, **more)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch.Tensor, "backward"), (torch.cuda.CUDAGraph, "replay")):
            patch.setattr(owner, name, counting(getattr(owner, name)))
        yield calls


@pytest.fixture(scope="session")
def whole(blind, tmp_path_factory):
    """whole(flags) -> the folder of an uninterrupted run without evaluations, made once, and its backward passes."""

    @functools.cache
    def run(flags):
        folder = tmp_path_factory.mktemp("whole")
        with backward_passes() as calls:
            assert blind(folder, flags) == 0
        return folder, len(calls)

    return run


INTERRUPTED = {  # flags; the shares of the whole after which it is interrupted
    "rdskd": ("", (0.01, 0.2, 0.8)),  # before the first checkpoint, in the generator's stage, in the student's
    "rdskd with a VAE": (f"{VAE} --steps 9", (0.3, 0.8)),
    "rdskd with a bank": ("--replay bank --bank-size 9", (0.3,)),
    "pre": (f"--method pre --student-steps 2 {VAE}", (0.55, 0.9)),  # somewhere within a round
    "dafl with a bank": ("--method dafl --student-steps 2 --replay bank --bank-size 9", (0.5,)),
    "soft-target": ("--method soft-target", (0.3, 0.8)),  # in the images' stage, in the student's
    "zskd": ("--method zskd", (0.4,)),
    "deepinversion": ("--method deepinversion", (0.4,)),
    "noise": ("--method noise", (0.6,)),
}


@pytest.mark.parametrize("name, share", [(name, v) for name, (_, shares) in INTERRUPTED.items() for v in shares])
def test_resume_equals_uninterrupted(blind, whole, tmp_path, name, share, capsys):
    flags = INTERRUPTED[name][0]
    folder, calls = whole(flags)
    capsys.readouterr()
    with backward_passes(int(share * calls), signal.SIGTERM if "replay" in flags else signal.SIGINT):
        assert blind(tmp_path, flags) == 130
    assert not (tmp_path / "result.json").exists()
    assert ("--resume" in one_line(capsys.readouterr().err)) == (tmp_path / "checkpoint.pt").exists() == (share > 0.1)
    for _ in range(2):  # the second time, a finished run has nothing left to do
        assert blind(tmp_path, f"{flags} --resume") == 0
        assert_same(folder, tmp_path)


def test_seconds_of_a_resumed_run(blind, tmp_path):
    with backward_passes(until=14):
        assert blind(tmp_path) == 130
    altered(lambda saved: saved.update(seconds=1000.0))(tmp_path / "checkpoint.pt")
    elsewhere = f"--data-dir {tmp_path}/data --teacher-dir {tmp_path}/teachers"  # they change no number
    assert blind(tmp_path, f"--resume {elsewhere}") == 0 and result_of(tmp_path)["seconds"] >= 1000


def test_a_stop_between_the_last_checkpoint_and_the_picture(blind, whole, tmp_path, monkeypatch):
    flags = "--method dafl --student-steps 2 --eval-every 12"

    def stop(images):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "png", stop)
        assert blind(tmp_path, flags) == 130
    assert (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "samples.png").exists()
    assert blind(tmp_path, f"{flags} --resume") == 0
    assert_same(whole(flags)[0], tmp_path)


def test_a_stopped_run_keeps_its_evaluations(command, tmp_path):
    assert command("whole") == 0
    with backward_passes(until=6 + 9):
        assert command("parts") == 130
    assert command("parts", "--resume") == 0
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_run_goes_on(blind, whole, teacher_file, tmp_path, kind):
    flags = "--steps 60 --eval-every 5 --generator-steps 1"
    arguments = small(f"--teacher {teacher_file} --no-eval --out {tmp_path} {flags}")
    with subprocess.Popen([sys.executable, HERE / "dfkd.py", *arguments], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as run:  # fmt: skip
        next(line for line in run.stdout if line.startswith("student    10/"))
        run.send_signal(kind)
        error = run.stderr.read()
    assert not (tmp_path / "result.json").exists()
    if kind == signal.SIGKILL:
        assert run.returncode == -kind
    else:
        assert run.returncode == 130 and "--resume" in one_line(error)
    assert blind(tmp_path, f"{flags} --resume") == 0
    assert_same(whole(flags)[0], tmp_path)


def test_ctrl_c_during_the_imports_is_one_line(tmp_path):
    """At several moments after the first of torch's libraries is there; Python itself starts before our first line."""
    runs = []
    for delay in (0, 0.15, 0.4, 0.8):
        run = subprocess.Popen([sys.executable, HERE / "dfkd.py", "--out", tmp_path / "out", "--teacher-dir", tmp_path],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
        while "torch/lib/" not in Path(f"/proc/{run.pid}/maps").read_text():
            time.sleep(0.005)
        time.sleep(delay)
        run.send_signal(signal.SIGINT)
        runs.append(run)
    for run in runs:
        error = run.communicate()[1]
        assert run.returncode == 130 and "stopped" in one_line(error)


def test_a_stopped_teacher_goes_on(tmp_path, glyphs_are_drawn_once):
    real = data.Data(*(v[:300] for v in glyphs_are_drawn_once))

    def train(folder):
        return models.trained(tmp_path / folder, "glyphs", "wrn-10-1", real, GLYPHS, 3, 0, "fp32", lambda *line: None)

    teacher = train("whole")
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    whole = teacher.state_dict()
    with backward_passes(until=4), pytest.raises(KeyboardInterrupt):  # 2 steps an epoch
        train("parts")
    (half,) = (tmp_path / "parts").iterdir()
    assert half.suffix == ".training"
    with backward_passes() as calls:
        again = train("parts").state_dict()
    assert len(calls) == 2 and all(torch.equal(whole[k], again[k]) for k in whole)  # epochs 1 and 2 were there
    (done,) = (tmp_path / "parts").iterdir()
    assert done == half.with_suffix(".pt")
    for damaged in (b"no file of torch's", done.read_bytes()[:-100]):
        done.write_bytes(damaged)
        with pytest.raises(models.NetworkError, match=f"{done.name}: damaged; delete it"):
            train("parts")
    done.unlink()
    torch.save(dict(epochs=1, parts=[{}, {}, {}], random=None), half)
    for damaged in (half.read_bytes(), half.read_bytes()[:-100]):
        half.write_bytes(damaged)
        with pytest.raises(models.NetworkError, match=f"{half.name}: no half-trained teacher"):
            train("parts")


@pytest.mark.parametrize("name, arch", [("svhn", "wrn-10-1"), ("cifar100", "wrn-10-1"), ("fashion-mnist", "lenet5")])
def test_how_a_teacher_is_trained(made_data_sets, tmp_path, spy, name, arch):
    crops = spy(data, "cropped_and_mirrored")
    real, info = data.Data(*(v[:256] for v in data.load(name, made_data_sets))), data.INFO[name]
    half = tmp_path / "half"
    models.train(arch, real, info, 2, 0, "fp32", half, lambda *line: None)
    _, optimiser, cycle = torch.load(half, weights_only=True)["parts"]
    assert [len(x) for (x,), _ in crops] == 4 * [128] * info.mirror  # two epochs of two steps
    assert (cycle["last_epoch"], cycle["total_steps"]) == (4, 4)
    group, lr = optimiser["param_groups"][0], 3e-3 if arch == "lenet5" else 0.1
    assert group.get("nesterov", False) == (arch != "lenet5") and group["max_lr"] == models.teacher_lr(arch) == lr
    draw = dfkd.real_images(real, info, dfkd.parse("--method kd --device cpu --batch 7".split()))
    crops.clear()
    assert draw().shape == (7, info.channels, 32, 32) and [len(x) for (x,), _ in crops] == [7] * info.mirror


def test_kd_draws_every_training_image_and_no_other(glyphs_are_drawn_once):
    real = data.Data(*(v[:30] for v in glyphs_are_drawn_once))
    draw = dfkd.real_images(real, GLYPHS, dfkd.parse("--method kd --device cpu --batch 1000".split()))
    drawn, training = ({x.numpy().tobytes() for x in v} for v in (draw(), data.normalise(real.train_images, GLYPHS)))
    assert drawn == training


def test_flags_reach_the_teacher_that_is_trained(monkeypatch, tmp_path):
    seen = {}

    def train(name, real, info, epochs, seed, precision, *rest):
        seen.update(name=name, epochs=epochs, seed=seed, precision=precision)
        raise dfkd.RunError("enough")

    monkeypatch.setattr(models, "train", train)
    monkeypatch.setattr(models, "set_up_torch", lambda threads, device: seen.update(threads=threads))
    flags = f"--teacher-epochs 3 --teacher-seed 5 --threads 7 --teacher-dir {tmp_path}/teachers --out {tmp_path}/run"
    assert dfkd.main(small(flags)) == 1
    assert seen == dict(name="lenet5", epochs=3, seed=5, precision="fp32", threads=7)


def test_the_checksum_of_a_network_has_its_statistics_in_it():
    net = models.build("wrn-10-1")
    before = models.crc(net)
    net.bn.running_mean += 1
    assert models.crc(net) != before


def test_a_folder_that_cannot_be_written_is_an_error_at_once(monkeypatch, glyphs_are_drawn_once):
    monkeypatch.setattr(models, "train", None)
    with pytest.raises(OSError):
        models.trained(Path("/proc/self"), "glyphs", "lenet5", glyphs_are_drawn_once, GLYPHS, 1, 0, "fp32", None)
    with pytest.raises(OSError), data.claimed(Path("/proc/self"), dfkd.FILES, resume=False):
        raise AssertionError


def test_a_teacher_is_kept_for_each_of_its_settings(tmp_path, monkeypatch, glyphs_are_drawn_once):
    monkeypatch.setattr(models, "train", lambda name, *rest: models.build(name))
    real = glyphs_are_drawn_once
    usual = dict(name="lenet5", real=real, epochs=3, seed=0, precision="fp32")
    for change in ({}, dict(name="lenet5_half"), dict(real=real._replace(train_images=255 - real.train_images)),
                   dict(real=real._replace(train_labels=9 - real.train_labels)), dict(epochs=4), dict(seed=1),
                   dict(precision="bf16"), {}):  # fmt: skip
        models.trained(tmp_path, "glyphs", info=GLYPHS, show=None, **{**usual, **change})
    assert len(list(tmp_path.iterdir())) == 7
    for module, name, value in ((torch, "__version__", "2.99"), (torch, "get_num_threads", lambda: 99),
                                (models, "teacher_lr", lambda name: 1.0)):  # fmt: skip
        monkeypatch.setattr(module, name, value)
        models.trained(tmp_path, "glyphs", info=GLYPHS, show=None, **usual)
    assert len(list(tmp_path.iterdir())) == 10


def altered(change):
    """A damage to a checkpoint: change(saved) alters its content, and torch would load it all the same."""

    def damage(path):
        saved = torch.load(path, weights_only=True)
        change(saved)
        torch.save(saved, path)

    return damage


CHECKPOINTS = {
    "another version's": lambda path: torch.save(dict(step=3, net={}), path),
    "a list": lambda path: torch.save([1, 2], path),
    "a .training file": lambda path: torch.save(dict(epochs=1, parts=[], random={}), path),
    "no parts": altered(lambda saved: saved.update(parts={})),
    "other parts": altered(lambda saved: saved.update(parts=dict(S=models.build("lenet5").state_dict()))),
    "a shorter list": altered(lambda saved: saved["parts"]["optimiser_S"]["param_groups"][0].update(betas=(0.9,))),
    "no random state": altered(lambda saved: saved.update(random=dict(cpu=torch.zeros(3)))),
    "no settings": altered(lambda saved: saved.update(settings=None)),
    "no figures": altered(lambda saved: saved.update(done={"student": "8"})),
    "no rows": altered(lambda saved: saved.update(rows=[3])),
    "no seconds": altered(lambda saved: saved["rows"][-1].pop("seconds")),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "text": lambda path: path.write_text("no checkpoint"),
}


@pytest.mark.parametrize("damage", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_of_another_kind_is_refused(refused, whole, tmp_path, damage):
    checkpoint = Path(shutil.copy(whole("")[0] / "checkpoint.pt", tmp_path))
    damage(checkpoint)
    content = checkpoint.read_bytes()
    assert "not this version's" in refused(tmp_path, "--resume")
    assert checkpoint.read_bytes() == content


@pytest.mark.parametrize("change", [
    lambda held: held["images"], lambda held: LENET, lambda held: {**held, "images": held["images"][1:]},
    lambda held: {**held, "labels": held["labels"][:, 1:]}, None,
], ids=["a tensor", "a teacher", "fewer images", "other classes", "missing"])  # fmt: skip
def test_a_changed_transfer_set_is_refused(refused, whole, tmp_path, change):
    shutil.copytree(whole("--method soft-target")[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "transfer" / "0.pt"
    held = data.load_tensors(path)
    if change:
        torch.save(change(held), path)
    else:
        path.unlink()
    assert "0.pt: missing, damaged or of another run" in refused(tmp_path, "--method soft-target --resume")


def test_resume_refuses_other_arguments(whole, refused, teacher_file, tmp_path, monkeypatch):
    shutil.copytree(whole("")[0], tmp_path, dirs_exist_ok=True)
    torch.save({k: v + 1 for k, v in torch.load(teacher_file, weights_only=True).items()}, tmp_path / "other.pt")
    assert "another teacher; give the same" in refused(tmp_path, f"--resume --teacher {tmp_path / 'other.pt'}")
    monkeypatch.setattr(dfkd, "get_teacher", None)  # what the flags say is found before a teacher is trained
    for flags, words in (("--student-lr 0.5", "--student-lr 0.01, now 0.5; "), ("--batch 9", "--batch")):
        assert words in refused(tmp_path, f"--resume {flags}")


def test_resume_refuses_a_flag_that_was_not_there(whole, refused, tmp_path):
    shutil.copytree(whole("--method zskd")[0], tmp_path, dirs_exist_ok=True)
    altered(lambda saved: saved["settings"].pop("image_lr"))(tmp_path / "checkpoint.pt")
    assert "--image-lr None, now" in refused(tmp_path, "--method zskd --resume")
    altered(lambda saved: saved["settings"].update(gone=0.5, image_lr=0.1))(tmp_path / "checkpoint.pt")
    assert "--gone 0.5, now None" in refused(tmp_path, "--method zskd --image-lr 0.1 --resume")


def test_resume_says_where_it_goes_on(blind, tmp_path, capsys):
    flags = "--resume --generator-steps 4 --steps 6 --eval-every 2"
    with backward_passes(until=4 + 3):  # of G, of S: a checkpoint after two of S
        assert blind(tmp_path, flags) == 130
    assert f"resumed    nothing, {tmp_path} holds no run yet\n" in capsys.readouterr().out
    assert blind(tmp_path, flags) == 0
    assert "resumed    after generator step 4, student step 2\n" in capsys.readouterr().out


def test_resume_says_that_the_program_has_changed(blind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "git_commit", lambda: "one")
    with backward_passes(until=10):
        assert blind(tmp_path) == 130
    monkeypatch.setattr(data, "git_commit", lambda: "other")
    altered(lambda saved: saved.update(torch="2.0"))(tmp_path / "checkpoint.pt")
    assert blind(tmp_path, "--resume") == 0
    said = capsys.readouterr().out
    assert "began with commit one of this program, goes on with other" in said
    assert f"began with torch 2.0, goes on with {torch.__version__}\n" in said
    monkeypatch.setattr(data, "git_commit", lambda: "third")
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert blind(tmp_path, "--resume") == 0
    assert "goes on with" not in capsys.readouterr().out
    result = result_of(tmp_path)
    assert result["git_commit"] == "other" and result["torch_version"] != "9.9"  # what computed the numbers


@pytest.mark.parametrize("flags, function, message", [  # the function that gives NaN, the terms that may be named
    ("", "diversity_seeking_loss", "(L_ds|L_G) became nan at generator step 3;"),  # twice a step
    (f"{VAE} --steps 9", "vae_loss", "L_vae became nan at generator step 5;"),
    ("", "distillation_loss", "L_kd became nan at student step 5;"),
    (f"--method pre --student-steps 2 {VAE}", "js_disagreement_loss", "(L_G|L_js) became nan at student step 9 to 10;"),
    ("--method dafl --student-steps 2", "activation_loss", "(L_G|L_a) became nan at student step 5 to 6;"),
    ("--method zskd", "soft_target_loss", "L_x became nan at images step 10 to 18;"),
])
def test_nan_stops_the_run_and_names_the_term(blind, refused, whole, tmp_path, monkeypatch, flags, function, message):
    module = replay if hasattr(replay, function) else g
    calls, real = [], getattr(module, function)

    def broken(*args):
        calls.append(1)
        return real(*args) * (math.nan if len(calls) > 4 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, broken)
        message = f"{message} try lower learning rates and another --out; the last checkpoint is kept"
        assert re.search(message, refused(tmp_path, flags))
    assert blind(tmp_path, f"{flags} --resume") == 0  # from the last checkpoint
    assert_same(whole(flags)[0], tmp_path)


def test_a_full_disk_keeps_what_was_written(blind, refused, whole, tmp_path):
    """A limit on file sizes makes the second stage's larger checkpoint fail as on a full disk."""
    folder, limits = whole("")[0], resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / "checkpoint.pt").stat().st_size - 1000, limits[1]))
    try:
        assert "checkpoint.pt" in refused(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("*.part"))
    assert blind(tmp_path, "--resume") == 0
    assert_same(folder, tmp_path)


def test_mkls_functions_are_first_called_on_one_thread(monkeypatch):
    """Which kernels two threads get that make the first call together is chance, and first images would differ."""
    called, threads = {}, []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for name in ("tanh", "exp", "log", "sqrt", "sin", "cos", "erf"):
        monkeypatch.setattr(torch, name, lambda x, name=name: called.setdefault(name, x.numel()))
    models.set_up_torch(1)
    assert threads == [1] and len(called) == 7 and torch.are_deterministic_algorithms_enabled()
    assert max(called.values()) < 1000  # torch splits nothing so small between threads


def test_cores_that_others_use(monkeypatch, capsys):
    ticks = ["cpu  100 0 0 100 0 0 0 0 9 9\n", "cpu  250 0 0 150 0 0 0 0 9 9\n"]  # 150 of 200 are not idle
    monkeypatch.setattr(Path, "read_text", lambda path: ticks.pop(0))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert models.cores_in_use() == 6
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for used, said in ((6, False), (7, True)):
        monkeypatch.setattr(models, "cores_in_use", lambda used=used: used)
        models.set_up_torch(2)
        assert ("other processes keep the cores busy" in capsys.readouterr().out) == said
    models.set_up_torch(1)
    assert "busy" not in capsys.readouterr().out


def test_the_peak_of_the_memory_is_in_gib():
    assert 0.05 < float(models.peak_memory("cpu").split()[0]) < 1000


def test_what_a_run_says_at_its_end(tmp_path, capsys):
    result = dict(
        teacher="lenet5", student="lenet5_half", teacher_accuracy=99.0, accuracy_last=97.5, accuracy_mean=90.0,
        accuracy_variance=4.0, accuracy_max=98.0, steps=50, args=dict(eval_every=20, device="cpu"),
        agreement_fresh=81.5, agreement_memory=62.5, transfer_set=dict(images=24, agreement=0.75, strayed=0.25),
        seconds=61, classes=10, classes_fresh=4,
    )  # fmt: skip
    dfkd.summary(result, tmp_path)
    printed = capsys.readouterr().out
    for words in ("over all 3 evaluations: mean 90.00 %, variance 4.00, maximum 98.00 %",
                  "agrees with the teacher on 81.5 % of fresh synthetic images\n",
                  "in these, the teacher sees 4 of its 10 classes",
                  "agrees with the teacher on 62.5 % of memory samples",
                  "images   24: the teacher puts 75.0 % of them into their label's top class",
                  "25.0 % of the labels favour another class", "time     1:01 for the distillation"):  # fmt: skip
        assert words in printed


def test_the_record_keeps_no_graph(tmp_path):
    run, _ = bare_run(tmp_path)
    next(run.steps("student", 8))
    h = 2 * torch.ones(3, requires_grad=True)
    run.log(L_G=(h * h).sum())
    held = weakref.ref(h)
    del h
    assert held() is None


def test_the_first_nan_is_the_one_that_is_named(tmp_path):
    run, _ = bare_run(tmp_path)
    with pytest.raises(dfkd.RunError, match="L_kd became nan at student step 2;"):
        for turn in run.steps("student", 4):
            run.log(L_a=torch.tensor(math.nan if turn == 2 else 0.0), L_kd=torch.tensor(math.nan if turn == 1 else 0.0))


def test_images_are_compared_without_gradients(tmp_path):
    run, _ = bare_run(tmp_path)
    seen = []

    class S(nn.Module):
        def forward(self, x):
            seen.append(torch.is_grad_enabled())
            return x.flatten(1)

    run.teacher, run.kept = nn.Flatten(), {"S": S()}
    assert run.compared([torch.randn(5, 1, 2, 2)])[0] == 100 and seen == [False]
    assert run.compared([torch.eye(4)[[0, 0, 3], None, None], torch.eye(4)[[0, 1], None, None]])[1] == 3  # classes


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_on_a_terminal_and_in_a_file(monkeypatch, tmp_path, terminal):
    """A round takes a second. Two of four rounds are evaluated; a terminal shows the others, too."""
    out, clock = io.StringIO(), [0.0]
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    run, _ = bare_run(tmp_path, "--steps 4 --eval-every 2")
    for turn in run.steps("student", 4):
        run.log(L_kd=torch.tensor(float(turn)))
        clock[0] += 1
    kept = ["student    2/4  eta 0:02  1.0/s  L_kd 0.5", "student    4/4  eta 0:00  1.0/s  L_kd 2.5"]
    if terminal:
        first, third = "student    1/4  eta 0:03  1.0/s  L_kd 0", "student    3/4  eta 0:01  1.0/s  L_kd 2"
        assert out.getvalue() == "".join(f"\r\x1b[K{line}" for line in (first, f"{kept[0]}\n", third, f"{kept[1]}\n"))
    else:
        assert out.getvalue().splitlines() == kept  # less than 15 seconds
    assert [models.clock(seconds) for seconds in (59.6, 3599, 7325)] == ["1:00", "59:59", "2:02:05"]


def test_a_progress_line_fits_into_a_row_of_the_terminal(monkeypatch):
    """One that wraps would leave its first row there, twice a second. One that stays is wrapped."""
    out = io.StringIO()
    out.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "24")
    line = "student    1/4  eta 0:03  L_G -1.5"
    dfkd.show(line, keep=False)
    dfkd.show(line, keep=True)
    wrapped = "student    1/4\n           eta 0:03\n           L_G -1.5\n"
    assert out.getvalue() == f"\r\x1b[K{line[:20]}\r\x1b[K{wrapped}"


def test_an_error_on_a_terminal_takes_the_progress_lines_place(monkeypatch, tmp_path):
    err = io.StringIO()
    err.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", err)
    assert dfkd.main(["--table", str(tmp_path / "none")]) == 1
    assert err.getvalue().startswith("\r\x1b[Kdfkd.py: ") and err.getvalue().endswith("\n")


def test_progress_within_a_long_round(monkeypatch, tmp_path, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    run, _ = bare_run(tmp_path)
    next(run.steps("images", 8, each=4))
    for seconds in (15, 16):
        clock[0] = seconds
        run.tell("step 50/100")
    assert capsys.readouterr().out == "images     0/8  step 50/100\n"  # every 15 seconds


def test_the_rate_of_a_resumed_run_counts_from_where_it_goes_on(monkeypatch, tmp_path, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    run, _ = bare_run(tmp_path, "--eval-every 4")
    run.done["student"] = 4
    for _ in run.steps("student", 8):
        clock[0] += 1
    assert "student    8/8  eta 0:00  1.0/s" in capsys.readouterr().out


# ---------------------------------------------------------------- finished runs


@pytest.fixture
def two_runs(tmp_path):
    """The folders of two finished runs."""
    curves = {"<a>-0": ((10, 20.0), (20, 90.0), (30, 95.0), (40, 100.0)), "<a>-1": ((20, 85.0), (40, 92.0))}
    for name, curve in curves.items():
        (tmp_path / name).mkdir()
        rows = [dict(stage="student", step=step, accuracy=a, seconds=2 * step, L_kd=0.5) for step, a in curve]
        before = [dict(stage="generator", step=5 * i, L_oh=x, L_ie=2 * x) for i, x in enumerate((9, 7, 0.1, 0.3), 1)]
        content = data.csv_rows([*before, *rows])
        (tmp_path / name / "metrics.csv").write_bytes(content)
        most = max(accuracy for _, accuracy in curve)
        result = dict(accuracy_last=curve[-1][1], accuracy_max=most, accuracy_mean=50, accuracy_variance=4)
        settings = dict(seed=len(curve), teacher_seed=0, steps=curve[-1][0], width=64, threads=len(curve))
        result.update(teacher_accuracy=99, replay_bytes=5000, transfer_set=dict(bytes=24_000), seconds=90,
                      steps=curve[-1][0], args=settings, diversity=1 / len(curve), agreement_fresh=None)  # fmt: skip
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    return [tmp_path / name for name in curves]


def test_a_full_disk_behind_standard_output_is_one_line(two_runs, monkeypatch, capsys):
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # which cannot be closed either
        monkeypatch.setattr(sys, "stdout", full)
        code = dfkd.main(["--table", *map(str, two_runs)])
    assert (code, capsys.readouterr().err) == (1, "dfkd.py: standard output: No space left on device\n")


@pytest.mark.parametrize("job", ["--table", "--plot"])
def test_folders_without_a_run_are_left_out(two_runs, tmp_path, capsys, job):
    """As runs/teachers is among runs/*; not one that is missing, or whose run is not finished."""
    (tmp_path / "teachers").mkdir()
    out = ["--out", str(tmp_path / "a.svg")] if job == "--plot" else []
    folders = [str(tmp_path / "teachers"), *map(str, two_runs)]
    assert dfkd.main([job, *folders, *out]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"dfkd.py: {folders[0]}: left out, there is no run in it\n"
    assert shown.out.count("\n") == (1 if out else 11)
    (two_runs[1] / "result.json").rename(two_runs[1] / "checkpoint.pt")
    for other, words in ([str(tmp_path / "none")], "no finished run"), (folders[2:], "is not finished; its command"), (
            folders[:1], "no finished run"):  # fmt: skip
        assert dfkd.main([job, *other, *out]) == 1
        assert words in one_line(capsys.readouterr().err)


def test_a_closed_pipe_is_one_line_at_the_end_of_python_too(two_runs):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, HERE / "dfkd.py", "--table", *two_runs]
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "dfkd.py: standard output: Broken pipe\n")


def test_plot_draws_the_curves_of_runs(two_runs, tmp_path, failure):
    flags = ["--plot", *map(str, two_runs), "--out", str(tmp_path / "curves.svg")]
    assert dfkd.main(flags) == 0
    lines = ElementTree.parse(tmp_path / "curves.svg").findall("{*}polyline")
    assert [len(line.get("points").split()) for line in lines] == [4, 2]
    assert lines[0].get("stroke") == lines[1].get("stroke")  # two seeds: one name, one colour
    for row, words in {"40,": "not evaluated", "40,101": "damaged", "40,92,7": "damaged", "40": "damaged"}.items():
        (two_runs[1] / "metrics.csv").write_text(f"step,accuracy\n{row}\n")
        assert words in failure(1, dfkd.main, flags), row
    assert "no finished run" in failure(1, dfkd.main, ["--table", str(tmp_path)])
    (two_runs[1] / "metrics.csv").write_text("")
    assert "damaged" in failure(1, dfkd.main, flags)
    (two_runs[1] / "metrics.csv").unlink()
    (two_runs[1] / "metrics.csv").mkdir()
    assert "metrics.csv: Is a directory" in failure(1, dfkd.main, flags)


def test_curves_over_minutes(two_runs, tmp_path):
    assert data.finished(two_runs[0]).curve[-1] == (40, 80 / 60, 100.0)
    flags = ["--plot", *map(str, two_runs), "--out", str(tmp_path / "curves.svg"), "--over", "minutes"]
    assert dfkd.main(flags) == 0
    texts = [e.text for e in ElementTree.parse(tmp_path / "curves.svg").findall("{*}text")]
    assert "minutes" in texts and "1" in texts and "40" not in texts


def test_pictures_go_where_they_are_said_to(two_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (two_runs[0] / "samples.png").write_bytes(data.png(torch.rand(8, 1, 4, 4)))
    for flag, file in (("--pictures", "samples.svg"), ("--plot", "curves.svg")):
        assert dfkd.main([flag, str(two_runs[0])]) == 0
        assert [e.text for e in ElementTree.parse(Path("runs") / file).iterfind("{*}text")].count("<a>") == 1
    assert dfkd.main(["--pictures", str(two_runs[1])]) == 1  # it has none


def test_table_has_a_row_for_runs_that_differ_in_the_seed(two_runs, capsys, monkeypatch):
    assert dfkd.main(["--table", *map(str, two_runs)]) == 0
    _, _, result, _, _, _, robustness, _, _, _, samples = capsys.readouterr().out.splitlines()
    assert result == "| <a> | 99.00 | 96.00 ± 5.66 | 100.00, 92.00 | 1.5 | 29 |"
    assert robustness == "| <a> | 96.00 | 50.00 | 4.00 | 94.75 | 3.125 |"
    assert samples == "| <a> | 0.375 | – | 0.1414 | 0.2828 |"  # of 0.1, 0.3: the first half is left out
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert dfkd.main(["--table", *map(str, two_runs)]) == 0
    assert "σ²" in sys.stdout.buffer.getvalue().decode()


def test_a_table_keeps_its_form_whatever_a_folder_is_called(two_runs, capsys):
    odd = two_runs[0].rename(two_runs[0].with_name("a|b\n c\udcff-0"))  # whose name is no UTF-8
    assert dfkd.main(["--table", str(odd)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and lines[2].startswith(r"| a\|b c? | 99.00 |")


@pytest.mark.parametrize("key, value, words", [("width", 32, "'width'"), ("seed", 4, "the same seeds")])
def test_table_refuses_a_row_of_runs_that_do_not_belong_together(two_runs, failure, key, value, words):
    path = two_runs[1] / "result.json"
    result = json.loads(path.read_text())
    result["args"][key] = value
    path.write_text(json.dumps(result))
    assert words in failure(1, dfkd.main, ["--table", *map(str, two_runs)])


@pytest.mark.parametrize("seeds", [(0, 1), (0, 0)])
def test_runs_of_a_row_may_differ_in_seed_teacher_and_device(two_runs, seeds):
    for i, folder in enumerate(two_runs):
        result = json.loads((folder / "result.json").read_text())
        result["args"].update(seed=seeds[i], teacher_seed=i, teacher_crc=i, device=("cpu", "cuda")[i])
        (folder / "result.json").write_text(json.dumps(result))
    assert data.results_table(two_runs).count("| <a> |") == 3


def test_a_curve_without_its_last_rows_is_damaged(two_runs):
    path = two_runs[0] / "metrics.csv"
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:-1]))
    with pytest.raises(data.DataError, match="damaged"):
        data.finished(two_runs[0])


def test_damaged_results_are_drawn_or_refused(two_runs):
    files = [two_runs[0] / name for name in ("metrics.csv", "result.json")]
    contents = [path.read_bytes() for path in files]

    def attempt(rng):
        damaged = rng.integers(2)
        for i, (path, content) in enumerate(zip(files, contents)):
            path.write_bytes(garbled(content, rng) if i == damaged else content)
        table = data.results_table(two_runs)
        curves = [(path.name, data.finished(path).curve) for path in two_runs]
        picture = data.svg_curves([(name, [(m, a) for _, m, a in curve]) for name, curve in curves]).decode()
        assert not re.search(r"\bnan\b|\binf\b", table + picture)
        ElementTree.fromstring(picture)

    assert 1 / 3 < refusals(300, attempt, data.DataError, two_runs[0]) < 1


OTHERS = (
    None, -1, 2**70, 1e308, math.nan, "text", [], {}, [[3]], {"a": 1}, True, torch.zeros(3), torch.zeros(0),
    torch.zeros(2, 2, dtype=torch.cfloat), torch.tensor(3), torch.ones(5, 5).to_sparse(), torch.empty(7, device="meta"),
    torch.ones(3, dtype=torch.bfloat16),
)  # fmt: skip


def altered_somewhere(tree, rng):
    """A copy of nested dicts, lists and tensors with one thing in it removed, renamed or replaced."""
    other = OTHERS[rng.integers(len(OTHERS))]
    if isinstance(tree, torch.Tensor) and rng.random() < 0.5:
        return [tree.flatten(), tree[None], tree.double(), tree.reshape(-1)[:-1]][rng.integers(4)]
    if not isinstance(tree, (dict, list)) or not tree or rng.random() < 0.1:
        return other
    changed = copy.copy(tree)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key, kind = keys[rng.integers(len(keys))], rng.integers(8)
    if kind > 1:
        changed[key] = altered_somewhere(tree[key], rng)
    elif kind or isinstance(tree, list):
        del changed[key]
    else:
        changed[other if isinstance(other, (int, str)) else "other"] = changed.pop(key)
    return changed


def damage(path, content, tree, rng):
    """Write a file anew: its bytes garbled, or its tensors altered."""
    if rng.random() < 0.5:
        path.write_bytes(garbled(content, rng))
    else:
        torch.save(altered_somewhere(tree, rng), path)


def test_a_damaged_teacher_is_loaded_or_refused(tmp_path):
    path, tree = tmp_path / "teacher.pt", dict(models.build("lenet5_half").state_dict())
    torch.save(tree, path)
    content = path.read_bytes()

    def attempt(rng):
        damage(path, content, tree, rng)
        assert models.load(path, "lenet5_half", GLYPHS, "cpu", "fp32")(torch.zeros(2, 1, 32, 32)).isfinite().all()

    assert 1 / 2 < refusals(60, attempt, (data.DataError, models.NetworkError), path)


def test_a_damaged_checkpoint_is_resumed_or_refused(blind, whole, tmp_path, capsys):
    path = Path(shutil.copy(whole("")[0] / "checkpoint.pt", tmp_path))
    content, tree = path.read_bytes(), torch.load(path, weights_only=True)

    def attempt(rng):
        damage(path, content, tree, rng)
        capsys.readouterr()
        if blind(tmp_path, "--resume"):
            raise dfkd.RunError(one_line(capsys.readouterr().err).strip())

    assert 1 / 2 < refusals(30, attempt, dfkd.RunError, tmp_path)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags, named", [
    ("--method magic", "magic"), ("--dataset imagenet", "imagenet"), ("--student-arch lenet6", "lenet6"),
    ("--teacher-arch resnet50", "resnet50"), ("--student-arch wrn-17-1", "wrn-17-1"),
    ("--student-arch wrn-16-0", "wrn-16-0"), ("--batch 0", "--batch"), ("--batch 1", "--batch"),
    ("--batch many", "--batch"), ("--steps 0", "--steps"), ("--eval-every 0", "--eval-every"),
    ("--generator-lr 0", "--generator-lr"), ("--student-lr nan", "--student-lr"), ("--temperature -1", "--temperature"),
    ("--seed -1", "--seed"), ("--device tpu", "tpu"), ("--no-eval", "--teacher FILE"), ("--shedule paper", "--shedule"),
    ("--teacher nowhere.pt", "nowhere.pt"), ("--student-l 1", "--student-l"), ("--threads 0", "--threads"),
    ("--width 0", "--width"), ("--student-steps 3", "--student-steps"), ("--bank-size 9", "--replay bank"),
    ("--method pre --replay bank --memory-width 5", "--replay vae"), ("--method kd --replay vae", "--replay"),
    ("--method pre --replay bank --no-balanced", "--no-balanced"), ("--seed 99999999999999999999", "--seed"),
    ("--method pre --loss-weights 1 x 3", "--loss-weights"), ("--method dafl --loss-weights 1 2", "has 3"),
    ("--method soft-target --loss-weights 1 2", "has 1"), ("--method zskd --sigma 2", "--sigma"),
    ("--method soft-target --sigma small", "--sigma"), ("--method soft-target --sigma 1e20", "--sigma"),
    ("--method zskd --image-lr 1e38", "--image-lr"), ("--channels 2147483647", "--channels"),
    ("--images 7", "--images"), ("--method soft-target --layer fc3", "fc3"), ("--method zskd --replay vae", "--replay"),
    ("--num-classes 7", "--teacher FILE"), ("--channels 0", "--channels"), ("--table", "--table"),
    ("--method zskd --temperature 0", "--temperature"), ("--teacher-arch wrn-10-1", "--student-arch"),
    ("--teacher .", "no file"), ("--method pre --temperature 3", "--temperature means nothing"),
    ("--teacher dfkd.py --teacher-arch wrn-16-2 --channels 3 --dataset svhn", "--dataset"),
    ("--method zskd --ours magic", "magic"), ("--method noise --ours range", "--ours means nothing"),
    ("--method rdskd --ours range smooth", "--ours smooth means nothing"),
    ("--method rdskd --terms ds --penalty sum", "--penalty means nothing"),
    ("--teacher dfkd.py --teacher-arch lenet5 --std 0.3", "--mean and --std: give both"),
    ("--method zskd --ours scale", "--ours scale means nothing"), ("--threads 9999", "--threads"),
    ("--teacher=", "--teacher is empty"), ("--export=", "--export is empty"), ("--plot a --out .", "a folder"),
    ("--teacher dfkd.py --teacher-seed 1", "--teacher-seed means nothing"),
    ("--method soft-target --layer fc2 --teacher-arch wrn-10-1 --student-arch lenet5", "no such layer"),
    ("--method dafl --decay-every 9", "--decay-every means nothing"),
    ("--method kd --no-eval --teacher dfkd.py", "kd distils on real images"),
    ("--method pre --decay-every 9", "--decay-every means nothing without --student-decay cosine"),
    ("--method pre --no-balanced --latent-lr 1", "--latent-lr means nothing without --balanced"),
    ("--replay bank --latent-lr 1", "--latent-lr means nothing without --replay vae"),
    ("--out dfkd.py", "dfkd.py: a file; give a folder"), ("--table a", "--out means nothing to --table"),
    ("--over minutes", "--over means nothing without --plot"), ("--export data.py", "give a FILE.pt2"),
    ("--plot a --method pre", "--method means nothing to --plot"),
    ("--pictures a --no-balanced", "--no-balanced means nothing to --pictures"), ("--table=", "--table is empty"),
    ("--plot a --out data.py", "data.py: no file of this kind; give a FILE.svg"), ("--temperature 1e30", "between"),
    ("--dataset glyphs --teacher-arch net.py:Net", "not trained here"),
    ("--teacher dfkd.py --teacher-epochs 3", "--teacher-epochs means nothing"),
    ("--teacher dfkd.py --teacher-arch lenet5 --mean 0.3", "--mean and --std: give both"),
    ("--student-decay drops --steps 96000", "the first drop, at step 96000, comes after"),
])  # fmt: skip
def test_usage_errors(flags, named, failure, monkeypatch, tmp_path):
    monkeypatch.setattr(dfkd, "distil", None)  # flags that are not refused do not start a long run here
    assert named in failure(2, dfkd.main, ["--out", str(tmp_path / "out"), *flags.split()])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, told", [
    ("--teacher dfkd.py", "mean 0.168, deviation 0.282: of --dataset glyphs"), ("", None),
    ("--teacher dfkd.py --dataset mnist", "mean 0.1307, deviation 0.3081: of --dataset mnist"),
    ("--teacher dfkd.py --teacher-arch lenet5 --channels 1", "mean 0.5, deviation 0.25: of --mean, --std"),
    ("--teacher dfkd.py --teacher-arch wrn-16-2 --mean 0.3 0.4 0.6 --std 0.2 0.2 0.1",
     "mean 0.3 0.4 0.6, deviation 0.2 0.2 0.1: of --mean, --std"),
])  # fmt: skip
def test_what_the_images_of_a_given_teacher_are_taken_for_is_told(monkeypatch, capsys, tmp_path, flags, told):
    monkeypatch.setattr(data, "claimed", Mock(side_effect=dfkd.RunError("no further")))
    with pytest.raises(dfkd.RunError, match="no further"):
        dfkd.distil(dfkd.parse(f"--device cpu --threads {torch.get_num_threads()} --out {tmp_path} {flags}".split()))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("images ")]
    assert lines == ([f"images     normalised with {told}"] if told else [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
def test_no_gpu_is_a_usage_error(failure):
    assert "no GPU" in failure(2, dfkd.parse, ["--device", "cuda"])


def test_names_of_folders_that_cannot_be(refused):
    assert "File name too long" in refused("a" * 300)
    assert b"?" in data.svg_curves([(os.fsdecode(b"\xff"), [(0, 1.0)])])  # no UTF-8


def test_names_of_terms_have_no_order():
    assert dfkd.parse("--method zskd --ours range smooth".split()).ours == ("smooth", "range")
    assert dfkd.parse("--terms ds oh ds".split()).terms == ("oh", "ds")


@pytest.mark.parametrize("package", ["torch", "numpy"])
def test_without_torch_or_numpy_one_line_says_what_to_do(package):
    code = f"import runpy, sys; sys.modules['{package}'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, dfkd.__file__], capture_output=True, text=True)
    assert done.returncode == 1 and ".venv/bin/python" in one_line(done.stderr)


@pytest.mark.parametrize("method", dfkd.SCHEDULES)
@pytest.mark.parametrize("column", dfkd.COLUMNS)
def test_the_schedule_that_is_printed_makes_the_same_run(method, column):
    assert all(len(values) == len(dfkd.COLUMNS) for values in dfkd.SCHEDULES[method].values())
    kind = {"natural": "svhn"}.get(column.split()[-1], column.split()[-1])
    flags = f"--device cpu --method {method} --dataset {kind}" + " --no-balanced" * (method == "pre")
    if "paper" in column and method in ("mskd", "noise", "kd"):
        with pytest.raises(SystemExit):  # nothing is published
            dfkd.parse(f"{flags} --schedule paper".split())
        return
    args = dfkd.parse(f"{flags} --schedule {'paper' if 'paper' in column else 'default'}".split())
    again = dfkd.parse([*flags.split(), *dfkd.schedule_text(args).split()[1:]])
    for key in dfkd.SCHEDULES[method]:
        if not dfkd.lacking(key, args):  # others are not printed
            assert getattr(args, key) == getattr(again, key), key


def test_schedules_follow_the_kind_of_data():
    def numbers(flags):
        return vars(dfkd.parse(f"--device cpu {flags}".split()))

    assert numbers("--schedule paper --dataset mnist")["latent"] == 100
    svhn = numbers("--schedule paper --dataset svhn")
    assert (svhn["latent"], svhn["student_decay"]) == (1000, "none")
    assert (svhn["teacher_arch"], svhn["student_arch"]) == ("wrn-40-2", "wrn-16-1")
    cifar = numbers("--schedule paper --dataset cifar10 --method dafl --student-lr 0.5")
    assert (cifar["loss_weights"], cifar["student_optimiser"], cifar["student_lr"]) == ((0.05, 5, 0.01), "sgd", 0.5)
    assert (cifar["teacher_arch"], cifar["student_arch"]) == ("resnet34", "resnet18")
    assert numbers("--dataset cifar100 --teacher-arch alexnet")["student_arch"] == "alexnet_half"
    steps = {name: numbers(f"--dataset {name}")["steps"] for name in ("glyphs", "mnist", "fashion-mnist")}
    assert steps == {"glyphs": 5000, "mnist": 12_000, "fashion-mnist": 12_000}
    assert numbers("--steps 1000")["eval_every"] == 40
    for method in ("deepinversion", "soft-target", "zskd"):
        mix = {name: "mix" in numbers(f"--method {method} --dataset {name}")["ours"] for name in ("mnist", "cifar10")}
        assert mix == {"mnist": False, "cifar10": True}
    for method in ("dafl", "mskd", "pre"):  # SGD with a warm-up
        assert numbers(f"--method {method} --dataset cifar10")["student_decay"] == "cycle"
    rounds = numbers("--method pre --steps 25 --eval-every 25")
    assert (rounds["steps"], rounds["eval_every"]) == (30, 30)  # rounds of 10 are whole


RDSKD_CODE = dict(batch=512, width=128, generator_steps=2400, generator_lr=1e-3, steps=120_000, temperature=10,
                  student_optimiser="adam", student_lr=2e-3, ours=())  # fmt: skip
PRE_CODE = dict(batch=1024, latent=1000, generator_lr=0.02, loss_weights=(1, 5, 0.1), student_steps=10, steps=144_000,
                student_lr=0.1, student_decay="cosine", decay_every=360, eval_every=360, replay="vae",
                memory_latent=1000, memory_width=128, memory_lr=5e-4, latent_lr=0.02, ours=())  # fmt: skip
ZSKD_CODE = dict(image_steps=1500, image_batch=100, temperature=20, batch=64, student_optimiser="adam",
                 student_lr=1e-3, student_decay="none", ours=())  # fmt: skip
PUBLISHED = {  # papers.md
    ("rdskd", "mnist"): dict(RDSKD_CODE, latent=100, student_decay="none"),
    ("rdskd", "cifar10"): dict(RDSKD_CODE, latent=1000, student_decay="drops"),
    ("dafl", "mnist"): dict(batch=512, latent=100, generator_lr=0.2, loss_weights=(1, 5, 0.1), student_steps=1,
                            steps=24_000, temperature=1, student_optimiser="adam", student_lr=2e-3, ours=()),
    ("dafl", "cifar10"): dict(batch=1024, latent=1000, generator_lr=0.02, loss_weights=(0.05, 5, 0.01), student_steps=1,
                              steps=240_000, temperature=1, student_optimiser="sgd", student_lr=0.1,
                              student_decay="drops", ours=()),
    ("pre", "mnist"): dict(PRE_CODE, student_optimiser="adam"),
    ("pre", "cifar10"): dict(PRE_CODE, student_optimiser="sgd"),
    ("zskd", "mnist"): dict(ZSKD_CODE, images=24_000, steps=187_500, image_lr=pytest.approx(1e-3 / 0.3081, rel=0.02)),
    ("zskd", "cifar10"): dict(ZSKD_CODE, images=40_000, steps=312_500, image_lr=pytest.approx(1e-3 / 0.2, rel=0.02)),
    ("soft-target", "mnist"): dict(ZSKD_CODE, images=24_000, steps=187_500, sigma=1.5, loss_weights=(0.05,)),
    ("soft-target", "cifar10"): dict(ZSKD_CODE, images=40_000, steps=312_500, sigma=2.0, loss_weights=(0.1,)),
    ("deepinversion", "cifar10"): dict(image_batch=256, image_steps=2000, image_lr=0.1, loss_weights=(1e-3, 0, 10),
                                       ours=()),
}  # fmt: skip


@pytest.mark.parametrize("method, name", PUBLISHED)
def test_the_papers_schedules_are_as_published(method, name):
    args = vars(dfkd.parse(f"--method {method} --dataset {name} --schedule paper --device cpu".split()))
    expected = PUBLISHED[method, name]
    assert {key: args[key] for key in expected} == expected


def test_defaults_of_ones_own_teacher(tmp_path):
    torch.save({}, tmp_path / "t.pt")
    args = dfkd.parse(f"--teacher {tmp_path}/t.pt --teacher-arch wrn-16-2 --num-classes 5 --device cpu".split())
    assert (args.channels, args.image_size, args.mean, args.std) == (3, 32, 3 * (0.5,), 3 * (0.25,))
    args = dfkd.parse(f"--teacher {tmp_path}/t.pt --teacher-arch wrn-16-2 --mean 0.1 --std 0.2 --device cpu".split())
    assert (args.num_classes, args.channels) == (10, 1)
    args = dfkd.parse(f"--teacher {tmp_path}/t.pt --teacher-arch wrn-16-2 --channels 2 --device cpu".split())
    assert args.steps == 12_000  # MNIST's column


def test_the_student_optimisers_follow_their_schedules(monkeypatch):
    def rates(flags, steps):
        optimiser, decay = dfkd.student_optimiser(nn.Linear(1, 1), dfkd.parse(f"--device cpu {flags}".split()))
        assert isinstance(optimiser, torch.optim.SGD) == ("sgd" in flags or "cifar" in flags)
        group = optimiser.param_groups[0]
        assert group["weight_decay"] == (5e-4 if isinstance(optimiser, torch.optim.SGD) else 0)
        assert not group.get("nesterov")
        assert "cycle" in flags or group.get("momentum", 0.9) == 0.9  # torch's cycle moves it
        values = []
        for _ in range(steps):
            values.append(decay.get_last_lr()[0])
            optimiser.step()
            decay.step()
        return values

    sgd = "--student-optimiser sgd --student-lr 1 --student-decay"
    assert set(rates(f"{sgd} none", 5)) == {1.0}
    assert rates(f"{sgd} cosine --steps 4", 4) == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    cycle = rates(f"{sgd} cycle --steps 100", 100)
    assert cycle[0] == pytest.approx(0.04) and max(cycle) == pytest.approx(cycle[14]) and cycle[-1] < 1e-4
    _, drops = dfkd.student_optimiser(nn.Linear(1, 1), dfkd.parse(f"--device cpu {sgd} drops --steps 240000".split()))
    assert sorted(drops.milestones.elements()) == [800 * dfkd.EPOCH, 1600 * dfkd.EPOCH]
    with monkeypatch.context() as patch:
        patch.setattr(dfkd, "EPOCH", 1)
        drops = rates(f"{sgd} drops", 1601)
    assert drops[799] == 1 and drops[800] == drops[1599] == pytest.approx(0.1) and drops[1600] == pytest.approx(0.01)
    for name in ("mnist", "cifar10"):  # PRE-DFKD's cosine moves once an epoch of 36 rounds
        epochs = [(1 + math.cos(math.pi * epoch / 400)) / 20 for epoch in range(4)]
        values = rates(f"--method pre --schedule paper --dataset {name}", 1081)
        assert values == pytest.approx(np.repeat(epochs, 360)[:1081].tolist(), rel=1e-9)


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


LENET = models.build("lenet5").state_dict()


def one_bit_altered():
    """A file of LENET whose last bias differs in one bit, which torch.load would not notice."""
    file = io.BytesIO()
    torch.save(LENET, file)
    bias = LENET["classifier.bias"].numpy().tobytes()
    return file.getvalue().replace(bias, bytes([bias[0] ^ 1]) + bias[1:])


TEACHER_FILES = {  # what torch.save wrote, or bytes
    "text": (b"no checkpoint", "not a PyTorch file"),
    "empty": (b"", "not a PyTorch file"),
    "one bit altered": (one_bit_altered(), "not a PyTorch file.*damaged"),
    "code": (Exploit(), "not a PyTorch file"),
    "whole model": (models.build("lenet5"), "not a PyTorch file"),
    "no state dict": ([1, 2], "no state dict"),
    "more than tensors": ({**LENET, "epoch": 3}, "no state dict"),
    "other network": (models.build("wrn-10-1").state_dict(), "--teacher-arch"),
    "other widths": (models.build("lenet5_half").state_dict(), "shape.*3, 1, 5, 5"),
    "other classes": (models.build("lenet5", 7).state_dict(), "10 classes.*7"),
    "NaN": ({k: v / 0 for k, v in LENET.items()}, "NaN"),
    "infinite in float32": ({k: v.double() * 1e300 for k, v in LENET.items()}, "NaN or infinity"),
    "whole numbers": ({k: (100 * v).to(torch.int8) for k, v in LENET.items()}, "torch.int8, no weights"),
    "40 GB in a few bytes": ({**LENET, "classifier.bias": torch.zeros(1).expand(10**10)}, "shape.*10000000000"),
}  # fmt: skip


@pytest.mark.parametrize("content, message", TEACHER_FILES.values(), ids=TEACHER_FILES)
def test_bad_teacher_files(refused, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("bad.pt").write_bytes(content)
    else:
        torch.save(content, "bad.pt")
    assert re.search(f"bad.pt: .*{message}", refused("out", "--teacher bad.pt"))
    assert not Path("exploited").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")  # quantised tensors will be removed from torch
@pytest.mark.parametrize("convert", [
    torch.Tensor.to_sparse, torch.Tensor.cfloat, lambda v: v.to("meta"),
    lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8),
], ids=["sparse", "complex", "on meta", "quantised"])  # fmt: skip
def test_tensors_that_no_network_takes(refused, convert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({k: convert(v) for k, v in LENET.items()}, "bad.pt")
    message = refused("out", "--teacher bad.pt")
    assert "bad.pt: " in message and "sparse, quantised, complex or without values" in message


@pytest.mark.parametrize("prefix", ["module.", ""], ids=["DataParallel", "plain"])
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model", "net"])
def test_state_dicts_as_others_save_them_just_load(tmp_path, prefix, key):
    state = {f"{prefix}{k}": v for k, v in LENET.items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "teacher.pt")
    net = models.load(tmp_path / "teacher.pt", "lenet5", GLYPHS, "cpu", "fp32")
    assert all(torch.equal(v, LENET[k]) for k, v in net.state_dict().items())
    assert not net.training and not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("flags, words", [
    ("--dataset mnist --data-dir {0}", "train-images-idx3-ubyte: begins with nothing"),
    ("--out /proc/dfkd", "/proc/dfkd"),  # a folder that cannot be made
])  # fmt: skip
def test_what_is_found_wrong_later_is_one_line(command, tmp_path, flags, words, failure):
    write_files(tmp_path / "mnist", {"train-images-idx3-ubyte": b""})
    assert words in failure(1, command, "out", flags.format(tmp_path))


@pytest.mark.parametrize("error, words", [
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory: give a smaller"),
    (RuntimeError("Storage size calculation overflowed with sizes=[9]"), "out of memory"),
    (MemoryError(), "out of memory"), (torch.cuda.OutOfMemoryError("x"), "out of memory"),
    (BrokenPipeError(32, "Broken pipe"), "standard output: Broken pipe"),
    (OSError(28, "No space left"), "standard output: No space"),  # a file's error has its name
])  # fmt: skip
def test_errors_of_a_run_are_one_line(monkeypatch, failure, tmp_path, error, words):
    monkeypatch.setattr(dfkd, "distil", Mock(side_effect=error))
    assert words in failure(1, dfkd.main, ["--device", "cpu", "--out", str(tmp_path / "out")])


def test_a_graph_that_runs_out_of_memory_while_it_is_recorded_is_one_line(monkeypatch, failure, tmp_path):
    class Recording:  # torch.cuda.graph: its end fails, too, when what it records has failed
        def __enter__(self):
            pass

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    def distil(args):
        with Recording():
            raise torch.cuda.OutOfMemoryError("x")

    monkeypatch.setattr(dfkd, "distil", distil)
    assert "out of memory" in failure(1, dfkd.main, ["--device", "cpu", "--out", str(tmp_path / "out")])


def test_a_file_system_without_locks_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(data.fcntl, "flock", Mock(side_effect=OSError(37, "No locks available")))
    with pytest.raises(OSError, match=str(tmp_path)), data.claimed(tmp_path, dfkd.FILES, resume=False):
        pass


def test_a_mistake_of_the_program_is_not_hidden(monkeypatch, tmp_path):
    monkeypatch.setattr(dfkd, "distil", Mock(side_effect=RuntimeError("a mistake")))
    with pytest.raises(RuntimeError, match="a mistake"):
        dfkd.main(["--device", "cpu", "--out", str(tmp_path / "out")])


def test_the_commit_is_this_programs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = subprocess.run(f"git -C '{HERE}' log -1 --format=%H", shell=True, capture_output=True, text=True)
    commit = log.stdout.strip()
    changed = subprocess.run(f"git -C '{HERE}' diff --quiet HEAD", shell=True, stderr=subprocess.DEVNULL).returncode
    assert data.git_commit() == (f"{commit}{'-dirty' if changed else ''}" if commit else None)


def test_the_commit_says_where_files_were_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def git(command):
        command = f"git -c user.name=A -c user.email=a@b.c {command}"
        return subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout.strip()

    git("init -q")
    git("commit -q --allow-empty -m other")
    file = tmp_path / "data.py"
    shutil.copy(data.__file__, file)
    monkeypatch.setattr(data, "__file__", str(file))
    assert data.git_commit() is None  # a copy in somebody's repository, of which it is no part
    git("add data.py")
    git("commit -q -m ours")
    commit = git("log -1 --format=%H")
    assert data.git_commit() == commit
    file.write_text(file.read_text() + "\n")
    assert data.git_commit() == f"{commit}-dirty"


# ---------------------------------------------------------------- the house


def test_imports_go_one_way():
    """Distillation's ingredients know no data set, and nothing but torch and numpy is needed."""
    ours = {"dfkd", "replay", "generators", "models", "data"}
    allowed = {"dfkd": ours, "replay": {"generators"}, "models": {"data"}}
    for module in ours:
        imported = set()
        for node in ast.walk(ast.parse((HERE / f"{module}.py").read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        assert imported & ours <= allowed.get(module, set())
        assert imported - ours - set(sys.stdlib_module_names) <= {"torch", "numpy"}


def test_no_line_is_longer_than_120_columns():
    for path in HERE.glob("*.py"):
        lines = path.read_text(encoding="utf-8").split("\n")
        assert [n for n, line in enumerate(lines, 1) if len(line) > 120] == [], path.name


def test_the_readmes_own_loop_runs_as_it_stands():
    (code,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 32
    teacher, student = models.build("wrn-10-1", 10, 3), models.build("lenet5", 10, 3)
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in (teacher, student)]
    exec(code, dict(teacher=teacher, student=student, range=lambda n: range(2)))
    assert all(torch.equal(v, before[0][k]) for k, v in teacher.state_dict().items())
    assert not torch.equal(student.classifier.weight, before[1]["classifier.weight"])


def test_the_readme_names_functions_that_exist():
    """`module.name`, and further `name`s after it in the same line."""
    pattern, found = r"`(?:(generators|replay|models|data|dfkd)\.(?!py\b))?([A-Za-z_]\w+)(?:\.\w+)?`", 0
    for line in (HERE / "README.md").read_text().splitlines():
        module = None
        for named, name in re.findall(pattern, line):
            module = named or module
            if module:
                assert hasattr(sys.modules[module], name), f"{module}.{name}"
                found += 1
    assert found > 30


# ---------------------------------------------------------------- own networks


NETS = '''
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune


class thin(nn.Module):
    def __init__(self, num_classes, channels=1):
        super().__init__()
        conv = lambda i, o: (nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))
        self.body = nn.Sequential(*conv(channels, 8), *conv(8, 16), *conv(16, 32), nn.AdaptiveAvgPool2d(1))
        self.fc, self.scale = nn.Linear(32, num_classes), nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x):
        self.kept = (self.body(x) * self.scale).view(x.size(0), -1)  # no leaf: deepcopy refuses it
        return self.fc(input=self.kept)


class CNN(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, width, 5, padding=2), nn.Conv2d(width, 2 * width, 5, padding=2)
        self.bn, self.module = nn.BatchNorm2d(2 * width, track_running_stats=width != 5), nn.Linear(98 * width, 10)

    def forward(self, x):
        x = F.relu(self.bn(F.max_pool2d(self.conv2(F.max_pool2d(F.relu(self.conv1(x)), 2)), 2)))
        return self.module(x.view(x.size(0), -1))


class Changing(CNN):  # its input in place
    def forward(self, x):
        x *= 0.5
        return super().forward(x)


class Auxiliary(CNN):  # another output in train mode
    def forward(self, x):
        return (super().forward(x), x) if self.training else super().forward(x)


class Detached(CNN):
    def forward(self, x):
        return super().forward(x).detach()


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.factor


class BrokenBackward(CNN):
    def forward(self, x):
        return super().forward(Broken.apply(x))


class Inference(CNN):
    def train(self, mode=True):
        assert not mode, "for inference only"
        return super().train(mode)


class Normalising(CNN):
    def forward(self, x):
        with torch.no_grad():
            x = x / 2
        return super().forward(x)


class InPlace(CNN):  # what autograd needs
    def forward(self, x):
        x = torch.sigmoid(super().forward(x))
        x += 1
        return x


class Fixed(CNN):  # without a return
    def train(self, mode=True):
        super().train(mode)


class Double(CNN):  # float64
    def __init__(self):
        super().__init__()
        self.double()

    def forward(self, x):
        return super().forward(x.double())


class Exits(CNN):
    def forward(self, x):
        raise SystemExit(0)


class Unused(CNN):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
        self.unused = nn.Linear(3, 3)


class Masked(CNN):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor(-torch.inf))


class Expanded(CNN):
    def __init__(self):
        super().__init__()
        self.register_buffer("zeros", torch.zeros(1).expand(10))


class Complex(CNN):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=torch.complex64))


class Seeded(CNN):
    def __init__(self):
        torch.manual_seed(5)
        super().__init__(4)


class Rezero(nn.Module):  # only while it is new, its last nn.Linear gives the logits
    def __init__(self):
        super().__init__()
        self.skip, self.head, self.alpha = nn.Linear(784, 10), nn.Linear(784, 10), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.alpha * self.skip(x.flatten(1)) + self.head(x.flatten(1))


class Squeezing(CNN):
    def forward(self, x):
        return super().forward(x).squeeze()


class Branching(CNN):  # torch.export cannot follow
    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


class Late(CNN):  # fails after some time
    calls, error = 0, AssertionError("worn out")

    def forward(self, x):
        self.calls += 1
        if self.calls > 9:
            raise self.error
        return super().forward(x)


class LateExit(Late):
    error = SystemExit(0)


class LateTable(Late):
    error = OSError("no table")


class Only(nn.Module):  # all of it in a child whose name other programs put in front of the keys
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

    def forward(self, x):
        return self.model(x)


class Twice(nn.Module):  # calls its layer twice
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(784, 784)

    def forward(self, x):
        return self.fc(self.fc(x.flatten(1)).relu())


class Keeping(CNN):  # a mean of its features, and with it the graph of every pass
    mean = 0

    def forward(self, x):
        y = super().forward(x)
        self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
        return y - self.mean


small = lambda: CNN(4)
probabilities = lambda: nn.Sequential(CNN(), nn.Softmax(1))
pruned = lambda: nn.Sequential(nn.Flatten(), prune.identity(nn.Linear(784, 10), "weight"))
same = CNN(4)
again = lambda: same
sharing = lambda: nn.Sequential(same, nn.Linear(10, 10))
lent = CNN(4)
lent.bn.running_mean = same.bn.running_mean
borrowing = lambda: lent
pairs = lambda: nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (2, 784)), nn.Linear(784, 10))
lazy = lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
frozen = lambda: CNN().requires_grad_(False)
halved = lambda: CNN().half()
batch_statistics = lambda: CNN(5)
no_linear = lambda: nn.Sequential(nn.Conv2d(1, 10, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
not_last = lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.ReLU(True))
one = lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 1))
seven = lambda num_classes=7: nn.Sequential(nn.Flatten(), nn.Linear(784, num_classes))
images = lambda: nn.Conv2d(1, 1, 3)
text = lambda: "network"
weightless = lambda: nn.Flatten()
number = 3
'''
OWN = {  # how the teacher was trained: (network, size)
    "CNN": "--teacher-arch {0}/nets.py:CNN --student-arch {0}/nets.py:small --teacher {0}/CNN.pt --image-size 28",
    "thin": "--teacher-arch {0}/nets.py:thin --student-arch {0}/nets.py:thin --teacher {0}/thin.pt --num-classes 10",
}


@pytest.fixture(scope="session")
def own(tmp_path_factory, glyphs_are_drawn_once):
    """own(name, flags, out) distils a network of nets.py that was trained on glyphs -> the exit code; its folder."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "nets.py").write_text(NETS)
    x28, y28 = (torch.from_numpy(v) for v in data.glyphs(2000, seed=2))
    x32, y32 = glyphs_are_drawn_once.train_images[:3000], glyphs_are_drawn_once.train_labels[:3000]
    for name, x, y, steps in (("CNN", x28[:, None], y28, 200), ("thin", x32, y32, 100)):
        torch.manual_seed(0)
        net = models.build(f"{folder}/nets.py:{name}", 10, 1, x.shape[-1])
        optimiser, x = models.adam(net, 1e-2), (x / 255 - 0.17) / 0.28
        for i in torch.randint(len(x) - 500, (steps, 32)):
            dfkd.minimise(F.cross_entropy(net(x[i]), y[i]), optimiser)
        torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, folder / f"{name}.pt")
    np.savez(folder / "CNN.npz", images=x28[-500:, :, :, None].numpy(), labels=y28[-500:].numpy().astype(np.uint8))
    np.savez(folder / "thin.npz", images=x32[-500:].numpy(), labels=y32[-500:].numpy())

    def run(name, flags, out):
        shape = "--channels 1 --mean 0.17 --std 0.28"
        return dfkd.main(small(f"{OWN[name].format(folder)} {shape} --out {out} {flags}"))

    return run, folder


@pytest.mark.parametrize("name, method, least", [
    ("CNN", "rdskd --generator-steps 60 --width 16", 40), ("CNN", f"pre --student-steps 5 --steps 60 {VAE}", 20),
    ("thin", "soft-target --images 48 --image-batch 48 --image-steps 15 --steps 20 --eval-every 20", 0),
])  # fmt: skip
def test_networks_of_ones_own_are_distilled(own, tmp_path, name, method, least, capsys, spy):
    (run, folder), compared = own, spy(dfkd.Run, "compared")
    flags = f"--steps 100 --eval-every 100 --batch 48 --student-lr 5e-3 --test {folder}/{name}.npz --method {method}"
    assert run(name, flags, tmp_path / "run") == 0
    result, printed = result_of(tmp_path / "run"), capsys.readouterr().out
    assert result["teacher_accuracy"] > (80 if name == "CNN" else 30) and result["accuracy_last"] > least
    assert 0 <= result["agreement_fresh"] <= 100 and "of fresh synthetic images" in printed
    agreements = [result[key] for key in ("agreement_fresh", "agreement_memory") if result[key] is not None]
    assert [agreement for _, (agreement, *_) in compared] == agreements
    assert (result["agreement_memory"] is not None) == ("of memory samples" in printed) == ("pre" in method)
    assert f"nn.Linear, '{'fc' if name == 'thin' else 'module'}', reads" in printed
    assert ("for logits: there" in printed) == ("soft-target" in method)
    nets = models.module_of(folder.resolve() / "nets.py")
    student = nets.thin(10) if name == "thin" else nets.small()
    student.load_state_dict(torch.load(tmp_path / "run" / "student.pt", weights_only=True))
    picture = (tmp_path / "run" / "samples.png").read_bytes()
    assert struct.unpack(">I", picture[16:20]) == (8 * (28 if name == "CNN" else 32),)


def test_the_check_of_a_student_leaves_it_as_it_was():
    student = models.Own("net", nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 3)), channels=1, size=8)
    before = copy.deepcopy(student.state_dict())
    student.check_that_it_trains()
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


@pytest.mark.parametrize("until, code", [(3, 130), (None, 0)])  # begun; finished
@pytest.mark.parametrize("changed", ["net.py", "teacher.py", "t.npz"])
def test_resume_refuses_a_changed_file_of_ones_own(own, failure, tmp_path, until, code, changed):
    for name in ("net.py", "teacher.py"):
        shutil.copy(own[1] / "nets.py", tmp_path / name)
    shutil.copy(own[1] / "CNN.npz", tmp_path / "t.npz")
    flags = f"--method noise --steps 9 --eval-every 2 --test {tmp_path}/t.npz --student-arch {tmp_path}/net.py:small"
    flags += f" --teacher-arch {tmp_path}/teacher.py:CNN"
    with backward_passes(until):
        assert own[0]("CNN", flags, tmp_path / "run") == code
    held = (tmp_path / changed).read_bytes()
    if changed.endswith(".py"):
        (tmp_path / changed).write_bytes(held + b"# later")
    else:
        np.savez(tmp_path / changed, images=np.zeros((1, 1, 28, 28), np.uint8), labels=np.zeros(1, int))
    line = failure(1, own[0], "CNN", f"{flags} --resume", tmp_path / "run")
    assert "another content of" in line and str(tmp_path / changed) in line
    (tmp_path / changed).write_bytes(held)
    assert own[0]("CNN", f"{flags} --resume", tmp_path / "run") == 0


@pytest.mark.parametrize("method", ["pre", "soft-target"])
def test_resume_equals_uninterrupted_with_a_network_of_ones_own(own, tmp_path, method):
    run, flags = own[0], f"--method {method}" + f" {VAE}" * (method in GENERATORS)
    with backward_passes() as calls:
        assert run("CNN", flags, tmp_path / "whole") == 0
    with backward_passes(until=int(0.6 * len(calls))):
        assert run("CNN", flags, tmp_path / "parts") == 130
    for _ in range(2):  # the second time, nothing is left but the agreement, which is the same once more
        assert run("CNN", f"{flags} --resume", tmp_path / "parts") == 0
        assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("method", ["mskd", "zskd", "noise"])
def test_the_agreement_is_measured_on_images_that_the_student_has_not_seen(own, tmp_path, monkeypatch, method):
    seen, runs, keep = {True: set(), False: set()}, [], dfkd.Run.keep
    monkeypatch.setattr(g, "augmented", lambda x, mirror, degrees=20: x)

    def note(net, x):
        seen[net.training].update(v.half().numpy().tobytes() for v in x[0])

    def watched(run, **parts):
        keep(run, **parts)
        runs.append(run)
        parts["S"].register_forward_pre_hook(note)

    monkeypatch.setattr(dfkd.Run, "keep", watched)
    assert own[0]("CNN", f"--method {method}", tmp_path / "run") == 0
    assert len(seen[False]) == (9 if method == "zskd" else 8 * 16) and not seen[True] & seen[False]
    (run,) = runs
    run.kept = {"S": run.teacher}
    assert run.compared([torch.randn(5, 1, 28, 28)])[0] == 100  # a student that is the teacher


def test_any_network_as_a_classifier(own):
    path = f"{own[1]}/nets.py"
    before = torch.get_rng_state()
    net = models.build(f"{path}:CNN", None, 1, 28)
    torch.set_rng_state(before)
    plain = models.module_of((own[1] / "nets.py").resolve()).CNN()
    assert net.training and net.classes == 10 and list(net.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in net.state_dict().items())  # no number was drawn
    x = torch.randn(4, 28, 28, 1).permute(0, 3, 1, 2)  # channels_last
    plain.load_state_dict(net.eval().state_dict())
    logits, features = copy.deepcopy(net)(x, return_features=True)
    assert torch.equal(logits, plain.eval()(x.reshape(4, 1, 28, 28))) and torch.equal(logits, net(x))
    assert features.shape == (4, 784) and torch.equal(net.classifier(features), logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    thin = models.build(f"{path}:thin", 10, 3)
    assert len(models.trained_weights(thin)) == len(list(thin.parameters())) - 1  # without `scale`


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module.net.", "_orig_mod.module."])
def test_a_weight_that_a_layer_computes_is_that_of_the_file(own, tmp_path, prefix):
    arch, path = f"{own[1]}/nets.py:pruned", tmp_path / "teacher.pt"
    saved = models.build(arch, 10, 1, 28)
    torch.save({prefix + key: value for key, value in saved.state_dict().items()}, path)
    teacher = models.load(path, arch, data.Info(10, 1, (0.0,), (1.0,), size=28), "cpu", "fp32")
    assert torch.equal(teacher.classifier.weight, saved.classifier.weight_orig)


def test_a_networks_own_names_are_no_prefix(own, tmp_path):
    arch, path = f"{own[1]}/nets.py:Only", tmp_path / "teacher.pt"
    saved = models.build(arch, 10, 1, 28).state_dict()
    torch.save(saved, path)
    loaded = models.load(path, arch, data.Info(10, 1, (0.0,), (1.0,), size=28), "cpu", "fp32").state_dict()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)


def test_the_features_are_what_the_last_call_of_a_layer_reads(own):
    net = models.build(f"{own[1]}/nets.py:Twice", None, 1, 28)
    logits, features = net(torch.randn(4, 1, 28, 28), return_features=True)
    assert torch.equal(net.classifier(features), logits)


def test_the_last_layer_is_looked_for_with_the_weights_of_the_file(own, tmp_path, failure):
    arch, path = f"{own[1]}/nets.py:Rezero", tmp_path / "teacher.pt"
    flags = f"--teacher {path} --teacher-arch {arch} --method soft-target"
    net = models.build(arch, 10, 1, 28)
    torch.save(net.state_dict(), path)
    assert own[0]("CNN", flags, tmp_path / "new") == 0
    torch.save(net.state_dict() | {"alpha": torch.tensor(3.0)}, path)
    assert "not what its last nn.Linear" in failure(1, own[0], "CNN", flags, tmp_path / "trained")


def test_a_network_that_sets_a_seed_leaves_the_run_its_own(own, tmp_path):
    for seed in (0, 1):
        flags = f"--student-arch {own[1]}/nets.py:Seeded --method noise --seed {seed}"
        assert own[0]("CNN", flags, tmp_path / str(seed)) == 0
    a, b = (torch.load(tmp_path / str(seed) / "student.pt") for seed in (0, 1))
    assert not all(torch.equal(a[key], b[key]) for key in a)


def test_a_network_that_squeezes_takes_one_image(own):
    net = models.build(f"{own[1]}/nets.py:Squeezing", 10, 1, 28).eval()
    x = torch.randn(3, 1, 28, 28)
    (one, f), (three, all_f) = net(x[:1], return_features=True), net(x, return_features=True)
    assert one.shape == (1, 10) and f.shape == (1, 784) and net(x[:1]).shape == (1, 10)
    torch.testing.assert_close((one, f), (three[:1], all_f[:1]))


def test_two_networks_import_each_what_lies_beside_it(tmp_path):
    for name, layer in (("a", "ReLU"), ("b", "Tanh")):
        (tmp_path / name / "blocks").mkdir(parents=True)
        (tmp_path / name / "blocks" / "last.py").write_text(f"from torch.nn import {layer} as last")
        (tmp_path / name / "act.py").write_text("from blocks.last import last as act")
        net = "return nn.Sequential(nn.Flatten(), nn.Linear(64, 3), act())\n"
        head = "from torch import nn\n"
        (tmp_path / name / "net.py").write_text(f"{head}from act import act\ndef net():\n    {net}")
        (tmp_path / name / "late.py").write_text(f"{head}def late():\n    from act import act\n    {net}")
    for function in ("net", "late", "late"):
        for name, layer in (("a", nn.ReLU), ("b", nn.Tanh)):
            assert isinstance(models.build(f"{tmp_path}/{name}/{function}.py:{function}", None, 1, 8).net[2], layer)


BAD_NETWORKS = [  # teacher, further flags, what the line says
    ("nowhere.py:Net", "", "no Python file"), ("nets.py:Magic", "", "no function or class Magic"),
    ("nets.py:number", "", "no function or class number"), ("broken.py:Net", "", "imported: ZeroDivisionError"),
    ("exits.py:Net", "", "imported: SystemExit"), ("nets.py:text", "", "gives a str"),
    ("nets.py:CNN", "--channels 3 --mean 0 0 0 --std 1 1 1", "fails on images .*--channels"),
    ("nets.py:thin", "", "cannot be called, see --num-classes"), ("nets.py:images", "", "not logits"),
    ("nets.py:CNN", "--image-size 32", "--image-size"), ("nets.py:CNN", "--num-classes 7", "10 classes, not 7"),
    ("nets.py:seven", "", "--student-arch.*10 classes, not 7"), ("nets.py:weightless", "", "10 classes, not 784"),
    ("nets.py:CNN", "--student-arch nets.py:frozen", "no weights"), ("nets.py:Masked", "", "'mask' in its state dict"),
    ("nets.py:CNN", "--student-arch nets.py:Auxiliary", "gives tuple"), ("nets.py:Detached", "", "passes no gradient"),
    ("nets.py:Normalising", "", "no gradient to its images"), ("nets.py:InPlace", "", "passes no gradient: Runtime.*"),
    ("nets.py:CNN", "--student-arch nets.py:InPlace", "passes no gradient: Runtime.*inplace"),
    ("nets.py:BrokenBackward", "", "passes no gradient: AttributeError.*factor"),
    ("nets.py:Inference", "", "cannot be used.*inference only"), ("loop.py:CNN", "", "no Python file"),
    ("n" * 300 + ".py:CNN", "", "name too long"),
    ("nets.py:CNN", "--student-arch lenet5", "lenet5 takes no images of 28"),
    ("nets.py:CNN", "--image-size 30", "no multiple of 4"),
    ("nets.py:CNN", "--mean 0.1 0.2", "2 and 1 numbers for 1"), ("nets.py:CNN", "--test no.npz", "no.npz: no file"),
    ("nets.py:CNN", "--export a.onnx", "FILE.pt2"), ("nets.py:CNN", "--export no/a.pt2", "FILE.pt2"),
    ("nets.py:CNN", "--no-eval --test nets.py", "one of them"), ("nets.py:CNN", "--method kd", "no --method kd"),
    ("nets.py:probabilities", "", "probabilities, not logits"),
    ("nets.py:halved", "", "no tensor of finite float32"), ("nets.py:Complex", "", "no tensor of finite float32"),
    ("nets.py:Expanded", "", 'cannot be used: .*"zeros"'),
    ("nets.py:CNN", "--std 0.1 0.2", "1 and 2 numbers for 1"), ("nets.py:one", "", "not logits"),
    ("nets.py:CNN", "--std 0", "--std"), ("nets.py:CNN", "--dataset glyphs", "--dataset"),
    ("nets.py:pairs", "", r"fails on images \(3"), ("nets.py:lazy", "", "cannot be used"),
    ("nets.py:Exits", "", "fails on images .*SystemExit"),
    ("nets.py:CNN", "--student-arch nets.py:Unused", "no weights"),
    ("nets.py:again", "--student-arch nets.py:again", "very network"),
    ("nets.py:again", "--student-arch nets.py:sharing", "or a part of it"),
    ("nets.py:again", "--student-arch nets.py:borrowing", "or a part of it"),
    ("nets.py:CNN", "--student-arch nets.py:Keeping", "passes no gradient: .*a second time"),
    ("nets.py:CNN", "--student-arch nets.py:Branching --export a.pt2", "--student-arch: .* cannot be exported"),
    *(("nets.py:no_linear", f"--method {m}", "no nn.Linear.*take") for m in ("dafl", "pre", "soft-target", "zskd")),
    ("nets.py:not_last", "--method zskd", "not what its last nn.Linear"),
    ("nets.py:batch_statistics", "--method deepinversion", "no running statistics"),
]


@pytest.mark.parametrize("teacher, flags, message", BAD_NETWORKS)
def test_bad_networks(own, tmp_path, monkeypatch, teacher, flags, message, failure):
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(3)")
    (tmp_path / "loop.py").symlink_to("loop.py")
    monkeypatch.chdir(tmp_path)
    assert re.search(message, failure(2, own[0], "CNN", f"--teacher-arch {teacher} {flags}", "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("teacher, method", [
    ("no_linear", "mskd"), ("not_last", "dafl"), ("batch_statistics", "rdskd"), ("frozen", "rdskd"),
    ("Changing", "soft-target"), ("Auxiliary", "dafl"), ("Fixed", "rdskd"),
    ("Double", "zskd"), ("Double", "soft-target"),
])  # fmt: skip
def test_a_network_needs_no_more_than_the_method_asks_for(own, tmp_path, teacher, method):
    arch = f"{own[1]}/nets.py:{teacher}"
    torch.save(models.build(arch, 10, 1, 28).state_dict(), tmp_path / "teacher.pt")
    flags = f"--teacher {tmp_path}/teacher.pt --teacher-arch {arch} --method {method}"
    assert own[0]("CNN", flags, tmp_path / "run") == 0


@pytest.mark.parametrize("name, error", [
    ("Late", "AssertionError: worn out"), ("LateExit", "SystemExit: 0"), ("LateTable", "OSError: no table"),
])  # fmt: skip
def test_a_network_that_fails_within_the_run_is_one_line(own, failure, tmp_path, name, error):
    line = 1 + NETS.splitlines().index("            raise self.error")
    printed = failure(1, own[0], "CNN", f"--student-arch {own[1]}/nets.py:{name} --method noise", tmp_path / "run")
    assert f"{own[1]}/nets.py:{name} fails in line {line}: {error}\n" in printed


def test_a_network_does_not_change_its_images_and_imports_what_lies_beside_it(own, tmp_path):
    net, x = models.build(f"{own[1]}/nets.py:Changing", 10, 1, 28), torch.ones(2, 1, 28, 28)
    net(x)
    assert torch.equal(x, torch.ones_like(x))
    (tmp_path / "net.py").write_text(f"import data\nfrom models import CNN\n{NETS}")
    (tmp_path / "models.py").write_text("from torch import nn\nCNN = nn.Sequential")
    (tmp_path / "data.txt").touch()  # no module
    assert models.build(f"{tmp_path}/net.py:small", 10, 1, 28).classes == 10 and sys.modules["models"] is models
    assert models.module_of((tmp_path / "net.py").resolve()).data is data


def test_a_teacher_of_another_network(own, tmp_path, failure):
    words = "thin.pt: does not fit .*nets.py:CNN with 10 classes and 1 channels"
    assert re.search(words, failure(1, own[0], "CNN", f"--teacher {own[1]}/thin.pt", tmp_path))


X, Y = np.zeros((6, 1, 28, 28), np.uint8), np.arange(6)
BAD_TESTS = {
    "pickled": (dict(images=X, labels=np.array([{}] * 6)), "allow_pickle"), "no labels": (dict(images=X), "labels"),
    "float images": (dict(images=X / 1, labels=Y), "images is float64"),
    "three axes": (dict(images=X[:, 0], labels=Y), r"uint8 \(6, 28, 28\), expected"),
    "another size": (dict(images=X[..., 1:], labels=Y), r"expected uint8 \(N, 1, 28, 28\) or \(N, 28, 28, 1\)"),
    "more channels": (dict(images=X.repeat(3, 1), labels=Y), "--channels"),
    "no images": (dict(images=X[:0], labels=Y[:0]), "0 labels"),
    "float labels": (dict(images=X, labels=Y / 1), "labels is float64"),
    "labels of two axes": (dict(images=X, labels=Y[:, None]), "labels is int64"),
    "other count": (dict(images=X, labels=Y[:5]), "5 labels"),
    "high labels": (dict(images=X, labels=Y + 5), "label 10"), "low": (dict(images=X, labels=Y - 1), "label -1"),
}  # fmt: skip


@pytest.mark.parametrize("arrays, message", BAD_TESTS.values(), ids=BAD_TESTS)
def test_bad_test_files(own, tmp_path, arrays, message, failure):
    np.savez(tmp_path / "bad.npz", **arrays)
    line = failure(1, own[0], "CNN", f"--test {tmp_path}/bad.npz", tmp_path / "out")
    assert re.search(f"bad.npz: .*{message}", line)


def test_members_of_a_test_file_that_are_no_arrays(own, tmp_path, failure):
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as file:
        for name in ("images", "labels"):
            file.writestr(f"{name}.npy", b"text")
    assert "no arrays" in failure(1, own[0], "CNN", f"--test {tmp_path}/bad.npz", tmp_path / "out")


def test_a_run_without_standard_output(blind, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert blind(tmp_path) == 0


def test_a_small_zip_of_many_bytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "NPZ_LIMIT", 5000)
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((20, 1, 32, 32), np.uint8), labels=np.arange(20) % 10)
    assert (tmp_path / "a.npz").stat().st_size < 5000
    with pytest.raises(data.DataError, match="more than 5000 bytes"):
        data.test_set(tmp_path / "a.npz", GLYPHS)


def test_a_damaged_test_file_is_read_or_refused(tmp_path):
    path, info = tmp_path / "test.npz", data.Info(10, 3, (0,) * 3, (1,) * 3, size=8)
    images, labels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8), np.arange(20) % 10
    np.savez_compressed(path, images=images, labels=labels)
    content = path.read_bytes()
    x, y = data.test_set(path, info)
    assert x.shape == (20, 3, 8, 8) and x[3, :, 4, 5].tolist() == images[3, 4, 5].tolist()
    assert y.tolist() == labels.tolist()

    def attempt(rng):
        path.write_bytes(garbled(content, rng))
        x, y = data.test_set(path, info)
        assert x.dtype == torch.uint8 and x.shape[1:] == (3, 8, 8) and 0 <= y.min() and y.max() < 10

    assert refusals(200, attempt, data.DataError, path) > 0.9  # a .zip holds a checksum of each member


@pytest.mark.filterwarnings("error:No complete tensor")  # torch, of weights that are not contiguous
@pytest.mark.parametrize("name", ["nets.py:Fixed", "wrn-10-1"])
def test_the_exported_student_is_the_student(own, tmp_path, name):
    arch = f"{own[1].resolve()}/{name}" if ":" in name else name
    flags = f"--method noise --student-arch {arch} --export {tmp_path}/student.pt2 --precision bf16"
    assert own[0]("CNN", flags, tmp_path / "run") == 0
    student = models.module_of((own[1] / "nets.py").resolve()).CNN() if ":" in name else models.build(name)
    student.eval()  # in float32
    student.load_state_dict(torch.load(tmp_path / "run" / "student.pt", weights_only=True))
    x = torch.randn(5, 1, 28, 28)
    assert torch.allclose(torch.export.load(tmp_path / "student.pt2").module()(x), student(x), atol=1e-6)


def test_what_is_exported_is_in_eval_mode(tmp_path):
    net, x = models.build("wrn-10-1"), torch.randn(5, 1, 32, 32)
    (tmp_path / "s.pt2").write_bytes(models.exported(net.train(), GLYPHS))
    assert torch.allclose(torch.export.load(tmp_path / "s.pt2").module()(x), net.eval()(x), atol=1e-6)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 exports no network that keeps something")
@pytest.mark.filterwarnings("ignore:The tensor attribute")  # torch, of what the network keeps
def test_a_student_that_keeps_an_activation_is_exported(own, tmp_path):
    assert own[0]("thin", f"--method noise --export {tmp_path}/student.pt2", tmp_path / "run") == 0
    assert torch.export.load(tmp_path / "student.pt2").module()(torch.randn(5, 1, 32, 32)).shape == (5, 10)


def test_samples_of_large_images_are_made_a_few_at_a_time(spy):
    G = g.Generator(3, 1, 8, 4)
    G(torch.randn(5, 3))  # its statistics are no longer the first ones
    with torch.no_grad():
        expected = G.eval()(torch.randn(64, 3, generator=torch.Generator().manual_seed(0)))
    made = spy(g.Generator, "forward")
    x = g.fixed_images(G.train())
    torch.testing.assert_close(x, expected)
    assert G.training and max(len(x) for _, x in made) <= 8


def test_the_readmes_own_network_is_distilled_as_it_stands(tmp_path, monkeypatch):
    readme, glyphs, randint = (HERE / "README.md").read_text(), data.glyphs, torch.randint
    (code,) = re.findall(r"```py\n(.*?)```", readme, re.DOTALL)
    (line,) = re.findall(r"^python net.py\npython dfkd.py (.*?)#", readme, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(code)
    with monkeypatch.context() as patch:
        patch.setattr(data, "glyphs", lambda count, seed: glyphs(500, seed))
        patch.setattr(torch, "randint", lambda high, shape: randint(high, (20, shape[1])))
        exec(code, dict(__name__="__main__"))
    assert dfkd.main([*line.replace("\\", "").split(), *small("")]) == 0
    models.module_of(Path("net.py").resolve()).small().load_state_dict(torch.load("runs/net/student.pt"))


# ---------------------------------------------------------------- ./run.sh table, ./run.sh claims


def with_python(tmp_path, script, **variables):
    """The environment for a run.sh whose Python is this shell script."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return {**os.environ, "PYTHON": str(python), **variables}


def run_sh(tmp_path, job, script, seeds):
    """Run a job of run.sh with a Python that is this shell script -> what it prints."""
    env = with_python(tmp_path, script, SEEDS=seeds)
    return subprocess.check_output([HERE / "run.sh", *job.split()], env=env, text=True)


@pytest.mark.parametrize("job, seeds", [
    ("table glyphs --threads 7", 1), ("table mnist", 5), ("table cifar10", 1), ("table cifar10 --device cpu", 1),
    ("claims mnist", 3),
])  # fmt: skip
def test_the_rows_of_a_table_are_commands_with_a_folder_each(tmp_path, job, seeds):
    """`python` is a script here that notes how it is called and sees a GPU."""
    noted = tmp_path / "noted"
    run_sh(tmp_path, job, f'[ "$1" = -c ] || echo "$@" >> "{noted}"', seeds="")
    *rows, table = [line.split()[1:] for line in noted.read_text().splitlines()]
    made, more = [vars(dfkd.parse([*row, "--device", "cpu"])) for row in rows], job.split()[2:]
    folders = [args.pop("out") for args in made]
    assert all(args["resume"] for args in made) and all(row[len(row) - len(more) :] == more for row in rows)
    assert table == ["--table", *folders] and len(set(folders)) == len(folders) >= 10
    assert all(folder.endswith(f"-{args['seed']}") for folder, args in zip(folders, made))
    assert all(args["seed"] == args["teacher_seed"] for args in made)
    assert {args["seed"] for args in made} == set(range(seeds))
    assert len(set(map(str, made))) == len(made)  # no two rows are the same run


@pytest.mark.parametrize("gpu, flags, large", [
    (True, "", True), (False, "", False), (True, " --device cpu", False), (True, " --device=cpu", False),
])  # fmt: skip
def test_which_pairs_the_cifar_table_has(tmp_path, gpu, flags, large):
    (tmp_path / "torch.py").write_text(f"class cuda:\n    is_available = lambda: {gpu}")
    script = f'''case "$2" in
        *is_available*) PYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@" ;;
        *) [ "$1" = -c ] || echo "$@" ;;
    esac'''
    assert ("resnet34" in run_sh(tmp_path, f"table cifar10{flags}", script, seeds="0")) == large


def test_the_short_table_has_no_further_rows(tmp_path):
    assert "drift" not in run_sh(tmp_path, "table glyphs", '[ "$1" = -c ] || echo "$@"', seeds="0")


@pytest.mark.parametrize("version, enough", [("2.5.1", False), ("2.6.0", True), ("2.10.0+cpu", True), ("3.0.0", True)])
def test_which_torch_is_recent_enough(tmp_path, version, enough):
    shutil.copy(HERE / "run.sh", tmp_path)
    (tmp_path / "dfkd.py").touch()
    (tmp_path / "torch.py").write_text(f"__version__ = {version!r}")
    script = f'''case "$1 $2" in
        "-c import numpy"*) PYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@" ;;
        "-m venv") exit 1 ;;
        "-c "*) ;;
        *) echo ran ;;
    esac'''
    env = with_python(tmp_path, script)
    ran = subprocess.run(["bash", tmp_path / "run.sh"], env=env, capture_output=True, text=True)
    assert (ran.returncode, "ran\n" in ran.stdout) == (0 if enough else 1, enough)


def test_the_main_job_is_rdskd(tmp_path):
    printed = run_sh(tmp_path, "--seed 3", '[ "$1" = -c ] || echo "$@"', seeds="")
    assert printed == "dfkd.py --method rdskd --seed 3\n"


@pytest.mark.parametrize("flags", ["--threads 1 --method kd", "--seed=3", "--out x"])
def test_the_rows_of_a_table_keep_their_names(flags):
    ran = subprocess.run([HERE / "run.sh", "table", "glyphs", *flags.split()], capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1
    assert re.match("run.sh: --(method|seed|out): each row of a table has its own", ran.stderr)


def test_a_flag_that_some_rows_refuse_ends_a_table_before_its_first_run(tmp_path):
    env = with_python(tmp_path, f'[ "$1" = -c ] && exec "{sys.executable}" "$@"; echo "$@"')
    job = [HERE / "run.sh", "table", "glyphs", "--latent", "50"]  # RDSKD, the first row, takes it
    ran = subprocess.run(job, env=env, cwd=HERE, capture_output=True, text=True)
    line = "dfkd.py: --latent means nothing to --method zskd; see --help\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", line)


def test_run_sh_works_in_its_own_folder_only(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / HERE.name).mkdir(parents=True)  # where cd would go by CDPATH
    env = with_python(tmp_path, '[ "$1" = -c ] || pwd', CDPATH=str(elsewhere))
    ran = subprocess.run(["bash", f"{HERE.name}/run.sh"], env=env, cwd=HERE.parent, capture_output=True, text=True)
    assert Path(ran.stdout.strip()).samefile(HERE)
    (tmp_path / "run.sh").symlink_to(HERE / "run.sh")
    ran = subprocess.run(["bash", tmp_path / "run.sh"], env=env, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "") and ran.stderr.startswith("run.sh: no dfkd.py in")


def test_the_claims_end_with_a_line_for_each_method(tmp_path):
    table = tmp_path / "table"
    rows = {"robust-rdskd": 96, "robust-rdskd-lr1": 98, "robust-dafl": 90, "claim-sum": 1, "robust-dafl-w": 90}
    rows = [f"| table-mnist-{name} | 99.00 | {x:.2f} ± 1.00 | 3.00, 4.00 | 5.0 | 6 |\n" for name, x in rows.items()]
    table.write_text("".join([*rows, "\n| table-mnist-robust-rdskd | 1 | 2 | 3 |\n"]))
    printed = run_sh(tmp_path, "claims mnist", f'case "$*" in *--table*) cat "{table}" ;; esac', seeds="0")
    assert printed.splitlines()[-2:] == [
        "robust-dafl: student 90.00 ± 0.00, worst 90.00, over 2 settings",
        "robust-rdskd: student 97.00 ± 1.41, worst 96.00, over 2 settings",
    ]
    assert subprocess.run([HERE / "run.sh", "jump"], capture_output=True).returncode == 2


# ---------------------------------------------------------------- ./run.sh bench


def time_when_done():
    """The time when the GPU, where there is one, has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch(Recorder):
    """Stands in for dfkd.Run: times the steps of a loop, without the first one of each stage."""

    def log(self, **terms):
        pass

    def steps(self, stage, count, each=1):
        times = []
        for step in range(count + 1):
            begun = time.perf_counter()
            yield step
            times.append(1000 * (time_when_done() - begun))
        self.logged[stage] = float(np.median(times[1:]))


class PlainGenerator(nn.Sequential):
    """The generator as the authors' code has it: nearest upsampling, then convolution with bias; float32, NCHW."""

    def __init__(self, latent, w, side=8):
        up = functools.partial(nn.Upsample, scale_factor=2)
        super().__init__(
            nn.Linear(latent, w * side**2), nn.Unflatten(1, (w, side, side)), nn.BatchNorm2d(w),
            up(), nn.Conv2d(w, w, 3, padding=1), nn.BatchNorm2d(w, 0.8), nn.LeakyReLU(0.2, inplace=True),
            up(), nn.Conv2d(w, w // 2, 3, padding=1), nn.BatchNorm2d(w // 2, 0.8), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(w // 2, 1, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(1, affine=False),
        )  # fmt: skip

    linear = property(lambda self: self[0])
    latent_dim = property(lambda self: self[0].in_features)


def test_our_generator_is_the_same_function_as_the_plain_one():
    z, ours, plain = torch.randn(8, 100), g.Generator(100, 1, width=64), PlainGenerator(100, 64)
    layers = [layer for layer in plain if layer.state_dict()]
    for layer, mine in zip(layers, ours.children(), strict=True):
        layer.load_state_dict(mine.state_dict(), strict=False)  # the biases before BatchNorm keep their random values
    assert torch.allclose(plain(z), ours(z), atol=1e-4)


@pytest.mark.parametrize("path", ["plain", "default"])
def test_the_benchmark_times_both_paths(path, monkeypatch):
    """A clock that only the loop's steps move: those of G by 2, 5, 5 seconds, those of S by 1 each."""
    made, clock, step = [], [0.0], torch.optim.Adam.step

    def slow(optimiser, *closure):
        step(optimiser, *closure)
        clock[0] += 1 if of_S(optimiser) else 2 if clock[0] == 0 else 5

    def of_S(optimiser):
        return len(optimiser.param_groups[0]["params"][0]) == 3  # LeNet-5-half's first channels

    real = nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda net, *x, **more: made.append(type(net)) or real(net, *x, **more))
    monkeypatch.setattr(torch.optim.Adam, "step", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert step_times(path, 2, "--device cpu --batch 8 --width 8") == (5000, 1000)
    assert (g.UpsampleConv2d in made, PlainGenerator in made) == ((False, True) if path == "plain" else (True, False))


def plain_step(loss, optimiser, decay, args, build=dfkd.student_step):
    """dfkd.student_step without a CUDA graph."""
    return build(loss, optimiser, decay, argparse.Namespace(device="cpu"))


def step_times(path, steps, more=""):
    """Milliseconds of one generator step and one student step of `dfkd.rdskd`, batch 512, the paper's networks."""
    flags = f"--schedule paper --dataset mnist --generator-steps {steps} --steps {steps} {more}"
    args = dfkd.parse(f"{flags} {'--precision fp32' if path == 'plain' else ''}".split())
    watch, ours = Stopwatch(), (dfkd.image_generator, g.frozen, dfkd.student_step)
    teacher, student = models.build("lenet5").to(args.device), models.build("lenet5_half").to(args.device)
    teacher.eval().requires_grad_(False)

    def plain_generator(info, args):
        G = PlainGenerator(args.latent, args.width).to(args.device)
        return G, models.adam(G, args.generator_lr)

    if path == "plain":
        dfkd.image_generator, g.frozen, dfkd.student_step = plain_generator, PlainGenerator.eval, plain_step
    else:
        models.keep_freed_memory()
        teacher, student = (net.to(memory_format=torch.channels_last) for net in (teacher, student))
    try:
        dfkd.rdskd(teacher, student, data.INFO["mnist"], args, watch)
    finally:
        dfkd.image_generator, g.frozen, dfkd.student_step = ours
    return watch.logged["generator"], watch.logged["student"]


def graph_times(teacher, student, channels, batch, steps, device="cuda"):
    """Milliseconds of a step of S on given images, without a CUDA graph and with it: the better of two trials each."""
    info, times = data.Info(10, channels, (0.5,) * channels, (0.3,) * channels), {plain_step: [], dfkd.student_step: []}
    args = dfkd.parse(f"--device {device}".split())
    x = torch.randn(batch, channels, 32, 32, device=device).to(memory_format=torch.channels_last)
    for make in 2 * [*times]:
        T, S = (models.on_device(name, info, device, args.precision) for name in (teacher, student))
        T.eval().requires_grad_(False)
        step = make(lambda x: g.distillation_loss(S(x), T(x), 10), *dfkd.student_optimiser(S, args), args)  # noqa: B023
        for _ in range(8):  # the graph is recorded in the fourth
            step(x)
        begun = time_when_done()
        for _ in range(steps):
            step(x)
        times[make].append(1000 * (time_when_done() - begun) / steps)
    return tuple(map(min, times.values()))


def test_the_benchmark_counts_the_steps_with_and_without_a_graph(monkeypatch):
    """A clock that a step without a graph moves by two seconds, one with it by one."""
    clock = [0.0]

    def stand_in(seconds):
        def build(loss, optimiser, decay, args):
            return lambda x: clock.append(clock[-1] + seconds) or loss(x)

        return build

    monkeypatch.setattr(sys.modules[__name__], "plain_step", stand_in(2))
    monkeypatch.setattr(dfkd, "student_step", stand_in(1))
    monkeypatch.setattr(time, "perf_counter", lambda: clock[-1])
    assert graph_times("lenet5", "lenet5_half", 1, 4, steps=3, device="cpu") == (2000, 1000)
    assert len(clock) == 1 + 4 * (8 + 3)


def bare_rate(dtype, device):
    """GFLOP/s of the generator's larger convolution alone, forward, in the form and precision that G computes it in."""
    x = torch.randn(512, 128, 16, 16).to(device, dtype, memory_format=torch.channels_last)
    v = torch.randn(128, 64, 4, 4).to(device, dtype)
    times = []
    with torch.inference_mode():
        for _ in range(6):
            begun = time.perf_counter()
            F.conv_transpose2d(x, v, stride=2, padding=1)
            times.append(time_when_done() - begun)
    return 512 * 1024 * 128 * 64 * 4 * 2 / np.median(times[1:]) / 1e9


def processor():
    try:
        return re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # no such file, or no such line: not Linux on x86
        return platform.machine()


def bench():
    """Time the default path against plain float32 NCHW: the same loop, the same networks, one process."""
    args = dfkd.parse([])
    if args.device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # for CUDA graphs
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{processor()}, {args.threads} threads"
    print(f"{where}, torch {torch.__version__}, default precision {args.precision}")
    print("RDSKD, batch 512, generator of width 128, LeNet-5 -> half; median milliseconds per step")
    plain, default = step_times("plain", 3), step_times("default", 8 if args.device == "cpu" else 24)
    rate = bare_rate(torch.bfloat16 if args.precision == "bf16" else torch.float32, args.device)
    # multiplications and additions of the three convolutions per image as computed, with 4 taps after upsampling
    work = 512 * 2 * (16**2 * 128 * 128 * 4 + 32**2 * 128 * 64 * 4 + 32**2 * 64 * 9) / 1e9
    for name, passes, a, b in zip(("generator", "student"), (3, 1), plain, default):
        reached = passes * work / (b / 1000)
        print(f"{name:<10} plain {a:6.0f}   default {b:6.0f}   {a / b:.1f} times as fast   {reached:.0f} GFLOP/s in "
              f"G's convolutions, {100 * reached / rate:.0f} % of the bare convolution's {rate:.0f}")  # fmt: skip
    for name, a, b in zip(("generator", "student"), plain, default):
        print(f"{name}_step plain_ms={a:.1f} default_ms={b:.1f} ratio={a / b:.2f}")
    if args.device == "cuda":
        print("a step of S on given images; milliseconds without and with its CUDA graph")
        for pair in (("lenet5", "lenet5_half", 1, 64), ("lenet5", "lenet5_half", 1, 512),
                     ("wrn-40-2", "wrn-16-1", 3, 128), ("resnet34", "resnet18", 3, 128),
                     ("resnet34", "resnet18", 3, 256)):  # fmt: skip
            a, b = graph_times(*pair, steps=40)
            print(f"{pair[0]} -> {pair[1]}, batch {pair[3]}: {a:.2f}, {b:.2f}, {a / b:.1f} times as fast")


if __name__ == "__main__":
    bench()
