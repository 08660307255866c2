"""Damages small valid files at random and opens them: each ends well or in one line of ours, within two seconds and 500 MB.

    python tests/fuzz.py                                    20,000 mutations of every form, as `make fuzz` does
    python tests/fuzz.py --forms gguf --first 77 --count 1  mutation 77 of a GGUF file again

A mutation is fixed by its form and number. They run in a child process, which the kernel stops where it goes beyond its limits; the parent
notes how it died and goes on after that mutation. A new child takes over now and then, as TensorFlow Text keeps every vocabulary that it has seen.
"""
import argparse
import base64
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

def sample_checkpoint():
    from llama_nb.checkpoint import Checkpoint, LazyTensor, LlamaConfig
    from llama_nb.positions import RopeScaling
    config, draw = LlamaConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=32, vocab_size=270, rope_scaling=RopeScaling("llama3", 8.0, 64)), np.random.default_rng(0)
    def lazy(values): return LazyTensor(values.shape, values.dtype, values.dtype.name, lambda: values)
    return Checkpoint("sample", config, {name: lazy(draw.standard_normal(shape).astype(np.float16)) for name, shape in config.tensor_shapes().items()})


def sample_model(folder):
    from llama_nb.vocabularies import synth_tokenizer
    (folder / "tokenizer.model").write_bytes(synth_tokenizer(270))


def sample_json(folder):
    "Byte-level, as `tokenizers` writes it, with a file of settings beside it."
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(letters[at], letters[at + 1]) for at in range(60, 70)]
    texts = [*letters, *map("".join, merges)]
    tokenizer = tokenizers.Tokenizer(models.BPE({text: id for id, text in enumerate(texts)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"]), tokenizer.add_tokens(["<think>", "<tool>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True, "chat_template": "{{ messages[0].content }}"}))


def sample_spaces(folder):
    "Llama 2's kind of tokenizer.json."
    import tokenizers
    from tokenizers import models, normalizers
    texts, merges = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "e", "\u2581a", "be", "ee"], [("\u2581", "a"), ("b", "e"), ("e", "e")]
    tokenizer = tokenizers.Tokenizer(models.BPE({text: id for id, text in enumerate(texts)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))


def sample_ranks(folder):
    tokens = [*(bytes([byte]) for byte in range(256)), b"be", b"ee", b"th", b"the", b" the", b"bee"]
    (folder / "tokenizer.model").write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))


def sample_added(folder):
    "SentencePiece's kind with added tokens in each of the files beside it."
    flags = dict(lstrip=True, rstrip=False, normalized=False, single_word=False, special=True)
    sample_model(folder)
    for name, content in {"added_tokens": {"<tool>": 270, "bees": 271}, "special_tokens_map": {"bos_token": flags | {"content": "<s>"}, "additional_special_tokens": ["<tool>"]},
                          "tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "legacy": False, "eos_token": "</s>", "chat_template": [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]},
                          "config": {"eos_token_id": [2, 270]}}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def sample_decoder(folder):
    "The same, the tokens with their flags in `tokenizer_config.json`, beside a `tokenizer.json` as transformers 5 saves it."
    sample_spaces(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["unk_token"], content["normalizer"] = None, {"type": "NFC"}
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    count, flags = len(content["model"]["vocab"]), dict(lstrip=False, rstrip=True, normalized=True, single_word=True, special=False)
    decoder = {str(count): flags | {"content": "<tool>"}, str(count + 1): flags | {"content": "be", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, "bos_token": "<s>", "extra_special_tokens": ["a"]}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2})), (folder / "chat_template.jinja").write_text("{{ messages }}")


def sample_pth(folder):
    from llama_nb.meta import config_to_params, write_pth
    checkpoint, rows = sample_checkpoint(), {"wq", "wk", "wv", "w1", "w3", "output"}
    for shard in range(2):
        parts = {name: checkpoint.read(name) if len(checkpoint[name].shape) == 1 else np.split(checkpoint.read(name), 2, int(name.split(".")[-2] not in rows))[shard] for name in checkpoint}
        write_pth(folder / f"consolidated.{shard:02}.pth", parts.items())
    (folder / "params.json").write_text(json.dumps(config_to_params(checkpoint.config)))
    sample_json(folder)


