"""Tests of the curriculum of continuous thoughts and of its generated questions."""

import json

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, LlamaConfig, Trainer, TrainingArguments

from crow_hf.methods import thoughts
from crow_hf.methods.thoughts import ThoughtStage, _share_of_right_rows, reachability_rows, train_by_stages
from helpers.coconut import DEEP, TOKENIZER, coconut


def test_stages_by_hand():
    row = {"question": "Q", "steps": ["a", "b"], "answer": "c"}

    def read(**options):
        columns = ThoughtStage(TOKENIZER, **options)(row)
        assert [i for i, label in zip(columns["input_ids"], columns["labels"], strict=True) if label != -100] == [
            label for label in columns["labels"] if label != -100
        ]
        learned = sum(label != -100 for label in columns["labels"])
        ids = columns["input_ids"]
        return TOKENIZER.decode(ids[:-learned]), TOKENIZER.decode(ids[-learned:])

    assert read() == ("<bos>Q\n", "a\nb\n### c<eos>")
    assert read(stage=1) == ("<bos>Q\n<bot><latent><eot>", "b\n### c<eos>")
    assert read(stage=1, thoughts_per_step=2) == ("<bos>Q\n<bot><latent><latent><eot>", "b\n### c<eos>")
    assert read(stage=3) == ("<bos>Q\n<bot><latent><latent><latent><eot>", "### c<eos>")
    assert read(stage=1, drop_rest=True) == ("<bos>Q\n<bot><latent><eot>", "### c<eos>")
    assert read(drop_rest=True) == ("<bos>Q\n", "### c<eos>")
    with pytest.raises(ValueError, match="steps"):
        ThoughtStage(TOKENIZER)({"question": "Q", "steps": None, "answer": "c"})
    with pytest.raises(ValueError, match="stage"):
        ThoughtStage(TOKENIZER, stage=-1)


def test_labels_of_thoughts_by_hand():
    """A thought's label begins its part of the step. Thoughts beyond the last step have none."""
    row = {"question": "Q", "steps": ["ab>cd", "e"], "answer": "f"}

    def read(row=row, **options):
        columns = ThoughtStage(TOKENIZER, label_thoughts=True, **options)(row)
        places = [i for i, token in enumerate(columns["input_ids"]) if TOKENIZER.decode([token]) == "<latent>"]
        plain = ThoughtStage(TOKENIZER, **options)(row)
        others = [i for i in range(len(plain["labels"])) if i not in places]
        assert columns["input_ids"] == plain["input_ids"]
        assert [columns["labels"][i] for i in others] == [plain["labels"][i] for i in others]
        return [columns["labels"][i] for i in places]

    assert read() == []
    assert TOKENIZER.decode(read(stage=1)) == "a"
    assert TOKENIZER.decode(read(stage=1, thoughts_per_step=2)) == "ac"
    assert TOKENIZER.decode(read(stage=2, thoughts_per_step=3, drop_rest=True)) == "a>deee"
    assert read(stage=3) == [*TOKENIZER("ae", add_special_tokens=False)["input_ids"], -100]
    assert read(row | {"steps": ["", "a"]}, stage=1) == [-100]
    assert read(row | {"steps": []}, stage=1, thoughts_per_step=2) == [-100, -100]


def test_questions_have_exactly_one_right_answer():
    """Only the right node can be reached, and the steps lead to it."""
    rows = reachability_rows(200, seed=0, num_nodes=9, steps=(2, 3))
    for row in rows:
        *edges, query = row["question"].rstrip("?").split(" ")
        root, _, choices = query.partition(":")
        reached, edges = {root}, [tuple(edge.split(">")) for edge in edges]
        for _ in edges:
            reached |= {b for a, b in edges if a in reached}
        assert [choice in reached for choice in sorted(choices.split("|"), key=row["answer"].__ne__)] == [True, False]
        path = [step.split(">") for step in row["steps"]]
        assert path[0][0] == root and path[-1][1] == row["answer"] and all(tuple(step) in edges for step in path)
        assert all(a[1] == b[0] for a, b in zip(path, path[1:], strict=False))
        assert len({node[0] for edge in edges for node in edge}) == 9
    assert len(set(rows["question"])) == 200
    assert reachability_rows(3, seed=5)["question"] == reachability_rows(3, seed=5)["question"]
    with pytest.raises(ValueError, match="num_nodes"):
        reachability_rows(1, seed=0, num_nodes=4, steps=(3,))
    with pytest.raises(ValueError, match="20 nodes"):
        reachability_rows(1, seed=0, num_nodes=21)


