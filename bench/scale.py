"""A pipeline over Ray's nodes beside one process: tokens/s with 1, 4 and 8 texts at once, by one, two and four stages.

    pip install -e ".[scale]"
    python bench/scale.py                    # 8 blocks of 65B in int4 (about 20 GB of disk on the way, 8 GB of memory), and all of SmolLM2 in int8
    python bench/scale.py --layers 2         # a try in minutes
    python bench/scale.py --report           # the figures measured so far

All nodes are on this machine: they share its cores and the bandwidth of its memory, so that stages can't be faster than one process, and the ratios say what
the messages cost and how far texts in flight fill the stages. Every result is a line of build/bench/scale.jsonl; a run that was stopped goes on where it was.
"""
import argparse
import datetime
import json
import os
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np

from llama_nb.benchmark import read_bandwidth
from machine import apart, command, cpu, missing, say, timed, usable_cores, version

RESULTS, STAGES, COUNTS, NEW = "scale.jsonl", (0, 2, 4), (1, 4, 8), 32
MODELS = {"65B": "int4", "SmolLM2": "int8"}


def make(name, path, layers):
    "A converted model, of random weights where there are no others."
    if name == "SmolLM2":
        return command("convert", "smollm2-135m-instruct", path, "--dtype", MODELS[name])
    source = path.with_name("scale-source")
    try:
        command("synth", source, "--like", name, "--layers", layers)
        command("convert", source, path, "--dtype", MODELS[name])
    finally:
        shutil.rmtree(source, ignore_errors=True)


def measure(path, stages, threads, repeats):
    "Tokens a second by number of texts, and the bytes of the files; a pipeline has so many nodes, each with its share of the threads."
    from llama_nb.library import load
    cluster = None
    if stages:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        from ray.cluster_utils import Cluster
        node = dict(num_cpus=max(1, threads // stages), object_store_memory=2 * 10**8, memory=10**11)
        cluster = Cluster(initialize_head=True, head_node_args=node | dict(include_dashboard=False))
        for _ in range(stages - 1):
            cluster.add_node(**node)
    try:
        llm = load(path, context_length=256, threads=threads, **dict(ray=cluster.address, sequences=max(COUNTS)) if stages else {})
        found = {count: statistics.median(rate(llm, count) for _ in range(repeats)) for count in COUNTS}
        shares = [who.split(" on ")[0] for who in llm.engine.stages] if stages else []
        if stages:
            llm.close()
    finally:
        if cluster:
            cluster.shutdown()
    return dict(rates=found, shares=shares, bytes=sum(file.stat().st_size for file in Path(path).glob("*.tflite")))


def rate(llm, count):
    "Tokens a second of so many texts that grow together, from two tokens each."
    ids = np.random.default_rng(0).integers(100, llm.config.vocab_size, (count, 2)).tolist()
    streams = [llm.stream(prompt, max_new_tokens=NEW, temperature=1.0, seed=0) for prompt in ids]
    seconds, _ = timed(llm.write, streams)
    return sum(len(stream.new_ids) for stream in streams) / seconds


def about(arguments):
    model, flags = cpu()
    return dict(cpu=model, flags=flags, threads=arguments.threads)


def results(arguments):
    "The last result of each model and number of stages on this machine, from the results file."
    found, file = {}, arguments.folder / RESULTS
    for line in map(json.loads, file.read_text().splitlines() if file.exists() else []):
        if all(line[key] == value for key, value in about(arguments).items()) and line["layers"] in (None, arguments.layers):
            found[line["model"], line["stages"]] = line
    return found


def report(arguments):
    "The results as lines to read."
    found, (model, flags) = results(arguments), cpu()
    if not found:
        return
    speed = max(line["bandwidth"] for line in found.values())
    yield f"{model} ({' '.join(flags)}), {usable_cores()} cores, {arguments.threads} threads in all; read bandwidth up to {speed / 1e9:.1f} GB/s"
    yield "tokens/s with so many texts at once, and the ratio to one process"
    yield f"\n{'':26}" + "".join(f"{count:>17}" for count in COUNTS)
    for (name, stages), line in sorted(found.items()):
        one = found.get((name, 0))
        label = f"{name} {MODELS[name]}" + (f" {line['layers']} blocks" if line["layers"] else "") + (f", {stages} stages" if stages else ", 1 process")
        cells = [f"{line['rates'][str(count)]:.1f}" + (f" (×{line['rates'][str(count)] / one['rates'][str(count)]:.2f})" if one else "") for count in COUNTS]
        yield f"{label:26}" + "".join(f"{cell:>17}" for cell in cells)
    yield ""
    for (name, stages), line in sorted(found.items()):
        limit = speed / line["bytes"]
        yield f"{name}, {stages or 'no'} stages: {line['bytes'] / 1e9:.2f} GB a pass, at most {limit:.1f} passes/s; {line['date']}, ray {line['ray']}, {'; '.join(line['shares']) or 'one process'}, load average {line['busy']:.1f} before it"
    if missing(["ray"]):
        yield "stages: not measured, ray not installed"


def main():
    if sys.argv[1:] == ["--worker"]:
        return print("\n" + json.dumps(measure(**json.loads(sys.stdin.read()))))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"all, unless named: {', '.join(MODELS)}")
    parser.add_argument("-t", "--threads", type=int, default=usable_cores())
    parser.add_argument("--repeats", type=int, default=3, help="times to take the median of (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="of 65B's 80 (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="for models and results (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure again what has a result")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if unknown := set(arguments.models) - set(MODELS):
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(MODELS)}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in [] if arguments.report else arguments.models or MODELS:
        layers = arguments.layers if name == "65B" else None
        todo = [stages for stages in STAGES if (arguments.again or (name, stages) not in results(arguments)) and stages <= (layers or 30) and not (stages and missing(["ray"]))]
        path = arguments.folder / f"scale-{name}-{layers or 'all'}"
        try:
            if todo and not (path / "manifest.json").exists():
                say(name, "being made")
                shutil.rmtree(path, ignore_errors=True)
                make(name, path, layers)
            for stages in todo:
                say(name, "being measured with", stages or "no", "stages")
                speed, busy = read_bandwidth(arguments.threads), os.getloadavg()[0]
                line = apart(__file__, dict(path=str(path), stages=stages, threads=arguments.threads, repeats=arguments.repeats))
                line |= about(arguments) | dict(model=name, stages=stages, layers=layers, bandwidth=speed, busy=busy, ray=version("ray"), date=datetime.date.today().isoformat())
                with (arguments.folder / RESULTS).open("a") as file:
                    print(json.dumps(line), file=file)
        except (RuntimeError, OSError) as error:
            say(name, "failed:", error)
        finally:
            shutil.rmtree(path, ignore_errors=True)
    print("\n".join(report(arguments)))


if __name__ == "__main__":
    main()
