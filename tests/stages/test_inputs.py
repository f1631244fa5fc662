"""Inputs that labelling tools and cameras produce: each is read right, or refused with the reason.

A case is one line of a table: how a pair is written, and the right mask or the words of the error.
Every case is prepared alone; ``doctor`` sees all those without settings in one folder.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin, features

from stages.common.errors import ConfigError, DataError
from stages.data.images import MAX_PIXELS, UPRIGHT, decode_image
from stages.data.manifest import read_manifest, read_original
from stages.datasets.interpolation import false_borders
from tests.factories import call, one_line, prepare, prepare_config, tiny_params

pytestmark = pytest.mark.filterwarnings("error")

M = np.zeros((20, 24), np.uint8)  # of two classes, and not its own mirror image
M[3:9, 2:12] = 1
VOIDED = np.where(M == 1, 255, 0).astype(np.uint8)
PARTLY = M.copy()
PARTLY[3, 2:12] = 255
Writer = Callable[[Path], None]


def rgb(seed: object, shape: tuple[int, int] = M.shape) -> np.ndarray:
    """An image of smooth colours, which JPEG keeps, that depends on the seed."""
    colours = np.random.default_rng(list(str(seed).encode())).integers(0, 256, (2, 2, 3), np.uint8)
    return np.asarray(Image.fromarray(colours).resize(shape[::-1], Image.Resampling.BILINEAR))


def saved(pixels: np.ndarray | Image.Image, mode: str = "", **options: object) -> Writer:
    """Return a writer of an image file; its format is that of the file's name."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image = image.convert(mode) if mode else image
    return lambda path: image.save(path, **options)  # type: ignore[arg-type]


def bytes_of(content: bytes) -> Writer:
    return lambda path: path.write_bytes(content) and None


def frames(*pixels: np.ndarray, mode: str = "L", format: str | None = None) -> Writer:
    first, *rest = (Image.fromarray(each).convert(mode) for each in pixels)
    return lambda path: first.save(path, format, save_all=True, append_images=rest)


def pyramid(path: Path, pixels: np.ndarray = M) -> None:
    """Write a TIFF with a smaller copy of itself, as GIS programs do."""
    with TiffImagePlugin.AppendingTiffWriter(path, new=True) as file:
        Image.fromarray(pixels).save(file, "TIFF")
        file.newFrame()
        Image.fromarray(pixels[::2, ::2]).save(file, "TIFF", tiffinfo={254: 1})


def rgb16(path: Path) -> None:
    """Write a PNG with 16 bits a channel, which Pillow cannot write."""
    height, width = M.shape

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    rows = zlib.compress(bytes(height * (1 + 6 * width)))
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def photo(orientation: int, shape: tuple[int, int] = M.shape) -> Writer:
    """A JPEG with an EXIF orientation whose stored pixels have a shape."""
    return saved(rgb(f"{orientation}{shape}", shape), exif=exif(orientation), quality=95)


def turned(mask: np.ndarray, orientation: int) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).transpose(UPRIGHT[orientation]))


def with_alpha(mask: np.ndarray, mode: str, alpha: int) -> Image.Image:
    """A mask whose void part, as in ``PARTLY``, has an alpha value; the rest is opaque."""
    image = Image.fromarray(mask).convert(mode)
    image.putalpha(Image.fromarray(np.where(PARTLY == 255, alpha, 255).astype(np.uint8)))
    return image


def broken_link(path: Path) -> None:
    path.symlink_to("nowhere.png")


def nothing(path: Path) -> None:
    pass


def smoothed(mask: np.ndarray, scale: int = 2) -> np.ndarray:
    height, width = mask.shape
    small = Image.fromarray(mask[::scale, ::scale])
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))


@dataclass(frozen=True)
class Case:
    """One pair, and what is right.

    Attributes
    ----------
    image, mask
        Suffix and writer of the files. Default: PNGs of an image and of ``M``.
    right
        The right mask, for an input that is read.
    error
        Words of the error, for one that is refused.
    finding
        Words of a finding.
    settings
        Keys of section ``prepare``.
    classes
        The class list.
    """

    image: tuple[str, Writer] | None = None
    mask: tuple[str, Writer] = ("png", saved(M))
    right: np.ndarray | None = None
    error: str = ""
    finding: str = ""
    settings: dict[str, object] = field(default_factory=dict)
    classes: str = "name\nbackground\nobject\n"


