"""Data-free knowledge distillation: teach a small network what a trained one knows, without any data.

    python dfkd.py --method rdskd                                        # digits drawn here, minutes on a CPU
    python dfkd.py --method rdskd --dataset mnist --schedule paper       # the authors' own schedule
    python dfkd.py --method rdskd --dataset mnist --teacher FILE --no-eval   # a teacher and nothing else

The order of this file: schedules, a loop for each method, what the loops share, the run's record, the command line,
one whole run. The losses and the synthesis of images are in generators.py, the memories in replay.py, networks,
teachers and optimisers in models.py, real images and files in data.py. The loops get a teacher and no data.
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C while torch is imported: one line, no traceback

    def stopped_at_once(*_):
        os.write(2, b"dfkd.py: stopped; nothing had begun\n")
        os._exit(130)

    signal.signal(signal.SIGINT, stopped_at_once)

import argparse
import functools
import io
import json
import math
import re
import shutil
import statistics
import textwrap
import time
import warnings
import zlib
from pathlib import Path

try:
    import data  # first: it asks for numpy, without which torch would only warn
    import generators
    import models
    import replay
    import torch
except ImportError as error:
    if __name__ != "__main__":
        raise
    advice = "; ./run.sh installs what is needed into .venv, for .venv/bin/python dfkd.py"
    sys.exit(f"dfkd.py: {error}{advice if error.name in ('torch', 'numpy') else ''}")

# ---------------------------------------------------------------- schedules

EPOCH = 120  # iterations that RDSKD's and DAFL's code call an epoch [C]
TERMS = ("oh", "ie", "ds")  # of RDSKD's L_G
# What we add to image synthesis, see `optimised`, and to what S sees of its images: `mix`, see `transfer_set`. Where
# there is a generator, `range` and `augment` mean what `image_bounds` and `student_batch` say.
OURS = ("smooth", "range", "settle", "augment", "scale", "sum", "mix")

# Every number of a method, one a line, named like its flag. A flag on the command line overrides it.
# The first three columns are `--schedule default`: ours, minutes on two CPU cores, found on validation images; for
# `natural` images, those with three channels, a guess for a GPU. The last two are `--schedule paper`: as published.
# The marks are for these two columns: [P] text, [C] code, [I] ours, where neither says anything. They hold for MNIST
# and CIFAR-10 (RDSKD: SVHN, too). Other data sets with three channels take CIFAR-10's column, all others MNIST's [I].
# Ours everywhere [I]: --precision, bfloat16 for large networks where it is fast; images drawn with replacement.
# "98.1 instead of 97.1" is the student's accuracy in percent, with the number of this line and without it.
# fmt: off
COLUMNS = ("glyphs", "mnist", "natural", "paper mnist", "paper natural")
RDSKD = {
    "batch":             (64, 64, 256, 512, 512),  # [C]
    "latent":            (100, 100, 256, 100, 1000),  # [C]
    "width":             (64, 64, 128, 128, 128),  # [C]
    "generator_steps":   (1000, 1000, 2400, 20 * EPOCH, 20 * EPOCH),  # [C]
    "generator_lr":      (1e-3, 1e-3, 1e-3, 1e-3, 1e-3),  # [C]
    "steps":             (5000, 12_000, 30_000, 1000 * EPOCH, 1000 * EPOCH),  # [C]
    "terms":             (TERMS,) * 5,  # [C]
    "penalty":           ("exp", "exp", "exp", "exp", "exp"),  # [P, C]
    "temperature":       (10.0, 10.0, 10.0, 10.0, 10.0),  # [C]
    "student_optimiser": ("adam", "adam", "adam", "adam", "adam"),  # [C]
    "student_lr":        (1e-2, 1e-2, 2e-3, 2e-3, 2e-3),  # [C]
    "student_decay":     ("cycle", "cycle", "cosine", "none", "drops"),  # [C]; SVHN: none
    "eval_every":        (0, 0, 0, 10 * EPOCH, 10 * EPOCH),  # [I]; 0: a 25th of the steps
    # range: 98.1 instead of 97.1 (validation, 2 seeds); augment beside it: 98.2 instead of 96.4, on glyphs 98.6 instead
    # of 98.2 (validation, 3 seeds)
    "ours":              (("range", "augment"), ("range", "augment"), ("range",), (), ()),
}
DAFL = {  # and MSKD, for which all of it is ours [I]
    "batch":             (64, 64, 256, 512, 1024),  # [C]
    "latent":            (100, 100, 256, 100, 1000),  # [C]
    "width":             (48, 48, 128, 128, 128),  # [C]
    "generator_lr":      (0.02, 0.02, 0.02, 0.2, 0.02),  # [C]
    "loss_weights":      ((1, 5, 0.1), (1, 5, 0.1), (0.05, 5, 0.01), (1, 5, 0.1), (0.05, 5, 0.01)),  # [C]
    "student_steps":     (5, 5, 5, 1, 1),  # for each of G [C]
    "steps":             (4000, 12_000, 30_000, 200 * EPOCH, 2000 * EPOCH),  # [C]
    "temperature":       (10.0, 10.0, 10.0, 1.0, 1.0),  # [C]; 97.4 % with 10, 96.3 % with 1 (validation, without range)
    "student_optimiser": ("adam", "adam", "sgd", "adam", "sgd"),  # [C]
    "student_lr":        (1e-2, 1e-2, 0.1, 2e-3, 0.1),  # [C]
    # natural: without a warm-up ResNet-18 dies, see models.student_optimiser; WRN-40-2, training images S never sees:
    # 59.0 instead of 51.7, MSKD 53.7 instead of 45.3 (2000 steps); 73.8 instead of 74.0, 67.6 instead of 55.9 (6000)
    "student_decay":     ("cycle", "cycle", "cycle", "none", "drops"),  # [C]
    "eval_every":        (0, 0, 0, EPOCH, 10 * EPOCH),  # [I]
    # augment: 98.0 instead of 97.5 (validation, 3 seeds, 3000 steps), better with two of three teachers; on glyphs 98.6
    # instead of 98.3, MSKD 98.0 instead of 97.8 (validation, 1 seed)
    "ours":              (("range", "augment"), ("range", "augment"), ("range",), (), ()),
}
PRE = {
    "batch":             (64, 64, 256, 1024, 1024),  # [C]
    "latent":            (100, 100, 256, 1000, 1000),  # [C]
    "width":             (48, 48, 128, 128, 128),  # [C]
    "generator_lr":      (0.02, 0.02, 0.02, 0.02, 0.02),  # [C]
    "loss_weights":      ((1, 5, 0.1), (1, 5, 0.1), (1, 5, 0.1), (1, 5, 0.1), (1, 5, 0.1)),  # [C]
    "student_steps":     (10, 10, 10, 10, 10),  # for each of G [C]
    "steps":             (4000, 8000, 30_000, 400 * 36 * 10, 400 * 36 * 10),  # 400 epochs of 36 rounds [C]
    "student_optimiser": ("adam", "adam", "sgd", "adam", "sgd"),  # [C]
    # paper mnist: 0.1 is the default of the authors' flag; LeNet-5-half dies in the first epoch (3 of 3 teachers)
    "student_lr":        (1e-2, 1e-2, 0.1, 0.1, 0.1),  # [C]; 97.2, 95.7 with 3e-3 (validation, 3 seeds, no replay)
    # natural: as DAFL's; WRN-40-2, no replay, training images S never sees: 56.8 instead of 53.8 (2000 steps), 73.8
    # instead of 71.1 (6000)
    "student_decay":     ("cycle", "cycle", "cycle", "cosine", "cosine"),  # [C]; that MNIST's Adam has it, too: [I]
    "decay_every":       (1, 1, 1, 36 * 10, 36 * 10),  # the cosine moves once an epoch [C]
    "eval_every":        (0, 0, 0, 36 * 10, 36 * 10),  # every epoch [P]
    "replay":            ("vae", "vae", "vae", "vae", "vae"),  # [P]
    # augment: 98.1 instead of 97.2 (validation, 3 seeds, 4000 steps, no replay)
    "ours":              (("range", "augment"), ("range", "augment"), ("range",), (), ()),
}
REPLAY = {  # PRE-DFKD's memory; with other methods it is ours [I]. A method's own table overrides it.
    "replay":            ("none", "none", "none", "none", "none"),
    "memory_latent":     (32, 32, 32, 1000, 1000),  # [C]; 32 and 32 make 0.5 MB
    "memory_width":      (32, 32, 32, 128, 128),  # [C]
    "memory_lr":         (5e-4, 5e-4, 5e-4, 5e-4, 5e-4),  # PRE-DFKD's 0.02 / 40 [C]
    "latent_lr":         (0.02, 0.02, 0.02, 0.02, 0.02),  # PRE-DFKD's rate of G [C]
    "bank_size":         (4096, 4096, 4096, 4096, 4096),  # [I]
    "teacher_term":      (True, True, True, True, True),  # [P, C]
    "balanced":          (True, True, True, True, True),  # [P, C]
}
ZSKD = {  # the code is for CIFAR-10 and AlexNet; the same for MNIST is ours [I]
    "images":            (12_000, 12_000, 12_000, 24_000, 40_000),  # ZSKD's; our notes do not say if [P] or [C]
    "image_batch":       (500, 500, 500, 100, 100),  # [C]
    "image_steps":       (100, 100, 100, 1500, 1500),  # [C]
    "image_lr":          (0.1, 0.1, 0.1, 3.2e-3, 5e-3),  # 1e-3 of pixels in [0, 1] [C], over MNIST's, CIFAR-10's std
    # mix: 40.2 instead of 25.4, 40.3 instead of 24.2 (WRN-40-2, two seeds of S, training images S never sees)
    "ours":              (("smooth", "range", "settle", "augment", "sum"),) * 2
                         + (("smooth", "range", "settle", "augment", "sum", "mix"), (), ()),
    "temperature":       (20.0, 20.0, 20.0, 20.0, 20.0),  # [C]
    "batch":             (64, 64, 256, 64, 64),  # [C]
    "steps":             (20_000, 20_000, 20_000, 500 * 24_000 // 64, 500 * 40_000 // 64),  # 500 epochs [C]
    "student_optimiser": ("adam", "adam", "adam", "adam", "adam"),  # [C]
    "student_lr":        (1e-2, 1e-2, 2e-3, 1e-3, 1e-3),  # [C]
    "student_decay":     ("cycle", "cycle", "cycle", "none", "none"),  # [C]
    "eval_every":        (0, 0, 0, 0, 0),  # [I]
}
SOFT_TARGET = ZSKD | {  # where nothing is said here, as ZSKD [I]; its temperature is that of the soft labels, too [P]
    "layer":             ("auto", "auto", "auto", "auto", "auto"),  # FC-2 where there is one [P], else the logits [I]
    "sigma":             ("auto", "auto", "auto", 1.5, 2.0),  # [P]
    "loss_weights":      ((0.05,), (0.05,), (0.05,), (0.05,), (0.1,)),  # lambda_a: LeNet-5, AlexNet [P]; others [I]
    # mix: 54.8 instead of 51.6, 56.2 instead of 47.8 (WRN-40-2, training images S never sees); on MNIST 98.40 instead
    # of 98.55 (validation)
    "ours":              (("smooth", "range", "settle", "augment", "scale", "sum"),) * 2
                         + (("smooth", "range", "settle", "augment", "scale", "sum", "mix"), (), ()),
}
CONTROL = {  # noise and kd, all of it ours [I]: results are published, no schedule is
    "batch":             (64, 64, 256, 64, 256),
    "steps":             (12_000, 12_000, 12_000, 12_000, 12_000),
    "temperature":       (10.0, 10.0, 10.0, 10.0, 10.0),
    "student_optimiser": ("adam", "adam", "adam", "adam", "adam"),
    "student_lr":        (1e-2, 1e-2, 2e-3, 1e-2, 2e-3),
    "student_decay":     ("cycle", "cycle", "cycle", "cycle", "cycle"),
    "eval_every":        (0, 0, 0, 0, 0),  # [I]
}
DEEPINVERSION = CONTROL | {  # the authors' numbers are for CIFAR-10; where nothing is said here, as CONTROL [I]
    "loss_weights":      ((1e-3, 0.0, 10.0),) * 5,  # alpha_tv, alpha_2, alpha_f: from the code's ranges [C], these [I]
    "images":            (12_000, 12_000, 12_000, 24_000, 40_000),  # [I]
    "image_batch":       (256, 256, 256, 256, 256),  # [C]
    "image_steps":       (100, 100, 500, 2000, 2000),  # [C]; 150 leave 39 % of CIFAR images outside their class
    "image_lr":          (0.1, 0.1, 0.1, 0.1, 0.1),  # [C]
    # mix: 64.4 instead of 61.6, 65.4 instead of 62.9; WRN-40-2 63.6 instead of 57.4 (training images S never sees)
    "ours":              (("smooth", "range", "settle", "sum"), ("smooth", "range", "settle", "sum"),
                          ("smooth", "range", "settle", "sum", "mix"), (), ()),
    "temperature":       (20.0, 20.0, 20.0, 20.0, 20.0),  # [I]
    "steps":             (20_000, 20_000, 20_000, 60_000, 60_000),  # [I]
}
SCHEDULES = {
    "rdskd": REPLAY | RDSKD, "pre": REPLAY | PRE, "soft-target": SOFT_TARGET, "dafl": REPLAY | DAFL,
    "mskd": REPLAY | DAFL, "zskd": ZSKD, "deepinversion": DEEPINVERSION, "noise": CONTROL, "kd": CONTROL,
}

TEACHERS = {
    "glyphs": "lenet5", "mnist": "lenet5", "fashion-mnist": "lenet5", "svhn": "wrn-40-2", "cifar10": "resnet34",
    "cifar100": "resnet34",
}
STUDENTS = {
    "lenet5": "lenet5_half", "alexnet": "alexnet_half", "resnet34": "resnet18", "wrn-40-2": "wrn-16-1",
    "wrn-16-2": "wrn-16-1",
}
TEACHER_EPOCHS = {"glyphs": 4, "mnist": 10, "fashion-mnist": 15, "svhn": 15, "cifar10": 30, "cifar100": 40}
# fmt: on
FEATURE_L_OH = 0.2  # the teacher's L_oh, in nats, on soft-target synthesis's features: what decides sigma [I]


class RunError(Exception):
    """The run cannot go on: the message is the one line that the user sees."""


# ---------------------------------------------------------------- a loop for each method: a teacher, and no data


def rdskd(teacher, student, info, args, run):
    """RDSKD [C]: train G alone on its objective; freeze it; train S on fresh images from it.

    With --replay, the memory learns in the first stage and gives samples to S in the second [I].
    """
    B, tau = args.batch, args.temperature
    G, optimiser_G = image_generator(info, args)
    optimiser_S, decay_S = student_optimiser(student, args)
    memory = replay_memory(info, args)
    reference = G.linear.weight.new_zeros(2)  # L_oh', L_ie' [C]; in G's precision
    penalty = {"exp": torch.exp, "sum": lambda increase: increase}[args.penalty]
    run.keep(G=G, S=student, optimiser_G=optimiser_G, optimiser_S=optimiser_S, decay_S=decay_S, memory=memory,
             reference=reference)  # fmt: skip
    run.samples = lambda: generators.fixed_images(G)

    for step in run.steps("generator", args.generator_steps):
        x = G(generators.latents(G, B))
        t = teacher(x)
        L_G = generators.rdskd_loss(x, t, reference, args.terms, penalty)
        minimise(L_G, optimiser_G)
        L_oh, L_ie = generators.one_hot_loss(t), generators.information_entropy_loss(t)
        if step % EPOCH == 1:  # once an epoch, after its second iteration [C]
            reference.copy_(torch.stack([L_oh, L_ie]).detach())
        run.log(L_G=L_G, L_oh=L_oh, L_ie=L_ie, L_ds=generators.diversity_seeking_loss(x, t))
        if memory:
            run.log(**memory.learn(x.detach(), teacher, rehearse=step > 0))

    frozen_G = generators.frozen(G)
    run.fresh = lambda: [generators.fresh_images(frozen_G, B) for _ in range(8)]

    def loss_S(x):
        return generators.distillation_loss(student(x), teacher(x), tau)

    step_S = student_step(loss_S, optimiser_S, decay_S, args)
    for _ in run.steps("student", args.steps):
        x = student_batch(generators.fresh_images(frozen_G, B), memory, teacher, info, args)
        L_kd = step_S(x)
        run.log(L_kd=L_kd)


def dafl(teacher, student, info, args, run):
    """DAFL [C]: G minimises a L_oh + b L_ie + c L_a."""

    def objective(x, z, t, f):
        return generators.dafl_loss(t, f, *args.loss_weights), dict(L_a=generators.activation_loss(f))

    generator_beside_student(objective, teacher, student, info, args, run)


def mskd(teacher, student, info, args, run):
    """MSKD [I]: DAFL with a mode-seeking term in the place of L_a."""

    def objective(x, z, t, f):
        return generators.mskd_loss(x, z, t, *args.loss_weights), dict(L_ms=generators.mode_seeking_loss(x, z))

    generator_beside_student(objective, teacher, student, info, args, run)


def generator_beside_student(objective, teacher, student, info, args, run):
    """DAFL's loop [C]: a step of G, then one of S on the very batch that G was trained on.

    With more than one step of S for each of G, the further ones see fresh batches [I]. With --replay, S sees memory
    samples beside each batch, and the memory learns after each of the first four steps of S, as in PRE-DFKD [I].
    """
    B, tau = args.batch, args.temperature
    G, optimiser_G = image_generator(info, args)
    optimiser_S, decay_S = student_optimiser(student, args)
    memory = replay_memory(info, args)
    run.keep(G=G, S=student, optimiser_G=optimiser_G, optimiser_S=optimiser_S, decay_S=decay_S, memory=memory)
    run.samples = lambda: generators.fixed_images(G)
    run.fresh = lambda: [generators.fresh_images(G, B) for _ in range(8)]

    def loss_S(x):
        return generators.distillation_loss(student(x), teacher(x), tau)

    step_S = student_step(loss_S, optimiser_S, decay_S, args)

    for turn in run.steps("student", args.steps, each=args.student_steps):
        z = generators.latents(G, B)
        x = G(z)
        t, f = teacher(x, return_features=True)
        L_G, own_term = objective(x, z, t, f)
        minimise(L_G, optimiser_G)
        L_ie = generators.information_entropy_log10(t)
        run.log(L_G=L_G, L_oh=generators.one_hot_loss(t), L_ie=L_ie, **own_term)

        for step in range(args.student_steps):
            novel = x.detach() if step == 0 else generators.fresh_images(G, B)
            seen = student_batch(novel, memory, teacher, info, args)  # with B/8 memory samples, where there are any
            L_kd = step_S(seen)
            run.log(L_kd=L_kd)
            if memory and step < 4:
                run.log(**memory.learn(novel, teacher, rehearse=turn > 0))


def pre(teacher, student, info, args, run):
    """PRE-DFKD [C]: a round is one step of G, ten of S on novel and memory samples, four of the memory.

    G: DAFL's terms, and disagreement between S and T. S: the mean distance of the logits. S is in train mode in L_js,
    too: its BatchNorms see G's batch [I].
    """
    B = args.batch
    G, optimiser_G = image_generator(info, args, spectral_norm=True, bound=0.08)
    optimiser_S, decay_S = student_optimiser(student, args)
    memory = replay_memory(info, args)
    run.keep(G=G, S=student, optimiser_G=optimiser_G, optimiser_S=optimiser_S, decay_S=decay_S, memory=memory)
    run.samples = lambda: generators.fixed_images(G)
    run.fresh = lambda: [generators.fresh_images(G, B) for _ in range(8)]

    def loss_S(x):
        return generators.logit_distance_loss(student(x), teacher(x))

    step_S = student_step(loss_S, optimiser_S, decay_S, args)

    for turn in run.steps("student", args.steps, each=args.student_steps):
        x = G(generators.latents(G, B))
        t, f = teacher(x, return_features=True)
        L_js = generators.js_disagreement_loss(student(x), t)
        L_G = generators.dafl_loss(t, f, *args.loss_weights) + L_js
        minimise(L_G, optimiser_G)
        L_ie = generators.information_entropy_log10(t)
        run.log(L_G=L_G, L_oh=generators.one_hot_loss(t), L_ie=L_ie, L_a=generators.activation_loss(f), L_js=L_js)

        for step in range(args.student_steps):
            novel = generators.fresh_images(G, B)
            seen = student_batch(novel, memory, teacher, info, args)  # with B/8 memory samples, where there are any
            L_kd = step_S(seen)
            run.log(L_kd=L_kd)
            if memory and step < 4:
                run.log(**memory.learn(novel, teacher, rehearse=turn > 0))


def soft_target(teacher, student, info, args, run):
    """Soft-target synthesis [P]: soft labels from a model of a layer's outputs, then images that have these labels."""
    tau, (lambda_a,) = args.temperature, args.loss_weights
    layer, linear, rest, sigma = feature_model(teacher, args)
    run.facts.update(layer=layer, sigma=sigma)
    scale = tau**2 if "scale" in args.ours else 1.0

    def make_images(index):
        y = generators.soft_labels(linear.weight, rest, sigma, tau, len(index))

        def objective(x):
            t, f = teacher(x, return_features=True)
            return scale * generators.soft_target_loss(t, y, tau) + lambda_a * generators.activation_loss(f)

        x, L_x = optimised(objective, len(index), info, args, run)
        t, f = teacher(x, return_features=True)
        run.log(L_x=L_x, L_ce=generators.soft_target_loss(t, y, tau), L_a=generators.activation_loss(f))
        return x, t, y, y.argmax(1)

    transfer_set(make_images, teacher, student, info, args, run)


