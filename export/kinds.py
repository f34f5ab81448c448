"""The kinds of attention that torch and phones compute."""

from jsurgery.attention.kinds.registry import rate_key
from jsurgery.errors import InputError
from jsurgery.wan.model_config import WanConfig


def check_kinds(network: WanConfig, source: str) -> None:
    """Raises InputError that names the kinds of a model, read from `source`, of which there is no other form."""
    kinds = network.hybrid.kinds if network.hybrid else ()
    if odd := sorted({kind.rate for kind in kinds if not kind.exportable}, key=rate_key):
        names = ", ".join(map(str, odd))
        raise InputError(f"{source}: hybrid.rates: export knows softmax, R-hybrids and linear blocks, found {names}")
