"""Damages small valid files at random and opens them: each ends well or in one line of ours, within two seconds and 500 MB.

    python tests/fuzz.py                                    20,000 mutations of every form, as `make fuzz` does
    python tests/fuzz.py --forms gguf --first 77 --count 1  mutation 77 of a GGUF file again

A mutation is fixed by its form and number. They run in a child process, which the kernel stops where it goes beyond its limits; the parent
notes how it died and goes on after that mutation.
"""
import argparse
import io
import json
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

SECONDS, MEMORY = 2, 500 * 2**20
TEXT = "Attract the bees: é, 蜂, 🐝 <s> 2026 \n"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


# Samples: what is damaged. Small, so that much of each file is not weights ----------------------------------------------------

def sample_config():
    from llama_nb.checkpoint import LlamaConfig
    return LlamaConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=8, vocab_size=270)


def sample_tensors():
    draw = np.random.default_rng(0)
    return {name: draw.standard_normal(shape, np.float32) for name, shape in sample_config().tensor_shapes().items()}


def sample_model(folder):
    from llama_nb.tokenizer import synth_tokenizer
    (folder / "tokenizer.model").write_bytes(synth_tokenizer(270))


def sample_pth(folder):
    from llama_nb.checkpoint import write_pth
    rows = {"wq", "wk", "wv", "w1", "w3", "output"}
    for shard in range(2):
        parts = {name: values if values.ndim == 1 else np.split(values, 2, int(name.split(".")[-2] not in rows))[shard] for name, values in sample_tensors().items()}
        write_pth(folder / f"consolidated.{shard:02}.pth", parts.items())
    (folder / "params.json").write_text(json.dumps(sample_config().to_params()))
    sample_model(folder)


def sample_npy(folder):
    for name, values in sample_tensors().items():
        np.save(folder / f"{name}.npy", values)
    (folder / "params.json").write_text(json.dumps(sample_config().to_params()))
    sample_model(folder)


def sample_gguf(folder):
    import gguf
    config = sample_config()
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for key, value in {"embedding_length": config.dim, "block_count": 1, "attention.head_count": 2, "attention.head_count_kv": 1, "feed_forward_length": 8, "context_length": 64}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + list("\u2581abehsty?!\u00e9"))
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 11)
    writer.add_token_scores([0.0] * 259 + [-float(rank) for rank in range(11)])
    writer.add_bos_token_id(1), writer.add_eos_token_id(2)
    import llama_nb.forms as forms
    names = {meta: name for name, meta in forms.GGUF_NAMES.items()}
    for name, values in sample_tensors().items():
        part = name.removesuffix(".weight").removeprefix("layers.0.")
        writer.add_tensor(("blk.0." if "layers.0." in name else "") + names[part] + ".weight", values.astype(np.float16))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()


SAMPLES = {"pth": sample_pth, "npy": sample_npy, "gguf": sample_gguf, "tokenizer.model": sample_model}


def open_sample(folder):
    "Everything in it: each tensor read, a text encoded and decoded."
    from llama_nb.forms import open_checkpoint
    from llama_nb.tokenizer import load_tokenizer
    if [path.name for path in folder.iterdir()] not in (["tokenizer.model"], ["tokenizer.json"]):
        checkpoint = open_checkpoint(folder)
        for name in checkpoint: checkpoint.read(name)
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode(TEXT))
    tokenizer.encode(TEXT, allow_special=True)


# Mutations ---------------------------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, 2, 3, 7, 8, 9, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
VALUES = [None, True, False, "", "a", "../x", "/etc/passwd", [], {}, [0], [[]], {"a": 0}, -1, 0.5, -0.5, 1e308, float("inf"), float("nan"), 10**30, *NUMBERS]


def place(draw, size):
    "A position: anywhere, or near one of the ends, where the lists are."
    near = min(size, 300)
    return draw.choice([draw.randrange(size), draw.randrange(near), size - 1 - draw.randrange(near)])


def mutate_bytes(draw, data):
    data = bytearray(data) or bytearray(1)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at, size = place(draw, len(data)), draw.choice([1, 2, 4, 8])
        match draw.randrange(6):
            case 0: data[at] ^= 1 << draw.randrange(8)
            case 1: data[at] = draw.randrange(256)
            case 2: data[at:at + size] = (draw.choice(NUMBERS) % 256**size).to_bytes(size, "little")
            case 3:
                changed = int.from_bytes(data[at:at + size], "little") + draw.choice([-1, 1, -8, 8, 2**31])
                data[at:at + size] = (changed % 256**size).to_bytes(size, "little")
            case 4:
                source, length = place(draw, len(data)), draw.choice([1, 8, 60, 300])
                data[at:at + draw.choice([0, length])] = data[source:source + length]
            case 5: del data[at:at + draw.choice([1, 2, 8, 60, len(data)])]
        if not data: break
    return bytes(data)


