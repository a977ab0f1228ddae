#!/usr/bin/env python3
"""Trains the ranking of answer spans (attention/plan/extract_weights.c, and the weights at the head of
attention/plan/extract_run.c).

    bench_extract FILE.json features spans.bin
    tools/train-extract/train.py FILE.json spans.bin --weights attention/plan/extract_weights.c
    (build again)
    bench_extract FILE.json tried tried.jsonl MODEL.gguf 40
    tools/train-extract/train.py FILE.json spans.bin --tried tried.jsonl

FILE.json is in SQuAD layout. All are log-linear models over the spans of one question: the likelihood
of spans by the square of their F1 with the gold answer (times 0.3 where they do not overlap the gold's
place) is raised, with an L2 penalty on standardised weights. The model's weights come in two steps, as
extract_run.c uses them: "early" ones, from the first token's likelihood, choose --spans-read of the 40,
"late" ones the answer; both are trained on text scores of weights that did not see the question's fold.
Printed are exact match, F1, share of answers that contain the gold, and words, of questions whose
articles no weights saw (five folds). Needs numpy and scipy.
"""
import argparse
import copy
import json
import string
import unicodedata

import numpy as np
from scipy.optimize import minimize

LOWER_TEXT = 36  # the feature that counts how far down the plan a block is: one paragraph cannot train it
LOWER_TEXT_WEIGHT = -4.0

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("file")
parser.add_argument("spans")
parser.add_argument("--tried")
parser.add_argument("--weights", help="write the C file of the text's weights here")
parser.add_argument("--penalty", type=float, default=30.0)
parser.add_argument("--folds", type=int, default=5)
parser.add_argument("--spans-read", type=int, nargs="+", default=[12])
parser.add_argument("--by-word", type=float, nargs="+", default=[0.15])
args = parser.parse_args()


def normal(text):
    """As `ibid eval qa` does: punctuation away, then articles."""
    text = "".join(c for c in text.lower() if unicodedata.category(c)[0] != "P" and c not in string.punctuation)
    return " ".join(w for w in text.split() if w not in ("a", "an", "the"))


def f1(answer, gold):
    a, g = normal(answer).split(), normal(gold).split()
    common = sum(min(a.count(w), g.count(w)) for w in set(g))
    return 2 * common / (len(a) + len(g)) if common else 0.0


questions = []
with open(args.file) as f:
    for a, article in enumerate(json.load(f)["data"]):
        for paragraph in article["paragraphs"]:
            text = paragraph["context"]
            for qa in paragraph["qas"]:
                gold = [(g["text"], len(text[: g["answer_start"]].encode())) for g in qa["answers"]]
                questions.append((a, text.encode(), gold))


class Case:
    """The spans of one question: features [n, k], texts, what each is worth."""

    def __init__(self, index, features, places):
        self.article, text, self.gold = questions[index]
        self.x = features.astype(np.float32)
        self.texts = [text[s:e].decode(errors="ignore") for s, e in places]
        worth = []
        for (s, e), t in zip(places, self.texts):
            there = any(e > at and s < at + len(g.encode()) for g, at in self.gold)
            worth.append(max(f1(t, g) for g, _ in self.gold) * (1.0 if there else 0.3))
        self.worth = np.array(worth) ** 2
        self.index, self.places = index, places


def load_spans(path):
    data, at, out = open(path, "rb").read(), 0, []
    index, n = np.frombuffer(data, "<u4", 2, 0)
    # The number of features follows from the first question's length, the only one unknown.
    width = next(w for w in range(1, 4096) if fits(data, w))
    record = np.dtype([("s", "<u4"), ("e", "<u4"), ("f", "<f4", (width,))])
    while at < len(data):
        index, n = np.frombuffer(data, "<u4", 2, at)
        rows = np.frombuffer(data, record, n, at + 8)
        at += 8 + n * record.itemsize
        if n:
            out.append(Case(int(index), rows["f"], list(zip(rows["s"].tolist(), rows["e"].tolist()))))
    return out


def fits(data, width):
    at, expected = 0, 0
    while at < len(data):
        if at + 8 > len(data):
            return False
        index, n = np.frombuffer(data, "<u4", 2, at)
        if index != expected:
            return False
        expected += 1
        at += 8 + int(n) * (8 + 4 * width)
    return at == len(data)


def load_tried(path, text_scores):
    """Columns: score of the text, log likelihood of the first token, of the others, of ending there,
    tokens, root of the first token's surprise."""
    out = []
    for line in open(path):
        j = json.loads(line)
        rows = [(text_scores[j["q"]].get((r[1], r[2])), r) for r in j["tried"]]
        rows = [(t, r) for t, r in rows if t is not None]
        if not rows:
            continue
        x = np.array([[t, r[5], r[6], r[7], r[3], max(0.0, -r[5]) ** 0.5] for t, r in rows])
        out.append(Case(j["q"], x, [(r[1], r[2]) for _, r in rows]))
        out[-1].n_words = np.minimum(3, [len(t.split()) for t in out[-1].texts])
    return out


