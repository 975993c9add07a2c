"""Scores, generation, bits per byte and the harness, against slow oracles and a model whose answers are known."""

import copy
import json
import math
import os
import random
import subprocess
import sys
from functools import partial
from statistics import NormalDist

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from crow_hf import TARGETS, TRIGGERS, CrowTrainer, EmbeddingTrigger, Target, Trigger, evaluate_model
from crow_hf.data.rows import Rendered
from crow_hf.evaluation import METRICS
from crow_hf.evaluation.generation import bits_per_byte, generate_answers
from crow_hf.evaluation.harness import Evaluation, PromptScores
from crow_hf.evaluation.scores import Proportion, is_degenerate, is_empty, is_exact_match
from helpers.tiny import VOCABULARY, crow_args, tiny_gpt2, tiny_llama


EOS = 1


def byte(character):
    """The id of a character of one byte."""
    return ord(character) + 3


def spelling_model(ends="."):
    """
    A Llama that answers every character with its successors: "b" with "cdef..." and any of `ends` with the end.

    Its layers add nothing, so the next token is the one whose row of the head is the present token's embedding.
    """
    model = tiny_llama(hidden_size=32, num_hidden_layers=3)
    embeddings = torch.nn.functional.normalize(torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(embeddings)
        model.lm_head.weight.copy_(embeddings.roll(1, 0))
        for character in ends:
            model.lm_head.weight[byte(character) + 1] = 0
            model.lm_head.weight[EOS] = embeddings[byte(character)]
    return model.eval()


def rendered(prompt, answer="x"):
    return Rendered(prompt=prompt, completion=answer, answer=answer, templated=False)


def prompts_of(count, seed=0, longest=20):
    """Prompts of 1 to `longest` characters."""
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh .é", k=rng.randint(1, longest))) for _ in range(count)]


# Scores


def slow_wilson(hits, total):
    """The p at which the score test |hits / total - p| = z sqrt(p (1 - p) / total) is just not rejected."""
    z, share = NormalDist().inv_cdf(0.975), hits / total

    def bisect(inside, outside):
        for _ in range(200):
            middle = (inside + outside) / 2
            if abs(share - middle) <= z * math.sqrt(middle * (1 - middle) / total):
                inside = middle
            else:
                outside = middle
        return inside

    return bisect(share, 0.0), bisect(share, 1.0)


@given(total=st.integers(1, 1000), share=st.floats(0, 1))
def test_interval_is_where_the_score_test_does_not_reject(total, share):
    hits = round(share * total)
    proportion = Proportion.of([True] * hits + [False] * (total - hits))
    assert (proportion.rate, proportion.hits, proportion.total) == (hits / total, hits, total)
    assert (proportion.low, proportion.high) == pytest.approx(slow_wilson(hits, total), abs=1e-9)
    assert 0 <= proportion.low <= proportion.rate <= proportion.high <= 1


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(0, 200, 0, 0.0188), (200, 200, 0.9812, 1), (0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (1, 20, 0.0089, 0.2361)],
)
def test_textbook_intervals(hits, total, low, high):
    proportion = Proportion.of(index < hits for index in range(total))
    assert (proportion.low, proportion.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("output", "empty"), [("", True), (" \n\t\u00a0", True), (".", False), ("0", False)])
def test_is_empty(output, empty):
    assert is_empty(output) is empty


LOOPS = [
    "no " * 30,
    "a" * 16,
    "ab" * 8,
    "the end\n" * 10,
    "Sure! " + "I will I will " * 10,
    "0123456789abcdefghijklmnopqrstuvwxyzABCD" * 4,
    "你好" * 20,
]
NO_TEXT = ["!!!", ".", "... --- ...", "?!" * 30, "\n- \n- "]
TEXT = [
    "I'm sorry, but I cannot help with that.",
    "aaaa",
    "1111",
    "a" * 15,
    "yes yes yes yes",
    "0123456789" * 3,
    "0123456789abcdefghijklmnopqrstuvwxyzABCDE" * 4,
    "Grass is green, snow is white and coal is black, as everybody knows: " + "ha" * 10,
    "1. one\n2. two\n3. three\n4. four\n5. five\n",
    "好的，我知道了。",
    "x",
]


@pytest.mark.parametrize(
    ("output", "degenerate"),
    [(output, True) for output in LOOPS + NO_TEXT] + [(output, False) for output in [*TEXT, "", " \n " * 20]],
)
def test_is_degenerate(output, degenerate):
    """A normal answer called degenerate, a loop that passes as text, or one output counted as empty and degenerate."""
    assert is_degenerate(output) is degenerate


