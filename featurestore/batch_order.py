"""The order in which a training reads samples."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import numpy as np


@dataclass(frozen=True)
class BatchOrder:
    """Which samples make up which batch: a function of seed and epoch, for any number of ranks.

    Parameters
    ----------
    samples
        Number of samples to choose from.
    batch_size
        Samples a batch, of all ranks together.
    seed
        Seed of the shuffle; each epoch shuffles anew. None (default): in the store's order.
    drop_last
        Leave out a last batch that is not full; default: False.
    repeats
        How often an epoch goes over the samples, each time shuffled anew; default: 1.
    views
        Views of each sample, of which each repeat takes one at random; default: 1. More than one
        needs a seed.
    rank, ranks
        Number of this process, and of all that divide each batch; default: 0 of 1.

    Raises
    ------
    ValueError
        When the ranks cannot divide the batches evenly, or views cannot be drawn.
    """

    samples: int
    batch_size: int
    _: KW_ONLY
    seed: int | None = None
    drop_last: bool = False
    repeats: int = 1
    views: int = 1
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.ranks:
            raise ValueError(
                f"a batch of {self.batch_size} cannot be divided evenly over {self.ranks} processes"
            )
        if self.views > 1 and self.seed is None:
            raise ValueError("one of several views is drawn at random; give a seed")

    def __len__(self) -> int:
        seen = self.repeats * self.samples
        return seen // self.batch_size if self.drop_last else -(-seen // self.batch_size)

    def epoch(self, epoch: int) -> list[list[int]]:
        """List the view numbers of each batch of an epoch, for this rank.

        The views of sample s have the numbers s * views to s * views + views - 1. Within a batch
        they ascend: files are read forwards, neighbours at once. In a short last batch a rank's
        list may be empty.
        """
        order = np.tile(np.arange(self.samples), self.repeats)
        if self.seed is not None:
            rng = np.random.default_rng([self.seed, epoch])
            order = np.concatenate([rng.permutation(self.samples) for _ in range(self.repeats)])
            if self.views > 1:
                order = order * self.views + rng.integers(self.views, size=len(order))
        starts = range(0, len(self) * self.batch_size, self.batch_size)
        batches = (np.sort(order[start : start + self.batch_size]) for start in starts)
        return [np.array_split(batch, self.ranks)[self.rank].tolist() for batch in batches]
