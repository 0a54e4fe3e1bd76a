"""Answers on the wire: one JSON object, or a piece of one for every state of a stream.

A streamed piece is put together from text that was rendered when the answer began; only what is
new is encoded. A piece carries whatever the engine added since the last one, so a reader that is
slow gets fewer and longer pieces.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from aqua_jax.batch import dialect
from aqua_jax.engine.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from aqua_jax.server.calls import Call

DONE = b"data: [DONE]\n\n"
_quote = json.encoder.encode_basestring_ascii  # json.dumps of a string, without looking further


def compact(value: Any) -> str:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":"))


class Answer:
    """How one call is answered.

    Args:
      call: the request.
      model: name echoed to the client.
      prompts: text and token ids of each prompt.
      tokenizer: the model's, or None; names the bytes of tokens and the text of echoed ids.

    Attributes:
      id: of the response.
    """

    def __init__(
        self, call: Call, model: str, prompts: Sequence[tuple[str | None, list[int]]],
        tokenizer: Any | None,
    ) -> None:
        self.id = ("chatcmpl-" if call.chat else "cmpl-") + uuid.uuid4().hex
        self._call, self._model, self._prompts = call, model, prompts
        self._created = int(time.time())
        self._tokenizer = tokenizer
        self._token_bytes = None if tokenizer is None else tokenizer.token_bytes
        kind = "chat.completion.chunk" if call.chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self._created, "model": model}
        self._head = "data: " + compact(head)[:-1] + ',"choices":['
        self._tail = ('],"usage":null}' if call.include_usage else "]}") + "\n\n"
        count = len(prompts) * call.params.n
        self._sent_text = [0] * count
        self._sent_tokens = [0] * count
        self._begun = [False] * count
        self._ended = [False] * count
        self._offsets = [0] * count  # characters of the tokens sent, for text_offset

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The response object of finished outputs, one for each prompt."""
        samples = self._call.params.n
        choices = [
            self._choice(index * samples + sample.index, output, sample)
            for index, output in enumerate(outputs) for sample in output.outputs
        ]
        return {
            "id": self.id,
            "object": "chat.completion" if self._call.chat else "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "usage": self._usage(outputs),
        }

    def pieces(self, prompt: int, output: RequestOutput) -> bytes:
        """Events with what is new in a later state of prompt number `prompt`; may be empty."""
        found = []
        for sample in output.outputs:
            place = prompt * self._call.params.n + sample.index
            if not self._ended[place]:
                piece = self._piece(place, output, sample)
                if piece is not None:
                    found.append(f'{self._head}{piece}{self._tail}')
        return "".join(found).encode()

    def last(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The end of a stream whose prompts have all finished."""
        if not self._call.include_usage:
            return DONE
        event = f'{self._head}],"usage":{compact(self._usage(outputs))}}}\n\n'
        return event.encode() + DONE

    def _usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        counted = 0 if self._call.discard else sum(
            len(sample.token_ids) for output in outputs for sample in output.outputs
        )
        prompt = sum(len(output.prompt_token_ids) for output in outputs)
        cached = sum(output.metrics.num_cached_tokens for output in outputs)
        return {
            **dialect.usage(prompt, counted), "prompt_tokens_details": {"cached_tokens": cached},
        }

    # Whole choices.

    def _choice(
        self, place: int, output: RequestOutput, sample: CompletionOutput
    ) -> dict[str, Any]:
        call = self._call
        said: dict[str, Any]
        if call.chat:
            logprobs = None
            if sample.logprobs is not None:
                logprobs = dialect.chat_logprobs(
                    sample.token_ids, sample.logprobs, call.params.logprobs, self._token_bytes
                )
            message = {"role": "assistant", "content": sample.text, "refusal": None}
            said = {"message": message, "logprobs": logprobs}
        else:
            tokens, tables = self._tokens(output, sample, 0)
            said = {
                "text": self._echo(output, place) + ("" if call.discard else sample.text),
                "logprobs": None if tables is None else self._names(tokens, tables, 0),
            }
        reason = "length" if call.discard else sample.finish_reason
        return {
            "index": place, **said, "finish_reason": reason, "stop_reason": sample.stop_reason,
        }

    def _echo(self, output: RequestOutput, place: int) -> str:
        if not self._call.echo:
            return ""
        text, ids = self._prompts[place // self._call.params.n]
        if text is None and self._tokenizer is not None:
            text = self._tokenizer.decode(ids, skip_special=False)
        return text or ""

    def _tokens(
        self, output: RequestOutput, sample: CompletionOutput, start: int
    ) -> tuple[list[int], list[TokenLogprobs | None] | None]:
        """Tokens from `start` on and their tables, an echoed prompt's before all others."""
        if sample.logprobs is None:
            return [], None
        tokens = sample.token_ids[start:]
        tables: list[TokenLogprobs | None] = list(sample.logprobs[start:])
        if self._call.discard:
            tokens, tables = [], []
        if self._call.echo and start == 0:
            tokens = list(output.prompt_token_ids) + tokens
            tables = list(output.prompt_logprobs or []) + tables
        return tokens, tables

    def _names(
        self, tokens: list[int], tables: list[TokenLogprobs | None], offset: int
    ) -> dict[str, Any]:
        named = dialect.completion_logprobs(tokens, tables, offset)
        if tables and tables[0] is None and self._tokenizer is not None:
            # The first token of a prompt has no table to name it.
            first = self._tokenizer.decode(tokens[:1], skip_special=False)
            shift = len(first) - len(named["tokens"][0])
            named["tokens"][0] = first
            named["text_offset"] = [
                place + shift if number else place
                for number, place in enumerate(named["text_offset"])
            ]
        return named

    # Pieces of a stream.

    def _piece(self, place: int, output: RequestOutput, sample: CompletionOutput) -> str | None:
        call = self._call
        new = "" if call.discard else sample.text[self._sent_text[place] :]
        first = not self._begun[place]
        count = len(sample.token_ids)
        logprobs = "null"
        fresh = sample.logprobs is not None and count > self._sent_tokens[place]
        if not (new or fresh or sample.finished or (first and (call.echo or count))):
            return None
        if fresh:
            logprobs = self._new_logprobs(place, output, sample)
        if first and call.echo:
            new = self._echo(output, place) + new
        self._begun[place] = True
        self._sent_text[place] = len(sample.text)
        self._sent_tokens[place] = count
        if not call.chat:
            said = f'"text":{_quote(new)}'
        elif first:
            said = f'"delta":{{"role":"assistant","content":{_quote(new)}}}'
        else:
            said = f'"delta":{{"content":{_quote(new)}}}' if new else '"delta":{}'
        ending = '"finish_reason":null'
        if sample.finished:
            self._ended[place] = True
            reason = "length" if call.discard else sample.finish_reason
            ending = f'"finish_reason":"{reason}","stop_reason":{json.dumps(sample.stop_reason)}'
        return f'{{"index":{place},{said},"logprobs":{logprobs},{ending}}}'

    def _new_logprobs(self, place: int, output: RequestOutput, sample: CompletionOutput) -> str:
        start = self._sent_tokens[place]
        assert sample.logprobs is not None
        if self._call.chat:
            return compact(dialect.chat_logprobs(
                sample.token_ids[start:], sample.logprobs[start:], self._call.params.logprobs,
                self._token_bytes,
            ))
        tokens, tables = self._tokens(output, sample, start)
        assert tables is not None
        named = self._names(tokens, tables, self._offsets[place])
        if tokens:
            self._offsets[place] = named["text_offset"][-1] + len(named["tokens"][-1])
        return compact(named)
