"""Chunked hybrids: a chunk of frames attends to itself by softmax and to the others through a linear state.

ReHyAt (arXiv 2601.04342): with chunks of Tc latent frames and an overlap of To, the queries of chunk t give softmax
weights to the frames [t Tc - To, (t + 1) Tc). All earlier frames are linear keys; where the kind is not causal, so are
all later ones. From chunk to chunk only the frames that leave the softmax window enter the state.
"""

import dataclasses
import re
from typing import ClassVar, Self

import jax

from jsurgery.attention.feature_maps import FeatureMapPair
from jsurgery.attention.kinds.base import TokenPlace
from jsurgery.attention.kinds.query_blocks import QueryBlockKind
from jsurgery.rates import Rate
from pallas_kernels import QueryBlock
from pallas_kernels.chunked import chunked_attention

SPELLING = re.compile(r"([CB])([1-9]\d{0,5})O(0|[1-9]\d{0,5})", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Chunked(QueryBlockKind):
    """ "C3O1": causal chunks of 3 latent frames that also see the frame before. "B3O1": bidirectional, not causal.

    The first chunk of a causal block sees no other frame. The last chunk may be shorter.
    """

    chunk: int  # Tc, in latent frames
    overlap: int  # To
    causal: bool = True

    family: ClassVar[str] = "chunked hybrid"
    spelling: ClassVar[str] = "names like 'C3O1' and 'B3O1'"

    @classmethod
    def parse(cls, rate: Rate) -> Self | None:
        match = SPELLING.fullmatch(str(rate))
        return cls(int(match[2]), int(match[3]), match[1] == "C") if match else None

    @property
    def rate(self) -> Rate:
        return f"{'C' if self.causal else 'B'}{self.chunk}O{self.overlap}"

    @property
    def description(self) -> str:
        frames = "1 frame" if self.chunk == 1 else f"{self.chunk} frames"
        overlap = f" and the {self.overlap} before" if self.overlap else ""
        rest = "earlier frames" if self.causal else "all other frames"
        return f"softmax within chunks of {frames}{overlap}, {rest} linear"

    def blocks(self, frames: int, tokens_per_frame: int) -> list[QueryBlock]:
        found = []
        for first in range(0, frames, self.chunk):
            start, end = max(first - self.overlap, 0), min(first + self.chunk, frames)
            others = ((0, start),) if self.causal else ((0, start), (end, frames))
            ranges = [(first, end), (start, end), *((a, b) for a, b in others if a < b)]
            queries, softmax, *linear = [(a * tokens_per_frame, b * tokens_per_frame) for a, b in ranges]
            found.append(QueryBlock(queries, softmax, tuple(linear)))
        return found

    def attend_in_raster_order(
        self, q: jax.Array, k: jax.Array, v: jax.Array, maps: FeatureMapPair | None, place: TokenPlace
    ) -> jax.Array:
        if maps is None:
            return super().attend_in_raster_order(q, k, v, maps, place)
        _, height, width = place.grid
        chunk, overlap = (length * height * width for length in (self.chunk, self.overlap))
        options = {"chunk": chunk, "overlap": overlap, "causal": self.causal, "stabilizer": place.stabilizer}
        return chunked_attention(q, k, v, *maps, **options)
