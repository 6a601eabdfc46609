"""Each example runs as its reader runs it: a program of its own, from the command line."""

import os
import re
import subprocess
import sys
from pathlib import Path


EXAMPLES = Path(__file__).parent.parent / "examples"

# Each example, with arguments that make it quick.
QUICK = {
    "train_digits.py": ("--epochs", "10"),
    "ema_and_lora.py": ("--steps", "200"),
    "gan.py": ("--steps", "150"),
    "char_transformer.py": (
        *("--steps", "60", "--dim", "32", "--depth", "1", "--context", "48"),
        *("--characters", "100000"),
    ),
}


def run(name: str, *arguments: str) -> str:
    """Runs an example under the defaults of JAX, not those of the tests; what it prints."""
    strict = {"JAX_CHECK_TRACER_LEAKS", "XLA_FLAGS"}
    env = {k: v for k, v in os.environ.items() if k not in strict}
    terminal = {"PYTHONIOENCODING": "utf-8", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *QUICK[name], *arguments],
        env=env | terminal,
        capture_output=True,
        encoding="utf-8",
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
    printed = run("train_digits.py", "--out", str(tmp_path))
    shown = percentages(printed)
    assert shown["trained model"] >= 97
    assert shown["restored checkpoint"] == shown["trained model"]
    assert (
        "first.kernel = second.kernel" in printed
    )  # once in the table, with both names
    assert printed.count("second.kernel") == 1
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "digits.safetensors").stat().st_size > 4 * 14_816


def test_ema_and_lora_adapts_to_the_mirror_and_averages_both_ways():
    printed = run("ema_and_lora.py")
    rows = re.findall(r"([\d,]+) (params|lora) +│ +([\d.]+)% │ +([\d.]+)%", printed)
    numbers = [(n, wrt, float(plain), float(mirror)) for n, wrt, plain, mirror in rows]
    trained, average, adapted, adapted_average = numbers
    for _, wrt, plain, mirror in (trained, average):
        assert wrt == "params" and plain > 85 and mirror < 60
    for _, wrt, plain, mirror in (adapted, adapted_average):
        assert wrt == "lora" and plain < 70 and mirror > 80
    assert (trained[0], adapted[0]) == ("26,122", "4,688")


def test_char_transformer_learns_and_decodes_with_its_cache_as_without(tmp_path):
    printed = run("char_transformer.py", "--out", str(tmp_path))
    (loss,) = re.findall(r"nats a character: ([\d.]+)", printed)
    assert float(loss) < 3.3  # the frequencies of the characters alone give 3.4
    (error,) = re.findall(r"differs by at most ([\d.e+-]+)", printed)
    assert float(error) < 1e-4
    assert printed.count("def test_") == 3  # the samples
    assert (tmp_path / "char_transformer.png").read_bytes().startswith(b"\x89PNG")


def test_gan_trains_two_models_and_draws_what_it_learnt(tmp_path):
    printed = run("gan.py", "--out", str(tmp_path))
    assert "generator: 37,857 numbers" in printed
    (seen,) = re.findall(r"sees (\d+) of the 10 digits", printed)
    (sure,) = re.findall(r"by ([\d.]+)%", printed)
    assert int(seen) >= 6 and float(sure) > 55  # of an untrained one: 1 digit
    assert (tmp_path / "gan.png").read_bytes().startswith(b"\x89PNG")