def zskd(teacher, student, info, args, run):
    """ZSKD [P, C]: soft labels from a Dirichlet distribution for each class, then images that have these labels."""
    tau, weight = args.temperature, teacher.classifier.weight

    def make_images(index):
        k = index % info.classes  # each class as often as any other [C]; in this order [I]
        beta = torch.where(index // info.classes % 2 == 0, 1.0, 0.1)  # for each class, half of its images [P]
        y = generators.dirichlet_targets(weight, k, beta)

        def objective(x):
            return generators.soft_target_loss(teacher(x), y, tau)

        x, L_x = optimised(objective, len(index), info, args, run, in_pixels=True)
        run.log(L_x=L_x)
        return x, teacher(x), y, k

    transfer_set(make_images, teacher, student, info, args, run)


def deepinversion(teacher, student, info, args, run):
    """DeepInversion [C]: images of each class that have T's BatchNorm statistics and look smooth."""
    if not any(isinstance(m, generators.BATCH_NORM) for m in teacher.modules()):
        print(f"{args.teacher_arch} has no BatchNorm: DeepInversion's term of its statistics is absent")

    def make_images(index):
        y = index % info.classes  # each class as often as any other [C]; in this order [I]

        def objective(x):
            x = generators.rolled(x)
            t, inputs = generators.batch_norm_inputs(teacher, x)
            return generators.deepinversion_loss(x, t, y, inputs, *args.loss_weights)

        x, L_x = optimised(objective, len(index), info, args, run)
        t, inputs = generators.batch_norm_inputs(teacher, x)
        L_ce = torch.nn.functional.cross_entropy(t, y)
        run.log(L_x=L_x, L_ce=L_ce, L_tv=generators.total_variation(x), L_bn=generators.batch_norm_prior(inputs))
        return x, t, torch.nn.functional.one_hot(y, info.classes).float(), y

    transfer_set(make_images, teacher, student, info, args, run)


def transfer_set(make_images, teacher, student, info, args, run):
    """Make a set of images batch by batch, a file for each batch; then train S on the finished set.

    make_images(numbers of the images) -> images, T's outputs on them, soft labels, intended classes.
    S learns T's outputs on the images as S sees them, augmented: ZSKD [C], the others as ZSKD [I]. T's outputs before
    the augmentation would mislead it: synthetic images lose their class with small changes of their pixels.
    With `mix` of --ours, S sees mixtures of pairs of them [I].
    The files hold float16. Its rounding, 1 part in 2000, is far below the noise that the images begin with [I].
    """
    optimiser_S, decay_S = student_optimiser(student, args)
    run.keep(S=student, optimiser_S=optimiser_S, decay_S=decay_S)
    folder = run.out / "transfer"
    folder.mkdir(exist_ok=True)
    stored = functools.partial(stored_images, folder, args, info)
    run.samples = lambda: stored(0)["images"][:64]
    for turn in run.steps("images", args.images, each=args.image_batch):
        first = turn * args.image_batch
        index = torch.arange(first, min(first + args.image_batch, args.images), device=args.device)
        x, t, y, intended = make_images(index)
        run.log(**generators.label_shares(t, y, intended))
        stored_batch = dict(images=x.half().cpu(), labels=y.float().cpu(), intended=intended.cpu())
        data.save(folder / f"{first}.pt", stored_batch)

    count = min(args.images, args.image_batch, 100)  # for a figure in percent; a whole batch may take minutes
    more = args.images + torch.arange(count, device=args.device)
    run.fresh = lambda: [make_images(more)[0]]
    batches = [stored(first) for first in range(0, args.images, args.image_batch)]
    images, y, intended = (torch.cat([b[k] for b in batches]).to(args.device) for k in ("images", "labels", "intended"))
    t = torch.cat([teacher(x.float()) for x in images.split(args.image_batch)])
    shares = {name: share.item() for name, share in generators.label_shares(t, y, intended).items()}
    run.facts.update(images=len(images), bytes=images.nbytes, **shares)

    def loss_S(x):
        return generators.distillation_loss(student(x), teacher(x), args.temperature)

    step_S = student_step(loss_S, optimiser_S, decay_S, args)
    for _ in run.steps("student", args.steps):
        index = torch.randint(len(images), (args.batch,), device=args.device)
        x = generators.augmented(images[index].float(), info.mirror)
        if "mix" in args.ours:
            x = generators.mixed(x)
        L_kd = step_S(x)
        run.log(L_kd=L_kd)


def stored_images(folder, args, info, first):
    """The batch of the transfer set that begins with image number `first`, from its file."""
    path, count = folder / f"{first}.pt", min(args.image_batch, args.images - first)
    images = torch.empty(count, info.channels, info.size, info.size, dtype=torch.float16)
    labels, intended = torch.empty(count, info.classes), torch.empty(count, dtype=torch.int64)
    try:
        held = data.load_tensors(path)
        if data.same_form(dict(images=images, labels=labels, intended=intended), held):
            return held
    except (FileNotFoundError, data.DataError):
        pass
    raise RunError(f"{path}: missing, damaged or of another run; begin elsewhere, with --out DIR")


def noise(teacher, student, info, args, run):
    """The lower bound: S learns from T's outputs on Gaussian images."""
    shape = (args.batch, info.channels, info.size, info.size)
    draw = functools.partial(torch.randn, shape, device=args.device)
    run.fresh = lambda: [draw() for _ in range(8)]
    on_images(draw, teacher, student, args, run)


def on_images(draw, teacher, student, args, run):
    """S learns from T's outputs on the batches that draw() gives: noise or, for the upper bound `kd`, real images."""
    optimiser_S, decay_S = student_optimiser(student, args)
    run.keep(S=student, optimiser_S=optimiser_S, decay_S=decay_S)

    def loss_S(x):
        return generators.distillation_loss(student(x), teacher(x), args.temperature)

    step_S = student_step(loss_S, optimiser_S, decay_S, args)
    for _ in run.steps("student", args.steps):
        L_kd = step_S(draw())
        run.log(L_kd=L_kd)


LOOPS = {
    "rdskd": rdskd, "pre": pre, "soft-target": soft_target, "dafl": dafl, "mskd": mskd, "zskd": zskd,
    "deepinversion": deepinversion, "noise": noise,
}  # fmt: skip

# ---------------------------------------------------------------- what the loops share


def image_generator(info, args, spectral_norm=False, bound=None):
    """G and its optimiser."""
    pixels = image_bounds(info, args)
    G = generators.Generator(args.latent, info.channels, info.size, args.width, spectral_norm, bound, pixels)
    G.bf16 = args.precision == "bf16"
    G.to(args.device, memory_format=torch.channels_last)
    return G, models.adam(G, args.generator_lr)


def image_bounds(info, args):
    """Black and white, to which images are clamped with `range` of --ours [I]; else None.

    Without it, G may draw darker than black, or dark digits on a bright ground. T is sure of such images all the same,
    and S learns what no real image needs.
    """
    return data.pixel_range(info, args.device) if "range" in args.ours else None


def student_batch(novel, memory, teacher, info, args):
    """What T and S see while S learns from G: novel images and, where there is a memory, B/8 samples of it.

    With `augment` of --ours, all are turned, scaled and shifted at random. G learns nothing of it; S learns more of T
    than its answers to what G draws [I].
    """
    x = torch.cat([novel, memory.recall(replay.memory_count(novel), teacher)]) if memory else novel
    return generators.augmented(x, info.mirror, degrees=45) if "augment" in args.ours else x


def replay_memory(info, args):
    """What --replay asks for: a module with `learn` and `recall`, or None."""
    if args.replay == "bank":
        return replay.Bank(args.bank_size, info.channels, info.size).to(args.device)
    if args.replay == "vae":
        vae = replay.VAE(args.memory_latent, info.channels, info.size, args.memory_width, image_bounds(info, args))
        vae.encoder.bf16 = vae.decoder.bf16 = args.precision == "bf16"
        vae.to(args.device, memory_format=torch.channels_last)
        return replay.PseudoReplay(vae, args.memory_lr, args.latent_lr, args.teacher_term, args.balanced)
    return None


def student_optimiser(student, args):
    """S's optimiser and the decay of its rate."""
    kind, lr, decay = args.student_optimiser, args.student_lr, args.student_decay
    drops = [800 * EPOCH, 1600 * EPOCH]
    return models.student_optimiser(student, kind, lr, decay, args.steps, args.decay_every or 1, drops)


def weights_of(optimiser):
    return [p for group in optimiser.param_groups for p in group["params"]]


def set_gradients(loss, optimiser):
    """The gradients of `loss`. Only the optimiser's own parameters get them: L_G depends on S, too."""
    optimiser.zero_grad()
    loss.backward(inputs=weights_of(optimiser))


def minimise(loss, optimiser):
    """One optimiser step on `loss`."""
    set_gradients(loss, optimiser)
    optimiser.step()


def student_step(loss, optimiser, decay, args):
    """f(x): one step of S on loss(x) -> that loss. On a GPU, loss and gradients are one CUDA graph.

    A user's network goes without it: it may do what no graph can hold.
    """

    def gradients(x):
        L = loss(x)
        set_gradients(L, optimiser)
        return L.detach()

    if args.device == "cuda" and ":" not in args.teacher_arch + args.student_arch:  # FILE.py:NAME
        gradients = models.as_cuda_graph(gradients, weights_of(optimiser))

    def step(x):
        L = gradients(x)
        optimiser.step()
        decay.step()
        return L

    return step


def feature_model(teacher, args):
    """What soft-target synthesis models, `auto` decided: a layer's name, the layer, what follows it, its sigma."""
    layer = teacher.modelled if args.layer == "auto" else args.layer
    sigma = args.sigma
    try:
        linear, rest = teacher.split(layer)
        if sigma == "auto":
            sigma = generators.feature_scale(linear.weight, rest, FEATURE_L_OH)
            print(f"sigma      {sigma:.4g} for {layer}: there the teacher's L_oh is {FEATURE_L_OH}")
        generators.feature_distribution(linear.weight, sigma)  # an error, if it has none
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise RunError(f"--layer {layer} --sigma {args.sigma}: {error}") from None
    return layer, linear, rest, sigma


def optimised(objective, count, info, args, run, in_pixels=False):
    """x* = argmin objective(x) by Adam, from Gaussian noise -> x*, the objective's last value.

    `in_pixels`: from pixels U[0, 1]; after every step the batch is min-max rescaled to pixels in [0, 1]. ZSKD does so
    before every step, the first one, too [C]. Adam moves normalised x here: its eps is 1e-8 / std in pixels [I].
    What --ours adds or puts in their place [I]: `smooth`, a beginning in weak smooth noise; `range`, images kept in the
    range of pixels; `settle`, an early end; `augment`, objective(augmented x), so that images keep their labels when S
    sees them augmented; `sum`, the gradient of the sum over the batch. `scale` is in soft_target's objective: CE times
    tau^2, so that it counts beside lambda_a L_a.
    """
    ours = args.ours
    mean, std = data.mean_and_std(info, args.device)
    bounds = image_bounds(info, args)
    shape = (count, info.channels, info.size, info.size)
    if "smooth" in ours:
        x = generators.smooth_noise(count, info.channels, info.size, args.device)
    elif in_pixels:
        x = (torch.rand(shape, device=args.device) - mean) / std
    else:
        x = torch.randn(shape, device=args.device)
    constrain = None
    if bounds:
        constrain = functools.partial(torch.clamp, min=bounds[0], max=bounds[1])
    elif in_pixels:
        constrain = functools.partial(generators.rescaled, mean=mean, std=std)

    def of_augmented(x):
        return objective(generators.augmented(x, info.mirror) if "augment" in ours else x)

    def report(step, L_x):
        run.tell(f"step {step}/{args.image_steps}  L_x {L_x:.4g}")

    settle = 0.01 if "settle" in ours else 0.0
    factor = count if "sum" in ours else 1
    return generators.synthesise(of_augmented, x, args.image_steps, args.image_lr, constrain, settle, factor, report)


# ---------------------------------------------------------------- the run's record

FILES = ("result.json", "metrics.csv", "samples.png", "student.pt", "checkpoint.pt", "transfer")


class Run:
    """Progress, evaluations, checkpoints, the result. A loop calls `keep` once, walks through `steps`, calls `log`."""

    def __init__(self, args, info):
        self.args, self.info = args, info
        self.settings = {key: value for key, value in vars(args).items() if key not in MAY_CHANGE}
        networks = {name.rpartition(":")[0] for name in (args.teacher_arch, args.student_arch)}
        self.named = sorted((networks | {args.test}) - {"", None})  # files of the user that make the numbers
        self.out, self.commit, self.torch = Path(args.out), data.git_commit(), str(torch.__version__)
        self.done, self.rows, self.facts = {}, [], {}  # steps done of each stage; rows of metrics.csv; for result.json
        self.kept, self.terms, self.samples, self.saved = {}, {}, None, None
        self.turn, self.fresh = 0, None  # fresh() -> batches of images that S was not trained on
        if args.resume and (self.out / "checkpoint.pt").is_file():
            self.resume()

    def resume(self):
        try:
            saved = data.load_tensors(self.out / "checkpoint.pt")
        except data.DataError:
            raise self.foreign() from None
        if not sound_checkpoint(saved):
            raise self.foreign()
        before, now = saved["settings"], self.settings
        for key in now | before:
            if before.get(key) != now.get(key) and key not in ("teacher_crc", "named_crc"):  # see `begin`
                raise RunError(f"{self.out}: began with {flag(key)} {before.get(key)}, now {now.get(key)}; "
                               f"give the same to resume")  # fmt: skip
        self.saved, self.done, self.rows = saved, saved["done"], saved["rows"]

    def complete(self):
        """Whether nothing is left to do: the files of a run with these very settings are there.

        A file that the flags name might be another now, and --export writes one more.
        """
        if self.named or self.args.teacher or self.args.export or self.done.get("student") != self.args.steps:
            return False
        try:
            data.finished(self.out)
        except data.DataError:
            return False
        needed = ("student.pt",) if self.args.method == "noise" else ("student.pt", "samples.png")
        return all((self.out / name).is_file() for name in needed)

    def foreign(self):
        return RunError(f"{self.out}/checkpoint.pt: damaged, or not this version's; begin elsewhere, with --out DIR")

    def begin(self, teacher, evaluate):
        """From here on the seconds count. A resumed run must have the same teacher; evaluate() -> accuracy of S."""
        self.teacher, self.evaluate = teacher, evaluate
        self.settings["teacher_crc"] = models.crc(teacher)
        if self.named:
            self.settings["named_crc"] = [zlib.crc32(Path(name).read_bytes()) for name in self.named]
        for key, what in (("teacher_crc", "teacher"), ("named_crc", f"content of {' or '.join(self.named)}")):
            if self.saved and self.saved["settings"].get(key) != self.settings.get(key):
                raise RunError(f"{self.out}: began with another {what}; give the same to resume")
        if self.saved and self.done.get("student") == self.args.steps:  # the record names what computed the numbers
            self.commit, self.torch = self.saved["commit"], self.saved["torch"]
        elif self.saved:
            commit, version = self.saved["commit"], self.saved["torch"]
            if commit != self.commit:
                print(f"{self.out}: began with commit {commit} of this program, goes on with {self.commit}")
            if version != self.torch:
                print(f"{self.out}: began with torch {version}, goes on with {self.torch}")
        if self.saved:
            print("resumed    after", ", ".join(f"{stage} step {done}" for stage, done in self.done.items()))
        elif self.args.resume:
            print(f"resumed    nothing, {self.out} holds no run yet")
        self.begun = time.perf_counter() - (self.saved["seconds"] if self.saved else 0)

    def keep(self, **parts):
        """Name what a checkpoint must hold: tensors, and all that has a state_dict. A resumed run gets it back here."""
        self.kept = {name: part for name, part in parts.items() if part is not None}
        if not self.saved:
            return
        try:
            pairs = [(part, self.saved["parts"][name]) for name, part in self.kept.items()]
            models.restore(pairs, self.saved["random"], self.args.device)
        except (LookupError, ValueError):
            raise self.foreign() from None
        self.saved = None

    def log(self, **terms):
        """Note loss terms of this round; nothing waits for the device here."""
        for name, value in terms.items():
            self.terms.setdefault(name, []).append((self.turn, value.detach()))

    def steps(self, stage, count, each=1):
        """Yield the numbers of a stage's rounds, from where a resumed run left off; a round is `each` of `count` steps.

        Between rounds it shows progress and, now and then, saves; in the student's stage it evaluates, too.
        """
        # a batch of images is long work: each is saved at once
        every = {"student": self.args.eval_every, "images": each}.get(stage, math.ceil(count / 20))
        first = self.done.get(stage, 0)
        begun = self.shown = time.perf_counter()
        for turn in range(math.ceil(first / each), math.ceil(count / each)):
            self.turn, self.where = turn, f"{stage:<10} {turn * each}/{count}"
            yield turn
            done = min((turn + 1) * each, count)
            saves = done // every > turn * each // every or done == count
            if saves:
                values = self.save(stage, done, each)
            elif self.due():
                values = {name: noted[-1][1].item() for name, noted in self.terms.items()}
            else:
                continue
            self.shown = time.perf_counter()
            rate = (done - first) / (self.shown - begun)
            text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            show(f"{stage:<10} {done}/{count}  eta {models.clock((count - done) / rate)}  {rate:.1f}/s  {text}", saves)

    def due(self):
        """Whether it is time to show something again: twice a second on a terminal, else every 15 seconds."""
        return time.perf_counter() - self.shown > (0.5 if sys.stdout.isatty() else 15)

    def tell(self, text):
        """Show what happens within a long round."""
        if self.due():
            self.shown = time.perf_counter()
            show(f"{self.where}  {text}", keep=False)

    def save(self, stage, done, each):
        """Check the losses since the last time, evaluate the student, save -> what to show."""
        means, bad = {}, []
        for name, noted in self.terms.items():
            turns, values = zip(*noted)
            values = torch.stack(values).cpu().double()
            means[name] = values.mean().item()
            bad += [(turn, value, name) for turn, value in zip(turns, values.tolist()) if not math.isfinite(value)]
        if bad:
            turn, value, name = min(bad, key=lambda found: found[0])  # NaN spreads: the first one tells the most
            where = f"{stage} step {turn * each + 1}" + (f" to {(turn + 1) * each}" if each > 1 else "")
            kept = f"; the last checkpoint is kept in {self.out}" if self.done else ""
            raise RunError(f"{name} became {value:.3g} at {where}; try lower learning rates and another --out{kept}")
        self.terms = {}
        accuracy = self.evaluate() if stage == "student" else None
        self.done[stage] = done
        self.rows.append(dict(stage=stage, step=done, accuracy=accuracy, seconds=round(self.seconds(), 1), **means))
        checkpoint = dict(settings=self.settings, done=self.done, rows=self.rows, seconds=self.seconds())
        checkpoint.update(commit=self.commit, torch=self.torch, random=models.random_state(self.args.device))
        checkpoint["parts"] = {k: v if isinstance(v, torch.Tensor) else v.state_dict() for k, v in self.kept.items()}
        data.save(self.out / "checkpoint.pt", checkpoint)
        self.show_files()
        return means if accuracy is None else dict(accuracy=accuracy, **means)

    def show_files(self):
        """Write what people look at: metrics.csv, samples.png."""
        data.write(self.out / "metrics.csv", data.csv_rows(self.rows))
        if self.samples:
            mean, std = data.mean_and_std(self.info, "cpu")
            data.write(self.out / "samples.png", data.png((self.samples().float().cpu() * std + mean).clamp(0, 1)))

    def seconds(self):
        return time.perf_counter() - self.begun

    def compared(self, batches):
        """Of batches: how often S (eval mode) predicts T's class, in percent; T's number of classes; their diversity.

        It comes after the last step and its checkpoint: what it draws, and what it changes in G, changes no result.
        """
        if not all(x.isfinite().all() for x in batches):  # no loss came after that step
            print("note: the generator or the memory became NaN in its last step; there are no figures of its images")
            return None, None, None
        student = self.kept["S"].eval()
        with torch.no_grad():
            t, s = (torch.cat([net(x) for x in batches]) for net in (self.teacher, student))
        same = (s.argmax(1) == t.argmax(1)).float().mean()
        diversity = generators.diversity_within_classes(torch.cat(batches), t)
        return 100 * same.item(), len(t.argmax(1).unique()), diversity.item()

    def finish(self, teacher_accuracy):
        """Write student.pt and, last of all, result.json -> the result."""
        args, memory, student = self.args, self.kept.get("memory"), self.kept["S"].state_dict()
        if not all(value.isfinite().all() for value in student.values()):
            raise RunError("the student became NaN in its last steps; try lower learning rates and another --out")
        self.show_files()  # once more: a kill may have come between the last checkpoint and them
        curve = [row["accuracy"] for row in self.rows if row["accuracy"] is not None]
        self.where = "agreement "
        agreement, classes, diversity = self.compared(self.fresh()) if self.fresh else (None, None, None)
        recalled = self.compared([memory.recall(args.batch, self.teacher) for _ in range(8)])[0] if memory else None
        result = dict(
            method=args.method, dataset=args.dataset, teacher=args.teacher_arch, student=args.student_arch,
            seed=args.seed, steps=args.steps, teacher_accuracy=teacher_accuracy,
            accuracy_last=curve[-1] if curve else None, accuracy_max=max(curve, default=None),
            accuracy_mean=statistics.fmean(curve) if curve else None,
            accuracy_variance=statistics.pvariance(curve) if curve else None,
            agreement_fresh=agreement, classes_fresh=classes, classes=self.info.classes, agreement_memory=recalled,
            diversity=diversity, replay_bytes=memory.bytes() if memory else 0, transfer_set=self.facts or None,
            seconds=self.rows[-1]["seconds"], args=self.settings, torch_version=self.torch,
            git_commit=self.commit,
        )  # fmt: skip
        data.save(self.out / "student.pt", {k: v.cpu() for k, v in student.items()})
        data.write(self.out / "result.json", (json.dumps(result, indent=2) + "\n").encode())
        return result


def sound_checkpoint(saved):
    """Whether this has the form of a checkpoint; what its parts hold is seen when they are loaded."""
    fields = dict(settings=dict, done=dict, rows=list, seconds=float, commit=(str, type(None)), torch=str, parts=dict,
                  random=dict)  # fmt: skip
    if not isinstance(saved, dict) or not fields.keys() <= saved.keys():
        return False
    settings, rows, plain = saved["settings"], saved["rows"], (str, int, float, tuple, list, type(None))
    if not all(isinstance(saved[key], kind) for key, kind in fields.items()) or not saved["seconds"] >= 0:
        return False
    if not all(isinstance(row, dict) and {"stage", "step", "accuracy", "seconds"} <= row.keys() for row in rows):
        return False
    values = [*settings.values(), *saved["done"].values(), *(value for row in rows for value in row.values())]
    if not all(isinstance(value, plain) for value in values) or not all(isinstance(key, str) for key in settings):
        return False
    kinds = dict(stage=(str,), seconds=(float,), accuracy=(float, type(None)))
    if not all(type(row[key]) in kind for row in rows for key, kind in kinds.items()):
        return False
    steps = {row["stage"]: row["step"] for row in rows}
    return steps == saved["done"] and all(type(step) is int and step > 0 for step in steps.values())


def show(line, keep):
    """Print a progress line; on a terminal, one that is not to be kept is overwritten by the next."""
    if sys.stdout.isatty():
        # of a line that wraps, only the last row would be overwritten; 4: room for Ctrl-C's ^C
        line = in_rows(line) if keep else line[: columns() - 4]
        print(f"\r\x1b[K{line}", end="\n" if keep else "", flush=True)
    else:
        print(line, flush=True)


def in_rows(line):
    """The line, wrapped as the terminal is wide, where two spaces stand; a name and its value have one between them."""
    parts = re.sub("(?<! ) (?! )", "\0", line)
    whole = dict(break_on_hyphens=False, break_long_words=False)
    return textwrap.fill(parts, columns() - 1, subsequent_indent=" " * 11, **whole).replace("\0", " ")


def columns():
    """The width of the terminal; 80 without one."""
    return max(20, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 80


# ---------------------------------------------------------------- the command line


def flag(key):
    """An argument's name as it stands on the command line."""
    return f"--{key.replace('_', '-')}"


def typed(key, args):
    """An argument's name as it was given: `--no-balanced` where its value is False."""
    return flag(f"no_{key}" if getattr(args, key) is False else key)


def number(kind, least, most=None, auto=False):
    """argparse's type for a number of this kind within these bounds, or for the word `auto`."""
    most = most or {int: 2**31 - 1, float: 1e30}[kind]

    def parse(text):
        if auto and text == "auto":
            return text
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # argparse says "invalid number value"
    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parser():
    top = Parser(
        prog="dfkd.py", allow_abbrev=False,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=26),
        usage="dfkd.py [--method METHOD] [--dataset NAME] [FLAGS]",
        description="Distil a trained teacher into a smaller student without its data.",
        epilog="A run prints its schedule first. All schedules stand at the top of dfkd.py.",
    )  # fmt: skip
    switch = argparse.BooleanOptionalAction

    add = top.add_argument_group("what to distil").add_argument
    add("--method", choices=SCHEDULES, default="rdskd", metavar="NAME",
        help=f"{', '.join(SCHEDULES)} (default: rdskd)")
    add("--dataset", choices=data.INFO, metavar="NAME", help=f"{', '.join(data.INFO)} (default: glyphs, drawn here)")
    add("--data-dir", default="datasets", metavar="DIR",
        help="folder of the data sets' folders and downloads (default: datasets)")
    add("--teacher", metavar="FILE", help="its state dict (default: one is trained here)")
    add("--teacher-arch", metavar="NAME", help=f"{', '.join(models.NAMES)}, any wrn-D-K, or FILE.py:NAME")
    add("--student-arch", metavar="NAME", help="the student's (default: as the papers have it)")
    add("--no-eval", action="store_true", help="touch no data set and measure nothing: for --teacher")
    add("--export", metavar="FILE.pt2", help="the student as torch.export.save writes it")

    add = top.add_argument_group("a teacher without a data set: needs --teacher and --teacher-arch").add_argument
    add("--num-classes", type=number(int, 2), metavar="K", help="its classes (default: FILE.py:NAME's, or 10)")
    add("--channels", type=number(int, 1, 1000), metavar="C", help="of its images (default: as --mean has, or 3)")
    add("--image-size", type=number(int, 8, 1024), metavar="N", help="their side, a multiple of 4 (default: 32)")
    add("--mean", type=number(float, 0, 1), nargs="+", metavar="M", help="of its pixels, per channel (default: 0.5)")
    add("--std", type=number(float, 1e-3), nargs="+", metavar="S", help="their deviation (default: 0.25)")
    add("--test", metavar="FILE.npz", help="images and labels that measure; see README.md")

    add = top.add_argument_group("schedule").add_argument
    add("--schedule", choices=("default", "paper"), default="default", metavar="NAME",
        help="default: ours, minutes on a CPU for grey images; paper: as published")
    add("--steps", type=number(int, 1), metavar="N", help="steps of the student, rounded up to whole rounds")
    add("--student-steps", type=number(int, 1), metavar="N", help="student steps for each step of G (dafl, mskd, pre)")
    add("--generator-steps", type=number(int, 1), metavar="N", help="steps of G before the student's first (rdskd)")
    add("--batch", type=number(int, 2), metavar="N", help="images per step")
    add("--latent", type=number(int, 1), metavar="D", help="dimension of the generator's latents z")
    add("--width", type=number(int, 2), metavar="N", help="channels of G's first convolution; the next has half")
    add("--generator-lr", type=number(float, 1e-12), metavar="LR", help="learning rate of the generator")
    add("--student-lr", type=number(float, 1e-12), metavar="LR", help="learning rate of the student")
    add("--student-optimiser", choices=("adam", "sgd"), metavar="NAME",
        help="adam, or sgd: momentum 0.9, weight decay 5e-4")
    add("--student-decay", choices=("none", "cosine", "cycle", "drops"), metavar="NAME", help="of its rate: none; "
        f"cosine to 0; cycle, 15 %% up, then down; drops to a tenth at {800 * EPOCH}, {1600 * EPOCH}")  # fmt: skip
    add("--decay-every", type=number(int, 1), metavar="N", help="student steps between moves of the cosine (pre)")
    add("--terms", nargs="+", choices=TERMS, metavar="L", help=f"rdskd: terms of L_G, of {' '.join(TERMS)}")
    add("--penalty", choices=("exp", "sum"), metavar="NAME", help="rdskd: exp of what L_oh, L_ie increase, or sum")
    add("--temperature", type=number(float, 1e-6, 1e6), metavar="TAU", help="of L_kd and of soft labels")
    add("--loss-weights", type=number(float, 0), nargs="+", metavar="A", help="dafl, pre: L_oh, L_ie, L_a; mskd: "
        "L_ms in place of L_a; soft-target: L_a; deepinversion: TV, L2, BatchNorm")  # fmt: skip
    add("--images", type=number(int, 8), metavar="N", help="in the transfer set of methods that optimise them")
    add("--image-batch", type=number(int, 8), metavar="N", help="images that are optimised together")
    add("--image-steps", type=number(int, 1), metavar="N", help="steps that optimise an image, at most")
    add("--image-lr", type=number(float, 1e-12), metavar="LR", help="learning rate of the images")
    add("--ours", nargs="*", choices=OURS, metavar="NAME", help=f"our additions that are on, none without a "
        f"name: {' '.join(OURS)}; for generators: range, augment")  # fmt: skip
    add("--layer", choices=("auto", "fc2", "logits"), metavar="NAME",
        help="soft-target models its outputs: auto, fc2, logits")
    add("--sigma", type=number(float, 1e-6, 1e6, auto=True), metavar="S",
        help=f"their deviation (auto: the teacher's L_oh is {FEATURE_L_OH})")
    add("--eval-every", type=number(int, 1), metavar="N", help="student steps between evaluations (default: a 25th)")

    add = top.add_argument_group("replay, for methods with a generator").add_argument
    add("--replay", choices=("none", "vae", "bank"), metavar="NAME", help="of earlier samples: none, vae, bank")
    add("--memory-latent", type=number(int, 1), metavar="D", help="latent dimension of the VAE")
    add("--memory-width", type=number(int, 2), metavar="N", help="channels of the VAE's widest convolution")
    add("--memory-lr", type=number(float, 1e-12), metavar="LR", help="learning rate of the VAE")
    add("--latent-lr", type=number(float, 1e-12), metavar="LR", help="of balanced inference's step on latents")
    add("--bank-size", type=number(int, 1), metavar="N", help="images that the bank holds at most")
    add("--teacher-term", action=switch, help="the teacher's outputs in the VAE's L_rec")
    add("--balanced", action=switch, help="category-balanced inference of memory samples")

    add = top.add_argument_group("the teacher that is trained here").add_argument
    add("--teacher-epochs", type=number(int, 1), metavar="N", help="epochs over the real training images")
    add("--teacher-seed", type=number(int, 0), metavar="N", help="its seed (default: 0)")
    add("--teacher-dir", default="runs/teachers", metavar="DIR", help="where trained teachers are kept")

    add = top.add_argument_group("the run").add_argument
    add("--seed", type=number(int, 0), default=0, metavar="N", help="seed of the distillation (default: 0)")
    add("--out", metavar="DIR", help="for the results (default: runs/DATASET-METHOD-SEED)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), metavar="NAME",
        help="cpu, cuda, or auto: a GPU if there is one")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), metavar="NAME",
        help="bf16, fp32, or auto: bf16 if the processor has it")
    add("--threads", type=number(int, 1, 1024), metavar="N", help="of the CPU; another number gives other results")

    group = top.add_argument_group("finished runs: distil nothing")
    add, add_one = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add_one("--plot", nargs="+", metavar="RUN", help="draw accuracies into --out (runs/curves.svg)")
    add("--over", choices=("steps", "minutes"), help="what --plot draws them over (default: steps)")
    add_one("--pictures", nargs="+", metavar="RUN", help="put samples into --out (runs/samples.svg)")
    add_one("--table", nargs="+", metavar="RUN", help="print a row for runs that differ in the seed alone")
    return top


