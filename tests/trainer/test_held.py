"""Budgets in a Trainer: by pieces and by accumulation, with everything else that Lightning does."""

import dataclasses

import lightning as L
import pytest
import torch
from helpers.comparing import assert_relatively_close
from helpers.lit import CONFIG, Lit, trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_da3 import (
    ConfigError,
    DA3Callback,
    DA3Config,
    DA3Strategy,
    MemoryConfig,
    step_costs,
)
from lightning_da3.budget.microbatches import Microbatches

EXACT = DA3Config(adapter=CONFIG.adapter, gate=None, memory=MemoryConfig(exact=True))


def data(batch_size=8, size=64):
    x = torch.randn(20, 3, size, size, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x.mean(dim=(1, 2, 3)) > 0).long()), batch_size=batch_size)


class Steps(Lit):
    """Remembers the gradients of every step, and how many samples each training step saw."""

    def __init__(self):
        super().__init__()
        self.seen, self.steps = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(len(batch[0]))
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        domain = self.net.domain(self.net.active_domain)
        self.steps.append([p.grad.clone() for p in domain.parameters()])


def fit(tmp_path, split=None, by="pieces", config=EXACT, module=None, batch_size=8, **kwargs):
    """A fit whose batches are split so, whatever the budget."""
    torch.manual_seed(1)
    module = module or Steps()
    memory = dataclasses.replace(config.memory, split=by)
    callback = DA3Callback("a", 2, dataclasses.replace(config, memory=memory))

    class Splits(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.net.budget_policy.split = split
            pl_module.net.budget_policy.by = by

    fitter = trainer(tmp_path, callback, epochs=1, callbacks=[Splits()], **kwargs)
    fitter.fit(module, data(batch_size))
    return module, fitter


WAYS = [
    ("pieces", Microbatches(3)),
    ("pieces", Microbatches(2, 2)),
    ("accumulate", Microbatches(3)),
]


@pytest.mark.parametrize(("by", "split"), WAYS)
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.01}, {"strategy": "da3"}],
    ids=str,
)
@pytest.mark.slow
def test_a_fit_takes_the_same_steps(tmp_path, by, split, options):
    whole, first = fit(tmp_path, **options)
    module, second = fit(tmp_path, split, by, **options)
    for one, other in zip(module.steps, whole.steps, strict=True):
        assert_relatively_close(one, other, 2e-4)
    assert first.global_step == second.global_step
    assert whole.seen == [8, 8, 4]
    assert module.seen == (whole.seen if by == "pieces" else [1, 3, 2, 2, 3, 3, 2, 2, 2])


@pytest.mark.parametrize(("by", "split"), WAYS)
def test_what_is_logged_is_that_of_the_whole_batch(tmp_path, by, split):
    class Logs(Steps):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("mean", loss, on_epoch=True, on_step=False)
            return {"loss": loss}

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.losses = [*getattr(self, "losses", []), outputs["loss"].item()]

    options = {"module": Logs(), "limit_train_batches": 2}
    whole, first = fit(tmp_path, **options)
    module, second = fit(tmp_path, split, by, module=Logs(), limit_train_batches=2)
    assert module.losses == pytest.approx(whole.losses, rel=1e-5)
    assert float(second.callback_metrics["mean"]) == pytest.approx(
        float(first.callback_metrics["mean"]), rel=1e-5
    )


@pytest.mark.parametrize(("by", "split"), WAYS)
@pytest.mark.slow
def test_bfloat16_trains(tmp_path, by, split):
    module, _ = fit(tmp_path, split, by, precision="bf16-mixed")
    whole, _ = fit(tmp_path, precision="bf16-mixed")
    for one, other in zip(module.steps[0], whole.steps[0], strict=True):
        assert torch.isfinite(one).all()
        assert_relatively_close([one], [other], 0.05)


@pytest.mark.parametrize("by", ["pieces", "accumulate"])
@pytest.mark.slow
def test_a_budget_is_held_in_a_trainer(tmp_path, by, caplog):
    """Chosen by prediction, said before the step, and shown by what the callback measures."""
    peaks = {}
    for budget in (None, "900KiB"):
        module = Steps()
        config = dataclasses.replace(CONFIG, memory=MemoryConfig(split=by))
        callback = DA3Callback("a", 2, config, budget=budget)
        fitter = trainer(tmp_path, callback, epochs=1)
        with caplog.at_level("INFO"):
            fitter.fit(module, data(10, 128))
        peaks[budget] = float(fitter.callback_metrics["da3/peak_bytes"])
    assert peaks[None] > 900 * 2**10 >= peaks["900KiB"]
    predicted = fitter.callback_metrics.get("da3/predicted_peak_bytes")
    assert by == "accumulate" or predicted <= 900 * 2**10  # of the split step, not of the whole
    assert module.net.budget_policy.budget == "900KiB"
    assert "Held to a budget of 900KiB, " in caplog.text
    costs = step_costs(module.net, 10, 128)
    assert len(costs.parts) > 1
    assert costs.accumulated == (by == "accumulate")
    assert ("gradients add up" if costs.accumulated else "goes through the network") in str(costs)


@pytest.mark.slow
def test_the_strategy_takes_a_budget_and_another_fit_another(tmp_path):
    module = Steps()
    strategy = DA3Strategy("a", 2, config=CONFIG, budget="2GiB")
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(
        accelerator="cpu", strategy=strategy, max_steps=1, default_root_dir=tmp_path, **options
    ).fit(module, data())
    assert module.net.budget_policy.budget == "2GiB"
    trainer(tmp_path, DA3Callback("b", 2, CONFIG, budget=5 * 10**8), epochs=1).fit(module, data())
    assert module.net.budget_policy.budget == 5 * 10**8
    trainer(tmp_path, DA3Callback("c", 2, CONFIG), epochs=1).fit(module, data())
    assert module.net.budget_policy.budget == 5 * 10**8


def test_manual_optimization_accumulates_by_itself(tmp_path):
    class Manual(Steps):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ConfigError, match="automatic_optimization=False"):
        fit(tmp_path, Microbatches(2), "accumulate", module=Manual())


@pytest.mark.slow
def test_a_domain_goes_from_one_budget_to_another(tmp_path):
    module, _ = fit(tmp_path, Microbatches(2))
    module.net.budget_policy.hold(MemoryConfig(budget="1GiB"))
    path = tmp_path / "a.safetensors"
    module.net.save_domain("a", path)
    other = Steps()
    trainer(tmp_path, DA3Callback("b", 2, EXACT, budget="2GiB"), epochs=1).fit(other, data())
    assert other.net.load_domain(path) == "a"
    assert other.net.budget_policy.budget == "2GiB"
