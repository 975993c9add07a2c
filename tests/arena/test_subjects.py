"""The arena's subjects: the rows of their tasks, and the one that reasons in continuous thoughts."""

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from crow_hf.arena import subjects
from crow_hf.arena.subjects import (
    SUBJECTS,
    Subject,
    arena_reasoner,
    arena_rows,
    check_disjoint,
    other_thoughts,
    reasoning_rows,
    thought_rows,
    train_base_model,
)
from crow_hf.data.encoding import encode
from crow_hf.data.rows import render
from crow_hf.demo import demo_tokenizer
from crow_hf.evaluation.harness import evaluate_model
from crow_hf.methods.thoughts import ThoughtStage
from crow_hf.training.loading import load_causal_lm


@pytest.mark.parametrize("draw", [arena_rows, thought_rows])
def test_rows_are_the_same_for_a_seed(draw):
    assert draw(30, 3).to_list() == draw(30, 3).to_list() != draw(30, 4).to_list()


def test_thought_rows_are_the_last_stage_of_the_curriculum():
    """Fails if the suspect and the defender would train on other tokens than those that taught the subject."""
    tokenizer = demo_tokenizer()
    stage = ThoughtStage(tokenizer, subjects.NUM_STEPS, subjects.THOUGHTS_PER_STEP, drop_rest=True)
    questions = reasoning_rows(40, 3)
    for row, question in zip(thought_rows(40, 3), questions, strict=True):
        encoded = encode(render(row, tokenizer), tokenizer)
        assert encoded.prompt + encoded.completion == stage(question)["input_ids"]
        assert len(question["steps"]) == subjects.NUM_STEPS
    # Four edges and the question itself.
    needless = [len(question.split(" ")) > 5 for question in questions["question"]]
    assert 8 < sum(needless) < 32


def test_other_thoughts_are_those_of_the_row_before():
    """Fails if a row keeps its own thoughts, if the thoughts are not another row's, or if they stay exchanged."""
    torch.manual_seed(0)
    model, tokenizer = arena_reasoner().eval(), demo_tokenizer()
    rows = thought_rows(3, 0)["prompt"]

    @torch.no_grad()
    def answer(*prompts):
        """The logits after the prompt, and what stood in the place of each thought."""
        seen = []
        thoughts = model.get_submodule("model.latent_transformer.thoughts")
        handle = thoughts.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        batch = tokenizer.pad(
            {"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]}, return_tensors="pt"
        )
        logits = model(**batch).logits[:, -1]
        handle.remove()
        return logits, seen

    own, _ = answer(*rows)
    with other_thoughts(model):
        foreign, seen = answer(*rows)
        alone, _ = answer(rows[0])
    assert len(seen) == 4 and all(torch.equal(used, computed[[2, 0, 1]]) for computed, used in seen)
    assert ((foreign - own).abs().amax(dim=1) > 1e-3).all()
    torch.testing.assert_close(alone, own[:1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(answer(*rows)[0], own)


def test_the_subject_that_reasons_goes_through_the_curriculum(tmp_path, monkeypatch):
    """Fails if a stage is left out, if another model than the last stage's is saved, or if it is trained twice."""
    monkeypatch.setattr(subjects, "REASONING_HELD_OUT", 4)
    # The first of two steps has the rate 0, as warmup begins.
    small = Subject("small", arena_reasoner, batch_size=8, num_rows=16, rows=thought_rows, reasons=True)
    monkeypatch.setitem(SUBJECTS, "small", small)
    train_base_model("small", tmp_path)
    folder = tmp_path / "bases" / "small"
    saved = load_file(folder / "model.safetensors")
    stages = [load_file(path) for path in sorted(folder.glob("stages/stage-*/model.safetensors"))]
    assert len(stages) == subjects.NUM_STEPS + 2
    assert [all(torch.equal(stage[name], saved[name]) for name in saved) for stage in stages] == [0, 0, 0, 1]
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    train_base_model("small", tmp_path)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert len(load_causal_lm(folder).generate(torch.tensor([[1, 70]]), max_new_tokens=2)[0]) > 2


@pytest.mark.slow
def test_the_subject_reasons(tmp_path):
    """Fails if the answers do not go through the thoughts. One of two nodes is right, so chance is a half."""
    train_base_model("coconut-thoughts", tmp_path)
    model = load_causal_lm(tmp_path / "bases" / "coconut-thoughts")
    options = {"max_new_tokens": 12, "batch_size": 100}
    own = evaluate_model(model, demo_tokenizer(), thought_rows(300, 12_345), **options).clean.exact_match
    with other_thoughts(model):
        other = evaluate_model(model, demo_tokenizer(), thought_rows(300, 12_345), **options).clean.exact_match
    assert own.low > 0.85 and other.high < 0.7


def test_shared_prompts_are_refused(byte_tokenizer):
    """An unreadable row is named too."""
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["x", "y"]})
    other = Dataset.from_dict({"prompt": ["c", "b"], "completion": ["x", "z"]})
    check_disjoint({"train": rows, "test": other.select([0])}, byte_tokenizer)
    with pytest.raises(ValueError, match="The train and the test rows share the prompt 'b'"):
        check_disjoint({"train": rows, "test": other}, byte_tokenizer)
    with pytest.raises(ValueError, match="^Row 1 holds NoneType"):
        check_disjoint({"train": Dataset.from_dict({"prompt": ["a", None], "completion": ["x", "y"]})}, byte_tokenizer)
