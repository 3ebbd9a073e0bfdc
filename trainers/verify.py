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
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any, Self

if find_spec("math_verify") is None:
    raise ModuleNotFoundError("math-verify is not installed; type: pip install math-verify")

RewardFunction = Callable[[str, str, Mapping[str, Any]], float]

log = logging.getLogger(__name__)
CHECK_S = 1.0  # of CPU for one comparison: a busy machine must not turn right answers into wrong ones
WALL = 30  # times as long by the clock, for a child that waits and uses no CPU
MEMORY = 4 << 30  # bytes of address space of the child
MARKED, LAST = 200, 2000  # characters that are compared: behind a mark, and of a completion's end
_MARKED = re.compile(r"####[ \t]*(\S[^\n]*)")
_NUMBER = re.compile(r"-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*")


class Checker:
    """A child process that compares answers; started when first needed, and anew after a comparison that ended it.

    As a context manager it is the queue for the child: entered once the child is free and ready. Entering raises
    RuntimeError if the child ends before it is ready.
    """

    def __init__(self, check_s: float = CHECK_S) -> None:
        self._check_s = check_s
        self._lock = threading.RLock()  # reward functions run in threads, several at a time
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._lock.acquire()
        try:
            self._ready()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def same(self, gold: str, answer: str) -> bool:
        """Whether `answer` has a final answer, boxed or after the word answer, that equals `gold` (bare LaTeX).

        False, with a warning in the log, if that is not known in time or the child does not survive the question: a
        policy's text must not end a run. Raises ValueError for a gold answer that math-verify cannot read.
        """
        with self:
            child = self._ready()
            reply = _ask(child, {"gold": gold, "answer": answer})
            if reply is None:
                self.close()
                if child.returncode in (-signal.SIGPROF, -signal.SIGALRM):
                    log.warning("not equal, as math-verify took over %g s of CPU: %.200r", self._check_s, answer)
                else:
                    log.warning("not equal, as math-verify ended with code %d: %.200r", child.returncode, answer)
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

    def _ready(self) -> subprocess.Popen[str]:
        """Return a child that waits for a question; one that was killed meanwhile is replaced."""
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.close()
        program = f"from trainers.verify import serve; serve({self._check_s})"
        paths = os.pathsep.join(path for path in sys.path if path)
        child = self._child = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert child.stdout is not None
        if not child.stdout.readline():
            self.close()
            raise RuntimeError(f"the process that runs math-verify ended with code {child.returncode} at its start")
        return child


CHECKER = Checker()


class Checked:
    """A reward function whose deadline begins behind `queue`: see RuleFunction."""

    queue = CHECKER

    def __init__(self, function: RewardFunction) -> None:
        self._function = function

    def __call__(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        return self._function(prompt, completion, row)


@Checked
def gsm8k(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """Return 1 if the completion's final answer is the number that GSM8K's `answer` has behind ####, else 0.

    A final answer is the first number behind the last ####, or stands in a box or after the word answer. One that only
    comes last is none: what is cut off at max_tokens would be rewarded by chance.
    """
    marks = _MARKED.findall(completion)
    text = (marks[-1][:MARKED] if marks else completion[-LAST:]).replace("$", "")  # dollars, not LaTeX
    if marks:
        number = _NUMBER.search(text)
        text = f"The final answer is {number[0]}" if number else ""
    return float(CHECKER.same(gsm8k_gold(row), text))


@Checked
def math(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """Return 1 if the final answer, boxed or after the word answer, is that of MATH's `solution`, else 0."""
    return float(CHECKER.same(math_gold(row), completion[-LAST:]))


def marked(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """Return 1 if the completion gives an answer behind ####, right or wrong, else 0."""
    return float(_MARKED.search(completion) is not None)


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
    for found in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # \{ and \} are characters of the answer
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return text[1 : found.start()].strip()
    raise ValueError("the row's last \\boxed{ is never closed; correct the row")


def serve(check_s: float) -> None:
    """Answer each line of standard input with one, until it ends: what the child runs. SIGPROF ends it if it hangs."""
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    for limit in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(limit, signal.SIG_DFL)  # it kills, even inside a single operation
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import (  # noqa: PLC0415  # a second of sympy, in this process only
        ExprExtractionConfig,
        LatexExtractionConfig,
        parse,
        verify,
    )

    logging.disable(logging.WARNING)  # that its own time limits are off
    final = [kind(try_extract_without_anchor=False) for kind in (LatexExtractionConfig, ExprExtractionConfig)]
    read = partial(parse, extraction_config=final, parsing_timeout=None)
    verify(read("\\boxed{1}"), read("The answer is 1"), timeout_seconds=None)  # its first use takes longer
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, check_s)
        signal.setitimer(signal.ITIMER_REAL, WALL * check_s)
        gold = read(f"\\boxed{{{asked['gold']}}}")
        if gold:
            answer = read(asked["answer"])
            reply: dict[str, Any] = {"same": bool(verify(gold, answer, timeout_seconds=None))}
        else:
            reply = {"error": f"math-verify cannot read the gold answer {asked['gold']!r}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
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
