"LLaMA in TensorFlow and Keras: the package that the book's chapters build. Public names are loaded when they are first used."
__version__ = "0.1.0"

import importlib
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

_home = {
    "load": "library",
    "load_tokenizer": "vocabularies",
    "open_checkpoint": "hub",
    "Llama": "generation",
    "LlamaConfig": "checkpoint",
    "Sampler": "sampling",
    "trace": "inside",
    "CheckpointError": "checkpoint",
    "TokenizerError": "tokenizer",
    "GenerationError": "sampling",
}
__all__ = list(_home)


def __getattr__(name):
    if name in _home:
        return getattr(importlib.import_module(f"llama_nb.{_home[name]}"), name)
    raise AttributeError(f"module 'llama_nb' has no attribute {name!r}")


def __dir__():
    return [*globals(), *__all__]
