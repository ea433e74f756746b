"""Learning and inference on a device: ONNX Runtime and numpy, no PyTorch.

>>> from lightning_da3.device import Learner
>>> learner = Learner("flowers_train.onnx", inference="flowers.onnx")
>>> learner.fit(images, labels, epochs=8, batch_size=32, learning_rate=3e-3)
>>> scores = learner.predict(images)
>>> learner.save("flowers.safetensors")

The files are those of `DA3Model.export_training` and `DA3Model.export`, and what is saved is what
`DA3Model.load_domain` takes.
"""

from lightning_da3.device.learner import Learner
from lightning_da3.device.predictor import Predictor

__all__ = ["Learner", "Predictor"]
