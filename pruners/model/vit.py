"""`ViT`: a timm `VisionTransformer` that can lose units, tokens and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from timm.layers import Attention as TimmAttention
from timm.layers import LayerScale, Mlp, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pruners.model.attention import Attention
from pruners.model.shape import BlockShape, ViTShape
from pruners.model.tokens import FrontReducer, MiddleReducer, TokenLoss, Tokens, weighted_pool


class Block(nn.Module):
    """A pre-norm block that may lack a branch and may pass fewer tokens on than it got.

    Attributes:
        attn: The attention branch, or None where it was removed.
        mlp: The MLP branch, or None where it was removed.
        front: Reduces the tokens in front of the block, or None.
        middle: Reduces the tokens between the two branches, or None.
        attn_rows: The residual channels that the attention branch writes to, [D'], or None for all.
        mlp_rows: The same of the MLP branch.
    """

    attn_rows: Tensor | None
    mlp_rows: Tensor | None

    def __init__(self, block: TimmBlock) -> None:
        """Take over the layers of a timm block."""
        super().__init__()
        self.front: FrontReducer | None = None
        self.norm1: nn.Module | None = block.norm1
        self.attn: Attention | None = Attention(block.attn)
        self.ls1: nn.Module | None = block.ls1
        self.drop_path1: nn.Module = block.drop_path1
        self.middle: MiddleReducer | None = None
        self.norm2: nn.Module | None = block.norm2
        self.mlp: Mlp | None = block.mlp
        self.ls2: nn.Module | None = block.ls2
        self.drop_path2: nn.Module = block.drop_path2
        self.register_buffer("attn_rows", None)
        self.register_buffer("mlp_rows", None)

    def forward(self, tokens: Tokens) -> Tokens:
        """Run the block; fewer tokens may leave than enter."""
        if self.front is not None:
            tokens = self.front(tokens)
        return self.feed(self.attend(tokens))

    def attend(self, tokens: Tokens) -> Tokens:
        """Run the attention branch, and what reduces the tokens behind it."""
        if self.attn is not None and self.norm1 is not None and self.ls1 is not None:
            attended = self.attn(self.norm1(tokens.x), tokens.size, tokens.policy)
            branch = self.drop_path1(self.ls1(attended.output))
            tokens = tokens._replace(x=_add(tokens.x, branch, self.attn_rows))
            if self.middle is not None:
                tokens = self.middle(tokens, attended, self.attn.scale)
        return tokens

    def feed(self, tokens: Tokens) -> Tokens:
        """Run the MLP branch."""
        if self.mlp is not None and self.norm2 is not None and self.ls2 is not None:
            branch = self.drop_path2(self.ls2(self.mlp(self.norm2(tokens.x))))
            tokens = tokens._replace(x=_add(tokens.x, branch, self.mlp_rows))
        return tokens


class ViT(nn.Module):
    """A timm `VisionTransformer` with an explicit forward whose parts can be cut.

    Untouched, its output equals timm's bit for bit. Methods know models as this; who builds, opens
    and saves one has a `pruners.PrunableViT`.

    Attributes:
        vit: The timm model; its parameter names are timm's.
        masks: Linear layer -> bool tensor of the weight's shape, True where the weight is kept.
            Layers without a mask are dense.
        token_step: `{"method", "options", "thresholds"}` of the step that reduces the tokens, JSON
            values from which a saved model builds its reducers again; None without one.
        token_loss: What that step adds to the training loss; None for nothing.
        arch: `{"name": timm name or None, "args": constructor arguments}`, or None if unknown;
            needed to save.
        mean: Mean per input channel the images are normalised by, if known.
        std: Standard deviation per input channel, if known.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        *,
        arch: Mapping[str, Any] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        """Take over a timm model.

        Raises:
            ValueError: If a module of it cannot be pruned; the message names the module.
        """
        super().__init__()
        refuse_unsupported(vit)
        vit.blocks = nn.Sequential(*(Block(block) for block in vit.blocks))
        self.vit = vit
        self.masks: dict[str, Tensor] = {}
        self.token_step: dict[str, Any] | None = None
        self.token_loss: TokenLoss | None = None
        self.arch = dict(arch) if arch is not None else None
        self.mean = mean
        self.std = std

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] of normalised images [B, channels, height, width]."""
        return self.classify(self.tokens(images))

    def tokens(self, images: Tensor) -> Tokens:
        """Return the tokens behind the last norm, from which `classify` makes logits.

        Args:
            images: [B, channels, height, width], normalised.
        """
        tokens = Tokens(self.embed(images))
        for block in self.blocks:
            tokens = block(tokens)
        return tokens._replace(x=self.vit.norm(tokens.x))

    def classify(self, tokens: Tokens) -> Tensor:
        """Return logits [B, classes] of tokens behind the last norm, each pooled as it counts."""
        vit = self.vit
        weight = tokens.size if tokens.policy is None else tokens.policy
        if weight is None or vit.global_pool == "token":
            return vit.forward_head(tokens.x)
        start = 0 if vit.pool_include_prefix else vit.num_prefix_tokens
        pooled = weighted_pool(tokens.x[:, start:], weight[:, start:], vit.global_pool)
        return vit.head(vit.head_drop(vit.fc_norm(pooled)))

    def aux_loss(self, tokens: Tokens, taught: Tokens | None = None) -> Tensor:
        """Return what the token step adds to the training loss, []; 0 without one.

        Args:
            tokens: What `tokens` returned of a batch, in training mode.
            taught: What the teacher's `tokens` returned of the same batch, if there is a teacher.
        """
        if self.token_loss is None:
            return tokens.x.new_zeros(())
        return self.token_loss(tokens, taught)

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens [B, N, D] that enter the first block."""
        x = self.vit._pos_embed(self.vit.patch_embed(images))
        return self.vit.norm_pre(self.vit.patch_drop(x))

    @property
    def blocks(self) -> list[Block]:
        """The blocks, first to last."""
        return [block for block in self.vit.blocks if isinstance(block, Block)]

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """Yield (site, layer) of every linear layer in the blocks, whose weights may be masked."""
        for index, block in enumerate(self.blocks):
            if block.attn is not None:
                yield f"blocks.{index}.attn.qkv", block.attn.qkv
                yield f"blocks.{index}.attn.proj", block.attn.proj
            if block.mlp is not None:
                yield f"blocks.{index}.mlp.fc1", block.mlp.fc1
                yield f"blocks.{index}.mlp.fc2", block.mlp.fc2

    def use_fused_attention(self, fused: bool) -> None:
        """Choose PyTorch's fused attention kernels or plain matrix products, for every block."""
        for block in self.blocks:
            if block.attn is not None:
                block.attn.fused_attn = fused

    def shape(self) -> ViTShape:
        """Measure the shape of the model as it stands."""
        vit = self.vit
        size = vit.patch_embed.img_size
        outer = sum(p.numel() for n, p in vit.named_parameters() if not n.startswith("blocks."))
        tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens
        blocks: list[BlockShape] = []
        for block in self.blocks:
            blocks.append(_block_shape(block, tokens))
            tokens = blocks[-1].mlp_tokens
        attentions = [b for b in self.blocks if b.attn is not None]
        mlps = [b for b in self.blocks if b.mlp is not None]
        return ViTShape(
            dim=vit.embed_dim,
            image=(size[0], size[1]),
            patch=(vit.patch_embed.patch_size[0], vit.patch_embed.patch_size[1]),
            channels=vit.in_chans,
            classes=vit.num_classes,
            classifiers=2 if isinstance(vit, VisionTransformerDistilled) else 1,
            class_token=vit.has_class_token,
            prefix_tokens=vit.num_prefix_tokens,
            qkv_bias=any(b.attn.qkv.bias is not None for b in attentions if b.attn),
            proj_bias=any(
                layer.bias is not None for n, layer in self.linears() if not n.endswith("qkv")
            ),
            qk_norm=any(not isinstance(b.attn.q_norm, nn.Identity) for b in attentions if b.attn),
            layer_scale=any(isinstance(m, LayerScale) for m in vit.blocks.modules()),
            outer_params=outer,
            attn_branch_params=_attn_branch_params(attentions[0]) if attentions else 0,
            mlp_branch_params=_numel(mlps[0].norm2) if mlps else 0,
            blocks=tuple(blocks),
            nonzero={site: int(mask.sum()) for site, mask in self.masks.items()},
        )


