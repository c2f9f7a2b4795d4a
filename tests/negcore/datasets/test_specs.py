"""The specs of the named datasets are data in TOML files, and a mistake in such a file is named."""

from dataclasses import astuple

import pytest
import xxhash

from negcore.datasets.mceval8k import SPECS
from negcore.datasets.mini import MINI_SPECS

NAMED = {**SPECS, **MINI_SPECS}
# Computed from the specs while they were written in Python. Prompts, and so the fingerprints of finished runs, follow
# from them: a new dataset adds a line, and no line changes.
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
    "mini/classification": "5f73a3484466de74",
    "mini/fact": "87e17b54d2e2b6d6",
    "mini/linguistic": "27327d80cea412bf",
    "mini/multilingual": "db54e63fde703728",
    "mini/nli": "c34599a02a79c7ee",
    "mini/self-reflection": "8b8738a2a26aceca",
}


def test_the_datasets_keep_their_order():
    assert list(NAMED) == list(DIGESTS)


@pytest.mark.parametrize("name", DIGESTS)
def test_no_spec_ever_changes(name):
    assert xxhash.xxh3_64_hexdigest(repr(astuple(NAMED[name])).encode()) == DIGESTS[name]
