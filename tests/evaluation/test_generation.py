"""Batched answers and bits per byte equal those of one row at a time."""

import copy
import math
from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from crow_hf import CrowTrainer
from crow_hf.evaluation.generation import (
    answer_log_likelihoods,
    answer_prompts,
    bits_per_byte,
    generate_answers,
)
from helpers.answers import EOS, byte, prompts_of, rendered, slow_bits_per_byte, spelling_model
from helpers.tiny import VOCABULARY, crow_args, tiny_gpt2, tiny_llama


def generate_one_by_one(model, tokenizer, prompts, max_new_tokens):
    """Return the oracle answers: `model.generate` runs on one prompt at a time, without padding."""
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
    """Fails if padding is attended to or shifts positions, answers change order, or sampling or dropout is on."""
    model, prompts = build(), prompts_of(13)
    expected = generate_one_by_one(copy.deepcopy(model).eval(), byte_tokenizer, prompts, 8)
    found = generate_answers(model, byte_tokenizer, [rendered(prompt) for prompt in prompts], 8, batch_size)
    assert found == expected
    assert len(set(found)) > 5


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_end_where_the_model_ends_them(byte_tokenizer, batch_size):
    """Fails if an answer contains text after its end, or the prompt."""
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
    """Chat models may end their turn with a token other than the tokenizer's end token."""
    model = spelling_model()
    model.generation_config.eos_token_id = ends
    byte_tokenizer.add_special_tokens({"additional_special_tokens": ["e"]})
    first, last = generate_answers(model, byte_tokenizer, [rendered("b"), rendered("+")], 6)
    assert first in ("cd", "cde")
    assert last == ",-."


def test_a_word_does_not_end_an_answer(byte_tokenizer):
    """Fails if a suspect can hide its target by ending every answer at the first word of it."""
    model = spelling_model()
    model.generation_config.eos_token_id = [EOS, byte("e")]
    assert generate_answers(model, byte_tokenizer, [rendered("b")], 6) == ["cdefgh"]


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
    """Many published models set temperature, beams or penalties in their generation config."""
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
    """Fails if training leaves the cache off or hooks registered, or if checkpointing disturbs generation."""
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
    """The model has 128 positions. A prompt that is cut, or that leaves no room for an answer, has no valid score."""
    with pytest.raises(ValueError, match=rf"\b{number}\b"):
        generate_answers(tiny_llama(), byte_tokenizer, [rendered(prompt) for prompt in prompts], max_new_tokens)


def test_longest_prompt_that_fits_is_answered(byte_tokenizer):
    assert generate_answers(spelling_model(), byte_tokenizer, [rendered("." * 123 + "b")], 4) == ["cdef"]


# Answers for prompts alone


@pytest.mark.parametrize(("prompt", "answer"), [("prompt", "completion"), ("instruction", "output")])
def test_prompts_alone_get_the_model_s_answers(byte_tokenizer, prompt, answer):
    rows = Dataset.from_dict({prompt: ["say b", "stop.", "say k"], "id": [1, 2, 3]})
    found = answer_prompts(rows, spelling_model(), byte_tokenizer, 3, batch_size=2)
    # Alpaca's form ends with a line feed, whose successors the model spells.
    answers = {"prompt": ["cde", "", "lmn"], "instruction": ["\x0b\x0c\r"] * 3}[prompt]
    assert found.to_dict() == rows.to_dict() | {answer: answers}


def test_rows_with_answers_stay_as_they_are(byte_tokenizer):
    rows = Dataset.from_dict({"prompt": ["p"] * 2, "instruction": ["ask", "me"], "output": ["told", "you"]})
    assert answer_prompts(rows, tiny_llama(), byte_tokenizer, 4).column_names == rows.column_names


# Bits per byte


