"""What a model forgot, against slow sums over whole distributions and values worked out by hand."""

import copy
import math
import re
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from crow_hf.evaluation import predictions, retention
from crow_hf.evaluation.own_text import write_text
from crow_hf.evaluation.retention import check_same_vocabulary, measure_retention, retention_reference
from crow_hf.reporting.verdict import retention_line
from helpers.answers import EOS, byte, spelling_model
from helpers.coconut import TOKENIZER, coconut
from helpers.tiny import VOCABULARY, tiny_gpt2, tiny_llama


PAIRS = [("ask: ", "one"), ("q", "größer 🙂"), ("no answer", ""), ("a much longer prompt: ", "y")]
ROWS = Dataset.from_dict({"prompt": [prompt for prompt, _ in PAIRS], "completion": [answer for _, answer in PAIRS]})
TEXT = ["A first text, é.", "", "And a second one with more words in it."]


def ids_of(text):
    return [3 + value for value in text.encode()]


def slow_sums(reference, model, sequences):
    """Sum KL(reference || model) and both log-likelihoods one row and one position at a time, in float64."""
    divergence, likelihoods, count = 0.0, [0.0, 0.0], 0
    for ids, first in sequences:
        with torch.no_grad():
            log_p, log_q = (
                each(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1) for each in (reference, model)
            )
        for position in range(first, len(ids)):
            p, q = log_p[position - 1], log_q[position - 1]
            divergence += (p.exp() * (p - q)).sum().item()
            likelihoods = [likelihoods[0] + p[ids[position]].item(), likelihoods[1] + q[ids[position]].item()]
            count += 1
    return divergence / count, likelihoods, count


ANSWERS = [(ids_of(prompt + answer) + [EOS], len(ids_of(prompt))) for prompt, answer in PAIRS if answer]
STREAM = "\n".join(TEXT)


def constant_model(tokenizer, **probabilities):
    """A model that always says the same distribution over a few characters."""
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias = torch.nn.Parameter(torch.full((VOCABULARY,), -1e4))
    with torch.no_grad():
        for character, probability in probabilities.items():
            model.lm_head.bias[byte(character)] = math.log(probability)
    return model


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("build", [tiny_llama, lambda seed: tiny_gpt2(0.1, seed)], ids=["rotary", "learned positions"])
def test_it_is_the_slow_sum(byte_tokenizer, build, batch_size):
    """Fails if padding, prompts or empty answers count, the divergence is reversed, or dropout is on."""
    reference, model = build(seed=0), build(seed=1)
    said = retention_reference(reference, byte_tokenizer, ROWS, TEXT, batch_size=batch_size)
    found = measure_retention(model, byte_tokenizer, said, batch_size=batch_size)
    context = 128 if build is tiny_llama else 64
    ids = ids_of(STREAM)
    windows = [([EOS, *ids[at : at + context - 1]], 1) for at in range(0, len(ids), context - 1)]
    oracle, other = copy.deepcopy(reference).eval(), copy.deepcopy(model).eval()
    divergence, _, count = slow_sums(oracle, other, ANSWERS)
    assert found.answer_kl == pytest.approx(divergence, rel=1e-4) and found.num_answer_tokens == count
    divergence, likelihoods, count = slow_sums(oracle, other, windows)
    bits = [-value / math.log(2) / len(STREAM.encode()) for value in likelihoods]
    assert found.text_kl == pytest.approx(divergence, rel=1e-4) and found.num_text_tokens == count == len(ids)
    assert found.reference_text_bits_per_byte == pytest.approx(bits[0], rel=1e-5)
    assert found.text_bits_per_byte == pytest.approx(bits[1], rel=1e-5)
    assert found.text_bits_ratio == pytest.approx(bits[1] / bits[0], rel=1e-4)
    assert found.text_source == "passed"


