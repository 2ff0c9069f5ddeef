"""What a pruning method is: `Pruner`, its three families, and `load_method`.

A *unit* method removes heads, head dims, neurons or branches; a *token* method lets fewer tokens
flow; a *weight* method zeroes single weights. A threshold is a share: for each site the share of
its units to cut, lowest scores first. So cost is a pure function of the thresholds (`shrink`), and
thresholds mean the same for every method.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol, runtime_checkable

from pruners.families.options import check_options
from pruners.model.shape import ViTShape
from pruners.model.types import Batches, Scores, Thresholds
from pruners.model.vit import ViT

FAMILIES = ("unit", "token", "weight")
"""The families, in the order in which a plan applies them."""


@dataclass(frozen=True, kw_only=True)
class Pruner(abc.ABC):
    """A pruning method: a frozen dataclass of its own options.

    Their types are those of the fields, their bounds are declared with `option`.
    """

    family: ClassVar[str]
    whole_sites: ClassVar[bool] = False
    """Whether a threshold of 1 is allowed; it removes the whole branch of its site."""

    def __post_init__(self) -> None:
        """Check each option by itself; a method adds what its options must be together.

        Raises:
            ValueError: That names the option, its value and what would be right.
        """
        check_options(self.name, self)

    @property
    def name(self) -> str:
        """The method's name: that of its file."""
        return type(self).__module__.rpartition(".")[2]

    def options(self) -> dict[str, Any]:
        """The options as JSON values; `load_method(name, **options)` gives an equal method."""
        return dataclasses.asdict(self)

    @abc.abstractmethod
    def sites(self, shape: ViTShape) -> dict[str, int]:
        """Return each site that can be cut in a network of that shape, and its number of units."""

    @abc.abstractmethod
    def score(self, vit: ViT, batches: Batches) -> Scores:
        """Score the units of each site. `vit` is left as it was."""

    @abc.abstractmethod
    def allocate(self, shape: ViTShape, scores: Scores, macs: float) -> Thresholds:
        """Propose thresholds whose shape has at most `macs` effective MACs.

        Raises:
            ValueError: If this method alone cannot get there.
        """

    @abc.abstractmethod
    def shrink(self, shape: ViTShape, thresholds: Thresholds) -> ViTShape:
        """Return the shape after the cut, without doing it. Pure."""

    @abc.abstractmethod
    def cut(self, vit: ViT, scores: Scores, thresholds: Thresholds) -> None:
        """Cut in place."""

    def prune(self, vit: ViT, batches: Batches, thresholds: Thresholds) -> None:
        """Score and cut in place."""
        self.cut(vit, self.score(vit, batches), thresholds)

    def ramped(self, thresholds: Thresholds, epoch: int) -> Thresholds:
        """Return the thresholds to reach before fine-tuning epoch 1, 2, ... (0: at once)."""
        return thresholds

    def check(self, shape: ViTShape, thresholds: Thresholds) -> None:
        """Check thresholds for a network of that shape.

        Raises:
            ValueError: For an unknown site or a share out of range.
        """
        sites = self.sites(shape)
        for site, share in thresholds.items():
            if site not in sites:
                raise ValueError(
                    f"threshold of {site!r} names no site of {self.name}; its sites are like "
                    f"{', '.join(list(sites)[:3]) or '(none left)'}"
                )
            number = isinstance(share, (int, float))
            if not number or not (0.0 <= share < 1.0 or (share == 1.0 and self.whole_sites)):
                raise ValueError(
                    f"threshold of {site} is {share!r}; "
                    "give the share of units to cut, 0 <= share < 1"
                    + (", or 1 for the whole branch" if self.whole_sites else "")
                )


@runtime_checkable
class ReducesTokens(Protocol):
    """A method whose models hold token reducers, which a saved model is rebuilt with."""

    def place(self, vit: ViT, thresholds: Thresholds) -> None:
        """Put reducers into the blocks of a model; weights are loaded afterwards."""


@cache
def method_names() -> tuple[str, ...]:
    """Names of the methods that exist: the files of `pruners/methods/`."""
    package = importlib.import_module("pruners.methods")
    return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__)))


def load_method(name: str, **options: Any) -> Pruner:
    """Build the method `name` with the given options.

    Raises:
        ValueError: For an unknown name or option, with those that exist.
    """
    names = method_names()
    if not isinstance(name, str):
        raise ValueError(f"method is {name!r}; give one of {', '.join(names)}")
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"method {name!r} does not exist; {hint}there are {', '.join(names)}")
    module = importlib.import_module(f"pruners.methods.{name}")
    (method,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Pruner)
        and value.__module__ == module.__name__
    )
    known = [f.name for f in dataclasses.fields(method)]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"option {unknown[0]!r} of {name} is unknown; "
            f"it takes {', '.join(known) or 'no options'}"
        )
    # TOML and JSON have lists where options are tuples.
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return method(**given)
