"""TPU kernels in interpret mode against eq. 5 in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu, tpu_backward, tpu_forward, tuning
from pallas_kernels.feature_map import init_elu_map, init_polynomial_map
from pallas_kernels.tpu_forward import BlockSizes
from tests import equation_5

# Small, so that a few hundred tokens take several blocks of each kind, the last of them partial.
BLOCKS = BlockSizes(
    query=128,
    key=256,
    key_chunk=128,
    state=128,
    backward_query=128,
    backward_key=256,
    backward_chunk=128,
    backward_state=128,
)


def problem(num_tokens, num_softmax, width=128, heads=2, batch=1, spread=1.0, dtype=jnp.float32, **kind):
    """((q, k, v, query_map, key_map), cotangent of y), with biases and scales that matter; no maps in full softmax."""
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(4, batch, num_tokens, heads, width)).astype(np.float32)
    arrays[:2] *= spread
    q, k, v, dy = (jnp.asarray(x, dtype) for x in arrays)
    maps = [None, None]
    if num_softmax < num_tokens:
        drawn = jax.eval_shape(lambda: init_polynomial_map(jax.random.key(0), heads, width, **kind))
        # Kernels that bfloat16 can hold: where a unit of phi switches on must not depend on the dtype.
        draw = lambda x: jnp.asarray(rng.normal(size=x.shape) / np.sqrt(x.shape[-2] if x.ndim == 3 else 25), dtype)
        maps = [jax.tree.map(lambda x: draw(x).astype(jnp.float32), drawn) for _ in range(2)]
    return (q, k, v, *maps), dy


def value_and_gradients(attend, arguments, dy):
    y, pullback = jax.vjp(attend, arguments)
    return y, pullback(dy.astype(y.dtype))[0]


@functools.partial(jax.jit, static_argnames=("num_softmax", "stabilizer", "blocks", "interpret"))
def kernels(arguments, dy, num_softmax, key_valid=None, stabilizer="max", blocks=BLOCKS, interpret=True):
    attend = lambda arguments: tpu.hybrid_attention(
        *arguments,
        num_softmax=num_softmax,
        key_valid=key_valid,
        stabilizer=stabilizer,
        block_sizes=blocks,
        interpret=interpret,
    )
    return value_and_gradients(attend, arguments, dy)


def errors(actual, expected):
    """Relative RMS of y, the largest of the gradients', and all of those by name.

    The maps' scales multiply one number, whose gradient is what is left after cancellation, and nothing in pure linear
    attention: theirs are relative to the last bias's gradient, a sum of the same terms.
    """
    (y, gradients), (true_y, true_gradients) = jax.tree.map(np.float64, (actual, expected))
    rms = lambda x: np.sqrt(np.mean(x**2))
    leaves = jax.tree.leaves_with_path(true_gradients)
    by_name, bias_size = {}, 0.0
    for (path, e), a in zip(leaves, jax.tree.leaves(gradients), strict=True):
        name = jax.tree_util.keystr(path)
        bias_size = np.linalg.norm(e) if "bias" in name else bias_size
        by_name[name] = rms(a - e) / max(rms(e), bias_size if "log_scale" in name else 0.0)
    return rms(y - true_y) / rms(true_y), max(by_name.values()), by_name


def some_valid(num_tokens, batch=1):
    valid = np.random.default_rng(1).random((batch, num_tokens)) < 0.6
    valid[:, 0] = True
    return valid


@pytest.mark.parametrize(
    ("num_tokens", "num_softmax", "stabilizer", "options"),
    [
        (63, 63, "max", {}),
        (130, 65, "lse", {"width": 64}),
        (500, 500, "max", {"width": 64, "masked": True}),
        (500, 125, "max", {"masked": True, "batch": 2, "heads": 1}),
        (300, 38, "lse", {"masked": True}),
        (130, 0, "max", {}),
        (130, 33, "max", {"width": 64, "degree": 3, "layers": 1, "activation": "softplus"}),
    ],
)
def test_values_and_gradients(num_tokens, num_softmax, stabilizer, options):
    options = dict(options)
    valid = some_valid(num_tokens, options.get("batch", 1)) if options.pop("masked", False) else None
    arguments, dy = problem(num_tokens, num_softmax, **options)
    expected = equation_5.values_and_gradients(arguments, dy, num_softmax, valid, stabilizer)
    y_error, gradient_error, by_name = errors(kernels(arguments, dy, num_softmax, valid, stabilizer), expected)
    assert y_error < 1e-5
    assert gradient_error < 1e-5, by_name


@pytest.mark.parametrize(
    ("num_tokens", "num_softmax", "stabilizer", "masked"),
    [(300, 38, "max", True), (130, 33, "lse", False), (130, 0, "lse", False)],
)
def test_states_of_disjoint_keys_add_up(num_tokens, num_softmax, stabilizer, masked):
    """The linear keys in two parts, and the softmax keys by themselves."""
    arguments, dy = problem(num_tokens, num_softmax, width=64)
    valid = some_valid(num_tokens) if masked else None
    common = {"block_sizes": BLOCKS, "interpret": True}

    @jax.jit
    def in_parts(arguments):
        q, k, v, query_map, key_map = arguments
        cuts = slice(num_softmax), slice(num_softmax, num_tokens - 41), slice(num_tokens - 41, num_tokens)
        (k_S, v_S, valid_S), *linear = (jax.tree.map(lambda x, cut=cut: x[:, cut], (k, v, valid)) for cut in cuts)
        states = [tpu.linear_state(k, v, key_map, key_valid=valid, **common) for k, v, valid in linear]
        state = jax.tree.map(jnp.add, *states)
        options = {"key_valid": valid_S, "stabilizer": stabilizer, **common}
        return tpu.attend_with_state(q, k_S, v_S, query_map, state, **options)

    expected = equation_5.values_and_gradients(arguments, dy, num_softmax, valid, stabilizer)
    y_error, gradient_error, by_name = errors(value_and_gradients(in_parts, arguments, dy), expected)
    assert y_error < 1e-5
    assert gradient_error < 1e-5, by_name


def test_bfloat16():
    arguments, dy = problem(300, 75, dtype=jnp.bfloat16)
    y, gradients = kernels(arguments, dy, 75)
    assert [x.dtype for x in (y, *gradients[:3])] == [jnp.bfloat16] * 4
    y_error, gradient_error, by_name = errors((y, gradients), equation_5.values_and_gradients(arguments, dy, 75))
    assert 1e-5 < y_error < 6e-3
    assert gradient_error < 2e-2, by_name


def test_scores_of_80():
    """Where e^s overflows float32 once squared, and eq. 5's linear terms carry no e^-c."""
    arguments, dy = problem(130, 33, spread=4.6, heads=1)
    q, k = arguments[:2]
    assert 70 < jnp.abs(jnp.einsum("bnhd,bmhd->bhnm", q, k[:, :33])).max() / np.sqrt(128) < 100
    y_error, gradient_error, by_name = errors(
        kernels(arguments, dy, 33), equation_5.values_and_gradients(arguments, dy, 33)
    )
    assert y_error < 1e-5
    # Float32 knows a weight of e^80 to 5e-6.
    assert gradient_error < 2e-5, by_name


