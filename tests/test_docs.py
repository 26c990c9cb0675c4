"""The examples in the docstrings of everything public run as doctests."""

import doctest

import pytest

import qkv_fast

FUNCTIONS = sorted(name for name in qkv_fast.__all__ if callable(getattr(qkv_fast, name)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples(name):
    tests = doctest.DocTestFinder(recurse=False).find(getattr(qkv_fast, name), name, globs={})
    assert sum(len(test.examples) for test in tests) > 0, f"{name} has no example"
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test)
    assert runner.failures == 0
