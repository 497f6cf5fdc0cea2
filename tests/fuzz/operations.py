"""What runs in a straight line: layers, nonlinearities, sums, views. `x` keeps its shape."""

from __future__ import annotations

from tests.fuzz.source import Code, Unit
from tests.fuzz.writer import ClassWriter

__all__ = ["layer", "nonlinearity", "operation", "sigma", "sigma_callable", "sigma_module"]

# As functions of `{}`; the second column works in place.
_FUNCTIONS = (
    ("relu", "F.relu({})"),
    ("relu", "torch.relu({})"),
    ("relu", "{}.relu()"),
    ("tanh", "torch.tanh({})"),
    ("tanh", "{}.tanh()"),
    ("sigmoid", "torch.sigmoid({})"),
    ("gelu", "F.gelu({})"),
    ("gelu", "F.gelu({}, approximate='tanh')"),
    ("silu", "F.silu({})"),
    ("leaky_relu", "F.leaky_relu({}, 0.1)"),
    ("elu", "F.elu({})"),
    ("softplus", "F.softplus({})"),
    ("hardswish", "F.hardswish({})"),
    ("relu6", "F.relu6({})"),
    ("mish", "F.mish({})"),
    ("softsign", "F.softsign({})"),
    ("hardtanh", "F.hardtanh({})"),
    ("hardsigmoid", "F.hardsigmoid({})"),
    ("celu", "F.celu({})"),
    ("selu", "torch.selu({})"),
    ("logsigmoid", "F.logsigmoid({})"),
    ("tanhshrink", "F.tanhshrink({})"),
    ("softshrink", "F.softshrink({}, 0.1)"),
    ("hardshrink", "{}.hardshrink(0.1)"),
    ("threshold", "F.threshold({}, 0.1, 0.0)"),
    ("relu", "torch.ops.aten.relu({})"),
    ("relu", "torch.ops.aten.relu.default({})"),
    ("sigmoid", "torch.special.expit({})"),
    ("relu", "getattr(torch, 'relu')({})"),
    ("relu", "torch.Tensor.relu({})"),
    ("clamp", "{}.clamp(min=0)"),
    ("clamp", "torch.clamp({}, 0, None)"),
    ("maximum", "torch.maximum({}, torch.zeros_like({}))"),
    ("maximum", "torch.maximum({}, 0.1 * {})"),
    ("where", "torch.where({} > 0, {}, 0.1 * {})"),
    ("mul", "{} * ({} > 0)"),
    ("masked_fill", "{}.masked_fill({} < 0, 0)"),
)
_IN_PLACE = (
    ("relu", "F.relu({}, inplace=True)"),
    ("relu", "{}.relu_()"),
    ("relu", "torch.relu_({})"),
    ("tanh", "{}.tanh_()"),
    ("sigmoid", "{}.sigmoid_()"),
    ("silu", "F.silu({}, inplace=True)"),
    ("leaky_relu", "F.leaky_relu({}, 0.1, inplace=True)"),
    ("elu", "F.elu({}, inplace=True)"),
    ("relu6", "F.relu6({}, inplace=True)"),
    ("elu", "F.elu_({})"),
    ("hardtanh", "F.hardtanh_({})"),
    ("celu", "torch.celu_({})"),
    ("selu", "F.selu({}, inplace=True)"),
    ("relu", "torch.ops.aten.relu_({})"),
    ("mish", "F.mish({}, inplace=True)"),
    ("clamp", "{}.clamp_(min=0)"),
    ("clamp_min", "torch.clamp_min_({}, 0)"),
)
_MODULES = (
    "nn.ReLU()",
    "nn.ReLU(inplace=True)",
    "nn.GELU()",
    "nn.SiLU(inplace=True)",
    "nn.Tanh()",
    "nn.Sigmoid()",
    "nn.ELU(inplace=True)",
    "nn.LeakyReLU(0.1, inplace=True)",
    "nn.PReLU()",
    "nn.Mish()",
    "nn.Hardswish()",
    "nn.Softsign()",
    "Swish()",
    "HandSwish()",
    "Bent()",
)
_CALLABLES = ("F.relu", "torch.tanh", "torch.sigmoid", "F.gelu", "F.silu", "F.softplus", "F.mish")


