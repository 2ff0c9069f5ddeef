from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pruners.model.policy import draw_keeps
from pruners.model.soft_tokens import HeadwiseClassifier, classifier_heads


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)


def a_classifier(heads: int = 3, dim: int = 24) -> HeadwiseClassifier:
    classifier = HeadwiseClassifier(dim, heads, 0.7)
    randomise(classifier)
    return classifier


def by_hand(classifier: HeadwiseClassifier, x: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Keep probabilities and logits, head by head with plain layers."""
    heads, d = classifier.heads, classifier.width
    squeezed = torch.stack([s.mean(-1) for s in x.chunk(heads, -1)], -1)
    a = classifier.excite(
        torch.nn.functional.gelu(classifier.squeeze(squeezed))
    ).sigmoid()  # [B, N, H]
    soft, logs = [], []
    for head, x_i in enumerate(x.chunk(heads, -1)):

        def linear(layer, values, head=head):
            bias = layer.bias.view(heads, -1)[head]
            return torch.nn.functional.linear(values, layer.weight[head].T, bias)

        norm = [p.view(heads, d)[head] for p in (classifier.norm_weight, classifier.norm_bias)]
        z = linear(classifier.embed, torch.nn.functional.layer_norm(x_i, (d,), *norm))
        z = torch.nn.functional.gelu(z)
        own, pooled = z[..., : d // 2], z[..., d // 2 :]
        pooled = (present.unsqueeze(-1) * pooled).sum(1) / present.sum(1).unsqueeze(-1)
        u = torch.cat([own, pooled.unsqueeze(1).expand_as(own)], -1)
        for layer in (classifier.fc1, classifier.fc2):
            u = torch.nn.functional.gelu(linear(layer, u))
        u = linear(classifier.fc3, u)
        soft.append(a[..., head, None] * u.softmax(-1))
        logs.append(a[..., head, None] * u.log_softmax(-1))
    total = a.sum(-1, keepdim=True)
    return sum(soft) / total, sum(logs) / total


def test_the_classifier_is_the_papers() -> None:
    classifier, x = a_classifier(), torch.randn(2, 7, 24)
    present = (torch.rand(2, 7) < 0.6).float()
    present[:, 0] = 1.0
    scores = classifier(x, present)
    soft, logs = by_hand(classifier, x, present)
    torch.testing.assert_close(scores.keep, soft[..., 0])
    torch.testing.assert_close(scores.logits, logs)
    torch.testing.assert_close(soft.sum(-1), torch.ones(2, 7))  # rows sum to 1


def heads_are_independent(classifier: HeadwiseClassifier) -> None:
    """Every head has parameters of its own, and channels belong to their head."""
    x, present = torch.randn(2, 7, 24), torch.ones(2, 7)
    heads, width = classifier.heads, classifier.width
    for layer in (classifier.embed, classifier.fc1, classifier.fc2, classifier.fc3):
        first, second = layer.weight[0], layer.weight[1]
        assert layer.weight.shape[0] == heads
        assert not torch.equal(first, second)
    # Equal means of all slices, so that the importance of heads does not change.
    x = x.unflatten(-1, (heads, width)) - x.unflatten(-1, (heads, width)).mean(-1, keepdim=True)
    rolled = x.roll(1, dims=2).flatten(2)
    assert (
        classifier(x.flatten(2), present).keep - classifier(rolled, present).keep
    ).abs().max() > 1e-3


def test_heads_are_independent() -> None:
    classifier = a_classifier()
    heads_are_independent(classifier)
    slices = torch.randn(2, 7, 3, 8)
    verdicts = classifier.verdicts(slices, torch.ones(2, 7))
    slices[:, :, 1] += torch.randn(2, 7, 8)
    moved = (classifier.verdicts(slices, torch.ones(2, 7)) - verdicts).abs().amax(dim=(0, 1, 3))
    assert (moved > 1e-4).tolist() == [False, True, False]


def test_tied_heads_are_found_out() -> None:
    classifier = a_classifier()
    with torch.no_grad():
        for parameter in classifier.parameters():
            if parameter.ndim == 3:
                parameter[:] = parameter[0]
        for name in ("norm_weight", "norm_bias"):
            flat = getattr(classifier, name)
            flat[:] = flat[:8].repeat(3)
        for layer in (classifier.embed, classifier.fc1, classifier.fc2, classifier.fc3):
            one = layer.bias.view(3, -1)
            one[:] = one[:1].clone()
    with pytest.raises(AssertionError):
        heads_are_independent(classifier)


def test_equal_importance_gives_the_plain_mean_of_heads() -> None:
    classifier, x = a_classifier(), torch.randn(2, 7, 24)
    torch.nn.init.zeros_(classifier.excite.weight)
    torch.nn.init.constant_(classifier.excite.bias, -1.7)
    present = torch.ones(2, 7)
    verdicts = classifier.verdicts(x.unflatten(-1, (3, 8)), present)
    scores = classifier(x, present)
    torch.testing.assert_close(scores.keep, verdicts.softmax(-1).mean(2)[..., 0])
    torch.testing.assert_close(scores.logits, verdicts.log_softmax(-1).mean(2))


def test_tokens_that_were_dropped_do_not_count_in_means() -> None:
    classifier, x = a_classifier(), torch.randn(1, 7, 24)
    present = torch.tensor([[1.0, 0, 1, 1, 0, 1, 1]])
    there = present[0].bool()
    alone = classifier(x[:, there], torch.ones(1, 5))
    torch.testing.assert_close(classifier(x, present).keep[:, there], alone.keep)


def test_first_weights_keep_the_share_that_is_wanted() -> None:
    classifier = HeadwiseClassifier(384, 6, 0.62).requires_grad_(False)
    scores = classifier(torch.randn(8, 196, 384), torch.ones(8, 196))
    assert scores.keep.mean() == pytest.approx(0.62, abs=0.005)
    assert draw_keeps(scores.logits).mean() == pytest.approx(0.62, abs=0.03)
    weights = [p for p in classifier.parameters() if p.ndim > 1]
    assert all(0.01 < w.std() < 0.03 and w.abs().max() <= 2.0 for w in weights)


def test_biases_and_norms_have_no_weight_decay() -> None:
    names = {name for name, p in HeadwiseClassifier(24, 3, 0.7).named_parameters() if p.ndim > 1}
    assert all(name.endswith(".weight") for name in names)
    assert len(names) == 6


@pytest.mark.parametrize(
    ("dim", "heads", "slices"), [(384, 6, 6), (384, 5, 4), (24, 3, 3), (24, 4, 3), (20, 3, 1)]
)
def test_slices_are_the_most_that_fit(dim: int, heads: int, slices: int) -> None:
    assert classifier_heads(dim, heads) == slices


@pytest.mark.parametrize(("dim", "heads"), [(26, 2), (24, 0)])
def test_widths_that_cannot_be_split_are_refused(dim: int, heads: int) -> None:
    with pytest.raises(ValueError, match=f"dim is {dim} with {heads} heads"):
        classifier_heads(dim, heads)
