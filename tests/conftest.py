"""What all tests share."""

import pytest

COMPARING = ("test_converting.py", "test_zoo.py", "test_docs.py", "test_cli.py")


@pytest.fixture(autouse=True, scope="module")
def _conversions(request):
    """Most tests convert without comparing, as the comparison has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name not in COMPARING and "verifying" not in request.path.parts:
            patch.setattr("lightning_da3.converting._has_values", lambda _: False)
        yield


def pytest_collection_modifyitems(items):
    """Workers that run tests side by side must find the same names: no addresses in them."""
    odd = [item.nodeid for item in items if " at 0x" in item.nodeid]
    assert not odd, f"name the parameters of {odd}"
