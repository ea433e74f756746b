"""Runs of two processes: ``python ranks.py NAMES FOLDER STRATEGY``, one after the other.

Rank zero writes the results, of each run into a folder of its own inside of FOLDER.
"""

import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from helpers.apart import ALONE, PARAMETERS, Apart, learned
from helpers.lit import CONFIG, Lit, LitConfigure, data
from helpers.skips import BY_DOMAIN, config, network
from lightning_da3 import (
    DA3Callback,
    DA3Config,
    DA3DDPStrategy,
    DomainLoader,
    GateConfig,
    MemoryConfig,
)
from lightning_da3.budget.microbatches import Microbatches
from lightning_da3.metrics import AccuracyMatrix, DecathlonScore

# nothing random, nothing rounded, and a budget that weighs as much as the loss
BUDGET = DA3Config(
    adapter=CONFIG.adapter,
    gate=GateConfig(target=0.3, weight=5.0, noise=False, by="cell"),
    memory=MemoryConfig(exact=True),
)
UNGATED = DA3Config(
    adapter=CONFIG.adapter, gate=None, memory=MemoryConfig(exact=True, split="accumulate")
)


class HalfShut(Lit):
    """Starts with gates of which some are shut, not the same ones for every sample."""

    def on_fit_start(self):
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, value in self.net.domain("a").named_parameters():
                value.copy_(0.5 * torch.randn(value.shape, generator=generator))
                if name.endswith("attend.bias"):
                    value.zero_()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)

    def train_dataloader(self):
        """Two global batches of eight in a fixed order, of which every rank has its part."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(16, 3, 16, 16, generator=generator)
        samples = TensorDataset(x, (x.mean(dim=(1, 2, 3)) > 0).long())
        ranks = self.trainer.world_size
        sampler = DistributedSampler(samples, ranks, self.global_rank, shuffle=False)
        return DataLoader(samples, batch_size=8 // ranks, sampler=sampler)

    def on_before_optimizer_step(self, optimizer):
        domain = self.net.domain("a")
        gradients = {name: value.grad.clone() for name, value in domain.named_parameters()}
        self.steps = [*getattr(self, "steps", []), gradients]
        if self.net.decided_flops_fraction is not None:
            fraction = self.net.executed_flops_fraction.item()
            self.fractions = [*getattr(self, "fractions", []), fraction]


def trainer(folder, strategy, devices=2, callbacks=(), **kwargs):
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "strategy": strategy,
            "devices": devices,
            "max_epochs": 1,
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **kwargs,
        }
    )


def gradients(folder, devices, strategy, config=BUDGET, split=None):
    """Two steps of global batches of eight, on one process or two; split by `split` if any."""

    class Splits(L.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.net.budget_policy.split = split

    module = HalfShut()
    callbacks = [DA3Callback("a", 2, config), Splits()]
    fitter = trainer(folder, strategy, devices, callbacks, use_distributed_sampler=False)
    fitter.fit(module)
    return module, fitter


def save(fitter, folder, name, content):
    if fitter.is_global_zero:
        torch.save(content, Path(folder) / f"{name}.pt")


def equal_gradients(folder, strategy):
    module, fitter = gradients(folder, 2, strategy)
    save(fitter, folder, "learned", {"steps": module.steps, "fractions": module.fractions})


def equal_gradients_in_pieces(folder, strategy):
    module, fitter = gradients(folder, 2, strategy, split=Microbatches(1, 2))
    save(fitter, folder, "learned", {"steps": module.steps, "fractions": module.fractions})


def equal_gradients_accumulated(folder, strategy):
    module, fitter = gradients(folder, 2, strategy, UNGATED, Microbatches(2))
    save(fitter, folder, "learned", {"steps": module.steps})


def two_domains_one_after_the_other(folder, strategy):
    module = LitConfigure("configure_model")
    for domain, classes in (("a", 2), ("b", 3)):
        callback = DA3Callback(domain, classes, CONFIG, save_dir=folder)
        fitter = trainer(folder, strategy, callbacks=[callback])
        fitter.fit(module, data())
        fitter.test(module, data(), verbose=False)
        fitter.save_checkpoint(Path(folder) / f"{domain}.ckpt")
    save(fitter, folder, "learned", {d: module.net.domain(d).state_dict() for d in "ab"})


def saves_the_best(folder, strategy):
    """Each rank logs another value; the mean of the second epoch is the largest."""

    class Scored(Lit):
        def on_train_epoch_end(self):
            score = [0.5, 0.9, 0.2][self.current_epoch] + 9 * self.global_rank
            self.log("score", score, sync_dist=True)

    how = {"save_dir": folder, "monitor": "score", "mode": "max"}
    fitter = trainer(folder, strategy, callbacks=[DA3Callback("a", 2, CONFIG, **how)], max_epochs=3)
    fitter.fit(Scored(), data())
    save(fitter, folder, "learned", {})


def metrics_add_up(folder, strategy):
    """Rank zero is right about all of its samples, rank one about none."""

    class Scored(Lit):
        def __init__(self):
            super().__init__()
            self.score, self.matrix = DecathlonScore({"a": 0.5}), AccuracyMatrix(["a", "b"])

        def test_step(self, batch, batch_idx):
            target = batch[1]
            preds = target + self.global_rank
            self.score.update("a", preds, target)
            self.matrix.update("a", "a", preds, target)
            self.log("score", self.score)

        def on_test_epoch_end(self):
            self.found = {"matrix": self.matrix.compute(), "mean": self.matrix.average_accuracy()}

    module = Scored()
    fitter = trainer(folder, strategy, callbacks=[])
    (logged,) = fitter.test(module, data(), verbose=False)
    save(fitter, folder, "learned", {"score": logged["score"], **module.found})


def pictures(folder, strategy):
    """Every rank has a logger, rank zero alone writes."""
    logger = CSVLogger(folder, name=f"rank{os.environ.get('LOCAL_RANK', '0')}", version="")
    fitter = trainer(folder, strategy, callbacks=[DA3Callback("a", 2, CONFIG)], logger=logger)
    fitter.log_every_n_steps = 1
    module = Lit()
    fitter.fit(module, DataLoader(data().dataset, batch_size=1))
    for name, value in module.net.domain("a").state_dict().items():  # the same on every rank
        assert torch.equal(value, fitter.strategy.broadcast(value)), name
    save(fitter, folder, "learned", {})


def monitors_nothing(folder, strategy):
    callback = DA3Callback("a", 2, CONFIG, save_dir=folder, monitor="score")
    trainer(folder, strategy, callbacks=[callback]).fit(Lit(), data())


def interleaved(folder, strategy):
    """The classifier is outside of the network, and of each domain."""

    class Module(Apart):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=0.1)

        def on_before_optimizer_step(self, optimizer):
            active = self.net.active_domain
            trained = [*self.net.domain(active).parameters(), *self.classifier.parameters()]
            assert all(p.grad is not None for p in trained)
            others = [name for name in self.net.domains if name != active]
            for name in others:
                assert len(learned(self, name)) > 6
                assert not any(p.grad is not None for p in self.net.domain(name).parameters())

    module = Module()
    callback = DA3Callback({"a": None, "b": None}, config=ALONE)
    fitter = trainer(folder, strategy, callbacks=[callback], max_epochs=2)
    fitter.fit(module, DomainLoader({"a": data(), "b": data(1)}))
    for name in "ab":  # the same on every rank
        for tensor in (learned(module, name)[key] for key in sorted(PARAMETERS)):
            assert torch.equal(tensor, fitter.strategy.broadcast(tensor))
    save(fitter, folder, "learned", fitter.global_step)


class SeesHead(L.Callback):
    """The head of domain "a" as it is when the first step begins."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.weight = pl_module.net.domain("a").head.weight.detach().clone()


