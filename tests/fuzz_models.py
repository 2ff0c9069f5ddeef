"""The files of models and runs, each with a sample, ways to damage it, and its reader."""

from __future__ import annotations

import hashlib
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pruners import Plan, PrunableViT, Step, load_method
from pruners.families.learned import Learned
from pruners.training.learner import Learner, LearningData, run
from search.records.digests import directory_digest, file_digest, json_digest
from search.tracking.served import read_served
from search.trial.trial_files import RESULTS, TUNER, TrialFiles
from tests.fuzz_format import Format, either
from tests.mutations import Random, damaged, damaged_json, odd_values
from tests.search.trial_events import config_of, result_of

SMALLEST = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}
SMALLEST |= {"num_classes": 3, "in_chans": 1}


def smallest_model(folder: Path) -> PrunableViT:
    """Save a model of one block that is pruned in every way."""
    torch.manual_seed(0)
    vit = PrunableViT(VisionTransformer(**SMALLEST), arch={"name": None, "args": SMALLEST})
    vit.mean, vit.std = (0.5,), (0.5,)
    steps = {
        "grouped": {"blocks.0.mlp.neuron": 0.5},
        "evit": {"blocks.0.token": 0.5},
        "magnitude": {"blocks.0.mlp.fc1": 0.5},
    }
    options = {"grouped": {"criterion": "magnitude", "compensate": False}}
    plan = Plan(
        steps=tuple(
            Step(pruner=load_method(name, **options.get(name, {})), thresholds=thresholds)
            for name, thresholds in steps.items()
        )
    )
    plan.apply(vit)
    vit.save(folder, measured={"val_top1": 1.0})
    return vit


def shape(folder: Path) -> Format:
    smallest_model(folder)
    path = folder / "shape.json"
    damage = partial(damaged_json, json.loads(path.read_text()))
    return Format(
        path=path, damage=damage, read=lambda: PrunableViT.load(folder), named=str(folder)
    )


def safetensors(content: bytes, random: Random) -> bytes:
    """Damage a safetensors file: its bytes, its header, or JSON in its metadata."""
    if random.integers(3) == 0:
        return damaged(content, random)
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = header.get("__metadata__", {})
    if metadata and random.integers(2):
        key = sorted(metadata)[random.integers(len(metadata))]
        found = damaged_json(json.loads(metadata[key]), random)
        metadata[key] = found.decode(errors="replace")
        text = json.dumps(header).encode()
    else:
        text = damaged_json(header, random)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def weights(folder: Path) -> Format:
    smallest_model(folder)
    path = folder / "model.safetensors"
    damage = partial(safetensors, path.read_bytes())
    return Format(
        path=path, damage=damage, read=lambda: PrunableViT.load(folder), named=str(folder)
    )


def plain_weights(folder: Path) -> Format:
    """Weights that say what they are, without a shape."""
    path, state = folder / "vit.safetensors", VisionTransformer(**SMALLEST).state_dict()
    content = save(state, {"arch": json.dumps(SMALLEST)})
    path.write_bytes(content)
    return Format(
        path=path,
        damage=partial(safetensors, content),
        read=lambda: PrunableViT.from_safetensors(path),
        named=str(path),
    )


def learned(folder: Path) -> Format:
    path = folder / "a.safetensors"
    scores = {"blocks.0.mlp.neuron": torch.ones(4)}
    Learned(scores=scores, weights={"w": torch.ones(2)}, report={"seconds": 1.0}).save(path)
    damage = partial(safetensors, path.read_bytes())
    return Format(path=path, damage=damage, read=lambda: Learned.load(path), named=str(path))


class Line(Learner):
    """Learns a straight line."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
        self.optimizers = {"adam": torch.optim.Adam(self.vit.parameters())}

    def step(self, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        loss = self.vit(images).square().mean()
        loss.backward()
        self.optimizers["adam"].step()
        return loss


def state(folder: Path) -> Format:
    """State of a learning run; its checksum fits, mostly."""
    path = folder / "a.part"
    batch = (torch.ones(2, 1), torch.zeros(2))
    run(Line(), LearningData.of([batch]), 1, 0, path)
    content, size = path.read_bytes(), hashlib.sha256().digest_size
    values = torch.load(io.BytesIO(content[size:]), weights_only=True)

    def sealed(data: bytes) -> bytes:
        return hashlib.sha256(data).digest() + data

    def odd(random: Random) -> bytes:
        stream = io.BytesIO()
        torch.save(odd_values(values, random), stream)
        return sealed(stream.getvalue())

    return Format(
        path=path,
        damage=either(
            partial(damaged, content), lambda random: sealed(damaged(content[size:], random)), odd
        ),
        read=lambda: run(Line(), LearningData.of([]), 0, 0, path),
        named=str(path),
    )


def resealed(values: dict[str, Any]) -> dict[str, Any]:
    """Results with a digest that fits."""
    values = {key: value for key, value in values.items() if key != "digest"}
    return {**values, "digest": json_digest(values)}


def damaged_sealed(values: dict[str, Any], random: Random) -> bytes:
    """Damaged values, mostly behind a digest that fits, so that what is in them is read."""
    content = damaged_json(values, random)
    try:
        found = json.loads(content)
        return json.dumps(resealed(found)).encode() if random.random() < 0.9 else content
    except (ValueError, TypeError, AttributeError, RecursionError):
        return content


def served_note(folder: Path) -> Format:
    """What is known of an MLflow model; where there is nothing, it is made again."""
    path, model = folder / "0001.json", folder / "0001"
    model.mkdir()
    (model / "MLmodel").write_text("a model")
    values = {"weights": "abc", "difference": 2e-6, "reason": "", "files": directory_digest(model)}
    path.write_text(json.dumps(resealed(values)))

    def read() -> object:
        served = read_served(folder, "0001", "abc")
        if served is None:
            raise ValueError(f"{path} is none")
        return served.reason

    return Format(
        path=path, damage=partial(damaged_sealed, resealed(values)), read=read, named=str(path)
    )


def trial(folder: Path, name: str) -> Format:
    """What a trial leaves: its results, or the state of its tuner with a digest that fits."""
    files = TrialFiles(folder, config_of("0001"))
    tuner = {"optimizer": {"state": [torch.ones(2)], "lr": 0.1}, "steps": 3}
    vit = PrunableViT(VisionTransformer(**SMALLEST), arch={"name": None, "args": SMALLEST})
    files.save(vit, [result_of("0001", epoch=1)], tuner, 1.5)
    (saved,) = files.directory.glob("epoch-*")
    path = saved / name
    results, content = path.with_name(RESULTS), path.read_bytes()

    def read() -> object:
        if name == TUNER:
            values = json.loads(results.read_text())
            values["digests"][TUNER] = file_digest(path)
            results.write_text(json.dumps(resealed(values)))
        return files.load()

    def odd(random: Random) -> bytes:
        stream = io.BytesIO()
        torch.save(odd_values(tuner, random), stream)
        return stream.getvalue()

    damage = either(partial(damaged, content), odd)
    if name == RESULTS:
        damage = partial(damaged_sealed, json.loads(content))
    return Format(path=path, damage=damage, read=read, named=str(path.parent))
