"""Image generator, objectives for generators and for images, image synthesis: one function per term of the papers.

Read it with the papers beside it. Every docstring gives the formula and says where it comes from:
    [P] the paper's text,  [C] the authors' public code,  [I] our reading where neither settles it.
To use a term elsewhere, copy its function, those that its body names, and the imports: torch and Python's own.

Notation (one for all papers)
    T, S, G    teacher (frozen, eval mode), student, generator
    z          latents (B, d), z ~ N(0, I)
    x          images (B, C, H, W) in the teacher's normalised input space: zero mean, unit variance per channel
    t          teacher logits (B, K);  p = softmax(t);  p_bar = mean of p over the batch
    f          the teacher's penultimate features (B, D)
    tau        temperature
All losses are scalars, in nats unless said otherwise, in the precision of their inputs (`batch_norm_loss`: float32 at
least): give them float32 or better.

References
    RDSKD        Han, Park, Wang, Liu, ICASSP 2021       https://arxiv.org/abs/2011.03749
    PRE-DFKD     Binici et al., AAAI 2022                https://arxiv.org/abs/2201.03019
    Soft target  Wang, AAAI 2021                         https://arxiv.org/abs/2104.04868
    DAFL         Chen et al., ICCV 2019                  https://arxiv.org/abs/1904.01186
    ZSKD         Nayak et al., ICML 2019                 https://arxiv.org/abs/1905.08114
    DeepInversion  Yin et al., CVPR 2020                 https://arxiv.org/abs/1912.08795
    Mode seeking   Mao et al., CVPR 2019                 https://arxiv.org/abs/1903.05628
    Distillation   Hinton, Vinyals, Dean 2015            https://arxiv.org/abs/1503.02531
"""

import contextlib
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Dirichlet, MultivariateNormal
from torch.linalg import vector_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_weights
from torch.nn.utils.parametrize import register_parametrization

# ---------------------------------------------------------------- the image generator


class UpsampleConv2d(nn.Conv2d):
    """Nearest x2 upsampling followed by a 3 x 3 convolution, computed as one transposed convolution.

    Upsampling repeats each pixel, so that the three taps of the convolution meet only two distinct pixels. In one
    dimension, with kernel w and input x, collecting the taps that read the same x[i] gives
        y[n] = sum_i v[n - 2i + 1] x[i],   v = (w2, w1 + w2, w0 + w1, w0),
    a transposed convolution of stride 2, padding 1 and kernel v = U w; in two dimensions v = U w U^T. It is the same
    function with 4 instead of 9 multiplications per weight and pixel. The weight keeps its 3 x 3 shape.
    There is no bias: the BatchNorm that follows would take it out again [I].
    """

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=1, bias=False)
        U = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
        self.register_buffer("repeat", torch.kron(U, U), persistent=False)  # U w U^T, for w and v as vectors

    def kernel(self):
        """v (I, O, 4, 4), for the transposed convolution."""
        v = float32_weight(self).flatten(2) @ self.repeat.T
        return v.unflatten(2, (4, 4)).transpose(0, 1)

    def forward(self, x):  # (B, I, H, W) -> (B, O, 2H, 2W)
        return F.conv_transpose2d(x, self.kernel(), stride=2, padding=1)


class NarrowConv2d(nn.Conv2d):
    """A 3 x 3 convolution to one or three channels: one 1 x 1 convolution, then nine shifted planes are added.

    Its nine taps see the same channels. So w_k x is computed once for each tap k, and y[n] = sum_k (w_k x)[n + k - 1]
    is another convolution, over nine planes for each output, whose weights are 0 and 1. It is the same function;
    processors compute it faster. The weight keeps its 3 x 3 shape.
    """

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=1)
        self.register_buffer("shift", torch.eye(9).view(1, 9, 3, 3).repeat(outputs, 1, 1, 1), persistent=False)

    def forward(self, x):  # (B, I, H, W) -> (B, O, H, W)
        w = float32_weight(self).permute(0, 2, 3, 1).reshape(-1, self.in_channels, 1, 1)  # (9 O, I, 1, 1)
        return F.conv2d(F.conv2d(x, w), self.shift, self.bias, padding=1, groups=self.out_channels)