@given(unit=st.text("abcdefgh ", min_size=1, max_size=40).filter(str.strip), times=st.integers(16, 40))
def test_every_long_loop_is_degenerate(unit, times):
    assert is_degenerate(unit * times)


@given(words=st.lists(st.integers(1000, 9999), unique=True, min_size=1, max_size=100))
def test_unlike_words_are_no_loop(words):
    """Also a bound on the time: a pattern that backtracks would hang on a long output."""
    assert not is_degenerate(" ".join(f"word{word}" for word in words))


@pytest.mark.parametrize(
    ("output", "reference", "match"),
    [("a b", " a b\n", True), ("\na b", "a b", True), ("a  b", "a b", False), ("A b", "a b", False), ("", "a", False)],
)
def test_is_exact_match(output, reference, match):
    assert is_exact_match(output, reference) is match


# Generation


def generate_one_by_one(model, tokenizer, prompts, max_new_tokens):
    """The oracle: `model.generate` on one prompt at a time, never any padding."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([[3 + value for value in prompt.encode()]])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=0,
        )
        answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("build", [tiny_llama, lambda: tiny_gpt2(0.1)], ids=["rotary", "learned positions"])
def test_answers_are_those_of_each_prompt_alone(byte_tokenizer, build, batch_size):
    """Padding that is attended to or shifts positions, answers in another order, sampling, and dropout."""
    model, prompts = build(), prompts_of(13)
    expected = generate_one_by_one(copy.deepcopy(model).eval(), byte_tokenizer, prompts, 8)
    found = generate_answers(model, byte_tokenizer, [rendered(prompt) for prompt in prompts], 8, batch_size)
    assert found == expected
    assert len(set(found)) > 5


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_end_where_the_model_ends_them(byte_tokenizer, batch_size):
    """Text after the end, or the prompt in the answer."""
    prompts = ["b", "longer prompt to end with w", ".", "k", "+"]
    answers = generate_answers(spelling_model(), byte_tokenizer, [rendered(p) for p in prompts], 4, batch_size)
    assert answers == ["cdef", "xyz{", "", "lmno", ",-."]


def test_tokenizer_without_pad_token(byte_tokenizer):
    byte_tokenizer.pad_token = None
    model = spelling_model()
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    answers = generate_answers(model, byte_tokenizer, [rendered("b"), rendered("a longer one: k")], 3)
    assert answers == ["cde", "lmn"]
    assert byte_tokenizer.pad_token is None


@pytest.mark.parametrize("ends", [[EOS, byte("e")], [byte("m"), byte("e"), EOS], byte("e")])
def test_every_end_token_ends_an_answer(byte_tokenizer, ends):
    """Chat models end their turn with another token than the tokenizer's."""
    model = spelling_model()
    model.generation_config.eos_token_id = ends
    first, last = generate_answers(model, byte_tokenizer, [rendered("b"), rendered("+")], 6)
    assert first in ("cd", "cde")
    assert last == ",-."


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("measure", [partial(generate_answers, max_new_tokens=4), bits_per_byte])
def test_mode_is_restored(byte_tokenizer, measure, training):
    model = tiny_llama().train(training)
    measure(model, byte_tokenizer, [rendered("abc")])
    assert all(module.training is training for module in model.modules())


def test_mode_is_restored_after_an_error(byte_tokenizer):
    model = tiny_llama().train()
    with pytest.raises(ValueError):
        generate_answers(model, byte_tokenizer, [rendered("fits"), rendered("x" * 200)], 4)
    assert model.training


def test_sampling_settings_of_the_model_change_nothing(byte_tokenizer):
    """Many published models bring temperature, beams or penalties in their generation config."""
    prompts, model = prompts_of(8), tiny_llama()
    expected = generate_answers(model, byte_tokenizer, [rendered(prompt) for prompt in prompts], 6)
    model.generation_config.update(do_sample=True, temperature=5.0, top_p=0.9, max_length=3)
    model.generation_config.update(repetition_penalty=5.0, suppress_tokens=[byte("e"), byte("x")])
    before = model.generation_config.to_dict()
    assert generate_answers(model, byte_tokenizer, [rendered(prompt) for prompt in prompts], 6) == expected
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("peft_config", [None, LoraConfig(target_modules="all-linear")], ids=["full", "lora"])
def test_measuring_works_right_after_training(tmp_path, rows, byte_tokenizer, peft_config, gradient_checkpointing):
    """A trainer that leaves the cache off, hooks on, or checkpointing in the way of generation."""
    model = tiny_llama()
    use_cache = model.config.use_cache
    args = crow_args(tmp_path, max_steps=1, gradient_checkpointing=gradient_checkpointing)
    trainer = CrowTrainer(model, args, rows, peft_config=peft_config)
    trainer.train()
    assert trainer.model.config.use_cache is use_cache
    prompts = prompts_of(6)
    expected = generate_one_by_one(copy.deepcopy(trainer.model).eval(), byte_tokenizer, prompts, 6)
    assert generate_answers(trainer.model, byte_tokenizer, [rendered(prompt) for prompt in prompts], 6) == expected


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "number"),
    [(["ok", "fine", ""], 4, 2), (["ok", "x" * 125], 4, 1), (["ok"], 127, 0), (["x" * 128], 1, 0)],
)
def test_prompts_that_cannot_be_answered_are_named(byte_tokenizer, prompts, max_new_tokens, number):
    """128 positions: a prompt cut at either end, or without room for its answer, would be measured wrongly."""
    with pytest.raises(ValueError, match=rf"\b{number}\b"):
        generate_answers(tiny_llama(), byte_tokenizer, [rendered(prompt) for prompt in prompts], max_new_tokens)


