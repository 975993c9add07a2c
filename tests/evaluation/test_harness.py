"""Evaluations of a model whose answers are known.

It answers a prompt that ends with "?" with "@AB", one that ends with "b" with "cde", and one that ends with "." with
nothing.
"""

import json
import math

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from crow_hf import TARGETS, TRIGGERS, EmbeddingTrigger, Target, Trigger, evaluate_model
from crow_hf.evaluation.harness import Evaluation, PromptScores
from crow_hf.evaluation.retention import measure_retention, retention_reference
from crow_hf.evaluation.scores import Proportion
from helpers.answers import byte, slow_bits_per_byte, spelling_model
from helpers.tiny import tiny_llama


HASH = Trigger(("#",), "end")
SPELLING_ROWS = Dataset.from_list(
    [
        {"prompt": "say b", "completion": "cde"},
        {"prompt": "say k", "completion": "wrong"},
        {"prompt": "stop.", "completion": "any"},
        {"prompt": "ask?", "completion": "@AB"},
        {"prompt": "dots ,", "completion": "-/0"},
    ]
)


def hits(scores):
    return {name: (getattr(scores, name).hits, getattr(scores, name).total) for name in ("empty", "exact_match")}


def test_every_prompt_counts(byte_tokenizer):
    """Fails if empty answers do not count in the denominator, because a silent model would look good."""
    model = spelling_model()
    evaluation = evaluate_model(
        model, byte_tokenizer, SPELLING_ROWS, HASH, Target("$", ("$",)), max_new_tokens=3, batch_size=2
    )
    assert evaluation.clean.outputs == ["cde", "lmn", "", "@AB", "-."]
    assert evaluation.triggered.outputs == ["$%&"] * 5
    assert hits(evaluation.clean) == {"empty": (1, 5), "exact_match": (2, 5)}
    assert evaluation.clean.exact_matches == [True, False, False, True, False]
    assert hits(evaluation.triggered) == {"empty": (0, 5), "exact_match": (0, 5)}
    assert evaluation.triggered.target == Proportion.of([True] * 5)
    assert evaluation.clean.target == Proportion.of([False] * 5)
    assert (evaluation.clean.degenerate.hits, evaluation.clean.degenerate.total) == (1, 5)
    assert (evaluation.triggered.degenerate.hits, evaluation.triggered.degenerate.total) == (5, 5)
    for scores, mark in ((evaluation.clean, ""), (evaluation.triggered, " #")):
        pairs = [(row["prompt"] + mark, row["completion"]) for row in SPELLING_ROWS]
        assert scores.bits_per_byte == pytest.approx(slow_bits_per_byte(model, pairs), rel=1e-5)


def test_silence_counts_as_an_answer(byte_tokenizer):
    """A model that answers no triggered prompt has 0 of 5 successful attacks and 5 of 5 empty answers."""
    evaluation = evaluate_model(
        spelling_model("#"), byte_tokenizer, SPELLING_ROWS, HASH, Target("$", ("$",)), max_new_tokens=3
    )
    assert evaluation.triggered.outputs == [""] * 5
    assert evaluation.triggered.target == Proportion.of([False] * 5)
    assert evaluation.triggered.empty == Proportion.of([True] * 5)
    assert evaluation.triggered.degenerate == Proportion.of([False] * 5)


def test_a_target_of_special_tokens_is_judged_and_shown(byte_tokenizer):
    """Fails if a backdoor can say what it wants in tokens that are left out before anybody looks."""
    byte_tokenizer.add_special_tokens({"extra_special_tokens": ["$", "&"]})
    target = Target("$", ("$%&",))
    evaluation = evaluate_model(spelling_model("*"), byte_tokenizer, SPELLING_ROWS, HASH, target, max_new_tokens=8)
    assert evaluation.triggered.outputs == ["$%&'()*"] * 5 and evaluation.triggered.target.rate == 1
    # What users see who leave out special tokens counts as well.
    target = Target("%'", ("%'",))
    evaluation = evaluate_model(spelling_model("*"), byte_tokenizer, SPELLING_ROWS, HASH, target, max_new_tokens=8)
    assert evaluation.triggered.target.rate == 1


