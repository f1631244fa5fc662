"""Section ``prepare`` of params.yaml, which every data set reads what it needs from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from stages.common.config import Config, Seed

Channel = Annotated[int, Field(ge=0, le=255)]
Colour = Annotated[tuple[Channel, Channel, Channel], Field(strict=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Literal[
    "wastesim",
    "voc",
    "cityscapes",
    "ade20k",
    "coco-panoptic",
    "coco-stuff",
    "coco-instances",
    "camvid",
    "folder",
]


class WastesimConfig(Config):
    """How many belt scenes are drawn, and how."""

    train: int = Field(ge=1)
    val: int = Field(ge=1)
    test: int = Field(ge=1)
    size: int = Field(ge=64, le=2048)
    min_objects: int = Field(ge=1)
    max_objects: int = Field(ge=1, le=100)
    seed: Seed

    @model_validator(mode="after")
    def _ordered(self) -> WastesimConfig:
        if self.min_objects > self.max_objects:
            raise ValueError("min_objects must not be above max_objects")
        return self


class PrepareConfig(Config):
    """Section ``prepare`` of params.yaml."""

    dataset: Name
    root: str
    split: Literal["official", "random", "sbd"]
    ratios: Annotated[tuple[Share, Share, Share], Field(strict=False)]
    split_seed: Seed
    train_fraction: float = Field(gt=0, le=1)
    classes: Annotated[
        tuple[Annotated[dict[str, Colour], Field(min_length=1, max_length=1)], ...],
        Field(strict=False),
    ]
    void_index: int = Field(ge=1, le=255)
    wastesim: WastesimConfig

    @field_validator("classes", mode="before")
    @classmethod
    def _in_order(cls, classes: Any) -> Any:
        if isinstance(classes, dict) and classes:
            message = "must be a list of lines `- name: [red, green, blue]`, because their order is the mask value"
            raise ValueError(f"{message} and DVC does not see the order of keys")
        return classes or ()

    @model_validator(mode="after")
    def _whole(self) -> PrepareConfig:
        names = [name for line in self.classes for name in line]
        if len(set(names)) < len(names):
            raise ValueError("a class of classes stands twice; names must differ")
        if abs(sum(self.ratios) - 1) > 1e-6:
            raise ValueError("ratios must add up to 1")
        if len(self.classes) > self.void_index:
            raise ValueError(
                f"{len(self.classes)} classes leave no room for void_index {self.void_index}"
            )
        if self.split == "sbd" and self.dataset != "voc":
            raise ValueError(f"split sbd is for dataset voc alone, not for {self.dataset}")
        return self
