"""kill -9 of any process at random moments while indexing and asking; a full disk; damaged indexes."""
import glob
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

from support import SAMPLE, Service, model_file

SEED = int(os.environ.get("IBID_TEST_SEED", "20260101"))
KILLS = int(os.environ.get("IBID_TEST_KILLS", "50"))


def notes(path, first, count):
    with open(path, "w") as f:
        for i in range(first, first + count):
            f.write(json.dumps({"id": f"doc-{i}", "title": f"Entry {i}",
                                "text": f"Entry number {i} of the register. The clerk of station {i * 37 % 1009} "
                                        f"counted {i * 7919 % 10007} lamps and wrote it down with care.",
                                "metadata": {"n": i}}) + "\n")


class Faults(unittest.TestCase):
    def setUp(self):
        self.s = Service()

    def tearDown(self):
        self.s.close()

    def test_kill_at_random_moments(self):
        rng = random.Random(SEED)
        print(f"seed {SEED}, {KILLS} kills", flush=True)
        s = self.s
        s.ok("index", SAMPLE)
        question = "How tall is the tower of the lighthouse on Skerrow Point?"
        answer = s.json("ask", "--max-tokens", "8", question)["answer"]
        known = {"default": {d["document"] for d in s.json("list")["documents"]}}
        acknowledged = set()
        for kill in range(KILLS):
            path = os.path.join(s.dir, f"notes-{kill}.jsonl")
            notes(path, kill * 6, 6)
            indexing = s.start("index", "--json", "--collection", "notes", path)
            asking = s.start("ask", "--json", "--max-tokens", "8", question)
            time.sleep(rng.uniform(0, 0.8))
            try:
                victims = s.pids()
                victim = rng.choice(sorted(victims))
                os.kill(victims[victim], signal.SIGKILL)
            except (ProcessLookupError, AssertionError, FileNotFoundError, ValueError):
                victim = "nobody (it was restarting)"
            out, err = indexing.communicate(timeout=120)
            asked, ask_err = asking.communicate(timeout=120)
            self.assertEqual(indexing.returncode, 0, (kill, victim, out, err, s.logs()))
            report = json.loads(out)
            self.assertEqual(report["state"], "done")
            acknowledged |= {f"doc-{i}" for i in range(kill * 6, kill * 6 + 6)}
            if asking.returncode == 0:
                self.assertEqual(json.loads(asked)["answer"], answer)
            else:  # an answer may be lost with its process, but says so and does not hang
                self.assertIn('"error"', asked, (kill, victim, asked, ask_err))
            s.wait_ready()
            if kill % 10 == 9:
                self.check(acknowledged, known, question, answer)
        self.check(acknowledged, known, question, answer)

    def check(self, acknowledged, known, question, answer):
        s = self.s
        docs = s.json("list", "--collection", "notes")["documents"]
        self.assertEqual({d["document"] for d in docs}, acknowledged)
        self.assertTrue(all(d["state"] == "ready" and d["chunks"] == 1 for d in docs))
        self.assertEqual({d["document"] for d in s.json("list")["documents"]}, known["default"])
        verify = s.json("verify")
        self.assertTrue(verify["clean"], verify)
        again = s.json("ask", "--max-tokens", "8", question)
        self.assertEqual(again["answer"], answer)
        if again["usage"]["encoded_tokens"]:  # on purpose only: the disk was slower than the encoder
            self.assertEqual(again["usage"]["encoded_why"], "slow_disk", again["usage"])
        last = max(int(d.split("-")[1]) for d in acknowledged)
        hit = s.json("search", "--collection", "notes", f"entry number {last} of the register")["hits"][0]
        self.assertEqual(hit["document"], f"doc-{last}")

    def test_takeover_keeps_the_options(self):
        s = self.s
        self.assertFalse(s.json("status")["running"])  # status looks and starts nothing
        self.assertFalse(s.json("status")["running"])
        s.ok("up", "--arithmetic", "f32", "--kernels", "reference")
        for _ in range(3):
            old = s.pids()
            os.kill(old["supervisor"], signal.SIGKILL)
            new = old
            while new["supervisor"] == old["supervisor"]:  # it may take a moment to die
                s.ok("up")  # when the new one is in office, returns only when every room is new
                new = s.pids()
            self.assertFalse(set(old.values()) & set(new.values()), (old, new, s.logs()))
            for name, pid in new.items():
                with open(f"/proc/{pid}/cmdline") as f:
                    words = f.read().split("\0")
                self.assertIn(("--arithmetic", "f32"), list(zip(words, words[1:])), name)
                self.assertIn(("--kernels", "reference"), list(zip(words, words[1:])), name)

    def test_damaged_indexes_are_rebuilt(self):
        s, rng = self.s, random.Random(SEED)
        s.ok("index", SAMPLE)
        query = "main span of the Harl bridge"
        before = s.json("search", query)["hits"]
        files = [f for f in glob.glob(os.path.join(s.data, "index", "**"), recursive=True) if os.path.isfile(f)]
        self.assertGreaterEqual(len(files), 2)
        for harm in ("truncate", "flip", "remove", "garbage"):
            s.ok("down")
            for path in [f for f in glob.glob(os.path.join(s.data, "index", "**"), recursive=True) if os.path.isfile(f)]:
                size = os.path.getsize(path)
                if harm == "remove":
                    os.unlink(path)
                elif harm == "truncate":
                    os.truncate(path, size // 2)
                else:
                    with open(path, "r+b") as f:
                        for _ in range(20 if harm == "flip" else 1):
                            f.seek(rng.randrange(max(1, size)) if harm == "flip" else 0)
                            f.write(bytes([rng.randrange(256)]) * (1 if harm == "flip" else 4096))
            after = s.json("search", query)["hits"]
            self.assertEqual([h["document"] for h in before], [h["document"] for h in after], harm)
            s.json("verify", status=0)

    def test_full_disk(self):
        mount = tempfile.mkdtemp(prefix="ibid-full-")
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", mount],
                          capture_output=True).returncode != 0:
            self.skipTest("tmpfs cannot be mounted here")
        s = self.s
        try:
            # The model's file stays outside; the store comes onto the small disk.
            s.ok("index", "--collection", "small", os.path.join(SAMPLE, "reservoir.txt"))
            s.ok("down")
            shutil.move(os.path.join(s.data, "store"), os.path.join(mount, "store"))
            os.symlink(os.path.join(mount, "store"), os.path.join(s.data, "store"))
            path = os.path.join(s.dir, "notes.jsonl")
            with open(os.path.join(mount, "ballast"), "wb", buffering=0) as f:
                try:
                    while True:
                        f.write(bytes(1 << 16))
                except OSError:
                    pass
            notes(path, 1000, 12)
            r = s.run("index", "--json", "--collection", "small", path)
            self.assertEqual(r.returncode, 2, r.stdout)
            self.assertIn("disk_full", r.stdout + r.stderr + s.logs())
            self.assertTrue(s.json("search", "--collection", "small", "springs of Fellside")["hits"])
            os.unlink(os.path.join(mount, "ballast"))
            r = s.json("index", "--collection", "small", path)
            self.assertEqual(r["ready"], 12, r)
            # More than the disk holds: refused by the forecast, or stopped by the disk; reads go on.
            notes(path, 0, 400)
            r = s.run("index", "--json", "--collection", "small", path)
            self.assertEqual(r.returncode, 2, r.stdout)
            self.assertIn("disk", r.stdout + r.stderr)
            hits = s.json("search", "--collection", "small", "springs of Fellside")["hits"]
            self.assertTrue(hits[0]["document"].endswith("reservoir.txt"))
            self.assertTrue(s.json("verify")["clean"])
        finally:
            s.run("down")
            subprocess.run(["umount", mount], check=False)
            shutil.rmtree(mount, ignore_errors=True)


if __name__ == "__main__":
    model_file()
    unittest.main(verbosity=2)