COLOURS = "name,red,green,blue\nbackground,0,0,0\nobject,250,50,83\n"
BLACK_LAST = "name,red,green,blue\nobject,250,50,83\nbackground,0,0,0\n"
RED = np.where(M[..., None] == 1, np.uint8([250, 50, 83]), np.uint8(0))
VOID = {"transparent": "void"}
ALL_MASKS = {
    "1 bit": Case(mask=("png", saved(M * 255, "1")), right=M),
    "palette": Case(mask=("png", saved(M, "P")), right=M),
    "palette with transparency": Case(mask=("png", saved(M, "P", transparency=0)), right=M),
    "GIF": Case(mask=("gif", saved(M)), right=M),
    "BMP": Case(mask=("bmp", saved(M)), right=M),
    "16 bits": Case(mask=("png", saved(M.astype(np.uint16))), right=M),
    "TIFF of 16 bits": Case(mask=("tif", saved(M.astype("<u2"))), right=M),
    "big-endian TIFF of 16 bits": Case(
        mask=("tif", saved(Image.frombytes("I;16B", (24, 20), M.astype(">u2").tobytes()))),
        right=M,
    ),
    "TIFF of 32 bits": Case(mask=("tiff", saved(M.astype(np.int32))), right=M),
    "TIFF with LZW": Case(mask=("tif", saved(M, compression="tiff_lzw")), right=M),
    "TIFF with overviews": Case(mask=("tif", pyramid), right=M),
    "grey with full alpha": Case(mask=("png", saved(with_alpha(M, "L", 255))), right=M),
    "RGB of equal channels": Case(mask=("png", saved(M, "RGB")), right=M),
    "RGBA of equal channels": Case(mask=("png", saved(M, "RGBA")), right=M),
    "RGB of indices beside a list of colours": Case(
        mask=("png", saved(M, "RGB")), right=M, classes=COLOURS
    ),
    "RGB of indices where black is another class": Case(
        mask=("png", saved(M, "RGB")),
        error=r"colour \(1, 1, 1\) in row 3, column 2 \(from 0\) is that of no class",
        classes=BLACK_LAST,
    ),
    "black in a list without black": Case(
        mask=("png", saved(M * 0, "RGB")),
        error=r"colour \(0, 0, 0\) .* is that of no class",
        classes=COLOURS.replace("0,0,0", "9,9,9"),
    ),
    "black where it is another class": Case(
        mask=("png", saved(M * 0, "RGB")), right=M * 0 + 1, classes=BLACK_LAST
    ),
    "colours": Case(mask=("png", saved(RED)), right=M, classes=COLOURS),
    "transparent grey": Case(
        mask=("png", saved(with_alpha(M, "L", 0))),
        error=r"pixel in row 3, column 2 \(from 0\) is transparent, .* prepare\.transparent",
    ),
    "transparent grey as void": Case(
        mask=("png", saved(with_alpha(M, "L", 0))), right=PARTLY, settings=VOID
    ),
    "transparent RGBA of equal channels as void": Case(
        mask=("png", saved(with_alpha(M, "RGB", 0))), right=PARTLY, settings=VOID
    ),
    "transparent colours": Case(
        mask=("png", saved(with_alpha(RED, "RGB", 0))),
        error=r"is transparent, .* prepare\.transparent",
        classes=COLOURS,
    ),
    "transparent colours as void": Case(
        mask=("png", saved(with_alpha(RED, "RGB", 0))), right=PARTLY, settings=VOID, classes=COLOURS
    ),
    "half transparent": Case(
        mask=("png", saved(with_alpha(M, "L", 128))),
        error="row 3, column 2 .* is half transparent",
        settings=VOID,
    ),
    "float TIFF": Case(
        mask=("tif", saved(M.astype(np.float32))), error="the mask holds 32-bit floats"
    ),
    "JPEG": Case(
        mask=("jpg", saved(M * 255)),
        error=r"0\.png: this mask is missing; 0\.jpg is not of a format that is read as mask",
    ),
    "JPEG named PNG": Case(
        mask=("png", saved(M, format="JPEG")), error="the mask is a JPEG file, whose compression"
    ),
    "TIFF with JPEG inside": Case(
        mask=("tif", saved(M, compression="jpeg")), error=r"the mask is a TIFF \(JPEG\) file"
    ),
    "WebP named PNG": Case(
        mask=("png", saved(M, format="WEBP")), error="the mask is a WEBP file, whose compression"
    ),
    "TIFF of two pages": Case(
        mask=("tif", frames(M, 1 - M)), error=r"this mask has 2 frames or pages \(TIFF\)"
    ),
    "moving GIF": Case(
        mask=("gif", frames(M, 1 - M)), error=r"this mask has 2 frames or pages \(GIF\)"
    ),
    "moving PNG": Case(
        mask=("png", frames(M, 1 - M)), error=r"this mask has 2 frames or pages \(PNG\)"
    ),
    "CMYK": Case(mask=("tif", saved(M, "CMYK")), error="the mask has mode CMYK, expected colours"),
    "colours of 16 bits": Case(mask=("png", rgb16), error="colours of 16 bits a channel"),
    "a mask with an orientation of its own": Case(
        mask=("png", saved(M, exif=exif(6))), error=r"has an EXIF orientation of its own \(6\)"
    ),
    "a broken link to a mask": Case(
        mask=("png", broken_link), error=r"this mask is a broken symbolic link to nowhere\.png"
    ),
    "no mask": Case(mask=("png", nothing), error="this mask is missing; add it"),
    "an empty mask": Case(mask=("png", bytes_of(b"")), error="not a readable mask: its first"),
    "0 and 255": Case(
        mask=("png", saved(M * 255)),
        right=VOIDED,
        finding="masks that hold only the first class and void: 1, .* set prepare.binary to true",
    ),
    "0 and 255 in a binary data set": Case(
        mask=("png", saved(M * 255)), right=M, settings={"binary": True}
    ),
    "0 and 1 in a binary data set": Case(right=M, settings={"binary": True}),
    "RGB of 0 and 255 in a binary data set": Case(
        mask=("png", saved(M * 255, "RGB")), right=M, settings={"binary": True}
    ),
    "grey edges in a binary data set": Case(
        mask=("png", saved(M * 254)), error="mask value 254 in row 3", settings={"binary": True}
    ),
    "void of its own in a binary data set": Case(
        mask=("png", saved(np.where(M == 1, 7, 255).astype(np.uint8))),
        right=np.where(M == 1, 255, 1),
        settings={"binary": True, "void_index": 7},
    ),
    "a bilinear resize of three classes": Case(
        mask=("png", saved(smoothed(M * 2))),
        right=smoothed(M * 2),
        finding="classes that occur only as thin borders: 1, .* pixels of middle are thin",
        classes="name\nbackground\nmiddle\nobject\n",
    ),
}
PALETTED = Image.fromarray(rgb("p")).quantize(16)
ALL_IMAGES = {
    "JPEG of a phone with a preview (MPO)": Case(
        image=("jpg", frames(rgb(1), rgb(2), mode="RGB", format="MPO")), right=M
    ),
    "CMYK JPEG": Case(image=("jpg", saved(rgb("c"), "CMYK")), right=M),
    "grey with alpha": Case(image=("png", saved(with_alpha(M, "L", 0))), right=M),
    "palette with transparency": Case(
        image=("png", saved(PALETTED, transparency=bytes(range(16)))), right=M
    ),
    "GIF": Case(image=("gif", saved(rgb("g"))), right=M),
    "WebP": Case(image=("webp", saved(rgb("w"))), right=M),
    "JFIF": Case(image=("jfif", saved(rgb("j"), format="JPEG")), right=M),
    "TIFF with overviews": Case(image=("tif", lambda path: pyramid(path, rgb("o"))), right=M),
    "moving GIF": Case(
        image=("gif", frames(rgb(1), rgb(2), mode="RGB")),
        error=r"this image has 2 frames or pages \(GIF\)",
    ),
    "TIFF of two pages": Case(
        image=("tif", frames(rgb(3), rgb(4), mode="RGB")),
        error=r"this image has 2 frames or pages \(TIFF\)",
    ),
    "grey of 16 bits": Case(
        image=("png", saved(M.astype(np.uint16) * 4000)),
        error=r"more than 8 bits a channel \(mode I;16\)",
    ),
    "colours of 16 bits": Case(
        image=("png", rgb16), error=r"more than 8 bits a channel \(mode RGB;16B\)"
    ),
    "floats": Case(
        image=("tif", saved(M.astype(np.float32))), error=r"more than 8 bits a channel \(mode F\)"
    ),
    "HEIC": Case(
        image=("heic", bytes_of(b"\0\0\0\x24ftypheic")),
        error=r"0\.jpg: this image is missing; 0\.heic is not of a format that is read",
    ),
    "HEIC named JPEG": Case(
        image=("jpg", bytes_of(b"\0\0\0\x24ftypheic")),
        error="not a readable image: its first bytes, .*ftypheic.*, are of no format",
    ),
    "a pointer of Git LFS": Case(
        image=("jpg", bytes_of(b"version https://git-lfs.github.com/spec/v1\n")),
        error="not a readable image: its first bytes, b'version https://git-lfs",
    ),
    "a broken link to an image": Case(
        image=("png", broken_link), error=r"this image is a broken symbolic link to nowhere\.png"
    ),
    "16000 x 12000": Case(
        image=("png", lambda path: Image.new("1", (16000, 12000)).save(path)),
        error=r"16000 x 12000 has 192000000 pixels, .* 178956970 .* increase prepare\.max_pixels",
    ),
    "few pixels": Case(right=M, settings={"max_pixels": M.size}),
    "too many pixels": Case(
        error=r"24 x 20 has 480 pixels, more than the limit of 479",
        settings={"max_pixels": M.size - 1},
    ),
    "orientation 3": Case(
        image=("jpg", photo(3)), right=M, finding="EXIF orientation keeps their size: 1"
    ),
    "orientation 3 and colours": Case(
        image=("jpg", photo(3)),
        mask=("png", saved(RED)),
        right=M,
        finding="EXIF orientation keeps their size: 1",
        classes=COLOURS,
    ),
    "a square with orientation 6": Case(
        image=("jpg", photo(6, (24, 24))),
        mask=("png", saved(np.pad(M, ((0, 4), (0, 0))))),
        right=np.pad(M, ((0, 4), (0, 0))),
        finding="EXIF orientation keeps their size: 1",
    ),
    "orientation 6 and a mask of the turned size": Case(image=("jpg", photo(6, (24, 20))), right=M),
    "orientation 6 and a mask of the stored size": Case(
        image=("jpg", photo(6)),
        error=r"the mask is 24 x 20 pixels, its image .* is 20 x 24; the image is turned by its "
        "EXIF orientation 6, and the mask has the size of the stored pixels: set prepare.exif to "
        "ignore",
    ),
    "a turned mask where EXIF is ignored": Case(
        image=("jpg", photo(6, (24, 20))),
        error="the mask is 24 x 20 pixels, .* is 24 x 20; .* turned pixels: set prepare.exif to "
        "apply",
        settings={"exif": "ignore"},
    ),
    **{
        f"orientation {orientation} and a mask of the stored pixels": Case(
            image=("jpg", photo(orientation)),
            right=turned(M, orientation),
            settings={"exif": "ignore"},
        )
        for orientation in UPRIGHT
    },
    "orientation 3 and colours of the stored pixels": Case(
        image=("png", saved(rgb("e"), exif=exif(3))),
        mask=("png", saved(RED)),
        right=turned(M, 3),
        settings={"exif": "ignore"},
        classes=COLOURS,
    ),
}
if features.check("avif"):
    ALL_IMAGES["AVIF"] = Case(image=("avif", saved(rgb("a"))), right=M)
