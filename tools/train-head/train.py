#!/usr/bin/env python3
"""Trains a head on shards and writes it as a calibration record (attention/plan/head.h, calibration.c).

    train.py OUT.head --fingerprint HEX [--shards 1,2,3] [--steps 360] [--seed 0] ...

Token key = the raw key of one head, centred and of unit length, beside the projection of all inputs, of unit length;
--raw-share is the raw part's share of the score. The projection is linear plus a GELU layer, over standardised
inputs; it starts as principal components. Loss: MaxSim, weighted by IDF, softmax over the passages of a batch, some
of them neighbours in the teacher's space; --distil of it is the divergence from the teacher's own softmax.
Questions and passages that are held out (6 %) are only reported on. See passages.py for the whole recipe.
"""

import argparse, json, math, time
import jax, jax.numpy as jnp, msgpack
import numpy as np

R = ""


class Data:
    pass


def load(shards, H):
    D = Data()
    X = []
    Xq = []
    D.c0 = []
    D.cn = []
    D.cids = []
    D.q0 = []
    D.qn = []
    D.own = []
    D.mask = []
    C = []
    Q = []
    M = []
    D.src = []
    nc = nq = 0
    D.qids = []
    for s in shards:
        b = R + f"tr{s}"
        J = json.load(open(b + ".json"))
        n = len(J)
        T = {k: v for k, v in np.load(b + ".teach.npz").items()}
        bl = np.fromfile(b + ".blocks", np.uint32).reshape(-1, 4).astype(int)
        ids = np.fromfile(b + ".ids", np.int32)
        ends = np.fromfile(b + ".ends", np.uint32)
        K = np.memmap(b + ".keys", np.float16, "r").reshape(len(ids), -1, 3, 64)
        x = np.concatenate([K[:, l - 1, h] for l, h in H], 1)
        masks = [m for y in J for _, m in y[3]]
        qbase = len(D.own)
        firstblock = {}
        cnt = {}
        for r, st, k, nt in bl:
            if r < n:
                cnt[r] = cnt.get(r, 0) + 1
                firstblock.setdefault(r, (st, k, nt))
        qbl = {r - n: (st, k) for r, st, k, nt in bl if r >= n}
        cmap = {}
        for r, (st, k, nt) in firstblock.items():
            if cnt[r] > 1:
                continue
            cmap[r] = len(D.c0)
            D.c0.append(st + nc)
            D.cn.append(k)
            D.src.append(J[r][0])
            C.append(T["C"][r])
        for j, o in enumerate(T["own"]):
            o = int(o)
            if o not in cmap or j not in qbl:
                continue
            st, k = qbl[j]
            if k < 2 or k > 60:
                continue
            D.q0.append(st + nc)
            D.qn.append(k)
            D.own.append(cmap[o])
            Q.append(T["Q"][j])
            M.append(T["M"][j])
            a, e = masks[j]
            fs, fk, nt = firstblock[o]
            if e > a:
                en = ends[fs : fs + fk].astype(int)
                stt = np.concatenate([[0], en[:-1]])
                mk = np.zeros(fk, bool)
                mk[nt:] = (en[nt:] > a + 1) & (stt[nt:] < e - 0)
                mk[:nt] = False
                D.mask.append(mk)
            else:
                D.mask.append(None)
        X.append(x)
        D.qids.append(ids)
        nc += len(ids)
    D.X = np.concatenate(X)
    D.ids = np.concatenate(D.qids)
    for k in ("c0", "cn", "q0", "qn", "own"):
        setattr(D, k, np.array(getattr(D, k)))
    D.C = np.array(C, np.float32)
    D.Q = np.array(Q, np.float32)
    D.M = np.array(M, np.float32)
    df = np.zeros(D.ids.max() + 1, int)
    for a, n in zip(D.c0, D.cn):
        df[np.unique(D.ids[a : a + n])] += 1
    N = len(D.c0)
    D.idf = np.log((N - df + 0.5) / (df + 0.5) + 1).astype(np.float32)
    rows = np.concatenate([np.arange(a, a + n) for a, n in zip(D.c0, D.cn)])
    sub = rows[::5]
    D.mean = D.X[sub].astype(np.float32).mean(0)
    D.sd = D.X[sub].astype(np.float32).std(0) + 1e-6
    D.qofc = [[] for _ in range(N)]
    for j, o in enumerate(D.own):
        D.qofc[o].append(j)
    rng = np.random.default_rng(0)
    D.dev = rng.random(N) < 0.06  # held-out chunks
    S = D.C @ D.C.T
    np.fill_diagonal(S, -1)
    D.nn = np.argpartition(-S, 12, axis=1)[:, :12]
    return D


def gelu(x):
    return 0.5 * x * (1 + jnp.tanh(0.7978845608 * (x + 0.044715 * x**3)))


