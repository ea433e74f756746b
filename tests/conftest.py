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
