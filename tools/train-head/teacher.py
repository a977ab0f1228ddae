#!/usr/bin/env python3
"""The teacher's vectors of shards that pairs.py made: teacher.py MINILM SEED...

MINILM: the folder with model.safetensors and tokenizer.json of the sentence model. Writes trSEED.teach.npz: vectors
of the questions, of the passages, and of each question's passage without the sentence it was made of (token
states pooled without it).
"""

import json, os, struct, sys
import numpy as np, jax, jax.numpy as jnp
from tokenizers import Tokenizer

P = ""


def load():
    b = open(P + "model.safetensors", "rb").read()
    n = struct.unpack("<Q", b[:8])[0]
    h = json.loads(b[8 : 8 + n])
    o = {}
    for k, v in h.items():
        if k == "__metadata__":
            continue
        s, e = v["data_offsets"]
        if v["dtype"] != "F32":
            continue
        o[k.removeprefix("bert.")] = np.frombuffer(b[8 + n + s : 8 + n + e], np.float32).reshape(v["shape"])
    return o


W = None


def ln(x, g, b):
    m = x.mean(-1, keepdims=True)
    v = ((x - m) ** 2).mean(-1, keepdims=True)
    return (x - m) / jnp.sqrt(v + 1e-12) * g + b


@jax.jit
def tokens(w, ids, mask):
    x = (
        w["embeddings.word_embeddings.weight"][ids]
        + w["embeddings.position_embeddings.weight"][: ids.shape[1]][None]
        + w["embeddings.token_type_embeddings.weight"][0]
    )
    x = ln(x, w["embeddings.LayerNorm.weight"], w["embeddings.LayerNorm.bias"])
    B, T, _ = x.shape
    bias = (mask[:, None, None, :] - 1.0) * 1e9
    for l in range(6):
        p = f"encoder.layer.{l}."
        lin = lambda y, n: y @ w[p + n + ".weight"].T + w[p + n + ".bias"]
        q, k, v = [
            lin(x, "attention.self." + n).reshape(B, T, 12, 32).transpose(0, 2, 1, 3) for n in ("query", "key", "value")
        ]
        a = jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / np.sqrt(32) + bias, -1) @ v
        a = lin(a.transpose(0, 2, 1, 3).reshape(B, T, 384), "attention.output.dense")
        x = ln(x + a, w[p + "attention.output.LayerNorm.weight"], w[p + "attention.output.LayerNorm.bias"])
        h = lin(jax.nn.gelu(lin(x, "intermediate.dense"), approximate=False), "output.dense")
        x = ln(x + h, w[p + "output.LayerNorm.weight"], w[p + "output.LayerNorm.bias"])
    return x


@jax.jit
def fwd(w, ids, mask):
    x = tokens(w, ids, mask)
    s = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return s / jnp.linalg.norm(s, axis=-1, keepdims=True)


def embed(texts, maxlen=256, batch=32, log=False):
    global W
    if W is None:
        W = {k: jnp.asarray(v) for k, v in load().items()}
    tk = Tokenizer.from_file(P + "tokenizer.json")
    tk.no_padding()
    tk.enable_truncation(maxlen)
    enc = [e.ids for e in tk.encode_batch(texts)]
    order = sorted(range(len(enc)), key=lambda i: len(enc[i]))
    out = np.zeros((len(enc), 384), np.float32)
    for i in range(0, len(order), batch):
        ix = order[i : i + batch]
        T = max(len(enc[j]) for j in ix)
        T = (T + 15) // 16 * 16
        ids = np.zeros((batch, T), np.int32)
        m = np.zeros((batch, T), np.float32)
        m[:, 0] = 1
        for r, j in enumerate(ix):
            ids[r, : len(enc[j])] = enc[j]
            m[r, : len(enc[j])] = 1
        out[ix] = np.asarray(fwd(W, ids, m))[: len(ix)]
        if log and (i // batch) % 50 == 0:
            print(i, len(order), flush=True)
    return out


def run(base):
    d = json.load(open(base + ".json"))
    W = {k: jnp.asarray(v) for k, v in load().items()}
    tk = Tokenizer.from_file(P + "tokenizer.json")
    tk.no_padding()
    tk.enable_truncation(256)
    qs = [q for x in d for q, _ in x[3]]
    own = np.array([i for i, x in enumerate(d) for _ in x[3]], np.int32)
    Q = embed(qs)
    texts = [(x[1] + "\n" if x[1] else "") + x[2] for x in d]
    enc = tk.encode_batch(texts)
    order = sorted(range(len(enc)), key=lambda i: len(enc[i].ids))
    C = np.zeros((len(d), 384), np.float32)
    M = np.zeros((len(qs), 384), np.float32)
    first = {}
    for j, i in enumerate(own):
        first.setdefault(int(i), []).append(j)
    masks = [m for x in d for _, m in x[3]]
    B = 32
    for s in range(0, len(order), B):
        ix = order[s : s + B]
        T = (max(len(enc[j].ids) for j in ix) + 15) // 16 * 16
        ids = np.zeros((B, T), np.int32)
        m = np.zeros((B, T), np.float32)
        m[:, 0] = 1
        for r, j in enumerate(ix):
            n = len(enc[j].ids)
            ids[r, :n] = enc[j].ids
            m[r, :n] = 1
        X = np.asarray(tokens(W, ids, m))
        for r, j in enumerate(ix):
            n = len(enc[j].ids)
            x = X[r, :n]
            v = x.mean(0)
            C[j] = v / np.linalg.norm(v)
            base0 = len(texts[j]) - len(d[j][2])
            off = enc[j].offsets
            for q in first.get(j, []):
                a, b = masks[q]
                keep = np.array([not (b > a and o[1] > o[0] and o[0] >= a + base0 and o[1] <= b + base0) for o in off])
                v = x[keep].mean(0)
                M[q] = v / np.linalg.norm(v)
        if (s // B) % 10 == 0:
            print(base, s, len(order), flush=True)
    np.savez(base + ".teach.npz", Q=Q.astype(np.float16), C=C.astype(np.float16), M=M.astype(np.float16), own=own)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    P = os.path.join(sys.argv[1], "")
    for seed in sys.argv[2:]:
        run("tr" + seed)