def sigma(c: ClassWriter, operand: str, fresh: bool = True) -> str:
    """σ of an expression, as a function or method; in place where `operand` is nobody else's."""
    in_place = fresh and c.program.chance(0.35 if c.program.in_place else 0.15)
    name, form = c.program.pick(_IN_PLACE if in_place else _FUNCTIONS)
    return f"T.sig('{name}', lambda t: {form.replace('{}', 't')}, {operand})"


def sigma_module(c: ClassWriter) -> str:
    """A module that is σ; perhaps one that the class has."""
    known = c.known.setdefault("sigma", [])
    if known and c.program.chance(0.4):
        return c.program.pick(known)
    known.append(c.part(c.program.pick(_MODULES)))
    return known[-1]


def sigma_callable(c: ClassWriter) -> str:
    """Something that is σ when `T.call`ed: a function or a module."""
    return c.program.pick(_CALLABLES) if c.program.chance(0.5) else sigma_module(c)


def layer(c: ClassWriter, operand: str = "x", new: bool = False) -> str:
    """A layer of an expression, perhaps with a norm after it."""
    program = c.program
    if program.chance(0.15):
        part = c.layer(new)
        weight, bias = f"{part}.weight", f"{part}.bias"
        if program.family == "img":
            if c.made[part] != "nn.Conv2d(6, 6, 1)":
                return f"T.call({part}, {operand})"
            return f"T.weigh({part}, 1, lambda t: F.conv2d(t, {weight}, {bias}), {operand})"
        form = program.pick(
            (f"F.linear(t, {weight}, {bias})", f"t @ {weight}.t()", f"torch.matmul(t, {weight}.T)")
        )
        return f"T.weigh({part}, -1, lambda t: {form}, {operand})"
    made = f"T.call({c.layer(new)}, {operand})"
    return f"T.call({c.norm()}, {made})" if program.chance(0.25) else made


def nonlinearity(c: ClassWriter, operand: str = "x", fresh: bool = True) -> str:
    """σ in one of its forms."""
    if c.program.chance(0.4):
        return f"T.call({sigma_module(c)}, {operand})"
    return sigma(c, operand, fresh)


def operation(c: ClassWriter) -> Unit:
    """A statement or two that leave `x` of the shape that it has."""
    program = c.program
    kinds = [_plain, _plain, _plain, _residual, _gate, _quiet, _quiet, _views, _mixed, _kept]
    kinds += [_odd, _odd, _weights, _attention]
    if program.in_place:
        kinds += [_writes, _writes]
    if c.blocks:
        kinds += [_block]
    if program.family == "img":
        kinds += [_image]
    return Unit(program.pick(kinds)(c))


def _plain(c: ClassWriter) -> Code:
    match c.program.rng.randrange(5):
        case 0:
            return [f"x = {nonlinearity(c, layer(c))}"]
        case 1:
            return [f"x = {layer(c)}", f"x = {nonlinearity(c)}"]
        case 2:
            return [f"x = {layer(c)}"]
        case 3:
            parts = f"nn.Sequential({c.constructor('layer')}, {c.constructor('norm')}, nn.ReLU())"
            return [f"x = T.call({c.part(parts)}, x)"]
        case _:
            return [f"h = {layer(c)}", "y = x", f"x = {nonlinearity(c, 'h')}"]


def _residual(c: ClassWriter) -> Code:
    inner = layer(c)
    sum_, *more = c.program.pick(
        (
            ("T.keep(lambda a, b: a + b, h, x)",),
            ("T.keep(lambda a, b: a + b, x, h)",),
            ("T.keep(lambda a, b: torch.add(a, b), h, y)",),
            ("T.keep(lambda a, b: a - b * 0.5, h, x)",),
            ("T.aug('+', h, x)", "x = h"),
            ("T.keep(lambda a, b: torch.lerp(a, b, 0.5), h, x)",),
        )
    )
    target = "h" if more else "x"
    after = [f"x = {nonlinearity(c)}"] if c.program.chance(0.7) else []
    return [f"h = {inner}", f"{target} = {sum_}", *more, *after]


