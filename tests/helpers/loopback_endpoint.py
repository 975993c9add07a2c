"""A server of chat completions on this machine, whose answers and faults are given by a function."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, finish_reason="stop", tokens=1):
    """The body of a response, as OpenAI defined it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return {"choices": [choice], "usage": {"completion_tokens": tokens}}


class LoopbackEndpoint:
    """
    A server on a free port that runs until the end of the `with` block.

    `answer` maps the body of a request to the status and the body of the response: JSON, bytes, or an iterator of
    bytes. `requests` holds the path, the headers and the body of each request.
    """

    def __init__(self, answer):
        self.answer, self.requests = answer, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"endpoint": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    endpoint: LoopbackEndpoint

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.endpoint.requests.append((self.path, dict(self.headers), body))
        status, content = self.endpoint.answer(body)
        self.send_response(status)
        if status == 307:
            self.send_header("Location", content)
        self.end_headers()
        if isinstance(content, (dict, list, str)):
            content = [json.dumps(content).encode()]
        try:
            for part in [content] if isinstance(content, bytes) else content:
                self.wfile.write(part)
                self.wfile.flush()
        except OSError:
            # The client waits no longer.
            pass

    def log_message(self, *args):
        pass