def unit(x):
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def project(p, x):
    y = x @ p["w0"].T
    if "w1" in p:
        y = y + gelu(x @ p["w1"].T + p["b1"]) @ p["w2"].T
    return unit(y)


def init(D, dim, hid, rng):
    # PCA start
    X = (D.X[::29].astype(np.float32) - D.mean) / D.sd
    X = X[np.random.default_rng(1).permutation(len(X))[:6000]]
    U, S, V = np.linalg.svd(X - X.mean(0), full_matrices=False)
    p = {"w0": jnp.asarray(V[:dim] / (S[:dim, None] / math.sqrt(len(X))) ** 0.5, jnp.float32)}
    d = X.shape[1]
    if hid:
        p.update(
            w1=jnp.asarray(rng.normal(size=(hid, d)) / math.sqrt(d), jnp.float32),
            b1=jnp.zeros(hid),
            w2=jnp.asarray(rng.normal(size=(dim, hid)) * 0.3 / math.sqrt(hid), jnp.float32),
        )
    p["ls"] = jnp.asarray(math.log(20.0))
    return p


def loss_fn(p, qx, qw, cx, cm, T, lam, wr2, rq, rc, tt):
    B = qx.shape[0]
    q = project(p, qx)
    c = project(p, cx)

    def ms(q, c):
        s = jnp.einsum("qid,cjd->qicj", q, c)
        return jnp.where(cm[None, None], s, -2.0)

    s = ms(q, c) * (1 - wr2)
    if rq is not None:
        s = s + wr2 * ms(rq, rc)
    s = s.max(-1)
    s = (s * qw[..., None]).sum(1) / qw.sum(1)[:, None]
    z = s * jnp.exp(p["ls"])
    con = -jnp.diag(jax.nn.log_softmax(z, 1)).mean()
    t = jax.nn.softmax(T / tt, 1)
    dis = (t * (jnp.log(t + 1e-9) - jax.nn.log_softmax(z, 1))).sum(1).mean()
    return (1 - lam) * con + lam * dis, (con, dis)


def batch(D, rng, B, LQ, LC, ids, near, noise=0.0):
    seeds = []
    seen = set()
    while len(seeds) < B:
        c = int(rng.choice(ids))
        cand = [c] + ([int(x) for x in rng.choice(D.nn[c], 3, replace=False)] if rng.random() < near else [])
        for x in cand:
            if x not in seen and D.qofc[x] and len(seeds) < B and D.dev[x] == D.dev[c]:
                seen.add(x)
                seeds.append(x)
    qs = [int(rng.choice(D.qofc[c])) for c in seeds]
    d = D.X.shape[1]
    qx = np.zeros((B, LQ, d), np.float16)
    qw = np.zeros((B, LQ), np.float32)
    cx = np.zeros((B, LC, d), np.float16)
    cm = np.zeros((B, LC), bool)
    T = D.Q[qs] @ D.C[seeds].T
    for i, (c, q) in enumerate(zip(seeds, qs)):
        a, n = D.q0[q], min(D.qn[q], LQ)
        qx[i, :n] = D.X[a : a + n]
        qw[i, :n] = D.idf[D.ids[a : a + n]]
        rows = np.arange(D.c0[c], D.c0[c] + D.cn[c])
        if D.mask[q] is not None:
            rows = rows[~D.mask[q]]
            T[i, i] = D.Q[q] @ D.M[q]
        if len(rows) < 4:
            rows = np.arange(D.c0[c], D.c0[c] + D.cn[c])
        if len(rows) > LC:
            rows = np.sort(rng.choice(rows, LC, replace=False))
        cx[i, : len(rows)] = D.X[rows]
        cm[i, : len(rows)] = True
    return qx, qw, cx, cm, T


