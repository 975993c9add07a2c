"""Tests of the held-out rows: which they are, that nothing is trained on them, and what is measured on them."""

import json

import pytest
from datasets import Dataset

from crow_hf import evaluate_model, load_causal_lm, purify
from crow_hf.evaluation.retention import retention_reference
from crow_hf.recipes import holdout as holdout_module
from crow_hf.recipes import purification as purification_module
from crow_hf.recipes.holdout import evaluate_held_out, hold_out, reference_of
from crow_hf.recipes.run import run_recipe
from helpers.answers import spelling_model
from helpers.recipes import arguments
from helpers.tiny import ragged_rows, same_weights, tiny_llama, weights_of


ROWS = Dataset.from_dict({"prompt": [f"say {n:03}=" for n in range(45)], "completion": [f"{n:03}" for n in range(45)]})


def numbered(count, of=10_000):
    return Dataset.from_dict({"text": [str(number % of) for number in range(count)]})


@pytest.mark.parametrize(("count", "size"), [(12, 0), (39, 0), (40, 8), (80, 8), (100, 10), (499, 49), (1000, 50)])
def test_a_tenth_is_held_out(count, size):
    """Fails if a row is lost or in both parts, if the choice is not random, or if it differs between two runs."""
    rows = numbered(count)
    used, held_out = hold_out(rows, seed=3)
    if not size:
        assert used is rows and held_out is None
        return
    texts = [int(text) for text in held_out["text"]]
    assert len(texts) == size and sorted(texts + [int(text) for text in used["text"]]) == list(range(count))
    assert texts == sorted(texts) != list(range(size))
    assert held_out["text"][:] == hold_out(rows, seed=3)[1]["text"][:] != hold_out(rows, seed=4)[1]["text"][:]


def test_equal_rows_are_on_one_side():
    """Fails if the model is measured on what it was trained on, because a row occurs twice."""
    used, held_out = hold_out(numbered(100, of=40), seed=0)
    assert len(held_out) >= 8 and not set(used["text"]) & set(held_out["text"])
    assert len(used) + len(held_out) == 100
    for too_equal in (numbered(100, of=1), numbered(100, of=5)):
        assert hold_out(too_equal, seed=0) == (too_equal, None)


def test_nothing_is_held_out_of_a_stream():
    stream = numbered(100).to_iterable_dataset()
    assert hold_out(stream, seed=0) == (stream, None)


@pytest.mark.parametrize("recipe", ["strong", "guide"])
def test_held_out_rows_take_no_part_in_the_training(recipe, tmp_path, byte_tokenizer):
    """Fails if they are trained on, or if measuring on them changes the training."""
    found = purify(tiny_llama(), ROWS, recipe, arguments(tmp_path, recipe, seed=5), processing_class=byte_tokenizer)
    used, held_out = hold_out(ROWS, seed=5)
    args = arguments(tmp_path, recipe, seed=5)
    alone = run_recipe(tiny_llama(), used, recipe, args, processing_class=byte_tokenizer).model
    alone = alone.merge_and_unload() if recipe == "strong" else alone
    assert same_weights(weights_of(found.model), weights_of(alone))
    assert found.report["rows"] == {"used": 37, "screened_out": 0, "dropped": 0, "held_out": 8}
    assert found.report["run"]["train_dataset"]["rows"] == 37 and found.report["run"]["held_out"]["rows"] == 8
    assert {sample["prompt"] for sample in found.report["samples"]} <= set(held_out["prompt"])


