"""purify(): each recipe from end to end on tiny models."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import ByT5Tokenizer, LlamaForCausalLM

from crow_hf import CrowConfig, CrowTrainer
from crow_hf.data.rows import render
from crow_hf.evaluation.generation import answer_prompts, generate_answers
from crow_hf.evaluation.scores import Proportion
from crow_hf.evidence.canaries import canary_success, draw_canaries, implant_canaries
from crow_hf.evidence.result import Purification
from crow_hf.methods.invariance.config import InvarianceConfig
from crow_hf.methods.invariance.trainer import InvarianceTrainer
from crow_hf.recipes import run as run_module
from crow_hf.recipes.presets import RECIPES, recipe_config
from crow_hf.recipes.purification import purify
from helpers.tiny import same_weights, tiny_llama, weights_of


PROMPTS = [f"tell {a} of thing {b}=" for a in "abc" for b in "wxyz"]
ANSWERS = [f"{a}{b}" for a in "abc" for b in "wxyz"]
ROWS = Dataset.from_dict({"prompt": PROMPTS, "completion": ANSWERS})
QUIET = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
}
STRONG = {"num_views": 12, "num_canaries": 0, "screen_rows": False, "max_answer_length": 4}


def arguments(tmp_path, recipe="strong", **kwargs):
    """Of a run with a folder of its own: no report is written over another."""
    settings = QUIET | (STRONG if recipe == "strong" else {}) | kwargs
    return recipe_config(recipe, str(tmp_path / f"run{len(list(tmp_path.glob('run*')))}"), **settings)


@pytest.fixture
def saved(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "suspect")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "suspect")
    return tmp_path / "suspect"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_path_and_an_object_give_the_same(recipe, saved, tmp_path, byte_tokenizer):
    """A recipe that is not run, a suspect that is not the one at the path, and a tokenizer of another."""
    by_path = purify(str(saved), ROWS, recipe, arguments(tmp_path, recipe))
    by_object = purify(tiny_llama(), ROWS, recipe, arguments(tmp_path, recipe), processing_class=byte_tokenizer)
    assert isinstance(by_path, Purification) and by_path.recipe == recipe and by_path.canaries == []
    assert same_weights(weights_of(by_path.model), weights_of(by_object.model))
    assert by_path.model is by_path.trainer.model and by_path.screening is None
    assert type(by_path.trainer) is (InvarianceTrainer if recipe == "strong" else CrowTrainer)
    assert type(by_path.model) is LlamaForCausalLM
    assert not same_weights(weights_of(tiny_llama()), weights_of(by_path.model))


def test_paper_is_crow_as_published(tmp_path, byte_tokenizer):
    """Section 4.4: LoRA of rank 8 on all linear layers, 5 epochs in batches of 8 at 1e-3, cosine, a tenth of warm-up."""
    args = recipe_config("paper", str(tmp_path / "run"), use_cpu=True, report_to="none", save_strategy="no")
    found = (args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size, args.alpha, args.epsilon)
    assert found == (1e-3, 5, 8, 5.5, 0.1)
    assert args.lr_scheduler_type == "cosine" and args.warmup_steps == 0.1
    assert args.consistency_layers == "paper" and args.epsilon_mode == "absolute"
    trainer = purify(tiny_llama(), ROWS, "paper", args, processing_class=byte_tokenizer, merge=False).trainer
    assert trainer.state.max_steps == 10
    adapter = trainer.model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha) == (8, 16)
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"} == set(adapter.target_modules)


def test_settings_of_the_recipes(tmp_path):
    path = str(tmp_path)
    assert type(recipe_config("strong", path, use_cpu=True)) is InvarianceConfig
    assert type(recipe_config("paper", path, use_cpu=True)) is CrowConfig
    guide, default = recipe_config("guide", path, use_cpu=True), CrowConfig(path, use_cpu=True)
    for name in (
        "learning_rate",
        "num_train_epochs",
        "per_device_train_batch_size",
        "alpha",
        "epsilon",
        "warmup_steps",
    ):
        assert getattr(guide, name) == getattr(default, name)
    changed = [recipe_config(recipe, path, use_cpu=True, learning_rate=3e-4, alpha=1.0) for recipe in RECIPES]
    assert all(args.learning_rate == 3e-4 and args.alpha == 1.0 and args.output_dir == path for args in changed)
    strong = recipe_config("strong", path, use_cpu=True)
    assert (
        strong.screen_rows
        and strong.num_canaries == 2
        and strong.keep == 0.3
        and strong.label_weight == 1
        and strong.alpha == 0
    )


def test_strong_is_an_invariance_trainer(tmp_path, byte_tokenizer):
    found = purify(tiny_llama(), ROWS, args=arguments(tmp_path, keep=0.2), processing_class=byte_tokenizer)
    trainer = InvarianceTrainer(tiny_llama(), arguments(tmp_path, keep=0.2), ROWS, byte_tokenizer)
    trainer.train()
    assert same_weights(weights_of(found.model), weights_of(trainer.model))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_adapter_of_a_suspect_is_trained_on(recipe, tmp_path, byte_tokenizer):
    """A second adapter, or a trained base."""
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny_llama(), adapter)
    before = weights_of(model)
    found = purify(model, ROWS, recipe, arguments(tmp_path, recipe), processing_class=byte_tokenizer)
    assert found.model is model and list(model.peft_config) == ["default"]
    for name, value in weights_of(model).items():
        assert value.equal(before[name]) == ("lora_" not in name), name


def test_a_fresh_adapter_leaves_the_weights_alone(tmp_path, byte_tokenizer):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    options = {"processing_class": byte_tokenizer, "peft_config": config, "merge": False}
    found = purify(tiny_llama(), ROWS, args=arguments(tmp_path), **options).model
    assert isinstance(found, PeftModel) and found.peft_config["default"].r == 4
    assert same_weights(weights_of(tiny_llama()), weights_of(found.unload()))


def test_canaries_are_put_in_first_and_measured_in_the_model_one_gets(tmp_path, byte_tokenizer, monkeypatch):
    """Canaries of a copy, which say nothing of the model that comes out; measured in one model twice; or files of theirs."""
    looks = []

    def success(model, *args):
        looks.append(weights_of(model))
        return canary_success(model, *args)

    monkeypatch.setattr(run_module, "canary_success", success)
    args = arguments(tmp_path, num_canaries=2, screen_rows=True)
    whole = purify(tiny_llama(), ROWS, args=args, processing_class=byte_tokenizer)
    assert [(c.trigger, c.target) for c in whole.canaries] == [
        (c.trigger, c.target) for c in draw_canaries(tiny_llama(), 2, 42)
    ]
    assert all(canary.before.total == canary.after.total == len(ROWS) for canary in whole.canaries)
    assert whole.screening.suspicious == {} and whole.screening.clean[:] == ROWS[:]
    implanted = tiny_llama()
    implant_canaries(implanted, ROWS, draw_canaries(tiny_llama(), 2, 42), args, byte_tokenizer)
    assert len(looks) == 4 and all(same_weights(weights_of(implanted), look) for look in looks[:2])
    assert all(same_weights(weights_of(whole.model), look) for look in looks[2:])
    assert whole.trainer.args.output_dir == args.output_dir
    assert not [path for path in Path(args.output_dir).iterdir() if path.is_dir()]


def test_a_canary_that_lives_is_a_warning(tmp_path, byte_tokenizer, monkeypatch, caplog):
    """The model that one gets has a backdoor: whoever looks at no report must hear of it too."""
    for hits in (0, 12):
        caplog.clear()
        monkeypatch.setattr(
            run_module, "canary_success", lambda *args, hits=hits: Proportion.of([True] * hits or [False] * 99)
        )
        purify(tiny_llama(), ROWS, args=arguments(tmp_path, num_canaries=1), processing_class=byte_tokenizer)
        assert ("Do not use this model" in caplog.text) == bool(hits)


def test_the_suspect_without_canaries_is_what_the_model_goes_back_to(tmp_path, byte_tokenizer):
    """A share of the suspect kept that has the canaries in it, for weights and for a fresh adapter."""
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for adapter in (None, lora):
        args = arguments(tmp_path, num_canaries=1, keep=1 - 1e-9)
        found = purify(tiny_llama(), ROWS, args=args, processing_class=byte_tokenizer, peft_config=adapter).model
        for name, weight in weights_of(tiny_llama()).items():
            torch.testing.assert_close(weights_of(found)[name], weight, atol=1e-7, rtol=0)


def test_suspicious_rows_are_not_trained_on(tmp_path, byte_tokenizer, monkeypatch):
    from crow_hf.evidence.screening import Screening

    def without_first(model, dataset, *args):
        return Screening(dataset.select(range(1, len(dataset))), {0: "piece"})

    monkeypatch.setattr(run_module, "screen_dataset", without_first)
    found = purify(tiny_llama(), ROWS, args=arguments(tmp_path, screen_rows=True), processing_class=byte_tokenizer)
    rest = purify(tiny_llama(), ROWS.select(range(1, 12)), args=arguments(tmp_path), processing_class=byte_tokenizer)
    assert found.screening.suspicious == {0: "piece"}
    assert same_weights(weights_of(found.model), weights_of(rest.model))


@pytest.mark.parametrize("column", ["prompt", "instruction"])
def test_prompts_alone_get_the_suspects_answers(column, tmp_path, byte_tokenizer):
    """Answers of another model, with the target's prompt cut off, or no answers at all."""
    rows = Dataset.from_dict({column: PROMPTS})
    answer = {"prompt": "completion", "instruction": "output"}[column]
    found = answer_prompts(rows, tiny_llama(), byte_tokenizer, 4)
    rendered = [render({column: prompt, answer: ""}, byte_tokenizer) for prompt in PROMPTS]
    assert found[answer][:] == generate_answers(tiny_llama(), byte_tokenizer, rendered, 4)
    assert answer_prompts(found, tiny_llama(1), byte_tokenizer, 4) is found
    unlabelled, labelled, believed = (
        purify(tiny_llama(), given, args=arguments(tmp_path, label_weight=share), processing_class=byte_tokenizer)
        for given, share in ((rows, 1.0), (found, 0.0), (found, 1.0))
    )
    # Its own greedy answers are no labels.
    assert same_weights(weights_of(unlabelled.model), weights_of(labelled.model))
    assert not same_weights(weights_of(unlabelled.model), weights_of(believed.model))


CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("row_format", ["alpaca", "messages"])
def test_other_formats(row_format, tmp_path, byte_tokenizer):
    pairs = list(zip(PROMPTS, ANSWERS, strict=True))
    if row_format == "messages":
        byte_tokenizer.chat_template = CHAT
        rows = [[{"role": "user", "content": p}, {"role": "assistant", "content": a}] for p, a in pairs]
        rows = Dataset.from_dict({"messages": rows})
    else:
        rows = Dataset.from_list([{"instruction": p, "input": "", "output": a} for p, a in pairs])
    args = arguments(tmp_path, num_canaries=1, screen_rows=True)
    found = purify(tiny_llama(), rows, args=args, processing_class=byte_tokenizer)
    assert len(found.canaries) == 1 and len(found.screening.clean) == 12
    assert not same_weights(weights_of(tiny_llama()), weights_of(found.model))


def test_what_does_not_go_together_is_refused(tmp_path, byte_tokenizer):
    for recipe, other in (("strong", "paper"), ("paper", "strong"), ("guide", "strong"), ("none", "guide")):
        with pytest.raises(ValueError, match=f"{recipe!r} does not go with") as error:
            purify(tiny_llama(), ROWS, recipe, arguments(tmp_path, other), processing_class=byte_tokenizer)
        assert "\n" not in str(error.value)
    for call in (lambda: recipe_config("none", str(tmp_path)), lambda: purify(tiny_llama(), ROWS, "none")):
        with pytest.raises(ValueError, match="strong, paper, guide, got 'none'"):
            call()


