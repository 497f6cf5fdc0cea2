"""How a program decides: every way that Python has to run one thing or another.

Each construct is a function that returns code which leaves `x` of the shape that it has. `DEEP`
ones have bodies of any statements, the others decide between a few calls.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz.decisions import decide, truth
from tests.fuzz.operations import (
    layer,
    nonlinearity,
    operation,
    sigma,
    sigma_callable,
)
from tests.fuzz.source import Code, Unit
from tests.fuzz.writer import ClassWriter

__all__ = [
    *("body_of", "construct", "deep", "flat", "lines_of", "method_of", "statements", "two_layers"),
]

Construct = Callable[[ClassWriter, int], Code]
DEEP: list[Construct] = []
FLAT: list[Construct] = []


def deep(function: Construct) -> Construct:
    DEEP.append(function)
    return function


def flat(function: Construct) -> Construct:
    FLAT.append(function)
    return function


def statements(c: ClassWriter, depth: int, most: int = 2) -> Code:
    """One statement or some."""
    found: Code = []
    for _ in range(c.program.rng.randint(1, most)):
        found.append(construct(c, depth) if c.program.chance(0.45) else operation(c))
    return found


def construct(c: ClassWriter, depth: int) -> Unit:
    """A statement that decides something."""
    chosen = c.program.pick(FLAT if depth >= 2 or c.program.chance(0.65) else DEEP)
    c.program.drawn[f"in {chosen.__name__}"] += 1
    return Unit(chosen(c, depth))


def body_of(c: ClassWriter, depth: int) -> Code:
    return statements(c, depth + 1)


def method_of(c: ClassWriter, body: Code | None = None, kind: str = "") -> str:
    """A method of the class that runs a layer and σ, or `body`."""
    name = f"s{c.program.fresh()}"
    inner = body or [f"x = {layer(c)}", f"x = {nonlinearity(c)}"]
    c.methods += [f"def {name}(self, x):", ["y = x", *inner, "return x"]]
    return f"self.{name}" if not kind else name


# -- statements -----------------------------------------------------------------------------------


@deep
def if_else(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    test = truth(c, before)
    return [*before, f"if {test}:", body_of(c, depth), "else:", body_of(c, depth)]


@deep
def if_alone(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    test = truth(c, before)
    return [*before, f"if {test}:", body_of(c, depth)]


@deep
def elif_chain(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    expr = decide(c, before)
    first, second, third = (body_of(c, depth) for _ in range(3))
    return [
        *before,
        f"d = {expr}",
        "if d == 0:",
        first,
        "elif d == 1:",
        second,
        "else:",
        third,
    ]


@deep
def match_number(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    expr = decide(c, before)
    inner: Code = [
        "case 0:",
        body_of(c, depth),
        "case 1 | 3:",
        body_of(c, depth),
        "case _:",
        ["pass"],
    ]
    return [*before, f"match {expr}:", inner]


@deep
def match_shapes(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    expr = decide(c, before)
    inner: Code = [
        "case [0, *_]:",
        body_of(c, depth),
        "case [1, n] if n > 3:",
        body_of(c, depth),
        "case _:",
        [],
    ]
    return [*before, f"match [{expr}, x.shape[0] + 2]:", inner]


@deep
def while_loop(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    expr = decide(c, before)
    n = c.program.fresh()
    return [*before, f"w{n} = {expr}", f"while w{n} > 0:", [*body_of(c, depth), f"w{n} -= 1"]]


@deep
def for_break(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    test, n = truth(c, before), c.program.fresh()
    inner: Code = [*before, f"if {test}:", ["break"], *body_of(c, depth)]
    return [f"for i{n} in range(2):", inner, "else:", body_of(c, depth)]


@deep
def for_continue(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    expr, n = decide(c, before), c.program.fresh()
    inner: Code = [f"if i{n} == d{n}:", ["continue"], *body_of(c, depth)]
    return [*before, f"d{n} = {expr}", f"for i{n} in range(3):", inner]


@deep
def for_range(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    expr = decide(c, before)
    return [*before, f"for _ in range({expr}):", body_of(c, depth)]


@deep
def try_raise(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    expr = decide(c, before)
    c.program.drawn["raises"] += 1
    inner = [*body_of(c, depth), f"check({expr})", *body_of(c, depth)]
    tail: Code = ["except Odd:", body_of(c, depth)]
    if c.program.chance(0.4):
        tail += ["else:", body_of(c, depth)]
    if c.program.chance(0.3):
        tail += ["finally:", body_of(c, depth)]
    return [*before, "try:", inner, *tail]


@deep
def suppressed(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    expr = decide(c, before)
    with_ = c.program.pick(("contextlib.suppress(Odd)", "Swallow()", "quiet()", "self.quiet"))
    if with_ == "self.quiet" and not any("self.quiet" in str(line) for line in c.init):
        made = c.program.pick(("Swallow()", "contextlib.suppress(Odd)"))
        c.init.append(f"self.quiet = {made}")
    return [*before, f"with {with_}:", [*body_of(c, depth), f"check({expr})", *body_of(c, depth)]]


@deep
def asserted(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    test = truth(c, before)
    inner: Code = [*before, f"assert {test}", *body_of(c, depth)]
    return ["try:", inner, "except AssertionError:", body_of(c, depth)]


@deep
def raising_builtins(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    expr = decide(c, before)
    fault, kind = c.program.pick(
        (
            ("1 // ({})", "ZeroDivisionError"),
            ("{{1: 1, 2: 2}}[{}]", "KeyError"),
            ("(1,)[{}]", "IndexError"),
            ("getattr(object(), 'x' * ({}))", "AttributeError"),
            ("x.view(({}) + 5, -1, 7777)", "RuntimeError"),
            ("next(iter([0] * ({})))", "StopIteration"),
        )
    )
    return [
        *before,
        "try:",
        [fault.format(expr), *body_of(c, depth)],
        f"except {kind}:",
        body_of(c, depth),
    ]


@deep
def early_return(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    test = truth(c, before)
    body = [*body_of(c, depth), *before, f"if {test}:", ["return x"], *body_of(c, depth)]
    return [f"x = {method_of(c, body)}(x)"]


@deep
def swallowed_return(c: ClassWriter, depth: int) -> Code:
    """`finally` with a return of its own."""
    before: Code = []
    expr = decide(c, before)
    body: Code = [
        *before,
        "try:",
        [*body_of(c, depth), f"check({expr})", *body_of(c, depth)],
        "except Odd:",
        ["return x"],
        "finally:",
        body_of(c, depth),
    ]
    return [f"x = {method_of(c, body)}(x)"]


@deep
def nested_function(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    expr, n = decide(c, before), c.program.fresh()
    inner: Code = [
        "y = x",
        "nonlocal_ = v",
        *body_of(c, depth),
        "if nonlocal_ > 0:",
        body_of(c, depth),
        "return x",
    ]
    return [*before, f"v = {expr}", f"def inner{n}(x):", inner, f"x = inner{n}(x)"]


@deep
def with_block(c: ClassWriter, depth: int) -> Code:
    """A context manager that says itself whether its body is to run, or what is to."""
    before: Code = []
    expr = decide(c, before)
    return [
        *before,
        f"with Chooser({expr}) as d:",
        ["if d:", body_of(c, depth)],
        *body_of(c, depth),
    ]


@deep
def hooked_part(c: ClassWriter, depth: int) -> Code:
    """A hook of the user's own that decides what it records."""
    n = c.program.fresh()
    part = c.part("nn.Linear(6, 6)") if c.program.family != "img" else c.part("nn.Conv2d(6, 6, 1)")
    c.init += [
        f"self.seen{n} = []",
        f"{part}.register_forward_hook(lambda m, a, o, s=self.seen{n}: s.append(o.mean().item()))",
    ]
    return [
        f"x = T.call({part}, x)",
        f"x = {nonlinearity(c)}",
        f"if self.seen{n} and self.seen{n}[-1] > 0:",
        body_of(c, depth),
    ]