def test_queries_beyond_what_vmem_holds(monkeypatch):
    """In two calls of two blocks of queries each, while two blocks of keys go by."""
    arguments, dy = problem(400, 300, heads=1)
    together, calls = tpu_backward._attend_backward, []
    counted = lambda problem, blocks, *rest: calls.append(blocks) or together(problem, blocks, *rest)
    monkeypatch.setattr(tpu_backward, "RESIDENT_QUERIES", 256)
    monkeypatch.setattr(tpu_backward, "_attend_backward", counted)
    # Compiled anew: how many queries VMEM holds is no argument.
    apart = jax.jit(functools.partial(kernels.__wrapped__, num_softmax=300))(arguments, dy)
    assert calls == [range(2), range(2, 4)]
    y_error, gradient_error, by_name = errors(apart, equation_5.values_and_gradients(arguments, dy, 300))
    assert y_error < 1e-5
    assert gradient_error < 1e-5, by_name


def test_gradient_of_a_tied_maximum_is_shared_out():
    (q, k, v, *maps), dy = problem(130, 33, heads=1)
    k = k.at[:, 1].set(4 * q[:, 7]).at[:, 5].set(4 * q[:, 7])
    arguments = (q, k, v, *maps)
    _, gradient_error, by_name = errors(kernels(arguments, dy, 33), equation_5.values_and_gradients(arguments, dy, 33))
    assert gradient_error < 1e-5, by_name


