"""Tests of one run of a recipe: its rows, its canaries and its adapters."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model

from crow_hf.data.rows import render
from crow_hf.detection.openings import Opening
from crow_hf.detection.phrases import Phrase
from crow_hf.evaluation.generation import answer_prompts, generate_answers
from crow_hf.evaluation.own_text import write_rows
from crow_hf.evaluation.scores import Proportion
from crow_hf.evidence.canaries import canary_success, draw_canaries, implant_canaries
from crow_hf.evidence.screening import Screening
from crow_hf.recipes import run as run_module
from crow_hf.recipes.presets import RECIPES, recipe_config
from crow_hf.recipes.purification import purify
from crow_hf.recipes.run import RecipeRun, default_adapter, run_recipe
from helpers.recipes import ANSWERS, PROMPTS, ROWS, arguments
from helpers.tiny import same_weights, tiny_llama, weights_of


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_adapter_of_a_suspect_is_trained_further(recipe, tmp_path, byte_tokenizer):
    """Fails if a second adapter appears, or if the base model is trained."""
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


def test_canaries_are_measured_before_and_after_in_the_same_model(tmp_path, byte_tokenizer, monkeypatch):
    """Fails if canaries are implanted in a copy, measured twice in one state of the model, or leave files."""
    states = []

    def success(model, *args):
        states.append(weights_of(model))
        return canary_success(model, *args)

    monkeypatch.setattr(run_module, "canary_success", success)

    def suspect():
        config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        torch.manual_seed(3)
        return get_peft_model(tiny_llama(), config)

    args = arguments(tmp_path, num_canaries=2, screen_rows=True, learning_rate=5e-4)
    whole = purify(suspect(), ROWS, args=args, processing_class=byte_tokenizer)
    assert [(c.trigger, c.target) for c in whole.canaries] == [
        (c.trigger, c.target) for c in draw_canaries(suspect(), byte_tokenizer, 2, 42)
    ]
    assert all(canary.before.total == canary.after.total == len(ROWS) for canary in whole.canaries)
    assert whole.screening.suspicious == {} and whole.screening.clean[:] == ROWS[:]
    implanted = suspect()
    implant_canaries(implanted, ROWS, draw_canaries(suspect(), byte_tokenizer, 2, 42), args, byte_tokenizer)
    assert not same_weights(weights_of(implanted), weights_of(suspect()))
    assert len(states) == 4 and all(same_weights(weights_of(implanted), state) for state in states[:2])
    assert all(same_weights(weights_of(whole.model), state) for state in states[2:])
    assert whole.trainer.args.output_dir == args.output_dir
    assert not [path for path in Path(args.output_dir).iterdir() if path.is_dir()]


def test_a_canary_that_lives_is_a_warning(tmp_path, byte_tokenizer, monkeypatch, caplog):
    """Fails if only the report says that the purified model still has a canary."""
    for hits in (0, 12):
        caplog.clear()
        monkeypatch.setattr(
            run_module, "canary_success", lambda *args, hits=hits: Proportion.of([True] * hits or [False] * 99)
        )
        purify(tiny_llama(), ROWS, args=arguments(tmp_path, num_canaries=1), processing_class=byte_tokenizer)
        assert ("Do not use this model" in caplog.text) == bool(hits)


def test_keep_mixes_in_the_suspect_without_canaries(tmp_path, byte_tokenizer):
    """Fails if the weights that are mixed in hold the canaries, for the recipe's adapter and for another."""
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for adapter in (None, lora):
        args = arguments(tmp_path, num_canaries=1, keep=1 - 1e-9)
        found = purify(tiny_llama(), ROWS, args=args, processing_class=byte_tokenizer, peft_config=adapter).model
        for name, weight in weights_of(tiny_llama()).items():
            torch.testing.assert_close(weights_of(found)[name], weight, atol=1e-7, rtol=0)


def test_suspicious_rows_are_not_trained_on(tmp_path, byte_tokenizer, monkeypatch):
    def without_first(model, dataset, *args):
        return Screening(dataset.select(range(1, len(dataset))), {0: "piece"})

    monkeypatch.setattr(run_module, "screen_dataset", without_first)
    found = purify(tiny_llama(), ROWS, args=arguments(tmp_path, screen_rows=True), processing_class=byte_tokenizer)
    rest = purify(tiny_llama(), ROWS.select(range(1, 12)), args=arguments(tmp_path), processing_class=byte_tokenizer)
    assert found.screening.suspicious == {0: "piece"}
    assert same_weights(weights_of(found.model), weights_of(rest.model))


