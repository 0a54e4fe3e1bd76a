"""First come, first served."""

from hypothesis import given
from hypothesis import strategies as st

from aqua_jax.scheduling.policies import POLICIES, FirstComeFirstServed
from aqua_jax.scheduling.sequence import Sequence


def _sequences(arrivals):
    return [
        Sequence(index, str(index), [1], 2, arrival=float(arrival))
        for index, arrival in enumerate(arrivals)
    ]


def _order(sequences):
    return sorted(sequences, key=lambda s: (s.arrival, s.seq_id))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_the_queue_is_in_order_of_arrival_whenever_one_joins(arrivals, random):
    policy, sequences = FirstComeFirstServed(), _sequences(arrivals)
    random.shuffle(sequences)
    queued = []
    for sequence in sequences:
        policy.push(sequence)
        queued.append(sequence)
        if random.random() < 0.3:
            leaver = random.choice(queued)
            policy.remove(leaver)
            queued.remove(leaver)
        assert len(policy) == len(queued)
        assert policy.head(0.0) is (_order(queued)[0] if queued else None)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_early_arrivals_run_first_and_the_latest_gives_way(arrivals, random):
    policy, sequences = FirstComeFirstServed(), _sequences(arrivals)
    expected = _order(sequences)
    random.shuffle(sequences)
    order = policy.running_order(sequences, 0.0)
    assert order == expected
    assert policy.victim(reversed(order)) is expected[-1]


def test_the_policy_has_a_name():
    assert POLICIES["fcfs"] is FirstComeFirstServed