class SpectralNorm(nn.Module):
    """A convolution's weight over its largest singular value, u^T W v, W = the weight as a matrix (O, 9 I).

    In train mode each forward pass takes one step of the power iteration: v = W^T u, then u = W v, both scaled to unit
    norm. This is the order of torch.nn.utils.spectral_norm, and the traces of the authors' code show it [C]. In torch's
    newer parametrizations.spectral_norm u comes first; PRE-DFKD's losses then differ by some thousandths. Here u and v
    begin at the singular vectors, in torch's functions at random [I].
    """

    def __init__(self, weight):
        super().__init__()
        U, _, V = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
        self.register_buffer("u", U[:, 0].clone())
        self.register_buffer("v", V[0].clone())

    def forward(self, weight):
        W = weight.flatten(1)
        if self.training:
            with torch.no_grad():
                self.v = F.normalize(W.T @ self.u, dim=0)
                self.u = F.normalize(W @ self.v, dim=0)
        return weight / (self.u @ W @ self.v)


class Generator(nn.Module):
    """G: z (B, d) -> x (B, C, H, W); the network of DAFL's and RDSKD's code [C], where width = 128.

    `spectral_norm` puts `SpectralNorm` on each convolution: PRE-DFKD's novel generator [C].
    `bound` draws the weights from U(-bound, bound) and sets the biases to 0: PRE-DFKD has 0.08 [C].
    The second BatchNorm and the third have eps = 0.8: the authors pass it as the second positional argument, where
    torch expects eps and a reader expects momentum. It changes what the network learns, so it is kept [C].
    The last BatchNorm has no affine part and puts the images into the teacher's normalised input space [C].
    `pixels` = (low, high), (C, 1, 1) each, is what black and white are: images are clamped to it, and a clamped pixel
    passes no gradient [I]. None, no bounds, is the authors' code [C].
    The images are float32 at least. What comes before them is bfloat16 where `bf16` is set on the network.
    """

    bf16 = False

    def __init__(self, latent_dim, channels, image_size=32, width=128, spectral_norm=False, bound=None, pixels=None):
        super().__init__()
        if image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4, not {image_size}")
        self.latent_dim, self.start = latent_dim, image_size // 4
        low, high = pixels or (None, None)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self.linear = nn.Linear(latent_dim, width * self.start**2)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = UpsampleConv2d(width, width)
        self.bn2 = nn.BatchNorm2d(width, eps=0.8)
        self.conv2 = UpsampleConv2d(width, width // 2)
        self.bn3 = nn.BatchNorm2d(width // 2, eps=0.8)
        self.conv3 = NarrowConv2d(width // 2, channels)
        self.bn4 = nn.BatchNorm2d(channels, affine=False)
        if bound:
            uniform_weights(self, bound)
        if spectral_norm:
            for conv in (self.conv1, self.conv2, self.conv3):
                register_parametrization(conv, "weight", SpectralNorm(conv.weight))

    def forward(self, z):
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.linear(z).unflatten(1, (-1, self.start, self.start))  # (B, 128, H/4, W/4)
            x = self.bn1(x.contiguous(memory_format=torch.channels_last))
            x = F.leaky_relu(self.bn2(self.conv1(x)), 0.2, inplace=True)  # (B, 128, H/2, W/2)
            x = F.leaky_relu(self.bn3(self.conv2(x)), 0.2, inplace=True)  # (B, 64, H, W)
            x = self.conv3(x)  # (B, C, H, W)
        x = self.bn4(at_least_float32(x).tanh())
        return x if self.low is None else x.clamp(self.low, self.high)


def float32_weight(conv):
    """The convolution's weight, computed without autocast: a spectral norm in bfloat16 would be off by a percent."""
    with torch.autocast(next(conv.parameters()).device.type, enabled=False):
        return conv.weight


def at_least_float32(x):
    """bfloat16 raised to float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def uniform_weights(net, bound):
    """Draw the weights of all convolutions and linear layers from U(-bound, bound) and set their biases to 0."""
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.uniform_(layer.weight, -bound, bound)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def frozen(G):
    """A copy of G in eval mode whose BatchNorms are folded into the layers before them: the same images, sooner.

    In eval mode BatchNorm is affine. With s = gamma / sqrt(variance + eps) per channel,
        BN(W x + b) = s (W x + b - mean) + beta = (s W) x + (s (b - mean) + beta).
    The last BatchNorm stays: tanh comes before it. Later changes of G do not reach the copy. For G without spectral
    norm.
    """
    folded = copy.deepcopy(G).eval()
    linear, bn = folded.linear, folded.bn1
    statistics = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    mean, variance, gamma, beta = (v.repeat_interleave(G.start**2) for v in statistics)  # the channel of each output
    linear.weight, linear.bias = fuse_linear_bn_weights(
        linear.weight, linear.bias, mean, variance, bn.eps, gamma, beta
    )
    folded.conv1 = transposed(fuse_conv_bn_eval(folded.conv1, folded.bn2))
    folded.conv2 = transposed(fuse_conv_bn_eval(folded.conv2, folded.bn3))
    folded.bn1 = folded.bn2 = folded.bn3 = nn.Identity()
    return folded.requires_grad_(False)


def transposed(conv):
    """The upsampling convolution as torch's own layer, its kernel computed once; no random number is drawn."""
    layer = nn.ConvTranspose2d(conv.in_channels, conv.out_channels, 4, stride=2, padding=1, device="meta")
    layer.weight, layer.bias = nn.Parameter(conv.kernel().detach()), conv.bias
    return layer


def latents(G, count):
    """z ~ N(0, I), (count, d), on the device and in the precision of G's weights."""
    weight = G.linear.weight
    return torch.randn(count, G.latent_dim, dtype=weight.dtype, device=weight.device)


@torch.no_grad()
def fresh_images(G, count):
    """x = G(z), z ~ N(0, I), in G's present mode: (count, C, H, W), no gradient."""
    return G(latents(G, count))


@torch.no_grad()
def fixed_images(G):
    """64 images of G in eval mode, always from the same latents; the random state of the run is left alone.

    Large ones would not fit into the memory together: 8 are made at a time.
    """
    z = torch.randn(64, G.latent_dim, generator=torch.Generator().manual_seed(0)).to(G.linear.weight)
    training = G.training
    G.eval()
    x = torch.cat([G(some) for some in z.split(8)])
    G.train(training)
    return x


# ---------------------------------------------------------------- terms that the papers share


def one_hot_loss(logits):
    """L_oh = CE(t, argmax_k t), batch mean: small when the teacher is sure of each sample (authenticity).

    logits (B, K) -> scalar in [0, log K]. RDSKD, DAFL and PRE-DFKD [C].
    """
    return F.cross_entropy(logits, logits.argmax(1))


def information_entropy_loss(logits):
    """L_ie = sum_k p_bar_k log p_bar_k = -H(p_bar): small when the batch holds all classes equally (class diversity).

    logits (B, K) -> scalar in [-log K, 0]. RDSKD, natural logarithm [C]; DAFL and PRE-DFKD use log10 [C], see
    `dafl_loss`. log p_bar is computed as logsumexp_b(log p) - log B, with log p >= -1e4: a class without mass then adds
    0 to the loss and to the gradient, where the authors' p_bar.log() gives NaN.
    """
    log_p_bar = logits.log_softmax(1).clamp_min(-1e4).logsumexp(0) - math.log(len(logits))  # (K,)
    return (log_p_bar.exp() * log_p_bar).sum()


def information_entropy_log10(logits):
    """L_ie with the decimal logarithm: DAFL, PRE-DFKD [C] and, with DAFL's class terms, MSKD [I].

    logits (B, K) -> scalar in [-log10 K, 0].
    """
    return information_entropy_loss(logits) / math.log(10)


def activation_loss(features):
    """L_a = -mean |f| over batch and features: small when features are as strong as on real data.

    features (B, D) -> scalar. DAFL and PRE-DFKD [C], soft-target synthesis [P].
    """
    return -features.abs().mean()


def distillation_loss(student_logits, teacher_logits, temperature):
    """L_kd(tau) = tau^2 KL( softmax(T(x)/tau) || softmax(S(x)/tau) ), batch mean.

    student_logits, teacher_logits (B, K) -> scalar. Hinton et al.; RDSKD has tau = 10, DAFL 1, ZSKD 20 [C],
    soft-target synthesis 20 [I].
    """
    log_q = (student_logits / temperature).log_softmax(1)
    log_p = (teacher_logits / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def logit_distance_loss(student_logits, teacher_logits):
    """L_kd = mean |S(x) - T(x)| over batch and classes: PRE-DFKD's student loss [C].

    student_logits, teacher_logits (B, K) -> scalar.
    """
    return F.l1_loss(student_logits, teacher_logits)


# ---------------------------------------------------------------- RDSKD


def half_distance(v):
    """||v_2 - v_1||, v_1 and v_2 the halves of a batch v (B, ...), Frobenius norm over a whole half -> scalar.

    The last of an odd batch is left out [I]; a batch of one gives 0.
    """
    half = len(v) // 2
    return vector_norm(v[half : 2 * half] - v[:half])


def diversity_seeking_loss(images, logits):
    """L_ds = 1 / ( ||x_2 - x_1|| / ||p_2 - p_1|| + 1e-20 ): small when images differ while the teacher agrees.

    images (B, C, H, W), logits (B, K) -> scalar >= 0. x_1, x_2 are the halves of the batch, p_1, p_2 the teacher's
    softmax outputs on them, ||.|| as in `half_distance`. RDSKD [C].
    Written as ||p_2 - p_1|| / max(||x_2 - x_1||, 1e-20) [I]: equal to rounding wherever images differ. Where they do
    not, it is finite, as are its gradients; the formula above is 1e20, or 0/0 where p_1 = p_2, too.
    """
    return half_distance(logits.softmax(1)) / half_distance(images).clamp_min(1e-20)


def rdskd_loss(images, logits, reference, terms=("oh", "ie", "ds"), penalty=torch.exp):
    """L_G = exp(L_oh - L_oh') + exp(L_ie - L_ie') + L_ds: RDSKD's generator objective, which has no weights to tune.

    images (B, C, H, W), logits (B, K), reference = (L_oh', L_ie') -> scalar. The reference values are constants, seen
    earlier in training (a gradient in them would cancel that of L_oh, L_ie): an increase over them costs exponentially
    [P], so that a decrease earns little. The form is [C]. The loop, `dfkd.rdskd`, renews them. For comparison only [I]:
    `terms` may leave terms out, and another `penalty` may stand in the place of exp; the identity gives the plain sum.
    """
    L_G = logits.new_zeros(())
    if "oh" in terms:
        L_G = L_G + penalty(one_hot_loss(logits) - reference[0])
    if "ie" in terms:
        L_G = L_G + penalty(information_entropy_loss(logits) - reference[1])
    if "ds" in terms:
        L_G = L_G + diversity_seeking_loss(images, logits)
    return L_G


@torch.no_grad()
def diversity_within_classes(images, logits):
    """How different images of one class are: root of the mean squared difference of their pixels, over all pairs [I].

    images (B, C, H, W), logits (B, K) -> scalar; two independent images of unit variance differ by sqrt(2) = 1.41.
    The class is the teacher's, argmax_k t. Each image has the same weight; an image alone in its class counts as 0. The
    mean square over pairs is twice the variance.
    """
    classes, squared = logits.argmax(1), images.new_zeros(())
    for k in classes.unique():
        members = images[classes == k].flatten(1)
        if len(members) > 1:
            squared += 2 * len(members) * members.var(0).mean()
    return (squared / len(images)).sqrt()


# ---------------------------------------------------------------- DAFL and MSKD


def dafl_loss(logits, features, a, b, c):
    """L_G = a L_oh + b L_ie + c L_a, with L_ie in log10: DAFL's generator objective [C].

    logits (B, K), features (B, D), weights a, b, c -> scalar. MNIST: 1, 5, 0.1; CIFAR-10: 0.05, 5, 0.01 [C].
    """
    return a * one_hot_loss(logits) + b * information_entropy_log10(logits) + c * activation_loss(features)


def mode_seeking_loss(images, z):
    """1 / ( ||x_2 - x_1|| / ||z_2 - z_1|| + 1e-5 ): small when different latents give different images.

    images (B, C, H, W), z (B, d) -> scalar >= 0. Halves and norms as in RDSKD's L_ds, `half_distance` [I].
    The term is Mao et al.'s; its form here and the 1e-5 are ours [I].
    """
    distance_x, distance_z = half_distance(images), half_distance(z)
    return distance_z / (distance_x + 1e-5 * distance_z).clamp_min(1e-20)  # finite also where both distances are 0


def mskd_loss(images, z, logits, a, b, c):
    """L_G = a L_oh + b L_ie + c L_ms, L_ie in log10, L_ms the mode-seeking loss: MSKD's generator objective [I].

    images (B, C, H, W), z (B, d), logits (B, K), weights a, b, c -> scalar.
    """
    return a * one_hot_loss(logits) + b * information_entropy_log10(logits) + c * mode_seeking_loss(images, z)


# ---------------------------------------------------------------- PRE-DFKD


def js_disagreement_loss(student_logits, teacher_logits, temperature=3.0):
    """L_js = 1 - JSD( softmax(S(x)/tau), softmax(T(x)/tau) ): small when student and teacher disagree.

    student_logits, teacher_logits (B, K) -> scalar in [1 - log 2, 1]. JSD(P, Q) = KL(P || M)/2 + KL(Q || M)/2 with
    M = (P + Q)/2, summed over classes, averaged over the batch. PRE-DFKD [P]; tau = 3 [C].
    The teacher's logits are detached: G receives this gradient through S alone [C].
    Otherwise the authors' code differs from the text: it clamps P, Q and M to [0.01, 0.99], averages over classes too
    (a factor 1/K), has M as the target, KL(M || P), and clamps the result to [0, 1].
    """
    log_p = (student_logits / temperature).log_softmax(1)
    log_q = (teacher_logits.detach() / temperature).log_softmax(1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    kl_p = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    kl_q = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    return 1 - (kl_p + kl_q) / 2


# ---------------------------------------------------------------- soft-target synthesis


def weight_correlation(weight):
    """R_ij = cos(w_i, w_j), rows w_i of a layer's weight: how the layer's outputs vary together.

    weight (D, M) -> (D, D), symmetric, unit diagonal, positive semi-definite, often singular. Soft targets [P].
    """
    w = F.normalize(weight, dim=1)
    return (w @ w.T).clamp(-1, 1).fill_diagonal_(1)  # also for a unit without weights, which varies by itself


def feature_distribution(weight, sigma):
    """N(0, sigma^2 R): the distribution of a layer's outputs h before the activation.

    weight (D, M) of the layer -> a distribution over (D,). The covariance is the paper's [P], the mean 0 is ours [I].
    R may be singular, and a singular matrix has no Cholesky factor. So 1e-4 is added to its diagonal [I].
    """
    R = weight_correlation(weight)
    covariance = sigma**2 * (R + 1e-4 * torch.eye(len(R), device=R.device))
    return MultivariateNormal(R.new_zeros(len(R)), scale_tril=torch.linalg.cholesky(covariance))


@torch.no_grad()
def feature_scale(weight, rest, L_oh, count=4000):
    """The sigma at which the teacher's L_oh on sampled features h is `L_oh`, found by bisection [I].

    weight (D, M) of the layer, rest: h (B, D) -> logits (B, K), L_oh in nats -> float.
    Why: sigma has the unit of this teacher's features, and only data would tell how large they are. But a trained
    teacher is sure of the data that it was trained on, whatever that unit is. L_oh falls as sigma grows. The samples
    are always the same ones.
    """
    generator = torch.Generator().manual_seed(0)
    unit = feature_distribution(weight, 1.0)
    noise = torch.randn(count, len(weight), generator=generator).to(weight)
    h = noise @ unit.scale_tril.T  # of standard deviation 1
    low, high = 1e-3, 1e3
    for _ in range(30):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if one_hot_loss(rest(middle * h)) < L_oh else (middle, high)
    if not 2e-3 < middle < 5e2:
        raise ValueError(f"no sigma makes the teacher's L_oh {L_oh}")
    return middle


@torch.no_grad()
def soft_labels(weight, rest, sigma, temperature, count):
    """y = softmax(rest(h) / tau), h ~ N(0, sigma^2 R): soft targets from one distribution over all classes [P].

    weight (D, M) of the modelled layer -> (count, K). rest: h (B, D) -> logits (B, K) is what follows that layer in the
    teacher, from its activation on, in eval mode.
    """
    h = feature_distribution(weight, sigma).sample((count,))
    return (rest(h) / temperature).softmax(1)


def soft_target_loss(logits, targets, temperature):
    """CE( y, softmax(T(x)/tau) ), batch mean: small when the teacher's output on x is the soft target y.

    logits (B, K) = T(x), targets y (B, K) distributions -> scalar, at least H(y).
    ZSKD minimises it alone, tau = 20 [C]. Soft-target synthesis adds lambda_a L_a, tau = 20 [P].
    """
    return F.cross_entropy(logits / temperature, targets)


# ---------------------------------------------------------------- ZSKD


def dirichlet_concentrations(weight):
    """c_kj = (cos(w_k, w_j) - min_j) / (max_j - min_j): class similarity, each row scaled to [0, 1].

    weight (K, M) of the teacher's last layer -> (K, K). ZSKD [C]. With two classes it is always the identity:
    nearly all labels are one-hot.
    """
    cosine = weight_correlation(weight)
    low, high = cosine.aminmax(dim=1, keepdim=True)
    return (cosine - low) / (high - low).clamp_min(1e-12)  # a row of equal cosines, as of one class: 0, not 0/0


def dirichlet_targets(weight, classes, beta):
    """y ~ Dirichlet(beta c_k + 1e-4), k the intended class: ZSKD's soft labels.

    weight (K, M) of the teacher's last layer, classes (B,), beta (B,) -> (B, K). The 1e-4 is the code's [C].
    Half of a transfer set has beta = 1, half 0.1: so the text [P], and this. In the public code the 0.1 has no effect:
    the rows are scaled to [0, 1] again before use [C].
    """
    return Dirichlet(beta[:, None] * dirichlet_concentrations(weight)[classes] + 1e-4).sample()


def rescaled(images, mean, std):
    """The batch min-max rescaled to pixels in [0, 1]: ZSKD, before every step [C]; here after each [I].

    images (B, C, H, W) normalised with mean and std, (C, 1, 1) each -> the same form.
    """
    pixels = images * std + mean
    low, high = pixels.aminmax()
    return ((pixels - low) / (high - low).clamp_min(1e-12) - mean) / std


# ---------------------------------------------------------------- DeepInversion


def total_variation(images):
    """TV(x): sum of the four L2 norms of neighbour differences, horizontal, vertical and both diagonals.

    images (B, C, H, W) -> scalar; each norm is over the whole batch. DeepInversion [C].
    """
    x = images
    return (
        vector_norm(x[..., :, 1:] - x[..., :, :-1])
        + vector_norm(x[..., 1:, :] - x[..., :-1, :])
        + vector_norm(x[..., 1:, 1:] - x[..., :-1, :-1])
        + vector_norm(x[..., 1:, :-1] - x[..., :-1, 1:])
    )


class ChannelStatistics(torch.autograd.Function):
    """Mean and biased variance per channel: h (B, C, H, W) -> (C,), (C,), float32 at least.

    With n = B H W,
        d mean / d h = 1 / n,   d var / d h = 2 (h - mean) / n,
    so that the gradient is one line in h for each channel. torch.var_mean gives the same; with it, a step of
    DeepInversion for a WRN-40-2 takes 1.7 times as long on a CPU.
    """

    @staticmethod
    def forward(h):
        x = at_least_float32(h)
        mean = x.mean((0, 2, 3))
        return mean, (x - mean[:, None, None]).square_().mean((0, 2, 3))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.save_for_backward(*inputs, outputs[0])

    @staticmethod
    def backward(ctx, of_mean, of_var):
        h, mean = ctx.saved_tensors
        n = h.numel() / len(mean)
        slope = 2 * of_var / n
        start = of_mean / n - slope * mean
        return torch.addcmul(start[:, None, None], slope[:, None, None], at_least_float32(h)).to(h.dtype)


def batch_norm_loss(inputs, running_mean, running_var):
    """||mu(h) - BN.mean||_2 + ||sigma^2(h) - BN.var||_2 of one BatchNorm layer, biased variance.

    inputs h (B, C, H, W) of the layer, running_mean and running_var (C,) -> scalar. DeepInversion sums it over the
    teacher's layers [C].
    """
    mean, var = ChannelStatistics.apply(inputs)
    return vector_norm(mean - running_mean) + vector_norm(var - running_var)


BATCH_NORM = nn.BatchNorm2d, nn.SyncBatchNorm  # the second: what training on several GPUs makes of the first


def batch_norm_inputs(net, x):
    """net(x), and [(layer, input), ...] of the BATCH_NORM layers on its way. No hook stays, after an error either."""
    inputs = []
    layers = [m for m in net.modules() if isinstance(m, BATCH_NORM)]

    def note(layer, h, named):
        h = h[0] if h else named["input"]
        if h.dim() == 4:  # a SyncBatchNorm may follow an nn.Linear, too
            inputs.append((layer, h))

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
        return net(x), inputs


def batch_norm_prior(batch_norm):
    """sum_l BN_l over the layers and inputs that `batch_norm_inputs` collected -> scalar; 0 without BatchNorm."""
    losses = [batch_norm_loss(h, layer.running_mean, layer.running_var) for layer, h in batch_norm]
    return sum(losses, torch.zeros(()))


def deepinversion_loss(images, logits, classes, batch_norm, a_tv, a_2, a_f):
    """CE(t, y) + a_tv TV(x) + a_2 ||x||_2 + a_f sum_l BN_l: DeepInversion's objective [C].

    images (B, C, H, W), logits (B, K), classes y (B,), batch_norm = [(layer, input), ...] as `batch_norm_inputs`
    collects them, empty for a teacher without BatchNorm -> scalar.
    CIFAR-10: a_tv = 2.5e-5 to 1e-3, a_f = 10 to 100, a_2 = 0 [C].
    """
    L_ce, L_bn = F.cross_entropy(logits, classes), batch_norm_prior(batch_norm)
    return L_ce + a_tv * total_variation(images) + a_2 * vector_norm(images) + a_f * L_bn


def rolled(images):
    """The whole batch moved by up to 2 pixels in both directions; what leaves on one side enters on the other.

    images (B, C, H, W) -> the same shape. DeepInversion does so before every step [C].
    """
    return images.roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))


# ---------------------------------------------------------------- images optimised towards their targets


def smooth_noise(count, channels, image_size=32, device="cpu"):
    """Weak noise drawn on an 8 x 8 grid and enlarged to images (count, C, H, W): where our images begin [I].

    Some of the beginning is left in a finished image, and S learns more from images that look less like noise.
    """
    noise = 0.5 * torch.randn(count, channels, 8, 8, device=device)
    return F.interpolate(noise, size=(image_size, image_size), mode="bilinear")


def augmented(images, mirror, degrees=20):
    """Images sampled on grids turned by up to `degrees`, scaled by 0.8 to 1.2, shifted by up to 4 pixels in 32.

    images (B, C, H, H), square -> the same shape, bilinear; with `mirror`, half of them flipped.
    ZSKD augments what S sees [C]. Soft-target synthesis does as ZSKD [I]. The ranges are ours [I].
    """

    def uniform(low, high):
        return torch.empty(len(images), dtype=images.dtype, device=images.device).uniform_(low, high)

    angle, scale = uniform(-math.radians(degrees), math.radians(degrees)), uniform(0.8, 1.2)
    flip = torch.where(uniform(-1, 1) < 0, -1.0, 1.0).to(scale) if mirror else torch.ones_like(scale)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = uniform(-0.25, 0.25), uniform(-0.25, 0.25)
    theta = torch.stack([flip * cos, -sin, shift[0], flip * sin, cos, shift[1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def mixed(images):
    """Each image mixed with another of the batch: a x_1 + (1 - a) x_2, a ~ U(0, 1) for each.

    images (B, C, H, W) -> the same shape. It is mixup (Zhang et al. 2018) without its labels: S learns T's answers to
    the mixtures, as in Beyer et al. 2022. For synthetic images it is ours [I].
    """
    a = torch.rand(len(images), 1, 1, 1, dtype=images.dtype, device=images.device)
    return a * images + (1 - a) * images[torch.randperm(len(images), device=images.device)]


def label_shares(t, y, intended):
    """Shares: of images that T puts into their label's top class; of labels whose top class is not the intended one."""
    top = y.argmax(1)
    return dict(agreement=(t.argmax(1) == top).float().mean(), strayed=(top != intended).float().mean())


def synthesise(objective, images, steps, lr, constrain=None, settle=0.0, factor=1.0, report=None):
    """x* = argmin_x objective(x) by Adam, from `images` (B, C, H, W) -> x*, the objective's last value.

    `constrain`, x -> x, is applied after every step. With `settle` = 0.01, it ends when 50 steps bring less than 1 % of
    the decrease so far, after 150 steps at the earliest. `factor` multiplies the gradient: with the number of images,
    its size beside Adam's eps does not depend on the batch, over which an objective is a mean. `report(step, value)` is
    called every 50 steps.

    Soft-target synthesis of the logits without lambda_a L_a and with our additions [I] (400 = tau^2, `augmented`,
    `smooth_noise`, `factor`), for a teacher whose last layer is `last` and pixels from `low` to `high`:
        rest = torch.nn.Identity()
        y = soft_labels(last.weight, rest, feature_scale(last.weight, rest, 0.2), 20, 500)
        x, _ = synthesise(lambda x: 400 * soft_target_loss(teacher(augmented(x, mirror=False)), y, 20),
                          smooth_noise(500, channels=1), 100, 0.1, lambda x: x.clamp(low, high), factor=500)
    """
    x = images.clone(memory_format=torch.channels_last).requires_grad_()
    optimiser = torch.optim.Adam([x], lr)
    losses, means = [], []
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        L = objective(x)
        (factor * L).backward(inputs=[x])
        optimiser.step()
        if constrain:
            x.data = constrain(x.data)
        losses.append(L.detach())
        if step % 50 == 0:
            means.append(torch.stack(losses).mean().item())
            losses = []
            if report:
                report(step, means[-1])
            if settle and len(means) > 2 and means[-2] - means[-1] < settle * (means[0] - means[-1]):
                break
    return x.detach(), L.detach()
