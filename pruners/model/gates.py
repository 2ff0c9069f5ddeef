"""Gates: factors on the units of a model, in slots that it already has.

A gate stands in or behind a module of the model that is learned on, which is a copy; nothing is
hooked, and `remove_gates` leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pruners.model.shape import ViTShape
from pruners.model.vit import ViT

SLOTS = {
    "tokens1": "norm1",  # [B, N, D], what attention sees
    "query": "attn.q_norm",  # [B, H, N, K]
    "key": "attn.k_norm",  # [B, H, N, K]
    "mixed": "attn.norm",  # [B, N, H * V], between attention and proj
    "attn_out": "attn.proj_drop",  # [B, N, D'], what attention writes
    "tokens2": "norm2",  # [B, N, D], what the MLP sees
    "pre_neuron": "mlp.act",  # [B, N, F], between fc1 and the activation
    "neuron": "mlp.norm",  # [B, N, F], between activation and fc2
    "mlp_out": "mlp.drop2",  # [B, N, D'], what the MLP writes
}
"""Name of a slot -> the module of a block whose place a gate takes, and what passes it."""


class Gate(nn.Module):
    """Multiplies a module's output by `value`, which whoever learns sets before a forward pass.

    Attributes:
        inner: The module whose place the gate takes.
        value: Broadcast against the output; None changes nothing. It is no parameter of the gate.
    """

    def __init__(self, inner: nn.Module) -> None:
        """Stand behind a module."""
        super().__init__()
        self.inner = inner
        self.value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Run the module on x [B, N, D], or [B, H, N, K] of queries and keys, and multiply."""
        out = self.inner(x)
        return out if self.value is None else out * self.value.to(out.dtype)


class InputGate(Gate):
    """Multiplies a module's input by `value`."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [B, N, D] and run the module."""
        return self.inner(x if self.value is None else x * self.value.to(x.dtype))


def add_gates(vit: ViT, *slots: str) -> list[dict[str, Gate]]:
    """Put gates into slots of every block; return slot -> gate for each block.

    Slots of a branch that is gone are absent.
    """
    gates: list[dict[str, Gate]] = []
    for block in vit.blocks:
        gates.append({})
        for slot in slots:
            branch, _, leaf = SLOTS[slot].rpartition(".")
            owner = getattr(block, branch) if branch else block
            inner = getattr(owner, leaf, None)
            if inner is not None:
                gates[-1][slot] = InputGate(inner) if slot == "pre_neuron" else Gate(inner)
                setattr(owner, leaf, gates[-1][slot])
    return gates


def remove_gates(vit: ViT) -> None:
    """Put the modules back whose places gates have taken."""
    for module in list(vit.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Gate):
                setattr(module, name, child.inner)


@torch.no_grad()
def fold_gates(vit: ViT, gates: list[dict[str, Gate]]) -> None:
    """Multiply the values of all gates into the layers beside them and open the gates; exact.

    Slots that can be folded are `query` and `key` (values [H, 1, K], nothing normalised behind
    the gate), `mixed` [H * V] and `neuron` [F].
    """
    for block, slots in zip(vit.blocks, gates, strict=True):
        for slot, gate in slots.items():
            if gate.value is None:
                continue
            if slot in ("query", "key") and block.attn is not None:
                rows = block.attn.heads * block.attn.qk_dim
                part = slice(0, rows) if slot == "query" else slice(rows, 2 * rows)
                factors = gate.value.flatten()
                block.attn.qkv.weight[part] *= factors.unsqueeze(1)
                if block.attn.qkv.bias is not None:
                    block.attn.qkv.bias[part] *= factors
            elif slot == "mixed" and block.attn is not None:
                block.attn.proj.weight *= gate.value
            elif slot == "neuron" and block.mlp is not None:
                block.mlp.fc2.weight *= gate.value
            else:
                raise AssertionError(f"a gate in the slot {slot} cannot be folded")
            gate.value = None


def hard(soft: Tensor, kept: Tensor) -> Tensor:
    """Return `kept` [...] (bool) as numbers, with the gradient of `soft` (straight-through)."""
    return kept.to(soft.dtype) + soft - soft.detach()


def linear_macs(shape: ViTShape, index: int, qk: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """Return the multiply-adds of a block with real-valued sizes, []; differentiable.

    Args:
        shape: Shape of the network.
        index: Block.
        qk: [], q/k dims of all its heads together.
        v: [], v dims of all its heads together.
        hidden: [], neurons.
    """
    block, dim = shape.blocks[index], shape.dim
    n, m = block.tokens, block.mlp_tokens
    attention = n * dim * (2 * qk + v) + n * n * (qk + v) + n * v * block.attn_out
    return attention + m * hidden * (dim + block.mlp_out)


def remaining_weights(shape: ViTShape, fractions: Mapping[str, Tensor]) -> Tensor:
    """Return (qkv * a + proj * a o + fc1 * f + fc2 * f g) / all weights, over all blocks.

    qkv, ... are the sizes of the blocks' matrices; a, o, f, g the fractions of a block's heads,
    written channels of attention, neurons and written channels of the MLP (site -> []) that are
    kept, 1 where a site is absent. Differentiable.
    """
    units = {"qkv": ["head"], "proj": ["head", "attn_out"]}
    units |= {"fc1": ["neuron"], "fc2": ["neuron", "mlp_out"]}
    left, total = torch.zeros(()), 0
    for layer, rows, columns, _ in shape.linears():
        branch, _, name = layer.rpartition(".")
        size = torch.tensor(float(rows * columns))
        for kind in units[name]:
            size = size * fractions.get(f"{branch}.{kind}", 1.0)
        left, total = left + size, total + rows * columns
    return left / total
