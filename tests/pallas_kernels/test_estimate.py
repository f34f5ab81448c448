"""Static estimates: grid steps and sections from the program, cycles from the TPU compiler, which needs no TPU."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.extend.core import jaxprs_in_params

from jsurgery.bench.attention_programs import AttentionShape, arguments, at_rate, gradients, of_rows, step
from pallas_kernels import tpu
from pallas_kernels.block_traffic import block_traffic
from pallas_kernels.estimate import Kernel, cycles_of, estimate_cycles, kernels_of
from pallas_kernels.tpu_problem import BlockSizes
from tests.conftest import needs_libtpu

STEPS, ROWS = 8, 512
PRODUCTS_PER_CYCLE = 918e12 / 2 / 1.75e9  # multiply-adds of a v6e: half of its FLOP/s, divided by its clock rate


def squares(condition, x, name: str | None = "squares"):
    """A kernel with two sections: products, in the steps where `condition` holds, and a sum, in the last step."""

    def kernel(x_ref, y_ref):
        i = pl.program_id(0)
        y_ref[...] = x_ref[...]

        @pl.when(condition(i))
        def _():
            a = x_ref[...]
            for _ in range(4):
                a = jnp.dot(a, x_ref[...], preferred_element_type=jnp.float32).astype(a.dtype)
            y_ref[...] = a

        @pl.when(i == STEPS - 1)
        def _():
            y_ref[...] += 1

    block = pl.BlockSpec((ROWS, ROWS), lambda i: (i, 0))
    return pl.pallas_call(kernel, grid=(STEPS,), in_specs=[block], out_specs=block, out_shape=jax.typeof(x), name=name)(
        x
    )


def first(i):
    return i == 0


def half(i):
    return (i % 2 == 0) & (i < STEPS)


def always(i):
    return i >= 0


X = jax.ShapeDtypeStruct((STEPS * ROWS, ROWS), jnp.bfloat16)


@pytest.mark.parametrize(("condition", "share"), [(first, 1 / 8), (half, 1 / 2), (always, 1)])
def test_sections_count_in_the_share_of_steps_that_run_them(condition, share):
    jaxpr = jax.make_jaxpr(functools.partial(squares, condition))(X).jaxpr
    assert kernels_of(jaxpr) == {"squares": [Kernel(STEPS, (share, 1 / 8))]}


def test_a_section_conditional_on_data_counts_in_every_step():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]

        @pl.when(x_ref[0, 0] > 0)
        def _():
            y_ref[...] += 1

    call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32), grid=(2, 3), name="data")
    jaxpr = jax.make_jaxpr(call)(jax.ShapeDtypeStruct((8, 128), jnp.float32)).jaxpr
    assert kernels_of(jaxpr) == {"data": [Kernel(6, (1.0,))]}


def test_kernels_without_a_name_are_named_after_their_scope():
    @jax.jit
    def function(x):
        with jax.named_scope("outer"), jax.named_scope("inner"):
            y = squares(first, x, name=None)
        return squares(first, y, name=None)

    found = kernels_of(jax.make_jaxpr(function)(X).jaxpr)
    assert found == {name: [Kernel(STEPS, (1 / 8, 1 / 8))] for name in ("inner", "function")}


def test_grid_steps_of_the_kernels_of_a_gradient():
    """Two heads of 300 tokens and 150 softmax keys: 3 and 2 blocks of 128, 2 and 1 blocks of 256."""
    size = AttentionShape(300, 2, 128, "bfloat16", "lse")
    blocks = BlockSizes(
        query=128, key=128, key_chunk=128, state=256, backward_query=256, backward_key=128, backward_state=128
    )
    attend = at_rate(tpu.hybrid_attention, size, 2, block_sizes=blocks)
    jaxpr = jax.make_jaxpr(functools.partial(gradients, attend))(*arguments(size, 2)).jaxpr
    found = kernels_of(jaxpr)
    assert {name: [kernel.steps for kernel in kernels] for name, kernels in found.items()} == {
        "hybrid_state": [2 * 2],
        "hybrid_attend": [2 * 3 * 2],
        "hybrid_delta": [2 * 3],
        "hybrid_read_out_backward": [2 * 3],
        "hybrid_state_backward": [2 * 2],
        "hybrid_attend_backward": [2 * 2 * 2],
    }
    # Each block of queries reads all blocks of softmax keys. The last, of tokens 128 to 255, reaches past the 150th.
    moved, weights = traffic_of(jaxpr)["hybrid_attend"], 128 * 256 + 256 * 256
    rows = 300 + 300 + 3 * 2 * 256  # q and y once, k and v for each block of queries
    assert moved == 2 * (2 * (128 * rows + weights + 256 * 128) + 4 * (2 * 256 + 256 + 2 * 300))
    # Backward, each of two blocks of keys reads q and dy; k, v, dk, dv, dq and its linear part move once.
    rows = 2 * 2 * 300 + 2 * 256 + 2 * 150 + 2 * 300
    assert traffic_of(jaxpr)["hybrid_attend_backward"] == 2 * (2 * 128 * rows + 4 * 2 * 300 * (3 + 1))


def traffic_of(jaxpr):
    """Bytes that each kernel declares, by name."""
    found = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found[equation.params["name"]] = equation.params["cost_estimate"].bytes_accessed
        for inner in jaxprs_in_params(equation.params):
            found |= traffic_of(inner)
    return found


def test_a_block_moves_when_it_is_another_than_in_the_step_before():
    """Six steps, (i, j) = (0, 0), (0, 1), (1, 0), ...; the third block of 8 rows has 4."""
    rows, columns = pl.BlockSpec((8, 128), lambda i, j: (i, 0)), pl.BlockSpec((8, 128), lambda i, j: (0, j))
    late = pl.BlockSpec((None, 8, 128), lambda i, j: (i, jnp.where(i == 2, j, 0), 0))
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    count = lambda spec, x: block_traffic((3, 2), [spec], [x]) // (4 * 128)
    assert count(rows, array(20, 128)) == 20
    assert count(columns, array(20, 256)) == 6 * 8
    assert count(late, array(3, 12, 128)) == 8 + 8 + 8 + 4
    element = pl.BlockSpec((None, pl.Element(8), pl.Element(128)), lambda i, j: (0, 6 * i, 0))
    assert count(element, array(1, 18, 128)) == 8 + 8 + 6
    assert block_traffic((3, 2), [rows, columns], [array(20, 128), array(20, 256)]) == 4 * 128 * 68


SCHEDULE = """
 LH: loop header
   0x0   :  { %1 = a } /* Start region 1 */
   0x1 LB: > { %2 = a  ;;  %3 = b } /* Start region 7 */
   0x2   : > { %4 = sbr.rel (%p1) target = $region9 }
   0x3   : > { %5 = a } /* Start region 8 */
   0x4   : >> { %6 = sbr.rel (%p2) target = $region5 } /* Start region 4 */
   0x5   : >> { %7 = vmatmul.bf16.gmra.mxu1 a  ;;  %70 = vmatmul.bf16.vlgmr.msra.gmra.mxu0 b
second line of it }
   0x6   : >> { %8 = a } /* End region 4 */
   0x7   : > { %9 = a } /* Start/End empty region 5 */
   0x8   : > { %10 = vmatmul.bf16.gmra.mxu1 a } /* End region 8 */
   0x9 PF: > { %11 = a } /* Start/End empty region 9 */
   0xa   : > { %12 = sbr.rel (!%p3) target = $region7 }
   0xb   :  { %13 = a }