@deep
def decorated(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    expr, n = decide(c, before), c.program.fresh()
    inner = [*before, f"self.turns = {expr}", *body_of(c, depth), "return x"]
    c.methods += [
        f"{c.program.pick(('@twice', '@maybe', '@plain'))}",
        f"def s{n}(self, x):",
        ["y = x", *inner],
    ]
    if "self.turns = 0" not in c.init:
        c.init.append("self.turns = 0")
    return [f"x = self.s{n}(x)"]


@deep
def generator(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    expr, n = decide(c, before), c.program.fresh()
    first, second = c.layer(), c.layer()
    c.methods += [
        f"def g{n}(self, d):",
        [f"yield {first}", "if d:", [f"yield {second}"], "if d > 1:", ["return"], f"yield {first}"],
    ]
    inner: Code = ["x = T.call(m, x)", f"x = {nonlinearity(c)}"]
    return [*before, f"for m in self.g{n}({expr}):", inner, *body_of(c, depth)]


@deep
def sent(c: ClassWriter, depth: int) -> Code:
    """A generator that is sent values and runs the forward between them."""
    before: Code = []
    expr, n = decide(c, before), c.program.fresh()
    c.methods += [
        f"def g{n}(self, x):",
        ["y = x", "d = yield x", "if d:", body_of(c, depth), "else:", body_of(c, depth), "yield x"],
    ]
    return [*before, f"g = self.g{n}(x)", "next(g)", f"x = g.send({expr})", "g.close()"]


# -- between a few calls ------------------------------------------------------------------------


def _then(c: ClassWriter, code: Code, x: str = "x") -> Code:
    """And σ of what came out."""
    return [*code, f"x = {nonlinearity(c, x)}"] if c.program.chance(0.8) else code


def two_layers(c: ClassWriter) -> tuple[str, str]:
    return c.layer(new=True), c.layer(new=True)


@flat
def conditional_module(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    a, b = two_layers(c)
    return _then(c, [*lines_of(c, before, f"x = T.call({a} if TEST else {b}, x)")])


def lines_of(c: ClassWriter, before: Code, line: str) -> Code:
    """A line with TEST or NUMBER in it, and what has to run before it."""
    if "TEST" in line:
        line = line.replace("TEST", truth(c, before))
    if "NUMBER" in line:
        line = line.replace("NUMBER", decide(c, before))
    return [*before, line]


@flat
def conditional_number(c: ClassWriter, depth: int) -> Code:
    code = lines_of(c, [], f"h = T.keep(lambda t: t * (0.5 if TEST else 1.5), {layer(c)})")
    return _then(c, code, "h")


@flat
def conditional_tensor(c: ClassWriter, depth: int) -> Code:
    return _then(c, [f"h = {layer(c)}", *lines_of(c, [], "h = h if TEST else y")], "h")


@flat
def boolean_operator(c: ClassWriter, depth: int) -> Code:
    method = method_of(c)
    form = c.program.pick(
        (
            f"h = (TEST) and {method}(x)",
            f"h = (TEST) or {method}(x)",
            f"h = None if TEST else {method}(x)",
            f"h = (lambda: {method}(x))() if TEST else None",
        )
    )
    return [*lines_of(c, [], form), "x = h if torch.is_tensor(h) else x"]


@flat
def walrus(c: ClassWriter, depth: int) -> Code:
    method = method_of(c)
    test = f"if (h := {method}(x) if TEST else None) is not None:"
    return [*lines_of(c, [], test), ["x = h"]]


@flat
def comprehension(c: ClassWriter, depth: int) -> Code:
    a, b = two_layers(c)
    line = f"ms = [m for i, m in enumerate(({a}, {b}, {a})) if i <= NUMBER]"
    inner: Code = ["x = T.call(m, x)", f"x = {nonlinearity(c)}"]
    return [*lines_of(c, [], line), "for m in ms:", inner]


@flat
def comprehension_of_maps(c: ClassWriter, depth: int) -> Code:
    a, b = two_layers(c)
    act = sigma_callable(c)
    line = f"hs = [T.call({act}, T.call(m, x)) for m in ({a}, {b})[: NUMBER + 1]]"
    return [*lines_of(c, [], line), "x = hs[-1]"]


@flat
def index(c: ClassWriter, depth: int) -> Code:
    a, b = two_layers(c)
    return _then(c, lines_of(c, [], f"x = T.call(({a}, {b}, {a})[NUMBER], x)"))


@flat
def module_list(c: ClassWriter, depth: int) -> Code:
    kind = c.program.pick(("nn.ModuleList", "nn.ModuleList", "Rotating", "Picky"))
    parts = c.part(f"{kind}([{c.constructor('layer')}, {c.constructor('layer')}])")
    act = nonlinearity(c)
    match c.program.rng.randrange(4):
        case 0:
            return [*lines_of(c, [], f"x = T.call({parts}[NUMBER % 2], x)"), f"x = {act}"]
        case 1:
            line = f"for m in {parts}:" if kind == "Rotating" else f"for m in {parts}[:NUMBER]:"
            return [*lines_of(c, [], line), ["x = T.call(m, x)", f"x = {act}"]]
        case 2:
            line = f"for m in reversed({parts}) if TEST else {parts}:"
            return [*lines_of(c, [], line), ["x = T.call(m, x)", f"x = {act}"]]
        case _:
            line = f"m = list({parts})[-NUMBER % 2]"
            return [*lines_of(c, [], line), "x = T.call(m, x)", f"x = {act}"]


@flat
def module_dict(c: ClassWriter, depth: int) -> Code:
    a, b = c.constructor("layer"), c.constructor("layer")
    parts = c.part(f"nn.ModuleDict(dict(one={a}, two={b}))")
    line = c.program.pick(
        (
            f"x = T.call({parts}['one' if TEST else 'two'], x)",
            f"x = T.call({parts}[('one', 'two', 'one')[NUMBER]], x)",
            f"x = T.call(list({parts}.values())[NUMBER % 2], x)",
            f"x = T.call({parts}[sorted({parts}, reverse=bool(NUMBER))[0]], x)",
        )
    )
    return _then(c, lines_of(c, [], line))


@flat
def plain_dict(c: ClassWriter, depth: int) -> Code:
    a, b = method_of(c), method_of(c)
    return lines_of(c, [], f"x = {{0: {a}, 1: {b}}}.get(NUMBER, {a})(x)")


@flat
def getattr_name(c: ClassWriter, depth: int) -> Code:
    a, b = (part.removeprefix("self.") for part in two_layers(c))
    line = c.program.pick(
        (
            f"x = T.call(getattr(self, ('{a}', '{b}', '{a}')[NUMBER]), x)",
            f"x = T.call(self.get_submodule('{a}' if TEST else '{b}'), x)",
            f"x = T.call(self._modules['{a}' if TEST else '{b}'], x)",
            f"x = T.call(dict(self.named_children())['{a}' if TEST else '{b}'], x)",
            f"x = T.call(operator.attrgetter('{a}' if TEST else '{b}')(self), x)",
        )
    )
    return _then(c, lines_of(c, [], line))


@flat
def property_layer(c: ClassWriter, depth: int) -> Code:
    a, b = two_layers(c)
    before: Code = []
    test, n = truth(c, before), c.program.fresh()
    # A property that raises AttributeError is looked up once more, by nn.Module's __getattr__.
    c.methods += ["@property", f"def q{n}(self):"]
    c.methods += [["x = self.at_hand", *before, f"return {a} if {test} else {b}"]]
    return _then(c, ["self.at_hand = x.detach()", f"x = T.call(self.q{n}, x)"])


@flat
def property_sigma(c: ClassWriter, depth: int) -> Code:
    before: Code = []
    test, n = truth(c, before), c.program.fresh()
    c.methods += ["@property", f"def q{n}(self):"]
    c.methods += [
        [
            "x = self.at_hand",
            *before,
            f"if {test}:",
            [f"return {sigma(c, layer(c), fresh=False)}"],
            f"return {sigma(c, layer(c), fresh=False)}",
        ]
    ]
    return ["self.at_hand = x", f"x = self.q{n}", "self.at_hand = None"]


@flat
def descriptor_layer(c: ClassWriter, depth: int) -> Code:
    a, b = (part.removeprefix("self.") for part in two_layers(c))
    slot, n = c.program.slot(), c.program.fresh()
    c.fields.append(f"r{n} = Pick('{a}', '{b}')")
    c.program.prepare += [f"for m in of(model, {c.name}):", [f"m._second = bool(k[{slot}])"]]
    return _then(c, [f"x = T.call(self.r{n}, x)"])


@flat
def operator_class(c: ClassWriter, depth: int) -> Code:
    a, b = two_layers(c)
    act = sigma_callable(c)
    line = c.program.pick(
        (
            f"x = (Box(x, NUMBER) + {a} + {act}).x",
            f"x = (Box(x, NUMBER) @ ({a}, {b}) + {act}).x",
            f"x = Box(x, NUMBER)[{a}, {b}].x",
            f"x = Box(x, NUMBER)({a}, {act}).x",
            f"x = (-(Box(x, NUMBER) >> {a})).x",
        )
    )
    return lines_of(c, [], line)


@flat
def recursion(c: ClassWriter, depth: int) -> Code:
    n = c.program.fresh()
    c.methods += [
        f"def s{n}(self, x, d):",
        [
            "y = x",
            "if d <= 0:",
            ["return x"],
            f"x = {layer(c)}",
            f"x = {nonlinearity(c)}",
            f"return self.s{n}(x, d - 1)",
        ],
    ]
    return lines_of(c, [], f"x = self.s{n}(x, NUMBER)")


@flat
def partials(c: ClassWriter, depth: int) -> Code:
    line = c.program.pick(
        (
            "act = partial(F.leaky_relu, negative_slope=0.1 + NUMBER)",
            "act = partial(F.relu, inplace=TEST)",
            "act = partial((F.relu, F.gelu, torch.tanh)[NUMBER])",
            "act = partial(F.gelu, approximate='tanh' if TEST else 'none')",
        )
    )
    after = c.program.pick(([], ["x = T.vague(lambda a, b: a + b, h, x)"]))
    return [f"h = {layer(c)}", *lines_of(c, [], line), "x = T.call(act, h)", *after]


@flat
def reduced(c: ClassWriter, depth: int) -> Code:
    a, b = two_layers(c)
    act = sigma_callable(c)
    parts = f"({a}, {act}, {b}, {act})[: 2 * (NUMBER)]"
    return lines_of(c, [], f"x = reduce(lambda x, m: T.call(m, x), {parts}, x)")


@flat
def mapped(c: ClassWriter, depth: int) -> Code:
    a, b = two_layers(c)
    act = sigma_callable(c)
    line = f"hs = list(map(lambda m: T.call({act}, T.call(m, x)), ({a}, {b})[: 1 + NUMBER]))"
    last = "x = T.keep(lambda a, b: a + b, hs[0], hs[-1])"
    return [*lines_of(c, [], line), last]


@flat
def filtered(c: ClassWriter, depth: int) -> Code:
    a, b = two_layers(c)
    line = f"for m in filter(lambda m: (m is {a}) == (TEST), ({a}, {b})):"
    return [*lines_of(c, [], line), ["x = T.call(m, x)", f"x = {nonlinearity(c)}"]]


@flat
def sorted_key(c: ClassWriter, depth: int) -> Code:
    a, b = two_layers(c)
    line = c.program.pick(
        (
            f"order = sorted(({a}, {b}), key=lambda m: (m is {a}) == bool(v))",
            f"order = sorted([{a}, {b}], key=lambda m: m.weight.sum().item(), reverse=bool(v))",
            f"order = [max(({a}, {b}), key=lambda m: int(m is {a}) * (v - 1))]",
            f"order = [{a}, {b}][:: (1 if v else -1)]",
            f"order = [{a}, {b}]\nif v: order.reverse()",
            f"order = random.sample([{a}, {b}], 2) + [{a}] * int(v > 1)",
        )
    )
    inner: Code = ["x = T.call(m, x)", f"x = {nonlinearity(c)}"]
    return [*lines_of(c, [], "v = NUMBER"), line, "for m in order:", inner]


@flat
def mangled_methods(c: ClassWriter, depth: int) -> Code:
    n = c.program.fresh()
    for letter in "ab":
        inner: Code = ["y = x", f"x = {layer(c)}", f"x = {nonlinearity(c)}", "return x"]
        c.methods += [f"def __{letter}{n}(self, x):", inner]
    return lines_of(c, [], f"x = self.__a{n}(x) if TEST else self.__b{n}(x)")


@flat
def static_methods(c: ClassWriter, depth: int) -> Code:
    n = c.program.fresh()
    a, b = two_layers(c)
    c.methods += ["@staticmethod", f"def s{n}(v, a, b):", ["return b if v else a"]]
    c.methods += ["@classmethod", f"def t{n}(cls, v, a, b):", [f"return cls.s{n}(v, a, b)"]]
    which = c.program.pick(("self.s", "self.t", f"{c.name}.s", "type(self).t"))
    return _then(c, lines_of(c, [], f"x = T.call({which}{n}(NUMBER, {a}, {b}), x)"))


@flat
def super_method(c: ClassWriter, depth: int) -> Code:
    """A block whose base has a forward, and which decides whether to ask it."""
    program, n = c.program, c.program.fresh()
    base = ClassWriter(program, f"Base{n}")
    base.body += [Unit([f"x = {layer(base)}", f"x = {nonlinearity(base)}"])]
    derived = ClassWriter(program, f"Derived{n}")
    line = f"x = super().forward(x) if TEST else {layer(derived)}"
    derived.body += [*lines_of(derived, [], line), f"x = {nonlinearity(derived)}"]
    head, inner = derived.code()
    program.top += [*base.code(), str(head).replace("nn.Module", base.name), inner]
    return [f"x = T.call({c.part(f'Derived{n}()')}, x)"]


@flat
def closures(c: ClassWriter, depth: int) -> Code:
    a, b = two_layers(c)
    act = nonlinearity(c, "h")
    line = c.program.pick(
        (
            f"fs = [lambda x, m=m: T.call(m, x) for m in ({a}, {b})]\nh = fs[NUMBER % 2](x)",
            f"f = (lambda m: lambda x: T.call(m, x))({a} if TEST else {b})\nh = f(x)",
            f"f = partial(lambda m, x: T.call(m, x), {a} if TEST else {b})\nh = f(x)",
        )
    )
    return [*lines_of(c, [], line), f"x = {act}"]


@flat
def executed(c: ClassWriter, depth: int) -> Code:
    a, b = two_layers(c)
    act = sigma_callable(c)
    code = f"x = T.call({act}, T.call({a} if v else {b}, x))"
    if c.program.chance(0.5):
        names = "dict(globals(), self=self, x=x, v=v)"
        line = f"space = {names}\nexec(T.source({code!r}), space)\nx = space['x']"
    else:
        inner = code.removeprefix("x = ")
        line = f"x = eval(T.source({inner!r}).strip(), globals(), dict(self=self, x=x, v=v))"
    return [*lines_of(c, [], "v = NUMBER"), line]


@flat
def helper_function(c: ClassWriter, depth: int) -> Code:
    a, b = two_layers(c)
    act = sigma_callable(c)
    before: Code = []
    n = c.program.fresh()
    expr = decide(c, before)
    c.program.top += [
        f"def h{n}(a, b, x, v):",
        ["m = a if v else b", "x = T.call(m, x)", "return T.sig('relu', lambda t: F.relu(t), x)"],
    ]
    return [*before, f"x = h{n}({a}, {b}, x, {expr})", f"x = T.call({act}, T.call({a}, x))"]


@flat
def raising_submodule(c: ClassWriter, depth: int) -> Code:
    """A part that raises after σ; its caller goes on with something else."""
    program, n = c.program, c.program.fresh()
    part = ClassWriter(program, f"Strict{n}")
    before: Code = []
    expr = decide(part, before)
    part.body += [
        f"x = {layer(part)}",
        f"x = {nonlinearity(part)}",
        *before,
        f"check({expr})",
        f"x = {layer(part)}",
        f"x = {nonlinearity(part)}",
    ]
    program.top += part.code()
    made = c.part(f"Strict{n}()")
    inner: Code = [f"x = {layer(c)}", f"x = {nonlinearity(c)}"]
    return ["try:", [f"x = T.call({made}, x)"], "except Odd:", inner]


@flat
def skipped_submodule(c: ClassWriter, depth: int) -> Code:
    if not c.blocks:
        return conditional_module(c, depth)
    part = c.part(f"{c.program.pick(c.blocks)}()")
    how = c.program.pick(("T.call", "T.forward"))
    return [*lines_of(c, [], "if TEST:"), [f"x = {how}({part}, x)"]]


@flat
def past_a_part(c: ClassWriter, depth: int) -> Code:
    """Calls a part as a whole, or what is in it one by one."""
    inner = ClassWriter(c.program, f"Part{c.program.fresh()}")
    act = c.program.pick(("HandSwish()", "Swish()", "Bent()", "nn.PReLU()", "nn.GELU()"))
    calls = [inner.layer(new=True), inner.part(act)]
    inner.body += [f"x = T.call({name}, x)" for name in calls]
    c.program.top += inner.code()
    part = c.part(f"{inner.name}()")
    apart = [f"x = T.call({name.replace('self', part)}, x)" for name in calls]
    return [*lines_of(c, [], "if TEST:"), [f"x = T.call({part}, x)"], "else:", apart]


@flat
def writes_into_its_argument(c: ClassWriter, depth: int) -> Code:
    """A part begins with σ in place; its caller goes on with what the part was given."""
    inner = ClassWriter(c.program, f"Part{c.program.fresh()}")
    act = c.program.pick(
        (
            "T.sig('relu', lambda t: F.relu(t, inplace=True), x)",
            "T.sig('sigmoid', lambda t: t.sigmoid_(), x)",
            f"T.call({inner.part('nn.ReLU(inplace=True)')}, x)",
        )
    )
    inner.body += [f"x = {act}", f"x = T.call({inner.layer(new=True)}, x)"]
    c.program.top += inner.code()
    h = f"T.call({c.part(f'{inner.name}()')}, x)"
    after = [f"h = {h}", "x = T.keep(lambda a, b: a + b, x, h)", f"x = {nonlinearity(c)}"]
    return [f"x = {layer(c)}", *lines_of(c, [], "if TEST:"), after]


@flat
def by_forward(c: ClassWriter, depth: int) -> Code:
    a, b = two_layers(c)
    return _then(c, lines_of(c, [], f"x = T.forward({a} if TEST else {b}, x)"))


@flat
def forward_of_sigma(c: ClassWriter, depth: int) -> Code:
    act = c.part("nn.ReLU()")
    return [f"h = {layer(c)}", *lines_of(c, [], f"x = T.forward({act}, h) if TEST else h")]


@flat
def sigma_choice(c: ClassWriter, depth: int) -> Code:
    a, b = sigma_callable(c), sigma_callable(c)
    line = c.program.pick(
        (f"x = T.call({a} if TEST else {b}, h)", f"x = T.call([{a}, {b}, {a}][NUMBER], h)")
    )
    return [f"h = {layer(c)}", *lines_of(c, [], line)]


@flat
def sigma_or_none(c: ClassWriter, depth: int) -> Code:
    line = f"x = T.call({sigma_callable(c)}, x) if TEST else x"
    return [f"x = {layer(c)}", *lines_of(c, [], line)]


@flat
def inplace_flag(c: ClassWriter, depth: int) -> Code:
    """σ in place in one pass and not in another; what it was given is used afterwards, or not."""
    act = c.part("nn.ReLU()")
    line, call = c.program.pick(
        (
            (f"{act}.inplace = TEST", f"T.call({act}, h)"),
            (f"setattr({act}, 'inplace', TEST)", f"T.call({act}, h)"),
            ("flag_ = TEST", "T.sig('relu', lambda t: F.relu(t, inplace=flag_), h)"),
            ("flag_ = TEST", "T.sig('leaky_relu', lambda t: F.leaky_relu(t, 0.1, flag_), h)"),
            ("flag_ = TEST", "T.sig('relu', lambda t: (t.relu_ if flag_ else t.relu)(), h)"),
            ("act_ = torch.relu_ if TEST else torch.relu", "T.sig('relu', lambda t: act_(t), h)"),
        )
    )
    after = c.program.pick(([], ["x = T.vague(lambda a, b: a + b, h, x)"]))
    flags = lines_of(c, [], line.replace("TEST", "bool(TEST)"))
    return [f"h = {layer(c)}", *flags, f"x = {call}", *after]


@flat
def rebound_global_sigma(c: ClassWriter, depth: int) -> Code:
    n, slot = c.program.fresh(), c.program.slot()
    c.program.top.append(f"act{n} = F.relu")
    c.program.prepare += [f"global act{n}", f"act{n} = (F.relu, torch.tanh, F.gelu)[k[{slot}]]"]
    return [f"h = {layer(c)}", f"x = T.call(act{n}, h)"]


@flat
def rebound_attribute(c: ClassWriter, depth: int) -> Code:
    n, slot = c.program.fresh(), c.program.slot()
    c.init.append(f"self.act{n} = F.relu")
    chosen = f"(F.relu, torch.tanh, F.gelu)[k[{slot}]]"
    c.program.prepare += [f"for m in of(model, {c.name}):", [f"m.act{n} = {chosen}"]]
    return [f"h = {layer(c)}", f"x = T.call(self.act{n}, h)"]


@flat
def rebound_method(c: ClassWriter, depth: int) -> Code:
    slot = c.program.slot()
    a, b, d = method_of(c, kind="name"), method_of(c, kind="name"), c.program.fresh()
    c.fields.append(f"step{d} = None")
    line = f"{c.name}.step{d} = ({c.name}.{a}, {c.name}.{b}, {c.name}.{a})[k[{slot}]]"
    c.program.prepare.append(line)
    return [f"x = self.step{d}(x)"]


@flat
def rebound_forward(c: ClassWriter, depth: int) -> Code:
    """A part whose `forward` is set on the instance, another one in some passes."""
    program, n, slot = c.program, c.program.fresh(), c.program.slot()
    part = ClassWriter(program, f"Patched{n}")
    part.body += [f"x = {layer(part)}", f"x = {nonlinearity(part)}"]
    part.methods += [
        "def other(self, x):",
        ["y = x", f"x = {layer(part)}", f"x = {nonlinearity(part)}", "return x"],
    ]
    program.top += part.code()
    program.prepare += [
        f"for m in of(model, Patched{n}):",
        [f"m.__dict__.update(forward=m.other) if k[{slot}] else m.__dict__.pop('forward', None)"],
    ]
    return [f"x = T.call({c.part(f'Patched{n}()')}, x)"]


@flat
def shared_order(c: ClassWriter, depth: int) -> Code:
    """Two layers, one after the other, in one order or the other."""
    a, b = two_layers(c)
    line = f"m, n = ({a}, {b}) if TEST else ({b}, {a})"
    first, second = nonlinearity(c), nonlinearity(c)
    return [
        *lines_of(c, [], line),
        "x = T.call(m, x)",
        f"x = {first}",
        "x = T.call(n, x)",
        f"x = {second}",
    ]


@flat
def tensors_by_index(c: ClassWriter, depth: int) -> Code:
    """Which of several layers' results goes on, by a number."""
    a, b = two_layers(c)
    line = c.program.pick(
        (
            "h = (p, q, p)[NUMBER]",
            "h = [p, q][NUMBER % 2]",
            "h = dict(p=p, q=q)['p' if TEST else 'q']",
            "h, _ = (p, q) if TEST else (q, p)",
            "h = [q, p].pop(NUMBER % 2)",
            "h = next(t for t in (p, q) if (t is p) == bool(v))",
            "h = max((p, q), key=lambda t: t.mean().item())",
            "h = T.keep(lambda a, b: a + b, *((p, q) if TEST else (q, p)))",
        )
    )
    line = line.replace("*((p, q) if TEST else (q, p))", "p if v else q, q if v else p")
    return [
        *lines_of(c, [], "v = TEST"),
        f"p, q = T.call({a}, x), T.call({b}, x)",
        *lines_of(c, [], line),
        f"x = {nonlinearity(c, 'h')}",
    ]


@flat
def first_operand(c: ClassWriter, depth: int) -> Code:
    """Whose map a residual sum is, by a decision."""
    line = "h = T.keep(lambda a, b: a + b, h, x) if TEST else T.keep(lambda a, b: a + b, x, h)"
    return [f"h = {layer(c)}", *lines_of(c, [], line), f"x = {nonlinearity(c, 'h')}"]


@flat
def filters_by_number(c: ClassWriter, depth: int) -> Code:
    """Which filters σ gets, by a number from anywhere."""
    axis = c.program.axis
    lead = ":, " * axis
    form = c.program.pick(
        (
            f"T.view(lambda t: t[{lead}v : v + 2], h)",
            f"T.view(lambda t: t[{lead}v:], h)",
            f"T.view(lambda t: t[{lead}: 6 - v], h)",
            f"T.view(lambda t: t[{lead}v :: 2], h)",
            f"T.view(lambda t: t[{lead}:: v + 1], h)",
            f"T.view(lambda t: t.narrow({axis}, v, 3), h)",
            f"T.view(lambda t: t.narrow({axis}, int(v), 1), h)",
            f"T.view(lambda t: torch.split(t, [v + 1, 5 - v], {axis}), h)[1]",
            f"T.view(lambda t: t.split(2, {axis}), h)[v]",
            f"T.view(lambda t: t.chunk(3, {axis}), h)[v]",
            f"T.view(lambda t: t.tensor_split(3, {axis}), h)[-v]",
            f"T.view(lambda t: t.select({axis}, v), h)",
            f"T.view(lambda t: t[{lead}v], h)",
            f"T.view(lambda t: t.unbind({axis}), h)[v]",
            f"T.loose(lambda t: t[{lead}[v, v + 1]], h)",
            f"T.loose(lambda t: t.index_select({axis}, torch.tensor([v, 5])), h)",
            f"T.loose(lambda t: torch.roll(t, v, {axis}), h)",
            f"T.loose(lambda t: t.flip({axis}) if v else t, h)",
            "T.view(lambda t: t.unsqueeze(v), h)",
            "T.view(lambda t: t.movedim(0, v % t.dim()), h)",
            f"T.view(lambda t: t.transpose({axis}, v % t.dim()), h)",
            "T.view(lambda t: t[[v % t.shape[0]]], h)",
            "T.view(lambda t: t[v % t.shape[0]], h)",
            "T.view(lambda t: t[... if v else slice(None)], h)",
        )
    )
    if c.program.family == "vec":
        form = c.program.pick((form, "T.view(lambda t: t.view(-1, *((2, 3) if v else (3, 2))), h)"))
    return [
        *lines_of(c, [], "v = NUMBER"),
        f"h = {layer(c)}",
        f"h = {form}",
        f"h = {nonlinearity(c, 'h', fresh=False)}",
        "x = T.keep(lambda a, b: a + b.mean(), x, h)",
    ]


@flat
def weights_by_number(c: ClassWriter, depth: int) -> Code:
    """Weights used by a function, picked by a number."""
    if c.program.family == "img":
        return tensors_by_index(c, depth)
    a, b = two_layers(c)
    return [
        *lines_of(c, [], f"m = ({a}, {b}, {a})[NUMBER]"),
        "h = T.weigh(m, -1, lambda t: F.linear(t, m.weight, m.bias), x)",
        f"x = {nonlinearity(c, 'h')}",
    ]


@flat
def numbers(c: ClassWriter, depth: int) -> Code:
    """Numbers that change values and nothing else."""
    line = c.program.pick(
        (
            "h = T.keep(lambda t: t * (0.5 + v), h)",
            "h = T.keep(lambda t: F.dropout(t, 0.1 * v, True), h)",
            "h = T.keep(lambda t: F.dropout(t, 0.2, bool(v)), h)",
            "h = T.keep(lambda t: t.clamp(-1 - v, 1 + v), h)",
            "h = T.keep(lambda t: t + torch.full_like(t, v), h)",
            "h = T.keep(lambda t: t.contiguous() if v else t, h)",
            "h = T.keep(lambda t: t.to(torch.float64 if v else torch.float32), h)",
            "h = T.keep(lambda t: t.clone() if v else t, h)",
            "h = T.keep(lambda t: t.detach() if v else t, h)",
        )
    )
    return [
        *lines_of(c, [], "v = NUMBER"),
        f"h = {layer(c)}",
        line,
        f"h = {nonlinearity(c, 'h', fresh=False)}",
        "x = T.keep(lambda t: t.float(), h)",
    ]


@flat
def repeated(c: ClassWriter, depth: int) -> Code:
    """The same layer some times: calls."""
    part = c.layer()
    inner: Code = [f"x = T.call({part}, x)", f"x = {nonlinearity(c)}"]
    return [*lines_of(c, [], "for _ in range(1 + NUMBER):"), inner]


@flat
def checkpointed(c: ClassWriter, depth: int) -> Code:
    method = method_of(c)
    line = f"x = checkpoint({method}, x, use_reentrant=False) if TEST else {method}(x)"
    return lines_of(c, [], line)


@flat
def no_grad_part(c: ClassWriter, depth: int) -> Code:
    method = method_of(c)
    line = "with torch.no_grad() if TEST else contextlib.nullcontext():"
    return [*lines_of(c, [], line), [f"h = {method}(x)"], "x = T.keep(lambda a, b: a + b, x, h)"]


@flat
def remembered_route(c: ClassWriter, depth: int) -> Code:
    """What this pass computed decides the next one's way."""
    n = c.program.fresh()
    a, b = two_layers(c)
    c.init.append(f"self.route{n} = 0")
    return [
        f"x = T.call(({a}, {b})[self.route{n}], x)",
        f"x = {nonlinearity(c)}",
        f"self.route{n} = int(x.detach().mean() > 0.1)",
    ]


@flat
def experts(c: ClassWriter, depth: int) -> Code:
    """Rows go to one of two layers by their data; either may get none."""
    a, b = two_layers(c)
    return [
        "route = (x.detach().flatten(1).sum(1) > 0).long().tolist()",
        "h = T.keep(lambda t: t.clone(), x)",
        f"for e, m in enumerate(({a}, {b})):",
        [
            "rows = [i for i, r in enumerate(route) if r == e]",
            "if rows:",
            [
                "p = T.call(m, T.view(lambda t: t[rows], x))",
                f"p = {nonlinearity(c, 'p')}",
                "h[rows] = p",
            ],
        ],
        "x = T.vague(lambda t: t * 1.0, h)",
    ]


@flat
def early_exit(c: ClassWriter, depth: int) -> Code:
    method = method_of(c)
    return [*lines_of(c, [], "if not (TEST):"), [f"x = {method}(x)"], f"x = {layer(c)}"]


@flat
def tensor_dispatch(c: ClassWriter, depth: int) -> Code:
    """Per-pass objects: modules made anew in each forward."""
    line = c.program.pick(
        (
            "act = nn.ReLU() if TEST else nn.Tanh()",
            "act = {0: nn.GELU, 1: nn.ReLU, 2: nn.SiLU}[NUMBER]()",
        )
    )
    return [f"h = {layer(c)}", *lines_of(c, [], line), "x = T.call(act, h)"]


@flat
def reentrant(c: ClassWriter, depth: int) -> Code:
    """A module that calls itself."""
    if c.name == "Net":
        return recursion(c, depth)
    n = c.program.fresh()
    c.init.append(f"self.deep{n} = 0")
    return [
        f"self.deep{n} += 1",
        *lines_of(c, [], f"if self.deep{n} < 3 and self.deep{n} <= NUMBER:"),
        ["x = T.call(self, x)"],
        f"self.deep{n} -= 1",
    ]


@flat
def swapped_parts(c: ClassWriter, depth: int) -> Code:
    """Two parts that change their names between passes."""
    a, b = two_layers(c)
    slot = c.program.slot()
    inner = f"{a.replace('self', 'm')}, {b.replace('self', 'm')}"
    other = f"{b.replace('self', 'm')}, {a.replace('self', 'm')}"
    c.program.prepare += [f"for m in of(model, {c.name}):", [f"if k[{slot}]: {inner} = {other}"]]
    return _then(c, [f"x = T.call({a}, x)"])


@flat
def set_between_passes(c: ClassWriter, depth: int) -> Code:
    """Flags and numbers of torch's own modules."""
    slot = c.program.slot()
    constructor, line = c.program.pick(
        (
            ("nn.ReLU()", "inplace = bool(k[{}])"),
            ("nn.SiLU()", "inplace = k[{}] > 1"),
            ("nn.GELU()", "approximate = 'tanh' if k[{}] else 'none'"),
            ("nn.LeakyReLU(0.1)", "negative_slope = 0.1 + k[{}]"),
            ("nn.PReLU()", "weight.requires_grad = not k[{}]"),
        )
    )
    act = c.part(constructor)
    c.program.prepare += [
        f"for m in of(model, {c.name}):",
        [f"{act.replace('self', 'm')}.{line.format(f'{slot}')}"],
    ]
    return [f"h = {layer(c)}", f"x = T.call({act}, h)"]


@flat
def dropout_flag(c: ClassWriter, depth: int) -> Code:
    """What comes back is a copy in one pass and the very tensor in another."""
    drop = c.part(c.program.pick(("nn.Dropout(0.3)", "nn.Dropout(0.0)", "nn.Identity()")))
    return [
        *lines_of(c, [], f"{drop}.train(bool(TEST))"),
        f"h = {layer(c)}",
        f"p = T.call({drop}, h)",
        f"x = {nonlinearity(c, 'p', fresh=False)}",
    ]


@flat
def aliased(c: ClassWriter, depth: int) -> Code:
    """σ in place of what is, or is not, the same memory as something else."""
    line = c.program.pick(
        (
            "p = T.keep(lambda t: t.contiguous() if v else t.clone(), h)",
            "p = T.keep(lambda t: t if v else t.clone(), h)",
            "p = T.keep(lambda t: t.to(torch.float32 if v else torch.float64), h)",
            "p = T.view(lambda t: t.reshape(t.shape), h) if v else T.keep(lambda t: t + 0, h)",
            "p = T.view(lambda t: t[:], h) if v else T.keep(lambda t: t * 1, h)",
        )
    )
    act = c.program.pick(("T.sig('relu', lambda t: t.relu_(), p)", "T.call(ACT, p)"))
    act = act.replace("ACT", c.part("nn.ReLU(inplace=True)")) if "ACT" in act else act
    return [
        *lines_of(c, [], "v = TEST"),
        f"h = {layer(c)}",
        line,
        f"p = {act}",
        "x = T.vague(lambda a, b: a + b.float(), h, p)",
    ]


@flat
def autocast_part(c: ClassWriter, depth: int) -> Code:
    method = method_of(c)
    line = "with torch.autocast('cpu', torch.bfloat16, enabled=bool(TEST)):"
    return [*lines_of(c, [], line), [f"x = {method}(x)"], "x = T.keep(lambda t: t.float(), x)"]


@flat
def hook_in_forward(c: ClassWriter, depth: int) -> Code:
    """A hook of the user's, set within the forward and taken off again."""
    program, n = c.program, c.program.fresh()
    part = ClassWriter(program, f"Hooked{n}")
    part.body += [f"x = {layer(part)}", f"x = {nonlinearity(part)}", f"x = {layer(part)}"]
    program.top += part.code()
    made = c.part(f"Hooked{n}()")
    hook = c.program.pick(
        (
            f"{made}.register_forward_hook(lambda m, a, o: T.keep(lambda t: t * 0.5, o))",
            f"{made}.register_forward_pre_hook(lambda m, a: (T.keep(lambda t: t * 0.5, a[0]),))",
        )
    )
    return [
        "handle = None",
        *lines_of(c, [], "if TEST:"),
        [f"handle = {hook}"],
        f"x = T.call({made}, x)",
        "if handle is not None: handle.remove()",
        f"x = {nonlinearity(c)}",
    ]


@flat
def stacked_weights(c: ClassWriter, depth: int) -> Code:
    """Weights of experts in one parameter; what they are called is not for us to say."""
    if c.program.family == "img":
        return weights_by_number(c, depth)
    n = c.program.fresh()
    c.init.append(f"self.w{n} = nn.Parameter(torch.randn(3, 6, 6) * 0.3)")
    line = f"h = T.vague(lambda t: F.linear(t, self.w{n}[NUMBER]), x)"
    return [*lines_of(c, [], line), f"x = {nonlinearity(c, 'h')}"]


@flat
def tied(c: ClassWriter, depth: int) -> Code:
    """One layer under two names."""
    a, b = two_layers(c)
    n = c.program.fresh()
    c.init.append(f"self.tied{n} = {a}")
    return _then(c, lines_of(c, [], f"x = T.call(self.tied{n} if TEST else {b}, x)"))


@flat
def escaping(c: ClassWriter, depth: int) -> Code:
    """An exception that ends the pass; the next one goes on."""
    if not c.program.chance(0.4):
        return try_raise(c, 2)
    before: Code = []
    expr = decide(c, before)
    return [*before, f"check(({expr}) == 2)"]


@flat
def dynamic_module(c: ClassWriter, depth: int) -> Code:
    """A part whose class looks up attributes itself."""
    program, n, slot = c.program, c.program.fresh(), c.program.slot()
    part = ClassWriter(program, f"Looked{n}")
    a, b = (p.removeprefix("self.") for p in two_layers(part))
    part.methods += [
        "def __getattr__(self, name):",
        [
            "if name == 'chosen':",
            [f"return self.{b} if self.__dict__.get('second') else self.{a}"],
            "return super().__getattr__(name)",
        ],
    ]
    part.body += ["x = T.call(self.chosen, x)", f"x = {nonlinearity(part)}"]
    program.top += part.code()
    program.prepare += [f"for m in of(model, Looked{n}):", [f"m.second = k[{slot}] > 0"]]
    return [f"x = T.call({c.part(f'Looked{n}()')}, x)"]


@flat
def passed_arguments(c: ClassWriter, depth: int) -> Code:
    """What a part does is told by what it is given."""
    program, n = c.program, c.program.fresh()
    part = ClassWriter(program, f"Given{n}")
    a, b = two_layers(part)
    act = nonlinearity(part)
    before: Code = []
    expr = decide(c, before)
    given, used = program.pick(
        (
            ("{}", "m = {a} if v else {b}"),
            ("None if {} else 1", "m = {a} if v is None else {b}"),
            ("('on', 'off')[{} % 2]", "m = {a} if v == 'on' else {b}"),
            ("[0] * {}", "m = {a} if len(v) else {b}"),
            ("x if {} else None", "m = {a} if v is not None else {b}"),
            ("torch.tensor({})", "m = {a} if v.item() else {b}"),
            ("np.int64({})", "m = ({a}, {b}, {a})[v]"),
            ("{{'k': {}}}", "m = {a} if v['k'] else {b}"),
            ("lambda: {}", "m = {a} if v() else {b}"),
            ("(x, {})", "m = {a} if v[1] else {b}"),
            ("slice({})", "m = ({a}, {b}, {a})[v][-1] if v.stop else {b}"),
        )
    )
    part.body += [
        used.format(a=a, b=b),
        "x = T.call(m, x)",
        f"x = {act}",
    ]
    head, inner = part.code()
    assert isinstance(inner, list)
    place = inner.index("def forward(self, x):")
    inner[place] = "def forward(self, x, v=None):"
    program.top += [head, inner]
    made = c.part(f"Given{n}()")
    keyword = program.pick(("", "v="))
    return [*before, f"x = T.call({made}, x, {keyword}{given.format(expr)})"]


@flat
def several_results(c: ClassWriter, depth: int) -> Code:
    """A method that gives a tuple, a dict or None, as it likes."""
    n = c.program.fresh()
    a, b = two_layers(c)
    before: Code = []
    expr = decide(c, before)
    c.methods += [
        f"def s{n}(self, x):",
        [
            *before,
            f"v = {expr}",
            f"p, q = T.call({a}, x), T.call({b}, x)",
            "if v == 0:",
            ["return p, q"],
            "if v == 1:",
            ["return dict(q=q)"],
            "return None",
        ],
    ]
    return [
        f"r = self.s{n}(x)",
        "if isinstance(r, tuple):",
        ["h, _ = r"],
        "elif r:",
        ["h = r['q']"],
        "else:",
        ["h = x"],
        f"x = {nonlinearity(c, 'h', fresh=False)}",
    ]
