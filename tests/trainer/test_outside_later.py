"""What trains beside the network learns from losses of before its domain was left."""

import pytest
import torch
from helpers.apart import PARAMETERS, Apart, learn
from torch import nn

CHANGES = {"another": "b", "none": None}


class ByToken(Apart):
    """No norm has statistics."""

    def __init__(self):
        super().__init__()
        self.classifier[0] = nn.LayerNorm(8)


@pytest.mark.parametrize("policy", ["domain", "shared"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*train with every domain in turn")
def test_a_domain_set_before_the_backward_takes_no_gradients(tmp_path, change, policy):
    module = ByToken()
    learn(tmp_path, module, "a", outside=policy)
    module.net.add_domain("b")
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 0, 1])

    def gradients(between):
        module.net.set_domain("a")
        mine = {k: p for k, p in module.named_parameters() if k in PARAMETERS or "bank.a." in k}
        module.zero_grad()
        module.train()
        module.classifier.eval()
        # what a loss reads of parameters alone never passes the network's output
        decay = sum(p.square().sum() for p in module.net.domain("a").parameters())
        loss = module.margin(module(x), y) + decay
        between()
        loss.backward()
        return mine, {k: None if p.grad is None else p.grad.clone() for k, p in mine.items()}

    def switch():
        for name in ("b", "a", CHANGES[change]):  # back and forth
            module.net.set_domain(name)

    _, want = gradients(lambda: None)
    parameters, got = gradients(switch)
    assert all(gradient is not None for gradient in want.values())
    assert all(torch.equal(got[name], want[name]) for name in want)
    rest = PARAMETERS if policy == "shared" and change == "another" else set()
    assert {name for name, p in parameters.items() if p.requires_grad} == rest


def test_what_waits_for_a_backward_is_not_more_with_every_switch(tmp_path):
    module = Apart()
    learn(tmp_path, module, "a")
    module.net.add_domain("b")
    module.net.set_domain("a")
    weight = module.classifier[1].weight
    node = torch.autograd.graph.get_gradient_edge(weight).node  # DDP holds it, too
    handles = []
    for name in ("b", "a") * 3:
        module.net.set_domain(name)
        handles += node.metadata.values()
    assert len({id(handle) for handle in handles}) == 1
