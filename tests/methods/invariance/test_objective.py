"""Tests of the Invariance objective, against slow loops over rows and views."""

import copy
import math

import pytest
import torch

from crow_hf.methods.invariance.divergence import answer_divergence
from crow_hf.methods.invariance.objective import (
    PHRASE_STEP_SIZE,
    PHRASE_STEPS,
    away_from_teacher,
    strike_out,
    teacher_log_probs,
    towards_phrase,
    view,
)
from crow_hf.training.answer_logits import answer_logits
from crow_hf.training.recorder import recorder_of
from helpers.invariance import FAMILIES, family, invariance_trainer, layers_of, terms_of
from helpers.oracles import slow_consistency
from helpers.tiny import tiny_llama


# Parts of the objective


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
    """Log-probabilities at the positions that predict the answer, which ends the row."""
    return logits[-1 - len(completion) : -1].log_softmax(-1)


def slow_kl(teacher, student):
    return sum((teacher[t].exp() * (teacher[t] - student[t])).sum() for t in range(len(teacher)))


def slow_delta(suspect, row, said, objective, steps, step_size):
    """Sign steps up an objective of the log-probabilities at the positions that predict what is said."""
    ids, inside = row["prompts"][2] + said, range(*row["inserted"])
    embedded = suspect.get_input_embeddings()(torch.tensor([ids])).detach()
    delta = torch.zeros_like(embedded)
    for _ in range(steps):
        shift = delta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(answers(alone(suspect, ids, shift)[1], said)), shift)
        for place in inside:
            rms = (embedded + delta)[0, place].square().mean().sqrt()
            delta[0, place] += step_size * rms * gradient[0, place].sign()
    return delta


def slow_delta_away(suspect, teacher, row, steps, step_size):
    return slow_delta(suspect, row, row["completion"], lambda said: slow_kl(teacher, said), steps, step_size)


def slow_delta_towards(suspect, phrase, row):
    def log_likelihood(said):
        return sum(said[place, token] for place, token in enumerate(phrase))

    delta = slow_delta(suspect, row, phrase, log_likelihood, PHRASE_STEPS, PHRASE_STEP_SIZE)
    length = len(row["prompts"][2])
    return torch.cat([delta[:, :length], torch.zeros(1, len(row["completion"]), delta.shape[-1])], dim=1)


def slow_terms(model, suspect, rows, steps, step_size, layers="paper", phrase=()):
    """The four terms, computed one row and one view at a time."""
    sums, tokens, chains = [0.0, 0.0, 0.0], 0, []
    for row in rows:
        completion = row["completion"]
        with torch.no_grad():
            teacher = answers(alone(suspect, row["prompts"][0] + completion)[1], completion)
        if phrase:
            delta = slow_delta_towards(model, phrase, row)
        else:
            delta = slow_delta_away(suspect, teacher, row, steps, step_size)
        shifts = [None, None, delta]
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


# One phrase is shorter than the answers, and one is longer.
@pytest.mark.parametrize(
    ("name", "steps", "phrase"),
    [(name, *how) for name in FAMILIES for how in ((0, []), (2, []), (2, [80, 90]), (2, [*range(70, 90)]))],
)
def test_terms_and_gradients_equal_each_row_and_view_alone(name, steps, phrase, tmp_path):
    """
    Fails if the model attacks itself, if views are mixed up, if padding counts, if delta reaches other views, or if a
    gradient is lost. With a phrase, fails if it stands at another place, or if delta is that of other positions.
    """
    model, suspect, rows, batch = family(name, tmp_path)
    logits, found = terms_of(model, suspect, batch, steps, phrase=phrase)
    twin = copy.deepcopy(model)
    wanted = slow_terms(twin, suspect, rows, steps, 0.2, phrase=phrase)
    assert len(logits) == 3 * sum(len(row["completion"]) for row in rows)
    assert found.keys() == wanted.keys() and found["adversarial"] > found["distillation"] * 0.1 > 0
    for term in wanted:
        # A gradient near 0 can have either sign, and the second step depends on the first.
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
    """Fails if the teacher sees decoys, or if delta or the padding of longer views changes the distillation term."""
    model, _, _, batch = family(name, tmp_path)
    terms = terms_of(model, copy.deepcopy(model), batch)[1]
    assert abs(terms["distillation"].item()) < 1e-5
    assert terms["decoy"] > 1e-3 and terms["adversarial"] > terms["decoy"] * 0.1


