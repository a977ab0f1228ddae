"""`ibid eval` as a user has it: every kind on a tiny data set of our own, its JSON, wrong input, Ctrl-C."""
import json
import os
import subprocess
import tempfile
import time
import unittest

from support import Service, interrupt

TEXTS = {
    "kiln": "The kiln at Ambry burns oak and reaches 1,180 degrees after nine hours.",
    "heron": "A heron has nested on the weir of the Sallow since the spring of 2011.",
    "organ": "The organ of Saint Wystan was built by Tobias Fell and has 1,412 pipes.",
    "tram": "Tram 9 ends at Gorse Lane, where the depot keeps a car from 1926.",
    "cheese": "Rushbeck cheese ripens for seven months in the cellars below the dairy.",
    "clock": "The clock of the corn exchange is wound by hand every Tuesday.",
}
QUESTIONS = [("q1", "How hot does the kiln at Ambry get?", "kiln", "1,180 degrees"),
             ("q2", "Since when has a heron nested on the weir?", "heron", "the spring of 2011"),
             ("q3", "Who built the organ of Saint Wystan?", "organ", "Tobias Fell"),
             ("q4", "Where does tram 9 end?", "tram", "Gorse Lane")]


class Eval(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.s = Service()
        cls.dir = cls.s.dir
        cls.beir = cls.write_beir()
        cls.squad = os.path.join(cls.dir, "squad.json")
        paragraphs = [{"context": TEXTS[n], "qas": [{"id": i, "question": q, "answers": [{"text": a, "answer_start": 0}]}
                                                     for i, q, d, a in QUESTIONS if d == n]} for n in TEXTS]
        with open(cls.squad, "w") as f:
            json.dump({"data": [{"title": "A_town", "paragraphs": paragraphs}]}, f)

    @classmethod
    def tearDownClass(cls):
        cls.s.close()

    @classmethod
    def path(cls, name, lines):
        path = os.path.join(cls.dir, name)
        with open(path, "w") as f:
            f.writelines(x + "\n" for x in lines)
        return path

    @classmethod
    def write_beir(cls):
        corpus = cls.path("corpus.jsonl", [json.dumps({"_id": n, "title": "", "text": t}) for n, t in TEXTS.items()])
        queries = cls.path("queries.jsonl", [json.dumps({"_id": i, "text": q}) for i, q, _, _ in QUESTIONS])
        qrels = cls.path("qrels.tsv", ["query-id\tcorpus-id\tscore"] + [f"{i}\t{d}\t1" for i, _, d, _ in QUESTIONS])
        return ["--corpus", corpus, "--queries", queries, "--qrels", qrels]

    def test_retrieval(self):
        out = os.path.join(self.dir, "out.jsonl")
        r = self.s.json("eval", "retrieval", *self.beir, "--folds", "2", "--out", out)
        self.assertEqual((r["documents"], r["queries"]), (6, 4))
        rows = {x["system"]: x for x in r["systems"]}
        self.assertEqual(set(rows), {"lexical", "keys", "hybrid"})
        for name in ("lexical", "hybrid"):  # every question shares rare words with its document
            self.assertEqual((rows[name]["recall1"], rows[name]["ndcg10"], rows[name]["mrr10"]), (1, 1, 1))
        for x in rows.values():
            self.assertLessEqual(x["recall1"], x["recall5"])
            self.assertLess(0, x["ms_p50"])
            self.assertLessEqual(x["ms_p50"], x["ms_p99"])
        self.assertEqual(sum(x["queries"] for x in r["folds"] if x["system"] == "keys"), 4)
        self.assertEqual(len(r["differences"]), 6)
        with open(out) as f:
            lines = [json.loads(x) for x in f]
        self.assertEqual(len(lines), 12)
        for x in lines:
            gold = {i: d for i, _, d, _ in QUESTIONS}[x["id"]]
            self.assertEqual(x["recall1"], float(x["ranked"][:1] == [gold]))
        human = self.s.ok("eval", "retrieval", "--squad", self.squad, "--system", "lexical,hybrid", "--limit", "2")
        self.assertIn("nDCG@10", human)
        self.assertIn("hybrid - lexical", human)
        self.assertIn("2 queries", human)

    def test_answers(self):
        out = os.path.join(self.dir, "answers.jsonl")
        r = self.s.json("eval", "qa", "--squad", self.squad, "--plan", "auto,always", "--plan",
                        "blocks=2,recompute=1,mode=generate,always", "--out", out)
        self.assertEqual([x["plan"] for x in r["plans"]], ["auto,always", "blocks=2,recompute=1,mode=generate,always"])
        with open(out) as f:
            lines = [json.loads(x) for x in f]
        self.assertEqual(len(lines), 8)
        for x in r["plans"]:
            mine = [y for y in lines if y["plan"] == x["plan"]]
            self.assertAlmostEqual(x["contains"], sum(y["contains"] for y in mine) / 4, places=4)
            self.assertEqual((x["quotes_misplaced"], x["refused"]), (0, 0))
            self.assertGreater(x["words"], 0)
            for y in mine:
                self.assertLessEqual(y["exact"], y["f1"] + 1e-9)
        self.assertEqual({x["measure"] for x in r["differences"]}, {"contains", "F1", "exact"})

    def test_find(self):
        text = "Anna Ruell flew from Oslo to Lima. In Lima she met Per Dahl. Later Anna Ruell went home to Oslo."
        info = [{"mention": m, "entity": e} for m, e in (("Anna Ruell", "Anna"), ("Oslo", "Oslo"), ("Lima", "Lima"),
                ("Lima", "Lima"), ("Per Dahl", "Per"), ("Anna Ruell", "Anna"), ("Oslo", "Oslo"))]
        ktrlf = self.path("k.jsonl", [json.dumps({"id": "x", "data": {"target_text": text, "entity_info": info, "qa_pairs": [
            {"question": "cities", "target_entities": ["Oslo", "Lima"]}]}})])
        rows = {x["method"]: x for x in self.s.json("eval", "find", "--ktrlf", ktrlf)["methods"]}
        # four of the seven mentions are gold: precision 4/7, recall 1
        self.assertAlmostEqual(rows["every linked mention"]["em_f1"], 2 * 4 / 11, places=5)
        self.assertAlmostEqual(rows["every capitalised phrase"]["em_f1"], 2 * 4 / 11, places=5)
        self.assertLess(0, rows["ibid find"]["ms_p50"])

    def test_long(self):
        book = self.path("book.txt", [" ".join(f"Parcel {i * 7 + k} went to shed {(i * 31 + k) % 97}." for k in range(6)) + "\n"
                                      for i in range(120)])
        svg = os.path.join(self.dir, "grid.svg")
        needles = self.path("needles.txt", ["S: Old Wilbur tunes violins in Tarvin.", "O: Where does old Wilbur tune violins?",
                                             "N: Which craftsman adjusts string instruments?", "",
                                             "A: The blue lamp belongs to Sofie Brandt.", "B: Sofie Brandt lives in Mell.",
                                             "T: Where does the owner of the blue lamp live?"])
        r = self.s.json("eval", "long", "--book", book, "--lengths", "2000,4000", "--needles", needles, "--svg", svg)
        rows = {(x["length"], x["system"], x["kind"]): x for x in r["rows"]}
        self.assertEqual(rows[(2000, "lexical", "alike")]["recall5"], 1)
        self.assertEqual(rows[(4000, "lexical", "alike")]["recall1"], 1)
        self.assertEqual(rows[(2000, "lexical", "apart")]["questions"], 1)
        self.assertEqual(rows[(2000, "hybrid", "thread")]["questions"], 1)
        with open(svg) as f:
            self.assertTrue(f.read().endswith("</svg>\n"))

    def test_wrong_input(self):
        broken = self.path("broken.jsonl", ['{"_id": "1", "text": "x"}', "oops"])
        b = self.beir
        for words, says in (((), "--corpus"), (("--corpus", "/none", *b[2:]), "/none"),
                            (("--corpus", broken, *b[2:]), "broken.jsonl:2:"), (("--squad", broken), "broken.jsonl:"),
                            (("--squad", self.squad, *b), "one data set"), ((*b, "--system", "oracle"), "lexical, keys, hybrid"),
                            ((*b[:4], "--qrels", b[1]), "corpus.jsonl:1:")):
            r = self.s.run("eval", "retrieval", *words)
            self.assertEqual(r.returncode, 2, words)
            self.assertIn(says, r.stderr, words)
        for words, says in ((("qa",), "--squad"), (("find",), "--ktrlf"), (("long",), "--book"), (("fly",), "not one of"),
                            (("qa", "--squad", self.squad, "--plan", "bloks=1"), "bloks"),
                            (("qa", "--squad", self.squad, "--plan", "recompute=7"), "recompute"),
                            (("long", "--book", broken, "--lengths", "12,x"), "--lengths")):
            r = self.s.run("eval", *words)
            self.assertEqual(r.returncode, 2, words)
            self.assertIn(says, r.stderr, words)

    def test_interrupt_leaves_nothing(self):
        folder = tempfile.mkdtemp(prefix="t", dir="/tmp")
        env = {**self.s.env, "TMPDIR": folder}
        p = subprocess.Popen([os.environ.get("IBID_BIN", "build/plain/bin/ibid"), "eval", "retrieval", *self.beir],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        time.sleep(2)
        interrupt(p)
        _, err = p.communicate(timeout=300)
        self.assertEqual(p.returncode, 2, err)
        self.assertIn("cancelled", err)
        self.assertEqual(os.listdir(folder), [])
        os.rmdir(folder)


if __name__ == "__main__":
    unittest.main()
