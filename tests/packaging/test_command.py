"""`prunefront` as people have it: its verbs, and what it says of what is missing or in its way."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import pytest

import cluster.__main__
import search.__main__
from cluster.command import VERBS, main
from tests.packaging.wheel import Installed


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a command is refused with."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("package", ["search", "cluster"])
def test_the_verbs_are_those_of_the_programs(package: str) -> None:
    parser = {"search": search.__main__, "cluster": cluster.__main__}[package]._parser("prunefront")
    (verbs,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    described = {choice.dest: choice.help for choice in verbs._choices_actions}
    assert described == {verb: does for verb, (of, does) in VERBS.items() if of == package}


def test_help_names_all_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in VERBS)
    assert main([]) == 2


def test_help_of_a_verb_calls_the_command_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("run", "submit"):
        with pytest.raises(SystemExit) as end:
            main([verb, "--help"])
        assert end.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: prunefront {verb} ")


@pytest.mark.parametrize(
    ("verb", "hint"), [("sumbit", "did you mean 'submit'?"), ("x", "there are run, show, ")]
)
def test_an_unknown_verb_is_refused(
    verb: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {verb!r} is no verb of prunefront; {hint}")


def without(folder: Path, *missing: str) -> dict[str, str]:
    """Variables of a process that lacks packages."""
    for name in missing:
        line = f'raise ModuleNotFoundError("No module named {name!r}", name="{name}")\n'
        (folder / f"{name}.py").write_text(line)
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    ("verb", "missing", "extra"),
    [
        ("run", "pyarrow", "search"),
        pytest.param("run", "optuna", "search", marks=pytest.mark.slow),
        ("due", "cronsim", "cluster"),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(
    verb: str, missing: str, extra: str, installed: Installed, tmp_path: Path
) -> None:
    arguments = ["sample"] if verb == "run" else ["--tracking", "sqlite:///x.db"]
    variables = without(tmp_path, missing)
    done = installed.call("prunefront", verb, *arguments, cwd=tmp_path, variables=variables)
    line = refused(done)
    assert f"prunefront {verb} needs {missing}, which is not installed" in line
    assert line.endswith(f"pip install 'prunefront[{extra}]'")


def test_sweeps_are_submitted_without_torch(installed: Installed, tmp_path: Path) -> None:
    variables = without(tmp_path, "torch", "timm", "optuna", "mlflow", "pyarrow", "tomli_w")
    variables["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:9"  # nobody listens
    done = installed.call("prunefront", "submit", "sample", cwd=tmp_path, variables=variables)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: http://127.0.0.1:9")


@pytest.mark.parametrize("name", ["search", "pruners", "cluster"])
@pytest.mark.parametrize("layout", ["{name}/__init__.py", "{name}.py"])
def test_another_package_on_the_path_is_named(
    name: str, layout: str, installed: Installed, tmp_path: Path
) -> None:
    other = tmp_path / "theirs" / layout.format(name=name)
    other.parent.mkdir(parents=True)
    other.write_text("raise RuntimeError('not ours')\n" if name != "cluster" else "")
    variables = {"PYTHONPATH": str(tmp_path / "theirs")}
    line = refused(installed.call("prunefront", "show", "x", cwd=tmp_path, variables=variables))
    found = other.parent if other.name == "__init__.py" else other
    assert f"Python finds the package {name!r} in {found}, " in line
    assert f"take {tmp_path / 'theirs'} off PYTHONPATH, or install prunefront into an " in line


@pytest.mark.slow
def test_a_folder_of_our_name_beside_it_is_no_clash(installed: Installed, tmp_path: Path) -> None:
    for name in ("search", "pruners", "cluster"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    line = refused(installed.call("prunefront", "show", "x", cwd=tmp_path))
    assert line == "error: x/front.json does not exist; give the directory of a sweep that ran"


def test_a_package_that_was_installed_over_ours_is_named(
    installed: Installed, tmp_path: Path
) -> None:
    ours = installed.packages / "search" / "__init__.py"
    theirs = installed.packages / "searchlight-1.0.dist-info"
    content = ours.read_bytes()
    try:
        ours.write_text('"""Searchlight."""\n')
        theirs.mkdir()
        (theirs / "METADATA").write_text("Metadata-Version: 2.1\nName: searchlight\nVersion: 1.0\n")
        (theirs / "RECORD").write_text("search/__init__.py,,\n")
        line = refused(installed.call("prunefront", "show", "x", cwd=tmp_path))
    finally:
        ours.write_bytes(content)
        for file in theirs.iterdir():
            file.unlink()
        theirs.rmdir()
    assert f"error: {ours} is no longer prunefront's: searchlight was installed over it; " in line
