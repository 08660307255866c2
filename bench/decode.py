"""Prefill and decode of SmolLM2-135M in float32, by llama_nb and by its peers: same file, same prompt, same threads, one run.

    pip install -e ".[bench]"
    python bench/decode.py                  # all cores; about three minutes on two
    python bench/decode.py --json > speed.json

Each contender works in a process of its own, one after another, in turn for as many rounds as asked for; the medians of its best round count.
The read bandwidth is measured between them, since decoding reads every weight once for each token: bandwidth / bytes per token is the limit.
"""
import argparse
import json
import os
import statistics
import sys

import numpy as np

from llama_nb.benchmark import read_bandwidth
from machine import apart, cpu, missing, timed, usable_cores

MODEL = "smollm2-135m-instruct"
CONTEXTS = (125, 250, 500, 1000)
TEXT = "Bees are flying insects known for their part in pollination and, in the best-known species, for making honey. " * 60


# The contenders: each gives (start over, ids -> logits of the last position). Only new ids are computed.

def llama_nb(threads):
    import llama_nb
    decoder = llama_nb.load(MODEL, dtype="float32", threads=threads).decoder
    return decoder.forget, decoder.advance


def transformers(threads):
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.utils import logging

    from llama_nb.hub import fetch
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    path = fetch(MODEL, progress=False)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    state = {}

    def reset():
        state.update(cache=DynamicCache(), known=0)

    @torch.inference_mode()
    def advance(ids):
        new = torch.tensor([ids[state["known"]:]])
        state["known"] = len(ids)
        return model(new, past_key_values=state["cache"], use_cache=True, logits_to_keep=1).logits[0, -1].numpy()
    return reset, advance


CONTENDERS = {"llama_nb": llama_nb, "transformers": transformers}
NEEDS = {"llama_nb": ["tensorflow"], "transformers": ["torch", "transformers"]}


def work(name, threads, ids, prompt, new, repeats, contexts):
    "Times one contender: a prompt read from nothing, tokens after it, and tokens after longer and longer contexts."
    reset, advance = CONTENDERS[name](threads)

    def prefill(length):
        reset()
        return timed(advance, ids[:length])

    def decode(given, logits, count):
        given, seconds = list(given), []
        for _ in range(count):
            given.append(int(np.argmax(logits)))
            elapsed, logits = timed(advance, given)
            seconds.append(elapsed)
        return statistics.median(seconds), given[-count:]

    for _ in range(2):
        _, logits = prefill(prompt)
        decode(ids[:prompt], logits, 2)
    prefills = [prefill(prompt) for _ in range(repeats)]
    seconds, written = decode(ids[:prompt], prefills[-1][1], new)
    at_context = {}
    for length in contexts:
        _, logits = prefill(length)
        at_context[length], _ = decode(ids[:length], logits, max(4, new // 4))
    return dict(prefill=statistics.median(elapsed for elapsed, _ in prefills), decode=seconds, at_context=at_context, written=written)


# One run.

def run_worker(name, arguments, ids):
    "`work` in a process of its own."
    call = dict(name=name, threads=arguments.threads, ids=ids, prompt=arguments.prompt, new=arguments.new, repeats=arguments.repeats, contexts=arguments.contexts)
    try:
        return apart(__file__, call)
    except RuntimeError as error:
        sys.exit(f"{name}: {error}")


def measure(arguments):
    from llama_nb.library import describe
    from llama_nb.vocabularies import load_tokenizer
    from llama_nb.hub import fetch
    about = describe(MODEL)
    ids = load_tokenizer(fetch(MODEL, progress=False)).encode(TEXT)
    ids = ids[:max(arguments.prompt, *arguments.contexts)]
    absent = {name: missing(packages) for name, packages in NEEDS.items() if missing(packages)}
    rounds, speeds = {name: [] for name in CONTENDERS if name not in absent}, []
    for _ in range(arguments.rounds):
        speeds.append(read_bandwidth(arguments.threads))
        for name, results in rounds.items():
            results.append(run_worker(name, arguments, ids))
    best = {name: min(results, key=lambda result: result["decode"]) for name, results in rounds.items()}
    model, flags = cpu()
    position_bytes = 2 * about["n_layers"] * about["n_kv_heads"] * about["dim"] // about["n_heads"] * 4
    bytes_per_token = about["weights_bytes"] + position_bytes * (arguments.prompt + arguments.new // 2)
    return dict(model=MODEL, dtype="float32", cpu=model, flags=flags, cores=os.cpu_count(), threads=arguments.threads, prompt=arguments.prompt, new=arguments.new,
                bandwidth=max(speeds), bytes_per_token=bytes_per_token, limit=max(speeds) / bytes_per_token, absent=absent, results=best)


def report(run):
    "The run as lines to read."
    yield f"{run['model']}, {run['dtype']}: a prompt of {run['prompt']} tokens, then {run['new']} more"
    yield f"{run['cpu']} ({' '.join(run['flags'])}), {run['cores']} cores, {run['threads']} threads"
    yield f"read bandwidth {run['bandwidth'] / 1e9:.1f} GB/s; {run['bytes_per_token'] / 1e6:.0f} MB read for each token; so at most {run['limit']:.1f} tokens/s decoded"
    yield ""
    yield f"{'':14}{'prefill':>16}{'decode':>16}{'of the limit':>14}"
    for name, result in run["results"].items():
        yield f"{name:14}{run['prompt'] / result['prefill']:>12.0f} t/s{1 / result['decode']:>12.1f} t/s{100 / result['decode'] / run['limit']:>12.0f} %"
    ours = run["results"].get("llama_nb")
    for name, result in run["results"].items():
        if ours and name != "llama_nb":
            same = sum(a == b for a, b in zip(ours["written"], result["written"]))
            yield f"{'llama_nb / ' + name}: prefill ×{result['prefill'] / ours['prefill']:.2f}, decode ×{result['decode'] / ours['decode']:.2f} ({same} of {run['new']} tokens the same)"
    for name, packages in run["absent"].items():
        yield f"{name}: not compared, {' and '.join(packages)} not installed"
    yield ""
    for name, result in run["results"].items():
        costs = {int(length): seconds * 1e3 for length, seconds in result["at_context"].items()}
        first = costs[min(costs)]
        rise = max(costs.values()) / first - 1
        yield (f"{name}: ms a token after " + ", ".join(f"{length:,}: {cost:.1f}" for length, cost in costs.items())
               + f" tokens of context; at most {100 * rise:+.0f} % ({'flat' if rise <= 0.3 else 'not flat'} within 30 %)")


def main():
    if sys.argv[1:] == ["--worker"]:
        return print(json.dumps(work(**json.loads(sys.stdin.read()))))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-t", "--threads", type=int, default=usable_cores())
    parser.add_argument("--prompt", type=int, default=128, help="tokens to prefill (default: %(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens to decode (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="prefills to take the median of (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="lengths at which a token's cost is measured")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    run = measure(arguments)
    print(json.dumps(run) if arguments.json else "\n".join(report(run)))


if __name__ == "__main__":
    main()
