"""Files that anybody may have written, damaged in hundreds of ways: one line, or a right answer.

PIKO_MUTATIONS says how many mutations of each kind of file are tried.
"""

import contextlib
import dataclasses
import json
import os
import random
import shutil

import pytest
import safetensors.torch
import torch

import checkpoint
import meta
from checkpoint import Loaded
from meta import interleaved_rows
from model import Llama, LlamaConfig, RopeScaling
from run import write_json
from tokenizer import ByteTokenizer, CharacterTokenizer, SentencePieceTokenizer

N_MUTATION = int(os.environ.get("PIKO_MUTATIONS", 12))
NASTY = [None, True, False, 0, -1, 1, 2, 3, 1.5, -0.5, 1e300, -1e300, 1e-300, 10**6, 10**9, 2**31,
         2**63, 10**20, 10**400, "", "x", "2", "<s>", "\ud800", "x" * 5000, [], [[]], {}, {"a": 1},
         ["<s>"], [1, 2], float("nan"), float("inf")]  # fmt: skip


def places(value, path=()) -> list[tuple]:
    """The path of every value within a JSON value."""
    found = [path] if path else []
    inside = value.items() if isinstance(value, dict) else ()
    inside = enumerate(value) if isinstance(value, list) else inside
    for key, one in inside:
        found += places(one, (*path, key))
    return found


def mutated_json(content: bytes, dice: random.Random) -> bytes:
    """One to three values replaced, left out, doubled or moved elsewhere."""
    value = json.loads(content)
    for _ in range(dice.choice((1, 1, 2, 3))):
        *path, last = dice.choice(places(value) or [("x",)])
        inside = value
        for key in path:
            inside = inside[key]
        how = dice.choice(("replace", "replace", "replace", "drop", "double", "move"))
        if how == "replace":
            inside[last] = dice.choice(NASTY)
        elif how == "drop" and last in (inside if isinstance(inside, dict) else range(len(inside))):
            del inside[last]
        elif how == "double" and isinstance(inside, list):
            inside.append(inside[last])
        elif isinstance(inside, dict):
            inside[dice.choice((*inside, "banana"))] = inside.get(last)
        if not isinstance(value, dict) or not value:
            break
    return json.dumps(value).encode("utf-8", errors="surrogatepass")


def mutated_bytes(content: bytes, dice: random.Random) -> bytes:
    """A few bytes changed, put in, left out or cut off. The head of a file counts more."""
    bad = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 10))):
        at = dice.randrange(len(bad) if dice.random() < 0.5 else min(len(bad), 300)) if bad else 0
        n = dice.choice((1, 1, 4, 50))
        how = dice.choice(("bit", "bytes", "put in", "leave out", "cut off", "zero"))
        if how == "bit" and bad:
            bad[at] ^= 1 << dice.randrange(8)
        elif how == "bytes":
            bad[at : at + n] = dice.randbytes(n)
        elif how == "put in":
            bad[at:at] = dice.randbytes(n)
        elif how == "leave out":
            del bad[at : at + n]
        elif how == "cut off" and dice.random() < 0.3:
            del bad[at:]
        elif how == "zero":
            bad[at : at + n] = bytes(n)
    return bytes(bad)


def mutated(name: str, content: bytes, dice: random.Random) -> bytes:
    """A damaged version of a file: by its structure where it has one, and by its bytes."""
    if name.endswith(".json") and dice.random() < 0.8:
        return mutated_json(content, dice)
    return mutated_bytes(content, dice)


# ── Good folders ──────────────────────────────────────────────────────────────────────────────────


