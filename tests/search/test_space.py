from __future__ import annotations

import optuna
import pytest

from pruners import cost_of
from search.space import OutOfReachError, Space
from search.sweep import SweepError, load_sweep

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture
def space(sweep_file, tiny) -> Space:
    return Space(load_sweep(sweep_file), tiny().shape())


def proposals(space: Space, count: int) -> list:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    found = []
    for _ in range(count):
        try:
            found.append(space.propose(space.sample(study.ask())))
        except OutOfReachError:
            continue
    return found


@pytest.mark.parametrize("cost", ["effective_gmacs", "gmacs"])
@pytest.mark.parametrize("kind", ["tied", "layer"])
def test_every_plan_lies_within_the_budget(cost: str, kind: str, sweep_file, tiny) -> None:
    sets = [
        f'cost="{cost}"',
        f'steps=[{{method="grouped", space="{kind}"}}, {{method="evit"}}, '
        f'{{method="magnitude", space="{kind}"}}]',
    ]
    sweep, dense = load_sweep(sweep_file, sets), tiny().shape()
    space = Space(sweep, dense)
    found = proposals(space, 40)
    assert len(found) >= 20
    whole = getattr(cost_of(dense), cost)
    for proposal in found:
        ratio = getattr(cost_of(proposal.plan.shape(dense)), cost) / whole
        assert 0.5 <= ratio <= 0.9
        assert ratio == pytest.approx(proposal.cost_ratio)


def test_plans_follow_the_sampled_budget(space: Space) -> None:
    # With masked weights in the plan the cost is fine-grained enough to be met closely.
    parameters = space.ladder()[0]
    for step in ("grouped", "evit"):
        parameters[f"{step}.present"] = False
    for budget in (0.55, 0.7, 0.85):
        proposal = space.propose({**parameters, "budget": budget})
        assert proposal.cost_ratio == pytest.approx(budget, abs=0.002)
        assert [step.active for step in proposal.plan.steps] == [False, False, True]


def test_steps_are_mixed_freely(space: Space) -> None:
    mixes = {tuple(step.active for step in p.plan.steps) for p in proposals(space, 80)}
    assert (True, True, True) in mixes
    assert len(mixes) >= 5


def test_the_space_is_static(space: Space) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=2))
    names = {frozenset(space.sample(study.ask())) for _ in range(20)}
    assert len(names) == 1


def test_layer_space_has_a_parameter_per_site(sweep_file, tiny) -> None:
    sweep = load_sweep(sweep_file, ['steps=[{method="grouped", space="layer"}]'])
    parameters = Space(sweep, tiny().shape()).ladder()[0]
    assert {f"grouped.blocks.{i}.{u}" for i in range(3) for u in ("attn.head", "mlp.neuron")} < set(
        parameters
    )


def test_the_slope_runs_over_the_depth(space: Space) -> None:
    parameters = {
        **space.ladder()[1],
        "evit.present": False,
        "grouped.present": False,
        "magnitude.slope": 0.8,
    }
    thresholds = space.propose(parameters).plan.steps[2].thresholds
    shares = [thresholds[f"blocks.{i}.mlp.fc1"] for i in range(3)]
    assert shares[0] < shares[1] < shares[2]
    assert shares[1] == pytest.approx((shares[0] + shares[2]) / 2)


def test_the_ladder_is_uniform_and_spans_the_budget(space: Space) -> None:
    ladder = [space.propose(parameters) for parameters in space.ladder()]
    assert [p.parameters["budget"] for p in ladder] == [0.5, 0.9]
    for proposal in ladder:
        shares = {share for step in proposal.plan.steps for share in step.thresholds.values()}
        assert len(shares) == 1


def test_absent_steps_join_where_the_others_cannot_reach_the_budget(space: Space) -> None:
    nothing = {
        **space.ladder()[0],
        **{f"{s}.present": False for s in ("grouped", "evit", "magnitude")},
    }
    proposal = space.propose(nothing)
    assert proposal.plan == space.propose(space.ladder()[0]).plan
    assert proposal.parameters["evit.present"]


def test_a_budget_between_two_sizes_is_out_of_reach(sweep_file, tiny) -> None:
    steps = 'steps=[{method="grouped", units=["head"]}]'
    space = Space(load_sweep(sweep_file, [steps, "budget=[0.851, 0.852]"]), tiny().shape())
    with pytest.raises(OutOfReachError, match=r"between 0\.851 and 0\.852"):
        space.propose(space.ladder()[0])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget=[0.001, 0.5]", r"budget is \[0\.001, 0\.5\] .* these steps reach 0\.\d+"),
        (
            'steps=[{method="grouped", unts=["head"]}]',
            "option 'unts' of grouped is unknown; it takes units",
        ),
        ('steps=[{method="grouped", units=["heads"]}]', r"units of grouped is \['heads'\]"),
        (
            'steps=[{method="magnitude"}, {method="grouped"}]',
            "give them in the order unit, token, weight",
        ),
        ('steps=[{method="evit", max_share=1.0}]', "max_share of step evit is 1; give less than 1"),
    ],
)
def test_impossible_spaces_are_refused(override: str, message: str, sweep_file, tiny) -> None:
    with pytest.raises(SweepError, match=message):
        Space(load_sweep(sweep_file, [override]), tiny().shape())


def test_masks_cannot_meet_a_budget_of_dense_kernels(sweep_file, tiny) -> None:
    sweep = load_sweep(sweep_file, ['cost="gmacs"', 'steps=[{method="magnitude"}]'])
    with pytest.raises(SweepError, match=r"these steps reach 1\.000"):
        Space(sweep, tiny().shape())


def test_whole_branches_may_go_where_allowed(sweep_file, tiny) -> None:
    sweep = load_sweep(
        sweep_file, ['steps=[{method="grouped", max_share=1.0}]', "budget=[0.3, 0.5]"]
    )
    space = Space(sweep, tiny().shape())
    shapes = [p.plan.shape(tiny().shape()) for p in proposals(space, 60)]
    assert any(block.heads == 0 or block.hidden == 0 for shape in shapes for block in shape.blocks)


def test_a_ramp_longer_than_the_fine_tuning_is_refused(sweep_file, tiny) -> None:
    steps = 'steps=[{method="cap", ramp_epochs=2}]'
    with pytest.raises(
        SweepError, match=r"ramp_epochs of step cap is 2; give at most .* epochs, 1"
    ):
        Space(load_sweep(sweep_file, [steps]), tiny().shape())
