from __future__ import annotations

from pathlib import Path

import pytest

from search.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "{folder}/no.toml"], "error: sweep .*no.toml does not exist"),
        (["run", "{folder}/tiny.toml", "--set", "trails=3"], "trails is an unknown key"),
        (
            ["run", "{folder}/tiny.toml", "--set", "data.val='no.parquet'"],
            "data.val is 'no.parquet'",
        ),
        (
            ["run", "{folder}/tiny.toml", "--set", "steps=[{method='evit', fus=1}]"],
            "option 'fus' of evit",
        ),
        (["show", "{folder}"], "front.json does not exist"),
        (["report", "{folder}", "--out", "{folder}/x.html"], "front.json does not exist"),
        (["compare", "{folder}", "{folder}/x"], "front.json does not exist"),
        (["compare", "{folder}"], "give two directories or more"),
        (["export", "{folder}", "--trial", "0001", "--out", "x"], "trials.parquet does not exist"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([a.replace("{folder}", str(sweep_file.parent)) for a in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in message.removeprefix("error: ").split(".*"))
    assert not (sweep_file.parent / "results").exists()


def test_help_names_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("run", "show", "report", "compare", "export"))
