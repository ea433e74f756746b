"""What earlier versions of the library saved, as this one computes with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_da3.config import CONFIG_VERSION
from lightning_da3.ops.adapter_cells import VALUE_SCALE

_VALUE = re.compile(r"(^|\.)adapters\.[^.]+\.value\.(weight|bias)$")


def scaled_today(tensors: Mapping[str, Any], config: object) -> dict[str, Any]:
    """A domain's tensors that give what they gave when adapters did not scale their addends.

    Args:
        tensors: The tensors by name, of one domain or of several.
        config: The config that was saved with them, as `DA3Config.to_dict` gives it.
    """
    version = config.get("version", 1) if isinstance(config, Mapping) else CONFIG_VERSION
    if version != 1:
        return dict(tensors)
    return {
        name: value / VALUE_SCALE if _VALUE.search(name) and isinstance(value, Tensor) else value
        for name, value in tensors.items()
    }
