"""The process that measures: a row at a time, and whatever goes wrong in one is that row's reason to be missing."""

import contextlib
import gc
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import types
from multiprocessing.connection import Connection
from typing import Any

from jsurgery.bench.gpu_evidence.rows import ATTENTION, DISTILLATION, FORWARD, FULL, KERNELS, TOY, Row, Scale

PACKAGES = ("jax", "jaxlib", "flax", "optax", "ml-collections", "numpy", "torch")


def work(connection: Connection, toy: bool) -> None:
    """Sends what machine this is, then what it finds of every row that it is sent, until there are no more."""
    try:
        import jax

        on_gpu = jax.default_backend() == "gpu" and not toy
        let_pathlib_stand_for_etils()
        header = {"on_gpu": on_gpu, "machine": machine(jax.devices()[0]), "versions": versions()}
    except Exception as error:
        connection.send({"failed": f"JAX does not start: {reason(error)}"})
        return
    connection.send(header)
    with contextlib.suppress(EOFError):  # there are no more
        while True:
            connection.send(guarded(connection.recv(), FULL if on_gpu else TOY, on_gpu))


def let_pathlib_stand_for_etils() -> None:
    """Where etils is not installed. Modules of models import it for paths of their files, of which none is read here.

    After `import jax`, which asks for etils as well and does without.
    """
    try:
        from etils import epath  # noqa: F401
    except ImportError:
        stand_in, paths = types.ModuleType("etils"), types.ModuleType("etils.epath")
        vars(paths).update(Path=pathlib.Path, PathLike=str | os.PathLike[str])
        vars(stand_in).update(epath=paths)
        sys.modules |= {"etils": stand_in, "etils.epath": paths}


def guarded(row: Row, scale: Scale, on_gpu: bool) -> dict[str, Any]:
    """What was found, or {"missing": the reason, "lost": whether nothing runs in this process any more}."""
    try:
        return measure(row, scale, on_gpu)
    except NotImplementedError as error:  # refused before anything ran
        return {"missing": reason(error)}
    except Exception as error:
        found = {"missing": reason(error)}
    gc.collect()
    give_memory_back()
    return found | {"lost": not alive()}


def measure(row: Row, scale: Scale, on_gpu: bool) -> dict[str, Any]:
    if row.group == KERNELS:
        from jsurgery.bench.gpu_evidence.kernel_tests import kernel_test

        return kernel_test(row, scale, on_gpu)
    from jsurgery.bench.gpu_evidence import measuring

    kinds = {ATTENTION: measuring.attention, FORWARD: measuring.whole_forward, DISTILLATION: measuring.distillation}
    found = kinds[row.group](row, scale)
    give_memory_back()
    return found


def give_memory_back() -> None:
    """What torch keeps for itself on the GPU is JAX's to use again."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def alive() -> bool:
    """Whether the device still computes: an illegal access of one kernel ends it for all that come after."""
    try:
        import jax.numpy as jnp

        return float(jnp.ones(()) + 1) == 2
    except Exception:
        return False


def reason(error: BaseException) -> str:
    """One line, and not a long one: compilers' messages go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "" if isinstance(error, NotImplementedError) else f"{type(error).__name__}: "
    text = kind + (lines[0] if lines else "no message")
    return text if len(text) <= 300 else text[:300] + "…"


def machine(device: Any) -> dict[str, str]:
    found = {"name": platform.node(), "device": str(device.device_kind), "system": platform.platform()}
    if device.platform == "gpu":
        found["CUDA"] = str(device.client.platform_version).replace("\n", " ")
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
            found["driver"] = lines[0].strip()
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            found["driver"] = f"unknown: {reason(error)}"
    return found


def versions() -> dict[str, str]:
    """Of what may matter; torch is not imported for it, which would load its own CUDA libraries first."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
