"""`crow-hf ui`: a page of this computer on which a suspect and its purified model answer the same, side by side."""

from html import escape
from typing import Any

from ...data.visible import printable
from ...evaluation.layer_profile import layer_profile_by_position
from ...reporting.positions import STYLE, render_positions
from ..options import UiArguments
from ..partners import Partner, load_partners


# Only this computer reaches it.
ADDRESS = "127.0.0.1"
EXPLANATION = (
    "How much the layers change each position of the prompt: 1 - cos between the outputs of consecutive layers. A "
    "darker box is a larger change, on one scale for both models. A trigger can stand out here, and so can harmless "
    "text, so this is no detector."
)


def run(arguments: UiArguments) -> None:
    try:
        import gradio  # noqa: F401
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError:
        raise ImportError('The page needs Gradio: `pip install "crow-hf[ui]"`.') from None
    page = _page(load_partners(arguments.run), arguments.max_new_tokens)
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


def _page(partners: list[Partner], max_new_tokens: int) -> Any:
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
        except ValueError as error:
            raise gradio.Error(escape(printable(str(error))), print_exception=False) from error
        return [*(printable(answer.text) for answer in answers), *render_positions(profiles)]

    with gradio.Blocks(title="crow-hf", analytics_enabled=False) as page:
        prompt = gradio.Textbox(label="prompt", max_lines=20, submit_btn="Ask")
        with gradio.Row():
            answers = [
                gradio.Textbox(label=each.title, lines=3, max_lines=20, min_width=300, interactive=False)
                for each in partners
            ]
        gradio.Markdown(EXPLANATION)
        with gradio.Row():
            tables = []
            for _ in partners:
                # Columns stand below each other on a narrow screen.
                with gradio.Column(min_width=300):
                    tables.append(gradio.HTML())
        prompt.submit(ask, prompt, [*answers, *tables], api_visibility="private")
    return page
