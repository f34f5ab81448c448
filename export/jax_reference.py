"""The reference of an export: each part as a JAX function, and every named tensor that they compute from samples."""

import dataclasses
import functools
import gc
import pathlib
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from jsurgery.attention.rope import rope_tables
from jsurgery.diffusion import initial_noise, schedule
from jsurgery.io.files import save_array
from jsurgery.io.results import relative_error
from jsurgery.runtime.finite import check_finite
from jsurgery.runtime.progress import say
from jsurgery.surgery.trace import TraceSteps
from jsurgery.wan.abstract_module import abstract_module
from jsurgery.wan.checkpoint import load_text_encoder, load_transformer, load_vae, open_transformer
from jsurgery.wan.checkpoint_layouts import load_transformer_tensors
from jsurgery.wan.text_encoder import encode_prompts
from jsurgery.wan.tokenizer import Tokenizer
from jsurgery.wan.transformer import WanTransformer, layer_norm
from pallas_kernels import reference as brute_force

from .mobile_layout import TokenLayout
from .parity import load_sample, missing_samples, sample_file
from .parts import STEPS, ExportJob, Part


class JaxParts:
    """The parts of a job as functions of arrays, in float32. A function holds the weights of its part alone."""

    def __init__(self, job: ExportJob):
        self.job, self.config = job, job.config
        self.layout = TokenLayout.of(self.config, job.latent_shape)
        tables = rope_tables(self.layout.grid, self.config.attention_head_dim, self.config.rope_max_seq_len)
        self.rope = tuple(table[self.layout.order.permutation] for table in tables)

    def function(self, part: Part, plain: bool = False) -> Callable[..., tuple[jax.Array | np.ndarray, ...]]:
        """The part as a function of its inputs that returns a tuple of its outputs.

        With `plain` it can be traced, and attention is the O(N^2) reference: there are no loops over chunks.
        """
        if part.name == "text_encoder":
            encoder = load_text_encoder(f"{self.job.base}/text_encoder")
            return compiled(encoder, lambda encoder, ids, mask: (encode_prompts(encoder, ids, mask),))
        if part.name == "vae_decoder":
            vae = load_vae(f"{self.job.base}/vae")
            if plain:
                return compiled(vae, lambda vae, latents: (vae.decode(latents[None])[0],))
            return lambda latents: (vae.decode_in_chunks(np.asarray(latents)[None])[0],)
        if part.name == "transformer" and not plain:
            return self.whole()
        model = load_blocks(self.job.transformer, part.blocks)
        if part.name == "condition":
            return compiled(model.condition, lambda condition, *inputs: condition(*inputs))
        methods = {"embed": self.embed, "head": self.head, "transformer": self.spelled_out}
        method = methods.get(part.name, functools.partial(self.blocks, numbers=part.blocks, plain=plain))
        return functools.partial(method, model)

    def whole(self) -> Callable[..., tuple[jax.Array]]:
        """(latents, timestep, text embeddings) -> velocity, by the model's own forward, with all weights."""
        model = load_transformer(self.job.transformer)
        return compiled(model, lambda model, latents, *inputs: (model(latents[None], *inputs)[0],))

    def embed(self, model: WanTransformer, latents: jax.Array) -> tuple[jax.Array]:
        """Latents [T, H, W, C] -> tokens [1, N, D] in the order of the mobile form."""
        patches = model.patchify(latents[None])
        return (model.patch_embedding(patches[:, self.layout.order.permutation]),)

    def head(self, model: WanTransformer, x: jax.Array, time: jax.Array) -> tuple[jax.Array]:
        """Tokens [1, N, D] and time embedding [1, D] -> velocity [T, H, W, C]."""
        shift, scale = jnp.split(model.scale_shift_table[None] + time[:, None], 2, axis=1)
        x = model.proj_out(layer_norm(x, self.config.eps) * (1 + scale) + shift)
        natural = np.argsort(self.layout.order.permutation)
        return (model.unpatchify(x[:, natural], self.layout.grid)[0],)

    def spelled_out(self, model: WanTransformer, latents, timestep, text_embeddings) -> tuple[jax.Array]:
        """The whole transformer with `plain` attention."""
        time, modulation, text = model.condition(timestep, text_embeddings)
        (x,) = self.blocks(model, *self.embed(model, latents), text, modulation, range(self.config.num_layers), True)
        return self.head(model, x, time)

    def blocks(self, model: WanTransformer, x, text, modulation, numbers: Sequence[int], plain: bool):
        """(tokens,) after the blocks of these numbers, which are all that `model` has."""
        stacked, hybrid = nnx.state(model.blocks), model.config.hybrid
        for place, number in enumerate(numbers):
            maps = None
            if hybrid is not None and place in hybrid.mapped:
                slot = hybrid.mapped.index(place)
                stacked_maps = model.query_maps.maps, model.key_maps.maps
                maps = jax.tree.map(lambda leaf, i=slot: leaf[i], stacked_maps)
            state = jax.tree.map(lambda leaf, i=place: leaf[i], stacked)
            x = self.block(state, maps, x, text, modulation, self.config.rates[number], plain)
        return (x,)

    @functools.cached_property
    def block(self) -> Callable[..., jax.Array]:
        """(state, maps, x, text, modulation, rate, plain) -> x. Compiled once for each rate, not for each block."""
        model, hybrid = abstract_module(WanTransformer, self.config), self.config.hybrid
        graph, order = nnx.graphdef(model.blocks), hybrid.token_order(self.layout.grid) if hybrid else None
        stabilizer = hybrid.stabilizer if hybrid else "lse"

        @functools.partial(jax.jit, static_argnames=("rate", "plain"))
        def block(state, maps, x, text, modulation, rate, plain):
            rope = tuple(map(jnp.asarray, self.rope))
            module = nnx.merge(graph, state)
            if plain:
                attend = functools.partial(self.attend, rate=rate, maps=maps or (None, None))
                return module(x, text, modulation, rope, attend, self.attend)
            attend = lambda q, k, v: model.attend(q, k, v, maps, rate, self.layout.grid, order, stabilizer)
            return module(x, text, modulation, rope, attend)

        return block

    def attend(self, q, k, v, rate=1, maps=(None, None)) -> jax.Array:
        """Attention by the O(N^2) reference; by default full softmax."""
        num_softmax = k.shape[1] if rate == 1 else self.layout.softmax[rate]
        if maps[1] is None:
            k, v = k[:, :num_softmax], v[:, :num_softmax]
        stabilizer = self.config.hybrid.stabilizer if self.config.hybrid else "lse"
        return brute_force.hybrid_attention(q, k, v, *maps, num_softmax=num_softmax, stabilizer=stabilizer)


