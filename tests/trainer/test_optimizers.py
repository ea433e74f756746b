"""Optimizers hold what trains and nothing else."""

import copy

import pytest
import torch
from helpers.doors import DOORS, through
from helpers.lit import Lit, data
from torch import nn

from lightning_da3 import ConfigError
from lightning_da3.trainer.optimizers import drop_frozen_


def test_frozen_parameters_leave_groups_and_state_and_empty_groups_stay():
    frozen, trained = (nn.Parameter(torch.ones(2)) for _ in range(2))
    named = [{"params": [("f", frozen)]}, {"params": [("g", frozen.clone()), ("t", trained)]}]
    optimizer = torch.optim.Adam([{"params": [("f", frozen)]}, {"params": [("t", trained)]}])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    (frozen.sum() + trained.sum()).backward()
    optimizer.step()
    frozen.requires_grad_(False)
    drop_frozen_([optimizer])
    assert [group["params"] for group in optimizer.param_groups] == [[], [trained]]
    assert [group["param_names"] for group in optimizer.param_groups] == [[], ["t"]]
    assert list(optimizer.state) == [trained]
    optimizer.step()
    scheduler.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(named) == len(optimizer.param_groups)


class TwoGroups(Lit):
    """As one writes it for fine-tuning: a slow backbone, a fast rest, a scheduler."""

    def configure_optimizers(self):
        groups = [
            {"params": self.net.backbone.parameters(), "lr": 1e-4},
            {"params": self.net.bank.parameters()},
        ]
        optimizer = torch.optim.SGD(groups, 1e-2, momentum=0.9, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.mark.parametrize("door", DOORS)
def test_optimizers_hold_what_trains_and_nothing_else(tmp_path, door):
    module = TwoGroups()
    trainer = through(door, tmp_path)
    trainer.fit(module, data())
    trained = {id(p) for p in module.net.domain("a").parameters()}
    groups = [{id(p) for p in g["params"]} for g in trainer.optimizers[0].param_groups]
    assert groups == [set(), trained]
    assert {id(p) for p in trainer.optimizers[0].state} <= trained


def test_an_optimizer_of_nothing_that_trains_is_refused(tmp_path):
    class Wrong(Lit):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.backbone.parameters(), 0.1)

    with pytest.raises(ConfigError, match=r"No optimizer holds a parameter of \['a'\]"):
        through("callback", tmp_path).fit(Wrong(), data())
