"""Rotated models against the models they come from, in float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from pruners import PrunableViT
from pruners.model.rotation import principal_directions, rotated
from pruners.model.tokens import Tokens
from pruners.model.width import keep_width
from tests.models import TINY, VARIANTS, images_for

TURNED = {name: VARIANTS[name] for name in ("vit", "layer_scale", "registers", "pooled")}


def pairs(vit: PrunableViT) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images = images_for(vit, 6).double()
    return [(images[:4], torch.zeros(4)), (images[4:], torch.zeros(2))]


def distilled() -> PrunableViT:
    sizes = {key: TINY[key] for key in ("embed_dim", "depth", "num_heads", "num_classes")}
    vit = PrunableViT.from_timm(
        "deit_tiny_distilled_patch16_224", pretrained=False, img_size=32, **sizes
    )
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return vit.eval()


@pytest.mark.parametrize("variant", [*TURNED, "distilled"])
def test_a_rotated_model_computes_the_same(variant: str, tiny, tmp_path) -> None:
    vit = (distilled() if variant == "distilled" else tiny(**TURNED[variant])).double()
    before, images = copy.deepcopy(vit.state_dict()), images_for(vit, 5).double()
    turned = vit.rotated(pairs(vit))
    assert not turned.training
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in turned.modules())
    with torch.no_grad():
        torch.testing.assert_close(turned(images), vit(images), rtol=0, atol=1e-9)
        # The mean, which LayerNorm took away, is the last channel: nothing is left in it.
        narrow = copy.deepcopy(turned)
        keep_width(narrow, torch.arange(23))
        torch.testing.assert_close(narrow(images), vit(images), rtol=0, atol=1e-9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    turned.float().save(tmp_path)
    again = PrunableViT.load(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(images.float()), turned(images.float()))


def test_channels_are_principal_directions(tiny) -> None:
    """Against singular values of the stream itself: no other directions hold more."""
    vit = tiny(init_values=0.4).double()
    data = pairs(vit)
    rows, turned = [], rotated(vit, data)
    with torch.no_grad():
        for images, _ in data:
            tokens, other = Tokens(vit.embed(images)), Tokens(turned.embed(images))
            for block, after in itertools.zip_longest([*vit.blocks], [*turned.blocks]):
                rows.append((tokens.x, other.x))
                tokens, other = block(tokens), after(other)
            rows.append((tokens.x, other.x))
    dense = torch.cat([F.layer_norm(x, (24,)).flatten(0, 1) for x, _ in rows])
    held = torch.cat([F.rms_norm(x, (24,)).flatten(0, 1) for _, x in rows]).square().sum(0)
    singular = torch.linalg.svdvals(dense).square()
    torch.testing.assert_close(held[:20], singular[:20], rtol=1e-3, atol=1e-6)
    assert (held[:-1] >= held[1:] - 1e-9).all()
    directions = principal_directions(vit, data)
    torch.testing.assert_close(directions.T @ directions, torch.eye(24).double())


def test_a_stream_of_few_directions_is_cut_without_loss(tiny) -> None:
    vit = tiny(init_values=0.4).double()
    basis = torch.randn(24, 9, generator=torch.Generator().manual_seed(6)).double()
    span = basis @ torch.linalg.pinv(basis)  # [24, 24], of rank 9
    with torch.no_grad():
        vit.vit.pos_embed.copy_(vit.vit.pos_embed @ span.T)
        vit.vit.cls_token.copy_(vit.vit.cls_token @ span.T)
        layers = [vit.vit.patch_embed.proj]
        for block in vit.blocks:
            block.ls1.gamma.fill_(0.7)
            block.ls2.gamma.fill_(1.3)
            layers += [block.attn.proj, block.mlp.fc2]
        for layer in layers:
            layer.weight.copy_((span @ layer.weight.flatten(1)).view_as(layer.weight))
            layer.bias.copy_(span @ layer.bias)
        turned, images = rotated(vit, pairs(vit)), images_for(vit, 5).double()
        keep_width(turned, torch.arange(9))
        torch.testing.assert_close(turned(images), vit(images), rtol=0, atol=1e-8)
        keep_width(turned, torch.arange(8))
        assert (turned(images) - vit(images)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"qk_norm": True}, "q and k are normalised; rotate a model without qk_norm"),
        ({"pre_norm": True}, "norm_pre normalises the stream itself"),
        ({"qkv_bias": False}, r"blocks\.0\.attn\.qkv is Linear.* give a linear layer with a bias"),
        ({"norm_layer": "rmsnorm"}, r"fc_norm is|blocks\.0\.norm1 is RmsNorm.* give LayerNorm"),
        ({"global_pool": "max", "class_token": False}, "global_pool is 'max'; give"),
        ({"final_norm": False}, "fc_norm is Identity"),
    ],
)
def test_what_depends_on_the_basis_is_refused_by_name(args: dict, message: str, tiny) -> None:
    with pytest.raises(ValueError, match=message):
        rotated(tiny(**args), [])


def test_cut_models_and_no_images_are_refused(tiny) -> None:
    with pytest.raises(ValueError, match="there are no calibration images"):
        rotated(tiny(), [])
    vit = tiny()
    vit.blocks[0].attn = None
    with pytest.raises(ValueError, match="vit is cut; rotate the dense model"):
        rotated(vit, [])
