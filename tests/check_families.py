"""Print what the check at load finds in a tiny random model of every family, as a Markdown table.

Run it from the repository: `python -m tests.check_families [FAMILY ...]`; about a minute for all of them.
"""

import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))  # `support` is a module beside this one, as for the tests
from support import CONFIGS, tiny_model

from negcore.model.check import COMPARED, Comparison, ModelCheck
from negcore.model.language_model import LanguageModel


def main(families: list[str]) -> None:
    """Print a row a family, with the differences in float64 and in float32."""
    print(f"| family | way | layers | {' | '.join(f'{name} (float64, float32)' for name in COMPARED)} |")
    print("|---" * (3 + len(COMPARED)) + "|")
    for family in families:
        models = [tiny_model(family, dtype=dtype) for dtype in (torch.float64, torch.float32)]
        print(_row(family, models[0], [lm.check for lm in models]), flush=True)


def _row(family: str, lm: LanguageModel, checks: list[ModelCheck]) -> str:
    layers = f"{lm.n_layers} of {len(lm.model.get_submodule(lm.arch.layers))}"
    found = [", ".join(_cell(check[name]) for check in checks) for name in COMPARED]
    return f"| {' | '.join([f'`{family}`', lm.way, layers, *found])} |"


def _cell(one: Comparison) -> str:
    """A difference in bold failed; a way that a family does not go has a name for what it does instead."""
    if not one.applies:
        return {"virtual": "hooks", "prefix": "none"}[one.name]
    measured = "error" if one.difference is None else f"{one.difference:.0e}"
    return measured if one.passed else f"**{measured}**"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(sys.argv[1:] or list(CONFIGS))
