from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file

from search.check import check, label_range
from search.data.shards import find_shards
from search.sweep.spec import SweepError
from search.sweep.toml import load_sweep
from tests.images import labelled, write_images
from tests.models import TINY


def test_a_right_sweep_gives_its_model_and_space(sweep_file: Path) -> None:
    dense, space = check(load_sweep(sweep_file))
    assert dense.mean == (0.5, 0.5, 0.5)
    assert space.dense == dense.shape()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.path='{folder}/train.parquet'"],
            "model: model .* is not a readable safetensors file",
        ),
        (
            ["model.name='vit_tiny_patch16_22'"],
            "model: model name 'vit_tiny_patch16_22' is unknown to timm",
        ),
        (["model.args={depht=3}"], r"model: model args \['depht'\] are unknown"),
        (["model.args={depth=2}"], r"has the unknown tensor blocks\.2"),
        (
            ["model.mean=[0.5]"],
            r"model\.mean is \(0\.5,\); give one number for each of the model's 3 channels",
        ),
        (["data.label_column='lable'"], r"data\.train: .* has no column 'lable'"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(
    overrides: list[str], message: str, sweep_file: Path
) -> None:
    folder = str(sweep_file.parent)
    sweep = load_sweep(sweep_file, [o.replace("{folder}", folder) for o in overrides])
    with pytest.raises(SweepError, match=message) as error:
        check(sweep)
    assert "\n" not in str(error.value)


def test_normalisation_must_be_known(sweep_file: Path) -> None:
    text = "\n".join(
        li for li in sweep_file.read_text().splitlines() if not li.startswith(("mean", "std"))
    )
    sweep_file.write_text(text)
    with pytest.raises(SweepError, match=r"model\.mean is None; give one number"):
        check(load_sweep(sweep_file))


@pytest.mark.parametrize(
    ("label", "message"),
    [(5, "data.val has 6 classes and the model's head has 5"), (-1, "label -1")],
)
def test_labels_must_fit_the_head(label: int, message: str, sweep_file: Path) -> None:
    files, labels = labelled(20, 1)
    write_images(sweep_file.parent / "val.parquet", files, [*labels[:-1], label])
    with pytest.raises(SweepError, match=message):
        check(load_sweep(sweep_file))


@pytest.mark.parametrize("statistics", [True, False])
def test_class_names_of_the_schema_count(statistics: bool, sweep_file: Path) -> None:
    path = sweep_file.parent / "test.parquet"
    table = pq.read_table(path)
    names = {"info": {"features": {"label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    pq.write_table(table, path, write_statistics=statistics, row_group_size=7)
    assert label_range(find_shards(str(path))) == (0, 4)
    assert find_shards(str(path)).classes == ("a", "b", "c")
    with pytest.raises(SweepError, match=r"data\.test has 3 classes and the model's head has 5"):
        check(load_sweep(sweep_file))


def test_label_range_without_names(tmp_path: Path) -> None:
    path = write_images(tmp_path / "a.parquet", [b""] * 4, [3, 1, 2, 1], group=2)
    assert label_range(find_shards(str(path))) == (1, 3)
    assert find_shards(str(path)).classes == ()


def test_damaged_statistics_do_not_end_the_process(tmp_path: Path) -> None:
    # Arrow throws in C++, where Python cannot catch it, when it is asked for them.
    path = write_images(tmp_path / "a.parquet", [b""] * 2, [1, 2])
    content = bytearray(path.read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    found: Counter[tuple[int, int] | str] = Counter()
    for place in range(footer, len(content) - 8):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        try:
            found[label_range(find_shards(str(path)))] += 1
        except ValueError as error:
            found["named" if "a.parquet" in str(error) else "not named"] += 1
    assert found.keys() == {(1, 2), "named"}  # read as it was, or refused by name
    assert min(found.values()) > 100


def test_absent_labels_are_named(tmp_path: Path) -> None:
    path = write_images(tmp_path / "a.parquet", [b""] * 3, [None, None, 2], group=2)
    with pytest.raises(ValueError, match=r"a\.parquet: label is empty in 2 rows; give each"):
        label_range(find_shards(str(path)))


def test_a_model_without_a_head_is_refused(sweep_file: Path) -> None:
    from timm.models.vision_transformer import VisionTransformer

    args = {**TINY, "num_classes": 0}
    save_file(
        VisionTransformer(**args).state_dict(),
        sweep_file.parent / "vit.safetensors",
        {"arch": json.dumps(args)},
    )
    with pytest.raises(SweepError, match="model has 0 classes"):
        check(load_sweep(sweep_file))


def test_a_saved_pruned_model_can_be_the_dense_one(sweep_file: Path, tiny) -> None:
    from pruners import load_method

    vit = tiny()
    load_method("grouped", criterion="magnitude").cut(
        vit,
        load_method("grouped", criterion="magnitude").score(vit, []),
        {"blocks.0.mlp.neuron": 0.5},
    )
    vit.save(sweep_file.parent / "saved")
    dense, _ = check(load_sweep(sweep_file, [f"model.path='{sweep_file.parent}/saved'"]))
    assert dense.shape() == vit.shape()