def parse(argv):
    """The arguments, with the schedule's numbers filled in and `auto` decided, but for --layer and --sigma."""
    top = parser()
    given = vars(top.parse_args(argv))  # several values are a tuple, as in the schedules
    args = argparse.Namespace(**{key: tuple(v) if isinstance(v, list) else v for key, v in given.items()})
    for key, value in given.items():
        if value == "" or value == [""]:  # of a shell variable that is not set
            top.error(f"{flag(key)} is empty")
    for job, its in dict(plot=("plot", "over", "out"), pictures=("pictures", "out"), table=("table",)).items():
        if given[job]:
            for key in given:
                if key not in its and given[key] != top.get_default(key):
                    top.error(f"{typed(key, args)} means nothing to --{job}, which distils nothing")
            if args.out and not file_to_write(args.out, ".svg"):
                what = "a folder" if os.path.isdir(args.out) else "no file of this kind"
                top.error(f"--out {args.out}: {what}; give a FILE.svg")
            return args
    if args.over:
        top.error("--over means nothing without --plot")
    try:
        name_data(args, top.error)
        if args.export:
            check_export(args, top.error)
        name_networks(args, top.error)
    except OSError as error:  # a name that is too long, a folder that may not be entered
        top.error(f"{error.filename}: {error.strerror}")
    fill_schedule(args, top.error)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif args.device == "cuda" and not torch.cuda.is_available():
        top.error("--device cuda: torch sees no GPU here")
    if args.precision == "auto":
        args.precision = "bf16" if models.fast_bf16(args.device) else "fp32"
    args.threads = args.threads or torch.get_num_threads()
    args.out = args.out or f"runs/{args.dataset}-{args.method}-{args.seed}"
    if os.path.lexists(args.out) and not os.path.isdir(args.out):
        top.error(f"--out {args.out}: a file; give a folder")
    return args


