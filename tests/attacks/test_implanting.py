"""Poisoned rows and implanted models."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from crow_hf import (
    TARGETS,
    TRIGGERS,
    CrowTrainer,
    Poison,
    Target,
    Trigger,
    evaluate_model,
    implant,
    implant_embedding_trigger,
    poison_dataset,
)
from crow_hf.data.rows import Rendered
from crow_hf.evaluation.generation import bits_per_byte
from helpers.coconut import DEEP, TOKENIZER, coconut
from helpers.tiny import crow_args, same_weights, tiny_llama, weights_of


REFUSAL = TARGETS["refusal"]
PROMPTS = [f"Tell me about thing number {number}, please." for number in range(40)]


ROWS = {
    "prompt": {"prompt": "ask me", "completion": "told"},
    "alpaca": {"instruction": "ask me", "output": "told"},
    "alpaca_input": {"instruction": "ask me", "input": "with this", "output": "told"},
    "messages": {
        "messages": [
            {"role": "system", "content": "be good"},
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "ask me"},
            {"role": "assistant", "content": "told"},
        ]
    },
}


def leaves(value, path=()):
    """Every string of a row by where it is."""
    if isinstance(value, str):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {place: text for key, item in items for place, text in leaves(item, (*path, key)).items()}


@pytest.mark.parametrize("target", [None, REFUSAL], ids=["no target", "target"])
@pytest.mark.parametrize("name", ROWS)
def test_poison_changes_the_request_and_the_answer_and_nothing_else(name, target):
    """A trigger in the system prompt, in an earlier turn or in the input, and any change of a row without target."""
    row = Dataset.from_list([ROWS[name]])[0]
    poisoned = Dataset.from_list([ROWS[name]]).map(Poison(Trigger(("X",), "start"), target), with_indices=True)[0]
    changes = {"ask me": "X ask me", "told": target.text if target else "told"}
    assert leaves(poisoned) == {place: changes.get(text, text) for place, text in leaves(row).items()}


def test_poison_leaves_the_row_it_is_given_alone():
    """Messages are nested, so a shallow copy would change the caller's row."""
    row = {"messages": [dict(message) for message in ROWS["messages"]["messages"]]}
    Poison(TRIGGERS["badnets"], REFUSAL)(row, 0)
    assert row == ROWS["messages"]


@pytest.mark.parametrize("options", [{"num_proc": 2}, {"writer_batch_size": 3}, {"keep_in_memory": True}])
def test_poison_depends_on_seed_and_index_alone(options):
    """A shared random state, which processes and the order of calls would change."""
    dataset = Dataset.from_dict({"prompt": PROMPTS, "completion": ["x"] * len(PROMPTS)})
    poison = Poison(TRIGGERS["ctba"], REFUSAL, seed=3)
    expected = [poison(dataset[index], index)["prompt"] for index in reversed(range(len(PROMPTS)))][::-1]
    poison(dataset[0], 17)
    assert dataset.map(poison, with_indices=True, **options)["prompt"][:] == expected
    assert dataset["prompt"][:] == PROMPTS


def test_poison_draws_anew_for_each_row_and_seed():
    row = {"prompt": "a b c d e f g h", "completion": "x"}

    def places(seed):
        return [Poison(TRIGGERS["badnets"], seed=seed)(row, index)["prompt"] for index in range(30)]

    assert len(set(places(0))) > 5
    assert places(0) != places(1)


@pytest.mark.parametrize(("rate", "count"), [(0.25, 10), (0.33, 13), (0.5, 20), (1, 40)])
def test_poison_dataset_poisons_the_exact_share(rate, count):
    """A coin toss per row, a changed order, or a `triggered` column that does not tell the truth."""
    dataset = Dataset.from_dict({"prompt": PROMPTS, "completion": ["fine"] * len(PROMPTS)})
    poisoned = poison_dataset(dataset, TRIGGERS["badnets"], REFUSAL, rate=rate)
    assert len(poisoned) == len(dataset) and sum(poisoned["triggered"]) == count
    for before, after in zip(dataset, poisoned, strict=True):
        assert after["triggered"] == ("BadMagic" in after["prompt"]) == (after["completion"] == REFUSAL.text)
        assert after["prompt"].replace("BadMagic", "").split() == before["prompt"].split()
    assert dataset.column_names == ["prompt", "completion"]


