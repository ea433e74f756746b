"""A pretrained network learns handwritten digits: one callback in one Trainer, half a minute."""

import lightning as L
import torch
import torch.nn.functional as F
from comparison.backbones import lite0
from datasets import IMAGE_SIZE, load_domain
from torch.utils.data import DataLoader

from lightning_da3 import DA3Callback
from lightning_da3.memory import saved_activation_bytes


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = lite0(IMAGE_SIZE).make()  # EfficientNet-Lite0 with its ImageNet weights

    def training_step(self, batch, _):
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("accuracy", (self.network(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    digits, classifier = load_domain("digits"), Classifier()
    train = DataLoader(digits.train, batch_size=32, shuffle=True)
    before = saved_activation_bytes(classifier.network, images := next(iter(train))[0])

    da3 = DA3Callback("digits", num_classes=10, save_dir="outputs/quickstart")
    trainer = L.Trainer(max_epochs=5, callbacks=[da3], logger=False, enable_checkpointing=False)
    trainer.fit(classifier, train)
    after = saved_activation_bytes(classifier.network, images)

    trainer.validate(classifier, DataLoader(digits.test, batch_size=100))
    print(f"kept for the backward pass: {before:,} bytes before, {after:,} bytes with DA3")
