"""The asyncio engine: streaming, aborts, errors where they belong, a clean end."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from aqua_jax.config import EngineConfig, SamplingParams
from aqua_jax.engine.async_engine import AsyncEngine
from aqua_jax.engine.engine import Engine
from aqua_jax.errors import EngineDeadError, RequestError
from tests.tiny import write_config

PROMPT = [5, 6, 7, 8]


def params(tokens, **fields):
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, **fields)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    model = write_config(tmp_path_factory.mktemp("async") / "model")
    return EngineConfig(
        model=str(model), load_format="dummy", dtype="float32", kv_cache_tokens=1024,
        max_num_seqs=4, max_step_tokens=64, warmup="none",
    )


@pytest.fixture(scope="module")
def shared(config):
    """One engine for the tests that leave it running."""
    engine = AsyncEngine(config)
    yield engine
    engine.shutdown()


async def collect(stream):
    return [output async for output in stream]


def idle(engine, seconds=60.0):
    """Whether the engine gets rid of all requests in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if engine.stats()["live_requests"] == 0:
            return True
        time.sleep(0.01)
    return False


def test_outputs_grow_and_the_last_is_finished(shared):
    outputs = asyncio.run(collect(shared.generate(PROMPT, params(20))))
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    assert lengths == sorted(set(lengths)) and lengths[-1] == 20
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    for earlier, later in zip(outputs, outputs[1:], strict=False):
        ids = earlier.outputs[0].token_ids
        assert later.outputs[0].token_ids[: len(ids)] == ids


def test_many_at_once_say_what_one_alone_says(shared):
    async def run():
        prompts = [[5 + index, 9, 11] for index in range(12)]
        streams = [collect(shared.generate(p, params(5 + i))) for i, p in enumerate(prompts)]
        return await asyncio.gather(*streams)

    together = asyncio.run(run())
    for index, outputs in enumerate(together):
        assert len(outputs[-1].outputs[0].token_ids) == 5 + index
        alone = asyncio.run(collect(shared.generate([5 + index, 9, 11], params(1))))
        assert alone[-1].outputs[0].token_ids == outputs[-1].outputs[0].token_ids[:1]


def test_a_slow_consumer_skips_states_but_misses_no_token(shared):
    async def run():
        seen = []
        async for output in shared.generate(PROMPT, params(60)):
            seen.append(len(output.outputs[0].token_ids))
            await asyncio.sleep(0.05)
        return seen

    seen = asyncio.run(run())
    assert seen[-1] == 60 and len(seen) < 60


def test_a_bad_request_is_its_consumers_error_only(shared):
    async def run():
        good = asyncio.create_task(collect(shared.generate(PROMPT, params(30))))
        with pytest.raises(RequestError, match="prompt"):
            await collect(shared.generate([10**6], params(3)))
        with pytest.raises(RequestError, match="prompt"):
            await collect(shared.generate({"nope": 1}, params(3)))
        return await good

    assert asyncio.run(run())[-1].finished


def test_a_taken_request_id_is_refused_and_the_first_goes_on(shared):
    async def run():
        first = shared.generate(PROMPT, params(100), request_id="same")
        await anext(first)
        with pytest.raises(RequestError, match="request_id"):
            await collect(shared.generate(PROMPT, params(2), request_id="same"))
        return await collect(first)

    assert asyncio.run(run())[-1].outputs[0].finish_reason == "length"


def test_cancelling_the_task_aborts_the_request(shared):
    aborted = shared.stats()["requests_aborted"]

    async def run():
        task = asyncio.create_task(collect(shared.generate(PROMPT, params(400))))
        while shared.stats()["live_requests"] == 0:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert idle(shared) and shared.stats()["requests_aborted"] == aborted + 1
    assert shared.stats()["pages"]["in_use"] == 0


def test_closing_the_generator_aborts_the_request(shared):
    async def run():
        stream = shared.generate(PROMPT, params(400))
        await anext(stream)
        await stream.aclose()

    asyncio.run(run())
    assert idle(shared)


def test_abort_gives_the_consumer_a_last_output(shared):
    async def run():
        last = None
        async for output in shared.generate(PROMPT, params(400), request_id="stop-me"):
            last = output
            shared.abort("stop-me")
        return last

    last = asyncio.run(run())
    assert last.finished and last.outputs[0].finish_reason == "abort"
    shared.abort("unknown")


def test_an_idle_engine_uses_no_processor(shared):
    assert idle(shared)
    spent = []
    while not spent or (min(spent) >= 0.15 and len(spent) < 5):  # others end their work
        before = time.process_time()
        time.sleep(0.5)
        spent.append(time.process_time() - before)
    assert min(spent) < 0.15, spent


def test_shutdown_ends_everybody_with_the_reason(config):
    async def run():
        engine = AsyncEngine(config)
        tasks = [
            asyncio.create_task(collect(engine.generate([7 + i], params(500)))) for i in range(6)
        ]
        while engine.stats()["live_requests"] < 6:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.shutdown)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(end) for end in ends] == [EngineDeadError] * 6
        assert all("was shut down" in str(end) for end in ends)
        with pytest.raises(EngineDeadError, match="shut down"):
            await collect(engine.generate(PROMPT, params(3)))
        engine.shutdown()
        engine.abort("x")

    before = threading.active_count()
    asyncio.run(run())
    assert threading.active_count() <= before


def test_a_failing_engine_tells_its_consumers_why(config, caplog):
    class Failing(Engine):
        """Dies at the third step."""

        calls = 0

        def step(self):
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("the device melted")
            return super().step()

    async def run():
        async with AsyncEngine(config, make_engine=Failing) as engine:
            with pytest.raises(EngineDeadError, match="the device melted") as caught:
                await collect(engine.generate(PROMPT, params(50)))
            assert isinstance(caught.value.__cause__, RuntimeError)
            with pytest.raises(EngineDeadError, match="the device melted"):
                await collect(engine.generate(PROMPT, params(50)))

    asyncio.run(run())
    (said,) = [record for record in caplog.records if record.message == "the engine stops"]
    assert "the device melted" in str(said.exc_info)


def test_consumers_in_several_threads_with_their_own_loops(shared):
    results = {}

    def consume(index):
        results[index] = asyncio.run(collect(shared.generate([5 + index], params(15))))[-1]

    threads = [threading.Thread(target=consume, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(len(results[index].outputs[0].token_ids) == 15 for index in range(4))
