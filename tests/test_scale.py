"""A model over several devices and processes: where each number lies, and that logits and text are those of one device.
JAX computes in processes of its own, since Keras' backend is fixed when it is imported."""
import dataclasses
import importlib.util
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest

from llama_nb import library, mesh, scale
from llama_nb.meta import config_from_params
from llama_nb.checkpoint import SIZES, LazyTensor, LlamaConfig, bard_folder
from llama_nb.meta import join_shards, write_meta, write_pth
from llama_nb.hub import open_checkpoint
from llama_nb.cli import main
from llama_nb.sampling import GenerationError
from llama_nb.vocabularies import synth_tokenizer

needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed: pip install 'llama_nb[scale]'")
LLAMA_NB = [sys.executable, "-c", "import sys; from llama_nb.cli import main; sys.exit(main())"]
ALL_DIVIDES = LlamaConfig(dim=128, n_layers=2, n_heads=8, n_kv_heads=8, hidden_dim=384, vocab_size=4096, context_length=64, own_head_dim=24)
MESHES = {"bard": ["8", "4", "1"], "sharded": ["8", "1"]}
IDS = list(range(300, 340))
GREEDY = dict(max_new_tokens=12, temperature=0.0)

WORKER = """
import json, os, re, sys
import numpy as np
from llama_nb.library import load
name, meshes, place, out, dies = json.loads(sys.argv[1])
for mesh in meshes:
    llm = load(name, mesh=mesh, **place)
    np.save(f"{out}-{mesh}.npy", llm.logits(%r))
    text = llm.generate("To be, or", **%r)
    if dies: os._exit(9)
    shards = {v.path: [list(v.shape), sorted({s.data.shape for s in v.value.addressable_shards})] for v in llm.model.variables}
    again = llm.generate("My lord", **%r)
    meetings = []
    if mesh == "8":
        one = np.zeros((1, 1), "int32"), np.int32(3), 1
        program = llm.step.program.lower(llm.step.weights, llm.step.caches, *one).compile().as_text()
        meetings = re.findall(r" (all-[a-z]+)\\(", program)
    print(json.dumps(dict(mesh=mesh, text=text, again=again, shards=shards, bytes=llm.device_bytes(), meetings=meetings)))
llm.party.leave()
""" % (IDS, GREEDY, GREEDY)


def start(command, *arguments):
    environment = os.environ | {"KERAS_BACKEND": "jax"}
    return subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def work(name, meshes, out, dies=False, **place):
    return start([sys.executable, "-c", WORKER], json.dumps([str(name), meshes, place, str(out), dies]))


def results(process, code=0):
    "What a worker has printed, a dictionary for each mesh; its error output if it should fail."
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, (process.returncode, out, err)
    return [line for line in err.splitlines() if line.startswith("llama-nb")] if code else [json.loads(line) for line in out.splitlines()]


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    "Random weights in eight files of Meta's, cut as LLaMA 1's were: the embedding, `wo` and `w2` by columns."
    folder, rng = tmp_path_factory.mktemp("sharded") / "model", np.random.default_rng(0)
    values = {name: rng.normal(0, 0.05, shape).astype("float32") if len(shape) == 2 else np.ones(shape, "float32")
              for name, shape in ALL_DIVIDES.tensor_shapes().items()}
    write_meta(folder, ALL_DIVIDES, values.get, {"tokenizer.model": synth_tokenizer(ALL_DIVIDES.vocab_size)}, "float32")
    (folder / "consolidated.00.pth").unlink()
    def cut(name, value, number):
        axis = 1 if re.search("tok_embeddings|wo|w2", name) else 0
        return np.split(value, 8, axis)[number] if value.ndim == 2 else value
    for number in range(8):
        write_pth(folder / f"consolidated.{number:02}.pth", [(name, cut(name, value, number)) for name, value in values.items()], "float32")
    return folder


@pytest.fixture(scope="module")
def eight(tmp_path_factory, sharded):
    "What eight simulated devices, four of them, and one, have to say."
    out = tmp_path_factory.mktemp("eight")
    jobs = {name: work(path, MESHES[name], out / name) for name, path in (("bard", bard_folder()), ("sharded", sharded))}
    return out, {name: {found["mesh"]: found for found in results(job)} for name, job in jobs.items()}


def keras_logits(folder):
    llm = library.load(folder, dtype="float32")
    return llm.logits(IDS), llm.generate("To be, or", **GREEDY)


