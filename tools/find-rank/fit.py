#!/usr/bin/env python3
"""Fits the weights by which `ibid find` ranks the entities of a document (retriever/rank.h).

    fit.py --ibid BIN --data DIR --set FILE.jsonl [--set FILE.jsonl ...] [--write rank_weights.inc]

A set has the layout of KTRL+F (arXiv:2311.08329): one JSON object a line with data.target_text,
data.entity_info (mention, entity) and data.qa_pairs (question, target_entities). Its documents are
indexed into a collection of their own, every question is asked with `find --json --explain`, and two
logistic regressions (with and without the model's pass) are fitted on the features it prints.

What is printed is measured by cross-validation over documents: weights and thresholds of a fold come
from the other folds only. What is written is fitted on everything. Needs numpy.
"""
import argparse, collections, difflib, json, os, re, string, subprocess, sys, tempfile
import numpy as np

NAMES = ["mentions", "tokens", "words", "person", "place", "article", "acronym", "head_organization",
         "head_place", "head_event", "person_person", "person_place", "place_person", "place_place",
         "organization_person", "organization_place", "organization_organization", "work_person",
         "name_head", "name_rest", "keys", "gain", "gain_standard"]
GAINS = [NAMES.index("gain"), NAMES.index("gain_standard")]
THRESHOLDS = [0.05, 0.07, 0.09, 0.11, 0.13, 0.16, 0.19, 0.22, 0.26, 0.3, 0.35, 0.4]
WITHIN = [0.001, 0.2, 0.4, 0.7, 1.0]

# ---- The measures of the paper: multiset credit, and greedy longest common substrings ----

