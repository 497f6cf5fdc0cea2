"""Layers and tensors that come from elsewhere: containers, other objects, generators, threads."""

from __future__ import annotations

from tests.fuzz.constructs import body_of, deep, flat, lines_of, method_of, two_layers
from tests.fuzz.decisions import decide, truth
from tests.fuzz.operations import layer, nonlinearity
from tests.fuzz.source import Code, Unit
from tests.fuzz.writer import ClassWriter

__all__: list[str] = []

# Where two layers may be kept: what `__init__` does, and what gives the one of a number.
_HOLDERS = (
    ("self.s{n} = OrderedDict(p={a}, q={b})", "list(self.s{n}.values())[NUMBER % 2]"),
    ("self.s{n} = OrderedDict(p={a}, q={b})", "self.s{n}['q' if TEST else 'p']"),
    ("self.s{n} = Pair({a}, {b})", "self.s{n}[NUMBER % 2]"),
    ("self.s{n} = Pair({a}, {b})", "(self.s{n}.q if TEST else self.s{n}.p)"),
    ("self.s{n} = UserDict(p={a}, q={b})", "self.s{n}['q' if TEST else 'p']"),
    ("self.s{n} = UserList([{a}, {b}])", "self.s{n}[NUMBER % 2]"),
    ("self.s{n} = deque([{a}, {b}])", "self.s{n}[NUMBER % 2]"),
    ("self.s{n} = ChainMap(dict(p={a}), dict(p={b}, q={b}))", "self.s{n}['q' if TEST else 'p']"),
    ("self.s{n} = types.MappingProxyType(dict(p={a}, q={b}))", "self.s{n}['q' if TEST else 'p']"),
    ("self.s{n} = SimpleNamespace(p={a}, q={b})", "getattr(self.s{n}, 'pq'[NUMBER % 2])"),
    ("self.s{n} = [weakref.ref({a}), weakref.ref({b})]", "self.s{n}[NUMBER % 2]()"),
    ("self.s{n} = weakref.WeakValueDictionary(p={a}, q={b})", "self.s{n}['pq'[NUMBER % 2]]"),
    ("self.s{n} = {{0: ({a},), 1: [{b}]}}", "self.s{n}[NUMBER % 2][-1]"),
    ("self.s{n} = nn.Sequential({a}, {b})", "self.s{n}[NUMBER % 2]"),
    ("self.s{n} = nn.Sequential({a}, {b})", "self.s{n}[NUMBER % 2 :][0]"),
    (
        "self.s{n} = nn.ModuleList([{a}, {b}])",
        "next(itertools.islice(self.s{n}, NUMBER % 2, None))",
    ),
    ("self.s{n} = ({a}, {b})", "[m for m, _ in zip(self.s{n}, range(1 + NUMBER))][-1]"),
    ("self.s{n} = ({a}, {b})", "list(itertools.chain(self.s{n}, self.s{n}))[NUMBER]"),
    ("self.s{n} = ({a}, {b})", "operator.itemgetter(NUMBER % 2)(self.s{n})"),
    ("self.s{n} = ({a}, {b})", "self.s{n}[slice(NUMBER % 2, None)][0]"),
    ("self.s{n} = ({a}, {b})", "self.s{n}[np.int64(NUMBER % 2)]"),
    ("self.s{n} = ({a}, {b})", "self.s{n}[torch.tensor(NUMBER % 2)]"),
    ("self.s{n} = {{{a}: 1, {b}: 0}}", "sorted(self.s{n}, key=self.s{n}.get)[NUMBER % 2]"),
    ("self.s{n} = cell({a})[0], cell({b})[0]", "self.s{n}[NUMBER % 2]()"),
)


@flat
def held_layers(c: ClassWriter, depth: int) -> Code:
    a, b = two_layers(c)
    made, chosen = c.program.pick(_HOLDERS)
    n = c.program.fresh()
    c.init += made.format(n=n, a=a, b=b).split("\n")
    line = f"x = T.call({chosen.format(n=n)}, x)"
    return [*lines_of(c, [], line), f"x = {nonlinearity(c)}"]