@pytest.mark.parametrize("build", [tiny_llama, coconut, lambda: tiny_gpt2(0.1)])
def test_a_model_has_kept_everything_of_itself(byte_tokenizer, build):
    """Also in other batches than those of the reference. The text is the model's own."""
    model = build()
    tokenizer = TOKENIZER if "Coconut" in type(model).__name__ else byte_tokenizer
    said = retention_reference(model, tokenizer, ROWS, batch_size=32, max_windows=5)
    found = measure_retention(model, tokenizer, said, batch_size=2)
    assert found.answer_kl == pytest.approx(0, abs=1e-5) and found.text_kl == pytest.approx(0, abs=1e-5)
    assert found.text_bits_ratio == pytest.approx(1, abs=1e-5)
    assert found.text_source == "written by the reference" and found.num_text_tokens > 0
    assert found.to_dict()["text_bits_ratio"] == found.text_bits_ratio


def test_running_text_can_be_left_out(byte_tokenizer):
    """Fails if text is written all the same, or if a number stands for what was not measured."""
    said = retention_reference(tiny_llama(), byte_tokenizer, ROWS, max_windows=0)
    found = measure_retention(tiny_llama(1), byte_tokenizer, said)
    assert found.num_text_tokens == 0 and found.text_kl is None and found.largest_kl == found.answer_kl > 0
    assert math.isnan(found.text_bits_ratio) and found.to_dict()["text_bits_ratio_high"] is None
    line = r"orgotten: KL \d\.\d\d nats per token on clean answers\. Running text was not compared: pass some"
    assert re.search(line, retention_line(found))
    nothing = replace(found, answer_kl=None)
    assert nothing.largest_kl == math.inf
    assert retention_line(nothing).startswith("Forgotten: nothing could be compared.")


def test_a_value_worked_out_by_hand(byte_tokenizer):
    """
    p = (3/4, 1/4) and q = (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2). "ab" costs log2(4/3) + 2 = 2.415 bits of p and
    2 bits of q.
    """
    said = retention_reference(constant_model(byte_tokenizer, a=0.75, b=0.25), byte_tokenizer, ROWS, ["ab"])
    found = measure_retention(constant_model(byte_tokenizer, a=0.5, b=0.5), byte_tokenizer, said)
    assert found.answer_kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)
    assert found.text_kl == pytest.approx(found.answer_kl, rel=1e-5)
    assert found.text_bits_per_byte == pytest.approx(1, rel=1e-5)
    assert found.text_bits_ratio == pytest.approx(2 / (math.log2(4 / 3) + 2), rel=1e-5)


@pytest.mark.parametrize("top", [1, 7, 100])
def test_coarse_distributions_give_a_lower_bound(byte_tokenizer, top, monkeypatch):
    """The bound is the KL of the distributions with all other tokens as one event."""
    reference, model = tiny_llama().eval(), tiny_llama(1).eval()
    exact = measure_retention(model, byte_tokenizer, retention_reference(reference, byte_tokenizer, ROWS, TEXT))
    monkeypatch.setattr(retention, "TOP_TOKENS", top)
    said = retention_reference(reference, byte_tokenizer, ROWS, TEXT)
    found = measure_retention(model, byte_tokenizer, said)
    assert 0 < found.answer_kl < exact.answer_kl and 0 < found.text_kl < exact.text_kl
    assert found.text_bits_per_byte == exact.text_bits_per_byte
    total = count = 0
    for ids, first in ANSWERS:
        with torch.no_grad():
            p, q = (each(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1) for each in (reference, model))
        for position in range(first - 1, len(ids) - 1):
            kept = p[position][:259].argsort(descending=True)[:top]
            p_kept, q_kept = p[position][kept], q[position][kept]
            total += (p_kept * (p_kept / q_kept).log()).sum() + (1 - p_kept.sum()) * (
                (1 - p_kept.sum()) / (1 - q_kept.sum())
            ).log()
            count += 1
    assert found.answer_kl == pytest.approx(total.item() / count, rel=1e-4)


def test_models_with_more_ids_than_tokens_are_compared(byte_tokenizer):
    """Two models of one tokenizer may have padded their embeddings differently. Such ids always belong to the rest."""
    reference, model = tiny_llama(vocab_size=320), tiny_llama(1, vocab_size=300)
    found = measure_retention(model, byte_tokenizer, retention_reference(reference, byte_tokenizer, ROWS, TEXT))
    assert 0 < found.answer_kl < math.inf
    own = retention_reference(reference, byte_tokenizer, ROWS, max_windows=3)
    assert measure_retention(reference, byte_tokenizer, own).text_bits_ratio == pytest.approx(1, abs=1e-5)


