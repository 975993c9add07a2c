"""Suspects in GGUF, the format of llama.cpp: which file it is, and what is checked before transformers reads it."""

import struct
from pathlib import Path
from typing import Any, BinaryIO

from transformers.integrations.gguf import GgufHeader, read_gguf_metadata
from transformers.utils import cached_file, is_gguf_available


# The readers make an object of each value of the metadata. The largest vocabularies take about a million.
_MAX_VALUES = 2**22
# Characters of one text of the metadata.
_MAX_TEXT = 2**26
# The bytes of a value by its type. Texts and lists have a length of their own.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST = 8, 9


def split_gguf(path: str | Path) -> tuple[str, str | None]:
    """
    Split the name of a model into its place and its GGUF file.

    Args:
        path (`str` or `Path`):
            A folder or a name on the Hub, or one of these with a file, such as `owner/name/model.gguf`. A folder that
            has no safetensors, and one GGUF file, stands for this file.

    Returns:
        `tuple[str, str | None]`: The folder or the name on the Hub, and the name of the file. `None` if the weights
        are not in GGUF.

    Raises:
        `ValueError`: If a folder leaves open which of several files is meant.
    """
    path = Path(path) if Path(path).exists() else path
    if str(path).endswith(".gguf") and not Path(path).is_dir():
        folder, _, name = str(path).rpartition("/")
        return folder or ".", name
    if not Path(path).is_dir() or any(Path(path).glob("*.safetensors")):
        return str(path), None
    names = sorted(file.name for file in Path(path).glob("*.gguf"))
    if len(names) > 1:
        raise ValueError(
            f"{path} has {len(names)} GGUF files: pass the file that is meant as the model, such as "
            f"{Path(path) / names[0]}."
        )
    return str(path), names[0] if names else None


def gguf_header(path: str, folder: str, name: str, **options: Any) -> GgufHeader:
    """
    Read which tensors a GGUF file holds, and check what it says about sizes against the file itself.

    Args:
        path (`str`):
            The name of the model, for errors.
        folder (`str`):
            The folder, or the name on the Hub.
        name (`str`):
            The name of the file.
        **options:
            Where the file is: the `revision`, the `cache_dir` and the like.

    Raises:
        `ValueError`: If the file cannot be read, holds a part of a model, or asks for more memory than it takes.
    """
    if not is_gguf_available():
        raise ValueError(f"{path} is GGUF, which the package gguf reads: `pip install crow-hf[gguf]`.")
    try:
        file = Path(str(cached_file(folder, name, **options)))
        size = file.stat().st_size
        with file.open("rb") as stream:
            _check_metadata(stream)
        header, (metadata, _) = GgufHeader.from_file(str(file)), read_gguf_metadata(str(file))
    # The readers meet damage in many ways.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{path} cannot be read as GGUF ({reason}). Download the file again.") from error
    if metadata.get("split.count", 1) != 1:
        raise ValueError(f"{path} is one of several parts of a model: join them with `llama-gguf-split --merge`.")
    held, ends = sum(info.nbytes for info in header.tensors), [info.offset + info.nbytes for info in header.tensors]
    if header.data_start + max([held, *ends]) > size:
        raise ValueError(f"{path} is shorter than the tensors that it names. Download the file again.")
    layers = metadata.get(f"{header.architecture}.block_count")
    if not isinstance(layers, int) or layers > len(header.tensors):
        raise ValueError(f"{path} asks for {layers} layers, but has {len(header.tensors)} tensors: take another file.")
    if metadata.get(f"{header.architecture}.rope.scaling.type", "none") != "none":
        raise ValueError(
            f"{path} scales its positions (`rope.scaling.type`), which transformers does not read from GGUF: take the "
            "model in safetensors."
        )
    return header


def _check_metadata(stream: BinaryIO) -> None:
    """Walk over the metadata, and count its values before anything is made of them."""

    def read(kind: str) -> Any:
        return struct.unpack(f"<{kind}", stream.read(struct.calcsize(f"<{kind}")))[0]

    def skip_text() -> None:
        length = read("Q")
        if length > _MAX_TEXT:
            raise ValueError(f"a text of its metadata has {length:,} bytes")
        stream.seek(length, 1)

    magic, _, tensors, pairs = struct.unpack("<4sIQQ", stream.read(24))
    if magic != b"GGUF":
        raise ValueError("it does not begin as one")
    left = _MAX_VALUES - tensors
    for _ in range(pairs):
        skip_text()
        kind, count = read("I"), 1
        if kind == _LIST:
            kind, count = read("I"), read("Q")
        left -= count
        if left < 0:
            raise ValueError(f"it has over {_MAX_VALUES:,} values of metadata and tensors")
        for _ in range(count if kind == _TEXT else 0):
            skip_text()
        if kind != _TEXT:
            stream.seek(count * _WIDTHS[kind], 1)
