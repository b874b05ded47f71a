"""A small OpenAI-compatible server on loopback, computing with torch, that gives log-probabilities
in the form of one of several servers.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

Answer = tuple[int, Any]


def log_probs(model: Any) -> Callable[[list[int]], np.ndarray[Any, Any]]:
    """Return a function from ids to the log-probabilities of every next token, of a torch model."""
    import torch

    def compute(ids: list[int]) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids])).logits[0].float()
        return torch.log_softmax(out, -1).numpy()

    return compute


@dataclass
class Served:
    """What a server computes and how it answers.

    Attributes:
        compute: from ids to log-probabilities, `[len, vocab]`.
        form: whose form the answers have: `vllm`, `echo`, `echo of text`, `llama.cpp`, `mlx`.
        tokenizer: of the forms that take text.
        name: name of its model.
        requests: the bodies of all requests.
        answer: answers in place of all that; None for the computed answers.
    """

    compute: Callable[[list[int]], np.ndarray[Any, Any]]
    form: str = "vllm"
    tokenizer: Any = None
    name: str = "tuned"
    requests: list[Any] = field(default_factory=list)
    answer: Callable[[str, Any], Answer] | None = None

    def get(self, path: str) -> Answer:
        if self.answer is not None:
            return self.answer(path, None)
        return 200, {"object": "list", "data": [{"id": self.name}, {"id": "base"}]}

    def post(self, path: str, body: Any) -> Answer:
        self.requests.append(body)
        if self.answer is not None:
            return self.answer(path, body)
        if body["model"] != self.name:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        ids, text = body["prompt"], isinstance(body["prompt"], str)
        if text != (self.form in ("echo of text", "mlx")):
            code = 404 if self.form == "mlx" else 400
            return code, {"error": {"message": "prompt has the wrong type"}}
        ids = self.tokenizer(ids)["input_ids"] if text else ids
        choice = {"index": 0, "text": "x", "finish_reason": "length"}
        return 200, {"choices": [choice | self._log_probs(body, ids)]}

    def _log_probs(self, body: Any, ids: list[int]) -> dict[str, Any]:
        found = self.compute(ids)
        own = [None, *(float(found[i - 1, ids[i]]) for i in range(1, len(ids)))]
        if self.form == "vllm" and "prompt_logprobs" in body:
            entries = [
                None if one is None else {str(token): {"logprob": one, "rank": 1}}
                for token, one in zip(ids, own, strict=True)
            ]
            return {"prompt_logprobs": entries}
        if self.form.startswith("echo") and body.get("echo"):
            return {"logprobs": {"token_logprobs": [*own, float(found[-1].max())]}}
        wanted = body.get("top_logprobs") if self.form == "mlx" else body.get("logprobs")
        if self.form in ("llama.cpp", "mlx") and wanted:
            best = np.argsort(-found[-1])[: int(wanted)]
            top = [{"id": int(i), "logprob": float(found[-1, i])} for i in best]
            return {"logprobs": {"content": [top[0] | {"top_logprobs": top}]}}
        return {}


@contextmanager
def serve(served: Served) -> Iterator[str]:
    """Run a server; yield its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(served.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(served.post(self.path, body))

        def _send(self, answer: Answer) -> None:
            code, content = answer
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            with suppress(BrokenPipeError):  # of a client that did not wait
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
