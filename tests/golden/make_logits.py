#!/usr/bin/env python3
"""Writes logits.bin: what llama.cpp computes for the default model over one text, as an oracle for the
engine's forward pass; and the default model with every tensor dequantised to F32.

Usage: make_logits.py MODEL.gguf F32_OUT.gguf LOGITS_OUT   (needs llama-cpp-python, gguf, numpy)
  MODEL.gguf    the default model (Q4_1)
  F32_OUT.gguf  is written: the same metadata, byte for byte, and the same tensors as F32 (about 540 MB;
                not committed: a test that wants it runs this script first, or dequantises on its own)

Both are run with an f32 KV cache, without flash attention. llama.cpp rounds activations to 8 bits in
front of Q4_1 and Q8_0 weights, so the second section is noisier than the first.

logits.bin, little-endian, no padding:
  char[4]  "IBLG"
  u32      version 1
  u32      n_tokens
  u32      n_vocab
  u32      n_text, then that many bytes: the text; its tokens with parse_special are the ids below
  i32      ids[n_tokens]
  then two sections, first for the F32 file, then for MODEL.gguf itself:
    n_tokens rows (row p: the logits after tokens 0..p), each
      i32 top[2]    the ids of the largest and second largest logit
      f32 logit[2]  theirs
      f32 lse       log(sum(exp(logits))) over the vocabulary
    u32 n_full, then n_full times
      u32 position
      f32 logits[n_vocab]"""
import os
import struct
import sys

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

FULL = ([100, -1], [-1])  # positions stored whole, per section

TEXT = """<|im_start|>system
You answer questions about a small harbour town from the notes you are given.<|im_end|>
<|im_start|>user
# Notes on Averley harbour

The harbour of Averley has two breakwaters. The northern one was finished in 1871 and is built of grey granite \
blocks, each about three tonnes in weight; the southern one is younger, shorter, and made of poured concrete. Between \
them lies a channel that is 48 metres wide at its narrowest point. Ships drawing more than 5.2 metres must wait for \
high water, which comes about fifty minutes later each day.

The lighthouse stands at the end of the northern breakwater. Its lamp was lit with whale oil until 1889, then with \
paraffin, and since 1934 with electricity. It shows two white flashes every ten seconds and can be seen for fourteen \
nautical miles in clear weather. The last keeper, Marta Hollis, left in 1978, when the light was automated; her log \
books are kept in the town library, where anyone may read them on weekday mornings.

Fishing has declined. In 1950 there were sixty-three boats; in 1990 there were twenty-two, and today there are nine. \
Most of them catch crab and lobster within six miles of the shore. The fish market, once open every day but Sunday, \
now opens on Tuesdays and Fridays only. A cooperative buys the catch, keeps it in tanks filled with cooled sea water, \
and sells most of it to restaurants inland.

Tourism has grown instead. A ferry runs to the island of Skerrow from April to October, four times a day, and takes \
thirty-five minutes. The island has no cars, one shop, and a colony of about eleven hundred puffins that arrive in \
late March and leave in the first days of August. Visitors are asked to keep to the marked paths, because the birds \
nest in burrows that collapse easily under a careless foot.

The council maintains a tide gauge beside the ferry steps. It has recorded the water level every fifteen minutes \
since 1952, and its readings show that the mean level has risen by 19 centimetres in that time. After the storm of \
January 2014, when waves broke over the southern breakwater and flooded the lower street to a depth of sixty \
centimetres, a flood gate was installed; it has been closed eleven times since then.

Question: Who was the last keeper of the lighthouse, and why did she leave?<|im_end|>
<|im_start|>assistant
The last keeper was Marta Hollis. She left in 1978, when the light was automated, and her log books are now kept in \
the town library. Before that the lamp had burned whale oil, then paraffin, and from 1934 on it ran on electricity.<|im_end|>
"""


def export_f32(model, target):
    reader = GGUFReader(model)
    with open(model, "rb") as f:
        head = f.read(reader.tensors[0].field.offset)  # header and metadata, as they are
    table, offset = b"", 0
    for t in reader.tensors:
        name = t.name.encode()
        dims = [int(d) for d in t.shape]
        table += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
        table += struct.pack("<IQ", int(GGMLQuantizationType.F32), offset)
        offset += (4 * int(np.prod(t.shape)) + 31) // 32 * 32
    with open(target, "wb") as f:
        f.write(head + table)
        f.write(bytes(-f.tell() % 32))
        for t in reader.tensors:
            f.write(dequantize(t.data, t.tensor_type).astype("<f4").tobytes())
            f.write(bytes(-f.tell() % 32))


def run(path, ids, full):
    llama = llama_cpp.Llama(path, n_ctx=1024, n_batch=512, n_threads=2, logits_all=True, verbose=False,
                            flash_attn=False, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)
    llama.eval(ids)
    scores = llama.scores[: len(ids)].astype(np.float64)
    out = []
    for row in scores:
        top = np.argsort(-row, kind="stable")[:2]
        lse = row.max() + np.log(np.exp(row - row.max()).sum())
        out.append(struct.pack("<2i3f", *map(int, top), *map(float, row[top]), float(lse)))
    out.append(struct.pack("<I", len(full)))
    for p in full:
        p %= len(ids)
        out.append(struct.pack("<I", p) + scores[p].astype("<f4").tobytes())
    nll = -np.mean([scores[i][ids[i + 1]] - np.log(np.exp(scores[i] - scores[i].max()).sum()) - scores[i].max()
                    for i in range(len(ids) - 1)])
    print(f"{os.path.basename(path)}: {len(ids)} positions, perplexity of the text {np.exp(nll):.4f}")
    return b"".join(out), scores


def main():
    model, f32, target = sys.argv[1:]
    export_f32(model, f32)
    vocab = llama_cpp.Llama(model, vocab_only=True, verbose=False)
    ids = vocab.tokenize(TEXT.encode(), add_bos=False, special=True)
    text = TEXT.encode()
    assert 500 <= len(ids) <= 1024, len(ids)
    head = b"IBLG" + struct.pack("<IIII", 1, len(ids), vocab.n_vocab(), len(text)) + text
    first, a = run(f32, ids, FULL[0])
    second, b = run(model, ids, FULL[1])
    with open(target, "wb") as f:
        f.write(head + np.array(ids, "<i4").tobytes() + first + second)
    same = np.mean(a.argmax(1) == b.argmax(1))
    print(f"same top token in both: {same:.4f}; mean |difference of logits| {np.abs(a - b).mean():.4f}")
    print(f"{os.path.getsize(target)} bytes written to {target}")


main()