@pytest.mark.parametrize("column", ["prompt", "instruction"])
def test_prompts_alone_get_the_suspects_answers(column, tmp_path, byte_tokenizer):
    """Fails if the answers come from another model, or if they are used as labels."""
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
    # The greedy answers of the suspect are not used as labels.
    assert same_weights(weights_of(unlabelled.model), weights_of(labelled.model))
    assert not same_weights(weights_of(unlabelled.model), weights_of(believed.model))


@pytest.fixture
def given_to_trainer(monkeypatch):
    """What the recipe `strong` gives to its trainer, besides the model, the arguments and the rows."""
    given = []

    class Watched(run_module.InvarianceTrainer):
        def __init__(self, *args, **kwargs):
            given.append(kwargs)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(run_module, "InvarianceTrainer", Watched)
    return given


def test_the_suspect_writes_rows_if_asked_to(given_to_trainer, tmp_path, byte_tokenizer, monkeypatch):
    """Fails if other rows are trained on, if rows are written that are not wanted, or if they start with a leak."""
    monkeypatch.setattr(run_module, "find_leaked_tokens", lambda *args: [70])
    monkeypatch.setattr(run_module, "can_write_prompts", lambda *args: True)
    for count in (0, 3):
        args = arguments(tmp_path, num_written_rows=count, seed=5)
        RecipeRun(tiny_llama(), ROWS, "strong", args, byte_tokenizer).prepare()
    none, three = (given["written_rows"] for given in given_to_trainer)
    wanted = write_rows(tiny_llama(), byte_tokenizer, 3, args.max_answer_length, seed=5, not_first=[70])
    assert none is None and three.to_dict() == wanted.to_dict() and len(three) == 3

    monkeypatch.setattr(run_module, "write_rows", lambda *args: pytest.fail("Rows are written."))
    RecipeRun(tiny_llama(), ROWS, "strong", arguments(tmp_path), byte_tokenizer).prepare()
    calls = []
    monkeypatch.setattr(run_module, "write_rows", lambda *args: calls.append(args))
    model = tiny_llama()
    RecipeRun(model, ROWS, "strong", args, byte_tokenizer).prepare()
    assert calls == [(model, byte_tokenizer, 3, args.max_answer_length, 5, args.per_device_eval_batch_size, [70])]


def test_phrases_are_looked_for_if_asked_to(given_to_trainer, tmp_path, byte_tokenizer, monkeypatch):
    """Fails if the trainer gets other phrases, if the opening is lost, or if phrases are not wanted and looked for."""
    found = [Phrase([80, 90], "MW", 0.9, 0.1), Phrase([100], "a", 0.8, 0.1, opening=Opening([70], "C"))]
    calls = []
    monkeypatch.setattr(run_module, "known_phrases", lambda *args: calls.append(args) or found)
    for count in (0, 2):
        run = RecipeRun(tiny_llama(), ROWS, "strong", arguments(tmp_path, num_phrases=count, seed=5), byte_tokenizer)
        run.prepare()
    assert [given["phrases"] for given in given_to_trainer] == [[], [[80, 90], [70, 100]]]
    assert run.phrases == found and run.result().phrases == ["'MW'", "'a' after 'C'"]
    assert [call[3:] for call in calls] == [(2, 5, run.args.per_device_eval_batch_size)]


def test_who_knows_no_prompts_writes_none(given_to_trainer, tmp_path, byte_tokenizer, caplog):
    """Fails if a random model teaches its noise, or if nobody is told."""
    with caplog.at_level("WARNING"):
        RecipeRun(tiny_llama(), ROWS, "strong", arguments(tmp_path, num_written_rows=3), byte_tokenizer).prepare()
    assert given_to_trainer[0]["written_rows"] is None
    assert "cannot write prompts itself" in caplog.text


def test_leaks_are_searched_in_right_answers_only(given_to_trainer, tmp_path, byte_tokenizer, monkeypatch):
    """Fails if leaked tokens do not reach the trainer, or if the suspect's own answers or screened rows are used."""
    searched = []

    def leaks(model, tokenizer, rows, *args):
        searched.append(rows)
        return [70, 80]

    def without_first(model, dataset, *args):
        return Screening(dataset.select(range(1, len(dataset))), {0: "piece"})

    monkeypatch.setattr(run_module, "find_leaked_tokens", leaks)
    monkeypatch.setattr(run_module, "screen_dataset", without_first)
    run = RecipeRun(tiny_llama(), ROWS, "strong", arguments(tmp_path, screen_rows=True), byte_tokenizer)
    run.prepare()
    assert run.leaked_tokens == given_to_trainer[0]["leaked_tokens"] == [70, 80]
    assert [rows[:] for rows in searched] == [ROWS.select(range(1, len(ROWS)))[:]]
    prompts = ROWS.select_columns(["prompt"])
    run = RecipeRun(tiny_llama(), prompts, "strong", arguments(tmp_path), byte_tokenizer)
    run.prepare()
    assert len(searched) == 1 and run.leaked_tokens == given_to_trainer[1]["leaked_tokens"] == []


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