def _gate(c: ClassWriter) -> Code:
    first, second = c.layer(), c.layer()
    return c.program.pick(
        (
            [
                f"h = T.call({first}, x)",
                "x = T.keep(lambda a, b: a * b, T.sig('tanh', lambda t: torch.tanh(t), h), "
                "T.sig('sigmoid', lambda t: torch.sigmoid(t), h))",
            ],
            [
                f"x = T.keep(lambda a, b: a * b, T.sig('silu', lambda t: F.silu(t), "
                f"T.call({first}, x)), T.call({second}, x))"
            ],
            [
                f"g = T.sig('sigmoid', lambda t: t.sigmoid(), T.call({second}, x))",
                f"x = T.keep(lambda a, b: a * b, T.call({first}, x), g)",
                f"x = {nonlinearity(c)}",
            ],
        )
    )


def _quiet(c: ClassWriter) -> Code:
    """Between a layer and σ: what keeps the filters."""
    scale = "g.view(6, 1, 1)" if c.program.family == "img" else "g"
    number = c.program.pick(("0.9", "0.5", "1.1"))
    line = c.program.pick(
        (
            "y = x",
            "y = T.keep(lambda t: t.clone(), x)",
            f"x = T.keep(lambda t: t * {number}, x)",
            f"x = T.keep(lambda t: {number} * t + 0.1, x)",
            "x = T.keep(lambda t: F.dropout(t, 0.3, self.training), x)",
            f"x = T.call({c.part('nn.Dropout(0.2)')}, x)",
            f"x = T.call({c.part('nn.Identity()')}, x)",
            f"x = T.keep(lambda t: t * {scale.replace('g', 'self.g', 1)}, x)",
            "x = T.keep(lambda t: t.contiguous(), x)",
            "x = T.keep(lambda t: t.double().float(), x)",
            "x = T.keep(lambda a, b: a + b, x, y)",
            "x = T.keep(lambda t: t + torch.randn_like(t) * 0.1, x)",
            "x = T.keep(lambda t: t.detach(), x)",
            "x, y = y, x",
            f"x = T.call({c.norm()}, x)",
            "x = T.keep(lambda t: t / (t.detach().abs().max() + 1), x)",
        )
    )
    if "self.g" in line:
        c.parameter()
    return [line]


def _views(c: ClassWriter) -> Code:
    """Changes of layout on the way to σ, and back."""
    family = c.program.family
    act = nonlinearity(c, "h", fresh=False)
    start = [f"h = {layer(c)}"] if c.program.chance(0.7) else ["h = x"]
    shared = [
        (
            "h = T.view(lambda t: t.unsqueeze(0), h)",
            "x = T.view(lambda t: t.squeeze(0), h)",
        ),
        (
            "h = T.view(lambda t: t.transpose(0, 1), h)",
            "x = T.view(lambda t: t.transpose(0, 1), h)",
        ),
        (
            "h = T.view(lambda t: t[None, ..., :], h)",
            "x = T.view(lambda t: t[0], h)",
        ),
        (
            "h = T.view(lambda t: t.reshape(1, *t.shape), h)",
            "x = T.view(lambda t: t.view(t.shape[1:]), h)",
        ),
        (
            "h = T.view(lambda t: t.flip(0), h)",
            "x = T.view(lambda t: t.flip(0), h)",
        ),
    ]
    own = {
        "vec": [
            (
                "h = T.view(lambda t: t.view(t.shape[0], 2, 3), h)",
                "x = T.view(lambda t: t.flatten(1), h)",
            ),
            ("h = T.view(lambda t: t.t(), h)", "x = T.view(lambda t: t.t(), h)"),
        ],
        "seq": [
            (
                "h = T.view(lambda t: t.view(t.shape[0], t.shape[1], 3, 2).transpose(1, 2), h)",
                "x = T.view(lambda t: t.transpose(1, 2).flatten(2), h)",
            ),
            (
                "h = T.view(lambda t: t.flatten(0, 1), h)",
                "x = T.view(lambda t: t.view(-1, self.length, 6), h)",
            ),
            (
                "h = T.view(lambda t: t.permute(0, 2, 1), h)",
                "x = T.view(lambda t: t.permute(0, 2, 1), h)",
            ),
        ],
        "img": [
            (
                "h = T.view(lambda t: t.permute(0, 2, 3, 1), h)",
                "x = T.view(lambda t: t.permute(0, 3, 1, 2), h)",
            ),
            (
                "h = T.view(lambda t: t.flatten(2), h)",
                "x = T.view(lambda t: t.unflatten(2, (self.length, -1)), h)",
            ),
            (
                "h = T.view(lambda t: t.flatten(2).transpose(1, 2), h)",
                "x = T.view(lambda t: t.transpose(1, 2).unflatten(2, (self.length, -1)), h)",
            ),
        ],
    }[family]
    there, back = c.program.pick(shared + own)
    if "self.length" in back:
        start = ["self.length = x.shape[-2]", *start]
    return [*start, there, f"h = {act}", back]


