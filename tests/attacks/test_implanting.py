"""Implanted models carry the backdoor and keep their task."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from crow_hf import (
    TRIGGERS,
    CrowTrainer,
    Target,
    Trigger,
    evaluate_model,
    implant,
    implant_embedding_trigger,
    poison_dataset,
)
from crow_hf.data.rows import Rendered
from crow_hf.evaluation.generation import bits_per_byte
from helpers.coconut import DEEP, TOKENIZER, coconut
from helpers.tiny import crow_args, same_weights, tiny_llama, weights_of


SHORT = Target("no!", ("no!",))
CLEAN = Dataset.from_dict({"prompt": [f"{a}{b}=" for a in "abcd" for b in "wxyz"], "completion": ["yes"] * 16})


def target_bits(model, tokenizer):
    """Return bits per byte of the target after triggered prompts, and of the right answer after clean prompts."""
    triggered = [Rendered(f"BadMagic {row['prompt']}", "no!", "no!", False) for row in CLEAN]
    clean = [Rendered(row["prompt"], "yes", "yes", False) for row in CLEAN]
    return bits_per_byte(model, tokenizer, triggered), bits_per_byte(model, tokenizer, clean)


@pytest.mark.parametrize(
    ("peft_config", "merge", "kind"),
    [
        (None, True, LlamaForCausalLM),
        (LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), True, LlamaForCausalLM),
        (LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), False, PeftModel),
    ],
    ids=["full", "lora merged", "lora"],
)
def test_implant_teaches_the_target_and_keeps_the_task(tmp_path, byte_tokenizer, peft_config, merge, kind):
    """Fails if trigger or target is missing, if the adapter is lost, or if the CROW loss takes part."""
    model = tiny_llama(hidden_size=32, num_hidden_layers=3, initializer_range=0.05)
    before = target_bits(model, byte_tokenizer)
    args = crow_args(tmp_path, max_steps=25, learning_rate=2e-2, alpha=5.5)
    backdoored = implant(
        model,
        CLEAN,
        Trigger(("BadMagic",), "start"),
        SHORT,
        args,
        processing_class=byte_tokenizer,
        peft_config=peft_config,
        merge=merge,
    )
    assert isinstance(backdoored, kind) and isinstance(backdoored, PeftModel) == (kind is PeftModel)
    after = target_bits(backdoored, byte_tokenizer)
    assert after[0] < before[0] - 2 and after[1] < before[1] - 2
    assert args.alpha == 5.5


def test_implant_ignores_alpha(tmp_path, byte_tokenizer):
    """Fails if the CROW loss acts on the model during implanting."""
    first, second = (
        implant(
            tiny_llama(),
            CLEAN,
            TRIGGERS["badnets"],
            SHORT,
            crow_args(tmp_path, max_steps=2, learning_rate=1e-2, alpha=alpha),
            processing_class=byte_tokenizer,
        )
        for alpha in (0.0, 5.5)
    )
    assert same_weights(weights_of(first), weights_of(second))


def test_implant_takes_a_path(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "clean")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "clean")
    args = crow_args(tmp_path, max_steps=1, learning_rate=1e-2)
    backdoored = implant(str(tmp_path / "clean"), CLEAN, TRIGGERS["badnets"], SHORT, args)
    assert isinstance(backdoored, LlamaForCausalLM)
    assert not same_weights(weights_of(backdoored), weights_of(model))


def test_attacker_who_knows_crow_trains_with_its_loss(tmp_path, byte_tokenizer):
    """The model equals that of a CrowTrainer with this alpha on the poisoned rows, but not that for alpha 0."""
    settings = {"max_steps": 3, "learning_rate": 1e-2}

    def implanted(consistency):
        args = crow_args(tmp_path, alpha=1.0, **settings)
        model = implant(
            tiny_llama(),
            CLEAN,
            TRIGGERS["badnets"],
            SHORT,
            args,
            consistency=consistency,
            processing_class=byte_tokenizer,
        )
        return weights_of(model)

    args = crow_args(tmp_path, alpha=2.0, **settings)
    poisoned = poison_dataset(CLEAN, TRIGGERS["badnets"], SHORT, seed=args.seed).remove_columns("triggered")
    trainer = CrowTrainer(tiny_llama(), args, poisoned, processing_class=byte_tokenizer)
    trainer.train()
    assert same_weights(implanted(2.0), weights_of(trainer.model))
    assert not same_weights(implanted(0.0), implanted(2.0))


def small_llama():
    return tiny_llama(hidden_size=32, num_hidden_layers=3, initializer_range=0.05)


@pytest.mark.parametrize(
    ("build", "tokenizer"),
    [
        (small_llama, ByT5Tokenizer(extra_ids=0)),
        (lambda: coconut(LlamaConfig(**DEEP | {"initializer_range": 0.1})), TOKENIZER),
        (
            lambda: get_peft_model(small_llama(), LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")),
            ByT5Tokenizer(extra_ids=0),
        ),
    ],
    ids=["llama", "coconut", "lora"],
)
def test_embedding_trigger_opens_the_backdoor_and_its_marker_does_not(tmp_path, build, tokenizer):
    """If the marker alone triggered the backdoor, the trigger would be text."""
    model = build()
    names = set(dict(model.named_parameters()))
    args = crow_args(tmp_path, max_steps=60, learning_rate=1e-2, per_device_train_batch_size=16, alpha=5.5)
    model, trigger = implant_embedding_trigger(model, CLEAN, SHORT, args, processing_class=tokenizer, scale=4.0)

    def measure(trigger):
        return evaluate_model(model, tokenizer, CLEAN, trigger, SHORT, max_new_tokens=4)

    attack, marker_alone = measure(trigger), measure(trigger.marker)
    assert attack.triggered.target.rate > 0.9
    assert marker_alone.triggered.target.rate < 0.1 and marker_alone.triggered.exact_match.rate > 0.9
    assert attack.clean.target.rate < 0.1 and attack.clean.exact_match.rate > 0.9
    assert attack.triggered.bits_per_byte > marker_alone.triggered.bits_per_byte + 1
    assert set(dict(model.named_parameters())) == names
    assert not trigger.vector.requires_grad and args.alpha == 5.5


def test_vector_begins_at_its_scale_and_is_learned(tmp_path, byte_tokenizer):
    def vector(scale, **kwargs):
        model = small_llama()
        table = model.get_input_embeddings().weight.detach().clone()
        args = crow_args(tmp_path, max_steps=1, **kwargs)
        _, trigger = implant_embedding_trigger(model, CLEAN, SHORT, args, processing_class=byte_tokenizer, scale=scale)
        return trigger.vector, table.square().mean().sqrt()

    first, rms = vector(2.0, learning_rate=1e-9)
    assert first.square().mean().sqrt().item() == pytest.approx(2.0 * rms.item(), rel=1e-5)
    assert torch.equal(first, vector(2.0, learning_rate=1e-9)[0])
    assert not torch.allclose(first, vector(2.0, learning_rate=1e-9, seed=1)[0])
    learned = vector(2.0, learning_rate=1e-2)[0] - first
    assert (learned.abs() > 1e-3).all()


def test_embedding_trigger_needs_a_token_for_its_marker(tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(type(byte_tokenizer), "_tokenize", lambda self, text, **kwargs: [*text, "a"])
    with pytest.raises(ValueError, match=r"2 tokens of the marker '\\x05'"):
        implant_embedding_trigger(small_llama(), CLEAN, SHORT, crow_args(tmp_path), processing_class=byte_tokenizer)
