"""Datasets as data: multiple-choice prompts and single-answer facts, made for one tokenizer."""

from negcore.datasets.base import (
    SPLITS,
    Change,
    Dataset,
    Demonstration,
    Example,
    Overlap,
    PromptSettings,
    SplitReport,
    Tokenizer,
    Wording,
    fingerprint,
)
from negcore.datasets.chat import chat_prompts
from negcore.datasets.facts import FactSet, load_facts
from negcore.datasets.load import DatasetInfo, dataset_name, list_datasets, load_dataset
from negcore.datasets.render import choose_label_prefix, label_token

__all__ = [
    "SPLITS",
    "Change",
    "Dataset",
    "DatasetInfo",
    "Demonstration",
    "Example",
    "FactSet",
    "Overlap",
    "PromptSettings",
    "SplitReport",
    "Tokenizer",
    "Wording",
    "chat_prompts",
    "choose_label_prefix",
    "dataset_name",
    "fingerprint",
    "label_token",
    "list_datasets",
    "load_dataset",
    "load_facts",
]
