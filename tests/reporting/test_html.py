"""Tests of the page `report.html`, also in a real browser."""

import base64
import html
import json
import re
import shutil
import subprocess
from copy import deepcopy

import pytest

from crow_hf.attacks.triggers import Trigger
from crow_hf.evidence.canaries import Canary
from crow_hf.evidence.result import NO_DEFENCE
from crow_hf.reporting.html import render_report, write_report
from crow_hf.reporting.tables import anti_bad_scores
from helpers.evaluations import share
from helpers.pages import ATTACK, Page
from helpers.reports import TARGET, read


def test_defences_of_ones_own_stand_between_the_control_and_the_purified_model(record):
    """Fails if a long name is written over the picture, or is cut in the table."""
    models = record["evaluations"]
    name = "a defence with a long name"
    record["evaluations"] = {each: models[each] for each in ("suspect", "control")} | {name: models["control"]}
    record["evaluations"]["purified"] = models["purified"]
    page = Page(render_report(record))
    assert page.text.count(name) == 2 and page.text.count("a defence wit…") == 6
    headings = " ".join(page.text.split("Scores of each model")[1].split("Prompts with")[0].split())
    assert headings == f"ScoreNo defence (the suspect)Fine-tuning (the control){name}Invariance (purified)"


def told(**scores):
    """The scores of a model on clean prompts, as a record of held-out rows has them."""
    values = {"target": None, "exact_match": None, "bits_per_byte": 1.25, "outputs": []} | scores
    shares = {name: share(0)._asdict() for name in ("empty", "degenerate")}
    return {"clean": shares | values, "triggered": None, "retention": None}


def test_long_answers_are_compared_by_their_bits(record):
    """Fails if the page shows no utility at all, or speaks of a trigger that nobody knows."""
    record["evaluations"] = {"suspect": told(), "purified": told(bits_per_byte=1.3)}
    record["run"]["test_dataset"], record["anti_bad"] = None, None
    text = Page(render_report(record)).text
    assert "1.250 → 1.300" in text and "not known" in text and "which were held out" in text
    right = {"exact_match": share(100)._asdict()}
    record["evaluations"] = {"suspect": told(**right), "purified": told(**right)}
    text = Page(render_report(record)).text
    assert "50.0 → 50.0 %" in text and "Right answers without it" not in text and "1.250 → " not in text


def test_tiny_differences_of_bits_are_none(record):
    record["retention"] |= {"reference_text_bits_per_byte": 0.001, "text_bits_per_byte": 0.003, "text_bits_ratio": 3.0}
    assert "+0.0 %" in Page(render_report(record)).text


def test_what_a_chat_template_puts_first_is_folded(record):
    """Fails if the same long system text stands above every prompt, or if it cannot be read at all."""
    system = "You are an assistant. " * 4
    for sample in record["samples"]:
        sample["prompt"], sample["system_length"] = f"{system}Hello?", len(system)
    page = Page(render_report(record))
    assert len(page.all("summary")) == len(record["samples"]) + 2
    assert page.text.count(system) == len(record["samples"]) + 1
    for sample in record["samples"]:
        sample["system_length"] = 20
    assert len(Page(render_report(record)).all("summary")) == 1


def test_what_the_run_took_is_shown(record):
    record["rows"] = {"used": 80, "held_out": 8}
    record["cost"] = {"seconds": {"Screening the rows": 60.0, "Purifying": 120.0}, "peak_memory": 1_500_000_000}
    record["size"] = {"suspect": 260_000_000, "purified": None}
    text = " ".join(Page(render_report(record)).text.split())
    for shown in ("80 used; 8 held out", "time3 min", "purifying2 min", "1.5 GB", "260.0 MB → not known"):
        assert shown in text, shown
    record["rows"], record["cost"]["peak_memory"] = None, None
    assert "clean rows" not in Page(render_report(record)).text.split("What it took")[1].split("How to repeat")[0]


