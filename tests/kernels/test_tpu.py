"""TPU kernels in interpret mode against eq. 5 in float64, and through the TPU compiler, which needs no TPU."""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import init_elu_map, init_polynomial_map, tpu, tpu_backward, tuning
from pallas_kernels.feature_map import ACTIVATIONS
from pallas_kernels.tpu_forward import BlockSizes
from tests.conftest import needs_libtpu

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


def equation_5(arguments, dy, num_softmax, key_valid=None, stabilizer="max"):
    """y and every gradient in float64, by JAX's differentiation of eq. 5 as written."""

    def features(phi, x_BxNxHxD):
        for kernel, bias in zip(phi.kernels, phi.biases, strict=True):
            x_BxNxHxD = ACTIVATIONS[phi.activation](jnp.einsum("bnhd,hdf->bnhf", x_BxNxHxD, kernel) + bias[None, None])
        slices = jnp.split(x_BxNxHxD, phi.degree, axis=-1)
        scale = jnp.exp(phi.log_scale)[None, None, :, None]
        return scale * jnp.concatenate([psi ** (p + 1) for p, psi in enumerate(slices)], axis=-1)

    def attend(arguments):
        q, k, v, query_map, key_map = arguments
        weights = jnp.zeros((q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
        valid = jnp.ones(k.shape[:2], bool) if key_valid is None else key_valid
        valid = valid[:, None, None]
        if num_softmax:
            s = jnp.einsum("bnhd,bmhd->bhnm", q, k[:, :num_softmax]) / np.sqrt(q.shape[-1])
            s = jnp.where(valid[..., :num_softmax], s, -jnp.inf)
            c = s.max(-1) if stabilizer == "max" else jax.nn.logsumexp(s, -1)
            weights = weights.at[..., :num_softmax].set(jnp.exp(s - c[..., None]))
        if query_map is not None:
            linear = jnp.einsum("bnhf,bmhf->bhnm", features(query_map, q), features(key_map, k[:, num_softmax:]))
            weights = weights.at[..., num_softmax:].set(jnp.where(valid[..., num_softmax:], linear, 0.0))
        epsilon = 1e-6 if num_softmax == 0 else 0.0
        return jnp.einsum("bhnm,bmhd->bnhd", weights, v) / (weights.sum(-1) + epsilon).swapaxes(1, 2)[..., None]

    with jax.enable_x64(True):
        arguments, dy = jax.tree.map(lambda x: jnp.asarray(np.float64(x)), (arguments, dy))
        return jax.jit(value_and_gradients, static_argnums=0)(attend, arguments, dy)


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
    expected = equation_5(arguments, dy, num_softmax, valid, stabilizer)
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

    expected = equation_5(arguments, dy, num_softmax, valid, stabilizer)
    y_error, gradient_error, by_name = errors(value_and_gradients(in_parts, arguments, dy), expected)
    assert y_error < 1e-5
    assert gradient_error < 1e-5, by_name


def test_bfloat16():
    arguments, dy = problem(300, 75, dtype=jnp.bfloat16)
    y, gradients = kernels(arguments, dy, 75)
    assert [x.dtype for x in (y, *gradients[:3])] == [jnp.bfloat16] * 4
    y_error, gradient_error, by_name = errors((y, gradients), equation_5(arguments, dy, 75))
    assert 1e-5 < y_error < 6e-3
    assert gradient_error < 2e-2, by_name


def test_scores_of_80():
    """Where e^s overflows float32 once squared, and eq. 5's linear terms carry no e^-c."""
    arguments, dy = problem(130, 33, spread=4.6, heads=1)
    q, k = arguments[:2]
    assert 70 < jnp.abs(jnp.einsum("bnhd,bmhd->bhnm", q, k[:, :33])).max() / np.sqrt(128) < 100
    y_error, gradient_error, by_name = errors(kernels(arguments, dy, 33), equation_5(arguments, dy, 33))
    assert y_error < 1e-5
    # Float32 knows a weight of e^80 to 5e-6.
    assert gradient_error < 2e-5, by_name


def test_queries_beyond_what_vmem_holds(monkeypatch):
    arguments, dy = problem(300, 75, heads=1)
    together = kernels(arguments, dy, 75, stabilizer="lse")
    monkeypatch.setattr(tpu_backward, "RESIDENT_QUERIES", 256)
    apart = kernels.__wrapped__(arguments, dy, 75, stabilizer="lse")
    _, gradient_error, by_name = errors(apart, together)
    assert gradient_error < 1e-5, by_name


def test_gradient_of_a_tied_maximum_is_shared_out():
    (q, k, v, *maps), dy = problem(130, 33, heads=1)
    k = k.at[:, 1].set(4 * q[:, 7]).at[:, 5].set(4 * q[:, 7])
    arguments = (q, k, v, *maps)
    _, gradient_error, by_name = errors(kernels(arguments, dy, 33), equation_5(arguments, dy, 33))
    assert gradient_error < 1e-5, by_name


def test_races(capfd, monkeypatch):
    """None as it is, on two cores; one where the linear keys of a head are summed by both at once."""
    arguments, dy = problem(140, 50, width=64, heads=2)
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, out_of_bounds_reads="uninitialized")
    y, gradients = kernels(arguments, dy, 50, interpret=interpret)
    y_error, gradient_error, by_name = errors((y, gradients), equation_5(arguments, dy, 50))
    assert y_error < 1e-5 and gradient_error < 1e-5, by_name
    assert "RACE DETECTED" not in capfd.readouterr().out

    call = tpu.Problem.call
    monkeypatch.setattr(tpu.Problem, "call", lambda *args, parallel, **rest: call(*args, parallel=1, **rest))
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
    for chip, entries in json.loads(tuning.PATH.read_text()).items():
        if chip.startswith("v"):
            assert all(BlockSizes(**entry["blocks"]) for entry in entries)


def test_blocks_by_the_number_of_softmax_keys(monkeypatch):
    """Longer blocks of queries while the softmax keys are one step of the backward; what was tuned comes first."""
    queries = [tpu.blocks_for("v5e", 75600, count).backward_query for count in (1, 4096, 4097, 75600)]
    assert queries == [2048, 2048, 1024, 1024] and BlockSizes().backward_key == 4096
    monkeypatch.setattr(tuning, "lookup", lambda chip, *counts: {"backward_key": 512} if chip == "v6e" else {})
    assert tpu.blocks_for("v6e", 8192, 2048).backward_key == 512


COMPILE = """
    import collections, functools, json, sys
    import jax, jax.numpy as jnp
    from pallas_kernels import init_polynomial_map, reference, tpu
    from pallas_kernels.estimate import compile_ahead

    def step(attend, q, k, v, query_map, key_map, dy):
        y, pullback = jax.vjp(attend, q, k, v, query_map, key_map)
        return y, pullback(dy)

    for chip, implementation, heads, num_tokens, num_softmax, options in json.loads(sys.argv[1]):
        x = jax.ShapeDtypeStruct((1, num_tokens, heads, options.pop("width", 128)), jnp.bfloat16)
        kind = options.pop("kind", {})
        phi = jax.eval_shape(lambda: init_polynomial_map(jax.random.key(0), heads, x.shape[-1], **kind))
        phi = None if num_softmax == num_tokens else phi
        module = {"tpu": tpu, "reference": reference}[implementation]
        if implementation == "tpu":
            options["block_sizes"] = tpu.blocks_for(chip, num_tokens, num_softmax)
        attend = functools.partial(module.hybrid_attention, num_softmax=num_softmax, **options)
        program = compile_ahead(chip, functools.partial(step, attend), x, x, x, phi, phi, x)
        print(json.dumps([program.as_text(), program.memory_analysis().temp_size_in_bytes]))
"""
FULL_GRID = os.environ.get("FULL_GRID") == "1"


def compile_for_tpu(*cases, options=""):
    """(HLO, temporary bytes) of forward and backward of (chip, implementation, heads, N, num_softmax, options)."""
    run = subprocess.run(
        [sys.executable, "-c", "if 1:" + COMPILE, json.dumps(cases)],
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": options},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[")]


