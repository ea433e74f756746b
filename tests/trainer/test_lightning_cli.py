"""LightningCLI: the callback and the strategies from YAML, and what ``--help`` says of them."""

import pytest
import torch
from helpers.lit import Lit, data

from lightning_da3 import AdapterConfig, DA3Config, DA3Model, GateConfig

pytest.importorskip("jsonargparse")
from lightning.pytorch.cli import LightningCLI

# lightning calls jsonargparse in its old ways
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUIET = """
seed_everything: false
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""
CALLBACK = """
  callbacks:
    - class_path: DA3Callback
      init_args:
        domain: digits
        num_classes: 2
        config:
          adapter: {hidden_channels: 4, min_stride: 1}
          gate: {target: 0.7, noise: false, by: cell}
"""
STRATEGY = """
  strategy:
    class_path: DA3Strategy
    init_args:
      domain: {digits: 2, faces: 3}
      config:
        adapter: {hidden_channels: 4, min_stride: 1}
        gate: null
"""


@pytest.fixture(autouse=True)
def _no_arguments_but_those_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["cli.py"])


class Ready(Lit):
    def train_dataloader(self):
        return data()


def cli(tmp_path, text, *arguments):
    path = tmp_path / "run.yaml"
    path.write_text(QUIET + text)
    return LightningCLI(
        Ready,
        args=[*(arguments or ("fit",)), f"--config={path}"],
        run=not arguments,
        save_config_callback=None,
    )


def test_a_yaml_with_the_callback_and_its_nested_config_runs(tmp_path):
    done = cli(tmp_path, CALLBACK)
    assert isinstance(done.model.net, DA3Model)
    assert done.model.net.config == DA3Config(
        adapter=AdapterConfig(hidden_channels=4, min_stride=1),
        gate=GateConfig(target=0.7, noise=False, by="cell"),
    )
    assert done.trainer.global_step == 3
    values = done.model.net.domain("digits").state_dict()
    assert any(torch.count_nonzero(v) for k, v in values.items() if "value.weight" in k)


@pytest.mark.parametrize("name", ["da3", "da3_ddp"])
def test_strategies_by_name(tmp_path, name):
    made = cli(tmp_path, f"  strategy: {name}\n" + CALLBACK, "--trainer.devices=1")
    assert made.trainer.strategy.strategy_name == name


def test_a_strategy_by_class(tmp_path):
    made = cli(tmp_path, STRATEGY, "--trainer.devices=1")
    assert made.trainer.strategy._da3.session.domains == {"digits": 2, "faces": 3}
    assert made.trainer.strategy._da3.config.gate is None


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (
            "--trainer.callbacks.help=DA3Callback",
            (
                "domain DOMAIN",
                "numbers of classes by",
                "num_classes",
                "config",
                "save_dir",
                "monitor",
            ),
        ),
        ("--trainer.strategy.help=DA3Strategy", ("domain DOMAIN", "numbers of classes by")),
    ],
)
def test_help_names_every_argument_with_its_type(tmp_path, capsys, option, words):
    with pytest.raises(SystemExit):
        LightningCLI(Ready, args=["fit", option])
    printed = " ".join(capsys.readouterr().out.split())
    for word in (*words, "dict[str, int]"):
        assert word in printed
    assert "Untyped" not in printed


def test_the_best_epoch_is_saved(tmp_path):
    saving = f"""
        save_dir: {tmp_path / "domains"}
        monitor: da3/executed_flops_fraction
        mode: max
"""
    done = cli(tmp_path, CALLBACK.rstrip() + saving)
    (path,) = (tmp_path / "domains").iterdir()
    assert done.model.net.load_domain(path, "again") == "again"
    with pytest.raises(SystemExit):
        cli(tmp_path, CALLBACK.rstrip() + saving.replace("max", "best"))


def test_a_wrong_value_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`target` must lie in \(0, 1\], got 7"):
        cli(tmp_path, CALLBACK.replace("target: 0.7", "target: 7"))


class Apart(Ready):
    """A classifier beside the network."""

    def __init__(self):
        super().__init__()
        self.scores = torch.nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.scores(self.net(batch[0])), batch[1])


@pytest.mark.filterwarnings("ignore:.*configure_optimizers` will be overridden")
@pytest.mark.parametrize("kind", [Ready, Apart])
def test_the_commands_own_optimizer_trains_the_domain(tmp_path, kind):
    options = ["--optimizer=AdamW", "--optimizer.lr=0.01", "--lr_scheduler=ExponentialLR"]
    path = tmp_path / "run.yaml"
    path.write_text(QUIET + CALLBACK)
    done = LightningCLI(
        kind,
        args=["fit", f"--config={path}", *options, "--lr_scheduler.gamma=0.5"],
        save_config_callback=None,
    )
    (optimizer,) = done.trainer.optimizers
    domain = done.model.net.domain("digits")
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in done.model.parameters() if p.requires_grad
    }
    assert done.trainer.lr_scheduler_configs[0].scheduler.get_last_lr() == [0.005]
    assert any(torch.count_nonzero(a.value.weight) for a in domain.adapters.values())
