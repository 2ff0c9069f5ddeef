"""The files of data, sweeps and results, each with a sample, ways to damage it, and its reader."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tomllib
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
from PIL import Image

from search.check import label_range
from search.data.cache import open_decoded
from search.data.decode import Corrupt, ImageSpec, decode_all
from search.data.images import open_images
from search.data.shards import find_shards
from search.data.teacher import open_answers
from search.records.files import read_front, read_trials, write_front, write_trials
from search.records.front import build_front
from search.records.journal import Journal
from search.records.ledger import Ledger
from search.sweep.toml import load_sweep
from search.tracking.note import note
from search.tracking.run_ids import RUNS
from search.tracking.runs import SweepRuns
from tests.fuzz_format import Format, either
from tests.images import png, random_pixels, write_images
from tests.mutations import ODD, Random, damaged, damaged_json, odd_values
from tests.search.logged import TINY_SHAPE, tracked
from tests.search.trial_events import config_of, result_of
from tests.search.trial_records import record
from tests.sweeps import SWEEP_TOML

SPEC = ImageSpec(size=(6, 4), channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)


def sweep(folder: Path) -> Format:
    path, text = folder / "sweep.toml", SWEEP_TOML.format(folder=folder)
    path.write_text(text)

    def values(random: Random) -> bytes:
        try:
            return tomli_w.dumps(odd_values(tomllib.loads(text), random)).encode(errors="replace")
        except (TypeError, AttributeError):  # TOML has no null
            return b"x = " + b"[" * 3000

    damage = either(partial(damaged, text.encode()), values)
    return Format(path=path, damage=damage, read=lambda: load_sweep(path), named=str(path))


def setting(folder: Path) -> Format:
    """Overrides of the command line: one a file, for once."""
    toml, path = folder / "sweep.toml", folder / "setting"
    toml.write_text(SWEEP_TOML.format(folder=folder))
    path.write_text("trials=8")
    samples = (b"data.batch_size=64", b'steps=[{method="evit"}]', b"budget=[0.2,0.9]", b"a.b.c=1")

    def read() -> object:
        return load_sweep(toml, [path.read_bytes().decode(errors="replace")])

    damage = either(*(partial(damaged, sample) for sample in samples))
    return Format(path=path, damage=damage, read=read, named="")


def shards(folder: Path) -> Format:
    path = write_images(folder / "a.parquet", [b"one", None, b"three"], [0, 2, 1], group=2)
    content = path.read_bytes()
    types = (pa.int8(), pa.uint64(), pa.float32(), pa.string())

    def table(random: Random) -> bytes:
        labels = pa.array([None, *random.integers(-5, 300, 2)], pa.int64())
        kind = types[random.integers(len(types))]
        labels = labels[int(random.integers(2)) :].cast(kind, safe=False)
        images = [{"bytes": b"x", "path": "x.png"}, {"bytes": None}, None][: len(labels)]
        bare = [{"bytes": "x"}, {"path": b"\xff"}, 7, None][random.integers(4)]
        images = [images, [bare] * len(labels)][random.integers(2)]
        names = {"info": {"features": {"label": {"names": ["a", "b", "c"]}}}}
        found = pa.table({"image": images, "label": labels[: len(images)]})
        found = found.replace_schema_metadata({"huggingface": damaged_json(names, random)})
        sink = pa.BufferOutputStream()
        pq.write_table(found, sink, row_group_size=int(random.integers(1, 3)))
        return sink.getvalue().to_pybytes()

    def read() -> object:
        found = find_shards(str(path))
        return label_range(found), list(found.read_groups(found.groups()))

    damage = either(*[partial(damaged, content)] * 2, table)
    return Format(path=path, damage=damage, read=read, named=str(path))


def image(kind: str, folder: Path) -> Format:
    """An image file; of a PNG, parts whose checksums fit."""
    path = folder / "a"
    picture, stream = Image.fromarray(random_pixels(1, 6, 4)[0]), io.BytesIO()
    picture.save(stream, format=kind)
    content = stream.getvalue()
    path.write_bytes(content)
    pool = ThreadPoolExecutor(1)

    def read() -> object:
        rows = [("a.png", path.read_bytes(), 0)]
        return list(decode_all(rows, SPEC, Corrupt(limit=0, names=[]), pool))

    def sealed(random: Random) -> bytes:
        found, rest = content[:8], content[8:]
        hit = random.integers(3)
        for number in range(3):
            size = int.from_bytes(rest[:4]) + 4
            part, rest = rest[4 : 4 + size], rest[8 + size :]
            if number == hit:
                part = part[:4] + damaged(part[4:], random)
            found += (len(part) - 4).to_bytes(4) + part + zlib.crc32(part).to_bytes(4)
        return found

    ways = [partial(damaged, content)] + ([sealed] * 2 if kind == "PNG" else [])
    return Format(path=path, damage=either(*ways), read=read, named="a.png")


def journal(folder: Path) -> Format:
    path, lines = folder / "a.jsonl", [{"a": 1}, {"b": [1.5, None], "c": {"d": "x"}}, {}]
    for line in lines:
        Journal(path).append(line)
    content = path.read_bytes()
    damage = either(partial(damaged, content), lambda random: damaged_json(lines, random) + b"\n")
    return Format(path=path, damage=damage, read=lambda: Journal(path).read(), named=str(path))


def resealed(path: Path, lines: list[dict[str, Any]], random: Random) -> bytes:
    """Return a journal that says odd things, with checksums that fit."""
    found = odd_values(lines, random)
    path.unlink(missing_ok=True)
    for line in found if isinstance(found, list) else []:
        if isinstance(line, dict):
            Journal(path).append(line)
    return path.read_bytes() if path.exists() else b""


def ledger(folder: Path) -> Format:
    """The events of a sweep."""
    toml = folder / "sweep.toml"
    toml.write_text(SWEEP_TOML.format(folder=folder))
    whole = load_sweep(toml)
    whole.directory.mkdir(parents=True)
    written = Ledger(whole)
    written.begin()
    written.ask(config_of("0000", origin="dense", cost_ratio=1.0))
    written.report(result_of("0000", status="finished", by_class=[50.0, None]))
    written.end("0000", "dense", "")
    path = written.journal.path
    lines, other = written.journal.read(), folder / "other.jsonl"
    damage = partial(resealed, other, lines)
    return Format(path=path, damage=damage, read=lambda: Ledger(whole), named=str(path))


def mlflow_notes(folder: Path) -> Format:
    """What a sweep knows of its runs in MLflow."""
    path, other = folder / RUNS, folder / "other.jsonl"
    lines = [{"experiment": "1", "parent": "a"}, {"trial": "0000", "run": "b"}, {"place": 7}]
    for line in lines:
        Journal(path).append(line)

    content = path.read_bytes()

    def read() -> object:
        with patch("search.tracking.runs.mlflow_client"):
            return SweepRuns.open(tracked(folder), TINY_SHAPE)

    def damage(random: Random) -> bytes:
        return resealed(other, lines, random) or content  # without a line, there are new runs

    return Format(path=path, damage=damage, read=read, named=str(path))


def front(folder: Path) -> Format:
    path = folder / "front.json"
    dense = record("0000", 1.0, 80.0, "dense", origin="dense", methods="dense")
    members = [record("0001", 0.5, 70.0, spread=0.5, runs=3), record("0002", 0.7, 75.0)]
    write_front(path, build_front([dense, *members], "effective_gmacs"))
    damage = partial(damaged_json, json.loads(path.read_text()))

    def read() -> str:
        front = read_front(path)
        return note(front, front.members, "", {})

    return Format(path=path, damage=damage, read=read, named=str(path))


def trials(folder: Path) -> Format:
    path, whole = folder / "trials.parquet", record("0001", 0.5, 70.0)
    write_trials(path, [whole])
    row, columns = asdict(whole), ("parameters", "plan", "shape", "history", "by_class")
    content = path.read_bytes()

    def odd(random: Random) -> bytes:
        values = dict(row)
        for key in columns:
            values[key] = json.dumps(row[key])
            if random.integers(4) == 0:
                values[key] = damaged_json(row[key], random).decode(errors="replace")
        names = sorted(values)
        values[names[random.integers(len(names))]] = ODD[random.integers(len(ODD))]
        sink = pa.BufferOutputStream()
        try:
            pq.write_table(pa.Table.from_pylist([values]), sink)
        except (pa.ArrowException, OverflowError):  # Arrow has no such value
            return b"PAR1"
        return sink.getvalue().to_pybytes()

    damage = either(partial(damaged, content), odd)
    return Format(path=path, damage=damage, read=lambda: read_trials(path), named=str(path))


def answers(folder: Path) -> Format:
    """A teacher's answers, with a note that fits."""
    path, values = folder / "teacher.npy", np.ones((3, 2), np.float16)
    stream = io.BytesIO()
    np.save(stream, values)
    content = stream.getvalue()
    path.write_bytes(content)

    def read() -> object:
        data = path.read_bytes()
        written = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        path.with_suffix(".json").write_text(json.dumps(written))
        found = open_answers(path, values.shape)
        if found is None:
            raise ValueError(f"{path} is none")  # it is computed again
        return found.tobytes()

    return Format(path=path, damage=partial(damaged, content), read=read, named=str(path))


