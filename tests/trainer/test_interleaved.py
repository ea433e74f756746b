"""Several domains in one run: DomainLoader, and the domain switched before every batch."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.lit import CONFIG, Lit, data, lit, logits, parameters, trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_da3 import ConfigError, DA3Callback, DA3Config, DA3Strategy, DomainLoader

QUIET = DA3Config(adapter=CONFIG.adapter, gate=None)
BOTH = {"a": 2, "b": 2}


class Momentum(Lit):
    """An optimizer that moves whatever has a gradient, or had one."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=0.1)


class Evaluates(Momentum):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y), add_dataloader_idx=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.net(batch[0])


def test_domain_loader_takes_turns_until_all_have_given_everything():
    loader = DomainLoader({"a": ["a0"], "b": ["b0", "b1", "b2"], "c": ["c0", "c1"]})
    assert len(loader) == 6
    for _ in range(2):  # epochs
        batches = [(*batch.items(), i, loader_idx) for batch, i, loader_idx in loader]
        assert [name for (_, name), *_ in batches] == ["a0", "b0", "c0", "b1", "c1", "b2"]
        assert [key for (key, _), *_ in batches] == ["a", "b", "c", "b", "c", "b"]
        assert [i for _, i, _ in batches] == list(range(6))
    loader.limits = 2
    iter(loader)
    assert len(loader) == 5
    assert [next(iter(batch.values())) for batch, *_ in loader] == ["a0", "b0", "c0", "b1", "c1"]
    loader.reset()
    assert next(loader)[0] == {"a": "a0"}


def test_domain_loader_knows_no_length_if_one_of_its_loaders_does_not():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    loader = DomainLoader({"a": DataLoader(Endless()), "b": [1]})
    with pytest.raises(TypeError, match="has a length if all"):
        len(loader)
    assert len(list(loader)) == 4


@pytest.mark.parametrize("loaders", [{}, [[1]]])
def test_domain_loader_needs_names(loaders):
    with pytest.raises(ConfigError, match="dict of loaders by name"):
        DomainLoader(loaders)


def test_interleaved_domains_learn_what_they_learn_one_after_the_other(tmp_path):
    """Momentum and weight decay included: what gets no gradient does not move."""

    def run(domain, loader):
        fitter = trainer(tmp_path, DA3Callback(domain, config=QUIET), epochs=3)
        fitter.fit(module, loader)
        return fitter

    module = Momentum()
    torch.manual_seed(1)
    fitter = run(BOTH, DomainLoader({"a": data(), "b": data(1)}))
    assert fitter.global_step == 18
    assert module.net.domains == ["a", "b"]
    together = {name: parameters(module, name) for name in BOTH}

    module = Momentum()
    torch.manual_seed(1)
    trainer(tmp_path, DA3Callback(BOTH, config=QUIET), limit_train_batches=0).fit(
        module, DomainLoader({"a": data(), "b": data(1)})
    )  # the same fresh domains, untrained
    for name, seed in (("a", 0), ("b", 1)):
        run(name, data(seed))
    for name in BOTH:
        torch.testing.assert_close(parameters(module, name), together[name], rtol=0, atol=0)


def test_the_optimizer_holds_every_domain_and_each_step_moves_one(tmp_path):
    module, moved = Momentum(), []

    class Watches(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = {name: parameters(pl_module, name) for name in BOTH}

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            now = {name: parameters(pl_module, name) for name in BOTH}
            (named,) = batch
            assert pl_module.net.active_domain == named
            moved.append(
                [
                    n
                    for n in BOTH
                    if any(not torch.equal(now[n][k], v) for k, v in self.before[n].items())
                ]
            )

    callbacks = {"callbacks": [Watches()]}
    fitter = trainer(tmp_path, DA3Callback(BOTH, config=QUIET), **callbacks)
    fitter.fit(module, DomainLoader({"a": data(), "b": data(1)}))
    assert moved == [["a"], ["b"]] * 6
    held = {id(p) for group in fitter.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for name in BOTH for p in module.net.domain(name).parameters()}


def test_accumulated_gradients_of_every_domain_are_used(tmp_path):
    module = Momentum()
    fitter = trainer(tmp_path, DA3Callback(BOTH, config=QUIET), 1, accumulate_grad_batches=2)
    loader = DomainLoader({"a": data(), "b": data(1)})
    fitter.fit(module, loader)
    assert fitter.global_step == 3
    for name in BOTH:
        assert any(v.any() for k, v in parameters(module, name).items() if "value.weight" in k)


def test_loaders_by_domain_evaluate_each_with_its_own(tmp_path):
    module = Evaluates()
    loaders = {"a": data(), "b": data(1)}
    fitter = trainer(tmp_path, DA3Callback(BOTH, config=CONFIG, save_dir=str(tmp_path)))
    fitter.fit(module, DomainLoader(loaders), loaders)
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {"a.safetensors", "b.safetensors"}
    active = module.net.active_domain
    predicted = fitter.predict(module, loaders)
    assert module.net.active_domain == active
    module.eval()
    for name, seed, scores in zip(BOTH, (0, 1), predicted, strict=True):
        module.net.set_domain(name)
        with torch.no_grad():
            expected = [module.net(x) for x, _ in data(seed)]
        torch.testing.assert_close(scores, expected, rtol=0, atol=0)
    (a, b) = fitter.test(module, loaders, verbose=False)
    assert a["val_loss/a"] != b["val_loss/b"]


def test_a_run_of_one_domain_validates_the_others_too(tmp_path):
    module = Evaluates()
    trainer(tmp_path, DA3Callback("a", 2, CONFIG)).fit(module, data(), data())
    before = logits(module, "a")
    active = []

    class Watches(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            active.append(pl_module.net.active_domain)

    fitter = trainer(tmp_path, DA3Callback("b", 2, CONFIG), callbacks=[Watches()])
    fitter.fit(module, data(1), {"a": data(), "b": data(1)})
    assert active == ["b"] * 6
    assert torch.equal(logits(module, "a"), before)


def test_batches_and_loaders_without_a_domain_are_refused(tmp_path):
    def run(loader, *more):
        module = Evaluates() if more else Momentum()
        trainer(tmp_path, DA3Callback(BOTH, config=CONFIG)).fit(module, loader, *more)

    with pytest.raises(ConfigError, match=r"must say of which one domain it is.*Got a list"):
        run(data())
    with pytest.raises(ConfigError, match=r"Got a dict of \['a', 'b'\].*DomainLoader"):
        run({"a": data(), "b": data(1)})
    with pytest.raises(ConfigError, match=r"Got a dict of \['c'\]"):
        run(DomainLoader({"c": data()}))
    with pytest.raises(ConfigError, match="give a dict of loaders by name of the domain"):
        run(DomainLoader({"a": data()}), data())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((BOTH, 3), "`num_classes` is 3 beside"),
        (({},), "must be a name or a dict"),
        ((7, 2), "must be a name or a dict.*got 7"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ConfigError, match=message):
        DA3Callback(*arguments)


def test_the_strategy_learns_several_domains_too(tmp_path):
    module = lit()
    fitter = L.Trainer(
        strategy=DA3Strategy({"a": 2, "b": 3}, config=CONFIG),
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    fitter.fit(module, DomainLoader({"a": data(), "b": data(1)}))
    assert module.net.domain("b").num_classes == 3
    for name in "ab":
        assert any(v.any() for k, v in parameters(module, name).items() if "value.weight" in k)