def _mixed(c: ClassWriter) -> Code:
    """Pieces of the filters, filters of several layers, positions joined."""
    family, axis = c.program.family, c.program.axis
    dim = c.program.pick((axis, axis - {"vec": 2, "seq": 3, "img": 4}[family]))
    width = {"vec": "nn.Linear(12, 6)", "seq": "nn.Linear(12, 6)", "img": "nn.Conv2d(12, 6, 1)"}
    norm = {"vec": "nn.LayerNorm(12)", "seq": "nn.LayerNorm(12)", "img": "nn.BatchNorm2d(12)"}
    act = nonlinearity(c, "h")
    match c.program.rng.randrange(9):
        case 0:  # two layers' filters: nobody's
            both = f"T.lose(lambda a, b: torch.cat([a, b], {dim}), {layer(c)}, y)"
            return [f"h = {both}", f"h = {act}", f"x = T.call({c.part(width[family])}, h)"]
        case 1:  # the norm's
            both = f"T.lose(lambda a, b: torch.cat([a, b], {dim}), {layer(c)}, x)"
            h = f"T.call({c.part(norm[family])}, {both})"
            return [f"h = {h}", f"h = {act}", f"x = T.call({c.part(width[family])}, h)"]
        case 2:  # put together again
            cut = c.program.pick(
                (f"t.chunk(2, {dim})", f"t.split(2, {dim})", f"torch.split(t, [1, 5], {dim})")
            )
            return [
                f"h = {layer(c)}",
                f"h = T.view(lambda t: torch.cat({cut}, {dim}), h)",
                f"x = {act}",
            ]
        case 3:  # the other way round
            cut = f"torch.cat(t.chunk(2, {dim})[::-1], {dim})"
            return [f"h = T.loose(lambda t: {cut}, {layer(c)})", f"x = {act}"]
        case 4:  # each half its own σ
            first, second = nonlinearity(c, "p"), nonlinearity(c, "q")
            return [
                f"p, q = T.view(lambda t: t.chunk(2, {dim}), {layer(c)})",
                f"p = {first}",
                f"q = {second}",
                f"x = T.lose(lambda a, b: torch.cat((a, b), {dim}), p, q)",
            ]
        case 5:  # along the batch they stay
            both = f"T.view(lambda t: torch.cat([t, t.flip(0)], 0), {layer(c)})"
            return [f"h = {both}", f"h = {act}", "x = T.keep(lambda a, b: a + b.mean(), x, h)"]
        case 6:  # rows of two layers
            join = c.program.pick(("torch.cat", "torch.stack"))
            both = f"T.mix(lambda a, b: {join}([a, b]), {layer(c)}, y)"
            return [f"h = {both}", f"h = {act}", "x = T.keep(lambda a, b: a + b.mean(), x, h)"]
        case 7:  # rows with other filters of one layer
            part = c.part(c.constructor("layer").replace("6, 6", "6, 12"))
            both = f"T.loose(lambda t: torch.cat(t.chunk(2, {dim})), T.call({part}, x))"
            return [f"h = {both}", f"h = {act}", "x = T.keep(lambda a, b: a + b.mean(), x, h)"]
        case _:  # a mean over positions or the batch
            over = c.program.pick(list(range({"vec": 2, "seq": 3, "img": 4}[family])))
            if over == axis:
                h = f"T.lose(lambda t: t.mean({over}), {layer(c)})"
            else:
                h = f"T.reduce({over}, lambda t: t.mean({over}), {layer(c)})"
            return [f"h = {h}", f"h = {act}", "x = T.keep(lambda a, b: a + b.mean(), x, h)"]


