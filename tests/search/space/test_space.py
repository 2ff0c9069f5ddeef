from __future__ import annotations

import optuna
import pytest
import torch

from pruners import cost_of, load_method
from search.space.allocation import own_allocation
from search.space.build import build_space
from search.space.deviating import ResidualStep
from search.space.space import OutOfReachError, Space
from search.space.step import Rung
from search.sweep.spec import SweepError
from search.sweep.toml import load_sweep

optuna.logging.set_verbosity(optuna.logging.WARNING)

MIXED = 'steps=[{method="grouped"}, {method="evit"}, {method="magnitude"}]'


def rungs_of(sweep, vit, batches) -> dict[str, list[Rung]]:
    """What is known of the steps' methods on a dense model."""
    shape, found = vit.shape(), {}
    for label, spec in zip(sweep.labels, sweep.steps, strict=True):
        method = load_method(spec.method, **spec.options)
        scores = method.score(vit, batches)
        own = own_allocation(method, shape, scores, spec.max_share)
        found[label] = [Rung(pruner=method, own=own, path=label if scores else "")]
    return found


def known_space(sweep, vit, batches) -> Space:
    return build_space(sweep, vit.shape()).measured(rungs_of(sweep, vit, batches))


@pytest.fixture
def space(sweep_file, tiny, batches) -> Space:
    return known_space(load_sweep(sweep_file, [MIXED]), tiny(), batches)


def proposals(space: Space, count: int) -> list:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    found = []
    for _ in range(count):
        try:
            found.append(space.propose(space.sample(study.ask())))
        except OutOfReachError:
            continue
    return found


def actives(proposal) -> list[str]:
    return [step.pruner.name for step in proposal.plan.steps if step.active]


@pytest.mark.slow
@pytest.mark.parametrize("cost", ["effective_gmacs", "gmacs", "latency"])
@pytest.mark.parametrize("kind", ["tied", "layer", "residual"])
def test_every_plan_meets_its_budget(cost: str, kind: str, sweep_file, tiny, batches) -> None:
    sets = [
        f'cost="{cost}"',
        f'steps=[{{method="grouped", space="{kind}"}}, {{method="tome"}}, '
        f'{{method="magnitude", space="{kind}"}}]',
    ]
    sweep, vit = load_sweep(sweep_file, sets), tiny(patch_size=2)
    space, dense = known_space(sweep, vit, batches_for(vit)), vit.shape()
    found = proposals(space, 40)
    assert len(found) >= 38
    name = "effective_macs" if cost == "effective_gmacs" else "macs"
    for proposal in found:
        ratio = getattr(cost_of(proposal.plan.shape(dense)), name) / getattr(cost_of(dense), name)
        assert 0.5 <= ratio <= 0.9
        assert ratio == pytest.approx(proposal.cost_ratio)
        # Neurons or weights are fine enough to meet the budget; tokens alone are not.
        fine = {"grouped", "magnitude"} if name == "effective_macs" else {"grouped"}
        if fine & set(actives(proposal)):
            assert ratio == pytest.approx(proposal.parameters["budget"], rel=0.01)


def batches_for(vit) -> list:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(4, 3, *vit.shape().image, generator=generator), torch.arange(4))]


def test_alone_and_without_deviations_a_step_is_the_methods_own_allocation(
    sweep_file, tiny
) -> None:
    vit = tiny(patch_size=2)
    sweep = load_sweep(sweep_file, [MIXED.replace("evit", "tome"), "alone=3"])
    space = known_space(sweep, vit, batches_for(vit))
    dense = vit.shape()
    alone = [space.propose(parameters) for parameters in space.alone()]
    compared = 0
    assert [actives(p) for p in alone] == [["grouped"], ["tome"], ["magnitude"]] * 3
    for proposal in alone:
        step = next(s for s in proposal.plan.steps if s.active)
        scores = step.pruner.score(vit, batches_for(vit))
        macs = proposal.parameters["budget"] * cost_of(dense).effective_macs
        own = step.pruner.shrink(dense, step.pruner.allocate(dense, scores, macs))
        shape = proposal.plan.shape(dense)
        if cost_of(own).effective_macs < 0.99 * macs:  # whole heads: the budget is met by neurons
            continue
        compared += 1
        for one, other in zip(shape.blocks, own.blocks, strict=True):
            assert one.heads == other.heads
            assert abs(one.hidden - other.hidden) <= 1
            assert abs(one.mlp_tokens - other.mlp_tokens) <= 1
        for layer, kept in own.nonzero.items():
            assert shape.nonzero[layer] == pytest.approx(kept, rel=0.02)
    assert compared >= 6


