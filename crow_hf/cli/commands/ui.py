"""`crow-hf ui`: a page of this computer on which a suspect and its purified model answer the same, side by side."""

from html import escape
from pathlib import Path
from typing import Any

from ...data.visible import printable
from ...detection.guard import ConsistencyGuard
from ...detection.words import score_words
from ...evaluation.layer_profile import layer_profile_by_position
from ...files import is_unused
from ...reporting.positions import STYLE, render_positions, render_words
from ..options import UiArguments
from ..partners import Partner, load_partners


# Only this computer reaches it.
ADDRESS = "127.0.0.1"
GUARD_EXPLANATION = (
    "How far the prompt leads the model from clean prompts (the score of the guard), and how far that falls without "
    "each word. A whole bar is a fall to 0. The word with the longest bar may be a trigger, or a part of one. Strange "
    "but harmless text raises the score, too."
)
EXPLANATION = (
    "How much the layers change each position of the prompt: 1 - cos between the outputs of consecutive layers. A "
    "darker box is a larger change, on one scale for both models. A trigger can stand out here, and so can harmless "
    "text, so this is no detector."
)


def run(arguments: UiArguments) -> None:
    folder = None if arguments.guard_dir is None else Path(arguments.guard_dir)
    if folder is not None and is_unused(folder):
        raise ValueError(f"There is no guard in {folder}: fit one with `crow-hf guard`.")
    try:
        import gradio  # noqa: F401
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError:
        raise ImportError('The page needs Gradio: `pip install "crow-hf[ui]"`.') from None
    partners = load_partners(arguments.run)
    guarded = [] if folder is None else _load_guards(folder, partners)
    page = _page(partners, guarded, arguments.max_new_tokens)
    _, address, _ = page.launch(
        server_name=ADDRESS,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        # Nothing can be sent but a prompt, and nothing is kept.
        max_file_size=0,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        css=STYLE,
        # A page of the internet whose name an attacker points at this computer reads nothing.
        app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=[ADDRESS, "localhost"])]},
    )
    print(f"The page is at {address} until Ctrl-C.", flush=True)
    page.block_thread()


def _load_guards(folder: Path, partners: list[Partner]) -> list[tuple[Partner, ConsistencyGuard]]:
    """Load a guard for the models that it fits, and say which it does not fit."""
    guarded, refused = [], {}
    for each in partners:
        try:
            guarded.append((each, ConsistencyGuard.from_pretrained(folder, each.model, each.tokenizer)))
        except ValueError as error:
            refused[each.title] = error
    if not guarded:
        raise refused[partners[0].title]
    for title in refused:
        print(f"The guard belongs to the {guarded[0][0].title} model, so the {title} model has no scores.", flush=True)
    return guarded


def _page(partners: list[Partner], guarded: list[tuple[Partner, ConsistencyGuard]], max_new_tokens: int) -> Any:
    """Build the page."""
    import gradio

    def ask(prompt: str) -> Any:
        if not prompt.strip():
            return gradio.skip()
        try:
            answers = [each.answer(prompt, max_new_tokens) for each in partners]
            profiles = {
                each.title: layer_profile_by_position(each.model, each.tokenizer, answer.prompt_ids)
                for each, answer in zip(partners, answers, strict=True)
            }
            words = {each.title: score_words(guard, each.row(prompt)) for each, guard in guarded}
        except ValueError as error:
            raise gradio.Error(escape(printable(str(error))), print_exception=False) from error
        texts = [printable(answer.text) for answer in answers]
        return [*texts, *(render_words(*each) for each in words.items()), *render_positions(profiles)]

    def tables(explanation: str, count: int) -> list[Any]:
        gradio.Markdown(explanation)
        shown = []
        with gradio.Row():
            for _ in range(count):
                # Columns stand below each other on a narrow screen.
                with gradio.Column(min_width=300):
                    shown.append(gradio.HTML())
        return shown

    with gradio.Blocks(title="crow-hf", analytics_enabled=False) as page:
        prompt = gradio.Textbox(label="prompt", max_lines=20, submit_btn="Ask")
        with gradio.Row():
            answers = [
                gradio.Textbox(label=each.title, lines=3, max_lines=20, min_width=300, interactive=False)
                for each in partners
            ]
        outputs = [
            *answers,
            *(tables(GUARD_EXPLANATION, len(guarded)) if guarded else []),
            *tables(EXPLANATION, len(partners)),
        ]
        prompt.submit(ask, prompt, outputs, api_visibility="private")
    return page