def mutate_json(draw, data):
    "Another value, name or depth somewhere in it; at times a name twice."
    def holders(value):
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return [value] * bool(children) + [holder for child in children for holder in holders(child)]
    tree = json.loads(data)
    holder = draw.choice(holders(tree) or [[tree]])
    key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    match draw.randrange(7):
        case 0 | 1: holder[key] = draw.choice(VALUES)
        case 2 if isinstance(holder, dict): holder[draw.choice(["", "__metadata__", key + "x", *holder])] = holder.pop(key)
        case 3: holder[key] = draw.choice(draw.choice([list(each.values()) if isinstance(each, dict) else each for each in holders(tree)]))
        case 4: del holder[key]
        case 5 if isinstance(holder[key], int): holder[key] += draw.choice([-1, 1, 8, 2**31, 0.5])
        case 6 if isinstance(holder, dict): return json.dumps(tree).replace("{", '{"%s": %s, ' % (key, json.dumps(draw.choice(VALUES))), 1).encode()
        case _: holder[key] = json.loads("[" * 900 + "]" * 900)
    try:
        return json.dumps(tree).encode()
    except (ValueError, RecursionError):
        return data


def mutate_zip(draw, data):
    "Damage inside an archive that stays whole: its list, mostly; at times members go, come twice or change places."
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    chosen = draw.choice([index for index, (name, _) in enumerate(members) if name.endswith(".pkl")] + [draw.randrange(len(members))])
    name, content = members[chosen]
    match draw.randrange(8):
        case 0: members.pop(chosen)
        case 1: members.append((name, mutate_bytes(draw, content)))
        case 2: members[chosen] = (draw.choice(members)[0], content)
        case _: members[chosen] = (name, mutate_bytes(draw, content))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", draw.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])) as archive:
        for name, content in members: archive.writestr(zipfile.ZipInfo(name), content)
    return target.getvalue()


def mutate_safetensors(draw, data):
    "Damage in the list, of which the length stays right."
    (size,) = struct.unpack("<Q", data[:8])
    header = draw.choice([mutate_json, mutate_json, mutate_bytes])(draw, data[8:8 + size])
    return struct.pack("<Q", len(header)) + header + data[8 + size:]


INSIDE = {".json": mutate_json, ".pth": mutate_zip, ".bin": mutate_zip, ".safetensors": mutate_safetensors}


def mutated(form, number, files):
    "The files of the sample, one of them damaged: the same for the same form and number."
    draw = random.Random(f"{form} {number}")
    name = draw.choice(list(files))
    inside = INSIDE.get(Path(name).suffix)
    change = draw.choice([inside, inside, mutate_bytes]) if inside else mutate_bytes
    return files | {name: change(draw, files[name])}


# The child opens them, the parent counts -------------------------------------------------------------------------------------

def run(form, first, count):
    "Prints each mutation's number before it is opened, and what is wrong with it."
    from llama_nb.checkpoint import CheckpointError
    from llama_nb.tokenizer import TokenizerError
    with tempfile.TemporaryDirectory() as scratch:
        sample = Path(scratch) / "sample"
        sample.mkdir()
        SAMPLES[form](sample)
        open_sample(sample)
        files = {path.name: path.read_bytes() for path in sorted(sample.iterdir())}
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        for number in range(first, first + count):
            print(number, flush=True)
            folder = Path(scratch) / str(number)
            folder.mkdir()
            for name, content in mutated(form, number, files).items(): (folder / name).write_bytes(content)
            signal.setitimer(signal.ITIMER_PROF, SECONDS), signal.alarm(60)
            try:
                open_sample(folder)
                print("+", flush=True)
            except (CheckpointError, TokenizerError) as error:
                message = str(error)
                if "\n" in message or str(folder) not in message or "MemoryError" in message: print(f"! {message!r}", flush=True)
            except BaseException as error:
                print(f"! {type(error).__name__}: {str(error)[:300]!r}", flush=True)
            signal.setitimer(signal.ITIMER_PROF, 0), signal.alarm(0)
            for path in folder.iterdir(): path.unlink()
            folder.rmdir()


DEATHS = {signal.SIGPROF: f"more than {SECONDS} s", signal.SIGALRM: "more than a minute"}


def fuzz(form, count, first=0):
    "(mutations that opened, {number: what is wrong}) of so many mutations."
    opened, wrong, number, last = 0, {}, first - 1, first + count - 1
    while number < last:
        start = number
        command = [sys.executable, __file__, "--child", "--forms", form, "--first", str(number + 1), "--count", str(last - number)]
        with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
            for line in child.stdout:
                if line[0] == "!": wrong[number] = line[2:].strip()
                elif line[0] == "+": opened += 1
                else: number = int(line)
            child.wait(), errors.seek(0)
            reason = ([line for line in errors.read().splitlines() if line.strip()] or [""])[-1]
        if child.returncode and number == start: raise RuntimeError(f"{form}: the sample itself cannot be opened: {reason}")
        if child.returncode: wrong[number] = DEATHS.get(-child.returncode, f"died with {child.returncode}: {reason}")
    return opened, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=SAMPLES, default=list(SAMPLES))
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child: return run(options.forms[0], options.first, options.count)
    found = 0
    for form in options.forms:
        begin = time.monotonic()
        opened, wrong = fuzz(form, options.count, options.first)
        print(f"{form:16} {options.count} mutations, {opened} opened, {options.count - opened - len(wrong)} refused, {len(wrong)} wrong, {time.monotonic() - begin:.0f} s", flush=True)
        kinds = {}
        for number, what in wrong.items(): kinds.setdefault(re.sub(r"\W|\d", "", what)[:60], []).append(number)
        for numbers in kinds.values(): print(f"  {len(numbers)} times, as in {numbers[0]}: {wrong[numbers[0]][:300]}")
        found += len(wrong)
    sys.exit(found > 0)


if __name__ == "__main__":
    main()
