"""Writes smollm2.json: what transformers makes of the same GGUF file, so that the tests compare with it where torch is not installed.

python tests/golden/make.py        (needs the extra [parity]; about a minute)
"""
import json
from pathlib import Path

from llama_nb.hub import fetch
from llama_nb.vocabularies import load_tokenizer

PROMPTS = (
    "The best way to attract bees",
    "To be, or not to be, that is the question:",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "La capitale de la France est Paris. The capital of Italy is",
    "1, 2, 3, 5, 8, 13, 21, 34, 55, 89: every number is the sum of the two before it, naïve as that may sound 🐝.",
)
SAMPLE = range(7, 49152, 1537)


def load_reference(path: Path):
    "The model as transformers reads it, float32."
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def reference_logits(model, ids: list[int]):
    "(tokens, vocab) at every position."
    import torch
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def reference_greedy(model, ids: list[int], count: int) -> list[int]:
    "The ids of the greedy continuation."
    import torch
    with torch.no_grad():
        ids = torch.tensor([ids])
        return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, repetition_penalty=1.0)[0, ids.shape[1]:].tolist()


def main():
    import numpy as np
    path = fetch("smollm2-135m-instruct")
    tokenizer, model = load_tokenizer(path), load_reference(path)
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        logits = reference_logits(model, ids)
        rows.append(dict(prompt=prompt, ids=ids, top=logits.argmax(-1).tolist(), logsumexp=np.logaddexp.reduce(logits, axis=-1).round(5).tolist(),
                         sample=[[round(float(value), 5) for value in row[list(SAMPLE)]] for row in logits]))
    bees = rows[0]["ids"]
    golden = dict(prompts=rows, greedy=reference_greedy(model, bees, 40))
    Path(__file__).with_name("smollm2.json").write_text(json.dumps(golden, ensure_ascii=False).replace('{"prompt"', '\n{"prompt"') + "\n")


if __name__ == "__main__":
    main()
