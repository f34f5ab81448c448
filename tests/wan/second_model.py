"""A second Wan model, hybrid or not, in torch and float64: tokens in natural order, weights for all pairs of tokens.

It shares only the tensors with the project, by their names in the diffusers layout.
"""

import functools
import math
import re

import jax
import numpy as np
import torch
from flax import nnx
from torch.nn import functional as F

from jsurgery.wan import checkpoint_layouts
from pallas_kernels.api import hybrid_attention
from tests import equation_5

SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 3, "out_channels": 4, "text_dim": 12,
    "freq_dim": 16, "ffn_dim": 40,
}  # fmt: skip


def natural(j, rate, site):
    return j % rate == 0


def off_by_one(j, rate, site):
    return j % rate == (1 if rate > 1 else 0)


def staggered(j, rate, site):
    return (j + site[0]) % rate == 0


def staggered_by_rows(j, rate, site, rows=3):
    return (j + rows * site[0] + site[1]) % rate == 0


def chunks(query, key, Tc, To, causal):
    """Of ReHyAt, for a query and a key in these frames: whether the key gets a softmax weight, and a linear weight."""
    start, end = query // Tc * Tc - To, (query // Tc + 1) * Tc
    return start <= key < end, key < start or (not causal and key >= end)


def chunks_overlap_twice(query, key, Tc, To, causal):
    """As if the state got all keys of every chunk's window."""
    softmax, linear = chunks(query, key, Tc, To, causal)
    return softmax, linear or key < query // Tc * Tc


def chunks_see_ahead(query, key, Tc, To, causal):
    """As if no block were causal."""
    return chunks(query, key, Tc, To, False)


def masks(rate, sites, lattice, chunked):
    """in_S and in_L of eq. 5, bool [1 or N, N], of a block of a kind."""
    if isinstance(rate, str) and rate != "linear":
        size = *map(int, re.findall(r"\d+", rate)), rate[0] == "C"
        pairs = torch.tensor([[chunked(query[0], key[0], *size) for key in sites] for query in sites])
        return pairs[..., 0], pairs[..., 1]
    in_S = torch.tensor([[rate != "linear" and lattice(j, rate, site) for j, site in enumerate(sites)]])
    return in_S, ~in_S


def sparse_mask(q, k, percent, block, clear=1e-4):
    """Of SLA: bool [H, N, N], whether a key is in the blocks that score best with the query's block.

    `clear` is the least margin of a score in front of the best one that is not chosen.
    """
    of_token = torch.arange(q.shape[1]) // block
    means = lambda x: torch.stack([x[:, of_token == number].mean(1) for number in range(int(of_token[-1]) + 1)], 1)
    with torch.no_grad():
        scores = means(q) @ means(k - k.mean(1, keepdim=True)).mT
        count = max(1, int(percent / 100 * scores.shape[-1]))
        ordered = scores.sort(-1, descending=True).values
        if count < scores.shape[-1]:
            assert (ordered[..., count - 1] - ordered[..., count]).min() > clear, "too close for float32"
    chosen = scores >= ordered[..., count - 1 : count]
    return chosen[:, of_token][..., of_token]


def linear_average(q, k, v):
    """Of SLA: the linear branch before its projection, [H, N, D]."""
    phi_q, phi_k = q.softmax(-1), k.softmax(-1)
    return phi_q @ (phi_k.mT @ v) / (1e-5 + phi_q @ phi_k.sum(1)[..., None])


