from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from search.sweep.spec import SweepError
from search.sweep.toml import load_sweep, sweep_toml


def test_defaults(minimal: Path) -> None:
    sweep = load_sweep(minimal)
    assert (sweep.cost, sweep.sampler, sweep.seed) == ("effective_gmacs", "auto", 0)
    assert sweep.steps[0].options == {"scope": "layer"}
    assert sweep.directory == Path("results/a")
    with pytest.raises(ValidationError, match="frozen"):
        sweep.trials = 5


def test_labels_number_a_repeated_method(minimal: Path) -> None:
    steps = 'steps=[{method="grouped"}, {method="evit"}, {method="grouped", units=["qk_dim"]}]'
    assert load_sweep(minimal, [steps]).labels == ("grouped", "evit", "grouped-2")


def test_tables_of_the_search_are_set_key_by_key(minimal: Path) -> None:
    sweep = load_sweep(minimal)
    assert sweep.halving is None
    assert sweep.constraints.max_params is sweep.constraints.max_drop is None
    sets = [
        "epochs=3",
        "halving.eta=4",
        "constraints.max_drop=1.5",
        "constraints.max_params=5_000_000",
    ]
    sweep = load_sweep(minimal, sets)
    assert (sweep.halving.eta, sweep.halving.first, sweep.halving.brackets) == (4.0, 1, 1)
    assert (sweep.constraints.max_drop, sweep.constraints.max_params) == (1.5, 5_000_000)
    assert sweep.constraints.min_images_per_s is None
    assert load_sweep(minimal, ["epochs=3", "halving={}"]).halving.eta == 2.0
    assert load_sweep(minimal, ["epochs=3", "halving={}", "halving=false"]).halving is None
    with pytest.raises(SweepError, match="halving"):
        load_sweep(minimal, ["epochs=3", "halving=true"])


@pytest.mark.parametrize(
    ("halving", "message"),
    [
        ("{first=4}", r"halving\.first = 4 and epochs = 4; give a first rung before the last"),
        ("{brackets=4}", r"halving\.brackets = 4, with 2 rungs; give at most 3"),
    ],
)
def test_impossible_rungs_are_refused(halving: str, message: str, minimal: Path) -> None:
    with pytest.raises(SweepError, match=message):
        load_sweep(minimal, ["epochs=4", f"halving={halving}"])
    assert load_sweep(minimal, ["epochs=4", "halving={brackets=3}"]).halving.brackets == 3


@pytest.mark.parametrize("measures", ["cost='latency'", "constraints.min_images_per_s=100"])
def test_speed_is_not_measured_on_a_shared_gpu(measures: str, minimal: Path) -> None:
    with pytest.raises(SweepError, match=r"measures speed on resources\.gpu = 0\.5, a shared GPU"):
        load_sweep(minimal, [measures, "resources.gpu=0.5"])
    for gpu in (0, 1):
        assert load_sweep(minimal, [measures, f"resources.gpu={gpu}"]).resources.gpu == gpu
    assert load_sweep(minimal, ["resources.gpu=0.5", "constraints.max_drop=1"]).resources.gpu == 0.5


def test_the_last_training_is_longer(minimal: Path) -> None:
    with pytest.raises(SweepError, match=r"has final_epochs = 3; give more than epochs = 4"):
        load_sweep(minimal, ["epochs=4", "final_epochs=3"])
    assert load_sweep(minimal, ["epochs=4", "final_epochs=5"]).final_epochs == 5
    assert load_sweep(minimal, ["epochs=4", "final_epochs=0"]).final_epochs == 0


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ("{gpu=4}", "has gpu = 4, .* give as many workers: workers = 4, gpu = 1"),
        ("{gpu=1.5, workers=2}", "give as many workers: workers = 4, gpu = 1"),
        ("{gpu=0.5, workers=2}", "workers of a trial do not share a GPU; give gpu = 1, or 0"),
        ("{workers=0}", r"resources\.workers is 0"),
    ],
)
def test_a_process_trains_on_one_gpu(resources: str, message: str, minimal: Path) -> None:
    with pytest.raises(SweepError, match=message):
        load_sweep(minimal, [f"resources={resources}"])
    assert load_sweep(minimal, ["resources={gpu=1, workers=4}"]).resources.workers == 4


