"""Random programs, written as source, whose maps are known by construction.

`python -m tests.fuzz --programs 1000 --seed 7` writes and checks a thousand of them.

- `source.py`: a program as a tree of statements, and its two texts. The *told* text calls `T` at
  every layer, nonlinearity and change of layout; the *plain* one is the same without `T`.
- `told.py`: `T`, which keeps what the told program says: each pair (z, a), its layer and filters.
- `decisions.py`: what a program may decide by. `constructs.py`: how it may decide.
- `operations.py`: what runs in a straight line. `programs.py`: classes, passes, the whole program.
- `check.py`: runs both texts pass by pass, the plain one captured, and compares.
- `shrink.py`: drops statements while the program still fails.

Nothing here knows how fmapkit works inside.
"""
