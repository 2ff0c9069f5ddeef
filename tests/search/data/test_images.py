from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from search.data.augment import Epoch
from search.data.decode import ImageSpec
from search.data.images import Images, open_images
from search.data.shards import find_shards
from tests.images import png, random_pixels, write_images
from tests.processes import clean_forks

SPEC = ImageSpec(size=(24, 16), channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
PIXELS = random_pixels(50, 24, 16)
LABELS = [(i * 7) % 5 for i in range(50)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_images(tmp_path / "a.parquet", [png(p) for p in PIXELS], LABELS, group=12)


def opened(source: Path | str, tmp_path: Path, **more) -> Images:
    return open_images(str(source), SPEC, cache_dir=str(tmp_path / "cache"), **more)


def gather(images: Images, batch_size: int = 16, **more) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(images.batches(batch_size, **{"seed": None, "augment": False, **more}))
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def normalised(pixels: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(v, dtype=torch.double).view(3, 1, 1) for v in (SPEC.mean, SPEC.std))
    return ((x - mean) / std).float()


@pytest.mark.parametrize("cache_gb", [8.0, 0.0])
def test_images_and_labels_come_back_in_order(
    cache_gb: float, source: Path, tmp_path: Path
) -> None:
    images = opened(source, tmp_path, cache_gb=cache_gb)
    x, y = gather(images)
    assert len(images) == 50
    assert y.tolist() == LABELS
    torch.testing.assert_close(x, normalised(PIXELS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache_gb", [8.0, 0.0])
def test_a_seed_decides_a_shuffled_epoch(cache_gb: float, source: Path, tmp_path: Path) -> None:
    images = opened(source, tmp_path, cache_gb=cache_gb)
    first, again, other = (gather(images, 10, seed=s) for s in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert sorted(first[1].tolist()) == sorted(LABELS)
    key = normalised(PIXELS).sum(dim=(1, 2, 3)).sort().values
    torch.testing.assert_close(first[0].sum(dim=(1, 2, 3)).sort().values, key)
    assert first[1].tolist() != LABELS


def test_a_shuffled_epoch_leaves_the_last_smaller_batch_out(source: Path, tmp_path: Path) -> None:
    images = opened(source, tmp_path)
    assert [len(y) for _, y in images.batches(16, seed=1, augment=False)] == [16, 16, 16]
    assert [len(y) for _, y in images.batches(16, seed=None, augment=False)] == [16, 16, 16, 2]
    assert [len(y) for _, y in images.batches(64, seed=1, augment=False)] == [50]


@pytest.mark.parametrize("cache_gb", [8.0, 0.0])
def test_shares_of_a_batch_are_its_images_each_once(
    cache_gb: float, source: Path, tmp_path: Path
) -> None:
    images, stream = opened(source, tmp_path, cache_gb=cache_gb), Epoch(3, 1)
    whole = list(images.numbered(10, order=stream, views=stream))
    shares = [
        list(images.numbered(10, order=stream, views=stream, share=(rank, 3))) for rank in range(3)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [len(part[1]) for part in parts] == [4, 3, 3]
        for rank, part in enumerate(parts):
            assert torch.equal(part[0], batch[0][rank::3])
            assert torch.equal(part[1], batch[1][rank::3])
            assert part[2].tolist() == batch[2][rank::3].tolist()
    (none,) = images.numbered(100, order=stream, views=stream, share=(50, 51))
    assert (none[0].shape, len(none[1]), len(none[2])) == ((0, 3, 24, 16), 0, 0)


def test_decoded_once_and_mapped_afterwards(source: Path, tmp_path: Path) -> None:
    opened(source, tmp_path)
    (arrow,) = (tmp_path / "cache").glob("*.arrow")
    before = arrow.stat().st_mtime_ns
    again = opened(source, tmp_path)
    assert arrow.stat().st_mtime_ns == before
    allocated = pa.total_allocated_bytes()
    assert again.table is not None
    assert again.table.nbytes >= 50 * 24 * 16 * 3
    assert pa.total_allocated_bytes() == allocated  # mapped, not read


@pytest.mark.parametrize("damage", ["truncate", "swap", "no note"])
def test_a_torn_cache_is_made_again(damage: str, source: Path, tmp_path: Path) -> None:
    expected = gather(opened(source, tmp_path))[0]
    (arrow,) = (tmp_path / "cache").glob("*.arrow")
    note = arrow.with_suffix(".json")
    if damage == "truncate":
        arrow.write_bytes(arrow.read_bytes()[:1000])
    elif damage == "swap":
        note.write_text(note.read_text().replace("50", "49"))
    else:
        note.unlink()
    assert torch.equal(gather(opened(source, tmp_path))[0], expected)


def test_another_source_or_preparation_is_another_cache(source: Path, tmp_path: Path) -> None:
    digests = {opened(source, tmp_path).digest}
    small = ImageSpec(size=(12, 8), channels=3, mean=SPEC.mean, std=SPEC.std)
    digests.add(open_images(str(source), small, cache_dir=str(tmp_path / "cache")).digest)
    changed = PIXELS.copy()
    changed[17, 3, 3, 0] ^= 1
    write_images(source, [png(p) for p in changed], LABELS, group=12)
    images = opened(source, tmp_path)
    digests.add(images.digest)
    assert len(digests) == 3
    assert not torch.equal(gather(images)[0], normalised(PIXELS))


def _open_in_a_process(arguments: tuple[str, str]) -> tuple[int, float]:
    source, cache = arguments
    images = open_images(source, SPEC, cache_dir=cache)
    (arrow,) = Path(cache).glob("*.arrow")
    return len(images), arrow.stat().st_mtime_ns


def test_processes_that_arrive_together_decode_once(source: Path, tmp_path: Path) -> None:
    with clean_forks().Pool(2) as pool:
        found = pool.map(
            _open_in_a_process, [(str(source), str(tmp_path / "cache"))] * 4, chunksize=1
        )
    assert len(set(found)) == 1
    assert found[0][0] == 50
    assert not [name for name in os.listdir(tmp_path / "cache") if name.startswith(".")]


@pytest.mark.parametrize("cache_gb", [8.0, 0.0])
def test_corrupt_images_are_skipped_up_to_the_limit(cache_gb: float, tmp_path: Path) -> None:
    files: list[bytes | None] = [png(p) for p in PIXELS]
    files[3], files[20] = b"broken", None
    source = write_images(tmp_path / "b.parquet", files, LABELS, group=12)
    images = opened(source, tmp_path, cache_gb=cache_gb, max_corrupt=2)
    x, y = gather(images)
    assert len(x) == len(y) == 48
    assert images.corrupt.names == ["b/3.png", "b/20.png"]
    with pytest.raises(ValueError, match=r"max_corrupt = 1; the first are b/3\.png, b/20\.png"):
        gather(opened(source, tmp_path, cache_gb=cache_gb, max_corrupt=1))


@pytest.mark.parametrize("form", ["directory", "glob", "uri", "uri glob"])
def test_shards_are_found_in_order(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, part in (("2", slice(30, 50)), ("0", slice(0, 20)), ("1", slice(20, 30))):
        write_images(folder / f"{name}.parquet", [png(p) for p in PIXELS[part]], LABELS[part])
    (folder / "notes.txt").write_text("not a shard")
    source = {
        "directory": str(folder),
        "glob": f"{folder}/*.parquet",
        "uri": folder.as_uri(),
        "uri glob": f"{folder.as_uri()}/?.parquet",
    }[form]
    assert gather(opened(source, tmp_path))[1].tolist() == LABELS


def test_augmentation_changes_the_images_and_not_the_labels(source: Path, tmp_path: Path) -> None:
    images = opened(source, tmp_path)
    plain, augmented, again = (gather(images, 10, seed=4, augment=a) for a in (False, True, True))
    assert torch.equal(plain[1], augmented[1])
    assert torch.equal(augmented[0], again[0])
    different = (plain[0] != augmented[0]).flatten(1).any(1)
    assert different.float().mean() > 0.9


def test_an_epoch_decides_order_and_augmentation_with_the_seed(
    source: Path, tmp_path: Path
) -> None:
    images = opened(source, tmp_path)
    epochs = [
        gather(images, 10, seed=seed, epoch=epoch, augment=True)
        for seed, epoch in ((4, 1), (4, 2), (5, 1), (4, 1))
    ]
    assert torch.equal(epochs[0][0], epochs[3][0])
    orders = [gather(images, 10, seed=s, epoch=e)[0] for s, e in ((4, 1), (4, 2), (5, 1))]
    for first, second in itertools.combinations(range(3), 2):
        assert not torch.equal(orders[first], orders[second])
        assert not torch.equal(epochs[first][1], epochs[second][1])


def numbered(images: Images, batch_size: int, **more) -> tuple[torch.Tensor, list[int]]:
    batches = list(images.numbered(batch_size, **{"order": None, "views": None, **more}))
    return torch.cat([b[0] for b in batches]), np.concatenate([b[2] for b in batches]).tolist()


def shards_with_corrupt_images(tmp_path: Path) -> Path:
    """Fifty images in three shards of several row groups, of which 3, 20 and 21 are corrupt."""
    folder = tmp_path / "shards"
    folder.mkdir()
    files: list[bytes | None] = [png(p) for p in PIXELS]
    files[3], files[20], files[21] = b"broken", None, b""
    for name, part in (("0", slice(0, 20)), ("1", slice(20, 23)), ("2", slice(23, 50))):
        write_images(folder / f"{name}.parquet", files[part], LABELS[part], group=6)
    return folder


GOOD = [row for row in range(50) if row not in (3, 20, 21)]


@pytest.mark.parametrize("cache_gb", [8.0, 0.0])
def test_images_keep_the_numbers_of_their_rows(cache_gb: float, tmp_path: Path) -> None:
    folder = shards_with_corrupt_images(tmp_path)
    images = opened(folder, tmp_path, cache_gb=cache_gb, max_corrupt=3)
    x, numbers = numbered(images, 7)
    assert numbers == GOOD
    torch.testing.assert_close(x, normalised(PIXELS[GOOD]), rtol=0, atol=1e-5)
    shuffled, numbers = numbered(images, 1, order=Epoch(3, 1))
    assert sorted(numbers) == GOOD != numbers
    torch.testing.assert_close(shuffled, normalised(PIXELS[numbers]), rtol=0, atol=1e-5)
    labels = torch.cat([b[1] for b in images.numbered(7, order=Epoch(3, 1), views=None)])
    _, numbers = numbered(images, 7, order=Epoch(3, 1))
    assert labels.tolist() == [LABELS[n] for n in numbers]


def test_an_image_looks_the_same_in_an_epoch_whatever_else_is_asked(tmp_path: Path) -> None:
    folder = shards_with_corrupt_images(tmp_path)
    mapped, streamed = (opened(folder, tmp_path, cache_gb=gb, max_corrupt=9) for gb in (8.0, 0.0))
    expected, rows = numbered(mapped, 16, views=Epoch(4, 2))
    position = {row: i for i, row in enumerate(rows)}
    for images, batch_size, order in (
        (mapped, 16, Epoch(4, 2)),
        (mapped, 5, Epoch(9, 1)),
        (streamed, 7, None),
        (streamed, 5, Epoch(9, 1)),
    ):
        x, numbers = numbered(images, batch_size, order=order, views=Epoch(4, 2))
        assert torch.equal(x, expected[[position[n] for n in numbers]])
    x, numbers = numbered(mapped, 16, views=Epoch(4, 3))
    assert (x != expected).flatten(1).any(1).float().mean() > 0.8


def test_a_cache_without_numbers_is_made_again(source: Path, tmp_path: Path) -> None:
    expected = numbered(opened(source, tmp_path), 16)
    (arrow,) = (tmp_path / "cache").glob("*.arrow")
    table = pa.ipc.open_file(pa.memory_map(str(arrow))).read_all().drop_columns(["number"])
    arrow.unlink()
    with pa.OSFile(str(arrow), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    again = numbered(opened(source, tmp_path), 16)
    assert torch.equal(again[0], expected[0])
    assert again[1] == expected[1] == list(range(50))


@pytest.mark.parametrize("column", ["label", "number"])
def test_labels_that_were_altered_are_decoded_again(
    column: str, source: Path, tmp_path: Path
) -> None:
    opened(source, tmp_path)
    (arrow,) = (tmp_path / "cache").glob("*.arrow")
    table = pa.ipc.open_file(pa.memory_map(str(arrow))).read_all()
    values = table.column(column).to_numpy().copy()
    values[3] += 1000
    position = table.schema.get_field_index(column)
    table = table.set_column(position, table.schema.field(column), pa.array(values))
    arrow.unlink()
    with pa.OSFile(str(arrow), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    found = opened(source, tmp_path).table
    assert found is not None
    assert found.column("label").to_pylist() == LABELS
    assert found.column("number").to_pylist() == list(range(50))


def test_half_a_shard_is_named(source: Path, tmp_path: Path) -> None:
    content = source.read_bytes()
    for whole in range(0, len(content), 500):
        source.write_bytes(content[:whole])
        with pytest.raises(ValueError, match=r"a\.parquet is not a Parquet file"):
            opened(source, tmp_path)


def test_wrong_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no Parquet files; give a file, glob"):
        find_shards(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="has no Parquet files"):
        find_shards(str(tmp_path / "*.parquet"))
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"x\.parquet is not a Parquet file"):
        find_shards(str(tmp_path / "x.parquet"))
    source = str(write_images(tmp_path / "a.parquet", [png(PIXELS[0])], [1]))
    with pytest.raises(ValueError, match=r"no column 'img'; its columns are \['image', 'label'\]"):
        find_shards(source, image_column="img")
    with pytest.raises(ValueError, match=r"image is struct.*give integers"):
        find_shards(source, label_column="image")
    with pytest.raises(ValueError, match=r"label is int64; give struct<bytes"):
        find_shards(source, image_column="label")
    empty = str(write_images(tmp_path / "e.parquet", [], []))
    with pytest.raises(ValueError, match="has no rows"):
        find_shards(empty)
    unlabelled = str(write_images(tmp_path / "n.parquet", [png(PIXELS[0])] * 2, [1, None]))
    with pytest.raises(ValueError, match="label is empty in 1 rows; give each image a label"):
        opened(unlabelled, tmp_path)
    broken = str(write_images(tmp_path / "c.parquet", [b"x"], [1]))
    with pytest.raises(ValueError, match="no readable images"):
        opened(broken, tmp_path, max_corrupt=5)


SAMPLE = Path(__file__).parents[3] / "search" / "sample"


def test_the_shipped_sample_is_disjoint_stratified_and_small() -> None:
    tables = {
        split: pq.read_table(SAMPLE / f"{split}.parquet") for split in ("train", "val", "test")
    }
    assert {split: len(table) for split, table in tables.items()} == {
        "train": 4000,
        "val": 1000,
        "test": 1000,
    }
    seen: set[bytes] = set()
    for split, table in tables.items():
        counts = np.bincount(table.column("label").to_numpy(), minlength=10)
        assert (counts == len(table) // 10).all(), split
        rows = table.column("image").to_pylist()
        origin = "train" if split == "train" else "test"
        assert all(row["path"].startswith(f"{origin}/") for row in rows), split
        paths = {row["path"] for row in rows}
        assert len(paths) == len(table)
        assert b"huggingface" in table.schema.metadata
        assert not seen & {row["bytes"] for row in rows}
        seen |= {row["bytes"] for row in rows}
    assert sum(f.stat().st_size for f in SAMPLE.iterdir() if f.is_file()) < 20e6


def test_the_script_of_the_sample_is_deterministic(tmp_path: Path) -> None:
    import runpy

    make = runpy.run_path(str(SAMPLE / "make.py"))["make"]
    labels = [i % 5 for i in range(50)]
    source = write_images(tmp_path / "all.parquet", [png(p) for p in PIXELS], labels)
    outs = [tmp_path / "1", tmp_path / "2"]
    for out in outs:
        out.mkdir()
        make(source, source, out, per_class=2)
    for split in ("train", "val", "test"):
        first, second = ((out / f"{split}.parquet").read_bytes() for out in outs)
        assert first == second
    val, test = (pq.read_table(outs[0] / f"{s}.parquet") for s in ("val", "test"))
    paths = [r["path"] for t in (val, test) for r in t.column("image").to_pylist()]
    assert len(set(paths)) == 20
