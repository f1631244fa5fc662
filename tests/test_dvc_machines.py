"""DVC on other people's machines: links, other disks, read-only files. Nothing reruns or breaks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dvc.exceptions import CheckoutError
from dvc.repo import Repo

from tests.factories import call, files
from tests.test_dvc import names, reruns

pytestmark = pytest.mark.slow


@pytest.fixture
def mine(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the project that DVC has run to a path with spaces, with new times of change."""
    folder = tmp_path / "my own folder" / "the project"
    shutil.copytree(project, folder, symlinks=True, copy_function=shutil.copyfile)
    monkeypatch.chdir(folder)
    return folder


def link_to(path: Path, target: Path) -> None:
    """Move a file or folder elsewhere, and leave a symbolic link."""
    target.parent.mkdir(exist_ok=True)
    shutil.move(path, target)
    path.symlink_to(target)


def link_the_project(mine: Path, elsewhere: Path) -> Path:
    (elsewhere.parent / "link").symlink_to(mine)
    return elsewhere.parent / "link"


def link_the_images(mine: Path, elsewhere: Path) -> Path:
    link_to(mine / "photos", elsewhere / "photos")
    return mine


def link_an_image(mine: Path, elsewhere: Path) -> Path:
    link_to(mine / "photos" / "images" / "train" / "0.jpg", elsewhere / "first.jpg")
    return mine


def link_the_features(mine: Path, elsewhere: Path) -> Path:
    link_to(mine / "features", elsewhere / "features")
    return mine


@pytest.mark.parametrize(
    "change", [link_the_project, link_the_images, link_an_image, link_the_features]
)
def test_links_spaces_and_new_times_rerun_nothing(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Path]
) -> None:
    folder = change(mine, tmp_path / "elsewhere")
    monkeypatch.chdir(folder)
    assert reruns(folder) == set()
    before = files(folder / "dataset")
    result = call("prepare")
    assert result.exit_code == 0, result.output
    assert files(folder / "dataset") == before
    assert call("verify", "features/train").exit_code == 0


def test_dvc_does_not_look_into_a_linked_folder_of_images(mine: Path, tmp_path: Path) -> None:
    """docs/dvc.md says so; ``extract`` finds the change that DVC does not."""
    link_to(mine / "photos" / "images", tmp_path / "elsewhere" / "images")
    assert "prepare" in reruns(mine)  # its dependency lacks the images now
    with Repo(str(mine)) as repo:
        repo.commit("prepare", force=True)
    assert reruns(mine) == set()
    first = mine / "photos" / "images" / "train" / "0.jpg"
    first.write_bytes((first.parent / "1.jpg").read_bytes())
    assert reruns(mine) == set()
    shutil.rmtree(mine / "features")
    result = call("extract", "--device", "cpu")
    assert result.exit_code != 0
    assert "this file changed since the prepare stage" in result.stderr


@pytest.fixture
def other_disk() -> Iterator[Path]:
    """Return a folder on another file system than the project's."""
    folder = Path("/dev/shm") / f"featuregan-test-{os.getpid()}"
    if not folder.parent.is_dir():
        pytest.skip("there is no /dev/shm")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def relink(mine: Path, cache: Path, kind: str | None = None) -> None:
    """Move DVC's cache, and replace the files of the working copy by links into it."""
    if cache != mine / ".dvc" / "cache":
        shutil.move(mine / ".dvc" / "cache", cache)
    config = f"[cache]\n    dir = {cache}\n" + (f"    type = {kind}\n" if kind else "")
    (mine / ".dvc" / "config.local").write_text(config)
    with Repo(str(mine)) as repo:
        repo.checkout(relink=True, force=True)


STAGES = (
    "prepare",
    "extract --device cpu",
    "train-gan --device cpu",
    "train-decoder --variant baseline --device cpu",
    "report --device cpu",
)


@pytest.mark.parametrize("disk", ["same", "other"])
def test_stages_read_files_that_are_linked_to_the_cache_and_never_write_into_them(
    mine: Path, request: pytest.FixtureRequest, disk: str
) -> None:
    """On one disk DVC makes read-only hard links of shards and weights, to another symbolic ones.

    The list of kinds is that of .dvc/config; reflinks are not everywhere.
    """
    cache = mine / ".dvc" / "cache"
    if disk == "other":
        cache = request.getfixturevalue("other_disk") / "cache"
    relink(mine, cache, kind=None if disk == "other" else "hardlink,symlink,copy")
    for file in (path for path in cache.rglob("*") if path.is_file()):
        file.chmod(0o444)
    shard = mine / "features" / "train" / "shard-00000.h5"
    assert shard.is_symlink() == (disk == "other")
    assert shard.stat().st_nlink == (1 if disk == "other" else 2)
    assert reruns(mine) == set()

    before = files(cache)
    params = mine / "params.yaml"
    params.write_text(params.read_text().replace("input_size: 64 ", "input_size: 96 "))
    for stage in STAGES if disk == "same" else STAGES[:2]:
        result = call(*stage.split())
        assert result.exit_code == 0, (stage, result.output)
        assert files(cache) == before, stage
    assert not any(path.is_symlink() for path in (mine / "features").rglob("*"))
    assert names(reruns(mine)) >= {"extract", "train-gan"}


def test_hard_links_to_another_disk_fail_and_lose_nothing(mine: Path, other_disk: Path) -> None:
    """docs/dvc.md: a list of kinds works, ``hardlink`` by itself does not."""
    with pytest.raises(CheckoutError):
        relink(mine, other_disk / "cache", kind="hardlink")
    config = mine / ".dvc" / "config.local"
    config.write_text(config.read_text().replace("type = hardlink", "type = hardlink,symlink"))
    with Repo(str(mine)) as repo:
        repo.checkout(force=True)
    assert reruns(mine) == set()
