"""Each data set is read as its owners ship it: miniatures go through prepare and extract."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.common.errors import ConfigError, DataError
from stages.data.manifest import Pair, read_manifest
from stages.data.masks import decode_mask
from stages.datasets import ade20k, camvid, cityscapes, coco_objects, coco_stuff, voc
from stages.datasets.catalogue import DATASETS
from stages.datasets.config import Name
from stages.datasets.palette import bit_colour
from tests.factories import (
    SIDE,
    extract,
    extract_config,
    make_voc,
    photo,
    prepare,
    save,
    save_sbd,
    stripes,
)
from tests.factories import prepare_config as config


def prepared(
    root: Path, tmp_path: Path, dataset: str, **changes
) -> tuple[dict, dict[str, tuple[str, np.ndarray]]]:
    """Summary of prepare, and split and mask (255 is void) by id; extract stores equal masks."""
    summary = prepare(config(root, dataset=dataset, **changes), tmp_path)
    entries, classes = read_manifest(tmp_path / "dataset")
    masks = {}
    for entry in entries:
        path = Path(entry.mask)
        masks[entry.id] = (
            entry.split,
            decode_mask(
                path.read_bytes(),
                path,
                num_classes=len(classes.names),
                void_index=classes.void_index,
            ),
        )
    stores = extract(extract_config(), tmp_path)
    assert sum(len(store) for store in stores.values()) == len(entries)
    for split, store in stores.items():
        assert store.spec.class_names == classes.names == tuple(summary["classes"])
        assert store.spec.palette == classes.palette
        assert set(store.ids) == {id for id, (where, _) in masks.items() if where == split}
        for sample in store:
            np.testing.assert_array_equal(sample.mask, masks[sample.id][1])
    return summary, masks


def splits(masks: dict[str, tuple[str, np.ndarray]]) -> list[str]:
    return sorted(split for split, _ in masks.values())


def test_every_name_has_its_module() -> None:
    assert {"auto", "wastesim", *DATASETS} == set(Name.__args__)
    for module in DATASETS.values():
        assert isinstance(module.WHERE, str)
        assert callable(module.find)


# -- Pascal VOC with SBD ---------------------------------------------------------------------------


def test_voc_with_sbd(tmp_path: Path) -> None:
    make_voc(tmp_path / "voc")
    summary, masks = prepared(tmp_path / "voc", tmp_path, "voc", split="sbd")
    assert {id for id, (split, _) in masks.items() if split == "train"} == {
        "a",
        "b",
        "e",
        "f",
    }  # no image of VOC's val
    assert sorted(masks[id][0] for id in "cd") == ["test", "val"]
    np.testing.assert_array_equal(masks["e"][1], stripes(0, 20, 7))
    np.testing.assert_array_equal(masks["a"][1], stripes(0, 1, 255))  # VOC's own mask, not SBD's
    assert summary["classes"] == list(voc.NAMES)
    with pytest.raises(ValueError, match="split sbd is only for dataset voc"):
        config(tmp_path, dataset="camvid", split="sbd")


def test_bad_sbd_files_are_named(tmp_path: Path) -> None:
    make_voc(tmp_path / "voc")
    folder = tmp_path / "voc" / "benchmark_RELEASE" / "dataset"
    settings = config(tmp_path / "voc", dataset="voc", split="sbd")
    save_sbd(folder / "cls" / "e.mat", stripes(0, 21))
    with pytest.raises(
        DataError, match=r"e\.mat: holds 21, expected a mask of class indices from 0 to 20"
    ):
        prepare(settings, tmp_path)
    (folder / "cls" / "e.mat").write_bytes((folder / "cls" / "f.mat").read_bytes()[:150])
    with pytest.raises(DataError, match=r"e\.mat: not a readable mask of SBD"):
        prepare(settings, tmp_path)
    (tmp_path / "voc" / "ImageSets" / "Segmentation" / "val.txt").write_text("b\nc\n")
    with pytest.raises(DataError, match=r"id b is listed twice, in train\.txt and in val\.txt"):
        prepare(settings, tmp_path)
    shutil.rmtree(folder)
    (tmp_path / "voc" / "ImageSets" / "Segmentation" / "val.txt").write_text("c\nd\n")
    with pytest.raises(
        DataError, match=r"benchmark_RELEASE/dataset: .* unpack SBD's benchmark\.tgz .* --download"
    ):
        prepare(settings, tmp_path)


# -- Cityscapes ------------------------------------------------------------------------------------


def make_cityscapes(root: Path) -> None:
    for split, city, count in (
        ("train", "aachen", 2),
        ("train", "ulm", 1),
        ("val", "lindau", 2),
        ("test", "berlin", 1),
    ):
        for number in range(count):
            id = f"{city}_{number:06d}_000019"
            photo(root / "leftImg8bit" / split / city / f"{id}_leftImg8bit.png")
            labels = stripes(0) if split == "test" else stripes(7, 0, 9, 26, 33, 17)
            save(root / "gtFine" / split / city / f"{id}_gtFine_labelIds.png", labels)
            for other in ("instanceIds", "color"):  # they are shipped too, and are not read
                save(root / "gtFine" / split / city / f"{id}_gtFine_{other}.png", stripes(0))


def test_cityscapes(tmp_path: Path) -> None:
    make_cityscapes(tmp_path / "cityscapes")
    summary, masks = prepared(tmp_path / "cityscapes", tmp_path, "cityscapes")
    assert splits(masks) == ["test", "train", "train", "train", "val"]
    np.testing.assert_array_equal(masks["ulm_000000_000019"][1], stripes(0, 255, 255, 13, 18, 5))
    assert not any(id.startswith("berlin") for id in masks)
    assert len(summary["classes"]) == 19
    assert (summary["classes"][0], summary["classes"][13], summary["classes"][18]) == (
        "road",
        "car",
        "bicycle",
    )
    assert (summary["palette"][0], summary["palette"][13]) == ([128, 64, 128], [0, 0, 142])
    written = Image.open(tmp_path / "dataset" / "masks" / "ulm_000000_000019.png")
    assert written.mode == "P"
    assert written.getpalette()[3 * 13 :][:3] == [0, 0, 142]
    summary, masks = prepared(
        tmp_path / "cityscapes", tmp_path, "cityscapes", split="random", ratios=[0.6, 0.2, 0.2]
    )
    assert splits(masks) == ["test", "train", "train", "train", "val"]


def test_the_names_of_cityscapes_are_the_owners() -> None:
    names = (
        "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, "
        "terrain, sky, person, rider, car, truck, bus, train, motorcycle, bicycle"
    )
    assert ", ".join(cityscapes.CLASSES.names) == names


def test_bad_files_of_cityscapes_are_named(tmp_path: Path) -> None:
    root = tmp_path / "cityscapes"
    make_cityscapes(root)
    mask = root / "gtFine" / "train" / "aachen" / "aachen_000001_000019_gtFine_labelIds.png"
    pixels = stripes(7)
    pixels[3, 5] = 34
    save(mask, pixels)
    with pytest.raises(
        DataError,
        match=r"label id 34 in row 3, column 5 \(from 0\) is none of Cityscapes' label ids",
    ):
        prepare(config(root, dataset="cityscapes"), tmp_path)
    save(mask, stripes((1, 2, 3)))
    with pytest.raises(DataError, match="mode RGB"):
        prepare(config(root, dataset="cityscapes"), tmp_path)
    save(mask, stripes(7)[:, :-1])
    with pytest.raises(
        DataError, match="labelIds.png: the mask is 63 x 64 pixels"
    ):  # the owners' file, not the converted one
        prepare(config(root, dataset="cityscapes"), tmp_path)
    mask.unlink()
    with pytest.raises(DataError, match="labelIds.png: this mask is missing"):
        prepare(config(root, dataset="cityscapes"), tmp_path)
    shutil.rmtree(root / "gtFine" / "val")
    with pytest.raises(
        DataError,
        match=r"gtFine/val: there is no such folder; the masks belong there "
        r".*cityscapes-dataset\.com",
    ):
        prepare(config(root, dataset="cityscapes"), tmp_path)


# -- ADE20K ----------------------------------------------------------------------------------------


def make_ade20k(root: Path) -> None:
    for folder, name, count in (("training", "train", 3), ("validation", "val", 2)):
        for number in range(1, count + 1):
            photo(root / "images" / folder / f"ADE_{name}_{number:08d}.jpg")
            save(
                root / "annotations" / folder / f"ADE_{name}_{number:08d}.png",
                stripes(0, 1, 2, 150),
            )
    names = {1: "wall", 2: "building, edifice", 8: "bed ", 150: "flag"}
    rows = [
        f"{number}\t0.01\t10\t1\t{names.get(number, f'thing {number}, other word')}"
        for number in range(1, 151)
    ]
    (root / "objectInfo150.txt").write_text(
        "\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n"
    )


def test_ade20k(tmp_path: Path) -> None:
    make_ade20k(tmp_path / "ade")
    summary, masks = prepared(tmp_path / "ade", tmp_path, "ade20k")
    assert splits(masks) == ["test", "train", "train", "train", "val"]
    np.testing.assert_array_equal(masks["ADE_train_00000001"][1], stripes(255, 0, 1, 149))
    assert len(summary["classes"]) == 150
    assert [summary["classes"][index] for index in (0, 1, 2, 7, 149)] == [
        "wall",
        "building",
        "thing 3",
        "bed",
        "flag",
    ]
    assert len({tuple(colour) for colour in summary["palette"]}) == 150


def test_bad_files_of_ade20k_are_named(tmp_path: Path) -> None:
    root = tmp_path / "ade"
    make_ade20k(root)
    save(root / "annotations" / "training" / "ADE_train_00000002.png", stripes(1, 151))
    with pytest.raises(DataError, match=r"00000002\.png: mask value 151 in row 32, column 0"):
        prepare(config(root, dataset="ade20k"), tmp_path)
    lines = (root / "objectInfo150.txt").read_text().splitlines()
    for text, words in (
        ("\n".join(lines[:-1]), "must list 150 classes"),
        ("\n".join([*lines[:-1], lines[-1].replace("flag", "wall")]), "different names"),
        ("no list\nat all", "needs the columns Idx"),
    ):
        (root / "objectInfo150.txt").write_text(text)
        with pytest.raises(DataError, match=words):
            prepare(config(root, dataset="ade20k"), tmp_path)
    (root / "objectInfo150.txt").unlink()
    with pytest.raises(
        DataError,
        match=r"objectInfo150\.txt: the list of classes cannot be read .*ADEChallengeData2016\.zip",
    ):
        ade20k.read_names(root / "objectInfo150.txt")


# -- COCO ------------------------------------------------------------------------------------------


def make_coco(root: Path, images: str = "") -> dict[str, list[dict]]:
    """The images; and what both annotation files say of them."""
    entries = {}
    for folder, start, count in (("train2017", 1, 3), ("val2017", 11, 2)):
        entries[folder] = [
            {"id": number, "file_name": f"{number:012d}.jpg", "height": SIDE, "width": SIDE}
            for number in range(start, start + count)
        ]
        for entry in entries[folder]:
            photo(root / images / folder / entry["file_name"])
    return entries


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


PANOPTIC = [
    {"id": 1, "name": "person", "isthing": 1, "color": [220, 20, 60], "supercategory": "person"},
    {
        "id": 90,
        "name": "toothbrush",
        "isthing": 1,
        "color": [191, 162, 208],
        "supercategory": "indoor",
    },
    {
        "id": 92,
        "name": "banner",
        "isthing": 0,
        "color": [255, 255, 128],
        "supercategory": "textile",
    },
    {
        "id": 200,
        "name": "rug-merged",
        "isthing": 0,
        "color": [250, 141, 255],
        "supercategory": "floor",
    },
]


def make_panoptic(root: Path) -> None:
    colours = [(0, 0, 0), (1, 0, 0), (44, 1, 0), (7, 8, 9)]  # void, and segments 1, 300 and 591879
    for folder, images in make_coco(root).items():
        annotations = []
        for image in images:
            png = image["file_name"].replace(".jpg", ".png")
            segments = [
                {"id": 1, "category_id": 200, "iscrowd": 0, "area": 1},
                {"id": 300, "category_id": 1, "iscrowd": 1, "area": 1},
                {"id": 7 + 256 * 8 + 65536 * 9, "category_id": 92, "iscrowd": 0, "area": 1},
            ]
            annotations.append(
                {"image_id": image["id"], "file_name": png, "segments_info": segments}
            )
            save(root / "annotations" / f"panoptic_{folder}" / png, stripes(*colours))
        content = {
            "info": {},
            "images": images,
            "annotations": annotations,
            "categories": PANOPTIC[::-1],
        }
        write_json(root / "annotations" / f"panoptic_{folder}.json", content)


def test_coco_panoptic(tmp_path: Path) -> None:
    make_panoptic(tmp_path / "coco")
    summary, masks = prepared(tmp_path / "coco", tmp_path, "coco-panoptic")
    assert splits(masks) == ["test", "train", "train", "train", "val"]
    np.testing.assert_array_equal(masks["000000000002"][1], stripes(255, 3, 0, 2))
    assert summary["classes"] == ["person", "toothbrush", "banner", "rug-merged"]
    assert summary["palette"] == [category["color"] for category in PANOPTIC]


def test_bad_files_of_coco_panoptic_are_named(tmp_path: Path) -> None:
    root = tmp_path / "coco"
    make_panoptic(root)
    settings = config(root, dataset="coco-panoptic", split="random", ratios=[0.6, 0.2, 0.2])
    save(
        root / "annotations" / "panoptic_val2017" / "000000000011.png",
        stripes((0, 0, 0), (2, 1, 0)),
    )
    with pytest.raises(
        DataError,
        match=r"11\.png: segment 258 in row 32, column 0 .* "
        r"not described in panoptic_val2017\.json",
    ):
        prepare(settings, tmp_path)
    path = root / "annotations" / "panoptic_train2017.json"
    good = json.loads(path.read_text())
    for spoil, words in (
        (
            lambda content: content["annotations"][0].pop("segments_info"),
            "an annotation lacks 'segments_info'",
        ),
        (
            lambda content: content["annotations"][0].update(image_id=99),
            "lacks 99, or names one that the file does not describe",
        ),
        (lambda content: content["categories"].pop(), "has other categories"),
        (lambda content: content.pop("categories"), "is not COCO's JSON"),
    ):
        content = json.loads(json.dumps(good))
        spoil(content)
        write_json(path, content)
        with pytest.raises(DataError, match=words):
            prepare(settings, tmp_path)
    path.write_text('{"images": [')
    with pytest.raises(
        DataError, match=r"panoptic_train2017\.json: is not COCO's JSON, or a truncated one"
    ):
        prepare(settings, tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"these annotations are missing .*cocodataset\.org"):
        prepare(settings, tmp_path)


@pytest.mark.parametrize(
    "place", ["stuffthingmaps_trainval2017", "stuffthingmaps", "annotations", ""]
)
def test_coco_stuff(tmp_path: Path, place: str) -> None:
    root = tmp_path / "coco"
    for folder, images in make_coco(root, "images" if place == "annotations" else "").items():
        for image in images:
            save(
                root / place / folder / image["file_name"].replace(".jpg", ".png"),
                stripes(0, 181, 255, 91),
            )
    if place:
        prepare(config(root, dataset="coco-stuff"), tmp_path)
        assert len(read_manifest(tmp_path / "dataset")[0]) == 5
        return
    summary, masks = prepared(root, tmp_path, "coco-stuff")
    assert splits(masks) == ["test", "train", "train", "train", "val"]
    np.testing.assert_array_equal(masks["000000000012"][1], stripes(0, 181, 255, 91))
    assert (
        len(summary["classes"])
        == len(set(summary["classes"]))
        == len({tuple(colour) for colour in summary["palette"]})
        == 182
    )
    assert [summary["classes"][value] for value in (0, 11, 89, 90, 91, 156, 181)] == [
        "person",
        "street sign",
        "toothbrush",
        "hair brush",
        "banner",
        "sky-other",
        "wood",
    ]
    assert not (tmp_path / "dataset" / "masks").exists()  # the owners' files are used as they are
    save(root / "train2017" / "000000000001.png", stripes(182))
    with pytest.raises(DataError, match="mask value 182 is no class"):
        prepare(config(root, dataset="coco-stuff"), tmp_path)
    for mask in (*root.glob("train2017/*.png"), *root.glob("val2017/*.png")):
        mask.unlink()
    with pytest.raises(DataError, match=r"000000000001\.png: this mask is missing"):
        prepare(config(root, dataset="coco-stuff"), tmp_path)


THINGS = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}]


def box(top: int, left: int, bottom: int, right: int) -> list[list[float]]:
    """A rectangle as COCO's polygon."""
    return [[left, top, right, top, right, bottom, left, bottom]]