def sample_npy(folder):
    from llama_nb.meta import config_to_params
    checkpoint = sample_checkpoint()
    for name in checkpoint: np.save(folder / f"{name}.npy", checkpoint.read(name))
    (folder / "params.json").write_text(json.dumps(config_to_params(checkpoint.config)))
    sample_json(folder)


def sample_gguf(folder):
    from llama_nb.gguf import write_gguf
    from llama_nb.vocabularies import gguf_vocabulary, load_tokenizer
    sample_model(folder)
    tokenizer = load_tokenizer(folder)
    (folder / "tokenizer.model").unlink()
    write_gguf(folder / "model.gguf", sample_checkpoint(), gguf_vocabulary(tokenizer))


def sample_quantized(folder):
    "Weights in blocks and a byte-level vocabulary, as `gguf` writes them."
    import gguf
    from llama_nb.files import their_names
    from llama_nb.gguf import GGUF_NAMES, gguf_fields
    from llama_nb.vocabularies import gguf_vocabulary, load_tokenizer
    sample_json(folder)
    fields = gguf_vocabulary(load_tokenizer(folder))
    for path in list(folder.iterdir()): path.unlink()
    checkpoint, writer = sample_checkpoint(), gguf.GGUFWriter(folder / "model.gguf", "llama")
    for key, value in (gguf_fields(checkpoint.config) | fields).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value))
    for name, theirs in their_names(checkpoint.config, GGUF_NAMES, "blk").items():
        values, kind = checkpoint.read(name).astype(np.float32), gguf.GGMLQuantizationType.Q8_0
        if "w2" in name: writer.add_tensor(theirs, gguf.quantize(values, kind), raw_dtype=kind)
        else: writer.add_tensor(theirs, values)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()


def sample_parts(folder):
    "A GGUF model in two parts, the metadata in the first."
    import gguf
    from llama_nb.gguf import add_fields, gguf_fields, gguf_tensors
    from llama_nb.vocabularies import gguf_vocabulary, load_tokenizer
    sample_model(folder)
    checkpoint, vocabulary = sample_checkpoint(), gguf_vocabulary(load_tokenizer(folder))
    (folder / "tokenizer.model").unlink()
    tensors = list(gguf_tensors(checkpoint).items())
    for part in range(2):
        writer = gguf.GGUFWriter(folder / f"model-0000{part + 1}-of-00002.gguf", "llama")
        if part == 0: add_fields(writer, gguf_fields(checkpoint.config) | vocabulary)
        writer.add_uint16("split.no", part), writer.add_uint16("split.count", 2), writer.add_int32("split.tensors.count", len(tensors))
        for name, tensor in tensors[part::2]: writer.add_tensor(name, tensor.read())
        writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()