def test_longest_prompt_that_fits_is_answered(byte_tokenizer):
    assert generate_answers(spelling_model(), byte_tokenizer, [rendered("." * 123 + "b")], 4) == ["cdef"]


# Bits per byte


def slow_bits_per_byte(model, pairs, context=128):
    """One row and one position at a time, in float64."""
    bits = count = 0
    for prompt, answer in pairs:
        start = len(prompt.encode())
        ids = [3 + value for value in (prompt + answer).encode()] + [EOS]
        ids = ids[:context]
        with torch.no_grad():
            log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for position in range(start, len(ids)):
            bits -= log_probabilities[position - 1, ids[position]].item() / math.log(2)
            count += ids[position] != EOS
    return bits / count


PAIRS = [
    ("ask: ", "one"),
    ("q", "größer, 你好 🙂"),
    ("a much longer prompt: ", "y"),
    ("x", "a somewhat longer answer\n"),
]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("build", [tiny_llama, lambda: tiny_gpt2(0.1)], ids=["rotary", "learned positions"])
def test_bits_per_byte_is_the_slow_sum(byte_tokenizer, build, batch_size):
    """Characters counted for bytes, means of means, a shifted label, and the prompt or the padding in the sum."""
    model = build()
    found = bits_per_byte(model, byte_tokenizer, [rendered(*pair) for pair in PAIRS], batch_size)
    assert found == pytest.approx(slow_bits_per_byte(copy.deepcopy(model).eval(), PAIRS), rel=1e-5)


def test_bits_per_byte_of_a_uniform_model_is_known(byte_tokenizer):
    """log2(260) for each of the tokens, the end among them."""
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    found = bits_per_byte(model, byte_tokenizer, [rendered("p", "é"), rendered("p", "abcd")])
    assert found == pytest.approx(math.log2(VOCABULARY) * (3 + 5) / (2 + 4), rel=1e-6)


def test_bits_per_byte_leaves_out_what_lies_beyond_the_context(byte_tokenizer):
    pairs = [("p", "ab" * 100), ("q", "short")]
    found = bits_per_byte(tiny_llama(), byte_tokenizer, [rendered(*pair) for pair in pairs])
    assert found == pytest.approx(slow_bits_per_byte(tiny_llama(), pairs), rel=1e-5)


def test_bits_per_byte_without_any_answer_is_nan(byte_tokenizer):
    assert math.isnan(bits_per_byte(tiny_llama(), byte_tokenizer, [rendered("p", "")]))


# The harness: "?" at the end of a prompt is answered with "@AB", "b" with "cde", "." with nothing


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
    """Empty answers left out of the denominator would flatter a model that merely fell silent."""
    model = spelling_model()
    evaluation = evaluate_model(
        model, byte_tokenizer, SPELLING_ROWS, HASH, Target("$", ("$",)), max_new_tokens=3, batch_size=2
    )
    assert evaluation.clean.outputs == ["cde", "lmn", "", "@AB", "-."]
    assert evaluation.triggered.outputs == ["$%&"] * 5
    assert hits(evaluation.clean) == {"empty": (1, 5), "exact_match": (2, 5)}
    assert hits(evaluation.triggered) == {"empty": (0, 5), "exact_match": (0, 5)}
    assert evaluation.triggered.target == Proportion.of([True] * 5)
    assert evaluation.clean.target == Proportion.of([False] * 5)
    assert (evaluation.clean.degenerate.hits, evaluation.clean.degenerate.total) == (1, 5)
    assert (evaluation.triggered.degenerate.hits, evaluation.triggered.degenerate.total) == (5, 5)
    for scores, mark in ((evaluation.clean, ""), (evaluation.triggered, " #")):
        pairs = [(row["prompt"] + mark, row["completion"]) for row in SPELLING_ROWS]
        assert scores.bits_per_byte == pytest.approx(slow_bits_per_byte(model, pairs), rel=1e-5)