def runs(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths: down the columns, beginning with zeros."""
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    return {
        "counts": np.diff(np.concatenate([[0], edges, [flat.size]])).tolist(),
        "size": list(mask.shape),
    }


def make_instances(root: Path) -> np.ndarray:
    """Returns the mask of every image that has objects; the first of each split has none."""
    crowd = np.zeros((SIDE, SIDE), np.uint8)
    crowd[:, 40:] = 1
    objects = [
        {
            "category_id": 90,
            "segmentation": box(10, 10, 14, 14),
            "iscrowd": 0,
        },  # on the car, though listed before it
        {
            "category_id": 3,
            "segmentation": box(8, 8, 24, 48),
            "iscrowd": 0,
        },  # reaches over the crowd
        {"category_id": 1, "segmentation": runs(crowd), "iscrowd": 1},
        {
            "category_id": 1,
            "segmentation": box(40, 0, 44, 8) + box(50, 0, 54, 8),
            "iscrowd": 0,
        },  # two parts
    ]
    for folder, images in make_coco(root).items():
        annotations = [
            {**annotation, "id": 10 * image["id"] + number, "image_id": image["id"]}
            for image in images[1:]
            for number, annotation in enumerate(objects)
        ]
        content = {"images": images, "annotations": annotations, "categories": THINGS}
        write_json(root / "annotations" / f"instances_{folder}.json", content)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, 40:] = 255
    mask[8:24, 8:48] = 2
    mask[10:14, 10:14] = 3
    mask[40:44, :8] = mask[50:54, :8] = 1
    return mask


def test_coco_instances(tmp_path: Path) -> None:
    expected = make_instances(tmp_path / "coco")
    summary, masks = prepared(tmp_path / "coco", tmp_path, "coco-instances")
    assert splits(masks) == ["test", "train", "train", "train", "val"]
    np.testing.assert_array_equal(masks["000000000002"][1], expected)
    assert not masks["000000000001"][1].any()  # an image without an object is all background
    assert summary["classes"] == ["background", "person", "car", "toothbrush"]
    assert summary["palette"] == [list(bit_colour(value)) for value in range(4)]


def test_bad_files_of_coco_instances_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "coco"
    make_instances(root)
    path = root / "annotations" / "instances_train2017.json"
    good = json.loads(path.read_text())
    for spoil, words in (
        (
            lambda content: content["annotations"][0].update(category_id=4),
            "an entry lacks 4, or names one",
        ),
        (
            lambda content: content["annotations"][0].update(segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
            "the shape of annotation 20 of 000000000002 cannot be drawn .*7 numbers",
        ),
        (
            lambda content: content["annotations"][0].update(segmentation={"size": [64, 64]}),
            "the shape of annotation 20 of 000000000002 cannot be drawn",
        ),
        (
            lambda content: [each.pop("segmentation") for each in content["annotations"]],
            "no annotation has an outline; export polygons or masks",
        ),
        (
            lambda content: content["annotations"][0].update(
                segmentation=runs(np.ones((8, 8), np.uint8))
            ),
            "in an image of",
        ),
    ):
        content = json.loads(json.dumps(good))
        spoil(content)
        write_json(path, content)
        with pytest.raises(DataError, match=words) as caught:
            prepare(config(root, dataset="coco-instances"), tmp_path)
        assert str(caught.value).startswith(str(path))
    write_json(path, good)
    photo_path = root / "train2017" / "000000000002.jpg"
    save(photo_path, np.zeros((SIDE, SIDE - 1, 3), np.uint8))
    with pytest.raises(
        DataError,
        match=r"instances_train2017\.json: the mask is 64 x 64 pixels, "
        r"its image .*2\.jpg is 63 x 64",
    ):
        prepare(config(root, dataset="coco-instances"), tmp_path)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.delitem(sys.modules, "pycocotools.mask", raising=False)
    with pytest.raises(
        ConfigError, match=r"coco-instances needs pycocotools; pip install -e '\.\[coco\]'"
    ):
        prepare(config(root, dataset="coco-instances"), tmp_path)


def test_compressed_run_lengths_are_drawn() -> None:
    from pycocotools import mask as rasteriser

    inside = np.zeros((6, 5), np.uint8)
    inside[2:4, 1:3] = 1
    compressed = rasteriser.encode(np.asfortranarray(inside))
    shapes = [
        compressed,
        {**compressed, "counts": compressed["counts"].decode()},
        runs(inside),
        runs(np.ones((6, 5), np.uint8)),
    ]
    drawn = [
        coco_objects.draw(
            [{"segmentation": shape, "index": 1}],
            (6, 5),
            Pair("a", Path("a.jpg"), Path("a.json"), "train"),
            crowd_is_void=True,
        )
        for shape in shapes
    ]
    for mask, expected in zip(drawn, [inside, inside, inside, np.ones((6, 5))], strict=True):
        np.testing.assert_array_equal(mask, expected)


# -- CamVid ----------------------------------------------------------------------------------------

FRAMES = {
    "train": ("0001TP_008520", "0006R0_f00930", "0016E5_00901"),
    "val": ("0016E5_07959", "0016E5_08159"),
    "test": ("0001TP_008550", "Seq05VD_f00000"),
}
LABEL_COLOURS = """\
64 128 64	Animal
192 0 128	Archway
0 128 192	Bicyclist
0 128 64	Bridge
128 0 0		Building
64 0 128	Car
64 0 192	CartLuggagePram
192 128 64	Child
192 192 128	Column_Pole
64 64 128	Fence
128 0 192	LaneMkgsDriv
192 0 64	LaneMkgsNonDriv
128 128 64	Misc_Text
192 0 192	MotorcycleScooter
128 64 64	OtherMoving
64 192 128	ParkingBlock
64 64 0		Pedestrian
128 64 128	Road
128 128 192	RoadShoulder
0 0 192		Sidewalk
192 128 128	SignSymbol
128 128 128	Sky
64 128 192	SUVPickupTruck
0 0 64		TrafficCone
0 64 64		TrafficLight
192 64 128	Train
128 128 0	Tree
192 128 192	Truck_Bus
64 0 64		Tunnel
192 192 0	VegetationMisc
0 0 0		Void
64 192 0	Wall
"""
CLASS_BY_NAME = {
    name: index for index, group in enumerate(camvid.GROUPS.values()) for name in group
}


def make_camvid_original(root: Path) -> list[int]:
    """Write the owners' release, all 32 colours in each mask; return each stripe's class or 255."""
    rows = [line.split() for line in LABEL_COLOURS.splitlines()]
    colours = [(int(red), int(green), int(blue)) for red, green, blue, _ in rows]
    for frames in FRAMES.values():
        for id in frames:
            photo(root / "701_StillsRaw_full" / f"{id}.png")
            save(root / "LabeledApproved_full" / f"{id}_L.png", stripes(*colours))
    (root / "label_colors.txt").write_text(LABEL_COLOURS)
    return [CLASS_BY_NAME.get(name, 255) for *_, name in rows]


def make_camvid_segnet(root: Path, images: str, masks: str) -> None:
    for split, frames in FRAMES.items():
        for id in frames:
            photo(root / images.format(split) / f"{id}.png")
            save(root / masks.format(split) / f"{id}.png", stripes(*range(12)))


def test_camvid_as_its_owners_ship_it(tmp_path: Path) -> None:
    expected = make_camvid_original(tmp_path / "camvid")
    assert expected.count(255) == 1  # Void; every other colour has a class
    summary, masks = prepared(tmp_path / "camvid", tmp_path, "camvid")
    assert {id: split for id, (split, _) in masks.items()} == {
        id: split for split, ids in FRAMES.items() for id in ids
    }
    np.testing.assert_array_equal(masks["Seq05VD_f00000"][1], stripes(*expected))
    assert summary["classes"] == [
        "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car",
        "pedestrian", "bicyclist",
    ]  # fmt: skip
    assert summary["palette"][0] == [128, 128, 128]
    grouped = {
        "LaneMkgsDriv": 3,
        "SUVPickupTruck": 8,
        "Child": 9,
        "MotorcycleScooter": 10,
        "Wall": 1,
        "Misc_Text": 6,
        "TrafficCone": 2,
    }
    assert {name: CLASS_BY_NAME[name] for name in grouped} == grouped


@pytest.mark.parametrize(("images", "masks"), [("{}", "{}annot"), ("images/{}", "masks/{}")])
def test_camvid_as_segnet_has_it(tmp_path: Path, images: str, masks: str) -> None:
    make_camvid_segnet(tmp_path / "camvid", images, masks)
    summary, pairs = prepared(tmp_path / "camvid", tmp_path, "camvid")
    assert {id: split for id, (split, _) in pairs.items()} == {
        id: split for split, ids in FRAMES.items() for id in ids
    }
    np.testing.assert_array_equal(pairs["0001TP_008520"][1], stripes(*range(11), 255))
    assert summary["classes"] == list(camvid.NAMES)
    assert summary["void_index"] == 11


def test_bad_files_of_camvid_are_named(tmp_path: Path) -> None:
    root = tmp_path / "camvid"
    make_camvid_original(root)
    mask = root / "LabeledApproved_full" / "0016E5_00901_L.png"
    pixels = stripes((128, 128, 128))
    pixels[1, 2] = (128, 128, 129)
    save(mask, pixels)
    with pytest.raises(
        DataError,
        match=r"00901_L\.png: colour \(128, 128, 129\) in row 1, column 2 \(from 0\) "
        "is none of the 32",
    ):
        prepare(config(root, dataset="camvid"), tmp_path)
    photo(root / "701_StillsRaw_full" / "holiday.png")
    with pytest.raises(DataError, match=r"holiday\.png: is no frame of CamVid's four drives"):
        prepare(config(root, dataset="camvid"), tmp_path)
    shutil.rmtree(root / "LabeledApproved_full")
    with pytest.raises(
        DataError,
        match="holds none of CamVid's layouts: "
        "701_StillsRaw_full and LabeledApproved_full .* trainannot",
    ):
        prepare(config(root, dataset="camvid"), tmp_path)


# -- a folder of your own, with colours ------------------------------------------------------------

RED, GREEN, BLACK = (250, 50, 83), (61, 245, 61), (0, 0, 0)


def make_folder(root: Path, masks: list[np.ndarray]) -> None:
    for number, mask in enumerate(masks):
        photo(root / "images" / f"{number}.jpg")
        save(root / "masks" / f"{number}.png", mask)


LISTS = {
    "classes.csv": """\
name,red,green,blue
background,0,0,0
void,255,255,255
cat,250,50,83
old dog,61,245,61
""",
    "labelmap.txt": """\
# label:color_rgb:parts:actions
background:0,0,0::
Ignore:255,255,255::
cat:250,50,83::
old dog:61,245,61:head,tail:running
""",
}


@pytest.mark.parametrize("name", LISTS)
def test_masks_of_colours_and_of_indices_side_by_side(tmp_path: Path, name: str) -> None:
    """Indices are numbers of the list's lines, void included; colours are those of the list."""
    root = tmp_path / "mine"
    colours, indices = stripes(BLACK, RED, GREEN, (255, 255, 255)), stripes(0, 2, 3, 1)
    opaque = np.concatenate([colours, np.full((SIDE, SIDE, 1), 255, np.uint8)], axis=2)
    make_folder(root, [colours, indices, opaque, colours])
    (root / name).write_text(LISTS[name])
    palette = Image.fromarray(indices).convert("P")
    palette.putpalette([9, 9, 9] * 256)  # colours of a palette mean nothing
    palette.save(root / "masks" / "3.png")
    summary, masks = prepared(root, tmp_path, "folder", split="random", ratios=[0.5, 0.25, 0.25])
    assert summary["classes"] == ["background", "cat", "old dog"]
    assert summary["palette"] == [list(BLACK), list(RED), list(GREEN)]
    for id in "0123":
        np.testing.assert_array_equal(masks[id][1], stripes(0, 1, 2, 255))


def test_labelmes_first_line_has_no_mask_value(tmp_path: Path) -> None:
    """Its numbers begin at -1, so that the line after ``__ignore__`` is 0."""
    root = tmp_path / "mine"
    make_folder(root, [stripes(0, 1, 2, 255)] * 3)
    (root / "classes.csv").write_text("name\n__ignore__\n_background_\ncat\nold dog\n")
    summary, masks = prepared(root, tmp_path, "folder", split="random", ratios=[0.34, 0.33, 0.33])
    assert summary["classes"] == ["_background_", "cat", "old dog"]
    np.testing.assert_array_equal(masks["0"][1], stripes(0, 1, 2, 255))


def test_colours_without_a_void_class_leave_index_masks_as_they_are(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    make_folder(root, [stripes(BLACK, RED), stripes(0, 1, 9), stripes(0, 1)])
    (root / "classes.csv").write_text("name,red,green,blue\nbackground,0,0,0\ncat,250,50,83\n")
    _, masks = prepared(
        root, tmp_path, "folder", split="random", ratios=[0.34, 0.33, 0.33], void_index=9
    )
    np.testing.assert_array_equal(masks["0"][1], stripes(0, 1))
    np.testing.assert_array_equal(masks["1"][1], stripes(0, 1, 255))
    with open(tmp_path / "dataset" / "manifest.csv", newline="") as file:
        paths = {row["id"]: row["mask"] for row in csv.DictReader(file)}
    assert paths["0"] == (tmp_path / "dataset" / "masks" / "0.png").as_posix()
    assert paths["1"] == (root / "masks" / "1.png").as_posix()


def test_random_pools_the_split_folders(photos: Path, tmp_path: Path) -> None:
    summary = prepare(config(photos, split="random", ratios=[0.5, 0.25, 0.25]), tmp_path)
    assert {split: part["images"] for split, part in summary["splits"].items()} == {
        "train": 6,
        "val": 3,
        "test": 3,
    }
    entries, _ = read_manifest(tmp_path / "dataset")
    assert any(entry.id.split("/")[0] != entry.split for entry in entries)


def test_colours_that_are_no_class_are_named(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    strange = stripes(BLACK, RED)
    strange[40, 7] = (250, 50, 84)
    see_through = np.concatenate([stripes(BLACK), np.full((SIDE, SIDE, 1), 255, np.uint8)], axis=2)
    see_through[5, 6, 3] = 0
    make_folder(root, [stripes(BLACK, RED), strange, see_through])
    settings = config(root, dataset="folder", split="random", ratios=[0.34, 0.33, 0.33])
    (root / "classes.csv").write_text("name,red,green,blue\nbackground,0,0,0\ncat,250,50,83\n")
    with pytest.raises(
        DataError,
        match=r"masks/1\.png: colour \(250, 50, 84\) in row 40, column 7 \(from 0\) "
        "is that of no class",
    ):
        prepare(settings, tmp_path)
    assert (
        "masks/2.png: the pixel in row 5, column 6 (from 0) is transparent"
        in (tmp_path / "scratch" / "problems.txt").read_text()
    )
    for text, words in (
        (
            "name,red,green,blue\nbackground,0,0,0\ncat,0,0,0\n",
            r"the classes 'background' and 'cat' share the colour \(0, 0, 0\)",
        ),
        (
            "name,red,green,blue\nbackground,0,0,0\ncat,,,\n",
            "the class 'cat' has no colour; add columns",
        ),
        ("name\nvoid\n", "lists no class but void"),
    ):
        (root / "classes.csv").write_text(text)
        with pytest.raises(DataError, match=words):
            prepare(settings, tmp_path)


def test_bad_label_maps_are_named(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    make_folder(root, [stripes(BLACK)] * 3)
    settings = config(root, dataset="folder", split="random", ratios=[0.34, 0.33, 0.33])
    for text, words in (
        ("cat:1,2::\n", r"labelmap\.txt: the colour of class 'cat' must be three numbers"),
        ("cat:1,2,red::\n", "must be three numbers"),
        (":1,2,3::\n", "must have a name on every line"),
        ("# nothing\n", "must have a name on every line"),
        ("cat:::\ncat:::\n", "occurs twice"),
    ):
        (root / "labelmap.txt").write_text(text)
        with pytest.raises(DataError, match=words):
            prepare(settings, tmp_path)


def test_the_lists_of_coco_stuff_and_camvid_are_whole() -> None:
    assert len(coco_stuff.NAMES) == 182
    rows = [line.split() for line in LABEL_COLOURS.splitlines()]
    built_in = {name: colour for group in camvid.GROUPS.values() for name, colour in group.items()}
    assert {**built_in, "Void": (0, 0, 0)} == {
        name: (int(red), int(green), int(blue)) for red, green, blue, name in rows
    }
