"""The files of a model: checked before a library reads them, and told apart by their content.

Libraries meet a file that they cannot read with exceptions of many kinds, and with guesses. `reading` is the border
around them: whatever they raise becomes one `ModelError`, so that one bad model ends neither a run of several nor a
worker that holds another.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from gguf import GGUFReader
from safetensors import safe_open
from xxhash import xxh3_128

from negcore.errors import ModelError, RunError, one_line
from negcore.model.checksums import Method, checksums
from negcore.store.files import MOST_RECORD_BYTES, parse_json, read_bytes
from negcore.texts import quoted

_SUFFIXES = (".safetensors", ".json", ".txt", ".model")
"""Endings of the files that decide a model's numbers."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ADAPTER = "adapter_config.json"
"""File that tells the folder of an adapter from that of a model."""
_OBJECTS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Files that hold a JSON object."""
_SIZES = (
    (r"(layers|layer|depth)$", 10_000),
    (r"position|seq_len|seq_length", 2**31),
    (r"(size|dim|embd|inner|heads|head|experts|width)$", 2**24),
)
"""Most that a number of a configuration may be, by what its key is like."""
_FLOATS = ("F64", "F32", "F16", "BF16")

HARMLESS = re.compile(
    r"inv_freq$|(^|\.)position_ids$|(^|\.)token_type_ids$|(attn|attention)\.(masked_)?bias$"  # buffers, not weights
    r"|(^|\.)(vision|visual|image|audio|speech)\w*\.|(^|\.)(multi_?modal|mm)_?\w*\.|(^|\.)embed_(vision|audio)\."
    r"|(^|\.)pooler\.|^cls\.seq_relationship\.|(^|\.)mtp(\.|_|\d)"
)
"""Weights that may be left over: buffers of earlier versions, towers that see and hear, heads for other tasks."""
_LFS = b"version https://git-lfs.github.com/spec/"
_INDICES = "*.safetensors.index.json"
_PLAIN = (ModelError, OSError, ValueError, RuntimeError)
"""Errors whose message says enough without their type."""


def plain_reason(error: BaseException) -> str:
    """Return the message of an exception on one line, with its type if the message alone may say too little."""
    return one_line(error) if isinstance(error, _PLAIN) else f"{type(error).__name__}: {one_line(error)}"


@contextmanager
def reading(what: str, reason: Callable[[BaseException], str] = plain_reason) -> Iterator[None]:
    """Turn whatever a library raises while it reads a model's files into one line that begins with `what`.

    Parameters
    ----------
    what : str
    reason : callable, optional
        Function that returns the rest of the line.

    Raises
    ------
    ModelError
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of the tokenizers' Rust code is no Exception
        raise ModelError(f"{what}: {reason(error):.300}") from error


def check_directory(directory: Path) -> None:
    """Refuse a model directory with files that are not what their names say, before any library guesses at them.

    Raises
    ------
    ModelError
        Naming the first file at fault.
    """
    for file in _files(directory):
        check_file(file)
    for file in directory.iterdir():  # a pipe in place of any other file would be waited for
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise ModelError(f"{str(file)!r} {_not_a_file(file)}")
    if not (directory / "config.json").exists():
        raise ModelError(f"{str(directory)!r} has no config.json: give the directory that save_pretrained wrote")
    objects = {name: read_object(directory / name) for name in _OBJECTS if (directory / name).exists()}
    if (directory / ADAPTER).exists():
        raise ModelError(f"{str(directory)!r} holds an adapter ({ADAPTER}): name its model, and give this as --adapter")
    _check_weights(directory, is_quantized="quantization_config" in objects["config.json"])


def check_file(file: Path) -> None:
    """Refuse a file that cannot be read, or is not the file itself but what stands for it.

    Raises
    ------
    ModelError
    """
    try:
        if not file.is_file():
            raise ModelError(f"{str(file)!r} {_not_a_file(file)}")
        with file.open("rb") as stream:
            start = stream.read(len(_LFS))
    except OSError as error:
        raise ModelError(f"{str(file)!r} cannot be read ({error.strerror or error})") from error
    if start == _LFS:
        raise ModelError(f"{str(file)!r} is a Git LFS pointer, not the file that it stands for: run git lfs pull")


def _not_a_file(file: Path) -> str:
    if file.is_symlink():
        return f"is a link to {str(file.readlink())!r}, where no file is: fetch it, or mend the link"
    return "is no file" if file.exists() else "is no such file"


