"""Downloads from a test server are checked and whole: resumed, without ranges, or changed."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from torchvision.datasets import SBDataset
from torchvision.datasets.voc import DATASET_YEAR_DICT

from featurestore.errors import FeatureStoreError
from stages.common.errors import ConfigError, DataError
from stages.data.manifest import read_manifest
from stages.datasets import download
from stages.datasets.download import fetch
from tests.factories import make_voc, prepare
from tests.factories import prepare_config as config


class Server(ThreadingHTTPServer):
    """Serves ``files`` by path; attributes control its behaviour; ``asked`` logs the requests."""

    files: dict[str, bytes]
    ranges = True  # whether it can send a part
    stop_after: int | None = None  # bytes of the next answer's body, then the connection is cut
    status = 200
    asked: list[tuple[str, str | None]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.server.asked.append((self.path, wanted))
        content = self.server.files.get(self.path)
        if content is None or self.server.status != 200:
            self.send_error(404 if content is None else self.server.status)
            return
        start = (
            int(wanted.removeprefix("bytes=").removesuffix("-"))
            if wanted and self.server.ranges
            else 0
        )
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop, self.server.stop_after = self.server.stop_after, None
        self.wfile.write(content[start:] if stop is None else content[start : start + stop])

    def log_message(self, *arguments: object) -> None:
        """Keep quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.files, running.asked = {}, []
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_resumes(
    server: Server, tmp_path: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "BLOCK", 1000)
    server.files["/a.tar"], server.ranges, server.stop_after = CONTENT, ranges, 300_000
    file = tmp_path / "downloads" / "a.tar"
    with pytest.raises(DataError, match=r"a\.tar\.partial: .*start again to go on"):
        fetch(f"{server.url}/a.tar", MD5, file)
    assert not file.exists()
    partial = file.with_name("a.tar.partial")
    assert partial.read_bytes() == CONTENT[:300_000]
    fetch(f"{server.url}/a.tar", MD5, file)
    assert file.read_bytes() == CONTENT
    assert not partial.exists()
    assert server.asked == [("/a.tar", None), ("/a.tar", "bytes=300000-")]
    fetch(f"{server.url}/a.tar", MD5, file)  # it is there: nothing is asked
    assert len(server.asked) == 2


def test_a_whole_file_under_its_partial_name_is_not_downloaded_again(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "a.tar.partial").write_bytes(CONTENT)
    fetch(f"{server.url}/a.tar", MD5, tmp_path / "a.tar")
    assert (tmp_path / "a.tar").read_bytes() == CONTENT
    assert not server.asked


@pytest.mark.parametrize("length", [len(CONTENT), len(CONTENT) + 7])
def test_a_partial_file_that_is_too_long_is_downloaded_anew(
    server: Server, tmp_path: Path, length: int
) -> None:
    server.files["/a.tar"] = CONTENT
    (tmp_path / "a.tar.partial").write_bytes(b"x" * length)
    fetch(f"{server.url}/a.tar", MD5, tmp_path / "a.tar")
    assert (tmp_path / "a.tar").read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_the_file_removed(server: Server, tmp_path: Path) -> None:
    server.files["/a.tar"] = CONTENT
    (tmp_path / "a.tar.partial").write_bytes(b"of another file")  # continued, it can only be wrong
    with pytest.raises(DataError, match=f"has not the checksum {MD5}, and is removed; start again"):
        fetch(f"{server.url}/a.tar", MD5, tmp_path / "a.tar")
    assert not list(tmp_path.iterdir())
    fetch(f"{server.url}/a.tar", MD5, tmp_path / "a.tar")
    assert (tmp_path / "a.tar").read_bytes() == CONTENT


def test_a_server_that_cannot_serve_is_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/a\.tar answers 404 Not Found"):
        fetch(f"{server.url}/a.tar", MD5, tmp_path / "a.tar")
    server.files["/a.tar"], server.status = CONTENT, 503
    with pytest.raises(DataError, match="answers 503 Service Unavailable; try again later"):
        fetch(f"{server.url}/a.tar", MD5, tmp_path / "a.tar")
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match="gave up .*refused"):
        fetch(f"{server.url}/a.tar", MD5, tmp_path / "a.tar")


def test_a_full_disk_is_not_reported_as_a_server_error(server: Server, tmp_path: Path) -> None:
    server.files["/a.tar"] = CONTENT
    (tmp_path / "a.tar.partial").symlink_to("/dev/full")
    with pytest.raises(FeatureStoreError, match="No space left on device"):
        fetch(f"{server.url}/a.tar", MD5, tmp_path / "a.tar")


# -- Pascal VOC ------------------------------------------------------------------------------------


