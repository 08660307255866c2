"""What LLaMA's changes to GPT are worth, and how fast training is beside PyTorch.

    pip install -e ".[bench]"
    python bench/training.py speed                      # tokens/s of bard's training by llama_nb and by PyTorch; minutes
    python bench/training.py ablations                  # a GPT, bard, and bard with one part of a GPT each; half an hour to two for every one

`ablations` trains models of the same size on the same windows of the same tokens in the same order, all in the way of chapter 23, and writes how each of them
did to llama_nb/data/ablations.json, from which the chapter makes its table. What is done is kept; a run that was stopped goes on where it was.
"""
import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
from pathlib import Path

import numpy as np

from llama_nb.benchmark import read_bandwidth
from machine import apart, cpu, missing, timed, usable_cores

LLAMA = dict(norm="RMSNorm", positions="RoPE", feed_forward="SwiGLU", biases=False, grouped=True)
GPT = dict(norm="LayerNorm", positions="learned", feed_forward="GELU", biases=True, grouped=False)
SWAPS = {"LayerNorm for RMSNorm": "norm", "learned positions for RoPE": "positions", "GELU for SwiGLU": "feed_forward", "biases": "biases", "no grouped queries": "grouped"}
RUNS = {"GPT": GPT, "LLaMA": LLAMA, "LLaMA, another seed": LLAMA} | {f"LLaMA, {swap}": LLAMA | {part: GPT[part]} for swap, part in SWAPS.items()}


# The models: chapter 7's with its parts exchanged.

def count_parameters(config, parts):
    dim, hidden, kv = config.dim, config.hidden_dim, (config.n_kv_heads if parts["grouped"] else config.n_heads) * config.head_dim
    gated, norms = parts["feed_forward"] == "SwiGLU", 2 * config.n_layers + 1
    block = 2 * dim * dim + 2 * dim * kv + (3 if gated else 2) * dim * hidden
    if parts["biases"]:
        block += 2 * dim + 2 * kv + (2 if gated else 1) * hidden + dim
    table = config.context_length * dim if parts["positions"] == "learned" else 0
    return 2 * config.vocab_size * dim + table + config.n_layers * block + norms * dim * (2 if parts["biases"] and parts["norm"] == "LayerNorm" else 1)


def same_size(config, parts):
    "The configuration with the width of the feed-forward at which the model has as many parameters as the LLaMA."
    wanted = count_parameters(config, LLAMA)
    widths = (dataclasses.replace(config, hidden_dim=width) for width in range(8, 8 * config.dim, 8))
    return min(widths, key=lambda candidate: abs(count_parameters(candidate, parts) - wanted))


