"""Entropy patching: from text or bytes to patched byte sequences, as a transform for `datasets.map`."""

import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import multiprocess
import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from transformers.utils import logging

from ..models.boundaries import PatchRule, patch_starts
from ..models.byte_vocabulary import BOS_TOKEN_ID, BYTE_OFFSET, EOS_TOKEN_ID, NEWLINE
from ..models.configuration_byte_entropy import ByteEntropyConfig
from ..models.modeling_byte_entropy import ByteEntropyPredictor


logger = logging.get_logger(__name__)

TEXT_COLUMNS = ("text", "raw_content", "content", "bytes")
UNTRAINED_BITS = 7.0
USUAL_PATCH_SIZES = (1.5, 16.0)
# To judge a patch size by.
ENOUGH_BYTES = 200
_PROBE = b"The quick brown fox jumps over the lazy dog, and then it rests for a while in the shade of the old tree."
# Goes into the fingerprint: to be raised whenever the same predictor and settings give other patches.
_VERSION = 2
# Bytes at a time: what fits into the caches of a processor, and what keeps a GPU busy.
_CPU_BATCH, _GPU_BATCH = 2**12, 2**18


def load_entropy_predictor(path: str | Path | None = None) -> ByteEntropyPredictor:
    """
    Load a byte-entropy predictor, in float32 and from safetensors only.

    Args:
        path (`str` or `Path`, *optional*):
            A folder or a repository on the Hub. By default the small predictor that ships with the package.

    Returns:
        `ByteEntropyPredictor`

    Raises:
        `ValueError`: If there is none.
    """
    if path is None:
        path = str(files("crow_hf") / "models" / "default_entropy_predictor")
    try:
        return ByteEntropyPredictor.from_pretrained(path, dtype=torch.float32, use_safetensors=True).eval()
    except OSError as error:
        raise ValueError(
            f"There is no byte-entropy predictor in {path}, here or on the Hub: pass a folder that `save_pretrained` wrote."
        ) from error


def entropy_patching(
    byte_sequence: bytes,
    entropy_predictor: ByteEntropyPredictor,
    threshold: float = 0.8,
    relative_threshold: float = 0.1,
    **kwargs: Any,
) -> list[bytes]:
    """
    Cut bytes into patches: a new one begins where the next byte is hard to predict.

    The default thresholds are those of the project's guide. Most predictors are less sure than that, so that nearly every
    byte becomes a patch: [`calibrate_threshold`] finds thresholds for a size, and [`EntropyPatcher`] takes the predictor's own.

    Args:
        byte_sequence (`bytes`):
            What to cut.
        entropy_predictor (`ByteEntropyPredictor`):
            The model that predicts the next byte; [`load_entropy_predictor`] gives the one that ships.
        threshold (`float`, *optional*, defaults to 0.8):
            Highest entropy inside a patch, in bits.
        relative_threshold (`float`, *optional*, defaults to 0.1):
            Highest rise of the entropy from one byte to the next inside a patch, in bits.
        **kwargs:
            Other settings of [`EntropyPatcher`]: `rule`, `reset_on_newline`, `max_patch_length`.

    Returns:
        `list[bytes]`: The patches; joined, they are the input.
    """
    patcher = EntropyPatcher(entropy_predictor, threshold, relative_threshold, **kwargs)
    return patcher.patches(byte_sequence)


@dataclass(frozen=True)
class PatchedDocument:
    """
    Attributes:
        input_ids (`np.ndarray` of shape `(length,)`):
            Ids of the byte vocabulary.
        patch_lengths (`np.ndarray` of shape `(num_patches,)`):
            Their sum is `length`.
        entropies (`np.ndarray` of shape `(length,)`, *optional*):
            In bits, each about the next byte; 0 at special tokens, and `None` if the rule needs none.
    """

    input_ids: np.ndarray
    patch_lengths: np.ndarray
    entropies: np.ndarray | None


