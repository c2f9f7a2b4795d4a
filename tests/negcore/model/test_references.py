"""References of models: revisions in short and in full, and the names that models have in outputs."""

import pytest

from negcore.errors import ModelError
from negcore.model.references import folder_name, model_names, whole_references


@pytest.mark.parametrize(
    ("given", "whole"),
    [
        (["org/m@a", "@b"], ("org/m@a", "org/m@b")),
        (["org/m@a, @b,@c"], ("org/m@a", "org/m@b", "org/m@c")),
        (["org/m", "@refs/pr/1", "x/y", "@b"], ("org/m", "org/m@refs/pr/1", "x/y", "x/y@b")),
        (["org/m@a", "org/m@b"], ("org/m@a", "org/m@b")),
        (["org/m, with a comma"], ("org/m, with a comma",)),
    ],
)
def test_a_revision_alone_repeats_the_model_before_it(given, whole):
    assert whole_references(given) == whole


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["@a", "org/m"], "'@a' is one of the model before it, and there is none"),
        (["org/m", "@"], "'@' names no revision"),
        (["smollm2-135m", "@a"], "'smollm2-135m' is none of the hub's"),
        (["/models/m.gguf", "@a"], "'/models/m.gguf' is none of the hub's"),
    ],
)
def test_a_revision_of_nothing_is_refused(given, says):
    with pytest.raises(ModelError, match=says):
        whole_references(given)


def test_a_revision_of_a_folder_is_refused_and_a_folder_with_such_a_name_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,@b").mkdir()
    assert whole_references(["a,@b"]) == ("a,@b",)
    assert model_names(["a,@b", "org/m@c"]) == {"a,@b": "a,@b", "org/m@c": "org/m"}
    with pytest.raises(ModelError, match="is none of the hub's"):
        whole_references([str(tmp_path), "@a"])


def test_a_revision_alone_keeps_the_adapter_of_the_model_before_it(tmp_path):
    adapter = tmp_path / "fr@nch"
    adapter.mkdir()
    assert whole_references([f"org/m@a+{adapter}", "@b"]) == (f"org/m@a+{adapter}", f"org/m@b+{adapter}")


def test_names_have_the_revision_where_several_are_of_one_model():
    assert model_names(["org/m@a"]) == {"org/m@a": "org/m"}
    assert model_names(["org/m@b", "x/y@b", "org/m@a", "org/m"]) == {
        "org/m@b": "org/m@b",
        "x/y@b": "x/y",
        "org/m@a": "org/m@a",
        "org/m": "org/m",
    }


def test_a_folder_is_named_after_the_model_and_its_whole_revision():
    names = {"org/m@refs/pr/1": "m@refs-pr-1", "org/m@a": "m@a", "org/m": "m", "/models/m": "m", "..": ".."}
    assert {ref: folder_name(ref) for ref in names} == names