def normal(s):
    s = "".join(c for c in s.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", s).split())

def harmonic(p, r):
    return 2 * p * r / (p + r) if p + r else 0.0

def exact(gold, found):
    if not gold and not found:
        return 1.0
    same = sum((collections.Counter(gold) & collections.Counter(found)).values())
    return harmonic(same / max(len(found), 1), same / max(len(gold), 1))

memory = {}

def common(a, b):
    if (a, b) not in memory:
        m = difflib.SequenceMatcher(None, a, b).find_longest_match(0, len(a), 0, len(b))
        memory[a, b] = m.size
    return memory[a, b]

def overlap(gold, found):
    if not gold or not found:
        return float(not gold and not found)
    size = np.array([[common(g, f) for f in found] for g in gold], float)
    share = size / np.array([max(len(g), 1) for g in gold])[:, None]
    used, recall = set(), 0.0
    for i, row in enumerate(share.argsort()[:, ::-1]):
        for j in row:
            if j not in used:
                used.add(j)
                recall += share[i, j]
                break
    precision = (size / np.array([max(len(f), 1) for f in found])).max(0).sum()
    return harmonic(precision / len(found), recall / len(gold))

# ---- Questions and their candidates ----

def call(ibid, data, *args):
    out = subprocess.run([ibid, *args, "--data", data, "--json"], capture_output=True, text=True)
    if out.returncode > 1:
        sys.exit(f"{args}: {out.stderr}")
    return json.loads(out.stdout) if out.stdout.strip() else {}

def gather(ibid, data, path, cached):
    collection = re.sub(r"\W", "", os.path.basename(path))[:40]
    folder = os.path.join(data, "find-rank", collection)
    os.makedirs(folder, exist_ok=True)
    rows = [json.loads(line)["data"] for line in open(path, encoding="utf-8")]
    for i, row in enumerate(rows):
        with open(os.path.join(folder, f"{i}.txt"), "w", encoding="utf-8") as f:
            f.write(row["target_text"])
    if not cached:
        call(ibid, data, "index", folder, "--collection", collection)
    out = []
    for i, row in enumerate(rows):
        name, by = os.path.join(folder, f"{i}.txt"), collections.defaultdict(list)
        for e in row["entity_info"]:
            by[e["entity"]].append(e["mention"])
        for pair in row["qa_pairs"]:
            r = call(ibid, data, "find", pair["question"], name, "--collection", collection,
                     "--explain", "--min-score", "0")
            forms = collections.defaultdict(list)
            for m in r["matches"]:
                if m["kind"] in ("name", "form") and "entity" in m:
                    forms[m["name"]].append(normal(m["text"]))
            gold = [normal(m) for t in pair["target_entities"] for m in by[t]]
            c = [c for c in r["candidates"] if forms[c["name"]]]
            out.append(dict(doc=(path, i), question=pair["question"], gold=gold,
                            forms=[forms[x["name"]] for x in c],
                            y=np.array([bool(set(forms[x["name"]]) & set(gold)) for x in c], float),
                            x=np.array([x["features"] for x in c]).reshape(-1, len(NAMES)),
                            ms=r["timings_ms"]["total"]))
    return out

# ---- Fitting ----

def fit(rows, use, l2):
    x, y = np.concatenate([r["x"][:, use] for r in rows]), np.concatenate([r["y"] for r in rows])
    mean, sd = x.mean(0), x.std(0) + 1e-9
    z = np.hstack([(x - mean) / sd, np.ones((len(x), 1))])
    w, ridge = np.zeros(z.shape[1]), np.eye(z.shape[1]) * l2
    ridge[-1, -1] = 0
    for _ in range(50):
        p = 1 / (1 + np.exp(-z @ w))
        step = np.linalg.solve((z.T * (p * (1 - p))) @ z + ridge, z.T @ (p - y) + ridge @ w)
        w -= step
        if abs(step).max() < 1e-8:
            break
    full = np.zeros(len(NAMES))
    full[use] = w[:-1] / sd
    return full, w[-1] - (w[:-1] * mean / sd).sum()

def choose(r, s, threshold, within):
    if not len(s):
        return []
    low = min(np.log(threshold / (1 - threshold)), s.max() - within)
    return [f for forms, v in zip(r["forms"], s) if v >= low for f in forms]

def measure(r, found, seen={}):
    key = (r["doc"], r["question"], tuple(found))
    if key not in seen:
        seen[key] = (exact(r["gold"], found), overlap(r["gold"], found))
    return seen[key]

def best_limits(rows, scores):
    return max((np.mean([sum(measure(r, choose(r, s, t, w))) for r, s in zip(rows, scores)]), t, w)
               for t in THRESHOLDS for w in WITHIN)[1:]

def cross_validate(rows, use, l2, folds, seed):
    docs = sorted({r["doc"] for r in rows})
    np.random.default_rng(seed).shuffle(docs)
    fold = {tuple(d): i % folds for i, d in enumerate(docs)}
    out, weights, chosen = [], [], []
    for k in range(folds):
        train = [r for r in rows if fold[r["doc"]] != k]
        w, b = fit(train, use, l2)
        t, within = best_limits(train, [r["x"] @ w + b for r in train])
        weights.append(w)
        chosen.append((t, within))
        out += [measure(r, choose(r, r["x"] @ w + b, t, within)) for r in rows if fold[r["doc"]] == k]
    return 100 * np.mean(out, 0), np.array(weights), chosen

def only_asked(r):
    """The entities the model was asked about: the others come after them."""
    keep = r["x"][:, GAINS[0]] != 0
    return dict(r, x=r["x"][keep], y=r["y"][keep], forms=[f for f, k in zip(r["forms"], keep) if k])

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--ibid", default="ibid")
    a.add_argument("--data", required=True, help="data folder of a service of its own")
    a.add_argument("--set", action="append", required=True)
    a.add_argument("--indexed", action="store_true", help="the sets are indexed there already")
    a.add_argument("--write", help="the file of weights")
    a.add_argument("--l2", type=float, default=10.0)
    a.add_argument("--folds", type=int, default=7)
    o = a.parse_args()
    rows = [r for s in o.set for r in gather(o.ibid, o.data, s, o.indexed)]
    asked = [only_asked(r) for r in rows]
    print(f"{len(rows)} questions, {np.mean([len(r['y']) for r in rows]):.1f} entities each, "
          f"{np.median([r['ms'] for r in rows]):.0f} ms a question (median)")
    lines = []
    floor = np.quantile([r["x"][:, GAINS[0]].max() for r in asked if len(r["y"])], 0.03)
    plain = [i for i in range(len(NAMES)) if i not in GAINS]
    for title, rows, use in (("without the model's pass", rows, plain),
                             ("with it", asked, list(range(len(NAMES))))):
        runs = [cross_validate(rows, use, o.l2, o.folds, seed) for seed in (0, 1, 2)]
        print(f"{title}: List EM F1 {np.mean([r[0][0] for r in runs]):.1f}, "
              f"List Overlap F1 {np.mean([r[0][1] for r in runs]):.1f} "
              f"(cross-validated over documents, three partitions)")
        w, b = fit(rows, use, o.l2)
        t, within = best_limits(rows, [r["x"] @ w + b for r in rows])
        sd = np.concatenate([r["x"] for r in rows]).std(0)
        for i in use:
            spread = runs[0][1][:, i]
            print(f"  {NAMES[i]:26s} {w[i]:8.3f}   in folds {spread.min():8.3f} to {spread.max():8.3f}"
                  f"   times deviation {w[i] * sd[i]:6.2f}")
        print(f"  threshold {t}, within {within}; in folds {runs[0][2]}")
        lines.append("{%.4f,\n {%s},\n {%.3f, %.3f, %.3f}}," % (
            b, ", ".join(f"{v:.4f}" for v in w), t, within, floor if GAINS[0] in use else 0.0))
    if o.write:
        with open(o.write, "w") as f:
            f.write("/* Written by tools/find-rank/fit.py: do not edit. Without the model's gain, then "
                    "with it:\n * bias, weights in the order of ibidi_feature, limits. */\n")
            f.write("\n".join(lines) + "\n")

if __name__ == "__main__":
    main()
