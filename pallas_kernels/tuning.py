"""The best block sizes per chip and problem, measured or estimated, kept as tuned.json in the user's cache folder."""

import json
import math
import os
import pathlib
from collections.abc import Mapping

import jax

PATH = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pallas_kernels" / "tuned.json"
# jax's name of a chip (`Device.device_kind`) -> its name in tuned.json.
DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def current_chip() -> str:
    """The default device's name in tuned.json; jax's name for it if `DEVICE_KINDS` has none."""
    kind = str(jax.devices()[0].device_kind)
    return DEVICE_KINDS.get(kind, kind)


def load(chip: str, path: pathlib.Path = PATH) -> list[dict]:
    """The chip's entries in tuned.json; an empty list for a chip that nobody tuned for.

    An entry is {"num_keys": M, "num_softmax": S, "blocks": {name: tokens}, "source": "measured" or "static estimate"}.
    """
    return json.loads(path.read_text()).get(chip, []) if path.exists() else []


def save(
    chip: str, num_keys: int, num_softmax: int, blocks: Mapping[str, int], source: str, path: pathlib.Path = PATH
) -> None:
    """Adds an entry. It replaces the chip's entry for the same number of keys and of softmax keys, if there is one."""
    chips = json.loads(path.read_text()) if path.exists() else {}
    entries = [e for e in chips.get(chip, []) if (e["num_keys"], e["num_softmax"]) != (num_keys, num_softmax)]
    entries.append({"num_keys": num_keys, "num_softmax": num_softmax, "blocks": dict(blocks), "source": source})
    chips[chip] = sorted(entries, key=lambda e: (e["num_keys"], e["num_softmax"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(dict(sorted(chips.items())), indent=1) + "\n")
    temporary.replace(path)


def lookup(chip: str, num_keys: int, num_softmax: int, path: pathlib.Path = PATH) -> dict[str, int]:
    """The blocks of the entry nearest in keys and softmax keys, on a log scale; empty if none is within twofold."""

    def distances(entry: dict) -> tuple[float, float]:
        apart = lambda ours, theirs: abs(math.log2((1 + ours) / (1 + theirs)))
        return apart(num_softmax, entry["num_softmax"]), apart(num_keys, entry["num_keys"])

    entries = [entry for entry in load(chip, path) if max(distances(entry)) <= 1]
    return min(entries, key=lambda entry: sum(distances(entry)))["blocks"] if entries else {}
