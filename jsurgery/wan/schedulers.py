"""A diffusers scheduler's config as settings of our solvers, and what of it they do not follow."""

from typing import Any

from etils import epath

from jsurgery.errors import shortened
from jsurgery.io.files import read_object
from jsurgery.runtime.progress import say

FILE = "scheduler/scheduler_config.json"
SHIFTS = ("flow_shift", "shift")  # the field of the shift in schedulers that also know other models, and in the others
# A scheduler's class -> our solver. Of these our steps are the same, the others are replaced.
SAME = {"UniPCMultistepScheduler": "unipc", "FlowMatchEulerDiscreteScheduler": "euler", "FlowMatchLCMScheduler": "lcm"}
SIMILAR = {
    "DPMSolverMultistepScheduler": "unipc",
    "DPMSolverSinglestepScheduler": "unipc",
    "DEISMultistepScheduler": "unipc",
    "SASolverScheduler": "unipc",
    "FlowUniPCMultistepScheduler": "unipc",
    "FlowDPMSolverMultistepScheduler": "unipc",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "euler",
}
# Fields that change the steps, with the only values that our solvers follow. null means the same.
FOLLOWED: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("flow_prediction",),
    "use_flow_sigmas": (True,),
    "num_train_timesteps": (1000,),
    "solver_order": (2,),
    "solver_type": ("bh2",),
    "predict_x0": (True,),
    "lower_order_final": (True,),
    "disable_corrector": ([],),
    "solver_p": (),
    "final_sigmas_type": ("zero",),
    "thresholding": (False,),
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (),
    "invert_sigmas": (False,),
    "stochastic_sampling": (False,),
    "sigma_min": (),
    "sigma_max": (),
    "scale_factors": (),
}


def scheduler_settings(folder: epath.Path) -> tuple[dict[str, str], list[str]]:
    """Overrides of a config from scheduler/scheduler_config.json of a pipeline folder, and what they do not follow.

    A remark is a text such as "solver_order 3". Without that file, both are empty.
    """
    file = folder / FILE
    if not file.exists():
        return {}, []
    fields = read_object(file, "the config of a diffusers scheduler as JSON")
    class_name = str(fields.get("_class_name"))
    settings: dict[str, str] = {}
    remarks = [] if class_name in SAME else [shortened(class_name)]
    if solver := (SAME | SIMILAR).get(class_name):
        settings["sampler.solver"] = solver
        default = 1.0 if class_name in SAME else None
        given = next((fields[name] for name in SHIFTS if name in fields), default)
        if isinstance(given, int | float) and 0 < given < 1e30 and not isinstance(given, bool):
            settings["sampler.shift"] = str(given)
        elif given is not None or class_name in SAME:
            remarks.append(f"shift {shortened(given)}")
    for name, followed in FOLLOWED.items():
        if fields.get(name) is not None and fields[name] not in followed:
            remarks.append(f"{name} {shortened(fields[name])}")
    return settings, remarks


def say_replaced(folder: epath.Path, remarks: list[str], solver: str, shift: float) -> None:
    """Says, in one line, what of a pipeline's scheduler the chosen solver replaces; nothing without `remarks`."""
    if remarks:
        replaced = f"{folder / FILE}: {', '.join(remarks)}: replaced by"
        say(f"{replaced} solver {solver} with shift {shift:g} (--solver and --shift set others)")
