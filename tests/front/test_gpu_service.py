"""The service with its attention room on a GPU that is emulated: what status says; answers over more KV than its pool
holds; and what happens when the device is lost: whoever meets it gets a typed error, that one process starts again, no
other."""
import os
import shutil
import subprocess
import sys
import time
import unittest

import support

BIN = os.path.dirname(os.path.abspath(support.BIN))
TEXT = "The harbour master keeps nine lamps on the eastern quay.\n\nThe bell is rung at noon.\n"


class GpuService(unittest.TestCase):
    def setUp(self):
        self.s = s = support.Service.__new__(support.Service)
        s.dir = support.tempfile.mkdtemp(prefix="ibid-gpu-")
        s.data = os.path.join(s.dir, "data")
        s.env = {k: v for k, v in os.environ.items() if not k.startswith("IBID_")}
        s.env["XDG_CONFIG_HOME"] = os.path.join(s.dir, "config")
        self.lost = s.env["IBID_EMULATOR_LOST"] = os.path.join(s.dir, "lost")

    def tearDown(self):
        self.s.close()
        support.BIN = os.path.join(BIN, "ibid")

    def emulate(self):
        """From now on the programs are copies, the attention room's the emulated one."""
        folder = os.path.join(self.s.dir, "bin")
        os.mkdir(folder)
        for room in ["ibid", "ibid-kvstore", "ibid-retriever", "ibid-indexer", "ibid-extract"]:
            shutil.copy(os.path.join(BIN, room), folder)
        shutil.copy(os.path.join(BIN, "ibid-attention-emulated"), os.path.join(folder, "ibid-attention"))
        support.BIN = os.path.join(folder, "ibid")

    def ask(self, *more):
        return self.s.run("ask", "--always", "--mode", "generate", "--max-tokens", "3", "--json", *more, "How many lamps?")

    def answer(self, *more):
        asked = self.ask(*more)
        self.assertEqual(asked.returncode, 0, (asked, self.s.logs()))
        return support.json.loads(asked.stdout)

    def gpu(self):
        return self.s.json("status")["attention"]["models"][0]

    def index(self, content):
        """A document read on the CPU, before the GPU is there."""
        s = self.s
        model, text = os.path.join(s.dir, "tiny.gguf"), os.path.join(s.dir, "note.txt")
        subprocess.run([os.path.join(BIN, "write_model"), model], check=True)
        with open(text, "w") as f:
            f.write(content)
        s.ok("model", "add", model, "--name", "tiny", "--force", "--backend", "cpu")
        s.ok("index", text)
        s.ok("down")
        self.emulate()

    def start(self, pool):
        self.s.ok("up", "--backend", "cuda", "--gpu-pool", pool)
        self.s.wait_ready()

    def test_small_pool(self):
        self.index("\n\n".join(f"Lamp {i} of the harbour hangs at quay {7 * i}, beside the bell of year {1800 + i}, "
                               "where the master counts the boats at noon and writes them into his book." for i in range(60)))
        self.start("8M")
        select = ["--attention", "select=0.5,recall"]
        want = [self.answer("--blocks", "4"), self.answer("--blocks", "4", *select)]
        self.assertEqual(self.gpu()["gpu_streamed_steps"], 0)
        used = self.gpu()["gpu_pool_used"]
        self.assertLess(want[1]["usage"]["attention_share"], 1)
        self.assertLess(0, want[1]["usage"]["attention_recall"])
        self.s.ok("down")
        self.start(str(used * 3 // 4))
        got = [self.answer("--blocks", "4"), self.answer("--blocks", "4", *select)]
        self.assertEqual([a["answer"] for a in got], [a["answer"] for a in want])
        self.assertEqual(got[1]["usage"]["attention_recall"], want[1]["usage"]["attention_recall"])
        self.assertGreater(self.gpu()["gpu_streamed_steps"], 0)
        self.assertIn("has no room in the GPU's pool", self.s.logs())

    def test_lost_device(self):
        s = self.s
        self.index(TEXT)
        self.start("8M")
        first = self.ask()
        self.assertEqual(first.returncode, 0, (first, s.logs()))
        model = self.gpu()
        self.assertEqual((model["backend"], model["device"]), ("cuda", "emulated"))
        self.assertGreater(model["gpu_pool_used"], 0)
        self.assertIn("runs on emulated", s.ok("status"))
        self.assertEqual(self.ask().returncode, 0)
        self.assertGreater(self.gpu()["gpu_blocks_hit"], 0)
        before = s.pids()
        with open(self.lost, "w"):
            pass
        failed = self.ask()
        self.assertFalse(os.path.exists(self.lost), "the device was not used")
        if failed.returncode:  # or the search did without it, and the answer came from the next process
            self.assertRegex(failed.stdout + failed.stderr, "backend_error|unavailable")
        end = time.time() + 60
        while time.time() < end and s.json("status")["rooms"][1]["restarts"] == 0:
            time.sleep(0.2)
        s.wait_ready()
        after = s.pids()
        self.assertEqual({r for r in before if before[r] != after[r]}, {"attention"})
        self.assertIn("cannot go on: backend_error: GPU lost", s.logs())
        again = self.ask()
        self.assertEqual(again.returncode, 0, (again, s.logs()))
        self.assertEqual(support.json.loads(again.stdout)["answer"], support.json.loads(first.stdout)["answer"])


if __name__ == "__main__":
    if not os.path.exists(os.path.join(BIN, "ibid-attention-emulated")):
        print("this build has no emulated GPU")  # those with sanitizers
        sys.exit(77)
    unittest.main()
