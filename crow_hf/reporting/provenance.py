"""Hashes of what a purification reads: the files of models and of judges."""

from typing import Any

from ..attacks.judges import CommandJudge, ModelJudge
from ..attacks.targets import BaseTarget
from ..training.gguf import split_gguf
from ..training.hub import PUSHED
from .checksums import sha256_of
from .cost import folder_of_model


CARD = "README.md"


def checksums_of_model(name: str, **options: Any) -> dict[str, str] | None:
    """
    Return the hashes of the files that a model or an adapter is loaded from, with those of its tokenizer. Its card is
    not among them.

    Args:
        name (`str`):
            A folder, or a name on the Hub, whose files are looked up in the cache.
        **options:
            The `revision` and the `cache_dir` that the model was loaded with.

    Returns:
        `dict[str, str]`: The hash of each file by its name. `None` if the files are not known.
    """
    folder = folder_of_model(name, **options)
    if folder is None:
        return None
    patterns = {*PUSHED, gguf} if (gguf := split_gguf(name)[1]) else PUSHED
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file() and file.name != CARD}
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in sorted(files)}


def checksums_of_judge(target: BaseTarget | None) -> dict[str, str] | None:
    """Return the hashes of the files of a judge: those of its model, or its program and the files that it is given."""
    if isinstance(target, ModelJudge):
        return checksums_of_model(target.model)
    return {str(file): sha256_of(file) for file in target.files} if isinstance(target, CommandJudge) else None
