"""Try a model on a few tokens before any work, because not every architecture does what the objectives rely on."""

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from .loading import move
from .recorder import LayerRecorder, base_model_of, embedding_table, evaluating, plain_outputs
from .saves import one_line
from .sharding import is_sharded, will_shard


NUM_TOKENS = 12
# The largest relative differences that rounding may cause, in float32 and in half precision.
TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2


def place(model: PreTrainedModel | PeftModel, args: TrainingArguments) -> None:
    """
    Move a model to the device of a run, because some implementations of attention run on a GPU only. A model that is
    spread over devices, or that the training will shard, stays where it is.
    """
    if not will_shard(args) and getattr(base_model_of(model), "hf_device_map", None) is None:
        move(model, args.device)


def try_out(recorder: LayerRecorder) -> None:
    """
    Run a model forwards and backwards on a few tokens, and check what the objectives rely on.

    Models with sharded weights are not tried, because nothing gathers the shards before the training starts.

    Args:
        recorder (`LayerRecorder`):
            The recorder of the model.

    Raises:
        `ValueError`: If the model cannot be run or differentiated, if not every layer has one hidden state per
            position, if its loss is not that of the next token, or if it predicts a token from later ones.
    """
    if is_sharded(recorder.layers[0]):
        return
    try:
        with evaluating(recorder.base):
            trouble = _trouble_of(recorder)
    # Architectures fail in ways of their own.
    except Exception as error:
        trouble = f"fails on a few tokens ({one_line(error)})"
    if trouble:
        raise ValueError(f"{recorder.name} {trouble}. This model cannot be purified.")


def _trouble_of(recorder: LayerRecorder) -> str | None:
    base = recorder.base
    ids = 5 + torch.arange(2 * NUM_TOKENS, device=base.device).view(2, NUM_TOKENS) % (len(embedding_table(base)) - 5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    inputs = recorder.prepare(batch)
    with torch.enable_grad(), recorder.record() as record:
        outputs = base(**inputs)
    hidden, mask = record.hidden_states[-1], recorder.chain_mask(inputs)
    if mask is not None and hidden.shape[:2] != mask.shape:
        return f"has {hidden.shape[1]} hidden states for {mask.shape[1]} tokens"
    (gradient,) = torch.autograd.grad(hidden.float().square().mean(), record.perturbed[0])
    if not embedding_table(base).any():
        return "has embeddings of zeros alone"
    if not outputs.loss.isfinite() or not gradient.isfinite().all():
        return "computes NaN or infinity on a few tokens"
    logits = outputs.logits.detach().float()
    tolerance = TOLERANCE if base.dtype == torch.float32 else HALF_TOLERANCE
    next_token = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    if (outputs.loss - next_token).abs() > tolerance * next_token:
        return "computes another loss than that of the next token"
    changed = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
    # This pass comes last, because some models keep the states of the last one, which must be free of gradients.
    with torch.no_grad(), plain_outputs(base):
        others = base(**recorder.prepare(batch | {"input_ids": changed})).logits.float()
        # Dropout draws random numbers, and fails where a config is wrong, in this mode only.
        with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
            base.train()
            base(**recorder.prepare(batch))
    if (others - logits)[:, :-1].abs().max() > tolerance * logits.abs().max():
        return "predicts tokens from later ones, so it is no causal language model"
    return None
