import contextlib
import os
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from llama_nb.checkpoint import CheckpointError
from llama_nb.files import cache_folder
from llama_nb.hub import find_model
from llama_nb.quantization import divergence
from llama_nb.sampling import Sampler

ROOT = Path(__file__).resolve().parent.parent


def complaint(action, *arguments, **options):
    "The one line of the CheckpointError that must be raised."
    with pytest.raises(CheckpointError) as caught:
        action(*arguments, **options)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# What rounding may do to the logits of bard on an 8-bit engine, another CPU's kernels and passes of another size included. One step of noise in
# three of a hundred inputs (tests/noise) moves them by 0.5 at most, 0.05 in the mean, at a divergence of 0.001.
ROUNDING = dict(largest=1.6, divergence=0.01)


def same_but_for_rounding(expected, found):
    "Logits (tokens, vocab) of the same tokens, computed in two ways by an 8-bit engine."
    assert np.abs(found - expected).max() <= ROUNDING["largest"]
    assert divergence(expected[None], found[None]) <= ROUNDING["divergence"]


def watched(stream):
    "A stream that keeps the logits which each of its tokens was chosen from."
    choose, stream.seen = stream.choose, []

    def chooser(logits, ids):
        stream.seen.append(np.array(logits))
        return choose(logits, ids)
    stream.choose = chooser
    return stream


def written_as_alone(llm, stream, **sampling):
    """Whatever computed the logits of a watched stream (several texts, guesses, stages elsewhere), they are those of one plain pass of `llm`
    but for rounding, and each token is the sampler's choice from them, one draw a token. Texts themselves may part at near ties."""
    ids = stream.prompt_ids + stream.new_ids
    first, end = len(stream.prompt_ids), len(ids)
    same_but_for_rounding(llm.logits(ids)[first - 1:end - 1], np.array(stream.seen[:end - first]))
    choose = Sampler(**sampling).chooser()
    assert [choose(logits, ids[:place]) for place, logits in zip(range(first, end), stream.seen)] == stream.new_ids


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    "What tests convert and pack goes to a folder of their own; fetched files and compiled loops are found where they are."
    folder = tmp_path_factory.mktemp("cache")
    with contextlib.suppress(CheckpointError): find_model("smollm2-135m-instruct")
    for file in cache_folder().glob("[!.]*.*"):
        if file.is_file(): (folder / file.name).symlink_to(file)
    (cache_folder() / "compiled").mkdir(parents=True, exist_ok=True)
    (folder / "compiled").symlink_to(cache_folder() / "compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_NB_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def bard():
    "Our own small model, loaded once for all tests that only read from it."
    import llama_nb
    return llama_nb.load("bard", dtype="float32")


@pytest.fixture(scope="session")
def smollm2():
    "SmolLM2-135M-Instruct, loaded once for all tests that only read from it."
    import llama_nb
    return llama_nb.load("smollm2-135m-instruct", dtype="float32")