"""


def test_cycles_count_a_section_by_its_share_of_steps():
    """The schedule has 12 bundles. A branch in the loop's body jumps over 3 of them."""
    assert cycles_of(Kernel(10, (0.5,)), SCHEDULE, 2) == 10 * (12 - 3 / 2)
    # The compiler may remove the branches of sections that run in every step or in none.
    assert cycles_of(Kernel(10, (1, 0.5, 0)), SCHEDULE, 2) == 10 * (12 - 3 / 2)
    assert cycles_of(Kernel(10, (1,)), SCHEDULE, 2) == cycles_of(Kernel(10, ()), SCHEDULE, 2) == 120


def test_sections_that_copy_results_count_in_every_step():
    """After the section, 200 bundles later, come two short ones: one bundle each, which `pl.when` does not describe."""
    body = "".join(f"   0x{8 + i:x} : > {{ %8 = a }}\n" for i in range(200))
    copies = "".join(
        f"   0x{208 + 2 * i:x} : > {{ %8 = sbr.rel (!%p1) target = $region{20 + i} }}\n"
        f"   0x{209 + 2 * i:x} : > {{ %8 = a }} /* Start/End empty region {20 + i} */\n"
        for i in range(2)
    )
    lines = SCHEDULE.splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if "0x8 " in line)
    longer = (
        "".join(lines[:cut])
        + body
        + copies
        + "".join(lines[cut:])
        .replace("0x8 ", "0xd4 ")
        .replace("0x9 ", "0xd5 ")
        .replace("0xa ", "0xd6 ")
        .replace("0xb ", "0xd7 ")
    )
    assert cycles_of(Kernel(10, (0.5,)), longer, 2) == 10 * (12 + 204 - 3 / 2)


