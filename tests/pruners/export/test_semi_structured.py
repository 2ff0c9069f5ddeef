from __future__ import annotations

import copy

import pytest
import torch
from torch.sparse import (
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from pruners import Plan, PrunableViT, Step, load_method
from pruners.export.semi_structured import (
    BACKENDS,
    DTYPES,
    is_two_of_four,
    semi_structured_layers,
    to_semi_structured,
)
from tests.models import images_for

WIDE = {"embed_dim": 64, "num_heads": 4, "depth": 2}  # qkv 192 x 64, fc1 256 x 64, fc2 64 x 256


def masked(vit: PrunableViT, pattern: str, sites: tuple[str, ...]) -> PrunableViT:
    pruner = load_method("magnitude", pattern=pattern)
    Plan(steps=(Step(pruner=pruner, thresholds=dict.fromkeys(sites, 0.5)),)).apply(vit)
    return vit


def test_multiples_are_those_of_torch() -> None:
    kinds = {
        "cusparselt": SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": SparseSemiStructuredTensorCUTLASS,
    }
    for backend, (rows, columns) in BACKENDS.items():
        for dtype in DTYPES:
            limits = kinds[backend]._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert (limits.sparse_min_rows, limits.sparse_min_cols) == (rows, columns)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_weights_survive_the_sparse_format(dtype: torch.dtype, tiny) -> None:
    """PyTorch's own conversion keeps two of four; it returns the same weights only if they are."""
    vit = masked(tiny(**WIDE), "2:4", ("blocks.0.attn.qkv", "blocks.1.mlp.fc2"))
    layers, taken = dict(vit.linears()), semi_structured_layers(vit)
    for site, reasons in taken.items():
        weight = layers[site].weight.detach().to(dtype)
        packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
        same = torch.equal(sparse_semi_structured_to_dense_cutlass(packed, meta), weight)
        assert packed.numel() == weight.numel() // 2
        assert same == (reasons["cutlass"] == "") == (reasons["cusparselt"] == "")
        assert same == (site in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2"))
        if not same:
            assert reasons["cutlass"] == "its zeros are not 2:4 along the inputs"


def test_other_patterns_are_refused(tiny) -> None:
    vit = masked(tiny(**WIDE), "4:8", ("blocks.0.mlp.fc1",))
    assert not is_two_of_four(vit.blocks[0].mlp.fc1.weight)
    vit = masked(tiny(**WIDE), "none", ("blocks.0.mlp.fc1",))
    assert not is_two_of_four(vit.blocks[0].mlp.fc1.weight)
    weight = torch.tensor([[1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 3.0]])
    assert is_two_of_four(weight)
    assert is_two_of_four(torch.zeros(3, 4))
    assert not is_two_of_four(weight[:, 2:])  # two weights that are no group of four
    weight[0, 1] = 4.0
    assert not is_two_of_four(weight)
    assert not is_two_of_four(weight.T.contiguous())


@pytest.mark.parametrize(
    ("multiple", "hidden", "backends"),
    [(1, 180, {"cutlass", "cusparselt"}), (16, 176, {"cutlass"}), (64, 192, set())],
)
def test_cut_neurons_fit_in_multiples(multiple: int, hidden: int, backends: set[str], tiny) -> None:
    vit = tiny(**WIDE)
    grouped = load_method("grouped", criterion="magnitude", multiple=multiple, compensate=False)
    Plan(steps=(Step(pruner=grouped, thresholds={"blocks.0.mlp.neuron": 0.297}),)).apply(vit)
    masked(vit, "2:4", ("blocks.0.mlp.fc2",))
    assert vit.blocks[0].mlp.fc2.in_features == hidden
    reasons = semi_structured_layers(vit)["blocks.0.mlp.fc2"]
    assert {backend for backend, reason in reasons.items() if reason} == backends
    if "cutlass" in backends:
        assert reasons["cutlass"] == (
            f"it has 64 outputs and {hidden} inputs; cutlass needs multiples of 32 and 64"
        )


def test_a_model_on_the_cpu_is_refused_by_name(tiny) -> None:
    vit = masked(tiny(**WIDE), "2:4", ("blocks.0.attn.qkv",))
    with pytest.raises(ValueError, match=r"^vit is on cpu; .*: give vit\.cuda\(\)$"):
        to_semi_structured(vit, torch.float16)
    assert vit.blocks[0].attn.qkv.weight.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_tensor_cores_give_the_same_logits(dtype: torch.dtype, tiny) -> None:
    sites = ("blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.mlp.fc2")
    vit = masked(tiny(**WIDE), "2:4", sites).cuda()
    images, dense = images_for(vit, 8).cuda(), copy.deepcopy(vit)
    with pytest.raises(ValueError, match=r"^dtype is torch\.float32"):
        to_semi_structured(vit, torch.float32)
    with pytest.raises(ValueError, match=r"^no layer is taken; blocks\.0\.attn\.qkv: its zeros"):
        to_semi_structured(tiny(**WIDE).cuda(), dtype)
    assert to_semi_structured(vit, dtype) == list(sites)
    assert isinstance(vit.blocks[0].attn.qkv.weight, torch.sparse.SparseSemiStructuredTensor)
    with torch.inference_mode():
        exact, logits = dense(images), vit(images.to(dtype)).float()
        plain = dense.to(dtype)(images.to(dtype)).float()
    # As far from float32 as the same weights are without sparse kernels, within a factor.
    assert (logits - exact).abs().max() <= 2.0 * (plain - exact).abs().max() + 1e-3
