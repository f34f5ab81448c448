"""gpu-evidence: what the kernels and models of this project do on one GPU, measured in a few minutes.

`make gpu-evidence` runs it on a bare checkout beside jax, flax, optax, ml-collections, torch and numpy alone. One
process plans and writes (`__main__`, `rows`, `report`); another measures (`worker`), so that a crash costs one row.
"""