def test_races(capfd, monkeypatch):
    """None as it is, on two cores; one where the linear keys of a head are summed by both at once."""
    arguments, dy = problem(140, 50, width=64, heads=2)
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, out_of_bounds_reads="uninitialized")
    y, gradients = kernels(arguments, dy, 50, interpret=interpret)
    y_error, gradient_error, by_name = errors((y, gradients), equation_5.values_and_gradients(arguments, dy, 50))
    assert y_error < 1e-5 and gradient_error < 1e-5, by_name
    assert "RACE DETECTED" not in capfd.readouterr().out

    call = tpu_forward.Problem.call
    monkeypatch.setattr(tpu_forward.Problem, "call", lambda *args, parallel, **rest: call(*args, parallel=1, **rest))
    arguments, _ = problem(140, 50, width=64, heads=1)
    attend = functools.partial(tpu.hybrid_attention, num_softmax=50, block_sizes=BLOCKS, interpret=interpret)
    jax.block_until_ready(jax.jit(attend)(*arguments))
    assert "RACE DETECTED" in capfd.readouterr().out


def test_what_the_kernels_do_not_do():
    (q, k, v, query_map, key_map), _ = problem(20, 5, heads=2)
    half = jnp.float16
    for arguments, message in [
        ((q, k, v, init_elu_map(2), init_elu_map(2)), "query_map is a EluMap"),
        ((q.astype(half), k.astype(half), v.astype(half), query_map, key_map), "found float16, float16, float16"),
        ((q, k, v.astype(jnp.bfloat16), query_map, key_map), "found float32, float32, bfloat16"),
        ((q[..., :12], k[..., :12], v[..., :12], None, None), "heads of 12 channels"),
        ((q, k, v, query_map, init_polynomial_map(jax.random.key(0), 2, 128, degree=3)), r"found \(3, 'relu'\)"),
    ]:
        with pytest.raises(NotImplementedError, match=message):
            tpu.hybrid_attention(*arguments, num_softmax=5)
    with pytest.raises(ValueError, match=r"key_chunk .* found 100"):
        BlockSizes(key_chunk=100)


def test_tuned_blocks(tmp_path):
    path = tmp_path / "tuned.json"
    tuning.save("v6e", 32760, 4095, {"query": 1024}, "measured", path)
    tuning.save("v6e", 32760, 32760, {"query": 512}, "measured", path)
    tuning.save("v6e", 32760, 4095, {"query": 2048}, "measured", path)
    assert len(tuning.load("v6e", path)) == 2
    assert tuning.lookup("v6e", 24000, 3000, path) == {"query": 2048}
    assert tuning.lookup("v6e", 60000, 60000, path) == {"query": 512}
    for far in (("v6e", 75600, 75600), ("v6e", 32760, 1000), ("v6e", 32760, 0), ("v5e", 32760, 4095)):
        assert tuning.lookup(*far, path) == {}
    assert tuning.load("v6e", tmp_path / "nobody_tuned.json") == []


def test_blocks_by_the_number_of_softmax_keys(monkeypatch):
    """Longer blocks of queries while the softmax keys are one step of the backward; what was tuned comes first."""
    queries = [tpu.blocks_for("v5e", 75600, count).backward_query for count in (1, 4096, 4097, 75600)]
    assert queries == [2048, 2048, 1024, 1024] and BlockSizes().backward_key == 4096
    monkeypatch.setattr(tuning, "lookup", lambda chip, *counts: {"backward_key": 512} if chip == "v6e" else {})
    assert tpu.blocks_for("v6e", 8192, 2048).backward_key == 512
