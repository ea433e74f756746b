"""What is known of a layer, function or method: one table, which users add to with `register`."""

from lightning_da3.layers.chance import layer_may_draw, may_draw, without_chance
from lightning_da3.layers.facts import Facts, Replacement, register
from lightning_da3.layers.functions import as_pytorch, convolution_of, facts_of_function, layer_of
from lightning_da3.layers.modules import ADAPTIVE_POOLS, BATCH_NORMS, CONVS, TRANSPOSED
from lightning_da3.layers.queries import (
    WRITES,
    attribute_is_number,
    copying_name,
    facts_of,
    facts_of_call,
    facts_of_kind,
    has_frozen_form,
    has_hooks,
    has_modes,
    is_in_place,
    is_pure,
    is_registered,
    kinds_that_call,
    may_share,
    operation,
    replacement_for,
    writes,
)

__all__ = [
    "ADAPTIVE_POOLS",
    "BATCH_NORMS",
    "CONVS",
    "TRANSPOSED",
    "WRITES",
    "Facts",
    "Replacement",
    "as_pytorch",
    "attribute_is_number",
    "convolution_of",
    "copying_name",
    "facts_of",
    "facts_of_call",
    "facts_of_function",
    "facts_of_kind",
    "has_frozen_form",
    "has_hooks",
    "has_modes",
    "is_in_place",
    "is_pure",
    "is_registered",
    "kinds_that_call",
    "layer_may_draw",
    "layer_of",
    "may_draw",
    "may_share",
    "operation",
    "register",
    "replacement_for",
    "without_chance",
    "writes",
]