# Where a tensor may be kept: what makes the place, what writes it, what reads it.
_PLACES = (
    ("", "self.t{n} = {v}", "self.t{n}"),
    ("self.t{n} = SimpleNamespace(k=None)", "self.t{n}.k = {v}", "self.t{n}.k"),
    ("self.t{n} = dict(k=None)", "self.t{n}['k'] = {v}", "self.t{n}.get('k')"),
    ("self.t{n} = [None, 0]", "self.t{n}[0] = {v}", "self.t{n}[0]"),
    ("self.t{n} = nn.Identity()", "self.t{n}.k = {v}", "self.t{n}.k"),
    ("self.t{n} = Config()", "self.t{n}.k = {v}", "self.t{n}.k"),
    ("self.t{n} = deque([None], 1)", "self.t{n}.append({v})", "self.t{n}[-1]"),
    ("self.t{n} = cell()", "self.t{n}[1]({v})", "self.t{n}[0]()"),
    ("", "Right.t{n} = {v}", "Right.t{n}"),
    ("", "type(self).t{n} = {v}", "self.t{n}"),
    ("", "KEPT['{n}'] = {v}", "KEPT['{n}']"),
    ("", "put.t{n} = {v}", "put.t{n}"),
    ("", "LOCAL.t{n} = {v}", "LOCAL.t{n}"),
    ("", "VARIABLE.set({v})", "VARIABLE.get()"),
    ("self.t{n} = Slotted(None)", "self.t{n}.value = {v}", "self.t{n}.value"),
    ("", "Stored.t{n} = {v}", "getattr(Stored, 't{n}')"),
    ("", "globals()['T{n}'] = {v}", "T{n}"),
)


@flat
def tensor_elsewhere(c: ClassWriter, depth: int) -> Code:
    """A layer's result goes through some place, where there may be None as well."""
    made, write, read = c.program.pick(_PLACES)
    n = c.program.fresh()
    c.init += [made.format(n=n)] if made else []

    def put(value: str) -> str:
        return write.format(n=n, v=value)

    test = lines_of(c, [], "v = TEST")
    act = nonlinearity(c, "h", fresh=False)
    return [
        *test,
        f"h = {layer(c)}",
        put("h if v else None"),
        f"h = {read.format(n=n)}",
        "if h is not None:",
        [f"x = {act}"],
        "else:",
        [f"x = {nonlinearity(c)}"],
        *([put("None")] if c.program.chance(0.7) else []),
    ]


@flat
def tensors_elsewhere(c: ClassWriter, depth: int) -> Code:
    """Two layers' results in some container: a decision takes one."""
    a, b = two_layers(c)
    line = c.program.pick(
        (
            "h = Pair(p, q)[NUMBER % 2]",
            "h = OrderedDict(p=p, q=q)['q' if TEST else 'p']",
            "h = UserDict(p=p, q=q)['q' if TEST else 'p']",
            "h = getattr(SimpleNamespace(p=p, q=q), 'q' if TEST else 'p')",
            "h = getattr(Pair(p, q), 'q' if TEST else 'p')",
            "h = [p, q, p][NUMBER :][0]",
            "h = operator.itemgetter(NUMBER % 2)((p, q))",
            "h = next(itertools.islice((p, q), NUMBER % 2, None))",
            "h = [p, q][np.int64(NUMBER % 2)]",
            "h = {np.int64(0): p, np.int64(1): q}[NUMBER % 2]",
            "h = (p, q)[slice(NUMBER % 2, None)][0]",
            "h = list(reversed([p, q]))[NUMBER % 2]",
            "h = dict(zip('pq', (p, q)))['pq'[NUMBER % 2]]",
            "h = [t for i, t in enumerate((p, q)) if i == NUMBER % 2][0]",
            "h, *_ = [p, q][NUMBER % 2 :]",
            "h = (lambda a, b: b if TEST else a)(p, q)",
        )
    )
    return [
        f"p, q = T.call({a}, x), T.call({b}, x)",
        *lines_of(c, [], line),
        f"x = {nonlinearity(c, 'h', fresh=False)}",
    ]