def pack(folder: Path, prefix: str, mode: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tar:
        tar.add(folder, prefix)
    return content.getvalue()


@pytest.fixture
def official(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Serve miniatures of both archives, and patch torchvision's addresses and checksums."""
    make_voc(tmp_path / "miniature")
    sbd = tmp_path / "sbd"
    (tmp_path / "miniature" / "benchmark_RELEASE").rename(sbd)
    server.files = {
        "/VOCtrainval_11-May-2012.tar": pack(tmp_path / "miniature", "VOCdevkit/VOC2012", "w"),
        "/benchmark.tgz": pack(sbd, "benchmark_RELEASE", "w:gz"),
    }
    voc, more = (hashlib.md5(content).hexdigest() for content in server.files.values())
    entry = {
        **DATASET_YEAR_DICT["2012"],
        "url": f"{server.url}/VOCtrainval_11-May-2012.tar",
        "md5": voc,
    }
    monkeypatch.setitem(DATASET_YEAR_DICT, "2012", entry)
    monkeypatch.setattr(SBDataset, "url", f"{server.url}/benchmark.tgz")
    monkeypatch.setattr(SBDataset, "md5", more)
    return server


def test_voc_is_downloaded_once_and_prepared(official: Server, tmp_path: Path) -> None:
    root = tmp_path / "data" / "VOC2012"
    settings = config(root, dataset="voc")
    with pytest.raises(DataError, match=r"there is no such folder.*--download"):
        prepare(settings, tmp_path)
    official.stop_after = 5000
    with pytest.raises(DataError, match="start again to go on"):
        prepare(settings, tmp_path, download=True)
    assert not root.exists()
    prepare(settings, tmp_path, download=True)
    assert sorted(path.name for path in root.iterdir()) == [
        "ImageSets",
        "JPEGImages",
        "SegmentationClass",
    ]
    assert not list(
        (tmp_path / "scratch" / "downloads").iterdir()
    )  # neither the archive nor anything unpacked stays
    assert [entry.split for entry in read_manifest(tmp_path / "dataset")[0]].count("train") == 2
    asked = len(official.asked)
    prepare(
        config(root, dataset="voc", split="random", ratios=[0.5, 0.25, 0.25]),
        tmp_path,
        download=True,
    )
    assert len(official.asked) == asked
    prepare(
        config(root, dataset="voc", split="sbd"), tmp_path, download=True
    )  # SBD alone is missing
    assert [path for path, _ in official.asked[asked:]] == ["/benchmark.tgz"]
    assert [entry.split for entry in read_manifest(tmp_path / "dataset")[0]].count("train") == 4


def test_a_root_that_holds_something_else_is_not_touched(official: Server, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    prepare(config(root, dataset="voc"), tmp_path, download=True)  # an empty folder will do
    other = tmp_path / "letters"
    other.mkdir()
    (other / "a.txt").write_text("dear")
    asked = len(official.asked)
    with pytest.raises(DataError, match="has no JPEGImages, but holds something else"):
        prepare(config(other, dataset="voc"), tmp_path, download=True)
    assert len(official.asked) == asked
    assert [path.name for path in other.iterdir()] == ["a.txt"]


def test_a_root_that_links_to_another_disk_stays_a_link(official: Server, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "data").symlink_to("large")
    prepare(config(tmp_path / "data", dataset="voc"), tmp_path, download=True)
    assert (tmp_path / "data").is_symlink()
    assert (tmp_path / "large" / "JPEGImages" / "a.jpg").is_file()


def test_an_archive_of_something_else_is_refused(
    official: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASET_YEAR_DICT["2012"], "base_dir", "VOCdevkit/VOC2011")
    with pytest.raises(DataError, match="holds no VOCdevkit/VOC2011/JPEGImages"):
        prepare(config(tmp_path / "data", dataset="voc"), tmp_path, download=True)
    assert not (tmp_path / "data").exists()


def test_torchvision_still_has_what_is_downloaded() -> None:
    from stages.datasets import voc

    archives = voc.archives(Path("data"), config(Path("data"), dataset="voc", split="sbd"))
    assert [archive.url.rsplit("/", 1)[1] for archive in archives] == [
        "VOCtrainval_11-May-2012.tar",
        "benchmark.tgz",
    ]
    assert [archive.inside for archive in archives] == ["VOCdevkit/VOC2012", "benchmark_RELEASE"]
    assert [len(archive.md5) for archive in archives] == [32, 32]


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("cityscapes", "cityscapes-dataset.com, after registering there"),
        ("ade20k", "ADEChallengeData2016.zip"),
        ("coco-panoptic", "panoptic_annotations_trainval2017.zip of cocodataset.org"),
        ("coco-stuff", "stuffthingmaps_trainval2017.zip"),
        ("coco-instances", "annotations_trainval2017.zip"),
        ("camvid", "LabeledApproved_full.zip"),
        ("wastesim", "it is drawn"),
    ],
)
def test_other_data_sets_say_where_to_get_them(tmp_path: Path, dataset: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        prepare(config(tmp_path / "nowhere", dataset=dataset), tmp_path, download=True)
    assert str(caught.value).startswith(f"prepare.dataset: {dataset} cannot be downloaded: ")
    assert "\n" not in str(caught.value)