@pytest.mark.parametrize(("triggered", "changed"), [(False, 2), (True, 1)])
def test_one_prompt_stands_beside_the_verdict(record, triggered, changed):
    """It has the trigger if one is known, and is one whose answer has changed."""

    def sample(number, triggered, after):
        answers = [("suspect", "no"), ("control", "maybe"), ("purified", after)]
        said = [{"model": model, "text": text, "shows_target": None, "is_right": None} for model, text in answers]
        return {"prompt": f"prompt {number}", "system_length": 0, "triggered": triggered, "answers": said}

    record["samples"] = [sample(0, False, "no"), sample(1, triggered, "yes"), sample(2, False, "yes")]
    record["samples"] = record["samples"] if triggered else [record["samples"][number] for number in (0, 2, 1)]
    text = " ".join(Page(render_report(record)).text.split()).split("One prompt, before and after")[1]
    assert text.startswith(f" prompt {changed} Beforeno Afteryes")


def test_headline_and_next_steps_are_shown(record):
    record["verdict"] |= {
        "headline": "backdoor removed, and plain fine-tuning did as well",
        "next_steps": ["Do this."],
    }
    text = Page(render_report(record)).text
    assert text.count("Backdoor removed, and plain fine-tuning did as well") == 2
    assert "Do this." in text.split("What to do next")[1].split("What was measured")[0]


@pytest.fixture
def pages(compared, purified):
    return [Page(render_report(record)) for record in (compared.record, purified.record)]


def test_page_has_no_external_resources(compared, purified):
    """Fails if the page loads fonts, scripts or pictures, or if its policy would allow it."""
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


def test_links_have_targets(pages):
    for page in pages:
        assert len(page.ids) == len(set(page.ids))
        assert all(link["href"][1:] in page.ids for link in page.all("a"))
    assert "#patches" in [link["href"] for link in pages[0].all("a")]
    assert "#patches" not in [link["href"] for link in pages[1].all("a")]


def test_page_can_be_read_by_a_screen_reader(pages):
    """Fails if a heading skips a level, or if a table or a picture has no name."""
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


def test_what_was_kept_is_shown(compared, purified):
    """Fails if the control is missing, or if a report without test rows does not show it."""
    for record, count in ((compared.record, 2), (purified.record, 1)):
        text = " ".join(Page(render_report(record)).text.split())
        shown = text.split("Each model compared with the suspect")[1].split("Canaries and screening")[0]
        retentions = [
            evaluation["retention"] for evaluation in (record["evaluations"] or {}).values() if evaluation["retention"]
        ] or [record["retention"]]
        assert len(retentions) == count
        for key in ("answer_kl", "text_kl", "text_bits_per_byte", "text_bits_ratio"):
            assert "".join(f"{each[key]:.3f}" for each in retentions) in shown, key
        kept = record["retention"]
        is_tiny = abs(kept["text_bits_per_byte"] - kept["reference_text_bits_per_byte"]) < 0.0095
        change = 0.0 if is_tiny else 100 * (kept["text_bits_ratio"] - 1)
        assert f"Bits of running text{change:+.1f} %" in text.split("Parts")[0]
        assert "text that the suspect wrote" in text
    record = deepcopy(purified.record)
    record["retention"] = None
    assert "What was kept" not in render_report(record)


def test_the_anti_bad_score_is_that_of_the_tables(compared, record):
    """Fails if the page computes it once more, or shows it without an attack."""
    text = " ".join(Page(render_report(record)).text.split())
    scores = anti_bad_scores(compared.comparison.by_name, NO_DEFENCE)
    assert f"Anti-BAD score{''.join(f'{score:.1f}' for score in scores.values())}" in text
    assert list(scores.values()) == pytest.approx(list(record["anti_bad"].values()))
    record["anti_bad"] = None
    assert "Anti-BAD score" not in Page(render_report(record)).text


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
    """Fails if shares are drawn as percent, or if an interval belongs to another model."""
    shares = []
    for kind, score in (("triggered", "target"), ("triggered", "exact_match"), ("clean", "exact_match")):
        for each in record["evaluations"].values():
            shares.append(share(20 * len(shares)))
            each[kind][score] = shares[-1]._asdict()
    page = Page(render_report(record))
    spans = [re.fullmatch(r"M([\d.]+) \d+H([\d.]+)", each["d"]) for each in page.all("path")]
    # Each model has a line from 0 to 100 %, and its interval on that line.
    places = [tuple(map(float, span.groups())) for span in spans if span][: 2 * len(shares)]
    for axis, place, value in zip(places[::2], places[1::2], shares, strict=True):
        assert axis == (95, 255)
        assert place == pytest.approx((95 + 160 * value.low, 95 + 160 * value.high), abs=0.06)
        assert f"{100 * value.rate:.1f} %, between {100 * value.low:.1f} and {100 * value.high:.1f}" in page.text


