"""Exports of labelling tools are read as exported, each from a miniature of its exact layout.

Every picture shows its labels: cats are red and dogs are green. So the mask that prepare makes must
agree with the colours of the picture, wherever the tool puts its files and however it turns them.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
import pytest
from PIL import Image

from stages.common.errors import ConfigError, DataError
from stages.data.images import UPRIGHT, decode_image
from stages.data.manifest import read_manifest
from stages.data.masks import decode_mask
from stages.datasets import coco_export, cvat_xml, labelme
from stages.datasets.coco_objects import NO_OUTLINE, RINGS
from stages.datasets.findings import Finding
from stages.datasets.shapes import decode_segmentation, fill_polygon
from tests.factories import prepare, save
from tests.factories import prepare_config as config

HEIGHT, WIDTH = 24, 36
COLOURS = {"cat": (250, 0, 0), "dog": (0, 250, 0)}
IMAGES = {  # file by subset; boxes are (left, top, right, bottom) by label
    "train": ["a.png", "b.png", "c 1.png", "d.png"],
    "valid": ["e.png"],
    "test": ["f.png"],
}
ALL = [(subset, name) for subset, names in IMAGES.items() for name in names]
RANDOM = {"split": "random", "ratios": [0.5, 0.25, 0.25]}


def boxes(name: str) -> dict[str, tuple[int, int, int, int]]:
    """Places of the cat and the dog on an image, which differ between images."""
    shift = ord(name[0]) - ord("a")
    return {"cat": (2 + shift, 3, 12 + shift, 9), "dog": (14, 10 + shift, 30, 15 + shift)}


def picture(name: str) -> np.ndarray:
    pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    for label, (left, top, right, bottom) in boxes(name).items():
        pixels[top:bottom, left:right] = COLOURS[label]
    return pixels


def save_picture(path: Path, orientation: int = 1) -> None:
    """Save an image so that it is the picture once it is turned by its EXIF orientation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = Image.fromarray(picture(path.name))
    if orientation != 1:
        back = {6: 8, 8: 6}.get(orientation, orientation)
        stored = stored.transpose(UPRIGHT[back])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif)


# -- the layouts -----------------------------------------------------------------------------------


def labelme_shape(kind: str, label: str, points: list[list[float]], **more: object) -> dict:
    return {
        "label": label, "points": points, "group_id": None, "description": "",
        "shape_type": kind, "flags": {}, "mask": None, **more,
    }  # fmt: skip


