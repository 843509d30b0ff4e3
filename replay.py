"""Replay: what S saw earlier comes back, from a VAE that models it (PRE-DFKD) or from a bank of stored samples.

    [P] the paper's text,  [C] the authors' public code,  [I] our reading where neither settles it.

Notation as in generators.py; further E, M: the VAE's encoder and decoder; x_hat = M(z) with z ~ N(mu, sigma^2), the
reconstruction of x; mu, log_var = E(x), each (B, d).

Reference
    PRE-DFKD     Binici et al., AAAI 2022                https://arxiv.org/abs/2201.03019
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from generators import Generator, at_least_float32, information_entropy_log10, latents, one_hot_loss, uniform_weights

# ---------------------------------------------------------------- the VAE


class Encoder(nn.Module):
    """E: x (B, C, H, W) -> mu, log_var (B, d) each; the network of PRE-DFKD's code [C], where width = 128.

    Each column of pixels is first divided by its L2 norm, the norm along the height [C]. The second positional argument
    of BatchNorm is its eps, 0.8, as in `Generator` [C]. The image is halved by nearest resampling, which takes every
    other pixel [C]; of an odd side the last one, too [I].
    """

    bf16 = False

    def __init__(self, latent_dim, channels, image_size=32, width=128):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width // 2, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width // 2, eps=0.8)
        self.conv2 = nn.Conv2d(width // 2, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width, eps=0.8)
        self.conv3 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(width)
        features = width * math.ceil(image_size / 8) ** 2
        self.mu, self.log_var = nn.Linear(features, latent_dim), nn.Linear(features, latent_dim)

    def forward(self, x):
        x = F.normalize(x, p=2, dim=2)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            x = F.leaky_relu(self.bn1(self.conv1(x)), 0.2, inplace=True)  # (B, 64, H, W)
            x = F.leaky_relu(self.bn2(self.conv2(x)), 0.2, inplace=True)[..., ::2, ::2]  # (B, 128, H/2, W/2)
            x = self.bn3(self.conv3(x))[..., ::2, ::2].flatten(1)  # (B, 128 ceil(H/8) ceil(W/8))
            mu, log_var = self.mu(x), self.log_var(x)
        return at_least_float32(mu), at_least_float32(log_var)


class VAE(nn.Module):
    """Encoder E and decoder M, the generator's network without spectral norm; weights U(-0.08, 0.08), biases 0 [C].

    The authors' latent of 1000 makes M's linear layer alone 33 MB, where the paper says 2.1 MB for all.
    A latent of 32 and a width of 32, the default of dfkd.py, make 0.5 MB [I]. `pixels` as in `Generator`.
    """

    def __init__(self, latent_dim, channels, image_size=32, width=128, pixels=None):
        super().__init__()
        self.encoder = Encoder(latent_dim, channels, image_size, width)
        self.decoder = Generator(latent_dim, channels, image_size, width, pixels=pixels)
        uniform_weights(self, 0.08)

    def forward(self, x):
        mu, log_var = self.encoder(x)
        return self.decoder(reparametrise(mu, log_var)), mu, log_var


def reparametrise(mu, log_var):
    """z = mu + sigma eps, eps ~ N(0, I): a sample of N(mu, sigma^2) that gradients pass through."""
    return mu + (log_var / 2).exp() * torch.randn_like(mu)


def reconstruction_loss(images, reconstructed, logits, reconstructed_logits):
    """L_rec = mean |x - x_hat| + mean |T(x) - T(x_hat)|: the synthetic data-aware reconstruction loss [P, C].

    images, reconstructed (B, C, H, W), logits, reconstructed_logits (B, K) -> scalar. The second term is there because
    synthetic images lose their class with small changes of their pixels [P].
    """
    return F.l1_loss(reconstructed, images) + F.l1_loss(reconstructed_logits, logits)


def kl_divergence(mu, log_var):
    """KL( N(mu, sigma^2) || N(0, I) ) = mean_b( -1/2 sum_d (1 + log sigma^2 - mu^2 - sigma^2) ) [C].

    mu, log_var (B, d) -> scalar >= 0.
    """
    return (-(1 + log_var - mu**2 - log_var.exp()) / 2).sum(1).mean()


def vae_loss(L_rec, mu, log_var):
    """L_vae = L_rec + 1e-5 KL( N(mu, sigma^2) || N(0, I) ): the VAE's objective [C].

    L_rec scalar, mu, log_var (B, d) -> scalar.
    """
    return L_rec + 1e-5 * kl_divergence(mu, log_var)


def latent_balance_loss(z, logits):
    """L_oh + 5 L_ie + MSE(var(z), 1) + MSE(mean(z), 0): category-balanced inference's objective [P, C].

    z (B, d), logits (B, K) = T(M(z)), B > 1 -> scalar. L_ie is in log10; the statistics are per dimension over the
    batch [C].
    """
    var, mean = torch.var_mean(z, 0)
    L_ie = information_entropy_log10(logits)
    return one_hot_loss(logits) + 5 * L_ie + ((var - 1) ** 2).mean() + (mean**2).mean()


def balanced_latents(z, decoder, teacher, lr, gradient_in_decoder=False):
    """Category-balanced inference of memory samples: z takes one Adam step on `latent_balance_loss` [P, C].

    z (B, d) ~ N(0, I) -> z (B, d) and the loss, both without gradient. With `gradient_in_decoder`, the
    decoder's weights get the loss's gradient, too, at the z that came in. The authors' code does not clear it before
    the VAE's step [C].
    """
    z = z.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([z], lr)
    loss = latent_balance_loss(z, teacher(decoder(z)))
    loss.backward(inputs=[z, *decoder.parameters()] if gradient_in_decoder else [z])
    optimiser.step()
    return z.detach(), loss.detach()


class PseudoReplay(nn.Module):
    """A memory that stores no sample: a VAE learns novel images and its own, and new ones are drawn from it (PRE-DFKD).

    `teacher_term` and `balanced` switch the paper's two ingredients off.
    M is in eval mode for the samples that S sees, and in train mode in the VAE's own step [C].
    """

    def __init__(self, vae, lr, latent_lr, teacher_term=True, balanced=True):
        super().__init__()
        self.vae, self.latent_lr = vae, latent_lr
        self.teacher_term, self.balanced = teacher_term, balanced
        self.optimiser = torch.optim.Adam(vae.parameters(), lr, fused=True)

    def bytes(self):
        return sum(v.nbytes for v in self.vae.state_dict().values())

    def recall(self, count, teacher):
        """Memory samples for S, (count, C, H, W), no gradient; count > 1, as in `memory_count`."""
        self.vae.eval()
        return self.draw(count, teacher)[0]

    def draw(self, count, teacher, gradient_in_decoder=False):
        """x_mem = M(z), z ~ N(0, I) after category-balanced inference, in M's mode [P, C] -> x_mem, the loss of z."""
        decoder, L_balance = self.vae.decoder, None
        z = latents(decoder, count)
        if self.balanced:
            z, L_balance = balanced_latents(z, decoder, teacher, self.latent_lr, gradient_in_decoder)
        with torch.no_grad():
            return decoder(z), L_balance

    def learn(self, novel, teacher, rehearse):
        """One step of E and M on half of the novel batch and, with `rehearse`, B/8 samples of their own -> loss terms.

        E moves on L_vae. M moves on L_vae plus the balance objective of the rehearsed samples [C]. Half of an odd batch
        is rounded up [I].
        """
        self.vae.train()
        self.optimiser.zero_grad()
        x, L_balance = novel[: (len(novel) + 1) // 2], None
        if rehearse:
            x_mem, L_balance = self.draw(memory_count(novel), teacher, gradient_in_decoder=True)
            x = torch.cat([x, x_mem])
        x_hat, mu, log_var = self.vae(x)
        if self.teacher_term:
            L_rec = reconstruction_loss(x, x_hat, teacher(x), teacher(x_hat))
        else:
            L_rec = F.l1_loss(x_hat, x)
        L_vae = vae_loss(L_rec, mu, log_var)
        L_vae.backward(inputs=list(self.vae.parameters()))  # nothing into G or T, whoever calls
        self.optimiser.step()
        terms = dict(L_vae=L_vae, L_rec=L_rec, L_kl=kl_divergence(mu, log_var), L_balance=L_balance)
        return {name: term.detach() for name, term in terms.items() if term is not None}

    def get_extra_state(self):
        return self.optimiser.state_dict()

    def set_extra_state(self, state):
        self.optimiser.load_state_dict(state)


def memory_count(novel):
    """B/8, the number of memory samples beside B novel ones [C]; at least 2, for the batch statistics [I]."""
    return max(2, len(novel) // 8)


# ---------------------------------------------------------------- the bank that it is compared with


class Bank(nn.Module):
    """A bounded store of earlier samples: new ones replace old ones at random, draws are uniform.

    The straightforward replay that PRE-DFKD argues against, as in its baseline MB-DFKD [P]; what is stored when is our
    choice [I]. It has the methods of `PseudoReplay`, so that a loop need not know which of the two it has.
    """

    def __init__(self, capacity, channels, image_size=32):
        super().__init__()
        self.register_buffer("images", torch.zeros(capacity, channels, image_size, image_size))
        self.filled = 0

    def bytes(self):
        return self.images[: self.filled].nbytes

    def recall(self, count, teacher):
        """`count` stored images, drawn uniformly with replacement; none from an empty bank."""
        if not self.filled:
            return self.images[:0]
        return self.images[torch.randint(self.filled, (count,), device=self.images.device)]

    def learn(self, novel, teacher, rehearse):
        """Store B/8 novel images: in free places first, then in place of random earlier ones. There is no loss."""
        x = novel[: min(memory_count(novel), len(self.images))]
        free = min(len(x), len(self.images) - self.filled)
        places = torch.arange(self.filled, self.filled + free, device=x.device)
        others = torch.randperm(self.filled, device=x.device)[: len(x) - free]
        self.images[torch.cat([places, others])] = x.detach()
        self.filled += free
        return {}

    def get_extra_state(self):
        return self.filled

    def set_extra_state(self, filled):
        self.filled = filled
