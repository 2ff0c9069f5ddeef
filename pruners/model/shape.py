"""What is left of a Vision Transformer, as plain numbers.

A shape is what surgery realises, what cost is computed from, what a checkpoint is rebuilt from and
what MLflow stores. Letters used for sizes: `N` tokens, `D` width, `H` heads, `K` q/k width of a
head, `V` v width of a head, `F` neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """One transformer block: what enters it and what is left of it.

    Attributes:
        tokens: Tokens that enter the attention branch, prefix tokens included.
        mlp_tokens: Tokens that enter the MLP branch and leave the block.
        heads: Attention heads; 0 means that the whole attention branch is gone.
        qk_dim: Width of q and k in each head.
        v_dim: Width of v in each head.
        hidden: MLP neurons; 0 means that the whole MLP branch is gone.
        attn_out: Residual channels that the attention branch writes to; 0 without the branch.
        mlp_out: Residual channels that the MLP branch writes to; 0 without the branch.
        reducer_macs: Multiply-adds that reducing the tokens itself costs per image.
        reducer_params: Parameters of what reduces the tokens.
    """

    tokens: int
    mlp_tokens: int
    heads: int
    qk_dim: int
    v_dim: int
    hidden: int
    attn_out: int
    mlp_out: int
    reducer_macs: int = 0
    reducer_params: int = 0


@dataclass(frozen=True, kw_only=True)
class ViTShape:
    """A whole network: fixed sizes, and one `BlockShape` per block.

    Attributes:
        dim: Width D of the residual stream, the channels that are left.
        image: Height and width of the input in pixels.
        patch: Height and width of a patch in pixels.
        channels: Input channels.
        classes: Outputs of the classifier; 0 without one.
        classifiers: Linear classifiers (2 for a distilled DeiT).
        class_token: Whether the first token is a class token.
        prefix_tokens: Class, distillation and register tokens.
        qkv_bias: Whether the qkv layers have a bias.
        proj_bias: Whether proj, fc1 and fc2 have a bias.
        qk_norm: Whether q and k are normalised over a head's width, which ties all its q/k dims
            together.
        layer_scale: Whether a branch's output has a learned scale per channel.
        outer_params: Parameters outside the blocks.
        attn_branch_params: Parameters of an attention branch's norms.
        mlp_branch_params: Parameters of an MLP branch's norm.
        blocks: The blocks, first to last.
        nonzero: Weights that are not masked, by linear layer; a layer that is absent is dense.
    """

    dim: int
    image: tuple[int, int]
    patch: tuple[int, int]
    channels: int
    classes: int
    classifiers: int
    class_token: bool
    prefix_tokens: int
    qkv_bias: bool
    proj_bias: bool
    qk_norm: bool
    layer_scale: bool
    outer_params: int
    attn_branch_params: int
    mlp_branch_params: int
    blocks: tuple[BlockShape, ...]
    nonzero: Mapping[str, int] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in one image."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def reduced(self) -> bool:
        """Whether fewer tokens flow somewhere than enter the first block."""
        full = self.patches + self.prefix_tokens
        return any(block.tokens != full or block.mlp_tokens != full for block in self.blocks)

    def linears(self) -> Iterator[tuple[str, int, int, int]]:
        """Yield (site, out features, in features, tokens) of each linear layer in the blocks."""
        for index, block in enumerate(self.blocks):
            if block.heads:
                inner = block.heads * block.v_dim
                qkv = 2 * block.heads * block.qk_dim + inner
                yield f"blocks.{index}.attn.qkv", qkv, self.dim, block.tokens
                yield f"blocks.{index}.attn.proj", block.attn_out, inner, block.tokens
            if block.hidden:
                yield f"blocks.{index}.mlp.fc1", block.hidden, self.dim, block.mlp_tokens
                yield f"blocks.{index}.mlp.fc2", block.mlp_out, block.hidden, block.mlp_tokens

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary of plain numbers, lists and strings."""
        return asdict(self) | {"nonzero": dict(self.nonzero)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ViTShape:
        """Read what `to_json` wrote.

        Raises:
            ValueError: If a field is missing, unknown or of another type.
        """
        _check_fields(cls, values, "shape")
        blocks, nonzero = values["blocks"], values["nonzero"]
        if not isinstance(blocks, (list, tuple)) or not isinstance(nonzero, Mapping):
            raise ValueError("shape has no list of blocks, or no table of nonzero; give both")
        for index, block in enumerate(blocks):
            _check_fields(BlockShape, block, f"blocks.{index} of the shape")
            for key, value in block.items():
                _check_number(f"{key} of blocks.{index}", value)
        for key, value in values.items():
            if key in _PAIRS:
                if not isinstance(value, (list, tuple)) or len(value) != 2:
                    raise ValueError(f"{key} of the shape is {value!r}; give height and width")
                _check_number(key, value[0])
                _check_number(key, value[1])
            elif key in _FLAGS:
                if not isinstance(value, bool):
                    raise ValueError(f"{key} of the shape is {value!r}; give true or false")
            elif key not in ("blocks", "nonzero"):
                _check_number(key, value)
        for site, kept in nonzero.items():
            _check_number(f"nonzero of {site!r}", kept)
        image, patch = tuple(values["image"]), tuple(values["patch"])
        parts = tuple(BlockShape(**block) for block in blocks)
        return cls(**{**values, "image": image, "patch": patch, "blocks": parts})


_PAIRS = ("image", "patch")
_FLAGS = ("class_token", "qkv_bias", "proj_bias", "qk_norm", "layer_scale")


def _check_fields(kind: type[BlockShape] | type[ViTShape], values: object, name: str) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} is {values!r}; give what ViTShape.to_json writes")
    known, given = {f.name for f in fields(kind)}, set(values)
    if known != given:
        raise ValueError(
            f"{name} has missing fields {sorted(known - given)} and unknown fields "
            f"{sorted(given - known)}; give what ViTShape.to_json writes"
        )


def _check_number(name: str, value: object) -> None:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} of the shape is {value!r}; give a whole number, at least 0")


def units_kept(units: int, share: float, multiple: int = 1) -> int:
    """Return how many units stay when `share` of them is cut: at least one unless it is 1.

    What stays is rounded to the nearest multiple of `multiple`, at least one multiple; nothing is
    rounded where nothing is cut.
    """
    if share >= 1.0:
        return 0
    kept = max(1, units - int(share * units + 0.5))
    if kept == units:
        return units
    return min(units, max(1, (2 * kept + multiple) // (2 * multiple)) * multiple)
