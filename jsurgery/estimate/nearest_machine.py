"""The smallest known machines on which a stage fits, for messages where it does not."""

from collections.abc import Callable

from ml_collections import ConfigDict

from jsurgery.errors import DoesNotFit
from jsurgery.estimate.chips import GPUS, MACHINES, parse_topology
from jsurgery.surgery.phases import on_mesh
from jsurgery.wan.model_sizes import ModelSizes

PODS = ("v5e:4x4", "v5e:8x8", "v6e:4x4", "v6e:8x8", "v5p:2x2x2", "v5p:4x4x4", "v5p:4x4x8", "v5p:8x8x8")


def placed_or_nearest(stage: str, config: ConfigDict, sizes: ModelSizes, place: Callable[[], ConfigDict]) -> ConfigDict:
    """What `place` returns. Where it raises DoesNotFit, the message also names the smallest machines that would do."""
    try:
        return place()
    except DoesNotFit as error:
        found = nearest_machines(stage, config, sizes)
        enough = f"{' and '.join(found)} would do" if found else f"nothing known would do, up to {PODS[-1]}"
        raise DoesNotFit(f"{error}; {enough}") from None


def nearest_machines(stage: str, config: ConfigDict, sizes: ModelSizes) -> list[str]:
    """The TPUs and the GPUs with least memory on which a stage fits, by arithmetic; without those that have none."""
    known = {name: parse_topology(name) for name in (*MACHINES, *PODS)}
    is_gpu = lambda name: (MACHINES.get(name) or name).partition(":")[0] in GPUS
    found: dict[bool, str] = {}
    for name, (chip, count) in sorted(known.items(), key=lambda item: item[1][1] * item[1][0].memory):
        if is_gpu(name) in found:
            continue
        try:
            on_mesh(stage, config, sizes, count, chip.memory, tell=lambda line: None)
        except DoesNotFit:
            continue
        found[is_gpu(name)] = name
    return [found[kind] for kind in sorted(found)]
