"""Converts bard and writes with it, and prints what came out as JSON: for a CPU that `qemu-x86_64 -cpu MODEL python tests/another_cpu.py` imitates."""
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["LLAMA_NB_CACHE"] = tempfile.mkdtemp()

from llama_nb.checkpoint import bard_folder
from llama_nb.conversion import convert
from llama_nb.library import load

begin = time.perf_counter()
llm = load(convert(bard_folder(), Path(tempfile.mkdtemp()) / "bard", sys.argv[1]))
ids = llm.tokenizer.encode("My lord, my lord, my lord, my")
logits = llm.logits(ids)
stream = llm.stream(ids, max_new_tokens=20, temperature=0)
text = "".join(stream)
print(json.dumps(dict(text=text, seconds=time.perf_counter() - begin, logits=logits.tolist())))
