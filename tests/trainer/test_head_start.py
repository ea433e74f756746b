"""Heads that start where the training batches say, in a Trainer."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.domains import refused
from helpers.lit import CONFIG, Lit, callback, data, network, trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_da3 import ConfigError, DA3Callback, DA3Config, DomainLoader, MemoryConfig, convert


class Seen(L.Callback):
    """Heads as they are when the first step begins, and the samples of all steps."""

    def __init__(self):
        self.heads, self.samples = {}, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.samples:
            model = pl_module.net
            self.heads = {n: model.domain(n).head.weight.detach().clone() for n in model.domains}
        self.samples.append(batch)


def want(batches):
    model = convert(network(), CONFIG)
    model.add_domain("a", 2)
    model.start_head("a", batches)
    return model.domain("a").head.weight


def fitted(tmp_path, module, batches, da3=None, **kwargs):
    seen = Seen()
    da3 = da3 or callback(start_head=True)
    trainer(tmp_path, da3, callbacks=[seen], **kwargs).fit(module, batches)
    return seen


class Counts(Lit):
    """Counts and logs in its step, and answers with a dict."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(2)
        self.more = MetricCollection({"own": MulticlassAccuracy(2)})
        self.register_buffer("steps", torch.zeros(()))
        self.batch_norm = nn.BatchNorm2d(3)
        self.log_dict, self.counted = super().log_dict, []

    def on_train_batch_start(self, batch, batch_idx):
        self.counted += [int(self.steps), self.accuracy.update_count, self.more.own.update_count]

    def training_step(self, batch):
        x, y = batch
        self.steps += 1
        scores = self.net(self.batch_norm(x))
        loss = F.cross_entropy(scores, y)
        self.accuracy(scores, y)
        self.more.update(scores, y)
        self.log("loss", loss, on_step=True)
        self.log_dict({"accuracy": self.accuracy})
        return {"loss": loss}


def test_it_is_that_of_the_model_and_of_the_module_s_own_loss(tmp_path):
    seen = fitted(tmp_path, Lit(), data())
    torch.testing.assert_close(seen.heads["a"], want(data()))


def test_steps_leave_nothing_but_the_head(tmp_path):
    module = Counts()
    before = dict(vars(module))
    fitted(tmp_path, module, data(), callback(start_head=True, outside="frozen"), epochs=1)
    assert module.counted[:3] == [0, 0, 0]
    assert module.counted[3:6] == [1, 1, 1]
    assert module.log_dict == before["log_dict"]
    assert "log" not in vars(module)


def test_every_sample_is_seen_once_and_the_epochs_are_whole(tmp_path):
    loader = DataLoader(
        data().dataset, batch_size=5, shuffle=True, num_workers=1, persistent_workers=True
    )
    seen = fitted(tmp_path, Lit(), loader)
    torch.testing.assert_close(seen.heads["a"], want(data()), rtol=1e-3, atol=1e-4)
    assert [len(y) for _, y in seen.samples] == [5, 5, 2] * 2


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data().dataset)


def test_streams_without_a_length(tmp_path):
    seen = fitted(tmp_path, Lit(), DataLoader(Stream(), batch_size=4))
    torch.testing.assert_close(seen.heads["a"], want(data()))
    assert len(seen.samples) == 6


def test_the_limit_of_the_trainer_holds(tmp_path):
    seen = fitted(tmp_path, Lit(), data(), limit_train_batches=2)
    torch.testing.assert_close(seen.heads["a"], want([*data()][:2]))


def test_what_has_learned_is_left(tmp_path):
    module = Lit()
    fitted(tmp_path, module, data())
    learned = module.net.domain("a").head.weight.detach().clone()
    seen = fitted(tmp_path, module, data(1))
    assert torch.equal(seen.heads["a"], learned)


def test_several_domains_start_each_from_its_own(tmp_path):
    loader = DomainLoader({"a": data(), "b": data(1)})
    da3 = DA3Callback({"a": 2, "b": 2}, config=CONFIG, start_head=True)
    seen = fitted(tmp_path, Lit(), loader, da3)
    torch.testing.assert_close(seen.heads["a"], want(data()))
    torch.testing.assert_close(seen.heads["b"], want(data(1)))
    assert [*seen.samples[0]] == ["a"]


def test_steps_in_parts_start_as_whole_ones(tmp_path):
    memory = MemoryConfig(budget="1MiB", split="accumulate")
    config = DA3Config(CONFIG.adapter, CONFIG.gate, memory)
    da3 = DA3Callback("a", 2, config, start_head=True)
    seen = fitted(tmp_path, Lit(), data(), da3)
    torch.testing.assert_close(seen.heads["a"], want(data()))


class Manual(Lit):
    automatic_optimization = False


class OfAnIterator(Lit):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return super().training_step(batch, 0)


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
@pytest.mark.parametrize("kind", [Manual, OfAnIterator])
def test_steps_that_cannot_be_asked_are_refused(tmp_path, kind):
    module = kind()
    module.automatic_optimization = kind is not Manual
    with refused(ConfigError, "`model.start_head(domain, batches)` yourself"):
        fitted(tmp_path, module, data())
