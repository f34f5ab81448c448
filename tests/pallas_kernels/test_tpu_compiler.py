"""TPU kernels through the TPU compiler, which needs no TPU: they fit in VMEM, and leave no scores in HBM."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jsurgery.bench.attention_programs import AttentionShape, arguments, at_rate, gradients
from pallas_kernels import reference, tpu
from pallas_kernels.estimate import CHIPS, estimate_cycles, topology
from pallas_kernels.feature_map import ACTIVATIONS, init_polynomial_map
from pallas_kernels.tpu_problem import VMEM_LIMIT, BlockSizes
from tests.conftest import FULL_GRID, needs_libtpu

SOFTMAX_KERNELS = {"hybrid_attend", "hybrid_delta", "hybrid_attend_backward"}
LINEAR_KERNELS = {"hybrid_state", "hybrid_attend", "hybrid_delta", "hybrid_read_out_backward", "hybrid_state_backward"}
# The compiler takes seconds for the kernels at these, and most of a minute at those that it is given to run.
SMALL_BLOCKS = BlockSizes(
    query=256,
    key=512,
    key_chunk=256,
    state=256,
    backward_query=256,
    backward_key=512,
    backward_chunk=256,
    backward_state=256,
)


def compile_for_tpu(chip, attention, heads, num_tokens, num_softmax, width=128, kind=None, compiler=None, **options):
    """Forward and backward, compiled; `kind` describes phi, `compiler` has options of XLA's."""
    x = jax.ShapeDtypeStruct((1, num_tokens, heads, width), jnp.bfloat16)
    phi = None
    if num_softmax < num_tokens:
        phi = jax.eval_shape(lambda: init_polynomial_map(jax.random.key(0), heads, width, **(kind or {})))

    def step(q, k, v, query_map, key_map, dy):
        attend = functools.partial(attention, num_softmax=num_softmax, **options)
        y, pullback = jax.vjp(attend, q, k, v, query_map, key_map)
        return y, pullback(dy)

    device = jax.sharding.SingleDeviceSharding(topology(CHIPS[chip])[0])
    step = jax.jit(step, in_shardings=device, out_shardings=device)
    return step.lower(x, x, x, phi, phi, x).compile(compiler_options=compiler)


def called_kernels(hlo):
    return [line for line in hlo.splitlines() if "tpu_custom_call" in line]


def kernel_names(hlo):
    return {re.search(r"(hybrid|softmax)_[a-z_]*[a-z]", line)[0] for line in called_kernels(hlo)}


def expected_kernels(num_tokens, num_softmax):
    return (SOFTMAX_KERNELS if num_softmax else set()) | (LINEAR_KERNELS if num_softmax < num_tokens else set())


EVERY_SHAPE = [
    (chip, heads, num_tokens, rate)
    for chip in ("v5e", "v5p", "v6e")
    for heads, num_tokens in ((12, 12600), (12, 32760), (12, 75600), (40, 32760), (40, 75600))
    for rate in (1, 2, 4, 8, "linear")
]


@needs_libtpu
@pytest.mark.parametrize(("chip", "heads", "num_tokens", "rate"), EVERY_SHAPE if FULL_GRID else [("v5e", 12, 32760, 8)])
def test_compiles_for_tpu(chip, heads, num_tokens, rate):
    """Forward and backward at the sizes of the shipped configs, within VMEM, and with no fallback."""
    num_softmax = 0 if rate == "linear" else -(-num_tokens // rate)
    blocks = tpu.blocks_for(chip, num_tokens, num_softmax)
    program = compile_for_tpu(chip, tpu.hybrid_attention, heads, num_tokens, num_softmax, block_sizes=blocks)
    assert kernel_names(program.as_text()) == expected_kernels(num_tokens, num_softmax)


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "num_tokens", "num_softmax", "options"),
    [
        ("v6e", 2000, 1000, {"stabilizer": "lse"}),
        ("v5p", 700, 700, {}),
        ("v5e", 700, 0, {"width": 64, "kind": {"degree": 1, "layers": 1, "activation": "elu1"}}),
    ],
)
def test_small_blocks_compile_for_tpu(chip, num_tokens, num_softmax, options):
    """Several blocks of every kind, the last of them partial."""
    program = compile_for_tpu(
        chip, tpu.hybrid_attention, 2, num_tokens, num_softmax, block_sizes=SMALL_BLOCKS, **options
    )
    assert kernel_names(program.as_text()) == expected_kernels(num_tokens, num_softmax)