@needs_jax
@pytest.mark.parametrize("name, mesh", [(name, mesh) for name, meshes in MESHES.items() for mesh in meshes])
def test_logits_and_greedy_text_are_those_of_one_device_and_of_tensorflow(eight, sharded, name, mesh):
    out, found = eight
    logits = np.load(out / f"{name}-{mesh}.npy")
    expected, text = keras_logits({"bard": bard_folder(), "sharded": sharded}[name])
    assert np.abs(logits - np.load(out / f"{name}-1.npy")).max() <= 1e-4
    assert np.abs(logits - expected).max() <= 1e-4
    assert found[name][mesh]["text"] == text and found[name][mesh]["again"] == found[name]["1"]["again"]


@needs_jax
@pytest.mark.parametrize("name, mesh", [("sharded", "8"), ("bard", "4")])
def test_where_all_divides_each_device_has_its_share(eight, name, mesh):
    devices, found = int(mesh), eight[1][name]
    (whole,) = found["1"]["bytes"].values()
    assert len(found[mesh]["bytes"]) == devices
    for size in found[mesh]["bytes"].values():
        assert abs(size * devices / whole - 1) < 0.05


@needs_jax
@pytest.mark.parametrize("name, mesh", [("sharded", "8"), ("bard", "8"), ("bard", "4")])
def test_each_variable_is_cut_by_its_rule(eight, name, mesh):
    devices, kv_heads = int(mesh), {"sharded": 8, "bard": 4}[name]
    for path, (shape, parts) in eight[1][name][mesh]["shards"].items():
        axis = 1 if re.search("w[qkv13]/|^output", path) else 0 if re.search("w[o2]/|table", path) else None
        if kv_heads % devices and re.search("w[kv]/", path): axis = None
        expected = [size // devices if place == axis else size for place, size in enumerate(shape)]
        assert parts == [expected], path


@needs_jax
def test_with_fewer_kv_heads_than_devices_their_bytes_say_so(eight):
    "Of bard's 4 kv heads on 8 devices each device has all: matrices and cache."
    found, config = eight[1]["bard"], open_checkpoint(bard_folder()).config
    (whole,), sizes = found["1"]["bytes"].values(), found["8"]["bytes"].values()
    kept = 2 * config.n_layers * config.n_kv_heads * config.head_dim * (config.dim + config.context_length) * 4
    norms = (2 * config.n_layers + 1) * config.dim * 4
    assert set(sizes) == {(whole - kept - norms) // 8 + kept + norms}


@needs_jax
@pytest.mark.parametrize("name", ["bard", "sharded"])
def test_two_meetings_a_block_and_no_weights_on_the_way(eight, name):
    "And one for the embedding, one for the logits: the compiled step has no other exchange."
    layers = {"bard": 5, "sharded": 2}[name]
    assert sorted(eight[1][name]["8"]["meetings"]) == ["all-gather"] + ["all-reduce"] * (2 * layers + 1)


@needs_jax
@pytest.mark.parametrize("number", range(int(os.environ.get("LLAMA_NB_SOAK", "1"))))
def test_two_processes_of_four_devices(eight, tmp_path, number):
    address = free_address()
    jobs = [work(bard_folder(), ["2x4"], tmp_path / str(process), coordinator=address, process=process) for process in (0, 1)]
    for process, (found,) in enumerate(map(results, jobs)):
        one, size = eight[1]["bard"]["1"], set(eight[1]["bard"]["8"]["bytes"].values())
        assert np.abs(np.load(tmp_path / f"{process}-2x4.npy") - np.load(eight[0] / "bard-1.npy")).max() <= 1e-4
        assert (found["text"], found["again"]) == (one["text"], one["again"])
        assert len(found["bytes"]) == 4 and set(found["bytes"].values()) == size


@needs_jax
@pytest.mark.parametrize("number", range(int(os.environ.get("LLAMA_NB_SOAK", "1"))))
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_dies_the_other_says_so_and_ends(tmp_path, victim, number):
    address = free_address()
    jobs = [work(bard_folder(), ["2x1"], tmp_path / str(process), process == victim, coordinator=address, process=process) for process in (0, 1)]
    assert jobs[victim].wait(90) == 9
    begin = time.monotonic()
    assert results(jobs[1 - victim], 2) == ["llama-nb: another process of the mesh has ended, and so does this one"]
    assert time.monotonic() - begin < 30
    jobs[victim].communicate()


@needs_jax
def test_command_line_on_two_processes():
    "Prompt, seed and sampling are process 0's; only that prints."
    address = free_address()
    mesh = ["generate", "-m", "bard", "--mesh", "2x1", "--coordinator", address]
    jobs = [start(LLAMA_NB, *mesh, "--process", "1"), start(LLAMA_NB, *mesh, "--process", "0", "-p", "My lord", "-n", "20", "--temp", "0.9", "--json")]
    (out1, err1), (out0, err0) = (job.communicate(timeout=120) for job in jobs)
    assert [job.returncode for job in jobs] == [0, 0], (err0, err1)
    assert (out1, err1, err0) == ("", "", "") and json.loads(out0)["new_tokens"] == 20


@needs_jax
def test_command_line_on_one_process(eight):
    job = start(LLAMA_NB, "generate", "-m", "bard", "--mesh", "4", "-p", "To be, or", "-n", "12", "--temp", "0")
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0 and out == "To be, or" + eight[1]["bard"]["1"]["text"] + "\n" and err.count("\n") == 1


def device_mesh(devices):
    return keras.distribution.DeviceMesh((1, devices), ["batch", "model"], [f"cpu:{number}" for number in range(devices)])


@pytest.mark.parametrize("devices", [3, 5, 6144])
def test_a_mesh_that_divides_nothing_is_one_line(devices):
    wanted = f"mesh should divide one of vocab_size 4096, n_heads 8, n_kv_heads 8, hidden_dim 128; found {devices} devices, which divide none"
    with pytest.raises(GenerationError, match=re.escape(wanted)):
        mesh.layout_map(dataclasses.replace(ALL_DIVIDES, hidden_dim=128), device_mesh(devices))


def test_a_large_variable_without_a_rule_is_an_error():
    layout, config = mesh.layout_map(ALL_DIVIDES, device_mesh(8)), dataclasses.replace(ALL_DIVIDES, n_layers=1)
    model = mesh.build_model(config)
    mesh.check_layout(model.variables, layout)
    mesh.check_layout([keras.Variable(np.zeros((500, 500), "float32"), name="small")], layout)
    with pytest.raises(GenerationError, match="variable adapter of 1.0 MB: no rule of the layout names it"):
        mesh.check_layout([*model.variables, keras.Variable(np.zeros((512, 512), "float32"), name="adapter")], layout)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_part_is_read_from_the_files_that_hold_it(axis, count):
    "Where cut and files agree, it is the file's own pages: nothing is joined or copied."
    whole, touched = np.arange(16 * 24, dtype="float32").reshape(16, 24), []
    pieces = np.split(whole, count, axis)
    class Watched:
        def __init__(self, number): self.number, self.shape = number, pieces[number].shape
        def __getitem__(self, index): touched.append(self.number); return pieces[self.number][index]
    slices = [LazyTensor(piece.shape, piece.dtype, "float32", lambda number=number: Watched(number)) for number, piece in enumerate(pieces)]
    read = mesh.part_reader(join_shards("name", slices, whole.shape))
    for cut in range(8):
        for index in ((slice(2 * cut, 2 * cut + 2), slice(None)), (slice(None), slice(3 * cut, 3 * cut + 3)), (slice(None), slice(None))):
            touched.clear()
            found = read(index)
            assert np.array_equal(found, whole[index])
            along = range(*index[axis].indices(whole.shape[axis]))
            needed = sorted({place * count // whole.shape[axis] for place in along})
            assert touched == needed
            assert np.shares_memory(found, whole) == (len(needed) == 1)


@pytest.mark.parametrize("asked, found", [("8", (1, 8)), (8, (1, 8)), ("2x4", (2, 4)), ("16x1", (16, 1))])
def test_mesh_is_devices_or_processes_and_devices(asked, found):
    assert mesh.parse_mesh(asked) == found


@pytest.mark.parametrize("options, line", [
    (["--mesh", "0"], "mesh should be devices, as in 8, or processes x devices of each, as in 2x4; found '0'"),
    (["--mesh", "2x"], "mesh should be devices, as in 8, or processes x devices of each, as in 2x4; found '2x'"),
    (["--mesh", "2x4"], "coordinator should be HOST:PORT of process 0 for a mesh 2x4, found None"),
    (["--mesh", "8", "--coordinator", "here:1"], "coordinator should be left out for a mesh 8 of one process, found here:1"),
    (["--mesh", "2x4", "--coordinator", "here"], "coordinator should be HOST:PORT, found 'here'"),
    (["--mesh", "2x4", "--coordinator", "here:1"], "process should be 0 to 1 for a mesh 2x4, found None"),
    (["--mesh", "2x4", "--coordinator", "here:1", "--process", "2", "-p", "x"], "process should be 0 to 1 for a mesh 2x4, found 2"),
    (["--mesh", "8", "-t", "1"], "threads can't be chosen for a mesh, found 1"),
    (["--mesh", "8", "--dtype", "int8"], "on a mesh, dtype should be float32, found 'int8'"),
    (["--mesh", "8"], "a mesh needs KERAS_BACKEND=jax before Keras is imported, found tensorflow"),
    (["--coordinator", "here:1"], "--coordinator goes with --mesh"),
    (["--process", "1"], "--process goes with --mesh"),
])
def test_mistakes_are_one_line(capsys, monkeypatch, options, line):
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: name)
    assert main(["generate", "-m", "bard", "-p", "To be", *options]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"llama-nb: {line}\n")


def test_without_jax_the_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    assert main(["generate", "-m", "bard", "-p", "To be", "--mesh", "8"]) == 2
    assert capsys.readouterr().err == "llama-nb: a mesh needs JAX, which is not installed: pip install 'llama_nb[scale]'\n"


def test_a_coordinator_that_does_not_answer_is_one_line_in_time():
    begin, address = time.monotonic(), free_address()
    with pytest.raises(GenerationError, match=f"coordinator {address} should answer, found: .*refused"):
        mesh.meet(address, 2, 1, patience=1)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("host", ["no-such-host.invalid"])
def test_a_coordinator_without_an_address_is_one_line_in_time(host):
    with pytest.raises(GenerationError, match=f"coordinator {host}:1 should answer, found: "):
        mesh.meet(f"{host}:1", 2, 1, patience=1)


def test_a_coordinator_whose_port_is_taken_is_one_line():
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(GenerationError, match=f"coordinator {address} should be an address to listen at, found: .*in use"):
            mesh.meet(address, 2, 0, patience=1)


def test_processes_that_do_not_come_are_one_line_in_time():
    "A stranger at the door, and a process that came twice, don't count."
    address = free_address()
    def knock(text):
        with mesh.reach(("127.0.0.1", int(address.split(":")[1])), text, time.monotonic() + 5): time.sleep(1.5)
    guests = [threading.Thread(target=knock, args=(text,)) for text in ("hello", 7, 1, 1)]
    for guest in guests: guest.start()
    with pytest.raises(GenerationError, match=f"coordinator {address}: 3 processes should meet here within 2 s, found 2"):
        mesh.meet(address, 3, 0, patience=2)
    for guest in guests: guest.join()


def test_a_party_shares_what_process_0_says():
    address, found = free_address(), {}
    def join(process): found[process] = mesh.meet(address, 3, process, patience=20)
    threads = [threading.Thread(target=join, args=(process,)) for process in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    said = {process: found[process].share([process, "ä"]) for process in range(3)}
    assert said == dict.fromkeys(range(3), [0, "ä"])
    for party in found.values(): party.leave()


# The arithmetic of costs

PC, SLOW = scale.Machine(80e9, overhead=1e-4, flops=1e12), scale.Link(1e-3, 1e8)
SEVENTY = config_from_params(SIZES["70B"], 32000)


@pytest.mark.parametrize("seconds", [scale.tensor_seconds, scale.pipeline_seconds])
def test_one_machine_pays_no_network(seconds):
    for sequences in (1, 8):
        assert seconds(SEVENTY, 4.5, PC, SLOW, 1, sequences, 100) == pytest.approx(scale.pass_seconds(SEVENTY, 4.5, PC, sequences, 100))


def test_a_pass_reads_every_matrix_once_and_each_cache():
    shapes = SEVENTY.tensor_shapes()
    weights = sum(math.prod(shape) for name, shape in shapes.items() if name != "tok_embeddings.weight")
    assert scale.bytes_read(SEVENTY, 16) == 2 * weights
    assert scale.bytes_read(SEVENTY, 16, 3, 10) - 2 * weights == 3 * 10 * 80 * 2 * 8 * 128 * 2


def test_across_ends_at_the_meetings_and_along_at_one_machine():
    meetings = 160 * scale.all_reduce_seconds(SLOW, 2 * 8192, 10**6)
    assert scale.tensor_seconds(SEVENTY, 4.5, PC, SLOW, 10**6) == pytest.approx(meetings + 80 * PC.overhead, rel=1e-2)
    alone = scale.pass_seconds(SEVENTY, 4.5, PC)
    assert scale.pipeline_seconds(SEVENTY, 4.5, PC, SLOW, 8) > alone > scale.pipeline_seconds(SEVENTY, 4.5, PC, SLOW, 8, 8) / 8