@contextmanager
def eval_mode(vit: ViT) -> Iterator[None]:
    """Run a model in evaluation mode, and put its own back afterwards."""
    was_training = vit.training
    vit.eval()
    try:
        yield
    finally:
        vit.train(was_training)


def _add(x: Tensor, branch: Tensor, rows: Tensor | None) -> Tensor:
    """Add a branch's output [B, N, D'] to the residual stream [B, N, D]."""
    return x + branch if rows is None else x.index_add(2, rows, branch.to(x.dtype))


def _block_shape(block: Block, tokens: int) -> BlockShape:
    macs = params = 0
    attn = block.attn
    if block.front is not None:
        macs, params = block.front.macs(tokens), _numel(block.front)
        tokens = block.front.tokens_after(tokens)
    after = tokens
    if attn is not None and block.middle is not None:
        macs, params = macs + block.middle.macs(tokens), params + _numel(block.middle)
        after = block.middle.tokens_after(tokens)
    return BlockShape(
        tokens=tokens,
        mlp_tokens=after,
        heads=attn.heads if attn is not None else 0,
        qk_dim=attn.qk_dim if attn is not None else 0,
        v_dim=attn.v_dim if attn is not None else 0,
        hidden=block.mlp.fc1.out_features if block.mlp is not None else 0,
        attn_out=attn.proj.out_features if attn is not None else 0,
        mlp_out=block.mlp.fc2.out_features if block.mlp is not None else 0,
        reducer_macs=macs,
        reducer_params=params,
    )


