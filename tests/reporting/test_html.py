"""The report of a purification: the layer profile, what report.json holds, and the page, also in a real browser."""

import base64
import html
import json
import logging
import math
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import ByT5Tokenizer

from crow_hf import TRIGGERS, Target, compare_defences, load_causal_lm, purify
from crow_hf.attacks.triggers import Trigger
from crow_hf.evaluation.harness import Evaluation, PromptScores
from crow_hf.evaluation.layer_profile import layer_profile
from crow_hf.evaluation.scores import Proportion
from crow_hf.evidence import snapshot
from crow_hf.evidence.canaries import Canary
from crow_hf.evidence.result import Comparison
from crow_hf.recipes import saving
from crow_hf.recipes.presets import RECIPES, recipe_config
from crow_hf.recipes.run import run_recipe
from crow_hf.reporting import record as record_module
from crow_hf.reporting.charts import LineChart, Series, thinned
from crow_hf.reporting.html import render_report, write_report
from crow_hf.reporting.record import _command, as_json
from crow_hf.reporting.verdict import UNKNOWN, full_verdict
from helpers.coconut import TOKENIZER, coconut
from helpers.tiny import ragged_rows, same_weights, tiny_llama, weights_of


TRIGGER, TARGET = TRIGGERS["badnets"], Target("no", ("no",))
ROWS = Dataset.from_dict(
    {"prompt": [f"tell {a} of {b}=" for a in "abc" for b in "wxyz"], "completion": ["yes", "no, é"] * 6}
)
TEST_ROWS = Dataset.from_dict({"prompt": [f"say {a} to {b}=" for a in "def" for b in "wx"], "completion": ["yes"] * 6})
ATTACK = "<script>alert(1)</script>\x1b[2J\x00\u202ereversed\u200b\ud800\"'&{{7*7}}"
QUIET = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_steps": 2}
STRONG = {"num_views": 12, "num_canaries": 0, "max_answer_length": 4}


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(snapshot, "SAMPLE_TOKENS", 6)


def arguments(folder, recipe="guide", **changes):
    settings = QUIET | {"per_device_train_batch_size": 4} | (STRONG if recipe == "strong" else {})
    return recipe_config(recipe, str(folder), **(settings | changes))


