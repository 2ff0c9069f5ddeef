from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pruners import PrunableViT, load_method
from pruners.model.types import Thresholds
from pruners.training.evaluation import evaluate
from pruners.training.fine_tune import FineTuner
from pruners.training.recipe import Recipe
from tests.models import TINY, images_for

THREE = {"blocks.1.token": 0.3, "blocks.2.token": 0.3, "blocks.3.token": 0.3}
PLAIN = Recipe(epochs=2, distill=0.0, precision="float32")


def cut(vit: PrunableViT, thresholds: Thresholds, **options: object) -> PrunableViT:
    blocks = [int(site.split(".")[1]) for site in thresholds]
    load_method("dynamic_vit", blocks=blocks, **options).cut(vit, {}, thresholds)
    return vit


def selector_parameters(vit: PrunableViT) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in vit.named_parameters() if ".front." in n}


def backbone_parameters(vit: PrunableViT) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in vit.named_parameters() if ".front." not in n}


@pytest.mark.slow
def test_the_ratio_loss_alone_leads_to_the_target(tiny) -> None:
    vit = cut(tiny(img_size=(80, 80), depth=4).requires_grad_(False), THREE)  # 100 patches
    fronts = [block.front for block in vit.blocks[1:]]
    with torch.no_grad():
        for front in fronts:
            front.judge[4].bias.zero_()  # the paper's start: one half
    images = images_for(vit, 4)
    optimizer = torch.optim.Adam([p for f in fronts for p in f.parameters()], lr=1e-2)
    vit.train()
    for _ in range(100):
        optimizer.zero_grad()
        vit.aux_loss(vit.tokens(images)).backward()
        optimizer.step()
    with torch.no_grad():
        draws = [torch.stack(vit.tokens(images).decisions).mean(dim=(1, 2)) for _ in range(20)]
    shares = torch.stack(draws).mean(dim=0).tolist()
    assert shares == pytest.approx([0.7, 0.49, 0.343], abs=0.02)


def test_backbone_waits_for_the_selectors(tiny, batches) -> None:
    vit = cut(tiny(depth=4), {"blocks.1.token": 0.3, "blocks.2.token": 0.5})
    recipe = Recipe(
        epochs=30, lr=1e-5, selector_lr=1e-3, selector_alone=5 / 30, distill=0, precision="float32"
    )
    tuner = FineTuner(vit, recipe, steps_per_epoch=len(batches))
    start, fixed = backbone_parameters(vit), ("vit.cls_token", "vit.pos_embed")
    for epoch in range(8):
        before = selector_parameters(vit)
        tuner.train_epoch(batches)
        moved = {n: not torch.equal(p, start[n]) for n, p in backbone_parameters(vit).items()}
        assert not any(moved[name] for name in fixed)
        assert any(moved.values()) == (epoch >= 5)
        if epoch >= 5:
            assert all(moved[name] for name in moved if name not in fixed)
            backbone_lr, _, selector_lr, _ = (g["lr"] for g in tuner.optimizer.param_groups)
            assert backbone_lr / selector_lr == pytest.approx(0.01)
        for name, parameter in selector_parameters(vit).items():
            assert not torch.equal(parameter, before[name]), name


def test_selectors_settle_and_the_model_sees_what_they_keep(tiny, batches) -> None:
    vit = cut(tiny(depth=4), {"blocks.1.token": 0.3, "blocks.2.token": 0.5})
    recipe = Recipe(epochs=3, selector_settle=1 / 3, distill=0, precision="float32")
    tuner = FineTuner(vit, recipe, steps_per_epoch=len(batches))
    seen: list[int] = []
    hook = vit.blocks[3].mlp.register_forward_hook(lambda m, i, o: seen.append(i[0].shape[1]))
    for epoch in range(3):
        selectors, backbone = selector_parameters(vit), backbone_parameters(vit)
        tuner.train_epoch(batches)
        settled = epoch == 2
        for name, parameter in selector_parameters(vit).items():
            assert torch.equal(parameter, selectors[name]) == settled, name
        moved = [not torch.equal(p, backbone[n]) for n, p in backbone_parameters(vit).items()]
        assert any(moved)
        full, left = 7, vit.shape().blocks[3].tokens
        assert set(seen) == {left if settled else full}
        seen.clear()
    hook.remove()
    vit.train()  # a new run draws again
    assert vit.tokens(images_for(vit)).decisions