def test_unmatched_sections_count_in_every_step_with_a_warning():
    with pytest.warns(UserWarning, match="1 sections in the schedule, 2 in the kernel: .* up to 25.0% too much"):
        assert cycles_of(Kernel(10, (0.5, 0.5)), SCHEDULE, 2) == 120


def test_the_busiest_matrix_unit_may_determine_the_cycles():
    """Unit 1 has one product in the section and one after it."""
    assert cycles_of(Kernel(10, (0.5,)), SCHEDULE, 16) == 10 * (16 + 16 / 2)
    assert cycles_of(Kernel(10, (1.0,)), SCHEDULE, 16) == 10 * (16 + 16)


def kernels_with(conditions, x):
    return [squares(condition, x, name=condition.__name__) for condition in conditions]


@needs_libtpu
def test_estimated_cycles_follow_the_share_of_steps():
    kernels, _ = estimate_cycles("v6e", functools.partial(kernels_with, (first, half, always)), X)
    costs = {name.partition(".")[0]: cycles for name, cycles in kernels.items()}
    section = (costs["always"] - costs["first"]) / 7 * 8
    assert costs["half"] == pytest.approx(costs["always"] - section / 2, rel=0.03)
    products = STEPS * 4 * ROWS**3
    assert products < section * PRODUCTS_PER_CYCLE < 2 * products


@needs_libtpu
@pytest.mark.filterwarnings("ignore:. sections in the schedule")
def test_cycles_are_proportional_to_heads_and_above_the_flop_bound():
    """Forward and backward; XLA's own part does not grow with the heads."""
    blocks = BlockSizes(
        query=512, key=512, state=512, backward_query=512, backward_key=512, backward_chunk=512, backward_state=512
    )

    def estimated(heads):
        size = AttentionShape(4096, heads, 128, "bfloat16", "max")
        attend = functools.partial(of_rows, at_rate(tpu.hybrid_attention, size, 8, block_sizes=blocks), heads)
        rows = jax.ShapeDtypeStruct((1, 4096, heads * 128), jnp.bfloat16)
        maps = jax.eval_shape(lambda: arguments(size, 8)[3:])
        kernels, own = estimate_cycles("v6e", step(attend, "forward + backward"), *[rows] * 3, *maps)
        assert len(kernels) == 6
        forward = [kernels[name] for name in kernels if re.search(r"hybrid_(state|attend)(?!_backward)", name)]
        return sum(forward), sum(kernels.values()), sum(own.values()), size.flops(8)

    (forward, two, _, flops), (_, four, own, _) = estimated(2), estimated(4)
    assert four == pytest.approx(2 * two, rel=0.02) and own < four
    for cycles, products in ((forward, flops / 2), (two, 3 * flops / 2)):
        bound = products / PRODUCTS_PER_CYCLE
        assert bound < cycles < 4 * bound


@needs_libtpu
def test_a_program_without_kernels_and_an_unknown_chip():
    kernels, own = estimate_cycles("v5e", first, X)
    assert kernels == {} and sum(own.values()) > 0
    with pytest.raises(ValueError, match="v9"):
        estimate_cycles("v9", first, X)
