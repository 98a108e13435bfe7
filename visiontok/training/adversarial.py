"""Losses that make decoded images look right: a classifier's distance, and a discriminator (arXiv:2012.09841)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.errors import MissingDependencyError
from visiontok.tokenizers.pixel_decoder import same_padding

__all__ = ["Adversary", "Discriminator", "Perceptual", "hinge", "lecam"]

_SIZE, _POOLED, _BLUR = 224, 16, (1.0, 3.0, 3.0, 1.0)


class Perceptual(nn.Module):
    """Mean square difference of a frozen classifier's logits, both images at 224 pixels.

    Args:
        name: timm model; the release of TiTok and One-D-Piece uses ConvNeXt-S.
        pretrained: Load timm's weights.

    Raises:
        MissingDependencyError: timm is not installed.
    """

    def __init__(self, name: str, pretrained: bool = True) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise MissingDependencyError("a perceptual loss needs timm: pip install 'visiontok[timm]'") from error
        # In a list, so that checkpoints do not hold what timm has.
        classifier: Any = timm.create_model(name, pretrained=pretrained).eval()
        self._classifier = [classifier.requires_grad_(False)]

    def forward(self, made: Tensor, images: Tensor) -> Tensor:
        """The distance of `(B, 3, H, W)` images in [0, 1]."""
        classifier = self._classifier[0].to(images.device)
        mean, std = (
            torch.tensor(classifier.pretrained_cfg[key], device=images.device).view(1, 3, 1, 1)
            for key in ("mean", "std")
        )

        def logits(x: Tensor) -> Tensor:
            scaled = F.interpolate(x, (_SIZE, _SIZE), mode="bilinear", antialias=True)
            return classifier((scaled - mean) / std)

        with torch.no_grad():
            wanted = logits(images)
        return F.mse_loss(logits(made), wanted)


class Discriminator(nn.Module):
    """Logits `(B, 1, 16, 16)` of images: real above, made below zero.

    Args:
        width: Channels of the first layer; each of the stages but the first doubles them and all halve the image.
        stages: Of convolution, blurred halving, norm and leaky ReLU.
    """

    def __init__(self, width: int = 128, stages: int = 3) -> None:
        super().__init__()
        widths = [width, *(width * 2**stage for stage in range(stages))]
        self.first = nn.Conv2d(3, width, 5, padding=2)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(32, channels), channels) for channels in widths[1:])
        last = widths[-1]
        self.head = nn.Sequential(nn.Conv2d(last, last, 1), nn.LeakyReLU(0.1), nn.Conv2d(last, 1, 5, padding=2))
        line = torch.tensor(_BLUR) / sum(_BLUR)
        self.register_buffer("blur", line[:, None] * line, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(images), 0.1)
        for conv, norm in zip(self.convs, self.norms):
            x = conv(x)
            kernel = self.get_buffer("blur").expand(x.shape[1], 1, -1, -1)
            x = F.conv2d(same_padding(x, len(_BLUR), 2), kernel, stride=2, groups=x.shape[1])
            x = F.leaky_relu(norm(x), 0.1)
        return self.head(F.adaptive_max_pool2d(x, _POOLED))


def hinge(real: Tensor, made: Tensor) -> Tensor:
    """The discriminator's hinge loss of its logits for real and made images."""
    return (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2


def lecam(real: Tensor, made: Tensor, average_real: Tensor, average_made: Tensor) -> Tensor:
    """Keeps mean logits from leaving the running means of the other kind (arXiv:2104.03310)."""
    return F.relu(real - average_made).square().mean() + F.relu(average_real - made).square().mean()


class Adversary(nn.Module):
    """A discriminator with its own optimizer, trained after each update of the decoder.

    Its parameters take gradients only in its own step, so that the decoder's optimizer never sees them.

    Args:
        start: Updates of the decoder before it acts.
        lecam_weight: Of `lecam`.
        betas, weight_decay, clip_grad: Of its AdamW.
        decay: Of the running means of its logits.
    """

    def __init__(
        self, start: int, lecam_weight: float, betas: tuple[float, float], weight_decay: float,
        clip_grad: float | None, decay: float = 0.999,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network = Discriminator().requires_grad_(False)
        self.start, self.lecam_weight, self.clip_grad, self.decay = start, lecam_weight, clip_grad, decay
        self.optimizer = torch.optim.AdamW(self.network.parameters(), 1e-4, betas, weight_decay=weight_decay)
        self.updates = 0
        self.register_buffer("averages", torch.zeros(2))

    def get_extra_state(self) -> dict[str, Any]:
        """What resuming needs beside the weights."""
        return {"optimizer": self.optimizer.state_dict(), "updates": self.updates}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes it back."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]

    @property
    def acts(self) -> bool:
        """Whether it is time."""
        return self.updates >= self.start

    def loss(self, made: Tensor) -> Tensor:
        """What the decoder is to lower."""
        return -self.network(made).mean()

    def step(self, images: Tensor, made: Tensor, rate: float) -> None:
        """Trains the discriminator once, if it is time, and counts the update."""
        if self.acts:
            self._step(images, made, rate)
        self.updates += 1

    def _step(self, images: Tensor, made: Tensor, rate: float) -> None:
        self.network.requires_grad_(True)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        real, fake = self.network(images), self.network(made)
        averages = self.get_buffer("averages")
        loss = hinge(real, fake) + self.lecam_weight * lecam(real.mean(), fake.mean(), *averages.unbind())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_grad)
        self.optimizer.step()
        self.network.requires_grad_(False)
        averages.lerp_(torch.stack((real.mean(), fake.mean())).detach(), 1 - self.decay)
