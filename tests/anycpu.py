"""Runs all chapters and tests as other CPUs would compute them: `make anycpu`, or `python tests/anycpu.py older` for one of them.

What one machine can show: other targets for every compiler and library that looks at the CPU, one thread and two, and noise of one step
in the rounding of the 8-bit engine's inputs. A verdict that any of this changes is one machine's, and must not be asserted.
It takes the time of `make test` for each, and writes nothing into the checkout. Where `qemu-x86_64` is installed, `emulated` converts bard
and writes with it on two other models of CPU, 100 s for each conversion, and compares the logits with those computed here.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# (oneDNN below AVX-512 on a CPU that has it dies in bfloat16: TensorFlow asks the CPU, not oneDNN, what it can do. So it is left out instead.)
OLDER = dict(NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="+avx2,+fma,+bmi2", TF_ENABLE_ONEDNN_OPTS="0", ATEN_CPU_CAPABILITY="avx2",
             XLA_FLAGS="--xla_cpu_max_isa=AVX2", OPENBLAS_CORETYPE="Haswell", NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL AVX512_SPR")
OLDEST = dict(NUMBA_CPU_NAME="nehalem", NUMBA_CPU_FEATURES="+sse4.2", ONEDNN_MAX_CPU_ISA="AVX512_CORE", ATEN_CPU_CAPABILITY="default",
              XLA_FLAGS="--xla_cpu_max_isa=SSE4_2", OPENBLAS_CORETYPE="Nehalem", NPY_DISABLE_CPU_FEATURES="X86_V3 X86_V4 AVX512_ICL AVX512_SPR")
ONE_THREAD = dict(OMP_NUM_THREADS="1", TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1", NUMBA_NUM_THREADS="1")
VARIANTS = {"older": OLDER | ONE_THREAD, "oldest": OLDEST, "noise": dict(LLAMA_NB_NOISE="1")}


def run(name):
    "Builds the book and runs the tests in a copy of the checkout; the number of the commands that failed."
    with tempfile.TemporaryDirectory(prefix=f"anycpu-{name}-") as folder:
        files = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True).stdout
        copy = Path(folder) / "copy"
        for file in map(os.fsdecode, files.split(b"\0")[:-1]):
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
        paths = [str(copy / "tests/noise"), str(copy)]
        environment = os.environ | VARIANTS[name] | dict(PYTHONPATH=os.pathsep.join(paths), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", TF_CPP_MIN_LOG_LEVEL="3")
        affinity = os.sched_getaffinity(0)
        threads = [min(affinity)] if "OMP_NUM_THREADS" in VARIANTS[name] else affinity
        book = [str(Path(sys.executable).with_name("jupyter-book")), "build", ".", "-n", "-W", "--keep-going", "--config", "book/_config.yml", "--path-output", "book"]
        tests = [sys.executable, "-m", "pytest", "tests", "-n", "2", "--dist", "loadfile", "-q", *sys.argv[2:]]
        return sum(subprocess.run(command, cwd=copy, env=environment, preexec_fn=lambda: os.sched_setaffinity(0, threads)).returncode != 0
                   for command in (book, tests))


def emulated(models=("SandyBridge", "Haswell")):
    "Another CPU, instruction by instruction: how many of its conversions are further from this one's than rounding moves them."
    from conftest import ROUNDING
    from llama_nb.quantization import divergence
    if not shutil.which("qemu-x86_64"):
        return print("emulated: qemu-x86_64 is not installed (Debian: qemu-user)") or 0

    def told(*command):
        done = subprocess.run([*command, sys.executable, str(ROOT / "tests/another_cpu.py"), dtype], capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    far = 0
    for dtype in ("int8", "int4"):
        here = told()
        for model in models:
            there, expected = told("qemu-x86_64", "-cpu", model), np.array(here["logits"])
            found = np.array(there["logits"])
            largest, moved = np.abs(found - expected).max(), divergence(expected[None], found[None])
            print(f"{model} {dtype}: a logit moves by at most {largest:.2f}, divergence {moved:.5f}, {'the same' if here['text'] == there['text'] else 'another'} text")
            far += largest > ROUNDING["largest"] or moved > ROUNDING["divergence"]
    return far


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    names = sys.argv[1:2] or [*VARIANTS, "emulated"]
    failed = {name: emulated() if name == "emulated" else run(name) for name in names}
    for name, count in failed.items():
        print(f"{name}: {'as everywhere' if not count else 'something differs (see above)'}")
    sys.exit(any(failed.values()))
