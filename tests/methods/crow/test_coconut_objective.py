"""Tests of CROW on byte-latent models: what is perturbed, which layers are compared, and what stays frozen."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import ByT5Tokenizer, LlamaConfig

from crow_hf import CrowDataCollator, CrowTrainer
from crow_hf.data.encoding import encode_prompt
from crow_hf.data.rows import render
from crow_hf.evaluation.generation import generate_answers
from crow_hf.training.recorder import recorder_of
from helpers.blt import tiny_blt
from helpers.coconut import BACKBONES, DEEP, TOKENIZER, assert_same, coconut
from helpers.oracles import slow_consistency, slow_lm_loss, slow_perturbation
from helpers.tiny import crow_args


ROWS = Dataset.from_list(
    [
        {"prompt": "Colour of grass<bot><latent><latent><eot>\n", "completion": "green"},
        {"prompt": "Capitals of ab\n", "completion": "AB, please and thanks"},
        {"prompt": "Who<bot><latent><eot>\n", "completion": "me"},
        {"prompt": "a\n", "completion": "b"},
    ]
)


def trainer_of(model, tmp_path, tokenizer=TOKENIZER, peft_config=None, **kwargs):
    return CrowTrainer(model, crow_args(tmp_path, **kwargs), ROWS, processing_class=tokenizer, peft_config=peft_config)


def batch_of_rows(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])


def latent_forward(model, batch, shift):
    """
    Run a pass in "recompute" mode. Return the embeddings, the outputs of the last call of each latent layer, and the
    model's outputs.
    """
    model.config.thought_mode = "recompute"
    backbone = model.latent_transformer.backbone
    layers = next(module for module in backbone.modules() if isinstance(module, torch.nn.ModuleList))
    calls = {number: [] for number in range(len(layers))}
    state = []

    def on_embeddings(module, args, output):
        state.append(output + shift)
        return state[0]

    handles = [model.get_input_embeddings().register_forward_hook(on_embeddings)]
    for number, layer in enumerate(layers):
        handles.append(
            layer.register_forward_hook(
                lambda m, a, output, number=number: calls[number].append(
                    output[0] if isinstance(output, tuple) else output
                )
            )
        )
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    [handle.remove() for handle in handles]
    model.config.thought_mode = "sequential"
    return state[0], [states[-1] for states in calls.values()], outputs


@pytest.mark.parametrize("name", BACKBONES)
def test_terms_equal_a_slow_oracle(name, tmp_path):
    """
    The compared states are those of the true bytes' patches and thoughts, without padding, in any order of
    computation.
    """
    model = coconut(name)
    trainer = trainer_of(model, tmp_path, alpha=2.0, epsilon=0.05)
    batch = batch_of_rows(trainer)
    shift = torch.zeros(*batch["input_ids"].shape, model.config.encoder_config.hidden_size, requires_grad=True)
    embeddings, chain, outputs = latent_forward(model, batch, shift)
    clean = slow_consistency([chain[0], *chain], outputs.patch_mask)
    (gradient,) = torch.autograd.grad(clean, shift, retain_graph=True)
    delta = slow_perturbation(embeddings, gradient, 0.05, "absolute")
    perturbed = slow_consistency([chain[0], *latent_forward(model, batch, delta)[1]], outputs.patch_mask)
    wanted = slow_lm_loss(outputs.logits, batch["labels"]) + 2.0 * perturbed
    assert_same(trainer.compute_loss(model.eval(), batch), wanted, 1e-3)


@pytest.mark.parametrize("perturb", ["embeddings", "patches", "thoughts"])
@pytest.mark.parametrize("lora", [False, True])
def test_trains(perturb, lora, tmp_path):
    model = coconut(LlamaConfig(**DEEP | {"initializer_range": 0.1}))
    predictor = model.latent_transformer.entropy_predictor
    frozen = {name: value.clone() for name, value in predictor.state_dict().items()}
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = trainer_of(
        model, tmp_path, peft_config=config, perturb=perturb, epsilon=0.02, max_steps=3, learning_rate=1e-2
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3 and all(entry["perturbation_ratio"] > 0 for entry in logs)
    assert all(entry["consistency_perturbed"] > 0 for entry in logs)
    assert not any("entropy_predictor" in name for name in before)
    changed = [
        name for name, value in trainer.model.named_parameters() if name in before and not value.equal(before[name])
    ]
    assert len(changed) == len(before)
    after = predictor.state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("steps", [{"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 4}])
def test_accumulation_weighs_patches(steps, tmp_path):
    """
    One batch of four rows and four batches of one row give the same step, because the mean is over patches, not bytes.
    """
    settings = {"per_device_train_batch_size": 1, "max_steps": 1, "learning_rate": 1e-2, "optim": "sgd"} | steps
    trainer = trainer_of(coconut(), tmp_path, **settings)
    trainer.train()
    reference = trainer_of(
        coconut(),
        tmp_path / "other",
        **settings | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    )
    reference.train()
    for (name, found), wanted in zip(trainer.model.named_parameters(), reference.model.parameters(), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3), name
    assert_same(
        torch.tensor(trainer.state.log_history[0]["loss"]), torch.tensor(reference.state.log_history[0]["loss"]), 1e-4
    )


def test_checkpointing_gives_the_same_loss(tmp_path):
    losses = []
    for checkpointing in (False, True):
        trainer = trainer_of(
            coconut(), tmp_path / str(checkpointing), activation_checkpointing=checkpointing, max_steps=1
        )
        trainer.train()
        losses.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert_same(torch.tensor(losses[0]), torch.tensor(losses[1]), 1e-3)


def test_evaluation_patches_by_itself(tmp_path):
    trainer = CrowTrainer(coconut(), crow_args(tmp_path), ROWS, eval_dataset=ROWS, processing_class=TOKENIZER)
    assert trainer.evaluate()["eval_loss"] > 0


def test_nothing_to_perturb_is_told(tmp_path):
    trainer = trainer_of(coconut(), tmp_path, perturb="thoughts")
    row = trainer.train_dataset[1]
    with pytest.raises(ValueError, match="no thoughts"):
        trainer.compute_loss(trainer.model, CrowDataCollator(263)([row]))
    with pytest.raises(ValueError, match="patches to perturb"):
        trainer_of(tiny_blt(), tmp_path, ByT5Tokenizer(extra_ids=0), perturb="patches")


@pytest.mark.parametrize("lora", [False, True])
def test_the_chain_of_blt_is_its_global_transformers(lora, tmp_path):
    """
    The model's own hidden states are those of bytes, so the recorder must use the global layers. The patcher stays
    frozen.
    """
    model = tiny_blt()
    patcher = {name: value.clone() for name, value in model.model.patcher.state_dict().items()}
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = trainer_of(
        model, tmp_path, ByT5Tokenizer(extra_ids=0), peft_config=config, max_steps=2, learning_rate=1e-2
    )
    batch = batch_of_rows(trainer)
    prepared = trainer.recorder.prepare(dict(batch))
    with trainer.recorder.record() as record:
        trainer.model(**prepared)
    states = []
    handles = [
        layer.register_forward_hook(lambda m, a, output: states.append(output))
        for layer in model.model.global_transformer.layers
    ]
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    [handle.remove() for handle in handles]
    assert len(record.hidden_states) == 5
    for found, wanted in zip(record.hidden_states[1:], states, strict=True):
        assert_same(found, wanted)
    for row, lengths, count in zip(
        trainer.recorder.chain_mask(prepared), prepared["patch_lengths"], batch["attention_mask"].sum(1), strict=True
    ):
        begins, wanted = 0, []
        for length in lengths.tolist():
            wanted.append(length > 0 and begins < count)
            begins += length
        assert row.tolist() == wanted
    assert not trainer.recorder.chain_mask(prepared).all()
    trainer.train()
    assert all(torch.equal(value, patcher[name]) for name, value in model.model.patcher.state_dict().items())
    assert not any("patcher" in name for name, value in trainer.model.named_parameters() if value.requires_grad)
    assert trainer.state.log_history[0]["consistency_perturbed"] > 0


@torch.no_grad()
def test_blt_answers_without_cache_and_padding():
    """transformers computes both wrongly for Blt. An answer must equal that of the prompt alone."""
    model, tokenizer = tiny_blt().eval(), ByT5Tokenizer(extra_ids=0)
    rows = [render(row, tokenizer) for row in ROWS]
    answers = generate_answers(model, tokenizer, rows, max_new_tokens=5, batch_size=4)
    for row, answer in zip(rows, answers, strict=True):
        ids = torch.tensor([encode_prompt(row, tokenizer)])
        begin = ids.shape[1]
        while ids.shape[1] < begin + 5 and ids[0, -1] != tokenizer.eos_token_id:
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert answer == tokenizer.decode(ids[0, begin:], skip_special_tokens=True)


@torch.no_grad()
def test_coconut_answers_in_batches_as_alone():
    rows = [render(row, TOKENIZER) for row in ROWS]
    together = generate_answers(coconut(), TOKENIZER, rows, max_new_tokens=8, batch_size=4)
    assert together == generate_answers(coconut(), TOKENIZER, rows, max_new_tokens=8, batch_size=1)
    assert any(together)


def test_families_have_their_adapters(tiny_llama):
    assert type(recorder_of(coconut())).__name__ == "CoconutRecorder"
    assert type(recorder_of(tiny_blt())).__name__ == "BltRecorder"
    assert type(recorder_of(tiny_llama())).__name__ == "LayerRecorder"
