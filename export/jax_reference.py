"""The reference of an export: each part as a JAX function, and every named tensor that they compute from samples."""

import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from jsurgery.diffusion import initial_noise, schedule
from jsurgery.io.files import replacing
from jsurgery.io.results import relative_error
from jsurgery.runtime.progress import say
from jsurgery.surgery.trace import TraceSteps
from jsurgery.wan.checkpoint import load_text_encoder, load_transformer, load_vae
from jsurgery.wan.rope import rope_tables
from jsurgery.wan.text_encoder import encode_prompts
from jsurgery.wan.tokenizer import Tokenizer
from jsurgery.wan.transformer import WanTransformer, layer_norm
from pallas_kernels import reference as brute_force

from .mobile_layout import TokenLayout
from .parity import missing_samples
from .parts import STEPS, ExportJob, Part


class JaxParts:
    """The parts of a job as functions of arrays, in float32. Models are loaded when a part first needs them."""

    def __init__(self, job: ExportJob):
        self.job, self.config = job, job.config
        self.layout = TokenLayout.of(self.config, job.latent_shape)
        tables = rope_tables(self.layout.grid, self.config.attention_head_dim, self.config.rope_max_seq_len)
        self.rope = tuple(table[self.layout.order.permutation] for table in tables)

    @functools.cached_property
    def model(self) -> WanTransformer:
        return load_transformer(self.job.transformer)

    def function(self, part: Part, plain: bool = False) -> Callable[..., tuple[jax.Array, ...]]:
        """The part as a function of its inputs that returns a tuple of its outputs.

        With `plain`, attention is the O(N^2) reference, without loops over chunks.
        """
        if part.name == "text_encoder":
            encoder = load_text_encoder(f"{self.job.base}/text_encoder")
            return compiled(encoder, lambda encoder, ids, mask: (encode_prompts(encoder, ids, mask),))
        if part.name == "vae_decoder":
            vae = load_vae(f"{self.job.base}/vae")
            return compiled(vae, lambda vae, latents: (vae.decode(latents[None])[0],))
        model = self.model
        if part.name == "condition":
            return compiled(model.condition, lambda condition, *inputs: condition(*inputs))
        if part.name == "embed":
            return self.embed
        if part.name == "head":
            return self.head
        if part.name == "transformer":
            return self.spelled_out if plain else self.whole
        return functools.partial(self.blocks, numbers=part.blocks, plain=plain)

    @functools.cached_property
    def whole(self) -> Callable[..., tuple[jax.Array]]:
        """(latents, timestep, text embeddings) -> velocity, by the model's own forward; compiled once."""
        return compiled(self.model, lambda model, latents, *inputs: (model(latents[None], *inputs)[0],))

    def embed(self, latents: jax.Array) -> tuple[jax.Array]:
        """Latents [T, H, W, C] -> tokens [1, N, D] in the order of the mobile form."""
        patches = self.model.patchify(latents[None])
        return (self.model.patch_embedding(patches[:, self.layout.order.permutation]),)

    def head(self, x: jax.Array, time: jax.Array) -> tuple[jax.Array]:
        """Tokens [1, N, D] and time embedding [1, D] -> velocity [T, H, W, C]."""
        model = self.model
        shift, scale = jnp.split(model.scale_shift_table[None] + time[:, None], 2, axis=1)
        x = model.proj_out(layer_norm(x, self.config.eps) * (1 + scale) + shift)
        natural = np.argsort(self.layout.order.permutation)
        return (model.unpatchify(x[:, natural], self.layout.grid)[0],)

    def spelled_out(self, latents, timestep, text_embeddings) -> tuple[jax.Array]:
        """The whole transformer with `plain` attention."""
        time, modulation, text = self.model.condition(timestep, text_embeddings)
        (x,) = self.blocks(*self.embed(latents), text, modulation, range(self.config.num_layers), True)
        return self.head(x, time)

    def blocks(self, x, text, modulation, numbers, plain: bool) -> tuple[jax.Array]:
        """Tokens after the blocks of these numbers."""
        stacked, hybrid = nnx.state(self.model.blocks), self.config.hybrid
        for number in numbers:
            maps = None
            if hybrid is not None and hybrid.linear_branch and number in hybrid.converted:
                slot = hybrid.converted.index(number)
                stacked_maps = self.model.query_maps.maps, self.model.key_maps.maps
                maps = jax.tree.map(lambda leaf, i=slot: leaf[i], stacked_maps)
            state = jax.tree.map(lambda leaf, i=number: leaf[i], stacked)
            x = self.block(state, maps, x, text, modulation, self.config.rates[number], plain)
        return (x,)

    @functools.cached_property
    def block(self) -> Callable[..., jax.Array]:
        """(state, maps, x, text, modulation, rate, plain) -> x. Compiled once for each rate, not for each block."""
        graph, hybrid = nnx.graphdef(self.model.blocks), self.config.hybrid
        order = hybrid.token_order(self.layout.grid) if hybrid else None

        @functools.partial(jax.jit, static_argnames=("rate", "plain"))
        def block(state, maps, x, text, modulation, rate, plain):
            rope = tuple(map(jnp.asarray, self.rope))
            module = nnx.merge(graph, state)
            if plain:
                attend = functools.partial(self.attend, rate=rate, maps=maps or (None, None))
                return module(x, text, modulation, rope, attend, self.attend)
            attend = lambda q, k, v: self.model.attend(q, k, v, maps, rate, order)
            return module(x, text, modulation, rope, attend)

        return block

    def attend(self, q, k, v, rate=1, maps=(None, None)) -> jax.Array:
        """Attention by the O(N^2) reference; by default full softmax."""
        num_softmax = k.shape[1] if rate == 1 else self.layout.softmax[rate]
        if maps[1] is None:
            k, v = k[:, :num_softmax], v[:, :num_softmax]
        stabilizer = self.config.hybrid.stabilizer if self.config.hybrid else "lse"
        return brute_force.hybrid_attention(q, k, v, *maps, num_softmax=num_softmax, stabilizer=stabilizer)