def test_the_budget_is_split_as_sampled(space: Space) -> None:
    def reached(split: float) -> float:
        parameters = {**space.ladder()[0], "budget": 0.6, "evit.split": 0.0}
        proposal = space.propose({**parameters, "grouped.split": split})
        return cost_of(
            proposal.plan.steps[0].pruner.shrink(space.dense, proposal.plan.steps[0].thresholds)
        ).macs

    much, half, little, none = (reached(split) for split in (1.0, 0.6, 0.3, 0.1))
    assert much < half < little < none == cost_of(space.dense).macs


def test_steps_are_mixed_freely(space: Space) -> None:
    mixes = {tuple(actives(p)) for p in proposals(space, 80)}
    assert ("grouped", "evit", "magnitude") in mixes
    assert len(mixes) >= 5


def test_the_space_is_static(space: Space) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=2))
    names = {frozenset(space.sample(study.ask())) for _ in range(20)}
    assert names == {frozenset({*space.ranges(), *space.choices()})}


def test_layer_space_has_a_parameter_per_site(sweep_file, tiny) -> None:
    sweep = load_sweep(sweep_file, ['steps=[{method="grouped", space="layer"}]'])
    parameters = build_space(sweep, tiny().shape()).ladder()[0]
    assert {f"grouped.blocks.{i}.{u}" for i in range(3) for u in ("attn.head", "mlp.neuron")} < set(
        parameters
    )


def test_site_by_site_it_is_the_same_plan(space: Space) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    finer = space.refined()
    for _ in range(20):
        parameters = space.sample(study.ask())
        try:
            proposal = space.propose(parameters)
        except OutOfReachError:
            continue
        again = finer.propose(space.by_site(parameters))
        assert again.plan == proposal.plan
        assert set(again.parameters) == {*finer.ranges(), *finer.choices()}
    assert len(finer.ranges()) > 2 * len(space.ranges())
    assert {type(step) for step in space.steps} == {ResidualStep}


WIDTH = 'steps=[{method="grouped", units=["head", "neuron", "width"], space="KIND"}]'


@pytest.mark.parametrize("kind", ["residual", "tied", "layer"])
def test_plans_with_a_width_meet_their_budget(kind: str, sweep_file, tiny, batches) -> None:
    sweep = load_sweep(sweep_file, [WIDTH.replace("KIND", kind)])
    space = known_space(sweep, tiny(), batches)
    found = proposals(space, 20)
    assert len(found) >= 18
    for proposal in found:
        assert cost_of(proposal.plan.shape(space.dense)).macs == pytest.approx(
            proposal.cost_ratio * space.dense_cost
        )
        assert proposal.cost_ratio == pytest.approx(proposal.parameters["budget"], rel=0.02)
    assert len({proposal.plan.shape(space.dense).dim for proposal in found}) >= 4
    for proposal in proposals(space.refined(), 3) if kind == "residual" else ():
        assert -2.0 <= proposal.parameters["grouped.width"] <= 2.0


def test_the_width_is_the_methods_own_and_deviates_from_it(sweep_file, tiny, batches) -> None:
    vit = tiny()
    space = known_space(load_sweep(sweep_file, [WIDTH.replace("KIND", "residual")]), vit, batches)
    dense, finer, dims = space.dense, space.refined(), []
    pruner = space.steps[0].pruner
    for budget in (0.5, 0.9):
        macs = budget * cost_of(dense).effective_macs
        own = pruner.shrink(dense, pruner.allocate(dense, pruner.score(vit, batches), macs))
        shape = space.propose({**space.ladder()[0], "budget": budget}).plan.shape(dense)
        assert abs(shape.dim - own.dim) <= 1
    for deviation in (-1.0, 0.0, 1.0):
        parameters = {**space.ladder()[0], "budget": 0.6, "grouped.width": deviation}
        proposal = space.propose(parameters)
        assert finer.propose(space.by_site(parameters)).plan == proposal.plan
        dims.append(proposal.plan.shape(dense).dim)
    assert dims[0] > dims[1] > dims[2]


@pytest.mark.parametrize("behind", ['method="dynamic_vit"', 'method="taylor", pattern="2:4"'])
def test_a_width_that_a_later_step_does_not_take_is_refused(behind: str, sweep_file, tiny) -> None:
    units = 'units=["neuron", "width"], multiple='
    steps = f'steps=[{{method="grouped", {units}2}}, {{{behind}}}]'
    with pytest.raises(SweepError, match=r"grouped has multiple = 2, and may leave a width that"):
        build_space(load_sweep(sweep_file, [steps]), tiny().shape())
    build_space(load_sweep(sweep_file, [steps.replace("2}, {", "4}, {")]), tiny().shape())