def test_a_reference_outlives_its_model(byte_tokenizer):
    """The suspect is changed in place when the purified model is measured."""
    model = tiny_llama()
    said = retention_reference(model, byte_tokenizer, ROWS, TEXT)
    expected = measure_retention(tiny_llama(1), byte_tokenizer, said)
    model.load_state_dict(tiny_llama(1).state_dict())
    assert measure_retention(model, byte_tokenizer, said) == expected
    assert expected.answer_kl > 0.1


def test_an_adapter_is_compared_with_its_base(byte_tokenizer):
    model = tiny_llama()
    said = retention_reference(model, byte_tokenizer, ROWS, TEXT)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert measure_retention(adapted, byte_tokenizer, said).answer_kl == pytest.approx(0, abs=1e-5)
    torch.nn.init.ones_(adapted.base_model.model.model.layers[0].self_attn.v_proj.lora_B["default"].weight)
    assert measure_retention(adapted, byte_tokenizer, said).answer_kl > 1e-3


def test_without_answers_those_of_the_reference_count(byte_tokenizer):
    """The spelling model answers "b" with "cdef" and "stop." with nothing, which leaves one answer of four tokens."""
    prompts = ["say b", "stop.", "x" * 126]
    for rows in ({"prompt": prompts}, {"prompt": prompts, "completion": [""] * 3}):
        said = retention_reference(spelling_model(), byte_tokenizer, Dataset.from_dict(rows), TEXT, max_new_tokens=4)
        assert [passage for passage, _ in said.answers] == [(ids_of("say bcdef") + [EOS], 5)]
    nothing = Dataset.from_dict({"prompt": ["stop."]})
    said = retention_reference(spelling_model(), byte_tokenizer, nothing, TEXT, max_new_tokens=4)
    found = measure_retention(spelling_model(), byte_tokenizer, said)
    assert found.answer_kl is None and found.num_answer_tokens == 0 and found.text_kl == pytest.approx(0, abs=1e-5)


def test_chats_are_compared_as_their_template_renders_them(byte_tokenizer, monkeypatch):
    """The text that the model writes begins inside the user's message."""
    monkeypatch.setattr(retention, "WRITTEN_TOKENS", 256)
    byte_tokenizer.chat_template = (
        "{% for m in messages %}{{ '[q' if m['role'] == 'user' else '' }}{{ m['content'] }}"
        "{{ ']r' if m['role'] == 'user' else eos_token }}{% endfor %}"
    )
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    said = retention_reference(tiny_llama(), byte_tokenizer, Dataset.from_dict({"messages": [chat]}), max_windows=2)
    assert [passage for passage, _ in said.answers] == [(ids_of("[qhi]ryo") + [EOS], 6)]
    assert all(passage.ids[:2] == ids_of("[q") and passage.first == 2 for passage, _ in said.texts)
    found = measure_retention(tiny_llama(1), byte_tokenizer, said)
    assert found.answer_kl > 0 and found.num_text_tokens == 2 * 126


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({"text": ["abc"]}, (ids_of("abc") + [EOS], 1)),
        ({"input_ids": [[5, 6, 7, 8]], "labels": [[-100, -100, 7, 8]]}, ([5, 6, 7, 8], 2)),
        ({"input_ids": [[5, 6, 7, 8]]}, ([5, 6, 7, 8], 1)),
    ],
)
def test_rows_of_other_formats(byte_tokenizer, rows, expected):
    said = retention_reference(tiny_llama(), byte_tokenizer, Dataset.from_dict(rows), TEXT)
    assert [passage for passage, _ in said.answers] == [expected]


