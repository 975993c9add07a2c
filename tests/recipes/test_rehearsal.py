"""Tests of what is refused before the work."""

from types import SimpleNamespace

import pytest
import torch
from peft import HiraConfig, LoraConfig, get_peft_model

from crow_hf import CrowTrainer, InvarianceTrainer
from crow_hf.recipes import rehearsal as rehearsal_module
from crow_hf.recipes import run as run_module
from crow_hf.recipes.presets import lora_config
from crow_hf.recipes.purification import purify
from crow_hf.recipes.rehearsal import merge_before, rehearse
from crow_hf.recipes.run import RecipeRun
from crow_hf.training import trial as trial_module
from crow_hf.training.recorder import base_model_of
from helpers.recipes import ROWS, arguments
from helpers.tiny import same_weights, tiny_llama, weights_of


@pytest.mark.parametrize("recipe", ["strong", "guide"])
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"optim": "adamw_bnb_8bit"}, "optimizer"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"use_liger_kernel": True}, "liger"),
        ({"max_steps": 0}, "would not change"),
        ({"learning_rate": 0.0}, "would not change"),
        ({"max_steps": 1, "warmup_steps": 1}, "would not change"),
        ({"per_device_train_batch_size": 64, "dataloader_drop_last": True}, "would not change"),
        ({"report_to": "wandb"}, "tracker"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_model_is_used(
    recipe, settings, reason, tmp_path, byte_tokenizer, monkeypatch
):
    monkeypatch.setattr(rehearsal_module, "try_out", lambda recorder: None)
    model = tiny_llama()
    model.forward = lambda *args, **kwargs: pytest.fail("The model is used.")
    args = arguments(tmp_path, recipe, **settings)
    with pytest.raises(ValueError, match=reason):
        purify(model, ROWS, recipe, args, processing_class=byte_tokenizer)
    assert not list(tmp_path.glob("run*/*"))


@pytest.mark.parametrize("rows", [ROWS, ROWS.select_columns(["prompt"])], ids=["answers", "prompts"])
@pytest.mark.parametrize("limit", ["max_length", "context"])
def test_canaries_that_do_not_fit_are_refused_before_the_model_is_used(rows, limit, tmp_path, byte_tokenizer):
    """Fails if it is seen only after the canaries were implanted, or not for prompts without answers."""
    model = tiny_llama(max_position_embeddings=32 if limit == "context" else 128)
    model.forward = lambda *args, **kwargs: pytest.fail("The model is used.")
    args = arguments(tmp_path, num_canaries=1, max_length=32 if limit == "max_length" else 1024)
    with pytest.raises(ValueError, match="No row has room for a canary: .* allow 32"):
        purify(model, rows, args=args, processing_class=byte_tokenizer)


def test_an_adapter_that_does_not_fit_the_model_is_refused_before_it_is_used(tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(rehearsal_module, "try_out", lambda recorder: None)
    model = tiny_llama()
    model.forward = lambda *args, **kwargs: pytest.fail("The model is used.")
    with pytest.raises(ValueError, match="no_such_layer"):
        purify(
            model,
            ROWS,
            args=arguments(tmp_path),
            processing_class=byte_tokenizer,
            peft_config=LoraConfig(target_modules=["no_such_layer"]),
        )
    assert not [name for name, _ in model.named_modules() if "lora" in name]


def test_the_rehearsal_leaves_the_suspect_as_it_was(tmp_path, byte_tokenizer):
    model = tiny_llama()
    before, modules = weights_of(model), [name for name, _ in model.named_modules()]
    rehearse(model, ROWS, arguments(tmp_path), byte_tokenizer, lora_config(2), True)
    assert same_weights(weights_of(model), before) and [name for name, _ in model.named_modules()] == modules
    assert all(weight.requires_grad for weight in model.parameters())


def test_the_rehearsal_takes_no_memory(tmp_path, byte_tokenizer, monkeypatch):
    """Fails if the copy of the suspect that teaches has weights."""
    checked = []
    monkeypatch.setattr(InvarianceTrainer, "check_optimizer", lambda trainer: checked.append(trainer))
    rehearse(tiny_llama(), ROWS, arguments(tmp_path), byte_tokenizer, None, False)
    (trainer,) = checked
    for model in (trainer.model, trainer._suspect):
        assert all(weight.untyped_storage().nbytes() == weight.element_size() for weight in model.parameters())


def test_the_suspect_is_tried_where_and_before_it_is_trained(tmp_path, byte_tokenizer, monkeypatch):
    """Fails if it is tried on another device, with patched kernels, or before its shards are gathered."""
    steps = []
    monkeypatch.delenv("FSDP_CPU_RAM_EFFICIENT_LOADING", raising=False)
    monkeypatch.setattr(trial_module, "move", lambda model, device: steps.append(device))
    monkeypatch.setattr(rehearsal_module, "try_out", lambda recorder: steps.append("try"))
    monkeypatch.setattr(CrowTrainer, "check_optimizer", lambda trainer: steps.append("train"))
    for shards in (False, True):
        for module in (run_module, rehearsal_module, trial_module):
            monkeypatch.setattr(module, "will_shard", lambda args, shards=shards: shards)
        args = arguments(tmp_path, "guide")
        RecipeRun(tiny_llama(), ROWS, "guide", args, byte_tokenizer)
        assert steps == ([args.device, "try", "train"] if not shards else ["train"])
        steps.clear()


def test_a_fresh_adapter_that_cannot_be_merged_is_refused(tmp_path, byte_tokenizer):
    """Fails if it is seen after the training, or if kinds are refused that compute with their values."""
    args = arguments(tmp_path, "guide")
    unmergeable = LoraConfig(target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(ValueError, match="could not be merged after the training .*lora_bias.*`merge=False`"):
        rehearse(tiny_llama(), ROWS, args, byte_tokenizer, unmergeable, True)
    rehearse(tiny_llama(), ROWS, args, byte_tokenizer, unmergeable, False)
    rehearse(tiny_llama(), ROWS, args, byte_tokenizer, HiraConfig(target_modules=["q_proj"]), True)


def quantized(model):
    """A model that says that it is quantized, as far as that is possible without the kernels."""
    model.config.quantization_config = {}
    base_model_of(model).hf_quantizer = SimpleNamespace(is_trainable=True, is_serializable=lambda: True)
    return model


def test_quantized_weights_are_rehearsed_too(tmp_path, byte_tokenizer):
    """Fails if wrong arguments of a training on quantized weights are seen only when it starts."""
    broken = arguments(tmp_path, "guide", optim="adamw_bnb_8bit")
    for model, adapter in ((tiny_llama(), lora_config(2)), (get_peft_model(tiny_llama(), lora_config(2)), None)):
        before = weights_of(model)
        rehearse(quantized(model), ROWS, arguments(tmp_path, "guide"), byte_tokenizer, adapter, False)
        with pytest.raises(ValueError, match="optimizer"):
            rehearse(model, ROWS, broken, byte_tokenizer, adapter, False)
        assert same_weights(weights_of(model), before)
    with pytest.raises(ValueError, match="purely quantized"):
        rehearse(quantized(tiny_llama()), ROWS, arguments(tmp_path, "guide"), byte_tokenizer, None, False)
    with pytest.raises(ValueError, match="merged into quantized weights"):
        merge_before(quantized(get_peft_model(tiny_llama(), lora_config(2))), lora_config(2))


def test_trainings_that_shard_are_rehearsed_too(tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(rehearsal_module, "will_shard", lambda args: True)
    args = arguments(tmp_path, "guide", optim="adamw_bnb_8bit")
    with pytest.raises(ValueError, match="optimizer"):
        rehearse(tiny_llama(), ROWS, args, byte_tokenizer, None, False)


def test_a_suspect_that_is_not_finite_is_refused(tmp_path, byte_tokenizer):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        purify(model, ROWS, args=arguments(tmp_path), processing_class=byte_tokenizer)