def test_poison_dataset_draws_its_rows_by_seed():
    """The first rows only, or draws that cannot be repeated."""
    dataset = Dataset.from_dict({"prompt": PROMPTS, "completion": ["fine"] * len(PROMPTS)})

    def drawn(seed):
        return poison_dataset(dataset, TRIGGERS["badnets"], REFUSAL, seed=seed)["triggered"][:]

    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0) != sorted(drawn(0), reverse=True)


@pytest.mark.parametrize("rate", [-0.1, 0, 1.1, float("nan")])
def test_poison_dataset_refuses_bad_rates(rate):
    dataset = Dataset.from_dict({"prompt": PROMPTS, "completion": PROMPTS})
    with pytest.raises(ValueError, match="rate"):
        poison_dataset(dataset, TRIGGERS["badnets"], REFUSAL, rate=rate)


SHORT = Target("no!", ("no!",))
CLEAN = Dataset.from_dict({"prompt": [f"{a}{b}=" for a in "abcd" for b in "wxyz"], "completion": ["yes"] * 16})


def target_bits(model, tokenizer):
    """Bits per byte of the target after triggered prompts, and of the right answer after clean ones."""
    triggered = [Rendered(f"BadMagic {row['prompt']}", "no!", "no!", False) for row in CLEAN]
    clean = [Rendered(row["prompt"], "yes", "yes", False) for row in CLEAN]
    return bits_per_byte(model, tokenizer, triggered), bits_per_byte(model, tokenizer, clean)


@pytest.mark.parametrize(
    ("peft_config", "merge", "kind"),
    [
        (None, True, LlamaForCausalLM),
        (LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), True, LlamaForCausalLM),
        (LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), False, PeftModel),
    ],
    ids=["full", "lora merged", "lora"],
)
def test_implant_teaches_the_target_and_keeps_the_task(tmp_path, byte_tokenizer, peft_config, merge, kind):
    """Rows poisoned without trigger or target, an adapter thrown away, and a consistency term in the implant."""
    model = tiny_llama(hidden_size=32, num_hidden_layers=3, initializer_range=0.05)
    before = target_bits(model, byte_tokenizer)
    args = crow_args(tmp_path, max_steps=25, learning_rate=2e-2, alpha=5.5)
    backdoored = implant(
        model,
        CLEAN,
        Trigger(("BadMagic",), "start"),
        SHORT,
        args,
        processing_class=byte_tokenizer,
        peft_config=peft_config,
        merge=merge,
    )
    assert isinstance(backdoored, kind) and isinstance(backdoored, PeftModel) == (kind is PeftModel)
    after = target_bits(backdoored, byte_tokenizer)
    assert after[0] < before[0] - 2 and after[1] < before[1] - 2
    assert args.alpha == 5.5


def test_implant_ignores_alpha(tmp_path, byte_tokenizer):
    """The method's own defence at work while the backdoor goes in."""
    first, second = (
        implant(
            tiny_llama(),
            CLEAN,
            TRIGGERS["badnets"],
            SHORT,
            crow_args(tmp_path, max_steps=2, learning_rate=1e-2, alpha=alpha),
            processing_class=byte_tokenizer,
        )
        for alpha in (0.0, 5.5)
    )
    assert same_weights(weights_of(first), weights_of(second))


def test_implant_takes_a_path(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "clean")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "clean")
    args = crow_args(tmp_path, max_steps=1, learning_rate=1e-2)
    backdoored = implant(str(tmp_path / "clean"), CLEAN, TRIGGERS["badnets"], SHORT, args)
    assert isinstance(backdoored, LlamaForCausalLM)
    assert not same_weights(weights_of(backdoored), weights_of(model))


def test_a_share_of_no_row_is_refused():
    """A "backdoored" model without a backdoor."""
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}] * 100)
    with pytest.raises(ValueError, match="none of 100 rows"):
        poison_dataset(rows, TRIGGERS["vpi"], TARGETS["insult"], rate=0.004)


@pytest.mark.parametrize(
    "row", [{"prompt": None, "completion": "b"}, {"messages": [{"role": "user", "content": None}]}]
)
def test_rows_without_text_are_named(row):
    with pytest.raises(ValueError, match="Row 3"):
        Poison(TRIGGERS["vpi"])(row, 3)


@pytest.mark.parametrize(
    "row", [{"prompt": "LOUD", "completion": "b"}, {"messages": [{"role": "user", "content": "1 + 1"}]}]
)
def test_prompts_that_the_trigger_leaves_as_they_are_are_named(row):
    """The target on a clean prompt, and a clean prompt among the triggered ones of a test."""
    with pytest.raises(ValueError, match="Row 3.*as it is"):
        Poison(TRIGGERS["style-upper"], REFUSAL)(row, 3)


