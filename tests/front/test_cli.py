"""The command line as a user has it: every command, its JSON, its exit status, wrong input, a restart."""
import json
import os
import subprocess
import time
import unittest

from support import BIN, SAMPLE, Service, interrupt, model_file


class Cli(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.s = Service()
        cls.report = cls.s.json("index", SAMPLE)

    @classmethod
    def tearDownClass(cls):
        cls.s.close()

    def test_index_report(self):
        r = self.report
        self.assertEqual(r["state"], "done")
        self.assertGreaterEqual(r["ready"], 30)  # seven files and the notices, one document each
        self.assertEqual(r["failed"], 0)
        self.assertGreater(r["encoded_tokens"], 8000)
        again = self.s.json("index", SAMPLE)
        self.assertEqual((again["ready"], again["encoded_tokens"]), (0, 0))
        self.assertEqual(again["unchanged"], r["ready"])

    def test_list_show_range(self):
        docs = {d["document"]: d for d in self.s.json("list")["documents"]}
        path = os.path.join(os.path.realpath(SAMPLE), "lighthouse.txt")
        self.assertEqual(docs[path]["state"], "ready")
        self.assertEqual(docs["n-004"]["metadata"]["office"], "harbour")
        text = self.s.ok("show", path)
        self.assertIn("14 October 1871", text)
        at = text.encode().index(b"Maren Tolliver")
        self.assertEqual(self.s.ok("show", path, "--range", f"{at}:{at + 14}"), "Maren Tolliver")
        self.assertEqual(self.s.run("show", path, "--range", "5:1").returncode, 2)
        self.assertEqual(self.s.run("show", "no-such-document").returncode, 1)

    def test_search(self):
        r = self.s.json("search", "--top", "3", "Who built the lighthouse on Skerrow Point?")
        hit = r["hits"][0]
        self.assertTrue(hit["document"].endswith("lighthouse.txt"), r)
        text = self.s.ok("show", hit["document"]).encode()
        self.assertEqual(text[hit["start"]:hit["end"]].decode(), hit["text"])
        self.assertEqual(set(hit["scores"]), {"keys", "lexical"})
        self.assertEqual(len({h["document"] for h in r["hits"]}), len(r["hits"]))
        filtered = self.s.json("search", "--top", "50", "--filter", "office=harbour", "timetable of the ferry")
        self.assertEqual(filtered["hits"][0]["document"], "n-004")
        self.assertTrue(all(h["document"].startswith("n-") for h in filtered["hits"]))
        for name, text in (("bridge.md", "main span of the Harl bridge"), ("observatory.html", "minor planet named Porridge"),
                           ("cooperative-2022.pdf", "price of flour per kilogram in June")):
            hits = self.s.json("search", "--top", "2", text)["hits"]
            self.assertTrue(any(h["document"].endswith(name) for h in hits), (name, hits))
        page = [h for h in self.s.json("search", "general meeting cardamom knots")["hits"]
                if h["document"].endswith(".pdf")]
        self.assertRegex(page[0]["locator"], "page [1-5]")

    def test_queries_file(self):
        path = os.path.join(self.s.dir, "queries.jsonl")
        with open(path, "w") as f:
            for i, q in enumerate(("When does the ferry from Hallin to Oster sail?", "How many rivets has the bridge?")):
                f.write(json.dumps({"id": f"q{i}", "text": q}) + "\n")
        lines = [json.loads(x) for x in self.s.ok("search", "--queries", path).splitlines()]
        self.assertEqual([x["id"] for x in lines], ["q0", "q1"])
        self.assertEqual(lines[0]["hits"][0]["document"], "n-004")

    def check_answer(self, r):
        self.assertTrue(r["found"])
        self.assertTrue(r["answer"])
        self.assertLessEqual(len(r["citations"]), 3)
        self.assertGreaterEqual(r["relevance"], 0.5)
        self.assertEqual(r["coverage"], 1)
        for c in r["citations"]:
            quote = c["quote"].encode()
            self.assertLessEqual(len(quote), 300)
            text = self.s.ok("show", c["document"]).encode()
            self.assertEqual(text[c["start"]:c["end"]], quote)
        self.assertLessEqual(r["timings_ms"]["retrieve"], r["timings_ms"]["first_token"])
        self.assertLessEqual(r["timings_ms"]["first_token"], r["timings_ms"]["total"] + 1)

    def test_ask_and_restart(self):
        question = "How tall is the tower of the lighthouse on Skerrow Point?"
        first = self.s.json("ask", question)
        self.check_answer(first)
        self.assertTrue(first["citations"])
        self.assertEqual(first["usage"]["encoded_tokens"], 0)
        self.s.ok("down")
        again = self.s.json("ask", question)  # starts the service by itself
        self.assertEqual(again["answer"], first["answer"])
        self.assertEqual(again["usage"]["encoded_tokens"], 0)
        self.assertGreater(again["usage"]["reused_tokens"], 100)
        human = self.s.ok("ask", question)
        self.assertIn("[1]", human)
        self.assertIn("lighthouse.txt:", human)
        lines = [json.loads(x) for x in self.s.ok("ask", "--stream", "--json", question).splitlines()]
        self.assertEqual("".join(x["token"] for x in lines[:-1]).strip(), first["answer"].strip())
        self.check_answer(lines[-1])

    def test_ask_nothing_relevant(self):
        r = self.s.json("ask", "zxqv wobblefrotz kjhgf", status=1)
        self.assertFalse(r["found"])
        self.assertEqual((r["answer"], r["citations"]), ("", []))
        self.assertLess(r["relevance"], 0.5)
        self.assertEqual(r["coverage"], 1)

    def test_context_exceeded(self):
        r = self.s.run("ask", "--json", "--always", "word " * 9000)
        self.assertEqual(r.returncode, 2)
        error = json.loads(r.stdout)["error"]
        self.assertEqual(error["code"], "context_length_exceeded")
        self.assertRegex(error["message"], r"\d{4,}.*8192")

    def test_find(self):
        path = os.path.join(SAMPLE, "lighthouse.txt")
        r = self.s.json("find", "Tobias Wren", path)
        text = self.s.ok("show", path).encode()
        exact = [m for m in r["matches"] if m["kind"] == "exact"]
        self.assertEqual(len(exact), 1)
        for m in r["matches"]:
            self.assertEqual(text[m["start"]:m["end"]].decode(), m["text"])
        self.assertEqual(self.s.run("find", "--exact-only", "no such words at all", path).returncode, 1)
        fresh = os.path.join(self.s.dir, "fresh.txt")
        with open(fresh, "w") as f:
            f.write("A fresh file.\n\nThe kettle is on the STOVE, and the stove is hot.\n")
        human = self.s.ok("find", "stove", fresh)
        self.assertEqual(human.count("\n") >= 2, True)
        self.assertIn("3:", human)
        r = self.s.json("find", "stove", fresh)
        self.assertEqual([m["kind"] for m in r["matches"][:2]], ["exact", "exact"])
        self.assertEqual(self.s.run("find", "x", "/no/such/file").returncode, 2)

    def test_update_prune_rm(self):
        folder = os.path.join(self.s.dir, "notes")
        os.makedirs(folder, exist_ok=True)
        a, b = os.path.join(folder, "a.txt"), os.path.join(folder, "b.md")
        for path, text in ((a, "Alpha keeps the violet ledger in the cellar."), (b, "# Beta\n\nBeta lost the orange key.")):
            with open(path, "w") as f:
                f.write(text + "\n")
        self.assertEqual(self.s.json("index", "--collection", "notes", folder)["ready"], 2)
        with open(a, "w") as f:
            f.write("Alpha sold the violet ledger at the market.\n")
        r = self.s.json("index", "--collection", "notes", folder)
        self.assertEqual((r["ready"], r["unchanged"]), (1, 1))
        hits = self.s.json("search", "--collection", "notes", "violet ledger")["hits"]
        self.assertIn("market", hits[0]["text"])
        os.unlink(b)
        self.assertEqual(self.s.json("index", "--collection", "notes", "--prune", folder)["removed"], 1)
        self.assertEqual(len(self.s.json("list", "--collection", "notes")["documents"]), 1)
        self.s.ok("rm", "--collection", "notes", a)
        self.assertEqual(self.s.run("rm", "--collection", "notes", a).returncode, 1)
        self.assertEqual(self.s.json("search", "--collection", "notes", "violet ledger", status=1)["hits"], [])

    def test_bad_files(self):
        folder = os.path.join(self.s.dir, "bad")
        os.makedirs(folder, exist_ok=True)
        cases = {"empty.txt": b"", "binary.txt": bytes(range(256)) * 40, "broken.pdf": b"%PDF-1.4 nonsense" * 50,
                 "latin.txt": "caf\xe9 au lait, \xe0 la carte".encode("latin-1") * 3, "thing.xyz": b"what is this",
                 "lines.jsonl": b'{"id":"ok","title":"t","text":"A good line about herons."}\nnot json\n',
                 "good.txt": b"One good file about kingfishers.\n"}
        for name, data in cases.items():
            with open(os.path.join(folder, name), "wb") as f:
                f.write(data)
        r = self.s.json("index", "--collection", "bad", folder)
        states = {os.path.basename(f["path"]): f["state"] for f in r["files"]}
        self.assertEqual(states["empty.txt"], "empty", r["files"])
        self.assertIn(states["binary.txt"], ("unsupported", "failed"))
        self.assertIn(states["broken.pdf"], ("failed", "empty"))
        self.assertEqual(states["good.txt"], "ready")
        self.assertIn(states["latin.txt"], ("ready", "partial"))
        for f in r["files"]:
            if f["state"] not in ("ready", "unchanged"):
                self.assertTrue(f["reason"], f)
        self.assertEqual(self.s.json("search", "--collection", "bad", "kingfishers")["hits"][0]["text"].count("kingfishers"), 1)

    def test_wrong_use(self):
        for words in (("index",), ("index", "/no/such/folder"), ("search",), ("ask", "--recompute", "2", "q"),
                      ("search", "--collection", "nowhere", "q"), ("list", "--collection", "nowhere"),
                      ("model", "add", "/no/such.gguf"), ("model", "fly"), ("jobs", "--cancel", "x"),
                      ("index", "--collection", "bad name!", SAMPLE), ("fly",), ("search", "--queries", "/none"),
                      ("model", "add", os.path.join(SAMPLE, "lighthouse.txt"))):
            r = self.s.run(*words) if words != ("fly",) else subprocess.run([BIN, "fly"], capture_output=True, text=True)
            self.assertIn(r.returncode, (1, 2), words)
            self.assertRegex(r.stderr, r"ibid: [a-z_]+: .{10,}", words)
        r = self.s.run("search", "--json", "--collection", "nowhere", "q")
        self.assertEqual(json.loads(r.stdout)["error"]["code"], "unknown_collection")
        for command in ("up", "index", "ask", "model"):
            r = subprocess.run([BIN, command, "--help"], capture_output=True, text=True)
            self.assertEqual(r.returncode, 0)
            self.assertIn("Example:", r.stdout)

    def test_interrupted_job_resumes(self):
        path = os.path.join(self.s.dir, "long.txt")
        with open(path, "w") as f:
            for i in range(4000):
                f.write(f"Paragraph {i} says that item {i * 7919 % 10007} lies on shelf {i * 31 % 997}.\n\n")
        p = self.s.start("index", "--collection", "long", path)
        end = time.time() + 60
        while time.time() < end:  # until some of it is encoded
            jobs = [j for j in self.s.json("jobs")["jobs"] if j["collection"] == "long"]
            if jobs and jobs[0]["stage"] == "encode":
                break
            time.sleep(0.1)
        time.sleep(1.0)
        interrupt(p)
        _, err = p.communicate(timeout=120)
        self.assertEqual(p.returncode, 2, err)
        self.assertIn("--resume", err)
        self.s.ok("jobs", "--cancel", str(jobs[0]["id"]))

    def test_verify_and_status(self):
        self.assertTrue(self.s.json("verify")["clean"])
        st = self.s.json("status")
        self.assertTrue(all(r["ready"] for r in st["rooms"]))
        self.assertEqual(st["models"][0]["architecture"], "llama")
        self.assertIn("ready", self.s.ok("status"))
        self.s.ok("reindex")
        self.assertTrue(self.s.json("verify")["clean"])

    def test_environment_and_file(self):
        config = os.path.join(self.s.env["XDG_CONFIG_HOME"], "ibid")
        os.makedirs(config, exist_ok=True)
        with open(os.path.join(config, "ibid.ini"), "w") as f:
            f.write("[ibid]\ntop = 1\n")
        self.assertEqual(len(self.s.json("search", "the")["hits"]), 1)
        self.assertEqual(len(self.s.json("search", "the", env={"IBID_TOP": "2"})["hits"]), 2)
        os.unlink(os.path.join(config, "ibid.ini"))


if __name__ == "__main__":
    model_file()
    unittest.main(verbosity=2)
