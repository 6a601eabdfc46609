"""`python -m tests.fuzz --minutes 60 --seed 0`: random programs or histories, for so long."""

import argparse
import collections
import time

import equinox as eqx
import jax

from .compare import check
from .generate import generate
from .history import run_history
from .program import text, transforms_of


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument(
        "--count", type=int, help="so many seeds, however long it takes"
    )
    parser.add_argument("--histories", action="store_true", help="see `history.py`")
    parser.add_argument("--show", action="store_true", help="print the first program")
    args = parser.parse_args()
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if args.show:
        print(text(generate(args.seed)))
    if args.histories:
        raise SystemExit(_run_histories(args.seed, args.count, 60 * args.minutes))

    start = time.monotonic()
    outcomes, kinds = collections.Counter(), collections.Counter()
    transforms: collections.Counter[str] = collections.Counter()
    examples: dict[str, tuple[int, str]] = {}
    n = 0

    def summary() -> None:
        minutes = (time.monotonic() - start) / 60
        print(f"\n== {n} programs in {minutes:.1f} minutes")
        for outcome, count in outcomes.most_common():
            print(f"  {outcome:10} {count:6}  {100 * count / n:5.1f} %")
        for kind, count in kinds.most_common():
            seed, detail = examples[kind]
            print(f"  {count:6}  {kind}\n          seed {seed}: {detail[:300]}")
        print("  transforms:", dict(transforms.most_common()), flush=True)

    last = start
    while True:
        if args.count is not None and n >= args.count:
            break
        if args.count is None and time.monotonic() - start > 60 * args.minutes:
            break
        seed = args.seed + n
        program = generate(seed)
        report = check(program)
        n += 1
        outcomes[report.outcome] += 1
        for name in transforms_of(program.top):
            transforms[name] += 1
        if report.outcome != "equal":
            kind = f"{report.outcome}: {report.kind}"
            kinds[kind] += 1
            examples.setdefault(kind, (seed, report.detail))
        if report.outcome in ("wrong", "invalid"):
            print(
                f"\n-- {report.outcome}\n{text(program)}\n{report.detail[-3000:]}",
                flush=True,
            )
        if n % 300 == 0:
            # Compiled programs add up.
            jax.clear_caches()
            eqx.clear_caches()
        if time.monotonic() - last > 60:
            last = time.monotonic()
            summary()
    summary()
    raise SystemExit(1 if outcomes["wrong"] or outcomes["invalid"] else 0)


def _run_histories(seed: int, count: int | None, seconds: float) -> int:
    """Runs them, and says what differed. How many did."""
    end, n, wrong = time.monotonic() + seconds, 0, 0
    while n < count if count is not None else time.monotonic() < end:
        difference, steps = run_history(seed + n)
        n += 1
        if difference is not None:
            wrong += 1
            print(
                f"-- seed {seed + n - 1}, step {len(steps)}: {difference}", flush=True
            )
        jax.clear_caches()
        eqx.clear_caches()
    print(f"{n} histories, {wrong} of them wrong")
    return wrong


if __name__ == "__main__":
    main()
