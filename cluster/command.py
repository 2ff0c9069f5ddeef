"""`prunefront VERB ...`: the verbs of `python -m search` and of `python -m cluster`.

Imports a verb's package only when the verb is known, so that sweeps are submitted without torch,
and only if no other package of that name comes first on Python's path.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""Folder that holds the packages."""

PACKAGES = ("search", "pruners", "cluster")

VERBS = {
    "run": ("search", "run a sweep, or continue an interrupted one"),
    "show": ("search", "print the front of a sweep again"),
    "report": ("search", "write a sweep as one page"),
    "compare": ("search", "compare the fronts of sweeps of one model"),
    "export": ("search", "write a trial's model in all formats"),
    "promote": ("search", "approve a version of a registered model"),
    "submit": ("cluster", "run a sweep as a job"),
    "status": ("cluster", "say how the jobs of sweeps stand"),
    "logs": ("cluster", "print what the last job of a sweep has printed"),
    "stop": ("cluster", "stop a sweep; submitted again, it goes on"),
    "due": ("cluster", "submit the scheduled sweeps that are due; run it each minute"),
    "next": ("cluster", "show the slots of the coming week"),
}
"""Verb -> the package whose command it is, and what it does."""


class ClashError(Exception):
    """Another package has the name of one of ours: one line says which, and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The verb's exit code; 2 if the verb is unknown, its packages are not installed, or others
        have their names.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(VERBS)}"
        return _refuse(f"{verb!r} is no verb of prunefront; {hint}")
    package, _ = VERBS[verb]
    try:
        refuse_others()
        return _program(package)(arguments, "prunefront")
    except ClashError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in (*PACKAGES, ""):
            raise
        return _refuse(
            f"prunefront {verb} needs {missing}, which is not installed; "
            f"pip install 'prunefront[{package}]'"
        )


def _program(package: str) -> Callable[[Sequence[str], str], int]:
    """Return the program of a package, which is imported only now."""
    if package == "search":
        from search.__main__ import main as program
    else:
        from cluster.__main__ import main as program
    return program


def usage() -> str:
    """Return what `prunefront --help` prints."""
    verbs = [f"  {verb:<9} {does}" for verb, (_, does) in VERBS.items()]
    return "\n".join(
        ["usage: prunefront VERB ...", "", *verbs, "", "prunefront VERB --help says more."]
    )


def refuse_others(root: Path = ROOT) -> None:
    """Look for other packages of our names: on Python's path, or written over ours.

    Args:
        root: Folder that holds our packages.

    Raises:
        ClashError: If one is found.
    """
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        places = (
            [*(spec.submodule_search_locations or [spec.origin or ""])] if spec else ["nowhere"]
        )
        if Path(places[0]).resolve() != root / name:
            raise ClashError(
                f"Python finds the package {name!r} in {places[0]}, not in {root / name}; take "
                f"{Path(places[0]).parent} off PYTHONPATH, or install prunefront into an "
                "environment of its own"
            )
    if (over := _written_over(root)) is not None:
        others = importlib.metadata.packages_distributions().get(over.parent.name, [])
        named = ", ".join(sorted({other for other in others if other != "prunefront"}))
        raise ClashError(
            f"{over} is no longer prunefront's: {named or 'another package'} was installed over "
            "it; install prunefront into an environment of its own"
        )


def _written_over(root: Path) -> Path | None:
    """Return the first of our packages' `__init__.py` that is not what was installed."""
    try:
        installed = importlib.metadata.distribution("prunefront")
    except importlib.metadata.PackageNotFoundError:  # a checkout
        return None
    for file in installed.files or ():
        path = Path(str(installed.locate_file(file))).resolve()
        if path in {root / name / "__init__.py" for name in PACKAGES} and file.hash is not None:
            content = hashlib.new(file.hash.mode, path.read_bytes()).digest()
            if base64.urlsafe_b64encode(content).decode().rstrip("=") != file.hash.value:
                return path
    return None


def _refuse(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return 2
