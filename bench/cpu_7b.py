"""A 7B LLaMA on this CPU, by llama_nb and by what people install instead; SmolLM2-135M too. Random weights: speed doesn't know the difference.

    pip install -e ".[bench]"
    python bench/cpu_7b.py                        # everything; about an hour on two cores, 30 GB of disk, 16 GB of memory
    python bench/cpu_7b.py "7B llama.cpp Q4_0"    # one contender
    python bench/cpu_7b.py --layers 2             # a try in minutes
    python bench/cpu_7b.py --report               # the figures measured so far

Each contender's model is made, measured in a process of its own, and deleted, one after another (one that is there already is used and kept). Each result
is a line of build/bench/cpu_7b.jsonl, so a run that was stopped goes on where it was. The read bandwidth is measured before each token that is decoded, since it
changes from one minute to the next on a machine that is shared: decoding reads every weight and the cache of keys and values once for each token, so that bandwidth / bytes is the limit.
"""
import argparse
import dataclasses
import datetime
import functools
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import peers
from llama_nb.meta import config_from_params
from llama_nb.checkpoint import SIZES, LlamaConfig
from llama_nb.hub import fetch
from llama_nb.hub import open_checkpoint
from llama_nb.conversion import calibration_text
from llama_nb.benchmark import memory_reader, write_random_gguf
from machine import apart, command, cpu, missing, peak_memory, say, timed, usable_cores, version

SMALL = "smollm2-135m-instruct"
RESULTS = "cpu_7b.jsonl"
CONTEXT = 2048
NEAR, FAR, PROMPT, NEW = 128, 2000, 512, 16
READ = 2**28                # bytes that are read to measure the bandwidth
FIGURES = {f"decode {NEAR}": 1, f"prefill {PROMPT}": PROMPT, f"decode {FAR}": 1}      # the tokens that a figure's seconds are for


# llama_nb itself.

def synthesize(path, config):
    command("synth", path, "--like", "7B", "--layers", config.n_layers)


def convert(path, config, dtype):
    source = SMALL if config.tied else path.with_name("source")
    try:
        if not config.tied:
            synthesize(source, config)
        command("convert", source, path, "--dtype", dtype)
    finally:
        if not config.tied:
            shutil.rmtree(source, ignore_errors=True)


def llama_nb(path, config, threads, context):
    "A converted model, which has been loaded once: the second time counts."
    command("generate", "-m", path, "-p", "Bees", "-n", 1)
    import llama_nb.engine
    import llama_nb.library
    yield
    llm = llama_nb.library.load(path, threads=threads, context_length=context)
    yield "", llm.decoder.forget, llm.decoder.advance
    return {"eight sequences at once": eight_at_once(llm.engine)} | {f"guessed tokens, {kind}": guessing(llm, *texts) for kind, texts in TEXTS.items()}


def keras(path, config, threads, context):
    "The Keras model in bfloat16: chapter 19's oracle."
    import llama_nb.generation
    import llama_nb.library
    yield
    decoder = llama_nb.library.load(path, dtype="bfloat16", threads=threads, context_length=context).decoder
    yield "", decoder.forget, decoder.advance


def eight_at_once(engine):
    "Tokens a second of eight texts that grow together, over those of one."
    from llama_nb.batching import Batch

    def rate(count):
        rng, batch = np.random.default_rng(0), Batch(engine, count, NEAR + NEW)
        texts = {slot: rng.integers(100, engine.config.vocab_size, NEAR).tolist() for slot in range(count)}
        batch.advance(texts)
        seconds = []
        for _ in range(NEW):
            texts = {slot: [*ids, 100] for slot, ids in texts.items()}
            seconds.append(timed(batch.advance, texts)[0])
        return count / statistics.median(seconds)
    return rate(8) / rate(1)