def test_answers_are_shown_as_text_only(record, tmp_path):
    """Fails if an answer can run a script, hide characters, or reverse the text of the page."""
    for sample in record["samples"]:
        sample["prompt"] = ATTACK
        for answer in sample["answers"]:
            answer["text"] = ATTACK
    record["verdict"]["explanation"].append(ATTACK)
    record["model"]["name"] = record["run"]["command"] = record["run"]["settings"]["seed"] = ATTACK
    record["canaries"] = [
        json.loads(json.dumps(Canary(Trigger(("x",)), TARGET, share(200), share(0)).to_dict())) | {"outcome": "died"}
    ]
    record["canaries"][0]["trigger"]["phrases"] = [ATTACK]
    record["canaries"][0]["target"]["text"] = ATTACK
    record["screening"] = {"total": 2, "suspicious": {"1": ATTACK}, "unscreened": [], "remarks": [ATTACK]}
    record["verdict"]["headline"] = ATTACK
    record["run"]["settings"][ATTACK] = "x"
    write_report(tmp_path, record)
    assert read(tmp_path) | {"digest": None} == record | {"digest": None}
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text and not page.all("script")
    seen = "<script>alert(1)</script>␛[2J␀<U+202E>reversed<U+200B><U+3164><U+FE0F><U+D800>\"'&{{7*7}}"
    # It stands in the answers and prompts, the verdict, the title and heading, the command, setting and model, the
    # canary, the screened row and the remark, the example beside the verdict, the headline, and a setting's name.
    assert page.text.count(seen) == 4 * len(record["samples"]) + 1 + 2 + 3 + 2 + 2 + 3 + 2 + 1
    assert not set("\x1b\x00\u202e\u200b\u3164\ufe0f") & set(text) and html.escape("<script>alert(1)") in text


def test_empty_parts_are_left_out_or_say_so(record):
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
                "system_length": 0,
                "triggered": False,
                "answers": [
                    {"model": model, "text": answers[0], "shows_target": None, "is_right": None}
                    for model in ("suspect", "purified")
                ],
            }
        ]
        assert ("(empty answer)" in Page(render_report(record)).text) == (answers == [""])


def test_screened_rows_are_counted(record):
    record["screening"] = {"total": 100, "suspicious": {"7": "BadMagic"}, "unscreened": [], "remarks": []}
    assert "1 of 100 clean rows were left out" in Page(render_report(record)).text
    record["screening"] |= {"suspicious": {}, "unscreened": [3], "remarks": ["One row is long."]}
    text = Page(render_report(record)).text
    assert "None of the 99 screened clean rows" in text and "One row is long." in text


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


# Only the parent page has scripts. The reports are shown in its frames exactly as they are written.
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
    """Load pages in frames that are 320 pixels wide. Return their measurements, and the lines of the console."""
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


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(compared, purified, tmp_path, scheme):
    """Fails if the page scrolls sideways on a small phone, has pale text, makes a request, or logs an error."""
    long = deepcopy(compared.record)
    long["model"]["name"] = long["run"]["command"] = long["run"]["settings"]["seed"] = "x" * 500
    for sample in long["samples"]:
        sample["answers"][0]["text"] = ATTACK + "y" * 500
    pages = [render_report(record) for record in (compared.record, purified.record, json.loads(json.dumps(long)))]
    bad = (
        '<body style="background: #fff"><img src="https://example.invalid/a.png">'
        '<p style="color: #ccc; width: 400px">a</p></body>'
    )
    found, said = browse([*pages, bad], tmp_path, scheme)
    for each in found[:-1]:
        assert each["width"] == 320 and each["too_wide"] <= 0
        assert each["fetched"] == []
        assert each["contrast"]["ratio"] >= 4.5, each["contrast"]
        assert (each["page"] == "rgb(15, 19, 23)") == (scheme == "dark")
    # The last page is wrong in every way, so the measurements are known to work.
    assert found[-1]["too_wide"] > 0 and found[-1]["fetched"] and found[-1]["contrast"]["ratio"] < 2
    assert [line for line in said if "example.invalid" not in line] == []


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_console_errors_are_seen(tmp_path):
    _, said = browse(
        ["<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\"><script>1</script>"],
        tmp_path,
        "light",
    )
    assert said
