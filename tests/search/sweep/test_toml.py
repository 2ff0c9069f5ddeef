from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.sweep.spec import Sweep, SweepError
from search.sweep.toml import check_files, load_sweep, sweep_toml
from tests.sweeps import MINIMAL

SWEEPS = Path(__file__).parents[3] / "search" / "sweeps"


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_sweeps_are_right(path: Path) -> None:
    sweep = load_sweep(path)
    assert sweep.name == path.stem
    check_files(sweep)


def test_neither_torch_nor_ray_is_imported() -> None:
    code = (
        "import sys, search.sweep.toml;"
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
        (
            "cost='flops'",
            r"cost is 'flops'; input should be 'effective_gmacs', 'gmacs' or 'latency'",
        ),
        ("finetune.distill=1.5", r"finetune\.distill is 1\.5"),
        ("finetune.lr=nan", r"finetune\.lr is nan"),
        ("resources.gpu=-1", r"resources\.gpu is -1"),
        ("model={pretrained=false}", r"model has neither path nor name"),
        ("name=foo", r"--set name is foo, which is no TOML value; .*'name=\"foo\"'"),
        ("trials", r"--set 'trials' is no setting; give KEY=VALUE"),
        ("trials.x=3", r"trials is no table"),
        ("trials=3\nseed=1", r"--set trials is .*, which is more than a value"),
        ("a\nb=3", r"is no setting; give KEY=VALUE"),
        ("trials=" + "[" * 9_000, r"--set trials is \[.*, which is no TOML value"),
        ("halving.etta=4", r"halving\.etta is an unknown key; did you mean 'eta'\?"),
        ("halving.zzz=4", r"halving\.zzz is an unknown key; there are eta, first, brackets"),
        ("constraints.max_param=4", r"constraints\.max_param is .* did you mean 'max_params'\?"),
        ("constraints.max_dorp=4", r"constraints\.max_dorp is .* did you mean 'max_drop'\?"),
        ("max_hour=4", r"max_hour is an unknown key; did you mean 'max_hours'\?"),
        ("halving.eta=1.0", r"halving\.eta is 1\.0; input should be greater than 1"),
        ("halving.first=-1", r"halving\.first is -1"),
        ("halving.brackets=0", r"halving\.brackets is 0"),
        ("constraints.max_params=0", r"constraints\.max_params is 0"),
        ("constraints.min_images_per_s=0", r"constraints\.min_images_per_s is 0"),
        ("constraints.max_drop=inf", r"constraints\.max_drop is inf"),
        ("max_hours=0", r"max_hours is 0"),
        ("patience=-1", r"patience is -1"),
        ("confirm=-1", r"confirm is -1"),
        ("refine=1.0", r"refine is 1\.0; input should be less than 1"),
        ("sampler='cmaes'", r"sampler is 'cmaes'; input should be 'auto', 'gp'"),
        ("final_epochs=1", r"sweep has final_epochs = 1; give more than epochs = 1, or 0 for none"),
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


def maybe(some: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(st.none(), some)


positive = st.floats(1e-9, 1e9)
SEARCH = st.fixed_dictionaries(
    {},
    optional={
        "halving": maybe(
            st.fixed_dictionaries(
                {},
                optional={
                    "eta": st.floats(1.5, 9.0),
                    "first": st.integers(0, 9),
                    "brackets": st.integers(1, 3),
                },
            )
        ),
        "constraints": st.fixed_dictionaries(
            {},
            optional={
                "max_params": maybe(st.integers(1, 10**12)),
                "min_images_per_s": maybe(positive),
                "max_drop": maybe(positive),
            },
        ),
        "cost": st.sampled_from(["effective_gmacs", "gmacs", "latency"]),
        "sampler": st.sampled_from(["auto", "gp", "nsga2", "nsga3", "tpe", "random"]),
        "start_from": maybe(st.sampled_from(["results/a", 'a b/"c"'])),
        "elastic_epochs": st.integers(0, 9),
        "refine": st.floats(0.0, 0.99),
        "max_hours": maybe(positive),
        "patience": st.integers(0, 99),
        "min_growth": st.floats(0.0, 9.0),
        "confirm": st.integers(0, 9),
        "final_epochs": st.integers(100, 999),
    },
)


@settings(max_examples=80, deadline=None)
@given(search=SEARCH)
def test_how_a_sweep_searches_is_written_and_read(search: dict, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "minimal.toml").write_text(MINIMAL)
    minimal = load_sweep(folder / "minimal.toml").model_dump(exclude_none=True)
    sweep = Sweep.model_validate({**minimal, "epochs": 99, **search})
    (folder / "a.toml").write_text(sweep_toml(sweep), encoding="utf-8")
    again = load_sweep(folder / "a.toml")
    assert again == sweep
    for key in ("halving", "constraints"):
        for name, value in (search.get(key) or {}).items():
            assert getattr(getattr(again, key), name) == value
    scalars = {k: v for k, v in search.items() if k not in ("halving", "constraints")}
    assert {key: getattr(again, key) for key in scalars} == scalars


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
