"""Networks that are refused before anything is traced."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_da3.errors import ConversionError


def check_convertible(model: nn.Module) -> None:
    """Refuse what could not learn.

    Raises:
        ConversionError: Layers have no weights yet, or pass no gradient back.
    """
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ConversionError(
            f"{type(model).__name__} has layers that were never called, so they have no weights: "
            f"{lazy[:4]}. Run the network once on a batch, then convert it."
        )
    quantized = sorted(set(_quantized(model)))
    if quantized:
        raise ConversionError(
            f"{type(model).__name__} is quantized ({', '.join(quantized[:4])}): its int8 layers "
            "pass no gradient back, so nothing before them could learn. Convert the float network "
            f"that it was made from ({_float_twin(model)}), and quantize after training."
        )


def _quantized(model: nn.Module) -> Iterator[str]:
    for module in model.modules():
        kind = type(module)
        if ".quantized." in f"{kind.__module__}." or kind.__name__ in ("QuantStub", "DeQuantStub"):
            yield kind.__name__


def _float_twin(model: nn.Module) -> str:
    kind = type(model)
    twin = kind.__name__.removeprefix("Quantizable")
    home = kind.__module__.replace(".quantization", "").replace(".quantized", "")
    return f"{home}.{twin}"
