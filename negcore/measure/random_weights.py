"""Models that have learned nothing: their weights as the configuration initialises them, before any training.

Tokens have embeddings that differ, so a random network can still tell words apart. Weights that keep the values of the
trained ones, in another order, are no choice: activations grow so large in some families (Gemma) that rounding shows.
"""

from dataclasses import replace

import torch

from negcore.errors import ModelError
from negcore.measure.loading import checked
from negcore.model.language_model import LanguageModel
from negcore.model.quantised import plain_config
from negcore.model.skeleton import auto_class


def random_revision(revision: str, seed: int) -> str:
    """Return the revision of a model's weights once they are random: other weights, so another revision."""
    return f"{revision}+random-{seed}"


def randomise_weights(lm: LanguageModel, seed: int) -> LanguageModel:
    """Give a model the weights of a new model of its configuration, in place, and check it anew.

    They are drawn on the CPU in float32, so that devices and number types change nothing, and take memory there.

    Parameters
    ----------
    lm : LanguageModel
        Its weights are changed.
    seed : int
        Decides the weights; not negative.

    Returns
    -------
    LanguageModel
        The same model under another revision.

    Raises
    ------
    ModelError
        If some of its weights wait on disk, or it fails the check: see `negcore.measure.loading.accept`.

    References
    ----------
    Zhang, Bowman (2018), "Language Modeling Teaches You More than Translation Does", arXiv 1809.10040: untrained models
    as controls of probes.
    """
    if any(weight.is_meta for weight in lm.model.parameters()):
        raise ModelError(f"model {lm.card.name!r}: weights that wait on disk are not made random: give it more memory")
    config = plain_config(lm.card.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = auto_class(config, masked=lm.arch.masked).from_config(config, dtype=torch.float32)
    lm.model.load_state_dict(fresh.state_dict())
    card = replace(lm.card, revision=random_revision(lm.revision, seed))
    return checked(replace(lm, card=card, check=None))
