"""The entropy patcher: a transform for `datasets.map` that cuts text or bytes into patches."""

import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import multiprocess
import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from transformers.utils import logging

from ..models.boundaries import ENOUGH_BYTES, USUAL_PATCH_SIZES, PatchRule, patch_starts, share_of
from ..models.byte_vocabulary import BOS_TOKEN_ID, BYTE_OFFSET, EOS_TOKEN_ID, NEWLINE
from ..models.configuration_byte_entropy import ByteEntropyConfig
from ..models.modeling_byte_entropy import ByteEntropyPredictor
from .documents import PatchedDocument, as_bytes, documents_of, split_patches, to_binary


logger = logging.get_logger(__name__)

ByteSequence = str | bytes | bytearray | memoryview | Sequence[int] | np.ndarray | torch.Tensor

# A predictor with a higher mean entropy looks untrained.
UNTRAINED_BITS = 7.0
_PROBE = b"The quick brown fox jumps over the lazy dog, and then it rests for a while in the shade of the old tree."
# Part of the fingerprint. Raise it whenever the same predictor and settings give different patches.
_VERSION = 2
# Bytes per batch. The CPU batch fits into the caches of a processor, the GPU batch keeps a GPU busy.
_CPU_BATCH, _GPU_BATCH = 2**12, 2**18


def load_entropy_predictor(path: str | Path | None = None) -> ByteEntropyPredictor:
    """
    Load a byte-entropy predictor in float32, from safetensors only.

    Args:
        path (`str` or `Path`, *optional*):
            A folder or a repository on the Hub. Defaults to the small predictor that ships with the package.

    Returns:
        `ByteEntropyPredictor`: The predictor, in evaluation mode.

    Raises:
        `ValueError`: If there is no predictor at `path`.
    """
    if path is None:
        path = str(files("crow_hf") / "models" / "default_entropy_predictor")
    try:
        return ByteEntropyPredictor.from_pretrained(path, dtype=torch.float32, use_safetensors=True).eval()
    except OSError as error:
        raise ValueError(
            f"There is no byte-entropy predictor in {path}, neither here nor on the Hub. Pass a folder that "
            "`save_pretrained` wrote."
        ) from error


def entropy_patching(
    byte_sequence: ByteSequence,
    entropy_predictor: ByteEntropyPredictor,
    threshold: float = 0.8,
    relative_threshold: float = 0.1,
    unit: str = "share",
    **kwargs: Any,
) -> list[bytes]:
    """
    Cut bytes into patches that begin where the next byte is hard to predict.

    The default thresholds come from the project's guide. With the predictor that ships with the package, they cut
    English into patches of about 3 bytes. Use [`calibrate_threshold`] to find thresholds for another size, or
    [`EntropyPatcher`] for the predictor's own thresholds.

    Args:
        byte_sequence (`bytes`, `str`, `list[int]`, `np.ndarray` or `torch.Tensor`):
            The bytes to cut: anything that [`as_bytes`] accepts. Text is encoded in UTF-8.
        entropy_predictor (`ByteEntropyPredictor`):
            The model that predicts the next byte. [`load_entropy_predictor`] loads the one that ships with the
            package.
        threshold (`float`, *optional*, defaults to 0.8):
            Highest entropy inside a patch.
        relative_threshold (`float`, *optional*, defaults to 0.1):
            Highest rise of the entropy from one byte to the next inside a patch.
        unit (`str`, *optional*, defaults to `"share"`):
            Unit of both thresholds: `"share"` of the largest possible entropy of a byte, `"bits"` (the largest is 8)
            or `"nats"`.
        **kwargs:
            Other arguments of [`EntropyPatcher`], such as `rule`, `reset_on_newline` or `max_patch_length`.

    Returns:
        `list[bytes]`: The patches. Joined, they equal the input.

    Raises:
        `ValueError`: If `byte_sequence` is neither text nor bytes, or for settings that [`EntropyPatcher`] refuses.

    Example:

    ```python
    >>> entropy_patching("Our Theatre. A review of the play.", load_entropy_predictor())
    ```
    """
    patcher = EntropyPatcher(entropy_predictor, threshold, relative_threshold, unit=unit, **kwargs)
    return patcher.patches(as_bytes(byte_sequence))


