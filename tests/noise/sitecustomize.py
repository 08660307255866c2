"""Rounds as another CPU might: Python runs this file at its start where tests/noise is on PYTHONPATH.

With LLAMA_NB_NOISE=SEED, before each program of the engine a few per cent of the values that it will round to 8 bits are moved
by one step, and as many of the keys and values on their way to the cache. The same values in a pass of the same size
move in the same way, as they would on any one machine; in a pass of another size, which may have other kernels, in another.
"""
import hashlib
import importlib.abc
import importlib.machinery
import os
import sys
import threading

SHARE = 0.03
INPUT_NORMS = {"before": "attention_norm", "after": "ffn_norm", "head": "norm_weight"}


def generator(*parts):
    import numpy as np
    content = b"".join(part if isinstance(part, bytes) else repr(part).encode() for part in parts)
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))


def moves(row, step, *key):
    "One step up or down for a share of the elements of a row, 0 for the others."
    import numpy as np
    random = generator(os.environ["LLAMA_NB_NOISE"], row.tobytes(), *key)
    return np.where(random.random(row.shape) < SHARE, step * random.choice((-1, 1), row.shape), 0).astype(np.float32)


def input_steps(rows, norm, eps=1e-5):
    "How far each input of a norm would have to move for what comes out of it to move by one step of 255."
    import numpy as np
    size = np.sqrt(np.mean(rows * rows, axis=-1, keepdims=True) + eps)
    normed = rows / size * norm
    step = (np.maximum(normed.max(-1), 0) - np.minimum(normed.min(-1), 0))[:, None] / 255
    heavy = np.abs(norm) > 1e-3 * np.abs(norm).max()
    return np.where(heavy, step * size / np.where(heavy, norm, 1), 0)


within_a_pass = threading.local()


def during_passes(cls, name):
    "Notes that the engine is computing while this method runs: a program that is run by itself, to see how it rounds, isn't disturbed."
    plain = getattr(cls, name)

    def method(self, *arguments, **named):
        within_a_pass.now = True
        try:
            return plain(self, *arguments, **named)
        finally:
            within_a_pass.now = False
    setattr(cls, name, method)


def disturb_program(cls):
    "Makes the engine's `Program` compute from disturbed values, and leave the undisturbed ones behind."
    import numpy as np
    plain_init, plain_run = cls.__init__, cls.run

    def init(self, path, *arguments, **named):
        plain_init(self, path, *arguments, **named)
        self.path = path

    def norm_of(self, entry):
        if not hasattr(self, "norms"):
            from llama_nb.conversion import read_program
            weights = read_program(self.path)
            self.norms = {entry: np.array(weights[norm]) for entry, norm in INPUT_NORMS.items() if norm in weights}
        return self.norms[entry]

    def run(self, entry, rows):
        if not getattr(within_a_pass, "now", False):
            return plain_run(self, entry, rows)
        x, count = rows.arrays["x"], rows.count
        steps = input_steps(x, norm_of(self, entry))
        moved = np.array([moves(row, step, entry, count) for row, step in zip(x, steps)])
        kept = x.copy()
        x += moved
        if entry == "after":
            mixed = rows.arrays["mixed"]
            step = (np.maximum(mixed.max(-1), 0) - np.minimum(mixed.min(-1), 0)) / 255
            mixed += np.array([moves(row, one, "mixed", count) for row, one in zip(mixed, step)])
        plain_run(self, entry, rows)
        if entry == "after":
            x -= moved
        else:
            x[:] = kept
        if entry == "before":
            cached = rows.arrays["qkv"][:, x.shape[1]:]
            cached += np.array([moves(row, np.abs(row).max() / 127, "cache", count) for row in cached])

    cls.__init__, cls.run = init, run


def disturb(namespace):
    "Disturbs what there is of the engine's classes in a namespace, each once."
    found = {name: namespace.get(name) for name in ("Program", "Blocks", "Engine")}
    for name, cls in found.items():
        if not isinstance(cls, type) or "disturbed" in vars(cls) or cls.__module__ not in ("__main__", "llama_nb.engine"):
            continue
        if name == "Program":
            disturb_program(cls)
        else:
            during_passes(cls, {"Blocks": "run", "Engine": "logits"}[name])
        cls.disturbed = True


def in_notebooks(module):
    "Chapters that define the engine, cell by cell: what the cells before have defined is disturbed before each."
    begin = module.InteractiveShell.init_events

    def init_events(self):
        begin(self)
        self.events.register("pre_execute", lambda: disturb(self.user_ns))
    module.InteractiveShell.init_events = init_events


AFTER = {"llama_nb.engine": lambda module: disturb(vars(module)), "IPython.core.interactiveshell": in_notebooks}


class Watch(importlib.abc.MetaPathFinder):
    "Calls what AFTER names once a module has been imported."

    def find_spec(self, name, path, target=None):
        if name not in AFTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            AFTER[name](module)
        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("LLAMA_NB_NOISE"):
    sys.meta_path.insert(0, Watch())
