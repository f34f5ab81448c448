"""The token order of the mobile form: a prefix order made of strided slices. A permutation would need a gather."""

import dataclasses
import math
from functools import cached_property

import numpy as np

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.errors import InputError
from jsurgery.rates import Rate
from jsurgery.wan.model_config import WanConfig


@dataclasses.dataclass(frozen=True)
class PrefixSlices:
    """Strided slices of the natural token order which, concatenated, give the tokens in a prefix order.

    The zones are those of `TokenOrder`. Within a zone tokens are sorted by residue, where `TokenOrder` has them in
    another order; attention does not depend on it. On the staggered lattices, which shift by one position a frame or a
    row, each of these is a segment of its own.
    """

    segments: tuple[tuple[int, int, int], ...]  # (first token, tokens, lattice position of the first)
    chain: tuple[int, ...]

    @classmethod
    def of(cls, hybrid: HybridConfig | None, grid: tuple[int, int, int]) -> "PrefixSlices":
        """The slices for a (time, height, width) token grid; one slice of all tokens if no block is converted."""
        frames, height, width = grid
        size = height * width
        if hybrid is None or not hybrid.converted:
            return cls(((0, frames * size, 0),), (1,))
        chain = tuple(sorted(rate for rate in hybrid.chain if isinstance(rate, int)))
        if hybrid.lattice == "strided":
            return cls(((0, frames * size, 0),), chain)
        segment = width if hybrid.lattice == "staggered_rows" else size
        return cls(tuple((i * segment, segment, i * (segment + 1)) for i in range(frames * size // segment)), chain)

    @property
    def period(self) -> int:
        return max(self.chain)

    @cached_property
    def pieces(self) -> list[tuple[int, int, slice]]:
        """(segment, residue within the segment, slice of the natural order) of each piece that has tokens."""
        zone = lambda residue: sum(residue % rate != 0 for rate in self.chain)
        pieces = []
        for residue in sorted(range(self.period), key=zone):
            for number, (start, size, position) in enumerate(self.segments):
                local = (residue - position) % self.period
                if local < size:
                    pieces.append((number, local, slice(start + local, start + size, self.period)))
        return pieces

    @cached_property
    def permutation(self) -> np.ndarray:
        """int [N]: natural index of the i-th token in prefix order."""
        natural = np.arange(sum(size for _, size, _ in self.segments))
        return np.concatenate([natural[piece] for _, _, piece in self.pieces])

    @cached_property
    def places(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(segment, residue within the segment) -> (first, end) of that piece in prefix order."""
        ends = np.cumsum([len(range(piece.start, piece.stop, piece.step)) for _, _, piece in self.pieces]).tolist()
        starts = [0, *ends]
        return {key[:2]: place for key, place in zip(self.pieces, zip(starts, ends, strict=False), strict=True)}


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """The token order of a model for latents of one size (T, H, W)."""

    grid: tuple[int, int, int]
    order: PrefixSlices
    softmax: dict[Rate, int]  # rate -> number of softmax tokens

    @classmethod
    def of(cls, config: WanConfig, latent_shape: tuple[int, int, int]) -> "TokenLayout":
        """Raises InputError for patches of more than one frame."""
        if config.patch_size[0] != 1:
            raise InputError(f"patch_size: the mobile form takes patches of one frame, found {config.patch_size}")
        grid = config.token_grid(latent_shape)
        order = config.hybrid.token_order(grid) if config.hybrid else None
        softmax = {rate: math.prod(grid) if order is None else order.num_softmax(rate) for rate in config.rates}
        return cls(grid, PrefixSlices.of(config.hybrid, grid), softmax)

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)
