"""Models are called by their names, not by their paths, and two with one name are told apart."""

import threading

import pytest

from flows.show.accuracy_tables import asked
from flows.show.model_names import distinct_names, shown_model, told_apart


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/data/models/tiny", "tiny"),
        ("./tiny", "tiny"),
        ("a/b/tiny/", "tiny"),
        ("~/tiny", "tiny"),
        ("models/tiny.gguf", "tiny.gguf"),
        ("tiny", "tiny"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("smollm2-135m", "smollm2-135m"),
        ("smollm2-135m+/adapters/french", "smollm2-135m+french"),
        ("/models/c++/tiny", "tiny"),
        ("m" * 300 + "/n", "m" * 300 + "/n"),
        ("/", "/"),
    ],
)
def test_a_model_is_called_by_the_last_part_of_its_path_and_others_as_they_are(model, name):
    assert shown_model(model) == name
    assert asked(model, 0) == f"{name}, zero-shot"


def test_a_directory_here_is_a_path_even_if_it_looks_like_a_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown_model("models/tiny") == "models/tiny"
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert shown_model("models/tiny") == "tiny"


def test_models_that_end_alike_are_told_apart_by_as_much_as_that_takes():
    given = ["/a/x/tiny", "/b/x/tiny", "/c/y/tiny", "/c/other", "/tiny", "org/tiny"]
    names = distinct_names(given)
    assert names == {
        "/a/x/tiny": "a/x/tiny",
        "/b/x/tiny": "b/x/tiny",
        "/c/y/tiny": "y/tiny",
        "/c/other": "other",
        "/tiny": "/tiny",
        "org/tiny": "org/tiny",
    }
    assert len(set(distinct_names(["/tiny", "tiny", "./tiny", "org/tiny"]).values())) == 4


def test_names_are_told_apart_inside_the_block_alone_also_in_another_thread():
    with told_apart(["/a/tiny", "/b/tiny"]):
        assert [shown_model("/a/tiny"), shown_model("/b/tiny")] == ["a/tiny", "b/tiny"]
        seen = []
        thread = threading.Thread(target=lambda: seen.append(shown_model("/a/tiny")))
        thread.start()
        thread.join()
        assert seen == ["tiny"]  # another run of this process, with models of its own
    assert shown_model("/a/tiny") == "tiny"
