"""A stand-in for the engine: answers depend on the prompt alone, and take a few steps."""

from __future__ import annotations

import time
import zlib
from typing import Any

from aqua_jax.config import SamplingParams
from aqua_jax.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from aqua_jax.errors import EngineDeadError, RequestError


class ScriptedTokenizer:
    """Characters are tokens."""

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return [ord(character) for character in text]

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return "".join(f"{message['role']}:{message['content']};" for message in messages)


class ScriptedEngine:
    """Counts what it is asked; a prompt with "die" in it kills it, with "fail" fails alone."""

    def __init__(self, max_prompt: int = 1000):
        self.tokenizer = ScriptedTokenizer()
        self.max_prompt = max_prompt
        self.asked: list[tuple[Any, SamplingParams]] = []
        self.most_live = 0
        self.closed = False
        self._live: dict[str, tuple[list[int], SamplingParams, int]] = {}
        self._dead = False

    def add_request(
        self, request_id: str, prompt: Any, params: SamplingParams, *, user: str = "",
        weight: float = 1.0, priority: int = 0,
    ) -> None:
        if self._dead:
            raise EngineDeadError("the engine has stopped")
        if isinstance(prompt, dict):
            prompt = prompt["prompt_token_ids"]
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if len(ids) > self.max_prompt:
            raise RequestError("prompt", f"{len(ids)} tokens", f"at most {self.max_prompt} tokens")
        assert request_id not in self._live
        self.asked.append((prompt, params))
        self._live[request_id] = (ids, params, 1 + zlib.crc32(repr(ids).encode()) % 5)
        self.most_live = max(self.most_live, len(self._live))

    def step(self) -> list[RequestOutput]:
        if self._dead:
            raise EngineDeadError("the engine has stopped")
        outputs = []
        for name, (ids, params, steps) in list(self._live.items()):
            text = "".join(chr(token) for token in ids)
            if "die" in text:
                self._dead = True
                return [self._output(key, *value[:2], "error") for key, value in self._live.items()]
            if steps > 1:
                self._live[name] = (ids, params, steps - 1)
                outputs.append(self._output(name, ids, params, None))
                continue
            del self._live[name]
            outputs.append(self._output(name, ids, params, "error" if "fail" in text else "stop"))
        return outputs

    def _output(
        self, name: str, ids: list[int], params: SamplingParams, reason: str | None
    ) -> RequestOutput:
        text = "".join(chr(token) for token in reversed(ids)) + f"|{params.seed}"
        samples = [
            CompletionOutput(index, text, ids[::-1], finish_reason=reason)
            for index in range(params.n)
        ]
        now = time.monotonic()
        metrics = RequestMetrics(now, now, now if reason else None, params.n * len(ids))
        return RequestOutput(
            name, None, ids, samples, reason is not None, metrics,
            error="it broke" if reason == "error" else None,
        )

    def close(self) -> None:
        self.closed = True