def compile_distillation(chip, heads, num_tokens, **options):
    """The kernels of a step of distillation at rates 8, 4, 2 and full softmax, and at one rate with gradients."""
    x = jax.ShapeDtypeStruct((1, num_tokens, heads, 128), jnp.bfloat16)
    phi = jax.eval_shape(lambda: init_polynomial_map(jax.random.key(0), heads, 128))
    bounds = [-(-num_tokens // rate) for rate in (8, 4, 2, 1)]

    def step(q, k, v, query_map, key_map):
        outputs, lse, largest = tpu.softmax_zones(q, k, v, bounds, **options)

        def errors(query_map, key_map):
            state = tpu.linear_state(k, v, key_map, start=bounds[0], token_gradients=False, **options)
            branch = outputs[0], jnp.exp(lse[0] - largest[0])
            return tpu.hybrid_error(q, query_map, state, branch, outputs[-1], **options)[0].sum()

        return jax.value_and_grad(errors, argnums=(0, 1))(query_map, key_map)

    device = jax.sharding.SingleDeviceSharding(topology(CHIPS[chip])[0])
    step = jax.jit(step, in_shardings=device, out_shardings=device)
    return step.lower(x, x, x, phi, phi).compile()


LONG = [
    (chip, heads, tokens) for chip in ("v5e", "v5p", "v6e") for heads in (12, 40) for tokens in (12600, 32760, 75600)
]


@needs_libtpu
def test_small_blocks_of_distillation_compile_for_tpu():
    """Ends of prefixes inside of blocks, and a last block that is partial."""
    assert kernels_of_distillation(compile_distillation("v5e", 2, 700, block_sizes=SMALL_BLOCKS).as_text())


def kernels_of_distillation(hlo):
    """Whether the program calls the kernels of distillation, and no others."""
    return kernel_names(hlo) == {"softmax_zones", "hybrid_error", "hybrid_state", "hybrid_state_backward"}


if FULL_GRID:

    @needs_libtpu
    @pytest.mark.parametrize(("chip", "heads", "num_tokens"), LONG)
    def test_distillation_compiles_for_tpu(chip, heads, num_tokens):
        assert kernels_of_distillation(compile_distillation(chip, heads, num_tokens).as_text())

    @needs_libtpu
    @pytest.mark.parametrize("num_tokens", (12600, 32760, 75600))
    @pytest.mark.parametrize("chip", ("v5e", "v5p", "v6e"))
    def test_results_of_prefixes_take_at_most_15_percent_more_cycles(chip, num_tokens):
        """Than full softmax by the same kind of kernel: the compiler's schedules, for one head."""
        rows = jax.ShapeDtypeStruct((1, num_tokens, 1, 128), jnp.bfloat16)
        zones, _ = estimate_cycles(chip, functools.partial(zones_of, (8, 4, 2, 1)), rows, rows, rows)
        softmax, _ = estimate_cycles(chip, functools.partial(zones_of, (1,)), rows, rows, rows)
        attend, _ = estimate_cycles(chip, full_softmax, rows, rows, rows)
        assert sum(zones.values()) <= 1.15 * sum(attend.values())
        assert sum(softmax.values()) < sum(zones.values())


def zones_of(rates, q, k, v):
    return tpu.softmax_zones(q, k, v, [-(-k.shape[1] // rate) for rate in rates])


def full_softmax(q, k, v):
    return tpu.hybrid_attention(q, k, v, None, None, num_softmax=k.shape[1])


@needs_libtpu
@pytest.mark.parametrize("activation", ACTIVATIONS if FULL_GRID else ("elu1",))
@pytest.mark.parametrize(("degree", "layers"), [(1, 1), (3, 2)] if FULL_GRID else [(3, 2)])
def test_maps_compile_for_tpu(degree, layers, activation):
    kind = {"degree": degree, "layers": layers, "activation": activation}
    program = compile_for_tpu("v5e", tpu.hybrid_attention, 2, 500, 125, width=64, kind=kind)
    assert kernel_names(program.as_text()) == SOFTMAX_KERNELS | LINEAR_KERNELS


def kernel_calls(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation.params
        else:
            for inner in jaxprs_in_params(equation.params):
                yield from kernel_calls(inner)


@pytest.mark.parametrize("rate", [1, 2, 8])
def test_what_kernels_keep_fits_in_vmem(rate):
    """Scratch, and every block twice, at the most tokens of the shipped configs; a third of VMEM is left for the rest.

    What the rest takes only the compiler knows: with FULL_GRID=1, `test_compiles_for_tpu` asks it at every shape.
    """
    size = AttentionShape(75600, 1, 128, "bfloat16", "max")
    blocks = tpu.blocks_for("v5e", size.tokens, size.num_softmax(rate))
    attend = at_rate(tpu.hybrid_attention, size, rate, block_sizes=blocks)
    jaxpr = jax.make_jaxpr(functools.partial(gradients, attend))(*jax.eval_shape(lambda: arguments(size, rate))).jaxpr
    names = set()
    for call in kernel_calls(jaxpr):
        names.add(call["name"])
        scratch = call["grid_mapping"].num_scratch_operands
        references = [ref.inner_aval for ref in call["jaxpr"].in_avals]
        sizes = [aval.size * aval.dtype.itemsize for aval in references]
        assert 2 * sum(sizes) - sum(sizes[len(sizes) - scratch :]) < 2 / 3 * VMEM_LIMIT, call["name"]
    assert names == expected_kernels(size.tokens, size.num_softmax(rate))


def largest(hlo, dtypes):
    shapes = re.findall(r"\b(" + dtypes + r")\[([\d,]+)\]", hlo)
    return max(int(np.prod([int(size) for size in dimensions.split(",")])) for _, dimensions in shapes)


@needs_libtpu
def test_neither_scores_nor_features_reach_memory():
    """Nor does what does reach it grow faster than tokens. Everything counts: VMEM is kept for the kernels."""
    rate, width = 4, 128

    def compiled(attention, heads, num_tokens, **options):
        compiler = {"xla_vf_vmem_memory_space_assignment": "false"}
        options = {"width": width, "compiler": compiler, **options}
        program = compile_for_tpu("v5e", attention, heads, num_tokens, num_tokens // rate, **options)
        scores, features = heads * num_tokens * num_tokens // rate, heads * num_tokens * 2 * width
        return program.as_text(), program.memory_analysis().temp_size_in_bytes, scores, features

    # Plain XLA writes both: were the kernels to, it would be seen. The compiler is slow at it, hence so few tokens.
    written_out, _, scores, features = compiled(reference.hybrid_attention, 1, 512)
    assert largest(written_out, "f32") >= max(scores, features)
    heads, num_tokens = 12, 8192
    hlo, once, scores, features = compiled(tpu.hybrid_attention, heads, num_tokens, block_sizes=SMALL_BLOCKS)
    _, twice, _, _ = compiled(tpu.hybrid_attention, heads, 2 * num_tokens, block_sizes=SMALL_BLOCKS)
    assert largest(hlo, "f32|bf16|pred|s32") < scores
    assert largest(hlo, "f32") < features
    assert 0 < once < 5 * 2 * heads * num_tokens * width
    assert twice < 2.2 * once
