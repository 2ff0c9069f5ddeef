"""Pruning of Vision Transformers: plans, shapes, costs and methods. Needs torch and timm only.

>>> from pruners import Plan, PrunableViT, Step, load_method
>>> vit = PrunableViT.from_timm("vit_tiny_patch16_224", pretrained=False)
>>> plan = Plan(steps=(Step(pruner=load_method("magnitude"), thresholds={"blocks.0.mlp.fc1":
0.5}),))
>>> plan.apply(vit)

Shapes of tensors stand in brackets, in these letters: B images, N tokens, D width, H heads, K width
of a head's queries and keys, V of its values, F neurons of an MLP; `[]` is a scalar, `[...]` any
shape.
"""

from pruners.families.pruner import Pruner, load_method, method_names
from pruners.model.cost import Cost, cost_of
from pruners.model.shape import BlockShape, ViTShape
from pruners.plan import Plan, Step
from pruners.prunable_vit import PrunableViT

__all__ = [
    "BlockShape",
    "Cost",
    "Plan",
    "PrunableViT",
    "Pruner",
    "Step",
    "ViTShape",
    "cost_of",
    "load_method",
    "method_names",
]
