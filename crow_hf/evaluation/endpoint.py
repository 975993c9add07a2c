"""A model behind a server: answers prompts through an API as OpenAI defined it, which most servers speak."""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

# It comes with huggingface_hub, whose own session refuses every server when the Hub is offline.
import httpx2
from transformers.utils import logging
from transformers.utils.logging import tqdm

from ..secrets import HIDDEN
from .generation import Answer


logger = logging.get_logger(__name__)

API_KEY = "CROW_HF_API_KEY"
# Seconds before a request is repeated. There are as many repetitions.
WAITS = (1.0, 2.0, 4.0)
# A longer answer of a server is no answer to a prompt.
MAX_BYTES = 2**24
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# The request takes too long, comes too early or too often, or the server is at fault.
_REPEATED = (408, 425, 429, 500, 502, 503, 504)


class Endpoint:
    """
    A model that a server answers for, such as vLLM, TGI, Ollama or the server of llama.cpp.

    Prompts are sent as chats to `/chat/completions`, several at once, and answered greedily (temperature 0). The
    server applies the chat template. If the environment variable `CROW_HF_API_KEY` is set, its value is sent as the
    key. Requests that fail are repeated three times.

    Args:
        url (`str`):
            The address of the API, such as `"http://localhost:8000/v1"`.
        model (`str`):
            The name that the server knows the model by.
        num_requests (`int`, *optional*, defaults to 32):
            Number of requests at once.
        timeout (`float`, *optional*, defaults to 600.0):
            Seconds after which a request has failed.

    Raises:
        `ValueError`: If the address is none, holds credentials, or a number is not positive.

    Example:

    ```python
    >>> from crow_hf import Endpoint

    >>> endpoint = Endpoint("http://localhost:8000/v1", "purified", num_requests=8)
    ```
    """

    def __init__(self, url: str, model: str, num_requests: int = 32, timeout: float = 600.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"The endpoint {url!r} is no address: write it like http://localhost:8000/v1.")
        if parts.username or parts.password or parts.query:
            raise ValueError(f"The address of the endpoint may hold no key: set {API_KEY} in the environment instead.")
        if num_requests < 1 or not timeout > 0:
            raise ValueError("The number of requests at once and the timeout must be positive.")
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            logger.warning(f"Prompts, answers and the key travel to {parts.hostname} unencrypted: use https.")
        self.url, self.model, self.num_requests, self.timeout = url.rstrip("/"), model, num_requests, timeout
        self._key = os.environ.get(API_KEY, "").strip()

    def answer(self, prompts: Sequence[list[dict]], max_new_tokens: int) -> list[Answer]:
        """
        Answer prompts greedily.

        Args:
            prompts (`Sequence[list[dict]]`):
                The messages of each prompt, with `role` and `content`.
            max_new_tokens (`int`):
                Maximum number of tokens of an answer.

        Returns:
            `list[Answer]`: The answers in the order of the prompts. Servers give no token ids.

        Raises:
            `ValueError`: If the server cannot be reached, refuses a prompt, or does not answer as it should.
        """
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        options: dict[str, Any] = {"headers": headers, "timeout": self.timeout, "follow_redirects": False}
        with (
            httpx2.Client(**options) as client,
            ThreadPoolExecutor(self.num_requests) as pool,
            tqdm(total=len(prompts), desc="Writing answers", unit="prompt") as progress,
        ):
            # Alone, so that a server that is not there is asked once.
            first = [self._ask(client, messages, max_new_tokens) for messages in prompts[:1]]
            waiting = [pool.submit(self._ask, client, messages, max_new_tokens) for messages in prompts[1:]]
            answers = []
            try:
                for answer in (*first, *(each.result() for each in waiting)):
                    answers.append(answer)
                    progress.update()
            finally:
                pool.shutdown(cancel_futures=True)
        if cut := sum(was_cut for _, was_cut in answers):
            logger.warning(
                f"The endpoint cut {cut} answers after fewer than the {max_new_tokens} tokens that were asked for: "
                "raise its limit, or lower `max_new_tokens`."
            )
        return [answer for answer, _ in answers]

    def _ask(self, client: httpx2.Client, messages: list[dict], max_new_tokens: int) -> tuple[Answer, bool]:
        """Answer a prompt, and say whether the server cut the answer before the length that was asked for."""
        body = {"model": self.model, "messages": messages, "max_tokens": max_new_tokens, "temperature": 0}
        for wait in (*WAITS, None):
            try:
                status, content = self._post(client, body)
            except httpx2.HTTPError as error:
                status, content, trouble = None, b"", f"{type(error).__name__}: {error}"
            else:
                if status == 200:
                    return self._read(content, max_new_tokens)
                trouble = f"status {status}: {content.decode(errors='replace')}"
            if wait is None or (status is not None and status not in _REPEATED):
                break
            time.sleep(wait)
        raise ValueError(f"The endpoint {self.url} gives no answer ({self._shown(trouble)}).{self._advice(status)}")

    def _post(self, client: httpx2.Client, body: dict[str, Any]) -> tuple[int, bytes]:
        """Send a request, and return the status and the content of the response, both within limits."""
        content, end = b"", time.monotonic() + self.timeout
        with client.stream("POST", f"{self.url}/chat/completions", json=body) as response:
            for part in response.iter_bytes():
                content += part
                if len(content) > MAX_BYTES:
                    raise httpx2.HTTPError(f"more than {MAX_BYTES} bytes")
                if time.monotonic() > end:
                    raise httpx2.ReadTimeout(f"not complete after {self.timeout:g} seconds")
            return response.status_code, content

    def _read(self, content: bytes, max_new_tokens: int) -> tuple[Answer, bool]:
        try:
            read = json.loads(content)
            choice = read["choices"][0]
            text = choice["message"].get("content") or ""
            has_ended = choice.get("finish_reason") != "length"
            used = (read.get("usage") or {}).get("completion_tokens")
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f"The endpoint {self.url} does not answer as an API of chat completions "
                f"({self._shown(content.decode(errors='replace'))}): check the address, which often ends in /v1."
            ) from None
        was_cut = not has_ended and isinstance(used, int) and used < max_new_tokens
        return Answer(text, text, has_ended, [], []), was_cut

    def _shown(self, text: str) -> str:
        """The beginning of what a server said, in a line and without the key."""
        return " ".join((text.replace(self._key, HIDDEN) if self._key else text).split())[:200]

    def _advice(self, status: int | None) -> str:
        if status is None:
            return " Check that it runs, and its address."
        if status in (401, 403):
            return f" Set the key as {API_KEY} in the environment."
        return f" Check that it serves the model {self.model}, and its address, which often ends in /v1."
