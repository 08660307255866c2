import os
from pathlib import Path

import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from llama_nb.checkpoint import CheckpointError

ROOT = Path(__file__).resolve().parent.parent


def complaint(action, *arguments, **options):
    "The one line of the CheckpointError that must be raised."
    with pytest.raises(CheckpointError) as caught:
        action(*arguments, **options)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def bard():
    "Our own small model, loaded once for all tests that only read from it."
    import llama_nb
    return llama_nb.load("bard")


@pytest.fixture(scope="session")
def smollm2():
    "SmolLM2-135M-Instruct, loaded once for all tests that only read from it."
    import llama_nb
    return llama_nb.load("smollm2-135m-instruct")
