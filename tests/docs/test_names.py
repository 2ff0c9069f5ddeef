"""What pages name exists: files, folders, modules, what is in them, keys of a sweep."""

from __future__ import annotations

import re
import tomllib

import pytest

from search.sweep import parts, spec
from tests.docs.pages import PAGES, ROOT, blocks, lines_of, names_in, resolves, spans, text_of

NOW = [page for page in PAGES if page != "CHANGELOG.md"]  # which also tells what was
PATH = re.compile(r"(?:pruners|search|cluster|tests|docs|\.ci)/[\w./-]*\w/?")
DOTTED = re.compile(r"(?:pruners|search|cluster)(?:\.\w+)+")


def paths(page: str) -> set[str]:
    """Return the paths of this repository that a page names, in its code too."""
    code = "\n".join([*spans(page), *(block.text for block in blocks("", [page]))])
    return set(PATH.findall(code))


@pytest.mark.parametrize("page", NOW)
def test_every_path_exists(page: str) -> None:
    assert [path for path in sorted(paths(page)) if not (ROOT / path).exists()] == []


def test_there_are_paths_to_check() -> None:
    assert "search/sweeps/sample.toml" in paths("README.md")
    assert "tests/benchmarks/gallery.py" in paths("docs/review.md")


@pytest.mark.parametrize("page", NOW)
def test_every_dotted_name_is_defined(page: str) -> None:
    names = {span for span in spans(page) if DOTTED.fullmatch(span) and not is_file(span)}
    names |= set(re.findall(r"(?m)^::: (\S+)$", text_of(page)))
    assert {name for name in names if not resolves(name)} == set()


def is_file(name: str) -> bool:
    return name.rpartition(".")[2] in ("md", "toml", "py")


def test_a_name_that_is_gone_is_found() -> None:
    assert resolves("pruners.model.cost.cost_of")
    assert resolves("pruners.plan.Plan.apply")
    assert resolves("pruners.PrunableViT")
    assert not resolves("pruners.model.cost.price_of")
    assert not resolves("pruners.model.price")


@pytest.mark.parametrize("page", NOW)
def test_every_extra_is_one(page: str) -> None:
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    assert set(re.findall(r"prunefront\[(\w+)\]", text_of(page))) <= set(extras)


@pytest.mark.parametrize("page", NOW)
def test_every_target_of_make_is_one(page: str) -> None:
    targets = set(re.findall(r"(?m)^(\w+):", text_of("Makefile")))
    code = [*spans(page), *(line for block in blocks("", [page]) for line in lines_of(block))]
    named = {found[1] for line in code if (found := re.match(r"make (\w+)", line))}
    assert named - targets == set()


def keys() -> set[str]:
    """Return every key of a sweep, and every option of a method."""
    models = (spec.Sweep, parts.ModelSpec, parts.DataSpec, parts.StepSpec, parts.FineTuneSpec)
    models += (parts.Halving, parts.Constraints, parts.Resources)
    options = re.findall(r"(?m)^\| `(\w+)` \|", text_of("docs/method-options.md"))
    return {key for model in models for key in model.model_fields} | set(options)


def settings(span: str) -> set[str]:
    """Return the keys that `workers = 4, gpu = 1` sets, as sentences say it; none if it does not.

    A single letter stands for a number.
    """
    if not re.match(r"\w+ = ([\"\d\[{]|true|false|[a-z]$)", span):
        return set()
    return set(
        tomllib.loads(re.sub(r", (?=\w+ = )(?![^{]*})", "\n", re.sub(r"= [a-z]$", "= 1", span)))
    )


@pytest.mark.parametrize("page", NOW)
def test_every_setting_is_one(page: str) -> None:
    named = {key for span in spans(page) for key in settings(span)}
    assert named - keys() == set()


def test_settings_are_found_in_sentences() -> None:
    assert settings("workers = 4, gpu = 1") == {"workers", "gpu"}
    assert settings("resources = {cpu = 4, gpu = 1}") == {"resources"}
    assert settings("budgets = [0.4, 0.7]") == {"budgets"}
    assert settings("confirm = k") == {"confirm"}
    assert settings("images/s") == set()


WALK = re.findall(
    r"(?m)^\| (.+?) \| `([^`|]+)` \| `([^`|]+)` \|$",
    text_of("CONTRIBUTING.md").partition("## The walk")[2].partition("\n## ")[0],
)


@pytest.mark.parametrize(("question", "path", "name"), WALK)
def test_the_walk_leads_to_what_it_says(question: str, path: str, name: str) -> None:
    assert name in names_in(ROOT / path), question


def test_the_walk_answers_what_a_newcomer_asks() -> None:
    answers = {question.strip(". "): path for question, path, _ in WALK}
    for question, folder in {
        "Where does a plan get its cost?": "pruners/model/",
        "Where is Optuna asked?": "search/strategy/",
        "Where is MLflow told?": "search/tracking/",
        "Where is a killed trial picked up?": "search/trial/",
        "Where does a new method go?": "pruners/methods/",
        "Where does a new architecture go?": "pruners/model/",
        "Where does a new report go?": "search/report/",
    }.items():
        assert answers[question].startswith(folder), question
    rows = text_of("CONTRIBUTING.md").partition("## The walk")[2].partition("\n## ")[0]
    assert len(WALK) == rows.count("\n| ") - 1  # every row but the head says a place and a name