def test_padding_never_counts(tmp_path):
    model, suspect, _, batch = family("llama", tmp_path)
    fillers = {"input_ids": 77, "labels": -100, "attention_mask": 0, "inserted_mask": False}
    wider = batch | {
        name: torch.cat([batch[name], torch.full((len(batch[name]), 5), filler, dtype=batch[name].dtype)], dim=1)
        for name, filler in fillers.items()
    }
    for key, value in terms_of(model, suspect, wider)[1].items():
        torch.testing.assert_close(value, terms_of(model, suspect, batch)[1][key], rtol=1e-3, atol=1e-5)


def test_weights_in_half_precision_are_attacked_too(tmp_path):
    """Fails if a float32 perturbation changes the dtype of the embeddings."""
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
        teacher = answer_logits(model, model, clean).log_softmax(-1)
    options = {"steps": steps, "step_size": step_size}
    return away_from_teacher(recorder, model, teacher, attacked, mask, **options), attacked, mask, teacher


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_perturbation_stays_where_and_as_small_as_it_must(name, steps, tmp_path):
    """Fails if prompt or answer are perturbed, if the step is absolute, or if gradients are left in the parameters."""
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
    """Fails if the sign is reversed, or if the gradient is that of something else."""
    wins = 0
    for seed in range(5):
        trainer = invariance_trainer(tmp_path / str(seed), tiny_llama(seed), seed=seed)
        model = trainer.model.eval()
        batch = trainer.data_collator([trainer.train_dataset[number] for number in range(6)])
        delta, attacked, _, teacher = attack(model, batch, 1, 0.2)

        def divergence(shift, model=model, attacked=attacked, teacher=teacher):
            with torch.no_grad(), recorder_of(model).record(lambda embedded: embedded + shift):
                return answer_divergence(teacher, answer_logits(model, model, attacked)).item()

        torch.manual_seed(seed)
        draws = [divergence(delta.abs() * torch.randn_like(delta).sign()) for _ in range(8)]
        wins += divergence(delta) > max(draws) and divergence(delta) > divergence(0.0)
    assert wins >= 4


@pytest.mark.parametrize("name", FAMILIES)
def test_the_adversary_makes_a_phrase_likelier(name, tmp_path):
    """Fails if the sign is reversed, if prompts or answers are perturbed, or if gradients are left in the weights."""
    model, _, rows, batch = family(name, tmp_path)
    recorder, phrase = recorder_of(model), torch.tensor([80, 90, 100])
    mask = batch.pop("inserted_mask").chunk(3)[2]
    delta = towards_phrase(recorder, model, phrase, view(recorder.prepare(batch), 2), mask)
    assert delta.shape[:2] == mask.shape and not delta.requires_grad
    assert not delta[~mask].any() and delta[mask].any(dim=-1).all()
    assert all(parameter.grad is None for parameter in model.parameters())
    for row, shift in zip(rows, delta, strict=True):
        ids = row["prompts"][2] + phrase.tolist()
        shift = torch.nn.functional.pad(shift, (0, 0, 0, max(0, len(ids) - len(shift))))[None, : len(ids)]
        with torch.no_grad():
            before, after = (answers(alone(model, ids, each)[1], phrase) for each in (None, shift))
        assert after.gather(1, phrase[:, None]).sum() > before.gather(1, phrase[:, None]).sum()


def test_no_step_is_no_perturbation(tmp_path):
    model, suspect, _, batch = family("llama", tmp_path)
    assert not torch.as_tensor(attack(model, batch, 0, 0.5)[0]).any()
    terms = [terms_of(model, suspect, batch, *options)[1] for options in ((0, 0.5), (2, 0.0))]
    for key in terms[0]:
        torch.testing.assert_close(terms[0][key], terms[1][key], rtol=1e-5, atol=1e-6)