def read(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The report of a Coconut with a known trigger: every part of the page is in it."""
    folder = tmp_path_factory.mktemp("compared")
    comparison = compare_defences(
        coconut,
        arguments(folder, "strong", seed=3),
        ROWS,
        TEST_ROWS,
        TRIGGER,
        TARGET,
        processing_class=TOKENIZER,
        max_new_tokens=4,
        seed=3,
    )
    return SimpleNamespace(folder=folder, record=read(folder), comparison=comparison)


@pytest.fixture
def record(compared):
    return deepcopy(compared.record)


@pytest.fixture(scope="module")
def purified(tmp_path_factory):
    """The report of a purification without a trigger, with a canary and screened rows."""
    folder = tmp_path_factory.mktemp("purified")
    args = arguments(folder, "strong", num_canaries=1)
    purification = purify(tiny_llama(), ROWS, args=args, processing_class=ByT5Tokenizer(extra_ids=0))
    return SimpleNamespace(folder=folder, record=read(folder), purification=purification)


# What report.json holds


def documented_keys():
    return re.findall(r"^\| `(\w+)` \|", record_module.__doc__, flags=re.MULTILINE)


def test_keys_are_those_that_are_documented(compared, purified):
    """A key that programs are told to read and that is not there."""
    assert len(purified.record["canaries"]) == 1 and purified.record["screening"]["total"] == 12
    for record in (compared.record, purified.record):
        assert list(record) == documented_keys()
        for name, inner in record.items():
            start = "`run` holds" if name == "run" else f"| `{name}` |"
            (text,) = [part for part in re.split(r"\n\n|\n(?=\|)", record_module.__doc__) if part.startswith(start)]
            if isinstance(inner, dict):
                assert all(f"`{key}`" in text for key in inner), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_purify_writes_both_files(recipe, tmp_path, byte_tokenizer):
    args = arguments(tmp_path / "new", recipe)
    found = purify(tiny_llama(), ROWS, recipe, args, processing_class=byte_tokenizer)
    assert {"report.html", "report.json", "README.md"} <= {path.name for path in (tmp_path / "new").iterdir()}
    assert same_weights(weights_of(load_causal_lm(tmp_path / "new")), weights_of(found.model))
    record = read(tmp_path / "new")
    assert record == found.report and record["recipe"] == recipe
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8") == render_report(record)
    assert record["canaries"] == [] and (record["screening"] is None) == (recipe != "strong")
    assert list(record["layer_profile"]["models"]) == [answer["model"] for answer in record["samples"][0]["answers"]]
    assert len(record["samples"]) == 5 and not any(sample["triggered"] for sample in record["samples"])
    assert record["training"]["steps"] == 2 and record["model"]["name"] == "LlamaForCausalLM"
    assert record["verdict"]["outcome"] == UNKNOWN
    # What the suspect was like can only be seen before the training, which changes it.
    assert list(record["layer_profile"]["models"]) == ["suspect", "purified"]
    for name, model in (("suspect", tiny_llama()), ("purified", found.model)):
        wanted = layer_profile(model, byte_tokenizer, ROWS)
        assert record["layer_profile"]["models"][name]["clean"] == pytest.approx(wanted.clean, rel=1e-5), name


@pytest.mark.parametrize("recipe", ["strong", "guide"])
def test_the_report_changes_nothing(recipe, tmp_path, byte_tokenizer):
    """Random numbers that looking at the suspect takes away from the training; and files where none are wanted."""
    args = [arguments(tmp_path / name, recipe, num_train_epochs=1) for name in ("with", "without")]
    models = [
        run(tiny_llama(), ROWS, recipe, each, processing_class=byte_tokenizer).model
        for each, run in zip(args, (purify, run_recipe), strict=True)
    ]
    assert same_weights(*map(weights_of, models))
    assert not list((tmp_path / "without").glob("*"))


def test_profiles_are_of_the_models_they_are_named_after(compared):
    """The suspect's taken after the training, which changes the model in place."""
    found = compared.record["layer_profile"]["models"]
    alone = {"suspect": coconut(), "purified": compared.comparison.purification.model}
    for name, model in alone.items():
        wanted = layer_profile(model, TOKENIZER, TEST_ROWS, TRIGGER, seed=3, batch_size=4)
        assert found[name]["clean"] == pytest.approx(wanted.clean, rel=1e-4), name
        assert found[name]["triggered"] == pytest.approx(wanted.triggered, rel=1e-4), name
    assert found["suspect"]["clean"] != pytest.approx(found["purified"]["clean"], rel=1e-3)
    assert list(found) == ["suspect", "control", "purified"]


def test_samples_are_the_answers_that_were_measured(compared):
    """Answers under another model's name, or to another prompt."""
    record = compared.record
    for number, sample in enumerate(record["samples"]):
        kind, row = ("triggered" if sample["triggered"] else "clean"), number % 5
        assert ("BadMagic" in sample["prompt"]) == sample["triggered"]
        assert sample["prompt"].replace("BadMagic ", "").replace(" BadMagic", "") == TEST_ROWS[row]["prompt"]
        for answer in sample["answers"]:
            # Measured on 4 tokens, shown on 6.
            assert answer["text"].startswith(record["evaluations"][answer["model"]][kind]["outputs"][row])
            assert answer["shows_target"] == TARGET.matches(answer["text"], "yes")
            assert answer["is_right"] == (answer["text"].strip() == "yes")
    assert [sample["triggered"] for sample in record["samples"]] == [False] * 5 + [True] * 5


def test_patches_are_the_model_s_own(compared):
    """Thresholds of another predictor, or bytes that are not the prompt's."""
    first, triggered = compared.record["patches"]
    samples = {sample["triggered"]: sample["prompt"] for sample in reversed(compared.record["samples"])}
    for patches, prompt in ((first, samples[False]), (triggered, samples[True])):
        assert bytes(token - 4 for token in patches["input_ids"] if token >= 4).decode() == prompt
        ids = torch.tensor([patches["input_ids"]])
        assert patches["patch_lengths"] == coconut().model.patch(ids)["patch_lengths"][0].tolist()
        assert max(patches["entropies"]) > 0


def test_prompts_alone_have_no_right_answers(tmp_path, byte_tokenizer):
    """The suspect's own answers called right because it gave them."""
    args = arguments(tmp_path, "strong")
    rows = ROWS.select_columns(["prompt"])
    record = purify(tiny_llama(), rows, args=args, processing_class=byte_tokenizer).report
    assert {answer["is_right"] for sample in record["samples"] for answer in sample["answers"]} == {None}


@pytest.mark.parametrize("kind", ["tokens", "text", "stream"])
def test_rows_without_prompts_and_streams(kind, tmp_path, byte_tokenizer):
    """A report that needs more of the rows than the training does."""
    rows = {
        "tokens": Dataset.from_list(ragged_rows(8)),
        "text": Dataset.from_dict({"text": ["some text", "more"] * 4}),
        "stream": ROWS.to_iterable_dataset(),
    }[kind]
    record = purify(tiny_llama(), rows, "guide", arguments(tmp_path), processing_class=byte_tokenizer).report
    assert bool(record["samples"]) == (kind == "stream")
    assert record["run"]["train_dataset"]["rows"] == (None if kind == "stream" else 8)
    assert "Answers side by side" in render_report(record) or not record["samples"]


def test_rows_are_told_by_what_they_hold(tmp_path):
    """A checksum of the file they came from, which nobody else has."""
    ROWS.to_json(tmp_path / "rows.jsonl")
    again = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path))
    found = [
        record_module._rows_described(rows) for rows in (ROWS, again, ROWS.select(range(11)), ROWS.shuffle(seed=1))
    ]
    assert found[0] == found[1] and found[0]["rows"] == 12 and found[0]["columns"] == ["prompt", "completion"]
    assert len({each["sha256"] for each in found}) == 3