def train(
    D,
    dim=64,
    hid=256,
    steps=600,
    B=48,
    lr=2e-3,
    lam=0.7,
    near=0.5,
    LQ=28,
    LC=112,
    wr2=0.0,
    raw=None,
    tt=0.05,
    seed=0,
    wd=0.0,
    log=True,
    p=None,
):
    rng = np.random.default_rng(seed)
    p = p or init(D, dim, hid, rng)
    mean = jnp.asarray(D.mean)
    isd = jnp.asarray(1 / D.sd)
    ids = np.flatnonzero(~D.dev)
    dv = np.flatnonzero(D.dev)

    def pre(x):
        return (x.astype(jnp.float32) - mean) * isd

    def rawk(x):
        if raw is None:
            return None
        y = (x.astype(jnp.float32) - mean)[..., raw * 64 : raw * 64 + 64]
        return unit(y)

    @jax.jit
    def step(p, m, v, t, qx, qw, cx, cm, T):
        (l, a), g = jax.value_and_grad(loss_fn, has_aux=True)(
            p, pre(qx), qw, pre(cx), cm, T, lam, wr2, rawk(qx), rawk(cx), tt
        )
        r = lr * 0.5 * (1 + jnp.cos(jnp.pi * t / steps)) * jnp.minimum(1.0, t / 20)
        m = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, m, g)
        v = jax.tree.map(lambda a, b: 0.99 * a + 0.01 * b * b, v, g)
        p = jax.tree.map(
            lambda w, a, b: w - r * ((a / (1 - 0.9**t)) / (jnp.sqrt(b / (1 - 0.99**t)) + 1e-8) + wd * w), p, m, v
        )
        return p, m, v, l, a

    @jax.jit
    def ev(p, qx, qw, cx, cm, T):
        return loss_fn(p, pre(qx), qw, pre(cx), cm, T, lam, wr2, rawk(qx), rawk(cx), tt)

    m = jax.tree.map(jnp.zeros_like, p)
    v = jax.tree.map(jnp.zeros_like, p)
    t0 = time.time()
    acc = []
    r2 = np.random.default_rng(99)
    DV = [batch(D, r2, B, LQ, LC, dv, near) for _ in range(3)]
    for t in range(1, steps + 1):
        b = batch(D, rng, B, LQ, LC, ids, near)
        p, m, v, l, a = step(p, m, v, float(t), *b)
        acc.append((float(l), float(a[0]), float(a[1])))
        if log and (t % 100 == 0 or t in (20, steps)):
            e = [ev(p, *x) for x in DV]
            dvl = [
                np.mean([float(x[0]) for x in e]),
                np.mean([float(x[1][0]) for x in e]),
                np.mean([float(x[1][1]) for x in e]),
            ]
            print(
                t,
                "train %.3f con %.3f dis %.3f" % tuple(np.mean(acc[-60:], 0)),
                "dev %.3f con %.3f dis %.3f" % tuple(dvl),
                "scale %.1f" % math.exp(float(p["ls"])),
                "%.0fs" % (time.time() - t0),
                flush=True,
            )
    return jax.tree.map(np.asarray, p), dvl


def export(path, D, p, o):
    """The gain of the inputs is folded into the weights, so that the raw part is only centred."""
    f4 = lambda x: np.asarray(x, "<f4").tobytes()
    f2 = lambda x: np.asarray(x, "<f2").tobytes()
    gain = (1 / D.sd).astype(np.float32)
    record = dict(
        v=2,
        head_dim=64,
        inputs=[x for lh in o.inputs for x in lh],
        norm=0,
        mean=f4(D.mean),
        raw=[o.inputs.index(o.raw)],
        raw_weight=f4([math.sqrt(o.raw_share)]),
        out=o.dim,
        hidden=o.hidden,
        out_weight=f4([math.sqrt(1 - o.raw_share)]),
        w0=f2(p["w0"] * gain),
        b0=f4(np.zeros(o.dim)),
        w1=f2(p["w1"] * gain),
        b1=f4(p["b1"]),
        w2=f2(p["w2"]),
        numbers=f4([0, 0, 0, 0, 0, 0, o.keys_weight, 0]),
        note=o.note,
        model=bytes.fromhex(o.fingerprint),
    )
    with open(path, "wb") as f:
        f.write(msgpack.packb(record, use_bin_type=True))


def head_list(text):
    return [tuple(int(n) for n in x.split(".")) for x in text.split(",")]


if __name__ == "__main__":
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("out")
    a.add_argument("--fingerprint", required=True, help="of the model, from `ibid model list --json`")
    a.add_argument("--shards", default="1,2,3")
    a.add_argument(
        "--inputs", type=head_list, default=head_list("2.1,3.1,4.1,5.0,6.2,7.0,8.2,9.0"), help="LAYER.HEAD,..."
    )
    a.add_argument("--raw", type=lambda x: head_list(x)[0], default=(9, 0), help="the input that also goes in raw")
    a.add_argument("--raw-share", type=float, default=0.4)
    a.add_argument("--trained-share", type=float, default=0.35, help="the raw part's share while training")
    a.add_argument("--dim", type=int, default=64)
    a.add_argument("--hidden", type=int, default=128)
    a.add_argument("--steps", type=int, default=420)
    a.add_argument("--batch", type=int, default=40)
    a.add_argument("--distil", type=float, default=0.5)
    a.add_argument("--near", type=float, default=0.3, help="share of seeds that bring neighbours along")
    a.add_argument("--seed", type=int, default=5)
    a.add_argument("--keys-weight", type=float, default=0.59)
    a.add_argument("--note", default="")
    o = a.parse_args()
    data = load(o.shards.split(","), o.inputs)
    print(len(data.c0), "passages,", len(data.own), "questions")
    raw = o.inputs.index(o.raw) if o.trained_share > 0 else None
    p, _ = train(
        data,
        dim=o.dim,
        hid=o.hidden,
        steps=o.steps,
        B=o.batch,
        lam=o.distil,
        near=o.near,
        LQ=24,
        LC=64,
        raw=raw,
        wr2=o.trained_share,
        seed=o.seed,
    )
    export(o.out, data, p, o)
