"""What a fit says of itself, once."""

import logging
import pickle
import re
import warnings

import pytest
import torch
from helpers.lit import CONFIG, Lit, callback, data, lit, network, trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn

from lightning_da3 import DA3Callback, DA3Config, GateConfig, NoEffectWarning, convert
from lightning_da3.trainer import first_steps, saying


class Remembers(Logger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.given = []

    name = version = "none"

    def log_hyperparams(self, params, *args, **kwargs):
        self.given.append(params)

    def log_metrics(self, metrics, step=None):
        """Nothing."""


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("DA3: ")]


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO)
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).propagate = True
    return caplog


def test_a_fit_says_once_what_it_learns(tmp_path, told):
    loggers = [Remembers(), CSVLogger(tmp_path), Remembers()]
    module, da3 = lit(), callback("flowers")
    trainer(tmp_path, da3, logger=loggers, log_every_n_steps=1).fit(module, data())
    (block,) = said(told)
    first, second, *_ = block.split("\n")
    assert first == "DA3: net (Sequential), domain 'flowers', 2 classes, head 8; 2 hosts from 0"
    assert second.startswith("     trains ")
    assert "for the backward, fine-tuning" in second
    assert "(predicted, batch 4)" in block
    assert block == str(da3.saying.status)
    for logger in (loggers[0], loggers[2]):
        (given,) = [g["da3"] for g in logger.given if "da3" in g]
        assert given["domains"] == {"flowers": 2}
        assert given["step"]["kept_bytes"] == da3.saying.status.step.kept_bytes
    step, steps = da3.saying.status.step, da3.first_steps
    assert step.kept_bytes == steps.predicted.saved_activation_bytes
    assert step.finetune_kept_bytes > step.kept_bytes
    assert step.peak_bytes == steps.predicted.peak_bytes
    trainer(tmp_path, da3).fit(module, data())
    assert len(said(told)) == 2


def test_without_a_prediction_it_says_what_was_measured(tmp_path, told):
    trainer(tmp_path, callback(predict=False)).fit(lit(), data())
    (block,) = said(told)
    assert "(measured)" in block
    assert "fine-tuning" not in block


def test_fine_tuning_is_predicted_to_keep_what_it_keeps(tmp_path):
    from lightning_da3.memory import SavedActivations

    da3 = callback()
    trainer(tmp_path, da3).fit(lit(), data())
    net, x = network().train(), next(iter(data()))[0]
    with SavedActivations(net, inputs=x) as saved:
        _ = net(x)
    assert da3.first_steps.finetune_kept_bytes == saved.bytes


def test_several_domains(tmp_path, told):
    from lightning_da3 import DomainLoader

    loaders = DomainLoader({"a": data(), "b": data(1)})
    trainer(tmp_path, DA3Callback({"a": 2, "b": 3}, config=CONFIG)).fit(lit(), loaders)
    (block,) = said(told)
    assert "domains 'a', 2 classes; 'b', 3 classes" in block


# --- little is saved ------------------------------------------------------------------------------


class Unknown(nn.Module):
    """Nearly all that it keeps is kept by operations that nothing is known of."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(x)
        for _ in range(6):
            x = torch.atan(x + 0.5)
        return self.fc(x.mean((2, 3)))


def fit(tmp_path, net, worth=2**10, **kwargs):
    module = Lit("elsewhere")
    module.net = net
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_steps, "WORTH_IT_BYTES", worth)
        warnings.simplefilter("always")
        trainer(tmp_path, callback(**kwargs), epochs=1).fit(module, data())
    return [str(w.message) for w in caught if w.category is NoEffectWarning]


def test_where_little_is_saved_it_says_what_keeps_it(tmp_path):
    (message,) = fit(tmp_path, Unknown())
    assert "fine-tuning the whole network" in message
    assert "The peak is at atan_5, in the backward." in message
    assert "`print(module.net.plan)`" in message


@pytest.mark.slow
def test_where_much_is_saved_or_little_kept_it_says_nothing(tmp_path):
    plain = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip
    assert fit(tmp_path, plain) == []
    assert fit(tmp_path, Unknown(), worth=2**30) == []


def test_kept_bytes_and_peaks_are_both_looked_at():
    steps = first_steps.FirstSteps(nn.Linear(1, 1))
    steps.saved_activation_bytes, steps.finetune_kept_bytes = 2**20, 2**20
    steps.saved_by_module = {"net.backbone.lstm": 2**19, "": 2**18, "net.backbone.other": 0}
    assert "Most is kept by net.lstm (512 KiB), the loss (256 KiB)." in steps.no_effect
    peak = type("P", (), {"saved_activation_bytes": 1, "peak_bytes": 2**20, "nodes": ()})()
    peak.peak_node, peak.peak_phase = "backbone.layer1", "backward"
    steps.predicted, steps.finetune_kept_bytes, steps.finetune_peak_bytes = peak, 2**20, 2**20
    assert steps.no_effect.endswith("The peak is at layer1, in the backward.")
    steps.finetune_peak_bytes = 2**22
    assert steps.no_effect == ""


# --- gates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "steps", "warns"), [(0.0, 3, 1), (0.0, 9, 0)])
def test_a_missed_target_of_gates_is_a_warning(tmp_path, monkeypatch, weight, steps, warns):
    monkeypatch.setattr(saying, "ENOUGH_STEPS", steps)
    config = DA3Config(
        adapter=CONFIG.adapter, gate=GateConfig(target=0.2, weight=weight, by="cell")
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, DA3Callback("a", 2, config=config)).fit(lit(), data())
    found = [str(w.message) for w in caught if w.category is NoEffectWarning]
    assert len(found) == warns
    for message in found:
        assert re.search(r"domain 'a' let \d+% of the hosts' FLOPs run.* target is 20%", message)


# --- as a value -----------------------------------------------------------------------------------


def test_status_of_a_model(capsys):
    model = convert(network(), CONFIG)
    assert str(model.status()).startswith("DA3: Sequential, no domain, head 8; 2 hosts from 0")
    model.add_domain("a", 2), model.add_domain("b", 3)
    assert "no active domain of ['a', 'b']" in str(model.status())
    model.set_domain("b")
    status = model.status(name="net", outside={"classifier": 1000})
    assert "outside, with the domain: classifier (1 k)" in str(status)
    assert (status.domains, status.others) == ({"b": 3}, ("a",))
    own = sum(p.numel() for p in model.domain("b").parameters())
    assert status.trained == own + 1000
    assert status == pickle.loads(pickle.dumps(status))
    model.print_trainable_parameters()
    every = sum(p.numel() for p in model.parameters())
    expected = f"trainable params: {own:,d} || all params: {every:,d} || trainable%: "
    assert capsys.readouterr().out.startswith(expected)


def test_what_is_shown_is_short_and_public():
    model = convert(network(), CONFIG)
    model.add_domain("a", 2)
    line = repr(model)
    assert len(line.split("\n")) == 1
    assert "domains=['a']" in line
    assert "active_domain=None" in line
    names = dir(model)
    assert {"add_domain", "network", "plan"} <= {*names}
    assert not [name for name in names if name.startswith("_")]
    for shown in (model, model.plan):
        assert "<details>" in shown._repr_html_()
    assert "&lt;" not in model.plan.headline
