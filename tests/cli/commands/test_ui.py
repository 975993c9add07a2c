"""Tests of `crow-hf ui`: in a real browser, if Gradio, Playwright and Chromium are there."""

import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from datasets import Dataset

from crow_hf import ConsistencyGuard, load_causal_lm
from crow_hf.cli.commands.ui import _load_guards
from crow_hf.cli.partners import Partner
from crow_hf.data.visible import printable
from helpers.command_line import assert_one_sentence, run
from helpers.detection import BYTES
from helpers.tiny import tiny_llama


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<img src=x onerror=alert(1)> **bold** [a](javascript:alert(2)) ${1+1} {{value}} \u202eabc\u200b\x1b[2J&amp;"
# The command, with models that say the worst.
COMMAND = f"""
import sys
from crow_hf.cli import main, partners
def write_answers(*args, **kwargs):
    return [answer._replace(text={HOSTILE!r}) for answer in real(*args, **kwargs)]
real, partners.write_answers = partners.write_answers, write_answers
sys.exit(main(["ui", "--run", *sys.argv[1:], "--max_new_tokens", "8"]))
"""


def test_without_gradio(finished, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert run("ui", "--run", finished) == 1
    err = capsys.readouterr().err
    assert 'pip install "crow-hf[ui]"' in err
    assert_one_sentence(err, "ui")


def test_a_folder_without_a_guard(finished, tmp_path, capsys):
    assert run("ui", "--run", finished, "--guard_dir", tmp_path) == 1
    err = capsys.readouterr().err
    assert f"There is no guard in {tmp_path}" in err
    assert_one_sentence(err, "ui")


def test_a_guard_is_for_the_models_that_it_fits(guard_dir, paths, capsys):
    """Fails if a model gets scores of another one, or if nobody is told."""
    suspect = Partner("suspect", load_causal_lm(paths["model"]), BYTES)
    purified = Partner("purified", tiny_llama(seed=5).eval(), BYTES)
    assert [each for each, _ in _load_guards(guard_dir, [suspect, purified])] == [suspect]
    assert "belongs to the suspect model, so the purified model has no scores" in capsys.readouterr().out
    assert [each for each, _ in _load_guards(guard_dir, [suspect])] == [suspect]
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="fitted on another model"):
        _load_guards(guard_dir, [purified])


@pytest.fixture(scope="module")
def guard_dir(paths, tmp_path_factory):
    """The folder of a guard of the suspect."""
    folder = tmp_path_factory.mktemp("guard")
    rows = Dataset.from_list([{"prompt": f"what is {number}?", "completion": ""} for number in range(40)])
    guard = ConsistencyGuard.fit(load_causal_lm(paths["model"]), rows, BYTES, false_alarm_rate=0.1)
    guard.save_pretrained(folder)
    return folder


@contextmanager
def page_of(*arguments):
    """The lines that the command prints. It runs in a process of its own until it gets SIGTERM."""
    pytest.importorskip("gradio")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    process = subprocess.Popen(command, **options, env=os.environ | {"PYTHONPATH": ""})
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("The page is at "):
            break
    else:
        pytest.fail("".join(lines))
    try:
        yield lines
    finally:
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "Traceback" not in rest


def address_of(lines):
    return lines[-1].split()[4].rstrip("/")


@pytest.fixture(scope="module")
def address(finished):
    with page_of(finished) as lines:
        yield address_of(lines)


def status(request):
    """The status of an answer to a request."""
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_only_this_computer_and_only_prompts(address):
    """Fails if the page listens to others, takes files, gives files away, or answers to a name of the internet."""
    assert address.startswith("http://127.0.0.1:")
    assert status(f"{address}/config") == 200
    assert status(urllib.request.Request(f"{address}/config", headers={"Host": "evil.example"})) == 400
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--b--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert status(urllib.request.Request(f"{address}/gradio_api/upload", body, headers)) == 413
    assert status(f"{address}/gradio_api/file={os.path.abspath(__file__)}") == 403


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_hostile_text_is_seen_and_inert(address, width):
    """Fails if something outside is asked, if a text becomes an element or hides, or if the page is too wide."""
    playwright = pytest.importorskip("playwright.sync_api")
    prompt = "what is <img src=x onerror=alert(1)>{{value}}${1+1}\u202e? "
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        requests, dialogs = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(address, wait_until="networkidle")
        page.get_by_label("prompt").fill(prompt)
        page.get_by_role("button", name="Ask").click()
        page.locator(".positions").nth(1).wait_for()
        for title, table in zip(("suspect", "purified"), page.locator(".positions").all(), strict=True):
            assert page.get_by_label(title).input_value() == printable(HOSTILE)
            assert table.bounding_box()["width"] > 250
            pieces = table.locator("td:first-child").all_inner_texts()
            assert "".join(pieces) == prompt.replace("\u202e", "\ufffd" * 3)
            assert table.locator("caption").inner_text() == title and table.locator("tr i").count() == 2 * len(pieces)
        assert page.locator(".positions img, .positions b, input[type=file], a").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # Errors are text, too.
        page.get_by_label("prompt").fill("x" * 5000)
        page.get_by_role("button", name="Ask").click()
        page.get_by_text("exceed the model's context").wait_for()
        assert dialogs == [] and all(url.startswith((address, "data:", "blob:")) for url in requests)
        assert page.locator(".words").count() == 0
        browser.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_trigger_has_the_highest_bar(finished, guard_dir):
    """Fails if the guard's scores are not on the page, beside another word, or too wide, or if text hides there."""
    playwright = pytest.importorskip("playwright.sync_api")
    with page_of(finished, "--guard_dir", guard_dir) as lines, playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width in (1280, 390):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.goto(address_of(lines), wait_until="networkidle")
            page.get_by_label("prompt").fill("what is 7? <b>~~</b>\u200b")
            page.get_by_role("button", name="Ask").click()
            table = page.locator(".words").first
            table.wait_for()
            assert table.locator("caption").inner_text().startswith("suspect, an alarm: score ")
            bars = {
                each.locator("td").first.inner_text(): each.locator("i").bounding_box()["width"]
                for each in table.locator("tbody tr").all()
            }
            assert list(bars) == ["what", "is", "7?", "<b>~~</b><U+200B>"]
            assert max(bars, key=bars.get) == "<b>~~</b><U+200B>" and max(bars.values()) > 10
            assert page.locator(".words b").count() == 0
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
