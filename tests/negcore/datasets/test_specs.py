"""The specs of the named datasets are data in TOML files, and a mistake in such a file is named."""

from dataclasses import astuple, fields

import pytest
import xxhash

from negcore.datasets.base import Wording, check_template
from negcore.datasets.mceval8k import SPECS
from negcore.datasets.mini import MINI_SPECS
from negcore.datasets.specs import OptionsField, Spec, read_specs
from negcore.errors import DatasetError

NAMED = {**SPECS, **MINI_SPECS}
# Computed while the specs were still written in Python. Prompts follow from specs, and finished runs rest on prompts:
# a new dataset adds a line here, and no line changes. Units came later, and no prompt depends on them. (The mini sets
# were made anew once, because their rows told the answers.)
DIGESTS = {
    "mceval8k/agnews": "0860bbd86225d089",
    "mceval8k/amazon-reviews": "79f07d48ed3695ab",
    "mceval8k/imdb": "991914dee6689f52",
    "mceval8k/commonsenseqa": "f57a522d4f33273d",
    "mceval8k/fever": "c08d22015ec88a5d",
    "mceval8k/myriadlama": "2876007d41e25d21",
    "mceval8k/templama": "d15923567c111308",
    "mceval8k/chunking": "6affeda0c1c176ce",
    "mceval8k/clang8": "dae5be557ec08624",
    "mceval8k/ner": "9809e4f04f567c5b",
    "mceval8k/postag": "9e3851bd5c1c44b6",
    "mceval8k/amazon-review-multi": "45a25fc2fb50cefc",
    "mceval8k/lti": "eefd7d28d17cbaa8",
    "mceval8k/mlama": "0fe93c6068bc6bfc",
    "mceval8k/mpostag": "a8c5e78dba374815",
    "mceval8k/xnli": "94608814e94121c9",
    "mceval8k/mnli": "01cace132f38acdf",
    "mceval8k/paws": "92ee08e47aa7e1c1",
    "mceval8k/swag": "3cda314dc1921c4e",
    "mceval8k/halueval": "10e60e00a3338538",
    "mceval8k/stereoset": "ff82debc2026faca",
    "mceval8k/toxicity": "0ba48cb2cdce16cf",
    "mini/classification": "7e0d8b6e311a472f",
    "mini/fact": "87e17b54d2e2b6d6",
    "mini/linguistic": "0db843699015788f",
    "mini/multilingual": "8cc31749f867b55d",
    "mini/nli": "c34599a02a79c7ee",
    "mini/self-reflection": "8b8738a2a26aceca",
}


def test_the_datasets_keep_their_order():
    assert list(NAMED) == list(DIGESTS)


@pytest.mark.parametrize("name", DIGESTS)
def test_no_spec_ever_changes(name):
    spec = NAMED[name]
    values = tuple(value for field, value in zip(fields(spec), astuple(spec), strict=True) if field.name != "unit")
    assert xxhash.xxh3_64_hexdigest(repr(values).encode()) == DIGESTS[name]


@pytest.mark.parametrize("spec", NAMED.values(), ids=NAMED)
def test_every_wording_asks_for_fields_of_its_records(spec):
    for wording in spec.wordings:
        check_template(wording.question, spec.fields)


SIZES = """
[sizes]
genre = "order"
fields = ["first", "second"]
options = ["Smaller", "Larger"]
wordings.default.instruction = "Compare each two numbers."
wordings.default.question = "{first} and {second}"
wordings.inline.instruction = "Which way does it go?"
wordings.inline.question = "From {first} to {second}"
"""


def specs_of(tmp_path, text):
    path = tmp_path / "own.toml"
    path.write_text(text)
    return read_specs(path)


def test_a_dataset_is_one_table(tmp_path):
    (spec,) = specs_of(tmp_path, SIZES)
    inline = Wording(
        name="inline",
        instruction="Which way does it go?",
        question="From {first} to {second}",
        option="({letter}) {text}",
        separator="  ",
        cue="The letter of the right option is",
    )
    default = Wording(name="default", instruction="Compare each two numbers.", question="{first} and {second}")
    assert spec == Spec(
        name="sizes",
        genre="order",
        fields=("first", "second"),
        options=("Smaller", "Larger"),
        wordings=(default, inline),
    )


def test_a_dataset_like_another_takes_the_keys_that_it_does_not_have(tmp_path):
    own = '[own]\nlike = "sizes"\noptions = { name = "choices", n_options = 3 }\n'
    first, second = specs_of(tmp_path, own + SIZES)
    assert (first.name, first.genre, first.fields) == ("own", "order", second.fields)
    assert first.options == OptionsField("choices", 3) and first.wordings == second.wordings


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('colour = "red"', "dataset 'sizes': the key 'colour' is unknown; allowed: genre, fields, options, answer,"),
        ('name = "other"', "dataset 'sizes': the key 'name' is unknown"),
        ('like = "nothing"', "dataset 'sizes': like is 'nothing'; allowed: the other datasets of the file"),
        ('wordings.default.mood = "glad"', "dataset 'sizes', wording 'default': the key 'mood' is unknown"),
        ('wordings.third.question = "?"', "dataset 'sizes', wording 'third': the key 'instruction' is missing"),
        ('[empty]\ngenre = "order"', "dataset 'empty': the key 'fields' is missing"),
        ('[few]\nlike = "sizes"\noptions.name = "all"', "dataset 'few', options: the key 'n_options' is missing"),
        ("genre", "own.toml: not TOML"),
    ],
)
def test_a_mistake_is_named_with_its_file_and_dataset(tmp_path, line, message):
    with pytest.raises(DatasetError) as error:
        specs_of(tmp_path, SIZES + line)
    assert f"{tmp_path / 'own.toml'}" in str(error.value) and message in str(error.value)
