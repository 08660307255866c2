"""The command line: what it prints and where, and one line with exit code 2 for every mistake of the user's."""
import importlib.util
import io
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from llama_nb import checkpoint, cli, conversion, hub, meta
from llama_nb.meta import config_from_params
from llama_nb.checkpoint import LlamaConfig, bard_folder
from llama_nb.hub import open_checkpoint
from llama_nb.cli import main
from llama_nb.vocabularies import load_tokenizer, synth_tokenizer

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ["keras", "matplotlib", "nbdev", "tensorflow", "torch"]
LLAMA_NB = [sys.executable, "-c", "import sys; from llama_nb.cli import main; sys.exit(main())"]
TINY = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=16, norm_eps=1e-5, max_seq_len=32)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    "Every test runs in an empty folder of its own."
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def one_load(monkeypatch, bard):
    "The command line with bard loaded already, so that a test takes no second load."
    monkeypatch.setattr(cli, "load", lambda name, *_, **__: bard)


@pytest.fixture
def stdin(monkeypatch):
    def give(data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    return give


@pytest.fixture
def complaint(capsys, empty_folder):
    "Runs a command that must fail, and gives its one line; nothing may be printed to standard output or left behind."
    def run(*arguments):
        before = sorted(empty_folder.rglob("*"))
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.endswith("\n") and err.count("\n") == 1, (out, err)
        assert sorted(empty_folder.rglob("*")) == before
        return err
    return run


@pytest.fixture
def copy(tmp_path):
    "A copy of bard's folder, to be damaged."
    return shutil.copytree(bard_folder(), tmp_path / "model")


# Mistakes in the arguments.

@pytest.mark.parametrize("arguments, names", [
    ("--temp -1", "temperature"), ("--temp nan", "temperature"), ("--temp inf", "temperature"), ("--temp warm", "--temp"),
    ("--top-p 0", "top_p"), ("--top-p 1.1", "top_p"), ("--top-p nan", "top_p"), ("--top-k -1", "--top-k"), ("--min-p 2", "min_p"),
    ("--repetition-penalty 0", "repetition_penalty"), ("-n 0", "--max-new-tokens"), ("-n -5", "--max-new-tokens"), ("-n 2.5", "--max-new-tokens"),
    ("-t 0", "--threads"), ("-c 0", "--context-length"), ("-c 1", "context_length"), ("-c 100000", "context_length"), ("-s -1", "--seed"),
    ("--dtype int3", "--dtype"), ("--stop=", "--stop"), ("--frobnicate", "--frobnicate"),
])
def test_argument_out_of_range(complaint, arguments, names):
    assert names in complaint("generate", "-m", "bard", "-p", "To be", *arguments.split())


@pytest.mark.parametrize("arguments", [[], ["dance"], ["synth"], ["info", "--json", "a", "b"]])
def test_command_that_is_none(complaint, arguments):
    assert "--help" in complaint(*arguments)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_empty_prompt(complaint, stdin, command):
    assert "prompt" in complaint(command, "-m", "bard", "-p", "")
    for nothing in (b"", b"\n"):
        stdin(nothing)
        assert "prompt" in complaint(command, "-m", "bard")


def test_prompt_longer_than_the_context(complaint, one_load, bard):
    length = bard.config.context_length
    assert f"fewer than {length} tokens" in complaint("generate", "-m", "bard", "-p", "word " * length)


def test_standard_input_that_is_not_utf8(complaint, stdin):
    stdin("müde".encode("latin-1"))
    assert "byte 0xfc at 1" in complaint("generate", "-m", "bard")


def test_argument_that_is_not_unicode(complaint, one_load):
    assert "valid Unicode" in complaint("generate", "-m", "bard", "-p", os.fsdecode(b"m\xfcde"))


def test_chat_without_a_template(complaint, monkeypatch):
    monkeypatch.setattr(cli, "load", None)
    assert "no chat template" in complaint("chat", "-m", "bard", "-p", "Good morrow")


# Mistakes in the files.

def set_params(folder, **fields):
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({name: value for name, value in (params | fields).items() if value is not None}))


def damage_weights(folder, change):
    "Writes the folder's weights anew, one tensor changed."
    whole = open_checkpoint(folder)
    values = {name: np.asarray(whole.read(name), "float32") for name in whole}
    change(values)
    (folder / "consolidated.00.pth").unlink()
    meta.write_pth(folder / "consolidated.00.pth", values.items())


def put_nan(folder):
    "The first number of norm.weight, where it lies in the file."
    path, values = folder / "consolidated.00.pth", open_checkpoint(folder).read("norm.weight").tobytes()
    path.write_bytes(path.read_bytes().replace(values, np.array(0x7FC0, "<u2").tobytes() + values[2:]))


