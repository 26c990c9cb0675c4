"""What the tests of the programs share."""

import minilm
import pytest
from _examples import need_model


@pytest.fixture(scope="session")
def model():
    need_model()
    return minilm.MiniLM()