def file_to_write(path, suffix):
    """Whether `path` names a file of this kind, and is neither a folder nor a device."""
    return Path(path).suffix == suffix and (os.path.isfile(path) or not os.path.exists(path))


DESCRIPTION = ("num_classes", "channels", "image_size", "mean", "std", "test")  # of a teacher without a data set


def name_data(args, error):
    """The data set by name, or `own` for somebody's own teacher."""
    own = ":" in (args.teacher_arch or "")
    if own and not args.teacher:
        error(f"--teacher-arch {args.teacher_arch}: it is not trained here, give --teacher FILE")
    given = [flag(key) for key in DESCRIPTION if getattr(args, key)]
    if own and not args.dataset:
        given.append("--teacher-arch")
    if given:
        if not args.teacher or not args.teacher_arch:
            error(f"{given[0]} describes your own teacher: give --teacher FILE and --teacher-arch NAME")
        if args.dataset or args.method == "kd":
            error(f"{given[0]} is for a teacher without a data set: no --dataset, no --method kd")
        if args.no_eval and args.test:
            error("--no-eval measures nothing, --test FILE does: give one of them")
        args.dataset, args.no_eval = "own", not args.test
        if (args.mean is None) != (args.std is None):
            error("--mean and --std: give both, as your images were normalised")
        args.channels = args.channels or (len(args.mean) if args.mean else 3)
        args.image_size = args.image_size or 32
        args.mean, args.std = args.mean or (0.5,) * args.channels, args.std or (0.25,) * args.channels
        if args.image_size % 4:
            error(f"--image-size {args.image_size} is no multiple of 4")
        if not len(args.mean) == len(args.std) == args.channels:
            error(f"--mean and --std: {len(args.mean)} and {len(args.std)} numbers for {args.channels} channels")
        if args.test and not Path(args.test).is_file():
            error(f"--test {args.test}: no file there")
    args.dataset = args.dataset or "glyphs"
    if args.no_eval and not args.teacher:
        error("--no-eval touches no data, so that no teacher can be trained: give --teacher FILE")
    if args.no_eval and args.method == "kd":
        error("--method kd distils on real images, --no-eval touches none")
    if args.teacher and not Path(args.teacher).is_file():
        error(f"--teacher {args.teacher}: no file there")
    for key in ("teacher_epochs", "teacher_seed"):
        if args.teacher and getattr(args, key) is not None:
            error(f"{flag(key)} means nothing with --teacher FILE, which is trained")
    args.teacher_seed = args.teacher_seed or 0
    args.teacher_epochs = args.teacher_epochs or TEACHER_EPOCHS.get(args.dataset)