def load_blocks(path: str, numbers: Sequence[int]) -> WanTransformer:
    """The transformer as if it had the blocks of these numbers alone, in float32. No other block's weights are read.

    Raises InputError as `load_transformer` does.
    """
    config, tensors = open_transformer(path)
    place = {number: i for i, number in enumerate(numbers)}
    kept = {}
    for name, tensor in tensors.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.*)", name)
        if block is None:
            kept[name] = tensor
        elif int(block[1]) in place:
            kept[f"blocks.{place[int(block[1])]}.{block[2]}"] = tensor
    hybrid = config.hybrid and dataclasses.replace(config.hybrid, rates=tuple(config.rates[i] for i in numbers))
    config = dataclasses.replace(config, num_layers=len(numbers), hybrid=hybrid)
    model = abstract_module(WanTransformer, config)
    load_transformer_tensors(model, kept, source=path)
    return model


def compiled(module: nnx.Module, function: Callable) -> Callable:
    """`function(module, ...)` as a compiled function of arrays. Weights are arguments of the program, not constants."""
    graph, state = nnx.split(module)
    return functools.partial(jax.jit(lambda state, *inputs: function(nnx.merge(graph, state), *inputs)), state)


def export(job: ExportJob, folder: pathlib.Path, choices: tuple[str, ...]) -> None:
    """Writes `reference/SAMPLE/TENSOR.npy` for every tensor of the job's parts that a sample lacks.

    `choices` holds the number of samples. One part's weights are in memory at a time. Raises AssertionError where the
    parts together differ from the whole model.
    """
    count = int(choices[0])
    inputs = samples(job)
    for number in range(count):
        (folder / "reference" / str(number)).mkdir(parents=True, exist_ok=True)
        write_missing(folder, number, inputs[number])
    parts, needed = JaxParts(job), job.needed()
    for step, part in enumerate(needed, start=1):
        # The decoded video is only compared with, on sample 0.
        missing = missing_samples(folder, 1 if part.step == STEPS[2] else count, part.outputs)
        if not missing:
            continue
        function = parts.function(part)
        whole = parts.whole() if job.blocks_per_file and part.outputs == ("velocity",) else None
        for number in missing:
            outputs = run(function, load_sample(folder, number, part.inputs))
            if whole is not None:
                given = load_sample(folder, number, ("latents", "timestep", "text_embeddings"))
                error = relative_error(outputs[0], run(whole, given)[0])
                if not error < 1e-5:
                    raise AssertionError(f"the parts differ from the whole model by {error:.1e}")
            write_missing(folder, number, dict(zip(part.outputs, outputs, strict=True)))
        del function, whole
        gc.collect()
        say(f"export: reference {step}/{len(needed)}  {part.name}")


def write_missing(folder: pathlib.Path, number: int, tensors: dict[str, np.ndarray]) -> None:
    """Writes those tensors of a sample that are not there. Raises InputError for numbers that are not finite."""
    for name, tensor in tensors.items():
        check_finite(tensor, f"export: reference: {name} of sample {number}")
    for name, tensor in tensors.items():
        file = sample_file(folder, number, name)
        if not file.exists():
            save_array(epath.Path(file), tensor)


def run(function: Callable, arguments: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of a function, with matmuls in full float32."""
    with jax.default_matmul_precision("highest"):
        return [np.asarray(output) for output in function(*map(jnp.asarray, arguments))]


def samples(job: ExportJob) -> list[dict[str, np.ndarray]]:
    """The inputs of every sample: traced latents with timestep and prompt, or without a trace noise and prompts."""
    shapes, rng = job.tensors(), np.random.default_rng(job.seed)
    sampler = job.sampler
    rows = schedule(sampler["solver"], sampler["steps"], sampler["shift"], sampler.get("timesteps", ()))
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
