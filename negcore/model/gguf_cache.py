"""GGUF files, converted to safetensors directories in the cache; those that ship in Python packages have an alias."""

import importlib.util
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from xxhash import xxh3_128

from negcore.errors import ModelError, NegError
from negcore.model.checksums import checksum, checksums
from negcore.model.embedded import EMBEDDED
from negcore.model.model_files import check_file, read_object, reading, unused_gguf_weights
from negcore.model.whole_weights import load_whole, refuse_unused
from negcore.store.files import cache_directory, sync
from negcore.store.temporary import temporary_directory

logger = logging.getLogger(__name__)


_CONVERSION_VERSION = "1"
_CONTENTS = "checksums"
"""File of a converted model with the checksums of the others; its name keeps it out of the model's revision."""


def embedded_files(alias: str) -> list[Path]:
    """Return the pieces of an alias's GGUF file."""
    parts, command, digests = EMBEDDED[alias]
    files: list[Path] = []
    for package, name in parts:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModelError(f"model {alias!r} ships in a package that is not installed; run: {command}")
        files.append(Path(spec.origin).parent / name)
    with reading(f"model {alias!r}"):
        for file, known in zip(files, digests, strict=True):
            check_file(file)
            if checksum(file) != known:
                raise ModelError(f"{str(file)!r} is damaged or of another version; run: {command} --force-reinstall")
    return files


def convert_gguf(*pieces: Path) -> Path:
    """Convert a GGUF file to a safetensors directory, safely under concurrent starts; return the directory.

    That is done once, and again if the directory is no longer what was written.
    """
    with reading(f"GGUF file {str(pieces[0])!r}"):
        for piece in pieces:
            check_file(piece.absolute())
        digests = ":".join(checksums([(piece, "xxh3") for piece in pieces]))
    digest = xxh3_128(f"{_CONVERSION_VERSION}:{digests}".encode()).hexdigest()
    target = cache_directory() / "gguf" / digest
    if _is_as_written(target):
        return target
    with _draft_folder(target) as folder:
        if not _is_as_written(target):
            draft = folder / "model"
            with reading(f"GGUF file {str(pieces[0])!r} could not be converted"):
                _write_safetensors(_joined(pieces, folder / "joined.gguf"), draft)
                _note_contents(draft)
                if target.exists():
                    logger.warning("%s is damaged or of an earlier version: it is made again", target)
                    target.rename(folder / "damaged")
                draft.rename(target)
                sync(target.parent)
    return target


def _note_contents(directory: Path) -> None:
    """Note the checksum of every file of a directory in it, and wait until all of them are on the disk."""
    (directory / _CONTENTS).write_text(json.dumps(_contents(directory)), encoding="utf-8")
    for path in (*directory.iterdir(), directory):
        sync(path)


def _is_as_written(directory: Path) -> bool:
    """Tell whether a directory holds exactly the files whose checksums were noted in it."""
    try:
        noted = read_object(directory / _CONTENTS) if (directory / _CONTENTS).exists() else None
        return noted is not None and noted == _contents(directory)
    except (OSError, NegError):
        return False


def _contents(directory: Path) -> dict[str, str]:
    files = sorted(file for file in directory.iterdir() if file.name != _CONTENTS)
    return dict(zip([file.name for file in files], checksums([(file, "xxh3") for file in files]), strict=True))


@contextmanager
def _draft_folder(target: Path) -> Iterator[Path]:
    """Give a folder beside a directory that is to be made in the cache, to one process at a time.

    Raises
    ------
    ModelError
        If the cache cannot be written.
    """
    with ExitStack() as held:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(f"{target}.lock"))
            folder = held.enter_context(temporary_directory(target.parent))
        except OSError as error:
            raise ModelError(
                f"the cache {str(target.parent)!r} cannot be written ({error.strerror or error}): make room there, or "
                "set NEG_CACHE to a directory that can"
            ) from error
        yield folder


def _joined(pieces: Sequence[Path], whole: Path) -> Path:
    """Return the only piece, or all of them written to one file."""
    if len(pieces) == 1:
        return pieces[0]
    with whole.open("wb") as stream:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, stream)
    return whole


def _write_safetensors(file: Path, directory: Path) -> None:
    options = {"gguf_file": file.name}
    folder = file.parent or Path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    model = load_whole(transformers.AutoModelForCausalLM, folder, dtype=torch.float32, **options)
    refuse_unused(unused_gguf_weights(file, model.config.get_text_config().num_hidden_layers))
    # The weights are plain floats by now, but transformers does not save a model that is still marked as quantized.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
