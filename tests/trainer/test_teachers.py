"""What was done with the network before it was converted: copies, hooks."""

import copy

import pytest
import torch
from helpers.apart import ALONE, Apart, learn
from helpers.lit import Lit, callback, data, trainer

from lightning_da3 import DomainLoader, load_from_checkpoint
from lightning_da3.model.model import DA3Model


class Momentum(Apart):
    """Moves a copy of its network after it, as BYOL and MoCo do."""

    def __init__(self, made="init"):
        super().__init__()
        self.teacher = copy.deepcopy(self.net)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            both = zip(self.net.parameters(), self.teacher.parameters(), strict=True)
            for mine, its in both:
                its.mul_(0.5).add_(mine, alpha=0.5)
            target = self.teacher(batch[0])
        return super().training_step(batch, batch_idx) + (self.net(batch[0]) - target).pow(2).mean()


def values(model, domain):
    return {k: v.clone() for k, v in model.domain(domain).adapters.state_dict().items()}


def test_a_momentum_teacher_follows_the_converted_network(tmp_path):
    module = Momentum()
    learn(tmp_path, module, "a")
    assert isinstance(module.teacher, DA3Model)
    assert not any(p.requires_grad for p in module.teacher.parameters())
    mine, its = values(module.net, "a"), values(module.teacher, "a")
    moved = [name for name in mine if name.endswith("value.weight")]
    assert all(its[name].any() and not torch.equal(mine[name], its[name]) for name in moved)
    fitter = learn(tmp_path, module, "b")
    assert module.teacher.active_domain == "b"
    assert not any(p.requires_grad for p in module.teacher.parameters())
    fitter.save_checkpoint(tmp_path / "both.ckpt")
    again = load_from_checkpoint(Momentum, tmp_path / "both.ckpt")
    for domain in "ab":
        for name, value in values(module.teacher, domain).items():
            assert torch.equal(value, values(again.teacher, domain)[name])
    again.net.set_domain(None)
    learn(tmp_path, again, "b")  # which is the network is known
    both = {"c": None, "d": None}
    learn(tmp_path, again, both, DomainLoader({"c": data(), "d": data(1)}))
    assert all(any(v.any() for v in values(again.teacher, name).values()) for name in both)


def test_a_copy_whose_head_domains_replace_stays_and_is_said(tmp_path):
    module = Lit()
    module.teacher = copy.deepcopy(module.net)
    expected = module.teacher.state_dict()
    with pytest.warns(UserWarning, match=r"\['teacher'\] are copies of the network from before"):
        trainer(tmp_path, callback(backbone="net"), epochs=1).fit(module, data())
    assert not isinstance(module.teacher, DA3Model)
    assert module.net.domain("a").outside is None
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert set(module.teacher.state_dict()) == set(expected)


def test_hooks_are_carried_over_and_those_on_gradients_are_said(tmp_path):
    module, seen = Lit(), []
    module.net.register_forward_hook(lambda *_: seen.append("forward"))
    module.net[0].weight.register_hook(lambda _: seen.append("gradient"))
    with pytest.warns(UserWarning, match=r"1 hooks on gradients of Sequential .*on_fit_start"):
        trainer(tmp_path, callback(predict=False), epochs=1).fit(module, data())
    seen.clear()
    module.net(torch.ones(1, 3, 16, 16))
    assert seen == ["forward"]


def test_two_names_of_one_network_are_both_converted(tmp_path):
    module = Apart()
    module.encoder = module.net
    learn(tmp_path, module, "a", backbone="net")
    assert module.encoder is module.net
    assert isinstance(module.net, DA3Model)
    assert not [name for name in module.net.domain("a").state_dict() if "encoder" in name]
    assert ALONE.head is None