def test_the_slope_runs_over_the_depth(space: Space) -> None:
    def shares(slope: float) -> list[float]:
        parameters = {**space.ladder()[0], "budget": 0.6, "magnitude.slope": slope}
        parameters |= {"grouped.split": 0.0, "evit.split": 0.0}
        thresholds = space.propose(parameters).plan.steps[2].thresholds
        return [thresholds[f"blocks.{i}.mlp.fc1"] for i in range(3)]

    falling, own, rising = shares(-0.8), shares(0.0), shares(0.8)
    assert falling[0] > own[0] > rising[0]
    assert falling[2] < own[2] < rising[2]


def test_first_plans_span_the_budget_together_and_alone(sweep_file, tiny, batches) -> None:
    space = known_space(load_sweep(sweep_file, [MIXED, "alone=2"]), tiny(), batches)
    together = ["grouped", "evit", "magnitude"]
    ladder = [space.propose(parameters) for parameters in space.ladder()]
    assert [p.parameters["budget"] for p in ladder] == [0.5, 0.9]
    assert [actives(p) for p in ladder] == [together] * 2
    singles = [space.propose(parameters) for parameters in space.alone()]
    assert [p.parameters["budget"] for p in singles] == [0.5] * 3 + [0.9] * 3
    alone = [["grouped"], ["evit"], ["magnitude"]]
    assert [actives(p) for p in singles[3:]] == alone
    assert [actives(p) for p in singles[:3]] == [alone[0], together, alone[2]]  # evit ends before


@pytest.mark.parametrize(
    ("count", "places"),
    [(0, []), (1, [0.5]), (2, [0, 1]), (5, [0, 1, 0.5, 0.25, 0.75])],
)
def test_budgets_of_the_first_plans_go_from_coarse_to_fine(
    count: int, places: list[float], sweep_file, tiny
) -> None:
    sets = [MIXED, f"ladder={count}", f"alone={count}"]
    space = build_space(load_sweep(sweep_file, sets), tiny().shape())
    expected = pytest.approx([0.5 + 0.4 * place for place in places])
    assert [parameters["budget"] for parameters in space.ladder()] == expected
    assert [parameters["budget"] for parameters in space.alone()[::3]] == expected
    assert len(space.alone()) == 3 * count


def test_one_step_is_not_tried_alone_again(sweep_file, tiny) -> None:
    sweep = load_sweep(sweep_file, ['steps=[{method="magnitude"}]', "ladder=3", "alone=3"])
    space = build_space(sweep, tiny().shape())
    assert (len(space.ladder()), space.alone()) == (3, [])


def test_scores_are_handed_to_the_first_step_if_it_cuts_units(space: Space) -> None:
    for proposal in proposals(space, 40):
        assert proposal.scores == ("grouped" if actives(proposal)[0] == "grouped" else "")


def test_absent_steps_join_where_the_others_cannot_reach_the_budget(space: Space) -> None:
    nothing = {**space.ladder()[0], **{f"{s}.split": 0.0 for s in ("grouped", "evit", "magnitude")}}
    assert space.propose(nothing).plan == space.propose(space.ladder()[0]).plan


def test_a_budget_between_two_sizes_is_out_of_reach(sweep_file, tiny) -> None:
    steps = 'steps=[{method="grouped", units=["head"]}]'
    space = build_space(load_sweep(sweep_file, [steps, "budget=[0.851, 0.852]"]), tiny().shape())
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
        build_space(load_sweep(sweep_file, [override]), tiny().shape())


@pytest.mark.parametrize("steps", [MIXED, 'steps=[{method="grouped", max_share=1.0}]'])
def test_measured_methods_cut_at_least_as_far(steps: str, sweep_file, tiny, batches) -> None:
    """A budget that was in reach before methods were measured is not checked again."""
    sweep, vit = load_sweep(sweep_file, [steps]), tiny()
    space = build_space(sweep, vit.shape())
    measured = space.measured(rungs_of(sweep, vit, batches))
    parameters = space.neutral(space.low, 0)
    assert measured.plans(parameters).least_cost() <= space.plans(parameters).least_cost()


def test_masks_cannot_meet_a_budget_of_dense_kernels(sweep_file, tiny) -> None:
    sweep = load_sweep(sweep_file, ['cost="gmacs"', 'steps=[{method="magnitude"}]'])
    with pytest.raises(SweepError, match=r"these steps reach 1\.000"):
        build_space(sweep, tiny().shape())