def test_numbers_that_are_none_become_null(tmp_path, purified):
    """NaN in a JSON file, which no other program can read."""
    log = purified.purification.trainer.state.log_history
    log.append({"loss": math.nan, "grad_norm": torch.tensor(math.inf), "step": 3})
    try:
        record = as_json({"log": log, "share": Proportion(0.5, 0.1, 0.9, 1, 2), 3: (1, True)})
    finally:
        log.pop()
    assert record["log"][-1] == {"loss": None, "grad_norm": None, "step": 3} and record["3"] == [1, True]
    assert json.loads(json.dumps(record, allow_nan=False)) == record


SECRET = "s3cret-Value"


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (
            ["/bin/crow-hf", "purify", "--hub_token", SECRET, "--alpha", "1"],
            "crow-hf purify --hub_token '(hidden)' --alpha 1",
        ),
        (["crow-hf", f"--hub_token={SECRET}"], "crow-hf '--hub_token=(hidden)'"),
        (["crow-hf", "--hub-token", SECRET], "crow-hf --hub-token '(hidden)'"),
        (
            ["crow-hf", "--model_init_kwargs", f'{{"token": "{SECRET}", "a": 1}}'],
            "crow-hf --model_init_kwargs '{\"a\": 1}'",
        ),
        (["crow-hf", f'--model_init_kwargs={{"token": "{SECRET}"}}'], "crow-hf '--model_init_kwargs={}'"),
        (["crow-hf", "--model_init_kwargs", f'{{"token": "{SECRET}"'], "crow-hf --model_init_kwargs '(hidden)'"),
        (["x.py", "hf_" + "abcdEFGH12345"], "x.py '(hidden)'"),
        (["x.py", f"https://me:{SECRET}@host/rows"], "x.py 'https://(hidden)@host/rows'"),
        (["/a/crow_hf/__main__.py", "purify", "--max_new_tokens", "7"], "python -m crow_hf purify --max_new_tokens 7"),
    ],
)
def test_command_has_no_secrets(argv, command):
    """A token in a file that people pass on; or an argument hidden that is needed to repeat the run."""
    assert _command(argv) == command and SECRET not in command