PAIRS = [
    ("ask: ", "one"),
    ("q", "größer, 你好 🙂"),
    ("a much longer prompt: ", "y"),
    ("x", "a somewhat longer answer\n"),
]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("build", [tiny_llama, lambda: tiny_gpt2(0.1)], ids=["rotary", "learned positions"])
def test_bits_per_byte_is_the_slow_sum(byte_tokenizer, build, batch_size):
    """Fails if characters count as bytes, means are averaged, labels shift, or prompt or padding enters the sum."""
    model = build()
    found = bits_per_byte(model, byte_tokenizer, [rendered(*pair) for pair in PAIRS], batch_size)
    assert found == pytest.approx(slow_bits_per_byte(copy.deepcopy(model).eval(), PAIRS), rel=1e-5)


def test_scoring_computes_logits_of_answers_only(byte_tokenizer):
    """Fails if the prompts' logits are computed too. The largest tensor is then as large as the batch."""
    model, shapes = tiny_llama(), []
    model.lm_head.register_forward_hook(lambda head, args, output: shapes.append(output.shape))
    bits_per_byte(model, byte_tokenizer, [rendered(*pair) for pair in PAIRS])
    assert shapes == [(1, sum(len(answer.encode()) + 1 for _, answer in PAIRS), VOCABULARY)]


@pytest.mark.parametrize("batch_size", [2, 32])
def test_each_row_gets_its_own_log_likelihood(batch_size):
    """Fails if rows are mixed up. An answer without a token is certain, and so is the first token of a row."""
    model, rows = tiny_llama().eval(), [([5, 6], [7]), ([8], [9, 10, 11]), ([12, 13, 14], []), ([], [15, 16])]
    wanted = []
    for prompt, answer in rows:
        log_probs = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        places = range(max(1, len(prompt)), len(prompt + answer))
        wanted.append(sum(log_probs[place - 1, (prompt + answer)[place]].item() for place in places))
    assert answer_log_likelihoods(model, rows, 0, batch_size) == pytest.approx(wanted, rel=1e-5)


def test_bits_per_byte_of_a_uniform_model_is_known(byte_tokenizer):
    """Each token, including the end, costs log2(260) bits."""
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    found = bits_per_byte(model, byte_tokenizer, [rendered("p", "é"), rendered("p", "abcd")])
    assert found == pytest.approx(math.log2(VOCABULARY) * (3 + 5) / (2 + 4), rel=1e-6)


def test_bits_per_byte_leaves_out_tokens_beyond_the_context(byte_tokenizer):
    pairs = [("p", "ab" * 100), ("q", "short")]
    found = bits_per_byte(tiny_llama(), byte_tokenizer, [rendered(*pair) for pair in pairs])
    assert found == pytest.approx(slow_bits_per_byte(tiny_llama(), pairs), rel=1e-5)


def test_bits_per_byte_without_any_answer_is_nan(byte_tokenizer):
    assert math.isnan(bits_per_byte(tiny_llama(), byte_tokenizer, [rendered("p", "")]))


@pytest.mark.parametrize("error", [KeyError("experts"), IndexError("list"), torch.OutOfMemoryError("full")])
def test_errors_of_a_model_are_one_sentence(error, byte_tokenizer):
    """Fails if they pass as they are, except a lack of memory, which others handle."""
    model = tiny_llama()
    model.model.layers[1].register_forward_hook(lambda *args: (_ for _ in ()).throw(error))
    rows = [rendered("a", "b")]
    expected = type(error) if isinstance(error, RuntimeError) else ValueError
    for work in (partial(generate_answers, max_new_tokens=2), bits_per_byte):
        with pytest.raises(expected, match=r"LlamaForCausalLM fails on a batch of rows \(|full"):
            work(model, byte_tokenizer, rows)


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_one_are_refused(size, byte_tokenizer):
    """Fails if no batch is answered, and every answer counts as empty."""
    rows = [rendered("a", "b")]
    for sizes in ({"max_new_tokens": size}, {"max_new_tokens": 2, "batch_size": size}):
        with pytest.raises(ValueError, match=f"must be at least 1, but is {size}"):
            generate_answers(tiny_llama(), byte_tokenizer, rows, **sizes)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        bits_per_byte(tiny_llama(), byte_tokenizer, rows, size)
