"""How PyTorch tells modes that autocast is switched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.overrides import TorchFunctionMode

from lightning_da3.torch_private.finding import found

if TYPE_CHECKING:
    ToldOfAutocast = TorchFunctionMode
else:
    ToldOfAutocast = found(
        "torch.fx.experimental.proxy_tensor:PreDispatchTorchFunctionMode", TorchFunctionMode
    )
"""A mode that is told; where PyTorch has none, one that is not."""

ENTER: Any = found("torch.amp.autocast_mode:_enter_autocast", object())
"""What such a mode is called with: the type of device, the type, and whether it is switched on."""

EXIT: Any = found("torch.amp.autocast_mode:_exit_autocast", object())
"""What such a mode is called with when it is switched back."""
