"""Attention layers and whole forwards as compiled programs, for `bench attention` and `gpu-evidence`."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jsurgery.attention.feature_maps import FeatureMapConfig, LearnedMaps, init_feature_maps, init_projections
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.attention.kinds.registry import parse_block_budget
from jsurgery.io.results import xla_threads
from jsurgery.rates import Rate
from jsurgery.surgery.operate import operate
from jsurgery.wan.cost import Workload, core_flops, model_flops
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.transformer import WanTransformer
from jsurgery.wan.video_size import latent_grid
from pallas_kernels.feature_map import init_polynomial_map

PHI = FeatureMapConfig()
TEXT_LENGTH = 512


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """One attention layer; the batch size is 1."""

    tokens: int
    heads: int
    head_dim: int
    dtype: str
    stabilizer: str

    def num_softmax(self, rate: Rate) -> int:
        return 0 if isinstance(rate, str) else -(-self.tokens // rate)

    def flops(self, rate: Rate) -> int:
        """FLOPs of one forward at a rate, feature maps included."""
        config = WanConfig(num_attention_heads=self.heads, attention_head_dim=self.head_dim)
        return core_flops(Workload(config, self.tokens, feature_map=PHI), rate)

    def bound(self, rate: Rate) -> float:
        """The largest speed-up over full softmax that FLOPs allow."""
        return self.flops(1) / self.flops(rate)


def arguments(size: AttentionShape, rate: Rate) -> tuple:
    """Random q, k, v [1, N, H, D] and the feature maps of queries and keys, None at rate 1."""
    keys = jax.random.split(jax.random.key(0), 5)
    heads = 1, size.tokens, size.heads, size.head_dim
    q, k, v = (jax.random.normal(key, heads, jnp.dtype(size.dtype)) for key in keys[:3])
    if rate == 1:
        return q, k, v, None, None
    make = partial(init_polynomial_map, heads=size.heads, width=size.head_dim, degree=PHI.degree, layers=PHI.layers)
    return q, k, v, make(keys[3]), make(keys[4])


def step(attend: Callable, passes: str) -> Callable:
    """A function of q, k, v and maps: `attend` itself, or its gradients where `passes` names the backward too."""
    return attend if passes == "forward" else partial(gradients, attend)


def gradients(attend: Callable, *inputs: Any) -> tuple:
    """Gradients of q, k, v and maps. q serves as the result's cotangent, so that nothing else has to be computed."""
    return jax.vjp(attend, *inputs)[1](inputs[0])


def program(attend: Callable, inputs: tuple, passes: str) -> dict[str, Any]:
    """`step` as a compiled program, see `compiled`."""
    return compiled(jax.jit(step(attend, passes)), inputs)


def compiled(function: Any, inputs: tuple) -> dict[str, Any]:
    """{"run": a call of the jitted function on these inputs that waits for its end, "memory_bytes": what it takes}."""
    executable = function.lower(*inputs).compile()
    memory = executable.memory_analysis()
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return {
        "memory_bytes": None if memory is None else sum(getattr(memory, part) for part in parts),
        "run": lambda: jax.block_until_ready(executable(*inputs)),
    }


def torch_softmax(
    size: AttentionShape, passes: str, attend: Callable | None = None, device: str = "cpu"
) -> Callable[[], None]:
    """Full softmax in torch by `attend(q, k, v)`, by default `scaled_dot_product_attention`.

    On a GPU a call returns before the GPU has finished.
    """
    import torch

    torch.set_num_threads(xla_threads())
    generator = torch.Generator(device).manual_seed(0)
    shape, options = (1, size.heads, size.tokens, size.head_dim), {"dtype": getattr(torch, size.dtype)}
    q, k, v = (torch.randn(shape, generator=generator, device=device, **options) for _ in range(3))
    attend = attend or torch.nn.functional.scaled_dot_product_attention

    def forward() -> None:
        with torch.no_grad():
            attend(q, k, v)

    def both() -> None:
        leaves = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        torch.autograd.grad(attend(*leaves), leaves, q.detach())

    return forward if passes == "forward" else both


def at_rate(attend: Callable, size: AttentionShape, rate: Rate, **options: Any) -> Callable:
    """`attend` at a rate, as a function of q, k, v and maps. It can be pickled if `attend` can."""
    return partial(attend, num_softmax=size.num_softmax(rate), stabilizer=size.stabilizer, **options)


def of_rows(attend: Callable, heads: int, q: jax.Array, k: jax.Array, v: jax.Array, *maps: Any) -> jax.Array:
    """`attend` on q, k and v in the layout that projections leave, [B, N, H * D]. Returns y in the same layout."""
    split = lambda x: x.reshape(*x.shape[:2], heads, -1)
    return attend(split(q), split(k), split(v), *maps).reshape(q.shape)


def forwards(
    plans: tuple[str, ...], network: WanConfig, video: tuple[int, int, int], dtype: str, stabilizer: str
) -> list[dict[str, Any]]:
    """The `forward` of a softmax model and of each plan, all with the same random weights."""
    softmax = random_softmax_model(network, dtype)
    return [forward(softmax, plan, video, stabilizer) for plan in ("softmax", *plans)]


def random_softmax_model(network: WanConfig, dtype: str) -> WanTransformer:
    return nnx.jit(lambda: WanTransformer(network, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))()


def forward(
    softmax: WanTransformer, plan: str, video: tuple[int, int, int], stabilizer: str, text_length: int = TEXT_LENGTH
) -> dict[str, Any]:
    """A whole forward on random inputs: {"name", "flops", "bound", "memory_bytes", "run"}.

    A plan like "15R2" makes the last 15 blocks hybrid; the plan "softmax" leaves the model as it is.
    """
    network, model, rates = softmax.config, softmax, (1,) * softmax.config.num_layers
    if (named := parse_block_budget(plan)) is not None:
        converted = [rate for count, rate in named for _ in range(count)]
        rates = (*rates[len(converted) :], *converted)
        hybrid = HybridConfig(rates, stabilizer=stabilizer, feature_map=PHI)
        maps, width = LearnedMaps(None, None), network.attention_head_dim
        if hybrid.mapped:
            shape = len(hybrid.mapped), network.num_attention_heads, width
            query, key = (init_feature_maps(key, *shape, PHI) for key in jax.random.split(jax.random.key(1)))
            maps = LearnedMaps(query, key)
        if hybrid.projected:
            maps = maps._replace(projection=init_projections(len(hybrid.projected), width))
        model = operate(softmax, hybrid, maps)
    keys = jax.random.split(jax.random.key(2))
    latents = jax.random.normal(keys[0], (1, *latent_grid(*video, network.strides), network.in_channels), softmax.dtype)
    text = jax.random.normal(keys[1], (1, text_length, network.text_dim), softmax.dtype)
    graph, params = nnx.split(model)
    run = jax.jit(lambda params, *inputs: nnx.merge(graph, params)(*inputs))
    work = Workload(network, 0, text_length, PHI).of_video(*video)
    flops = model_flops(work, rates)
    bound = model_flops(work, (1,) * network.num_layers) / flops
    inputs = params, latents, jnp.full((1,), 500.0), text
    return {"name": plan, "flops": flops, "bound": bound, **compiled(run, inputs)}
