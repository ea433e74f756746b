"""Pictures of what training keeps, where gates run and what was learned. No pyplot, no state.

Needs matplotlib, which only the functions import: ``pip install lightning-da3[plot]``.
"""

from lightning_da3.plotting.accuracies import plot_accuracy_matrix
from lightning_da3.plotting.gates import plot_executed_shares, plot_gate_maps
from lightning_da3.plotting.memory import memory_rows, plot_memory, plot_step

__all__ = [
    "memory_rows",
    "plot_accuracy_matrix",
    "plot_executed_shares",
    "plot_gate_maps",
    "plot_memory",
    "plot_step",
]
