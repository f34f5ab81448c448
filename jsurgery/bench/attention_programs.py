"""What `bench attention` and `gpu-evidence` measure: attention layers and whole forwards as compiled programs."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jsurgery.attention.feature_maps import FeatureMapConfig, init_feature_maps
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.io.results import xla_threads
from jsurgery.rates import Rate, parse_block_budget
from jsurgery.surgery.operate import operate
from jsurgery.wan.cost import Workload, core_flops, model_flops
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.transformer import WanTransformer
from jsurgery.wan.video_size import latent_grid, num_tokens
from pallas_kernels.feature_map import init_polynomial_map

PHI = FeatureMapConfig()
TEXT_LENGTH = 512


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """One attention layer, of batch 1."""

    tokens: int
    heads: int
    head_dim: int
    dtype: str
    stabilizer: str

    def num_softmax(self, rate: Rate) -> int:
        return 0 if isinstance(rate, str) else -(-self.tokens // rate)

    def flops(self, rate: Rate) -> int:
        """Of one forward, phi included."""
        config = WanConfig(num_attention_heads=self.heads, attention_head_dim=self.head_dim)
        return core_flops(Workload(config, self.tokens, feature_map=PHI), rate)

    def bound(self, rate: Rate) -> float:
        """The speed-up over full softmax that FLOPs allow."""
        return self.flops(1) / self.flops(rate)


def arguments(size: AttentionShape, rate: Rate) -> tuple:
    """q, k, v and two maps, random."""
    keys = jax.random.split(jax.random.key(0), 5)
    heads = 1, size.tokens, size.heads, size.head_dim
    q, k, v = (jax.random.normal(key, heads, jnp.dtype(size.dtype)) for key in keys[:3])
    if rate == 1:
        return q, k, v, None, None
    make = partial(init_polynomial_map, heads=size.heads, width=size.head_dim, degree=PHI.degree, layers=PHI.layers)
    return q, k, v, make(keys[3]), make(keys[4])


def step(attend: Callable, passes: str) -> Callable:
    """Attention, or its gradients, of q, k, v and maps."""
    return attend if passes == "forward" else partial(gradients, attend)


def gradients(attend: Callable, *inputs: Any) -> tuple:
    """Of q, k, v and maps. q is also the result's cotangent, so that nothing but attention is at work."""
    return jax.vjp(attend, *inputs)[1](inputs[0])


def program(attend: Callable, inputs: tuple, passes: str) -> dict[str, Any]:
    return compiled(jax.jit(step(attend, passes)), inputs)


def compiled(function: Any, inputs: tuple) -> dict[str, Any]:
    """A jitted function as a program of these inputs, and the memory that it takes."""
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
    """Full softmax by `attend(q, k, v)`, or None: what torch chooses. On a GPU a call does not wait for its end."""
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
    """Attention of a size at a rate, as a function of q, k, v and maps that another process can import."""
    return partial(attend, num_softmax=size.num_softmax(rate), stabilizer=size.stabilizer, **options)


def of_rows(attend: Callable, heads: int, q: jax.Array, k: jax.Array, v: jax.Array, *maps: Any) -> jax.Array:
    """`attend` of q, k and v [B, N, H * D], as projections leave them, and maps; y likewise."""
    split = lambda x: x.reshape(*x.shape[:2], heads, -1)
    return attend(split(q), split(k), split(v), *maps).reshape(q.shape)


def forwards(
    plans: tuple[str, ...], network: WanConfig, video: tuple[int, int, int], dtype: str, stabilizer: str
) -> list[dict[str, Any]]:
    """`forward`s of a model of softmax alone and of each plan, all of the same random weights."""
    softmax = random_softmax_model(network, dtype)
    return [forward(softmax, plan, video, stabilizer) for plan in ("softmax", *plans)]


def random_softmax_model(network: WanConfig, dtype: str) -> WanTransformer:
    return nnx.jit(lambda: WanTransformer(network, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))()


def forward(
    softmax: WanTransformer, plan: str, video: tuple[int, int, int], stabilizer: str, text_length: int = TEXT_LENGTH
) -> dict[str, Any]:
    """A model's whole forward on random inputs: as it is for the plan "softmax", else with its last blocks hybrid."""
    network, model, rates = softmax.config, softmax, (1,) * softmax.config.num_layers
    if (named := parse_block_budget(plan)) is not None:
        count, rate = named
        rates = (*rates[count:], *(rate,) * count)
        shape = count, network.num_attention_heads, network.attention_head_dim
        query_maps, key_maps = (init_feature_maps(key, *shape, PHI) for key in jax.random.split(jax.random.key(1)))
        hybrid = HybridConfig(rates, stabilizer=stabilizer, feature_map=PHI)
        model = operate(softmax, hybrid, (query_maps, key_maps) if count else None)
    keys = jax.random.split(jax.random.key(2))
    latents = jax.random.normal(keys[0], (1, *latent_grid(*video), network.in_channels), softmax.dtype)
    text = jax.random.normal(keys[1], (1, text_length, network.text_dim), softmax.dtype)
    graph, params = nnx.split(model)
    run = jax.jit(lambda params, *inputs: nnx.merge(graph, params)(*inputs))
    work = Workload(network, num_tokens(*video), text_length, PHI)
    flops = model_flops(work, rates)
    bound = model_flops(work, (1,) * network.num_layers) / flops
    inputs = params, latents, jnp.full((1,), 500.0), text
    return {"name": plan, "flops": flops, "bound": bound, **compiled(run, inputs)}