def head_start(folder, strategy):
    """Every rank sees its own samples, and all start from those of both."""
    seen = SeesHead()
    callbacks = [DA3Callback("a", 2, CONFIG, start_head=True), seen]
    fitter = trainer(folder, strategy, callbacks=callbacks)
    fitter.fit(Lit(), data())
    assert torch.equal(seen.weight, fitter.strategy.broadcast(seen.weight))
    save(fitter, folder, "learned", seen.weight)


def skips(folder, strategy):
    """Every rank sees its own samples, and both choose alike, after DDP wrapped the module."""

    class Skips(Lit):
        def __init__(self):
            super().__init__()
            self.net = network()

    module = Skips()
    callback = DA3Callback("a", 2, config(gate=BY_DOMAIN))
    fitter = trainer(folder, strategy, callbacks=[callback], max_epochs=2)
    fitter.fit(module, data())
    skipped = module.net.skipped("a")
    assert skipped == fitter.strategy.broadcast(skipped)
    for name, value in module.net.domain("a").state_dict().items():  # the same on every rank
        assert torch.equal(value, fitter.strategy.broadcast(value)), name
    save(fitter, folder, "learned", list(skipped))


def dies(folder, strategy):
    class Dies(Lit):
        def training_step(self, batch, batch_idx):
            if self.global_rank == 1 and batch_idx == 1:
                if os.environ["HOW"] == "killed":
                    os._exit(3)
                raise RuntimeError("rank one has had enough")
            return super().training_step(batch, batch_idx)

    trainer(folder, strategy, callbacks=[DA3Callback("a", 2, CONFIG)]).fit(Dies(), data())
    (Path(folder) / "finished").touch()


def nan_on_one_rank(folder, strategy):
    class Nan(Lit):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.global_rank == 1 else loss

    trainer(folder, strategy, callbacks=[DA3Callback("a", 2, CONFIG)]).fit(Nan(), data())
    (Path(folder) / "finished").touch()


def started_processes(folder, strategy):
    """Spawn or fork: the domains must be in the main process afterwards."""
    module = Lit()
    fitter = trainer(folder, DA3DDPStrategy("a", 2, CONFIG, start_method=strategy))
    fitter.fit(module, data())
    fitter.test(module, data(), verbose=False)
    save(fitter, folder, "learned", {"state": module.net.domain("a").state_dict()})
    assert module.net.active_domain == "a"


def refuses_to_start(folder, strategy):
    """Each prints why the domains would be lost; nothing is started."""
    del strategy
    callback = DA3Callback("a", 2, CONFIG)  # which alone cannot convert before they start
    later = DA3DDPStrategy("a", 2, CONFIG, start_method="spawn")
    for module, how, callbacks in (
        (Lit(), "ddp_spawn", [callback]),
        (Lit(), "ddp_notebook", [callback]),
        (LitConfigure("configure_model"), later, []),
    ):
        try:
            trainer(folder, how, callbacks=callbacks).fit(module, data())
        except Exception as error:  # noqa: PERF203, BLE001  # as the processes pass it on
            print(error)  # noqa: T201


if __name__ == "__main__":
    torch.set_num_threads(1)
    names, folder, strategy = sys.argv[1:]
    for name in names.split(","):
        (Path(folder) / name).mkdir(exist_ok=True)
        globals()[name](str(Path(folder) / name), strategy)