def check_export(args, error):
    export = Path(args.export)
    if not file_to_write(export, ".pt2") or not os.access(export.parent, os.W_OK):
        error(f"--export {args.export}: give a FILE.pt2 in a folder that is there and can be written")
    if args.teacher and export.exists() and export.samefile(args.teacher):
        error(f"--export {args.export}: is the teacher's file; give another")


def name_networks(args, error):
    """Which networks; they are built once to see that they fit the images and, for an own teacher, its classes."""
    key, args.teacher_arch = "teacher_arch", args.teacher_arch or TEACHERS[args.dataset]
    try:
        teacher = models.tried(args.teacher_arch, data_info(args))
        if args.dataset == "own":
            args.num_classes = teacher.classes
        if isinstance(teacher, models.Own):
            teacher.check_that_it_teaches()
            check_method(teacher, args.method)
        key, args.student_arch = "student_arch", args.student_arch or STUDENTS.get(args.teacher_arch)
        if not args.student_arch:
            error(f"--teacher-arch {args.teacher_arch} has no usual student: give --student-arch NAME")
        student = models.tried(args.student_arch, data_info(args))
        if isinstance(student, models.Own):
            held = [set(map(id, [*net.parameters(), *net.buffers()])) for net in (teacher, student)]
            if held[0] & held[1]:
                error(f"--student-arch {args.student_arch}: gives the teacher's very network, or a part of it; make a "
                      f"new one each time")  # fmt: skip
            student.check_that_it_trains()
            if args.export:  # an error now, not after the run
                models.exported(student, data_info(args))
    except (ValueError, models.NetworkError) as problem:
        error(f"{flag(key)}: {problem}")
    if args.layer == "fc2" and teacher.modelled != "fc2":
        error(f"--layer fc2: {args.teacher_arch} has no such layer, only logits")


