"""What a `ViTShape` costs, in closed form.

Counted: multiply-adds of the patch convolution, of every linear layer (qkv, proj, fc1, fc2,
classifiers), of the two attention products (q k^T and attention times v), and of reducing tokens.
Not counted, as is usual: norms, softmax, GELU, biases, residual additions, pooling. One
multiply-add is one MAC; `torch.utils.flop_counter` counts it as two FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from pruners.model.shape import ViTShape


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of one image.

    Attributes:
        macs: Multiply-adds that a dense kernel runs.
        effective_macs: Multiply-adds on weights that are not masked; each linear layer's MACs times
            its density. Products of activations, the patch convolution and the classifier count in
            full.
        params: Parameters that are stored, masked ones included.
        nonzeros: Parameters that are not masked.
    """

    macs: int
    effective_macs: int
    params: int
    nonzeros: int

    @property
    def gmacs(self) -> float:
        """1e9 multiply-adds."""
        return self.macs / 1e9

    @property
    def effective_gmacs(self) -> float:
        """1e9 multiply-adds on weights that are not masked."""
        return self.effective_macs / 1e9

    @property
    def density(self) -> float:
        """Share of the stored parameters that is not masked."""
        return self.nonzeros / self.params


def cost_of(shape: ViTShape) -> Cost:
    """Return the cost of a shape."""
    fixed = _outer_macs(shape) + _activation_macs(shape)
    macs, effective, masked = fixed, fixed, 0
    for site, rows, columns, tokens in shape.linears():
        weights = rows * columns
        nonzero = shape.nonzero.get(site, weights)
        macs += tokens * weights
        effective += tokens * nonzero
        masked += weights - nonzero
    params = _params(shape)
    return Cost(macs=macs, effective_macs=effective, params=params, nonzeros=params - masked)


def _outer_macs(shape: ViTShape) -> int:
    patch_weights = shape.channels * shape.patch[0] * shape.patch[1] * shape.dim
    return shape.patches * patch_weights + shape.classifiers * shape.dim * shape.classes


def _activation_macs(shape: ViTShape) -> int:
    return sum(b.tokens**2 * b.heads * (b.qk_dim + b.v_dim) + b.reducer_macs for b in shape.blocks)


def _params(shape: ViTShape) -> int:
    params = shape.outer_params + sum(block.reducer_params for block in shape.blocks)
    for site, rows, columns, _ in shape.linears():
        biased = shape.qkv_bias if site.endswith("qkv") else shape.proj_bias
        params += rows * columns + biased * rows
    if shape.layer_scale:
        params += sum(block.attn_out + block.mlp_out for block in shape.blocks)
    attentions = sum(block.heads > 0 for block in shape.blocks)
    mlps = sum(block.hidden > 0 for block in shape.blocks)
    return params + attentions * shape.attn_branch_params + mlps * shape.mlp_branch_params
