"""Every invariant's test can fail: each of `mutants.py`'s mutations makes its test fail."""

import importlib.util
import inspect
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

TESTS = Path(__file__).resolve().parents[1]


@cache
def load(path: str) -> ModuleType:
    """The module in a file below tests/ (which is no package), by path."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_mutated", TESTS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MUTANTS = load("property/mutants.py").MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.test.split('::')[1]}-{mutant.function.__qualname__}")
def test_under_its_mutation_the_test_fails(mutant, request, monkeypatch):
    file, name = mutant.test.split("::")
    test = getattr(load(file), name)
    fixtures = {name: request.getfixturevalue(name) for name in inspect.signature(test).parameters}
    monkeypatch.setattr(mutant.target, "__code__", mutant.code())
    with pytest.raises(AssertionError):
        test(**fixtures)
