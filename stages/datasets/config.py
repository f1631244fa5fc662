"""Section ``prepare`` of params.yaml, which every data set reads what it needs from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from stages.common.config import Config, Listed, Seed
from stages.data.images import MAX_PIXELS

Channel = Annotated[int, Field(ge=0, le=255)]
Colour = Annotated[tuple[Channel, Channel, Channel], Listed]
ClassLine = Annotated[dict[str, Colour], Field(min_length=1, max_length=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Literal[
    "auto",
    "wastesim",
    "voc",
    "cityscapes",
    "ade20k",
    "coco-panoptic",
    "coco-stuff",
    "coco-instances",
    "camvid",
    "folder",
    "labelme",
    "cvat-masks",
    "cvat-xml",
    "coco",
    "roboflow-masks",
]


class WastesimConfig(Config):
    """How many belt scenes are drawn, and how."""

    train: int = Field(240, ge=1, description="training images")
    val: int = Field(60, ge=1, description="validation images")
    test: int = Field(100, ge=1, description="test images")
    size: int = Field(160, ge=64, le=2048, description="side of a scene in pixels")
    min_objects: int = Field(2, ge=1, description="fewest objects in a scene")
    max_objects: int = Field(5, ge=1, le=100, description="most objects in a scene")
    seed: Seed = Field(0, description="seed of the drawing")

    @model_validator(mode="after")
    def _ordered(self) -> WastesimConfig:
        if self.min_objects > self.max_objects:
            raise ValueError("min_objects must not be above max_objects")
        return self


class PrepareConfig(Config):
    """Section ``prepare`` of params.yaml."""

    dataset: Name = Field(
        "voc", description="data set, or the tool that exported root; auto: recognised by its files"
    )
    root: str = Field("data/VOC2012", description="folder of the data set")
    split: Literal["official", "random", "sbd"] = Field(
        "random", description="official: its authors'; random: by ratios; sbd: voc with SBD's masks"
    )
    ratios: Annotated[tuple[Fraction, Fraction, Fraction], Listed] = Field(
        (0.7, 0.15, 0.15), description="fractions of train, val and test in a random split"
    )
    split_seed: Seed = Field(0, description="seed of the random split and of train_fraction")
    train_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="fraction of the training images; smaller fractions are subsets",
    )
    fold: str = Field(
        "",
        pattern=r"^(|[1-9]\d?/[1-9]\d?)$",
        description="cross-validation: `2/4` tests on the second quarter of the training images, "
        "trains on the others and leaves out the test images; empty: none",
    )
    unlabelled: str = Field(
        "",
        description="folder in root of images without labels; left-out: images that "
        "train_fraction leaves out; empty: none",
    )
    classes: Annotated[tuple[ClassLine, ...], Listed] = Field(
        (),
        description="datasets folder, labelme, CVAT's: `- name: [red, green, blue]` per class, in "
        "their order; empty: read from the files in root",
    )
    mask_pattern: str = Field(
        "{name}",
        description="dataset folder: name of an image's mask; {name} is the image's name without "
        "suffix, {file} with suffix",
    )
    remap: dict[str, str | None] = Field(
        {},
        description="`old: new` merges or renames classes, by name or index; "
        "`old: void` makes their pixels void",
    )
    void_index: int = Field(
        255, ge=1, le=255, description="dataset folder: value of pixels without a label"
    )
    binary: bool = Field(
        False, description="dataset folder: masks hold 0 and 255, the second of two classes"
    )
    transparent: Literal["refuse", "void"] = Field(
        "refuse", description="dataset folder: transparent pixels of masks"
    )
    exif: Literal["apply", "ignore"] = Field(
        "apply",
        description="masks of images with an EXIF orientation. apply: drawn on the turned image; "
        "ignore: drawn on the stored pixels, so masks are turned too",
    )
    copies: Literal["error", "warn"] = Field(
        "error", description="files of equal bytes in two splits, such as train and test"
    )
    max_pixels: int = Field(
        MAX_PIXELS, ge=1, description="largest number of pixels; larger images are refused unread"
    )
    wastesim: WastesimConfig = Field(WastesimConfig(), description="drawn scenes")

    @field_validator("classes", mode="before")
    @classmethod
    def _in_order(cls, classes: object) -> object:
        if isinstance(classes, dict) and classes:
            message = (
                "must be a list of lines `- name: [red, green, blue]`, because their order is the "
                "mask value and DVC does not see the order of keys"
            )
            raise ValueError(message)
        return classes or ()

    @field_validator("mask_pattern")
    @classmethod
    def _of_the_image(cls, pattern: str) -> str:
        if not ("{name}" in pattern) ^ ("{file}" in pattern):
            raise ValueError("must hold {name} or {file} once, such as {name}_mask")
        return pattern.removesuffix(".png")

    @field_validator("remap", mode="before")
    @classmethod
    def _by_name(cls, remap: object) -> object:
        """Read numbers, which are indices, as YAML has them."""
        if not isinstance(remap, dict):
            return remap
        return {str(old): str(new) if isinstance(new, int) else new for old, new in remap.items()}

    @model_validator(mode="after")
    def _whole(self) -> PrepareConfig:
        names = [name for line in self.classes for name in line]
        if len(set(names)) < len(names):
            raise ValueError("a class of classes is listed twice; names must differ")
        if abs(sum(self.ratios) - 1) > 1e-6:
            raise ValueError("ratios must add up to 1")
        if len(self.classes) > self.void_index:
            raise ValueError(
                f"{len(self.classes)} classes leave no room for void_index {self.void_index}"
            )
        if self.fold:
            number, count = map(int, self.fold.split("/"))
            if number > count or count < 2:
                raise ValueError(f"fold {self.fold} must be K/N with K from 1 to N and N from 2")
        if self.split == "sbd" and self.dataset != "voc":
            raise ValueError(f"split sbd is only for dataset voc, not for {self.dataset}")
        return self