def hybrid_attention_of(tensors, prefix, q, k, v, rate, sites, hybrid, lattice, chunked):
    """Eq. 5 in one block, or SLA, for q, k, v [H, N, D] in natural order."""
    if isinstance(rate, str) and rate[0] == "S":
        percent, block = map(int, re.findall(r"\d+", rate))
        seen = sparse_mask(q, k, percent, block)
        y = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf).softmax(-1) @ v
        if not hybrid.linear_branch:
            return y
        average = linear_average(q, k, v)
        return y + F.linear(average, *(tensors[f"{prefix}.proj_l.{leaf}"] for leaf in ("weight", "bias")))
    in_S, in_L = masks(rate, sites, lattice, chunked)
    in_L = in_L if hybrid.linear_branch else torch.zeros_like(in_L)

    def phi(side, x):
        tensor = lambda name: tensors[f"{prefix}.phi_{side}.{name}"]
        kernels, biases = (
            [tensor(f"{layer}.{kind}") for layer in range(hybrid.feature_map.layers)] for kind in ("kernel", "bias")
        )
        shape = hybrid.feature_map.degree, hybrid.feature_map.activation
        return equation_5.feature_map(x, kernels, biases, tensor("log_scale"), *shape)

    return equation_5.equation_5(
        q, k, v, functools.partial(phi, "q"), functools.partial(phi, "k"), in_S, in_L, stabilizer=hybrid.stabilizer
    ).y


