"""What tests of domains share."""

import contextlib

import pytest
import torch


@torch.no_grad()
def shake_(model, domain, scale=0.3):
    for parameter in model.domain(domain).parameters():
        parameter.add_(torch.randn_like(parameter) * scale)


def refused(error, *parts):
    """A context that must raise `error` with all these phrases in its message."""

    @contextlib.contextmanager
    def context():
        with pytest.raises(error) as caught:
            yield
        for part in parts:
            assert part in str(caught.value)

    return context()
