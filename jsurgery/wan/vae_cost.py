"""Parameters, FLOPs and bytes of Wan's VAEs, summed up layer by layer. Shortcuts and patches have no products."""

import math

from jsurgery.wan.cost import Cost, attention_cost
from jsurgery.wan.model_config import VaeConfig


def vae_cost(config: VaeConfig, frames: int, height: int, width: int, bytes_per_value: int = 4) -> tuple[Cost, Cost]:
    """The cost of encoding and of decoding one video. Products with the padding of convolutions are counted too."""
    encoder, decoder = _walks(config, frames, height, width, bytes_per_value)
    return encoder.cost, decoder.cost


def kept_bytes(config: VaeConfig, height: int, width: int, bytes_per_value: int = 4) -> tuple[int, int]:
    """What the causal convolutions keep between two chunks of one clip, in encoding and in decoding."""
    encoder, decoder = _walks(config, 5, height, width, bytes_per_value)
    return encoder.kept, decoder.kept


def _walks(config: VaeConfig, frames: int, height: int, width: int, size: int) -> tuple["_VaeWalk", "_VaeWalk"]:
    patch = config.patch_size or 1
    encoder = _VaeWalk(frames, height // patch, width // patch, size)
    dim = config.base_dim
    encoder.conv(config.pixel_channels, dim, (3, 3, 3))
    for level, multiplier in enumerate(config.dim_mult):
        for _ in range(config.num_res_blocks):
            encoder.residual(dim, config.base_dim * multiplier)
            dim = config.base_dim * multiplier
        if level < len(config.temperal_downsample):
            encoder.downsample(dim, config.temperal_downsample[level])
    encoder.middle(dim)
    encoder.norm(dim)
    encoder.conv(dim, 2 * config.z_dim, (3, 3, 3))
    encoder.conv(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))

    decoder = _VaeWalk(encoder.frames, encoder.height, encoder.width, size)
    widths = [(config.decoder_base_dim or config.base_dim) * multiplier for multiplier in reversed(config.dim_mult)]
    decoder.conv(config.z_dim, config.z_dim, (1, 1, 1))
    decoder.conv(config.z_dim, widths[0], (3, 3, 3))
    decoder.middle(widths[0])
    dim = widths[0]
    for outputs, temporal in zip(widths, (*reversed(config.temperal_downsample), None), strict=True):
        for inputs in (dim, *[outputs] * config.num_res_blocks):
            decoder.residual(inputs, outputs)
        dim = outputs if config.is_residual else outputs // 2
        if temporal is not None:
            decoder.upsample(outputs, dim, temporal)
    decoder.norm(widths[-1])
    decoder.conv(widths[-1], config.pixel_channels, (3, 3, 3))
    return encoder, decoder


class _VaeWalk:
    """Adds up the cost of layers, one after the other, and keeps the size that the video has between them."""

    def __init__(self, frames: int, height: int, width: int, bytes_per_value: int):
        self.frames, self.height, self.width, self.bytes_per_value = frames, height, width, bytes_per_value
        self.cost, self.kept = Cost(), 0

    def conv(
        self, inputs: int, outputs: int, kernel: tuple[int, int, int], frames: int | None = None, stride: int = 1
    ) -> None:
        """A convolution whose result has `frames` frames, by default as many as its input, and the input's sides.

        Over time, it keeps as many frames as the kernel is longer than the `stride`.
        """
        if kernel[0] > 1:
            self.kept += self.bytes_per_value * (kernel[0] - stride) * self.height * self.width * inputs
        pixels, taps = (self.frames if frames is None else frames) * self.height * self.width, math.prod(kernel)
        parameters = taps * inputs * outputs + outputs
        moved = self.bytes_per_value * (parameters + pixels * (inputs + outputs))
        self.cost += Cost(parameters, 2 * pixels * taps * inputs * outputs, moved)

    def norm(self, dim: int) -> None:
        self.cost += Cost(dim)

    def residual(self, inputs: int, outputs: int) -> None:
        self.norm(inputs)
        self.conv(inputs, outputs, (3, 3, 3))
        self.norm(outputs)
        self.conv(outputs, outputs, (3, 3, 3))
        if inputs != outputs:
            self.conv(inputs, outputs, (1, 1, 1))

    def middle(self, dim: int) -> None:
        self.residual(dim, dim)
        self.norm(dim)
        self.conv(dim, 3 * dim, (1, 1, 1))
        self.cost += attention_cost(self.frames, self.height * self.width, dim, self.bytes_per_value)
        self.conv(dim, dim, (1, 1, 1))
        self.residual(dim, dim)

    def downsample(self, dim: int, temporal: bool) -> None:
        self.height, self.width = self.height // 2, self.width // 2
        self.conv(dim, dim, (1, 3, 3))
        if temporal:  # the convolution skips a clip's first frame
            self.frames = (self.frames - 1) // 2 + 1
            self.conv(dim, dim, (3, 1, 1), self.frames - 1, stride=2)

    def upsample(self, dim: int, outputs: int, temporal: bool) -> None:
        if temporal:
            self.conv(dim, 2 * dim, (3, 1, 1), self.frames - 1)
            self.frames = 2 * self.frames - 1
        self.height, self.width = 2 * self.height, 2 * self.width
        self.conv(dim, outputs, (1, 3, 3))
