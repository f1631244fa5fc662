"""Implicit semantic data augmentation for segmentation (Wang et al. 2019, 2021; thesis section 2.2.1): a loss in place of samples."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from featurestore import VOID
from stages.augment.base import Augmented, Augmenter, Context, LogitAdjustment, VariantConfig
from stages.segmentation.regions import labels_at


class ISDAConfig(VariantConfig):
    """Variant ``isda``."""

    augmenter: Literal["isda"]
    strength: float = Field(default=2.5, gt=0)  # lambda_0, reached at the end of training


class ISDA(Augmenter):
    """Cross-entropy under infinitely many samples around each vector, in closed form.

    Let a vector x of class y, in front of the last 1 x 1 convolution (w, b), be drawn from N(x, lambda * V_y) instead, V_y
    diagonal. The expected cross-entropy is at most that of the scores ``w_k x + b_k + lambda / 2 * sum(V_y * (w_k - w_y)^2)``
    (the paper's Proposition 1, with a diagonal covariance as in its code for segmentation). V is estimated on the way, over all
    vectors seen, and not differentiated. lambda grows from 0 with the steps, because V means little at first.

    Attributes
    ----------
    counts
        (K,) vectors seen of each class.
    means, variances
        (K, A) of their A channels.
    """

    def __init__(self, config: ISDAConfig, context: Context) -> None:
        super().__init__(config, context)
        last = context.decoder.last
        device = context.accelerator.device
        self.strength, self.steps = config.strength, context.steps
        self.step = 0
        self.counts = torch.zeros(last.out_channels, device=device)
        self.means, self.variances = torch.zeros(
            2, last.out_channels, last.in_channels, device=device
        )

    def adjust_logits(self, masks: Tensor) -> LogitAdjustment:
        """Add each pixel's margin to its scores; masks (B, H, W)."""

        def change(embeddings: Tensor, scores: Tensor, last: nn.Conv2d) -> Tensor:
            labels = labels_at(masks, (scores.shape[2], scores.shape[3]))
            self._observe(embeddings.detach().float(), labels)
            with torch.autocast(
                scores.device.type, enabled=False
            ):  # margins are differences of nearly equal sums
                margins = self.margins(
                    last.weight.float().flatten(1)
                )  # (K, K), row: the pixel's class
            known = labels != VOID
            added = margins[torch.where(known, labels, 0)] * known[..., None]  # (B, h, w, K)
            return scores.float() + added.permute(0, 3, 1, 2)

        return change

    def margins(self, weight: Tensor) -> Tensor:
        """(K, A) weights -> (K, K): lambda / 2 * sum over A of V_y * (w_k - w_y)^2, at row y and column k."""
        ratio = self.strength * self.step / self.steps
        crossed = (self.variances * weight) @ weight.T  # at (y, k): sum of V_y * w_y * w_k
        squares = self.variances @ weight.square().T
        return ratio / 2 * (squares - 2 * crossed + crossed.diagonal()[:, None])

    @torch.no_grad()
    def _observe(self, embeddings: Tensor, labels: Tensor) -> None:
        """Merge a batch's moments (of all processes) into those of all vectors before."""
        classes = len(self.counts)
        known = labels.flatten() != VOID
        vectors = embeddings.permute(0, 2, 3, 1).flatten(0, 2)[known]  # (B, A, h, w) -> (n, A)
        index = labels.flatten()[known]
        sums = torch.zeros(3, classes, vectors.shape[1], device=vectors.device)
        sums[0].index_add_(0, index, torch.ones_like(vectors))
        sums[1].index_add_(0, index, vectors)
        sums[2].index_add_(0, index, vectors.square())
        number, total, squares = self.accelerator.reduce(sums, "sum")
        count = number[:, 0]
        mean = total / number.clamp(min=1)
        variance = (squares / number.clamp(min=1) - mean.square()).clamp(min=0)
        share = (count / (self.counts + count).clamp(min=1))[:, None]
        self.variances = (
            (1 - share) * self.variances
            + share * variance
            + share * (1 - share) * (self.means - mean).square()
        )
        self.means = torch.lerp(self.means, mean, share)
        self.counts = self.counts + count

    def after_step(self, added: Augmented) -> None:
        """Let lambda grow."""
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """The estimate, and how far lambda has grown."""
        return {
            "step": self.step,
            "counts": self.counts,
            "means": self.means,
            "variances": self.variances,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.step = state["step"]
        for name in ("counts", "means", "variances"):
            setattr(self, name, state[name].to(self.counts.device))