def compiled(module: nnx.Module, function: Callable) -> Callable:
    """`function(module, ...)` as a compiled function of arrays. Weights are arguments of the program, not constants."""
    graph, state = nnx.split(module)
    return functools.partial(jax.jit(lambda state, *inputs: function(nnx.merge(graph, state), *inputs)), state)


def export(job: ExportJob, folder: pathlib.Path, choices: tuple[str, ...]) -> None:
    """Writes `reference/SAMPLE/TENSOR.npy` for every tensor of the job, for samples that are missing.

    `choices` holds the number of samples. Raises AssertionError where the parts together differ from the whole model.
    """
    count = int(choices[0])
    missing = missing_samples(folder, count)
    if not missing:
        return
    parts = JaxParts(job)
    functions = {part.name: parts.function(part) for part in job.parts()}
    inputs = samples(job)
    for number in missing:
        tensors = dict(inputs[number])
        for part in job.parts():
            if part.step == STEPS[2] and number:
                continue  # the decoded video is only compared with, on sample 0
            outputs = run(functions[part.name], tensors, part.inputs)
            tensors |= dict(zip(part.outputs, outputs, strict=True))
        if job.blocks_per_file:
            (whole,) = run(parts.whole, tensors, ("latents", "timestep", "text_embeddings"))
            error = relative_error(tensors["velocity"], whole)
            if not error < 1e-5:
                raise AssertionError(f"the parts differ from the whole model by {error:.1e}")
        with replacing(folder / "reference" / str(number)) as temporary:
            temporary.mkdir(parents=True, exist_ok=True)
            for name, tensor in tensors.items():
                np.save(temporary / f"{name}.npy", np.asarray(tensor))
        say(f"export: reference {number + 1}/{count}")


def run(function: Callable, tensors: dict[str, np.ndarray], names: tuple[str, ...]) -> list[np.ndarray]:
    """The outputs of a function for the named tensors, with matmuls in full float32."""
    with jax.default_matmul_precision("highest"):
        return [np.asarray(output) for output in function(*(jnp.asarray(tensors[name]) for name in names))]


def samples(job: ExportJob) -> list[dict[str, np.ndarray]]:
    """The inputs of every sample: traced latents with timestep and prompt, or without a trace noise and prompts."""
    shapes, rng = job.tensors(), np.random.default_rng(job.seed)
    rows = schedule(job.sampler["solver"], job.sampler["steps"], job.sampler["shift"])
    tokenizer = Tokenizer(f"{job.base}/tokenizer") if job.text_encoder else None
    traced = TraceSteps(epath.Path(job.trace)) if job.trace else None
    # Artefacts are compared on the first sample, from the middle of a trajectory. The others span all of it.
    shares = [0.5, *np.linspace(0, 1, job.samples - 1)]
    inputs = []
    for number, share in enumerate(shares):
        if traced is not None:
            traced_prompt = traced.prompts[number % len(traced.prompts)]
            index = traced.position(traced_prompt, round(share * (traced.steps_per_prompt - 1)))
            step, prompt = traced[index], traced.text(index)
            latents, timestep, embeddings = step["latents"], step["timestep"], step["text"][None]
        else:
            prompt = job.prompts[number % len(job.prompts)] if job.prompts else ""
            embeddings = rng.normal(size=shapes["text_embeddings"].shape)
            latents = initial_noise(job.seed, [number], shapes["latents"].shape)[0]
            timestep = rows.timestep[round(share * (len(rows.timestep) - 1))]
        tensors = {"latents": latents, "timestep": np.atleast_1d(timestep)}
        if tokenizer is None:
            tensors["text_embeddings"] = embeddings
        else:
            token_ids, tensors["mask"] = tokenizer([prompt], job.text_length)
        tensors = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
        inputs.append(tensors if tokenizer is None else tensors | {"token_ids": token_ids})
    return inputs