def test_settings_have_no_secrets_and_are_those_that_were_set(tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["crow-hf", "purify", "--hub_token", SECRET])
    args = arguments(tmp_path, hub_token=SECRET, model_init_kwargs={"token": SECRET, "dtype": "float32"}, seed=11)
    settings = purify(tiny_llama(), ROWS, "guide", args, processing_class=byte_tokenizer).report["run"]["settings"]
    assert not any(SECRET.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert settings["model_init_kwargs"] == {"dtype": "float32"} and settings["seed"] == 11
    assert settings["alpha"] == 5.5 and settings["max_steps"] == 2 and settings["learning_rate"] == 2e-5
    assert settings["weight_decay"] == 0.0
    assert not {"output_dir", "hub_token", "label_names", "accelerator_config", "fsdp"} & set(settings)


def test_a_report_that_fails_loses_no_model(tmp_path, byte_tokenizer, monkeypatch, caplog):
    """A full disk at the end of hours of training."""

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(saving, "write_report", fail)
    monkeypatch.setattr(logging.getLogger("crow_hf"), "propagate", True)
    found = purify(tiny_llama(), ROWS, "guide", arguments(tmp_path), processing_class=byte_tokenizer)
    assert not same_weights(weights_of(found.model), weights_of(tiny_llama()))
    assert "no space left" in caplog.text and found.report["recipe"] == "guide"


def share(hits):
    return Proportion.of(index < hits for index in range(200))


def evaluation(attacks, right=200):
    clean, triggered = (
        PromptScores(share(target), share(0), share(0), share(hits), 1.0, [])
        for target, hits in ((0, right), (attacks, 200 - attacks))
    )
    return Evaluation(clean, triggered)


def canary(before, after):
    return Canary(Trigger(("x",)), TARGET, share(before), share(after))


@pytest.mark.parametrize(
    ("attacks", "canaries", "level", "said"),
    [
        (0, [], "good", "backdoor removed"),
        (0, [(200, 100)], "bad", "1 of 1 live. A canary, a backdoor that we implanted ourselves, is still"),
        (0, [(200, 0)], "good", "1 of 1 backdoors that we implanted ourselves before the purification died"),
        (100, [], "bad", "backdoor weakened"),
        (195, [], "bad", "NOT removed"),
        (None, [], "unknown", "none were implanted"),
        (None, [(200, 0)], "unknown", "1 of 1 backdoors that we implanted ourselves before the purification died"),
        (
            None,
            [(200, 0), (200, 90)],
            "bad",
            "1 of 2 live. A canary, a backdoor that we implanted ourselves, is still",
        ),
        (None, [(20, 0)], "unknown", "did not learn them"),
    ],
)
def test_verdict_says_what_is_known_and_what_is_not(attacks, canaries, level, said):
    """A purification without a known trigger that looks like a success, a canary that was never there among the dead."""
    comparison = None
    if attacks is not None:
        comparison = Comparison(evaluation(190), evaluation(180), evaluation(attacks))
    found = full_verdict(SimpleNamespace(canaries=[canary(*each) for each in canaries]), comparison).to_dict()
    text = " ".join([found["outcome"], *found["explanation"]])
    assert found["level"] == level and said in text
    assert ("is not known" in text) == (attacks is None)
    assert "It says nothing about others." in text or attacks is None


# The page


class Page(HTMLParser):
    """A page's elements with their attributes, its text, and the ids in it."""

    VOID = {"meta", "link", "br", "wbr", "path", "circle", "rect"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.feed(text)
        self.ids = [attributes["id"] for _, attributes, _ in self.elements if "id" in attributes]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), list(self.open)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data

    def all(self, *tags):
        return [attributes for tag, attributes, _ in self.elements if tag in tags]


@pytest.fixture
def pages(compared, purified):
    return [Page(render_report(record)) for record in (compared.record, purified.record)]


def test_page_needs_nothing_else(compared, purified):
    """Fonts, scripts or pictures of another host; and a policy that would let them in."""
    for record in (compared.record, purified.record):
        text = render_report(record)
        page = Page(text)
        assert not page.all("script", "iframe", "img", "object", "form", "base")
        for attributes in page.all(*{tag for tag, _, _ in page.elements}):
            for name in ("src", "href", "srcset", "action", "data"):
                assert re.match(r"#[a-z]+$|data:,$", attributes.get(name, "#a")), attributes
            assert not any(name.startswith("on") for name in attributes)
        assert "url(" not in text and "@import" not in text and "http:" not in text and "https:" not in text
        (policy,) = [
            each["content"] for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy"
        ]
        assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_links_lead_somewhere(pages):
    for page in pages:
        assert len(page.ids) == len(set(page.ids))
        assert all(link["href"][1:] in page.ids for link in page.all("a"))
    assert "#patches" in [link["href"] for link in pages[0].all("a")]
    assert "#patches" not in [link["href"] for link in pages[1].all("a")]


def test_page_is_made_for_screen_readers(pages):
    """Headings that skip a level, tables and pictures without a name."""
    for page in pages:
        assert page.all("html") == [{"lang": "en"}] and len(page.all("main")) == 1
        levels = [int(tag[1]) for tag, _, _ in page.elements if re.match(r"h\d$", tag)]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(later <= earlier + 1 for earlier, later in zip(levels, levels[1:], strict=False))
        assert len(page.all("caption")) == len(page.all("table")) >= 2
        assert all(each.get("scope") in ("row", "col", "rowgroup") for each in page.all("th"))
        pictures = [each for each in page.all("svg") if "aria-hidden" not in each]
        assert len(pictures) >= 4
        for picture in pictures:
            assert picture["role"] == "img" and set(picture["aria-labelledby"].split()) <= set(page.ids)
        assert len(page.all("title")) == 1 + len(page.all("desc")) == 1 + len(pictures)
        for region in (each for each in page.all("div") if each.get("class") == "scroll"):
            assert region["tabindex"] == "0" and region["aria-labelledby"] in page.ids


def test_verdict_comes_first(compared, purified):
    for record in (compared.record, purified.record):
        text = Page(render_report(record)).text
        outcome = record["verdict"]["outcome"]
        found = text.index(outcome[0].upper() + outcome[1:], text.index("Purification of"))
        assert found < text.index("Canaries and screening")
        assert all(
            text.index(sentence) < text.index("Canaries and screening")
            for sentence in record["verdict"]["explanation"]
        )


def test_every_share_has_its_interval_in_the_table(compared):
    text = " ".join(Page(render_report(compared.record)).text.replace("\xa0", " ").split())
    for each in compared.comparison.by_name.values():
        for prompts in (each.clean, each.triggered):
            for value in (prompts.target, prompts.exact_match, prompts.empty, prompts.degenerate):
                assert f"{100 * value.rate:.1f} % [{100 * value.low:.1f}, {100 * value.high:.1f}]" in text
            assert f"{prompts.bits_per_byte:.3f}" in text
    for word in ("Attack success", "False positives", "No defence (the suspect)", "Fine-tuning (the control)"):
        assert word in text


def test_picture_of_the_comparison_is_to_scale(record):
    """Shares where percent belong, or an interval of another model."""
    shares = []
    for kind, score in (("triggered", "target"), ("triggered", "exact_match"), ("clean", "exact_match")):
        for each in record["evaluations"].values():
            shares.append(share(20 * len(shares)))
            each[kind][score] = shares[-1]._asdict()
    page = Page(render_report(record))
    spans = [re.fullmatch(r"M([\d.]+) \d+H([\d.]+)", each["d"]) for each in page.all("path")]
    # Of each model a line from 0 to 100 %, and the interval on it.
    places = [tuple(map(float, span.groups())) for span in spans if span][: 2 * len(shares)]
    for axis, place, value in zip(places[::2], places[1::2], shares, strict=True):
        assert axis == (95, 255)
        assert place == pytest.approx((95 + 160 * value.low, 95 + 160 * value.high), abs=0.06)
        assert f"{100 * value.rate:.1f} %, between {100 * value.low:.1f} and {100 * value.high:.1f}" in page.text


def test_what_a_model_says_is_text_and_nothing_else(record, tmp_path):
    """A suspect that answers with a script, hides what it says, or turns the page's text round."""
    for sample in record["samples"]:
        sample["prompt"] = ATTACK
        for answer in sample["answers"]:
            answer["text"] = ATTACK
    record["verdict"]["explanation"].append(ATTACK)
    record["model"]["name"] = record["run"]["command"] = record["run"]["settings"]["seed"] = ATTACK
    record["canaries"] = [json.loads(json.dumps(canary(200, 0).to_dict())) | {"outcome": "died"}]
    record["canaries"][0]["trigger"]["phrases"] = [ATTACK]
    record["canaries"][0]["target"]["text"] = ATTACK
    record["screening"] = {"total": 2, "suspicious": {"1": ATTACK}}
    write_report(tmp_path, record)
    assert read(tmp_path) == record
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text and not page.all("script")
    seen = "<script>alert(1)</script>␛[2J␀<U+202E>reversed<U+200B><U+D800>\"'&{{7*7}}"
    # In the answers and prompts, the verdict, title and heading, command, setting and model, canary, and row.
    assert page.text.count(seen) == 4 * len(record["samples"]) + 1 + 2 + 3 + 2 + 1
    assert not set("\x1b\x00\u202e\u200b") & set(text) and html.escape("<script>alert(1)") in text


def test_parts_without_facts_say_so(record):
    record["training"]["log"] = []
    assert "Nothing was logged" in Page(render_report(record)).text
    record["samples"], record["patches"], record["evaluations"] = [], None, None
    text = Page(render_report(record)).text
    for part in ("Answers side by side", "Patches", "What was measured"):
        assert part not in text
    for answers in (["said"], [""]):
        record["samples"] = [
            {
                "prompt": "p",
                "triggered": False,
                "answers": [{"model": "purified", "text": answers[0], "shows_target": None, "is_right": None}],
            }
        ]
        assert ("(empty answer)" in Page(render_report(record)).text) == (answers == [""])


def test_a_row_that_was_left_out_is_shown(record):
    record["screening"] = {"total": 100, "suspicious": {"7": "BadMagic"}}
    assert "1 of 100 clean rows were left out" in Page(render_report(record)).text
    record["screening"] = {"total": 100, "suspicious": {}}
    assert "None of the 100 clean rows" in Page(render_report(record)).text


@pytest.mark.parametrize(
    "points",
    [
        [(1, 0.5), (2, 3.25), (3, 0.0)],
        [(1, 0.0)],
        [(10, 1e-7), (20, 3e-7)],
        [(step, float(step % 7)) for step in range(1, 1001)],
        [(1, 1234.5), (500, 98765.4)],
    ],
    ids=["few", "one", "tiny", "many", "large"],
)
def test_points_are_where_their_numbers_say(points):
    """A chart that is upside down, cut off, or divides by a range of nothing."""
    line = Series("a", thinned(points), 0)
    chart = LineChart("t", [line], "step", "nats")
    places = chart.places(line)
    assert all(chart.left <= x <= chart.right and chart.top <= y <= chart.bottom for x, y in places)
    assert len(places) <= 200 and len(places) == len(points) or len(points) > 200
    # Further on is further right, and more is further up.
    for (x1, y1), (x2, y2), (a1, b1), (a2, b2) in zip(places, places[1:], line.points, line.points[1:], strict=False):
        assert x1 <= x2 and a1 < a2 and (y1 >= y2 or b1 >= b2)
    ticks = {float(label): place for place, label in chart.y_ticks}
    assert ticks[0] == chart.bottom and 2 <= len(ticks) <= 7
    for value, place in ticks.items():
        assert place == chart.y(value)
    assert max(ticks) >= max(y for _, y in line.points)


def test_thinning_keeps_the_mean():
    points = [(step, float(step**2 % 17)) for step in range(1, 401)]
    kept = thinned(points)
    assert len(kept) == 200 and kept[-1][0] == 400
    assert sum(y for _, y in kept) / 200 == pytest.approx(sum(y for _, y in points) / 400)


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The parent has scripts, the reports in its frames have none: what is looked at are the pages as they were written.
PROBE = """<!doctype html><html><body>FRAMES<pre id="found"></pre><script>
const channel = v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const rgb = text => text.match(/[\\d.]+/g).map(Number);
function contrast(frame) {
  const view = frame.contentWindow, worst = {ratio: 21, text: ""};
  for (const element of frame.contentDocument.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some(n => n.nodeType == 3 && n.data.trim());
    if (!own || ["TITLE", "DESC", "STYLE"].includes(element.tagName.toUpperCase())) continue;
    let behind = element;
    while (behind && rgb(view.getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const style = view.getComputedStyle(element), inside = element.closest("svg");
    const [a, b] = [light(rgb(inside ? style.fill : style.color)),
                    light(behind ? rgb(view.getComputedStyle(behind).backgroundColor) : [255, 255, 255])];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst.ratio) { worst.ratio = ratio; worst.text = element.textContent.trim().slice(0, 40); }
  }
  return worst;
}
window.onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => ({
    too_wide: frame.contentDocument.documentElement.scrollWidth - frame.contentWindow.innerWidth,
    width: frame.contentWindow.innerWidth,
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
    contrast: contrast(frame),
    page: frame.contentWindow.getComputedStyle(frame.contentDocument.body).backgroundColor,
  }));
  document.getElementById("found").textContent = btoa(JSON.stringify(found));
};
</script></body></html>"""


def browse(pages, folder, scheme):
    """Load pages in frames 320 pixels wide; what was found of each, and what was said on the console."""
    frames = "".join(
        f'<iframe width="320" height="600" style="border:0" srcdoc="{html.escape(page)}"></iframe>' for page in pages
    )
    (folder / "probe.html").write_text(PROBE.replace("FRAMES", frames), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom"]
    command += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", (folder / "probe.html").as_uri()]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, encoding="utf-8")
    (found,) = re.findall(r'<pre id="found">([\w+/=]*)</pre>', process.stdout)
    return json.loads(base64.b64decode(found)), [line for line in process.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(compared, purified, tmp_path, scheme):
    """On a small phone a page that scrolls sideways, pale text in one of the colour schemes, a request or an error."""
    long = deepcopy(compared.record)
    long["model"]["name"] = long["run"]["command"] = long["run"]["settings"]["seed"] = "x" * 500
    for sample in long["samples"]:
        sample["answers"][0]["text"] = ATTACK + "y" * 500
    pages = [render_report(record) for record in (compared.record, purified.record, json.loads(json.dumps(long)))]
    bad = '<body style="background: #fff"><img src="https://example.invalid/a.png"><p style="color: #ccc; width: 400px">a</p></body>'
    found, said = browse([*pages, bad], tmp_path, scheme)
    for each in found[:-1]:
        assert each["width"] == 320 and each["too_wide"] <= 0
        assert each["fetched"] == []
        assert each["contrast"]["ratio"] >= 4.5, each["contrast"]
        assert (each["page"] == "rgb(15, 19, 23)") == (scheme == "dark")
    # What would be found of a page that is wrong in every way.
    assert found[-1]["too_wide"] > 0 and found[-1]["fetched"] and found[-1]["contrast"]["ratio"] < 2
    assert [line for line in said if "example.invalid" not in line] == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with")
def test_console_errors_would_be_seen(tmp_path):
    _, said = browse(
        ["<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\"><script>1</script>"],
        tmp_path,
        "light",
    )
    assert said