def read_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises
    ------
    ModelError
        If the file holds anything else.
    """
    try:
        found = parse_json(read_bytes(file, MOST_RECORD_BYTES))
    except RunError as error:
        raise ModelError(f"{error}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(file)!r} is not JSON ({one_line(error):.200}): fetch or save it again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{str(file)!r} holds a {type(found).__name__}; an object is needed")
    return found


def check_sizes(config: Any, key: str = "") -> None:
    """Refuse a configuration with more layers, or wider ones, than any model has: to look at it would take days.

    Raises
    ------
    ModelError
        Naming the key.
    """
    if isinstance(config, dict):
        for name, value in config.items():
            check_sizes(value, str(name))
    elif isinstance(config, list):
        for value in config:
            check_sizes(value, key)
    elif isinstance(config, (int, float)):
        most = next((most for pattern, most in _SIZES if re.search(pattern, key)), math.inf)
        if config > most:
            raise ModelError(f"{key:.80} is {quoted(config)} in config.json; at most {most} are read")


def _check_weights(directory: Path, *, is_quantized: bool) -> None:
    """Refuse weights that are missing, pickled, cut short, or no plain numbers, by their names and headers alone."""
    weights = [file for file in _files(directory) if file.suffix == ".safetensors" and file.name[0] != "."]
    if not weights:
        pickles = sorted(file.name for file in directory.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise ModelError(
                f"{str(directory)!r} has its weights in {pickles[0]}, a format that can hold code and is never read: "
                "save the model again as safetensors"
            )
        raise ModelError(f"{str(directory)!r} has no weights: a file that ends in .safetensors is needed")
    for file in weights:
        with reading(f"{str(file)!r} is not safetensors"), safe_open(file, framework="numpy") as header:
            types = {name: header.get_slice(name).get_dtype() for name in header.keys()}  # noqa: SIM118
        odd = [name for name in sorted(types) if types[name] not in _FLOATS and not HARMLESS.search(name)]
        if odd and not is_quantized:
            raise ModelError(
                f"{str(file)!r} holds {odd[0]} as {types[odd[0]]}, but config.json has no quantization_config that "
                f"says what these numbers mean; allowed without: {', '.join(_FLOATS)}"
            )


def _named_by(index: Path) -> list[str]:
    """Return the files that an index of weights names: safetensors, in its directory or below it, nowhere else."""
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ModelError(f"{str(index)!r} has no weight_map from weights to files: fetch or save it again")
    names = sorted(set(shards.values()))
    for name in names:
        path = PurePath(name)
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors" or "\0" in name:
            raise ModelError(
                f"{str(index)!r} names {quoted(name)}; allowed are files that end in .safetensors, in its directory "
                "or below it"
            )
        if not (index.parent / name).exists():
            raise ModelError(f"{str(index)!r} names {name}, which is not there: fetch or save it again")
    return names


def unused_gguf_weights(file: Path, n_layers: int) -> list[str]:
    """Return the tensors of a GGUF file that transformers drops without a word: further layers, rescaled rotations."""
    names = [str(tensor.name) for tensor in GGUFReader(file).tensors]
    layers = {name: re.match(r"blk\.(\d+)\.", name) for name in names}
    return [name for name, layer in layers.items() if name.startswith("rope_") or (layer and int(layer[1]) >= n_layers)]


def _files(directory: Path) -> list[Path]:
    """Return the files of a model directory that decide its numbers, by name; those that an index names among them."""
    try:
        files = {file for file in directory.iterdir() if file.suffix in _SUFFIXES}
        for index in directory.glob(_INDICES):
            check_file(index)
            files |= {directory / name for name in _named_by(index)}
        return sorted(files)
    except OSError as error:
        raise ModelError(f"{str(directory)!r} cannot be read ({error.strerror or error})") from error


def directory_digest(directory: Path) -> str:
    """Return the xxh3-128 over every file of a model directory that decides its numbers."""
    files = _files(directory)
    digest = xxh3_128()
    for file, found in zip(files, checksums([(file, "xxh3") for file in files]), strict=True):
        digest.update(f"{file.relative_to(directory).as_posix()}:{found};".encode())
    return digest.hexdigest()


def check_snapshot(directory: Path, *, weights: bool) -> None:
    """Refuse files of the hub's cache whose content is not what the hub named them after.

    The cache keeps a file under its SHA-256 or, if it is small, the SHA-1 of git, and links to it. Files that are no
    such links cannot be checked.

    Parameters
    ----------
    directory : Path
        Snapshot of a commit.
    weights : bool
        False to leave out the weights.

    Raises
    ------
    ModelError
        Naming the file that is damaged.
    """
    files = [file for file in _files(directory) if weights or file.suffix != ".safetensors"]
    blobs = [blob for blob in map(Path.resolve, files) if blob.parent.name == "blobs"]
    known: list[tuple[Path, Method]] = [(blob, method) for blob in blobs if (method := _method_of(blob)) is not None]
    for (blob, _), found in zip(known, checksums(known), strict=True):
        if found != blob.name:
            raise ModelError(f"{str(blob)!r} is damaged (its checksum is not its name): delete it, to fetch it again")


def _method_of(blob: Path) -> Method | None:
    if not re.fullmatch("[0-9a-f]+", blob.name):
        return None
    methods: dict[int, Method] = {64: "sha256", 40: "git"}
    return methods.get(len(blob.name))