def answers_note(folder: Path) -> Format:
    whole = answers(folder)
    whole.read()
    path = whole.path.with_suffix(".json")

    def read() -> object:
        if open_answers(whole.path, (3, 2)) is None:
            raise ValueError(f"{path} is none")
        return None

    damage = partial(damaged_json, json.loads(path.read_text()))
    return Format(path=path, damage=damage, read=read, named=str(path))


def decoded(folder: Path, suffix: str) -> Format:
    """Decoded images, or the note beside them; where there are none, they are decoded again."""
    source = write_images(
        folder / "a.parquet", [png(p) for p in random_pixels(2, 6, 4)] + [None], [0, 1, 2]
    )

    images = open_images(str(source), SPEC, cache_dir=str(folder), max_corrupt=1)
    (arrow,) = folder.glob("*.arrow")

    def read() -> object:
        if (found := open_decoded(arrow, SPEC, 3)) is None:
            raise ValueError(f"{folder} has none")
        return list(dataclasses.replace(images, table=found[0]).batches(2, seed=0, augment=False))

    path = arrow.with_suffix(suffix)
    content = path.read_bytes()
    damage = partial(damaged, content)
    if suffix == ".json":
        damage = partial(damaged_json, json.loads(content))
    return Format(path=path, damage=damage, read=read, named=str(folder))