def check_method(teacher, method):
    """Raises NetworkError if the method needs more of the user's network than it has."""
    problem, layers = None, [m for m in teacher.modules() if isinstance(m, generators.BATCH_NORM)]
    if method in ("pre", "dafl", "soft-target", "zskd") and teacher.last is None:
        problem = f"no nn.Linear is called in it, and --method {method} needs the last one; take rdskd or mskd"
    elif method in ("soft-target", "zskd") and not teacher.ends_there:
        problem = (f"its logits are not what its last nn.Linear, {teacher.last}, gives, and --method {method} needs "
                   f"that; take another method")  # fmt: skip
    elif method == "deepinversion" and any(m.running_mean is None for m in layers):
        problem = "its BatchNorm has no running statistics, which deepinversion needs; take another method"
    if problem:
        raise models.NetworkError(f"{teacher.name}: {problem}")


def data_info(args):
    """What the run may know of the data: of the data set by name, or the shape of somebody's own teacher."""
    if args.dataset == "own":
        return data.Info(args.num_classes, args.channels, args.mean, args.std, size=args.image_size)
    return data.INFO[args.dataset]


def scheduled(args):
    """The numbers of this method's schedule for this data."""
    column = "natural" if data_info(args).channels == 3 else "mnist"
    if args.schedule == "paper":
        column = f"paper {column}"
    elif args.dataset == "glyphs":
        column = "glyphs"
    numbers = {key: values[COLUMNS.index(column)] for key, values in SCHEDULES[args.method].items()}
    if (args.method, args.schedule, args.dataset) == ("rdskd", "paper", "svhn"):
        numbers["student_decay"] = "none"  # [C]
    return numbers


