"""Token choice against a plain NumPy model of the filters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqua_jax.ops import sampling

VOCAB = 701  # neither a power of two nor a multiple of the block


def numpy_distribution(logits, temperature, top_k, top_p, min_p):
    """Distribution after min-p, top-k and top-p, in float64; no ties expected."""
    scaled = logits.astype(np.float64) / temperature
    probs = np.exp(scaled - scaled.max())
    probs[probs < min_p] = 0
    order = np.argsort(-probs)
    if top_k > 0:
        probs[order[top_k:]] = 0
    if top_p < 1:
        mass = np.cumsum(probs[order]) / probs.sum()
        probs[order[np.searchsorted(mass, top_p) + 1 :]] = 0
    return probs / probs.sum()


CASES = [
    # temperature, top_k, top_p, min_p
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, 0, 0.6, 0.0),
    (1.0, 40, 0.9, 0.0),
    (0.9, 0, 1.0, 0.2),
    (1.0, 1, 1.0, 0.0),
    (1.0, VOCAB + 5, 0.999, 0.001),
]


@pytest.fixture(scope="module")
def drawn():
    """Tokens drawn for every case from the same logits: [draws, cases]."""
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.normal(size=(len(CASES), VOCAB)) * 3, jnp.float32)
    columns = [jnp.asarray(c, d) for c, d in zip(
        zip(*CASES, strict=True), (jnp.float32, jnp.int32, jnp.float32, jnp.float32), strict=True
    )]
    draw = jax.jit(jax.vmap(sampling.sample_tokens, in_axes=(None,) * 5 + (0,)))
    uniforms = jnp.asarray(rng.random((3000, len(CASES))), jnp.float32)
    return np.asarray(logits), np.asarray(draw(logits, *columns, uniforms))


@pytest.mark.parametrize("case", range(len(CASES)))
def test_draws_follow_the_filtered_distribution(drawn, case):
    logits, tokens = drawn
    expected = numpy_distribution(logits[case], *CASES[case])
    counts = np.bincount(tokens[:, case], minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    # Five standard deviations of a binomial, plus one draw.
    bound = 5 * np.sqrt(expected * (1 - expected) * len(tokens)) + 1
    assert np.all(np.abs(counts - expected * len(tokens)) <= bound)


def test_greedy_takes_the_first_of_equals_whatever_the_neighbours():
    logits = np.zeros((3, VOCAB), np.float32)
    logits[0, [7, 9]] = 5
    logits[2, 600] = np.inf
    zero, ones = jnp.zeros(3), jnp.ones(3)
    args = (jnp.zeros(3, jnp.int32), ones, zero, ones * 0.5)
    assert sampling.sample_tokens(jnp.asarray(logits), zero, *args).tolist() == [7, 0, 600]
    mixed = sampling.sample_tokens(jnp.asarray(logits), jnp.asarray([0.0, 1.0, 0.0]), *args)
    assert mixed.tolist()[0::2] == [7, 600]


def test_a_row_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(5)
    logits = jnp.asarray(rng.normal(size=(4, VOCAB)), jnp.float32)
    temperature, top_k = jnp.asarray([1.0, 0.0, 0.8, 1.2]), jnp.asarray([0, 0, 3, 0], jnp.int32)
    top_p, min_p = jnp.asarray([1.0, 1.0, 1.0, 0.5]), jnp.zeros(4)
    uniforms = jnp.asarray([0.1, 0.2, 0.3, 0.999999])
    together = sampling.sample_tokens(logits, temperature, top_k, top_p, min_p, uniforms)
    order = jnp.asarray([2, 0, 3, 1])
    shuffled = sampling.sample_tokens(
        *(x[order] for x in (logits, temperature, top_k, top_p, min_p, uniforms))
    )
    assert shuffled.tolist() == together[order].tolist()


def test_uniforms_depend_on_request_sample_and_token_alone():
    keys = jnp.asarray([[0, 1], [0, 1], [0, 2], [0, 1]], jnp.uint32)
    numbers = sampling.request_uniforms(
        keys, jnp.asarray([0, 0, 0, 1]), jnp.asarray([5, 5, 5, 5])
    ).tolist()
    assert numbers[0] == numbers[1]
    assert len(set(numbers)) == 3
    assert all(0 <= number < 1 for number in numbers)


def test_extreme_uniforms_stay_inside_the_filter():
    logits = jnp.asarray(np.random.default_rng(7).normal(size=(2, VOCAB)), jnp.float32)
    kept = set(np.argsort(-np.asarray(logits[0]))[:3].tolist())
    for uniform in (0.0, float(np.nextafter(np.float32(1), np.float32(0)))):
        token = sampling.sample_tokens(
            logits[:1], jnp.ones(1), jnp.full(1, 3), jnp.ones(1), jnp.zeros(1),
            jnp.full(1, uniform),
        )
        assert int(token[0]) in kept


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation"):
        sampling.sample_tokens(
            jnp.zeros((1, 4)), *([jnp.zeros(1)] * 5), implementation="magic"
        )