CODE = '''
def mean_temperature(readings, station):
    """The mean temperature at a station."""
    total = 0.0
    count = 0
    for reading in readings:
        if reading.station == station:
            total += reading.temperature
            count += 1
    if count == 0:
        raise ValueError(f"no readings for station {station}")
    return total / count
'''
ARTICLE = """Wild bees need two things from a garden: food from early spring until late autumn, and a place to nest. Most of the 560 species of the region live alone and dig their nests into
bare, sunny soil; others use hollow stems or old beetle holes in dead wood. Native flowers with single blossoms give more nectar and pollen than double ones, whose stamens have been bred into petals. Insecticides harm
bees even where they do not kill them: animals that have taken up small doses no longer find their way home. A shallow dish of water with stones to land on helps in hot summers."""
SUMMARY = """ Wild bees need food from early spring until late autumn, and a place to nest. Most species live alone and dig their nests into bare, sunny soil; others use hollow stems or old beetle
holes in dead wood. Native flowers with single blossoms give more nectar and pollen than double ones. Insecticides harm bees even where they do not kill them. A shallow dish of water helps in hot summers."""
TEXTS = {
    "a program edited": (f"{CODE}\nThe same with the weight of each reading:\n", CODE.replace("+= reading.temperature", "+= reading.weight * reading.temperature").replace("+= 1", "+= reading.weight").replace("mean", "weighted_mean")),
    "a summary": (ARTICLE, SUMMARY),
    "new text": (SUMMARY, calibration_text()),
}


def guessing(llm, prompt, answer):
    "Tokens a second with guesses from the text so far, over those without, where the model writes just this answer."
    from llama_nb.batching import PromptLookup
    from llama_nb.vocabularies import load_tokenizer
    tokenizer, most, decoder = load_tokenizer(fetch(SMALL, progress=False)), llm.config.vocab_size, llm.decoder
    prompt, ids = ([id % most for id in tokenizer.encode(text)] for text in (prompt, prompt + answer))

    def seconds(advance):
        decoder.forget()
        advance(ids[:len(prompt)])
        return timed(lambda: [advance(ids[:end]) for end in range(len(prompt) + 1, len(ids))])[0]
    plain, guessed, again = (seconds(way) for way in (decoder.advance, PromptLookup(decoder).advance, decoder.advance))
    return (plain + again) / 2 / guessed


# The contenders.

@dataclasses.dataclass
class Contender:
    open: Callable              # (path, config, threads, context) yields when it has imported, then sessions; may return other ratios by name
    needs: str                  # a package
    bits: float                 # that a weight takes, its share of the scales included
    cache: int                  # bytes of a number in the cache of keys and values
    make: Callable | None       # (path, config) writes the model


CONTENDERS = {
    "7B llama_nb int4": Contender(llama_nb, "ai-edge-litert", 4.33, 1, functools.partial(convert, dtype="int4")),
    "7B llama_nb int8": Contender(llama_nb, "ai-edge-litert", 8, 1, functools.partial(convert, dtype="int8")),
    "7B llama.cpp Q4_0": Contender(peers.llama_cpp, "llama-cpp-python", 4.5, 2, functools.partial(write_random_gguf, kind="Q4_0")),
    "7B llama.cpp Q8_0": Contender(peers.llama_cpp, "llama-cpp-python", 8.5, 2, functools.partial(write_random_gguf, kind="Q8_0")),
    "7B OpenVINO int4": Contender(peers.openvino, "openvino", 4.125, 1, functools.partial(peers.write_openvino, bits=4)),
    "7B OpenVINO int8": Contender(peers.openvino, "openvino", 8, 1, functools.partial(peers.write_openvino, bits=8)),
    "SmolLM2 llama_nb int4": Contender(llama_nb, "ai-edge-litert", 4.33, 1, functools.partial(convert, dtype="int4")),
    "SmolLM2 llama_nb int8": Contender(llama_nb, "ai-edge-litert", 8, 1, functools.partial(convert, dtype="int8")),
    "SmolLM2 llama.cpp Q4_1": Contender(peers.llama_cpp, "llama-cpp-python", 5.74, 2, None),
    "7B llama_nb bfloat16": Contender(keras, "keras", 16, 2, synthesize),
    "7B transformers bfloat16": Contender(peers.transformers, "transformers", 16, 2, None),
}


def shape(name, layers):
    if name.startswith("SmolLM2"):
        return open_checkpoint(fetch(SMALL, progress=False)).config
    return config_from_params(SIZES["7B"] | ({"n_layers": layers} if layers else {}), 32000)