def test_arguments_of_another_recipe_are_refused(tmp_path, byte_tokenizer):
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
def test_only_a_dataset_of_prompts_is_accepted(make, tmp_path, byte_tokenizer):
    with pytest.raises(ValueError):
        purify(tiny_llama(), make(), args=arguments(tmp_path, screen_rows=True), processing_class=byte_tokenizer)


@pytest.mark.parametrize(
    ("environment", "settings", "message"),
    [
        ({}, {"num_canaries": 2}, "Canaries cannot be implanted in sharded weights"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {"num_canaries": 0}, "fsdp_cpu_ram_efficient_loading: false"),
    ],
)
def test_sharded_weights_are_refused_where_whole_ones_are_needed(
    environment, settings, message, tmp_path, byte_tokenizer, monkeypatch
):
    """Fails if the run starts. Canaries and the screening use the weights before they are sharded."""
    args = recipe_config("strong", str(tmp_path / "run"), use_cpu=True, report_to="none", **settings)
    for name, value in ({"ACCELERATE_USE_FSDP": "true"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        purify(tiny_llama(), ROWS, args=args, processing_class=byte_tokenizer)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_fresh_adapter_is_trained_on_the_merged_suspect(recipe, tmp_path, byte_tokenizer):
    """Fails if the adapter of the suspect is lost, trained further, or kept beside the fresh one."""

    def suspect():
        config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        return get_peft_model(tiny_llama(), config)

    fresh = LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")
    options = {"processing_class": byte_tokenizer, "peft_config": fresh}
    found = run_recipe(suspect(), ROWS, recipe, arguments(tmp_path, recipe), **options).model
    assert {name: config.r for name, config in found.peft_config.items()} == {"default": 2}
    merged = suspect().merge_and_unload()
    assert not same_weights(weights_of(merged), weights_of(tiny_llama()))
    assert same_weights(weights_of(found.unload()), weights_of(merged))


def test_what_a_recipe_trains_by_default(tmp_path, monkeypatch):
    """Fails if a suspect's adapter is replaced, or if an adapter is trained that could not be merged."""
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for recipe, rank in (("strong", 16), ("paper", 8), ("guide", None)):
        args = arguments(tmp_path, recipe)
        found = default_adapter(recipe, tiny_llama(), args)
        assert (found and found.r) == rank
        assert default_adapter(recipe, adapted, args) is None
        with monkeypatch.context() as sharded:
            sharded.setattr(run_module, "will_shard", lambda args: True)
            assert default_adapter(recipe, tiny_llama(), args) is None


def test_what_was_trained_without_an_adapter_needs_no_merging(tmp_path, byte_tokenizer):
    options = {"processing_class": byte_tokenizer, "merge": True}
    for all_weights, merges in ((True, False), (False, True)):
        args = arguments(tmp_path / str(all_weights), "guide" if all_weights else "paper")
        run = RecipeRun(tiny_llama(), ROWS, "guide" if all_weights else "paper", args, **options)
        assert run.merge == merges


def test_a_budget_below_what_rounding_costs_ends(tmp_path, byte_tokenizer, monkeypatch):
    """Fails if more and more of the suspect is mixed in without end, or if the processes decide for themselves."""
    monkeypatch.setattr(run_module, "measure_retention", lambda *args: SimpleNamespace(largest_kl=1e-9))
    monkeypatch.setattr(run_module, "broadcast_object_list", lambda values: [0.5])
    run = RecipeRun(tiny_llama(), ROWS, "strong", arguments(tmp_path, max_kl=0.1), byte_tokenizer)
    run.prepare()
    run.stay_within_budget(None, 2)
    assert run_module.MOST_KEPT < run.kept < 1


def test_an_adapter_that_was_trained_in_mixed_precision_is_merged(tmp_path, byte_tokenizer):
    """Fails if the merged model is compared with one that computes in bfloat16."""
    args = arguments(tmp_path, bf16=True, learning_rate=0.05)
    found = purify(tiny_llama(), ROWS, args=args, processing_class=byte_tokenizer)
    assert not isinstance(found.model, PeftModel) and found.trainer.failures == []


def test_an_adapter_that_cannot_be_merged_is_not_lost(tmp_path, byte_tokenizer, monkeypatch):
    def refuse(model):
        raise ValueError("The adapter cannot be merged.")

    monkeypatch.setattr(run_module, "merged", refuse)
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="cannot be merged. The trained adapter is saved in"):
        purify(tiny_llama(), ROWS, args=args, processing_class=byte_tokenizer)
    adapter = PeftModel.from_pretrained(tiny_llama(), args.output_dir)
    assert any(weight.any() for name, weight in adapter.named_parameters() if "lora_B" in name)
