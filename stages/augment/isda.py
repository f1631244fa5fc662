"""Implicit semantic data augmentation for segmentation: a loss in place of samples.

Wang et al. 2019, 2021; thesis section 2.2.1.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import override

from featurestore import VOID
from stages.augment.base import Augmented, Augmenter, Context, LogitAdjustment, State, VariantConfig
from stages.segmentation.regions import labels_at


class ISDAConfig(VariantConfig):
    """Strength of the implicit augmentation."""

    augmenter: Literal["isda"]
    strength: float = Field(2.5, gt=0, description="lambda_0, reached at the last step")


class ISDA(Augmenter):
    """Cross-entropy under infinitely many samples around each vector, in closed form.

    Let a vector x of class y, in front of the last 1 x 1 convolution (w, b), be drawn from
    N(x, lambda * V_y) instead, V_y diagonal. The expected cross-entropy is at most that of the
    logits ``w_k x + b_k + lambda / 2 * sum(V_y * (w_k - w_y)^2)`` (the paper's Proposition 1, with
    a diagonal covariance as in its code for segmentation). V is estimated during the training, over
    all vectors seen, and not differentiated. lambda grows linearly from 0, because V means little
    at first.

    Attributes
    ----------
    step
        Number of steps taken.
    counts
        (K,) vectors seen of each class.
    means, variances
        (K, A) of their A channels.
    """

    config: ISDAConfig

    def __init__(self, config: VariantConfig, context: Context) -> None:
        super().__init__(config, context)
        self.steps = context.steps
        self.start_round()

    @override
    def start_round(self) -> None:
        last, device = self.decoder.last, self.accelerator.device
        classes, channels = last.out_channels, last.in_channels
        self.step, self.counts = 0, torch.zeros(classes, device=device)
        self.means, self.variances = torch.zeros(2, classes, channels, device=device)

    @override
    def adjust_logits(self, masks: Tensor) -> LogitAdjustment:
        def adjust(embeddings: Tensor, logits: Tensor, last: nn.Conv2d) -> Tensor:
            labels = labels_at(masks, logits.shape[2:])
            self._observe(embeddings.detach().float(), labels)
            # Margins are differences of nearly equal sums: float32.
            with torch.autocast(logits.device.type, enabled=False):
                margins = self.margins(last.weight.float().flatten(1))
            known = labels != VOID
            added = margins[torch.where(known, labels, 0)] * known[..., None]  # (B, h, w, K)
            return logits.float() + added.permute(0, 3, 1, 2)

        return adjust

    def margins(self, weight: Tensor) -> Tensor:
        """Compute what is added to the logits of a pixel.

        Parameters
        ----------
        weight
            (K, A) of the last convolution.

        Returns
        -------
        Tensor
            (K, K): lambda / 2 * sum over A of V_y * (w_k - w_y)^2 at row y (the pixel's class) and
            column k.
        """
        strength = self.config.strength * self.step / self.steps
        crossed = (self.variances * weight) @ weight.T  # at (y, k): sum of V_y * w_y * w_k
        squares = self.variances @ weight.square().T
        return strength / 2 * (squares - 2 * crossed + crossed.diagonal()[:, None])

    @torch.no_grad()
    def _observe(self, embeddings: Tensor, labels: Tensor) -> None:
        """Merge the moments of a batch of all processes into the moments of all batches before."""
        vectors = embeddings.permute(0, 2, 3, 1).flatten(0, 2)  # (B, A, h, w) -> (n, A)
        index = labels.flatten().clamp(max=len(self.counts))  # void is a class of its own here
        sums = torch.zeros(3, len(self.counts) + 1, vectors.shape[1], device=vectors.device)
        for moment, values in enumerate((torch.ones_like(vectors), vectors, vectors.square())):
            sums[moment].index_add_(0, index, values)
        moments = self.accelerator.reduce(sums[:, :-1].contiguous(), "sum")
        # An overflow in fp16, whose step is skipped, is no batch.
        number, total, squares = torch.where(moments.isfinite().all(), moments, 0.0)
        count = number[:, 0]
        mean = total / number.clamp(min=1)
        variance = (squares / number.clamp(min=1) - mean.square()).clamp(min=0)
        fraction = (count / (self.counts + count).clamp(min=1))[:, None]
        self.variances = (
            (1 - fraction) * self.variances
            + fraction * variance
            + fraction * (1 - fraction) * (self.means - mean).square()
        )
        self.means = torch.lerp(self.means, mean, fraction)
        self.counts = self.counts + count

    @override
    def after_optimizer_step(self, added: Augmented) -> None:
        self.step += 1

    @override
    def state_dict(self) -> State:
        moments = {"counts": self.counts, "means": self.means, "variances": self.variances}
        return {"step": self.step, **moments}

    @override
    def load_state_dict(self, state: State) -> None:
        device = self.counts.device
        self.step = state["step"]
        self.counts, self.means, self.variances = (
            state[name].to(device) for name in ("counts", "means", "variances")
        )
