"""Data-free knowledge distillation: teach a small network what a trained one knows, without any data.

    python dfkd.py --method rdskd                                        # digits drawn here, three minutes on a CPU
    python dfkd.py --method rdskd --dataset mnist --schedule paper       # the authors' own schedule
    python dfkd.py --method rdskd --dataset mnist --teacher FILE --no-eval   # a teacher and nothing else

The order of this file: schedules, the distillation loops, teachers, the run (evaluation, checkpoints, results), the
command line. The losses are in generators.py, the networks in models.py, the real images in data.py; the loops get
a teacher and no data.
"""

import argparse
import csv
import html
import io
import itertools
import json
import os
import re
import signal
import statistics
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

import torch
import torch.nn.functional as F

import data
import generators
import models
import replay
from data import write

# ---------------------------------------------------------------- schedules

EPOCH = 120  # iterations that RDSKD's and DAFL's code call an epoch

# Every number of a method, as flags without their dashes; a flag on the command line overrides it.
# `default` is ours: minutes on two CPU cores. `paper` is the authors' own for MNIST: RDSKD, DAFL, PRE-DFKD, ZSKD [C];
# soft-target's sigma, tau and lambda_a [P], its sizes ZSKD's; DeepInversion's, found for CIFAR-10 [C]. A further entry holds what
# differs for one data set, or for `natural` images, those with three channels; there, `default` is a guess for a GPU. What the
# papers leave open is ours [I]: PRE-DFKD's Adam lr of S and its cosine's step; RDSKD on CIFAR-100; of the transfer sets the
# batch, the lr, the early stop, the augmentation, the scale of CE beside lambda_a, S's optimiser and steps; DeepInversion's
# L2, tau and number of images; all of MSKD; the controls.
# temperature 0 stands for PRE-DFKD's mean |S(x) - T(x)|.
FAST = dict(batch=64, student_optimiser="adam", student_lr=1e-2, student_decay="cycle")  # the best for LeNets in our trials
ADAM = dict(student_optimiser="adam", student_lr=2e-3, student_decay="none")
SGD = dict(student_optimiser="sgd", student_lr=0.1)
LARGE = dict(batch=256, student_lr=2e-3)  # FAST for networks larger than LeNets
NATURAL = dict(batch=256, latent=256, width=128, steps=30_000, student_decay="cosine")
TRANSFER = dict(images=12_000, image_batch=500, image_steps=100, image_lr=0.1, steps=20_000, temperature=20.0, **FAST)
TRANSFER_PAPER = {**TRANSFER, "images": 24_000, "image_steps": 1500, "steps": 60_000}
CONTROL = dict(steps=12_000, temperature=10.0, **FAST)
SCHEDULES = {
    "rdskd": {
        "default": dict(latent=100, width=64, generator_steps=1000, generator_lr=1e-3, steps=5000, temperature=10.0, **FAST),
        "default mnist": dict(steps=12_000),
        "default natural": dict(NATURAL, generator_steps=2400, student_lr=2e-3),
        "paper": dict(
            batch=512, latent=100, width=128, generator_steps=20 * EPOCH, generator_lr=1e-3, steps=1000 * EPOCH,
            temperature=10.0, eval_every=10 * EPOCH, **ADAM,
        ),
        "paper natural": dict(latent=1000),
        "paper cifar10": dict(student_decay="drops"),
        "paper cifar100": dict(student_decay="drops"),
    },
    "pre": {
        "default": dict(
            latent=100, width=48, generator_lr=0.02, loss_weights=(1, 5, 0.1), student_steps=10, steps=4000, temperature=0.0,
            replay="vae", **FAST,
        ),
        "default natural": dict(NATURAL, **SGD),
        "paper": dict(
            batch=1024, latent=1000, width=128, generator_lr=0.02, loss_weights=(1, 5, 0.1), student_steps=10,
            steps=400 * 36 * 10, temperature=0.0, replay="vae", memory_latent=1000, memory_width=128, eval_every=36 * 10,
            **{**ADAM, "student_decay": "cosine"},
        ),
        "paper natural": SGD,
    },
    "soft-target": {
        "default": dict(layer="auto", sigma="auto", loss_weights=(0.05,), **TRANSFER),
        "paper": dict(layer="auto", sigma=1.5, loss_weights=(0.05,), **TRANSFER_PAPER),
        "default natural": LARGE,
        "paper natural": dict(images=40_000, sigma=2.0, loss_weights=(0.1,), **LARGE),
    },
    "dafl": {
        "default": dict(
            latent=100, width=48, generator_lr=0.02, loss_weights=(1, 5, 0.1), student_steps=5, steps=4000, temperature=10.0,
            **FAST,
        ),
        "default natural": dict(NATURAL, loss_weights=(0.05, 5, 0.01), **SGD),
        "paper": dict(
            batch=512, latent=100, width=128, generator_lr=0.2, loss_weights=(1, 5, 0.1), student_steps=1,
            steps=200 * EPOCH, temperature=1.0, eval_every=EPOCH, **ADAM,
        ),
        "paper natural": dict(
            batch=1024, latent=1000, generator_lr=0.02, loss_weights=(0.05, 5, 0.01), steps=2000 * EPOCH,
            student_decay="drops", **SGD,
        ),
    },
    "zskd": {
        "default": TRANSFER, "default natural": LARGE, "paper": TRANSFER_PAPER,
        "paper natural": dict(images=40_000, **LARGE),
    },
    "deepinversion": {
        "default": dict(TRANSFER, image_batch=256, loss_weights=(1e-3, 0.0, 10.0)),
        "default natural": dict(image_steps=500, **LARGE),
        "paper": dict(TRANSFER_PAPER, image_batch=256, image_steps=2000, images=40_000, loss_weights=(1e-3, 0.0, 10.0)),
        "paper natural": LARGE,
    },
    "noise": {"default": CONTROL, "default natural": LARGE, "paper": CONTROL, "paper natural": LARGE},
}  # fmt: skip
SCHEDULES["mskd"], SCHEDULES["kd"] = SCHEDULES["dafl"], SCHEDULES["noise"]
# Replay, for every method with a generator. PRE-DFKD's lr of G is 0.02: the VAE has 1/40 of it, the latents all of it [C].
# The VAE's size is ours: below the paper's 2.1 MB.
MEMORY = dict(
    replay="none", memory_latent=32, memory_width=32, memory_lr=0.02 / 40, latent_lr=0.02, bank_size=4096,
    teacher_term=True, balanced=True,
)  # fmt: skip

TEACHERS = {
    "glyphs": "lenet5", "mnist": "lenet5", "fashion-mnist": "lenet5", "svhn": "wrn-40-2", "cifar10": "resnet34",
    "cifar100": "resnet34",
}  # fmt: skip
STUDENTS = {"lenet5": "lenet5_half", "alexnet": "alexnet_half", "resnet34": "resnet18", "wrn-40-2": "wrn-16-1", "wrn-16-2": "wrn-16-1"}
TEACHER_EPOCHS = {"glyphs": 4, "mnist": 10, "fashion-mnist": 15, "svhn": 15, "cifar10": 30, "cifar100": 40}
TEACHER_BATCH = 128
CERTAINTY = 0.2  # of the teacher about soft-target synthesis's features, L_oh in nats: what decides sigma [I]


