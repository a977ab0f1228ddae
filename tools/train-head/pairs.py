#!/usr/bin/env python3
"""Passages with pseudo-questions, in shards: pairs.py FOLDER passages.json SEED...

A question is a sentence of the passage with words dropped and some replaced by WordNet synonyms, often with a
question word before it; or a few of its words; or the sentence itself; or a sentence that follows the passage. The
sentence is mostly left out of the passage. Some passages are WordNet's example sentences and definitions, and
their questions the definition of a word in an example. See passages.py for the whole recipe.
"""

import json, os, random, re, struct, sys

C = ""


def wordnet():
    syn = []
    for f in ("noun", "verb", "adj", "adv"):
        for l in open(C + "wordnet-base/usr/share/wordnet/data." + f, encoding="latin1"):
            if l[0] == " ":
                continue
            a, g = l.split(" | ", 1)
            a = a.split(" ")
            n = int(a[3], 16)
            ws = [re.sub(r"\(.*\)", "", a[4 + 2 * i]).replace("_", " ") for i in range(n)]
            ex = re.findall(r'"([^"]{12,})"', g)
            gl = re.split(r'; "', g.strip())[0].strip()
            syn.append((f, ws, gl, ex))
    return syn


MIX = dict(
    anarchism=150,
    gimp=40,
    gnucash=40,
    octave=60,
    maxima=40,
    png=40,
    mh=30,
    reference=30,
    history=10,
    devref=30,
    install=20,
    sky=50,
    abs=15,
    kstars=50,
    gcide=120,
    foldoc=80,
    jargon=40,
    devil=15,
    games=60,
    fortunes=60,
)
MIX["debian-edu"] = 20
STOP = set(
    "a an the of and or to in on at by for from with as is are was were be been being it its this that these those which who whom whose what when where why how not no if then than so but into out up down over under about such can could may might will would shall should do does did done has have had having i you he she they we his her their our your my me him them us there here also more most other some any each all one two only very just s t".split()
)
LEADS = [
    "What",
    "Which",
    "Who",
    "When did",
    "Where was",
    "How many",
    "Why did",
    "How does",
    "What is",
    "In what",
    "What are",
    "How",
    "What kind of",
    "Who was",
    "Why is",
    "Where is",
    "Where do",
    "How can",
    "When was",
    "Is it true that",
    "What did",
    "How much",
]


def sents(x):
    o = []
    i = 0
    for m in re.finditer(r'[^.!?\n]+(?:[.!?]+["\')]*|\n+|$)(?:\s+|$)', x):
        s = m.group(0)
        a = m.start() + len(s) - len(s.lstrip())
        b = m.start() + len(s.rstrip())
        if b > a:
            o.append((a, b))
    # join fragments ("e.g.", initials)
    out = []
    for a, b in o:
        if out and (out[-1][1] - out[-1][0] < 25):
            out[-1] = (out[-1][0], b)
        else:
            out.append((a, b))
    return out


def words(s):
    return re.findall(r"[A-Za-z0-9][\w'-]*", s)


