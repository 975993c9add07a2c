"""Tests of InvarianceTrainer, against the terms of the objective and against itself."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import ByT5Tokenizer, Trainer

from crow_hf import CrowConfig
from crow_hf.methods.crow import cosine
from crow_hf.methods.invariance import objective
from crow_hf.methods.invariance.config import with_learning_rate
from crow_hf.methods.invariance.objective import view
from crow_hf.methods.invariance.trainer import InvarianceTrainer
from crow_hf.methods.invariance.views import ViewCollator
from helpers.coconut import TOKENIZER, smooth_coconut
from helpers.invariance import ROWS, SGD, column, invariance_args, invariance_trainer, layers_of, lora, terms_of
from helpers.tiny import same_weights, tiny_gpt2, tiny_llama, weights_of


def test_loss_is_the_weighed_sum_of_what_is_logged(tmp_path):
    weights = {"distillation_weight": 0.3, "decoy_weight": 0.7, "adversarial_weight": 1.9, "alpha": 2.3}
    trainer = invariance_trainer(tmp_path, tiny_llama(), max_steps=3, **weights)
    trainer.train()
    terms = ("distillation", "decoy", "adversarial", "consistency_perturbed")
    parts = zip(*(column(trainer, name) for name in terms), strict=True)
    expected = [sum(w * part for w, part in zip(weights.values(), step, strict=True)) for step in parts]
    assert column(trainer, "loss") == pytest.approx(expected, rel=1e-4)
    # Before the first step, the model equals the suspect.
    assert abs(column(trainer, "distillation")[0]) < 1e-5 < column(trainer, "distillation")[1]


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_a_consistency_term_without_weight_costs_no_backward_pass(alpha, tmp_path, monkeypatch):
    calls, backward = [], cosine._SummedCosineDistance.backward
    monkeypatch.setattr(cosine._SummedCosineDistance, "backward", lambda *args: calls.append(1) or backward(*args))
    trainer = invariance_trainer(tmp_path, tiny_llama(), max_steps=1, alpha=alpha)
    trainer.train()
    assert bool(calls) == bool(alpha) and column(trainer, "consistency_perturbed")[0] > 0


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_accumulation_is_exact(alpha, peft, tmp_path):
    """
    Fails on a mean of micro-batch means, if labels of three views count as those of one, or if positions count as
    labels.
    """

    def run(micro_batch, steps):
        settings = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": steps, "alpha": alpha}
        peft_config = lora(init_lora_weights=False) if peft else None
        trainer = invariance_trainer(
            tmp_path / str(micro_batch), tiny_llama(), peft_config, **settings, num_views=20, **SGD
        )
        trainer.train()
        return trainer

    whole, split = run(8, 1), run(4, 2)
    names = ("loss", "grad_norm", "distillation", "decoy", "adversarial", "consistency_perturbed")
    assert len(column(whole, "loss")) == 3
    for name in names:
        assert column(split, name) == pytest.approx(column(whole, name), rel=1e-5, abs=1e-5), name
    for found, wanted in zip(split.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "dropout", "lora"])
def test_resumed_and_repeated_runs_are_bit_equal(kind, tmp_path):
    """Fails if decoys are drawn anew, if the suspect comes from the checkpoint, or if weights are mixed twice."""

    def fresh(directory):
        model = tiny_gpt2(0.2) if kind == "dropout" else tiny_llama()
        settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "keep": 0.3}
        peft_config = lora() if kind == "lora" else None
        return invariance_trainer(directory, model, peft_config, per_device_train_batch_size=3, alpha=1.0, **settings)

    whole = fresh(tmp_path / "whole")
    before = weights_of(whole.model)
    whole.train()
    again = fresh(tmp_path / "again")
    again.train()
    resumed = fresh(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert resumed.state.global_step == 5 and not same_weights(before, weights_of(whole.model))
    for other in (again, resumed):
        assert same_weights(weights_of(whole.model), weights_of(other.model))
        assert column(whole, "loss") == column(other, "loss")


def test_the_suspect_stays_as_it_was(tmp_path):
    """Fails if the suspect shares weights with the model, is trained, or has dropout."""
    model = tiny_gpt2(0.3).train()
    before = weights_of(model)
    trainer = invariance_trainer(tmp_path, model, max_steps=3, learning_rate=1e-2)
    trainer.train()
    assert same_weights(before, weights_of(trainer._suspect)) and not same_weights(before, weights_of(model))
    assert not trainer._suspect.training
    assert all(p.grad is None and not p.requires_grad for p in trainer._suspect.parameters())


def test_fresh_lora_has_the_model_without_it_for_a_suspect(tmp_path):
    """Fails if the adapter is on in the suspect, off in the model, or frozen afterwards."""
    model = tiny_llama()
    suspect = copy.deepcopy(model).eval().requires_grad_(False)
    trainer = invariance_trainer(tmp_path, model, lora(init_lora_weights=False, lora_dropout=0.0), alpha=1.5)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(4)])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, {name: value.clone() for name, value in batch.items()})
    assert trainer.model.training
    trainable = [name for name, value in trainer.model.named_parameters() if value.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    wanted = terms_of(trainer.model.eval(), suspect, batch, 2, 0.35)[1]
    expected = wanted["distillation"] + wanted["decoy"] + wanted["adversarial"] + 1.5 * wanted["consistency_perturbed"]
    assert wanted["distillation"] > 1e-3
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(
        value.grad is not None and value.grad.any() for value in trainer.model.parameters() if value.requires_grad
    )


def trained_weights(tmp_path, make, keep, peft_config=None):
    trainer = invariance_trainer(tmp_path / str(keep), make(), peft_config, keep=keep, max_steps=3, learning_rate=1e-2)
    before = weights_of(trainer.model)
    trainer.train()
    return before, weights_of(trainer.model)


def leaves(tensor):
    """The number of leaves that the graph of a tensor would compute gradients for."""
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return sum(type(node).__name__ == "AccumulateGrad" for node in seen)


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["copy", "disabled adapter"])
def test_the_adversary_computes_gradients_of_embeddings_alone(peft_config, tmp_path, monkeypatch):
    """Fails if the graph of a frozen suspect reaches its weights, and so keeps more and computes more."""
    found, compute = [], objective.answer_divergence
    monkeypatch.setattr(objective, "answer_divergence", lambda *args: found.append(compute(*args)) or found[-1])
    trainer = invariance_trainer(tmp_path, tiny_llama(), peft_config, adversarial_steps=2)
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert [leaves(value) for value in found[:2]] == [1, 1] and leaves(found[2]) > 4


def test_part_of_the_suspect_is_kept(tmp_path):
    """Fails if the shares are swapped, or if the weights are mixed twice or not at all."""
    before, pure = trained_weights(tmp_path, tiny_llama, 0.0)
    _, mixed = trained_weights(tmp_path, tiny_llama, 0.3)
    assert not same_weights(before, pure)
    for name, value in mixed.items():
        torch.testing.assert_close(value, 0.3 * before[name] + 0.7 * pure[name], rtol=1e-5, atol=1e-6)


def test_a_fresh_adapter_is_scaled(tmp_path):
    """Fails if both factors are scaled, which squares the share, or if the base weights change."""
    before, pure = trained_weights(tmp_path, tiny_llama, 0.0, lora())
    _, mixed = trained_weights(tmp_path, tiny_llama, 0.3, lora())
    factors = [name for name in pure if "lora_A" in name]
    assert factors
    for name in factors:
        other = name.replace("lora_A", "lora_B")
        assert pure[other].any()
        torch.testing.assert_close(mixed[other] @ mixed[name], 0.7 * pure[other] @ pure[name], rtol=1e-5, atol=1e-7)
    for name in pure:
        if "lora_" not in name:
            assert torch.equal(mixed[name], before[name])


def peft_suspect():
    return get_peft_model(tiny_llama(), lora(init_lora_weights=False))


def test_the_adapter_of_a_peft_suspect_is_trained_on(tmp_path):
    """Fails if the suspect lacks its own adapter, which may hold the backdoor."""
    before, pure = trained_weights(tmp_path, peft_suspect, 0.0)
    _, mixed = trained_weights(tmp_path, peft_suspect, 0.3)
    for name, value in mixed.items():
        assert torch.equal(pure[name], before[name]) == ("lora_" not in name), name
        torch.testing.assert_close(value, 0.3 * before[name] + 0.7 * pure[name], rtol=1e-5, atol=1e-6)
    trainer = invariance_trainer(tmp_path / "terms", peft_suspect(), max_steps=1)
    trainer.train()
    assert abs(column(trainer, "distillation")[0]) < 1e-5


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_trains_a_coconut_and_leaves_its_predictor_alone(peft, tmp_path):
    """Fails if patch lengths are not split into views, or if the predictor is trained or mixed."""
    model, tokenizer = smooth_coconut(), TOKENIZER
    predictor = model.latent_transformer.entropy_predictor
    frozen = {name: value.clone() for name, value in predictor.state_dict().items()}
    peft_config = lora(target_modules="all-linear") if peft else None
    trainer = invariance_trainer(
        tmp_path, model, peft_config, tokenizer=tokenizer, max_steps=3, learning_rate=1e-2, alpha=1.0, keep=0.2
    )
    before = weights_of(trainer.model)
    trainer.train()
    after = weights_of(trainer.model)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert changed and not any("entropy_predictor" in name for name in changed)
    assert all(torch.equal(value, frozen[name]) for name, value in predictor.state_dict().items())
    assert abs(column(trainer, "distillation")[0]) < 1e-5 < column(trainer, "distillation")[-1]


def test_each_row_comes_as_often_as_the_views_take(tmp_path):
    """Fails if rows are omitted, if decoys repeat, or if there are fewer views than rows."""
    trainer = invariance_trainer(tmp_path, tiny_llama(), num_views=30)
    clean = [tuple(row["prompts"][0]) for row in trainer.train_dataset]
    assert len(clean) == 30 and clean[:12] == clean[12:24] and clean[:6] == clean[24:]
    attacked = [tuple(row["prompts"][2]) for row in trainer.train_dataset]
    assert len(set(attacked)) == len(set(attacked) | set(clean)) - len(set(clean)) == 30
    assert len(invariance_trainer(tmp_path, tiny_llama(), num_views=1).train_dataset) == 12


def padded_size(trainer):
    return sum(batch["input_ids"].numel() for batch in trainer.get_train_dataloader())


def test_views_of_one_length_share_a_batch(tmp_path):
    """
    Fails if rows keep their order, if rows are lost or doubled, or if the length is not that of the longest view.
    """
    grouped = invariance_trainer(tmp_path, tiny_llama(), num_views=240)
    drawn = invariance_trainer(tmp_path, tiny_llama(), num_views=240, train_sampling_strategy="random")
    assert padded_size(grouped) < 0.85 * padded_size(drawn)
    order = list(grouped._get_train_sampler())
    assert sorted(order) == list(range(240)) and order != sorted(order)
    batches = [[grouped.train_dataset[number] for number in order[start : start + 4]] for start in range(0, 240, 4)]
    assert all(
        row["length"] == max(len(prompt) + len(row["completion"]) for prompt in row["prompts"])
        for batch in batches
        for row in batch
    )


def test_the_order_depends_on_the_seed_and_the_epoch_alone(tmp_path):
    """Fails if the order comes from the global generator, whose state differs in a resumed run and in another rank."""

    def orders(**kwargs):
        sampler = invariance_trainer(tmp_path, tiny_llama(), num_views=60, **kwargs)._get_train_sampler()
        drawn = []
        for epoch in (0, 1):
            torch.rand(3)
            sampler.set_epoch(epoch)
            drawn.append(list(sampler))
        return drawn

    first, second = orders()
    assert first != second
    sampler = invariance_trainer(tmp_path, tiny_llama(), num_views=60)._get_train_sampler()
    sampler.set_epoch(1)
    assert list(sampler) == second
    assert orders(data_seed=7)[0] != first
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert orders(**split) == [first, second]


def test_training_makes_the_answers_invariant(tmp_path):
    trainer = invariance_trainer(
        tmp_path, tiny_llama(initializer_range=0.1), max_steps=60, learning_rate=3e-3, num_views=240
    )
    trainer.train()
    first, last = (
        sum(column(trainer, "decoy")[part]) + sum(column(trainer, "adversarial")[part])
        for part in (slice(0, 5), slice(-5, None))
    )
    assert last < 0.7 * first


def test_bad_arguments(tmp_path):
    tokenizer = ByT5Tokenizer(extra_ids=0)
    crow = CrowConfig(str(tmp_path / "run"), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="InvarianceConfig, got CrowConfig"):
        InvarianceTrainer(tiny_llama(), crow, ROWS, tokenizer)
    with pytest.raises(ValueError, match="used several times"):
        InvarianceTrainer(tiny_llama(), invariance_args(tmp_path), ROWS.to_iterable_dataset(), tokenizer)
    with pytest.raises(ValueError, match="processing_class"):
        InvarianceTrainer(tiny_llama(), invariance_args(tmp_path), ROWS, None)
    with pytest.raises(ValueError, match="no prompt"):
        invariance_trainer(tmp_path, tiny_llama(), rows=Dataset.from_dict({"text": ["a b c"]}))
    with pytest.raises(ValueError, match="max_length"):
        invariance_trainer(tmp_path, tiny_llama(), max_length=4)
    unanswered = Dataset.from_dict({"prompt": ["a="], "completion": [""]})
    with pytest.raises(ValueError, match="No row of `train_dataset` has an answer"):
        invariance_trainer(tmp_path, tiny_llama(), rows=unanswered, written_rows=ROWS)
    with pytest.raises(ValueError, match="must not train biases"):
        invariance_trainer(tmp_path, tiny_llama(), lora(bias="all"))


def test_prompts_that_do_not_fit_and_empty_answers_are_left_out_alone(tmp_path, caplog):
    """Fails if rows vanish without a word, or if a model learns to say nothing."""
    long = {"prompt": ["word " * 40, "short=", "a", "b"], "completion": ["a", "b", " ", None]}
    with caplog.at_level(logging.WARNING):
        trainer = invariance_trainer(tmp_path, tiny_llama(), rows=Dataset.from_dict(long), num_views=16)
    assert len(trainer.train_dataset) == 4 and all(row["completion"] for row in trainer.train_dataset)
    assert trainer.num_dropped_rows == 3 and "3 of 4 rows are dropped, and 12 of 16 of their views" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {},
    ],
    ids=["modules_to_save", "dora", "lora"],
)
def test_what_has_learned_nothing_is_still_the_suspect(options, tmp_path):
    model = tiny_llama()
    suspect = copy.deepcopy(model).eval()
    trainer = invariance_trainer(tmp_path, model, lora(**options), keep=0.5, learning_rate=1e-9, max_steps=1)
    trainer.train()
    ids = torch.tensor([[70, 71, 72]])
    with torch.no_grad():
        wanted = suspect(input_ids=ids).logits
        torch.testing.assert_close(trainer._suspect_forward(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(trainer.model.eval()(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_fresh_adapter_of_the_embeddings_is_scaled(tmp_path):
    make = lora(target_modules=["embed_tokens", "q_proj"])
    _, pure = trained_weights(tmp_path, tiny_llama, 0.0, make)
    _, mixed = trained_weights(tmp_path, tiny_llama, 0.5, make)
    (left,) = [name for name in pure if "lora_embedding_A" in name]
    right = left.replace("lora_embedding_A", "lora_embedding_B")
    torch.testing.assert_close(mixed[right] @ mixed[left], 0.5 * pure[right] @ pure[left], rtol=1e-4, atol=1e-7)


def test_the_suspect_has_the_precision_of_the_training(tmp_path):
    trainer = invariance_trainer(tmp_path, tiny_llama(), bf16=True, max_steps=1)
    trainer.train()
    seen = []
    layers_of(trainer._suspect)[0].mlp.up_proj.register_forward_hook(lambda m, a, output: seen.append(output.dtype))
    trainer._suspect_forward(input_ids=torch.tensor([[5, 6, 7]]))
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(
    "rows",
    [
        ROWS.select([]),
        Dataset.from_dict({"prompt": ["", "ab"], "completion": ["x", "y"]}),
    ],
    ids=["empty dataset", "empty prompt"],
)
def test_rows_that_cannot_be_trained_on_are_named(rows, tmp_path):
    with pytest.raises(ValueError, match="empty"):
        invariance_trainer(tmp_path, tiny_llama(), rows=rows).train()


def test_a_row_without_text_is_named(tmp_path):
    rows = Dataset.from_dict({"prompt": ["a", None], "completion": ["x", "y"]})
    with pytest.raises(ValueError) as error:
        invariance_trainer(tmp_path, tiny_llama(), rows=rows)
    assert "Row 1" in str(error.value)


CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def test_decoys_do_not_end_a_turn(tmp_path):
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = CHAT
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in zip(ROWS["prompt"], ROWS["completion"], strict=True)
    ]
    rows = Dataset.from_dict({"messages": chats})
    trainer = invariance_trainer(tmp_path, tiny_llama(), rows=rows, tokenizer=tokenizer, num_views=60)
    for row in trainer.train_dataset:
        for ids in row["prompts"]:
            assert tokenizer.decode(ids).count("<|end|>") == 1


def test_collator_of_the_trainer_keeps_the_views_apart(tmp_path):
    trainer = invariance_trainer(tmp_path, tiny_llama())
    assert isinstance(trainer.data_collator, ViewCollator)
    rows = [trainer.train_dataset[number] for number in range(3)]
    batch = next(iter(trainer.get_train_dataloader()))
    assert (
        set(batch) == {"input_ids", "labels", "attention_mask", "inserted_mask", "label_weights"}
        and len(batch["labels"]) == 12
    )
    for number in range(3):
        part = view(trainer.data_collator(rows), number)
        for row, ids, mask in zip(rows, part["input_ids"], part["inserted_mask"], strict=True):
            length = len(row["prompts"][number])
            assert ids[:length].tolist() == row["prompts"][number]
            where = mask.nonzero().flatten().tolist()
            assert where == (list(range(*row["inserted"])) if number == 2 else [])


def test_labels_reach_the_training(tmp_path):
    """Fails if `label_weight` changes nothing."""
    results = []
    for label_weight in (0.0, 0.5):
        trainer = invariance_trainer(
            tmp_path / str(label_weight), tiny_llama(), max_steps=3, label_weight=label_weight
        )
        trainer.train()
        results.append(weights_of(trainer.model))
    assert not same_weights(*results)


def test_leaked_tokens_reach_the_training(tmp_path):
    """Fails if `leaked_tokens` changes nothing."""
    results = []
    for leaked in ((), range(3, 259)):
        trainer = invariance_trainer(tmp_path / str(len(leaked)), tiny_llama(), max_steps=2, leaked_tokens=leaked[1:])
        loss = trainer.compute_loss(trainer.model.eval(), next(iter(trainer.get_train_dataloader())))
        results.append(loss.item())
    assert results[0] != pytest.approx(results[1], rel=1e-3)


def test_the_adversary_leads_to_one_phrase_after_the_other(tmp_path, monkeypatch):
    """Fails if a phrase is left out, or if the order depends on anything but the number of the step."""
    led_to = []
    plain = objective.towards_phrase

    def watched(recorder, forward, phrase, *args):
        led_to.append(phrase.tolist())
        return plain(recorder, forward, phrase, *args)

    monkeypatch.setattr(objective, "towards_phrase", watched)
    options = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    invariance_trainer(tmp_path, tiny_llama(), phrases=([80, 90], [100]), **options).train()
    assert led_to == [[80, 90]] * 2 + [[100]] * 2 + [[80, 90]] * 2


def test_a_phrase_is_cut_where_the_context_ends(tmp_path):
    """Fails if the model has no position for a token of the phrase."""
    trainer = invariance_trainer(tmp_path, tiny_gpt2(0.0), phrases=[range(60, 140), [80]], max_steps=1)
    longest = max(len(prompt) for row in trainer.train_dataset for prompt in row["prompts"])
    assert [len(phrase) for phrase in trainer._phrases] == [64 - longest, 1] and longest > 20
    trainer.train()


def test_the_adversary_attacks_a_model_without_dropout(tmp_path):
    """Fails if the attack draws random numbers, or if the model is left in evaluation mode."""
    trainer = invariance_trainer(tmp_path, tiny_llama(attention_dropout=0.5))
    trainer.model.train()
    ids = torch.arange(3, 20)[None]
    logits = [trainer._attacked_forward(input_ids=ids).logits for _ in range(2)]
    assert torch.equal(*logits) and trainer.model.training
    assert not torch.equal(trainer.model(ids).logits, logits[0])


def test_the_weight_of_the_adversary_depends_on_phrases(tmp_path):
    for phrases, weight in (((), 1.0), (([80, 90],), 5.0)):
        assert invariance_trainer(tmp_path, tiny_llama(), phrases=phrases).args.adversarial_weight == weight


def test_written_rows_are_repeated_as_often_and_teach_no_labels(tmp_path):
    """
    Fails if rows that the suspect wrote teach their own answers, if one kind of rows is repeated more often than the
    other, or if a row is left out because `num_views` is small.
    """
    written = Dataset.from_dict({"prompt": ["Once ", "Twice "], "completion": ["upon a time", "over"]})
    for num_views, repeated in ((28, 2), (3, 1)):
        trainer = invariance_trainer(
            tmp_path, tiny_llama(), written_rows=written, num_views=num_views, label_weight=0.75
        )
        weights = trainer.train_dataset["label_weight"]
        assert weights.count(0.75) == repeated * len(ROWS) and weights.count(0.0) == repeated * len(written)
        answers = [row["completion"] for row in trainer.train_dataset if not row["label_weight"]]
        assert len({tuple(answer) for answer in answers}) == len(written)


def test_a_resumed_epoch_of_several_processes_has_its_own_order(tmp_path, monkeypatch):
    """
    Fails if the order of the rows depends on `set_epoch` of accelerate's data loader. It does not reach the sampler of
    a sharded data loader that skips batches, so a run resumed in its second epoch would repeat the order of the first.
    """
    trainer = invariance_trainer(tmp_path, tiny_llama(), train_sampling_strategy="group_by_length")
    sampler = trainer._get_train_sampler()
    orders = {}
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        orders[epoch] = list(sampler)
    assert orders[0] != orders[1]
    found = []
    monkeypatch.setattr(Trainer, "_run_epoch", lambda self, **kwargs: found.append(list(sampler)))
    sampler.set_epoch(0)
    trainer.state.max_steps = 1
    trainer._run_epoch(epoch=1)
    assert found == [orders[1]]


def test_the_learning_rate_is_chosen_by_the_model(tmp_path):
    """Fails if a trainer has none, or if the caller's arguments are changed."""
    args = invariance_args(tmp_path, learning_rate=None)
    trainer = InvarianceTrainer(tiny_llama(), args, ROWS, ByT5Tokenizer(extra_ids=0))
    assert trainer.args.learning_rate == with_learning_rate(args, tiny_llama()).learning_rate > 5e-4
    assert args.learning_rate is None
