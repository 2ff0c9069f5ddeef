from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pruners.training.evaluation import evaluate, images_per_second


def test_evaluation_counts_every_image_once(tiny, batches) -> None:
    vit = tiny()
    images, labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    with torch.no_grad():
        logits = vit(images)
    measured = evaluate(vit, [(images[:11], labels[:11]), (images[11:], labels[11:])])
    assert measured.images == 18
    assert measured.top1 == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert measured.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    with pytest.raises(ValueError, match="no images"):
        evaluate(vit, [])


def test_every_class_is_counted_for_itself(tiny, batches) -> None:
    vit = tiny()
    batches = [(images, labels % 4) for images, labels in batches]  # nothing is of the last class
    measured = evaluate(vit, batches)
    with torch.no_grad():
        found = torch.cat([vit(images).argmax(1) for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    expected = [100.0 * (found[labels == c] == c).float().mean().item() for c in range(4)]
    assert measured.by_class[4] is None
    assert measured.by_class[:4] == pytest.approx(expected, rel=1e-6)
    assert len(set(expected)) > 1


def test_images_per_second_is_the_median_of_full_batches_after_the_first() -> None:
    assert images_per_second([(8, 9.0), (8, 1.0), (8, 4.0), (8, 2.0), (3, 0.1)]) == 4.0
    assert images_per_second([(8, 2.0)]) == 4.0