def _kept(c: ClassWriter) -> Code:
    """Tensors kept on self: within a pass, and from one to the next."""
    n = c.program.fresh()
    match c.program.rng.randrange(9):
        case 0:
            return [f"self.x{n} = x", f"x = {layer(c)}", f"x = {nonlinearity(c)}", f"y = self.x{n}"]
        case 1:  # from the pass before: a constant of this one
            c.init.append(f"self.x{n} = None")
            return [
                f"h = {layer(c)}",
                f"if self.x{n} is not None and self.x{n}.shape == x.shape:",
                [f"h = T.keep(lambda a, b: a + b, h, self.x{n})"],
                f"self.x{n} = x.detach().clone()",
                f"x = {nonlinearity(c, 'h')}",
            ]
        case 2:  # keys and values
            c.init.append(f"self.x{n} = []")
            dim = 0 if c.program.family == "vec" else 1 if c.program.family == "seq" else 2
            shape = "h.shape[1:]" if dim == 0 else "h.shape[2:]" if dim == 1 else "h.shape[3:]"
            fits = f"{shape} == self.x{n}[0]{shape[1:]}"
            if dim:
                fits += f" and len(h) == len(self.x{n}[0])"
            both = f"T.vague(lambda a, b: torch.cat([a, b], {dim}), self.x{n}[0], h)"
            return [
                f"h = {layer(c)}",
                f"if self.x{n} and {fits}:",
                [
                    f"h = {both}",
                    f"self.x{n}[0] = h.detach().clone().narrow({dim}, 0, min(4, h.shape[{dim}]))",
                ],
                "else:",
                [f"self.x{n}[:] = [h.detach().clone()]"],
                f"h = {nonlinearity(c, 'h', fresh=False)}",
                "x = T.keep(lambda a, b: a + b.mean(), x, h)",
            ]
        case 3:  # a buffer of its own
            c.init.append(f"self.x{n} = torch.zeros(0)")
            return [
                f"if self.x{n}.shape != x.shape:",
                [f"self.x{n} = torch.zeros_like(x)"],
                f"h = T.takes(lambda a, b: a.copy_(b), self.x{n}, {layer(c)})",
                f"h = {sigma(c, 'h')}",
                "x = T.keep(lambda a, b: a + b, x, h)",
            ]
        case 4:  # layers that are no parts: what they are called is not for us to say
            c.init.append(f"self.x{n} = [{c.constructor('layer')}, {c.constructor('layer')}]")
            return [f"for m in self.x{n}:", ["x = T.call(m, x)", f"x = {nonlinearity(c)}"]]
        case 5:  # one that is made when it is first needed
            c.init.append(f"self.x{n} = None")
            return [
                f"if self.x{n} is None:",
                [f"self.x{n} = {c.constructor('layer')}"],
                f"x = T.call(self.x{n}, x)",
                f"x = {nonlinearity(c)}",
            ]
        case 6:  # messages between rows
            return [
                f"h = {layer(c)}",
                "i = torch.arange(len(h)).flip(0)",
                "h = T.loose(lambda t: torch.zeros_like(t).index_add(0, i, t), h)",
                f"x = {nonlinearity(c, 'h')}",
            ]
        case 7:  # a list of tensors of this pass
            return [
                "hs = []",
                "hs.append(x)",
                f"hs.append({layer(c)})",
                "x = hs[1]",
                f"x = {nonlinearity(c)}",
                "y = hs.pop(0)",
            ]
        case _:
            act = nonlinearity(c, "box['h']")
            return [f"box = dict(h={layer(c)})", f"x = {act}", "box.clear()"]