class Gen:
    def __init__(g, seed):
        g.r = random.Random(seed)
        g.wn = wordnet()
        g.syn = {}
        for pos, ws, gl, ex in g.wn:
            for w in ws:
                g.syn.setdefault(w.lower(), []).append((ws, gl))
        g.exs = [x for x in g.wn if x[3] and len(x[2]) > 25]
        g.nouns = [x for x in g.wn if x[0] == "noun" and len(x[2]) > 50]

    def sub(g, w):
        l = w.lower()
        e = g.syn.get(l) or (g.syn.get(l[:-1]) if l.endswith("s") else None)
        if not e:
            return w
        c = [x for ws, _ in e[:2] for x in ws if x.lower() != l and len(x) > 2]
        return g.r.choice(c) if c else w

    def ask(g, ws):
        r = g.r
        s = " ".join(ws)
        return r.choice(LEADS) + " " + s + ("?" if r.random() < 0.9 else "")

    def question(g, text, nxt):
        r = g.r
        ss = [x for x in sents(text) if len(words(text[x[0] : x[1]])) >= 6]
        if not ss:
            return None
        a, b = r.choice(ss)
        s = text[a:b]
        ws = words(s)
        mask = (a, b) if r.random() < 0.8 else (0, 0)
        k = r.random()
        if k < 0.5:
            keep = r.uniform(0.35, 0.85)
            o = [w for w in ws if r.random() < keep]
            p = r.choice([0, 0.3, 0.6])
            o = [g.sub(w) if w.lower() not in STOP and r.random() < p else w for w in o]
            if len(o) < 3:
                return None
            q = g.ask(o[:24]) if r.random() < 0.7 else " ".join(o[:30])
        elif k < 0.7:
            o = [w for w in ws if w.lower() not in STOP]
            if len(ss) > 1 and r.random() < 0.5:
                c = r.choice(ss)
                o += [w for w in words(text[c[0] : c[1]]) if w.lower() not in STOP]
                mask = (0, 0) if r.random() < 0.5 else mask
            o = (
                r.sample(o, min(len(o), r.randint(2, 7)))
                if r.random() < 0.4
                else [w for w in o if r.random() < 0.6][:9]
            )
            o = [g.sub(w) if r.random() < 0.4 else w for w in o]
            if len(o) < 2:
                return None
            q = g.ask(o) if r.random() < 0.5 else " ".join(o)
        elif k < 0.85:
            q = " ".join(s.split()[:40])
        else:
            ns = [x for x in sents(nxt or "") if len(words((nxt or "")[x[0] : x[1]])) >= 6]
            if not ns:
                return None
            a, b = ns[0] if r.random() < 0.6 else r.choice(ns)
            mask = (0, 0)
            ws = words(nxt[a:b])
            keep = r.uniform(0.5, 1)
            q = g.ask([w for w in ws if r.random() < keep][:24])
        return q[:400], mask

    def wn_chunk(g):
        r = g.r
        n = r.randint(5, 9)
        qs = []
        t = ""
        for i in range(n):
            k = r.random()
            if k < 0.55:
                pos, ws, gl, ex = r.choice(g.exs)
                st = r.choice(ex).strip()
                st = st[0].upper() + st[1:]
                st += "" if st[-1] in ".!?" else "."
                oth = [x for x in ws if x.lower() not in st.lower()]
                q = (
                    g.ask([gl])
                    if r.random() < 0.5
                    else (
                        gl
                        if not oth or r.random() < 0.5
                        else r.choice(oth) + " " + " ".join(w for w in words(gl) if r.random() < 0.5)
                    )
                )
            else:
                pos, ws, gl, ex = r.choice(g.nouns)
                w = ws[0]
                st = f"{w[0].upper()+w[1:]} is {gl}."
                o = [x for x in words(gl)]
                o = [g.sub(x) if x.lower() not in STOP and r.random() < 0.5 else x for x in o if r.random() < 0.8]
                q = g.ask(o) if r.random() < 0.7 else ws[-1] + " " + " ".join(r.sample(o, len(o) // 3))
            if len(st) > 220:
                continue
            t += st + " "
            qs.append((q[:300], (0, 0)))
        return "", t.strip(), r.sample(qs, min(3, len(qs)))


def munge(t, m, qs, r):
    """Some chunks in small letters with spaces round the marks, as in old collections."""
    if r.random() < 0.12 and not any(x[1][1] for x in qs):
        f = lambda s: re.sub(r"\s*([.,;:()?!])\s*", r" \1 ", s.lower()).strip()
        return f(t), f(m), [(f(q), k) for q, k in qs]
    return t, m, qs


def shard(S, seed, scale=1.0):
    g = Gen(seed)
    r = g.r
    out = []
    for k, n in MIX.items():
        n = int(n * scale)
        c = S[k]
        for i in r.sample(range(len(c)), min(n, len(c))):
            title, x = c[i]
            if k in ("gcide", "devil", "jargon"):
                x = re.sub(r"\\[^\\]*\\,?", "", x)
                x = re.sub(r"\[[^\]]*\]", "", x)
                x = re.sub(r"\s+", " ", x)
            nxt = (
                c[i + 1][1]
                if k not in ("gcide", "foldoc", "devil", "jargon", "fortunes")
                and i + 1 < len(c)
                and c[i + 1][0] == title
                else None
            )
            qs = []
            for _ in range(6):
                q = g.question(x, nxt)
                if q:
                    qs.append(q)
                if len(qs) >= 2 + (r.random() < 0.4):
                    break
            if not qs:
                continue
            title = title if r.random() < 0.6 else ""
            x, title, qs = munge(x, title, qs, r)
            out.append((k, title, x, qs))
    for _ in range(int(120 * scale)):
        t, x, qs = g.wn_chunk()
        out.append(("wordnet", t, x, qs))
    r.shuffle(out)
    return out


def write(out, base):
    with open(base + ".rec", "wb") as f:

        def rec(k, t, x):
            t = t.encode()
            x = x.encode()
            f.write(k.encode() + struct.pack("<I", len(t)) + t + struct.pack("<I", len(x)) + x)

        for k, t, x, qs in out:
            rec("c", t, x)
        for k, t, x, qs in out:
            for q, m in qs:
                rec("q", "", q)
    json.dump(out, open(base + ".json", "w"))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    C = os.path.join(sys.argv[1], "")
    with open(sys.argv[2]) as f:
        found = json.load(f)
    for seed in map(int, sys.argv[3:]):
        made = shard(found, seed)
        write(made, f"tr{seed}")
        print(seed, len(made), "passages", sum(len(x[3]) for x in made), "questions")
