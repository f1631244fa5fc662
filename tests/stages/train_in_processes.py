"""Training stages on a small store, which ``test_distributed.py`` starts in several processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed as dist
from torch import nn

from stages import train_decoder, train_gan
from stages.augment.featuregan import FeatureGANConfig
from stages.augment.registry import NoneConfig
from stages.augment.self_training import SelfTrainingConfig
from stages.common.runtime import Machine
from stages.gan.monitor import MonitorConfig
from stages.train_decoder import TrainDecoderConfig
from stages.train_gan import TrainGanConfig
from stages.training.checkpoint import Checkpoint
from tests.factories import DECODER, GAN, IMAGE_GAN, MONITOR

GANS = {
    "gan": {"image_encoder": True, "kld_reduction": "sum", "lambda_info": 1.0},
    "oasis": {"adversarial_loss": "segmentation", "noise": "spatial"},
    "flow": {"family": "flow"},
    "concat": {"conditioning": "concat"},
    "image": IMAGE_GAN,
    # With seed 0 an activation of step 2 is at the kink of a ReLU: a relative change of all weights
    # by 1e-7 changes gradients by 1.5% there, in one process, too.
    "pseudo": {"unlabelled": True, "seed": 1},
}
SELF_TRAINING = {"augmenter": "self-training", "rounds": 1}
MEAN_TEACHER = {"augmenter": "self-training", "teacher": "ema"}


class NoDropout(nn.Module):
    """Which values are dropped is drawn in each process, so the sum of two is not one; left out."""

    def __init__(self, p: float) -> None:
        super().__init__()

    def forward(self, x):
        return x


def main(stages: str, features: Path, root: Path, gan: Path, saves: int = 0) -> None:
    """Train GANs of :data:`GANS`, a decoder and its backbone (``unfrozen``), or other decoders.

    ``saves`` above 0: die after so many saved states.
    """
    save, saved = Checkpoint.save, []

    def dying(self: Checkpoint, **state) -> None:
        save(self, **state)
        saved.append(1)
        if len(saved) == saves:
            dist.barrier()
            os._exit(9)

    Checkpoint.save = dying  # type: ignore[method-assign]
    nn.Dropout = NoDropout  # type: ignore[assignment, misc]
    dist.destroy_process_group = lambda group=None: (
        None
    )  # processes that have parted do not meet again; the next stage needs them
    for stage in stages.split(","):
        train(stage, features, root, gan, checkpoint_minutes=0 if saves else 60)


def train(stage: str, features: Path, root: Path, gan: Path, checkpoint_minutes: float) -> None:
    apart = (
        "APART" in os.environ and os.environ["RANK"] != "0"
    )  # as where machines do not share a disk
    machine = Machine(
        device="cpu",
        workers=0,
        shard="sharded" in root.name,
        checkpoint_minutes=checkpoint_minutes,
        scratch=root / ("other" if apart else "scratch"),
    )
    arguments = {
        "features": features,
        "out": root / stage,
        "metrics": root / "metrics" / stage,
        "logs": root / "logs",
        "machine": machine,
    }
    monitor = MonitorConfig(**MONITOR)
    if stage in GANS:
        train_gan.run(TrainGanConfig(**{**GAN, **GANS[stage]}), monitor, **arguments)
    else:
        changes, variant = {}, FeatureGANConfig(augmenter="featuregan", ratio=2)
        if stage == "unfrozen":
            changes = {"backbone": "trained", "backbone_lr": 1e-4, "image_augment": []}
            variant = NoneConfig(augmenter="none")
        elif stage == "self-training":
            variant = SelfTrainingConfig(**SELF_TRAINING)
        elif stage == "mean-teacher":
            variant = SelfTrainingConfig(**MEAN_TEACHER)
        config = TrainDecoderConfig(**{**DECODER, "lr": 5e-4, **changes})
        train_decoder.run(config, variant, monitor, name=stage, seed=0, gan=gan, **arguments)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:5]), *map(int, sys.argv[5:]))
