from __future__ import annotations

import json
import time

import pytest
import torch

from pruners import load_method
from pruners.latency.table import LatencyTable, measure_latency
from pruners.model.tokens import FrontReducer, Tokens

TABLE = LatencyTable(
    counts=(10, 20, 40),
    blocks_s=((1.0, 3.0, 4.0), (0.5, 1.0, 2.0)),
    kinds=(0, 1, 0),
    selector_s=(0.1, 0.2, 0.6),
    outer_s=0.25,
    batch=8,
    device="abacus",
)


class Passes(FrontReducer):
    """A selector that takes its time and drops nothing."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.modes: list[bool] = []

    def tokens_after(self, tokens: int) -> int:
        return tokens

    def macs(self, tokens: int) -> int:
        return 0

    def forward(self, tokens: Tokens) -> Tokens:
        self.modes.append(self.training)
        time.sleep(self.seconds)
        return tokens


def test_latency_is_the_sum_of_the_parts_between_counts_too() -> None:
    assert TABLE.latency([40, 20, 10]) == pytest.approx(0.25 + 4.0 + 1.0 + 1.0)
    assert TABLE.latency([15, 30, 25]) == pytest.approx(0.25 + 2.0 + 1.5 + 3.25)
    assert TABLE.latency([40, 20, 10], [30, 10]) == pytest.approx(6.25 + 0.4 + 0.1)


@pytest.mark.parametrize("count", [9, 41])
def test_counts_outside_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"token count {count} was not measured; give 10 to 40"):
        TABLE.latency([40, count, 10])
    with pytest.raises(ValueError, match=f"token count {count}"):
        TABLE.latency([40, 20, 10], [count])


def test_blocks_must_be_as_many_as_the_models() -> None:
    with pytest.raises(ValueError, match="tokens has 2 values; give 3"):
        TABLE.latency([40, 20])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": (20, 10, 40)}, "rising"),
        ({"counts": ()}, "rising"),
        ({"selector_s": (0.1,)}, "has 1 values; give 3"),
        ({"blocks_s": ((1.0, 2.0, 3.0), (1.0,))}, "has 1 values; give 3"),
        ({"kinds": (0, 2)}, "0 to 1"),
    ],
)
def test_rows_must_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatencyTable.from_json({**TABLE.to_json(), **change})


def test_json_round_trip() -> None:
    assert LatencyTable.from_json(json.loads(json.dumps(TABLE.to_json()))) == TABLE
    values = TABLE.to_json()
    del values["batch"]
    with pytest.raises(ValueError, match=r"missing fields \['batch'\]"):
        LatencyTable.from_json(values)


def test_a_shape_says_its_own_counts(tiny) -> None:
    """Blocks see what their selector lets through; selectors see what arrives."""
    shape = tiny(depth=4, img_size=(48, 32)).shape()  # 24 patches
    shrunk = load_method("spvit", blocks=(1, 3)).shrink(
        shape, {"blocks.1.token": 0.5, "blocks.3.token": 0.5}
    )
    counts = tuple(range(1, 26))
    table = LatencyTable(
        counts=counts,
        blocks_s=(tuple(float(n) for n in counts),),
        kinds=(0, 0, 0, 0),
        selector_s=tuple(1000.0 * n for n in counts),
        outer_s=0.0,
    )
    assert table.latency_of(shape) == 4 * 25
    assert table.latency_of(shrunk) == (25 + 14 + 14 + 9) + 1000 * (25 + 14)


def test_measured_tables_cover_the_counts_and_leave_the_model_alone(tiny) -> None:
    vit = tiny(img_size=(48, 32)).train()
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    selector = Passes()
    table = measure_latency(vit, selector, [25, 8, 12, 8], batch=2, rounds=3)
    assert table.counts == (8, 12, 25)
    assert (table.batch, table.device, table.kinds) == (2, "cpu", (0, 0, 0))
    assert len(table.blocks_s) == 1
    assert all(s > 0.0 for s in (*table.blocks_s[0], *table.selector_s, table.outer_s))
    assert vit.training
    assert not any(selector.modes)
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    assert all(block.front is None for block in vit.blocks)


def test_seconds_are_of_one_image_and_of_the_right_part(tiny) -> None:
    table = measure_latency(tiny(), Passes(0.01), [7], batch=4, rounds=3, warmup=0)
    assert 0.01 / 4 <= table.selector_s[0] < 0.01
    assert table.blocks_s[0][0] < table.selector_s[0]


def test_longer_sequences_take_longer(tiny) -> None:
    vit = tiny(img_size=(128, 128), embed_dim=96)
    (row,) = measure_latency(vit, Passes(), [33, 257], batch=4, rounds=5).blocks_s
    assert row[1] > 2 * row[0]


def test_each_kind_of_block_has_a_row(tiny) -> None:
    vit = tiny()
    load_method("grouped", criterion="magnitude").cut(
        vit,
        {"blocks.1.mlp.neuron": torch.rand(96), "blocks.2.attn.head": torch.rand(3)},
        {"blocks.1.mlp.neuron": 0.5, "blocks.2.attn.head": 1.0},
    )
    load_method("grouped", units=("width",)).cut(vit, {"width": torch.rand(24)}, {"width": 0.5})
    table = measure_latency(vit, Passes(), [5, 7], rounds=2)
    assert table.kinds == (0, 1, 2)
    assert len(table.blocks_s) == 3


def test_what_cannot_be_measured_is_refused(tiny) -> None:
    vit = tiny(img_size=(48, 32))
    with pytest.raises(ValueError, match="rounds is 0"):
        measure_latency(vit, Passes(), [7], rounds=0)
    with pytest.raises(ValueError, match="batch is 0"):
        measure_latency(vit, Passes(), [7], batch=0)
    with pytest.raises(ValueError, match="counts is"):
        measure_latency(vit, Passes(), [], rounds=1)
    load_method("spvit").cut(vit, {}, {"blocks.1.token": 0.5})
    with pytest.raises(ValueError, match="reduced tokens"):
        measure_latency(vit, Passes(), [7])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tiny) -> None:
    vit = tiny(img_size=(48, 32)).cuda()
    table = load_method("spvit").latency_table(vit, batch=8, rounds=3)
    assert table.device != "cpu"
    assert table.latency_of(vit.shape()) > 0.0