def build_variant(config, parts, dtype="float32", initializer="zeros"):
    "Ids to logits, as `build_model`, with the parts asked for."
    import keras
    keras.config.set_dtype_policy(dtype)
    from keras import ops

    from llama_nb.attention import causal_scores, merge_heads, mix_values, split_heads
    from llama_nb.block import RMSNorm
    from llama_nb.embedding import TokenEmbedding, tap
    from llama_nb.rope import RotaryEmbedding

    biases, same = parts["biases"], dict(kernel_initializer=keras.initializers.get(initializer))
    kv_heads = config.n_kv_heads if parts["grouped"] else config.n_heads
    rope = RotaryEmbedding(config.head_dim, config.context_length, config.rope_theta, name="rope")

    def dense(width):
        return keras.layers.Dense(width, use_bias=biases, kernel_initializer=same["kernel_initializer"].clone())

    def norm():
        return RMSNorm(config.norm_eps) if parts["norm"] == "RMSNorm" else keras.layers.LayerNormalization(epsilon=config.norm_eps, center=biases)

    class Positions(keras.layers.Layer):
        "Adds a vector of its own for each position."
        def build(self, shape):
            self.table = self.add_weight((config.context_length, config.dim), same["kernel_initializer"].clone(), name="table")

        def call(self, x):
            return x + self.table[:ops.shape(x)[1]]

    class Block(keras.layers.Layer):
        def build(self, shape):
            wide = dict(wq=config.dim, wk=kv_heads * config.head_dim, wv=kv_heads * config.head_dim, wo=config.dim)
            feed_forward = dict(w1=config.hidden_dim, w3=config.hidden_dim) if parts["feed_forward"] == "SwiGLU" else dict(w1=config.hidden_dim)
            for name, width in (wide | feed_forward).items():
                setattr(self, name, dense(width))
                getattr(self, name).build((None, config.dim))
            self.w2, self.attention_norm, self.ffn_norm = dense(config.dim), norm(), norm()
            self.w2.build((None, config.hidden_dim))
            for layer in (self.attention_norm, self.ffn_norm):
                layer.build(shape)

        def attend(self, x):
            q, k, v = split_heads(self.wq(x), config.n_heads), split_heads(self.wk(x), kv_heads), split_heads(self.wv(x), kv_heads)
            if parts["positions"] == "RoPE":
                q, k = rope(q), rope(k)
            return self.wo(merge_heads(mix_values(ops.softmax(causal_scores(q, k), axis=-1), v)))

        def feed(self, x):
            return self.w2(ops.silu(self.w1(x)) * self.w3(x) if parts["feed_forward"] == "SwiGLU" else ops.gelu(self.w1(x)))

        def call(self, x):
            x = x + tap(f"{self.name}.attention", self.attend(self.attention_norm(x)))
            return x + tap(f"{self.name}.feed_forward", self.feed(self.ffn_norm(x)))

    ids = keras.Input((None,), dtype="int32")
    x = TokenEmbedding(config.vocab_size, config.dim, same["kernel_initializer"].clone(), name="tok_embeddings")(ids)
    if parts["positions"] == "learned":
        x = Positions()(x)
    for number in range(config.n_layers):
        x = Block(name=f"layers.{number}")(x)
    output = keras.layers.Dense(config.vocab_size, use_bias=False, kernel_initializer=same["kernel_initializer"].clone(), name="output")
    return keras.Model(ids, output(norm()(x)))


