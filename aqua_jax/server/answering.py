"""Runs one call in the engine: whole or as a stream, for as long as the client is there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from aqua_jax.engine.async_engine import AsyncEngine
from aqua_jax.engine.mailbox import AnswerStream
from aqua_jax.engine.outputs import RequestOutput
from aqua_jax.errors import AquaError, RequestError
from aqua_jax.server.answers import Answer, compact
from aqua_jax.server.calls import Call
from aqua_jax.server.errors import ApiError, as_api_error
from aqua_jax.server.metrics import Latencies, Watch

T = TypeVar("T")

Prompts = list[tuple[str | None, list[int]]]


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, cancelled when the client disconnects.

    Raises:
      ClientGone: it did.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for one in (task, watch):
            if not one.done():
                one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class Run:
    """The engine's requests of one call, from acceptance to their end.

    Use it as an asynchronous context: what has not ended inside is aborted.
    """

    def __init__(
        self, engine: AsyncEngine, call: Call, prompts: Prompts, user: str, arrival: float,
        latencies: Latencies,
    ) -> None:
        self._engine, self._call, self._prompts = engine, call, prompts
        self._user, self._arrival, self._latencies = user, arrival, latencies
        self._streams: list[AnswerStream] = []
        self._watches: list[Watch] = []

    async def __aenter__(self) -> Run:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Aborts what has not ended."""
        for stream in self._streams:
            stream.close()

    @property
    def request_ids(self) -> list[str]:
        """Of the accepted requests."""
        return [stream.request_id for stream in self._streams]

    async def submit(self) -> None:
        """Hands all prompts to the engine; returns when every one is accepted.

        Raises:
          RequestError: one isn't.
          EngineDeadError: none can be.
        """
        call = self._call
        for index, (text, ids) in enumerate(self._prompts):
            try:
                stream = await self._engine.submit(
                    {"prompt_token_ids": ids} if text is None
                    else {"prompt": text, "prompt_token_ids": ids},
                    call.params, priority=call.priority, user=self._user, weight=call.weight,
                    arrival=self._arrival, final_only=not call.stream,
                )
            except RequestError as error:
                if error.field not in ("prompt", "prompt_token_ids"):
                    raise
                # As the client calls it.
                name = "prompt" if len(self._prompts) == 1 else f"prompt[{index}]"
                raise RequestError(name, error.value, error.allowed) from None
            self._streams.append(stream)
            self._watches.append(self._latencies.watch(call.stream))

    async def finished(self) -> list[RequestOutput]:
        """The finished outputs, one for each prompt.

        Raises:
          ApiError: the engine ended one with an error, or it was aborted.
        """
        found = []
        for stream, watch in zip(self._streams, self._watches, strict=True):
            async for output in stream:
                watch.saw(output)
            check_end(output)
            found.append(output)
        return found

    async def states(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """(number of the prompt, newer state) until all have finished."""
        if len(self._streams) == 1:
            async for output in self._streams[0]:
                self._watches[0].saw(output)
                yield 0, output
            return
        # One place in the queue: while the reader is slow, states pile up nowhere.
        queue: asyncio.Queue[tuple[int, RequestOutput | Exception]] = asyncio.Queue(1)

        async def forward(index: int, stream: AnswerStream) -> None:
            try:
                async for output in stream:
                    self._watches[index].saw(output)
                    await queue.put((index, output))
            except AquaError as error:
                await queue.put((index, error))

        tasks = [
            asyncio.ensure_future(forward(index, stream))
            for index, stream in enumerate(self._streams)
        ]
        try:
            left = len(tasks)
            while left:
                index, state = await queue.get()
                if isinstance(state, Exception):
                    raise state
                left -= state.finished
                yield index, state
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def check_end(output: RequestOutput) -> None:
    """Raises ApiError when a finished output isn't an answer."""
    reasons = {sample.finish_reason for sample in output.outputs}
    if "error" in reasons:
        raise ApiError(
            500, output.error or "the engine failed", kind="server_error", code="engine_error"
        )
    if "abort" in reasons:
        raise ApiError(
            503, "the server is shutting down and had no time left for this request",
            kind="server_error", code="aborted",
        )


class EventStream(Response):
    """A stream of server-sent events, ended by `[DONE]` or by an event with an error.

    Args:
      run: entered and submitted; closed at the end.
      answer: renders what it brings.
      headers: of the response.
      leave: called once at the end, however it comes.
    """

    media_type = "text/event-stream"

    def __init__(
        self, run: Run, answer: Answer, headers: dict[str, str], leave: Callable[[], None]
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", **headers})
        del self.headers["content-length"]  # it isn't known
        self._run, self._answer, self._leave = run, answer, leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends everything; what the client doesn't wait for is aborted."""
        try:
            async with self._run:
                await while_connected(receive, self._write(send))
        except (ClientGone, OSError):
            pass  # nobody is left to tell
        finally:
            self._leave()

    async def _write(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        )
        latest: dict[int, RequestOutput] = {}
        async with contextlib.aclosing(self._run.states()) as states:
            try:
                async for index, output in states:
                    if output.finished:
                        check_end(output)
                    latest[index] = output
                    piece = self._answer.pieces(index, output)
                    if piece:
                        await send(_part(piece, True))
            except (AquaError, ApiError) as error:
                event = f"data: {compact(as_api_error(error).body)}\n\n"
                await send(_part(event.encode(), False))
                return
        ended = self._answer.last([latest[index] for index in sorted(latest)])
        await send(_part(ended, False))


def _part(body: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}