def test_whole_branches_may_go_where_allowed(sweep_file, tiny) -> None:
    sweep = load_sweep(
        sweep_file, ['steps=[{method="grouped", max_share=1.0}]', "budget=[0.3, 0.5]"]
    )
    space = build_space(sweep, tiny().shape())
    shapes = [p.plan.shape(tiny().shape()) for p in proposals(space, 60)]
    assert any(block.heads == 0 or block.hidden == 0 for shape in shapes for block in shape.blocks)


def test_a_ramp_longer_than_the_fine_tuning_is_refused(sweep_file, tiny) -> None:
    steps = 'steps=[{method="cap", ramp_epochs=2}]'
    with pytest.raises(
        SweepError, match=r"ramp_epochs of step cap is 2; give at most .* epochs, 1"
    ):
        build_space(load_sweep(sweep_file, [steps]), tiny().shape())


LEARNED = 'steps=[{method="x_pruner"}, {method="vit_slim"}, {method="evit"}, {method="magnitude"}]'


def learned_scores(label: str, shape) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(label))
    sites = load_method(label).sites(shape)
    return {s: torch.rand(n, generator=generator) - 0.4 for s, n in sites.items()}


def learned_rung(method, shape, path: str) -> Rung:
    scores = learned_scores(method.name, shape)
    return Rung(pruner=method, own=own_allocation(method, shape, scores, 0.9), path=path)


@pytest.fixture
def learned_space(sweep_file, tiny) -> Space:
    shape = tiny(patch_size=4).shape()
    learned = {
        "x_pruner": [
            learned_rung(load_method("x_pruner", budget=budget), shape, f"x{budget}")
            for budget in (0.4, 0.8)
        ],
        "vit_slim": [learned_rung(load_method("vit_slim"), shape, "slim")],
    }
    return build_space(load_sweep(sweep_file, [LEARNED, "alone=2"]), shape).measured(learned)


def test_first_plans_are_what_each_learning_method_proposes_itself(learned_space: Space) -> None:
    together = [learned_space.propose(p) for p in learned_space.ladder()]
    found = [learned_space.propose(p) for p in learned_space.alone()]
    rest = ["evit", "magnitude"]
    assert [actives(p) for p in together] == [["x_pruner", *rest], ["vit_slim", *rest]]
    assert [actives(p) for p in found[:2]] == [["x_pruner"], ["vit_slim"]]
    assert [p.scores for p in (*together, *found[:2])] == ["x0.4", "slim", "x0.4", "slim"]
    alone = {(*actives(p), p.parameters["budget"]): p for p in found if len(actives(p)) == 1}
    assert alone["x_pruner", 0.9].scores == "x0.8"
    dense = learned_space.dense
    for label, budget in (("x_pruner", 0.5), ("vit_slim", 0.9)):
        method = load_method(label)
        macs = budget * cost_of(dense).effective_macs
        own = method.allocate(dense, learned_scores(label, dense), macs)
        step = next(s for s in alone[label, budget].plan.steps if s.active)
        shapes = [method.shrink(dense, shares).blocks for shares in (step.thresholds, own)]
        for one, other in zip(*shapes, strict=True):
            assert (one.heads, one.v_dim) == (other.heads, other.v_dim)
            assert abs(one.hidden - other.hidden) <= 2


def test_methods_that_learn_are_alternatives(learned_space: Space) -> None:
    found = proposals(learned_space, 60)
    seen = set()
    for proposal in found:
        active = actives(proposal)
        learners = [name for name in active if name in ("x_pruner", "vit_slim")]
        assert len(learners) <= 1
        assert active[: len(learners)] == learners
        assert bool(proposal.scores) == bool(learners)
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
    own = own_allocation(method, shape, scores, 0.9)
    rung = Rung(pruner=method, own=own, path="w")
    steps = 'steps=[{method="wdpruning"}, {method="magnitude"}]'
    sweep = load_sweep(sweep_file, [steps, "alone=2"])
    space = build_space(sweep, shape).measured({"wdpruning": [rung]})
    alone = space.propose(space.alone()[0])  # half of the cost: the last of three blocks can go
    assert [b.heads > 0 for b in alone.plan.shape(shape).blocks] == [True, True, False]
    wide = space.propose({**space.alone()[0], "budget": 0.88})
    assert all(b.heads and b.hidden for b in wide.plan.shape(shape).blocks)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ('{method="grouped"}, {method="x_pruner"}', "give those that learn first: x_pruner"),
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
        build_space(load_sweep(sweep_file, [f"steps=[{steps}]"]), tiny().shape())