class EntropyPatcher:
    """
    Cuts documents into patches; the function for `Dataset.map(..., batched=True)`, and for streams.

    The new columns are `input_ids` (bytes and special tokens), `patch_lengths` (their sum is the length) and, if wanted,
    `entropies` and `binary_patches`. The patches of a document do not depend on its neighbours. Documents longer than the
    predictor's context are scored in overlapping windows: with a sliding window whose reach fits into half the context
    ([`EntropyPatcher.is_exact`]) the entropies are those of one long pass; without, each byte sees at least half a context.
    Entropies of the same byte may differ by about 1e-6 bits from run to run of another shape, as float32 does: only a byte
    that close to a threshold can fall on the other side.

    A column of bytes must be read without a format: NumPy's strings, which the formats `"numpy"` (refused) and `"torch"`
    (which cannot be told from none) are made of, end before their last zeros. `dataset.with_format(None)` is the remedy.

    Args:
        predictor (`ByteEntropyPredictor`, `str` or `Path`, *optional*):
            The model or where to load it from; the one that ships by default. It is put into evaluation mode and stays on
            its device. Worker processes of `map` compute on the CPU, or with `with_rank=True` on the GPU of their rank: then
            start them by `multiprocess.set_start_method("spawn")`.
        threshold (`float`, *optional*):
            Highest entropy inside a patch, in bits. Thresholds do not transfer between predictors: by default it is that of
            the predictor's configuration, and [`calibrate_threshold`] finds others.
        relative_threshold (`float`, *optional*):
            Highest rise of the entropy inside a patch, in bits; that of the predictor's configuration by default.
        rule (`str`, *optional*, defaults to `"either"`):
            One of [`~models.boundaries.RULES`].
        reset_on_newline (`bool`, *optional*):
            Whether the predictor's context begins anew at each newline, and a patch after it. By default what the predictor
            was trained with.
        max_patch_length (`int`, *optional*):
            Longer patches are cut.
        column (`str`, *optional*):
            Which column holds the text or the bytes; the first of `text`, `raw_content`, `content`, `bytes` by default.
        add_special_tokens (`bool`, *optional*, defaults to `True`):
            Whether a document is put between beginning- and end-of-sequence tokens.
        return_entropies (`bool`, *optional*, defaults to `False`):
            Adds the column `entropies`: in bits, each about the next byte, 0 at special tokens.
        return_binary_patches (`bool`, *optional*, defaults to `False`):
            Adds the column `binary_patches`: for each patch its bytes as bits, the highest of each byte first; nothing for
            special tokens. [`from_binary`] reads it.

    Raises:
        `ValueError`: If the settings contradict each other or the predictor's vocabulary is not the 256 bytes.

    Example:

    ```python
    >>> patched = dataset.map(EntropyPatcher(), batched=True, remove_columns=dataset.column_names)
    ```
    """

    def __init__(
        self,
        predictor: ByteEntropyPredictor | str | Path | None = None,
        threshold: float | None = None,
        relative_threshold: float | None = None,
        rule: str = "either",
        reset_on_newline: bool | None = None,
        max_patch_length: int | None = None,
        column: str | None = None,
        add_special_tokens: bool = True,
        return_entropies: bool = False,
        return_binary_patches: bool = False,
    ) -> None:
        if not isinstance(predictor, ByteEntropyPredictor):
            predictor = load_entropy_predictor(predictor)
        config = predictor.config
        if config.vocab_size != 256:
            raise ValueError(
                f"The entropy predictor has a vocabulary of {config.vocab_size}, but must have the 256 bytes."
            )
        self.predictor = predictor.eval()
        self.rule = PatchRule(
            rule,
            config.patch_threshold if threshold is None else threshold,
            config.patch_relative_threshold if relative_threshold is None else relative_threshold,
            config.reset_on_newline if reset_on_newline is None else reset_on_newline,
            max_patch_length,
        )
        if return_entropies and not self.rule.needs_entropies:
            raise ValueError(f"The rule {rule!r} computes no entropies: choose another, or leave `return_entropies`.")
        self.column = column
        self.add_special_tokens = add_special_tokens
        self.return_entropies = return_entropies
        self.return_binary_patches = return_binary_patches
        self._checked = False

    @property
    def is_exact(self) -> bool:
        """Whether documents longer than the context get the entropies of one long pass."""
        reach = self.predictor.config.receptive_field
        return reach is not None and reach <= self.predictor.config.max_position_embeddings // 2

    def __call__(self, batch: Mapping[str, Sequence], rank: int | None = None) -> dict[str, list]:
        if rank is not None and torch.cuda.is_available():
            self.predictor.to(f"cuda:{rank % torch.cuda.device_count()}")
        documents = self.patch(_documents_of(batch, self.column))
        columns = {
            "input_ids": [document.input_ids for document in documents],
            "patch_lengths": [document.patch_lengths for document in documents],
        }
        if self.return_entropies:
            columns["entropies"] = [document.entropies for document in documents]
        if self.return_binary_patches:
            columns["binary_patches"] = [
                to_binary(document.input_ids, document.patch_lengths) for document in documents
            ]
        return columns

    def patches(self, byte_sequence: bytes) -> list[bytes]:
        """The patches of one document, without special tokens."""
        return split_patches(self.patch([byte_sequence])[0])

    def patch(self, documents: Iterable[bytes]) -> list[PatchedDocument]:
        """
        Cut several documents at once.

        Args:
            documents (`Iterable[bytes]`):
                The documents; empty ones are kept.

        Returns:
            `list[PatchedDocument]`: In the same order.
        """
        documents = [np.frombuffer(document, np.uint8) for document in documents]
        if not documents:
            return []
        # All in one long row, each between two special tokens: they part the documents, whether they are kept or not.
        ends = np.cumsum([len(document) + 2 for document in documents])
        begins = ends - [len(document) + 2 for document in documents]
        ids = np.empty(ends[-1], np.int16)
        ids[begins], ids[ends - 1] = BOS_TOKEN_ID, EOS_TOKEN_ID
        for document, begin, end in zip(documents, begins, ends, strict=True):
            ids[begin + 1 : end - 1] = document
            ids[begin + 1 : end - 1] += BYTE_OFFSET

        entropies = self._score(ids, begins + 1, ends - 1) if self.rule.needs_entropies else None
        starts = patch_starts(
            torch.from_numpy(ids)[None], None if entropies is None else torch.from_numpy(entropies)[None], self.rule
        )
        borders = np.flatnonzero(np.append(starts[0].numpy(), True))
        lengths = np.diff(borders).astype(np.int32)
        first_patches = np.searchsorted(borders, begins)
        after_patches = np.searchsorted(borders, ends)
        trim = 0 if self.add_special_tokens else 1
        patched = [
            PatchedDocument(
                ids[begin + trim : end - trim],
                _without_end(lengths[first + trim : after], trim),
                None if entropies is None else entropies[begin + trim : end - trim],
            )
            for begin, end, first, after in zip(begins, ends, first_patches, after_patches, strict=True)
        ]
        num_patches = np.count_nonzero(ids[borders[:-1]] >= BYTE_OFFSET)
        self._check(sum(map(len, documents)), num_patches, entropies)
        return patched

    def _score(self, ids: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Entropies of all bytes, 0 at the special tokens: pieces that need not know of each other, in batches by length."""
        entropies = np.zeros(len(ids), np.float32)
        data = np.clip(ids - BYTE_OFFSET, 0, 255).astype(np.uint8)
        pieces, known = self._pieces(data, begins, ends)
        order = np.argsort(pieces[:, 1] - pieces[:, 0], kind="stable")[::-1]
        device = self.predictor.device
        capacity = _CPU_BATCH if device.type == "cpu" else _GPU_BATCH
        position = 0
        while position < len(order):
            begin, end = pieces[order[position]]
            rows = order[position : position + max(1, capacity // (end - begin))]
            columns = np.arange(end - begin)
            index = pieces[rows, :1] + columns
            # A row's padding is whatever comes after it: no byte looks ahead.
            batch = torch.from_numpy(data[np.minimum(index, len(data) - 1)]).to(device, torch.long)
            scores = self.predictor.entropies(batch, reset_on_newline=False).cpu().numpy()
            wanted = (index < pieces[rows, 1:]) & (columns >= known[rows, None])
            entropies[index[wanted]] = scores[wanted]
            position += len(rows)
        return entropies

    def _pieces(self, data: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Where to cut: at newlines if the context begins anew there, and into overlapping windows of the context's length.

        Returns:
            `tuple`: Begins and ends, of shape `(num_pieces, 2)`; how many of its first bytes the piece before has scored, of
            shape `(num_pieces,)`.
        """
        cuts = np.zeros(len(data) + 1, bool)
        inside = np.zeros(len(data) + 1, np.int8)
        np.add.at(inside, begins, 1)
        np.add.at(inside, ends, -1)
        inside = np.cumsum(inside, dtype=np.int8)[:-1].astype(bool)
        cuts[begins] = cuts[ends] = True
        if self.rule.reset_on_newline:
            cuts[:-1] |= (data == NEWLINE) & inside
        borders = np.flatnonzero(cuts)
        segments = np.stack([borders[:-1], borders[1:]], axis=1)
        segments = segments[inside[segments[:, 0]]]

        context = self.predictor.config.max_position_embeddings
        overlap = self.predictor.config.receptive_field - 1 if self.is_exact else context // 2
        lengths = segments[:, 1] - segments[:, 0]
        counts = np.maximum(1, -(-(lengths - overlap) // (context - overlap)))
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        window_begins = np.repeat(segments[:, 0], counts) + number * (context - overlap)
        window_ends = np.minimum(window_begins + context, np.repeat(segments[:, 1], counts))
        return np.stack([window_begins, window_ends], axis=1), np.where(number > 0, overlap, 0)

    def _check(self, num_bytes: int, num_patches: int, entropies: np.ndarray | None) -> None:
        """Say once what makes patches useless: a predictor that was never trained, or thresholds of another one."""
        if self._checked or entropies is None or not num_patches:
            return
        self._checked = True
        size, mean = num_bytes / num_patches, entropies.sum() / num_bytes
        # Random bytes are as surprising: so ask about a sentence.
        if mean > UNTRAINED_BITS and self._bits_of_a_sentence() > UNTRAINED_BITS:
            logger.warning(
                f"The entropy predictor looks untrained: it finds {self._bits_of_a_sentence():.1f} of 8 bits in every byte of "
                "an English sentence. Take `load_entropy_predictor()`, or train it with the Trainer first."
            )
        elif num_bytes >= ENOUGH_BYTES and not USUAL_PATCH_SIZES[0] <= size <= USUAL_PATCH_SIZES[1]:
            logger.warning(
                f"The mean patch is {size:.1f} bytes long: `calibrate_threshold` finds thresholds for the size you want."
            )

    def _bits_of_a_sentence(self) -> float:
        sentence = torch.tensor([list(_PROBE)], device=self.predictor.device)
        return self.predictor.entropies(sentence).mean().item()

    # `datasets` hashes this state for its cache, and sends it to worker processes. A model object would hash to something
    # else in each process; its bytes do not.
    def __getstate__(self) -> dict[str, Any]:
        config = self.predictor.config.to_diff_dict()
        ignored = ("_name_or_path", "architectures", "transformers_version", "dtype")
        tied = self.predictor.all_tied_weights_keys
        weights = {name: value.cpu() for name, value in self.predictor.state_dict().items() if name not in tied}
        return {
            "version": _VERSION,
            "config": {name: config[name] for name in sorted(config) if name not in ignored},
            "dtype": str(self.predictor.dtype).removeprefix("torch."),
            "weights": save_safetensors(weights),
            "rule": asdict(self.rule),
            "column": self.column,
            "add_special_tokens": self.add_special_tokens,
            "return_entropies": self.return_entropies,
            "return_binary_patches": self.return_binary_patches,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A forked worker hangs if it uses the thread pool that its parent has used.
        if multiprocess.parent_process() is not None or multiprocessing.parent_process() is not None:
            torch.set_num_threads(1)
        with torch.random.fork_rng(devices=[]):
            predictor = ByteEntropyPredictor(ByteEntropyConfig(**state["config"]))
        self.predictor = predictor.to(getattr(torch, state["dtype"])).eval()
        # Not strict: a head tied to the embeddings is not among the weights.
        self.predictor.load_state_dict(load_safetensors(state["weights"]), strict=False)
        self.rule = PatchRule(**state["rule"])
        self.column = state["column"]
        self.add_special_tokens = state["add_special_tokens"]
        self.return_entropies = state["return_entropies"]
        self.return_binary_patches = state["return_binary_patches"]
        self._checked = False


def _without_end(lengths: np.ndarray, count: int) -> np.ndarray:
    """Patch lengths without the last `count` positions: the end of a text is part of the last patch or one of its own."""
    lengths = lengths.copy()
    lengths[-1] -= count
    return lengths[lengths > 0]


def _documents_of(batch: Mapping[str, Sequence] | pa.Table, column: str | None) -> list[bytes]:
    is_table = isinstance(batch, pa.Table)
    name = find_column(batch.column_names if is_table else batch, column)
    values = batch[name].to_pylist() if is_table else batch[name]
    if isinstance(values, (str, bytes)):
        raise ValueError("The patcher takes batches: pass `batched=True` to `map`.")
    return [to_bytes(value, name) for value in values]


def find_column(columns: Iterable[str], column: str | None = None) -> str:
    """
    The column with the documents: the one that was named, else the first of [`TEXT_COLUMNS`].

    Raises:
        `ValueError`: If it is not there.
    """
    found = next((name for name in ([column] if column else TEXT_COLUMNS) if name in columns), None)
    if found is None:
        wanted = f"no column {column!r}" if column else f"none of the columns {', '.join(TEXT_COLUMNS)}"
        raise ValueError(f"There is {wanted} among {sorted(columns)}: name the one with text or bytes as `column`.")
    return found


def to_bytes(value: Any, column: str = "text") -> bytes:
    """
    A document as bytes, text in UTF-8.

    Raises:
        `ValueError`: If it is neither text nor bytes.
    """
    if isinstance(value, str):
        return value.encode("utf-8")
    if isinstance(value, np.bytes_):
        raise ValueError(f"Column {column!r} has lost bytes to its NumPy format: pass `dataset.with_format(None)`.")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise ValueError(f"Column {column!r} holds {type(value).__name__}, not text or bytes: fill or drop those rows.")


def split_patches(document: PatchedDocument) -> list[bytes]:
    """The bytes of each patch, without those of special tokens."""
    borders = np.cumsum(document.patch_lengths)
    pieces = np.split(document.input_ids, borders[:-1]) if len(borders) else []
    pieces = [piece[piece >= BYTE_OFFSET] for piece in pieces]
    return [(piece - BYTE_OFFSET).astype(np.uint8).tobytes() for piece in pieces if len(piece)]


def to_binary(input_ids: np.ndarray, patch_lengths: np.ndarray) -> list[np.ndarray]:
    """
    The binary representation of the guide: for each patch, its bytes as bits, the highest of each byte first.

    Returns:
        `list` of `np.ndarray` of shape `(8 * num_bytes,)`: Zeros and ones; empty for a special token.
    """
    pieces = np.split(input_ids, np.cumsum(patch_lengths)[:-1]) if len(patch_lengths) else []
    return [np.unpackbits((piece[piece >= BYTE_OFFSET] - BYTE_OFFSET).astype(np.uint8)) for piece in pieces]


def from_binary(binary_patches: Iterable[Sequence[int]]) -> list[bytes]:
    """The patches whose bits these are: the inverse of `binary_patches`, without special tokens."""
    return [np.packbits(np.asarray(bits, np.uint8)).tobytes() for bits in binary_patches if len(bits)]