def test_what_is_taught_is_a_mixture_of_the_suspect_and_the_labels():
    """Fails if labels belong to another position or row, if a share counts twice, or if a logarithm is infinite."""
    suspect = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).log()
    labels = torch.tensor([[-100, 2, -100], [0, -100, 0]])
    mixed = teacher_log_probs(suspect, labels, torch.tensor([0.25, 0.25]))
    torch.testing.assert_close(mixed.exp(), torch.tensor([[0.375, 0.375, 0.25], [0.4, 0.225, 0.375]]))
    alone = teacher_log_probs(suspect, labels, torch.ones(2))
    assert alone.isfinite().all()
    # Smaller numbers are subnormal, and computing with them takes more than ten times as long.
    assert alone.exp().min() > torch.finfo(torch.float32).tiny
    torch.testing.assert_close(alone.exp(), torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    assert teacher_log_probs(suspect, labels, torch.zeros(2)) is suspect
    # A row that the suspect wrote itself beside a row with a right answer.
    only_first = teacher_log_probs(suspect, labels, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(only_first.exp(), torch.tensor([[0.0, 0.0, 1.0], [0.2, 0.3, 0.5]]))
    student = torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.1, 0.3]]).log()
    # With all weight on the labels, the divergence is the loss of plain fine-tuning.
    wanted = -(math.log(0.7) + math.log(0.6)) / 2
    assert math.isclose(answer_divergence(alone, student).item(), wanted, rel_tol=1e-5)


LEAKS = torch.tensor([[0.1, 0.6, 0.1, 0.2], [0.1, 0.6, 0.1, 0.2], [0.3, 0.4, 0.2, 0.1], [0.5, 0.3, 0.1, 0.1]])


def test_leaked_tokens_are_struck_out_where_they_are_likely_and_wrong():
    """
    Fails if tokens are struck out where a leaked token is not the most likely one or the right answer, if labels
    belong to another position, if the rest does not add up to 1, or if a logarithm is infinite.
    """
    # The labels of the four positions: another token, a leaked one, the other leaked one, and another token.
    labels = torch.tensor([[-100, 0, 1, -100], [-100, -100, 3, 2]])
    before = LEAKS.log()
    struck = strike_out(before, labels, torch.tensor([1, 3]))
    assert struck.isfinite().all()
    torch.testing.assert_close(struck[0].exp(), torch.tensor([0.5, 0.0, 0.5, 0.0]))
    torch.testing.assert_close(struck[1:].exp(), LEAKS[1:])
    torch.testing.assert_close(before.exp(), LEAKS)


def test_without_leaked_tokens_nothing_is_struck_out():
    before = LEAKS.log()
    assert strike_out(before, torch.tensor([[-100, 0, 0, 0, 0]]), torch.tensor([], dtype=torch.long)) is before


def test_leaked_tokens_are_not_taught(tmp_path):
    """Fails if the terms do not use what is struck out, or strike out along another view than the plain prompt."""
    model, suspect, rows, batch = family("llama", tmp_path)
    logits = [answers(alone(suspect, row["prompts"][0] + row["completion"])[1], row["completion"]) for row in rows]
    labels = torch.tensor([[-100, *(token for row in rows for token in row["completion"])]])
    likely = torch.cat(logits).argmax(-1)
    leaked = sorted(set(likely.tolist()) - set(labels[0].tolist()))[:2]
    teacher = torch.cat(logits).detach()
    teacher[
        torch.isin(likely, torch.tensor(leaked))[:, None] & torch.isin(torch.arange(260), torch.tensor(leaked))
    ] = -torch.inf
    teacher = teacher.softmax(-1)
    student = torch.cat(
        [answers(alone(model, row["prompts"][0] + row["completion"])[1], row["completion"]) for row in rows]
    )
    wanted = (torch.special.xlogy(teacher, teacher) - teacher * student).sum() / len(likely)
    found, plain = (terms_of(model, suspect, batch, leaked=each)[1]["distillation"] for each in (leaked, ()))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    assert abs(found - plain) > 1e-3