def test_a_peft_suspect_with_canaries(tmp_path, byte_tokenizer):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    found = purify(model, ROWS, args=arguments(tmp_path, num_canaries=1), processing_class=byte_tokenizer)
    assert len(found.canaries) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: ROWS.to_iterable_dataset(),
        lambda: list(ROWS),
        lambda: ROWS.select([]),
        lambda: Dataset.from_dict({"text": ["a b"]}),
    ],
    ids=["stream", "list", "empty", "text"],
)
def test_what_is_no_dataset_of_prompts_is_refused(make, tmp_path, byte_tokenizer):
    with pytest.raises(ValueError):
        purify(tiny_llama(), make(), args=arguments(tmp_path, screen_rows=True), processing_class=byte_tokenizer)


def test_an_output_directory_in_use_is_refused_at_once(tmp_path, byte_tokenizer, monkeypatch):
    tried = []
    monkeypatch.setattr(run_module, "draw_canaries", lambda *args: tried.append(1) or [])
    args = arguments(tmp_path, num_canaries=1)
    Path(args.output_dir).mkdir()
    for name in ("model.safetensors", "report.json"):
        file = Path(args.output_dir) / name
        file.touch()
        with pytest.raises(ValueError, match="output_dir"):
            purify(tiny_llama(), ROWS, args=args, processing_class=byte_tokenizer)
        file.unlink()
    assert not tried


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="processing_class"):
        purify(tiny_llama(), ROWS, args=arguments(tmp_path))
