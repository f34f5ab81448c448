"""What a run computes on, in words."""

import jax

from jsurgery.io.results import processor, xla_threads


def describe_machine() -> str:
    """The devices of all processes: "8 × TPU v5 lite"; without an accelerator the CPU and the threads of a process."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        threads = xla_threads()
        return f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{jax.device_count()} × {device.device_kind}"