def train(cases, penalty):
    x = np.concatenate([c.x for c in cases])
    counts = np.array([len(c.texts) for c in cases])
    starts = np.cumsum(counts) - counts
    worth = np.concatenate([c.worth / c.worth.sum() if c.worth.sum() > 0 else c.worth for c in cases])
    scale = np.sqrt((x.astype(np.float64) ** 2).mean(0)).astype(np.float32) + np.float32(1e-3)
    x = x / scale
    total = np.repeat(np.add.reduceat(worth, starts), counts)

    def loss(w):
        s = (x @ w.astype(np.float32)).astype(np.float64)
        s -= np.repeat(np.maximum.reduceat(s, starts), counts)
        e = np.exp(s)
        z = np.repeat(np.add.reduceat(e, starts), counts)
        slope = x.T @ (worth - e / z * total).astype(np.float32)
        return -(worth * (s - np.log(z))).sum() + penalty * (w @ w) / 2, penalty * w - slope

    found = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 150})
    return found.x / scale


def measure(answers):
    n = len(answers)
    exact = sum(max(normal(t) == normal(g) for g, _ in gold) for t, gold in answers)
    score = sum(max(f1(t, g) for g, _ in gold) for t, gold in answers)
    contains = sum(max(f" {normal(g)} " in f" {normal(t)} " for g, _ in gold) for t, gold in answers)
    words = sum(len(t.split()) for t, _ in answers)
    return (f"exact {100 * exact / n:.1f} %, F1 {100 * score / n:.1f}, contains {100 * contains / n:.1f} %, "
            f"{words / n:.1f} words ({n} questions)")


def unseen(cases, penalty, visit):
    """visit(case, weights that did not see its article)."""
    for k in range(args.folds):
        w = train([c for c in cases if c.article % args.folds != k], penalty)
        for c in cases:
            if c.article % args.folds == k:
                visit(c, w)


def part(case, chosen):
    c = copy.copy(case)
    c.x, c.worth, c.n_words = case.x[chosen], case.worth[chosen], case.n_words[chosen]
    c.texts = [case.texts[i] for i in chosen]
    return c


EARLY = [0, 1, 4, 5]


def narrow(cases, n_read, by_word):
    """The spans of each case that early weights choose, which did not see its article."""
    out = []

    def choose(c, w):
        s = c.x @ w + by_word * cases[c.at].n_words
        out.append(part(cases[c.at], np.argsort(-s, kind="stable")[:n_read]))

    look = []
    for at, c in enumerate(cases):
        look.append(copy.copy(c))
        look[-1].x, look[-1].at = c.x[:, EARLY], at
    unseen(look, 1.0, choose)
    return out, train(look, 1.0)


cases, answers, text_scores = load_spans(args.spans), [], {}


def score(c, w):
    s = c.x @ w
    answers.append((c.texts[int(np.argmax(s))], c.gold))
    text_scores[c.index] = dict(zip(c.places, s.tolist()))


unseen(cases, args.penalty, score)
print("text alone, unseen articles:", measure(answers))
if args.weights:
    w = train(cases, args.penalty)
    w[LOWER_TEXT] = LOWER_TEXT_WEIGHT
    with open(args.weights, "w") as out:
        out.write("/* Weights of the features of a span, as tools/train-extract printed them "
                  "(docs/quality.md). */\n#include \"attention/plan/extract.h\"\n\n/* clang-format off */\n"
                  "const float ibidi_extract_weights[IBID_EXTRACT_FEATURES] = {\n")
        for i in range(0, len(w), 8):
            out.write("    " + " ".join(f"{v:.4f}f," for v in w[i: i + 8]) + "\n")
        out.write("};\n/* clang-format on */\n")
if args.tried:
    looked = load_tried(args.tried, text_scores)
    for n_read in args.spans_read:
        for by_word in args.by_word:
            read, early = narrow(looked, n_read, by_word)
            answers = []
            unseen(read, 1.0, lambda c, w: answers.append(
                (c.texts[int(np.argmax(c.x @ w + by_word * c.n_words))], c.gold)))
            late = train(read, 1.0)
            print(f"{n_read} spans read, by_word {by_word}, unseen articles:", measure(answers))
            print("   early: text, first, token, surprise", ", ".join(f"{v:.3f}" for v in early))
            print("   late: text, first, rest, stop, token, surprise", ", ".join(f"{v:.3f}" for v in late))
