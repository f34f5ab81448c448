"""FLOPs and bytes of compiled programs against sums done by hand."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from jsurgery.attention.kinds.prefix_losses import AttentionInputs, nested_softmax, value_loss
from jsurgery.attention.token_order import TokenOrder
from jsurgery.attention.token_shards import TokenShards
from jsurgery.estimate.chips import CHIPS
from jsurgery.estimate.compile_ahead import chip_and_devices
from jsurgery.estimate.traffic import ProgramWork, bound_by, program_work
from jsurgery.wan.cost import Workload, core_flops, distillation_bytes, distillation_flops, model_bytes, model_flops
from jsurgery.wan.model_config import WanConfig
from pallas_kernels import init_polynomial_map, tpu
from tests.conftest import needs_libtpu

MIB = 2**20
# A loop of ten turns as the TPU compiler writes it, with tiles after the layout and S(1) for the chip's own memory. A
# turn reads a slice of 0.5 MiB of `weights`, fetches another, runs a branch and a kernel, and writes into `history`.
LOOP = """
%bits (p: ONE) -> ROWS {
  %p = ONE parameter(0)
  ROOT %b = ROWS bitcast(%p)
}
%step (p0: f32[1024,1024], p1: TEN, p2: s32[]) -> ROWS {
  %p0 = f32[1024,1024]{1,0:T(8,128)S(1)} parameter(0)
  %p1 = TEN parameter(1)
  %p2 = s32[]{:T(128)S(6)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %slice = ONE dynamic-slice(%p1, %p2, %zero, %zero)
  %w = ROWS fusion(%slice), kind=kLoop, calls=%bits
  ROOT %y = ROWS convolution(%p0, %w), dim_labels=bf_io->bf
}
%keep (p0: TEN, p1: ROWS, p2: s32[]) -> TEN {
  %p0 = TEN parameter(0)
  %p1 = ROWS parameter(1)
  %p2 = s32[]{:T(128)S(6)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %row = ONE bitcast(%p1)
  ROOT %new = TEN dynamic-update-slice(%p0, %row, %p2, %zero, %zero)
}
%small (p: ROWS) -> ROWS {
  ROOT %p = ROWS parameter(0)
}
%large (p: ROWS) -> ROWS {
  %p = ROWS parameter(0)
  ROOT %n = ROWS negate(%p)
}
%condition (c: (s32[], TEN, TEN)) -> pred[] {
  %c = (s32[]{:T(128)}, TEN, TEN) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%c), index=0
  %ten = s32[]{:T(128)S(6)} constant(10)
  ROOT %less = pred[]{:T(512)S(6)} compare(%i, %ten), direction=LT
}
%body (c: (s32[], TEN, TEN)) -> (s32[], TEN, TEN) {
  %c = (s32[]{:T(128)}, TEN, TEN) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%c), index=0
  %weights = TEN get-tuple-element(%c), index=1
  %history = TEN get-tuple-element(%c), index=2
  %x = f32[1024,1024]{1,0:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %y = ROWS fusion(%x, %weights, %i), kind=kOutput, calls=%step
  %ahead = ((TEN), NEAR, s32[]{:S(2)}) slice-start(%weights)
  %come = NEAR slice-done(%ahead)
  %z = ROWS conditional(%i, %y, %y), branch_computations={%small, %large}
  %k = bf16[1024,128]{1,0:T(8,128)(2,1)} custom-call(%z), custom_call_target="tpu_custom_call", KERNEL
  %kept = TEN fusion(%history, %z, %i), kind=kLoop, calls=%keep
  %one = s32[]{:T(128)S(6)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  ROOT %t = (s32[]{:T(128)}, TEN, TEN) tuple(%next, %weights, %kept)
}
ENTRY %main (weights: TEN, thin: f32[1000,1]) -> TEN {
  %weights = TEN parameter(0)
  %thin = f32[1000,1]{1,0:T(8,128)} parameter(1)
  %fetched = (f32[1000,1]{1,0:T(8,128)S(1)}, f32[1000,1]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%thin)
  %there = f32[1000,1]{1,0:T(8,128)S(1)} copy-done(%fetched)
  %i = s32[]{:T(128)} constant(0)
  %history = TEN broadcast(%i), dimensions={}
  %t = (s32[]{:T(128)}, TEN, TEN) tuple(%i, %weights, %history)
  %w = (s32[]{:T(128)}, TEN, TEN) while(%t), condition=%condition, body=%body
  ROOT %out = TEN get-tuple-element(%w), index=2
}
"""
KERNEL = (
    'backend_config={"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"1000","transcendentals":"7",'
    '"bytes_accessed":"4000000","remote_bytes_transferred":"0"},"needs_layout_passes":true}}'
)
LOOP = LOOP.replace("TEN", "f32[10,1024,128]{2,1,0:T(8,128)}").replace("ONE", "f32[1,1024,128]{2,1,0:T(8,128)}")
LOOP = LOOP.replace("NEAR", "f32[1,1024,128]{2,1,0:T(8,128)S(1)}")
LOOP = LOOP.replace("ROWS", "f32[1024,128]{1,0:T(8,128)}").replace("KERNEL", KERNEL)
SLICE = MIB // 2


def test_a_loop_counts_its_slices_as_often_as_it_runs():
    """What lies in the chip's own memory, S(1), moves nothing; of two branches the heavier counts."""
    work = program_work(LOOP)
    turn = 2 * SLICE  # %y: reads a slice of the weights, writes the product
    turn += SLICE  # %ahead: reads a slice
    turn += 2 * SLICE  # the branch %large: reads and writes
    turn += 4_000_000  # the kernel, by its own account
    turn += 2 * SLICE  # %kept: reads a row, writes it into the history
    near = LOOP.replace("%k = bf16[1024,128]{1,0:T(8,128)(2,1)", "%k = bf16[1024,128]{1,0:T(8,128)(2,1)S(1)")
    assert program_work(near).hbm_bytes == pytest.approx(program_work(LOOP).hbm_bytes - 10 * 4_000_000 / 3)
    once = 1000 * 128 * 4  # %thin, whose rows are padded to 128 lanes
    once += 10 * SLICE  # %history
    assert work.hbm_bytes == pytest.approx(10 * turn + once, abs=10 * 1024)  # and scalars
    assert work.flops == 10 * (2 * 1024 * 1024 * 128 + 1000)
    # With known shares, a fifth of the turns runs the branch that moves something.
    assert program_work(LOOP, (0.8, 0.2)).hbm_bytes == work.hbm_bytes - 0.8 * 10 * 2 * SLICE
    assert program_work(LOOP, (0.5, 0.3, 0.2)) == work
    assert work.exchanged_bytes == 0


def test_control_without_trips_the_count_is_another():
    without = LOOP.replace("constant(10)", "parameter(1)")
    assert program_work(without).flops == program_work(LOOP).flops / 10
    assert program_work(without).hbm_bytes < 0.3 * program_work(LOOP).hbm_bytes
    by_two = LOOP.replace("constant(1)", "constant(2)")  # the counter goes up by two
    assert program_work(by_two).flops == program_work(LOOP).flops / 2
    noted = without.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"10"}}')
    assert program_work(noted) == program_work(LOOP)