def bytes_per_token(contender, config, context):
    "The matrices (of the embedding table one row only, unless it is the output too) and the cache."
    weights = sum(np.prod(shape) for name, shape in config.tensor_shapes().items() if name != "tok_embeddings.weight" or config.tied)
    return weights * contender.bits / 8 + 2 * config.n_layers * config.n_kv_heads * config.head_dim * context * contender.cache


# One contender: its model, and its times, each in a process of its own.

def make(name, path, threads, layers):
    CONTENDERS[name].make(Path(path), shape(name, layers))


def measure_times(name, path, threads, layers, repeats, near):
    "Each figure's seconds, by setting; and what it took to get there."
    config, read, speeds = shape(name, layers), memory_reader(threads, READ), {}
    figures = {figure: {} for figure in list(FIGURES)[:2 if near else 3]}
    ids = np.random.default_rng(0).integers(100, config.vocab_size, FAR).tolist()
    sessions = CONTENDERS[name].open(Path(path), config, threads, CONTEXT)

    def decode(given):
        logits, seconds, figure = advance(given), [], f"decode {len(given)}"
        for _ in range(NEW):
            given = given + [int(np.argmax(logits))]
            speeds.setdefault(figure, {}).setdefault(setting, []).append(read())
            elapsed, logits = timed(advance, given)
            seconds.append(elapsed)
        if not np.isfinite(logits).all():
            raise RuntimeError("logits that are no numbers")
        return seconds

    def prefill():
        reset()
        return timed(advance, ids[:PROMPT])[0]

    next(sessions)
    load, session = timed(next, sessions)
    while True:
        setting, reset, advance = session
        reset()
        advance(ids[:NEAR // 2])
        measures = [lambda: decode(ids[:NEAR]), lambda: [prefill() for _ in range(repeats)], lambda: decode(ids)]
        for figure, seconds in zip(figures, measures):
            figures[figure][setting] = seconds()
        try:
            session = next(sessions)
        except StopIteration as end:
            return dict(load=load, peak=peak_memory() - READ, figures=figures, speeds=speeds, ratios=end.value or {})


def medians(runs, kind, figure):
    "The median of all runs' `figures` (seconds) or `speeds` (bytes a second), by setting."
    found = {}
    for run in runs:
        for setting, values in run[kind].get(figure, {}).items():
            found.setdefault(setting, []).extend(values)
    return {setting: statistics.median(values) for setting, values in found.items()}


def best(runs, figure):
    "Median seconds in the setting where they are least, and that setting; None if it wasn't measured."
    return min(((seconds, setting) for setting, seconds in medians(runs, "figures", figure).items()), default=None)


# One run.

def place(name, arguments):
    if not CONTENDERS[name].make:
        return Path(fetch(SMALL, progress=False))
    layers = f"-{arguments.layers}-layers" if arguments.layers else ""
    return arguments.folder / (name.replace(" ", "-") + layers)


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def measure(name, arguments):
    "Makes a contender's model, measures it, deletes it."
    contender, path, made = CONTENDERS[name], place(name, arguments), None
    call = dict(name=name, path=str(path), threads=arguments.threads, layers=arguments.layers)
    partial = path.with_name(path.name + ".part")
    try:
        if contender.make and not path.exists():
            say(name, "being made")
            remove(partial)
            made, _ = timed(apart, __file__, call | dict(work="make", path=str(partial)))
            partial.rename(path)
        busy = os.getloadavg()[0]
        say(name, "being measured")
        found = apart(__file__, call | dict(work="measure", repeats=arguments.repeats, near=arguments.near))
        return dict(contender=name, version=version(contender.needs), made=made, busy=busy, **found)
    finally:
        remove(partial)
        if made and not arguments.keep:
            remove(path)


def results(arguments):
    "The runs of each contender on this machine, from the results file."
    found, file = {}, arguments.folder / RESULTS
    if file.exists():
        for line in map(json.loads, file.read_text().splitlines()):
            if all(line[key] == value for key, value in about(arguments).items()):
                found.setdefault(line["contender"], []).append(line)
    return {name: found[name] for name in CONTENDERS if name in found}


def about(arguments):
    model, flags = cpu()
    return dict(cpu=model, flags=flags, threads=arguments.threads, layers=arguments.layers)


def report(arguments):
    "The results as lines to read: medians over all runs."
    found, (model, flags) = results(arguments), cpu()
    if not found:
        return
    speeds = [speed / 1e9 for runs in found.values() for figure in FIGURES for speed in medians(runs, "speeds", figure).values()]
    yield f"{model} ({' '.join(flags)}), {usable_cores()} cores, {arguments.threads} threads; read bandwidth {min(speeds):.0f} to {max(speeds):.0f} GB/s"
    if arguments.layers:
        yield f"a try: {arguments.layers} of 7B's 32 layers"
    yield "tokens/s; of decoding, the share of the limit that the bandwidth sets which was measured between the tokens"
    yield f"\n{'':26}" + "".join(f"{figure:>18}" for figure in FIGURES) + f"{'GB a token':>12}{'load':>9}{'memory':>10}"
    for name, runs in found.items():
        config, line, (load, peak) = shape(name, arguments.layers), f"{name:26}", (statistics.median(run[key] for run in runs) for key in ("load", "peak"))
        for figure, tokens in FIGURES.items():
            cell = "–"
            if time := best(runs, figure):
                rate = tokens / time[0]
                cell = f"{rate:.2f}"
                if speed := medians(runs, "speeds", figure).get(time[1]):
                    cell += f" ({100 * rate * bytes_per_token(CONTENDERS[name], config, int(figure.split()[1])) / speed:.0f} %)"
            line += f"{cell:>18}"
        yield line + f"{bytes_per_token(CONTENDERS[name], config, NEAR) / 1e9:>12.2f}{load:>7.1f} s{peak / 1e9:>7.1f} GB"
    yield ""
    for ours in filter(lambda name: " llama_nb " in name, found):
        for peer in filter(lambda name: " llama_nb " not in name and name.split()[0] == ours.split()[0], found):
            yield f"{ours} / {peer.split(maxsplit=1)[1]}: " + ", ".join(
                f"{figure} ×{best(found[peer], figure)[0] / best(found[ours], figure)[0]:.2f}" for figure in FIGURES if best(found[peer], figure) and best(found[ours], figure))
        for label in found[ours][-1].get("ratios", {}):
            yield f"{ours}: {label} ×{statistics.median(run['ratios'][label] for run in found[ours] if label in run['ratios']):.2f}"
    for name, runs in found.items():
        settings = {figure: time[1] for figure in FIGURES if (time := best(runs, figure))}
        yield f"{name}: {CONTENDERS[name].needs} {runs[-1]['version']}" + "".join(f"; {run['date']}, load average {run['busy']:.1f} before it" for run in runs) + "".join(
            f"; {figure}: {setting}" for figure, setting in settings.items() if setting)
    for name, contender in CONTENDERS.items():
        if name not in found and missing([contender.needs]):
            yield f"{name}: not compared, {contender.needs} not installed"


def main():
    if sys.argv[1:] == ["--worker"]:
        call = json.loads(sys.stdin.read())
        return print(json.dumps({"make": make, "measure": measure_times}[call.pop("work")](**call)))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contenders", nargs="*", metavar="CONTENDER", help=f"all, unless named: {', '.join(CONTENDERS)}")
    parser.add_argument("-t", "--threads", type=int, default=usable_cores())
    parser.add_argument("--repeats", type=int, default=2, help="prompts to take the median of (default: %(default)s)")
    parser.add_argument("--near", action="store_true", help=f"leave out decoding after {FAR:,} tokens, which takes most of the time")
    parser.add_argument("--layers", type=int, help="fewer than 7B's 32, for a try")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="for models and results (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave the models there")
    parser.add_argument("--again", action="store_true", help="measure again what has a result; the medians are over all runs")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if unknown := set(arguments.contenders) - set(CONTENDERS):
        parser.error(f"no contender {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in [] if arguments.report else arguments.contenders or CONTENDERS:
        if not missing([CONTENDERS[name].needs]) and (arguments.again or name not in results(arguments)):
            try:
                line = measure(name, arguments) | about(arguments) | dict(date=datetime.date.today().isoformat())
            except (RuntimeError, OSError) as error:
                say(name, "failed:", error)
            else:
                with (arguments.folder / RESULTS).open("a") as file:
                    print(json.dumps(line), file=file)
    print("\n".join(report(arguments)))


if __name__ == "__main__":
    main()
