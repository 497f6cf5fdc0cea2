"""Ways in which Python itself picks: by no argument of a call, no index and no branch."""

from __future__ import annotations

from tests.fuzz.constructs import flat, lines_of, two_layers
from tests.fuzz.operations import nonlinearity
from tests.fuzz.source import Code
from tests.fuzz.writer import ClassWriter

# v is 0, 1 or 2; w is another such number that it decides; p and q are results of two layers.
_LINES = (
    "h = {v: p, w: q}[1]",
    "h = {f'n{v}': p, f'n{w}': q}.get('n1')",
    "h = {(v, 0): p, (w, 0): q}[1, 0]",
    "h = {float(v): p, float(w): q}[1.0]",
    "h = {1: p, **{v: q}}[1]",
    "h = ({v: p, w: q} | {v: q})[1]",
    "h = {n: t for n, t in zip(order, (p, q))}[1]",
    "h = dict(zip(order, (p, q)))[1]",
    "h = dict([(v, p), (w, q)])[1]",
    "h = dict((n, t) for n, t in zip(order, (p, q)))[1]",
    "h = dict(enumerate((p, q), v % 2)).get(1, q)",
    "h = dict(zip(map(str, order), (p, q)))['1']",
    "h = sorted(dict(zip(order, (p, q))).items(), key=lambda pair: pair[0])[0][1]",
    "h = max((v, p), (w, q), key=operator.itemgetter(0))[1]",
    "h = min([(v, p), (w, q)], key=lambda pair: pair[0])[1]",
    "h = min(zip(order, 'pq', (p, q)))[2]",
    "h = max(((n, t) for n, t in zip(order, (p, q))), key=lambda pair: pair[0])[1]",
    "turns = iter(order)\nh = max((p, q), key=lambda t: next(turns))",
    "turns = iter(order)\nh = max((p, q), key=lambda t: next(turns) / 7)",
    "turns = iter(order)\ndef rank(t):\n return next(turns)\nh = sorted((p, q), key=rank)[0]",
    "h = [p, q]\nranks = {id(p): v, id(q): w}\nh.sort(key=lambda t: ranks[id(t)])\nh = h[0]",
    "turns = iter(order)\nh = min((p, q), key=lambda t: next(turns))",
    "h = [(v, 'p', p), (w, 'q', q)]\nh.sort()\nh = h[0][2]",
    "h = list(zip((p, q), range(v % 2 + 1)))[-1][0]",
    "h = list(t for t, _ in zip((p, q), range(v % 2 + 1)))[-1]",
    "h = list(map(lambda t, _: t, (p, q), range(v % 2 + 1)))[-1]",
    "h = ([p] * (v % 2) + [q])[0]",
    "h = ((v % 2) * (p,) + (q,))[0]",
    "turns = iter((p, q))\nlist(zip('.' * (v % 2), turns))\nh = next(turns)",
    "h, *_ = [p] * (v % 2) + [q]",
    "turns = iter((v % 2, 1))\nh = next(filter(lambda t: next(turns), (p, q)))",
    "turns = iter((v % 2, 1))\nh = next(itertools.dropwhile(lambda t: not next(turns), (p, q)))",
    "turns = iter((v % 2, 2))\nh = {k: list(g) for k, g in itertools.groupby((p, q), lambda t: "
    "next(turns))}.get(1, [q])[0]",
    "h = next(itertools.compress((p, q), [v % 2, 1]))",
    "h = functools.reduce(lambda a, b: a if v else b, (p, q))",
    "h = OrderedDict(zip(order, (p, q))).pop(1)",
    "h = ChainMap({v: p}, {1: q})[1]",
    "h = dict(zip(reversed(order), (q, p)))[1]",
    "h = dict(zip(iter(order), (p, q)))[1]",
    "h = dict(zip({v: p, w: q}.keys(), (p, q)))[1]",
    "h = dict(zip(OrderedDict(zip(order, 'pq')), (p, q)))[1]",
    "h = sorted(zip(reversed(order), 'qp', (q, p)))[0][2]",
    "rows = [p]\nrows = rows * (v % 2) + [q]\nh = rows[0]",
    "rows = [p]\nrows *= v % 2\nh = (rows + [q])[0]",
    "h = sorted((p, q), key=functools.cmp_to_key(lambda a, b: v - 1))[0]",
    "turns = iter(order)\nrank = lambda t: next(turns)\nh = min((p, q), key=rank)",
    "h = (u, T.keep(lambda t: t + 0, u), p)[v]",
    "h = [u, T.keep(lambda t: t + 0, u), q][v:][0]",
    "h = {0: u, 1: T.keep(lambda t: t + 0, u)}.get(v, p)",
    "h = next(itertools.islice((u, T.keep(lambda t: t + 0, u), p), v, None))",
    "h = SimpleNamespace(rows=[u, T.keep(lambda t: t + 0, u), p]).rows[v]",
    "h = operator.itemgetter(v)([u, T.keep(lambda t: t + 0, u), p])",
    "h = max(zip((v, 1.5), (p, u)))[1]",
    "h = [u, u, p].pop(v)",
    "h = SimpleNamespace(**dict(zip((f'n{v}', f'n{w}'), (p, q)))).n1",
)


@flat
def picked_by_python(c: ClassWriter, depth: int) -> Code:
    """Which of two layers' results goes on."""
    a, b = two_layers(c)
    return [
        *lines_of(c, [], "v = NUMBER"),
        "w = int(v != 1)",
        "order = [v, w]",
        f"p, q, u = T.call({a}, x), T.call({b}, x), T.keep(lambda t: t + 0, x)",
        *c.program.pick(_LINES).split("\n"),
        f"x = {nonlinearity(c, 'h')}",
    ]


@flat
def called_by_python(c: ClassWriter, depth: int) -> Code:
    """Which of two layers is called from code in C."""
    a, b = two_layers(c)
    line = c.program.pick(
        (
            "x = next(map(lambda m, t: T.call(m, t), layers, (x, x)))",
            "x = functools.reduce(lambda t, m: T.call(m, t), layers, x)",
            "x = next(itertools.starmap(lambda m, t: T.call(m, t), zip(layers, (x, x))))",
        )
    )
    return [
        *lines_of(c, [], "v = int((NUMBER) != 1)"),
        f"layers = [{{v: {a}, 1 - v: {b}}}[1]]",
        line,
        f"x = {nonlinearity(c)}",
    ]