def test_the_teachers_dropped_patches_and_prefix_do_not_matter(tiny) -> None:
    vit = cut(tiny(img_size=(48, 32), depth=4), THREE)
    images = images_for(vit)
    with torch.no_grad():
        tokens = vit.train().tokens(images)
        taught = tiny(img_size=(48, 32), depth=4).tokens(images)
        loss, kept = vit.aux_loss(tokens, taught), tokens.policy == 1.0
        kept[:, 0] = False
        elsewhere = taught.x + torch.randn_like(taught.x).masked_fill(kept.unsqueeze(-1), 0.0)
        assert torch.equal(vit.aux_loss(tokens, taught._replace(x=elsewhere)), loss)
        nearby = taught.x + torch.randn_like(taught.x).masked_fill(~kept.unsqueeze(-1), 0.0)
        assert (vit.aux_loss(tokens, taught._replace(x=nearby)) - loss).abs() > 1e-3


def test_the_whole_loss_written_out(tiny) -> None:
    vit = cut(tiny(img_size=(48, 32), depth=4), THREE, ratio_weight=5.0, token_weight=0.25)
    images = images_for(vit)
    with torch.no_grad():
        tokens, taught = vit.train().tokens(images), tiny(img_size=(48, 32), depth=4).tokens(images)
        loss = vit.aux_loss(tokens, taught)
    ratio, squares = 0.0, []
    for decision, count in zip(tokens.decisions, (16, 11, 8), strict=True):
        for image in range(3):
            ratio += (count / 24 - decision[image].sum() / 24) ** 2 / (3 * 3)
    for image in range(3):
        for patch in range(24):
            if tokens.decisions[-1][image, patch] == 1.0:
                errors = tokens.x[image, 1 + patch] - taught.x[image, 1 + patch]
                squares.append(errors.square().mean())
    torch.testing.assert_close(loss, 5.0 * ratio + 0.25 * torch.stack(squares).mean())


def test_a_trained_model_survives_saving(tiny, batches, tmp_path) -> None:
    vit = cut(tiny(depth=4), {"blocks.1.token": 0.3, "blocks.3.token": 0.5}, ratio_weight=5.0)
    FineTuner(vit, PLAIN, steps_per_epoch=3).train_epoch(batches)
    vit.eval().save(tmp_path / "model")
    again = PrunableViT.load(tmp_path / "model").eval()
    again.use_fused_attention(False)  # as the fine-tuner leaves it on CPUs
    for (name, ours), theirs in zip(
        vit.named_parameters(), dict(again.named_parameters()).values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
        assert ours.requires_grad == theirs.requires_grad, name
    assert torch.equal(again(batches[0][0]), vit(batches[0][0]))
    assert again.token_loss == vit.token_loss


def test_a_distilled_model_trains(batches) -> None:
    vit = cut(PrunableViT(VisionTransformerDistilled(**TINY)), {"blocks.1.token": 0.4})
    before = vit.vit.dist_token.clone()
    loss = FineTuner(vit, PLAIN, steps_per_epoch=3).train_epoch(batches)
    assert loss > 0.0
    assert torch.equal(vit.vit.dist_token, before)
    assert vit.eval().tokens(batches[0][0]).x.shape[1] == 2 + 3


def marked_patches(count: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of images, labels and where the one patch is, of 24, that says the class; [B, 24]."""
    templates = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        labels = torch.randint(4, (64,), generator=generator)
        patches = torch.randn(64, 24, 3, 4, 4, generator=generator)
        marked = torch.rand(64, 24, generator=generator).argsort(dim=1) < 1
        patches[marked] = templates[labels] + 0.5 * patches[marked]
        images = patches.view(64, 6, 4, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(64, 3, 24, 16)
        yield images, labels, marked


def labelled(count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    return ((images, labels) for images, labels, _ in marked_patches(count, seed))


@pytest.mark.slow
def test_learns_which_patches_say_the_class() -> None:
    args = {**TINY, "patch_size": 4, "num_classes": 4}
    dense = PrunableViT(VisionTransformer(**args))
    recipe = Recipe(epochs=1, lr=3e-3, distill=0.0, precision="float32")
    FineTuner(dense, recipe, steps_per_epoch=120).train_epoch(labelled(120, seed=1))
    assert evaluate(dense, labelled(5, seed=2)).top1 > 95.0
    vit = cut(copy.deepcopy(dense), {"blocks.1.token": 0.5, "blocks.2.token": 0.5})
    untrained = evaluate(vit, labelled(5, seed=2)).top1
    recipe = Recipe(epochs=1, distill=0.5, selector_lr=1e-2, precision="float32")
    FineTuner(vit, recipe, 80, dense).train_epoch(labelled(80, seed=3))
    images, _, marked = next(marked_patches(1, seed=4))
    with torch.no_grad():
        kept = torch.stack([vit.train().tokens(images).decisions[-1] for _ in range(5)])
    assert kept[:, marked].mean() > 0.6
    assert kept[:, ~marked].mean() < 0.27
    assert evaluate(vit, labelled(5, seed=2)).top1 > max(95.0, untrained + 5.0)