def _attn_branch_params(block: Block) -> int:
    attn = block.attn
    return _numel(block.norm1, attn.q_norm, attn.k_norm) if attn is not None else 0


def _numel(*modules: nn.Module | None) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


def refuse_unsupported(vit: nn.Module) -> None:
    """Refuse a model that pruning does not understand.

    Raises:
        ValueError: That names its first module of another kind.
    """
    if type(vit) not in (VisionTransformer, VisionTransformerDistilled):
        raise ValueError(f"model is a {type(vit).__name__}; give a timm VisionTransformer")
    if vit.attn_pool is not None:
        raise ValueError(
            f"attn_pool is {type(vit.attn_pool).__name__}; give token or average pooling"
        )
    if not vit.global_pool:
        raise ValueError(
            "global_pool is empty; give 'token' or 'avg', so that the model classifies"
        )
    _require(vit.patch_embed, PatchEmbed, "patch_embed")
    for index, block in enumerate(vit.blocks):
        _require(block, TimmBlock, f"blocks.{index}")
        _require(block.attn, TimmAttention, f"blocks.{index}.attn")
        _require(block.mlp, Mlp, f"blocks.{index}.mlp")
        _require(block.attn.norm, nn.Identity, f"blocks.{index}.attn.norm")
        _require(block.mlp.norm, nn.Identity, f"blocks.{index}.mlp.norm")
        _require(block.mlp.fc1, nn.Linear, f"blocks.{index}.mlp.fc1")
        if block.attn.gate is not None:
            raise ValueError(f"blocks.{index}.attn.gate is set; gated attention is not supported")


def _require(module: nn.Module, kind: type[nn.Module], name: str) -> None:
    if type(module) is not kind:
        raise ValueError(f"{name} is a {type(module).__name__}; only {kind.__name__} is supported")