def kernel_names(hlo):
    return {re.search(r"hybrid_[a-z_]*[a-z]", line)[0] for line in hlo.splitlines() if "tpu_custom_call" in line}


SOFTMAX_KERNELS = {"hybrid_attend", "hybrid_delta", "hybrid_attend_backward"}
LINEAR_KERNELS = {"hybrid_state", "hybrid_attend", "hybrid_delta", "hybrid_read_out_backward", "hybrid_state_backward"}


def expected_kernels(num_tokens, num_softmax):
    return (SOFTMAX_KERNELS if num_softmax else set()) | (LINEAR_KERNELS if num_softmax < num_tokens else set())


SAMPLED_SHAPES = [("v5e", 12, 32760, (8,)), ("v6e", 12, 75600, (2,)), ("v5p", 40, 32760, (1,))]
EVERY_SHAPE = [
    (chip, heads, num_tokens, (1, 2, 4, 8, "linear"))
    for chip in ("v5e", "v5p", "v6e")
    for heads, num_tokens in ((12, 12600), (12, 32760), (12, 75600), (40, 32760), (40, 75600))
]


@needs_libtpu
@pytest.mark.parametrize(("chip", "heads", "num_tokens", "rates"), EVERY_SHAPE if FULL_GRID else SAMPLED_SHAPES)
def test_compiles_for_tpu(chip, heads, num_tokens, rates):
    """Forward and backward at the sizes of the shipped configs, within VMEM, and with no fallback."""
    counts = [0 if rate == "linear" else -(-num_tokens // rate) for rate in rates]
    cases = [(chip, "tpu", heads, num_tokens, num_softmax, {}) for num_softmax in counts]
    for num_softmax, (hlo, _) in zip(counts, compile_for_tpu(*cases), strict=True):
        assert kernel_names(hlo) == expected_kernels(num_tokens, num_softmax)


@needs_libtpu
@pytest.mark.parametrize("activation", ACTIVATIONS if FULL_GRID else ("elu1",))
def test_maps_compile_for_tpu(activation):
    kinds = [{"degree": degree, "layers": layers, "activation": activation} for degree, layers in ((1, 1), (3, 2))]
    for hlo, _ in compile_for_tpu(*(("v5e", "tpu", 2, 500, 125, {"width": 64, "kind": kind}) for kind in kinds)):
        assert kernel_names(hlo) == SOFTMAX_KERNELS | LINEAR_KERNELS


def largest(hlo, dtypes):
    shapes = re.findall(r"\b(" + dtypes + r")\[([\d,]+)\]", hlo)
    return max(int(np.prod([int(size) for size in dimensions.split(",")])) for _, dimensions in shapes)


@needs_libtpu
def test_neither_scores_nor_features_reach_memory():
    """Nor does what does reach it grow faster than tokens. Everything counts: VMEM is kept for the kernels."""
    heads, rate, width, most = 12, 4, 128, 8192
    cases = [
        ("v5e", implementation, heads, num_tokens, num_tokens // rate, {})
        for implementation, num_tokens in (
            ("reference", most // 2),
            ("reference", most),
            ("tpu", most),
            ("tpu", 2 * most),
        )
    ]
    options = "--xla_vf_vmem_memory_space_assignment=false"
    (_, half_as_many), (written_out, many_bytes), (hlo, few_bytes), (_, twice) = compile_for_tpu(
        *cases, options=options
    )
    scores, features = heads * most * most // rate, heads * most * 2 * width
    assert largest(written_out, "f32") >= max(scores, features)
    assert largest(hlo, "f32|bf16|pred|s32") < scores
    assert largest(hlo, "f32") < features
    assert 0 < few_bytes < 5 * 2 * heads * most * width < many_bytes
    assert twice < 2.2 * few_bytes and many_bytes > 2.2 * half_as_many
