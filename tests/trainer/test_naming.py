"""What is logged while several domains take turns, with the loggers that people have."""

import csv
from importlib.util import find_spec

import pytest
import torch.nn.functional as F
from helpers.lit import CONFIG, Lit, data, trainer
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score

from lightning_da3 import DA3Callback, DomainLoader
from lightning_da3.files.domain_file import read_domain

BOTH = {"a": 2, "b": 2}


class Measures(Lit):
    """Logs numbers, metrics, a collection, and a metric that it computes by hand."""

    def __init__(self):
        super().__init__()
        self.train_acc, self.val_acc, self.by_hand = (BinaryAccuracy() for _ in range(3))
        self.both = MetricCollection([BinaryAccuracy(), BinaryF1Score()], prefix="both/")
        self.seen, self.overall = {}, []

    def _measured(self, batch):
        x, y = batch
        scores = self.net(x)
        return F.cross_entropy(scores, y), scores.softmax(1)[:, 1], y

    def training_step(self, batch, batch_idx):
        loss, scores, y = self._measured(batch)
        self.train_acc(scores, y)
        self.log("train/acc", self.train_acc, on_epoch=True)
        self.log("train/loss", loss, on_epoch=True)
        self.seen.setdefault(f"train/loss/{self.net.active_domain}", []).append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss, scores, y = self._measured(batch)
        self.val_acc(scores, y)
        self.by_hand(scores, y)
        self.both.update(scores, y)
        self.log("val/acc", self.val_acc)
        self.log_dict({"val/loss": loss})
        self.log_dict(self.both)
        hits = self.seen.setdefault(f"val/acc/{self.net.active_domain}", [])
        hits += ((scores > 0.5) == y).float().tolist()

    def on_validation_epoch_end(self):
        self.log("val/overall", self.by_hand.compute())
        self.by_hand.reset()
        hits = [hit for name, values in self.seen.items() if "val" in name for hit in values]
        self.overall.append(sum(hits) / len(hits))

    test_step = validation_step

    def on_train_epoch_start(self):
        self.seen.clear()


def fit(tmp_path, logger=False, **kwargs):
    module = Measures()
    da3 = DA3Callback(BOTH, config=CONFIG, predict=False, **kwargs)
    fitter = trainer(tmp_path, da3, logger=logger, log_every_n_steps=1, num_sanity_val_steps=0)
    loaders = {"a": data(), "b": data(1)}
    fitter.fit(module, DomainLoader(loaders), loaders)
    return module, fitter, loaders


def check(module, metrics):
    mean = {name: sum(values) / len(values) for name, values in module.seen.items()}
    for domain in BOTH:
        assert metrics[f"train/loss/{domain}_epoch"] == pytest.approx(mean[f"train/loss/{domain}"])
        for name in ("val/acc", "both/BinaryAccuracy"):
            assert metrics[f"{name}/{domain}"] == pytest.approx(mean[f"val/acc/{domain}"])
        for name in ("train/acc/{}_epoch", "val/loss/{}", "da3/executed_flops_fraction/{}"):
            assert name.format(domain) in metrics
    losses = mean["train/loss/a"], mean["train/loss/b"]
    assert metrics["train/loss_epoch"] == pytest.approx(sum(losses) / 2)
    assert metrics["val/overall"] == pytest.approx(module.overall[-1])
    assert not [name for name in metrics if "dataloader_idx" in name or "bytes/" in name]


def test_metrics_have_the_name_of_their_domain(tmp_path):
    own = Measures.log
    module, fitter, loaders = fit(tmp_path)
    check(module, {name: float(value) for name, value in fitter.callback_metrics.items()})
    assert module.log.__func__ is own
    assert module.val_acc.compute() == pytest.approx(module.overall[-1])  # has seen all
    (a, b) = fitter.test(module, loaders, verbose=False)
    assert "val/acc/a" in a
    assert "val/acc/b" in b
    only = DA3Callback("a", 2, CONFIG, predict=False)  # as ever
    fitter = trainer(tmp_path, only, 1, num_sanity_val_steps=0)
    fitter.fit(module, data(), data())
    assert {"train/loss_epoch", "val/acc", "val/overall"} <= set(fitter.callback_metrics)
    assert not [name for name in fitter.callback_metrics if name.endswith("/a")]


def test_csv_and_tensorboard_have_curves_of_every_domain(tmp_path):
    loggers = [CSVLogger(tmp_path)]
    if find_spec("tensorboard") is not None or find_spec("tensorboardX") is not None:
        from lightning.pytorch.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(tmp_path, name="tensorboard", version=""))
    module, _, _ = fit(tmp_path, loggers)
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    last = {name: float(v) for row in rows for name, v in row.items() if v}
    check(module, last)
    assert [row for row in rows if row["train/loss/a_step"]]
    for path in tmp_path.glob("tensorboard/events*"):
        written = path.read_bytes()
        assert {name for name in last if name.encode() not in written} <= {"epoch", "step"}
        assert b"dataloader_idx" not in written


@pytest.mark.slow
def test_wandb_has_curves_of_every_domain(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="test", save_dir=tmp_path)
    module, _, _ = fit(tmp_path, logger)
    found = dict(logger.experiment.summary)
    last = {
        name: v if isinstance(v, float) else dict(v).get("last")
        for name, v in found.items()
        if isinstance(v, float) or hasattr(v, "keys")
    }
    logger.experiment.finish()
    check(module, {name: value for name, value in last.items() if value is not None})


def test_a_file_is_kept_by_its_own_domains_metric(tmp_path):
    module, fitter, _ = fit(tmp_path, save_dir=str(tmp_path), monitor="val/loss")
    for domain in BOTH:
        saved = read_domain(tmp_path / f"{domain}.safetensors").metadata["extra"]["metrics"]
        last = float(fitter.callback_metrics[f"val/loss/{domain}"])
        assert saved[f"val/loss/{domain}"] <= last
    assert module.net.domains == list(BOTH)


def test_a_run_that_fails_leaves_the_module_as_it_was(tmp_path):
    class Fails(Measures):
        validation_step = None

        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("enough")
            return super().training_step(batch, batch_idx)

    module = Fails()
    metric = module.train_acc
    with pytest.raises(RuntimeError, match="enough"):
        trainer(tmp_path, DA3Callback(BOTH, config=CONFIG, predict=False)).fit(
            module, DomainLoader({"a": data(), "b": data(1)})
        )
    assert module.train_acc is metric
    assert "log" not in vars(module)
