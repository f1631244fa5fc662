"""Lists and file names as people's programs write them are read right, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.common.errors import ConfigError, DataError
from stages.data.manifest import Classes, read_manifest
from stages.datasets.class_list import Label, read_labels
from stages.datasets.id_lists import read_ids
from stages.datasets.layout import DatasetLayout
from stages.datasets.remap import remap_classes
from tests.factories import make_voc, photo, prepare, save, stripes
from tests.factories import prepare_config as config

# -- lists of ids ----------------------------------------------------------------------------------

IDS = ["a", "b", "c", "d"]
ID_LISTS = {  # the bytes of trainval.txt of a data set with the ids a, b, c and d
    "one a line": b"a\nb\nc\nd\n",
    "Windows": b"a\r\nb\r\nc\r\nd\r\n",
    "spaces and empty lines": b"\n  a \n\nb\t\nc\nd",
    "several a line": b"a b c\nd\n",
    "UTF-8 with a mark": "a\nb\nc\nd\n".encode("utf-8-sig"),
    "PowerShell": "a\r\nb\r\nc\r\nd\r\n".encode("utf-16"),
    "UTF-16, big end first": b"\xfe\xff" + "a\nb\nc\nd\n".encode("utf-16-be"),
    "names of images": b"a.jpg\nb.jpg\nc.JPG\nd.jpg\n",
    "paths of images": b"JPEGImages/a.jpg\n/JPEGImages/b.jpg\nJPEGImages\\c.jpg\nd.jpg\n",
    "in quotes": b'"a"\n"b"\n"c"\n"d"\n',
    "pairs of names": b"a.jpg a.png\nb.jpg b.png\nc.jpg c.png\nd.jpg d.png\n",
    "pairs of ids": b"a a\nb b\nc c\nd d\n",
    "pairs of paths": b"".join(
        b"/JPEGImages/%c.jpg /SegmentationClass/%c.png\n" % (id, id) for id in b"abcd"
    ),
}


@pytest.mark.parametrize("form", ID_LISTS)
def test_every_form_of_a_list_of_ids_is_read(tmp_path: Path, form: str) -> None:
    root = tmp_path / "voc"
    make_voc(root)
    (root / "ImageSets" / "Segmentation" / "trainval.txt").write_bytes(ID_LISTS[form])
    prepare(config(root, dataset="voc", split="random", ratios=[0.5, 0.25, 0.25]), tmp_path)
    entries, _ = read_manifest(tmp_path / "dataset")
    assert [entry.id for entry in entries] == IDS
    assert [Path(entry.mask).relative_to(root).as_posix() for entry in entries] == [
        f"SegmentationClass/{id}.png" for id in IDS
    ]


def test_a_pair_of_paths_names_the_mask(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text("JPEGImages/a.jpg SegmentationClassAug/a.png\n'b 1' b\n\"my photo\"\n")
    assert read_ids(path) == {
        "a": ("JPEGImages/a.jpg", "SegmentationClassAug/a.png"),
        "'b": (),
        "1'": (),
        "b": (),
        "my photo": (),
    }


BAD_ID_LISTS = {
    "flags of one class": (b"a  1\nb -1\n", r"the line 'a  1' has a flag, as lists of one class"),
    "an id twice": (b"a\nb\na.jpg\n", "id a is listed twice"),
    "another encoding": (b"\xe4\n", "neither in UTF-8 nor in UTF-16 .* save it as UTF-8"),
}


@pytest.mark.parametrize("case", BAD_ID_LISTS)
def test_a_wrong_list_of_ids_is_named_with_its_form(tmp_path: Path, case: str) -> None:
    content, words = BAD_ID_LISTS[case]
    path = tmp_path / "train.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_ids(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


# -- lists of classes ------------------------------------------------------------------------------

COLOURED = "name,red,green,blue\nsky,0,0,0\nold cat,250,50,83\n"
TWO = [Label("sky", (0, 0, 0)), Label("old cat", (250, 50, 83))]
BARE = [Label("sky", None), Label("old cat", None)]
CLASS_LISTS = {  # file name, bytes, labels
    "as documented": ("classes.csv", COLOURED.encode(), TWO),
    "UTF-8 with a mark": ("classes.csv", COLOURED.encode("utf-8-sig"), TWO),
    "UTF-16": ("classes.csv", COLOURED.encode("utf-16"), TWO),
    "semicolons": ("classes.csv", COLOURED.replace(",", ";").encode(), TWO),
    "tabs": ("classes.csv", COLOURED.replace(",", "\t").encode(), TWO),
    "spaces": ("classes.csv", COLOURED.replace(",", " , ").encode(), TWO),
    "a capital": ("classes.csv", COLOURED.replace("name", "Name").encode(), TWO),
    "capitals": ("classes.csv", COLOURED.replace("name,red", "NAME,RED").encode(), TWO),
    "empty rows": ("classes.csv", f"\n{COLOURED},,,\n;\n\n".encode(), TWO),
    "decimals": ("classes.csv", b"name,red,green,blue\nsky,0.0,0.0,0\nold cat,250.0,50,83\n", TWO),
    "quotes": ("classes.csv", b'"name"\n"sky"\n"old cat"\n', BARE),
    "no colours": ("classes.csv", b"name\nsky\nold cat", BARE),
    "Windows": ("classes.csv", b"name\r\nsky\r\nold cat\r\n", BARE),
    "CVAT": ("labelmap.txt", b"# label:color_rgb:parts:actions\nsky:0,0,0::\nold cat:::\n", [
        Label("sky", (0, 0, 0)), Label("old cat", None),
    ]),
    "CVAT in UTF-16": ("labelmap.txt", "sky:0,0,0::\nold cat:250,50,83::".encode("utf-16"), TWO),
}  # fmt: skip


@pytest.mark.parametrize("form", CLASS_LISTS)
def test_every_form_of_a_list_of_classes_is_read(tmp_path: Path, form: str) -> None:
    name, content, labels = CLASS_LISTS[form]
    (tmp_path / name).write_bytes(content)
    assert read_labels(tmp_path) == labels


BAD_CLASS_LISTS = {  # lines of classes.csv
    "no header": ("sky\ncat\n", "must begin with a line of column names .* found 'sky'"),
    "another header": ("class,red\nsky,1\n", "column names .* found 'class,red'"),
    "nothing": ("", "column names .* found ''"),
    "only the header": ("name\n", "must have a name on every line"),
    "a colour without a name": ("name,red,green,blue\n,1,2,3\n", "must have a name on every line"),
    "two parts": ("name,red,green,blue\nsky,1,2,\n", "'sky' must be three numbers"),
    "fractions": ("name,red,green,blue\nsky,0.5,0.5,0.5\n", "'sky' must be three numbers"),
    "words": ("name,red,green,blue\nsky,red,1,1\n", r"three numbers .* \['red', '1', '1'\]"),
    "too large": ("name,red,green,blue\nsky,1,1,256\n", "three numbers of 0 to 255"),
    "a name twice": ("name\nsky\ncat\nsky\n", "the class 'sky' occurs twice"),
}


@pytest.mark.parametrize("case", BAD_CLASS_LISTS)
def test_a_wrong_list_of_classes_is_named_with_its_cause(tmp_path: Path, case: str) -> None:
    content, words = BAD_CLASS_LISTS[case]
    (tmp_path / "classes.csv").write_text(content)
    with pytest.raises(DataError, match=words) as caught:
        read_labels(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'classes.csv'}: ")
    assert "\n" not in str(caught.value)


# -- names of masks --------------------------------------------------------------------------------

PATTERNS = {  # names of masks for the images x.jpg, y.png and z 1.jpeg; the pattern
    "as the image": (("x.png", "y.png", "z 1.png"), "{name}"),
    "a suffix": (("x_mask.png", "y_mask.png", "z 1_mask.png"), "{name}_mask"),
    "a prefix": (("seg-x.png", "seg-y.png", "seg-z 1.png"), "seg-{name}"),
    "both": (("a_x_b.png", "a_y_b.png", "a_z 1_b.png"), "a_{name}_b"),
    "the file's name": (("x.jpg.png", "y.png.png", "z 1.jpeg.png"), "{file}"),
    "the file's name and more": (("x.jpg_L.png", "y.png_L.png", "z 1.jpeg_L.png"), "{file}_L"),
}


@pytest.mark.parametrize("case", PATTERNS)
def test_the_pattern_of_masks_is_suggested_and_read(tmp_path: Path, case: str) -> None:
    names, pattern = PATTERNS[case]
    root = tmp_path / "mine"
    for image, mask in zip(("x.jpg", "y.png", "z 1.jpeg"), names, strict=True):
        photo(root / "images" / image)
        save(root / "masks" / mask, stripes(0, 1))
    (root / "classes.csv").write_text("name\nsky\ncat\n")
    settings = {"split": "random", "ratios": [0.34, 0.33, 0.33]}
    if pattern != "{name}":
        save(root / "masks" / "x_instances.png", stripes(0, 7))  # what a tool writes, too
        with pytest.raises(DataError) as caught:
            prepare(config(root, **settings), tmp_path)
        assert str(caught.value) == (
            f"{root / 'masks'}: 3 of 3 images have no mask named {{name}}, and 3 have one named "
            f"{pattern}; set prepare.mask_pattern to '{pattern}'"
        )
    prepare(config(root, **settings, mask_pattern=pattern), tmp_path)
    entries, _ = read_manifest(tmp_path / "dataset")
    assert {entry.id: Path(entry.mask).name for entry in entries} == dict(
        zip(("x", "y", "z 1"), names, strict=True)
    )


def test_a_mask_or_an_image_that_a_pattern_misses_is_named(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    for name in "abcdef":
        photo(root / "images" / f"{name}.jpg")
        save(root / "masks" / f"{name}_mask.png", stripes(0, 1))
    (root / "classes.csv").write_text("name\nsky\ncat\n")
    settings = config(root, split="random", mask_pattern="{name}_mask.png")
    (root / "masks" / "a_mask.png").unlink()
    with pytest.raises(DataError, match=r"masks/a_mask\.png: this mask is missing"):
        prepare(settings, tmp_path)
    save(root / "masks" / "a_mask.png", stripes(0, 1))
    (root / "images" / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"images/b\.jpg: this image is missing"):
        prepare(settings, tmp_path)


@pytest.mark.parametrize("pattern", ["", "mask", "{name}{file}", "{nam}"])
def test_a_pattern_without_the_images_name_is_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match=r"must hold \{name\} or \{file\} once"):
        config(tmp_path, mask_pattern=pattern)


# -- remapping -------------------------------------------------------------------------------------

NAMES = ("sky", "cat", "dog", "pole")
REMAPS = {  # the setting; the new classes; what 0, 1, 2 and 3 become; names that it leaves
    "merge": ({"dog": "cat"}, "sky cat pole", [0, 1, 1, 2], "sky, cat, pole"),
    "a new name": ({"dog": "pet", "cat": "pet"}, "sky pet pole", [0, 1, 1, 2], "sky, pole"),
    "rename": ({"sky": "air"}, "air cat dog pole", [0, 1, 2, 3], "cat, dog, pole"),
    "exchange": ({"cat": "dog", "dog": "cat"}, "sky dog cat pole", [0, 1, 2, 3], "sky, pole"),
    "move on": ({"sky": "cat", "cat": "pet"}, "cat pet dog pole", [0, 1, 2, 3], "dog, pole"),
    "drop": ({"sky": None, "pole": "void"}, "cat dog", [255, 0, 1, 255], "cat, dog"),
    "by index": ({3: "cat", "0": "air"}, "air cat dog", [0, 1, 2, 1], "cat, dog"),
    "to an index": ({"pole": 0, 2: "1", "cat": 1, "sky": "sky"}, "sky cat", [0, 1, 1, 0], "none"),
}


@pytest.mark.parametrize("case", REMAPS)
def test_classes_are_merged_renamed_and_dropped(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    remap, classes, values, kept = REMAPS[case]
    root = tmp_path / "mine"
    for number in range(3):
        photo(root / "images" / f"{number}.jpg")
        save(root / "masks" / f"{number}.png", stripes(0, 1, 2, 3, 9))
    lines = [f"{name},{number},0,0" for number, name in enumerate(NAMES)]
    (root / "classes.csv").write_text("\n".join(["name,red,green,blue", *lines]))
    settings = config(root, split="random", ratios=[0.34, 0.33, 0.33], void_index=9, remap=remap)
    summary = prepare(settings, tmp_path)
    assert summary["classes"] == classes.split()
    entries, read = read_manifest(tmp_path / "dataset")
    mask = np.asarray(Image.open(entries[0].mask))
    np.testing.assert_array_equal(mask, stripes(*values, 255))
    assert read.void_index == 255
    assert len(set(read.palette)) == len(read.names)
    assert f"prepare.remap leaves as they are: {kept}\n" in capsys.readouterr().out


BAD_REMAPS = {
    "an unknown name": (
        {"horse": "cat"},
        "there is no class 'horse'; the classes are 0 sky, 1 cat, 2 dog, 3 pole",
    ),
    "an unknown index": ({4: "cat"}, "there is no class '4'"),
    "twice": ({"cat": "dog", 1: "pole"}, "names the class 'cat' twice, by name and by index"),
    "nothing left": (dict.fromkeys(NAMES, "void"), "makes every class void"),
}


@pytest.mark.parametrize("case", BAD_REMAPS)
def test_a_wrong_remap_is_refused_with_the_known_classes(tmp_path: Path, case: str) -> None:
    remap, words = BAD_REMAPS[case]
    layout = DatasetLayout([], Classes(NAMES, ((0, 0, 0),) * 4))
    with pytest.raises(ConfigError, match=words) as caught:
        remap_classes(layout, config(tmp_path, remap=remap).remap)
    assert str(caught.value).startswith("prepare.remap: ")