CASES = {
    **{f"mask: {name}": case for name, case in ALL_MASKS.items()},
    **{f"image: {name}": case for name, case in ALL_IMAGES.items()},
}


def write(root: Path, id: str, case: Case) -> None:
    """Write the two files of a pair."""
    suffix, save = case.image or ("png", saved(rgb(id)))
    for folder, end, writer in (("images", suffix, save), ("masks", *case.mask)):
        path = root / folder / f"{id}.{end}"
        path.parent.mkdir(parents=True, exist_ok=True)
        writer(path)


def write_data(root: Path, *cases: Case) -> None:
    """Write a data set of a sound pair a split, ``train/9`` and so on, and of these cases."""
    for split in ("train", "val", "test"):
        write(root, f"{split}/9", Case(mask=("png", saved(M))))
    for number, case in enumerate(cases):
        write(root, f"train/{number if len(cases) == 1 else f'case {number}'}", case)
    (root / "classes.csv").write_text((cases or [Case()])[0].classes)


@pytest.mark.parametrize("name", CASES)
def test_an_input_is_read_right_or_refused_with_the_reason(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    write_data(tmp_path / "data", case)
    config = prepare_config(tmp_path / "data", **case.settings)
    if case.error:
        with pytest.raises(DataError, match=case.error) as caught:
            prepare(config, tmp_path)
        assert str(caught.value).startswith(str(tmp_path / "data"))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "dataset").exists()
        return
    prepare(config, tmp_path)
    printed = capsys.readouterr().out
    entries, classes = read_manifest(tmp_path / "dataset")
    image, mask = read_original(next(each for each in entries if each.id == "train/0"), classes)
    np.testing.assert_array_equal(mask, case.right)
    (path,) = (tmp_path / "data/images/train").glob("0.*")
    with Image.open(path) as file:
        expected = ImageOps.exif_transpose(file).convert("RGBA").convert("RGB")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    assert ("prepare: " in printed) == bool(case.finding)
    assert re.search(case.finding, printed)


