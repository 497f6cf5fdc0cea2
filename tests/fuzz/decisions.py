"""What a program decides by: expressions that give 0, 1 or 2, differing from pass to pass.

Most read something that `prepare(model, k)` sets before each pass; some read the data, a counter, a
random number, or what an earlier pass left behind.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.fuzz.source import Code, Unit
from tests.fuzz.writer import ClassWriter

__all__ = ["DECISIONS", "decide", "truth"]


@dataclass(frozen=True)
class Decision:
    """Templates: {n} is a fresh number, {k} the slot, {C} the class; `m` runs over its instances.

    Attributes:
        expr: what the decision is taken by, an int of 0, 1 or 2; `x` is a tensor at hand.
        init: lines of `__init__`.
        fields: lines of the class.
        top: lines of the module.
        each: what `prepare` does with each instance `m` of the class.
        prepare: what it does once.
        before: statements that run right before.
    """

    expr: str
    init: str = ""
    fields: str = ""
    top: str = ""
    each: str = ""
    prepare: str = ""
    before: str = ""


_D = Decision
DECISIONS: dict[str, Decision] = {
    # -- attributes, and what stands behind them ------------------------------------------------
    "attribute": _D("self.k{n}", init="self.k{n} = 0", each="m.k{n} = k[{k}]"),
    "flag": _D("1 if self.k{n} else 0", init="self.k{n} = False", each="m.k{n} = bool(k[{k}])"),
    "float": _D("int(self.k{n} * 2)", init="self.k{n} = 0.0", each="m.k{n} = k[{k}] / 2"),
    "class attribute": _D("self.c{n}", fields="c{n} = 0", prepare="{C}.c{n} = k[{k}]"),
    "type attribute": _D("type(self).c{n}", fields="c{n} = 0", prepare="{C}.c{n} = k[{k}]"),
    "dict": _D("self.d{n}['k']", init="self.d{n} = dict(k=0)", each="m.d{n}['k'] = k[{k}]"),
    "dict get": _D("self.d{n}.get('k', 0)", init="self.d{n} = dict()", each="put(m.d{n}, k[{k}])"),
    "dict key": _D("int('k' in self.d{n})", init="self.d{n} = dict()", each="put(m.d{n}, k[{k}])"),
    "list": _D("self.l{n}[1]", init="self.l{n} = [0, 0]", each="m.l{n}[1] = k[{k}]"),
    "list length": _D("len(self.l{n})", init="self.l{n} = []", each="m.l{n}[:] = [0] * k[{k}]"),
    "list last": _D("self.l{n}[-1]", init="self.l{n} = [0]", each="m.l{n}.append(k[{k}])"),
    "tuple": _D("self.t{n}[0]", init="self.t{n} = (0,)", each="m.t{n} = (k[{k}],)"),
    "set": _D("int(1 in self.s{n})", init="self.s{n} = set()", each="m.s{n} = {{k[{k}]}}"),
    "string": _D(
        "('off', 'on', 'auto').index(self.k{n})",
        init="self.k{n} = 'off'",
        each="m.k{n} = ('off', 'on', 'auto')[k[{k}]]",
    ),
    "string test": _D(
        "int(self.k{n}.startswith('on'))",
        init="self.k{n} = 'off'",
        each="m.k{n} = ('off', 'only', 'on')[k[{k}]]",
    ),
    "none": _D(
        "int(self.k{n} is None)", init="self.k{n} = 1", each="m.k{n} = None if k[{k}] else 1"
    ),
    "none object": _D(
        "0 if self.k{n} is not None else 1",
        init="self.k{n} = Left()",
        each="m.k{n} = None if k[{k}] else Left()",
    ),
    "isinstance": _D(
        "int(isinstance(self.k{n}, Right))",
        init="self.k{n} = Left()",
        each="m.k{n} = Right() if k[{k}] else Left()",
    ),
    "type": _D(
        "int(type(self.k{n}) is Right)",
        init="self.k{n} = Left()",
        each="m.k{n} = Right() if k[{k}] else Left()",
    ),
    "enum": _D(
        "(Mode.A, Mode.B, Mode.C).index(self.k{n})",
        init="self.k{n} = Mode.A",
        each="m.k{n} = (Mode.A, Mode.B, Mode.C)[k[{k}]]",
    ),
    "hasattr": _D(
        "int(hasattr(self, 'h{n}'))",
        each="m.__dict__.update(h{n}=1) if k[{k}] else m.__dict__.pop('h{n}', None)",
    ),
    "getattr default": _D(
        "getattr(self, 'h{n}', 0)",
        each="m.__dict__.update(h{n}=k[{k}]) if k[{k}] else m.__dict__.pop('h{n}', None)",
    ),
    "namespace": _D(
        "self.o{n}.k", init="self.o{n} = SimpleNamespace(k=0)", each="m.o{n}.k = k[{k}]"
    ),
    "nested": _D(
        "self.o{n}.a['b'][0]",
        init="self.o{n} = SimpleNamespace(a=dict(b=[0]))",
        each="m.o{n}.a['b'][0] = k[{k}]",
    ),
    "dataclass": _D("self.o{n}.k", init="self.o{n} = Config()", each="m.o{n}.k = k[{k}]"),
    "property": _D(
        "self.p{n}",
        init="self._p{n} = 0",
        fields="@property\ndef p{n}(self):\n    return self._p{n}",
        each="m._p{n} = k[{k}]",
    ),
    "mangled": _D("self.__k{n}", init="self.__k{n} = 0", each="setattr(m, '_{C}__k{n}', k[{k}])"),
    "descriptor": _D("self.e{n}", fields="e{n} = Knob()", each="m._knob = k[{k}]"),
    "dynamic attribute": _D(
        "self.o{n}.whatever", init="self.o{n} = Dynamic(0)", each="m.o{n}.value = k[{k}]"
    ),
    "slots": _D("self.o{n}.value", init="self.o{n} = Slotted(0)", each="m.o{n}.value = k[{k}]"),
    "buffer": _D(
        "int(self.b{n})",
        init="self.register_buffer('b{n}', torch.zeros((), dtype=torch.long))",
        each="m.b{n}.fill_(k[{k}])",
    ),
    "buffer item": _D(
        "self.b{n}[1].item()",
        init="self.register_buffer('b{n}', torch.zeros(2, dtype=torch.long))",
        each="m.b{n}.fill_(k[{k}])",
    ),
    "numpy": _D(
        "int(self.a{n}[0])",
        init="self.a{n} = np.zeros(2, dtype=np.int64)",
        each="m.a{n}[0] = k[{k}]",
    ),
    "numpy integer": _D(
        "self.a{n}", init="self.a{n} = np.int64(0)", each="m.a{n} = np.int64(k[{k}])"
    ),
    "training": _D("int(self.training)"),
    "grad mode": _D("int(torch.is_grad_enabled())"),
    "attribute of a part": _D(
        "getattr(self.i{n}, 'k', 0)", init="self.i{n} = nn.Identity()", each="m.i{n}.k = k[{k}]"
    ),
    "number of parts": _D(
        "len(self.l{n})",
        init="self.l{n} = nn.ModuleList()",
        each="m.l{n} = nn.ModuleList(nn.Identity() for _ in range(k[{k}]))",
    ),
    "parameter": _D(
        "int(self.w{n}[0])",
        init="self.w{n} = nn.Parameter(torch.zeros(3))",
        each="m.w{n}.data.fill_(k[{k}])",
    ),
    "frozen parameter": _D(
        "int(self.w{n}.requires_grad)",
        init="self.w{n} = nn.Parameter(torch.zeros(3))",
        each="m.w{n}.requires_grad_(k[{k}] > 0)",
    ),
    "attrgetter": _D(
        "operator.attrgetter('k{n}')(self)", init="self.k{n} = 0", each="m.k{n} = k[{k}]"
    ),
    "vars": _D("vars(self)['k{n}']", init="self.k{n} = 0", each="m.k{n} = k[{k}]"),
    "dict order": _D(
        "next(iter(self.d{n}))",
        init="self.d{n} = {{0: 1, 1: 0}}",
        each="m.d{n} = dict(sorted({{0: 1, 1: 0}}.items(), reverse=k[{k}] > 0))",
    ),
    "missing key": _D(
        "self.d{n}['other']", init="self.d{n} = Missing()", each="m.d{n}.other = k[{k}]"
    ),
    "default of a dict": _D(
        "defaultdict(lambda: self.k{n})['k']", init="self.k{n} = 0", each="m.k{n} = k[{k}]"
    ),
    "cached property": _D(
        "self.p{n}",
        init="self.k{n} = 0",
        fields="@functools.cached_property\ndef p{n}(self):\n    return self.k{n}",
        each="m.k{n} = k[{k}]; m.__dict__.pop('p{n}', None)",
    ),
    "class of the module": _D(
        "int(isinstance(self, tuple(C{n})))",
        top="C{n} = []",
        prepare="C{n}[:] = [{C}] if k[{k}] else []",
    ),
    "instance check": _D(
        "int(isinstance(self, Checked))", prepare="type(Checked).answer = k[{k}] > 0"
    ),
    "single dispatch": _D(
        "kind_of(self.k{n})",
        init="self.k{n} = Left()",
        each="m.k{n} = (Left(), Right(), 0)[k[{k}]]",
    ),
    "weak reference": _D(
        "int(self.r{n}() is None)",
        init="self.r{n} = weakref.ref(Left)",
        each="m.r{n} = weakref.ref(Left() if k[{k}] else Left)",
    ),
    "json": _D(
        "json.loads(self.k{n})['k']",
        init="self.k{n} = json.dumps(dict(k=0))",
        each="m.k{n} = json.dumps(dict(k=k[{k}]))",
    ),
    "slice": _D(
        "len((0, 0, 0)[self.k{n}]) % 3",
        init="self.k{n} = slice(0)",
        each="m.k{n} = slice(k[{k}])",
    ),
    "inference mode": _D("int(torch.is_inference_mode_enabled())"),
    # -- operators of a user's class ------------------------------------------------------------
    "bool": _D("int(bool(self.v{n}))", init="self.v{n} = Value(0)", each="m.v{n}.v = k[{k}]"),
    "len": _D("len(self.v{n})", init="self.v{n} = Value(0)", each="m.v{n}.v = k[{k}]"),
    "eq": _D("int(self.v{n} == 1)", init="self.v{n} = Value(0)", each="m.v{n}.v = k[{k}]"),
    "lt": _D("int(self.v{n} < 1)", init="self.v{n} = Value(0)", each="m.v{n}.v = k[{k}]"),
    "contains": _D("int(1 in self.v{n})", init="self.v{n} = Value(0)", each="m.v{n}.v = k[{k}]"),
    "index": _D("(0, 1, 2)[self.v{n}]", init="self.v{n} = Value(0)", each="m.v{n}.v = k[{k}]"),
    "int": _D("int(self.v{n})", init="self.v{n} = Value(0)", each="m.v{n}.v = k[{k}]"),
    "getitem": _D("self.v{n}['k']", init="self.v{n} = Value(0)", each="m.v{n}.v = k[{k}]"),
    "callable": _D("self.v{n}()", init="self.v{n} = Value(0)", each="m.v{n}.v = k[{k}]"),
    "add": _D("self.v{n} + 0", init="self.v{n} = Value(0)", each="m.v{n}.v = k[{k}]"),
    "iter": _D("sum(self.v{n})", init="self.v{n} = Value(0)", each="m.v{n}.v = k[{k}]"),
    "str": _D("int(str(self.v{n}))", init="self.v{n} = Value(0)", each="m.v{n}.v = k[{k}]"),
    "format": _D("int(f'{{self.v{n}}}')", init="self.v{n} = Value(0)", each="m.v{n}.v = k[{k}]"),
    # -- globals, closures, functions -----------------------------------------------------------
    "global": _D("G{n}", top="G{n} = 0", prepare="global G{n}\nG{n} = k[{k}]"),
    "globals()": _D("globals()['G{n}']", top="G{n} = 0", prepare="globals()['G{n}'] = k[{k}]"),
    "global list": _D("G{n}[0]", top="G{n} = [0]", prepare="G{n}[0] = k[{k}]"),
    "global object": _D("G{n}.k", top="G{n} = Config()", prepare="G{n}.k = k[{k}]"),
    "environment": _D(
        "int(os.environ.get('FUZZ_{n}', '0'))", prepare="os.environ['FUZZ_{n}'] = str(k[{k}])"
    ),
    "closure": _D("get{n}()", top="get{n}, set{n} = cell()", prepare="set{n}(k[{k}])"),
    "default argument": _D(
        "f{n}()",
        top="def f{n}(v=0):\n    return v",
        prepare="f{n}.__defaults__ = (k[{k}],)",
    ),
    "keyword default": _D(
        "f{n}()",
        top="def f{n}(*, v=0):\n    return v",
        prepare="f{n}.__kwdefaults__ = dict(v=k[{k}])",
    ),
    "function attribute": _D(
        "f{n}.v", top="def f{n}():\n    return 0\nf{n}.v = 0", prepare="f{n}.v = k[{k}]"
    ),
    "function rebound": _D(
        "f{n}()",
        top="def zero{n}():\n    return 0\ndef one{n}():\n    return 1\nf{n} = zero{n}",
        prepare="global f{n}\nf{n} = one{n} if k[{k}] else zero{n}",
    ),
    "code replaced": _D(
        "f{n}()",
        top="def zero{n}():\n    return 0\ndef one{n}():\n    return 1\ndef f{n}():\n    return 0",
        prepare="f{n}.__code__ = (one{n} if k[{k}] else zero{n}).__code__",
    ),
    "made by exec": _D(
        "f{n}()",
        top="def f{n}():\n    return 0",
        prepare="exec(f'def f{n}(): return {{k[{k}]}}', globals())",
    ),
    "lambda": _D("self.f{n}()", init="self.f{n} = lambda: 0", each="m.f{n} = lambda v=k[{k}]: v"),
    "partial": _D(
        "self.f{n}()", init="self.f{n} = partial(int, 0)", each="m.f{n} = partial(int, k[{k}])"
    ),
    "method rebound": _D(
        "self.f{n}()",
        fields="def f{n}(self):\n    return 0",
        prepare="{C}.f{n} = (lambda self: 1) if k[{k}] else (lambda self: 0)",
    ),
    "iterator": _D(
        "next(self.i{n}, 0)", init="self.i{n} = iter(())", each="m.i{n} = iter([k[{k}]] * 2)"
    ),
    "context variable": _D(
        "V{n}.get()",
        top="V{n} = contextvars.ContextVar('V{n}', default=0)",
        prepare="V{n}.set(k[{k}])",
    ),
    "thread local": _D(
        "L{n}.k", top="L{n} = threading.local()\nL{n}.k = 0", prepare="L{n}.k = k[{k}]"
    ),
    "module of the program": _D(
        "M{n}.k", top="M{n} = types.ModuleType('M{n}')\nM{n}.k = 0", prepare="M{n}.k = k[{k}]"
    ),
    "weak dictionary": _D(
        "W{n}.get(self, 0)", top="W{n} = weakref.WeakKeyDictionary()", each="W{n}[m] = k[{k}]"
    ),
    "queue": _D(
        "self.q{n}.popleft() if self.q{n} else 0",
        init="self.q{n} = deque()",
        each="m.q{n}.append(k[{k}])",
    ),
    "cached function": _D(
        "f{n}(x.shape[0])",
        top="N{n} = []\n@functools.lru_cache(None)\ndef f{n}(a):\n    N{n}.append(a)\n"
        "    return len(N{n}) % 3",
    ),
    "kept generator": _D("next(self.g{n})", init="self.g{n} = (v % 3 for v in itertools.count())"),
    # -- state that the passes themselves change ------------------------------------------------
    "counter": _D("self.n{n} % 3", init="self.n{n} = 0", before="self.n{n} += 1"),
    "counter of two": _D("self.n{n} // 2 % 2", init="self.n{n} = 0", before="self.n{n} += 1"),
    "global counter": _D("next(N{n}) % 2", top="N{n} = itertools.count()"),
    "toggle": _D("int(self.n{n})", init="self.n{n} = False", before="self.n{n} = not self.n{n}"),
    "cycle": _D("next(self.n{n})", init="self.n{n} = Cycle((0, 1, 0, 2))"),
    "seen before": _D(
        "int(len(self.n{n}) > 3)", init="self.n{n} = []", before="self.n{n}.append(x.shape[0])"
    ),
    "last pass": _D(
        "int(self.n{n} > 0)",
        init="self.n{n} = 0.0\nself.o{n} = 0.0",
        before="self.n{n}, self.o{n} = self.o{n}, x.detach().mean().item()",
    ),
    "tensor of the last pass": _D(
        "int(self.n{n} is not None and self.n{n}.mean() > 0)",
        init="self.n{n} = None\nself.o{n} = None",
        before="self.n{n}, self.o{n} = self.o{n}, x.detach().clone()",
    ),
    # -- chance ---------------------------------------------------------------------------------
    "random": _D("int(random.random() < 0.5)"),
    "randint": _D("random.randint(0, 2)"),
    "random choice": _D("random.choice((0, 1, 2))"),
    "numpy random": _D("int(np.random.rand() < 0.5)"),
    "torch random": _D("int(torch.rand(()).item() < 0.5)"),
    "torch randint": _D("int(torch.randint(0, 3, (1,)))"),
    "torch randperm": _D("torch.randperm(3).tolist()[0]"),
    "seed": _D("torch.initial_seed() % 3"),
    "random state": _D("int(torch.get_rng_state().sum()) % 2"),
    # -- data -----------------------------------------------------------------------------------
    "mean": _D("int(x.mean() > 0)"),
    "bool of tensor": _D("1 if (x.sum() > 0) else 0"),
    "item": _D("int(x.detach().sum().item() > 0)"),
    "tolist": _D("int(x.detach().flatten().tolist()[0] > 0)"),
    "max": _D("int(x.max().item() > 1)"),
    "argmax": _D("int(x.detach().flatten()[:3].argmax())"),
    "count": _D("int((x > 0).sum()) % 3"),
    "any": _D("int((x > 1.5).any())"),
    "nonzero": _D("len((x > 0).nonzero()) % 2"),
    "unique": _D("torch.unique(x.detach().sign()).numel() % 3"),
    "numpy of tensor": _D("int(x.detach().cpu().numpy().sum() > 0)"),
    "float of tensor": _D("int(float(x.detach().std()) > 1)"),
    "allclose": _D("int(torch.allclose(x, x.abs(), atol=1.0))"),
    "equal": _D("int(torch.equal(x.sign()[0], x.sign()[1]))"),
    "print": _D("int('-' in f'{{x.detach().mean().item():.3f}}')"),
    "bytes": _D("x.detach().to(torch.uint8).cpu().numpy().tobytes()[0] % 3"),
    "iteration of tensor": _D("int(next(iter(x.detach().flatten())) > 0)"),
    "batch size": _D("x.shape[0] % 3"),
    "batch size less one": _D("(x.shape[0] - 1) % 3"),
    "length": _D("len(x) % 2"),
    "last size": _D("x.size(-2) % 3"),
    "numel": _D("x.numel() // 6 % 2"),
    "dtype": _D("int(x.dtype == torch.float32)"),
    "requires grad": _D("int(x.requires_grad)"),
    "contiguous": _D("int(x.is_contiguous())"),
    "graph": _D("int(x.grad_fn is None)"),
    "leaf": _D("int(x.is_leaf)"),
    "stride": _D("x.stride(-1) % 3"),
    "complex comparison": _D("int(bool((x > -9).all()) and x.amax().item() > 0.5)"),
    "cpu numbers": _D("sum(v > 1 for v in x.detach().flatten()[:5].tolist()) % 3"),
    "min over rows": _D("min(range(len(x)), key=lambda i: x[i].sum().item()) % 3"),
    "sorted rows": _D("x.detach().flatten(1).sum(1).argsort().tolist()[0] % 3"),
    "in tensor": _D("int(1 in (x.detach() > 2).long())"),
    "string of tensor": _D("len(str(x.detach().flatten()[0].item() > 0)) % 2"),
    "global data": _D(
        "int(G{n}.sum() > 0)", top="G{n} = torch.zeros(2)", prepare="G{n}.fill_(k[{k}])"
    ),
}


def decide(c: ClassWriter, before: Code) -> str:
    """Draw a decision about the tensor `x`: an expression of 0, 1 or 2.

    Args:
        c: the class in whose methods it is read.
        before: gets what has to run first.
    """
    program = c.program
    if c.arguments and program.chance(0.08):
        program.drawn["by argument"] += 1
        return "(self.flag or 0)"
    name = program.pick(list(DECISIONS))
    program.drawn[f"by {name}"] += 1
    chosen = DECISIONS[name]
    slot = program.slot() if "{k}" in chosen.each + chosen.prepare else 0
    values = {"n": program.fresh(), "k": slot, "C": c.name}

    def filled(template: str) -> Code:
        return [*template.format(**values).split("\n")] if template else []

    c.init += filled(chosen.init)
    c.fields += filled(chosen.fields)
    program.top.append(Unit(filled(chosen.top)))
    program.prepare.append(Unit(filled(chosen.prepare)))
    if chosen.each:
        program.prepare += [f"for m in of(model, {c.name}):", filled(chosen.each)]
    before += filled(chosen.before)
    return f"({chosen.expr.format(**values)})"


_CONDITIONS = (
    "({0}) > 0",
    "({0}) == 1",
    "not ({0})",
    "0 < ({0}) < 2",
    "({0}) in (1, 2)",
    "bool({0})",
    "({0}) and True",
    "({0}) or False",
    "({0}) != 1",
    "(({0}) if True else 0)",
    "any(({0},))",
    "max(({0}), 0) > 0",
    "(v := ({0})) > 0",
    "({0}) is not None and ({0}) >= 1",
)


def truth(c: ClassWriter, before: Code) -> str:
    """A condition, in one of the ways to write one."""
    return c.program.pick(_CONDITIONS).format(decide(c, before))
