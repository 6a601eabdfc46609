"""Each example runs as its reader runs it: a program of its own, from the command line."""

import os
import re
import subprocess
import sys
from pathlib import Path


EXAMPLES = Path(__file__).parent.parent / "examples"

# Each example with a setting that is quick, and the files that it writes.
QUICK = {
    "train_digits.py": (("--epochs", "10"), ("digits.eqx", "digits.png")),
}


def run(name: str, out: Path) -> str:
    """Runs an example under the defaults of JAX, not those of the tests; what it prints."""
    arguments, _ = QUICK[name]
    strict = {"JAX_CHECK_TRACER_LEAKS", "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments, "--out", str(out)],
        env={k: v for k, v in os.environ.items() if k not in strict},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def percentages(text: str) -> dict[str, float]:
    """The lines that end in a percentage, by what they begin with."""
    return {
        name: float(number)
        for name, number in re.findall(r"^ *(\w[\w ]*?)  +([\d.]+)%$", text, re.M)
    }


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == QUICK.keys()


def test_train_digits_learns_and_its_checkpoint_has_the_same_accuracy(tmp_path):
    printed = run("train_digits.py", tmp_path)
    shown = percentages(printed)
    assert shown["trained model"] >= 97
    assert shown["restored checkpoint"] == shown["trained model"]
    assert (
        "first.kernel = second.kernel" in printed
    )  # once in the table, with both names
    assert printed.count("second.kernel") == 1
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "digits.eqx").stat().st_size > 4 * 14_816
