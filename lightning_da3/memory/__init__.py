"""What training keeps and what it peaks at, measured or predicted.

Nothing here logs or changes a network.

Saved activation bytes: the storages that autograd holds for the backward pass, each counted once
and whole, without those of parameters and buffers. They are seen in two places: in what a node
saved (`save_for_backward`, and every built-in operation), through `saved_tensors_hooks`; and in
tensors hidden as attributes of a custom Function's `ctx`, which those hooks never see.

Peak bytes: the largest total of new memory alive at one time in a step, above its start.

Not seen: what is saved under hooks entered inside the measured call (they replace ours), tensors
that a custom Function hides in closures or in objects of its own, and a library's own scratch
memory that does not come from PyTorch's allocator.
"""

from lightning_da3.memory.account import Microbatched
from lightning_da3.memory.by_batch import BatchPrediction
from lightning_da3.memory.costs import NodeCost, StepPrediction
from lightning_da3.memory.fake import fake_mode_of, resized, without_values
from lightning_da3.memory.free import free_bytes
from lightning_da3.memory.measured import PeakBytes, StepMeasurement, measure_step, resident_bytes
from lightning_da3.memory.saved import SavedActivations, saved_activation_bytes
from lightning_da3.memory.simulated import (
    NothingTrainsError,
    StepPredictor,
    mean_of,
    predict_step,
)

__all__ = [
    "BatchPrediction",
    "Microbatched",
    "NodeCost",
    "NothingTrainsError",
    "PeakBytes",
    "SavedActivations",
    "StepMeasurement",
    "StepPrediction",
    "StepPredictor",
    "fake_mode_of",
    "free_bytes",
    "mean_of",
    "measure_step",
    "predict_step",
    "resident_bytes",
    "resized",
    "saved_activation_bytes",
    "without_values",
]
