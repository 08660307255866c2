"""The outputs stored in the notebooks are what a fresh run gives.

The book build executes every chapter and leaves it in book/_build/jupyter_execute; here each text output is compared with the stored one.
Numbers may differ within a tolerance, images are compared by their presence, addresses not at all; cells tagged `measured` and cells
that the build doesn't run are exempt. What goes to stderr is not content.
"""
import json
import math
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXECUTED = ROOT / "book/_build/jupyter_execute/nbs"
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))

pytestmark = pytest.mark.book
RELATIVE, ABSOLUTE = 1e-3, 1e-4
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?|(?<!\w)[-+]?(?:inf|nan)(?!\w)")
NOISE = re.compile(r"\x1b\[[0-9;]*m|( at )?\b0x[0-9a-fA-F]{6,}\b")


def outputs(cell):
    "The outputs of a cell as (kind, text) pairs: streams joined, stderr left out, an image without its bytes."
    found = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            text = "".join(output["text"])
            if output["name"] == "stderr":
                continue
            if found and found[-1][0] == "stdout":
                text = found.pop()[1] + text
            found.append(("stdout", text))
        elif output["output_type"] == "error":
            found.append(("error", f"{output['ename']}: {output['evalue']}"))
        else:
            data = output["data"]
            images = sorted(kind for kind in data if kind.startswith("image/"))
            texts = [(kind, "".join(data[kind])) for kind in sorted(data) if kind.startswith("text/")]
            found += [(kind, "") for kind in images] or texts
    return found


def same_number(stored, fresh):
    "Integers are exact. Others may differ by the tolerance, or by one in the last of at least three printed digits."
    if not re.search(r"[.eE]|inf|nan", stored + fresh):
        return stored == fresh
    a, b = float(stored), float(fresh)
    if not (math.isfinite(a) and math.isfinite(b)):
        return repr(a) == repr(b)
    return abs(a - b) <= max(ABSOLUTE, RELATIVE * max(abs(a), abs(b)), last_place(stored), last_place(fresh))


def last_place(number):
    "What one in the last printed digit is worth, for a decimal fraction of three significant digits or more; else 0."
    mantissa, _, exponent = number.lower().partition("e")
    digits = mantissa.lstrip("+-0.").replace(".", "")
    if "." not in mantissa or len(digits) < 3:
        return 0.0
    return 1.01 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def same_text(stored, fresh):
    stored, fresh = (NOISE.sub("", text).strip() for text in (stored, fresh))
    if stored == fresh:
        return True
    words = [[" ".join(piece.split()) for piece in NUMBER.split(text)] for text in (stored, fresh)]
    numbers = [NUMBER.findall(text) for text in (stored, fresh)]
    return words[0] == words[1] and all(map(same_number, *numbers))


def exempt(cell):
    tags = cell["metadata"].get("tags", [])
    source = "".join(cell["source"])
    return "measured" in tags or "skip-execution" in tags or bool(re.search(r"^#\s*\|\s*eval:\s*false", source, re.M))


def differences(stored, fresh):
    "One message for each cell of a stored notebook whose fresh outputs say something else."
    messages = []
    if [(c["cell_type"], "".join(c["source"])) for c in stored["cells"]] != [(c["cell_type"], "".join(c["source"])) for c in fresh["cells"]]:
        return ["the executed notebook is not the stored one: run `make book`"]
    for number, (old, new) in enumerate(zip(stored["cells"], fresh["cells"]), 1):
        if old["cell_type"] != "code":
            continue
        before, after = outputs(old), outputs(new)
        errors = [text for kind, text in after if kind == "error"]
        if errors and "raises-exception" not in old["metadata"].get("tags", []):
            messages.append(f"cell {number} fails: {errors[0]}")
            break
        if exempt(old):
            continue
        if [kind for kind, _ in before] != [kind for kind, _ in after]:
            messages.append(f"cell {number} gives {[k for k, _ in after]}, stored are {[k for k, _ in before]}")
            continue
        for (_, stored_text), (_, fresh_text) in zip(before, after):
            if not same_text(stored_text, fresh_text):
                messages.append(f"cell {number}\n--- stored\n{stored_text.strip()}\n+++ fresh\n{fresh_text.strip()}\n")
    return messages


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_what_a_fresh_run_gives(path):
    if os.environ.get("LLAMA_NB_WEIGHTS"):
        pytest.skip("LLAMA_NB_WEIGHTS is set: the stored outputs are those of the book's own weights")
    executed = EXECUTED / path.name
    if not EXECUTED.exists():
        pytest.skip("the book has not been built: `make book`")
    assert executed.exists(), f"nbs/{path.name} is not in the book (_toc.yml)"
    messages = differences(*(json.loads(p.read_text("utf-8")) for p in (path, executed)))
    assert not messages, f"\nnbs/{path.name}: " + f"\nnbs/{path.name}: ".join(messages)


