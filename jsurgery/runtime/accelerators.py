"""Which accelerators this machine has, told by device files before JAX starts."""

import glob
import os
import sys

# Device files of TPUs (by their own driver, or by VFIO), and of GPUs by NVIDIA, in WSL, and by AMD.
ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd")


def leave_absent_accelerators_alone() -> None:
    """Tells JAX to compute on the CPU where Linux has no device file of an accelerator, unless JAX_PLATFORMS is set.

    Otherwise JAX tries the TPU wherever libtpu is installed, which compiles for TPUs that are elsewhere, and libtpu
    complains at length about the missing chips.
    """
    if sys.platform != "linux" or "JAX_PLATFORMS" in os.environ:
        return
    if not any(glob.glob(pattern) for pattern in ACCELERATORS):
        os.environ["JAX_PLATFORMS"] = "cpu"