class RunError(Exception):
    """The run cannot go on: the message is the one line that the user sees."""


# ---------------------------------------------------------------- distillation: a teacher, and no data


def rdskd(args, teacher, student, run):
    """RDSKD [C]: train G alone on its objective; freeze it; train S on fresh images from it."""
    G, optimiser_G, optimiser_S, decay_S, memory = generative(args, student, run)
    reference = run.state.setdefault("reference", torch.zeros(2, device=args.device))  # L_oh', L_ie' start at 0 [C]

    for step in run.steps("generator", args.generator_steps):
        x = G(latents(args))
        t = teacher(x)
        L_G = generators.rdskd_loss(x, t, reference)
        minimise(L_G, optimiser_G)
        with torch.no_grad():
            L_oh, L_ie = generators.one_hot_loss(t), generators.information_entropy_loss(t)
            L_ds = generators.diversity_seeking_loss(x, t)
            if step % EPOCH == 1:  # from the second iteration of an epoch [C], kept for a whole epoch [I]
                reference.copy_(torch.stack([L_oh, L_ie]))
        run.log(L_oh=L_oh, L_ie=L_ie, L_ds=L_ds, L_G=L_G)
        if memory:
            memory.learn(x.detach(), teacher, rehearse=step > 0)

    G.eval()
    for _ in run.steps("student", args.steps, evaluate=True):
        with torch.no_grad():
            x = G(latents(args))
        if memory:
            x = rehearsed(x, memory, teacher)
        L_kd = imitate(x, teacher(x), args, student, optimiser_S, decay_S)
        run.log(L_kd=L_kd)


def joint(args, teacher, student, run):
    """DAFL, PRE-DFKD [C], MSKD [I]: rounds of one step of G, then `student_steps` of S, the memory trained after the first 4.

    The first step of S in a round takes the batch that G was just trained on, which saves one [I]. S sees memory samples
    from the second round on, when the memory has learned something [I].
    """
    G, optimiser_G, optimiser_S, decay_S, memory = generative(args, student, run)
    for step in run.steps("student", args.steps, evaluate=True):
        place = step % args.student_steps  # within the round
        if place == 0:
            z = latents(args)
            x = G(z)
            L_G = generator_objective(args, z, x, teacher, student)
            minimise(L_G, optimiser_G)
            run.state["L_G"] = L_G.detach()
            novel = x.detach()
        else:
            with torch.no_grad():
                novel = G(latents(args))
        x = novel
        if memory and step >= args.student_steps:
            x = rehearsed(novel, memory, teacher)
        L_kd = imitate(x, teacher(x), args, student, optimiser_S, decay_S)
        if memory and place < 4:
            memory.learn(novel, teacher, rehearse=step >= args.student_steps)
        run.log(L_kd=L_kd, L_G=run.state["L_G"])


def generator_objective(args, z, x, teacher, student):
    """What G minimises in `joint`, with the weights a, b, c of --loss-weights."""
    t, f = teacher(x, return_features=True)
    a, b, c = args.loss_weights
    if args.method == "mskd":
        return generators.dafl_loss(t, f, a, b, c=0) + c * generators.mode_seeking_loss(x, z)
    L_G = generators.dafl_loss(t, f, a, b, c)
    return L_G + generators.js_disagreement_loss(student(x), t) if args.method == "pre" else L_G


def transfer_set(args, teacher, student, run):
    """Soft-target synthesis, ZSKD, DeepInversion: optimise images against T, a file for each batch; train S on the finished set.

    The files hold float16: its rounding, 1 part in 2000, is far below the noise that the images begin with, and what S
    learns are T's outputs on the images as S sees them: from the files, and augmented [I]. T's outputs before the
    augmentation would mislead S: synthetic images lose their class with small changes of their pixels.
    """
    optimiser_S, decay_S = student_optimiser(student, args)
    run.track(S=student, optimiser_S=optimiser_S, decay_S=decay_S)
    folder = run.out / "transfer"
    folder.mkdir(exist_ok=True)
    if args.method == "deepinversion" and not any(isinstance(m, torch.nn.BatchNorm2d) for m in teacher.modules()):
        print(f"{args.teacher_arch} has no BatchNorm: DeepInversion's term of its statistics is absent")
    run.samples = lambda: load_file(folder / "0.pt")["images"][:64]
    for first in run.steps("images", args.images, stride=args.image_batch):
        count = min(args.image_batch, args.images - first)
        x, targets, intended = SYNTHESES[args.method](args, teacher, count, run)
        run.log(**measures(teacher(x), targets, intended))
        batch = dict(images=x.half(), targets=targets, intended=intended)
        write(folder / f"{first}.pt", serialise({k: v.cpu() for k, v in batch.items()}))

    run.samples = None  # the picture is there
    files = [folder / f"{first}.pt" for first in range(0, args.images, args.image_batch)]
    gone = [path for path in files if not path.exists()]
    if gone:
        raise RunError(f"{gone[0]}: this part of the transfer set is gone; run without --resume")
    batches = [load_file(path) for path in files]
    images, targets, intended = (torch.cat([b[k] for b in batches]).to(args.device) for k in ("images", "targets", "intended"))
    logits = torch.cat([teacher(x.float()) for x in images.split(1000)])
    run.facts.update(images=len(images), bytes=images.nbytes)
    run.facts.update((k, v.item()) for k, v in measures(logits, targets, intended).items())
    for _ in run.steps("student", args.steps, evaluate=True):
        index = torch.randint(len(images), (args.batch,), device=args.device)
        x = generators.augmented(images[index].float(), info(args).mirror)
        L_kd = imitate(x, teacher(x), args, student, optimiser_S, decay_S)
        run.log(L_kd=L_kd)


def soft_target_images(args, teacher, count, run):
    """Soft-target synthesis [P]: features of a layer from their normal distribution, the soft targets that they give, images.

    Each step sees the images augmented, so that they keep their targets when S sees them augmented [I].
    """
    layer, rest = teacher.split(args.layer)
    h = generators.feature_distribution(layer.weight, args.sigma).sample((count,))
    targets = (rest(h) / args.temperature).softmax(1)

    def objective(x):
        t, f = teacher(generators.augmented(x, info(args).mirror), return_features=True)
        L_a = generators.activation_loss(f)
        return generators.soft_target_loss(t, targets, args.temperature) + args.loss_weights[0] * L_a

    return optimise(objective, args, count, run), targets, targets.argmax(1)


def feature_model(teacher, args):
    """The layer and the sigma that `auto` stands for with this teacher."""
    layer = args.layer
    if layer == "auto":
        layer = "fc2" if isinstance(teacher, (models.LeNet5, models.AlexNet)) else "logits"
    try:
        linear, rest = teacher.split(layer)
    except ValueError as error:
        raise RunError(f"--layer {layer}: {error}") from None
    if args.sigma != "auto":
        return layer, args.sigma
    sigma = generators.feature_scale(linear.weight, rest, CERTAINTY)
    print(f"sigma      {sigma:.4g} for {layer}: there the teacher's L_oh is {CERTAINTY}")
    return layer, sigma


def zskd_images(args, teacher, count, run):
    """ZSKD [C]: soft targets from a Dirichlet distribution for each class, images, augmented as soft-target's are [I]."""
    targets, intended = generators.dirichlet_targets(teacher.classifier.weight, count)

    def objective(x):
        t = teacher(generators.augmented(x, info(args).mirror))
        return generators.soft_target_loss(t, targets, args.temperature)

    return optimise(objective, args, count, run), targets, intended


def deepinversion_images(args, teacher, count, run):
    """DeepInversion [C]: random classes, images that have T's BatchNorm statistics and look smooth."""
    y = torch.randint(info(args).classes, (count,), device=args.device)
    with generators.batch_norm_inputs(teacher) as collected:

        def objective(x):
            collected.clear()
            x = x.roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
            return generators.deepinversion_loss(x, teacher(x), y, collected, *args.loss_weights)

        x = optimise(objective, args, count, run)
    return x, F.one_hot(y, info(args).classes).float(), y


SYNTHESES = {"soft-target": soft_target_images, "zskd": zskd_images, "deepinversion": deepinversion_images}


def optimise(objective, args, count, run):
    """x* = argmin objective(x) by Adam from noise [P, C], within the range of pixels [I].

    The noise is smooth and weak, drawn on an 8 x 8 grid: what is left of it in an image teaches S more when it looks less
    like noise [I]. Adam ends early when 50 steps bring less than 1 % of the decrease so far [I].
    """
    mean, std = data.mean_and_std(info(args), args.device)
    noise = 0.5 * torch.randn(count, info(args).channels, 8, 8, device=args.device)
    x = F.interpolate(noise, size=(32, 32), mode="bilinear").to(memory_format=torch.channels_last).requires_grad_()
    optimiser = torch.optim.Adam([x], args.image_lr)
    losses, means = [], []
    for step in range(1, args.image_steps + 1):
        L = objective(x)
        minimise(count * L, optimiser)  # the sum: what Adam's eps is to a gradient must not depend on the batch
        x.data.clamp_(-mean / std, (1 - mean) / std)
        losses.append(L.detach())
        if step % 50 == 0:
            means.append(torch.stack(losses).mean().item())
            losses = []
            run.tell(f"step {step}/{args.image_steps}  loss {means[-1]:.4g}")
            if len(means) > 2 and means[-2] - means[-1] < 0.01 * (means[0] - means[-1]):
                break
    return x.detach()


def measures(t, targets, intended):
    """Shares: of images that T puts into their target's top class, and of targets whose top class is not the intended one."""
    top = targets.argmax(1)
    return dict(agreement=(t.argmax(1) == top).float().mean(), strayed=(top != intended).float().mean())


def transfer(args, teacher, student, run, draw):
    """The controls at both ends: S learns from T's outputs on what `draw` gives, Gaussian noise or, for `kd`, real images."""
    optimiser_S, decay_S = student_optimiser(student, args)
    run.track(S=student, optimiser_S=optimiser_S, decay_S=decay_S)
    for _ in run.steps("student", args.steps, evaluate=True):
        x = draw()
        run.log(L_kd=imitate(x, teacher(x), args, student, optimiser_S, decay_S))


def imitate(x, t, args, student, optimiser_S, decay_S):
    """One step of S on the images x towards T's outputs t: L_kd(tau), or PRE-DFKD's mean |S(x) - T(x)| where tau is 0."""
    s = student(x)
    L_kd = generators.distillation_loss(s, t, args.temperature) if args.temperature else F.l1_loss(s, t)
    minimise(L_kd, optimiser_S)
    decay_S.step()
    return L_kd


METHODS = {
    "rdskd": rdskd, "pre": joint, "soft-target": transfer_set, "dafl": joint, "mskd": joint, "zskd": transfer_set,
    "deepinversion": transfer_set, "noise": transfer, "kd": transfer,
}  # fmt: skip


def generator(args):
    G = generators.Generator(args.latent, info(args).channels, width=args.width, spectral_norm=args.method == "pre")
    return in_precision(G.to(args.device, memory_format=torch.channels_last), args)


def generative(args, student, run):
    """What a loop with a generator trains, and `run` keeps: G, its optimiser, S's optimiser and its decay, the memory."""
    G = generator(args)
    optimiser_G = adam(G, args.generator_lr)
    optimiser_S, decay_S = student_optimiser(student, args)
    memory = replay_memory(args)
    run.track(G=G, S=student, optimiser_G=optimiser_G, optimiser_S=optimiser_S, decay_S=decay_S, memory=memory)
    run.samples = lambda: samples(G, args)
    return G, optimiser_G, optimiser_S, decay_S, memory


def rehearsed(novel, memory, teacher):
    """The novel images and B/8 from the memory."""
    return torch.cat([novel, memory.recall(replay.share(novel), teacher)])


def replay_memory(args):
    """What --replay asks for: a module with `learn` and `recall`, or None."""
    if args.replay == "bank":
        return replay.Bank(args.bank_size, info(args).channels).to(args.device)
    if args.replay == "vae":
        vae = replay.VAE(args.memory_latent, info(args).channels, width=args.memory_width)
        vae.to(args.device, memory_format=torch.channels_last)
        for part in (vae.encoder, vae.decoder):
            in_precision(part, args)
        return replay.PseudoReplay(vae, args.memory_lr, args.latent_lr, args.teacher_term, args.balanced)


def info(args):
    """What the run knows of the data: of the data set by name, or the shape of somebody's own teacher."""
    if args.dataset == "own":
        return data.Info(args.num_classes, args.channels, (0.5,) * args.channels, (0.25,) * args.channels)
    return data.INFO[args.dataset]


def latents(args):
    """z ~ N(0, I), (B, d)."""
    return torch.randn(args.batch, args.latent, device=args.device)


@torch.no_grad()
def samples(G, args):
    """64 images of G in eval mode, always from the same latents; the random state of the run is left alone."""
    z = torch.randn(64, args.latent, generator=torch.Generator().manual_seed(0)).to(args.device)
    training = G.training
    G.eval()
    x = G(z)
    G.train(training)
    return x


def adam(net, lr):
    return torch.optim.Adam(net.parameters(), lr, fused=True)


def sgd(net, lr, nesterov=False):
    return torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=nesterov)


