"""Trains a Wan transformer together with its text encoder, by flow matching on encoded clips."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from ml_collections import ConfigDict, FrozenConfigDict
from optax.contrib import MuonDimensionNumbers, muon

from jsurgery.data.latents import batches
from jsurgery.diffusion import add_noise_at_random_levels
from jsurgery.errors import InputError
from jsurgery.runtime.guard import likely_causes, rows_with_faults
from jsurgery.runtime.loop import run_steps
from jsurgery.runtime.mesh import global_batch, local_rows, make_mesh, put_state
from jsurgery.runtime.optimizer import initial_train_state, train_step, trained_parameters
from jsurgery.wan.checkpoint import load_text_encoder, load_transformer
from jsurgery.wan.model_config import TextEncoderConfig, WanConfig
from jsurgery.wan.text_encoder import TextEncoder, encode_prompts
from jsurgery.wan.tokenizer import Tokenizer
from jsurgery.wan.transformer import WanTransformer

VALIDATION_BATCHES = 4


class TransformerWithTextEncoder(nnx.Module):
    """The transformer and the text encoder whose embeddings it reads; they are trained together."""

    def __init__(self, transformer: WanConfig, text_encoder: TextEncoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.transformer = WanTransformer(transformer, dtype=dtype, rngs=rngs)
        self.text_encoder = TextEncoder(text_encoder, rngs=rngs)

    def __call__(self, latents, timesteps, token_ids, mask):
        return self.transformer(latents, timesteps, encode_prompts(self.text_encoder, token_ids, mask))


def flow_matching_loss(
    model: TransformerWithTextEncoder, batch: dict, key: jax.Array, *, shift: float, dropout: float
) -> jax.Array:
    """Mean squared velocity error at noise levels spread evenly over [0, 1] and then shifted.

    A fraction `dropout` of the captions is replaced by the empty caption.
    """
    key_noise, key_drop = jax.random.split(key)
    noisy, timesteps_B, velocity = add_noise_at_random_levels(batch["latents"], key_noise, shift)
    size = len(timesteps_B)
    dropped_B = jax.random.permutation(key_drop, jnp.arange(size)) < dropout * size
    token_ids = jnp.where(dropped_B[:, None], batch["blank_ids"], batch["token_ids"])
    mask = jnp.where(dropped_B[:, None], batch["blank_mask"], batch["mask"])
    return jnp.mean((model(noisy, timesteps_B, token_ids, mask) - velocity) ** 2)


def make_optimizer(train: ConfigDict) -> optax.GradientTransformation:
    """Muon on the blocks' matrices, or AdamW on everything; the learning rate warms up, stays, and decays to zero.

    The decay is 1 - sqrt (arXiv 2405.18392). Equal settings return the same object, so that compiled programs are
    reused.
    """
    fields = ("learning_rate", "warmup", "steps", "decay", "optimizer")
    return _make_optimizer(FrozenConfigDict({field: train[field] for field in fields}))


@functools.lru_cache
def _make_optimizer(train: FrozenConfigDict) -> optax.GradientTransformation:
    decay = max(train.decay, 1)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, train.learning_rate, max(train.warmup, 1)),
            optax.constant_schedule(train.learning_rate),
            lambda step: train.learning_rate * (1 - jnp.sqrt(jnp.clip(step / decay, 0, 1))),
        ],
        [train.warmup, train.steps - train.decay],
    )
    if train.optimizer == "adamw":
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.01))

    def stacked_kernels(params):
        def of(path, leaf):
            name = jax.tree_util.keystr(path)
            return MuonDimensionNumbers(1, 2) if "blocks" in name and "kernel" in name and leaf.ndim == 3 else None

        return jax.tree_util.tree_map_with_path(of, params)

    spectral = muon(schedule, adam_b2=0.99, muon_weight_dimension_numbers=stacked_kernels, consistent_rms=0.2)
    return optax.chain(optax.clip_by_global_norm(1.0), spectral)


def model_configs(train: ConfigDict, vocabulary: int) -> tuple[WanConfig, TextEncoderConfig]:
    transformer = WanConfig(
        num_attention_heads=train.heads,
        attention_head_dim=train.head_dim,
        in_channels=train.z_dim,
        out_channels=train.z_dim,
        text_dim=train.text_dim,
        ffn_dim=train.ffn_dim,
        num_layers=train.layers,
    )
    text_encoder = TextEncoderConfig(
        vocab_size=vocabulary,
        d_model=train.text_dim,
        d_kv=train.text_dim // 4,
        d_ff=2 * train.text_dim,
        num_heads=4,
        num_layers=train.text_layers,
    )
    return transformer, text_encoder


def loss_of(graph: nnx.GraphDef, params: Any, batch: dict, key: jax.Array, shift: float, dropout: float):
    return flow_matching_loss(nnx.merge(graph, params), batch, key, shift=shift, dropout=dropout)


validation_loss = jax.jit(loss_of, static_argnames=("graph", "shift", "dropout"))


def make_update(config: ConfigDict, optimizer: optax.GradientTransformation, graph: nnx.GraphDef) -> Any:
    """The jitted step (state, batch, key) -> (state, metrics, faults). Equal settings return the same function."""
    train = config.train
    return _make_update(optimizer, graph, train.shift, train.condition_dropout, train.ema)


@functools.lru_cache(maxsize=8)
def _make_update(
    optimizer: optax.GradientTransformation, graph: nnx.GraphDef, shift: float, dropout: float, ema: float
) -> Any:
    @jax.jit
    def update(state, batch, key):
        objective = lambda params, batch: loss_of(graph, params, batch, key, shift, dropout)
        return train_step(state, objective, batch, optimizer, pieces=1, ema=ema)

    return update


def train_transformer(
    config: ConfigDict,
    workdir: epath.Path,
    *,
    tokenizer: Tokenizer,
    latents: epath.Path,
    init: epath.Path | None = None,
) -> TransformerWithTextEncoder:
    """Trains, or continues training, on the shards in `latents/train`; returns the averaged (EMA) model.

    init: a pipeline folder with the initial weights. Raises InputError if its sizes differ from the config's.
    """
    train = config.train
    mesh = make_mesh(config.mesh)
    transformer, text_encoder = model_configs(train, tokenizer.vocab_size)
    model = TransformerWithTextEncoder(
        transformer, text_encoder, dtype=jnp.dtype(config.model.dtype), rngs=nnx.Rngs(config.seed)
    )
    if init is not None:
        model.transformer = load_transformer(init / "transformer", jnp.dtype(config.model.dtype))
        model.text_encoder = load_text_encoder(init / "text_encoder")
        for part, expected in (("transformer", transformer), ("text_encoder", text_encoder)):
            if (actual := getattr(model, part).config) != expected:
                raise InputError(f"config.train.init: {init / part}: expected {expected}, found {actual}")
    model.transformer.set_mesh(mesh, config.mesh.exchange)
    graph, params = nnx.split(model)
    optimizer = make_optimizer(train)
    blank_ids, blank_mask = tokenizer([""], config.text_length)

    rows = local_rows(mesh, train.batch)

    def tokenized(element):
        token_ids, mask = tokenizer(element["captions"], config.text_length)
        arrays = {"latents": element["latents"], "token_ids": token_ids, "mask": mask}
        return global_batch(mesh, rows, train.batch, arrays) | {"blank_ids": blank_ids, "blank_mask": blank_mask}

    update = make_update(config, optimizer, graph)
    data = batches(latents / "train", train.batch, config.seed, rows)
    held_out = batches(latents / "holdout", train.batch, config.seed, rows)

    def validate(params) -> float:
        """The loss on fixed clips, noise and noise levels."""
        keys = jax.random.split(jax.random.key(1), VALIDATION_BATCHES)
        settings = {"shift": train.shift, "dropout": 0.0}
        losses = [validation_loss(graph, params, tokenized(held_out[i]), key, **settings) for i, key in enumerate(keys)]
        return float(np.mean([float(value) for value in losses]))

    def one_step(state: dict[str, Any], step: int) -> tuple[dict[str, Any], dict[str, jax.Array], Any]:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        return update(state, tokenized(data[step]), key)

    def explain(step: int, values: dict[str, Any], faults: Any, state: dict[str, Any]) -> str:
        bad = rows_with_faults(data[step]["latents"], rows)
        return likely_causes(values["loss"], step, bad, state["params"], faults)

    initial = put_state(mesh, initial_train_state(params, optimizer, train.ema))
    state = run_steps(
        "train", config, initial, one_step, steps=train.steps,
        checkpoints=workdir / "transformer", metrics=workdir / "transformer_metrics",
        format_metrics=lambda values: (values, f"loss {values['loss']:.4f}"), likely_cause=explain,
        validate=lambda state: {"validation_loss": validate(trained_parameters(state))},
    )  # fmt: skip
    return nnx.merge(graph, trained_parameters(state))
