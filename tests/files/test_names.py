"""Names that are file names everywhere, and of different files."""

import pytest

from lightning_da3 import DomainError
from lightning_da3.files.names import check_apart, check_name


@pytest.mark.parametrize("name", ["CON", "con", "nul", "Aux", "prn", "COM1", "lpt9"])
def test_names_of_devices(name):
    with pytest.raises(DomainError, match="on Windows a file of that name is a device"):
        check_name(name)


@pytest.mark.parametrize("name", ["nul.txt", "a.", "a ", " a", "con.", "a\n", "ä", "A:b", 3, None])
def test_names_that_some_systems_change(name):
    with pytest.raises(DomainError, match="cannot name a domain"):
        check_name(name)


@pytest.mark.parametrize("name", ["console", "com", "COM10", "null", "aux_1"])
def test_names_that_only_begin_like_a_device_are_names(name):
    check_name(name)


def test_names_that_differ_by_case_alone():
    check_apart("a", [])
    check_apart("a", ["a", "ab", "B"])
    with pytest.raises(DomainError, match="'A' and 'a' differ by case alone"):
        check_apart("A", ["b", "a"])
    check_apart("A", ["A", "a"])  # a system that keeps them apart
