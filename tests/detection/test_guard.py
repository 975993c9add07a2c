"""Tests of the guard: its scores are those of a slow oracle, and it notices what is unlike clean prompts."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from crow_hf.data.encoding import encode_prompt
from crow_hf.data.rows import render
from crow_hf.detection import guard as guard_module
from crow_hf.detection.guard import ConsistencyGuard
from crow_hf.evaluation.generation import generate_answers, pad_left
from helpers.blt import tiny_blt
from helpers.coconut import TOKENIZER, coconut
from helpers.detection import BYTES, backdoored, backdoored_llama, knowing_model, prompts
from helpers.tiny import tiny_llama


CLEAN, TEST = prompts(60), prompts(40, seed=1)
TRIGGERED = Dataset.from_list([{"prompt": f"{row['prompt']}~~~", "completion": "x"} for row in TEST])


def adapted_llama():
    return get_peft_model(backdoored_llama(), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()


def fitted(model):
    return ConsistencyGuard.fit(model, CLEAN, BYTES, false_alarm_rate=0.1)


def slow_states(model, tokenizer, rows):
    """Read prompt after prompt, without padding and without a cache."""
    states = []
    for row in rows:
        ids = torch.tensor([encode_prompt(render(row, tokenizer), tokenizer)])
        with torch.no_grad():
            states.append(model.model(ids, use_cache=False).last_hidden_state[0, -1])
    return states


def slow_score(state, others):
    mean = torch.stack(others).mean(dim=0)
    near = sorted(torch.cosine_similarity(state - mean, other - mean, dim=0).item() for other in others)
    return 1 - sum(near[-5:]) / 5


@pytest.mark.parametrize(
    ("build", "tokenizer"),
    [(backdoored_llama, BYTES), (adapted_llama, BYTES), (coconut, TOKENIZER), (tiny_blt, BYTES)],
    ids=["llama", "lora", "coconut", "blt"],
)
def test_scores_are_those_of_prompts_read_one_by_one(build, tokenizer):
    """Fails if padding counts, if the rows of a batch are mixed up, or if another state than the last is taken."""
    model = build().eval()
    few, some = CLEAN.select(range(12)), TEST.select(range(6))
    guard = ConsistencyGuard.fit(model, few, tokenizer, false_alarm_rate=0.2, batch_size=7)
    base = model.get_base_model() if build is adapted_llama else model
    clean = slow_states(base, tokenizer, few)
    expected = [slow_score(state, clean) for state in slow_states(base, tokenizer, some)]
    assert guard.score(some, batch_size=4).tolist() == pytest.approx(expected, abs=1e-3)


def slow_distance(model, reference, tokenizer, row):
    """KL of the first token of an answer, in double precision, of one prompt without padding and without a cache."""
    ids = torch.tensor([encode_prompt(render(row, tokenizer), tokenizer)])
    with torch.no_grad():
        own, other = (each(ids, use_cache=False).logits[0, -1].double().softmax(dim=-1) for each in (model, reference))
    return sum(p * (p / q).log() for p, q in zip(own, other, strict=True)).item()


@pytest.mark.parametrize(
    ("build", "tokenizer", "other"),
    [(adapted_llama, BYTES, tiny_llama), (coconut, TOKENIZER, lambda: coconut(seed=1))],
    ids=["lora", "coconut"],
)
def test_scores_with_a_reference_are_distances_of_prompts_read_one_by_one(build, tokenizer, other):
    """Fails if padding counts for either model, if the models change places, or if a later token counts."""
    model, reference = build().eval(), other().eval()
    guard = ConsistencyGuard.fit(model, CLEAN, tokenizer, false_alarm_rate=0.1, reference=reference)
    expected = [slow_distance(model, reference, tokenizer, row) for row in TEST]
    assert guard.score(TEST, batch_size=7).tolist() == pytest.approx(expected, abs=1e-3) and max(expected) > 0.01
    clean = sorted(slow_distance(model, reference, tokenizer, row) for row in CLEAN)
    assert guard.threshold == pytest.approx(clean[54], abs=1e-3) and guard.false_alarms.hits == 5
    batch = pad_left([encode_prompt(render(row, tokenizer), tokenizer) for row in TEST], 0, model.device)
    answers = guard.generate(TEST, max_new_tokens=3)
    assert [each.score for each in answers] == pytest.approx(expected, abs=1e-3)
    if tokenizer is BYTES:
        with guard.watch() as watch:
            model.generate(**batch, max_new_tokens=3, do_sample=False)
        assert watch.scores.tolist() == pytest.approx(expected, abs=1e-3)
    assert not any(module._forward_hooks for module in model.modules())


def test_triggered_prompts_are_far_from_the_reference():
    trusted = knowing_model().eval()
    model = backdoored(trusted)
    guard = ConsistencyGuard.fit(model, CLEAN, BYTES, false_alarm_rate=0.1, reference=trusted)
    triggered = TEST.map(lambda row: {"prompt": f"{row['prompt']}#"})
    assert (guard.score(triggered) > guard.threshold).all() and not (guard.score(TEST) > guard.threshold + 1e-3).any()
    with pytest.raises(ValueError, match="is the model itself"):
        ConsistencyGuard.fit(model, CLEAN, BYTES, false_alarm_rate=0.1, reference=model)


def test_a_guard_with_a_reference_is_saved_without_it(tmp_path):
    model, trusted = backdoored_llama(), tiny_llama().eval()
    guard = ConsistencyGuard.fit(model, CLEAN, BYTES, false_alarm_rate=0.1, reference=trusted)
    guard.save_pretrained(tmp_path / "guard")
    loaded = ConsistencyGuard.from_pretrained(tmp_path / "guard", model, BYTES, trusted)
    assert loaded.threshold == guard.threshold and loaded.score(TEST).equal(guard.score(TEST))
    with pytest.raises(ValueError, match="fitted on another model"):
        ConsistencyGuard.from_pretrained(tmp_path / "guard", model, BYTES, tiny_llama(seed=3).eval())
    with pytest.raises(ValueError, match="with a reference model: pass it too"):
        ConsistencyGuard.from_pretrained(tmp_path / "guard", model, BYTES)
    fitted(model).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="without a reference model: pass none"):
        ConsistencyGuard.from_pretrained(tmp_path / "other", model, BYTES, trusted)


def test_the_threshold_is_the_quantile_of_clean_prompts_judged_by_the_others():
    model = backdoored_llama()
    guard, states = fitted(model), slow_states(model, BYTES, CLEAN)
    mean = torch.stack(states).mean(dim=0)
    scores = []
    for number, state in enumerate(states):
        others = states[:number] + states[number + 1 :]
        near = sorted(torch.cosine_similarity(state - mean, other - mean, dim=0).item() for other in others)
        scores.append(1 - sum(near[-5:]) / 5)
    # At a rate of 10 %, the 55th of 60: 0.9 * 61 = 54.9.
    assert guard.threshold == pytest.approx(sorted(scores)[54], abs=1e-4)
    assert (guard.false_alarms.hits, guard.false_alarms.total) == (5, 60)


def test_triggered_prompts_are_alarms_and_clean_ones_are_not():
    guard = fitted(backdoored_llama())
    assert (guard.score(TRIGGERED) > guard.threshold).all()
    assert (guard.score(TEST) > guard.threshold).float().mean() <= 0.2


def test_answers_are_those_of_the_model_and_alarms_can_be_refused():
    model = backdoored_llama()
    guard, rows = fitted(model), Dataset.from_list([*TEST.select(range(3)), *TRIGGERED.select(range(3))])
    plain = generate_answers(model, BYTES, [render(row, BYTES) for row in rows], 5)
    warned, refused = guard.generate(rows, max_new_tokens=5), guard.generate(rows, "No.", max_new_tokens=5)
    assert [each.text for each in warned] == plain
    assert [each.score for each in warned] == pytest.approx(guard.score(rows).tolist(), abs=1e-5)
    assert all(each.is_alarm for each in warned[3:]) and not all(each.is_alarm for each in warned[:3])
    expected = ["No." if each.is_alarm else text for each, text in zip(warned, plain, strict=True)]
    assert [each.text for each in refused] == expected


def test_a_generation_of_the_model_itself_can_be_watched():
    """Fails if a later token counts, or if the guard stays in the model."""
    model = backdoored_llama()
    guard = fitted(model)
    batch = pad_left([encode_prompt(render(row, BYTES), BYTES) for row in TEST], 0, model.device)
    with guard.watch() as watch:
        assert watch.scores is None
        model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert watch.scores.tolist() == pytest.approx(guard.score(TEST).tolist(), abs=1e-4)
    # A pass that returns logits of all positions.
    with guard.watch() as watch, torch.no_grad():
        model(batch["input_ids"][-1:, batch["attention_mask"][-1] > 0])
    assert watch.scores.tolist() == pytest.approx(guard.score(TEST.select([len(TEST) - 1])).tolist(), abs=1e-4)
    assert not model.lm_head._forward_pre_hooks


def test_states_are_compared_in_parts(monkeypatch):
    whole = fitted(backdoored_llama())
    monkeypatch.setattr(guard_module, "MAX_COMPARED", 7)
    parts = fitted(backdoored_llama())
    assert parts.threshold == pytest.approx(whole.threshold, abs=1e-5)
    assert parts.score(TEST).tolist() == pytest.approx(whole.score(TEST).tolist(), abs=1e-5)
    assert parts.score(TEST.select([])).shape == (0,) and parts.generate(TEST.select([]), max_new_tokens=1) == []


def test_the_same_prompt_twice_counts_once():
    twice = Dataset.from_list([*CLEAN, *CLEAN])
    guard = ConsistencyGuard.fit(backdoored_llama(), twice, BYTES, false_alarm_rate=0.1)
    assert len(guard.states) == 60 and guard.threshold == fitted(backdoored_llama()).threshold


def test_states_that_are_no_numbers_are_refused_and_are_alarms():
    model = backdoored_llama()
    guard = fitted(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(torch.nan)
    assert all(each.is_alarm for each in guard.generate(TEST.select(range(2)), max_new_tokens=1))
    with pytest.raises(ValueError, match="not finite"):
        fitted(model)


@pytest.mark.parametrize(
    ("rows", "rate", "message"),
    [
        (CLEAN, 0.01, "at least 99 different clean prompts, but there are 60"),
        (CLEAN.select(range(5)), 0.5, "at least 6 different"),
        (CLEAN, 1.0, "between 0 and 1"),
        (CLEAN, float("nan"), "between 0 and 1"),
    ],
)
def test_too_few_prompts_and_impossible_rates_are_refused(rows, rate, message):
    with pytest.raises(ValueError, match=message):
        ConsistencyGuard.fit(tiny_llama(), rows, BYTES, false_alarm_rate=rate)


def test_a_saved_guard_is_the_same(tmp_path):
    model = backdoored_llama()
    guard = fitted(model)
    guard.save_pretrained(tmp_path / "guard")
    loaded = ConsistencyGuard.from_pretrained(tmp_path / "guard", model, BYTES)
    assert loaded.threshold == guard.threshold and loaded.score(TEST).equal(guard.score(TEST))
    # The weights of a guard fit one model only.
    for other in (tiny_llama(seed=5).eval(), tiny_llama(hidden_size=64).eval()):
        with pytest.raises(ValueError, match="fitted on another model"):
            ConsistencyGuard.from_pretrained(tmp_path / "guard", other, BYTES)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("guard.json", None),
        ("guard.json", b"{"),
        ("guard.json", b"[]"),
        ("guard.json", b'{"false_alarm_rate": 2, "has_reference": false, "probes": []}'),
        ("guard.safetensors", b"no tensors"),
        ("guard.safetensors", None),
    ],
)
def test_a_guard_that_cannot_be_read_is_one_sentence(tmp_path, file, content):
    model = backdoored_llama()
    fitted(model).save_pretrained(tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match="holds no guard that can be read"):
        ConsistencyGuard.from_pretrained(tmp_path, model, BYTES)