DAMAGES = {
    "no weights": (lambda folder: (folder / "consolidated.00.pth").unlink(), "consolidated.00.pth"),
    "empty weights": (lambda folder: (folder / "consolidated.00.pth").write_bytes(b""), "empty"),
    "web page": (lambda folder: (folder / "consolidated.00.pth").write_text("<!DOCTYPE html><html>Log in</html>"), "web page"),
    "truncated weights": (lambda folder: os.truncate(folder / "consolidated.00.pth", 1_000_000), "cut short"),
    "no params": (lambda folder: (folder / "params.json").unlink(), "params.json"),
    "params not JSON": (lambda folder: (folder / "params.json").write_text("{dim: 4096}"), "not JSON"),
    "n_heads does not divide dim": (lambda folder: set_params(folder, n_heads=7), "divide dim"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer.model"),
    "truncated tokenizer": (lambda folder: os.truncate(folder / "tokenizer.model", 10_001), "tokenizer.model"),
    "tokenizer of another size": (lambda folder: (folder / "tokenizer.model").write_bytes(synth_tokenizer(999)), "2048"),
    "missing tensor": (lambda folder: damage_weights(folder, lambda values: values.pop("norm.weight")), "norm.weight is missing"),
    "extra tensor": (lambda folder: damage_weights(folder, lambda values: values.update(extra=np.ones(3))), "extra"),
    "misshapen tensor": (lambda folder: damage_weights(folder, lambda values: values.update({"norm.weight": np.ones(3)})), "norm.weight should have shape"),
    "NaN": (put_nan, "norm.weight should be finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(complaint, copy, damage):
    harm, names = DAMAGES[damage]
    harm(copy)
    line = complaint("generate", "-m", copy, "-p", "To be")
    assert names in line and str(copy) in line


@pytest.mark.parametrize("data, names", [(b"", "empty"), (b"<html>", "web page"), (b"GGUF\3\0\0\0", "GGUF"), (b"hello", "model.gguf")])
@pytest.mark.parametrize("command", ["info", "generate -p To -m"])
def test_damaged_gguf(complaint, tmp_path, data, names, command):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    assert names in complaint(*command.split(), path)


def test_no_such_model(complaint):
    assert "bard, smollm2-135m-instruct" in complaint("info", "brad")


def test_pickle_that_runs_a_command(complaint, copy, empty_folder):
    class Canary:
        def __reduce__(self):
            return os.system, (f"touch {empty_folder}/canary",)
    with zipfile.ZipFile(copy / "consolidated.00.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"norm.weight": Canary()}, protocol=2))
    assert "refused" in complaint("generate", "-m", copy, "-p", "To be")


def test_cache_folder_that_cannot_be_written(complaint, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMA_NB_CACHE", str(tmp_path / "file" / "cache"))
    assert "cache" in complaint("info")


def test_no_network_and_no_cached_file(complaint, tmp_path, monkeypatch):
    def unreachable(*_):
        raise checkpoint.CheckpointError("unreachable")
    monkeypatch.setenv("LLAMA_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "download_package", unreachable)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "not to be had" in complaint("generate", "-p", "To be")
    assert not any((tmp_path / "cache").rglob("*"))


# What works.

def test_generate(one_load, bard, capsys):
    assert main(["generate", "-m", "bard", "-p", "To be", "-n", "4", "--temp", "0"]) == 0
    out, err = capsys.readouterr()
    assert out == "To be" + bard.generate("To be", max_new_tokens=4, temperature=0) + "\n"
    assert re.fullmatch(r"\d+ tokens read in [\d.]+ s, 4 written, [\d.]+ tokens/s \(length\); float32; peak memory [\d.]+ [MG]B; .*bard\n", err)


def test_generate_from_standard_input(one_load, capsys, stdin):
    stdin("Où es-tu\n".encode())
    assert main(["generate", "-m", "bard", "-n", "2", "-s", "1"]) == 0
    assert capsys.readouterr().out.startswith("Où es-tu")


def test_generate_as_json(one_load, bard, capsys):
    assert main("generate -m bard -p To -n 4 --seed 3 --top-p 0.9 --json".split()) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert err == "" and out.count("\n") == 1
    assert answer["text"] == bard.generate("To", max_new_tokens=4, seed=3, top_p=0.9)
    assert set(answer) == {"text", "prompt_tokens", "new_tokens", "finish_reason", "prefill_seconds", "tokens_per_second", "peak_memory_bytes", "path", "dtype"}
    assert answer["new_tokens"] == 4 and answer["finish_reason"] == "length" and answer["peak_memory_bytes"] > 1e7


def test_bfloat16(capsys):
    assert main("generate -m bard -p To -n 2 --dtype bfloat16 --json".split()) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 2


def test_stop_string(one_load, bard, capsys):
    text = bard.generate("To be", max_new_tokens=20, temperature=0)
    assert main(["generate", "-m", "bard", "-p", "To be", "-n", "20", "--temp", "0", "--stop", text[4:6]]) == 0
    assert capsys.readouterr().out == "To be" + text[:text.index(text[4:6])] + "\n"


def test_full_context_is_said(one_load, bard, capsys):
    words = next(count for count in range(1000, 0, -1) if len(bard.tokenizer.encode("and " * count)) < bard.config.context_length)
    assert main(["generate", "-m", "bard", "-p", "and " * words, "--temp", "0"]) == 0
    assert "--context-length gives more" in capsys.readouterr().err


def test_chat(smollm2, monkeypatch, capsys):
    monkeypatch.setattr(cli, "load", lambda name, *_, **__: smollm2)
    assert main(["chat", "-p", "What do bees eat?", "--system", "You are brief.", "-n", "8", "--temp", "0", "--json"]) == 0
    messages = [dict(role="system", content="You are brief."), dict(role="user", content="What do bees eat?")]
    assert json.loads(capsys.readouterr().out)["text"] == smollm2.chat(messages, max_new_tokens=8, temperature=0)


def test_chat_line_by_line(smollm2, monkeypatch, capsys):
    monkeypatch.setattr(cli, "load", lambda name, *_, **__: smollm2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello!\n\nAnd what do they eat?\n"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(["chat", "-n", "4", "--temp", "0", "--stats"]) == 0
    assert capsys.readouterr().err.count("4 written") == 2


@pytest.mark.parametrize("name", ["nobody/nothing", "weights/7B.gguf", "hf://nobody/nothing"])
def test_neither_here_nor_on_the_hub(name, complaint, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert f"{name}: no such file or folder; as a repository: " in complaint("info", name)


def test_info(capsys):
    assert main(["info", "bard", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["parameters"] == open_checkpoint(bard_folder()).config.n_parameters <= 5_000_000
    assert about["dtype"] == "int8" and about["memory"][0]["weights_bytes"] == 4 * about["parameters"] and about["tokenizer"] == "SentencePieceTokenizer"
    assert main(["info", "-m", "bard", "--dtype", "bfloat16", "-c", "64"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"context_length\s+64\n", shown) and "memory for 64 tokens" in shown
    assert re.search(r"float32 .* fits\n", shown) and shown.endswith("the most exact that fits: float32\n")


def test_info_when_memory_is_short(capsys, monkeypatch):
    monkeypatch.setattr(conversion, "available_memory", lambda: 10_000_000)
    assert main(["info", "bard"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"float32 .* does not fit\n", shown) and shown.endswith("the most exact that fits: int8\n")
    assert main(["info", "bard", "--json"]) == 0
    assert [row["fits"] for row in json.loads(capsys.readouterr().out)["memory"]] == [False, False, True, True]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(checkpoint.SIZES, "tiny", TINY)


def test_synth_then_generate(tiny, capsys):
    assert main("synth made --like tiny --layers 1 --json".split()) == 0
    made = json.loads(capsys.readouterr().out)
    config = config_from_params(TINY | dict(n_layers=1), 32000)
    assert made["parameters"] == config.n_parameters and open_checkpoint("made").config == config
    assert main("generate -m made -p bees -n 3 --temp 0 --json".split()) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] <= 3


def test_synth_is_seeded(tiny):
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["synth", folder, "--like", "tiny", "-s", seed]) == 0
    a, b, c = (open_checkpoint(folder).read("output.weight").astype("float32") for folder in "abc")
    assert (a == b).all() and (a != c).any()


@pytest.mark.parametrize("arguments, names", [("--like 8B", "8B"), ("--layers 0", "--layers"), ("--like tiny --seed x", "--seed")])
def test_synth_refuses(tiny, complaint, arguments, names):
    assert names in complaint("synth", "made", *arguments.split())


def test_synth_keeps_what_is_there(tiny, complaint, empty_folder):
    (empty_folder / "poem.txt").write_text("mine")
    assert "poem.txt" in complaint("synth", ".", "--like", "tiny")


@pytest.mark.parametrize("form", ["meta", "hf", "gguf"])
def test_convert_to_other_forms(form, complaint, capsys):
    assert main(["convert", "bard", "it", "--to", form]) == 0
    assert capsys.readouterr().out.startswith("it: 4,676,352 parameters as ")
    bard, it = open_checkpoint(bard_folder()), open_checkpoint("it")
    assert all((it.read(name) == bard.read(name)).all() for name in bard) and it.config == bard.config
    assert load_tokenizer("it").encode("Où, 1 bee?") == load_tokenizer(bard_folder()).encode("Où, 1 bee?")
    assert "it: " in complaint("convert", "bard", "it", "--to", form)


def test_convert_refuses_a_dtype_that_a_form_has_not(complaint, tmp_path):
    assert "--to hf" in complaint("convert", "bard", "it", "--to", "hf", "--dtype", "int4") and not Path("it").exists()


def test_train(complaint, capsys):
    Path("texts.txt").write_text((bard_folder().parent / "macbeth.txt").read_text()[:30_000])
    assert main("train texts.txt it --preset infant --minutes 0.01 --json".split()) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] >= 20 and 1 < report["bits_per_byte"] < 9
    assert main("generate -m it -p To -n 2 --temp 0".split()) == 0
    capsys.readouterr()
    assert "nowhere.txt" in complaint("train", "nowhere.txt", "new") and not Path("new").exists()


@pytest.mark.parametrize("command", ["", "generate", "chat", "info", "list", "rm", "synth", "convert", "train", "bench"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0 and "usage: llama-nb" in capsys.readouterr().out


# A process of its own.

def start(*arguments, **options):
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*LLAMA_NB, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


@pytest.mark.parametrize("arguments", [["--help"], ["info", "bard"], ["generate", "--temp", "-1", "-p", "To be"], ["generate", "-m", "brad", "-p", "To be"], ["chat", "-m", "bard", "-p", "To be"]])
def test_what_needs_no_tensorflow_imports_none(arguments):
    code = f"import sys; from llama_nb.cli import main\ntry: main({arguments})\nexcept SystemExit: pass\nprint(*set({HEAVY}) & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == ""


def test_text_goes_out_and_one_line_to_standard_error():
    out, err = start(*"generate -m bard -n 3 --temp 0".split()).communicate("Où".encode(), timeout=120)
    assert out.startswith("Où".encode()) and out.endswith(b"\n")
    assert re.fullmatch(rb"\d+ tokens read .* 3 written, .*bard\n", err), "TensorFlow's greetings are not shown"


def test_interrupt_prints_what_it_has(monkeypatch):
    monkeypatch.setitem(checkpoint.SIZES, "long", TINY | dict(max_seq_len=50_000))
    assert main("synth long --like long --layers 1".split()) == 0
    process = start(*"generate -m long -p To --temp 0 -c 50000".split())
    begin = process.stdout.read(6)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130 and (begin + rest).endswith(b"\n")
    assert err.count(b"\n") == 1 and b"(interrupted)" in err


def pressing_at(call, bard, monkeypatch, error=None):
    "Ctrl-C is pressed while that token is computed; perhaps something on the way makes another error of it."
    calls, advance = itertools.count(1), bard.decoder.advance
    def pressed(ids):
        if next(calls) == call:
            try: signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt: raise error or KeyboardInterrupt
        return advance(ids)
    monkeypatch.setattr(bard.decoder, "advance", pressed)


@pytest.mark.parametrize("error", [None, RuntimeError("lost")])
def test_interrupt_before_the_first_token(error, one_load, bard, monkeypatch, capsys):
    pressing_at(1, bard, monkeypatch, error)
    assert main("generate -m bard -p To --temp 0".split()) == 130
    assert capsys.readouterr().out == "To\n"


def test_interrupt_leaves_one_json_object(one_load, bard, monkeypatch, capsys):
    pressing_at(2, bard, monkeypatch)
    assert main("generate -m bard -p To -n 9 --temp 0 --json".split()) == 130
    answer = json.loads(capsys.readouterr().out)
    assert answer["finish_reason"] == "interrupted" and answer["new_tokens"] >= 1 and answer["text"]


def test_interrupt_shows_what_is_held_back_for_a_stop_string(one_load, bard, monkeypatch, capsys):
    whole = bard.generate("To be", max_new_tokens=4, temperature=0)
    pressing_at(4, bard, monkeypatch)
    assert main(["generate", "-m", "bard", "-p", "To be", "--temp", "0", "--stop", whole + "no, this never comes"]) == 130
    assert capsys.readouterr().out == f"To be{whole}\n"


def test_reader_that_goes_away():
    process = start(*"generate -m bard -p To -n 100 --temp 0".split())
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 0 and err == b""


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_another_backend_of_keras(backend):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([*LLAMA_NB, *"generate -m bard -p To -n 1 --temp 0 --dtype float32".split()], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("To") and len(done.stderr.splitlines()) == 1
    if importlib.util.find_spec(backend):
        code = "import llama_nb\ntry: llama_nb.load('bard', dtype='float32')\nexcept llama_nb.GenerationError as error: print(error)"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout == f"dtype float32 needs Keras with TensorFlow, found {backend}; set KERAS_BACKEND=tensorflow before Keras is imported, or take int8\n"
