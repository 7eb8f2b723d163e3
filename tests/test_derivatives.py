"""Derivatives of the ops, forward and backward, of first and second order, against differences in float64."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jax_router
from cases import draw
from jax_router import _native
from moves import lay_out
from oracle import activation_topk as oracle_activation_topk
from oracle import f64


def directional(function, x, direction, h=1e-5):
    """The float64 derivative of a float64 function, by central differences."""
    return (function(f64(x) + h * f64(direction)) - function(f64(x) - h * f64(direction))) / (2 * h)


def jacobian(function, x):
    """The float64 derivatives of a float64 function of rows in each entry of its row, on a new last axis."""
    return np.stack([directional(function, x, unit) for unit in np.eye(x.shape[-1])], axis=-1)


SCORINGS = list(itertools.product(["sqrtsoftplus", "sigmoid", "softmax"], [True, False]))


@pytest.mark.parametrize(("score_fn", "renormalize"), SCORINGS)
def test_jvp_and_grad(score_fn, renormalize, implementation, rng):
    """Against differences of the float64 oracle, forward and backward, with a bias that steers and a mask."""
    logits, tangent = draw(rng, "logits", 6, 16), draw(rng, "t", 6, 16)
    bias, mask = draw(rng, "bias", 16), np.arange(6) != 4
    logits[4] = np.nan
    options = {"top_k": 3, "score_fn": score_fn, "renormalize": renormalize, "scale": 2.5}
    route = partial(jax_router.activation_topk, implementation=implementation, **options)
    _, pushed = jax.jit(lambda x, t: jax.jvp(lambda x: route(x, bias, token_mask=mask).weights, (x,), (t,)))(
        logits, tangent
    )

    def oracle(x):
        return oracle_activation_topk(x, bias, token_mask=mask, **options)[0]

    want = directional(oracle, logits, tangent)
    np.testing.assert_allclose(pushed, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(pushed[4], 0)

    cotangent = draw(rng, "c", 6, 3)
    pulled = jax.jit(jax.grad(lambda x: (route(x, bias, token_mask=mask).weights * cotangent).sum()))(logits)
    np.testing.assert_allclose(np.vdot(pulled, tangent), np.vdot(cotangent, want), rtol=1e-4, atol=1e-6)
    by_logit = np.einsum("nk,nke->ne", cotangent, jacobian(oracle, logits))
    np.testing.assert_allclose(pulled, by_logit, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(pulled[4], 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradient_has_the_dtype_of_the_logits(dtype, rng):
    logits = jnp.asarray(draw(rng, "logits", 6, 16), dtype)
    cotangent = draw(rng, "c", 6, 3)

    def loss(x, implementation):
        return (jax_router.activation_topk(x, top_k=3, implementation=implementation).weights * cotangent).sum()

    got = jax.jit(jax.grad(partial(loss, implementation="native")))(logits)
    want = jax.jit(jax.grad(partial(loss, implementation="reference")))(logits)
    assert got.dtype == want.dtype == dtype
    np.testing.assert_allclose(f64(got), f64(want), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_of_more_logits_than_caches_hold(dtype, rng):
    """Row by row that of a few."""
    logits = jnp.asarray(rng.normal(0, 1, (33000, 256)), dtype)
    cotangent = rng.normal(0, 1, (33000, 6)).astype(np.float32)

    @jax.jit
    def gradient(logits, cotangent):
        route = partial(jax_router.activation_topk, top_k=6, implementation="native")
        return jax.vjp(lambda x: route(x).weights, logits)[1](cotangent)[0]

    got = gradient(logits, cotangent)
    for rows in (slice(0, 100), slice(-100, None)):
        np.testing.assert_array_equal(got[rows], gradient(logits[rows], cotangent[rows]))


@pytest.mark.parametrize(("score_fn", "renormalize"), SCORINGS)
def test_vjp_of_vjp(score_fn, renormalize, rng):
    """The second derivative, in the logits and in the cotangent, against the reference's."""
    logits, ids = draw(rng, "logits", 6, 16), draw(rng, "ids", 6, 3)
    ids[0], ids[1], ids[2] = 7, [7, 7, -1], -1  # equal ids add up, a row without ids has no gradient,
    logits[3] = -400  # and scores that underflow do not make it a NaN

    def norm_of_gradient(x, cotangent, implementation):
        def weights(x):
            return jax_router.route_at(
                x, ids, score_fn=score_fn, renormalize=renormalize, implementation=implementation
            ).weights

        return (jax.vjp(weights, x)[1](cotangent)[0] ** 2).sum()

    cotangent = draw(rng, "c", 6, 3)
    got, want = (
        jax.jit(jax.grad(partial(norm_of_gradient, implementation=implementation), argnums=(0, 1)))(logits, cotangent)
        for implementation in ("native", "reference")
    )
    for mine, other in zip(got, want):
        assert np.abs(other).max() > 1e-3
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("renormalize", [True, False])
def test_jacobians(renormalize, mode, implementation, rng):
    """Against differences of the float64 oracle. They batch the linear primitives over their linear operand alone."""
    logits = draw(rng, "logits", 16)
    options = {"top_k": 3, "score_fn": "softmax", "renormalize": renormalize}
    route = partial(jax_router.activation_topk, implementation=implementation, **options)
    got = jax.jit(mode(lambda x: route(x).weights))(logits)
    want = jacobian(lambda x: oracle_activation_topk(x, **options)[0], logits)
    assert np.abs(want).max() > 1e-2
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_topk_select_derivative(implementation, rng):
    """The values' cotangents go to where the values came from; what is past a length gets none."""
    scores, lengths = draw(rng, "logits", 5, 16), np.array([0, 2, 4, 9, 16], np.int32)
    cotangent = draw(rng, "c", 5, 4)

    def select(x):
        return jax_router.topk_select(x, 4, lengths=lengths, implementation=implementation)

    (_, indices), pull = jax.vjp(jax.jit(select), scores)
    (got,) = pull((cotangent, np.zeros((5, 4), jax.dtypes.float0)))
    want = np.zeros_like(scores)
    for row, column in zip(*np.nonzero(np.asarray(indices) >= 0)):
        want[row, indices[row, column]] = cotangent[row, column]
    np.testing.assert_array_equal(got, want)
    _, (pushed, _) = jax.jvp(select, (scores,), (want,))
    np.testing.assert_array_equal(pushed, np.where(np.asarray(indices) >= 0, cotangent, 0))


