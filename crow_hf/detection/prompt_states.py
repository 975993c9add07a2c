"""Scores many continuations of the same prompts, whose states are computed once."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import Cache, PreTrainedModel

from ..evaluation.generation import inference_mode, naming_errors, pad_left
from ..training.recorder import base_model_of


# Tokens of a batch, those of the prompts included. Their keys and values are copied for each continuation.
MAX_BATCH_TOKENS = 16_384
# Logits of a batch. With a vocabulary of 262,000 tokens, they would take gigabytes otherwise.
MAX_BATCH_LOGITS = 2**27


class PromptStates:
    """
    Prompts with their keys and values, which every continuation of them shares.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model, in evaluation mode.
        prompts (`Sequence[list[int]]`):
            Token ids of N prompts. None of them is empty.
        pad_token_id (`int`):
            Token that pads shorter prompts. It never counts.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, prompts: Sequence[list[int]], pad_token_id: int):
        self.model = model
        self.num_prompts = len(prompts)
        self._takes = inspect.signature(base_model_of(model).forward).parameters
        batch = pad_left(list(prompts), pad_token_id, model.device)
        self._ids, self._mask = batch["input_ids"], batch["attention_mask"]
        outputs = self._forward(self._ids, self._mask, None, 1)
        self._cache: Cache | None = getattr(outputs, "past_key_values", None)
        # The states of linear attention cannot be selected row by row, so the prompts are read again each time.
        if not all(hasattr(layer, "batch_select_indices") for layer in getattr(self._cache, "layers", [None])):
            self._cache = None
        self.next_logits: torch.Tensor = outputs.logits[:, -1].float()
        if not self.next_logits.isfinite().all():
            raise ValueError(
                f"{type(base_model_of(model)).__name__} computes logits that are infinite or no numbers, so it cannot "
                "be scanned. Check it with `crow-hf doctor`."
            )
        self._check_padding(min(prompts, key=len))

    def logits(
        self, continuations: Sequence[list[int]], num_last: int, has_gradient: bool = False
    ) -> Iterator[torch.Tensor]:
        """
        Yield, for each continuation, the logits after its last tokens.

        Args:
            continuations (`Sequence[list[int]]`):
                Token ids, all of the same length L of at least `num_last`.
            num_last (`int`):
                Number of tokens whose logits are needed.
            has_gradient (`bool`, *optional*, defaults to `False`):
                Whether gradients flow from the logits to the embeddings of the continuations.

        Returns:
            `Iterator[torch.Tensor]`: In float32, of shape `(N, num_last, V)`. Those of one batch exist at a time.
        """
        length = self._mask.shape[1] + (len(continuations[0]) if continuations else 0)
        most = min(MAX_BATCH_TOKENS // length, MAX_BATCH_LOGITS // (num_last * self.next_logits.shape[-1]))
        size = max(1, most // self.num_prompts)
        for start in range(0, len(continuations), size):
            yield from self._read(torch.tensor(continuations[start : start + size]), num_last, has_gradient)

    def _check_padding(self, shortest: list[int]) -> None:
        """Refuse models that read padding as text. Some with linear attention do."""
        row = int(self._mask.sum(dim=1).argmin())
        ids = torch.tensor([shortest], device=self.model.device)
        alone = self._forward(ids, torch.ones_like(ids), None, 1).logits[0, -1].float()
        if not (alone - self.next_logits[row]).norm() <= 0.05 * alone.norm():
            raise ValueError(
                f"{type(base_model_of(self.model)).__name__} reads the padding of a prompt as if it were text, so "
                "prompts cannot be read together. A scan of this architecture is not supported."
            )

    def _read(self, continuations: torch.Tensor, num_last: int, has_gradient: bool) -> torch.Tensor:
        count = len(continuations)
        rows = torch.arange(self.num_prompts, device=self.model.device).repeat(count)
        ids = continuations.to(self.model.device).repeat_interleave(self.num_prompts, dim=0)
        mask = torch.cat([self._mask[rows], torch.ones_like(ids)], dim=1)
        cache = copy.deepcopy(self._cache)
        if cache is None:
            ids = torch.cat([self._ids[rows], ids], dim=1)
        else:
            with naming_errors(self.model):
                cache.batch_select_indices(rows)
        logits = self._forward(ids, mask, cache, num_last, has_gradient).logits
        return logits[:, -num_last:].float().view(count, self.num_prompts, num_last, -1)

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Cache | None, num_last: int, has_gradient: bool = False
    ) -> Any:
        """Read tokens after those of the cache, as `generate` does. The mask covers both."""
        base: Any = base_model_of(self.model)
        options: dict[str, Any] = {"past_key_values": cache, "attention_mask": mask, "use_cache": True}
        if "position_ids" in self._takes:
            options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        inputs = base.prepare_inputs_for_generation(ids, **options)
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = num_last
        with inference_mode(self.model), torch.set_grad_enabled(has_gradient), naming_errors(self.model):
            return self.model(**inputs)