def sample_hf(folder):
    from llama_nb.huggingface import read_safetensors, write_hf, write_safetensors
    write_hf(folder / "whole", sample_checkpoint())
    (folder / "whole" / "config.json").rename(folder / "config.json")
    tensors = read_safetensors(folder / "whole" / "model.safetensors")
    places = {name: f"model-0000{1 + (index > 4)}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for file in set(places.values()): write_safetensors(folder / file, {name: tensor for name, tensor in tensors.items() if places[name] == file})
    (folder / "whole" / "model.safetensors").unlink(), (folder / "whole").rmdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    sample_json(folder)


def sample_bin(folder):
    from llama_nb.meta import write_pth
    from llama_nb.huggingface import read_safetensors, write_hf
    write_hf(folder / "whole", sample_checkpoint())
    (folder / "whole" / "config.json").rename(folder / "config.json")
    tensors = read_safetensors(folder / "whole" / "model.safetensors")
    write_pth(folder / "pytorch_model.bin", ((name, tensor.read()) for name, tensor in tensors.items()))
    (folder / "whole" / "model.safetensors").unlink(), (folder / "whole").rmdir()
    sample_spaces(folder)


def sample_adapter(folder):
    "An adapter in peft's form, for the sample's matrices."
    from llama_nb.checkpoint import LazyTensor
    from llama_nb.huggingface import write_safetensors
    draw, shapes = np.random.default_rng(0), {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "mlp.down_proj": (8, 32)}
    values = {f"base_model.model.model.layers.0.{name}.lora_{half}.weight": draw.standard_normal((2, size) if half == "A" else (out, 2)).astype(np.float32) for name, (out, size) in shapes.items() for half in "AB"}
    write_safetensors(folder / "adapter_model.safetensors", {name: LazyTensor(each.shape, each.dtype, "float32", lambda each=each: each) for name, each in values.items()})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {"k_proj": 8}}))


SAMPLES = {"pth": sample_pth, "npy": sample_npy, "gguf": sample_gguf, "quantized": sample_quantized, "parts": sample_parts, "safetensors": sample_hf, "bin": sample_bin, "tokenizer.model": sample_model, "tiktoken": sample_ranks, "tokenizer.json": sample_json, "adapter": sample_adapter, "added tokens": sample_added, "decoder": sample_decoder}


def open_sample(folder):
    "Everything in it: each tensor read, a text encoded and decoded."
    from llama_nb.hub import open_checkpoint, with_lora
    from llama_nb.tokenizer import HandMadeBPE
    from llama_nb.vocabularies import SentencePieceTokenizer, import_tensorflow_text, load_tokenizer
    if (folder / "adapter_config.json").exists():
        adapted = with_lora(sample_checkpoint(), folder)
        for name in adapted: adapted.read(name)
        return
    if any(path.suffix in (".pth", ".npy", ".gguf", ".safetensors", ".bin") for path in folder.iterdir()):
        checkpoint = open_checkpoint(folder)
        for name in checkpoint: checkpoint.read(name)
    tokenizer = load_tokenizer(folder)
    if isinstance(tokenizer, SentencePieceTokenizer):
        import_tensorflow_text()
        if tokenizer.model.is_plain: HandMadeBPE(tokenizer.model).encode(TEXT)
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

def allow(more):
    "So many bytes more than the process has now, where the system says how many that is; returns the limits before."
    before, pages = resource.getrlimit(resource.RLIMIT_AS), Path("/proc/self/statm")
    if pages.exists():
        resource.setrlimit(resource.RLIMIT_AS, (int(pages.read_text().split()[0]) * resource.getpagesize() + more, before[1]))
    return before


def run(form, first, count):
    "Prints each mutation's number before it is opened, and what is wrong with it."
    from llama_nb.checkpoint import CheckpointError
    from llama_nb.tokenizer import TokenizerError
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        sample = Path(scratch) / "sample"
        sample.mkdir()
        SAMPLES[form](sample)
        open_sample(sample)
        files = {path.name: path.read_bytes() for path in sorted(sample.iterdir())}
        allow(MEMORY)
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
                message, late = str(error), str(error).startswith("SentencePiece refuses the model: ")
                if "\n" in message or not (late or str(folder) in message) or "MemoryError" in message: print(f"! {message!r}", flush=True)
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
        command = [sys.executable, __file__, "--child", "--forms", form, "--first", str(number + 1), "--count", str(min(last - number, 2000))]
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
        for number, what in wrong.items(): kinds.setdefault(re.sub(r"<\S*>|\W|\d", "", what)[:250], []).append(number)
        for numbers in kinds.values(): print(f"  {len(numbers)} times, as in {numbers[0]}: {wrong[numbers[0]][:300]}")
        found += len(wrong)
    sys.exit(found > 0)


if __name__ == "__main__":
    main()
