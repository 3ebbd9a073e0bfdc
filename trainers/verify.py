"""Rewards that can be checked: does a completion end with the right answer? Compared by math-verify.

A recipe names `trainers.verify:gsm8k` or `trainers.verify:math` as a reward or a scorer. Comparisons run in a child
process, because a policy may write what sympy never finishes: math-verify's own time limit works in a main thread only,
where no reward function runs, and a single huge power holds the interpreter's lock, so that no thread could end it.
"""

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

if find_spec("math_verify") is None:
    raise ModuleNotFoundError("math-verify is not installed; type: pip install math-verify")

log = logging.getLogger(__name__)
CHECK_S = 5.0  # of CPU for one comparison: a busy machine must not turn right answers into wrong ones
MEMORY = 4 << 30  # bytes of address space of the child
_MARKED = re.compile(r"####[ \t]*(\S[^\n]*)")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*")


class Checker:
    """A child process that compares answers; started when first needed, and anew after a comparison that hung."""

    def __init__(self, check_s: float = CHECK_S) -> None:
        self._check_s = check_s
        self._lock = threading.Lock()  # reward functions run in threads, several at a time
        self._child: subprocess.Popen[str] | None = None

    def same(self, gold: str, answer: str) -> bool:
        r"""Whether the final answer in the text `answer` equals `gold`, LaTeX without delimiters.

        False, with a warning in the log, if that is not known in time. Raises ValueError for a gold answer that
        math-verify cannot read, RuntimeError if the child fails.
        """
        with self._lock:
            child = self._child or self._start()
            reply = _ask(child, {"gold": gold, "answer": answer})
            if reply is None:
                self.close()
                if child.returncode != -signal.SIGPROF:
                    raise RuntimeError(f"the process that runs math-verify ended with code {child.returncode}")
                log.warning("not equal, as math-verify took over %g s of CPU: %.200r", self._check_s, answer)
                return False
        if "error" in reply:
            raise ValueError(reply["error"])
        return bool(reply["same"])

    def close(self) -> None:
        """End the child, if there is one."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _start(self) -> subprocess.Popen[str]:
        program = f"from trainers.verify import serve; serve({self._check_s})"
        paths = os.pathsep.join(path for path in sys.path if path)
        self._child = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        return self._child


CHECKER = Checker()


def gsm8k(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """Return 1 if the completion ends with the number that GSM8K's `answer` has behind ####, else 0.

    Its answer stands behind its own last ####, or else is what math-verify finds: a box, or the last number.
    """
    marked = _MARKED.findall(completion)
    answer = marked[-1] if marked else completion
    return float(CHECKER.same(gsm8k_gold(row), answer.replace("$", " ")))  # dollars, not LaTeX


def math(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    r"""Return 1 if the completion's final answer equals what MATH's `solution` has in its last \boxed{}, else 0."""
    return float(CHECKER.same(math_gold(row), completion))


def gsm8k_gold(row: Mapping[str, Any]) -> str:
    """Return the number behind #### without commas. Raises ValueError if the row has none."""
    _, mark, gold = str(row.get("answer", "")).rpartition("####")
    if not mark or not gold.strip():
        raise ValueError("the row has no 'answer' with a number behind ####; is its data.format gsm8k?")
    return gold.strip().replace(",", "")


def math_gold(row: Mapping[str, Any]) -> str:
    r"""Return what stands in the last \boxed{} or \fbox{}. Raises ValueError if there is none."""
    solution = str(row.get("solution", ""))
    boxes = list(_BOX.finditer(solution))
    if not boxes:
        raise ValueError("the row has no 'solution' with \\boxed{}; is its data.format math?")
    text = solution[boxes[-1].end() :]
    if not text.startswith("{"):  # \boxed 2
        return re.split(r"[$\s]", text, maxsplit=1)[0]
    depth = 0
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[1:place].strip()
    raise ValueError("the row's last \\boxed{ is never closed; correct the row")


def serve(check_s: float) -> None:
    """Answer each line of standard input with one, until it ends: what the child runs. SIGPROF ends it if it hangs."""
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # it kills, even inside a single operation
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import parse, verify  # noqa: PLC0415  # a second of sympy, in this process only

    logging.disable(logging.WARNING)  # that its own time limits are off
    verify(parse("1", parsing_timeout=None), parse("\\boxed{1}", parsing_timeout=None), timeout_seconds=None)  # warm
    for line in sys.stdin:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, check_s)
        gold = parse(f"\\boxed{{{asked['gold']}}}", parsing_timeout=None)
        if gold:
            answer = parse(asked["answer"], parsing_timeout=None)
            reply: dict[str, Any] = {"same": bool(verify(gold, answer, timeout_seconds=None))}
        else:
            reply = {"error": f"math-verify cannot read the gold answer {asked['gold']!r}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


def _ask(child: subprocess.Popen[str], question: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the child's reply; None if it ended instead."""
    assert child.stdin is not None and child.stdout is not None
    try:
        print(json.dumps(question), file=child.stdin, flush=True)
        reply = child.stdout.readline()
    except BrokenPipeError:
        reply = ""
    if reply:
        found: dict[str, Any] = json.loads(reply)
        return found
    child.wait()
    return None