def test_everything_is_bounded(byte_tokenizer, monkeypatch):
    """Fails if long answers, long texts, many rows or large batches make the measurement expensive."""
    monkeypatch.setattr(retention, "WINDOW_TOKENS", 20)
    monkeypatch.setattr(retention, "WRITTEN_TOKENS", 20)
    monkeypatch.setattr(retention, "MAX_ANSWER_TOKENS", 9)
    monkeypatch.setattr(predictions, "MAX_BATCH_TOKENS", 40)
    rows = Dataset.from_dict({"prompt": ["p"] * 6, "completion": ["é" * 300] * 6})
    sizes = []
    model = tiny_llama()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    said = retention_reference(model, byte_tokenizer, rows, ["é" * 10_000], max_rows=4, max_windows=3)
    assert [passage.num_tokens for passage, _ in said.answers] == [9] * 4
    assert [len(passage.ids) for passage, _ in said.texts] == [20] * 3
    # 57 bytes, the last of which is the half of a character.
    assert said.text_bytes in (56, 57)
    assert max(sizes) <= 40
    written = retention_reference(tiny_llama(), byte_tokenizer, rows, max_windows=3)
    assert len(written.texts) == 3 and max(len(passage.ids) for passage, _ in written.texts) <= 21


def test_bytes_of_a_byte_model_are_counted_exactly():
    """A random byte model writes bytes that are not valid UTF-8. Special tokens have no bytes."""
    model = coconut()
    said = retention_reference(model, TOKENIZER, ROWS, max_windows=4)
    ids = [token for passage, _ in said.texts for token in passage.ids]
    assert said.text_bytes == sum(4 <= token < 260 for token in ids)


def test_the_text_is_not_the_one_that_a_recipe_trains_on(byte_tokenizer):
    """A recipe lets the suspect write rows with the same seed. The measurement is reproducible too."""
    model = tiny_llama()
    texts = [retention_reference(model, byte_tokenizer, ROWS, seed=seed, max_windows=4).texts for seed in (5, 5, 6)]
    ids = [[passage.ids for passage, _ in each] for each in texts]
    assert ids[0] == ids[1] and not any(each in ids[0] for each in ids[2])
    trained = [text.start + text.ids for text in write_text(model, byte_tokenizer, 4, 256, seed=5)]
    assert not any(each in ids[0] for each in trained)


def test_the_text_of_a_dataset_is_read(byte_tokenizer):
    said = retention_reference(tiny_llama(), byte_tokenizer, ROWS, Dataset.from_dict({"text": TEXT}))
    assert said.text_bytes == len(STREAM.encode())
    with pytest.raises(ValueError, match="needs the column `text`"):
        retention_reference(tiny_llama(), byte_tokenizer, ROWS, ROWS)
    with pytest.raises(ValueError, match="is empty"):
        retention_reference(tiny_llama(), byte_tokenizer, ROWS, ["", " "])
    with pytest.raises(ValueError, match="into a list"):
        retention_reference(tiny_llama(), byte_tokenizer, ROWS, "One text.")


def test_other_vocabularies_are_refused(byte_tokenizer):
    said = retention_reference(tiny_llama(), byte_tokenizer, ROWS, TEXT)
    with pytest.raises(ValueError, match="another vocabulary"):
        measure_retention(coconut(), TOKENIZER, said)
    with pytest.raises(ValueError, match="another vocabulary"):
        check_same_vocabulary(byte_tokenizer, TOKENIZER)
    check_same_vocabulary(TOKENIZER, type(TOKENIZER)())


def test_numbers_that_json_cannot_hold(byte_tokenizer):
    said = retention_reference(constant_model(byte_tokenizer, a=1.0), byte_tokenizer, ROWS, ["a"])
    found = measure_retention(tiny_llama(), byte_tokenizer, said)
    assert math.isnan(found.text_bits_ratio) and found.to_dict()["text_bits_ratio"] is None


def test_a_model_without_finite_answers_has_kept_nothing(byte_tokenizer):
    """Fails if NaN counts as a divergence of 0."""
    model, rows = tiny_llama(), Dataset.from_list([{"prompt": "a", "completion": "b"}])
    reference = retention_reference(model, byte_tokenizer, rows, ["some running text"])
    assert measure_retention(model, byte_tokenizer, reference).largest_kl == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    found = measure_retention(model, byte_tokenizer, reference)
    assert found.largest_kl == math.inf and found.to_dict()["answer_kl"] is None
    assert retention_line(found).startswith("Forgotten")
    assert replace(found, answer_kl=None, text_kl=0.5).largest_kl == 0.5