# Flags that mean nothing unless another has this value.
NEEDS = {key: ("replay", "vae") for key in REPLAY if key != "replay"}
NEEDS |= {"bank_size": ("replay", "bank"), "latent_lr": ("balanced", True), "decay_every": ("student_decay", "cosine")}


def lacking(key, args):
    """What this flag needs and the run does not have, as a flag; None where nothing is lacking."""
    if key not in NEEDS:
        return None
    other, value = NEEDS[key]
    if getattr(args, other) != value:
        return flag(other) if value is True else f"{flag(other)} {value}"
    return lacking(other, args)


def fill_schedule(args, error):
    """Fill in what was not given; refuse flags that mean nothing to the method."""
    if args.schedule == "paper" and args.method in ("mskd", "noise", "kd"):
        error(f"--schedule paper: no schedule of --method {args.method} is published")
    numbers = scheduled(args)
    keys = dict.fromkeys(key for schedule in SCHEDULES.values() for key in schedule)
    given = [key for key in keys if getattr(args, key) is not None]
    for key in keys.keys() - given:
        setattr(args, key, numbers.get(key))
    for key in given:
        text = typed(key, args)
        if key not in numbers:
            error(f"{text} means nothing to --method {args.method}")
        needed = lacking(key, args)
        if needed:
            error(f"{text} means nothing without {needed}")
    usual = len(numbers.get("loss_weights", ()))
    if args.loss_weights and len(args.loss_weights) != usual:
        error(f"--loss-weights: --method {args.method} has {usual} of them, not {len(args.loss_weights)}")
    of_images = tuple(name for name in OURS if name != "scale")
    known = {"soft-target": OURS, "zskd": of_images, "deepinversion": of_images}.get(args.method, ("range", "augment"))
    for name in args.ours or ():
        if name not in known:
            error(f"--ours {name} means nothing to --method {args.method}")
    for key, names in (("ours", OURS), ("terms", TERMS)):  # in any order, and the same run
        if getattr(args, key):
            setattr(args, key, tuple(name for name in names if name in getattr(args, key)))
    if "penalty" in given and args.terms == ("ds",):
        error("--penalty means nothing to L_ds alone: it is for L_oh and L_ie")
    if "student_decay" in given and args.student_decay == "drops" and args.steps <= 800 * EPOCH:
        error(f"--student-decay drops: the first drop, at step {800 * EPOCH}, comes after --steps {args.steps}")
    each = args.student_steps or 1  # rounds are whole, and evaluations fall between them
    args.steps = each * math.ceil(args.steps / each)
    args.eval_every = each * math.ceil((args.eval_every or math.ceil(args.steps / 25)) / each)


# ---------------------------------------------------------------- one whole run

