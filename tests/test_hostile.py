"Files made to do harm: nothing in them runs, and each is refused in one line, in little time and memory."
import contextlib
import dataclasses
import itertools
import json
import os
import pickle
import re
import resource
import struct
import subprocess
import time
import zipfile

import numpy as np
import pytest

import fuzz
from llama_nb import gguf
from llama_nb.meta import config_to_params
from llama_nb.checkpoint import Checkpoint, CheckpointError, LazyTensor, LlamaConfig
from llama_nb.meta import read_pth, write_pth
from llama_nb.gguf import read_gguf, write_gguf
from llama_nb.hub import open_checkpoint
from llama_nb.huggingface import read_safetensors, write_hf, write_safetensors

CONFIG = LlamaConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=8, vocab_size=4)
MODEL = {name: np.ones(shape, np.float32) for name, shape in CONFIG.tensor_shapes().items()}


@contextlib.contextmanager
def within():
    "500 MB more memory than now, and of the processor's time two seconds; four, as it may have others to serve."
    begin, limits = time.process_time(), fuzz.allow(fuzz.MEMORY)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.process_time() - begin < 2 * fuzz.SECONDS


def refused(path, action=open_checkpoint):
    "The one line about it that opening and reading must end in."
    with within(), pytest.raises(CheckpointError) as caught:
        opened = action(path)
        if isinstance(opened, Checkpoint):
            for name in opened: opened.read(name)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and "MemoryError" not in message and len(message) <= 1000
    return message


@pytest.fixture
def canary(tmp_path):
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()


# .pth: a pickle is a program, in an archive that may lie ----------------------------------------------------------------------