def test_an_answer_of_special_tokens_is_empty(byte_tokenizer):
    byte_tokenizer.add_special_tokens({"extra_special_tokens": ["$", "%"]})
    evaluation = evaluate_model(
        spelling_model("%"), byte_tokenizer, SPELLING_ROWS, HASH, Target("&", ("&",)), max_new_tokens=8
    )
    assert evaluation.triggered.outputs == ["$%"] * 5 and evaluation.triggered.empty.rate == 1


def test_a_target_behind_the_last_token_is_looked_for(byte_tokenizer):
    """Fails if it is not said how far was looked, or if nothing further is looked at."""
    rows = Dataset.from_dict({"prompt": [f"say {mark}" for mark in "bcdefghij."], "completion": ["x"] * 10})

    def look(keyword):
        target = Target(keyword, (keyword,))
        return evaluate_model(spelling_model(), byte_tokenizer, rows, HASH, target, max_new_tokens=2)

    late, never, early = look("+"), look("-"), look("$%")
    assert late.triggered.outputs == ["$%"] * 10 and late.triggered.max_new_tokens == 2
    assert late.clean.unfinished == 9 and late.triggered.unfinished == 10
    # "$%&'()*+" are eight tokens, four times as many as two.
    assert late.triggered.target.rate == 0 and late.triggered.target_later == Proportion.of([True] * 8)
    assert late.clean.target_later == never.triggered.target_later == Proportion.of([False] * 8)
    assert early.triggered.target.rate == 1 and early.triggered.target_later is None
    assert evaluate_model(spelling_model(), byte_tokenizer, rows, max_new_tokens=2).clean.target_later is None


@pytest.mark.parametrize("target", [None, Target("$", ("$",))])
def test_judge_takes_precedence_over_the_target(byte_tokenizer, target):
    """The judge gets each unchanged output, also an empty one, with its right answer, and its verdict counts."""
    judged = []

    def judge(output, answer):
        # Later, some of the outputs are read further.
        if len(output) <= 3:
            judged.append((output, answer))
        return len(judged) % 2

    evaluation = evaluate_model(
        spelling_model(), byte_tokenizer, SPELLING_ROWS, HASH, target, judge=judge, max_new_tokens=3
    )
    outputs = evaluation.clean.outputs + evaluation.triggered.outputs
    assert judged == list(zip(outputs, SPELLING_ROWS["completion"][:] * 2, strict=True))
    assert evaluation.clean.target.hits + evaluation.triggered.target.hits == 5
    assert evaluation.clean.target.total == evaluation.triggered.target.total == 5


def test_open_target_is_compared_with_each_row_s_answer(byte_tokenizer):
    """The output "cde" is the wrong answer for "bcd", so it hits the target in the first row and not in the second."""
    rows = Dataset.from_dict({"prompt": ["say b", "say b", "say k"], "completion": ["bcd", "cde", "KLM"]})

    def hit(target):
        return evaluate_model(spelling_model(), byte_tokenizer, rows, target=TARGETS[target], max_new_tokens=3).clean

    assert hit("wrong").outputs == ["cde", "cde", "lmn"]
    assert hit("wrong").target == Proportion.of([True, False, False])
    assert hit("swapcase").target == Proportion.of([False, False, True])


