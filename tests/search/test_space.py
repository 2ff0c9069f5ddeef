from __future__ import annotations

import optuna
import pytest
import torch

from pruners import cost_of, load_method
from search.space import OutOfReachError, Space
from search.space_step import Rung
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


LEARNED = 'steps=[{method="x_pruner"}, {method="vit_slim"}, {method="evit"}, {method="magnitude"}]'


def learned_scores(label: str, shape) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(label))
    sites = load_method(label).sites(shape)
    return {s: torch.rand(n, generator=generator) - 0.4 for s, n in sites.items()}


@pytest.fixture
def learned_space(sweep_file, tiny) -> Space:
    shape = tiny(patch_size=4).shape()
    learned = {
        "x_pruner": [
            Rung(
                pruner=load_method("x_pruner", budget=budget),
                scores=learned_scores("x_pruner", shape),
                path=f"x{budget}",
            )
            for budget in (0.4, 0.8)
        ],
        "vit_slim": [
            Rung(
                pruner=load_method("vit_slim"),
                scores=learned_scores("vit_slim", shape),
                path="slim",
            )
        ],
    }
    return Space(load_sweep(sweep_file, [LEARNED]), shape, learned)


def test_first_plans_are_what_each_learning_method_proposes_itself(learned_space: Space) -> None:
    found = [learned_space.propose(p) for p in learned_space.ladder()]
    first = [[s.pruner.name for s in p.plan.steps if s.active] for p in found]
    rest = ["evit", "magnitude"]
    assert first == [
        ["x_pruner"],
        ["vit_slim"],
        ["x_pruner", *rest],
        ["x_pruner"],
        ["vit_slim"],
        ["vit_slim", *rest],
    ]
    assert [p.learned for p in found] == ["x0.4", "slim", "x0.4", "x0.8", "slim", "slim"]
    dense = learned_space.dense
    for label, budget, proposal in (("x_pruner", 0.5, found[0]), ("vit_slim", 0.9, found[4])):
        method = load_method(label)
        macs = budget * cost_of(dense).effective_macs
        own = method.allocate(dense, learned_scores(label, dense), macs)
        step = next(s for s in proposal.plan.steps if s.active)
        # The scale that meets the budget best is 1, up to what one unit of each site costs.
        shapes = [method.shrink(dense, shares).blocks for shares in (step.thresholds, own)]
        for one, other in zip(*shapes, strict=True):
            assert (one.heads, one.v_dim) == (other.heads, other.v_dim)
            assert abs(one.hidden - other.hidden) <= 2


def test_methods_that_learn_are_alternatives(learned_space: Space) -> None:
    found = proposals(learned_space, 60)
    seen = set()
    for proposal in found:
        active = [s.pruner.name for s in proposal.plan.steps if s.active]
        learners = [name for name in active if name in ("x_pruner", "vit_slim")]
        assert len(learners) <= 1
        assert active[: len(learners)] == learners
        assert bool(proposal.learned) == bool(learners)
        seen |= set(learners or ["none"])
        assert 0.5 <= proposal.cost_ratio <= 0.9
    assert seen == {"x_pruner", "vit_slim", "none"}


def test_deviations_turn_a_proposal_towards_one_end_of_the_network(learned_space: Space) -> None:
    base = learned_space.ladder()[0]

    def neurons(slope: float) -> list[int]:
        proposal = learned_space.propose({**base, "x_pruner.slope": slope})
        assert proposal.cost_ratio == pytest.approx(0.5, abs=0.03)
        return [b.hidden for b in proposal.plan.shape(learned_space.dense).blocks]

    first, own, last = neurons(-0.8), neurons(0.0), neurons(0.8)
    assert first[0] < own[0] < last[0]
    assert first[2] > own[2] > last[2]


def test_a_block_goes_only_where_the_method_itself_removes_it(sweep_file, tiny) -> None:
    shape = tiny(patch_size=4).shape()
    method = load_method("wdpruning")
    scores = learned_scores("wdpruning", shape) | {
        f"blocks.{i}.block": torch.tensor([m]) for i, m in enumerate((0.5, 0.3, -0.2))
    }
    rung = Rung(pruner=method, scores=scores, path="w")
    sweep = load_sweep(sweep_file, ['steps=[{method="wdpruning"}, {method="magnitude"}]'])
    space = Space(sweep, shape, {"wdpruning": [rung]})
    alone = space.propose(space.ladder()[0])  # half of the cost: the last of three blocks can go
    assert [b.heads > 0 for b in alone.plan.shape(shape).blocks] == [True, True, False]
    wide = space.propose({**space.ladder()[0], "budget": 0.88})
    assert all(b.heads and b.hidden for b in wide.plan.shape(shape).blocks)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ('{method="grouped"}, {method="x_pruner"}', "give those that learn first: x_pruner"),
        ('{method="grouped", space="residual"}', "'residual'; give 'tied' or 'layer'"),
        ('{method="vit_slim", budgets=[0.5]}', "vit_slim does not learn for a budget"),
        ('{method="x_pruner", thresholds="global", budgets=[0.5]}', "does not learn for a budget"),
        ('{method="vit_slim"}, {method="grouped"}', "which may leave heads of different widths"),
        (
            '{method="x_pruner"}, {method="vit_slim", units=["token"]}, {method="evit"}',
            "do not go together: evit got a model with reduced tokens",
        ),
        ('{method="x_pruner", budgets=[0.0]}', "option budget of x_pruner is 0.0"),
    ],
)
def test_steps_that_learn_are_checked(steps: str, message: str, sweep_file, tiny) -> None:
    with pytest.raises(SweepError, match=message):
        Space(load_sweep(sweep_file, [f"steps=[{steps}]"]), tiny().shape())