def test_versions_are_registered_by_the_sweeps_name_unless_it_says_otherwise(minimal: Path) -> None:
    sweep = load_sweep(minimal)
    assert (sweep.model_name, sweep.register_front) == ("a", True)
    assert sweep.alias_budgets == (0.25, 0.5, 0.75)
    assert load_sweep(minimal, ['registered_model="deit-small"']).model_name == "deit-small"
    off = load_sweep(minimal, ["register_front=false", "alias_budgets=[]"])
    assert (off.register_front, off.alias_budgets) == (False, ())
    minimal.write_text(sweep_toml(off))
    assert load_sweep(minimal) == off


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('registered_model="a/b"', "registered_model is 'a/b'; string should match"),
        ("registered_model=false", "registered_model is False; input should be a valid string"),
        ("alias_budgets=[0.5, 1.0]", r"alias_budgets\.1 is 1\.0; input should be less than 1"),
        ("alias_budgets=[0.0]", r"alias_budgets\.0 is 0\.0; input should be greater than 0"),
    ],
)
def test_impossible_registrations_are_refused(setting: str, message: str, minimal: Path) -> None:
    with pytest.raises(SweepError, match=message):
        load_sweep(minimal, [setting])


@pytest.mark.parametrize(
    ("line", "low", "high"),
    [("budget_gmacs = [2, 4.6]", 2.0, 4.6), ("budget_gmacs = [0.1, 20.0]", 0.1, 20.0)],
)
def test_a_budget_in_gmacs(line: str, low: float, high: float, minimal: Path) -> None:
    minimal.write_text(minimal.read_text().replace("budget = [0.3, 0.8]", line))
    sweep = load_sweep(minimal)
    assert (sweep.budget, sweep.budget_of) == (None, None)
    assert (sweep.budget_gmacs.low, sweep.budget_gmacs.high) == (low, high)
    minimal.write_text(sweep_toml(sweep))
    assert load_sweep(minimal) == sweep


@pytest.mark.parametrize(
    ("value", "names"),
    [("'deit_small_patch16_224'", ("deit_small_patch16_224",)), ("['a', 'b']", ("a", "b"))],
)
def test_a_budget_of_other_models(value: str, names: tuple[str, ...], minimal: Path) -> None:
    sweep = load_sweep(minimal, [f"budget_of={value}"])
    assert sweep.budget_of == names
    minimal.write_text(sweep_toml(sweep))
    assert load_sweep(minimal) == sweep


def test_a_sweep_has_one_budget(minimal: Path) -> None:
    text = minimal.read_text()
    minimal.write_text(text + "budget_gmacs = [2.0, 4.6]\n")
    with pytest.raises(SweepError, match="the sweep has budget and budget_gmacs; give one of them"):
        load_sweep(minimal)
    minimal.write_text(text.replace("budget = [0.3, 0.8]", ""))
    with pytest.raises(
        SweepError, match=r"has no budget; give .* or one of budget_gmacs, budget_of"
    ):
        load_sweep(minimal)


def test_a_budget_that_is_set_replaces_the_files(minimal: Path) -> None:
    sweep = load_sweep(minimal, ["budget_gmacs=[2.0, 4.6]", "budget_of='a'"])
    assert (sweep.budget, sweep.budget_gmacs, sweep.budget_of) == (None, None, ("a",))
    sweep = load_sweep(minimal, ["budget_of='a'", "budget=[0.2, 0.4]"])
    assert (sweep.budget.low, sweep.budget_of) == (0.2, None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "budget_gmacs=[4.6, 2.0]",
            r"budget_gmacs is impossible: \[4\.6, 2\.0\]; give 1e9 multiply",
        ),
        ("budget_gmacs=[0.0, 2.0]", "budget_gmacs is impossible"),
        ("budget_gmacs=[1.0, inf]", "budget_gmacs is impossible"),
        ("budget_gmacs=2.0", r"budget_gmacs is 2\.0; "),
        ("budget_gmacs=[2.0]", "budget_gmacs needs two numbers"),
        ("budget_of=[]", r"budget_of is \[\]; tuple should have at least 1"),
        ("budget_of=['a', 'b', 'c']", "budget_of is .*; tuple should have at most 2"),
        ("budget_of=3", "budget_of is 3; "),
    ],
)
def test_impossible_absolute_budgets_are_refused(setting: str, message: str, minimal: Path) -> None:
    with pytest.raises(SweepError, match=message):
        load_sweep(minimal, [setting])


def test_an_absolute_budget_becomes_shares_once(minimal: Path) -> None:
    sweep = load_sweep(minimal, ["budget_gmacs=[2.0, 4.6]"])
    with pytest.raises(AssertionError, match="turns every budget into shares"):
        sweep.shares  # noqa: B018
    known = sweep.in_shares(0.25, 0.5)
    assert (known.shares.low, known.shares.high, known.budget_gmacs) == (0.25, 0.5, None)
    minimal.write_text(sweep_toml(known))
    assert load_sweep(minimal) == known
    assert load_sweep(minimal).in_shares(0.25, 0.5) == known
