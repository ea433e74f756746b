"""Files of inference whose weights take fewer bits, measured."""

from __future__ import annotations

import logging
import tempfile
from functools import partial
from pathlib import Path

from device_files import batch, learned, network_of, session_of
from device_rows import Row, Sizes
from measure import alternate
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process

from lightning_da3 import DA3Config, MemoryConfig

MIB = 2**20


def smaller(name: str, sizes: Sizes) -> list[Row]:
    """Files of inference with weights in bfloat16, and in 8 bits by the runtime's own quantizer."""
    network = network_of(name, sizes.image)
    files: dict[str, Path] = {}
    examples, _ = batch(2, sizes.image, 0)
    one = examples[:1].numpy()
    with tempfile.TemporaryDirectory() as folder:
        for weights in ("same", "bfloat16"):
            config = DA3Config(memory=MemoryConfig(weights=weights))
            model = learned(network, config).eval()
            files[weights] = model.export("measured", Path(folder) / weights, examples)
        prepared, files["8 bits"] = Path(folder) / "prepared", Path(folder) / "8 bits"
        logging.disable(logging.WARNING)  # the quantizer asks for what was done
        quant_pre_process(files["same"], prepared, skip_symbolic_shape=True)
        quantize_dynamic(prepared, files["8 bits"], weight_type=QuantType.QUInt8)
        sessions = {kind: session_of(path) for kind, path in files.items()}
        runs = {kind: partial(s.run, None, {"input": one}) for kind, s in sessions.items()}
        times = alternate(runs, sizes.rounds)
        held = {kind: path.stat().st_size / MIB for kind, path in files.items()}
    rows = []
    for kind in files:
        rows.append(Row(name, f"smaller: the file, weights {kind}", held[kind], "MiB"))
        rows.append(Row(name, f"smaller: one image, weights {kind}", times[kind].cpu_ms, "ms"))
    return rows
