#!/usr/bin/env python3
"""Writes arch.bin: what llama.cpp computes for the tiny models of tests/attention/test_arch.c, one of each
architecture and weight type. With --check it also tries files that the gguf package writes, with its own
quantisers, and compares the engine's logits with llama.cpp's.

Usage: make_arch.py TEST_BINARY OUT      (needs llama-cpp-python, gguf, numpy)
       make_arch.py TEST_BINARY --check
  TEST_BINARY  test_attention_arch; it writes the models (--write) and runs the engine (--logits)

arch.bin, little-endian, no padding:
  char[4] "IBAR", u32 version 1, u32 n_cases, u32 rows per case
  per case: u64 XXH3 of the file; u64 sum over the weights of blk.1.ffn_down as the gguf package has them,
  sum = sum * 1000003 + bits of each, -0 as 0; f32 logits[rows][vocabulary] of rows ROWS"""
import os
import struct
import subprocess
import sys
import tempfile

import gguf
import llama_cpp
import numpy as np
from gguf.quants import dequantize, quantize

N, VOCAB, ROWS = 24, 288, [5, 14, 23]
TOKENS = [(i * 97 + 41) % VOCAB for i in range(N)]


def llama_logits(path):
    llama = llama_cpp.Llama(path, n_ctx=64, n_batch=64, n_threads=2, logits_all=True, verbose=False, flash_attn=False,
                            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)
    llama.eval(TOKENS)
    return llama.scores[:N].astype("<f4").copy()


def weights_sum(path):
    t = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_down.weight")
    total = 0
    for bits in (dequantize(t.data, t.tensor_type).astype("<f4") + np.float32(0)).view("<u4").ravel().tolist():
        total = (total * 1000003 + bits) % 2**64
    return total


def make(binary, target):
    with tempfile.TemporaryDirectory() as folder:
        lines = subprocess.run([binary, "--write", folder], check=True, stdout=subprocess.PIPE, text=True).stdout
        cases = [line.rsplit(" ", 1) for line in lines.splitlines()]
        out = [b"IBAR" + struct.pack("<III", 1, len(cases), len(ROWS))]
        for path, checksum in cases:
            logits = llama_logits(path)
            assert np.isfinite(logits).all()
            print(os.path.basename(path), "logits have the root mean square", np.sqrt((logits**2).mean()))
            out.append(struct.pack("<QQ", int(checksum), weights_sum(path)) + logits[ROWS].tobytes())
    with open(target, "wb") as f:
        f.write(b"".join(out))
    print(f"{sum(map(len, out))} bytes written to {target}")


def byte_texts():
    plain = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    rest = [b for b in range(256) if b not in plain]
    return [chr(b) if b in plain else chr(256 + rest.index(b)) for b in range(256)]


def write(path, arch, kind, seed):
    """A model with the gguf package's writer. Head widths: as the model's, or wider (qwen3)."""
    rng = np.random.default_rng(seed)
    d, heads, kv_heads, ff, layers = 256, 4, 2, 512, 2
    dim = 128 if arch == "qwen3" else d // heads
    w = gguf.GGUFWriter(path, arch)
    w.add_block_count(layers)
    w.add_context_length(64)
    w.add_embedding_length(d)
    w.add_feed_forward_length(ff)
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(1e6)
    if arch == "llama":
        w.add_rope_dimension_count(dim)
    else:
        w.add_key_length(dim)
        w.add_value_length(dim)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("llama-bpe" if arch == "llama" else "qwen2")
    texts = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + byte_texts() + ["th"]
    texts += [f"unused-{i}" for i in range(VOCAB - len(texts))]
    w.add_token_list(texts)
    w.add_token_types([3] * 3 + [1] * 257 + [5] * (VOCAB - 260))
    w.add_token_merges(["t h"])
    w.add_eos_token_id(2)
    w.add_bos_token_id(1)

    def floats(name, x):
        w.add_tensor(name, x.astype(np.float32))

    def matrix(name, rows, cols):
        x = (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)
        if kind == gguf.GGMLQuantizationType.F32:
            floats(name, x)
        else:
            w.add_tensor(name, quantize(x, kind), raw_dtype=kind)

    matrix("token_embd.weight", VOCAB, d)
    floats("output_norm.weight", rng.uniform(0.5, 1.5, d))
    if arch == "llama":
        matrix("output.weight", VOCAB, d)
        floats("rope_freqs.weight", np.linspace(1, 8, dim // 2))
    for i in range(layers):
        b = f"blk.{i}."
        for norm in ("attn_norm", "ffn_norm"):
            floats(f"{b}{norm}.weight", rng.uniform(0.5, 1.5, d))
        for name, rows, cols in (("attn_q", heads * dim, d), ("attn_k", kv_heads * dim, d), ("attn_v", kv_heads * dim, d),
                                 ("attn_output", d, heads * dim), ("ffn_gate", ff, d), ("ffn_up", ff, d),
                                 ("ffn_down", d, ff)):
            matrix(f"{b}{name}.weight", rows, cols)
            if arch == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                floats(f"{b}{name}.bias", rng.standard_normal(rows) / 2)
        if arch == "qwen3":
            for name in ("attn_q_norm", "attn_k_norm"):
                floats(f"{b}{name}.weight", rng.uniform(0.3, 1.7, dim))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def check(binary):
    kinds = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]  # what the package can quantise to
    limits = {"F32": 2e-5, "F16": 2e-3, "BF16": 2e-2}
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for arch in ("llama", "qwen2", "qwen3"):
            for seed, kind in enumerate(kinds):
                path = os.path.join(folder, f"{arch}-{kind}.gguf")
                write(path, arch, getattr(gguf.GGMLQuantizationType, kind), seed)
                raw = subprocess.run([binary, "--logits", path], check=True, stdout=subprocess.PIPE).stdout
                own, want = np.frombuffer(raw, "<f4").reshape(N, VOCAB), llama_logits(path)
                off = np.sqrt(((own - want) ** 2).mean() / (want**2).mean())
                ok = off <= limits.get(kind, 3e-2)
                failed += not ok
                print(f"{arch} {kind}: {off:.2g} of the logits' root mean square{'' if ok else ': TOO FAR'}")
    sys.exit(failed != 0)


if sys.argv[2] == "--check":
    check(sys.argv[1])
make(sys.argv[1], sys.argv[2])