ROWS = reachability_rows(8, seed=0, num_nodes=6, steps=(2,))


def thinker(seed=0):
    return coconut(LlamaConfig(**DEEP | {"initializer_range": 0.1, "max_position_embeddings": 512}), seed=seed)


def arguments(folder, **options):
    options = {"max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True} | options
    return TrainingArguments(str(folder), **options)


def steps_of(folder):
    files = sorted(folder.glob("stage-*/trainer_state.json"))
    return [json.loads(file.read_text())["global_step"] for file in files]


def test_the_curriculum_trains_each_stage_once(tmp_path):
    """Each stage is trained and saved. A second call loads it instead of training again."""
    model = thinker()
    before = model.lm_head.weight.detach().clone()
    train_by_stages(model, arguments(tmp_path), ROWS, ROWS, TOKENIZER, num_stages=2)
    assert steps_of(tmp_path) == [1, 1, 1, 1]
    assert not torch.equal(model.lm_head.weight, before)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    fresh = thinker(seed=1)
    train_by_stages(fresh, arguments(tmp_path), ROWS, ROWS, TOKENIZER, num_stages=2)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
    with pytest.raises(ValueError, match="10 thoughts"):
        train_by_stages(fresh, arguments(tmp_path), ROWS, ROWS, TOKENIZER, num_stages=5, thoughts_per_step=2)


def test_a_stage_ends_when_it_is_learned(tmp_path, caplog):
    """One row is learned by heart long before the last step, and the stage after it is learned from the start."""
    row, model = ROWS.select([0]), thinker()
    args = arguments(tmp_path, max_steps=400, eval_strategy="steps", eval_steps=10, learning_rate=5e-3)
    train_by_stages(model, args, row, row, TOKENIZER, num_stages=2)
    first, *_, last = steps_of(tmp_path)
    assert 0 < first < 400 and first % 10 == 0 and last == 0
    labels = ThoughtStage(TOKENIZER, 2, drop_rest=True)(row[0])
    ids = torch.tensor([labels["input_ids"]])
    learned = sum(label != -100 for label in labels["labels"])
    assert torch.equal(model.eval()(ids).logits[0, -learned - 1 : -1].argmax(-1), ids[0, -learned:])


def test_labels_of_thoughts_are_learned_but_not_counted(tmp_path, monkeypatch):
    """Training rows have them. Whether a stage ends is up to the text, so held-out rows do not."""
    seen = []

    class Watched(Trainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            seen.append([rows[0]["labels"].count(-100) for rows in (self.eval_dataset, self.train_dataset)])

    monkeypatch.setattr(thoughts, "Trainer", Watched)
    train_by_stages(thinker(), arguments(tmp_path), ROWS, ROWS, TOKENIZER, num_stages=2, label_thoughts=True)
    assert [unlabelled - labelled for unlabelled, labelled in seen] == [0, 1, 2, 2]


def test_rows_are_right_to_the_last_byte():
    labels = np.array([[-100, 5, 6, 7], [-100, -100, 6, -100]])
    predicted = np.array([[5, 6, 7, 0], [0, 6, 0, 0]])
    assert _share_of_right_rows(EvalPrediction(predicted, labels)) == {"accuracy": 1.0}
    predicted[0, 2] = 8
    assert _share_of_right_rows(EvalPrediction(predicted, labels)) == {"accuracy": 0.5}