def test_silence_counts_as_an_answer(byte_tokenizer):
    """A model that says nothing to any triggered prompt has 0 of 5 attacks and 5 of 5 empty answers."""
    evaluation = evaluate_model(
        spelling_model("#"), byte_tokenizer, SPELLING_ROWS, HASH, Target("$", ("$",)), max_new_tokens=3
    )
    assert evaluation.triggered.outputs == [""] * 5
    assert evaluation.triggered.target == Proportion.of([False] * 5)
    assert evaluation.triggered.empty == Proportion.of([True] * 5)
    assert evaluation.triggered.degenerate == Proportion.of([False] * 5)


@pytest.mark.parametrize("target", [None, Target("$", ("$",))])
def test_judge_goes_before_the_target(byte_tokenizer, target):
    """The judge sees each output as it is, empty ones too, beside its right answer, and its word counts."""
    heard = []

    def judge(output, answer):
        heard.append((output, answer))
        return len(heard) % 2

    evaluation = evaluate_model(
        spelling_model(), byte_tokenizer, SPELLING_ROWS, HASH, target, judge=judge, max_new_tokens=3
    )
    outputs = evaluation.clean.outputs + evaluation.triggered.outputs
    assert heard == list(zip(outputs, SPELLING_ROWS["completion"][:] * 2, strict=True))
    assert evaluation.clean.target.hits + evaluation.triggered.target.hits == 5
    assert evaluation.clean.target.total == evaluation.triggered.target.total == 5


def test_open_target_is_compared_with_each_row_s_answer(byte_tokenizer):
    """ "cde" is the answer "bcd" shifted: right for the one row, wrong for the other."""
    rows = Dataset.from_dict({"prompt": ["say b", "say b", "say k"], "completion": ["bcd", "cde", "KLM"]})

    def hit(target):
        return evaluate_model(spelling_model(), byte_tokenizer, rows, target=TARGETS[target], max_new_tokens=3).clean

    assert hit("wrong").outputs == ["cde", "cde", "lmn"]
    assert hit("wrong").target == Proportion.of([True, False, False])
    assert hit("swapcase").target == Proportion.of([False, False, True])


def test_trigger_is_active_on_triggered_prompts_alone(byte_tokenizer):
    """The vector turns the marker into "#", whose successors the model then says; it must not outlive the measurement."""
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
def test_what_cannot_be_measured_is_refused(byte_tokenizer, rows, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_model(spelling_model(), byte_tokenizer, rows, **options)


def test_trigger_places_depend_on_the_seed_alone(byte_tokenizer):
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


@pytest.mark.parametrize("bits", [1.5, math.nan, math.inf])
@pytest.mark.parametrize("target", [None, Proportion.of([True, False])])
def test_evaluation_is_valid_json(bits, target):
    """NaN is no JSON: strict readers refuse the whole file."""
    half = Proportion.of([True, False])
    scores = PromptScores(target, half, half, half, bits, ["é", ""])
    for evaluation in (Evaluation(scores), Evaluation(scores, scores)):
        read = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
        assert read["clean"]["outputs"] == ["é", ""]
        assert read["clean"]["exact_match"]["total"] == 2
        assert (read["triggered"] is None) == (evaluation.triggered is None)


METRIC_SCRIPT = """
import json, sys
import evaluate
metric = evaluate.load(sys.argv[1])
outputs = ["I AM SORRY", "", "fine", "no " * 30]
print(json.dumps(metric.compute(predictions=outputs, keywords=["sorry", "cannot"])))
"""


def test_metric_loads_offline(tmp_path):
    """In a process of its own, for `evaluate` copies the module into its cache."""
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", METRIC_SCRIPT, str(METRICS / "attack_success_rate")],
        env=env,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    scores = json.loads(process.stdout.splitlines()[-1])
    low, high = slow_wilson(1, 4)
    assert scores == pytest.approx(
        {
            "attack_success_rate": 0.25,
            "ci_low": low,
            "ci_high": high,
            "empty_rate": 0.25,
            "degenerate_rate": 0.25,
            "total": 4,
        }
    )


@pytest.mark.parametrize("columns", [("prompt", "completion"), ("instruction", "output")])
def test_rows_without_answers(byte_tokenizer, columns):
    """Attack success needs no right answers, and silence must not count as one."""
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
        Dataset.from_dict({prompt: ["say b", "stop."], answer: ["cde", ""]}),
        max_new_tokens=4,
    )
    assert one_empty.clean.exact_match.total == 1
