from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from search.sweep import Sweep, SweepError, check_files, load_sweep, sweep_toml

SWEEPS = Path(__file__).parents[2] / "search" / "sweeps"
MINIMAL = """
name = "a"
budget = [0.3, 0.8]
trials = 4
epochs = 1
model.name = "vit_tiny_patch16_224"
data = { train = "t", val = "v", test = "s" }
steps = [{ method = "magnitude", scope = "layer" }]
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "a.toml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_sweeps_are_right(path: Path) -> None:
    sweep = load_sweep(path)
    assert sweep.name == path.stem
    check_files(sweep)


def test_defaults(minimal: Path) -> None:
    sweep = load_sweep(minimal)
    assert (sweep.cost, sweep.sampler, sweep.seed) == ("effective_gmacs", "tpe", 0)
    assert sweep.steps[0].options == {"scope": "layer"}
    assert sweep.directory == Path("results/a")
    with pytest.raises(ValidationError, match="frozen"):
        sweep.trials = 5


def test_neither_torch_nor_ray_is_imported() -> None:
    code = (
        "import sys, search.sweep;"
        "print(sorted({'torch', 'ray', 'timm', 'mlflow', 'pruners'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trails=3", r"trails is an unknown key; did you mean 'trials'\?"),
        ("data.batchsize=3", r"data\.batchsize is an unknown key; did you mean 'batch_size'\?"),
        ("finetune.zzz=3", r"finetune\.zzz is an unknown key; there are lr, weight_decay"),
        ("trials=1", r"trials is 1; input should be greater than or equal to 2"),
        ("trials='many'", r"trials is 'many'; input should be a valid integer"),
        ("trials=2.5", r"trials is 2\.5; "),
        ("budget=[0.8, 0.3]", r"budget is impossible: \[0\.8, 0\.3\]; .* 0 < low < high <= 1"),
        ("budget=[0.0, 0.3]", r"budget is impossible"),
        ("budget=[0.3, 1.2]", r"budget is impossible"),
        ("budget=[0.3]", r"budget needs two numbers"),
        ("name='a/b'", r"name is 'a/b'"),
        ("name='..'", r"name is '\.\.'"),
        ("steps=[]", r"steps is \[\]"),
        (
            "steps=[{method='magnitud'}]",
            r"steps\.0 names no method: 'magnitud'; did you mean 'magnitude'\?.*x_pruner$",
        ),
        ("steps=[{scope='layer'}]", r"steps\.0\.method is missing"),
        ("steps=[{method='evit', max_share=1.5}]", r"steps\.0\.max_share is 1\.5"),
        ("cost='flops'", r"cost is 'flops'; input should be 'effective_gmacs' or 'gmacs'"),
        ("finetune.distill=1.5", r"finetune\.distill is 1\.5"),
        ("finetune.lr=nan", r"finetune\.lr is nan"),
        ("resources.gpu=-1", r"resources\.gpu is -1"),
        ("model={pretrained=false}", r"model has neither path nor name"),
        ("name=foo", r"--set name is foo, which is no TOML value; .*'name=\"foo\"'"),
        ("trials", r"--set 'trials' is no setting; give KEY=VALUE"),
        ("trials.x=3", r"trials is no table"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(override: str, message: str, minimal: Path) -> None:
    with pytest.raises(SweepError, match=message) as error:
        load_sweep(minimal, [override])
    assert "\n" not in str(error.value)


def test_several_problems_are_counted(minimal: Path) -> None:
    with pytest.raises(SweepError, match=r"\(and 1 more\)"):
        load_sweep(minimal, ["trials=0", "epochs=-1"])


def test_files_that_are_not_there(minimal: Path, tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="does not exist; give a TOML file"):
        load_sweep(tmp_path / "no.toml")
    with pytest.raises(SweepError, match=r"data\.train is 't', which does not exist"):
        check_files(load_sweep(minimal))
    with pytest.raises(SweepError, match=r"model\.path is 'x\.safetensors'"):
        check_files(load_sweep(minimal, ["model.path='x.safetensors'"]))
    check_files(
        load_sweep(minimal, [f"data.{s}='s3://b/{s}/*.parquet'" for s in ("train", "val", "test")])
    )


def test_globs_are_looked_up(minimal: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "1.parquet").touch()
    sets = [f"data.{split}='d/*.parquet'" for split in ("train", "val", "test")]
    check_files(load_sweep(minimal, sets))
    with pytest.raises(SweepError, match=r"data\.val is 'd/\*\.pq'"):
        check_files(load_sweep(minimal, [*sets, "data.val='d/*.pq'"]))


def test_broken_toml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('name = "a"\nbudget = [0.3 0.8]\n')
    with pytest.raises(SweepError, match=r"a\.toml is not TOML: .*line 2"):
        load_sweep(path)


def test_overrides_win_in_order(minimal: Path) -> None:
    sweep = load_sweep(
        minimal,
        ["trials=8", "data.batch_size=64", "trials=9", 'steps=[{method="evit", fuse=false}]'],
    )
    assert (sweep.trials, sweep.data.batch_size) == (9, 64)
    assert sweep.steps[0].options == {"fuse": False}


def test_labels_number_a_repeated_method(minimal: Path) -> None:
    steps = 'steps=[{method="grouped"}, {method="evit"}, {method="grouped", units=["qk_dim"]}]'
    assert load_sweep(minimal, [steps]).labels == ("grouped", "evit", "grouped-2")


text = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12)
values = st.one_of(
    st.booleans(),
    st.integers(-9, 9),
    st.floats(-5, 5),
    text,
    st.lists(st.integers(0, 3), max_size=3),
)


@settings(max_examples=80, deadline=None)
@given(
    options=st.dictionaries(
        text.filter(lambda k: k not in ("method", "space", "max_share", "options")),
        values,
        max_size=4,
    ),
    args=st.dictionaries(text, values, max_size=3),
    train=text,
    lr=st.floats(1e-9, 1.0),
)
def test_written_toml_reads_as_the_same_sweep(
    options: dict, args: dict, train: str, lr: float, tmp_path_factory
) -> None:
    sweep = Sweep.model_validate(
        {
            "name": "a",
            "budget": [0.25, 0.75],
            "trials": 3,
            "epochs": 0,
            "model": {"name": "x", "args": args, "mean": [0.5], "std": [0.25]},
            "data": {"train": train, "val": "v", "test": "t"},
            "finetune": {"lr": lr},
            "steps": [{"method": "magnitude", **options}, {"method": "evit", "space": "layer"}],
        }
    )
    path = tmp_path_factory.mktemp("sweep") / "a.toml"
    path.write_text(sweep_toml(sweep), encoding="utf-8")
    assert load_sweep(path) == sweep