def loaded_with(tokenizer, folder) -> Loaded:
    sizes = LlamaConfig(
        vocab_size=tokenizer.vocab_size, seq_len=30, n_layer=2, n_head=2, n_kv_head=1, d_model=8,
        d_head=4, d_ff=6, rope_scaling=RopeScaling(), tie_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return Loaded(folder, Llama(sizes).eval(), tokenizer, (tokenizer.eos_id,))


@pytest.fixture(scope="module")
def trained_tokenizer(stories) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(stories.splitlines(), 340)


def hugging_face(tokenizer, folder) -> None:
    checkpoint.export(loaded_with(tokenizer, folder), folder)


def shards(tokenizer, folder) -> None:
    """Pickles in two parts, and the tokenizer as SentencePiece's file alone."""
    hugging_face(tokenizer, folder)
    (folder / "tokenizer.json").unlink()
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file_of = {name: f"part{i % 2}.bin" for i, name in enumerate(tensors)}
    for file in ("part0.bin", "part1.bin"):
        torch.save({n: t for n, t in tensors.items() if file_of[n] == file}, folder / file)
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": file_of})


def metas(tokenizer, folder) -> None:
    folder.mkdir()
    model = loaded_with(tokenizer, folder).model
    params = {"dim": 8, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "norm_eps": 1e-5}
    write_json(folder / "params.json", params | {"rope_theta": 1e4, "use_scaled_rope": True})
    weights = {}
    for name, weight in model.state_dict().items():
        parts = name.removesuffix(".weight").split(".", 2)
        if name.endswith(("wq.weight", "wk.weight")):
            weight = interleaved_rows(weight, 2 if "wq" in name else 1)
        theirs = meta.TOP.get(parts[0]) or f"layers.{parts[1]}.{meta.BLOCK[parts[2]]}"
        weights[f"{theirs}.weight"] = weight.clone()
    torch.save(weights, folder / "consolidated.00.pth")
    tokenizer.save(folder)


def run_of(tokenizer, folder) -> None:
    folder.mkdir()
    model = loaded_with(tokenizer, folder).model
    sizes = dataclasses.asdict(model.config)
    write_json(folder / "config.json", {"model": sizes, "train": {}, "versions": {}})
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    tokenizer.save(folder)


FOLDERS = {  # a good folder, the tokenizer in it, and its files
    "hugging face": (hugging_face, None, "config.json generation_config.json tokenizer.json "
                     "tokenizer_config.json model.safetensors"),
    "hugging face, bytes": (hugging_face, ByteTokenizer(), "alphabet.json"),
    "shards": (shards, None, "pytorch_model.bin.index.json part0.bin tokenizer.model "
               "tokenizer_config.json"),
    "meta": (metas, None, "params.json consolidated.00.pth tokenizer.model"),
    "run": (run_of, CharacterTokenizer("\n Oedny"), "config.json model.safetensors alphabet.json"),
}  # fmt: skip
KINDS = [(kind, name) for kind, (*_, names) in FOLDERS.items() for name in names.split()]
SAMPLE = ["--sample", "--prompt", "One day", "--max-new-tokens", 3, "--device", "cpu"]


@contextlib.contextmanager
def native_stderr(file):
    """What libraries that are not written in Python print to stderr goes into `file`."""
    usual = os.dup(2)
    with open(file, "wb") as stream:
        os.dup2(stream.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(usual, 2)
        os.close(usual)


@pytest.mark.parametrize(("kind", "name"), KINDS, ids=lambda x: x)
def test_mutated_file_is_one_line_or_a_right_run(command, tmp_path, trained_tokenizer, kind, name):
    make, tokenizer, _ = FOLDERS[kind]
    folder = tmp_path / "good"
    make(tokenizer or trained_tokenizer, folder)
    good = command(*SAMPLE, "--weights", folder)
    assert good.code == 0, good.err
    content, dice = (folder / name).read_bytes(), random.Random(f"{kind} {name}")
    for i in range(N_MUTATION):
        bad = mutated(name, content, dice)
        (folder / name).write_bytes(bad)
        shutil.copy(folder / name, tmp_path / "last")  # what to look at after a crash
        verbs = [SAMPLE] if i % 4 else [["--export", tmp_path / f"exported{i}"], SAMPLE]
        for words in verbs:
            with native_stderr(tmp_path / "printed"):
                outcome = command(*words, "--weights", folder)
            assert (tmp_path / "printed").read_bytes() == b"", (i, bad[:500])
            assert "Traceback" not in outcome.err
            if outcome.code:
                lines = [x for x in outcome.err.splitlines() if not x.startswith("weights ")]
                assert outcome.complaint and len(lines) == 1, (i, bad[:500])
