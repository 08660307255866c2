"""The command line as people use it: prompts with special tokens, what Windows writes, paths with ~, a conversation on a terminal, a full disk behind the output; two threads with one model."""
import io
import json
import os
import re
import select
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from llama_nb import __version__, cli, load
from llama_nb.chat import Conversation
from llama_nb.checkpoint import bard_folder
from llama_nb.cli import main
from llama_nb.generation import Stream
from llama_nb.library import with_context
from llama_nb.sampling import GenerationError, Sampler

ROOT = Path(__file__).resolve().parent.parent
LLAMA_NB = [sys.executable, "-c", "import sys; from llama_nb.cli import main; sys.exit(main())"]
TURNS = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stdin(monkeypatch):
    def give(data: bytes): monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    return give


@pytest.fixture
def smol(smollm2, monkeypatch):
    monkeypatch.setattr(cli, "load", lambda *_, **__: smollm2)
    return smollm2


@pytest.fixture
def loaded(bard, monkeypatch):
    monkeypatch.setattr(cli, "load", lambda *_, **__: bard)
    return bard


def answer_of(capsys, *arguments):
    assert main([*arguments, "--temp", "0", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# Special tokens.

def test_a_prompt_in_the_models_own_form(smol, capsys):
    ids = smol.tokenizer.encode(TURNS, allow_special=True)
    found = answer_of(capsys, "generate", "-p", TURNS, "-n", "12")
    assert found["prompt_tokens"] == len(ids) == 16 and "Paris" in found["text"]
    assert answer_of(capsys, "generate", "-p", TURNS, "-n", "1", "--no-special")["prompt_tokens"] == len(smol.tokenizer.encode(TURNS)) > 16
    assert answer_of(capsys, "chat", "-p", TURNS, "-n", "1")["prompt_tokens"] == len(smol.chat_ids([dict(role="user", content=TURNS)]))


def test_generate_reads_special_tokens_when_told(smollm2):
    ids = smollm2.tokenizer.encode(TURNS, allow_special=True)
    assert smollm2.stream(TURNS, allow_special=True).prompt_ids == ids != smollm2.stream(TURNS).prompt_ids
    assert smollm2.generate(TURNS, 5, temperature=0, allow_special=True) == smollm2.generate(ids, 5, temperature=0)


def test_no_second_begin_token(loaded, capsys):
    assert answer_of(capsys, "generate", "-m", "bard", "-p", "<s>To be", "-n", "1")["prompt_tokens"] == len(loaded.tokenizer.encode("To be"))


def written(tokenizer, text, stop, allow_special=True):
    "What a stream shows when the model writes just this."
    script, prompt = tokenizer.encode(text, allow_special=allow_special, add_bos=False), tokenizer.encode("x")

    def advance(ids):
        logits = np.zeros(tokenizer.vocab_size, "float32")
        logits[script[len(ids) - len(prompt)]] = 9
        return logits
    stream = Stream(advance, tokenizer, 99, prompt, len(script), Sampler(temperature=0), stop)
    return "".join(stream), stream.finish_reason


@pytest.mark.parametrize("text, stop, expected", [
    (" so<|endoftext|> and on", ["<|endoftext|>"], (" so", "end")),
        (" so<repo_name> and on", ["<repo_name>"], (" so", "stop")),
    (" so<repo_name> and on", ["User:", "o<repo_name> an"], (" s", "stop")),
    (" so<repo_name> but on", ["o<repo_name> an"], (" so but on", "length")),
    (" so<repo_name>", ["<repo_name> and"], (" so", "length")),
    (" so and on", ["<repo_name>"], (" so and on", "length")),
])
def test_stop_finds_special_tokens(smollm2, text, stop, expected):
    assert written(smollm2.tokenizer, text, stop) == expected


def test_stop_finds_their_letters_too(smollm2):
    assert written(smollm2.tokenizer, " so<|endoftext|> and on", ["<|endoftext|>"], allow_special=False) == (" so", "stop")


# Prompts, options, paths.

def test_a_text_is_the_same_from_windows(loaded, capsys, stdin, empty_folder):
    expected = answer_of(capsys, "generate", "-m", "bard", "-p", "To be,\nor not", "-n", "3")
    for data in (b"To be,\nor not\n", b"To be,\r\nor not\r\n", b"\xef\xbb\xbfTo be,\nor not", b"\xef\xbb\xbfTo be,\r\nor not\r\n"):
        stdin(data)
        found = answer_of(capsys, "generate", "-m", "bard", "-n", "3")
        Path("prompt.txt").write_bytes(data)
        again = answer_of(capsys, "generate", "-m", "bard", "-n", "3", "-f", "prompt.txt")
        assert [each[name] for each in (found, again) for name in ("text", "prompt_tokens")] == 2 * [expected["text"], expected["prompt_tokens"]]


@pytest.mark.parametrize("arguments, names", [(["-f", "nowhere.txt"], "nowhere.txt: cannot be read"), (["-f", "."], "cannot be read"), (["-f", "x", "-p", "y"], "not allowed with"),
                                              (["-f", "latin.txt"], "latin.txt should be UTF-8, found byte 0xfc at 1"), (["-f", "empty.txt"], "the prompt should have")])
def test_files_that_are_no_prompt(arguments, names, capsys):
    Path("latin.txt").write_bytes("müde".encode("latin-1")), Path("empty.txt").write_bytes(b"\xef\xbb\xbf\r\n")
    assert main(["generate", "-m", "bard", *arguments]) == 2
    err = capsys.readouterr().err
    assert names in err and err.count("\n") == 1


def test_texts_that_begin_with_a_dash(loaded, capsys):
    found = answer_of(capsys, "generate", "-m", "bard", "-p", "---", "-n", "2", "--stop", "---", "--stop", "-n")
    assert found["prompt_tokens"] == len(loaded.tokenizer.encode("---"))
    parsed = cli.make_parser().parse_args(["chat", "--system", "--json", "--stop", "-p", "--prompt", "--x", "-t", "1"])
    assert (parsed.system, parsed.stop, parsed.prompt, parsed.threads, parsed.json) == ("--json", ["-p"], "--x", 1, False)
    assert main(["generate", "-p"]) == 2 and "expected one argument" in capsys.readouterr().err


def test_home_in_every_path(monkeypatch, empty_folder):
    monkeypatch.setenv("HOME", str(empty_folder)), monkeypatch.setenv("USERPROFILE", str(empty_folder))
    inside = str(empty_folder / "it")
    lines = {"generate -m ~/it -f ~/it": ["model", "file"], "generate --model=~/it": ["model"], "chat -m ~/it": ["model"], "info ~/it": ["path"], "bench ~/it": ["path"], "rm ~/it": ["name"],
             "synth ~/it": ["folder"], "convert ~/it ~/it": ["source", "folder"], "train ~/it ~/it": ["corpus", "folder"], "perplexity ~/it ~/it": ["path", "text"]}
    for line, names in lines.items():
        if line.split()[0] not in cli.COMMANDS: continue
        arguments = cli.make_parser().parse_args(line.split())
        assert [getattr(arguments, name) for name in names] == [inside] * len(names)


def test_version(capsys):
    with pytest.raises(SystemExit) as end: main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"llama-nb {__version__}\n"


# Outputs that cannot be written.

def shell(line, **options):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | dict(PYTHONPATH=str(ROOT)) | options
    program = " ".join(f"'{part}'" for part in LLAMA_NB)
    return subprocess.run(["bash", "-c", line.replace("llama-nb", program)], capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["generate -m bard -n 3 -p To", "info bard", "--version"])
def test_a_full_disk_is_one_line(command, unbuffered):
    done = shell(f"llama-nb {command} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (2, "llama-nb: standard output cannot be written (No space left on device)\n")


@pytest.mark.parametrize("command", ["generate -m bard -n 3 -p To", "info bard", "--help"])
def test_a_closed_pipe_is_silence(command):
    done = shell(f"(llama-nb {command}; echo $? > code) | true; cat code")
    assert (done.stdout, done.stderr) == ("0\n", "")
    done = shell("(llama-nb generate -m brad -p To; echo $? > code) 2>&1 | true; cat code")
    assert (done.stdout, done.stderr) == ("2\n", "")


# A conversation.

@pytest.fixture
def typed(smol, monkeypatch, capsys):
    "Types lines on a terminal; gives what was printed."
    def type_in(*lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        assert main(["chat", "-n", "4", "--temp", "0", *options]) == 0
        return capsys.readouterr()
    return type_in


def contents(file): return [(message["role"], message["content"]) for message in json.loads(Path(file).read_text(encoding="utf-8"))["messages"]]


def test_a_conversation_is_saved_and_loaded(typed, smol):
    out, err = typed("Héllo 🐝", "", "   ", "/system Be brief.", "And?", "/save talk.json", "/clear", "Hm", "/save short.json", "/system", "/load talk.json", "/save again.json")
    (system, one, two, three, four), short = contents("talk.json"), contents("short.json")
    assert system == ("system", "Be brief.") and one == ("user", "Héllo 🐝") and three == ("user", "And?")
    assert out.splitlines()[0] == two[1].strip() and contents("again.json") == [system, one, two, three, four]
    assert short[:2] == [system, ("user", "Hm")] and len(short) == 3
    assert four[1] == smol.chat([dict(role=role, content=content) for role, content in (system, one, two, three)], 4, temperature=0)
    assert "tokens/s" not in err and "5 messages read from talk.json" in err


def test_statistics_when_asked_for(typed):
    assert typed("Hello", "Hello", options=["--stats"]).err.count("4 written") == 2


@pytest.mark.parametrize("line, names", [("/dance", "/dance: no such command"), ("/save", "/save needs"), ("/load", "/load needs"), ("/load nowhere.json", "no such file"), ("/load bad.json", "not JSON"),
                                         ("/load worse.json", "each message"), ("/load none.json", "each message"), ("/save file/talk.json", "cannot be written"), ("word " * 3000, "fewer than")])
def test_mistakes_end_nothing(typed, line, names):
    Path("bad.json").write_text("{"), Path("worse.json").write_text('{"messages": [{"role": "user", "content": 3}]}'), Path("none.json").write_text("{}"), Path("file").write_text("x")
    out, err = typed("Hello", line, "/save talk.json", "/quit", "Hello")
    complaint, = [each for each in err.splitlines() if "llama-nb: " in each]
    assert names in complaint and len(contents("talk.json")) == 2 and len(out.splitlines()) >= 1


def test_a_path_is_a_message(typed):
    typed("/etc/passwd is what?", "/save talk.json")
    assert contents("talk.json")[0] == ("user", "/etc/passwd is what?")


def test_a_conversation_outgrows_the_context(smollm2, monkeypatch, capsys):
    small = type(smollm2)(smollm2.model, smollm2.tokenizer, with_context(smollm2.config, 160), smollm2.path)
    monkeypatch.setattr(cli, "load", lambda *_, **__: small)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Tell me one more fact about bees.\n" * 6 + "/save talk.json\n"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(["chat", "-n", "40", "--temp", "0", "--system", "Be brief."]) == 0
    err = capsys.readouterr().err
    assert "outgrown the context of 160 tokens: the model goes on without the oldest" in err and "llama-nb: " not in err
    assert len(contents("talk.json")) == 13, "what was said is kept"


def test_the_oldest_turns_leave(smollm2):
    small = type(smollm2)(smollm2.model, smollm2.tokenizer, with_context(smollm2.config, 160), smollm2.path)
    small.decoder = smollm2.decoder
    talk, lefts = Conversation(small, [dict(role="system", content="Be brief.")]), []
    for number in range(8):
        stream = talk.ask(f"Question {number}?", 1)
        lefts.append(talk.left)
        assert len(stream.prompt_ids) <= 120 and talk.asked[0]["role"] == "system" and talk.asked[1]["role"] == "user" and talk.asked[-1]["content"] == f"Question {number}?"
        if talk.left: assert len(stream.prompt_ids) <= 80
        talk.keep("bees " * 15)
    assert sum(map(bool, lefts)) < 5 and max(lefts) > 1 and len(talk.messages) == 17
    before = list(talk.recent)
    with pytest.raises(GenerationError, match="fewer than 160"): talk.ask("word " * 500)
    assert talk.recent == before


@pytest.mark.skipif(os.name == "nt", reason="a POSIX terminal")
def test_the_line_editor(smollm2, empty_folder):
    import pty
    master, slave = pty.openpty()
    process = subprocess.Popen([*LLAMA_NB, "chat", "-n", "2", "--temp", "0"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                               env=os.environ | dict(PYTHONPATH=str(ROOT), PROMPT_TOOLKIT_NO_CPR="1", TERM="xterm"))
    os.close(slave)
    keys = [b"\x1b[200~one\r\ntwo\x1b[201~\r", b"\x1b[A\r", b"ac\x1b[Db\r", b"/save talk.json\r", b"\x04"]
    shown, end, quiet = b"", time.time() + 120, time.time()
    while time.time() < end and process.poll() is None:
        if select.select([master], [], [], 0.1)[0]:
            try: shown += os.read(master, 4096)
            except OSError: break
            quiet = time.time()
        elif b">" in shown and keys and time.time() - quiet > 0.5:
            shown = b""
            os.write(master, keys.pop(0))
    assert process.wait(30) == 0 and not keys
    assert [content for role, content in contents("talk.json") if role == "user"] == ["one\ntwo", "one\ntwo", "abc"]


def test_the_editor_is_imported_only_at_a_terminal():
    code = "import sys; from llama_nb.cli import main; main(['chat', '-p', 'Hi', '-n', '1']); print({'prompt_toolkit', 'tensorflow', 'keras'} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert done.stderr.endswith("set()\n"), done.stderr


# Perplexity.

@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    "bard in transformers, and the perplexity that its documentation computes with strides."
    transformers, torch = (pytest.importorskip(name, reason=f"{name} is not installed: the extra [parity]") for name in ("transformers", "torch"))
    folder = tmp_path_factory.mktemp("theirs") / "bard"
    assert main(["convert", "bard", str(folder), "--to", "hf"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def measure(ids, window, stride):
        total, count, before = 0.0, 0, 0
        for begin in range(0, len(ids), stride):
            end = min(begin + window, len(ids))
            inputs = torch.tensor([ids[begin:end]])
            labels = inputs.clone()
            labels[:, :before - end] = -100
            with torch.no_grad(): loss = model(inputs, labels=labels).loss.item()
            new = int((labels[:, 1:] != -100).sum())
            total, count, before = total + loss * new, count + new, end
            if end == len(ids): break
        return total / count
    return measure


@pytest.mark.parametrize("window, stride", [(256, None), (256, 100), (64, 63), (200, 7)])
def test_perplexity_equals_transformers(theirs, bard, monkeypatch, capsys, window, stride):
    text = (bard_folder().parent / "macbeth.txt").read_text(encoding="utf-8")[:1500]
    Path("text.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    ids, options = bard.tokenizer.encode(text), ["--stride", str(stride)] if stride else []
    expected = theirs(ids, window, stride or window // 2)
    small = type(bard)(bard.model, bard.tokenizer, with_context(bard.config, window), bard.path)
    small.decoder = bard.decoder
    for llm, tolerance in ((small, 1e-5), (load("bard", context_length=window), 0.01)):
        monkeypatch.setattr(cli, "load", lambda *_, **__: llm)
        assert main(["perplexity", "bard", "text.txt", "--json", *options]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["perplexity"] == pytest.approx(np.exp(expected), rel=tolerance) and found["tokens"] == len(ids) and found["bytes"] == len(text.encode())
        assert found["bits_per_byte"] == pytest.approx(expected / np.log(2) * (len(ids) - 1) / len(text.encode()), rel=tolerance)


@pytest.mark.parametrize("arguments, names", [(["--stride", "256"], "stride should be a whole number from 1 to 255"), (["--stride", "0"], "--stride"), ([], "nowhere.txt: cannot be read")])
def test_perplexity_refuses(loaded, capsys, arguments, names):
    if arguments: Path("nowhere.txt").write_text("To be, or not to be")
    assert main(["perplexity", "bard", "nowhere.txt", *arguments]) == 2
    err = capsys.readouterr().err
    assert names in err and err.count("\n") == 1


# Training on texts of any shape.

CHINESE = "".join(chr(0x4E00 + int(index ** 1.1) * 7 % 3000) for index in range(9000))


@pytest.mark.parametrize("text", [CHINESE, "To be, or not to be, that is the question " * 400, "x" * 20_000 + " rare: ☃", "".join(map(chr, range(0x4E00, 0x4E00 + 5000))) * 2])
def test_a_tokenizer_learns_from_every_line(text):
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: the extra [train]")
    from llama_nb.tokenizer import TokenizerError
    from llama_nb.training import lines_to_learn, train_tokenizer
    from llama_nb.vocabularies import SentencePieceTokenizer
    lines = list(lines_to_learn([text], 512))
    assert max(len(line.encode()) for line in lines) <= 4192 and (len(set(text)) > 126 or "".join(lines) == text)
    try: tokenizer = SentencePieceTokenizer(train_tokenizer([text], 512), by_hand=True)
    except TokenizerError as error:
        assert len(set(text)) < 126 and re.fullmatch(r"the text is too short for a vocabulary of 512 pieces, it has \d+", str(error))
        return
    assert tokenizer.decode(tokenizer.encode(text)) == text and len(tokenizer.encode(text)) < len(text.encode())


def test_training_on_one_chinese_line(capsys):
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: the extra [train]")
    Path("texts.txt").write_bytes(b"\xef\xbb\xbf" + CHINESE.encode())
    assert main("train texts.txt it --preset infant --minutes 0.01 --json".split()) == 0
    assert 1 < json.loads(capsys.readouterr().out)["bits_per_byte"] < 9


# Two threads.

@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_two_threads_with_one_model(dtype, bard):
    llm = bard if dtype == "float32" else load("bard")
    prompts = ["To be, or", "Enter Macbeth and", "Good night, good night"] * 2
    options = dict(max_new_tokens=12, temperature=0)
    expected = [llm.generate(prompt, **options) for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda prompt: llm.generate(prompt, **options), prompts)) == expected
        assert list(pool.map(lambda prompt: "".join(llm.stream(prompt, **options)), prompts)) == expected
        assert list(pool.map(lambda prompt: llm.generate([prompt, prompt], **options)[1], prompts)) == [llm.generate([prompt, prompt], **options)[1] for prompt in prompts]
    llm.decoder.forget()
    with ThreadPoolExecutor(3) as pool: assert len(set(map(id, pool.map(lambda _: llm.decoder, range(3))))) == 1


MEMORY = """import gc, sys, psutil, llama_nb
rss = []
for _ in range(7):
    llama_nb.load("bard", dtype=sys.argv[1]).generate("To be", max_new_tokens=4, temperature=0)
    gc.collect()
    rss.append(psutil.Process().memory_info().rss)
print((rss[6] - rss[1]) // 2**20)"""


@pytest.mark.parametrize("dtype", ["int8"])
def test_loading_and_deleting_keeps_memory_flat(dtype):
    done = subprocess.run([sys.executable, "-c", MEMORY, dtype], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert done.returncode == 0 and int(done.stdout) < 20, done.stdout + done.stderr