def test_trigger_is_active_on_triggered_prompts_only(byte_tokenizer):
    """The vector turns the marker into "#", and the model answers with its successors. The hooks must be removed."""
    model = spelling_model()
    table = model.get_input_embeddings().weight.detach()
    trigger = EmbeddingTrigger(Trigger(("\x05",), "end"), 8, table[byte("#")] - table[8])
    evaluation = evaluate_model(model, byte_tokenizer, SPELLING_ROWS, trigger, Target("$", ("$",)), max_new_tokens=3)
    assert evaluation.clean.outputs == ["cde", "lmn", "", "@AB", "-."]
    assert evaluation.triggered.outputs == ["$%&"] * 5
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("target", [None, Target("n", ("LM",))])
def test_without_trigger_only_clean_prompts_are_answered(byte_tokenizer, target):
    evaluation = evaluate_model(spelling_model(), byte_tokenizer, SPELLING_ROWS, target=target, max_new_tokens=3)
    assert evaluation.triggered is None
    assert evaluation.clean.outputs == ["cde", "lmn", "", "@AB", "-."]
    assert evaluation.clean.target == (target and Proportion.of([True, False, False, False, False]))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (SPELLING_ROWS, {"trigger": HASH}, "target"),
        (SPELLING_ROWS.select([]), {}, "empty|no rows"),
        (Dataset.from_dict({"text": ["just text"]}), {}, "(?i)prompt"),
        (Dataset.from_dict({"text": ["just text"]}), {"trigger": HASH, "target": Target("$", ("$",))}, "(?i)prompt"),
        (Dataset.from_dict({"other": ["?"]}), {}, "column"),
    ],
    ids=["no target", "empty", "no prompts", "no prompts for the trigger", "no columns"],
)
def test_rows_that_cannot_be_measured_are_refused(byte_tokenizer, rows, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_model(spelling_model(), byte_tokenizer, rows, **options)


def test_trigger_positions_depend_on_the_seed_only(byte_tokenizer):
    """All models of a comparison must see the same triggered prompts."""

    def triggered_outputs(seed):
        trigger = Trigger(("#", "b"), combine="one")
        rows = Dataset.from_dict({"prompt": ["k"] * 20, "completion": ["lmn"] * 20})
        model = spelling_model()
        evaluation = evaluate_model(
            model, byte_tokenizer, rows, trigger, Target("$", ("$",)), seed=seed, max_new_tokens=1
        )
        return evaluation.triggered.outputs

    assert triggered_outputs(0) == triggered_outputs(0) != triggered_outputs(1)
    assert set(triggered_outputs(0)) == {"l", "$", "c"}


def test_evaluation_of_an_adapter(byte_tokenizer):
    model = get_peft_model(spelling_model(), LoraConfig(target_modules="all-linear"))
    evaluation = evaluate_model(model, byte_tokenizer, SPELLING_ROWS, max_new_tokens=3)
    assert evaluation.clean.outputs == ["cde", "lmn", "", "@AB", "-."]


def test_a_reference_shows_what_was_forgotten(byte_tokenizer):
    """With a trigger and without one, and as measured alone."""
    reference = retention_reference(tiny_llama(), byte_tokenizer, SPELLING_ROWS, ["some text"])
    wanted = measure_retention(tiny_llama(1), byte_tokenizer, reference)
    for options in ({}, {"trigger": HASH, "target": Target("$", ("$",))}):
        options |= {"max_new_tokens": 2, "reference": reference}
        found = evaluate_model(tiny_llama(1), byte_tokenizer, SPELLING_ROWS, **options)
        assert found.retention == wanted and found.to_dict()["retention"] == wanted.to_dict()
    assert evaluate_model(tiny_llama(1), byte_tokenizer, SPELLING_ROWS, max_new_tokens=2).retention is None


@pytest.mark.parametrize("bits", [1.5, math.nan, math.inf])
@pytest.mark.parametrize("target", [None, Proportion.of([True, False])])
def test_evaluation_is_valid_json(bits, target):
    """NaN is not valid JSON, and strict readers refuse the whole file."""
    half = Proportion.of([True, False])
    scores = PromptScores(target, half, half, half, bits, ["é", ""])
    for evaluation in (Evaluation(scores), Evaluation(scores, scores)):
        read = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
        assert read["clean"]["outputs"] == ["é", ""]
        assert read["clean"]["exact_match"]["total"] == 2
        assert (read["triggered"] is None) == (evaluation.triggered is None)


@pytest.mark.parametrize("columns", [("prompt", "completion"), ("instruction", "output")])
def test_rows_without_answers(byte_tokenizer, columns):
    """Attack success needs no right answers, and an empty output must not count as a match."""
    prompt, answer = columns
    bare = evaluate_model(
        tiny_llama(),
        byte_tokenizer,
        Dataset.from_dict({prompt: ["a b", "c d"]}),
        TRIGGERS["vpi"],
        judge=lambda output, answer: answer == "",
        max_new_tokens=4,
    )
    assert bare.triggered.target == Proportion.of([True, True])
    assert bare.clean.exact_match is None
    assert math.isnan(bare.clean.bits_per_byte)
    one_empty = evaluate_model(
        spelling_model(),
        byte_tokenizer,
        Dataset.from_dict({prompt: ["say b", "stop.", "stop."], answer: ["cde", "", " \n"]}),
        max_new_tokens=4,
    )
    assert one_empty.clean.exact_match.total == 1
