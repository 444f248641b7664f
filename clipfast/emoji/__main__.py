"""Train a small CLIP on emoji and ask it what a kangaroo is, of which it saw none: `python -m clipfast.emoji`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from clipfast.emoji.demo import TEXTS, Demo, Emoji, record, report, run


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 1 after an error."""
    parser = argparse.ArgumentParser(prog="python -m clipfast.emoji", description=__doc__)
    for field in fields(Demo):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            choices=TEXTS if field.name == "text" else None,
            default=field.default,
            help="default: %(default)s",
        )
    parser.add_argument(
        "--seeds", type=int, default=1, help="runs with the seeds from --seed on (default: %(default)s)"
    )
    options = vars(parser.parse_args(arguments))
    seeds = options.pop("seeds")
    try:
        demo = Demo(**options)
        emoji, results = Emoji(), []
        for seed in range(demo.seed, demo.seed + seeds):
            out = demo.out if seeds == 1 else str(Path(demo.out, f"seed-{seed}"))
            results.append(run(replace(demo, seed=seed, out=out), emoji))
            print(report(results[-1]), flush=True)
            if seeds > 1:
                record(results, Path(demo.out, "seeds.json"))
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