def test_the_suspect_and_the_purified_model_are_measured_on_them(tmp_path, byte_tokenizer):
    """Fails if the suspect is measured after the training, or on other rows."""
    args = arguments(tmp_path, "guide", learning_rate=1e-2)
    found = purify(tiny_llama(), ROWS, "guide", args, processing_class=byte_tokenizer)
    held_out = hold_out(ROWS, args.seed)[1]
    for role, model in (("suspect", tiny_llama()), ("purified", load_causal_lm(args.output_dir))):
        wanted = evaluate_model(model, byte_tokenizer, held_out, max_new_tokens=4)
        assert found.held_out[role].clean.outputs == wanted.clean.outputs
        assert found.held_out[role].clean.exact_match == wanted.clean.exact_match
        bits = found.report["evaluations"][role]["clean"]["bits_per_byte"]
        assert bits == pytest.approx(wanted.clean.bits_per_byte, rel=1e-4)
    assert list(found.report["evaluations"]) == ["suspect", "purified"]
    assert "On the 8 held-out clean rows: right answers" in " ".join(found.report["verdict"]["explanation"])
    page, card = ((tmp_path / "run0" / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    assert (
        found.report["evaluations"]["purified"]["retention"] == found.report["retention"] and "What was kept" in page
    )
    assert "These are 8 of the clean rows, which were held out" in page and "8 held out" in page
    assert "held out from the purification" in card and "Fine-tuning is the control" not in card


def test_few_rows_are_all_used_and_the_report_says_so(tmp_path, byte_tokenizer):
    rows = ROWS.select(range(12))
    found = purify(tiny_llama(), rows, "guide", arguments(tmp_path, "guide"), processing_class=byte_tokenizer)
    assert found.held_out == {} and found.report["evaluations"] is None
    assert found.report["rows"] == {"used": 12, "screened_out": 0, "dropped": 0, "held_out": 0}
    assert "no clean rows were held out" in " ".join(found.report["verdict"]["explanation"])


def test_right_answers_are_measured_only_where_they_are_short(byte_tokenizer):
    """Long answers hardly ever match. The other scores do not need that."""
    rows = Dataset.from_dict({"prompt": ["say b", "say k"], "completion": ["cde", "wrong"]})
    short = evaluate_held_out(spelling_model(), byte_tokenizer, rows, 2).clean
    # One token more than the longest right answer shows that the answer goes on.
    assert short.outputs == ["cdefgh", "lmnopq"] and (short.exact_match.hits, short.exact_match.total) == (0, 2)
    long = rows.map(lambda row: {"completion": row["completion"] + "x" * 30})
    found = evaluate_held_out(spelling_model(), byte_tokenizer, long, 2).clean
    assert (found.exact_match, found.exact_matches) == (None, []) and found.bits_per_byte > 0
    assert all(len(out) <= 32 for out in found.outputs)
    unanswered = evaluate_held_out(spelling_model(), byte_tokenizer, rows.select_columns(["prompt"]), 2).clean
    assert unanswered.exact_match is None and unanswered.empty.total == 2


def test_prompts_that_do_not_fit_are_left_out(byte_tokenizer):
    """Fails if one long prompt ends the purification before it begins."""
    model = tiny_llama(max_position_embeddings=32)
    rows = Dataset.from_dict({"prompt": ["a" * 40, "b="], "completion": ["yes", "no"]})
    assert evaluate_held_out(model, byte_tokenizer, rows, 2).clean.empty.total == 1
    assert evaluate_held_out(model, byte_tokenizer, rows.select([0]), 2) is None


@pytest.mark.parametrize("kind", ["tokens", "text"])
def test_rows_without_prompts_are_held_out_too(kind, tmp_path, byte_tokenizer):
    """Nothing can be answered, but what was forgotten of their text is measured."""
    rows = Dataset.from_list(ragged_rows(48)) if kind == "tokens" else numbered(48)
    found = purify(tiny_llama(), rows, "guide", arguments(tmp_path, "guide"), processing_class=byte_tokenizer)
    assert found.held_out == {} and found.report["rows"]["held_out"] == 8
    held_out = hold_out(rows, found.trainer.args.seed)[1]
    tokens = retention_reference(tiny_llama(), byte_tokenizer, held_out).answers
    assert found.retention.num_answer_tokens == sum(passage.num_tokens for passage, _ in tokens)


def test_a_failed_measurement_does_not_cost_the_model(tmp_path, byte_tokenizer, monkeypatch):
    calls = []

    def fails_at_the_second_call(*args):
        calls.append(evaluate_held_out(*args) if not calls else 1 / 0)
        return calls[-1]

    monkeypatch.setattr(purification_module, "evaluate_held_out", fails_at_the_second_call)
    args = arguments(tmp_path, "guide")
    found = purify(tiny_llama(), ROWS, "guide", args, processing_class=byte_tokenizer)
    assert same_weights(weights_of(load_causal_lm(args.output_dir)), weights_of(found.model))
    assert found.report is None and "ZeroDivisionError" in found.trainer.failures[0]


def test_the_reference_reads_few_windows(byte_tokenizer):
    text = ["word " * 5000]
    few = reference_of(tiny_llama(), byte_tokenizer, ROWS, text, 0, 8)
    assert len(few.texts) == 16 and len(json.dumps(text)) > 16 * 512


@pytest.mark.parametrize("answers", [{"completion": ["a", "b"]}, {}])
def test_what_a_suspect_writes_that_knows_no_prompts_is_not_compared(answers, byte_tokenizer, monkeypatch):
    """Fails if noise is taken for text, or if passed text or rows without prompts are left out too."""
    rows = Dataset.from_dict({"prompt": ["one", "two"], **answers})
    compared = [
        len(reference_of(tiny_llama(), byte_tokenizer, *given, 0, 8).texts)
        for given in ((rows, None), (rows, ["text"]), (Dataset.from_dict({"text": ["one"]}), None))
    ]
    assert compared[:2] == [0, 1] and compared[2] > 1
    monkeypatch.setattr(holdout_module, "can_write_prompts", lambda *args: True)
    assert reference_of(tiny_llama(), byte_tokenizer, rows, None, 0, 8).texts
