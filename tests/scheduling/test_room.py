"""What is asked for when somebody has to go, and who goes."""

from __future__ import annotations

from aqua_jax.scheduling.fair import Fair
from aqua_jax.scheduling.holdings import Found
from aqua_jax.scheduling.sequence import Sequence
from tests.scheduling.histories import History, Machine


def test_other_newcomers_need_nothing_where_no_prompt_fits_a_step():
    history = History(
        Machine(num_pages=40, max_num_seqs=4, max_step_tokens=16, host_slots=8), Fair()
    )
    room = history.scheduler.room
    wanted = [
        room.newcomers(Sequence(0, "0", [1] * prompt, 200), Found([], 0), 3)
        for prompt in (4, 8, 60)
    ]
    assert wanted == [2 * 1, 1 * 2, 0]  # others times pages
    history.close()