def test_dense_router_derivative(rng):
    """In x, weight and logit_bias, against the reference; forward against backward."""
    x, weight, logit_bias = draw(rng, "x", 7, 8), draw(rng, "weight", 16, 8), draw(rng, "l", 16)
    cotangent = draw(rng, "c", 7, 3)

    def loss(operands, implementation):
        x, weight, logit_bias = operands
        weights, _ = jax_router.dense_router(x, weight, logit_bias=logit_bias, top_k=3, implementation=implementation)
        return (weights * cotangent).sum()

    operands = (x, weight, logit_bias)
    native, plain = (partial(loss, implementation=implementation) for implementation in ("native", "reference"))
    got, want = jax.jit(jax.grad(native))(operands), jax.jit(jax.grad(plain))(operands)
    for mine, other in zip(got, want):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)
    _, pushed = jax.jit(lambda o: jax.jvp(native, (o,), (o,)))(operands)
    np.testing.assert_allclose(pushed, sum(np.vdot(g, o) for g, o in zip(got, operands)), rtol=1e-4, atol=1e-5)


def test_no_gradient_to_the_bias_or_through_the_selection(implementation, rng):
    logits, bias = draw(rng, "logits", 5, 16), draw(rng, "bias", 16)

    def loss(logits, bias):
        weights, _ = jax_router.activation_topk(logits, bias, top_k=3, renormalize=False, implementation=implementation)
        return weights.sum()

    by_logits, by_bias = jax.jit(jax.grad(loss, argnums=(0, 1)))(logits, bias)
    np.testing.assert_array_equal(by_bias, 0)
    ids = jax_router.activation_topk(logits, bias, top_k=3).expert_ids
    chosen = (np.asarray(ids)[..., None] == np.arange(16)).any(-2)
    np.testing.assert_array_equal(np.asarray(by_logits) != 0, chosen)


@pytest.mark.parametrize("score_fn", ["sqrtsoftplus", "sigmoid", "softmax"])
def test_gradient_of_a_single_renormalized_weight_is_exactly_zero(score_fn, implementation, rng):
    def weights(x):
        return jax_router.activation_topk(x, top_k=1, score_fn=score_fn, implementation=implementation).weights.sum()

    logits = draw(rng, "logits", 50, 16)
    # XLA divides approximately on a GPU, where the reference's s / s may be 1 less an ulp. The kernels divide exactly.
    tolerance = 1e-7 if implementation == "reference" and jax.default_backend() != "cpu" else 0
    np.testing.assert_allclose(jax.jit(jax.grad(weights))(logits), 0, atol=tolerance)


