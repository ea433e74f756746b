"""The quick start from cli.yaml: ``python cli.py fit``; ``fit --help`` lists what it can set."""

from pathlib import Path

import lightning as L
from datasets import load_domain
from lightning.pytorch.cli import LightningCLI
from quickstart import Classifier
from torch.utils.data import DataLoader


class Domain(L.LightningDataModule):
    """One of the examples' domains.

    Args:
        name: "digits", "textures" or "faces".
        batch_size: Images a step.
    """

    def __init__(self, name: str = "digits", batch_size: int = 32):
        super().__init__()
        self.domain, self.batch_size = load_domain(name), batch_size

    def train_dataloader(self):
        return DataLoader(self.domain.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.domain.test, 100)


if __name__ == "__main__":
    defaults = {"default_config_files": [str(Path(__file__).with_name("cli.yaml"))]}
    LightningCLI(
        Classifier, Domain, parser_kwargs={"fit": defaults}, save_config_kwargs={"overwrite": True}
    )