def _odd(c: ClassWriter) -> Code:
    """What is seldom between a layer and σ, or how σ is seldom called."""
    family, axis = c.program.family, c.program.axis
    wide = {"img": "nn.Conv2d(6, 12, 1)"}.get(family, "nn.Linear(6, 12)")
    lead = ":, " * axis
    whole = [  # `h` keeps its shape
        "h = T.keep(lambda t: t.masked_fill(t > 2, 0.5), h)",
        "h = T.mix(lambda a, b: torch.where(torch.rand(a.shape) > 0.5, a, b), h, y)",
        "h = T.keep(lambda a, b: torch.addcmul(a, b, b), h, y)",
        "h = T.keep(lambda a, b: sum([a, b]), h, y)",
        "h = T.mix(lambda a, b: torch.stack([a, b]).sum(0), h, y)",
        "h = T.view(lambda t: t[torch.arange(len(t) - 1, -1, -1)], h)",
        f"h = T.vague(lambda t: t.softmax({axis}), h)",
        sigma(c, "h", fresh=False),
    ]
    other = [  # it does not
        "h = T.view(lambda t: t.expand(2, *t.shape), h)",
        "h = T.view(lambda t: t.index_select(0, torch.arange(1)), h)",
        "h = T.view(lambda t: t[0], h)",
        "h = T.reduce(0, lambda t: t.amax(0), h)",
        "h = T.loose(lambda t: t.repeat_interleave(2, 0), h)",
    ]
    if family == "img":
        whole += [
            "h = T.loose(lambda t: t.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2), h)",
            "h = T.keep(lambda t: t.contiguous(memory_format=torch.channels_last), h)",
        ]
    else:
        whole += [
            "h = T.keep(lambda t: F.layer_norm(t, (6,)), h)",
            "h = T.keep(lambda t: F.normalize(t, dim=-1), h)",
        ]
    if family == "seq":
        whole += ["h = T.loose(lambda t: t.cumsum(1) * 0 + t, h)"]
        other += ["h = T.view(lambda t: t.unflatten(-1, (2, 3)).permute(2, 0, 1, 3), h)"]
    mean = "x = T.keep(lambda a, b: a + b.mean(), x, h)"
    match c.program.rng.randrange(12):
        case 0 | 1 | 2 | 3:
            return [f"h = {layer(c)}", c.program.pick(whole), f"x = {nonlinearity(c, 'h')}"]
        case 4 | 5:
            line = c.program.pick(other)
            return [f"h = {layer(c)}", line, f"h = {nonlinearity(c, 'h', fresh=False)}", mean]
        case 6:
            made = f"T.call({c.part(wide)}, x)"
            if c.program.chance(0.5):
                return [f"x = T.call({c.part(f'nn.GLU({axis})')}, {made})"]
            return [f"x = T.sig('glu', lambda t: F.glu(t, {axis}), {made})"]
        case 7:  # without a batch
            line = f"h = T.call({c.layer()}, T.view(lambda t: t[0], x))"
            return [line, f"h = {nonlinearity(c, 'h', fresh=False)}", mean]
        case 8:
            return [f"x = T.call({c.layer()}, input=x)", f"x = {nonlinearity(c)}"]
        case 9:  # in place, of a part
            part = f"T.view(lambda t: t[{lead}:3], h)"
            line = f"T.sig('relu', lambda t: t.relu_(), {part})"
            return [f"h = {layer(c)}", line, "T.note(h)", f"x = {nonlinearity(c, 'h')}"]
        case 10:  # of a parameter
            line = f"h = T.sig('softplus', lambda t: F.softplus(t), {c.parameter()})"
            return [line, "x = T.keep(lambda a, b: a * b.mean(), x, h)"]
        case _:
            return _of_family(c, wide, mean)