def test_derivative_of_sqrtsoftplus_where_it_underflows(implementation):
    """sigmoid(x) / (2 sqrt(softplus(x))), which is 0 / 0 long before its value, exp(x / 2) / 2, underflows."""
    x = np.concatenate([np.linspace(-170, 170, 1001), [-17, -16.6, 20, 88.7, 89, 1e4, 3e38]]).astype(np.float32)

    def weights(x):
        routing = jax_router.activation_topk(x[:, None], top_k=1, renormalize=False, implementation=implementation)
        return routing.weights.sum()

    softplus = np.logaddexp(0, f64(x))
    want = np.exp(-np.logaddexp(0, -f64(x))) / (2 * np.sqrt(softplus))
    got = jax.jit(jax.grad(weights))(x)
    np.testing.assert_allclose(f64(got), want, rtol=3e-6, atol=2e-38)
    beyond = jax.jit(jax.grad(weights))(np.float32([-1e4, -np.inf, np.inf]))
    np.testing.assert_array_equal(beyond, 0)


def exact_derivatives(score_fn, x):
    """The first and the second derivative of a score, in float64, from formulas without a kink."""
    x = f64(x)
    s, rest = np.exp(-np.logaddexp(0, -x)), np.exp(-np.logaddexp(0, x))  # sigmoid(x), and 1 - sigmoid(x)
    if score_fn == "sigmoid":
        return s * rest, s * rest * (rest - s)
    score = np.sqrt(np.logaddexp(0, x))
    return s / (2 * score), s * rest / (2 * score) - s**2 / (4 * score**3)


@pytest.mark.parametrize("score_fn", ["sqrtsoftplus", "sigmoid"])
def test_derivatives_of_scores(score_fn, implementation):
    """Where the formulas for both signs meet, and above logits of 17, where sigmoid(x) rounds to 1."""
    x = np.concatenate([np.linspace(-80, 80, 3201), np.linspace(-1, 1, 41), [-0.0, 1e-6, -1e-6, 17, 30, 85]])
    x = x.astype(np.float32)

    def score(x):
        routing = jax_router.route_at(
            x[None], jnp.zeros(1, jnp.int32), score_fn=score_fn, renormalize=False, implementation=implementation
        )
        return routing.weights[0]

    first, second = exact_derivatives(score_fn, x)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(score)))(x), first, rtol=3e-6, atol=1e-37)
    near = np.abs(x) < 3  # there the second derivative has a zero, as a difference of numbers near 1
    for order in (jax.grad(jax.grad(score)), jax.jacfwd(jax.grad(score)), jax.jacrev(jax.jacfwd(score))):
        got = np.asarray(jax.jit(jax.vmap(order))(x))
        np.testing.assert_allclose(got[near], second[near], rtol=3e-6, atol=5e-8)
        np.testing.assert_allclose(got[~near], second[~near], rtol=3e-6, atol=1e-37)
    infinite = np.float32([np.inf, -np.inf])
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.grad(jax.grad(score))))(infinite), 0)


def test_third_derivative_at_zero(implementation):
    """Of log(1 + exp(x)) ** 0.5, by hand: at 0 its derivatives follow from log(2) and those of the sigmoid."""

    def score(x):
        return jax_router.route_at(x[None], jnp.zeros(1, jnp.int32), renormalize=False, implementation=implementation)[
            0
        ][0]

    f, d1, d2, d3 = np.log(2), 1 / 2, 1 / 4, 0
    want = d3 / (2 * f**0.5) - 3 * d1 * d2 / (4 * f**1.5) + 3 * d1**3 / (8 * f**2.5)
    np.testing.assert_allclose(jax.jit(jax.grad(jax.grad(jax.grad(score))))(jnp.float32(0)), want, rtol=1e-5)


def test_integer_operands_have_float0_cotangents(rng):
    logits, ids = draw(rng, "logits", 5, 16), draw(rng, "ids", 5, 2)
    token_ids, lut = draw(rng, "token_ids", 5), draw(rng, "lut", 12, 2)

    def loss(token_ids, lut, logits, ids):
        hashed = jax_router.hash_router(token_ids, lut)
        return (hashed.weights * jax_router.route_at(logits, hashed.expert_ids + ids).weights).sum()

    got = jax.grad(loss, argnums=(0, 1, 2, 3), allow_int=True)(token_ids, lut, logits, ids)
    assert [g.dtype for g in got] == [jax.dtypes.float0, jax.dtypes.float0, np.float32, jax.dtypes.float0]
    _, sizes_dot = jax.jvp(
        lambda ids: jax_router.expert_dispatch(ids, 16).group_sizes, (ids,), (np.zeros(ids.shape, jax.dtypes.float0),)
    )
    assert sizes_dot.dtype == jax.dtypes.float0


def test_gradient_of_no_tokens(implementation):
    def loss(x, weight):
        return jax_router.dense_router(x, weight, top_k=2, implementation=implementation).weights.sum()

    by_x, by_weight = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.zeros((0, 8)), jnp.ones((16, 8)))
    assert by_x.shape == (0, 8)
    np.testing.assert_array_equal(by_weight, np.zeros((16, 8)))


