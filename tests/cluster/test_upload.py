from __future__ import annotations

from pathlib import Path

import pytest

from cluster.upload import ROOT, refuse_what_stays_behind, shipped, stage
from search.sweep.spec import SweepError
from search.sweep.toml import load_sweep

SAMPLE = ROOT / "search" / "sweeps" / "sample.toml"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_code_and_the_sweep_are_sent(sweep_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "staged"
    target.mkdir()
    stage(sweep_file, load_sweep(sweep_file), target)
    sent = files(target)
    assert {"sweep.toml", "search/run.py", "pruners/methods/tome.py"} <= sent
    assert {Path(name).suffix for name in sent} == {".py", ".toml"}
    assert {Path(name).parts[0] for name in sent} == {"sweep.toml", "search", "pruners"}
    assert (target / "sweep.toml").read_text() == sweep_file.read_text()
    own = {
        str(p.relative_to(ROOT)) for k in ("search", "pruners") for p in (ROOT / k).rglob("*.py")
    }
    assert sent - {"sweep.toml"} == own


def test_the_sample_is_sent_where_a_sweep_names_it(tmp_path: Path) -> None:
    stage(SAMPLE, load_sweep(SAMPLE), tmp_path)
    data = {name for name in files(tmp_path) if Path(name).suffix not in (".py", ".toml")}
    assert data == {
        f"search/sample/{n}"
        for n in ("vit_cifar10.safetensors", "train.parquet", "val.parquet", "test.parquet")
    }
    other = load_sweep(SAMPLE, ['data.train="/data/train.parquet"'])
    assert "train.parquet" not in {path.name for path in shipped(other)}


def test_what_is_too_large_is_refused_with_the_largest_files(
    sweep_file: Path, tmp_path: Path
) -> None:
    root, target = tmp_path / "root", tmp_path / "target"
    for name, size in (("a", 10), ("b", 40_000_000), ("c", 5_000_000), ("d", 9_000_000)):
        path = root / "search" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)
    target.mkdir()
    with pytest.raises(
        SweepError,
        match=r"the upload has 54 MB, more than 50; the largest files are "
        r"search/b\.py \(40 MB\), search/d\.py \(9 MB\), search/c\.py \(5 MB\)",
    ):
        stage(sweep_file, load_sweep(sweep_file), target, root)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('model.path="weights.safetensors"', "model.path is 'weights.safetensors', which the job"),
        ('data.val="data/val.parquet"', r"data\.val is 'data/val.parquet', which the job"),
        ('data.val="search/run.py/../../x"', r"data\.val is"),
        ('start_from="results/a"', "start_from is 'results/a', which the job"),
        ('storage="results"', r"storage is 'results', which goes when the job ends; .*--set"),
        ('data.train="search/sample"', r"data\.train is 'search/sample'"),
    ],
)
def test_what_a_job_would_not_find_is_refused(
    override: str, message: str, sweep_file: Path
) -> None:
    refuse_what_stays_behind(load_sweep(sweep_file))
    refuse_what_stays_behind(load_sweep(sweep_file, ['data.val="s3://bucket/val/*.parquet"']))
    with pytest.raises(SweepError, match=message):
        refuse_what_stays_behind(load_sweep(sweep_file, [override]))