def student_optimiser(student, args):
    """Adam or SGD for S, and its learning rate over the steps: constant, a half cosine down to 0, one cycle, or in drops.

    In the cycle, torch's OneCycleLR moves the momentum (Adam: beta_1) as well, from 0.95 to 0.85 and back.

    The cycle's warm-up matters for networks without BatchNorm: at RDSKD's default rate of 0.01, two fifths of the units
    of LeNet-5-half's last convolution die without it, one fifth with it.
    """
    if args.student_optimiser == "sgd":
        optimiser = sgd(student, args.student_lr)
    else:
        optimiser = adam(student, args.student_lr)
    if args.student_decay == "cycle":
        return optimiser, torch.optim.lr_scheduler.OneCycleLR(optimiser, args.student_lr, args.steps, pct_start=0.15)
    if args.student_decay == "drops":
        return optimiser, torch.optim.lr_scheduler.MultiStepLR(optimiser, [800 * EPOCH, 1600 * EPOCH])
    if args.student_decay == "cosine":
        return optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.steps)
    return optimiser, torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1)


def minimise(loss, optimiser):
    """One step; gradients only of what the optimiser moves: L_G reaches the student's weights as well."""
    optimiser.zero_grad()
    loss.backward(inputs=[p for group in optimiser.param_groups for p in group["params"]])
    optimiser.step()


def in_precision(net, args):
    """Let `net` compute in bfloat16 where --precision says so. Losses stay in float32: networks return float32."""
    if args.precision == "bf16":
        net.forward = torch.autocast(torch.device(args.device).type, torch.bfloat16)(net.forward)
    return net


# ---------------------------------------------------------------- teachers: trained here once, or given


def build(arch, args):
    """A classifier for the data set. LeNets stay in float32: they are too small to gain from less, as measured."""
    net = models.build(arch, info(args).classes, info(args).channels).to(args.device, memory_format=torch.channels_last)
    return net if arch.startswith("lenet5") else in_precision(net, args)


