"""The backbone computes what it computes in eval, whatever `train()` says."""

import pytest
import torch
import torch.nn.functional as F
from helpers.comparing import assert_relatively_close
from torch import nn

from lightning_da3 import AdapterConfig, DA3Config, convert

ADAPTER = AdapterConfig(hidden_channels=4, max_cells=16, min_stride=1)


class Tokens(nn.Module):
    """Sequences (N, T, 16) around a layer or function; in Python if `branches` is set."""

    def __init__(self, mixing, branches=False):
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(16, 16, 1), nn.ReLU(), nn.Conv1d(16, 16, 3, padding=1))
        self.mixing, self.branches = mixing, branches
        self.last, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.first(x.transpose(1, 2)).transpose(1, 2)
        if self.branches and float(x.detach().sum()) > 1e9:
            return x
        y = self.mixing(x) if isinstance(self.mixing, nn.Module) else self.mixing(self, x)
        y = y[0] if isinstance(self.mixing, TUPLES) else y
        return self.head(self.last(x + y).relu().mean(1))


TUPLES = (nn.RNNBase, nn.MultiheadAttention)


class Attends(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)


class Calls(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True)
        self.kwargs = kwargs

    def forward(self, x):
        return self.attention(x, x, x, **self.kwargs)[0]


LAYERS = {
    "attention": lambda: Calls(),
    "attention without weights": lambda: Calls(need_weights=False),
    "a subclass": lambda: Attends(16, 2, dropout=0.5, batch_first=True),
    "LSTM": lambda: nn.LSTM(16, 16, 2, dropout=0.5, batch_first=True),
    "GRU": lambda: nn.GRU(16, 16, 2, dropout=0.5, batch_first=True),
    "RNN": lambda: nn.RNN(16, 16, 2, dropout=0.5, batch_first=True),
    "encoder": lambda: nn.TransformerEncoderLayer(16, 2, 16, 0.5, batch_first=True),
    "rrelu": nn.RReLU,
    "alpha dropout": nn.AlphaDropout,
}


def attend(self, x):
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)


FUNCTIONS = {
    "dropout": lambda self, x: F.dropout(x, 0.5, self.training),
    "by name": lambda self, x: F.dropout(x, p=0.5, training=self.training),
    "of torch": lambda self, x: torch.dropout(x, 0.5, self.training),
    "alpha": lambda self, x: F.alpha_dropout(x, 0.5, self.training),
    "channels": lambda self, x: F.dropout1d(x, 0.5, self.training),
    "rrelu": lambda self, x: F.rrelu(x, training=self.training),
    "attention": attend,
}


def assert_held(network):
    torch.manual_seed(0)
    x = torch.randn(3, 7, 16)
    network.eval()
    model = convert(network, DA3Config(ADAPTER, None, head=None)).train()
    want = network(x)
    assert_relatively_close(model(x), want, 1e-5)
    model.add_domain("a")
    model.set_domain("a")
    model.train()
    assert_relatively_close(model(x), want, 1e-5)
    return model


@pytest.mark.parametrize("branches", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, branches):
    model = assert_held(Tokens(LAYERS[name](), branches))
    assert model.plan.python or not branches


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_in_what_stays_python(name):
    model = assert_held(Tokens(FUNCTIONS[name], branches=True))
    assert model.plan.python


def test_what_is_random_in_eval_stays_random():
    torch.manual_seed(0)
    network = Tokens(lambda self, x: F.dropout(x, 0.5), branches=True).eval()
    model = convert(network, DA3Config(ADAPTER, None, head=None)).train()
    x = torch.randn(3, 7, 16)
    assert not torch.equal(model(x), model(x))