@flat
def other_thread(c: ClassWriter, depth: int) -> Code:
    """A layer runs in another thread, which is not captured; or a decision is taken there."""
    if c.program.chance(0.5):
        return lines_of(c, [], f"x = {method_of(c)}(x) if elsewhere(lambda: NUMBER) else x")
    m = c.layer()
    return [
        f"h = T.aside(lambda t: elsewhere(lambda: {m}(t)), x)",
        "h = T.sig('gelu', lambda t: F.gelu(t), h)",
        "x = T.keep(lambda a, b: a + b, x, h)",
    ]


@flat
def kept_way(c: ClassWriter, depth: int) -> Code:
    """A generator that lives from pass to pass, and goes another way each time."""
    n = c.program.fresh()
    inner: Code = ["x = yield", "while True:"]
    ways = [
        [f"x = {layer(c)}", f"x = {nonlinearity(c)}", "x = yield x"]
        for _ in range(c.program.pick((2, 3)))
    ]
    inner.append([line for way in ways for line in way])
    c.methods += [f"def g{n}(self):", inner]
    c.init += [f"self.way{n} = None"]
    return [
        f"if self.way{n} is None:",
        [f"self.way{n} = self.g{n}()", f"next(self.way{n})"],
        f"x = self.way{n}.send(x)",
    ]


@flat
def coroutine(c: ClassWriter, depth: int) -> Code:
    n = c.program.fresh()
    before: Code = []
    test = truth(c, before)
    c.methods += [
        f"async def s{n}(self, x):",
        [
            "y = x",
            *before,
            f"if {test}:",
            [f"x = {layer(c)}"],
            f"x = {nonlinearity(c)}",
            "return x",
        ],
    ]
    return [
        "try:",
        [f"self.s{n}(x).send(None)"],
        "except StopIteration as done:",
        ["x = done.value"],
    ]


@flat
def own_call(c: ClassWriter, depth: int) -> Code:
    """A part with a `__call__` of its own."""
    program, n = c.program, c.program.fresh()
    part = ClassWriter(program, f"Called{n}")
    before: Code = []
    test = truth(part, before)
    part.body += [Unit([f"x = {layer(part)}", f"x = {nonlinearity(part)}"])]
    part.methods += [
        "def __call__(self, x):",
        [*before, f"if {test}:", ["x = super().__call__(x)"], "return x"],
    ]
    program.top += part.code()
    return [f"x = T.call({c.part(f'Called{n}()')}, x)"]


@flat
def own_getattribute(c: ClassWriter, depth: int) -> Code:
    program, n, slot = c.program, c.program.fresh(), c.program.slot()
    part = ClassWriter(program, f"Attributes{n}")
    a, b = (p.removeprefix("self.") for p in two_layers(part))
    part.methods += [
        "def __getattribute__(self, name):",
        [
            f"if name == '{a}' and self.__dict__.get('second'):",
            [f"return self.{b}"],
            "return super().__getattribute__(name)",
        ],
    ]
    part.body += [f"x = T.call(self.{a}, x)", f"x = {nonlinearity(part)}"]
    program.top += part.code()
    program.prepare += [f"for m in of(model, Attributes{n}):", [f"m.second = k[{slot}] > 0"]]
    return [f"x = T.call({c.part(f'Attributes{n}()')}, x)"]


@flat
def other_class(c: ClassWriter, depth: int) -> Code:
    """A part that is of another class in some passes."""
    program, n, slot = c.program, c.program.fresh(), c.program.slot()
    part = ClassWriter(program, f"First{n}")
    part.body += [f"x = {layer(part)}", f"x = {nonlinearity(part)}"]
    head, inner = part.code()
    assert isinstance(inner, list)
    other = f"class Second{n}(First{n}):"
    forward: Code = ["y = x", f"x = {layer(part)}", f"x = {nonlinearity(part)}", "return x"]
    head, inner = part.code()
    program.top += [head, inner, other, ["def forward(self, x):", forward]]
    program.prepare += [
        f"for m in of(model, First{n}) + of(model, Second{n}):",
        [f"m.__class__ = Second{n} if k[{slot}] else First{n}"],
    ]
    return [f"x = T.call({c.part(f'First{n}()')}, x)"]