def load_teacher(args, real):
    """The teacher of --teacher FILE; else the one saved for these settings before; else a new one, saved."""
    if args.teacher:
        teacher = load_weights(Path(args.teacher), args)
    else:
        settings = dict(
            dataset=args.dataset, data=zlib.crc32(real.train_images.cpu().numpy()), arch=args.teacher_arch,
            epochs=args.teacher_epochs, lr=teacher_lr(args), batch=TEACHER_BATCH, seed=args.teacher_seed,
            precision=args.precision, device=torch.device(args.device).type, threads=args.threads,
        )  # fmt: skip
        digest = zlib.crc32(json.dumps(settings).encode())
        path = Path(args.teacher_dir) / f"{args.dataset}-{args.teacher_arch}-{digest:08x}.pt"
        if path.exists():
            teacher = load_weights(path, args)
            print(f"teacher    {args.teacher_arch}, trained before: {path}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            teacher = train_teacher(real, args, path.with_suffix(".training"))
            write(path, weights(teacher))
            path.with_suffix(".training").unlink(missing_ok=True)
            print(f"teacher    {args.teacher_arch}, saved for later runs: {path}")
    return teacher.eval().requires_grad_(False)


def load_weights(path, args):
    """The teacher whose state dict is in file `path`; RunError says in one line why it does not fit."""
    state = load_file(path)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise RunError(f"{path}: no state dict; save one with torch.save(net.state_dict(), FILE)")
    bad = next((k for k, v in state.items() if not v.isfinite().all()), None)
    if bad is not None:
        raise RunError(f"{path}: '{bad}' holds NaN or infinity; train the teacher again")
    net = build(args.teacher_arch, args)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:  # a headline, then a line for each kind of difference
        reason = str(error).splitlines()[1].strip()
        raise RunError(f"{path}: not a {args.teacher_arch} with {info(args).classes} classes and {info(args).channels} "
                       f"channels; see --teacher-arch, --num-classes, --channels: {reason[:160]}") from None  # fmt: skip
    return net


def teacher_lr(args):
    return 3e-3 if args.teacher_arch.startswith("lenet5") else 0.1


def train_teacher(real, args, checkpoint):
    """A teacher trained by cross-entropy on the real training images, over one learning-rate cycle.

    LeNets by Adam; the larger networks by SGD with Nesterov's momentum. Where images may be mirrored, they are also
    cropped at random. After each epoch all is saved in the file `checkpoint`, from which a stopped training goes on.
    """
    torch.manual_seed(args.teacher_seed)
    net, lr = build(args.teacher_arch, args), teacher_lr(args)
    if args.teacher_arch.startswith("lenet5"):
        optimiser = adam(net, lr)
    else:
        optimiser = sgd(net, lr, nesterov=True)
    count, begun = len(real.train_labels), time.perf_counter()
    per_epoch = max(1, count // TEACHER_BATCH)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, args.teacher_epochs * per_epoch)
    first, parts = 0, (net, optimiser, cycle)
    if checkpoint.exists():
        saved = load_file(checkpoint)
        first = saved["epochs"]
        for part, state in zip(parts, saved["parts"]):
            part.load_state_dict(state)
        set_random_state(saved["random"], args.device)
    shown = begun
    for epoch in range(first, args.teacher_epochs):
        order = torch.randperm(count)[: per_epoch * TEACHER_BATCH]
        for step, index in enumerate(order.split(TEACHER_BATCH), start=1):
            x = real.train_images[index]
            if data.INFO[args.dataset].mirror:
                x = data.cropped_and_mirrored(x)
            loss = F.cross_entropy(net(data.normalise(x, args.dataset)), real.train_labels[index])
            minimise(loss, optimiser)
            cycle.step()
            now = time.perf_counter()
            if step == per_epoch or now - shown > 15:
                shown, done = now, epoch + step / per_epoch
                eta = (now - begun) / (done - first) * (args.teacher_epochs - done)
                show(f"teacher    {done:.4g}/{args.teacher_epochs} epochs  loss {loss.item():.4g}  eta {clock(eta)}", step == per_epoch)
        state = [part.state_dict() for part in parts]
        write(checkpoint, serialise(dict(epochs=epoch + 1, parts=state, random=random_state(args.device))))
    return net


@torch.no_grad()
def accuracy(net, images, labels, args):
    """Percent of images that `net` classifies as labelled; the network's mode is kept."""
    training = net.training
    net.eval()
    right = 0
    for x, y in zip(images.split(2000), labels.split(2000)):
        right += (net(data.normalise(x, args.dataset)).argmax(1) == y).sum()
    net.train(training)
    return 100 * right.item() / len(labels)


# ---------------------------------------------------------------- the run: progress, evaluation, checkpoints, results


class Run:
    """One run's folder: `for step in run.steps(...)` reports, evaluates and saves between the steps of a loop."""

    def __init__(self, args, evaluate):
        self.args, self.out, self.evaluate = args, Path(args.out), evaluate
        self.position, self.rows, self.state = {}, [], {}
        self.objects, self.terms, self.samples, self.facts = {}, [], None, {}
        self.saved, self.begun, self.commit = {}, time.perf_counter(), git_commit()
        if args.resume and (self.out / "checkpoint.pt").exists():
            self.saved = load_file(self.out / "checkpoint.pt")
            try:
                self.check_arguments(self.saved["args"])
                self.position, self.rows, self.state = (self.saved[k] for k in ("position", "rows", "state"))
                self.state = {k: v.to(args.device) for k, v in self.state.items()}
                self.begun -= self.saved["seconds"]
            except (KeyError, TypeError, AttributeError):
                raise RunError(f"{self.out}/checkpoint.pt: no checkpoint of this program; run without --resume") from None
            if self.saved.get("commit") != self.commit:
                print(f"{self.out}: began with commit {self.saved.get('commit')} of this program, goes on with {self.commit}")

    def check_arguments(self, before):
        now = numbers_of(self.args)
        changed = sorted(k for k in {**now, **before} if now.get(k) != before.get(k))
        if changed:
            k = changed[0]
            if k == "teacher_crc":
                raise RunError(f"{self.out}: began with another teacher; give the same to resume")
            raise RunError(f"{self.out}: began with {flag(k)} {before.get(k)}, now {now.get(k)}; give the same to resume")

    def track(self, **objects):
        """Name everything with a state_dict that a checkpoint must hold; a resumed run gets it back here."""
        self.objects = {name: thing for name, thing in objects.items() if thing is not None}
        if self.saved:
            for name, thing in self.objects.items():
                thing.load_state_dict(self.saved["objects"][name])
            set_random_state(self.saved["random"], self.args.device)

    def log(self, **terms):
        """Note the loss terms of a step; nothing waits for the device here."""
        self.names = list(terms)
        self.terms.append(torch.stack([v.detach() for v in terms.values()]))

    def steps(self, stage, count, evaluate=False, stride=1):
        """Yield the numbers of a stage's steps, from where a resumed run left off; with a stride, each is saved."""
        every = self.args.eval_every if evaluate else -(-count // 20)
        first = self.position.get(stage, 0)
        begun = time.perf_counter()
        self.shown = begun
        for step in range(first, count, stride):
            self.place = f"{stage:<10} {step}/{count}"
            yield step
            done = min(step + stride, count)
            pause = stride > 1 or done % every == 0 or done == count
            row = self.pause(stage, done, evaluate) if pause else None
            if self.due() or pause:
                rate = (done - first) / (time.perf_counter() - begun)
                values = row or dict(zip(self.names, self.terms[-1].tolist()))
                text = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if k not in ("step", "seconds") and v is not None)
                show(f"{stage:<10} {done}/{count}  {text}  {rate:.1f}/s  eta {clock((count - done) / rate)}", pause)

    def due(self):
        """Whether it is time to show something again."""
        now = time.perf_counter()
        if now - self.shown < (0.5 if sys.stdout.isatty() else 15):
            return False
        self.shown = now
        return True

    def tell(self, text):
        """Show what happens within a long step."""
        if self.due():
            show(f"{self.place}  {text}", keep=False)

    def pause(self, stage, done, evaluate):
        """Check the losses since the last pause, evaluate the student, save."""
        values = torch.stack(self.terms).cpu()
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            step, term = bad[0].tolist()
            raise RunError(f"{self.names[term]} became {values[step, term]:.3g} at {stage} step {done - len(values) + step + 1}; "
                           f"try a lower learning rate{'; the last good checkpoint is kept' if self.position else ''}")  # fmt: skip
        row = dict(step=done, accuracy=self.evaluate() if evaluate else None)
        row.update(zip(self.names, values.double().mean(0).tolist()), seconds=round(self.seconds(), 1))
        self.terms = []
        self.position[stage] = done
        if evaluate:
            self.rows.append(row)
            write(self.out / "metrics.csv", table(self.rows))
        if self.samples:
            write(self.out / "samples.png", self.picture())
        checkpoint = dict(args=numbers_of(self.args), position=self.position, rows=self.rows, state=self.state)
        checkpoint.update(seconds=self.seconds(), random=random_state(self.args.device), commit=self.commit)
        checkpoint["objects"] = {name: thing.state_dict() for name, thing in self.objects.items()}
        write(self.out / "checkpoint.pt", serialise(checkpoint))
        return row

    def seconds(self):
        return time.perf_counter() - self.begun

    def picture(self):
        x = self.samples()
        mean, std = data.mean_and_std(info(self.args), "cpu")
        return png((x.float().cpu() * std + mean).clamp(0, 1))

    def finish(self, teacher_accuracy):
        """Write student.pt and, last of all, result.json; return the result."""
        args, memory = self.args, self.objects.get("memory")
        curve = [row["accuracy"] for row in self.rows if row["accuracy"] is not None]
        result = dict(
            method=args.method, dataset=args.dataset, teacher=args.teacher_arch, student=args.student_arch,
            seed=args.seed, steps=args.steps, teacher_accuracy=teacher_accuracy,
            accuracy_last=curve[-1] if curve else None, accuracy_max=max(curve, default=None),
            accuracy_mean=statistics.fmean(curve) if curve else None,
            accuracy_variance=statistics.pvariance(curve) if curve else None,
            replay_bytes=memory.bytes() if memory else 0, transfer_set=self.facts or None, seconds=round(self.seconds(), 1),
            args=numbers_of(args), torch_version=torch.__version__, git_commit=self.commit,
        )  # fmt: skip
        write(self.out / "student.pt", weights(self.objects["S"]))
        write(self.out / "result.json", (json.dumps(result, indent=2) + "\n").encode())
        return result


# What decides where things are and not what the numbers become: a resumed run may differ in these.
PLACES = ("out", "resume", "data_dir", "teacher_dir", "teacher")


def numbers_of(args):
    return {k: v for k, v in vars(args).items() if k not in PLACES}


def random_state(device):
    return dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state() if device == "cuda" else None)


def set_random_state(state, device):
    torch.set_rng_state(state["cpu"])
    if device == "cuda":
        torch.cuda.set_rng_state(state["cuda"])


def weights(net):
    """A network's state dict as the bytes of a file that loads on every machine."""
    return serialise({k: v.cpu() for k, v in net.state_dict().items()})


def serialise(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def load_file(path):
    """What torch.save wrote to `path`: tensors and plain values only, no pickled code is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception:  # torch.load raises whatever the damaged bytes lead to
        raise RunError(f"{path}: not a PyTorch file of plain tensors (a state dict, for a teacher), or a damaged one") from None


def table(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def png(images, columns=8):
    """Images in [0, 1], (N, C, H, W), as the bytes of one PNG picture with a grid of them; grey unless C is 3."""
    if images.shape[1] not in (1, 3):
        images = images[:, :1]
    n, channels, height, width = images.shape
    grid = images[: n // columns * columns].unflatten(0, (-1, columns))  # (rows, columns, C, H, W)
    pixels = (grid.permute(0, 3, 1, 4, 2) * 255).round().byte().reshape(-1, columns * width * channels)
    lines = F.pad(pixels, (1, 0)).numpy().tobytes()  # each line begins with its filter type, 0

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", columns * width, len(pixels), 8, 0 if channels == 1 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


FIGURES = ("teacher_accuracy", "accuracy_last", "accuracy_max", "accuracy_mean", "accuracy_variance", "replay_bytes", "seconds")


def finished(folder):
    """A run's result and its curve, [(step, accuracy), ...]."""
    try:
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        curve = [(int(row["step"]), float(row["accuracy"])) for row in rows if row["accuracy"]]
        result = json.loads((folder / "result.json").read_text())
        if not curve:
            raise RunError(f"{folder}: the run was not evaluated, it has no accuracies")
        return {key: float(result[key]) for key in FIGURES}, curve
    except (OSError, KeyError, TypeError, ValueError):
        raise RunError(f"{folder}: no finished run there, a folder with metrics.csv and result.json") from None


def without_seed(folder):
    return re.sub(r"-\d+$", "", Path(folder).name)


def results_table(folders):
    """Runs that differ in nothing but the seed as one row each of a Markdown table; figures as PRE-DFKD reports them."""
    groups = {}
    for folder in map(Path, folders):
        groups.setdefault(without_seed(folder), []).append(finished(folder))
    lines = ["| run | teacher | student | seeds | maximum | μ | σ² | μ, second half | σ², second half | replay kB | minutes |", "|---" * 11 + "|"]
    for name, runs in groups.items():
        results = [result for result, _ in runs]
        last = [r["accuracy_last"] for r in results]
        halves = [[a for _, a in curve[len(curve) // 2 :]] for _, curve in runs]

        def mean(key, scale=1.0):
            return statistics.fmean(r[key] for r in results) / scale

        spread = f" ± {statistics.stdev(last):.2f}" if len(last) > 1 else ""
        cells = [name, f"{mean('teacher_accuracy'):.2f}", f"{statistics.fmean(last):.2f}{spread}", ", ".join(f"{v:.2f}" for v in last),
                 f"{mean('accuracy_max'):.2f}", f"{mean('accuracy_mean'):.2f}", f"{mean('accuracy_variance'):.2f}",
                 f"{statistics.fmean(map(statistics.fmean, halves)):.2f}", f"{statistics.fmean(map(statistics.pvariance, halves)):.3f}",
                 f"{mean('replay_bytes', 1000):.0f}", f"{mean('seconds', 60):.1f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(folders):
    """The student's accuracy over its steps in several runs, side by side: the bytes of one SVG picture.

    Runs that differ in nothing but the seed, the end of their names, have one colour.
    The vertical axis begins at the lowest accuracy of the runs' second halves: what is below it, a run's beginning, is cut.
    """
    runs = [finished(Path(folder))[1] for folder in folders]
    last = max(run[-1][0] for run in runs)
    top = max(a for run in runs for _, a in run)
    bottom = min(a for run in runs for _, a in run[len(run) // 2 :])
    bottom -= max(top - bottom, 0.1) / 10
    width, height, colours = 640, 360, ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000", "#999")

    def place(step, accuracy):
        return f"{50 + (width - 60) * step / last:.1f},{20 + (height - 50) * (top - accuracy) / (top - bottom):.1f}"

    def label(x, y, text, more=""):
        return f'<text x="{x}" y="{y}" {more}>{text}</text>'

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
             '<rect width="100%" height="100%" fill="white"/>',
             f'<clipPath id="axes"><rect x="50" y="15" width="{width - 55}" height="{height - 45}"/></clipPath>',
             f'<path d="M50 20V{height - 30}H{width - 10}" fill="none" stroke="#888"/>',
             label(45, 24, f"{top:.1f} %", 'text-anchor="end"'), label(45, height - 30, f"{bottom:.1f} %", 'text-anchor="end"'),
             label(width - 10, height - 12, f"student step {last}", 'text-anchor="end"')]  # fmt: skip
    groups = dict(zip(dict.fromkeys(map(without_seed, folders)), itertools.cycle(colours)))
    for folder, run in zip(folders, runs):
        points, colour = " ".join(place(*row) for row in run), groups[without_seed(folder)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5" clip-path="url(#axes)"/>')
    for i, (name, colour) in enumerate(groups.items()):
        parts.append(label(width - 14, height - 40 - 16 * i, html.escape(name), f'fill="{colour}" text-anchor="end"'))
    return "\n".join([*parts, "</svg>\n"]).encode()


def show(line, keep):
    """Print a progress line; on a terminal, one that is not to be kept is overwritten by the next."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{line}", end="\n" if keep else "", flush=True)
    else:
        print(line, flush=True)


def clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def git_commit():
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------- the command line


def flag(key):
    """An argument's name as it stands on the command line."""
    return f"--{key.replace('_', '-')}"


def integer(least, most=2**31 - 1):
    def parse(text):
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not between {least} and {most}")
        return value

    parse.__name__ = "integer"  # argparse says "invalid integer value"
    return parse


def number(zero=False, auto=False):
    def parse(text):
        if auto and text == "auto":
            return text
        value = float(text)
        if not 0 <= value < float("inf") or value == 0 and not zero:
            raise argparse.ArgumentTypeError(f"{text} is not a {'number of at least 0' if zero else 'positive number'}")
        return value

    parse.__name__ = "number"
    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parse(argv):
    """The arguments, with the schedule's numbers filled in and everything `auto` decided."""
    parser = Parser(
        prog="dfkd.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Distil a trained teacher into a smaller student without the data it was trained on.",
        epilog=schedules_text(),
    )  # fmt: skip
    add = parser.add_argument_group("what to distil").add_argument
    add("--method", choices=METHODS, default="rdskd", help="the method (default: rdskd)")
    add("--dataset", choices=data.INFO, help="what the teacher was trained on (default: glyphs, drawn here)")
    add("--data-dir", default="datasets", metavar="DIR", help="folder with a folder per data set; downloads go there (default: datasets)")
    add("--teacher", metavar="FILE", help="the teacher's state dict; without it, one is trained and kept in --teacher-dir")
    add("--teacher-arch", metavar="NAME", help=f"the teacher's network: {', '.join(models.NAMES)}, or any wrn-D-K (default: {', '.join(f'{k} {v}' for k, v in TEACHERS.items())})")
    add("--num-classes", type=integer(2), metavar="K", help="a teacher of your own: its classes; no data set is touched. "
        "Its pixels are taken to be normalised with mean 0.5 and deviation 0.25 (default: 10)")  # fmt: skip
    add("--channels", type=integer(1), metavar="C", help="and the channels of its images (default: 3)")
    add("--student-arch", metavar="NAME", help="the student's network, of the same names (default: the papers' for this teacher)")
    add("--no-eval", action="store_true", help="touch no data set at all: needs --teacher; the student is not measured")

    add = parser.add_argument_group("schedule (defaults of each method: below)").add_argument
    add("--schedule", choices=("default", "paper"), default="default", help="ours, minutes on a CPU, or the authors' own")
    add("--steps", type=integer(1), metavar="N", help="steps of the student")
    add("--student-steps", type=integer(1), metavar="N", help="steps of the student for each of the generator (dafl, mskd, pre)")
    add("--generator-steps", type=integer(1), metavar="N", help="steps of the generator before the student's first (rdskd)")
    add("--batch", type=integer(2), metavar="N", help="images per step")
    add("--latent", type=integer(1), metavar="D", help="dimension of the generator's latents z")
    add("--width", type=integer(2), metavar="N", help="channels of the generator's first convolution; the second has half")
    add("--generator-lr", type=number(), metavar="LR", help="learning rate of the generator")
    add("--student-lr", type=number(), metavar="LR", help="learning rate of the student")
    add("--student-optimiser", choices=("adam", "sgd"), help="the student's optimiser; sgd: momentum 0.9, weight decay 5e-4")
    add("--student-decay", choices=("none", "cosine", "cycle", "drops"), help="the student's learning rate over its steps: constant, "
        f"falling, rising for 15 %% of them and falling, or a tenth of itself from steps {800 * EPOCH} and {1600 * EPOCH} on")  # fmt: skip
    add("--temperature", type=number(zero=True), metavar="TAU", help="of the distillation loss; 0: mean |S(x) - T(x)|, as pre has it")
    add("--loss-weights", type=number(zero=True), nargs="+", metavar="A", help="of L_oh, L_ie and the third term (dafl, mskd, pre); "
        "of L_a (soft-target); of TV, L2 and BatchNorm statistics (deepinversion)")  # fmt: skip
    add("--images", type=integer(8), metavar="N", help="images of the transfer set (soft-target, zskd, deepinversion)")
    add("--image-batch", type=integer(8), metavar="N", help="images that are optimised together")
    add("--image-steps", type=integer(1), metavar="N", help="steps of an image at most; it ends when the loss has settled")
    add("--image-lr", type=number(), metavar="LR", help="learning rate of the images")
    add("--layer", choices=("auto", "fc2", "logits"), help="whose outputs soft-target models (auto: fc2 where the teacher has it)")
    add("--sigma", type=number(auto=True), metavar="SIGMA", help=f"their standard deviation (auto: where the teacher's L_oh is {CERTAINTY})")
    add("--eval-every", type=integer(1), metavar="N", help="student steps between evaluations, which are also checkpoints (default: 1/25 of --steps)")

    add = parser.add_argument_group("replay, for methods with a generator").add_argument
    add("--replay", choices=("none", "vae", "bank"), help="what brings earlier samples back (default: none; pre: vae)")
    add("--memory-latent", type=integer(1), metavar="D", help=f"latent dimension of the VAE (default: {MEMORY['memory_latent']})")
    add("--memory-width", type=integer(2), metavar="N", help=f"channels of the VAE's widest convolution (default: {MEMORY['memory_width']})")
    add("--memory-lr", type=number(), metavar="LR", help=f"learning rate of the VAE (default: {MEMORY['memory_lr']})")
    add("--latent-lr", type=number(), metavar="LR", help=f"of balanced inference's step on latents (default: {MEMORY['latent_lr']})")
    add("--bank-size", type=integer(1), metavar="N", help=f"images that the bank holds at most (default: {MEMORY['bank_size']})")
    switch = argparse.BooleanOptionalAction
    add("--teacher-term", action=switch, help="the teacher's outputs in the VAE's reconstruction loss (default: yes)")
    add("--balanced", action=switch, help="category-balanced inference of memory samples (default: yes)")

    add = parser.add_argument_group("the teacher that is trained here").add_argument
    add("--teacher-epochs", type=integer(1), metavar="N", help=f"epochs over the real training images (default: {', '.join(f'{k} {v}' for k, v in TEACHER_EPOCHS.items())})")
    add("--teacher-seed", type=integer(0), default=0, metavar="N", help="its seed (default: 0)")
    add("--teacher-dir", default="runs/teachers", metavar="DIR", help="where trained teachers are kept (default: runs/teachers)")

    add = parser.add_argument_group("the run").add_argument
    add("--seed", type=integer(0), default=0, metavar="N", help="seed of the distillation (default: 0)")
    add("--out", metavar="DIR", help="folder for the results (default: runs/DATASET-METHOD-SEED)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute (default: auto, a GPU if there is one)")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="of the large networks; losses are always fp32 "
        "(default: auto, bf16 where the processor has it)")  # fmt: skip
    add("--threads", type=integer(1), metavar="N", help="CPU threads (default: torch's choice); results depend on it in the last bits")

    add = parser.add_argument_group("finished runs: distil nothing").add_argument
    add("--plot", nargs="+", metavar="RUN", help="draw the accuracies of the runs in these folders over their steps into --out (default: curves.svg)")
    add("--table", nargs="+", metavar="RUN", help="print a row for each group of runs that differ in the seed, the end of their names")

    args = parser.parse_args(argv)
    if args.plot or args.table:
        return args
    if args.num_classes or args.channels:
        if not args.teacher or not args.teacher_arch:
            parser.error("--num-classes and --channels describe a teacher of your own: give --teacher FILE and --teacher-arch NAME")
        if args.dataset or args.method == "kd":
            parser.error("--num-classes and --channels are for a teacher without a data set: no --dataset, no --method kd")
        args.dataset, args.no_eval = "own", True
        args.num_classes, args.channels = args.num_classes or 10, args.channels or 3
    args.dataset = args.dataset or "glyphs"
    schedules = SCHEDULES[args.method]
    numbers = dict(schedules[args.schedule])
    for special in ["natural"] * (info(args).channels == 3) + [args.dataset]:
        numbers.update(schedules.get(f"{args.schedule} {special}", {}))
    if "width" in numbers:  # the method trains a generator
        numbers = {**MEMORY, **numbers}
    for key in {k for s in SCHEDULES.values() for k in s["default"]} | set(MEMORY):
        if getattr(args, key) is None:
            setattr(args, key, numbers.get(key))
            continue
        given = flag(f"no_{key}" if getattr(args, key) is False else key)
        kind = "bank" if key == "bank_size" else "vae"
        if key not in numbers:
            parser.error(f"{given} means nothing to --method {args.method}")
        if key in MEMORY and key != "replay" and (args.replay or numbers["replay"]) != kind:
            parser.error(f"{given} means nothing without --replay {kind}")
    if args.loss_weights:
        args.loss_weights, usual = tuple(args.loss_weights), numbers["loss_weights"]
        if len(args.loss_weights) != len(usual):
            parser.error(f"--loss-weights: --method {args.method} has {len(usual)} of them, not {len(args.loss_weights)}")
    if "images" in numbers and not args.temperature:
        parser.error(f"--temperature 0: --method {args.method} divides by it")
    if args.sigma not in (None, "auto") and not 1e-6 < args.sigma < 1e6:
        parser.error(f"--sigma {args.sigma:g}: not between 1e-6 and 1e6")
    args.eval_every = args.eval_every or numbers.get("eval_every") or max(1, args.steps // 25)
    args.out = args.out or f"runs/{args.dataset}-{args.method}-{args.seed}"
    args.teacher_arch = args.teacher_arch or TEACHERS[args.dataset]
    args.student_arch = args.student_arch or STUDENTS.get(args.teacher_arch)
    if not args.student_arch:
        parser.error(f"--teacher-arch {args.teacher_arch} has no usual student: give --student-arch NAME")
    args.teacher_epochs = args.teacher_epochs or TEACHER_EPOCHS.get(args.dataset)
    if args.no_eval and not args.teacher:
        parser.error("--no-eval touches no data, so that no teacher can be trained: give --teacher FILE")
    if args.no_eval and args.method == "kd":
        parser.error("--method kd distils on real images, --no-eval touches none")
    if args.teacher and not Path(args.teacher).is_file():
        parser.error(f"--teacher {args.teacher}: no file there")
    for arch in (args.teacher_arch, args.student_arch):
        try:
            with torch.device("meta"):
                models.build(arch)
        except ValueError as error:
            parser.error(str(error))
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.precision == "auto":
        args.precision = "bf16" if fast_bf16(args.device) else "fp32"
    args.threads = args.threads or torch.get_num_threads()
    return args


def fast_bf16(device):
    """Whether the processor multiplies bfloat16 matrices in hardware; elsewhere bf16 is slower than float32."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def schedules_text():
    """The schedules as the last part of --help."""
    lines = ["schedules:"]
    for method, of_method in SCHEDULES.items():
        for name, schedule in of_method.items():
            lines.append(f"  {method}, {name}")
            given = {k: " ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in schedule.items()}
            lines.append("    " + " ".join(f"{flag(k)} {v}" for k, v in given.items()))
    return "\n".join(lines)


def probe(out):
    """Make the run's folder and try to write there, before any work is done."""
    out.mkdir(parents=True, exist_ok=True)
    write(out / "writable", b"?")
    (out / "writable").unlink(missing_ok=True)  # by another run that begins in the same folder


def set_aside(out, resume):
    """Move what an earlier run left in the folder into a folder `previous-N` in it."""
    old = [out / name for name in FILES if (out / name).exists()]
    if old and not (resume and (out / "checkpoint.pt").exists()):
        n = next(n for n in range(1, 10_000) if not (out / f"previous-{n}").exists())
        aside = out / f"previous-{n}"
        aside.mkdir()
        for path in old:
            path.rename(aside / path.name)
        print(f"{out} held an earlier run: moved into {aside}")


FILES = ("result.json", "metrics.csv", "samples.png", "student.pt", "checkpoint.pt", "transfer")


def distil(args):
    """One whole run: data for teacher and evaluation, teacher, distillation, results."""
    torch.set_num_threads(args.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32: what may be coarser computes in bfloat16
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time and changes no result
    out = Path(args.out)
    probe(out)
    print(f"{args.method}: {args.teacher_arch} -> {args.student_arch} on {args.dataset}, seed {args.seed}, "
          f"{args.device}, {args.threads} threads, {args.precision}; results in {out}", flush=True)  # fmt: skip
    real = None if args.no_eval else data.Data(*(v.to(args.device) for v in data.load(args.dataset, args.data_dir)))
    teacher = load_teacher(args, real)
    args.teacher_crc = zlib.crc32(b"".join(v.cpu().numpy().tobytes() for v in teacher.state_dict().values()))
    if args.method == "soft-target":
        args.layer, args.sigma = feature_model(teacher, args)
    torch.manual_seed(args.seed)
    student = build(args.student_arch, args)

    def evaluate(net):
        return None if real is None else accuracy(net, real.test_images, real.test_labels, args)

    teacher_accuracy = evaluate(teacher)
    set_aside(out, args.resume)
    run = Run(args, lambda: evaluate(student))
    try:
        METHODS[args.method](args, teacher, student, run, *controls(args, real))
        summary(run.finish(teacher_accuracy), out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the same command with --resume goes on from {out}" if run.position else "") from None


def controls(args, real):
    """What `noise` and `kd` draw instead of generated images; nothing for a method of data-free distillation."""
    if args.method == "noise":
        return [lambda: torch.randn(args.batch, info(args).channels, 32, 32, device=args.device)]
    if args.method == "kd":
        count = len(real.train_images)
        change = data.cropped_and_mirrored if info(args).mirror else lambda x: x
        return [lambda: data.normalise(change(real.train_images[torch.randint(count, (args.batch,))]), args.dataset)]
    return []


def summary(result, out):
    print()
    if result["accuracy_last"] is not None:
        evaluations = -(-result["steps"] // result["args"]["eval_every"])
        print(f"teacher  {result['teacher']:<12} {result['teacher_accuracy']:.2f} %")
        print(f"student  {result['student']:<12} {result['accuracy_last']:.2f} % at the last step")
        print(f"         over all {evaluations} evaluations: mean {result['accuracy_mean']:.2f} %, "
              f"variance {result['accuracy_variance']:.2f}, maximum {result['accuracy_max']:.2f} %")  # fmt: skip
    made = result["transfer_set"]
    if made:
        print(f"images   {made['images']}: the teacher puts {100 * made['agreement']:.1f} % of them into their target's top class")
        if made["strayed"]:
            print(f"         {100 * made['strayed']:.1f} % of the targets favour another class than the one they were drawn for")
    print(f"time     {clock(result['seconds'])} for the distillation; memory {peak_memory(result['args']['device'])} at the peak")
    print(f"files    {out}/: {', '.join(name for name in FILES if (out / name).exists())}")


def peak_memory(device):
    """The most memory that this process held, on the GPU where it computed there."""
    if device == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of the GPU's"
    if not resource:
        return "unknown"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == 'darwin' else 20):.2f} GiB"


def main(argv=None):
    args = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if args.plot:
            picture = Path(args.out or "curves.svg")
            write(picture, curves(args.plot))
            print(f"drawn: {picture}")
        elif args.table:
            print(results_table(args.table))
        else:
            distil(args)
        return 0
    except (RunError, data.DataError) as error:
        problem, code = str(error), 1
    except OSError as error:
        problem, code = f"{error.filename or args.out}: {error.strerror or error}", 1
    except (MemoryError, RuntimeError) as error:  # torch has no class of its own for running out of CPU memory
        known = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
        if not known:
            raise
        problem, code = "out of memory: give a smaller --batch, --width or --bank-size", 1
    except KeyboardInterrupt as stop:
        problem, code = f"stopped; {stop if str(stop) else 'nothing new was saved, run the same command again'}", 130
    print(f"dfkd.py: {problem}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
