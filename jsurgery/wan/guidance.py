"""Classifier-free guidance: moves a prompt's velocity away from the negative prompt's velocity."""

import functools

import jax
import jax.numpy as jnp

from jsurgery.diffusion import State, Velocity, guided, solver_step
from jsurgery.runtime.mesh import sharding
from jsurgery.wan.transformer import WanTransformer


def guidance_batch(
    latents: jax.Array, timesteps_B: jax.Array, text: jax.Array, negative_text: jax.Array | None, *, in_pairs: bool
) -> dict[str, jax.Array]:
    """The transformer's inputs for both branches as one batch [2 B, ...]; [B, ...] without a negative text.

    `in_pairs` puts every example beside its negative, so that both stay on the same device of a mesh. Otherwise all
    examples come first. A caller must keep to one order, because the two may round differently.
    """
    if negative_text is None:
        return {"latents": latents, "timestep": timesteps_B, "text": text}

    def both(positive: jax.Array, negative: jax.Array) -> jax.Array:
        if in_pairs:
            return jnp.stack([positive, negative], 1).reshape(-1, *positive.shape[1:])
        return jnp.concatenate([positive, negative])

    return {
        "latents": both(latents, latents),
        "timestep": both(timesteps_B, timesteps_B),
        "text": both(text, negative_text),
    }


def guide(velocity: jax.Array, guidance: float, *, in_pairs: bool) -> jax.Array:
    """The guided velocity [B, ...], from the transformer's velocities [2 B, ...] for a `guidance_batch`."""
    if in_pairs:
        pairs = velocity.reshape(-1, 2, *velocity.shape[1:])
        return guided(pairs[:, 0], pairs[:, 1], guidance)
    conditional, unconditional = jnp.split(velocity, 2)
    return guided(conditional, unconditional, guidance)


def with_given_frames(x: jax.Array, given: jax.Array | None) -> jax.Array:
    """The latents x [B, T, H, W, C], which begin with the given ones [B, K, H, W, C]; x itself without any."""
    return x if given is None else jnp.concatenate([given.astype(x.dtype), x[:, given.shape[1] :]], axis=1)


def guided_velocity(
    transformer: WanTransformer,
    text: jax.Array,
    negative_text: jax.Array | None,
    guidance: float,
    batched: bool,
    given: jax.Array | None = None,
) -> Velocity:
    """A function (x, timesteps) -> float32 velocity for text [B, L, D], guided away from `negative_text` [1, L, D].

    With `batched` both branches run as one batch of 2 B, otherwise one after the other. Without a negative text there
    is no guidance. The transformer sees the latents `given` [B, K, H, W, C] in place of the first K frames of x, and
    what it leaves there means nothing.
    """
    options = {} if given is None else {"given_frames": given.shape[1]}
    if negative_text is None:
        forward = lambda x, timesteps: transformer(with_given_frames(x, given), timesteps, text, **options)
        return lambda x, timesteps: forward(x, timesteps).astype(jnp.float32)
    negative_text = jnp.broadcast_to(negative_text, text.shape)

    def velocity(x, timesteps):
        x = with_given_frames(x, given)
        if batched:
            both = guidance_batch(x, timesteps, text, negative_text, in_pairs=False)
            velocities = transformer(both["latents"], both["timestep"], both["text"], **options)
            return guide(velocities.astype(jnp.float32), guidance, in_pairs=False)
        branches = (transformer(x, timesteps, branch, **options) for branch in (text, negative_text))
        conditional, unconditional = branches
        return guided(conditional.astype(jnp.float32), unconditional.astype(jnp.float32), guidance)

    return velocity


@jax.jit
def blocks_not_finite(transformer: WanTransformer, x: jax.Array, timesteps_B: jax.Array, text: jax.Array) -> jax.Array:
    """bool [L]: whether a block's queries, keys, values or attention output hold numbers that are not finite."""
    attention, layers, order = transformer.planned_attention(transformer.config.token_grid(x.shape[1:4]))

    def watched(q, k, v, layer):
        y, _ = attention(q, k, v, layer)
        return y, ~jnp.stack([jnp.isfinite(each).all() for each in (q, k, v, y)]).all()

    return transformer.apply_blocks(x, timesteps_B, text, watched, layers, order=order)[1]


# jax.jit, since nnx.jit would return the model too: a copy of its weights at every call.
@functools.partial(jax.jit, static_argnames=("guidance", "batched"))
def sampling_step(
    transformer,
    text,
    negative_text,
    state: State,
    row,
    key,
    guidance: float,
    batched: bool,
    given=None,
    first_frame: int | None = None,
):
    """The solver's state after one step from `state`, by a row of its schedule; compiled. See `guided_velocity`.

    With a mesh, the state is whole on every device, as it is before the first step: one program serves all steps.
    `first_frame` is that of `solver_step`.
    """
    velocity = guided_velocity(transformer, text, negative_text, guidance, batched, given)
    state = solver_step(velocity, state, row, key, first_frame)
    mesh = transformer.device_mesh
    return state if mesh is None else jax.lax.with_sharding_constraint(state, sharding(mesh))