# The comparison itself.

def code(source="x", *, stdout=None, text=None, image=None, error=None, stderr=None, tags=()):
    made = []
    if stderr is not None:
        made.append({"output_type": "stream", "name": "stderr", "text": stderr})
    if stdout is not None:
        made += [{"output_type": "stream", "name": "stdout", "text": part} for part in stdout.splitlines(True)]
    if text is not None:
        made.append({"output_type": "execute_result", "data": {"text/plain": [text]}, "metadata": {}})
    if image is not None:
        made.append({"output_type": "display_data", "data": {"image/png": image, "text/plain": f"<Figure {image}>"}, "metadata": {}})
    if error is not None:
        made.append({"output_type": "error", "ename": "ValueError", "evalue": error, "traceback": []})
    return {"cell_type": "code", "source": source, "metadata": {"tags": list(tags)}, "outputs": made}


def compare(old, new):
    return differences({"cells": [old]}, {"cells": [new]})


@pytest.mark.parametrize("old, new", [
    (code(stdout="a\nb\n"), code(stdout="a\nb\n")),
    (code(stdout="loss 2.1234 at step 10\n"), code(stdout="loss 2.1236 at step 10\n")),
    (code(text="[ 0.1234 -1.     ]"), code(text="[0.12341 -1.0001]")),
    (code(text="3.1e-07"), code(text="8.8e-06")),
    (code(text="0.572"), code(text="0.573")),
    (code(text="-inf"), code(text="-inf")),
    (code(text="0"), code(text="0.00001")),
    (code(text="<Layer>"), code(text="<Layer at 0x7f12ab>")),
    (code(image="one"), code(image="two")),
    (code(stderr="step 1"), code()),
    (code(error="no", tags=["raises-exception"]), code(error="no", tags=["raises-exception"])),
    (code(stdout="3 ms", tags=["measured"]), code(stdout="9 ms", tags=["measured"])),
    (code(stdout="by hand", tags=["skip-execution"]), code(tags=["skip-execution"])),
    (code("#| eval: false\nx", stdout="by hand"), code("#| eval: false\nx")),
])
def test_accepted(old, new):
    assert compare(old, new) == []


@pytest.mark.parametrize("old, new", [
    (code(stdout="a\n"), code(stdout="b\n")),
    (code(stdout="loss 2.123"), code(stdout="loss 2.143")),
    (code(text="0.1"), code(text="0.2")),
    (code(text="[304, 13978]"), code(text="[304, 13979]")),
    (code(text="1,000"), code(text="1,001")),
    (code(text="nan"), code(text="1.0")),
    (code(text="float32"), code(text="float16")),
    (code(text="'<0x0A>'"), code(text="'<0x0B>'")),
    (code(text="[1.0, 2.0]"), code(text="[1.0]")),
    (code(text="1.0"), code(text="-1.0")),
    (code(text="1.0"), code()),
    (code(), code(stdout="new\n")),
    (code(image="one"), code(text="<Figure>")),
    (code(text="1.0"), code(error="boom")),
    (code(stdout="3 ms", tags=["measured"]), code(error="boom", tags=["measured"])),
    (code(error="no", tags=["raises-exception"]), code(error="yes", tags=["raises-exception"])),
    (code("x = 1"), code("x = 2")),
])
def test_refused(old, new):
    assert len(compare(old, new)) == 1


def test_a_message_names_the_cell_and_shows_both_texts():
    message, = compare(code(text="kept"), code(text="changed"))
    assert "cell 1" in message and "kept" in message and "changed" in message