class EntropyPatcher:
    """
    A transform that cuts documents into patches, for `Dataset.map(..., batched=True)` and for streams.

    It adds the columns `input_ids` (bytes and special tokens) and `patch_lengths` (the length of each patch), and on
    request `entropies` and `binary_patches`. The patches of a document do not depend on other documents in the batch.

    Documents longer than the predictor's context are scored in overlapping windows. If the reach of the sliding window
    fits into half the context ([`EntropyPatcher.is_exact`]), the entropies equal those of one long pass. Otherwise
    each byte sees at least half a context. Entropies of the same byte may differ by about 1e-6 bits between batches of
    different shape, because of float32 rounding. Only a byte that close to a threshold can change sides.

    Read a column of bytes without a format. The formats `"numpy"` and `"torch"` use NumPy strings, which lose trailing
    zeros. `"numpy"` raises an error, but `"torch"` cannot be told from no format. Pass `dataset.with_format(None)`.

    Args:
        predictor (`ByteEntropyPredictor`, `str` or `Path`, *optional*):
            The predictor or its location. Defaults to the one that ships with the package. It is set to evaluation
            mode and stays on its device. Worker processes of `map` compute on the CPU, or with `with_rank=True` on the
            GPU of their rank. In that case start them with `multiprocess.set_start_method("spawn")`.
        threshold (`float`, *optional*):
            Highest entropy inside a patch. Defaults to the value of the predictor's configuration, because thresholds
            do not transfer between predictors. [`calibrate_threshold`] finds others.
        relative_threshold (`float`, *optional*):
            Highest rise of the entropy inside a patch. Defaults to the value of the predictor's configuration.
        rule (`str`, *optional*, defaults to `"either"`):
            One of [`~models.boundaries.RULES`].
        reset_on_newline (`bool`, *optional*):
            Whether the predictor's context restarts at each newline, and a patch begins after it. Defaults to the
            setting that the predictor was trained with.
        max_patch_length (`int`, *optional*):
            Maximum length of a patch in bytes. Longer patches are cut.
        unit (`str`, *optional*, defaults to `"share"`):
            Unit of the thresholds that are passed, one of [`~models.boundaries.UNITS`]: `"share"` of the largest
            possible entropy of a byte, `"bits"` (the largest is 8) or `"nats"`. Configurations hold shares.
        column (`str`, *optional*):
            Column of text or bytes. Defaults to the first of `text`, `raw_content`, `content`, `bytes`.
        add_special_tokens (`bool`, *optional*, defaults to `True`):
            Whether to enclose a document in beginning- and end-of-sequence tokens.
        return_entropies (`bool`, *optional*, defaults to `False`):
            Whether to add the column `entropies`: the entropy of the prediction of the next byte, in bits. 0 at
            special tokens.
        return_binary_patches (`bool`, *optional*, defaults to `False`):
            Whether to add the column `binary_patches`: the bits of each patch, highest bit of each byte first. Empty
            for special tokens. [`from_binary`] decodes it.

    Raises:
        `ValueError`: If the settings contradict each other, or if the predictor's vocabulary is not the 256 bytes.

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
        unit: str = "share",
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
                f"The entropy predictor has a vocabulary of {config.vocab_size}, but needs the 256 bytes."
            )
        self.predictor = predictor.eval()
        self.rule = PatchRule(
            rule,
            config.patch_threshold if threshold is None else share_of(threshold, unit),
            config.patch_relative_threshold if relative_threshold is None else share_of(relative_threshold, unit),
            config.reset_on_newline if reset_on_newline is None else reset_on_newline,
            max_patch_length,
        )
        if return_entropies and not self.rule.needs_entropies:
            raise ValueError(
                f"The rule {rule!r} computes no entropies. Choose another rule or drop `return_entropies`."
            )
        self.column = column
        self.add_special_tokens = add_special_tokens
        self.return_entropies = return_entropies
        self.return_binary_patches = return_binary_patches
        self._checked = False

    @property
    def is_exact(self) -> bool:
        """Whether documents longer than the context get the same entropies as in one long pass."""
        reach = self.predictor.config.receptive_field
        return reach is not None and reach <= self.predictor.config.max_position_embeddings // 2

    def __call__(self, batch: Mapping[str, Sequence], rank: int | None = None) -> dict[str, list]:
        if rank is not None and torch.cuda.is_available():
            self.predictor.to(f"cuda:{rank % torch.cuda.device_count()}")
        documents = self.patch(documents_of(batch, self.column))
        columns: dict[str, list] = {
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
        """Return the patches of one document, without special tokens."""
        return split_patches(self.patch([byte_sequence])[0])

    def patch(self, documents: Iterable[bytes]) -> list[PatchedDocument]:
        """
        Cut several documents at once.

        Args:
            documents (`Iterable[bytes]`):
                The documents. Empty ones are kept.

        Returns:
            `list[PatchedDocument]`: The patched documents, in the same order.
        """
        arrays = [np.frombuffer(document, np.uint8) for document in documents]
        if not arrays:
            return []
        # All documents form one long row. Special tokens separate them, whether or not they are kept in the end.
        ends = np.cumsum([len(array) + 2 for array in arrays])
        begins = ends - [len(array) + 2 for array in arrays]
        ids = np.empty(ends[-1], np.int16)
        ids[begins], ids[ends - 1] = BOS_TOKEN_ID, EOS_TOKEN_ID
        for array, begin, end in zip(arrays, begins, ends, strict=True):
            ids[begin + 1 : end - 1] = array
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
                _drop_last(lengths[first + trim : after], trim),
                None if entropies is None else entropies[begin + trim : end - trim],
            )
            for begin, end, first, after in zip(begins, ends, first_patches, after_patches, strict=True)
        ]
        num_patches = int(np.count_nonzero(ids[borders[:-1]] >= BYTE_OFFSET))
        self._check(sum(map(len, arrays)), num_patches, entropies)
        return patched

    def _score(self, ids: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Compute entropies in batches of independent pieces, sorted by length. Special tokens get 0."""
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
            # A row is padded with the bytes after it. That is safe because the predictor is causal.
            batch = torch.from_numpy(data[np.minimum(index, len(data) - 1)]).to(device, torch.long)
            scores = self.predictor.entropies(batch, reset_on_newline=False).cpu().numpy()
            wanted = (index < pieces[rows, 1:]) & (columns >= known[rows, None])
            entropies[index[wanted]] = scores[wanted]
            position += len(rows)
        return entropies

    def _pieces(self, data: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Cut the documents at newlines, if the context restarts there, and into overlapping windows of the context's
        length.

        Returns:
            `tuple`: Begins and ends of the pieces, of shape `(num_pieces, 2)`, and the number of first bytes of each
            piece that the piece before has scored, of shape `(num_pieces,)`.
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
        """Warn once about an untrained predictor, or about thresholds that give unusual patch sizes."""
        if self._checked or entropies is None or not num_patches:
            return
        self._checked = True
        size, mean = num_bytes / num_patches, entropies.sum() / num_bytes
        # Random bytes have the same entropy, so a sentence decides whether the predictor is trained.
        if mean > UNTRAINED_BITS and self._bits_of_a_sentence() > UNTRAINED_BITS:
            logger.warning(
                f"The entropy predictor looks untrained. It finds {self._bits_of_a_sentence():.1f} of 8 bits in every "
                "byte of an English sentence. Use `load_entropy_predictor()`, or train it with the Trainer first."
            )
        elif num_bytes >= ENOUGH_BYTES and not USUAL_PATCH_SIZES[0] <= size <= USUAL_PATCH_SIZES[1]:
            logger.warning(
                f"The mean patch is {size:.1f} bytes long. Use `calibrate_threshold` to find thresholds for another "
                "size."
            )

    def _bits_of_a_sentence(self) -> float:
        sentence = torch.tensor([list(_PROBE)], device=self.predictor.device)
        return self.predictor.entropies(sentence).mean().item()

    # `datasets` hashes this state for its cache and sends it to worker processes. The hash of a model object differs
    # between processes, the hash of its bytes does not.
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
        # A forked worker hangs if it uses the thread pool of its parent.
        if multiprocess.parent_process() is not None or multiprocessing.parent_process() is not None:
            torch.set_num_threads(1)
        with torch.random.fork_rng(devices=[]):
            predictor = ByteEntropyPredictor(ByteEntropyConfig(**state["config"]))
        self.predictor = predictor.to(getattr(torch, state["dtype"])).eval()
        # Not strict, because a head tied to the embeddings is not saved.
        self.predictor.load_state_dict(load_safetensors(state["weights"]), strict=False)
        self.rule = PatchRule(**state["rule"])
        self.column = state["column"]
        self.add_special_tokens = state["add_special_tokens"]
        self.return_entropies = state["return_entropies"]
        self.return_binary_patches = state["return_binary_patches"]
        self._checked = False


def _drop_last(lengths: np.ndarray, count: int) -> np.ndarray:
    """Remove the last `count` positions. The end token is part of the last patch or a patch of its own."""
    lengths = lengths.copy()
    lengths[-1] -= count
    return lengths[lengths > 0]
