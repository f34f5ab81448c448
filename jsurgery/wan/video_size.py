"""The size of a video in pixels, in latents and in tokens."""

from jsurgery.errors import InputError
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.rope import check_grid


def num_tokens(
    frames: int,
    height: int,
    width: int,
    patch_size: tuple[int, int, int] = (1, 2, 2),
    vae_strides: tuple[int, int, int] = (4, 8, 8),
) -> int:
    """Tokens of a video of `frames` x `height` x `width` pixels; the first frame is a latent frame of its own.

    Raises:
      InputError: a size that the strides do not divide.
    """
    tokens = 1
    for name, size, first, patch, stride in zip(
        ("frames", "height", "width"), (frames, height, width), (1, 0, 0), patch_size, vae_strides, strict=True
    ):
        latent, rest = divmod(size - first, stride)
        latent += first
        if size < 1 or rest or latent % patch:
            form = f"{stride}k + 1" if first else f"a multiple of {stride * patch}"
            raise InputError(f"{name}: expected {form}, found {size}")
        tokens *= latent // patch
    return tokens


VAE_STRIDES = (4, 8, 8)


def check_size(config: WanConfig, frames: int, height: int, width: int) -> None:
    """Raises InputError for a video that patches do not divide or that is longer than RoPE's table on an axis."""
    grid = config.token_grid(latent_grid(frames, height, width))
    check_grid(grid, config.rope_max_seq_len)


def latent_grid(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(T, H, W) of a video's latents."""
    t, h, w = VAE_STRIDES
    return (frames - 1) // t + 1, height // h, width // w
