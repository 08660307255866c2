"The pipeline of blocks on a Ray cluster: the same text as one process, whatever happens to its stages, and nothing left behind."
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'llama_nb[scale]'")

from ray._private import state
from ray.cluster_utils import Cluster

from conftest import same_but_for_rounding, watched, written_as_alone
from llama_nb import pipeline
from llama_nb.checkpoint import CheckpointError, bard_folder
from llama_nb.conversion import convert, open_converted
from llama_nb.library import load
from llama_nb.meta import write_meta
from llama_nb.pipeline import Pipeline, RayLlama, Stage, connect, split_blocks
from llama_nb.sampling import GenerationError

PROMPTS = ["My lord,", "The queen", "What", "O", "Enter MACBETH and", "No more", "And"]
NODE = dict(num_cpus=1, object_store_memory=80 * 2**20, memory=20 * 2**20, include_dashboard=False)


def refuses(error, message, function, *arguments, **named):
    with pytest.raises(error) as caught:
        function(*arguments, **named)
    assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


@pytest.mark.parametrize("count, room, sizes", [
    (8, [100, 100], [4, 4]), (7, [100, 100, 100], [3, 3, 1]), (80, [10**6] * 4, [20] * 4),
    (8, [3, 100], [3, 5]), (8, [100, 2, 100], [3, 2, 3]), (4, [0, 100], [0, 4]), (3, [1, 1, 1], [1, 1, 1]),
])
def test_blocks_are_shared_as_evenly_as_memory_allows(count, room, sizes):
    shares = split_blocks([1] * count, room)
    assert [len(share) for share in shares] == sizes and [layer for share in shares for layer in share] == list(range(count))


def test_too_little_memory_in_all():
    refuses(GenerationError, "6.00 GB of memory are needed for 3 blocks, the nodes have room for 2 of them: 1.90, 4.10 GB",
            split_blocks, [2 * 10**9] * 3, [19 * 10**8, 41 * 10**8])


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nonsense"])
def test_no_cluster(address):
    refuses(GenerationError, f"no Ray cluster at '{address}'", connect, address)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"no", b""])
def test_what_answers_is_not_ray(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:
        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(answer)
        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        refuses(GenerationError, f"no Ray cluster at '{address}' (what answers there isn't Ray)", connect, address)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return convert(bard_folder(), tmp_path_factory.mktemp("bard") / "int8")


@pytest.fixture(scope="module")
def alone(folder):
    return load(folder)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, folder):
    "Two nodes with memory and one without, all of them here. Their caches are the tests' own."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_NB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        cluster.add_node(**NODE)
        cluster.add_node(**NODE | dict(memory=2**19))
        assert connect(cluster.address)
        session = cluster.head_node.get_session_dir_path()
        yield cluster
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(session, ignore_errors=True)


def alive():
    return {name for name, actor in state.actors().items() if actor["State"] != "DEAD"}


def nothing_left(before=frozenset(), seconds=20):
    "Waits until no actor but those before, and no object is left in the cluster."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if alive() <= before and ray.available_resources()["object_store_memory"] == ray.cluster_resources()["object_store_memory"]:
            return True
        time.sleep(0.2)
    return False


def open_llama(folder, alone, sequences=4):
    model = open_converted(folder)
    return RayLlama(Pipeline(model, model.config, "auto", sequences), alone.tokenizer, folder)


def kill(llm, number):
    stage = list(llm.engine.stages.values())[number]
    os.kill(state.actors(stage._actor_id.hex())["Pid"], signal.SIGKILL)


@pytest.fixture(scope="module")
def llm(cluster, folder, alone):
    "Three of bard's five blocks on one node, two on another, none on the third, which has no memory."
    with open_llama(folder, alone) as llm:
        yield llm
    assert nothing_left()


def writes_as_one_process(llm, alone, prompts, max_new_tokens=30, after_five=None, prompt_lookup_num_tokens=0, stop=(), **sampling):
    "Texts over stages are those of one process, but for rounding; `after_five` is called when the first text has five tokens."
    sampling = sampling or dict(temperature=0)
    streams = [watched(llm.stream(prompt, max_new_tokens, stop, prompt_lookup_num_tokens, **sampling)) for prompt in prompts]
    if after_five:
        stream, = streams
        for _ in zip(stream, range(5)): pass
        after_five()
        "".join(stream)
    else:
        llm.write(streams)
    for stream in streams:
        assert len(stream.new_ids) == max_new_tokens or stream.finish_reason in ("end", "stop")
        written_as_alone(alone, stream, **sampling)


def test_a_node_without_memory_gets_no_blocks(llm):
    assert [who.split(" on ")[0] for who in llm.engine.stages] == ["blocks 0 to 2", "blocks 3 to 4"]


def test_the_same_text_as_one_process(llm, alone):
    for prompt in PROMPTS[:2]: writes_as_one_process(llm, alone, [prompt])
    writes_as_one_process(llm, alone, PROMPTS[:1], 20, stop="\n", temperature=0.8, seed=3)


def test_more_texts_than_there_is_room_for(llm, alone):
    writes_as_one_process(llm, alone, PROMPTS)


def test_a_long_prompt_and_guesses(llm, alone):
    ids = alone.tokenizer.encode("My lord, the king is come. " * 40)[:200]
    for guesses in (0, 5): writes_as_one_process(llm, alone, [ids], 20, prompt_lookup_num_tokens=guesses)
    same_but_for_rounding(alone.logits(ids), llm.logits(ids))


