"""llama.cpp as a peer: a process that runs prompts when asked, so that both can take turns.

As a script it needs `llama-cpp-python` and NumPy only, so any interpreter that has them can run it:

    PYTHON experiments/llama_peer.py MODEL.gguf --threads 2 --context 128

It reads one JSON object a line, {"prompt": [ids], "n_tokens": n}, and answers each with
{"prompt_seconds", "decode_seconds", "tokens"}: a greedy continuation from an empty context. The
first line it writes is {"version"}.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class LlamaPeer:
    """A running peer; a context manager.

    Parameters
    ----------
    python
        An interpreter that has `llama_cpp`.
    model
        The GGUF file.
    threads, n_context, n_batch
        As of llama.cpp.

    Raises
    ------
    OSError
        If the peer cannot be started or ends early.
    """

    def __init__(
        self, python: str, model: Path, *, threads: int, n_context: int, n_batch: int = 64
    ) -> None:
        command = [python, str(Path(__file__).resolve()), str(model), "--threads", str(threads)]
        command += ["--context", str(n_context), "--batch", str(n_batch)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
        self.version: str = self._answer()["version"]

    def __enter__(self) -> LlamaPeer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()

    def run(self, prompt: list[int], n_tokens: int) -> dict[str, Any]:
        """Continue a prompt: `prompt_seconds`, `decode_seconds`, `tokens`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": prompt, "n_tokens": n_tokens}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise OSError("llama.cpp: the peer ended without an answer")
        answer: dict[str, Any] = json.loads(line)
        return answer


def has_llama_cpp(python: str) -> bool:
    """Whether an interpreter can import `llama_cpp`."""
    done = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False)
    return done.returncode == 0


def _continue(llama: Any, llama_cpp: Any, prompt: list[int], n_tokens: int) -> dict[str, Any]:
    import numpy as np

    def evaluate(tokens: list[int]) -> int:
        llama.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (llama.n_vocab(),)).argmax())

    llama.reset()
    started = time.perf_counter()
    tokens = [evaluate(prompt)]
    prompt_seconds = time.perf_counter() - started
    started = time.perf_counter()
    while len(tokens) < n_tokens:
        tokens.append(evaluate(tokens[-1:]))
    return {
        "prompt_seconds": prompt_seconds,
        "decode_seconds": time.perf_counter() - started,
        "tokens": tokens,
    }


def main() -> int:
    """Serve requests from stdin until it closes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    import llama_cpp

    llama = llama_cpp.Llama(
        args.model, n_ctx=args.context, n_batch=args.batch, n_threads=args.threads,
        n_threads_batch=args.threads, verbose=False,
    )  # fmt: skip
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = _continue(llama, llama_cpp, request["prompt"], request["n_tokens"])
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
