"""Each example runs as its reader runs it: as a program, from the command line."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path


EXAMPLES = Path(__file__).parent.parent / "examples"

# Each example, with arguments that make it quick.
QUICK = {
    "train_digits.py": ("--epochs", "6"),
    "ema_and_lora.py": ("--steps", "100"),
    "gan.py": ("--steps", "150"),
    "char_transformer.py": (
        *("--steps", "60", "--dim", "32", "--depth", "1", "--context", "48"),
        *("--characters", "100000"),
    ),
    "actor_critic.py": ("--updates", "80"),
    "ensemble.py": ("--epochs", "4", "--members", "3"),
    "neural_ode.py": ("--steps", "200", "--motions", "64"),
    "shared_stack.py": (
        *("--steps", "100", "--depth", "2", "--length", "4", "--vocab", "6"),
    ),
    "stream.py": ("--steps", "150"),
    "sharded_transformer.py": ("--steps", "5", "--dim", "32", "--depth", "2"),
}


def run(name: str, folder: Path, *arguments: str) -> str:
    """Runs an example under the defaults of JAX, not those of the tests; what it prints."""
    strict = {"JAX_CHECK_TRACER_LEAKS", "XLA_FLAGS"}
    env = {k: v for k, v in os.environ.items() if k not in strict}
    terminal = {"PYTHONIOENCODING": "utf-8", "COLUMNS": "100"}
    # XLA logs what takes long on a busy machine; an exception is printed by Python.
    terminal["TF_CPP_MIN_LOG_LEVEL"] = "3"
    picture = folder / "some folder" / "picture.png"
    command = [sys.executable, EXAMPLES / name, *QUICK[name], "--picture", picture]
    done = subprocess.run(
        [*map(str, command), *arguments],
        env=env | terminal,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    return done.stdout


def percentages(text: str) -> dict[str, float]:
    """The lines that end in a percentage, by what they begin with."""
    return {
        name: float(number)
        for name, number in re.findall(r"^ *(\w[\w ]*?)  +([\d.]+)%$", text, re.M)
    }


def numbers(pattern: str, text: str) -> list[float]:
    """The numbers in a line that has each where there is a `#`."""
    (found,) = re.findall(pattern.replace("#", r"([\d.e+-]*\d)"), text)
    return list(map(float, found if isinstance(found, tuple) else [found]))


def test_every_example_is_run_here():
    programs = {path.name for path in EXAMPLES.glob("*.py")} - {"_run.py"}
    assert programs == QUICK.keys()


def required(project: dict, extra: str) -> set[str]:
    """The packages that an extra installs, those of the library included."""
    names = set()
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras[extra]]:
        (name,) = re.findall(r"^[\w.-]+", requirement)
        if name == project["name"]:
            others = re.findall(r"\w+", requirement.partition("[")[2])
            names.update(*(required(project, other) for other in others))
        else:
            names.add(name)
    return names


def test_the_extra_installs_all_that_the_examples_need():
    root = EXAMPLES.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    called = {"sklearn": "scikit-learn"}
    needed = set()
    for file in EXAMPLES.glob("*.py"):
        text = file.read_text()
        for name in re.findall(r"^ *(?:import|from) ([a-z]\w*)", text, re.MULTILINE):
            if name not in sys.stdlib_module_names | {"refx_eqx"}:
                needed.add(called.get(name, name))
        if "rx.save(" in text or "rx.load(" in text:
            needed.add("safetensors")
    assert "safetensors" in needed and "jax" in needed
    assert needed - {"numpy"} <= required(project, "examples")  # JAX brings NumPy


def test_train_digits_learns_and_its_checkpoint_has_the_same_accuracy(tmp_path):
    checkpoint = tmp_path / "digits.safetensors"
    printed = run("train_digits.py", tmp_path, "--checkpoint", str(checkpoint))
    shown = percentages(printed)
    assert shown["trained model"] >= 97
    assert shown["restored checkpoint"] == shown["trained model"]
    assert re.search(r"second.kernel .* is first.kernel", printed)
    assert checkpoint.stat().st_size > 4 * 14_816


def test_ema_and_lora_adapts_to_the_mirror_and_averages_both_ways(tmp_path):
    printed = run("ema_and_lora.py", tmp_path)
    rows = re.findall(r"│ +([\d,]*) +│ +([\d.]+)% │ +([\d.]+)%", printed)
    trained, average, adapted, adapted_average, merged = rows
    assert (trained[0], adapted[0]) == ("26,122", "4,688")
    for _, plain, mirrored in (trained, average):
        assert float(plain) > 85 and float(mirrored) < 60
    for _, plain, mirrored in (adapted, adapted_average):
        assert float(plain) < 80 and float(mirrored) > 70
    assert merged[1:] == adapted[1:]
    change = numbers("A file with the changes: # bytes", printed.replace(",", ""))
    whole = numbers("A file with all of it: # bytes", printed.replace(",", ""))
    assert 4 * 4_688 < change[0] < whole[0] / 5


def test_char_transformer_learns_and_decodes_with_its_cache_as_without(tmp_path):
    printed = run("char_transformer.py", tmp_path)
    # The frequencies of the characters alone give 3.4.
    assert numbers("nats a character: #", printed) < [3.3]
    assert numbers("differs by at most #", printed) < [1e-4]
    assert printed.count("def test_") == 3  # the samples


def test_gan_trains_two_models_and_draws_what_it_learned(tmp_path):
    printed = run("gan.py", tmp_path)
    assert "generator: 37,857 parameters" in printed
    assert numbers("sees # of the 10 digits", printed) >= [6.0]
    assert numbers("is #% sure", printed) > [55.0]  # an untrained one makes 1 digit


def test_actor_critic_balances_longer_than_at_first(tmp_path):
    printed = run("actor_critic.py", tmp_path)
    assert numbers("in training had # steps", printed) < [40.0]
    assert numbers("actor had # steps", printed) > [90.0]


def test_ensemble_is_no_worse_than_one_of_it(tmp_path):
    printed = run("ensemble.py", tmp_path)
    assert "weight=Ref(f32[3,64,64]" in printed
    one, together = numbers("Log loss: # for one on average, # for all", printed)
    assert together < one < 0.3


def test_neural_ode_finds_the_friction(tmp_path):
    printed = run("neural_ode.py", tmp_path)
    found, real = numbers(r"Friction: # \(true value: #\)", printed)
    assert abs(found - real) < 0.05


def test_shared_stack_sorts_and_has_one_feed_forward(tmp_path):
    printed = run("shared_stack.py", tmp_path)
    assert re.search(
        r"attention.query_proj.weight +params +Ref +\(2, 48, 48\)", printed
    )
    assert re.search(r"feed_forward.layers.0.weight +params +Ref +\(192, 48\)", printed)
    assert percentages(printed)["numbers in their place"] > 60  # by chance: 17


def test_stream_is_forecast_from_where_the_training_left_it(tmp_path):
    printed = run("stream.py", tmp_path)
    assert numbers(r"  #, 1 ahead", printed) < [0.025]
    assert numbers(r"  #, 20 ahead", printed) < numbers("varies by #", printed)


def test_sharded_transformer_trains_as_on_one_device_and_is_restored_on_fewer(tmp_path):
    printed = run("sharded_transformer.py", tmp_path)
    assert "P(None, 'tensor', 'fsdp')" in printed  # a weight of the stack
    first, last = numbers("loss: # at first, # at the end", printed)
    assert last < first - 1
    differences = re.findall(r"differs? by (?:at most )?([\d.e+-]+)", printed)
    assert len(differences) == 5  # on one device; restored on 8, 4 and 1; exported
    assert all(float(x) < 1e-5 for x in differences)
