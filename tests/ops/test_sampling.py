"""Token choice against a plain NumPy model of the filters."""

import functools

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


IMPLEMENTATIONS = ["reference", "ffi"]


def choose(implementation):
    """The op with its implementation fixed, compiled."""
    return jax.jit(functools.partial(sampling.sample_tokens, implementation=implementation))


def problem(seed, rows, spread=3.0):
    """Logits and one uniform number per row."""
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(size=(rows, VOCAB)) * spread, jnp.float32)
    return logits, jnp.asarray(rng.random(rows), jnp.float32)


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def drawn(request):
    """Tokens drawn for every case from the same logits: [draws, cases]."""
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.normal(size=(len(CASES), VOCAB)) * 3, jnp.float32)
    columns = [jnp.asarray(c, d) for c, d in zip(
        zip(*CASES, strict=True), (jnp.float32, jnp.int32, jnp.float32, jnp.float32), strict=True
    )]
    draws = 3000
    uniforms = jnp.asarray(rng.random(draws * len(CASES)), jnp.float32)
    tiled = [jnp.tile(c, (draws,) + (1,) * (c.ndim - 1)) for c in (logits, *columns)]
    tokens = choose(request.param)(*tiled, uniforms)
    return np.asarray(logits), np.asarray(tokens).reshape(draws, len(CASES))


@pytest.mark.parametrize("case", range(len(CASES)))
def test_draws_follow_the_filtered_distribution(drawn, case):
    logits, tokens = drawn
    expected = numpy_distribution(logits[case], *CASES[case])
    counts = np.bincount(tokens[:, case], minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    # Five standard deviations of a binomial, plus one draw.
    bound = 5 * np.sqrt(expected * (1 - expected) * len(tokens)) + 1
    assert np.all(np.abs(counts - expected * len(tokens)) <= bound)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_greedy_takes_the_first_of_equals_whatever_the_neighbours(implementation):
    logits = np.zeros((3, VOCAB), np.float32)
    logits[0, [7, 9]] = 5
    logits[2, 600] = 1e30
    logits[2, :500] = -np.inf
    zero, ones = jnp.zeros(3), jnp.ones(3)
    args = (jnp.zeros(3, jnp.int32), ones, zero, ones * 0.5)
    run = choose(implementation)
    assert run(jnp.asarray(logits), zero, *args).tolist() == [7, 0, 600]
    mixed = run(jnp.asarray(logits), jnp.asarray([0.0, 1.0, 0.0]), *args)
    assert mixed.tolist()[0::2] == [7, 600]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_give_no_token(implementation, bad, temperature):
    logits = np.zeros((3, VOCAB), np.float32)
    logits[0, 5] = bad
    logits[1, :] = -np.inf
    logits[2, VOCAB - 1] = 40
    ones = jnp.ones(3)
    tokens = choose(implementation)(
        jnp.asarray(logits), ones * temperature, jnp.zeros(3, jnp.int32), ones, ones * 0, ones * 0.5
    )
    assert tokens.tolist() == [-1, -1, VOCAB - 1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_does_not_depend_on_its_neighbours(implementation):
    logits, _ = problem(5, 4, 1.0)
    temperature, top_k = jnp.asarray([1.0, 0.0, 0.8, 1.2]), jnp.asarray([0, 0, 3, 0], jnp.int32)
    top_p, min_p = jnp.asarray([1.0, 1.0, 1.0, 0.5]), jnp.zeros(4)
    uniforms = jnp.asarray([0.1, 0.2, 0.3, 0.999999])
    run = choose(implementation)
    together = run(logits, temperature, top_k, top_p, min_p, uniforms)
    order = jnp.asarray([2, 0, 3, 1])
    shuffled = run(*(x[order] for x in (logits, temperature, top_k, top_p, min_p, uniforms)))
    assert shuffled.tolist() == together[order].tolist()


def test_both_implementations_choose_the_same_tokens():
    rng = np.random.default_rng(9)
    rows = 400
    logits, uniforms = problem(11, rows)
    parameters = (
        jnp.asarray(rng.choice([0.0, 0.3, 1.0, 2.0], rows), jnp.float32),
        jnp.asarray(rng.choice([0, 1, 7, 50, 10_000], rows), jnp.int32),
        jnp.asarray(rng.choice([1.0, 0.5, 0.95, 0.01], rows), jnp.float32),
        jnp.asarray(rng.choice([0.0, 0.05, 1.0], rows), jnp.float32),
    )
    plain = choose("reference")(logits, *parameters, uniforms)
    native = choose("ffi")(logits, *parameters, uniforms)
    # A uniform number within rounding of a token's edge may fall on either side.
    assert np.mean(np.asarray(plain) != np.asarray(native)) <= 0.005


def test_rows_past_the_valid_ones_are_skipped():
    logits, uniforms = problem(13, 6)
    ones = jnp.ones(6)
    args = (logits, ones, jnp.zeros(6, jnp.int32), ones, ones * 0, uniforms)
    full = sampling.sample_tokens(*args, implementation="ffi")
    part = sampling.sample_tokens(*args, rows=jnp.asarray([4]), implementation="ffi")
    assert part.tolist() == [*full.tolist()[:4], 0, 0]


def test_uniforms_depend_on_request_sample_and_token_alone():
    keys = jnp.asarray([[0, 1], [0, 1], [0, 2], [0, 1]], jnp.uint32)
    numbers = sampling.request_uniforms(
        keys, jnp.asarray([0, 0, 0, 1]), jnp.asarray([5, 5, 5, 5])
    ).tolist()
    assert numbers[0] == numbers[1]
    assert len(set(numbers)) == 3
    assert all(0 <= number < 1 for number in numbers)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_uniforms_stay_inside_the_filter(implementation):
    logits, _ = problem(7, 1, 1.0)
    kept = set(np.argsort(-np.asarray(logits[0]))[:3].tolist())
    for uniform in (0.0, float(np.nextafter(np.float32(1), np.float32(0)))):
        token = choose(implementation)(
            logits, jnp.ones(1), jnp.full(1, 3), jnp.ones(1), jnp.zeros(1), jnp.full(1, uniform)
        )
        assert int(token[0]) in kept


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation"):
        sampling.sample_tokens(
            jnp.zeros((1, 4)), *([jnp.zeros(1)] * 5), implementation="magic"
        )
