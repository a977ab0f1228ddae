"""A data folder with the real service in it, for the tests of the command line."""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

BIN = os.environ.get("IBID_BIN", "build/plain/bin/ibid")
ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
SAMPLE = os.path.join(ROOT, "tools", "sample")


def model_file():
    """The default model's GGUF, or the end of the test: skipped, or failed where it is required."""
    data = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    path = os.environ.get("IBID_TEST_MODEL") or os.path.join(
        data, "ibid", "models", "SmolLM2-135M-Instruct.Q4_1.gguf")
    if not os.path.exists(path):
        print(f"the default model is not at {path}; set IBID_TEST_MODEL")
        sys.exit(1 if os.environ.get("IBID_TEST_REQUIRE_MODEL") == "1" else 77)
    return path


class Service:
    """One data folder. The first one of a process adds the model (and calibrates it); the others copy
    that folder's state, which is what a restart on the same data is."""

    template = None

    def __init__(self):
        self.dir = tempfile.mkdtemp(prefix="ibid-test-")
        self.data = os.path.join(self.dir, "data")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("IBID_")}
        self.env["XDG_CONFIG_HOME"] = os.path.join(self.dir, "config")
        if Service.template is None:
            Service.template = tempfile.mkdtemp(prefix="ibid-template-")
            self.ok("model", "add", model_file(), "--name", "smollm2")
            self.ok("down")
            shutil.copytree(self.data, os.path.join(Service.template, "data"),
                            ignore=shutil.ignore_patterns("run", "log"))
        else:
            shutil.copytree(os.path.join(Service.template, "data"), self.data)

    def run(self, *words, timeout=300, **more):
        command = [BIN, *words, "--data", self.data]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              env={**self.env, **more.pop("env", {})}, timeout=timeout, **more)

    def start(self, *words):
        return subprocess.Popen([BIN, *words, "--data", self.data], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, env=self.env)

    def ok(self, *words, status=0, **more):
        got = self.run(*words, **more)
        assert got.returncode == status, (words, got.returncode, got.stdout, got.stderr, self.logs())
        return got.stdout

    def json(self, *words, status=0, **more):
        return json.loads(self.ok(*words, "--json", status=status, **more))

    def pids(self):
        """Room name -> pid, the supervisor included, of what runs now."""
        rooms = {r["room"]: r["pid"] for r in self.json("status")["rooms"] if r["ready"]}
        with open(os.path.join(self.data, "run", "supervisor.lock")) as f:
            rooms["supervisor"] = int(f.read())
        return rooms

    def wait_ready(self, seconds=30):
        end = time.time() + seconds
        while time.time() < end:
            status = self.json("status")
            if status["running"] and all(r["ready"] for r in status["rooms"]):
                return status
            time.sleep(0.05)
        raise AssertionError(("not ready", status, self.logs()))

    def logs(self):
        out = ""
        folder = os.path.join(self.data, "log")
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            with open(os.path.join(folder, name), errors="replace") as f:
                out += f"--- {name}\n{f.read()[-2000:]}\n"
        return out

    def close(self):
        self.run("down")
        shutil.rmtree(self.dir, ignore_errors=True)


def interrupt(process):
    process.send_signal(signal.SIGINT)