def apply_rope(x, sites):
    """RoPE of [H, N, D]: pairs of channels are rotated by time, then height, then width."""
    width = x.shape[-1]
    third = 2 * (width // 6)
    angles = torch.tensor([
        [
            site[axis] * 10_000.0 ** (-pair / size)
            for axis, size in enumerate((width - 2 * third, third, third))
            for pair in range(0, size, 2)
        ]
        for site in sites
    ]).double()  # fmt: skip
    rotated = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(rotated).flatten(-2)


def brute_force(tensors, config, latents, timestep, text, lattice=natural, given_frames=0, chunked=chunks):
    """The velocity [T, H, W, C] of one example. The tokens of the first `given_frames` frames have timestep 0."""
    hybrid, heads = config.hybrid, config.num_attention_heads
    frames, height, width, _ = latents.shape
    sites = [(t, y, x) for t in range(frames) for y in range(height // 2) for x in range(width // 2)]

    def linear(name, x):
        return F.linear(x, tensors[f"{name}.weight"].flatten(1), tensors[f"{name}.bias"])

    def norm(x):
        return F.layer_norm(x, x.shape[-1:], eps=config.eps)

    def project(name, x, context):
        q, k, v = linear(f"{name}.to_q", x), linear(f"{name}.to_k", context), linear(f"{name}.to_v", context)
        q, k = (
            F.rms_norm(t, t.shape[-1:], tensors[f"{name}.norm_{side}.weight"], config.eps)
            for side, t in (("q", q), ("k", k))
        )
        return (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))

    half = config.freq_dim // 2
    timesteps = torch.tensor([[0.0 if site[0] < given_frames else float(timestep)] for site in sites]).double()
    angles = timesteps * 10_000.0 ** (-torch.arange(half).double() / half)
    time = linear("condition_embedder.time_embedder.linear_1", torch.cat([torch.cos(angles), torch.sin(angles)], -1))
    time = linear("condition_embedder.time_embedder.linear_2", F.silu(time))
    modulation = linear("condition_embedder.time_proj", F.silu(time)).unflatten(-1, (6, -1))
    text = F.gelu(linear("condition_embedder.text_embedder.linear_1", text), approximate="tanh")
    text = linear("condition_embedder.text_embedder.linear_2", text)

    patches = [latents[t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].permute(2, 0, 1).flatten() for t, y, x in sites]
    x = linear("patch_embedding", torch.stack(patches))
    for i, rate in enumerate(hybrid.rates):
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = (tensors[f"{block}.scale_shift_table"] + modulation).unbind(1)
        h = norm(x) * (1 + scale1) + shift1
        q, k, v = project(f"{block}.attn1", h, h)
        q, k = apply_rope(q, sites), apply_rope(k, sites)
        y = hybrid_attention_of(tensors, f"{block}.attn1", q, k, v, rate, sites, hybrid, lattice, chunked)
        x = x + gate1 * linear(f"{block}.attn1.to_out.0", y.transpose(0, 1).flatten(1))
        h = norm(x) * tensors[f"{block}.norm2.weight"] + tensors[f"{block}.norm2.bias"]
        q, k, v = project(f"{block}.attn2", h, text)
        y = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v
        x = x + linear(f"{block}.attn2.to_out.0", y.transpose(0, 1).flatten(1))
        h = norm(x) * (1 + scale2) + shift2
        x = x + gate2 * linear(f"{block}.ffn.net.2", F.gelu(linear(f"{block}.ffn.net.0.proj", h), approximate="tanh"))
    shift, scale = (tensors["scale_shift_table"] + time[:, None]).unbind(1)
    out = linear("proj_out", norm(x) * (1 + scale) + shift)
    return out.unflatten(0, (frames, height // 2, width // 2)).unflatten(-1, (2, 2, -1)).transpose(2, 3).reshape(
        frames, height, width, -1
    )  # fmt: skip


def in_double(model):
    tensors = checkpoint_layouts.transformer_tensors(model).items()
    return {name: torch.tensor(tensor, dtype=torch.float64, requires_grad=True) for name, tensor in tensors}


def brute_force_batch(tensors, config, latents, timesteps, text, lattice=natural, given_frames=0, chunked=chunks):
    latents, timesteps, text = (torch.tensor(x).double() for x in (latents, timesteps, text))
    examples = zip(latents, timesteps, text, strict=True)
    return torch.stack([brute_force(tensors, config, *example, lattice, given_frames, chunked) for example in examples])


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def gradient_error(gradients, tensors):
    """The largest relative error of a tensor's gradient.

    The tensors of a feature map count as one, since log_scale has the gradient 0 in a purely linear block.
    """
    groups: dict[str, list[str]] = {}
    for name in tensors:
        groups.setdefault(re.sub(r"(phi_[qk]).*", r"\1", name), []).append(name)
    flat = lambda arrays, names: np.concatenate([np.ravel(arrays[name]) for name in names])
    expected = {name: tensor.grad.numpy() for name, tensor in tensors.items()}
    return max(relative_error(flat(gradients, names), flat(expected, names)) for names in groups.values())


def check_formula(model, arguments, with_gradients):
    """Checks the velocity, and the gradients, against brute force; returns the velocity and the tensors in float64."""
    tensors = in_double(model)
    expected = brute_force_batch(tensors, model.config, *arguments)
    graph, params = nnx.split(model)
    if not with_gradients:
        velocity = run(graph, params, *arguments)
    else:
        cotangent = np.random.default_rng(2).normal(size=expected.shape).astype(np.float32)
        velocity, gradients = value_and_gradients(graph, params, arguments, cotangent)
        (expected * torch.tensor(cotangent)).sum().backward()
        gradients = checkpoint_layouts.transformer_tensors(nnx.merge(graph, gradients))
        assert gradient_error(gradients, tensors) < 1e-5
    assert relative_error(velocity, expected.detach()) < 1e-5
    return velocity, tensors


def inputs(grid):
    rng = np.random.default_rng(1)
    frames, height, width = grid
    latents = rng.normal(size=(2, frames, 2 * height, 2 * width, SIZES["in_channels"])).astype(np.float32)
    text = rng.normal(size=(2, 5, SIZES["text_dim"])).astype(np.float32)
    # Small timesteps: near 1000 the float32 sinusoids of the model have errors of 1e-4.
    return latents, np.array([31.0, 4.5], np.float32), text


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def run(graph, params, latents, timesteps, text, order=None, given_frames=0):
    """The velocity; with `order`, that of full softmax on tokens in this order."""
    model = nnx.merge(graph, params)
    if order is None:
        return model(latents, timesteps, text, given_frames)
    full = lambda q, k, v, _: (hybrid_attention(q, k, v, None, None, num_softmax=k.shape[1]), None)
    return model.apply_blocks(latents, timesteps, text, full, None, order=order)[0]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(graph, params, arguments, cotangent):
    velocity, pullback = jax.vjp(lambda params: nnx.merge(graph, params)(*arguments), params)
    return velocity, pullback(cotangent)[0]
