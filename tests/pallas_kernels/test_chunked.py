"""Attention in chunks with a recurrent state, against eq. 5 in float64 with the key ranges of ReHyAt's formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunked import chunk_step, chunked_attention
from pallas_kernels.feature_map import init_polynomial_map
from tests import equation_5
from tests.pallas_kernels.kernel_tests import cosine, errors_of_arrays, problem, some_valid

# (tokens, chunk, overlap): a last chunk that is partial, no overlap, an overlap of more than a chunk, of whole chunks,
# of more than all tokens, and one chunk alone.
SHAPES = [(29, 8, 3), (24, 8, 0), (31, 5, 7), (23, 4, 8), (13, 5, 40), (9, 20, 2)]


def branch_masks(length, chunk, overlap, causal):
    """in_S and in_L [N, N] of the paper's formula, one query after another."""
    in_S, in_L = np.zeros((2, length, length), bool)
    for query in range(length):
        start, stop = max(query // chunk * chunk - overlap, 0), min((query // chunk + 1) * chunk, length)
        in_S[query, start:stop] = True
        in_L[query, :start] = True
        in_L[query, stop:] = not causal
    return in_S, in_L


@functools.partial(jax.jit, static_argnames=("attend", "chunk", "overlap", "causal", "stabilizer", "implementation"))
def values_and_gradients(attend, arguments, cotangent, key_valid=None, **options):
    y, pullback = jax.vjp(lambda arguments: attend(*arguments, key_valid=key_valid, **options), arguments)
    return y, pullback(cotangent)[0]


def valid_keys(length, chunk):
    valid = some_valid(length, batch=2)
    valid[:, ::chunk] = True
    return valid


def errors(actual, arguments, masks, **options):
    """Of y, and the largest of any gradient."""
    expected = equation_5.values_and_gradients(arguments, cosine(arguments[0]), masks=masks, **options)
    value, gradients = errors_of_arrays(actual, expected)
    return value, max(gradients.values())


@pytest.mark.parametrize(
    ("number", "implementation"), [*((n, "xla") for n in range(len(SHAPES))), *((n, "reference") for n in (0, 2))]
)
@pytest.mark.parametrize("causal", [True, False])
def test_values_and_gradients_are_those_of_the_formula(number, causal, implementation):
    shape = SHAPES[number]
    length, chunk, overlap = shape
    arguments = problem(length, heads=2)
    valid = valid_keys(length, chunk) if number % 2 == causal else None
    options = {"stabilizer": "max" if number % 3 else "lse", "key_valid": valid}
    sizes = {"chunk": chunk, "overlap": overlap, "causal": causal, "implementation": implementation}
    actual = values_and_gradients(chunked_attention, arguments, cosine(arguments[0]), **sizes, **options)
    assert max(errors(actual, arguments, branch_masks(*shape, causal), **options)) < 1e-5


@pytest.fixture(scope="module")
def of_29_tokens():
    arguments = problem(29, heads=2)
    sizes = {"chunk": 8, "overlap": 3, "causal": True, "implementation": "xla"}
    return arguments, values_and_gradients(chunked_attention, arguments, cosine(arguments[0]), **sizes)


def counted_twice(in_S, in_L):
    """The overlap also linearly, as by a state to which every key of the window before was added."""
    return in_S, np.tril(np.repeat(np.repeat(np.tri(4, k=-1, dtype=bool), 8, 0), 8, 1)[:29, :29])


def acausal(in_S, in_L):
    return in_S, ~in_S


def one_key_less(in_S, in_L):
    later = in_S & np.roll(in_S, 1, axis=1)
    return later, in_L | (in_S & ~later)


@pytest.mark.parametrize("wrong", [counted_twice, acausal, one_key_less])
def test_wrong_key_ranges_would_be_noticed(of_29_tokens, wrong):
    arguments, actual = of_29_tokens
    masks = branch_masks(29, 8, 3, True)
    assert max(errors(actual, arguments, masks)) < 1e-5
    value, gradient = errors(actual, arguments, wrong(*masks))
    assert value > 1e-3 and gradient > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_later_chunks_change_nothing_before_them(causal):
    """If causal; otherwise they do."""
    arguments = q, k, v, *maps = problem(29, heads=2)
    changed = [x.copy() for x in (q, k, v)]
    for x in changed:
        x[:, 16:] += 1.0
    attend = jax.jit(functools.partial(chunked_attention, chunk=8, overlap=3, causal=causal, implementation="xla"))
    before, after = attend(*arguments), attend(*changed, *maps)
    assert np.array_equal(before[:, :16], after[:, :16]) == causal
    assert np.abs(np.asarray(before - after))[:, 16:].max() > 1e-2


@pytest.mark.parametrize(
    ("shape", "stabilizer"), [((29, 8, 3), "max"), ((31, 5, 7), "lse"), ((23, 4, 8), "max"), ((24, 8, 0), "lse")]
)
def test_a_loop_of_steps_is_the_whole(shape, stabilizer):
    length, chunk, overlap = shape
    q, k, v, *maps = problem(length, heads=2)
    step = jax.jit(functools.partial(chunk_step, overlap=overlap, stabilizer=stabilizer))
    y, window, state = [], (k[:, :0], v[:, :0]), None
    for start in range(0, length, chunk):
        piece = [x[:, start : start + chunk] for x in (q, k, v)]
        part, window, state = step(*piece, *window, state, *maps)
        y.append(part)
    whole = functools.partial(chunked_attention, chunk=chunk, overlap=overlap, causal=True, stabilizer=stabilizer)
    np.testing.assert_allclose(np.concatenate(y, axis=1), jax.jit(whole)(q, k, v, *maps), rtol=1e-5, atol=2e-6)


def test_the_program_does_not_grow_with_the_number_of_chunks():
    def operations(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        phi = jax.eval_shape(lambda: init_polynomial_map(jax.random.key(0), 2, 8))
        attend = functools.partial(chunked_attention, chunk=32, overlap=8, causal=True, implementation="xla")
        gradient = jax.jit(lambda *arguments: jax.vjp(attend, *arguments)[1](arguments[0]))
        return gradient.lower(x, x, x, phi, phi).as_text().count(" = ")

    assert operations(64 * 32) == operations(4 * 32)


def test_bad_arguments_are_named():
    q, k, v, *maps = problem(9, heads=2)
    attend = functools.partial(chunked_attention, chunk=4, overlap=1, causal=True)
    for wrong, message in [
        (lambda: attend(q, k[:, :8], v, *maps), r"one shape, found \(2, 9, 2, 5\), \(2, 8, 2, 5\)"),
        (lambda: attend(q, k, v, *maps, chunk=0), "chunk must be at least 1 token, found 0"),
        (lambda: attend(q, k, v, *maps, overlap=-1), "overlap must be at least 0 tokens, found -1"),
        (lambda: attend(q, k, v, None, None), "chunks of 4 of 9 tokens have linear keys"),
        (lambda: attend(q, k, v, *maps, stabilizer="mean"), "max, lse, found 'mean'"),
        (lambda: attend(q, k, v, *maps, implementation="stock"), "xla, reference, tpu, gpu, found 'stock'"),
        (lambda: attend(q, k, v, *maps, key_valid=np.ones((2, 9))), r"bool \(2, 9\), found float64 \(2, 9\)"),
        (lambda: chunk_step(q, k, v, k, v, None, *maps, overlap=4), r"same 4 tokens or fewer, found \(2, 9, 2, 5\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()


def test_without_maps_where_windows_reach_all_earlier_keys():
    q, k, v, *_ = problem(9, heads=2)
    y = chunked_attention(q, k, v, None, None, chunk=4, overlap=8, causal=True, implementation="xla")
    expected = equation_5.values((q, k, v, None, None), masks=(branch_masks(9, 4, 8, True)[0], np.zeros((9, 9), bool)))
    np.testing.assert_allclose(y, expected.y, rtol=1e-5, atol=1e-5)