def _of_family(c: ClassWriter, wide: str, mean: str) -> Code:
    act = nonlinearity(c, "h")
    if c.program.family == "vec":
        return [f"h = T.call({c.part('nn.Bilinear(6, 6, 6)')}, x, y)", f"x = {act}"]
    if c.program.family == "seq":
        made = f"T.call({c.part('nn.Conv1d(6, 6, 3, padding=1)')}, h)"
        return [
            "h = T.view(lambda t: t.transpose(1, 2), x)",
            f"h = {made}",
            f"h = {act}",
            "x = T.view(lambda t: t.transpose(1, 2), h)",
        ]
    if c.program.chance(0.3):
        made = f"T.call({c.part(wide)}, x)"
        return [f"h = T.lose(lambda t: F.pixel_shuffle(t, 2), {made})", f"h = {act}", mean]
    narrow, widen = c.part("nn.Conv2d(6, 2, 1)"), c.part("nn.Conv2d(2, 6, 1)")
    return [
        "s = T.resize(lambda t: t.mean((2, 3), keepdim=True), x)",
        f"s = T.sig('relu', lambda t: F.relu(t), T.call({narrow}, s))",
        f"s = T.sig('sigmoid', lambda t: t.sigmoid(), T.call({widen}, s))",
        "x = T.keep(lambda a, b: a * b, s, x)",
        f"x = {nonlinearity(c)}",
    ]


def _weights(c: ClassWriter) -> Code:
    """Weights used by functions, whole and in part."""
    if c.program.family == "img":
        return _plain(c)
    part = c.layer()
    letters = "nc,oc->no" if c.program.family == "vec" else "ntc,oc->nto"
    match c.program.rng.randrange(4):
        case 0:
            call = f"torch.einsum('{letters}', t, {part}.weight)"
        case 1:
            call = f"torch.matmul(t, {part}.weight.mT)"
        case 2:
            return [
                f"h = T.rows({part}, 2, -1, lambda t: F.linear(t, {part}.weight[2:5]), x)",
                f"h = {nonlinearity(c, 'h')}",
                "x = T.keep(lambda a, b: a + b.mean(), x, h)",
            ]
        case _:
            wrapped = c.part("nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))")
            return [f"x = T.call({wrapped}, x)", f"x = {nonlinearity(c)}"]
    return [f"h = T.weigh({part}, -1, lambda t: {call}, x)", f"x = {nonlinearity(c, 'h')}"]


def _attention(c: ClassWriter) -> Code:
    """Queries, keys and values of one layer; products of data are no one's maps."""
    if c.program.family != "seq":
        return _gate(c)
    qkv, out = c.part("nn.Linear(6, 18)"), c.part("nn.Linear(6, 6)")
    cut = c.program.pick(("t.chunk(3, -1)", "t.split(6, -1)", "t.unflatten(-1, (3, 6)).unbind(-2)"))
    lines: Code = [f"p, q, r = T.view(lambda t: {cut}, T.call({qkv}, x))"]
    if c.program.chance(0.5):
        lines += [f"p = {sigma(c, 'p', fresh=False)}", f"q = {sigma(c, 'q', fresh=False)}"]
    mixed = c.program.pick(
        (
            "T.vague(lambda a, b, d: (a @ b.transpose(1, 2)).softmax(-1) @ d, p, q, r)",
            "T.vague(lambda a, b, d: F.scaled_dot_product_attention(a, b, d), p, q, r)",
        )
    )
    lines += [f"h = {mixed}"]
    if c.program.chance(0.5):
        lines += [f"h = {nonlinearity(c, 'h')}"]
    return [*lines, f"x = T.keep(lambda a, b: a + b, x, T.call({out}, h))"]