@flat
def all_children(c: ClassWriter, depth: int) -> Code:
    """A part that runs what `children()` and the like give it."""
    program, n = c.program, c.program.fresh()
    part = ClassWriter(program, f"Chain{n}")
    made = [c.constructor("layer"), "nn.ReLU()", c.constructor("layer"), "nn.Tanh()"]
    for constructor in made:
        part.part(constructor)
    before: Code = []
    expr = decide(part, before)
    which = program.pick(
        (
            "list(self.children())[: 2 + 2 * (v % 2)]",
            "[m for m in self.modules() if m is not self][: 2 + 2 * (v % 2)]",
            "list(self._modules.values())[2 * (v % 2) :]",
            "[m for k, m in self.named_children()][: 2 + 2 * (v % 2)]",
        )
    )
    part.body += [*before, f"v = {expr}", f"for m in {which}:", ["x = T.call(m, x)"]]
    program.top += part.code()
    return [f"x = T.call({c.part(f'Chain{n}()')}, x)"]


@flat
def other_dtype(c: ClassWriter, depth: int) -> Code:
    """A part whose weights are of another dtype, or layout, in some passes."""
    part, slot = c.layer(new=True), c.program.slot()
    form = c.program.pick(("dtype=torch.float64 if k[{}] else torch.float32",) * 3)
    if c.program.family == "img" and c.program.chance(0.4):
        form = "memory_format=torch.channels_last if k[{}] else torch.contiguous_format"
    c.program.prepare += [
        f"for m in of(model, {c.name}):",
        [f"{part.replace('self', 'm')}.to({form.format(slot)})"],
    ]
    return [
        f"h = T.call({part}, T.keep(lambda t: t.to({part}.weight.dtype), x))",
        f"h = {nonlinearity(c, 'h')}" if c.program.chance(0.8) else "y = x",
        "x = T.keep(lambda t: t.float(), h)",
    ]


@deep
def exit_stack(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    expr = decide(c, before)
    inner: Code = [
        "stack.enter_context(Swallow())",
        *body_of(c, depth),
        f"check({expr})",
        *body_of(c, depth),
    ]
    return [*before, "with contextlib.ExitStack() as stack:", inner]


@deep
def raised_again(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    expr = decide(c, before)
    again = c.program.pick(("raise", "raise Odd(7) from error", "raise ValueError(1)"))
    kinds = "(Odd, ValueError)"
    inner: Code = [
        "try:",
        [*body_of(c, depth), f"check({expr})", *body_of(c, depth)],
        "except Odd as error:",
        [*body_of(c, depth), again],
    ]
    return [*before, "try:", inner, f"except {kinds}:", body_of(c, depth)]


@deep
def left_by_finally(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    expr, n = decide(c, before), c.program.fresh()
    inner: Code = ["try:", [f"check(d{n})", *body_of(c, depth)]]
    inner += ["except Odd:", ["continue"], "finally:", [f"d{n} -= 1", *body_of(c, depth)]]
    return [*before, f"d{n} = {expr}", "for _ in range(2):", inner]


@deep
def thrown(c: ClassWriter, depth: int) -> Code:
    """A generator that an exception is thrown into."""
    before: Code = []
    test, n = truth(c, before), c.program.fresh()
    c.methods += [
        f"def g{n}(self, x):",
        [
            "y = x",
            "try:",
            ["yield x", *body_of(c, depth)],
            "except Odd:",
            body_of(c, depth),
            "yield x",
        ],
    ]
    return [*before, f"g = self.g{n}(x)", "next(g)", f"x = g.throw(Odd(1)) if {test} else next(g)"]


@deep
def delegated(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    expr, n = decide(c, before), c.program.fresh()
    first, second = c.layer(), c.layer()
    c.methods += [
        f"def g{n}(self, d):",
        [f"if d > 1: yield from self.g{n}(d - 1)", f"yield {first} if d else {second}"],
    ]
    inner: Code = ["x = T.call(m, x)", f"x = {nonlinearity(c)}"]
    return [*before, f"for m in self.g{n}({expr}):", inner, *body_of(c, depth)]
