"""The process that measures one row at a time. An error in a row becomes the reason why that row is missing."""

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

from jsurgery.bench.gpu_evidence.rows import (
    ATTENTION,
    DISTILLATION,
    FORWARD,
    FULL,
    KERNELS,
    PARTS,
    TOY,
    Row,
    Scale,
)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "ml-collections", "numpy", "torch")


def work(connection: Connection, toy: bool) -> None:
    """Sends a header that describes the machine, then receives rows and sends their results until the pipe closes."""
    try:
        import jax

        on_gpu = jax.default_backend() == "gpu" and not toy
        let_pathlib_stand_for_etils()
        header = {"on_gpu": on_gpu, "machine": machine(jax.devices()[0]), "versions": versions()}
    except Exception as error:
        connection.send({"failed": f"JAX does not start: {reason(error)}"})
        return
    connection.send(header)
    with contextlib.suppress(EOFError):  # no more rows
        while True:
            connection.send(guarded(connection.recv(), FULL if on_gpu else TOY, on_gpu))


def let_pathlib_stand_for_etils() -> None:
    """Where etils is not installed: the models' modules import it for paths of files, none of which is read here.

    Must come after `import jax`, which uses etils where it finds it.
    """
    try:
        from etils import epath  # noqa: F401
    except ImportError:
        stand_in, paths = types.ModuleType("etils"), types.ModuleType("etils.epath")
        vars(paths).update(Path=pathlib.Path, PathLike=str | os.PathLike[str])
        vars(stand_in).update(epath=paths)
        sys.modules |= {"etils": stand_in, "etils.epath": paths}


def guarded(row: Row, scale: Scale, on_gpu: bool) -> dict[str, Any]:
    """The result of a row, or {"missing": the reason, "lost": whether the device no longer computes}."""
    try:
        return measure(row, scale, on_gpu)
    except NotImplementedError as error:  # refused before anything ran
        return {"missing": reason(error)}
    except Exception as error:
        failure = {"missing": reason(error)}
    gc.collect()
    give_memory_back()
    return failure | {"lost": not alive()}


def measure(row: Row, scale: Scale, on_gpu: bool) -> dict[str, Any]:
    if row.group == KERNELS:
        from jsurgery.bench.gpu_evidence.kernel_tests import kernel_test

        return kernel_test(row, scale, on_gpu)
    from jsurgery.bench.gpu_evidence import measuring, parts

    kinds = {
        ATTENTION: measuring.attention,
        PARTS: parts.part,
        FORWARD: measuring.whole_forward,
        DISTILLATION: measuring.distillation,
    }
    result = kinds[row.group](row, scale)
    give_memory_back()
    return result


def give_memory_back() -> None:
    """Frees the GPU memory that torch has cached, for JAX."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def alive() -> bool:
    """Whether the device still computes: after a kernel's illegal memory access nothing runs in this process."""
    try:
        import jax.numpy as jnp

        return float(jnp.ones(()) + 1) == 2
    except Exception:
        return False


def reason(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters: compilers' messages are pages long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "" if isinstance(error, NotImplementedError) else f"{type(error).__name__}: "
    text = kind + (lines[0] if lines else "no message")
    return text if len(text) <= 300 else text[:300] + "…"


def machine(device: Any) -> dict[str, str]:
    facts = {"name": platform.node(), "device": str(device.device_kind), "system": platform.platform()}
    if device.platform == "gpu":
        facts["CUDA"] = str(device.client.platform_version).replace("\n", " ")
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
            facts["driver"] = lines[0].strip()
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            facts["driver"] = f"unknown: {reason(error)}"
    return facts


def versions() -> dict[str, str]:
    """Versions of `PACKAGES`, from their metadata: importing torch here would load its own CUDA libraries first."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed
