"""gpu-evidence: tests and measures this project's kernels and models on one GPU, in a few minutes.

`make gpu-evidence` runs it on a bare checkout and needs only jax, flax, optax, ml-collections, torch and numpy. One
process plans and writes (`__main__`, `rows`, `report`), another measures (`worker`): a crash then costs only one row.
"""
