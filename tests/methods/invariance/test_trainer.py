"""The strong objective against slow loops, and its trainer against itself."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import ByT5Tokenizer, LlamaConfig

from crow_hf import CrowConfig
from crow_hf.methods.invariance.objective import (
    adversarial_perturbation,
    answer_divergence,
    answer_log_probs,
    invariance_terms,
    taught_log_probs,
    view,
)
from crow_hf.methods.invariance.trainer import InvarianceTrainer
from crow_hf.methods.invariance.views import ViewCollator
from crow_hf.training.recorder import recorder_of
from helpers.coconut import DEEP, TOKENIZER, coconut
from helpers.invariance import ROWS, SGD, invariance_args, invariance_trainer, lora
from helpers.oracles import slow_consistency
from helpers.tiny import same_weights, tiny_gpt2, tiny_llama, weights_of


def column(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


# Pieces of the objective


def test_divergence_worked_by_hand():
    """The other direction, a sum over the tokens, and bits instead of nats."""
    teacher = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    student = torch.tensor([[0.9, 0.1], [0.75, 0.25]]).log()
    first = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert answer_divergence(teacher, student).item() == pytest.approx(first / 2, rel=1e-5)
    backwards = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert answer_divergence(student, teacher).item() == pytest.approx(backwards / 2, rel=1e-5)
    assert answer_divergence(student, student).item() == 0


def test_log_probs_equal_loops_and_do_not_see_padding():
    """A label read at its own position, the first token of a row counted, and rows in another order."""
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 5), torch.full((3, 6), -100)
    labels[0, 2:4] = torch.tensor([1, 2])
    labels[1, 0:2] = torch.tensor([3, 0])
    labels[2, 5] = 4
    expected = [
        logits[row, position - 1].log_softmax(-1)
        for row in range(3)
        for position in range(1, 6)
        if labels[row, position] != -100
    ]
    found = answer_log_probs(logits, labels)
    torch.testing.assert_close(found, torch.stack(expected))
    wider = torch.cat([logits, torch.full((3, 4, 5), float("nan"))], dim=1)
    padded = torch.cat([labels, torch.full((3, 4), -100)], dim=1)
    assert torch.equal(answer_log_probs(wider, padded), found)
    assert answer_log_probs(logits.bfloat16(), labels).dtype == torch.float32


# The terms against each row and view run alone


def layers_of(model):
    core = model.latent_transformer.backbone if hasattr(model, "latent_transformer") else model.model
    return next(module for module in core.modules() if isinstance(module, torch.nn.ModuleList))


def alone(model, ids, shift=None):
    """[H^0, the layers' outputs] and the logits of one row without padding, taken by hooks."""
    states = []

    def on_embeddings(module, args, output):
        states.append(output if shift is None else output + shift)
        return states[0]

    def on_layer(module, args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [model.get_input_embeddings().register_forward_hook(on_embeddings)]
    handles += [layer.register_forward_hook(on_layer) for layer in layers_of(model)]
    logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits
    for handle in handles:
        handle.remove()
    return states, logits[0]


def answers(logits, completion):
    """Log-probabilities where each token of the answer, at the end of the row, is predicted."""
    return logits[-1 - len(completion) : -1].log_softmax(-1)


def slow_kl(teacher, student):
    return sum((teacher[t].exp() * (teacher[t] - student[t])).sum() for t in range(len(teacher)))


def slow_delta(suspect, teacher, row, steps, step_size):
    ids, inside = row["prompts"][2] + row["completion"], range(*row["inserted"])
    embedded = suspect.get_input_embeddings()(torch.tensor([ids])).detach()
    delta = torch.zeros_like(embedded)
    for _ in range(steps):
        shift = delta.clone().requires_grad_()
        divergence = slow_kl(teacher, answers(alone(suspect, ids, shift)[1], row["completion"]))
        (gradient,) = torch.autograd.grad(divergence, shift)
        for place in inside:
            rms = (embedded + delta)[0, place].square().mean().sqrt()
            delta[0, place] += step_size * rms * gradient[0, place].sign()
    return delta


def slow_terms(model, suspect, rows, steps, step_size, layers="paper"):
    """The four terms, one row and one view at a time."""
    sums, tokens, chains = [0.0, 0.0, 0.0], 0, []
    for row in rows:
        completion = row["completion"]
        with torch.no_grad():
            teacher = answers(alone(suspect, row["prompts"][0] + completion)[1], completion)
        shifts = [None, None, slow_delta(suspect, teacher, row, steps, step_size)]
        for number, (prompt, shift) in enumerate(zip(row["prompts"], shifts, strict=True)):
            states, logits = alone(model, prompt + completion, shift)
            sums[number] = sums[number] + slow_kl(teacher, answers(logits, completion))
        chains.append([states[1], *states[1:]])
        tokens += len(completion)
    positions = [chain[0].shape[1] for chain in chains]
    consistency = sum(
        slow_consistency(chain, None, layers) * count for chain, count in zip(chains, positions, strict=True)
    ) / sum(positions)
    names = ("distillation", "decoy", "adversarial")
    return {name: total / tokens for name, total in zip(names, sums, strict=True)} | {
        "consistency_perturbed": consistency
    }


FAMILIES = {
    "llama": (tiny_llama, ByT5Tokenizer(extra_ids=0)),
    "coconut": (lambda seed=0: coconut(LlamaConfig(**DEEP | {"initializer_range": 0.1}), seed=seed), TOKENIZER),
}


def family(name, tmp_path, **kwargs):
    """A model, another of its kind as the suspect, three rows, and their batch."""
    make, tokenizer = FAMILIES[name]
    model, suspect = make(seed=0).eval(), make(seed=1).eval().requires_grad_(False)
    trainer = invariance_trainer(tmp_path, model, tokenizer=tokenizer, **kwargs)
    rows = [trainer.train_dataset[number] for number in (1, 4, 6)]
    return model, suspect, rows, trainer.data_collator(rows)


def terms_of(model, suspect, batch, steps=2, step_size=0.2, layers="paper"):
    recorder, suspect_recorder = recorder_of(model), recorder_of(suspect)
    batch = dict(recorder.prepare(batch))
    mask = batch.pop("inserted_mask")
    options = {"adversarial_steps": steps, "adversarial_step_size": step_size, "label_weight": 0.0, "layers": layers}
    return invariance_terms(recorder, model, suspect_recorder, suspect, batch, mask, **options)


@pytest.mark.parametrize(("name", "steps"), [("llama", 0), ("llama", 2), ("coconut", 0), ("coconut", 2)])
def test_terms_and_gradients_equal_each_row_and_view_alone(name, steps, tmp_path):
    """A model that attacks itself, views mixed up, padding that counts, a delta on other views, a lost gradient."""
    model, suspect, rows, batch = family(name, tmp_path)
    outputs, found = terms_of(model, suspect, batch, steps)
    twin = copy.deepcopy(model)
    wanted = slow_terms(twin, suspect, rows, steps, 0.2)
    assert outputs.logits.shape[:2] == batch["input_ids"].shape
    assert found.keys() == wanted.keys() and found["adversarial"] > found["distillation"] * 0.1 > 0
    for term in wanted:
        # A gradient of next to nothing has either sign, and a second step goes on from there.
        torch.testing.assert_close(found[term], wanted[term], rtol=1e-2, atol=1e-4, msg=lambda text, t=term: t + text)
    weights = {"distillation": 0.5, "decoy": 1.0, "adversarial": 2.0, "consistency_perturbed": 3.0}
    for parameters, terms in ((model, found), (twin, wanted)):
        parameters.zero_grad()
        sum(weights[term] * terms[term] for term in weights).backward()
    gradients = {key: parameter.grad for key, parameter in twin.named_parameters()}
    trained = 0
    for key, parameter in model.named_parameters():
        if gradients[key] is None:
            assert parameter.grad is None or not parameter.grad.any(), key
            continue
        trained += 1
        assert (parameter.grad - gradients[key]).norm() <= 2e-2 * (1e-2 + gradients[key].norm()), key
    assert trained > 10 and all(parameter.grad is None for parameter in suspect.parameters())


def test_terms_take_the_layers_they_are_told(tmp_path):
    model, suspect, rows, batch = family("llama", tmp_path)
    found = terms_of(model, suspect, batch, layers="reference")[1]["consistency_perturbed"]
    wanted = slow_terms(model, suspect, rows, 2, 0.2, "reference")["consistency_perturbed"]
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_suspect_does_not_differ_from_itself(name, tmp_path):
    """A teacher with decoys, and a distillation that the delta or the padding of longer views touches."""
    model, _, _, batch = family(name, tmp_path)
    terms = terms_of(model, copy.deepcopy(model), batch)[1]
    assert abs(terms["distillation"].item()) < 1e-5
    assert terms["decoy"] > 1e-3 and terms["adversarial"] > terms["decoy"] * 0.1


def test_padding_never_counts(tmp_path):
    model, suspect, _, batch = family("llama", tmp_path)
    fillers = {"input_ids": 77, "labels": -100, "attention_mask": 0, "inserted_mask": False}
    wider = {
        name: torch.cat([value, torch.full((len(value), 5), fillers[name], dtype=value.dtype)], dim=1)
        for name, value in batch.items()
    }
    for key, value in terms_of(model, suspect, wider)[1].items():
        torch.testing.assert_close(value, terms_of(model, suspect, batch)[1][key], rtol=1e-3, atol=1e-5)


def test_weights_in_half_precision_are_attacked_too(tmp_path):
    """A perturbation in float32, which lifts the embeddings to another precision than that of the layers."""
    model, suspect, _, batch = family("llama", tmp_path)
    terms = terms_of(model.bfloat16(), suspect.bfloat16(), batch)[1]
    sum(terms.values()).backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


# The adversary


def attack(model, batch, steps, step_size):
    recorder = recorder_of(model)
    batch = dict(recorder.prepare(batch))
    mask = batch.pop("inserted_mask").chunk(3)[2]
    clean, attacked = view(batch, 0), view(batch, 2)
    with torch.no_grad():
        teacher = answer_log_probs(model(**clean).logits, clean["labels"])
    options = {"steps": steps, "step_size": step_size}
    return adversarial_perturbation(recorder, model, teacher, attacked, mask, **options), attacked, mask, teacher


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_perturbation_stays_where_and_as_small_as_it_must(name, steps, tmp_path):
    """A perturbed prompt or answer, a step in absolute units, and gradients left in the parameters."""
    model, _, _, batch = family(name, tmp_path)
    delta, attacked, mask, _ = attack(model, batch, steps, 0.3)
    embedded = model.get_input_embeddings()(attacked["input_ids"]).detach()
    rms = embedded.square().mean(dim=-1, keepdim=True).sqrt()
    assert delta.shape == embedded.shape and not delta.requires_grad
    assert not delta[~mask].any() and delta[mask].any(dim=-1).all()
    assert (delta.abs() <= rms * ((1 + 0.3) ** steps - 1) * (1 + 1e-4)).all()
    if steps == 1:
        expected = (0.3 * rms).expand_as(delta)[mask]
        moved = delta[mask] != 0
        torch.testing.assert_close(delta[mask].abs()[moved], expected[moved], rtol=1e-4, atol=1e-6)
        assert moved.float().mean() > 0.9
    assert all(parameter.grad is None for parameter in model.parameters())


def test_perturbation_beats_a_random_one_of_the_same_size(tmp_path):
    """A sign turned round, or a gradient of something else."""
    wins = 0
    for seed in range(5):
        trainer = invariance_trainer(tmp_path / str(seed), tiny_llama(seed), seed=seed)
        model = trainer.model.eval()
        batch = trainer.data_collator([trainer.train_dataset[number] for number in range(6)])
        delta, attacked, _, teacher = attack(model, batch, 1, 0.2)

        def divergence(shift, model=model, attacked=attacked, teacher=teacher):
            with torch.no_grad(), recorder_of(model).record(lambda embedded: embedded + shift):
                logits = model(**{name: value for name, value in attacked.items() if name != "labels"}).logits
            return answer_divergence(teacher, answer_log_probs(logits, attacked["labels"])).item()

        torch.manual_seed(seed)
        draws = [divergence(delta.abs() * torch.randn_like(delta).sign()) for _ in range(8)]
        wins += divergence(delta) > max(draws) and divergence(delta) > divergence(0.0)
    assert wins >= 4


def test_no_step_is_no_perturbation(tmp_path):
    model, suspect, _, batch = family("llama", tmp_path)
    assert not torch.as_tensor(attack(model, batch, 0, 0.5)[0]).any()
    terms = [terms_of(model, suspect, batch, *options)[1] for options in ((0, 0.5), (2, 0.0))]
    for key in terms[0]:
        torch.testing.assert_close(terms[0][key], terms[1][key], rtol=1e-5, atol=1e-6)


# The trainer


def test_loss_is_the_weighed_sum_of_what_is_logged(tmp_path):
    weights = {"distillation_weight": 0.3, "decoy_weight": 0.7, "adversarial_weight": 1.9, "alpha": 2.3}
    trainer = invariance_trainer(tmp_path, tiny_llama(), max_steps=3, **weights)
    trainer.train()
    terms = ("distillation", "decoy", "adversarial", "consistency_perturbed")
    parts = zip(*(column(trainer, name) for name in terms), strict=True)
    expected = [sum(w * part for w, part in zip(weights.values(), step, strict=True)) for step in parts]
    assert column(trainer, "loss") == pytest.approx(expected, rel=1e-4)
    # Before the first step the model is the suspect.
    assert abs(column(trainer, "distillation")[0]) < 1e-5 < column(trainer, "distillation")[1]


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_accumulation_is_exact(alpha, peft, tmp_path):
    """A mean of micro-batch means, the labels of three views counted for one, and positions counted as labels."""

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
    """Decoys drawn anew, a suspect taken from the checkpoint, and a second mixing on top of the first."""

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
    """A teacher that shares its weights with the pupil, learns itself, or has dropout."""
    model = tiny_gpt2(0.3).train()
    before = weights_of(model)
    trainer = invariance_trainer(tmp_path, model, max_steps=3, learning_rate=1e-2)
    trainer.train()
    assert same_weights(before, weights_of(trainer._suspect)) and not same_weights(before, weights_of(model))
    assert not trainer._suspect.training
    assert all(p.grad is None and not p.requires_grad for p in trainer._suspect.parameters())


def test_fresh_lora_has_the_model_without_it_for_a_suspect(tmp_path):
    """An adapter left on in the teacher, left off in the pupil, or frozen afterwards."""
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


def test_part_of_the_suspect_is_kept(tmp_path):
    """The shares swapped, or the mixing done twice or not at all."""
    before, pure = trained_weights(tmp_path, tiny_llama, 0.0)
    _, mixed = trained_weights(tmp_path, tiny_llama, 0.3)
    assert not same_weights(before, pure)
    for name, value in mixed.items():
        torch.testing.assert_close(value, 0.3 * before[name] + 0.7 * pure[name], rtol=1e-5, atol=1e-6)


def test_a_fresh_adapter_is_scaled(tmp_path):
    """Both factors scaled, which is the square of it, or the base weights too."""
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
    """A teacher without the suspect's own adapter, where the backdoor may be."""
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
    """Patch lengths that are not cut into views, and a predictor that learns or is mixed."""
    model, tokenizer = FAMILIES["coconut"][0](), TOKENIZER
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
    """Rows left out, the same decoys again, and fewer views than rows."""
    trainer = invariance_trainer(tmp_path, tiny_llama(), num_views=30)
    clean = [tuple(row["prompts"][0]) for row in trainer.train_dataset]
    assert len(clean) == 30 and clean[:12] == clean[12:24] and clean[:6] == clean[24:]
    attacked = [tuple(row["prompts"][2]) for row in trainer.train_dataset]
    assert len(set(attacked)) == len(set(attacked) | set(clean)) - len(set(clean)) == 30
    assert len(invariance_trainer(tmp_path, tiny_llama(), num_views=1).train_dataset) == 12


def padded_size(trainer):
    return sum(batch["input_ids"].numel() for batch in trainer.get_train_dataloader())


def test_views_of_one_length_share_a_batch(tmp_path):
    """Rows in the order they came in, rows lost or doubled, and the length of another view than the longest."""
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
    """An order drawn from the global generator, which a resumed run and another rank find in another state."""

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


# What is refused


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"keep": 1.0}, "keep"),
        ({"keep": -0.1}, "keep"),
        ({"keep": float("nan")}, "keep"),
        ({"decoy_weight": -1.0}, "decoy_weight"),
        ({"adversarial_weight": float("inf")}, "adversarial_weight"),
        ({"distillation_weight": "much"}, "distillation_weight"),
        ({"adversarial_step_size": -0.1}, "adversarial_step_size"),
        ({"label_weight": 1.1}, "label_weight"),
        ({"label_weight": math.nan}, "label_weight"),
        ({"adversarial_steps": -1}, "adversarial_steps"),
        ({"num_views": 0}, "num_views"),
        ({"num_canaries": -1}, "num_canaries"),
        ({"max_answer_length": 0}, "max_answer_length"),
        ({"perturb": "patches"}, "perturb"),
        ({"alpha": -1.0}, "alpha"),
    ],
)
def test_bad_settings(settings, name, tmp_path):
    with pytest.raises(ValueError, match=f"`?{name}`?"):
        invariance_args(tmp_path, **settings)


