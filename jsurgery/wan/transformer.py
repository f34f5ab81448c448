"""The Wan2.1 diffusion transformer, with full softmax or hybrid self-attention in each block.

Names follow the diffusers checkpoint where they can; `weights.py` holds the one table between the two.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding

from jsurgery.attention.hybrid import (
    FORMAT_VERSION,
    FeatureMap,
    HybridConfig,
    attend,
    init_feature_maps,
    token_order,
)
from jsurgery.attention.token_order import Rate, TokenOrder
from jsurgery.errors import InputError
from jsurgery.files import read_object
from jsurgery.model_config import check_fields
from jsurgery.runtime.mesh import LOGICAL, batch_pieces, check_heads, parameter_shardings, place, sharding
from jsurgery.runtime.stages import write_json
from jsurgery.wan import weights
from jsurgery.wan.abstract_module import abstract_module
from jsurgery.wan.hashes import check_hashes, write_hashes
from jsurgery.wan.rope import apply_rope, rope_tables
from jsurgery.wan.safetensors_files import SHARD_BYTES, Tensors, open_tensors, write_shards, write_tensors
from pallas_kernels import hybrid_attention, sharded_cross_attention, sharded_self_attention

CLASS_NAME = "WanTransformer3DModel"
HYBRID_CLASS_NAME = "HybridWanTransformer3DModel"
ORIGINAL_CLASS_NAME = "WanModel"
# What the backward pass recomputes of a block.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda block: block,
    "blocks": jax.checkpoint,
    "matmuls": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}
# Our size -> its name in the original repository's config.json, which leaves out the other sizes.
ORIGINAL_SIZES = {
    "dim": "dim",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "freq_dim": "freq_dim",
    "ffn_dim": "ffn_dim",
    "num_layers": "num_layers",
}


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan transformer, named as in diffusers' config.json; the defaults are Wan2.1 1.3B."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 8960
    num_layers: int = 30
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_max_seq_len: int = 1024
    hybrid: HybridConfig | None = None  # None: every block is full softmax, as published

    @classmethod
    def from_json(cls, fields: dict[str, Any], source: str = "config.json") -> Self:
        """The config in a parsed config.json of diffusers or jsurgery; raises InputError for another architecture."""
        kind = fields.get("_class_name")
        if kind not in (CLASS_NAME, HYBRID_CLASS_NAME):
            raise InputError(f"{source}: expected _class_name {CLASS_NAME} or {HYBRID_CLASS_NAME}, found {kind!r}")
        for name, wan in (("qk_norm", "rms_norm_across_heads"), ("image_dim", None), ("added_kv_proj_dim", None)):
            if fields.get(name, wan) != wan:
                raise InputError(f"{source}: {name}: the text-to-video Wan2.1 has {wan!r}, found {fields[name]!r}")
        known = {field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name in fields}
        patch_size = known.get("patch_size", cls.patch_size)
        known["patch_size"] = tuple(patch_size) if isinstance(patch_size, list) else patch_size
        if kind == HYBRID_CLASS_NAME:
            known["hybrid"] = HybridConfig.from_json(fields.get("hybrid"), source)
            rates, layers = known["hybrid"].rates, known.get("num_layers", cls.num_layers)
            if len(rates) != layers:
                raise InputError(f"{source}: hybrid.rates has {len(rates)} entries, num_layers is {layers}")
        config = cls(**known)
        check_fields(config, source)
        for name in ("attention_head_dim", "freq_dim"):
            if getattr(config, name) % 2:
                raise InputError(f"{source}: {name}: expected an even number, found {getattr(config, name)}")
        return config

    def to_json(self) -> dict[str, Any]:
        """The content of config.json; a hybrid has a class name of its own, so that stock diffusers refuses it."""
        fields = dataclasses.asdict(self) | {"qk_norm": "rms_norm_across_heads", "image_dim": None}
        fields |= {"added_kv_proj_dim": None, "pos_embed_seq_len": None}
        hybrid = fields.pop("hybrid")
        if hybrid is None:
            return {"_class_name": CLASS_NAME, **fields}
        return {"_class_name": HYBRID_CLASS_NAME, **fields, "hybrid": {"format_version": FORMAT_VERSION, **hybrid}}

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def rates(self) -> tuple:
        return self.hybrid.rates if self.hybrid else (1,) * self.num_layers

    def token_grid(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Tokens along time, height and width for latents of `latent_shape` = (T, H, W)."""
        for name, size, patch in zip(("frames", "height", "width"), latent_shape, self.patch_size, strict=True):
            if size % patch:
                raise InputError(f"latents: {name} is {size}, not a multiple of the patch size {patch}")
        return tuple(size // patch for size, patch in zip(latent_shape, self.patch_size, strict=True))  # type: ignore[return-value]


class Linear(nnx.Linear):
    """A linear layer that, on one device, flattens its batch axes and asks for sums in float32.

    XLA on CPUs is twice as fast so, backward by the one and in bfloat16 by the other. Over a mesh the one would gather
    every example's tokens, as a flat axis cannot be split by examples and by tokens, and the other would exchange
    sums at twice their width.
    """

    def __init__(self, in_features: int, out_features: int, *, dtype: Any = None, rngs: nnx.Rngs):
        super().__init__(in_features, out_features, dtype=dtype, rngs=rngs)
        self.compute_on(None)

    def compute_on(self, mesh: Mesh | None) -> None:
        self.flat = mesh is None
        self.preferred_element_type = jnp.float32 if self.flat else None

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        if not self.flat:
            return super().__call__(x)
        y = super().__call__(x.reshape(-1, x.shape[-1])).astype(x.dtype)
        return y.reshape(*x.shape[:-1], -1)


def rms_norm(x_BxNxD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32."""
    x = x_BxNxD.astype(jnp.float32)
    normed = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (normed * weight_D[None, None]).astype(x_BxNxD.dtype)


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """Layer norm over the last axis without gain and bias; float32 in and out."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)


def timestep_embedding(timesteps_B: jax.Array, width: int) -> jax.Array:
    """Sinusoids of timesteps in [0, 1000], cosines first: [B, width]."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps_B.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Attention(nnx.Module):
    """Projections and norms of an attention layer; queries and keys are normalised over the full width."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        dim = config.dim
        self.heads, self.eps = config.num_attention_heads, config.eps
        self.to_q, self.to_k, self.to_v, self.to_out = (Linear(dim, dim, dtype=dtype, rngs=rngs) for _ in range(4))
        self.norm_q = nnx.Param(jnp.ones(dim))
        self.norm_k = nnx.Param(jnp.ones(dim))

    def project(self, x_BxNxD: jax.Array, context_BxMxD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, N, H, D/H] from `x`; k, v [B, M, H, D/H] from `context`."""
        q = rms_norm(self.to_q(x_BxNxD), self.norm_q[...], self.eps)
        k = rms_norm(self.to_k(context_BxMxD), self.norm_k[...], self.eps)
        v = self.to_v(context_BxMxD)
        return tuple(t.reshape(*t.shape[:2], self.heads, -1) for t in (q, k, v))  # type: ignore[return-value]

    def output(self, y_BxNxHxD: jax.Array) -> jax.Array:
        return self.to_out(y_BxNxHxD.reshape(*y_BxNxHxD.shape[:2], -1))


def full_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention to every key: [B, N, H, D]."""
    return hybrid_attention(q, k, v, None, None, num_softmax=k.shape[1])


class Block(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward; the timestep scales, shifts and gates (adaLN)."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        dim = config.dim
        self.eps, self.cross_attn_norm = config.eps, config.cross_attn_norm
        self.attn1 = Attention(config, dtype=dtype, rngs=rngs)
        self.attn2 = Attention(config, dtype=dtype, rngs=rngs)
        if config.cross_attn_norm:
            self.norm2_scale = nnx.Param(jnp.ones(dim))
            self.norm2_bias = nnx.Param(jnp.zeros(dim))
        self.ffn_in = Linear(dim, config.ffn_dim, dtype=dtype, rngs=rngs)
        self.ffn_out = Linear(config.ffn_dim, dim, dtype=dtype, rngs=rngs)
        self.scale_shift_table = nnx.Param(jax.random.normal(rngs.params(), (6, dim)) / math.sqrt(dim))

    def __call__(
        self,
        x_BxNxD: jax.Array,
        text_BxMxD: jax.Array,
        modulation_Bx6xD: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        self_attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        cross_attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = full_attention,
    ) -> jax.Array:
        x, dtype = x_BxNxD, x_BxNxD.dtype
        modulation = self.scale_shift_table[None] + modulation_Bx6xD.astype(jnp.float32)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=1)

        h = (layer_norm(x, self.eps) * (1 + scale1) + shift1).astype(dtype)
        q, k, v = self.attn1.project(h, h)
        y = self_attention(apply_rope(q, *rope), apply_rope(k, *rope), v)
        x = (x + self.attn1.output(y) * gate1).astype(dtype)

        h = x
        if self.cross_attn_norm:
            h = (layer_norm(x, self.eps) * self.norm2_scale[None, None] + self.norm2_bias[None, None]).astype(dtype)
        q, k, v = self.attn2.project(h, text_BxMxD)
        x = x + self.attn2.output(cross_attention(q, k, v))

        h = (layer_norm(x, self.eps) * (1 + scale2) + shift2).astype(dtype)
        h = self.ffn_out(jax.nn.gelu(self.ffn_in(h), approximate=True))
        return (x + h * gate2).astype(dtype)


class ConditionEmbedder(nnx.Module):
    """Timestep and text, brought to the model's width."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        dim = config.dim
        self.freq_dim = config.freq_dim
        self.time_in = Linear(config.freq_dim, dim, rngs=rngs)
        self.time_out = Linear(dim, dim, rngs=rngs)
        self.time_proj = Linear(dim, 6 * dim, rngs=rngs)
        self.text_in = Linear(config.text_dim, dim, dtype=dtype, rngs=rngs)
        self.text_out = Linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, timesteps_B: jax.Array, text_BxMxE: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Time embedding [B, D], modulation [B, 6, D], text [B, M, D]."""
        time_BxD = self.time_out(jax.nn.silu(self.time_in(timestep_embedding(timesteps_B, self.freq_dim))))
        modulation = self.time_proj(jax.nn.silu(time_BxD)).reshape(time_BxD.shape[0], 6, -1)
        text_BxMxD = self.text_out(jax.nn.gelu(self.text_in(text_BxMxE), approximate=True))
        return time_BxD, modulation, text_BxMxD


class WanTransformer(nnx.Module):
    """velocity = transformer(latents [B, T, H, W, C], timesteps [B] in [0, 1000], text embeddings [B, M, text_dim]).

    Block parameters are stacked [L, ...] and scanned, also when rates differ from block to block: compile time does
    not grow with depth. The feature maps of the converted blocks are stacked in the order of `hybrid.converted`.
    """

    def __init__(self, config: WanConfig, *, dtype: Any = jnp.float32, remat: str = "none", rngs: nnx.Rngs):
        dim, patch = config.dim, math.prod(config.patch_size)
        self.config, self.dtype, self.remat = config, dtype, remat
        self.mesh: Mesh | None = None
        self.exchange = "gather"
        self.patch_embedding = Linear(patch * config.in_channels, dim, dtype=dtype, rngs=rngs)
        self.condition = ConditionEmbedder(config, dtype=dtype, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, dtype=dtype, rngs=rngs)

        self.blocks = stacked_blocks(rngs)
        self.scale_shift_table = nnx.Param(jax.random.normal(rngs.params(), (2, dim)) / math.sqrt(dim))
        self.proj_out = Linear(dim, patch * config.out_channels, dtype=dtype, rngs=rngs)

        hybrid = config.hybrid
        if hybrid and hybrid.converted and hybrid.linear_branch:
            shape = len(hybrid.converted), config.num_attention_heads, config.attention_head_dim
            self.query_maps = FeatureMap(init_feature_maps(rngs.params(), *shape, hybrid.feature_map))
            self.key_maps = FeatureMap(init_feature_maps(rngs.params(), *shape, hybrid.feature_map))

    def __call__(self, latents: jax.Array, timesteps: jax.Array, text_embeddings: jax.Array) -> jax.Array:
        hybrid = self.config.hybrid
        grid, shards = self.config.token_grid(latents.shape[1:4]), self.shards
        order = hybrid.token_order(grid, shards) if hybrid else None
        if hybrid is None or order is None:
            order = token_order(grid, (1,), "strided", shards) if shards > 1 else None
            full = lambda q, k, v, _: (self.attend(q, k, v, None, 1, order), None)
            return self.apply_blocks(latents, timesteps, text_embeddings, full, None, order=order)[0]
        kinds = sorted(set(self.config.rates), key=str)

        def planned(q, k, v, layer):
            kind, maps = layer
            at = lambda rate: lambda q, k, v, maps: self.attend(q, k, v, maps, rate, order, hybrid.stabilizer)
            branches = [at(rate) for rate in kinds]
            return lax.switch(kind, branches, q, k, v, maps), None

        kind_L = jnp.array([kinds.index(rate) for rate in hybrid.rates])
        maps = None
        if hybrid.linear_branch:
            # A softmax block's slot is filled with some map that its branch never reads.
            slot_L = jnp.array([sum(rate != 1 for rate in hybrid.rates[:i]) for i in range(len(hybrid.rates))])
            slot_L = jnp.minimum(slot_L, len(hybrid.converted) - 1)
            maps = jax.tree.map(lambda leaf: leaf[slot_L], (self.query_maps.maps, self.key_maps.maps))
        return self.apply_blocks(latents, timesteps, text_embeddings, planned, (kind_L, maps), order=order)[0]

    def spread(self, mesh: Mesh, exchange: str = "gather") -> None:
        """Moves the parameters onto the mesh, in place, and activations with them from now on."""
        self.compute_on(mesh, exchange)
        place(mesh, self)

    def compute_on(self, mesh: Mesh, exchange: str = "gather") -> None:
        """From now on spreads activations over a mesh.

        `exchange` is how attention meets the keys of other shards of the sequence: "gather" or "all_to_all". Raises
        DoesNotFit where the heads do not divide.
        """
        check_heads(mesh, self.config.num_attention_heads, exchange)
        self.mesh, self.exchange = (mesh if mesh.size > 1 else None), exchange
        for _, module in nnx.iter_modules(self):
            if isinstance(module, Linear):
                module.compute_on(self.mesh)

    @property
    def shards(self) -> int:
        """Pieces of the token sequence, one a device along the mesh's context axis."""
        return 1 if self.mesh is None else self.mesh.shape[LOGICAL["sequence"]]

    def attend(self, q, k, v, maps, rate: Rate, order: TokenOrder | None, stabilizer: str = "lse") -> jax.Array:
        """A block's self-attention at `rate`, on one device or spread over the mesh."""
        num_softmax = k.shape[1] if order is None else order.num_softmax(rate)
        options = {"num_softmax": num_softmax, "stabilizer": stabilizer}
        maps = (None, None) if rate == 1 or maps is None else maps
        if self.mesh is None:
            return attend(q, k, v, *maps, **options)
        if order is not None and order.valid is not None:
            options["key_valid"] = jnp.asarray(order.valid)
        spread = self._sharding(len(q), "sequence", "heads")
        return sharded_self_attention(q, k, v, *maps, **options, sharding=spread, exchange=self.exchange)

    def apply_blocks(
        self,
        latents_BxTxHxWxC: jax.Array,
        timesteps_B: jax.Array,
        text_BxMxE: jax.Array,
        self_attention: Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
        layers: Any,
        *,
        order: TokenOrder | None,
        until: int | None = None,
    ) -> tuple[jax.Array, Any]:
        """The whole network around a given self-attention.

        `self_attention(q, k, v, layer) -> (y, record)` is traced once and scanned: `layer` is this block's slice of the
        [L, ...] leaves of `layers`, and the records come back stacked [L, ...]. `order` is how tokens lie. Blocks from
        number `until` on are passed over, with zeros for records.
        Returns (velocity [B, T, H, W, C], records).
        """
        config = self.config
        grid = config.token_grid(latents_BxTxHxWxC.shape[1:4])
        cos, sin = rope_tables(grid, config.attention_head_dim, config.rope_max_seq_len)
        x = self.patchify(latents_BxTxHxWxC.astype(self.dtype))
        if order is not None:
            x, cos, sin = x[:, order.permutation], cos[order.permutation], sin[order.permutation]
        x = self.patch_embedding(self._constrained(x))
        rope = jnp.asarray(cos), jnp.asarray(sin)
        time, modulation, text = self.condition(timesteps_B, text_BxMxE.astype(self.dtype))

        graph, stacked = nnx.split(self.blocks)
        to_text = full_attention
        if self.mesh is not None:
            to_text = functools.partial(sharded_cross_attention, sharding=self._sharding(len(x), "sequence", "heads"))

        def block(x, layer):
            state, layer = layer
            records = []

            def recorded(q, k, v):
                y, record = self_attention(q, k, v, layer)
                records.append(record)
                return y

            x = nnx.merge(graph, state)(x, text, modulation, rope, recorded, to_text)
            return self._constrained(x), records[0]

        def block_or_none(x, layer):
            number, layer = layer
            zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
            none = lambda x, layer: (x, jax.tree.map(zeros, jax.eval_shape(block, x, layer)[1]))
            return lax.cond(number < until, block, none, x, layer)

        body, layers = block, (stacked, layers)
        if until is not None:
            body, layers = block_or_none, (jnp.arange(config.num_layers), layers)
        x, records = lax.scan(REMAT[self.remat](body), x, layers)

        shift, scale = jnp.split(self.scale_shift_table[None] + time[:, None].astype(jnp.float32), 2, axis=1)
        x = self.proj_out((layer_norm(x, config.eps) * (1 + scale) + shift).astype(self.dtype))
        if order is not None:
            x = x[:, order.inverse]
        return self.unpatchify(x, grid), records

    def _constrained(self, x_BxNxD: jax.Array) -> jax.Array:
        """Tokens, kept where the mesh has their batch and their piece of the sequence."""
        if self.mesh is None:
            return x_BxNxD
        return lax.with_sharding_constraint(x_BxNxD, self._sharding(len(x_BxNxD), "sequence", None))

    def _sharding(self, batch: int, *dimensions: str | None) -> NamedSharding:
        """Of an array of `batch` examples; a batch that the mesh does not divide is whole everywhere."""
        assert self.mesh is not None
        divides = batch % batch_pieces(self.mesh) == 0
        return sharding(self.mesh, "batch" if divides else None, *dimensions)

    def patchify(self, latents_BxTxHxWxC: jax.Array) -> jax.Array:
        """[B, T, H, W, C] -> [B, N, pt * ph * pw * C], tokens row-major."""
        (pt, ph, pw), (b, t, h, w, c) = self.config.patch_size, latents_BxTxHxWxC.shape
        x = latents_BxTxHxWxC.reshape(b, t // pt, pt, h // ph, ph, w // pw, pw, c)
        return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, pt * ph * pw * c)

    def unpatchify(self, x_BxNxP: jax.Array, grid: tuple[int, int, int]) -> jax.Array:
        (pt, ph, pw), (t, h, w) = self.config.patch_size, grid
        x = x_BxNxP.reshape(-1, t, h, w, pt, ph, pw, self.config.out_channels)
        return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, t * pt, h * ph, w * pw, self.config.out_channels)


def read_config(path: epath.PathLike) -> WanConfig:
    """The config of a transformer's folder or file, of any layout.

    A config.json in the folder, or beside the file, is diffusers', ours or the original repository's; without one, the
    tensors' shapes tell all but the number of heads, which is that of the published models: of 128 channels each.
    Raises InputError when it is another architecture's or cannot be told.
    """
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected a transformer")
    file = (path if path.is_dir() else path.parent) / "config.json"
    fields = read_object(file) if file.exists() else {}
    kind = fields.get("_class_name")
    if kind in (CLASS_NAME, HYBRID_CLASS_NAME):
        return WanConfig.from_json(fields, source=str(file))

    tensors = open_tensors(path)
    layout = weights.transformer_layout(tensors, path)
    if path.is_dir() and kind not in (None, ORIGINAL_CLASS_NAME):
        expected = f"{CLASS_NAME}, {HYBRID_CLASS_NAME} or {ORIGINAL_CLASS_NAME}"
        raise InputError(f"{file}: expected _class_name {expected}, found {kind!r}")
    if any(".phi_q." in name for name in tensors):
        raise InputError(f"{path}: a hybrid transformer without its config.json; expected {file}")
    sizes = weights.transformer_sizes(tensors, layout, path)
    if kind != ORIGINAL_CLASS_NAME and not path.is_dir():
        fields = {}  # of something else that lies beside the file
    heads = _check_original(fields, sizes, file)
    sizes["eps"] = fields.get("eps", WanConfig.eps)
    dim = sizes.pop("dim")
    if heads is None and dim % 128:
        raise InputError(f"{path}: a width of {dim} is not heads of 128 channels; expected the heads in {file}")
    heads = heads or dim // 128
    return WanConfig(num_attention_heads=heads, attention_head_dim=dim // heads, **sizes)


def _check_original(fields: dict[str, Any], sizes: dict[str, Any], file: epath.Path) -> int | None:
    """The number of heads in the original repository's config.json, if it says and agrees with the tensors."""
    told = {original: sizes[name] for name, original in ORIGINAL_SIZES.items()} | {"model_type": "t2v"}
    for name, expected in told.items():
        if (found := fields.get(name, expected)) != expected:
            raise InputError(f"{file}: {name}: expected {expected!r}, as its tensors are, found {found!r}")
    heads = fields.get("num_heads")
    if heads is not None and (not isinstance(heads, int) or heads < 1 or sizes["dim"] % heads):
        raise InputError(f"{file}: num_heads: expected a divisor of {sizes['dim']}, found {heads!r}")
    return heads


def load_transformer(path: epath.PathLike, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> WanTransformer:
    """A transformer from a folder or .safetensors file: diffusers', the original repository's, ComfyUI's or ours.

    Parameters are float32; `dtype` is that of matmuls. Tensors are memory-mapped and put one by one where they belong
    on the mesh. Raises InputError naming the file that is missing, damaged or does not fit.
    """
    check_hashes(path)
    config = read_config(path)
    tensors = open_tensors(path)
    model = abstract_module(WanTransformer, config, dtype=jnp.dtype(dtype))
    if mesh is not None:
        state = nnx.state(model)
        placed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        nnx.update(model, jax.tree.map(placed, state, parameter_shardings(mesh, state)))
    weights.load_transformer_tensors(model, tensors, weights.transformer_layout(tensors, path), source=path)
    return model


def save_transformer(
    transformer: WanTransformer,
    path: epath.PathLike,
    layout: str = "diffusers",
    shard_bytes: int = SHARD_BYTES,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes what `load_transformer` reads, in shards above `shard_bytes`; `more` also goes into config.json.

    "diffusers" is a folder that diffusers reads too, unless the transformer is a hybrid; "original" a folder as the
    original repository's, "comfyui" one file. Raises InputError for a hybrid in any but the first.
    """
    tensors = weights.lazy_transformer_tensors(transformer, layout)
    write_transformer(tensors, transformer.config, path, layout, shard_bytes, more)


def write_transformer(
    tensors: Tensors,
    config: WanConfig,
    path: epath.PathLike,
    layout: str,
    shard_bytes: int = SHARD_BYTES,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes tensors that are named in `layout`.

    diffusers looks for its own file name whatever class config.json names, and drops the tensors that it does not know:
    a hybrid's file has another name, which is no variant of that one either.
    """
    path = epath.Path(path)
    if layout == "comfyui":
        if config.attention_head_dim != 128:
            raise InputError(f"{path}: ComfyUI's layout takes heads of 128 channels, found {config.attention_head_dim}")
        write_tensors(path, tensors)
        return
    stem = "hybrid_wan" if config.hybrid else "diffusion_pytorch_model"
    hashes = write_shards(path, stem, tensors, shard_bytes)
    fields = config.to_json()
    if layout == "original":
        fields = {"_class_name": ORIGINAL_CLASS_NAME, "model_type": "t2v", "text_len": 512, "eps": config.eps}
        fields |= {original: getattr(config, name) for name, original in ORIGINAL_SIZES.items()}
        fields["num_heads"] = config.num_attention_heads
    write_json(path / "config.json", {**(more or {}), **fields})
    write_hashes(path, hashes, "config.json")