# Flags that may differ when a run goes on: they change no number.
MAY_CHANGE = ("out", "resume", "data_dir", "teacher_dir", "teacher", "export", "plot", "over", "pictures", "table")


def distil(args):
    """One whole run: data for teacher and evaluation, teacher, distillation, results."""
    models.set_up_torch(args.threads, args.device)
    out, info = Path(args.out), data_info(args)
    images = "your images" if args.dataset == "own" else args.dataset
    threads = f"{args.threads} thread{'s' if args.threads > 1 else ''}"
    print(f"{args.method}: {args.teacher_arch} -> {args.student_arch} on {images}, seed {args.seed}, {args.device}, "
          f"{threads}, {args.precision}")  # fmt: skip
    print(f"results    {out}/")
    print(schedule_text(args), flush=True)
    if args.teacher:
        print(what_it_takes(args, info), flush=True)
    if not repeatable(args):
        print("note: on a GPU this command does not give the same bits again (--ours augment)")
        warnings.filterwarnings("ignore", "grid_sampler_2d_backward_cuda")  # torch says it in three lines
    with data.claimed(out, FILES, args.resume):
        run = Run(args, info)
        if run.complete():
            print(f"files      {out}/: the run is finished, nothing is left to do")
            return
        real, test = None, None
        if args.test:
            test = [v.to(args.device) for v in data.test_set(Path(args.test), info)]
        elif not args.no_eval:
            real = data.Data(*(v.to(args.device) for v in data.load(args.dataset, args.data_dir)))
            test = real.test_images, real.test_labels
        teacher = get_teacher(args, info, real)
        if isinstance(teacher, models.Own):
            check_method(teacher, args.method)  # again, with the weights of the file
            if teacher.last is not None:
                print(f"features   what the teacher's last nn.Linear, '{teacher.last}', reads")
        torch.manual_seed(args.seed)
        student = models.on_device(args.student_arch, info, args.device, args.precision)
        if torch.initial_seed() != args.seed:
            torch.manual_seed(args.seed)  # the user's network has set another one

        def evaluate(net):
            return None if test is None else models.accuracy(net, *test, info)

        teacher_accuracy = evaluate(teacher)
        run.begin(teacher, lambda: evaluate(student))
        try:
            if args.method == "kd":
                run.samples = lambda: data.normalise(real.train_images[:64], info)
                on_images(real_images(real, info, args), teacher, student, args, run)
            else:
                LOOPS[args.method](teacher, student, info, args, run)
            summary(run.finish(teacher_accuracy), out)
            if args.export:
                data.write(Path(args.export), models.exported(student, info))
                print(f"exported {args.export}")
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the same command with --resume goes on from {out}" if run.done else "") from None


def repeatable(args):
    """Whether this command gives the same bits again: on a GPU, the gradient of grid_sample has no fixed order."""
    return args.device == "cpu" or not args.images or "augment" not in args.ours


def schedule_text(args):
    """The numbers of the run, as flags."""
    flags = []
    for key in SCHEDULES[args.method]:
        value = getattr(args, key)
        if lacking(key, args):
            continue
        if isinstance(value, bool):
            flags.append(typed(key, args))
        else:
            flags.append(f"{flag(key)} {' '.join(map(str, value)) if isinstance(value, tuple) else value}".strip())
    return in_rows("schedule   " + "  ".join(flags))


def what_it_takes(args, info):
    """The images that the teacher of --teacher FILE is taken to know, which its file does not say."""
    mean, std = (" ".join(f"{v:.4g}" for v in values) for values in (info.mean, info.std))
    where = "--mean, --std" if args.dataset == "own" else f"--dataset {args.dataset}"
    return f"images     normalised with mean {mean}, deviation {std}: of {where}"


def get_teacher(args, info, real):
    """The teacher of --teacher FILE; else the one trained here before with the same settings; else a new one."""
    if args.teacher:
        return models.load(Path(args.teacher), args.teacher_arch, info, args.device, args.precision)
    return models.trained(Path(args.teacher_dir), args.dataset, args.teacher_arch, real, info, args.teacher_epochs,
                          args.teacher_seed, args.precision, show)  # fmt: skip


def real_images(real, info, args):
    """What `kd` learns on, the one method that is not data-free: batches of real training images."""
    count = len(real.train_images)

    def draw():
        x = real.train_images[torch.randint(count, (args.batch,), device=args.device)]
        return data.normalise(data.cropped_and_mirrored(x) if info.mirror else x, info)

    return draw


def summary(result, out):
    print()
    if result["teacher_accuracy"] is not None:
        evaluations = math.ceil(result["steps"] / result["args"]["eval_every"])
        print(f"teacher  {result['teacher']:<12} {result['teacher_accuracy']:.2f} %")
        print(f"student  {result['student']:<12} {result['accuracy_last']:.2f} % at the last step")
        print(f"         over all {evaluations} evaluations: mean {result['accuracy_mean']:.2f} %, "
              f"variance {result['accuracy_variance']:.2f}, maximum {result['accuracy_max']:.2f} %")  # fmt: skip
    else:
        print("student  not evaluated: no image with a label was looked at")
    if result["agreement_fresh"] is not None:
        print(f"         it agrees with the teacher on {result['agreement_fresh']:.1f} % of fresh synthetic images")
        if result["classes_fresh"] < min(result["classes"], 10):  # then a high agreement says little
            print(f"         in these, the teacher sees {result['classes_fresh']} of its {result['classes']} classes")
    if result["agreement_memory"] is not None:
        print(f"         it agrees with the teacher on {result['agreement_memory']:.1f} % of memory samples")
    made = result["transfer_set"]
    if made:
        agreement, strayed = 100 * made["agreement"], 100 * made["strayed"]
        print(f"images   {made['images']}: the teacher puts {agreement:.1f} % of them into their label's top class")
        if strayed:
            print(f"         {strayed:.1f} % of the labels favour another class than the intended one")
    memory = models.peak_memory(result["args"]["device"])
    print(f"time     {models.clock(result['seconds'])} for the distillation; memory {memory} at the peak")
    print(f"files    {out}/: {', '.join(name for name in FILES if (out / name).exists())}")


def only_runs(folders):
    """The folders without those in which no run has written anything, as runs/teachers of runs/*."""
    runs = [name for name in folders if not os.path.isdir(name) or any((Path(name) / file).exists() for file in FILES)]
    if not runs:
        return folders  # an error says why
    for name in folders:
        if name not in runs:
            print(f"dfkd.py: {name}: left out, there is no run in it", file=sys.stderr)
    return runs


def drawn_runs(args):
    """The picture that --plot or --pictures asks for."""
    if args.pictures:
        samples = [(data.without_seed(run), Path(run) / "samples.png") for run in only_runs(args.pictures)]
        return data.svg_samples(samples)
    over_minutes, curves = args.over == "minutes", []
    for run in only_runs(args.plot):
        curve = data.finished(Path(run)).curve
        points = [(minutes if over_minutes else step, accuracy) for step, minutes, accuracy in curve]
        curves.append((data.without_seed(run), points))
    return data.svg_curves(curves, "minutes" if over_minutes else "student step")


def out_of_memory(error):
    texts = ("DefaultCPUAllocator", "size calculation overflowed")  # torch has no class of its own for CPU memory
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in texts)


def line_of(error):
    """What the user sees of an error; None for a mistake of this program, which keeps its traceback."""
    if isinstance(error, (RunError, models.NetworkError, data.DataError)):
        return str(error)
    # a CUDA graph whose recording runs out of memory ends with an error of its own, in the other's place
    if out_of_memory(error) or out_of_memory(error.__context__):
        return "out of memory: give a smaller --batch, --width, --latent, --image-batch or --bank-size"
    problem = models.own_failure(error)
    if problem is None and isinstance(error, OSError):
        problem = f"{error.filename or 'standard output'}: {error.strerror or error}"
    return problem


def main(argv=None):
    args = parse(argv)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it is closed
    if isinstance(sys.stdout, io.TextIOWrapper):
        # --table has Greek letters, which not every encoding has; a folder's name may be in none
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.default_int_handler)
    try:
        if args.plot or args.pictures:
            picture = Path(args.out or f"runs/{'curves' if args.plot else 'samples'}.svg")
            picture.parent.mkdir(parents=True, exist_ok=True)
            data.write(picture, drawn_runs(args))
            print(f"drawn: {picture}")
        elif args.table:
            print(data.results_table(only_runs(args.table)))
        else:
            distil(args)
        sys.stdout.flush()  # where a closed pipe is one line
        return 0
    except (Exception, SystemExit) as error:
        problem, code = line_of(error), 1
        if problem is None:
            raise
        if isinstance(error, OSError) and error.filename is None:
            sys.stdout = open(os.devnull, "w")  # else Python tries again at its end, and complains
    except KeyboardInterrupt as stop:
        if __name__ == "__main__":  # the end is short: a second Ctrl-C would only make it untidy
            for kind in (signal.SIGINT, signal.SIGTERM):
                signal.signal(kind, signal.SIG_IGN)
        problem, code = f"stopped; {stop if str(stop) else 'run the same command again'}", 130
    # on a terminal, in the place of the progress line and of Ctrl-C's ^C
    start = "\r\x1b[K" if sys.stderr and sys.stderr.isatty() else ""
    print(f"{start}dfkd.py: {problem}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