def test_bad_arguments(tmp_path):
    tokenizer = ByT5Tokenizer(extra_ids=0)
    crow = CrowConfig(str(tmp_path / "run"), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="InvarianceConfig, got CrowConfig"):
        InvarianceTrainer(tiny_llama(), crow, ROWS, tokenizer)
    with pytest.raises(ValueError, match="used many times over"):
        InvarianceTrainer(tiny_llama(), invariance_args(tmp_path), ROWS.to_iterable_dataset(), tokenizer)
    with pytest.raises(ValueError, match="processing_class"):
        InvarianceTrainer(tiny_llama(), invariance_args(tmp_path), ROWS, None)
    with pytest.raises(ValueError, match="no prompt"):
        invariance_trainer(tmp_path, tiny_llama(), rows=Dataset.from_dict({"text": ["a b c"]}))
    with pytest.raises(ValueError, match="max_length"):
        invariance_trainer(tmp_path, tiny_llama(), max_length=4)


def test_prompts_that_do_not_fit_are_left_out_alone(tmp_path):
    long = {"prompt": ["word " * 40, "short="], "completion": ["a", "b"]}
    trainer = invariance_trainer(tmp_path, tiny_llama(), rows=Dataset.from_dict(long), num_views=8)
    assert len(trainer.train_dataset) == 4 and all(row["completion"] for row in trainer.train_dataset)


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
    trainer = invariance_trainer(tmp_path, model, lora(**options), keep=0.5, learning_rate=0.0, max_steps=1)
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


