"""Random programs, run with the lifted transforms and in plain Python, and compared.

- `program.py`: what a program is, and its text;
- `generate.py`: a random program, of a seed or of hypothesis, with `calls.py` for the calls
    of transforms, and `draw.py` for names and expressions;
- `interpret.py`: what both interpretations have in common;
- `lifted.py`: with the transforms of this library;
- `plain.py`: with loops and ifs, of `heap.py`, `plain_derivatives.py` and `plain_lanes.py`;
- `compare.py`: one seed, run both ways;
- `history.py`: many calls of the same functions, with `functions.py` for these;

`python -m tests.fuzz --minutes 60 --seed 0` runs programs for an hour; with `--histories`,
histories.
"""
