"What the benchmarks share: the machine they run on, its read bandwidth, and work in a process of its own."
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "i8mm", "sve")


def timed(function, *arguments):
    begin = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - begin, result


def cpu():
    "Model, and those of its flags that matter here."
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = dict((key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines))
        return facts.get("model name", platform.processor()), [flag for flag in FLAGS if flag in facts.get("flags", facts.get("Features", "")).split()]
    except OSError:
        return platform.processor() or platform.machine(), []


def peak_memory():
    "The most bytes that this process has had in memory, mapped files included."
    try:
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def version(package):
    "A distribution's version; None where it isn't installed."
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(packages):
    return [package for package in packages if version(package) is None]


def apart(script, call):
    "What `script --worker` answers to a call, in a process of its own: JSON on standard input, and on the last line of its output."
    environment = os.environ | dict(OMP_NUM_THREADS=str(call["threads"]), TF_CPP_MIN_LOG_LEVEL="3")
    done = subprocess.run([sys.executable, script, "--worker"], input=json.dumps(call), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def command(*arguments):
    "`llama-nb` with these arguments, in a process of its own."
    done = subprocess.run([sys.executable, "-c", "import sys; from llama_nb.cli import main; sys.exit(main())", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])


def say(*words):
    print(datetime.datetime.now().strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)
