"Files made to do harm: nothing in them runs, and each is refused in one line, in little time and memory."
import contextlib
import itertools
import json
import os
import pickle
import resource
import struct
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from llama_nb.checkpoint import CheckpointError, LlamaConfig, read_pth, write_pth
from llama_nb.forms import open_checkpoint

CONFIG = LlamaConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=8, vocab_size=4)
MODEL = {name: np.ones(shape, np.float32) for name, shape in CONFIG.tensor_shapes().items()}


@contextlib.contextmanager
def within(seconds=4, memory=500 * 2**20):
    "So much more memory than now, and of the processor's time two seconds; four, as it may have others to serve."
    before, (_, hard) = time.process_time(), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    assert time.process_time() - before < seconds


def refused(path, action=open_checkpoint):
    "The one line about it that opening and reading must end in."
    with within(), pytest.raises(CheckpointError) as caught:
        checkpoint = action(path)
        for name in checkpoint: checkpoint.read(name)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and "MemoryError" not in message and len(message) < 1000
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


DEEP = b")" + b"\x85" * 520_000
DOUBLED = b")" + b"q\x01h\x01\x86" * 60
WIDE = group(*[b"K\x01"] * 20_000)

@pytest.mark.parametrize("program", [
    b"", b".", b"}", b"(", b"t.", b"R.", b"s.", b"u.", b"(u.", b"\x85.", b"h\x00.", b"}q\x00h\x01.", b"}}s.", b"ctorch\nFloatStorage\n)R.", listing(("x", tensor()))[:40], listing(("x", tensor()))[:-1],
    b"\x80\x02}" + DEEP + b"Ns.", b"\x80\x02}" + DOUBLED + b"Ns.", b"\x80\x02" + DEEP + b")R.", name("collections", "OrderedDict") + group(group(group(DEEP, b"N"))) + b"R.",
    listing(("x", DEEP)), listing(("x", DOUBLED)), b"\x80\x02" + DOUBLED + b".", b"(" * 520_000 + b".", b"\x80\x02}" + b"}" * 520_000 + b").",
    listing(("x", b"N"), before=b"".join(b"r" + struct.pack("<I", 2**32 - 1 - index) for index in range(100_000))),
    b"X\xff\xff\xff\xff.", b"\x8a\xff.", b"\x8b\xff\xff\xff\x7f.", b"\x8b\xff\xff\xff\xff.", b"I" + b"9" * 500_000 + b"\n.", b"L" + b"9" * 500_000 + b"L\n.",
    b"\x80\x02" + group(text("storage"), text("k"), text("0"), text("cpu"), b"K\x04") + b"q\x010" + WIDE + b"q\x020" + b"".join(
        name("torch._utils", "_rebuild_tensor_v2") + b"(h\x01K\x00h\x02h\x02tR0" for _ in range(10_000)) + b"}.",
    listing(("x" * 520_000, b"N")), listing(("x", tensor())) + b" " * 2**24,
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


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_lie(tmp_path):
    good = listing(("x", tensor()))
    assert "uncompressed" in refused(archive(tmp_path / "deflated.pth", good, STORAGE, method=zipfile.ZIP_DEFLATED), read_pth)
    assert "uncompressed" in refused(archive(tmp_path / "bomb.pth", bytes(2**26), STORAGE, method=zipfile.ZIP_DEFLATED), read_pth)
    assert "twice" in refused(archive(tmp_path / "twice.pth", good, STORAGE, STORAGE), read_pth)
    assert "twice" in refused(archive(tmp_path / "two-lists.pth", good, STORAGE, ("archive/data.pkl", good)), read_pth)
    refused(archive(tmp_path / "other-list.pth", good, STORAGE, ("other/data.pkl", good)), read_pth)
    refused(archive(tmp_path / "none.pth", good), read_pth)
    with zipfile.ZipFile(archive(tmp_path / "byteorder.pth", good, STORAGE), "a", zipfile.ZIP_DEFLATED) as file: file.writestr("archive/byteorder", bytes(2**26))
    assert "uncompressed" in refused(tmp_path / "byteorder.pth", read_pth)


# params.json: no number is believed before it is checked ----------------------------------------------------------------------

def meta_folder(folder, params, tensors=MODEL):
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    write_pth(folder / "consolidated.00.pth", tensors.items())
    return folder


PARAMS = CONFIG.to_params()
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
            assert str(error).startswith(str(folder)) and "\n" not in str(error) and len(str(error)) < 1000
    shapes = CONFIG.tensor_shapes()
    assert all(config.tensor_shapes() == shapes for _, config in opened)


@pytest.mark.parametrize("field", ["dim", "n_layers", "n_heads"])
def test_missing_fields(field, tmp_path):
    params = {name: value for name, value in PARAMS.items() if name != field}
    assert f"{field} is missing" in refused_params(meta_folder(tmp_path / "model", params))


def refused_params(folder):
    with within(), pytest.raises(CheckpointError) as caught: open_checkpoint(folder)
    return str(caught.value)


@pytest.mark.parametrize("changes", [dict(dim=16), dict(n_layers=2), dict(n_layers=10**6), dict(n_kv_heads=2), dict(n_heads=1), dict(vocab_size=5), dict(vocab_size=2**31 - 1), dict(multiple_of=2**31 - 1),
                                     dict(multiple_of=64), dict(ffn_dim_multiplier=2.0), dict(ffn_dim_multiplier=1e9), dict(dim=2**30, n_heads=2**20)], ids=str)
def test_numbers_that_are_not_the_tensors(changes, tmp_path):
    refused_params(meta_folder(tmp_path / "model", PARAMS | changes))