def ablations(arguments):
    "Trains them all, one after the other."
    from llama_nb.checkpoint import bard_folder
    from llama_nb.vocabularies import load_tokenizer
    from llama_nb.training import BARD, bits_per_byte, fetch_shakespeare, split_plays, train
    config = dataclasses.replace(BARD, dim=arguments.dim, n_layers=arguments.layers, context_length=arguments.context)
    config = dataclasses.replace(config, hidden_dim=8 * round(config.dim * 8 / 3 / 8))
    tokenizer, (texts, held_out) = load_tokenizer(bard_folder()), split_plays(fetch_shakespeare())
    batch_size, out = 2048 // config.context_length, Path(arguments.out)
    settings = dict(config=dataclasses.asdict(config), tokens=arguments.steps * 2048, dropout=arguments.dropout, seed=arguments.seed, dtype=arguments.dtype)
    record = json.loads(out.read_text()) if out.exists() else dict(settings=settings, runs={})
    if record["settings"] != settings:
        sys.exit(f"{out}: holds runs with other settings")
    for name, parts in RUNS.items():
        if name in record["runs"] or arguments.only not in (None, name):
            continue
        sized, seed = same_size(config, parts), arguments.seed + (name == "LLaMA, another seed")
        state = out.parent / f".{out.stem}.{list(RUNS).index(name)}.npz"
        model, log = train(sized, tokenizer, texts, held_out, arguments.steps, batch_size, dropout=arguments.dropout, seed=seed, state=state,
                           measure_every=max(1, arguments.steps // 4), progress=sys.stderr.isatty(),
                           dtype=arguments.dtype, build=lambda config, *options: build_variant(config, parts, *options))
        record["runs"][name] = dict(parts=parts, parameters=model.count_params(), hidden_dim=sized.hidden_dim, loss=log["training"][-1]["loss"],
                                    held_out=log["held_out"], **log["clock"])
        out.write_text(json.dumps(record, indent=1))
        state.unlink()
        print(f"{name:40} {model.count_params():>10,} parameters  {log['held_out'][-1]['bits_per_byte']:.3f} bits per byte", flush=True)


# Speed: contenders give a function that trains on a batch and returns the loss before the step.

def keras_step(threads, batch, dtype="float32", compiled=True):
    import keras
    import tensorflow as tf
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    keras.config.set_dtype_policy(dtype)
    from llama_nb.checkpoint import bard_folder
    from llama_nb.hub import open_checkpoint
    from llama_nb.model import build_model, load_weights
    from llama_nb.training import BARD, compile_for_training
    model = load_weights(build_model(BARD, dtype), open_checkpoint(bard_folder()))
    compile_for_training(model, 1000)
    if not compiled:
        model.jit_compile = False
    inputs, targets = (tf.constant(part) for part in batch)
    return lambda: float(model.train_on_batch(inputs, targets))


def torch_model(config, read):
    "LLaMA in plain PyTorch, with its fused attention."
    import torch
    from torch import nn
    from torch.nn import functional as F

    angles = torch.outer(torch.arange(config.context_length), config.rope_theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim))
    cos, sin = angles.cos(), angles.sin()

    def turn(x):
        real, imaginary = x[..., ::2], x[..., 1::2]
        c, s = cos[:x.shape[2]], sin[:x.shape[2]]
        return torch.stack([real * c - imaginary * s, real * s + imaginary * c], -1).flatten(-2)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            kv = config.n_kv_heads * config.head_dim
            widths = dict(wq=(config.dim, config.dim), wk=(config.dim, kv), wv=(config.dim, kv), wo=(config.dim, config.dim))
            self.attention = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in widths.items()})
            widths = dict(w1=(config.dim, config.hidden_dim), w2=(config.hidden_dim, config.dim), w3=(config.dim, config.hidden_dim))
            self.feed_forward = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in widths.items()})
            self.attention_norm, self.ffn_norm = (nn.RMSNorm(config.dim, config.norm_eps) for _ in range(2))

        def forward(self, x):
            h, part, count = self.attention_norm(x), self.attention, x.shape[:2]
            q, k, v = (part[name](h).view(*count, -1, config.head_dim).transpose(1, 2) for name in ("wq", "wk", "wv"))
            mixed = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True, enable_gqa=True)
            x = x + part["wo"](mixed.transpose(1, 2).flatten(2))
            h, part = self.ffn_norm(x), self.feed_forward
            return x + part["w2"](F.silu(part["w1"](h)) * part["w3"](h))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
            self.layers = nn.ModuleList([Block() for _ in range(config.n_layers)])
            self.norm, self.output = nn.RMSNorm(config.dim, config.norm_eps), nn.Linear(config.dim, config.vocab_size, bias=False)

        def forward(self, ids):
            x = self.tok_embeddings(ids)
            for layer in self.layers:
                x = layer(x)
            return self.output(self.norm(x))

    model = Model()
    model.load_state_dict({name: torch.from_numpy(np.array(read(name), "float32")) for name in config.tensor_shapes()})
    return model


def torch_step(threads, batch, compiled=False, half=False):
    import torch

    from llama_nb.checkpoint import bard_folder
    from llama_nb.hub import open_checkpoint
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(bard_folder())
    model = torch_model(checkpoint.config, checkpoint.read)
    inputs, targets = (torch.from_numpy(part.astype("int64")) for part in batch)
    vectors, matrices = ([p for p in model.parameters() if (p.dim() < 2) == flat] for flat in (True, False))
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    optimizer, forward = torch.optim.AdamW(groups, lr=2e-5, betas=(0.9, 0.95)), torch.compile(model) if compiled else model

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = forward(inputs)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())
    return step


CONTENDERS = {
    "llama_nb": keras_step, "llama_nb, no XLA": functools.partial(keras_step, compiled=False),
    "llama_nb, bfloat16": functools.partial(keras_step, dtype="mixed_bfloat16"),
    "PyTorch": torch_step, "PyTorch, compiled": functools.partial(torch_step, compiled=True),
    "PyTorch, bfloat16": functools.partial(torch_step, half=True), "PyTorch, compiled, bfloat16": functools.partial(torch_step, compiled=True, half=True)}
NEEDS = {name: ["torch"] if name.startswith("PyTorch") else ["tensorflow"] for name in CONTENDERS}


def work(name, threads, batch, repeats):
    step = CONTENDERS[name](threads, np.array(batch, "int32"))
    first = step()
    for _ in range(2):
        step()
    return dict(loss=first, seconds=statistics.median(timed(step)[0] for _ in range(repeats)))


