"""What the papers print about their families; none of it is of a tiny model."""

PAPERS = {
    "Attention Surgery, 15R2 (2509.24899)": ("Wan2.1 1.3B", "VBench 83.21 (teacher 83.10)"),
    "ReHyAt, 15 blocks, Tc 3 To 1 (2601.04342)": ("Wan2.1 1.3B", "VBench 83.79"),
    "ReHyAt, Tc 1 / 2 / 3 / 5": ("Wan2.1 1.3B", "VBench 80.97 / 82.08 / 82.17 / 82.48"),
    "ReHyAt, To 0 / 1": ("Wan2.1 1.3B", "VBench 81.56 / 82.17"),
    "ReHyAt, causal / not causal": ("Wan2.1 1.3B", "VBench 82.35 / 82.27"),
    "SLA, 95 % of the blocks left out": ("Wan2.1 1.3B", "the kernel 13.7 times as fast, the whole 2.2 times"),
    "LinVideo, learned selection (2510.08318)": ("Wan 1.3B / 14B", "1.43 / 1.71 times as fast"),
}
