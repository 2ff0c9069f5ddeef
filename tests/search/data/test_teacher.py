from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from pruners import PrunableViT
from search.data.augment import Epoch, crop_and_flip, draw_views
from search.data.decode import ImageSpec
from search.data.images import Images, open_images
from search.data.teacher import PREFIX, Teacher, make_room, open_answers, weights_digest
from tests.images import png, random_pixels, write_images
from tests.models import TINY
from tests.processes import clean_forks

SPEC = ImageSpec(size=(24, 16), channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
PIXELS = random_pixels(40, 24, 16)
BYTES = 128 + 40 * 5 * 2
"""Size of a file of answers: a header, then 40 rows of 5 classes in float16."""


@pytest.fixture
def images(tmp_path: Path) -> Images:
    return open_all(tmp_path, [png(p) for p in PIXELS])


def open_all(tmp_path: Path, files: list[bytes | None], **more: float) -> Images:
    source = write_images(tmp_path / "train.parquet", files, [i % 5 for i in range(40)], group=12)
    return open_images(str(source), SPEC, cache_dir=str(tmp_path / "cache"), **more)


@pytest.fixture
def dense(tiny: Callable[..., PrunableViT]) -> PrunableViT:
    vit = tiny()
    vit.use_fused_attention(False)
    return vit


def teacher(dense: PrunableViT, images: Images, folder: Path, **more: object) -> Teacher:
    arguments = {
        "augment": True,
        "autocast": None,
        "device": torch.device("cpu"),
        "folder": folder,
        "limit_gb": 1.0,
        "batch_size": 16,
    }
    return Teacher(dense, images, **{**arguments, **more})  # type: ignore[arg-type]


def asked_one_by_one(dense: PrunableViT, epoch: Epoch | None) -> torch.Tensor:
    """Logits [40, 5] in float64 of the images as an epoch shows them."""
    precise = type(dense).from_state_dict(dense.vit.state_dict(), **TINY).eval().double()
    precise.use_fused_attention(False)
    mean, std = (torch.tensor(v).double().view(3, 1, 1) * 255 for v in (SPEC.mean, SPEC.std))
    rows = []
    for number, pixels in enumerate(PIXELS):
        image = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
        if epoch is not None:
            image = crop_and_flip(image, draw_views(epoch, np.array([number]), 3), 3)
        with torch.no_grad():
            rows.append(precise((image.double() - mean) / std))
    return torch.cat(rows)


def test_answers_are_the_dense_models_logits_of_the_augmented_images(
    dense, images, tmp_path
) -> None:
    one = teacher(dense, images, tmp_path)
    seen = []
    for epoch in (Epoch(7, 1), Epoch(7, 2), Epoch(8, 1)):
        answers = one.answers(epoch)
        assert answers.dtype == np.float16
        expected = asked_one_by_one(dense, epoch).numpy()
        assert np.abs(answers - expected).max() <= 2**-11 * np.abs(expected).max() + 1e-5
        seen.append(answers.copy())
    assert np.abs(seen[0] - seen[1]).max() > 0.05
    assert np.abs(seen[0] - seen[2]).max() > 0.05


def test_answers_are_in_the_precision_of_training(dense, images, tmp_path) -> None:
    answers = teacher(dense, images, tmp_path, autocast=torch.bfloat16, batch_size=40)
    found = torch.from_numpy(answers.answers(Epoch(7, 1)).copy())
    ((x, _, _),) = images.numbered(40, order=None, views=Epoch(7, 1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = dense(x)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(found, expected.half())  # float16 has all digits of bfloat16
    full = torch.from_numpy(teacher(dense, images, tmp_path).answers(Epoch(7, 1)).copy())
    assert not torch.equal(found, full)


def test_without_augmentation_all_epochs_share_one_file(dense, images, tmp_path) -> None:
    one = teacher(dense, images, tmp_path, augment=False)
    expected = asked_one_by_one(dense, None).numpy()
    for epoch in (Epoch(7, 1), Epoch(7, 2)):
        assert np.abs(one.answers(epoch) - expected).max() <= 2**-11 * np.abs(expected).max() + 1e-5
    assert len(list(tmp_path.glob(f"{PREFIX}*.npy"))) == 1


def test_answers_are_computed_once_and_mapped(dense, images, tmp_path, monkeypatch) -> None:
    first = teacher(dense, images, tmp_path).answers(Epoch(7, 1)).copy()
    monkeypatch.setattr(Teacher, "_compute", lambda *_: pytest.fail("computed again"))
    again = teacher(dense, images, tmp_path, batch_size=9).answers(Epoch(7, 1))
    assert isinstance(again, np.memmap)
    assert np.array_equal(again, first)


def _ask_in_a_process(arguments: tuple[PrunableViT, Images, Path]) -> tuple[float, str]:
    torch.set_num_threads(1)
    one = teacher(*arguments)
    answers = one.answers(Epoch(7, 1))
    return one.path(Epoch(7, 1)).with_suffix(".json").stat().st_mtime_ns, answers.tobytes().hex()


def test_processes_that_arrive_together_compute_once(dense, images, tmp_path) -> None:
    with clean_forks().Pool(2) as pool:
        found = pool.map(_ask_in_a_process, [(dense, images, tmp_path)] * 4, chunksize=1)
    assert len(set(found)) == 1
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize(
    "damage", ["truncate", "flip a bit", "no note", "half a note", "another shape", "gone"]
)
def test_torn_answers_are_computed_again(damage: str, dense, images, tmp_path) -> None:
    one = teacher(dense, images, tmp_path)
    expected, path = one.answers(Epoch(7, 1)).copy(), one.path(Epoch(7, 1))
    note, content = path.with_suffix(".json"), bytearray(path.read_bytes())
    assert len(content) == BYTES
    path.unlink()  # so that what `one` has mapped stays as it is
    if damage == "truncate":
        path.write_bytes(content[:-2])
    elif damage == "flip a bit":
        content[-7] ^= 4
        path.write_bytes(content)
    elif damage == "another shape":
        np.save(path.open("wb"), expected[:, :4])
        found = {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        note.write_text(json.dumps(found))
    elif damage != "gone":
        path.write_bytes(content)
        note.write_text(note.read_text()[:20])
        if damage == "no note":
            note.unlink()
    assert open_answers(path, (40, 5)) is None
    assert np.array_equal(teacher(dense, images, tmp_path).answers(Epoch(7, 1)), expected)
    assert open_answers(path, (40, 5)) is not None


def test_a_process_that_dies_while_it_computes_leaves_nothing_to_use(
    dense, images, tmp_path, monkeypatch
) -> None:
    one = teacher(dense, images, tmp_path)
    ask, asked = Teacher._ask, []

    def dying(self: Teacher, batch: torch.Tensor) -> torch.Tensor:
        asked.append(len(batch))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask(self, batch)

    monkeypatch.setattr(Teacher, "_ask", dying)
    with pytest.raises(KeyboardInterrupt):
        one.answers(Epoch(7, 1))
    path = one.path(Epoch(7, 1))
    assert not path.exists()
    (tmp_path / f".{path.name}.1").write_bytes(b"of a process that was killed")
    monkeypatch.undo()
    assert np.isfinite(one.answers(Epoch(7, 1))).all()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("cache_gb", [8.0, 0.0])
def test_corrupt_images_do_not_shift_answers_and_have_none(
    cache_gb: float, dense, tmp_path
) -> None:
    files: list[bytes | None] = [png(p) for p in PIXELS]
    corrupt = [0, 11, 12, 39]
    for row in corrupt:
        files[row] = b"broken"
    images = open_all(tmp_path, files, cache_gb=cache_gb, max_corrupt=9)
    answers = teacher(dense, images, tmp_path).answers(Epoch(7, 1))
    expected = asked_one_by_one(dense, Epoch(7, 1)).numpy()
    good = np.setdiff1d(np.arange(40), corrupt)
    assert np.isnan(answers[corrupt]).all()
    difference = np.abs(answers[good] - expected[good])
    assert difference.max() <= 2**-11 * np.abs(expected).max() + 1e-5


def test_anything_decisive_changes_the_name(dense, images, tiny, tmp_path) -> None:
    def named(vit: PrunableViT = dense, data: Images = images, **more: object) -> str:
        return teacher(vit, data, tmp_path, **more).path(Epoch(7, 1)).name

    other_images = open_all(tmp_path, [png(p) for p in PIXELS[::-1]])
    other_weights = tiny()
    with torch.no_grad():
        other_weights.vit.head.bias[0] += 1e-6
    # The same tensors in another network.
    other_network = PrunableViT.from_state_dict(dense.vit.state_dict(), **TINY, act_layer="relu")
    names = {
        named(),
        named(augment=False),
        named(autocast=torch.bfloat16),
        named(device=torch.device("cuda")),
        named(data=other_images),
        named(vit=other_weights),
        named(vit=other_network),
        teacher(dense, images, tmp_path).path(Epoch(7, 2)).name,
        teacher(dense, images, tmp_path).path(Epoch(8, 1)).name,
    }
    assert len(names) == 9
    assert named() == named(batch_size=3, limit_gb=2.0)


def test_what_fits_is_counted_over_all_epochs(dense, images, tmp_path) -> None:
    def fits(gb: float, epochs: int, **more: bool) -> bool:
        return teacher(dense, images, tmp_path, limit_gb=gb, **more).fits(epochs)

    assert fits(1200e-9, 3)  # 40 images * 5 classes * 2 bytes * 3 epochs
    assert not fits(1199e-9, 3)
    assert fits(400e-9, 3, augment=False)
    assert not fits(0.0, 1)
    assert not fits(0.0, 1, augment=False)


def backdate(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_the_files_used_least_recently_go_where_there_is_no_room(dense, images, tmp_path) -> None:
    one = teacher(dense, images, tmp_path, limit_gb=(3 * BYTES + 50) / 1e9)
    epochs = [Epoch(7, number) for number in range(5)]
    paths = [one.path(epoch) for epoch in epochs]
    kept = [one.answers(epoch).copy() for epoch in epochs[:3]]
    for age, path in zip((30, 20, 10), paths, strict=False):
        backdate(path, age)
    (tmp_path / "decoded.npy").write_bytes(b"x" * 10_000)  # not one of these files
    one.answers(epochs[0])  # used again
    one.answers(epochs[3])
    assert [path.exists() for path in paths] == [True, False, True, True, False]
    leftovers = [path.with_suffix(end) for path in paths[1:2] for end in (".json", ".lock")]
    assert not any(path.exists() for path in leftovers)
    assert np.array_equal(one.answers(epochs[1]), kept[1])  # still mapped here
    again = teacher(dense, images, tmp_path, limit_gb=(3 * BYTES + 50) / 1e9)
    assert np.array_equal(again.answers(epochs[1]), kept[1])  # computed again
    assert [path.exists() for path in paths] == [True, True, False, True, False]
    assert (tmp_path / "decoded.npy").exists()


def test_a_file_in_work_and_the_newest_stay(tmp_path) -> None:
    paths = [tmp_path / f"{PREFIX}{i}.npy" for i in range(4)]
    for age, path in zip((40, 30, 20, 10), paths, strict=True):
        path.write_bytes(b"x" * 100)
        backdate(path, age)
    with FileLock(paths[1].with_suffix(".lock")):
        make_room(tmp_path, 250, keep=paths[0])
    assert [path.exists() for path in paths] == [True, True, False, False]
    make_room(tmp_path, 200, keep=paths[0])
    assert [path.exists() for path in paths] == [True, True, False, False]
    make_room(tmp_path, 0, keep=paths[0])
    assert [path.exists() for path in paths] == [True, False, False, False]


def test_logits_that_float16_cannot_hold_are_refused(dense, images, tmp_path) -> None:
    with torch.no_grad():
        dense.vit.head.bias[2] = 1e5
    with pytest.raises(ValueError, match=r"not finite in float16; give data\.teacher_gb = 0"):
        teacher(dense, images, tmp_path).answers(Epoch(7, 1))


def test_the_digest_of_weights_sees_every_bit_and_name(tiny) -> None:
    vit = tiny()
    digests = {weights_digest(vit), weights_digest(tiny())}
    assert len(digests) == 1
    with torch.no_grad():
        vit.vit.pos_embed[0, 3, 5] = torch.nextafter(vit.vit.pos_embed[0, 3, 5], torch.tensor(9.0))
    digests.add(weights_digest(vit))
    digests.add(weights_digest(tiny().bfloat16()))
    swapped = tiny()
    norms = swapped.vit.blocks[0].norm1, swapped.vit.blocks[0].norm2
    swapped.vit.blocks[0].norm1, swapped.vit.blocks[0].norm2 = norms[::-1]
    digests.add(weights_digest(swapped))
    assert len(digests) == 4