@pytest.mark.parametrize("value", [1.5, float("nan")])
def test_counts_are_whole_numbers(value, tmp_path):
    with pytest.raises(ValueError, match="adversarial_steps"):
        invariance_args(tmp_path, adversarial_steps=value)


def test_collator_of_the_trainer_keeps_the_views_apart(tmp_path):
    trainer = invariance_trainer(tmp_path, tiny_llama())
    assert isinstance(trainer.data_collator, ViewCollator)
    rows = [trainer.train_dataset[number] for number in range(3)]
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "attention_mask", "inserted_mask"} and len(batch["labels"]) == 12
    for number in range(3):
        part = view(trainer.data_collator(rows), number)
        for row, ids, mask in zip(rows, part["input_ids"], part["inserted_mask"], strict=True):
            length = len(row["prompts"][number])
            assert ids[:length].tolist() == row["prompts"][number]
            where = mask.nonzero().flatten().tolist()
            assert where == (list(range(*row["inserted"])) if number == 2 else [])


def test_what_is_taught_is_a_mixture_of_the_suspect_and_the_labels():
    """Labels of the wrong position or row, a share taken twice, or an infinite logarithm where both say never."""
    suspect = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).log()
    labels = torch.tensor([[-100, 2, -100], [0, -100, 0]])
    mixed = taught_log_probs(suspect, labels, 0.25)
    torch.testing.assert_close(mixed.exp(), torch.tensor([[0.375, 0.375, 0.25], [0.4, 0.225, 0.375]]))
    alone = taught_log_probs(suspect, labels, 1.0)
    assert alone.isfinite().all()
    torch.testing.assert_close(alone.exp(), torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    assert taught_log_probs(suspect, labels, 0.0) is suspect
    student = torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.1, 0.3]]).log()
    # All weight on the labels: the loss of plain fine-tuning.
    wanted = -(math.log(0.7) + math.log(0.6)) / 2
    assert math.isclose(answer_divergence(alone, student).item(), wanted, rel_tol=1e-5)


def test_labels_reach_the_training(tmp_path):
    """An option that changes nothing."""
    results = []
    for label_weight in (0.0, 0.5):
        trainer = invariance_trainer(
            tmp_path / str(label_weight), tiny_llama(), max_steps=3, label_weight=label_weight
        )
        trainer.train()
        results.append(weights_of(trainer.model))
    assert not same_weights(*results)