def labelme_json(path: Path, shapes: list[dict], size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    content = {
        "version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"{path.stem}.png",
        "imageData": None, "imageHeight": size[0], "imageWidth": size[1],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def make_labelme(root: Path, orientation: int = 1) -> None:
    """LabelMe saves a JSON beside each image; the coordinates are those of the turned image."""
    for subset, name in ALL:
        path = root / subset / name
        save_picture(path, orientation)
        shapes = [
            labelme_shape("rectangle", label, [[right - 1, bottom - 1], [left, top]])
            for label, (left, top, right, bottom) in boxes(name).items()
        ]
        labelme_json(path.with_suffix(".json"), shapes)


def cvat_document(images: list[str], labels: tuple[str, ...] = ("cat", "dog")) -> str:
    named = "".join(
        f"<label><name>{label}</name><color>#{bytes(COLOURS.get(label, (1, 2, 3))).hex()}</color>"
        "<type>any</type><attributes></attributes></label>"
        for label in labels
    )
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n'
        f"  <meta><project><id>1</id><name>pets</name><labels>{named}</labels></project>"
        "<dumped>2024-07-05 12:00:00+00:00</dumped></meta>\n" + "\n".join(images) + "</annotations>"
    )


def cvat_image(name: str, shapes: list[str], subset: str = "", number: int = 0) -> str:
    of_subset = f" subset={quoteattr(subset)}" if subset else ""
    return (
        f'<image id="{number}" name={quoteattr(name)}{of_subset} task_id="2" '
        f'width="{WIDTH}" height="{HEIGHT}">{"".join(shapes)}</image>'
    )


def make_cvat_xml(root: Path, orientation: int = 1) -> None:
    """CVAT writes one XML for a project, and images in folders of their subsets."""
    images = []
    for number, (subset, name) in enumerate(ALL):
        save_picture(root / "images" / subset / name, orientation)
        shapes = [
            f'<box label="{label}" source="manual" occluded="0" xtl="{left}.00" ytl="{top}.00" '
            f'xbr="{right}.00" ybr="{bottom}.00" z_order="0"></box>'
            for label, (left, top, right, bottom) in boxes(name).items()
        ]
        images.append(cvat_image(name, shapes, subset, number))
    (root / "annotations.xml").write_text(cvat_document(images), encoding="utf-8")


CATEGORIES = [  # the ids have gaps
    {"id": 7, "name": "dog", "supercategory": ""},
    {"id": 3, "name": "cat", "supercategory": ""},
]


def ring(box: tuple[int, int, int, int]) -> list[int]:
    left, top, right, bottom = box
    return [left, top, right, top, right, bottom, left, bottom]


def coco_content(names: list[str], size: tuple[int, int] = (HEIGHT, WIDTH)) -> dict:
    ids = {category["name"]: category["id"] for category in CATEGORIES}
    annotations = [
        {
            "id": 10 * number + ids[label], "image_id": number, "category_id": ids[label],
            "segmentation": [ring(box)], "area": 1.0, "bbox": [0, 0, 1, 1], "iscrowd": 0,
        }
        for number, name in enumerate(names, 1)
        for label, box in boxes(Path(name).name).items()
    ]  # fmt: skip
    images = [
        {"id": number, "file_name": name, "height": size[0], "width": size[1]}
        for number, name in enumerate(names, 1)
    ]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_coco_of_cvat(root: Path, orientation: int = 1) -> None:
    for subset, names in IMAGES.items():
        for name in names:
            save_picture(root / "images" / subset / name, orientation)
        write_json(root / "annotations" / f"instances_{subset}.json", coco_content(names))


def make_coco_of_roboflow(root: Path, orientation: int = 1) -> None:
    """Roboflow adds the category 0 that is only the parent of the others."""
    for subset, names in IMAGES.items():
        content = coco_content(names)
        content["categories"] = [
            {"id": 0, "name": "pets", "supercategory": "none"},
            *({**category, "supercategory": "pets"} for category in CATEGORIES),
        ]
        for name in names:
            save_picture(root / subset / name, orientation)
        write_json(root / subset / "_annotations.coco.json", content)


def truth(name: str) -> np.ndarray:
    """The mask of an image: background 0, cat 1, dog 2."""
    pixels = picture(name)
    return np.where(pixels[..., 0] > 200, 1, np.where(pixels[..., 1] > 200, 2, 0)).astype(np.uint8)


def make_cvat_masks(root: Path, orientation: int = 1) -> None:
    """Masks are colours of labelmap.txt; names with spaces are in quotes."""
    palette = np.array([(0, 0, 0), COLOURS["cat"], COLOURS["dog"]], np.uint8)
    lines = [
        f"{label}:{','.join(map(str, palette[value]))}::"
        for value, label in enumerate(("background", "cat", "dog"))
    ]
    root.mkdir(parents=True)
    header = "# label:color_rgb:parts:actions"
    (root / "labelmap.txt").write_text("\n".join([header, *lines]) + "\n")
    for subset, names in IMAGES.items():
        path = root / "ImageSets" / "Segmentation" / f"{subset}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        stems = [name.removesuffix(".png") for name in names]
        path.write_text("".join(f'"{stem}"\n' if " " in stem else f"{stem}\n" for stem in stems))
        for name in names:
            save_picture(root / "JPEGImages" / name, orientation)
            save(root / "SegmentationClass" / name, palette[truth(name)])
            save(root / "SegmentationObject" / name, palette[truth(name)])


def make_roboflow_masks(root: Path, orientation: int = 1) -> None:
    for subset, names in IMAGES.items():
        for name in names:
            save_picture(root / subset / name, orientation)
            save(root / subset / f"{Path(name).stem}_mask.png", truth(name))
        (root / subset / "_classes.csv").write_text(
            "Pixel Value, Class\n0, background\n1, cat\n2, dog\n"
        )


Make = Callable[..., None]
TOOLS: dict[str, tuple[str, Make]] = {
    "LabelMe": ("labelme", make_labelme),
    "CVAT's XML": ("cvat-xml", make_cvat_xml),
    "CVAT's COCO": ("coco", make_coco_of_cvat),
    "Roboflow's COCO": ("coco", make_coco_of_roboflow),
    "CVAT's masks": ("cvat-masks", make_cvat_masks),
    "Roboflow's masks": ("roboflow-masks", make_roboflow_masks),
}


def prepared(
    root: Path, tmp_path: Path, dataset: str, **changes: object
) -> tuple[dict, dict[str, tuple[str, np.ndarray, np.ndarray]]]:
    """Summary of prepare; by id the split, the image and the mask as later stages read them."""
    summary = prepare(config(root, dataset=dataset, **changes), tmp_path)
    entries, classes = read_manifest(tmp_path / "dataset")
    read = {}
    for entry in entries:
        image, mask = Path(entry.image), Path(entry.mask)
        pixels = decode_mask(
            mask.read_bytes(), mask,
            num_classes=len(classes.names), void_index=classes.void_index,
        )  # fmt: skip
        read[entry.id] = entry.split, np.asarray(decode_image(image.read_bytes(), image)), pixels
    return summary, read


def check_masks(summary: dict, read: dict[str, tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Compare every mask with the colours of its image."""
    assert summary["classes"] == ["background", "cat", "dog"]
    for id, (_, image, mask) in read.items():
        for value, label in ((1, "cat"), (2, "dog")):
            np.testing.assert_array_equal(
                mask == value, (image == COLOURS[label]).all(2), err_msg=f"{label} of {id}"
            )


@pytest.mark.parametrize("tool", TOOLS)
def test_an_export_is_recognised_and_read(
    tmp_path: Path, tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, make = TOOLS[tool]
    root = tmp_path / "export"
    make(root)
    summary, read = prepared(root, tmp_path, "auto")
    assert summary["dataset"] == dataset
    assert f"prepare: dataset {dataset}, recognised by " in capsys.readouterr().out
    assert sorted(split for split, *_ in read.values()) == ["test", *["train"] * 4, "val"]
    assert {id.rpartition("/")[2] for id in read} == {Path(name).stem for _, name in ALL}
    check_masks(summary, read)


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("tool", ["LabelMe", "CVAT's XML"])
def test_outlines_on_the_turned_image_stay(tmp_path: Path, tool: str, orientation: int) -> None:
    dataset, make = TOOLS[tool]
    make(tmp_path / "export", orientation)
    check_masks(*prepared(tmp_path / "export", tmp_path, dataset))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_cocos_outlines_on_stored_pixels_are_turned(tmp_path: Path, orientation: int) -> None:
    root = tmp_path / "export"
    for name in IMAGES["train"]:  # here the stored image is the picture
        exif = Image.Exif()
        exif[0x0112] = orientation
        (root / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(name)).save(root / "images" / name, exif=exif)
    write_json(root / "annotations" / "instances_default.json", coco_content(IMAGES["train"]))
    check_masks(*prepared(root, tmp_path, "coco", **RANDOM))


def test_cocos_sizes_tell_that_outlines_are_on_the_turned_image(tmp_path: Path) -> None:
    make_coco_of_cvat(tmp_path / "export", orientation=6)
    check_masks(*prepared(tmp_path / "export", tmp_path, "coco"))


# -- LabelMe ---------------------------------------------------------------------------------------


def as_base64(mask: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def square(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH]
LABELME_SHAPES = {  # shapes, and the mask; LabelMe's borders are inside
    "polygon": (
        [labelme_shape("polygon", "cat", [[2, 3], [10, 3], [10, 8], [2, 8]])],
        square(3, 2, 9, 11),
    ),
    "a polygon of an old version": (
        [{"label": "cat", "points": [[2, 3], [10, 3], [10, 8], [2, 8]], "line_color": None}],
        square(3, 2, 9, 11),
    ),
    "oriented rectangle": (
        [labelme_shape("oriented_rectangle", "cat", [[2, 3], [10, 3], [10, 8], [2, 8]])],
        square(3, 2, 9, 11),
    ),
    "rectangle": ([labelme_shape("rectangle", "cat", [[10, 8], [2, 3]])], square(3, 2, 9, 11)),
    "circle": (
        [labelme_shape("circle", "cat", [[18, 12], [18, 17]])],
        np.hypot(ROWS - 12, COLUMNS - 18) <= 5.5,
    ),
    "mask": (
        [
            labelme_shape(
                "mask", "cat", [[5.0, 6.0], [8.0, 7.0]],
                mask=as_base64(np.array([[1, 0, 0, 1], [1, 1, 1, 1]], bool)),
            )
        ],
        square(6, 5, 8, 9) - square(6, 6, 7, 8),
    ),
    "a mask across the border": (
        [
            labelme_shape(
                "mask", "cat", [[-1.0, 22.0], [1.0, 25.0]], mask=as_base64(np.ones((4, 3), bool))
            )
        ],
        square(22, 0, 24, 2),
    ),
    "the later shape is above": (
        [
            labelme_shape("rectangle", "cat", [[2, 3], [10, 8]]),
            labelme_shape("rectangle", "dog", [[5, 3], [20, 8]]),
        ],
        square(3, 2, 9, 11) + 2 * square(3, 5, 9, 21) - square(3, 5, 9, 11),
    ),
    "void": (
        [labelme_shape("rectangle", "__ignore__", [[2, 3], [10, 8]])], square(3, 2, 9, 11) * 255,
    ),
    "outside": ([labelme_shape("rectangle", "cat", [[-5, -5], [2, 3]])], square(0, 0, 4, 3)),
    "nothing": ([], square(0, 0, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("case", LABELME_SHAPES)
def test_labelmes_shapes(tmp_path: Path, case: str) -> None:
    shapes, expected = LABELME_SHAPES[case]
    root = tmp_path / "export"
    make_labelme(root)
    labelme_json(root / "train" / "a.json", shapes)
    _, read = prepared(root, tmp_path, "labelme")
    np.testing.assert_array_equal(read["train/a"][2], expected)


BAD_LABELME_SHAPES = {
    kind: ([labelme_shape(kind, "wire", [[2, 3], [10, 3]])], f"is a {kind}, which covers no area")
    for kind in ("line", "linestrip", "point", "points")
} | {
    "two points": (
        [labelme_shape("polygon", "cat", [[2, 3], [9, 9]])], "2 points, expected at least 3",
    ),
    "three corners": ([labelme_shape("rectangle", "cat", [[2, 3]] * 3)], "3 points, expected 2"),
    "no PNG": ([labelme_shape("mask", "cat", [[1, 1], [2, 2]], mask="AAAA")], "cannot be drawn"),
    "no mask": ([labelme_shape("mask", "cat", [[1, 1], [2, 2]])], "cannot be drawn"),
    "no label": ([{"points": [[1, 1]]}], r"is not LabelMe's JSON.* \(KeyError: 'label'\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LABELME_SHAPES)
def test_a_shape_that_labelme_cannot_have_or_that_has_no_area_is_named(
    tmp_path: Path, case: str
) -> None:
    shapes, words = BAD_LABELME_SHAPES[case]
    root = tmp_path / "export"
    make_labelme(root)
    labelme_json(root / "train" / "b.json", shapes)
    with pytest.raises(DataError, match=words) as caught:
        prepare(config(root, dataset="labelme"), tmp_path)
    assert str(caught.value).startswith(f"{root / 'train' / 'b.json'}: ")
    assert "\n" not in str(caught.value)


def test_labelmes_files_with_problems_are_all_listed(tmp_path: Path) -> None:
    root = tmp_path / "export"
    make_labelme(root)
    (root / "train" / "a.json").write_text('{"shapes": [')
    (root / "train" / "b.json").write_text("{}")
    (root / "train" / "d.png").unlink()
    labelme_json(root / "valid" / "e.json", [], size=(WIDTH, HEIGHT))
    with pytest.raises(DataError, match="and 3 more problems"):
        prepare(config(root, dataset="labelme"), tmp_path)
    listed = (tmp_path / "scratch" / "problems.txt").read_text().splitlines()
    for line, (file, words) in zip(
        sorted(listed),
        (
            ("train/a.json", "is not LabelMe's JSON, or a truncated one"),
            ("train/b.json", "(KeyError: 'shapes')"),
            ("train/d.png", "this image is missing"),
            ("valid/e.json", "the mask is 24 x 36 pixels, its image"),
        ),
        strict=True,
    ):
        assert line.startswith(f"{root / file}: ")
        assert words in line


def test_the_classes_of_labelme(tmp_path: Path) -> None:
    """They are those of labels.txt, else all labels by name; background is 0."""
    root = tmp_path / "export"
    make_labelme(root)
    assert prepared(root, tmp_path, "labelme")[0]["classes"] == ["background", "cat", "dog"]
    lines = ["__ignore__", "_background_", "dog", "cat"]
    (root / "labels.txt").write_text("\n".join(lines), encoding="utf-16")
    summary, read = prepared(root, tmp_path, "labelme")
    assert summary["classes"] == ["_background_", "dog", "cat"]
    assert read["train/a"][2][4, 4] == 2
    given = [{"cat": [1, 2, 3]}, {"dog": [4, 5, 6]}]
    summary, read = prepared(root, tmp_path, "labelme", classes=given)
    assert summary["palette"] == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    (root / "labels.txt").write_text("cat\n")
    with pytest.raises(
        DataError, match=r"f\.json: the label 'dog' is not in .*labels\.txt; .* background, cat\)"
    ):
        prepare(config(root, dataset="labelme"), tmp_path)


def test_labelmes_images_are_found_and_those_without_a_json_counted(tmp_path: Path) -> None:
    root = tmp_path / "export"
    make_labelme(root)
    flat = tmp_path / "flat"
    for folder, suffix in (("json", ".json"), ("images", ".png")):
        (flat / folder).mkdir(parents=True)
        for file in root.glob(f"*/*{suffix}"):
            shutil.move(file, flat / folder / file.name)
    for file in (flat / "json").iterdir():
        content = json.loads(file.read_text())
        content["imagePath"] = "..\\images\\" + content["imagePath"]
        file.write_text(json.dumps(content))
    save_picture(flat / "images" / "z.png")
    settings = config(flat, dataset="labelme", **RANDOM)
    layout = labelme.find(flat, settings)
    assert [(finding.kind, finding.path.name) for finding in layout.findings] == [
        ("images without an annotation file", "z.png")
    ]
    check_masks(*prepared(flat, tmp_path, "labelme", **RANDOM))
    with pytest.raises(DataError, match="has the subset 'json', expected subsets named train"):
        prepare(config(flat, dataset="labelme"), tmp_path)


# -- CVAT ------------------------------------------------------------------------------------------

TRIANGLE = (ROWS + 0.5 < 15) & (COLUMNS + 0.5 > 4) & (ROWS + 0.5 - 3 > COLUMNS + 0.5 - 4)
TURNED = (abs(ROWS + 0.5 - 12) < 6) & (abs(COLUMNS + 0.5 - 18) < 3)
CVAT_SHAPES = {  # elements of an image, and the mask
    "box": ('<box label="cat" xtl="2" ytl="3" xbr="10" ybr="8"/>', square(3, 2, 8, 10)),
    "box between pixels": (
        '<box label="cat" xtl="2.4" ytl="2.6" xbr="9.7" ybr="8.2"/>', square(3, 2, 8, 10),
    ),
    "turned box": (
        '<box label="cat" xtl="12" ytl="9" xbr="24" ybr="15" rotation="90.0"/>', TURNED,
    ),
    "polygon": ('<polygon label="cat" points="4.00,3.00;16.00,15.00;4.00,15.00"/>', TRIANGLE),
    "polygon from the end": (
        '<polygon label="cat" points="4.00,15.00;16.00,15.00;4.00,3.00"/>', TRIANGLE,
    ),
    "polygon across the border": (
        '<polygon label="cat" points="-4.0,-4.0;6.0,-4.0;6.0,5.0;-4.0,5.0"/>', square(0, 0, 5, 6),
    ),
    "ellipse": (
        '<ellipse label="cat" cx="18" cy="12" rx="9" ry="5"/>',
        ((COLUMNS + 0.5 - 18) / 9) ** 2 + ((ROWS + 0.5 - 12) / 5) ** 2 <= 1,
    ),
    "turned ellipse": (
        '<ellipse label="cat" cx="18" cy="12" rx="9" ry="5" rotation="90"/>',
        ((COLUMNS + 0.5 - 18) / 5) ** 2 + ((ROWS + 0.5 - 12) / 9) ** 2 <= 1,
    ),
    "mask": (
        '<mask label="cat" rle="1, 2, 5" left="5" top="6" width="4" height="2"/>',
        square(6, 6, 7, 8),
    ),
    "layers": (
        '<box label="dog" xtl="5" ytl="3" xbr="20" ybr="8" z_order="1"/>'
        '<box label="cat" xtl="2" ytl="3" xbr="10" ybr="8" z_order="0"/>',
        square(3, 2, 8, 10) + 2 * square(3, 5, 8, 20) - square(3, 5, 8, 10),
    ),
    "a tag of the image": (
        '<tag label="cat"></tag><box label="dog" xtl="2" ytl="3" xbr="10" ybr="8"/>',
        2 * square(3, 2, 8, 10),
    ),
    "nothing": ("", square(0, 0, 0, 0)),
}  # fmt: skip


def rewrite_first(root: Path, shapes: str) -> None:
    images = [cvat_image("a.png", [shapes], "train")]
    text = (root / "annotations.xml").read_text()
    begin, end = text.index("<image"), text.index("</image>") + len("</image>")
    (root / "annotations.xml").write_text(text[:begin] + images[0] + text[end:])


@pytest.mark.parametrize("case", CVAT_SHAPES)
def test_cvats_shapes(tmp_path: Path, case: str) -> None:
    shapes, expected = CVAT_SHAPES[case]
    root = tmp_path / "export"
    make_cvat_xml(root)
    rewrite_first(root, shapes)
    summary, read = prepared(root, tmp_path, "cvat-xml")
    np.testing.assert_array_equal(read["a"][2], expected)
    assert summary["palette"] == [[0, 0, 0], list(COLOURS["cat"]), list(COLOURS["dog"])]


def test_an_image_that_nobody_has_labelled_yet_is_a_finding(tmp_path: Path) -> None:
    root = tmp_path / "export"
    make_cvat_xml(root)
    summary, _ = prepared(root, tmp_path / "labelled", "cvat-xml")
    assert summary["findings"] == {}
    rewrite_first(root, "")
    summary, _ = prepared(root, tmp_path / "not-labelled", "cvat-xml")
    assert summary["findings"] == {"images without an outline": 1}


def test_cvats_polygons_are_those_of_its_mask_export(tmp_path: Path) -> None:
    """CVAT draws its masks with pycocotools; along the border a pixel may differ."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radii = rng.uniform(20, 60, 9)
        points = np.stack([64 + radii * np.cos(angles), 64 + radii * np.sin(angles)], 1)
        ours = fill_polygon(points.tolist(), (128, 128))
        theirs = decode_segmentation([points.reshape(-1).tolist()], (128, 128))
        assert abs(int(ours.sum()) - int(theirs.sum())) < 0.02 * theirs.sum()
        assert (ours != theirs).sum() < 0.04 * theirs.sum()


BAD_CVAT = {  # what replaces the first image's shapes, or a change of the whole file
    **{
        kind: (f'<{kind} label="cat" points="2,3;4,5"/>', f"a has a {kind} .*covers no area")
        for kind in ("polyline", "points", "cuboid", "skeleton")
    },
    "an unknown label": ('<box label="cow"/>', "a has the label 'cow', expected one of background"),
    "a missing corner": ('<box label="cat" xtl="1"/>', "a box of a .* cannot be drawn: 'ytl'"),
    "words": ('<polygon label="cat" points="one,two"/>', "a polygon of a .* cannot be drawn"),
    "too many runs": (
        '<mask label="cat" rle="1, 9" left="5" top="6" width="4" height="2"/>',
        "its runs have 10 pixels, expected 2 x 4",
    ),
}


@pytest.mark.parametrize("case", BAD_CVAT)
def test_a_shape_of_cvat_without_an_area_is_named(tmp_path: Path, case: str) -> None:
    shapes, words = BAD_CVAT[case]
    root = tmp_path / "export"
    make_cvat_xml(root)
    rewrite_first(root, shapes)
    with pytest.raises(DataError, match=words) as caught:
        prepare(config(root, dataset="cvat-xml"), tmp_path)
    assert str(caught.value).startswith(f"{root / 'annotations.xml'}: ")
    assert "\n" not in str(caught.value)


BAD_DOCUMENTS = {
    "truncated": ("<annotations><meta>", "is not CVAT's XML, or a truncated one"),
    "another XML": ("<annotation></annotation>", "holds <annotation>, expected <annotations>"),
    "a video": ("<annotations><track/></annotations>", "'CVAT for video 1.1'"),
    "no labels": ("<annotations/>", "lists no labels"),
    "no size": (cvat_document(['<image name="a.png"/>']), "an image lacks name, width or height"),
    "no name": (cvat_document(['<image width="1" height="1"/>']), "an image lacks name"),
}


@pytest.mark.parametrize("case", BAD_DOCUMENTS)
def test_an_xml_that_is_not_of_cvat_is_named(tmp_path: Path, case: str) -> None:
    content, words = BAD_DOCUMENTS[case]
    (tmp_path / "annotations.xml").write_text(content)
    with pytest.raises(DataError, match=words):
        cvat_xml.find(tmp_path, config(tmp_path, dataset="cvat-xml"))


def test_tasks_of_cvat_side_by_side(tmp_path: Path) -> None:
    """Two tasks may have an image of one name, and no subsets."""
    root = tmp_path / "export"
    for task in ("task 1", "task 2"):
        make_cvat_xml(root / task)
        path = root / task / "annotations.xml"
        text = path.read_text()
        for subset in IMAGES:
            text = text.replace(f'subset="{subset}"', 'subset="default"')
            for image in (root / task / "images" / subset).iterdir():
                image.rename(root / task / "images" / image.name)
        path.write_text(text)
    summary, read = prepared(root, tmp_path, "cvat-xml", copies="warn", **RANDOM)
    assert len(read) == 12
    assert "task 2/c 1" in read
    check_masks(summary, read)
    with pytest.raises(DataError, match="images outside of subsets, .* prepare.split to random"):
        prepare(config(root, dataset="cvat-xml"), tmp_path)
    (root / "task 2" / "annotations.xml").write_text(cvat_document([], labels=("cow",)))
    with pytest.raises(DataError, match="has the label 'cow', which .*task 1.* has not"):
        prepare(config(root, dataset="cvat-xml", **RANDOM), tmp_path)


def test_cvats_masks_without_saved_images(tmp_path: Path) -> None:
    root = tmp_path / "export"
    make_cvat_masks(root)
    (root / "JPEGImages").rename(root / "pictures")
    with pytest.raises(DataError, match="JPEGImages: there is no such folder, .*'Save images'"):
        prepare(config(root, dataset="cvat-masks"), tmp_path)
    (root / "pictures").rename(root / "images")
    check_masks(*prepared(root, tmp_path, "cvat-masks"))
    shutil.rmtree(root / "ImageSets")
    check_masks(*prepared(root, tmp_path, "cvat-masks", **RANDOM))


# -- COCO ------------------------------------------------------------------------------------------


def change(content: dict, number: int, **values: object) -> None:
    content["annotations"][number].update(values)


OUTLINES = [ring(boxes("a.png")["cat"])]
COCO_ROWS: dict[str, tuple[Callable[[dict], object], list[tuple[str, int]], bool]] = {
    # a change of the file, what is counted as left out, and whether image a still has its cat
    "an empty outline": (lambda c: change(c, 0, segmentation=[]), [(NO_OUTLINE, 1)], False),
    "null": (lambda c: change(c, 0, segmentation=None), [(NO_OUTLINE, 1)], False),
    "absent": (lambda c: c["annotations"][0].pop("segmentation"), [(NO_OUTLINE, 1)], False),
    "two points first": (
        lambda c: change(c, 0, segmentation=[[1, 2, 3, 4], *OUTLINES]), [(RINGS, 1)], True,
    ),
    "two points second": (
        lambda c: change(c, 0, segmentation=[*OUTLINES, [1, 2, 3, 4], [5, 6]]), [(RINGS, 2)], True,
    ),
    "only two points": (
        lambda c: change(c, 0, segmentation=[[1, 2, 3, 4]]), [(RINGS, 1)], False,
    ),
    "one polygon without a list": (lambda c: change(c, 0, segmentation=OUTLINES[0]), [], True),
    "run lengths of a brush": (  # CVAT marks them as crowds
        lambda c: change(c, 0, iscrowd=1, segmentation=run_lengths(truth("a.png") == 1)), [], True,
    ),
    "a background": (
        lambda c: c["categories"].append({"id": 9, "name": "Background"}), [], True,
    ),
}  # fmt: skip


def run_lengths(mask: np.ndarray) -> dict:
    flat = np.concatenate([[0], mask.T.reshape(-1).astype(int), [-1]])
    edges = np.flatnonzero(np.diff(flat))
    return {"counts": np.diff(np.concatenate([[0], edges])).tolist(), "size": list(mask.shape)}


@pytest.mark.parametrize("case", COCO_ROWS)
def test_cocos_annotations_without_an_outline_are_counted(tmp_path: Path, case: str) -> None:
    spoil, counted, has_cat = COCO_ROWS[case]
    root = tmp_path / "export"
    make_coco_of_cvat(root)
    content = coco_content(IMAGES["train"])
    spoil(content)
    for path in (root / "annotations").iterdir():
        other = json.loads(path.read_text())
        write_json(path, {**other, "categories": content["categories"]})
    path = root / "annotations" / "instances_train.json"
    write_json(path, content)
    findings = coco_export.find(root, config(root, dataset="coco")).findings
    assert findings == [
        Finding(kind, path, f"{count} {kind} are left out", count) for kind, count in counted
    ]
    summary, read = prepared(root, tmp_path, "coco")
    assert summary["classes"][1:] == ["cat", "dog"]
    np.testing.assert_array_equal(read["a"][2] == 1, (truth("a.png") == 1) & has_cat)
    np.testing.assert_array_equal(read["b"][2], truth("b.png"))


def test_one_file_name_in_two_splits_of_coco(tmp_path: Path) -> None:
    root = tmp_path / "export"
    for subset, names in {"train": ["a.png", "b.png"], "val": ["b.png"], "test": ["c.png"]}.items():
        for name in names:
            save_picture(root / "images" / subset / name)
        write_json(root / "annotations" / f"instances_{subset}.json", coco_content(names))
    # The two images differ: prepare may refuse equal ones in two splits.
    save(root / "images" / "val" / "b.png", picture("b.png") | np.uint8(1))
    _, read = prepared(root, tmp_path, "coco")
    assert sorted(read) == ["test/c", "train/a", "train/b", "val/b"]


PLACES = {  # file name in the JSON, place of the JSON, place of the image
    "Label Studio": ("images/0a1b-a.png", "result.json", "images/0a1b-a.png"),
    "labelme2coco": ("JPEGImages/a.png", "annotations.json", "JPEGImages/a.png"),
    "a path of another machine": ("/home/me/pets/a.png", "pets.json", "images/a.png"),
    "Windows": ("..\\pets\\a.png", "annotations/instances_default.json", "images/a.png"),
    "a folder": ("day 1/a.png", "annotations/instances_default.json", "images/day 1/a.png"),
}


@pytest.mark.parametrize("case", PLACES)
def test_where_other_tools_put_cocos_images(tmp_path: Path, case: str) -> None:
    name, annotations, image = PLACES[case]
    root = tmp_path / "export"
    write_json(root / annotations, coco_content([name, name.replace("a.png", "b.png")]))
    save_picture(root / image)
    layout = coco_export.find(root, config(root, dataset="coco", split="random"))
    assert layout.pairs[0].image == root / image
    assert all(not pair.id.startswith("/") and ".." not in pair.id for pair in layout.pairs)


BAD_COCO = {
    "no file": (None, "holds no annotations in COCO's JSON"),
    "another JSON": ({"shapes": []}, "is not COCO's JSON"),
    "only boxes": (
        {**coco_content(["a.png"]), "annotations": [{"image_id": 1, "category_id": 3}]},
        "no annotation has an outline",
    ),
    "a category twice": (
        {**coco_content(["a.png"]), "categories": [*CATEGORIES, {"id": 9, "name": "cat"}]},
        "the class 'cat' occurs twice",
    ),
}


@pytest.mark.parametrize("case", BAD_COCO)
def test_a_wrong_coco_export_is_named(tmp_path: Path, case: str) -> None:
    content, words = BAD_COCO[case]
    if content is not None:
        write_json(tmp_path / "annotations.json", content)
    with pytest.raises(DataError, match=words):
        coco_export.find(tmp_path, config(tmp_path, dataset="coco", split="random"))


# -- Roboflow, and what is recognised --------------------------------------------------------------


def test_the_values_of_roboflows_list(tmp_path: Path) -> None:
    root = tmp_path / "export"
    make_roboflow_masks(root)
    for path in root.glob("*/_classes.csv"):
        path.write_text("Pixel Value, Class\n0, background\n2, dog\n1, void\n")
    summary, read = prepared(root, tmp_path, "roboflow-masks")
    assert summary["classes"] == ["background", "dog"]
    expected = np.array([0, 255, 1], np.uint8)[truth("a.png")]
    np.testing.assert_array_equal(read["train/a"][2], expected)
    (root / "test" / "_classes.csv").write_text("Pixel Value, Class\n0, background\n")
    with pytest.raises(DataError, match=r"train/_classes\.csv: differs from .*test/_classes\.csv"):
        prepare(config(root, dataset="roboflow-masks"), tmp_path)
    (root / "test" / "_classes.csv").write_text("Pixel Value, Class\nzero, background\n")
    with pytest.raises(DataError, match="must have lines `0, background`"):
        prepare(config(root, dataset="roboflow-masks"), tmp_path)


def test_a_folder_of_several_data_sets_or_of_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(
        DataError,
        match=r"none of the data sets that prepare.dataset auto looks for: folder \(images and "
        r"masks\), .*, labelme \(\*\.json with shapes\), .*; set prepare.dataset to one of them",
    ):
        prepare(config(tmp_path / "none", dataset="auto"), tmp_path)
    make_labelme(tmp_path / "both")
    make_cvat_xml(tmp_path / "both")
    with pytest.raises(
        DataError,
        match=r"several data sets .*: cvat-xml \(annotations\.xml\), labelme \(\*\.json",
    ):
        prepare(config(tmp_path / "both", dataset="auto"), tmp_path)
    with pytest.raises(ConfigError, match="auto cannot be downloaded: name the data set"):
        prepare(config(tmp_path / "absent", dataset="auto"), tmp_path, download=True)


def test_a_folder_of_the_users_own_is_recognised(photos: Path, tmp_path: Path) -> None:
    assert prepare(config(photos, dataset="auto"), tmp_path)["dataset"] == "folder"