def test_a_binary_data_set_has_two_classes(tmp_path: Path) -> None:
    write_data(tmp_path / "data", Case(classes="name\na\nb\nc\n"))
    with pytest.raises(ConfigError, match=r"prepare\.binary: needs two classes, .* has 3"):
        prepare(prepare_config(tmp_path / "data", binary=True), tmp_path)


@pytest.mark.parametrize("folder", ["data", "data/masks/train"])
def test_a_folder_that_is_a_broken_link_is_named(folder: str, tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    (tmp_path / folder).rename(tmp_path / "moved")
    (tmp_path / folder).symlink_to("elsewhere")
    with pytest.raises(DataError, match=f"{folder}: is a broken symbolic link to elsewhere"):
        prepare(prepare_config(tmp_path / "data"), tmp_path)


def test_masks_of_0_and_255_alone_name_the_setting(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    for path in (tmp_path / "data" / "masks").rglob("*.png"):
        saved(M * 255)(path)
    with pytest.raises(DataError, match="hold only one class, .* set prepare.binary to true"):
        prepare(prepare_config(tmp_path / "data"), tmp_path)
    summary = prepare(prepare_config(tmp_path / "data", binary=True), tmp_path)
    assert summary["splits"]["test"]["pixel_share"] == pytest.approx(
        {"background": 1 - M.mean(), "object": M.mean()}
    )


def test_turned_images_are_counted(tmp_path: Path) -> None:
    cases = [Case(image=("jpg", photo(6, (24, 20)))), Case(image=("jpg", photo(3)))]
    write_data(tmp_path / "data", *cases)
    assert prepare(prepare_config(tmp_path / "data"), tmp_path)["turned_images"] == 2


@pytest.mark.parametrize(("rule", "splits"), [("error", 2), ("warn", 2), ("error", 1)])
def test_copies_of_an_image(
    rule: str, splits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nine copies: of equal bytes, whatever their names and masks."""
    write_data(tmp_path / "data")
    for number in range(9):
        split = ("train", "test")[number % splits]
        copy = Case(image=("png", saved(rgb("copy"))), mask=("png", saved(M * (number % 2))))
        write(tmp_path / "data", f"{split}/copy {number}", copy)
    config = prepare_config(tmp_path / "data", copies=rule)
    if rule == "error" and splits == 2:
        with pytest.raises(
            DataError,
            match=r"same bytes as .*copy 0\.png in the split 'train'.*prepare\.copies "
            ".* 3 more problems",
        ):
            prepare(config, tmp_path)
        return
    summary = prepare(config, tmp_path)
    within = {"copies of images within a split": 8 if splits == 1 else 4}
    across = {"copies of images in two splits": 4} if splits == 2 else {}
    assert summary["findings"] == within | across
    assert (
        f"within a split: {within['copies of images within a split']}, the first is"
        in capsys.readouterr().out
    )


def test_the_limit_of_pixels_is_this_projects_only_while_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that read side by side must not restore each other's limit too early or too late."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    file = io.BytesIO()
    Image.fromarray(rgb(0)).save(file, "PNG")

    def read(number: int) -> tuple[int, int]:
        return decode_image(file.getvalue(), tmp_path / f"{number}.png").size

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(read, range(200))) == {(24, 20)}
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(DataError, match=r"has 480 pixels, more than the limit of 9"):
        decode_image(file.getvalue(), tmp_path / "a.png", max_pixels=9)
    assert Image.MAX_IMAGE_PIXELS == 100
    assert MAX_PIXELS == 2 * (1024**3 // 12)  # where Pillow refuses an image, unless told otherwise


@pytest.mark.parametrize(
    ("mask", "false"),
    [
        (smoothed(M * 2), True),
        (smoothed(np.kron(M * 5, np.ones((4, 4), np.uint8)), 4), True),
        (np.asarray(Image.fromarray(M * 2).resize((240, 200), Image.Resampling.NEAREST)), False),
        (np.kron(M * 2, np.ones((9, 9), np.uint8)), False),
        (smoothed(M), False),  # two classes: nothing is between them
        (np.where(smoothed(M * 2) == 1, 255, M * 2).astype(np.uint8), False),  # void borders
        (M, False),
        (M[:1, :1], False),
    ],
)  # fmt: skip
def test_an_interpolated_mask_is_told_from_a_real_one(mask: np.ndarray, false: bool) -> None:
    assert false_borders(mask).any() == false


def test_a_thin_pole_between_other_classes_is_no_false_border() -> None:
    street = np.zeros((60, 60), np.uint8)
    street[30:], street[:, 20], street[10:50, 40] = 4, 2, 2
    assert not false_borders(street).any()


# -- doctor ----------------------------------------------------------------------------------------


def files(root: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in root.rglob("*")}


def test_doctor_lists_every_fault_of_a_folder_and_writes_nothing(tmp_path: Path) -> None:
    three = "name\nbackground\nmiddle\nobject\n"
    faults = [
        case
        for case in CASES.values()
        if (case.error or case.finding) and not case.settings and "," not in case.classes
    ]
    data = tmp_path / "data"
    write_data(data, Case(classes=three), *faults)
    write(data, "test/copy", Case(image=("png", saved(rgb("train/9")))))
    write(data, "train/copy", Case(image=("png", saved(rgb("train/9")))))
    before = files(tmp_path)
    result = call("doctor", str(data), "--workers", "2")
    assert result.exit_code == 1
    assert files(tmp_path) == before
    errors = [case.error for case in faults if case.error]
    assert f"problems: {len(errors) + 1}, which stop prepare" in result.output
    assert "copy.png: is in the split 'test', and has the same bytes as" in result.output
    assert re.search("copies of images within a split: 1", result.output)
    for words in errors:
        assert re.search(re.sub(r"\b0\\\.", r"case \\d+\\.", words), result.output), words
    for kind in ("thin borders", "the first class and void", "EXIF orientation keeps their size"):
        assert re.search(rf"{kind}: \d+\n    \S+.*: ", result.output), kind


def test_doctor_shows_a_sound_folder_and_draws_its_most_doubtful_masks(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "overlays"
    write_data(data, Case(image=("jpg", photo(6, (24, 20)))))
    result = call("doctor", str(data), "--out", str(out), "--strict")
    assert result.exit_code == 0
    for line in (
        f"{data}: dataset folder, 4 images (train 2, val 1, test 1)",
        "sizes: 4 of 24 x 20",
        "turned by their EXIF orientation: 1 images",
        "problems: 0",
        "findings: 0",
    ):
        assert line in result.output.splitlines()
    assert re.search(rf"object +{100 * M.mean():.2f} +2 +", result.output)
    assert not out.exists()
    for number, height in enumerate((8, 4, 6, 2)):
        mask = np.zeros_like(M)
        mask[:height] = 255
        write(data, f"train/void {number}", Case(mask=("png", saved(mask))))
    for strict, code in (((), 0), (("--strict",), 1)):
        result = call("doctor", str(data), "--out", str(out), *strict)
        assert result.exit_code == code
    drawn = sorted(path.name for path in out.rglob("*.jpg"))
    assert drawn == ["void 0.jpg", "void 1.jpg", "void 2.jpg"]
    assert re.search(r"doubtful: 40\.0% of \S+/void 0\.png: \S+/void 0\.jpg", result.output)
    with Image.open(out / "train" / "void 0.jpg") as overlay:
        assert overlay.size == (24, 20)


def test_doctor_reads_the_section_prepare(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    for path in (tmp_path / "data" / "masks").rglob("*.png"):
        saved(M * 255)(path)
    assert "hold only one class" in call("doctor", str(tmp_path / "data")).output
    changes = {"prepare.binary": True, "prepare.split": "official", "prepare.root": "elsewhere"}
    params = tmp_path / "params.yaml"
    params.write_text(tiny_params(changes))
    result = call("doctor", str(tmp_path / "data"), "--params", str(params))
    assert result.exit_code == 0, result.output
    params.write_text(tiny_params({"prepare.dataset": "wastesim"}))
    refused = call("doctor", str(tmp_path / "data"), "--params", str(params))
    assert refused.exit_code == 2
    assert "wastesim is drawn by the prepare stage" in one_line(refused)
    assert call("doctor", str(tmp_path / "nowhere")).exit_code == 1
