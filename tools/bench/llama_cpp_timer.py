"""Measures llama.cpp, one command a line from standard input, one JSON line back; see tools/bench/engine.

usage: llama_cpp_timer.py MODEL.gguf THREADS   (with a Python that has llama-cpp-python)

  prefill N     N tokens, logits of the last, from an empty context
  decode N      32 steps over N tokens of context
  quality FILE N   perplexity over the first N positions of the windows in FILE (one a line: ids, then the next one)
  load          opening the model and a context
  memory        peak and present size, and what Python took before
"""
import ctypes
import json
import math
import sys
import time

STEPS = 32
CONTEXT = 8192


def memory():
    with open("/proc/self/status") as f:
        lines = dict(line.split(":", 1) for line in f)
    return int(lines["VmHWM"].split()[0]) * 1024, int(lines["VmRSS"].split()[0]) * 1024


class Engine:
    """llama.cpp through its C functions, so that Python's part in a step is a call."""

    def __init__(self, path, threads):
        import llama_cpp

        self.c = llama_cpp
        self.path, self.threads = path, threads
        self.python_bytes = memory()[1]
        self.keep = self.open()
        llm = self.keep
        self.ctx, self.n_vocab = llm.ctx, llm.n_vocab()
        self.memory = self.c.llama_get_memory(self.ctx)
        self.tokens = [(i * 7919 + 1234) % self.n_vocab for i in range(CONTEXT)]
        self.n = 0

    def open(self):
        # Its own defaults otherwise: f16 KV, micro-batches of 512.
        return self.c.Llama(self.path, n_ctx=CONTEXT, n_threads=self.threads, n_threads_batch=self.threads,
                            flash_attn=True, verbose=False)

    def clear(self, n=0):
        if n == 0:
            self.c.llama_memory_clear(self.memory, True)
        elif not self.c.llama_memory_seq_rm(self.memory, 0, n, -1):
            raise RuntimeError("llama_memory_seq_rm failed")
        self.n = n

    def forward(self, n):
        """Appends n tokens; the logits of the last are ready afterwards."""
        while n > 0:
            step = min(n, 512)
            ids = (self.c.llama_token * step)(*self.tokens[self.n:self.n + step])
            if self.c.llama_decode(self.ctx, self.c.llama_batch_get_one(ids, step)) != 0:
                raise RuntimeError("llama_decode failed")
            self.n += step
            n -= step
        self.c.llama_get_logits_ith(self.ctx, -1)

    def prefill(self, n):
        self.clear()
        start = time.perf_counter()
        self.forward(n)
        return {"case": "prefill", "context": n, "tokens": n, "ms": 1e3 * (time.perf_counter() - start)}

    def decode(self, n):
        if self.n > n:
            self.clear(n)
        self.forward(n - self.n)
        self.forward(1)
        start = time.perf_counter()
        for _ in range(STEPS):
            self.forward(1)
        ms = 1e3 * (time.perf_counter() - start)
        self.clear(n)
        return {"case": "decode", "context": n, "tokens": STEPS, "ms": ms}

    def load(self):
        start = time.perf_counter()
        llm = self.open()
        ms = 1e3 * (time.perf_counter() - start)
        llm.close()
        return {"case": "load", "ms": ms}

    def quality(self, path, positions):
        import numpy

        total, count = 0.0, 0
        with open(path) as f:
            for line in f:
                ids = [int(x) for x in line.split()]
                rows = min(len(ids) - 1, positions - count)
                if rows <= 0:
                    break
                logits = self.window(ids[:-1], numpy)[:rows]
                top = logits.max(axis=1)
                lse = top + numpy.log(numpy.exp(logits - top[:, None]).sum(axis=1))
                following = numpy.array(ids[1:rows + 1])
                known = following >= 0
                total += float((lse - logits[numpy.arange(rows), following])[known].sum())
                count += rows
        return {"case": "quality", "positions": count, "ppl": math.exp(total / max(count, 1))}

    def window(self, ids, numpy):
        if len(ids) > 512:
            raise ValueError("a window has at most 512 tokens")
        self.clear()
        batch = self.c.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, t in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = t, i, 1, 0, 1
        failed = self.c.llama_decode(self.ctx, batch) != 0
        self.c.llama_batch_free(batch)
        if failed:
            raise RuntimeError("llama_decode failed")
        size = ctypes.c_float * (len(ids) * self.n_vocab)
        flat = ctypes.cast(self.c.llama_get_logits(self.ctx), ctypes.POINTER(size)).contents
        return numpy.frombuffer(flat, dtype=numpy.float32).reshape(len(ids), self.n_vocab).astype(numpy.float64)

    def answer(self, words):
        if words[0] == "prefill":
            return self.prefill(int(words[1]))
        if words[0] == "decode":
            return self.decode(int(words[1]))
        if words[0] == "quality":
            return self.quality(words[1], int(words[2]))
        if words[0] == "load":
            return self.load()
        if words[0] == "memory":
            peak, now = memory()
            return {"case": "memory", "peak_bytes": peak, "bytes": now, "python_bytes": self.python_bytes}
        return {"error": "no such command"}


def main():
    engine = Engine(sys.argv[1], int(sys.argv[2]))
    print(json.dumps({"case": "ready", "version": engine.c.__version__}), flush=True)
    for line in sys.stdin:
        words = line.split()
        if not words or words[0] == "quit":
            break
        try:
            print(json.dumps(engine.answer(words)), flush=True)
        except Exception as e:  # the driver says which command it was
            print(json.dumps({"error": f"{type(e).__name__}: {e}"}), flush=True)


if __name__ == "__main__":
    main()
