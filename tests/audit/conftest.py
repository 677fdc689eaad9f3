"""The fake model as a fixture."""

from types import ModuleType

import pytest

from fastsafe_testing import fake_model


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    return fake_model
