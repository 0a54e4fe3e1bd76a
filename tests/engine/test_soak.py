"""A long mixed load with random aborts: everything accepted ends, and nothing is left in use.

80 requests here, 2,000 in `make test-long`.
"""

from __future__ import annotations

import random
import threading

from aqua_jax.config import SamplingParams
from tests.engine.driving import tiny_engine
from tests.scale import at_scale

VOCAB = 131


def random_params(generator: random.Random) -> SamplingParams:
    greedy = generator.random() < 0.4
    return SamplingParams(
        n=generator.choice([1, 1, 1, 2, 4]),
        temperature=0.0 if greedy else generator.uniform(0.2, 1.5),
        top_k=generator.choice([0, 0, 5]),
        top_p=generator.choice([1.0, 0.9]),
        max_tokens=generator.randrange(1, 160),
        min_tokens=0,
        stop_token_ids=generator.sample(range(VOCAB), generator.choice([0, 0, 3])),
        logprobs=generator.choice([None, None, None, 2]),
        prompt_logprobs=generator.choice([None] * 7 + [1]),
        frequency_penalty=generator.choice([0.0] * 7 + [0.5]),
    )


def test_soak_ends_with_nothing_in_use(tmp_path):
    generator = random.Random(17)
    total = at_scale(80, 2000)
    threads = threading.active_count()
    prefixes = [[generator.randrange(3, VOCAB) for _ in range(48)] for _ in range(3)]
    finished: dict[str, str] = {}
    aborted: set[str] = set()
    with tiny_engine(tmp_path, kv_cache_tokens=384, max_num_seqs=8) as engine:
        added = 0
        while added < total or engine.has_unfinished():
            while added < total and engine.num_live_requests < 20 and generator.random() < 0.6:
                ids = [generator.randrange(3, VOCAB) for _ in range(generator.randrange(1, 120))]
                if generator.random() < 0.4:
                    ids = generator.choice(prefixes) + ids[:60]
                engine.add_request(str(added), ids, random_params(generator))
                added += 1
            if generator.random() < 0.05 and added:
                victim = str(generator.randrange(max(0, added - 20), added))
                if victim not in finished:
                    aborted.add(victim)
                engine.abort(victim)
            for output in engine.step():
                assert output.request_id not in finished, "an ended request came back"
                for sample in output.outputs:
                    assert len(sample.token_ids) < 160
                if output.finished:
                    reasons = {sample.finish_reason for sample in output.outputs}
                    assert reasons <= {"stop", "length", "abort"}
                    finished[output.request_id] = "abort" if "abort" in reasons else "done"
        stats = engine.stats()
    assert sorted(finished, key=int) == [str(i) for i in range(total)]
    assert {i for i, how in finished.items() if how == "abort"} == aborted
    assert stats["pages"]["in_use"] == 0 and stats["live_requests"] == 0
    assert stats["pages"]["free"] + stats["pages"]["cached"] == stats["pages"]["total"]
    assert stats["preemptions"] > 0 and stats["cached_tokens"] > 0
    assert stats["pool_resets"] == 0
    assert threading.active_count() == threads