@pytest.mark.parametrize("name", ["permute", "combine"])
def test_derivatives_of_moved_rows(name, implementation, rng):
    """Of both orders and modes, in rows and weights, against differences; the ops are linear in each."""
    dispatch = lay_out(rng.integers(-1, 6, (7, 3)), 5, align=2)
    rows = 7 if name == "permute" else len(dispatch.token_index)
    operands = draw(rng, "x", rows, 4), draw(rng, "w", 7, 3)

    def move(rows, weights):
        return jnp.sin(getattr(jax_router, name)(rows, dispatch, weights, implementation=implementation))

    check_grads(move, operands, order=2, atol=2e-2, rtol=2e-2)
    check_grads(lambda rows: move(rows, None), operands[:1], order=2, atol=2e-2, rtol=2e-2)
    check_grads(lambda weights: move(operands[0], weights), operands[1:], order=2, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["permute", "combine"])
def test_pullbacks_of_moved_rows_are_linear_maps(name, implementation, rng):
    """`jax.linear_transpose` of a pullback is the derivative again."""
    dispatch = lay_out(rng.integers(-1, 6, (7, 3)), 5, align=2)
    rows = 7 if name == "permute" else len(dispatch.token_index)
    operands = draw(rng, "x", rows, 4), draw(rng, "w", 7, 3)
    tangents = draw(rng, "x", rows, 4), draw(rng, "w", 7, 3)

    def move(rows, weights):
        return getattr(jax_router, name)(rows, dispatch, weights, implementation=implementation)

    result, pull = jax.vjp(move, *operands)
    _, want = jax.jvp(move, operands, tangents)
    (got,) = jax.linear_transpose(pull, result)(tangents)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for i in range(2):  # one of the two cotangents alone
        (got,) = jax.linear_transpose(lambda grad, i=i: pull(grad)[i], result)(tangents[i])
        zeros = [np.zeros_like(tangent) for tangent in tangents]
        zeros[i] = tangents[i]
        np.testing.assert_allclose(got, jax.jvp(move, operands, tuple(zeros))[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("implementation", ["auto", "reference", "jax_router.reference"])
def test_no_derivative_of_moved_rows_scatters(implementation, platform, rng):
    """Nor does one of second order, where there is no kernel either."""
    dispatch = lay_out(rng.integers(-1, 6, (7, 3)), 5, align=2)
    of_module = implementation == "jax_router.reference"
    module = jax_router.reference if of_module else jax_router
    options = {} if of_module else {"implementation": implementation}

    def loss(x, w):
        y = jnp.sin(module.permute(x, dispatch, w, **options))
        return (module.combine(y, dispatch, w, **options) ** 2).sum()

    def second(x, w):
        return sum((grad**2).sum() for grad in jax.grad(loss, (0, 1))(x, w))

    gradients = jax.jit(jax.value_and_grad(second, (0, 1)))
    traced = gradients.trace(draw(rng, "x", 7, 4), draw(rng, "w", 7, 3))
    assert "scatter" not in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_gradient_of_rows_of_8_bits(implementation, rng):
    """Summed in f32, and rounded to the dtype of the rows."""
    dispatch = lay_out(rng.integers(0, 5, (7, 3)), 5)
    x = draw(rng, "x", 7, 4).astype(jnp.float8_e4m3fn)
    grad = jax.grad(lambda x: jax_router.permute(x, dispatch, implementation=implementation).astype(jnp.float32).sum())
    np.testing.assert_array_equal(np.asarray(grad(x)).astype(np.float32), 3.0)


MANY_CHOICES = {
    "renormalized": {},
    "apart": {"score_fn": "sigmoid", "renormalize": False},
    "softmax of all": {"score_fn": "softmax", "renormalize": False},
}


@pytest.mark.parametrize("scoring", MANY_CHOICES)
def test_more_choices_than_kernels_take(scoring, rng):
    """A gradient has a kernel where there is one for so many choices, whether or not the selection had one."""
    logits, cotangent = (rng.normal(0, 1, (6, n)).astype(np.float32) for n in (128, 100))

    def gradient(logits, implementation="auto"):
        route = partial(jax_router.activation_topk, top_k=100, implementation=implementation, **MANY_CHOICES[scoring])
        return jax.vjp(lambda logits: route(logits).weights, logits)[1](cotangent)[0]

    np.testing.assert_allclose(jax.jit(gradient)(logits), gradient(logits, "reference"), rtol=1e-4, atol=1e-6)
    on_cuda = jax.jit(gradient).trace(logits).lower(lowering_platforms=("cuda",)).as_text()
    has_kernel = scoring == "apart" and not isinstance(_native.load("cuda"), ImportError)
    assert ("jax_router.route_cotangent" in on_cuda) == has_kernel