def speed(arguments):
    "Times the contenders in turn, each in a process of its own."
    from llama_nb.checkpoint import bard_folder
    from llama_nb.vocabularies import load_tokenizer
    from llama_nb.training import BARD, batches, encode_texts, fetch_shakespeare
    ids = encode_texts(load_tokenizer(bard_folder()), [fetch_shakespeare()["hamlet"]])
    batch = [part.numpy().tolist() for part in next(iter(batches(ids, BARD.context_length, arguments.batch)))]
    absent = {name: missing(packages) for name, packages in NEEDS.items() if missing(packages)}
    results, speeds, failed = {name: [] for name in CONTENDERS if name not in absent}, [], {}
    for _ in range(arguments.rounds):
        speeds.append(read_bandwidth(arguments.threads))
        for name in list(results):
            try:
                results[name].append(apart(__file__, dict(name=name, threads=arguments.threads, batch=batch, repeats=arguments.repeats)))
            except RuntimeError as error:
                failed[name] = str(error)
                del results[name]
    best = {name: min(runs, key=lambda run: run["seconds"]) for name, runs in results.items()}
    model, flags = cpu()
    return dict(parameters=BARD.n_parameters, batch=arguments.batch, length=BARD.context_length, cpu=model, flags=flags, cores=os.cpu_count(), threads=arguments.threads,
                bandwidth=max(speeds), results=best, absent=absent, failed=failed)


def report(run):
    yield f"training bard, {run['parameters']:,} parameters, {run['batch']} x {run['length']} tokens a step, float32 where nothing else is said"
    yield f"{run['cpu']} ({' '.join(run['flags'])}), {run['cores']} cores, {run['threads']} threads; read bandwidth {run['bandwidth'] / 1e9:.1f} GB/s"
    yield ""
    tokens = run["batch"] * run["length"]
    for name, result in run["results"].items():
        same = run["results"].get(name.replace("PyTorch, compiled", "PyTorch").replace("PyTorch", "llama_nb"))
        ratio = f"   llama_nb, same precision: x{result['seconds'] / same['seconds']:.2f}" if same and name.startswith("PyTorch") else ""
        yield f"{name:28}{tokens / result['seconds']:>10.0f} tokens/s{6 * run['parameters'] * tokens / result['seconds'] / 1e9:>8.0f} GFLOPS   first loss {result['loss']:.4f}{ratio}"
    for name, packages in run["absent"].items():
        yield f"{name}: not compared, {' and '.join(packages)} not installed"
    for name, error in run["failed"].items():
        yield f"{name}: did not run ({error})"


def main():
    if sys.argv[1:] == ["--worker"]:
        return print(json.dumps(work(**json.loads(sys.stdin.read()))))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("speed", help="tokens/s beside PyTorch")
    one.add_argument("-t", "--threads", type=int, default=usable_cores())
    one.add_argument("--batch", type=int, default=8)
    one.add_argument("--repeats", type=int, default=10, help="steps to take the median of (default: %(default)s)")
    one.add_argument("--rounds", type=int, default=2, help="turns of each contender (default: %(default)s)")
    one.add_argument("--json", action="store_true", help="print one JSON object")
    two = commands.add_parser("ablations", help="the value of each of LLaMA's changes")
    two.add_argument("--out", default=Path(__file__).resolve().parent.parent / "llama_nb/data/ablations.json")
    two.add_argument("--steps", type=int, default=6400, help="of 2,048 tokens each (default: %(default)s)")
    for name, value in dict(dim=256, layers=5, context=256, seed=0).items():
        two.add_argument(f"--{name}", type=int, default=value, help="(default: %(default)s)")
    two.add_argument("--dropout", type=float, default=0.1)
    two.add_argument("--dtype", default="mixed_bfloat16", help="what the layers compute in (default: %(default)s)")
    two.add_argument("--only", choices=list(RUNS), help="train this one")
    arguments = parser.parse_args()
    if arguments.command == "ablations":
        return ablations(arguments)
    run = speed(arguments)
    print(json.dumps(run) if arguments.json else "\n".join(report(run)))


if __name__ == "__main__":
    main()