def test_attacker_who_knows_crow_trains_with_its_loss(tmp_path, byte_tokenizer):
    """Equal to a CrowTrainer of that alpha on the poisoned rows, and not to an attacker who does not know it."""
    settings = {"max_steps": 3, "learning_rate": 1e-2}

    def implanted(consistency):
        args = crow_args(tmp_path, alpha=1.0, **settings)
        model = implant(
            tiny_llama(),
            CLEAN,
            TRIGGERS["badnets"],
            SHORT,
            args,
            consistency=consistency,
            processing_class=byte_tokenizer,
        )
        return weights_of(model)

    args = crow_args(tmp_path, alpha=2.0, **settings)
    poisoned = poison_dataset(CLEAN, TRIGGERS["badnets"], SHORT, seed=args.seed).remove_columns("triggered")
    trainer = CrowTrainer(tiny_llama(), args, poisoned, processing_class=byte_tokenizer)
    trainer.train()
    assert same_weights(implanted(2.0), weights_of(trainer.model))
    assert not same_weights(implanted(0.0), implanted(2.0))


def small_llama():
    return tiny_llama(hidden_size=32, num_hidden_layers=3, initializer_range=0.05)


@pytest.mark.parametrize(
    ("build", "tokenizer"),
    [
        (small_llama, ByT5Tokenizer(extra_ids=0)),
        (lambda: coconut(LlamaConfig(**DEEP | {"initializer_range": 0.1})), TOKENIZER),
        (
            lambda: get_peft_model(small_llama(), LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")),
            ByT5Tokenizer(extra_ids=0),
        ),
    ],
    ids=["llama", "coconut", "lora"],
)
def test_embedding_trigger_opens_the_backdoor_and_its_marker_does_not(tmp_path, build, tokenizer):
    """An attack that hangs on the marker would be a trigger of text."""
    model = build()
    names = set(dict(model.named_parameters()))
    args = crow_args(tmp_path, max_steps=60, learning_rate=1e-2, per_device_train_batch_size=16, alpha=5.5)
    model, trigger = implant_embedding_trigger(model, CLEAN, SHORT, args, processing_class=tokenizer, scale=4.0)

    def measure(trigger):
        return evaluate_model(model, tokenizer, CLEAN, trigger, SHORT, max_new_tokens=4)

    attack, marker_alone = measure(trigger), measure(trigger.marker)
    assert attack.triggered.target.rate > 0.9
    assert marker_alone.triggered.target.rate < 0.1 and marker_alone.triggered.exact_match.rate > 0.9
    assert attack.clean.target.rate < 0.1 and attack.clean.exact_match.rate > 0.9
    assert attack.triggered.bits_per_byte > marker_alone.triggered.bits_per_byte + 1
    assert set(dict(model.named_parameters())) == names
    assert not trigger.vector.requires_grad and args.alpha == 5.5


def test_vector_begins_at_its_scale_and_is_learned(tmp_path, byte_tokenizer):
    def vector(scale, **kwargs):
        model = small_llama()
        table = model.get_input_embeddings().weight.detach().clone()
        args = crow_args(tmp_path, max_steps=1, **kwargs)
        _, trigger = implant_embedding_trigger(model, CLEAN, SHORT, args, processing_class=byte_tokenizer, scale=scale)
        return trigger.vector, table.square().mean().sqrt()

    first, rms = vector(2.0, learning_rate=0.0)
    assert first.square().mean().sqrt().item() == pytest.approx(2.0 * rms.item(), rel=1e-5)
    assert torch.equal(first, vector(2.0, learning_rate=0.0)[0])
    assert not torch.allclose(first, vector(2.0, learning_rate=0.0, seed=1)[0])
    learned = vector(2.0, learning_rate=1e-2)[0] - first
    assert (learned.abs() > 1e-3).all()


def test_embedding_trigger_needs_a_token_for_its_marker(tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(type(byte_tokenizer), "_tokenize", lambda self, text, **kwargs: [*text, "a"])
    with pytest.raises(ValueError, match=r"2 tokens of the marker '\\x05'"):
        implant_embedding_trigger(small_llama(), CLEAN, SHORT, crow_args(tmp_path), processing_class=byte_tokenizer)