def test_heads_of_their_own_width(llm, alone, tmp_path):
    config = dataclasses.replace(alone.config, n_layers=2, own_head_dim=16)
    shapes, rng = config.tensor_shapes(), np.random.default_rng(0)
    write_meta(tmp_path / "source", config, lambda name: rng.standard_normal(shapes[name]) * 0.05 + (len(shapes[name]) == 1), {"tokenizer.model": (bard_folder() / "tokenizer.model").read_bytes()})
    folder = convert(tmp_path / "source", tmp_path / "int8")
    ids = alone.tokenizer.encode(PROMPTS[0])
    with open_llama(folder, alone) as narrow: same_but_for_rounding(load(folder).logits(ids), narrow.logits(ids))


def test_texts_take_turns(llm, alone):
    one, other = (watched(llm.stream(prompt, max_new_tokens=10, temperature=0)) for prompt in PROMPTS[:2])
    for _ in zip(one, other): llm.generate(PROMPTS[2:4], max_new_tokens=1)
    for stream in (one, other):
        "".join(stream)
        assert len(stream.new_ids) == 10
        written_as_alone(alone, stream, temperature=0)


# What happens to stages.

@pytest.mark.parametrize("number", [0, 1])
def test_a_stage_is_killed_while_a_text_is_written(llm, alone, number):
    writes_as_one_process(llm, alone, PROMPTS[:1], after_five=lambda: kill(llm, number))


def test_a_stage_is_killed_while_several_are_written(llm, alone, monkeypatch):
    answer, calls = llm.engine.answer, []
    def answer_and_kill(results):
        calls.append(results)
        if len(calls) in (10, 60): kill(llm, len(calls) % 3)
        return answer(results)
    monkeypatch.setattr(llm.engine, "answer", answer_and_kill)
    writes_as_one_process(llm, alone, PROMPTS)
    assert len(calls) > 60


def test_a_stage_that_always_dies_ends_it(llm, monkeypatch):
    class Doomed(Stage):
        def run(self, x, *rest):
            if len(x) > 5: os._exit(1)
            return super().run(x, *rest)
    monkeypatch.setattr(pipeline, "Stage", Doomed)
    llm.engine.renew("")
    refuses(GenerationError, "given up after 3 attempts: blocks ", llm.generate, "My lord, the king is come", max_new_tokens=2)
    monkeypatch.undo()
    llm.engine.attempts = 1
    llm.engine.renew("")


def test_a_node_is_lost(cluster, folder, alone):
    node = cluster.add_node(**NODE)
    with open_llama(folder, alone) as llm:
        assert len(llm.engine.stages) == 3
        writes_as_one_process(llm, alone, PROMPTS[:1], after_five=lambda: cluster.remove_node(node))
        assert len(llm.engine.stages) == 2


def test_a_slow_stage(cluster, folder, alone, monkeypatch):
    "It takes longer, and is the same; one that doesn't answer at all is named."
    class Slow(Stage):
        def run(self, x, *rest):
            if len(self.blocks.programs) == 2: time.sleep(3 if len(x) > 5 else 0.02)
            return super().run(x, *rest)
    monkeypatch.setattr(pipeline, "Stage", Slow)
    with open_llama(folder, alone) as llm:
        writes_as_one_process(llm, alone, PROMPTS[:4])
        llm.engine.patience = 1.5
        refuses(GenerationError, "no answer for 1.5 seconds", llm.generate, "My lord, the king is come", max_new_tokens=1)
        refuses(GenerationError, "blocks 3 to 4 on", llm.generate, "My lord, the king is come", max_new_tokens=1)


@pytest.mark.parametrize("end, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_the_driver_is_interrupted(cluster, folder, end, code):
    command = "import sys; from llama_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    before = alive()
    arguments = ["generate", "-m", str(folder), "--ray", cluster.address, "-p", "My lord,", "-n", "250", "--temp", "0"]
    driver = subprocess.Popen([sys.executable, "-c", command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    driver.stdout.read(30)
    assert len(alive() - before) == 2
    driver.send_signal(end)
    assert driver.wait(20) == code and nothing_left(before)
    driver.stdout.close()


# Where blocks come from.

@pytest.fixture
def swapped(folder, tmp_path):
    "A model of which two blocks have changed places."
    copy = shutil.copytree(folder, tmp_path / "copy")
    for old, new in (("layers.3.tflite", "kept"), ("layers.4.tflite", "layers.3.tflite"), ("kept", "layers.4.tflite")):
        (copy / old).rename(copy / new)
    return copy


class Apart(Stage):
    "A stage whose node sees no path of the driver's."
    def sees(self, names): return False


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_another_block(cluster, swapped, alone):
    refuses(CheckpointError, f"{swapped / 'layers.3.tflite'}: not the file that the manifest lists", open_llama, swapped, alone)


def test_a_node_without_the_path_fetches_once(cluster, folder, swapped, alone, monkeypatch):
    monkeypatch.setattr(pipeline, "Stage", Apart)
    cache = pipeline.cache_folder() / "blocks"
    refuses(CheckpointError, "layers.3.tflite: not the file that the manifest lists", open_llama, swapped, alone)
    fetched, = cache.iterdir()
    assert not {"layers.3.tflite", "layers.4.tflite"} & set(os.listdir(fetched))
    with open_llama(folder, alone) as llm:
        writes_as_one_process(llm, alone, PROMPTS[:1])
    fetched, = cache.iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in fetched.iterdir()}
    assert sorted(before) == [*(f"layers.{layer}.tflite" for layer in range(5)), "rope.npy"]
    with open_llama(folder, alone): pass
    assert {path.name: path.stat().st_mtime_ns for path in fetched.iterdir()} == before


def test_too_many_sequences_for_the_memory(cluster, folder, alone):
    refuses(GenerationError, "of memory are needed for 5 blocks, the nodes have room for", open_llama, folder, alone, 128)
    refuses(GenerationError, "sequences should be a whole number from 1 to 128, found 0", open_llama, folder, alone, 0)
