"""Stores from anywhere: what a file says is checked before it is believed.

``FEATUREGAN_FAULTS=50 python -m pytest tests/featurestore/test_untrusted.py`` multiplies the number
of random cases.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import featurestore
from featurestore import FeatureStoreError, ShardCorruptError, StoreSpec
from featurestore.layouts import LAYOUTS
from tests.factories import SPEC, sample, write

TIMES = int(os.environ.get("FEATUREGAN_FAULTS", "1"))
LAYERED = dataclasses.replace(
    SPEC,
    feature_shape=(8, 4, 5),
    layer_names=("a", "b"),
    layer_shapes=((6, 4, 5), (2, 2, 3)),
)
SHARD = "shard-00000.h5"


def spec_of(compression: str) -> StoreSpec:
    return dataclasses.replace(SPEC, compression=compression)


def write_layered(folder: Path, count: int = 3) -> None:
    rng = np.random.default_rng(1)
    with featurestore.create(folder, LAYERED) as writer:
        for number in range(count):
            layers = {
                layer.name: rng.random(layer.shape, np.float32).astype(np.float16)
                for layer in LAYERED.layers
            }
            writer.append(**{**sample(number, SPEC), "features": layers})


# -- crafted shards --------------------------------------------------------------------------------


def replace(name: str, **options: Any) -> Callable[[h5py.File], None]:
    """Return an edit that creates a dataset again, with other options of h5py."""

    def edit(file: h5py.File) -> None:
        old = file[name]
        settings = {"shape": old.shape, "dtype": old.dtype, **options}
        del file[name]
        file.create_dataset(name, **settings)

    return edit


def put(name: str, made: Callable[[h5py.File], Any]) -> Callable[[h5py.File], None]:
    """Return an edit that puts another object under a name."""

    def edit(file: h5py.File) -> None:
        new = made(file)
        del file[name]
        file[name] = new

    return edit


def attribute(name: str, value: object) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        file.attrs[name] = value

    return edit


def virtual(file: h5py.File) -> None:
    shape, dtype = file["masks"].shape, file["masks"].dtype
    layout = h5py.VirtualLayout(shape, dtype)
    layout[:] = h5py.VirtualSource("elsewhere.h5", "masks", shape, dtype)
    del file["masks"]
    file.create_virtual_dataset("masks", layout)


def compact(file: h5py.File) -> None:
    del file["ids"]
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_layout(h5py.h5d.COMPACT)
    kind, space = h5py.h5t.py_create(np.dtype("S4")), h5py.h5s.create_simple((3,))
    h5py.h5d.create(file.id, b"ids", kind, space, options)


OUTSIDE = "/dev/zero"
EDITS: list[tuple[str, StoreSpec, Callable[[h5py.File], None], str]] = [
    ("external link", SPEC, put("masks", lambda _: h5py.ExternalLink("x.h5", "masks")),
     "'masks' is a ExternalLink, which is refused"),
    ("soft link", SPEC, put("masks", lambda _: h5py.SoftLink("/images")),
     "'masks' is a SoftLink, which is refused"),
    ("external link of a group", LAYERED, put("layers/b", lambda _: h5py.ExternalLink("x.h5", "/")),
     "'layers/b/features' is a ExternalLink"),
    ("external storage", SPEC, replace("masks", external=[(OUTSIDE, 0, 1 << 20)]),
     "'masks' has its values in another file, which is refused"),
    ("virtual", SPEC, virtual, "'masks' is stored as virtual, not contiguous"),
    ("chunked", SPEC, replace("masks", chunks=True), "'masks' is stored as chunked"),
    ("compressed", SPEC, replace("masks", compression="gzip"), "'masks' is stored as chunked"),
    ("compact", SPEC, compact, "'ids' is stored as compact"),
    ("missing", SPEC, lambda file: file.pop("masks"), "'masks' is missing"),
    ("group", SPEC, put("masks", lambda file: file.create_group("x")), "'masks' is no dataset"),
    ("type", SPEC, put("masks", lambda _: np.dtype("u1")), "'masks' is no dataset"),
    ("no group", LAYERED, put("layers", lambda file: file["masks"]), "'/layers' is no group"),
    ("references", SPEC, replace("masks", dtype=h5py.ref_dtype), "dataset 'masks' is object"),
    ("lists", SPEC, replace("masks", dtype=h5py.vlen_dtype("u1")), "dataset 'masks' is object"),
    ("ids are lists", SPEC, replace("ids", dtype=h5py.string_dtype()), "'/ids' has no values"),
    ("ids are numbers", SPEC, replace("ids", data=[1, 2, 3], dtype="i8"), "'ids' is int64 (3,)"),
    ("ids are a table", SPEC, replace("ids", shape=(1, 3), data=[[b"a", b"b", b"c"]]), "'ids' is"),
    ("ids are not UTF-8", SPEC, replace("ids", data=[b"\xff"] * 3), "codec can't decode"),
    ("ids without values", SPEC, replace("ids", shape=(1 << 40,)), "'/ids' has no values"),
    ("no dataspace", SPEC, put("ids", lambda file: file.create_dataset("x", data=h5py.Empty("S4"))),
     "'/ids' has no values"),
    ("masks without values", SPEC, replace("masks"), "'/masks' has no values"),
    ("a large sample", SPEC, attribute("mask_shape", [1 << 40, 1 << 20]), "bytes cannot hold 3"),
    ("a small map", SPEC, attribute("feature_shape", [6, 4, 4]), "dataset 'features' is"),
    ("shape of floats", SPEC, attribute("feature_shape", [6.0, 4.0, 5.0]), "feature_shape is"),
    ("shape is text", SPEC, attribute("feature_shape", "6, 4, 5"), "feature_shape is '6, 4, 5'"),
    ("shape is negative", SPEC, attribute("feature_shape", [6, -4, 5]), "three positive numbers"),
    ("names are numbers", SPEC, attribute("class_names", [1, 2, 3]), "class_names is (1, 2, 3)"),
    ("stride 0", SPEC, attribute("output_stride", 0), "output_stride must be a positive number"),
    ("a colour", SPEC, attribute("palette", np.full((3, 3), 256)), "a colour of the palette"),
    ("two layers of one name", LAYERED, attribute("layer_names", np.array(["a", "a"], "S")),
     "a name and a shape"),
    ("a layer too many", LAYERED, attribute("layer_names", np.array(["a", "b", "c"], "S")),
     "a name and a shape"),
    ("no layer", LAYERED, attribute("layer_shapes", np.empty((0, 3), int)), "a name and a shape"),
    ("a layer of size 0", LAYERED, attribute("layer_shapes", [[6, 0, 5], [2, 2, 3]]), "layer"),
    ("unknown layout", SPEC, attribute("compression", "rar"), "compression must be one of"),
    ("zeros of a link", spec_of("zeros"), put("feature_starts", lambda _: h5py.SoftLink("/ids")),
     "'feature_starts' is a SoftLink"),
    ("zeros without starts", spec_of("zeros"), replace("feature_starts", data=np.zeros(0, int),
     shape=None), "out of bounds"),
    ("starts that decrease", spec_of("zeros"), replace("feature_starts", data=[9, -5, 3, 1]),
     "dataset 'feature_values' is"),
    ("lz4 in one piece", spec_of("lz4"), replace("masks"), "'masks' is stored as contiguous"),
    ("lz4 by gzip", spec_of("lz4"), replace("masks", chunks=(1, 32, 40), compression="gzip"),
     "has the filters [1], not those of lz4"),
    ("lz4 by zstd", spec_of("lz4"), replace("masks", chunks=(1, 32, 40), fletcher32=True,
     compression=hdf5plugin.Bitshuffle(cname="zstd")), "'/masks' is packed with the options"),
    ("lz4 of half samples", spec_of("lz4"), replace("masks", chunks=(1, 16, 40), fletcher32=True,
     compression=hdf5plugin.Bitshuffle()), "has chunks of (1, 16, 40), not of one sample"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "edit", "problem"),
    [pytest.param(*case, id=name) for name, *case in EDITS],
)
def test_a_crafted_shard_is_refused_with_one_line(
    tmp_path: Path, spec: StoreSpec, edit: Callable[[h5py.File], None], problem: str
) -> None:
    if spec is LAYERED:
        write_layered(tmp_path / "store")
    else:
        write(tmp_path / "store", 3, spec=spec)
    shard = tmp_path / "store" / SHARD
    with h5py.File(shard, "r+") as file:
        edit(file)
    seal(tmp_path / "store")
    for path in (shard, tmp_path / "store"):
        with pytest.raises(FeatureStoreError) as caught:
            featurestore.open(path)[0]
        text = str(caught.value)
        assert problem in text, text
        assert text.startswith(f"{shard}: "), text
        assert "\n" not in text, text


def chunk_edit(file: h5py.File, edit: Callable[[bytearray], None]) -> None:
    """Change the packed bytes of the first mask; their checksum is made anew."""
    chunk = bytearray(file["masks"].id.read_direct_chunk((0, 0, 0))[1][:-4])
    edit(chunk)
    scratch = file.create_dataset(
        "x", data=np.frombuffer(chunk, np.uint8), chunks=(len(chunk),), fletcher32=True
    )
    file.flush()
    file["masks"].id.write_direct_chunk((0, 0, 0), scratch.id.read_direct_chunk((0,))[1])
    del file["x"]


def set_bytes(layout: str, place: int, value: int) -> Callable[[bytearray], None]:
    return lambda chunk: struct.pack_into(layout, chunk, place, value)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (set_bytes(">Q", 0, 1 << 50), "a wrong header"),
        (set_bytes(">Q", 0, 8), "a wrong header"),
        (set_bytes(">I", 8, 64), "a wrong header"),
        (set_bytes(">I", 12, 1 << 31), "blocks do not fill it"),
        (set_bytes(">I", 12, 1), "blocks do not fill it"),
        (lambda chunk: chunk.clear() or chunk.extend(b"short"), "a wrong header"),
        (lambda chunk: chunk.extend(b"more"), "blocks do not fill it"),
    ],
    ids=["large", "small", "block", "long", "short", "empty", "more"],
)
def test_a_chunk_whose_sizes_are_wrong_is_refused_before_it_is_unpacked(
    tmp_path: Path, codec: str, edit: Callable[[bytearray], None], problem: str
) -> None:
    """The filter crashes on each of them, or reads what is not its own."""
    write(tmp_path / "store", 3, spec=spec_of(codec))
    with h5py.File(tmp_path / "store" / SHARD, "r+") as file:
        chunk_edit(file, edit)
    store = featurestore.open(tmp_path / "store" / SHARD)
    with pytest.raises(ShardCorruptError, match=f"row 0 of 'masks' cannot be decoded .*{problem}"):
        store.mask(0)
    np.testing.assert_array_equal(store.mask(1), sample(1)["mask"])


def test_a_chunk_that_skips_a_filter_or_is_missing_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "store", 3, spec=spec_of("lz4"))
    with h5py.File(tmp_path / "store" / SHARD, "r+") as file:
        masks = file["masks"].id
        unsummed = masks.read_direct_chunk((0, 0, 0))[1][:-4]
        masks.write_direct_chunk((0, 0, 0), unsummed, filter_mask=2)
        replace("images", chunks=(1, 32, 40, 3), fletcher32=True,
                compression=hdf5plugin.Bitshuffle())(file)  # fmt: skip
    store = featurestore.open(tmp_path / "store" / SHARD)
    for read in (store.mask, store.image):
        with pytest.raises(ShardCorruptError, match="missing or skips a filter"):
            read(0)


# -- crafted indexes -------------------------------------------------------------------------------


def seal(
    folder: Path, edit: Callable[[dict[str, Any]], None] = lambda body: None, *, hashed: bool = True
) -> None:
    """Edit an index and make its digest anew; ``hashed``: also sizes and hashes of the shards."""
    path = folder / "index.json"
    body = json.loads(path.read_text())
    for record in body["shards"] if hashed else ():
        content = (folder / record["file"]).read_bytes()
        record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(body)
    body.pop("digest", None)
    body["digest"] = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    path.write_text(json.dumps(body, indent=1) + "\n")


def set_key(keys: list[str | int], value: object, body: Any) -> None:
    *parents, last = keys
    for key in parents:
        body = body[key]
    body[last] = value


@pytest.mark.parametrize(
    ("keys", "value", "problem"),
    [
        (["shards"], [], "statistics of 0 samples are damaged"),
        (["shards", 0, "file"], "../shard-00000.h5", "the shards are not"),
        (["shards", 1, "file"], "shard-00000.h5", "the shards are not"),
        (["shards", 0, "samples"], 3.0, "no number of samples"),
        (["shards", 0, "samples"], True, "no number of samples"),
        (["shards", 0, "samples"], 0, "no number of samples"),
        (["shards", 0, "bytes"], 10, "10 bytes cannot hold 3 samples"),
        (["samples"], 8, "changed after it was written"),
        (["fingerprint"], 5, "changed after it was written"),
        (["more"], 5, "changed after it was written"),
        (["spec", "feature_shape"], [6.0, 4, 5], "feature_shape is"),
        (["spec", "feature_shape"], [1 << 62, 1 << 62, 5], "bytes cannot hold 3 samples"),
        (["spec", "class_names"], ["belt", 2, "x"], "class_names is"),
        (["spec", "class_names"], "abc", "class_names is"),
        (["spec", "layer_names"], ["a"], "a name and a shape"),
        (["spec", "nonnegative"], 1, "nonnegative is"),
        (["spec", "more"], 1, "more"),
        (["statistics", "mean"], [0.5], "statistics of 7 samples are damaged"),
        (["statistics", "mean"], [float("nan")] * 6, "statistics of 7 samples are damaged"),
        (["statistics", "count"], 6, "statistics of 7 samples are damaged"),
        (["statistics", "variance"], [-1.0] * 6, "a negative variance"),
        (["statistics", "class_pixels"], [1 << 80] * 3, "OverflowError"),
        (["statistics", "class_pixels"], [1.5] * 3, "changed after it was written"),
    ],
)
def test_a_crafted_index_is_refused_with_one_line(
    tmp_path: Path, keys: list[str | int], value: object, problem: str
) -> None:
    write(tmp_path / "store")
    seal(tmp_path / "store", partial(set_key, keys, value))
    with pytest.raises(FeatureStoreError) as caught:
        featurestore.open(tmp_path / "store")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


# -- locks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["none", "lz4"])
def test_a_read_only_store_whose_files_another_process_has_locked_can_be_read(
    tmp_path: Path, compression: str
) -> None:
    write(tmp_path / "store", 3, spec=spec_of(compression))
    for file in (tmp_path / "store").iterdir():
        file.chmod(0o444)
    (tmp_path / "store").chmod(0o555)
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'rb'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "store" / SHARD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    try:
        store = featurestore.open(tmp_path / "store")
        store.verify()
        np.testing.assert_array_equal(store.mask(2), sample(2)["mask"])
    finally:
        process.communicate("\n")
        (tmp_path / "store").chmod(0o755)


# -- random damage ---------------------------------------------------------------------------------


READ = ("features", "masks", "images")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=6,
)
ATTRIBUTES = st.sampled_from(sorted(SPEC.to_attributes()))
NUMBERS = st.sampled_from(["u1", "i1", "f2", "f4", "f8", "i8", ">f2", "S3"])
PLACE = st.floats(0, 1)
CHANGES = st.one_of(
    # of bytes: HDF5's own structures are in the first pages and at the end
    st.tuples(
        st.just("bytes"),
        st.lists(
            st.tuples(st.sampled_from(["first", "any", "last"]), PLACE, st.binary(max_size=4)),
            min_size=1,
            max_size=8,
        ),
    ),
    st.tuples(st.just("length"), PLACE),
    # of HDF5's structures, whose checksums then fit
    st.tuples(st.just("attribute"), ATTRIBUTES, st.integers(-2, 300) | st.floats() | st.text()
              | st.lists(st.integers(-2, 300), max_size=4)),
    st.tuples(st.just("dataset"), st.integers(0, 9), NUMBERS,
              st.lists(st.integers(0, 40), max_size=4), st.booleans()),
    st.tuples(st.just("chunk"),
              st.lists(st.tuples(PLACE, st.integers(0, 255)), min_size=1, max_size=4)),
)  # fmt: skip
INDEX_CHANGES = st.one_of(
    st.tuples(st.just("bytes"), PLACE, st.binary(max_size=4)),
    st.tuples(st.just("json"), st.lists(st.integers(0, 30), min_size=1, max_size=4), JSON),
)


def change_shard(shard: Path, kind: str, *how: Any) -> None:
    content = bytearray(shard.read_bytes())
    shard.unlink()  # not written into: the file may still be mapped
    if kind == "length":
        del content[int(how[0] * len(content)) :]
    for where, fraction, new in how[0] if kind == "bytes" else ():
        size = len(content) if where == "any" else 4096
        place = int(fraction * size) + (len(content) - size if where == "last" else 0)
        content[place : place + len(new)] = new
    shard.write_bytes(content)
    if kind in ("bytes", "length"):
        return
    with h5py.File(shard, "r+") as file:
        if kind == "attribute":
            file.attrs[how[0]] = how[1]
            return
        if kind == "dataset":
            number, dtype, shape, packed = how
            name = sorted(file)[number % len(file)]
            options = (
                {"chunks": True, "compression": "gzip"} if packed and min(shape, default=0) else {}
            )
            replace(name, shape=shape, dtype=dtype, **options)(file)
        elif file["masks"].chunks:

            def edit(chunk: bytearray) -> None:
                for fraction, value in how[0]:
                    chunk[int(fraction * (len(chunk) - 1))] = value

            chunk_edit(file, edit)


def change_index(index: Path, kind: str, *how: Any) -> None:
    if kind == "bytes":
        content = bytearray(index.read_bytes())
        place = int(how[0] * len(content))
        content[place : place + len(how[1])] = how[1]
        index.write_bytes(content)
        return
    steps, value = how

    def edit(body: Any) -> None:
        for step in steps:
            keys = sorted(body) if isinstance(body, dict) else range(len(body))
            parent, key = body, keys[step % len(keys)]
            body = body[key]
            if not isinstance(body, (dict, list)) or not body:
                break
        parent[key] = value

    seal(index.parent, edit, hashed=False)


def read_all(path: Path) -> list[list[bytes]] | None:
    """Read all arrays of a store in each way; None where one line of error says why it cannot be.

    Any other exception is a fault of the reader.
    """
    try:
        store = featurestore.open(path)
        store.verify() if path.is_dir() else None
        rows = [
            [array.tobytes() for array in store.gather(name, range(len(store)))] for name in READ
        ]
        samples = [(each.features, each.mask, each.image) for each in store]
        store.stats, store.to_frame(), repr(store)
    except FeatureStoreError as error:
        return None if len(str(error).splitlines()) == 1 else pytest.fail(str(error))
    assert [list(row) for row in zip(*rows, strict=True)] == [
        [np.asarray(array).tobytes() for array in each] for each in samples
    ]
    return rows


@pytest.fixture(scope="module", params=LAYOUTS)
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store of two shards in one layout."""
    folder = tmp_path_factory.mktemp(request.param) / "store"
    write(folder, 4, spec=spec_of(request.param))
    return folder


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN and infinity in damaged numbers
@settings(
    max_examples=100 * TIMES,
    deadline=20_000,  # ms; a hang is a fault, too
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(of_shard=st.none() | CHANGES, of_index=st.none() | INDEX_CHANGES, sealed=st.booleans())
def test_a_damaged_store_is_read_right_or_refused(
    good: Path, tmp_path: Path, of_shard: tuple | None, of_index: tuple | None, sealed: bool
) -> None:
    """Hashes that were made anew hide a change of values, but nothing makes the reader fail."""
    shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
    folder = shutil.copytree(good, tmp_path / "damaged")
    if of_shard is not None:
        change_shard(folder / SHARD, *of_shard)
    if sealed:
        seal(folder)
    if of_index is not None:
        change_index(folder / "index.json", *of_index)
    actual = read_all(folder)
    read_all(folder / SHARD)  # which has no hash
    if not sealed and actual is not None:
        assert actual == read_all(good)