CONVOLUTION = """
ENTRY %main (x: bf16[{inputs}], w: bf16[{taps}]) -> bf16[{out}] {{
  %x = bf16[{inputs}]{{3,2,1,0:T(8,128)(2,1)}} parameter(0)
  %w = bf16[{taps}]{{3,2,1,0:T(8,128)(2,1)}} parameter(1)
  ROOT %y = bf16[{out}]{{3,2,1,0:T(8,128)(2,1)}} convolution(%x, %w), window={{{window}}}, dim_labels=b01f_01io->b01f
}}
"""


@pytest.mark.parametrize(
    ("size", "strides", "padding", "dilations"),
    [
        ((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
        ((3, 2), (2, 1), ((0, 1), (2, 0)), (1, 3)),
        ((1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    ],
)
def test_a_convolution_counts_the_pairs_that_meet(size, strides, padding, dilations):
    """Brute force: a convolution of ones adds up, at each output, the number of inputs under the window."""
    x, w = jnp.ones((2, 7, 5, 3)), jnp.ones((*size, 3, 4))
    options = {"window_strides": strides, "padding": padding, "lhs_dilation": dilations}
    y = np.asarray(lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options))
    by_axis = lambda name, values: f"{name}={'x'.join(map(str, values))}"
    window = [by_axis("size", size), by_axis("stride", strides), by_axis("lhs_dilate", dilations)]
    window.append(by_axis("pad", [f"{low}_{high}" for low, high in padding]))
    shape = lambda array: ",".join(map(str, array.shape))
    text = CONVOLUTION.format(inputs=shape(x), taps=shape(w), out=shape(y), window=" ".join(window))
    assert program_work(text).flops == 2 * y.sum()


SPLIT = """
%begin (p: bf16[128,1024]) -> (bf16[128,1024], bf16[512,1024], u32[]) {
  %p = bf16[128,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %g = bf16[512,1024]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, frontend_attributes={chain_id="2"}
  ROOT %s = (bf16[128,1024], bf16[512,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) custom-call(%g), TARGETStart"
}
%beside (own: bf16[128,1024], all: bf16[512,1024], x: f32[1024,128]) -> (f32[1024,128]) {
  %own = bf16[128,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %all = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %x = f32[1024,128]{1,0:T(8,128)} parameter(2)
  %g = bf16[512,1024]{1,0:T(8,128)(2,1)} all-gather(%own), channel_id=1, frontend_attributes={chain_id="2"}
  %n = f32[1024,128]{1,0:T(8,128)} negate(%x)
  ROOT %t = (f32[1024,128]{1,0:T(8,128)}, bf16[512,1024], bf16[512,1024]) tuple(%n, %all, %g)
}
%finish (own: bf16[128,1024], all: bf16[512,1024]) -> bf16[512,1024] {
  %own = bf16[128,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %all = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %g = bf16[512,1024]{1,0:T(8,128)(2,1)} all-gather(%own), channel_id=1, frontend_attributes={chain_id="2"}
  ROOT %d = bf16[512,1024]{1,0:T(8,128)(2,1)} custom-call(%own, %all, %g), TARGETDone"
}
ENTRY %main (own: bf16[128,1024], x: f32[1024,128]) -> bf16[512,1024] {
  %own = bf16[128,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %x = f32[1024,128]{1,0:T(8,128)} parameter(1)
  %s = (bf16[128,1024], bf16[512,1024], u32[]{:S(2)}) fusion(%own), kind=kCustom, calls=%begin
  %all = bf16[512,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %f = (f32[1024,128], bf16[512,1024], bf16[512,1024]) fusion(%own, %all, %x), kind=kOutput, calls=%beside
  %then = bf16[512,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%f), index=2
  ROOT %d = bf16[512,1024]{1,0:T(8,128)(2,1)} fusion(%own, %then), kind=kCustom, calls=%finish
}
""".replace("TARGET", 'custom_call_target="AsyncCollective')


def test_a_collective_in_steps_moves_its_operand_and_its_result_once():
    work = program_work(SPLIT)
    assert work.exchanged_bytes == MIB
    assert work.hbm_bytes == MIB // 4 + MIB + 2 * SLICE  # and the work beside it


def test_the_times_of_a_program_and_the_longest():
    times = ProgramWork(197e12, 1.6e12, 1e10).seconds(CHIPS["v5e"])
    assert times == {"compute": pytest.approx(1), "memory": pytest.approx(2), "exchange": pytest.approx(0.1)}
    assert bound_by(times) == "memory"


def compiled(function, *shapes) -> Any:
    """`function` compiled for one v5e."""
    device = jax.sharding.SingleDeviceSharding(chip_and_devices("v5e:2x2", 1)[1][0])
    return jax.jit(function, in_shardings=device, out_shardings=device).lower(*shapes).compile()


@needs_libtpu
def test_products_in_a_compiled_loop():
    """The rows stay in the chip's memory; the weights of each turn come from HBM. XLA's analysis takes a loop once."""
    x, weights = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1024, 8192), (5, 8192, 8192)))
    program = compiled(lambda x, weights: lax.scan(lambda x, w: (x @ w, None), x, weights)[0], x, weights)
    work = program_work(program.as_text())
    assert work.flops == 5 * 2 * 1024 * 8192 * 8192
    assert work.hbm_bytes == pytest.approx(2 * (5 * 8192 * 8192 + 2 * 1024 * 8192), rel=0.01)
    assert program.cost_analysis()["flops"] == pytest.approx(work.flops / 5)


