from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from pruners import PrunableViT, cost_of, load_method
from pruners.methods.vit_slim import patches_kept, token_site
from pruners.model.sites import kind_of
from pruners.training.learner import LearningData, run
from tests.models import VARIANTS, images_for

PATCHES = {"patch_size": 4}  # 24 patches instead of 6
ALL = ("ragged_dim", "neuron", "token")


def fresh(vit, batches, **options):
    method = load_method("vit_slim", **options)
    return method, method.learner(copy.deepcopy(vit), LearningData.of(batches))


def spread_out(learner):
    """Give every mask a value of its own, some of heads and patches far below the others."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for z in [*learner.dims.values(), *learner.neurons.values()]:
            z.copy_(torch.rand(z.shape, generator=generator) + 0.1)
        for z in learner.patches.values():
            z.copy_(torch.randn(z.shape, generator=generator))
    return learner


def learned_from(vit, batches, **options):
    method, learner = fresh(vit, batches, **options)
    learned = spread_out(learner).conclude(LearningData.of(batches))
    return method, learned


def test_masks_start_at_one_and_those_of_patches_at_tanh_3(tiny, batches) -> None:
    vit, images = tiny(), images_for(tiny())
    _, learner = fresh(vit, batches)
    learner.set_gates()
    assert torch.equal(learner.vit(images), vit(images))
    assert [tuple(z.shape) for z in learner.dims.values()] == [(3, 8)] * 3
    assert [tuple(z.shape) for z in learner.neurons.values()] == [(96,)] * 3
    _, joint = fresh(vit, batches, units=ALL)
    joint.set_gates()
    difference = (joint.vit(images) - vit(images)).abs().max()
    assert 1e-6 < difference < 0.05
    assert [tuple(z.shape) for z in joint.patches.values()] == [(6,)] * 2


def test_the_penalty_has_the_papers_gradient(tiny, batches) -> None:
    _, learner = fresh(tiny(), batches, units=ALL, attn_pull=0.3, mlp_pull=0.2, patch_pull=0.1)
    spread_out(learner)
    with torch.no_grad():
        learner.dims["1"][2, 3] = -0.4
    learner.penalty().backward()
    # Each weight is spread over all masks of its kind: 3 x 24 dims, 3 x 96 neurons, 2 x 6 patches.
    for z, weight in ((learner.dims["1"], 0.3 / 72), (learner.neurons["0"], 0.2 / 288)):
        torch.testing.assert_close(z.grad, weight * z.detach().sign())
    z = learner.patches["2"]
    torch.testing.assert_close(z.grad, 0.1 / 12 * (1.0 - torch.tanh(z.detach()).square()))


def test_without_a_task_all_masks_shrink_alike(tiny, batches, monkeypatch) -> None:
    _, learner = fresh(tiny(), batches, travel=0.9, epochs=20)
    monkeypatch.setattr(F, "cross_entropy", lambda logits, labels: 0.0 * logits.sum())
    seen = []
    for _ in range(50):
        learner.step(*batches[0], 0.0)
        seen.append(learner.neurons["1"].detach().clone())
    steps = torch.stack(seen).diff(dim=0)
    torch.testing.assert_close(steps, torch.full_like(steps, -0.9 / 60), atol=1e-4, rtol=0)


def test_a_dead_neuron_falls_fastest_and_a_useful_one_stays(tiny) -> None:
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(5, (40, 16), generator=generator)
    noise = torch.randn(40, 16, 3, 24, 16, generator=generator)
    data = [(n + y.view(-1, 1, 1, 1) - 2.0, y) for n, y in zip(noise, labels, strict=True)]
    vit = tiny()
    method = load_method("vit_slim", epochs=1, mlp_pull=0.58, attn_pull=0.58, travel=0.6)
    warmed = copy.deepcopy(vit)
    optimizer = torch.optim.Adam(warmed.parameters(), lr=3e-3)
    for images, y in data[:30]:
        optimizer.zero_grad()
        F.cross_entropy(warmed(images), y).backward()
        optimizer.step()
    with torch.no_grad():
        fc1, fc2 = warmed.blocks[2].mlp.fc1, warmed.blocks[2].mlp.fc2
        fc2.weight[:, 7] = 0.0
        fc1.weight[7] = 0.0
        fc1.bias[7] = -20.0  # GELU of it is 0, so neither weights nor masks get a gradient
        norms = fc2.weight.norm(dim=0)
        useful = norms.argmax()
        fc2.weight[:, useful] *= 4.0
    learner = method.learner(warmed, LearningData.of(data))
    run(learner, LearningData.of(data), 1, seed=0)
    masks = learner.neurons["2"].detach()
    # Only neurons that do harm fall as fast or faster.
    assert masks[7] < masks.quantile(0.2)
    assert masks[useful] == masks.max()
    assert masks[useful] > masks.median() + 0.2


@pytest.mark.parametrize("fused", [True, False])
def test_one_mask_is_that_of_a_dim_in_q_k_and_v(fused: bool, tiny, batches) -> None:
    vit, images = tiny(), images_for(tiny())
    _, learner = fresh(vit, batches)
    with torch.no_grad():
        learner.dims["1"][2, 5] = 0.0
        row = 2 * 8 + 5
        for start in (0, 24, 48):  # q, k and v of width 3 x 8
            vit.blocks[1].attn.qkv.weight[start + row] = 0.0
            vit.blocks[1].attn.qkv.bias[start + row] = 0.0
    learner.set_gates()
    vit.use_fused_attention(fused)
    learner.vit.use_fused_attention(fused)
    torch.testing.assert_close(learner.vit(images), vit(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dims", ["ragged_dim", "dim", "head"])
def test_folded_masks_equal_soft_masks(dims: str, variant: str, tiny) -> None:
    vit = tiny(**VARIANTS[variant])
    images = images_for(vit)
    _, learner = fresh(vit, [(images, torch.zeros(3, dtype=torch.long))], units=(dims, "neuron"))
    spread_out(learner).set_gates()
    expected = learner.vit(images)
    learned = learner.conclude(LearningData.of([]))
    vit.vit.load_state_dict(dict(learned.weights))
    torch.testing.assert_close(vit(images), expected, atol=2e-5, rtol=1e-5)


def test_every_kind_keeps_its_share_over_the_whole_network_and_budgets_nest(tiny, batches) -> None:
    vit = tiny(**PATCHES)
    method, learned = learned_from(vit, batches, units=ALL)
    shape, dense = vit.shape(), cost_of(vit.shape()).effective_macs
    totals = {"ragged_dim": 72, "neuron": 288, "token": 48}
    before: dict[str, float] = {}
    for budget in (0.9, 0.7, 0.5):
        shares = method.allocate(shape, learned.scores, budget * dense)
        cut = dict.fromkeys(totals, 0.0)
        for site, share in shares.items():
            cut[kind_of(site)] += share * learned.scores[site].numel()
        steps = {k: round(v) for k, v in cut.items()}
        # int((1 - b) n) of each kind for one b
        low = max(steps[k] / n for k, n in totals.items())
        high = min((steps[k] + 1) / n for k, n in totals.items())
        assert low < high
        assert all(share >= before.get(site, 0.0) for site, share in shares.items())
        before = shares
    assert len({s for site, s in before.items() if "heads" in site}) > 3
    assert len({s for site, s in before.items() if site.endswith("neuron")}) == 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.0, 0.95), min_size=3, max_size=3), st.booleans())
def test_patches_leave_for_good(shares: list[float], headless: bool) -> None:
    from timm.models.vision_transformer import VisionTransformer

    vit = PrunableViT(
        VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=4, num_heads=2)
    )
    method = load_method("vit_slim", units=ALL)
    thresholds = {token_site(i): share for i, share in enumerate(shares)}
    if headless:
        thresholds |= {f"blocks.1.attn.heads.{h}.dim": 1.0 for h in (0, 1)}
    shape = vit.shape()
    thresholds = {s: t for s, t in thresholds.items() if s in method.sites(shape)}
    torch.manual_seed(0)
    scores = {site: torch.rand(units) for site, units in method.sites(shape).items()}
    predicted = method.shrink(shape, thresholds)
    method.cut(vit, scores, thresholds)
    assert vit.shape() == predicted
    tokens = [block.mlp_tokens for block in predicted.blocks]
    assert tokens == sorted(tokens, reverse=True)
    assert vit(torch.zeros(2, 3, 16, 16)).shape == (2, 1000)
    # What a block passes on is never less than its own share wants.
    for index, count in patches_kept(predicted, thresholds).items():
        assert count >= 16 - int(shares[index] * 16 + 0.5)
        assert 0 in vit.blocks[index].middle.index  # the class token


@pytest.mark.parametrize("variant", ["vit", "registers", "layer_scale"])
def test_leaving_equals_a_mask_on_the_keys_and_a_plain_gate_does_not(variant: str, tiny) -> None:
    vit = tiny(**VARIANTS[variant], **PATCHES)
    images, shape = images_for(vit), vit.shape()
    method = load_method("vit_slim", units=ALL)
    generator = torch.Generator().manual_seed(1)
    scores = {s: torch.rand(n, generator=generator) for s, n in method.sites(shape).items()}
    thresholds = {token_site(0): 0.3, token_site(1): 0.6}
    masked, gated = copy.deepcopy(vit), copy.deepcopy(vit)
    method.cut(vit, scores, thresholds)
    kept, here = {}, torch.arange(shape.blocks[0].tokens)
    for index in (0, 1):
        here = here[vit.blocks[index].middle.index]
        kept[index + 1] = torch.zeros(shape.blocks[0].tokens, dtype=torch.bool)
        kept[index + 1][here] = True

    def forward(model, keys: bool):
        x = model.vit.norm_pre(model.vit._pos_embed(model.vit.patch_embed(images)))
        for index, block in enumerate(model.blocks):
            keep = kept.get(index)
            y = block.norm1(x)
            if keep is not None and not keys:
                y = y * keep.unsqueeze(1)
            attn = block.attn
            q, k, v = attn.qkv(y).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
            bias = None
            if keep is not None and keys:
                bias = torch.zeros(len(keep)).masked_fill(~keep, float("-inf")).unsqueeze(0)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attn.scale)
            x = x + block.ls1(attn.proj(mixed.transpose(1, 2).flatten(2)))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return model.vit.forward_head(model.vit.norm(x))

    torch.testing.assert_close(vit(images), forward(masked, keys=True), atol=1e-5, rtol=0)
    assert (vit(images) - forward(gated, keys=False)).abs().max() > 1e-3


@pytest.mark.parametrize("multiple", [1, 4])
def test_ragged_surgery_equals_hard_masks_at_the_old_scale_only(
    multiple: int, tiny, batches
) -> None:
    vit, images = tiny(), images_for(tiny())
    method, learner = fresh(vit, batches, multiple=multiple)
    spread_out(learner)
    with torch.no_grad():
        learner.dims["1"][0] = 0.0  # a head that goes as a whole
    scores = learner.scores()
    shares = method.allocate(vit.shape(), scores, 0.6 * cost_of(vit.shape()).effective_macs)
    assert shares["blocks.1.attn.heads.0.dim"] == 1.0
    predicted = method.shrink(vit.shape(), shares)
    with torch.no_grad():  # hard masks of exactly what the cut keeps
        for index in range(3):
            for head in range(3):
                site = f"blocks.{index}.attn.heads.{head}.dim"
                gone = scores[site].argsort()[: round(shares[site] * 8)]
                learner.dims[str(index)][head] = torch.ones(8).index_fill(0, gone, 0.0)
            order = scores[f"blocks.{index}.mlp.neuron"].argsort()
            gone = order[: 96 - predicted.blocks[index].hidden]
            learner.neurons[str(index)].copy_(torch.ones(96).index_fill(0, gone, 0.0))
    learner.set_gates()
    expected = learner.vit(images)
    method.cut(vit, scores, shares)
    assert vit.shape() == predicted
    assert len({block.v_dim for block in predicted.blocks}) > 1 or multiple == 4
    torch.testing.assert_close(vit(images), expected, atol=1e-5, rtol=0)
    for block in vit.blocks:
        block.attn.scale = block.attn.qk_dim**-0.5
    if any(block.attn.qk_dim < 8 for block in vit.blocks):
        assert (vit(images) - expected).abs().max() > 1e-3


def test_at_no_cut_costs_are_counted_ones_and_a_share_saves_that_share(tiny, batches) -> None:
    vit = tiny(**PATCHES)
    method, learned = learned_from(vit, batches)
    shape = vit.shape()
    vit.use_fused_attention(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vit(images_for(vit, 1))
    dense = counter.get_total_flops() / 2
    assert cost_of(method.shrink(shape, {})).macs == dense
    shares = method.allocate(shape, learned.scores, 0.6 * dense)
    kept = [1.0 - share for share in shares.values()]
    pruned = cost_of(method.shrink(shape, shares))
    blocks = (pruned.effective_macs - 24 * 3 * 16 * 24) / (dense - 24 * 3 * 16 * 24)
    assert sum(kept) / len(kept) == pytest.approx(blocks, abs=0.06)


def test_a_model_with_chosen_patches_survives_saving(tiny, batches, tmp_path) -> None:
    vit = tiny(**PATCHES)
    method, learned = learned_from(vit, batches, units=ALL)
    shares = method.allocate(vit.shape(), learned.scores, 0.5 * cost_of(vit.shape()).macs)
    method.cut_learned(vit, learned, shares)
    assert vit.shape().blocks[1].mlp_tokens < 25
    vit.save(tmp_path)
    again, images = PrunableViT.load(tmp_path).eval(), images_for(vit)
    assert again.shape() == vit.shape()
    assert torch.equal(again(images), vit(images))


def test_wrong_options_are_refused() -> None:
    for option in ("attn_pull", "mlp_pull", "patch_pull"):
        with pytest.raises(ValueError, match=f"option {option} of vit_slim is -1"):
            load_method("vit_slim", **{option: -1.0})
    with pytest.raises(ValueError, match="option travel of vit_slim is 0"):
        load_method("vit_slim", travel=0.0)
    with pytest.raises(ValueError, match="overlap"):
        load_method("vit_slim", units=("ragged_dim", "head"))
