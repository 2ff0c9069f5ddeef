from __future__ import annotations

import pytest

from pruners import load_method, method_names


def test_methods_are_the_files_of_the_folder() -> None:
    assert {"evit", "grouped", "magnitude", "taylor"} <= set(method_names())
    for name in method_names():
        assert load_method(name).name == name


def test_unknown_methods_and_options_say_what_exists() -> None:
    with pytest.raises(
        ValueError, match=r"'magnitud' does not exist; did you mean 'magnitude'\?.*evit"
    ):
        load_method("magnitud")
    with pytest.raises(ValueError, match=r"there are .*grouped"):
        load_method("zzz")
    with pytest.raises(ValueError, match="option 'shar' of evit is unknown; it takes fuse"):
        load_method("evit", shar=1)


@pytest.mark.parametrize("name", ["os", "../evit", "evit.os", "evit\n", "", "__init__", ["evit"]])
def test_what_is_no_method_is_not_imported(name: object) -> None:
    with pytest.raises(ValueError, match=r"method .*there are |method is \['evit'\]; give one of"):
        load_method(name)  # type: ignore[arg-type]


def test_options_of_the_wrong_type_are_named() -> None:
    with pytest.raises(ValueError, match="option ramp_epochs of evit is 'x'; give a whole number"):
        load_method("evit", ramp_epochs="x")


def test_options_from_toml_lists_become_tuples() -> None:
    assert load_method("grouped", units=["neuron"]) == load_method("grouped", units=("neuron",))