def text(value): return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
def whole(value): return b"\x8a" + bytes([size := value.bit_length() // 8 + 1]) + value.to_bytes(size, "little", signed=True)
def group(*parts): return b"(" + b"".join(parts) + b"t"
def name(module, qualified): return f"c{module}\n{qualified}\n".encode()


def tensor(key="0", size=4, offset=0, shape=(4,), strides=(1,), kind="FloatStorage"):
    storage = group(text("storage"), name("torch", kind), text(key), text("cpu"), whole(size)) + b"Q"
    return name("torch._utils", "_rebuild_tensor_v2") + group(storage, whole(offset), group(*map(whole, shape)), group(*map(whole, strides)), b"\x89" + name("collections", "OrderedDict") + b")R") + b"R"


def listing(*items, before=b""):
    return b"\x80\x02}" + before + b"(" + b"".join(text(key) + value for key, value in items) + b"u."


def archive(path, listing, *members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        for member, content in [("archive/data.pkl", listing), *members]: file.writestr(member, content)
    return path


STORAGE = ("archive/data/0", np.arange(4, dtype=np.float32).tobytes())


def test_a_listing_made_by_hand_is_read(tmp_path):
    tensors = read_pth(archive(tmp_path / "x.pth", listing(("x", tensor()), ("y", tensor(shape=(2, 2), strides=(1, 2)))), STORAGE))
    assert tensors["x"].read().tolist() == [0, 1, 2, 3] and tensors["y"].read().tolist() == [[0, 2], [1, 3]]


class Trap:
    def __init__(self, function, *arguments): self.parts = function, arguments
    def __reduce__(self): return self.parts


class Setting:
    def __init__(self, canary): self.canary = canary
    def __setstate__(self, state): open(state["canary"], "w")


def programs(canary):
    command, touch = f"touch '{canary}'", f"open({str(canary)!r}, 'w')"
    for protocol in range(6):
        for trap in (Trap(os.system, command), Trap(subprocess.call, ["touch", str(canary)]), Trap(eval, touch), Trap(exec, touch)):
            yield pickle.dumps({"x": trap}, protocol=protocol)
        yield pickle.dumps({"x": Setting(str(canary))}, protocol=protocol)
        yield pickle.dumps({"x": Trap(pickle.loads, pickle.dumps(Trap(os.system, command)))}, protocol=protocol)
    yield b"(S" + repr(command).encode() + b"\niposix\nsystem\n."
    yield b"(cos\nsystem\nS" + repr(command).encode() + b"\no."
    for asked in ("torch._utils\nos.system", "collections\nOrderedDict.__class__", "torch\nStorage.os", "torch.serialization\nos.system", "collections OrderedDict\nsystem", "builtins\neval", "torch\nFloatStorage.__init__"):
        yield listing(("x", b"c" + asked.encode() + b"\n(" + text(command) + b"tR"))
    for module, called, argument in (("os", "system", command), ("builtins", "eval", touch)):
        yield listing(("x", b"h\x01h\x02\x93(" + text(argument) + b"tR"), before=text(module) + b"q\x010" + text(called) + b"q\x020")
        yield listing(("x", b"h\x01h\x02\x93(" + text(argument) + b"tR"), before=b"(" + text(module) + b"q\x01" + text(called) + b"q\x02t0")
        yield listing(("x", text(f"{module}.{called}") + b"(" + text(argument) + b"tR"))
    yield listing(("x", tensor() + group(text(command)) + b"R"))
    yield listing(("x", name("torch._utils", "_rebuild_parameter") + group(name("os", "system"), b"\x89", b"}") + b"R"))


def test_the_traps_work_where_they_are_not_refused(tmp_path):
    for program in itertools.islice(programs(tmp_path / "canary"), 36):
        pickle.loads(program)
        assert (tmp_path / "canary").exists()
        (tmp_path / "canary").unlink()


@pytest.mark.parametrize("kind", ["archive", "legacy", "nested"])
def test_no_pickle_runs(kind, canary, tmp_path):
    for number, program in enumerate(programs(canary)):
        path = tmp_path / f"{number}.pth"
        if kind == "legacy": path.write_bytes(program)
        elif kind == "archive": archive(path, program, STORAGE)
        else: archive(path, pickle.dumps({"x": program}), STORAGE)
        refused(path, read_pth)
        assert not canary.exists()


DEEP = b")" + b"\x85" * 100_000
DOUBLED = b")" + b"q\x01h\x01\x86" * 60
WIDE = group(*[b"K\x01"] * 20_000)

@pytest.mark.parametrize("program", [
    b"", b".", b"}", b"(", b"t.", b"R.", b"s.", b"u.", b"(u.", b"\x85.", b"h\x00.", b"}q\x00h\x01.", b"}}s.", b"ctorch\nFloatStorage\n)R.", listing(("x", tensor()))[:40], listing(("x", tensor()))[:-1],
    b"\x80\x02}" + DEEP + b"Ns.", b"\x80\x02}" + DOUBLED + b"Ns.", b"\x80\x02" + DEEP + b")R.", name("collections", "OrderedDict") + group(group(group(DEEP, b"N"))) + b"R.",
    listing(("x", DEEP)), listing(("x", DOUBLED)), b"\x80\x02" + DOUBLED + b".", b"(" * 100_000 + b".", b"\x80\x02}" + b"}" * 100_000 + b").",
    listing(("x", b"N"), before=b"".join(b"r" + struct.pack("<I", 2**32 - 1 - index) for index in range(100_000))),
    b"X\xff\xff\xff\xff.", b"\x8a\xff.", b"\x8b\xff\xff\xff\x7f.", b"\x8b\xff\xff\xff\xff.", b"I" + b"9" * 500_000 + b"\n.", b"L" + b"9" * 500_000 + b"L\n.",
    b"\x80\x02" + group(text("storage"), text("k"), text("0"), text("cpu"), b"K\x04") + b"q\x010" + WIDE + b"q\x020" + b"".join(
        name("torch._utils", "_rebuild_tensor_v2") + b"(h\x01K\x00h\x02h\x02tR0" for _ in range(10_000)) + b"}.",
    listing(("x" * 100_000, b"N")), listing(("x", tensor())) + b" " * 2**24,
], ids=lambda program: f"{program[:12]!r}*{len(program)}")
def test_programs_that_would_break_the_machine(program, tmp_path):
    refused(archive(tmp_path / "x.pth", program, STORAGE), read_pth)


@pytest.mark.parametrize("changes", [
    dict(size=5), dict(size=3), dict(size=2**62), dict(size=-4), dict(key="1"), dict(key="../data.pkl"), dict(offset=1), dict(offset=-1), dict(offset=2**62), dict(shape=(5,)), dict(shape=(-4,)), dict(shape=(0,)), dict(shape=(2**62, 2**62), strides=(1, 1)),
    dict(shape=(2, 2), strides=(3, 1)), dict(strides=(-1,)), dict(strides=(2**62,)), dict(strides=(1, 1)), dict(shape=(2**40,), strides=(0,)), dict(shape=(4, 4), strides=(1, 0)), dict(shape=(3, 2), strides=(1, 1)),
    dict(shape=(1,) * 30_000, strides=(1,) * 30_000), dict(shape=(), strides=(), offset=4), dict(kind="DoubleStorage"), dict(kind="UntypedStorage"), dict(shape=(2**2000,)),
], ids=lambda changes: str(changes)[:60])
def test_storages_and_windows_that_lie(changes, tmp_path):
    refused(archive(tmp_path / "x.pth", listing(("x", tensor(**changes))), STORAGE), read_pth)


def overwrite(path, at, content):
    data = bytearray(path.read_bytes())
    data[at:at + len(content)] = content
    path.write_bytes(data)


def local_header(path, member):
    with zipfile.ZipFile(path) as file: return file.getinfo(member).header_offset


@pytest.mark.parametrize("at, content", [(0, b"XX"), (8, b"\x08\x00"), (18, b"\x04\0\0\0"), (22, b"\x04\0\0\0"), (26, b"\x05\0"), (30, b"b"), (44 - 1, b"1"), (28, b"\xff\xff")], ids=str)
@pytest.mark.parametrize("member", ["archive/data.pkl", "archive/data/0"])
def test_local_header_and_central_directory_disagree(member, at, content, tmp_path):
    path = archive(tmp_path / "x.pth", listing(("x", tensor())), STORAGE)
    overwrite(path, local_header(path, member) + at, content)
    refused(path, read_pth)


@pytest.mark.parametrize("size", [0, 3, 2**16, 2**31 - 2, 2**32 - 2])
@pytest.mark.parametrize("at", [20, 24])
@pytest.mark.parametrize("index", [0, 1])
def test_sizes_in_the_central_directory(index, at, size, tmp_path):
    path = archive(tmp_path / "x.pth", listing(("x", tensor())), STORAGE)
    begin = [found.start() for found in re.finditer(b"PK\1\2", path.read_bytes())][index]
    overwrite(path, begin + at, struct.pack("<I", size))
    refused(path, read_pth)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_lie(tmp_path):
    good = listing(("x", tensor()))
    assert "uncompressed" in refused(archive(tmp_path / "deflated.pth", good, STORAGE, method=zipfile.ZIP_DEFLATED), read_pth)
    assert "uncompressed" in refused(archive(tmp_path / "bomb.pth", bytes(2**25), STORAGE, method=zipfile.ZIP_DEFLATED), read_pth)
    assert "twice" in refused(archive(tmp_path / "twice.pth", good, STORAGE, STORAGE), read_pth)
    assert "twice" in refused(archive(tmp_path / "two-lists.pth", good, STORAGE, ("archive/data.pkl", good)), read_pth)
    refused(archive(tmp_path / "other-list.pth", good, STORAGE, ("other/data.pkl", good)), read_pth)
    refused(archive(tmp_path / "none.pth", good), read_pth)
    with zipfile.ZipFile(archive(tmp_path / "byteorder.pth", good, STORAGE), "a", zipfile.ZIP_DEFLATED) as file: file.writestr("archive/byteorder", bytes(2**25))
    assert "uncompressed" in refused(tmp_path / "byteorder.pth", read_pth)


@pytest.mark.parametrize("bad", ["a\nb", "\x1b[2J", "\r\n", "x" * 100_000, "\u202ex"])
def test_names_stay_in_their_line(bad, tmp_path):
    folder = meta_folder(tmp_path / "model", PARAMS, MODEL | {bad: np.ones(4, np.float32)})
    assert refused(folder).isprintable()
    write_pth(folder / "consolidated.01.pth", MODEL.items())
    assert refused(folder).isprintable()


@pytest.mark.parametrize("file", ["params.json", "consolidated.00.pth"])
def test_what_is_no_file(file, tmp_path):
    folder = meta_folder(tmp_path / "model", PARAMS)
    (folder / file).unlink()
    os.mkfifo(folder / file)
    assert refused(folder).startswith(f"{folder / file}: ")
    (folder / file).unlink(), (folder / file).mkdir()
    assert refused(folder).startswith(f"{folder / file}: ")
    (folder / file).rmdir(), (folder / file).symlink_to(folder / file)
    assert refused(folder).startswith(f"{folder / file}: ")


@pytest.mark.parametrize("start", [b"\x93NUMPY\2\0\xff\xff\xff\xff", b"\x93NUMPY\3\0\xff\xff\xff\x7f", b"\x93NUMPY\1\0\xff\xff", b"\x93NUMPY\1", b"\x93NUMPY\1\0v\0" + b"(" * 9000], ids=str)
def test_headers_of_npy_files(start, tmp_path):
    (tmp_path / "norm.weight.npy").write_bytes(start + b"{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }\n" + bytes(16))
    assert refused(tmp_path).startswith(f"{tmp_path / 'norm.weight.npy'}: ")


# params.json: no number is believed before it is checked ----------------------------------------------------------------------

def meta_folder(folder, params, tensors=MODEL):
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    write_pth(folder / "consolidated.00.pth", tensors.items())
    return folder


PARAMS = config_to_params(CONFIG)
WRONG = [None, "8", "", True, [], [8], {}, {"a": 1}, -1, 0, 0.5, 1e300, float("nan"), float("inf"), 2**31 - 1, 2**31, 2**63, 10**4000]


@pytest.mark.parametrize("field", [*PARAMS, "ffn_dim_multiplier", "use_scaled_rope", "rope_scaling_factor"])
def test_every_field_with_every_wrong_value(field, tmp_path):
    "A few of these are right for a few fields; none may end in anything but a checkpoint or one line."
    folder = meta_folder(tmp_path / "model", PARAMS)
    opened = []
    for value in WRONG:
        (folder / "params.json").write_text(json.dumps(PARAMS | {field: value}))
        try:
            with within(): opened.append((value, open_checkpoint(folder).config))
        except CheckpointError as error:
            assert str(error).startswith(str(folder)) and "\n" not in str(error) and len(str(error)) <= 1000
    shapes = CONFIG.tensor_shapes()
    assert all(config.tensor_shapes() == shapes for _, config in opened)


@pytest.mark.parametrize("field", ["dim", "n_layers", "n_heads"])
def test_missing_fields(field, tmp_path):
    params = {name: value for name, value in PARAMS.items() if name != field}
    assert f"{field} is missing" in refused(meta_folder(tmp_path / "model", params))


@pytest.mark.parametrize("changes", [dict(dim=16), dict(n_layers=2), dict(n_layers=10**6), dict(n_kv_heads=2), dict(n_heads=1), dict(vocab_size=5), dict(vocab_size=2**31 - 1), dict(multiple_of=2**31 - 1),
                                     dict(multiple_of=64), dict(ffn_dim_multiplier=2.0), dict(ffn_dim_multiplier=1e9), dict(dim=2**30, n_heads=2**20)], ids=str)
def test_numbers_that_are_not_the_tensors(changes, tmp_path):
    refused(meta_folder(tmp_path / "model", PARAMS | changes))


# safetensors: a length, a list in JSON, the numbers -----------------------------------------------------------------------------

HEADER = {"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "y": {"dtype": "F16", "shape": [3], "data_offsets": [16, 22]}}
NUMBERS = np.arange(4, dtype=np.float32).tobytes() + np.arange(3, dtype=np.float16).tobytes()


def safetensors(path, header, numbers=NUMBERS, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + numbers)
    return path


def entry(name="x", **changes): return HEADER | {name: HEADER[name] | changes}


def test_a_header_made_by_hand_is_read(tmp_path):
    tensors = read_safetensors(safetensors(tmp_path / "x.safetensors", HEADER | {"__metadata__": {"format": "pt"}}))
    assert tensors["x"].read().tolist() == [[0, 1], [2, 3]] and tensors["y"].read().tolist() == [0, 1, 2]
    assert list(read_safetensors(safetensors(tmp_path / "z.safetensors", HEADER | {"z": {"dtype": "F16", "shape": [0], "data_offsets": [22, 22]}}))) == ["x", "y", "z"]


def test_cut_at_every_length(tmp_path):
    whole = safetensors(tmp_path / "whole.safetensors", HEADER).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        assert read_refused(tmp_path / "cut.safetensors")


def read_refused(path): return refused(path, read_safetensors)


@pytest.mark.parametrize("length", [0, 1, 3, 10**6, 2**31, 2**63 - 1, 2**63, 2**64 - 1])
def test_header_lengths(length, tmp_path):
    read_refused(safetensors(tmp_path / "x.safetensors", HEADER, length=length))


TEXT = json.dumps(HEADER)

@pytest.mark.parametrize("header", [
    TEXT.encode("utf-16"), TEXT.encode("latin-1") + b"\xff", TEXT.replace("x", "\0").encode(), b"[]", b"null", b"1", b'"x"', b"{", b"", b"{}", TEXT[:-1].encode(), TEXT.encode() + b"}", TEXT.replace("16", "1e1").encode(),
    b"[" * 2**23, b'{"x":' * 2**21, b'{"x":' + b"[" * 900 + b"]" * 900 + b"}", TEXT.replace('"y"', '"x"').encode(), TEXT.replace('"F16"', '"F16", "dtype": "F16"').encode(), b'{"__metadata__": {}, "__metadata__": {}, ' + TEXT[1:].encode(),
    b'{"x": ' + b"9" * 10**6 + b"}", TEXT.replace("[2, 2]", f"[{'9' * 10**6}, 2]").encode(), TEXT.replace("[2, 2]", f"[{'1, ' * 10**6}1]").encode(), TEXT.replace("[3]", "[NaN]").encode(), TEXT.encode() + b" " * 2**25,
], ids=lambda header: f"{header[:10]!r}*{len(header)}")
def test_headers_that_are_none(header, tmp_path):
    read_refused(safetensors(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("header", [
    *({"x": value} | {"y": HEADER["y"]} for value in (None, 1, "x", [], {}, [0, 16])),
    *(entry(dtype=dtype) for dtype in (None, 5, [], {}, "", "f32", "F64", "I64", "BOOL", "F8_E4M3", "F32" * 100_000)),
    *(entry(shape=shape) for shape in (None, 4, "22", {}, [4, 2], [-2, -2], [-4], [2.0, 2], [True, 4], ["2", 2], [[2], 2], [2**32, 2**32], [2**63, 2], [2**64, 0], [0, 2**62], [1] * 4 + [4])),
    *(entry(data_offsets=span) for span in (None, 16, [], [0], [0, 16, 16], [0, 16.0], [False, 16], [-16, 0], [16, 0], [1, 17], [0, 15], [0, 17], [8, 24], [2**64, 2**64 + 16], ["0", "16"], {"0": 16})),
    entry("y", data_offsets=[0, 6]), entry("y", data_offsets=[15, 21]), entry("y", data_offsets=[17, 23]), entry("y", data_offsets=[22, 28]), HEADER | {"z": HEADER["x"]}, {"x": HEADER["x"]}, {"y": HEADER["y"]},
], ids=lambda header: str(header)[:90])
def test_entries_that_lie(header, tmp_path):
    read_refused(safetensors(tmp_path / "x.safetensors", header))


def test_trailing_bytes(tmp_path):
    read_refused(safetensors(tmp_path / "x.safetensors", HEADER, NUMBERS + b"\0"))


# A Hugging Face folder: config.json, and an index that names shards -------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    "A sound one, in two shards."
    write_hf(tmp_path / "model", checkpoint(MODEL))
    folder = tmp_path / "model"
    tensors = read_safetensors(folder / "model.safetensors")
    places = {name: f"model-{1 + (index > 4)}.safetensors" for index, name in enumerate(tensors)}
    for file in set(places.values()): write_safetensors(folder / file, {name: tensor for name, tensor in tensors.items() if places[name] == file})
    (folder / "model.safetensors").unlink()
    put_index(folder, places)
    open_checkpoint(folder)
    return folder


def checkpoint(arrays):
    return Checkpoint("memory", CONFIG, {name: LazyTensor(values.shape, values.dtype, "float32", lambda values=values: values) for name, values in arrays.items()})


def put_index(folder, places, **others):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places} | others))


def get_places(folder): return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize("name", ["../model-1.safetensors", "/etc/passwd", "sub/model-1.safetensors", "..", ".", "", "model-3.safetensors", "config.json", "model-1.safetensors\0", "model-1.safetensors/", "C:\\x", "-" * 10_000, None, 1, ["model-1.safetensors"], {}])
def test_shards_that_are_named_amiss(name, folder):
    (folder / "sub").mkdir()
    places = get_places(folder)
    for file in ("sub/model-1.safetensors", "../model-1.safetensors"): (folder / file).write_bytes((folder / "model-1.safetensors").read_bytes())
    put_index(folder, {tensor: name if file == "model-1.safetensors" else file for tensor, file in places.items()})
    refused(folder)


def test_a_shard_may_be_a_link(folder, tmp_path):
    shard = folder / "model-1.safetensors"
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    assert len(open_checkpoint(folder)) == len(MODEL)
    for elsewhere in ("/dev/zero", "/etc/passwd", str(tmp_path), str(shard)):
        shard.unlink()
        shard.symlink_to(elsewhere)
        assert refused(folder).startswith(str(shard))
    shard.unlink()
    assert "no such file" in refused(folder)


def test_the_hubs_cache_is_made_of_links(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "1234", tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert len(open_checkpoint(snapshot)) == len(MODEL)


def test_an_index_that_names_too_much(folder):
    places = get_places(folder)
    put_index(folder, places | {"model.layers.7.mlp.up_proj.weight": "model-1.safetensors"})
    assert "tensor model.layers.7.mlp.up_proj.weight is missing" in refused(folder)
    put_index(folder, {name: "model-1.safetensors" for name in places})
    assert "is missing" in refused(folder)


@pytest.mark.parametrize("content", [b"", b"\n<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", b"\0" * 300, b"GGUF" + b"\xff" * 300])
@pytest.mark.parametrize("file", ["config.json", "model-1.safetensors", "model.safetensors.index.json"])
def test_files_that_are_something_else(file, content, folder):
    (folder / file).write_bytes(content)
    assert refused(folder).startswith(str(folder / file))


@pytest.mark.parametrize("index", [{}, [], {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": 3}])
def test_indexes_that_are_none(index, folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder)


FIELDS = ["architectures", "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size", "head_dim", "rms_norm_eps", "max_position_embeddings", "rope_theta",
          "rope_scaling", "rope_parameters", "sliding_window", "tie_word_embeddings", "hidden_act", "layer_types", "attention_bias", "torch_dtype", "no_rope_layers"]


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_a_config_with_every_wrong_value(field, folder):
    fields = json.loads((folder / "config.json").read_text())
    for value in [*WRONG, {"rope_type": "llama3", "factor": 1e300}, {"type": "linear", "factor": "2"}, {"rope_type": [], "factor": 2.0}, {"rope_type": "dynamic", "factor": 10**30}, {"rope_theta": []}, {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 0},
                  ["full_attention", []], [{}], ["MistralForCausalLM"]]:
        (folder / "config.json").write_text(json.dumps(fields | {field: value}))
        try:
            with within(): opened = open_checkpoint(folder)
        except CheckpointError as error:
            assert str(error).startswith(str(folder)) and "\n" not in str(error) and len(str(error)) <= 1000
        else:
            assert opened.config.tensor_shapes() == CONFIG.tensor_shapes()


# GGUF: counts and lengths that nobody has counted ---------------------------------------------------------------------------------

def string(value): return struct.pack("<Q", len(value.encode())) + value.encode()
def field(name, kind, value): return string(name) + struct.pack("<I", kind) + value
def info(name, shape, kind=0, offset=0): return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
def header(fields, tensors, version=3, magic=b"GGUF"): return magic + struct.pack("<IQQ", version, len(tensors), len(fields)) + b"".join(fields) + b"".join(tensors)


def gguf_file(path, data, numbers=bytes(64)):
    path.write_bytes(data + bytes(-len(data) % 32) + numbers)
    return path


ARCHITECTURE = field("general.architecture", 8, string("llama"))
FOUR = info("x", (4,))


def test_a_gguf_header_made_by_hand_is_read(tmp_path):
    found = read_gguf(gguf_file(tmp_path / "x.gguf", header([ARCHITECTURE, field("list", 9, struct.pack("<IQ2f", 6, 2, 1, 2)), field("texts", 9, struct.pack("<IQ", 8, 1) + string("é"))], [FOUR, info("y", (32, 2), 8, 32)]), bytes(200)))
    assert found.fields == {"general.architecture": "llama", "list": [1.0, 2.0], "texts": ["é"]}
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {"x": (4,), "y": (2, 32)} and found.tensors["y"].rows.shape == (2, 34)


@pytest.mark.parametrize("data", [
    header([], [], magic=b"GGUX"), *(header([ARCHITECTURE], [FOUR], version) for version in (0, 1, 4, 2**24 * 3, 2**32 - 1)),
    *(b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + ARCHITECTURE + FOUR for tensors, fields in [(2**64 - 1, 0), (0, 2**64 - 1), (2**64 - 1, 2**64 - 1), (1, 2), (2, 1), (2**32, 1)]),
    header([ARCHITECTURE, ARCHITECTURE], [FOUR]), header([ARCHITECTURE], [FOUR, FOUR]),
    *(header([ARCHITECTURE, field("general.alignment", kind, value)], [FOUR]) for kind, value in [(8, string("32")), (6, struct.pack("<f", 32)), (7, b"\1"), (4, bytes(4)), (5, struct.pack("<i", -32)), (10, struct.pack("<Q", 2**64 - 1)), (9, struct.pack("<IQI", 4, 1, 32))]),
    *(header([ARCHITECTURE, field("x", kind, value)], [FOUR]) for kind, value in [
        (13, b""), (2**32 - 1, b""), (9, struct.pack("<IQ", 8, 2**64 - 1)), (9, struct.pack("<IQ", 0, 2**64 - 1)), (9, struct.pack("<IQ", 12, 2**61)), (9, struct.pack("<IQ", 9, 1) * 100_000), (9, struct.pack("<IQIQI", 9, 1, 4, 1, 1)), (9, struct.pack("<IQ", 77, 1)),
        (8, struct.pack("<Q", 2**64 - 1)), (8, struct.pack("<Q", 2**32)), (8, struct.pack("<Q", 4) + b"\xff\xfe\xff\xff")]),
    header([struct.pack("<Q", 2**63) + ARCHITECTURE], [FOUR]),
    *(header([ARCHITECTURE], [info("x", *shape)]) for shape in [((0,),), ((17,),), ((2**64 - 1,),), ((2**32, 2**32),), ((2**62, 4),), ((4, 0),), ((4,), 0, 64), ((4,), 0, 2**64 - 1), ((4,), 0, 2**63), ((4,), 999), ((4,), 2**32 - 1), ((4,), 8), ((33,), 8), ((1,) * 5,)]),
    header([ARCHITECTURE], [string("x") + struct.pack("<I", 2**32 - 1)]), header([ARCHITECTURE], [string("x") + struct.pack("<IIQ", 0, 0, 0)]),
    header([field(f"{number}", 9, struct.pack("<IQ", 8, 1) + string("")) for number in range(20_000)], [info(str(number), (2**40,)) for number in range(10)]),
], ids=lambda data: f"{len(data)} {data[-30:]!r}")
def test_gguf_headers_that_lie(data, tmp_path):
    path = gguf_file(tmp_path / "x.gguf", data)
    with within(), pytest.raises(CheckpointError) as caught: read_gguf(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value) and len(str(caught.value)) <= 1000


def test_a_gguf_file_cut_at_every_length(tmp_path):
    whole = gguf_file(tmp_path / "whole.gguf", header([ARCHITECTURE], [FOUR]), bytes(16)).read_bytes()
    for length in range(len(whole)):
        (tmp_path / f"{length}.gguf").write_bytes(whole[:length])
        with pytest.raises(CheckpointError): read_gguf(tmp_path / f"{length}.gguf")


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("key", ["embedding_length", "block_count", "attention.head_count", "attention.head_count_kv", "feed_forward_length", "context_length", "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scaling.type",
                                 "rope.scaling.factor", "attention.sliding_window", "expert_count"])
def test_every_metadata_field_with_every_wrong_value(key, tmp_path, monkeypatch):
    write_gguf(tmp_path / "x.gguf", checkpoint(MODEL))
    found = read_gguf(tmp_path / "x.gguf")
    for value in WRONG:
        changed = dataclasses.replace(found, fields=found.fields | {f"llama.{key}": value})
        monkeypatch.setattr(gguf, "read_gguf", lambda path: changed)
        try:
            with within(): opened = open_checkpoint(tmp_path / "x.gguf")
        except CheckpointError as error:
            assert str(error).startswith(str(tmp_path)) and "\n" not in str(error) and len(str(error)) <= 1000
        else:
            assert opened.config.tensor_shapes() == CONFIG.tensor_shapes()


# The fuzzer, briefly --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", fuzz.SAMPLES)
def test_mutations(form):
    _, wrong = fuzz.fuzz(form, 300)
    assert not wrong