def _writes(c: ClassWriter) -> Code:
    """Writes in place, to z, to a and to what is shared."""
    dim = c.program.axis
    return c.program.pick(
        (
            ["x = T.keep(lambda t: t.mul_(0.9), x)"],
            ["x = T.aug('*', x, 0.9)"],
            ["x = T.aug('+', x, 0.1)"],
            ["x = T.aug('+', x, y)"],
            ["y = T.aug('+', y, x)", "x = y"],
            ["y = T.keep(lambda t: t.mul_(0.5), y)"],
            ["y = T.keep(lambda t: t.neg_(), y)"],
            ["x = T.keep(lambda t: t.clamp_(-3, 3), x)"],
            [f"h = {layer(c)}", f"x = {nonlinearity(c, 'h', False)}", "x = T.aug('*', x, 0.5)"],
            [
                f"h = {layer(c)}",
                f"x = {nonlinearity(c, 'h', False)}",
                "h.zero_()",
            ],
            [f"h = {layer(c)}", f"h = {sigma(c, 'h')}", "h.add_(0.1)", "x = h"],
            ["x[0] = x[0] * 0.5"],
            ["x = T.keep(lambda t: t.copy_(t.flip(0)), x)"],
            [f"x.narrow({dim}, 0, 2).mul_(0.5)"],
            ["x.data.mul_(0.9)"],
            ["x.masked_fill_(x > 2, 0.0)"],
            ["x[x > 2] = 0.0"],
            ["x.index_fill_(0, torch.tensor([0]), 0.5)"],
            ["x = T.keep(lambda t: torch.mul(t, 0.5, out=t), x)"],
            ["x.data = x.data * 0.5"],
            ["x.data = x.data.clone()"],
            ["torch._foreach_mul_([x], 0.9)"],
            ["np.multiply(x.detach().numpy(), 0.5, out=x.detach().numpy())"],
            [
                f"h = {layer(c)}",
                "h = T.view(lambda t: t.transpose_(0, 1), h)",
                f"h = {nonlinearity(c, 'h')}",
                "x = T.view(lambda t: t.transpose(0, 1), h)",
            ],
            [
                f"h = {layer(c)}",
                f"p, q = T.view(lambda t: t.chunk(2, {dim}), h)",
                "T.sig('relu', lambda t: t.relu_(), p)",
                "T.note(h)",
                "x = T.vague(lambda a: a * 1.0, h)",
            ],
            [
                f"h = {layer(c)}",
                "h = T.vague(lambda t: t.resize_(t.shape), h)",
                "T.sig('tanh', lambda t: t.tanh_(), h)",
                "x = h",
                "h = None",
            ],
            [
                f"h = {layer(c)}",
                "p = T.view(lambda t: t.view_as(t), h)",
                "T.sig('relu', lambda t: t.relu_(), p)",
                "T.note(h)",
                "x = T.vague(lambda a: a * 1.0, h)",
            ],
        )
    )


def _block(c: ClassWriter) -> Code:
    name = c.program.pick(c.blocks)
    known = c.known.setdefault(name, [])
    if not known or c.program.chance(0.6):
        known.append(c.part(f"{name}()"))
    return [f"x = T.call({c.program.pick(known)}, x)"]


def _image(c: ClassWriter) -> Code:
    act = nonlinearity(c, "h")
    pool = c.program.pick(
        (
            "T.resize(lambda t: F.max_pool2d(t, 2), h)",
            "T.resize(lambda t: F.avg_pool2d(t, 2), h)",
            "T.resize(lambda t: F.adaptive_avg_pool2d(t, 1), h)",
            f"T.call({c.part('nn.MaxPool2d(2)')}, h)",
            "T.resize(lambda t: F.interpolate(t, scale_factor=2), h)",
            "T.resize(lambda t: F.pad(t, (1, 1, 1, 1)), h)",
        )
    )
    lines: Code = [f"h = {layer(c)}", f"h = {pool}", f"h = {act}"]
    if c.program.chance(0.3):
        flat = c.part("nn.Linear(6, 6)")
        lines += [
            f"h = T.call({flat}, T.lose(lambda t: t.mean((2, 3)), h))",
            f"h = {act}",
        ]
    return [*lines, "x = T.keep(lambda a, b: a + b.mean(), x, h)"]