@needs_libtpu
def test_neither_scores_nor_features_of_distillation_reach_memory():
    """One head at two rates with gradients, as traced for a TPU: kernels by their blocks move what
    `wan.cost.distillation_bytes` counts, and keys and values once more for every further block of queries."""
    tokens, network = 12_600, WanConfig(num_attention_heads=1, attention_head_dim=128, num_layers=1)
    order, rates = TokenOrder(tokens, (1, 2, "linear")), (2, "linear")
    maps = jax.eval_shape(lambda key: init_polynomial_map(key, 1, 128), jax.random.key(0))
    mesh = jax.sharding.Mesh(np.array(chip_and_devices("v5e:2x2", 1)[1][:1]), ("x",))

    def gradients(q, k, v, *maps_of_rates):
        shards = TokenShards(order)
        branches, full = nested_softmax(q, k, v, shards, rates)
        for rate, maps in zip(rates, maps_of_rates, strict=True):
            at = AttentionInputs(rate, q, k, v, branches.get(rate), full, shards, "lse")
            yield jax.value_and_grad(lambda maps, at=at: value_loss(maps, at).sum())(maps)

    mapped = jax.shard_map(lambda *x: list(gradients(*x)), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    rows = jax.ShapeDtypeStruct((1, tokens, 1, 128), jnp.bfloat16)
    operations = list(all_operations(jax.make_jaxpr(mapped)(rows, rows, rows, *[(maps, maps)] * 2).jaxpr))
    kernels = [each.params for each in operations if each.primitive.name == "pallas_call"]
    assert [each["name"] for each in kernels].count("softmax_zones") == 1

    counted = Workload(network, tokens)
    least = distillation_bytes(counted, rates) - model_bytes(counted, (1,))
    queries = tpu.blocks_for("v5e", tokens, tokens).query
    read_again = (-(-tokens // queries) - 1) * 2 * 2 * tokens * 128
    qkv = 3 * 2 * tokens * 128  # the teacher's own, which `model_bytes` counts
    moved = sum(each["cost_estimate"].bytes_accessed for each in kernels)
    assert moved == pytest.approx(least + qkv + read_again, rel=0.08)  # further: maps, states, blocks that overlap
    flops = sum(each["cost_estimate"].flops for each in kernels)
    branches = distillation_flops(counted, rates) - model_flops(counted, (1,)) + core_flops(counted, 1)
    assert flops == pytest.approx(branches, rel=0.1)
    largest = max(math.prod(value.aval.shape) for each in operations for value in each.outvars)
    assert largest == 2 * tokens * 128, "the outputs of two prefixes; features would be as many, for every map"
    assert largest < tokens**2 / 8


def all_operations(jaxpr) -> Iterator[Any]:
    """The operations of a program, but not those inside of kernels."""
    for each in jaxpr.eqns:
        yield each
        if each.primitive.name != "pallas_call":
            for inner in jaxprs_in_params(each.params):
                yield from all_operations(inner)
