"""The HTTP application: OpenAI's endpoints over one `AsyncEngine`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from aqua_jax.engine.async_engine import AsyncEngine
from aqua_jax.errors import EngineDeadError, RequestError
from aqua_jax.prompts import render_chat
from aqua_jax.server import errors, openapi
from aqua_jax.server.answering import ClientGone, EventStream, Prompts, Run, while_connected
from aqua_jax.server.answers import Answer, compact
from aqua_jax.server.calls import Call, parse_call
from aqua_jax.server.config import ServerConfig
from aqua_jax.server.errors import ApiError
from aqua_jax.server.feed import StateFeed
from aqua_jax.server.gate import Busy, Gate
from aqua_jax.server.keys import Keys
from aqua_jax.server.metrics import Collector, Latencies
from aqua_jax.server.page import page
from aqua_jax.server.snapshots import Snapshot

T = TypeVar("T")

_INLINE_CHARS = 2000  # of text; more is tokenized by a thread, beside the event loop
_FOLLOW_EVERY_S = 0.5
_LOOK_AGAIN_S = 0.1  # when there is no later version yet: snapshots that cost much are kept longer
_CLIENT_GONE = 499  # nginx's number; nobody sees it
_OPEN_PATHS = ("/health", "/")


class Door:
    """Lets requests in that have a key."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        given = headers.get(b"authorization")
        owner = self._keys.owner(None if given is None else given.decode("latin-1"))
        if owner is None and scope["path"] not in _OPEN_PATHS:
            refusal = ApiError(
                401, "this server wants a key: Authorization: Bearer KEY", code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            await errors.error_response(refusal)(scope, receive, send)
            return
        scope["aqua.owner"] = owner or ""
        await self._app(scope, receive, send)


class Server:
    """Endpoints and what they share. Everything runs on one event loop.

    Args:
      engine: serves; its thread is the only one that steps.
      config: limits and names.
      model: name to serve the model under, unless the configuration has one.
      max_model_len: longest prompt and answer together, in tokens.
      keys: who is let in.
    """

    def __init__(
        self, engine: AsyncEngine, config: ServerConfig, *, model: str, max_model_len: int,
        keys: Keys,
    ) -> None:
        self.engine, self.config = engine, config
        self.model = config.served_model_name or model
        self.gate = Gate(config.max_live_requests)
        self.draining = False
        self._max_model_len = max_model_len
        self._started = int(time.time())
        self._runs: set[Run] = set()
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "aqua-tokenize")
        self._stats: Snapshot[dict[str, Any]] = Snapshot(engine, lambda inner: inner.stats())
        self._feed = StateFeed(engine, lambda: {"model": self.model, "live": self.gate.live})
        self.latencies = Latencies(self._feed.ended)
        self._collector = Collector(self.latencies)
        self._registry = CollectorRegistry()
        self._registry.register(self._collector)
        ProcessCollector(registry=self._registry)
        refusals = (ApiError, RequestError, Busy, EngineDeadError, HTTPException, Exception)
        self.app: ASGIApp = Door(
            Starlette(
                routes=[
                    Route("/v1/completions", self._completions, methods=["POST"]),
                    Route("/v1/chat/completions", self._chat, methods=["POST"]),
                    Route("/v1/models", self._models),
                    Route("/v1/models/{model:path}", self._one_model),
                    Route("/health", self._health),
                    Route("/metrics", self._metrics),
                    Route("/debug/state", self._debug_state),
                    Route("/openapi.json", self._openapi),
                    Route("/", self._page),
                ],
                exception_handlers=dict.fromkeys(refusals, errors.handle),
            ),
            keys,
        )

    def abort_all(self) -> None:
        """Ends every live request; its client is told why."""
        for run in self._runs:
            for request_id in run.request_ids:
                self.engine.abort(request_id)

    def close(self) -> None:
        """Ends the server's own thread."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    # OpenAI's endpoints.

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def _answer(self, request: Request, chat: bool) -> Response:
        arrival = time.monotonic()
        self._check_open()
        self.gate.check()
        try:
            call = parse_call(await self._read_body(request), chat)
            return await self._run(request, call, arrival)
        except ClientGone:
            return Response(status_code=_CLIENT_GONE)

    async def _run(self, request: Request, call: Call, arrival: float) -> Response:
        self._check_model(call.model)
        count = 1 if call.chat else len(call.prompts)
        if count > self.gate.limit:
            raise RequestError("prompt", f"{count} prompts", f"at most {self.gate.limit}")
        self.gate.enter(count)
        run: Run | None = None
        handed_over = False

        def leave() -> None:
            if run is not None:
                self._runs.discard(run)
            self.gate.leave(count)

        try:
            prompts = await self._tokenize(call)
            user = call.user or request.scope["aqua.owner"]
            run = Run(self.engine, call, prompts, user, arrival, self.latencies)
            self._runs.add(run)
            answer = Answer(call, call.model or self.model, prompts, self.engine.tokenizer)
            headers = {"x-request-id": answer.id}
            if not call.stream:
                outputs = await while_connected(request.receive, self._whole(run))
                return _compact_json(answer.whole(outputs), headers)
            try:
                await while_connected(request.receive, run.submit())
            except BaseException:
                run.close()
                raise
            handed_over = True
            return EventStream(run, answer, headers, leave)
        except RequestError as error:
            if call.chat and error.field.startswith("prompt"):
                raise ApiError(400, str(error), param="messages") from None
            raise
        finally:
            if not handed_over:
                leave()

    async def _whole(self, run: Run) -> Any:
        async with run:
            await run.submit()
            return await run.finished()

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._describe()]})

    async def _one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._describe())

    def _describe(self) -> dict[str, Any]:
        return {
            "id": self.model, "object": "model", "created": self._started, "owned_by": "aqua-jax",
            "max_model_len": self._max_model_len,
        }

    # Looking in from outside.

    async def _health(self, request: Request) -> Response:
        self._check_open()
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        stats = await self._stats.get()
        self._collector.stats = stats if stats is not None else self.engine.stats()
        self._collector.live, self._collector.refused = self.gate.live, self.gate.refused
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def _debug_state(self, request: Request) -> Response:
        since = request.query_params.get("since", "")
        if since and not (since.isdecimal() and len(since) < 20):
            raise RequestError("since", since, "a version that /debug/state has given")
        seen = int(since) if since else None
        state = await self._feed.get(seen)
        if state is None:
            raise ApiError(503, "the engine doesn't answer", kind="server_error")
        headers = {"cache-control": "no-store"}
        if "follow" in request.query_params:
            kind = "application/x-ndjson"
            return StreamingResponse(self._follow(seen), media_type=kind, headers=headers)
        return Response(state[1], media_type="application/json", headers=headers)

    async def _follow(self, seen: int | None) -> AsyncGenerator[bytes, None]:
        """A line for each new version, until the server stops."""
        clock = asyncio.get_running_loop().time
        while not self.draining:
            began = clock()
            state = await self._feed.get(seen)
            if state is None or state[0] == seen:
                await asyncio.sleep(_LOOK_AGAIN_S)
                continue
            seen = state[0]
            yield state[1] + b"\n"
            # Looking waits for the end of a step, which isn't to be added to the pause.
            await asyncio.sleep(max(_LOOK_AGAIN_S, began + _FOLLOW_EVERY_S - clock()))

    async def _openapi(self, request: Request) -> Response:
        import aqua_jax

        return JSONResponse(openapi.document(aqua_jax.__version__))

    async def _page(self, request: Request) -> Response:
        return page()

    # Inside.

    def _check_open(self) -> None:
        dead = self.engine.dead
        if dead is not None:
            raise EngineDeadError(f"the engine has stopped: {dead}")
        if self.draining:
            raise ApiError(
                503, "the server is shutting down", kind="server_error", code="shutting_down",
                headers={"retry-after": "5", "connection": "close"},
            )

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            raise ApiError(
                404, f"the model {name!r} does not exist; this server has {self.model!r}",
                param="model", code="model_not_found",
            )

    async def _read_body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
        # A page of another site can send forms and plain text here, but not JSON unasked.
        if kind.lower() != "application/json":
            raise ApiError(
                415, f"Content-Type: got {kind}; allowed: application/json", code="not_json"
            )
        limit = self.config.max_body_bytes
        length = request.headers.get("content-length", "0")
        parts, size = [], int(length) if length.isdecimal() and len(length) < 20 else 0
        if size <= limit:
            size = 0
            try:
                async with asyncio.timeout(self.config.read_timeout_s):
                    more = True
                    while more and size <= limit:
                        message = await request.receive()
                        if message["type"] == "http.disconnect":
                            raise ClientGone
                        parts.append(message.get("body", b""))
                        size += len(parts[-1])
                        more = message.get("more_body", False)
            except TimeoutError:
                raise ApiError(
                    408, f"the body didn't arrive within {self.config.read_timeout_s:g} s",
                    headers={"connection": "close"},
                ) from None
        if size > limit:
            raise ApiError(
                413, f"body: more than {limit} bytes", param="body", code="body_too_large",
                headers={"connection": "close"},
            )
        return b"".join(parts)

    async def _tokenize(self, call: Call) -> Prompts:
        """Text and ids of every prompt.

        Raises:
          RequestError: no tokenizer or chat template, or messages that it refuses.
          ApiError: a prompt that is too long.
        """
        tokenizer = self.engine.tokenizer

        def chat() -> Prompts:
            return [render_chat(tokenizer, call.messages)]

        def complete() -> Prompts:
            return [
                (prompt, _encode(tokenizer, prompt)) if isinstance(prompt, str)
                else (None, prompt)
                for prompt in call.prompts
            ]

        if call.chat:
            size = sum(len(message["content"]) for message in call.messages)
        else:
            size = sum(len(prompt) for prompt in call.prompts if isinstance(prompt, str))
        found = await self._beside(chat if call.chat else complete, size > _INLINE_CHARS)
        for index, (_, ids) in enumerate(found):
            if len(ids) >= self._max_model_len:
                where = "messages" if call.chat else "prompt"
                raise ApiError(
                    400, f"{where}: got {len(ids)} tokens; allowed: at most "
                    f"{self._max_model_len - 1}, for the model's length is {self._max_model_len} "
                    "and an answer needs one",
                    param=where if len(found) == 1 else f"{where}[{index}]",
                    code="context_length_exceeded",
                )
        return found

    async def _beside(self, function: Callable[[], T], slow: bool) -> T:
        if not slow:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._worker, function)


def _encode(tokenizer: Any | None, text: str) -> list[int]:
    if tokenizer is None:
        raise RequestError("prompt", text, "token ids: this model came without a tokenizer")
    ids: list[int] = tokenizer.encode(text)
    return ids


def _compact_json(value: dict[str, Any], headers: dict[str, str]) -> Response:
    return Response(compact(value), headers=headers, media_type="application/json")

