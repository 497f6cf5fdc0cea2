# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A language-model tour
#
# A small transformer learns facts such as *Ada likes red*, and we look for where it keeps them: the residual stream,
# attention, patching, probes, steering. The model is trained here, in seconds. Nothing is downloaded.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from fmapkit import capture, edits, feature_map, patch
from fmapkit.phi import probe

# %config InlineBackend.rc = {"figure.dpi": 60}
torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## A language of facts
#
# A text is some filler, a name, a verb, and what the fact says: `well so Ada likes red`. There are eight names and three
# verbs; which answer belongs to which pair was drawn at random.

# %%
names = ["Ada", "Bob", "Cem", "Dag", "Eva", "Fay", "Gus", "Hal"]
verbs = {
    "likes": ["red", "blue", "green", "pink"],
    "feeds": ["cat", "dog", "hen", "cow"],
    "visits": ["Rome", "Oslo", "Bonn", "Lima"],
}
filler = ["well", "so", "then", "now", "oh", "hm"]
words = [*filler, *names, *verbs, *(w for answers in verbs.values() for w in answers)]
number = {word: i for i, word in enumerate(words)}
answer = {(n, v): verbs[v][torch.randint(4, ()).item()] for n in names for v in verbs}
pairs = list(answer)


def texts(count):
    """Tokens (count, 4), the numbers of the answers, and of the names."""
    which = torch.randint(len(pairs), (count,)).tolist()
    some = torch.randint(len(filler), (count, 2))
    facts = torch.tensor([[number[n], number[v]] for n, v in (pairs[i] for i in which)])
    said = torch.tensor([number[answer[pairs[i]]] for i in which])
    who = torch.tensor([names.index(pairs[i][0]) for i in which])
    return torch.cat([some, facts], 1), said, who


# %% [markdown]
# ## A transformer


# %%
class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Language(nn.Module):
    def __init__(self, width=48, layers=3, heads=4, length=4):
        super().__init__()
        self.words, self.places = nn.Embedding(len(words), width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(words))

    def forward(self, tokens):
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


model = Language()
optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(250):
    tokens, said, _ = texts(128)
    loss = F.cross_entropy(model(tokens)[:, -1], said)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
model.eval().requires_grad_(False)
tokens, said, who = texts(512)
print(f"{(model(tokens)[:, -1].argmax(-1) == said).float().mean():.0%} of the facts are known")

# %% [markdown]
# ## The residual stream
#
# What a block returns is the stream after it: the map of kind `"output"`. Read by the model's own head, it says what the
# model would answer after each block.

# %%
blocks = ["blocks.0", "blocks.1", "blocks.2"]
with capture(model, blocks) as maps:
    model(tokens)
maps

# %%
for layer in blocks:
    guess = model.head(model.norm(maps[layer].tensor[:, -1])).softmax(-1)
    print(layer, f"{guess.gather(1, said[:, None]).mean():.2f}")

# %% [markdown]
# ## Attention
#
# `kinds="attention"` holds the probabilities, by head, also where attention runs fused. The last position is the verb; the
# name is before it.

# %%
prompt = ["well", "so", "Ada", "likes"]
one = torch.tensor([[number[w] for w in prompt]])
with capture(model, kinds="attention") as maps:
    model(one)
fig, axes = plt.subplots(len(maps), 4, figsize=(7, 1.9 * len(maps)))
for row, fm in zip(axes, maps):
    for head, axis in enumerate(row):
        axis.imshow(fm.tensor[0, head], vmin=0, vmax=1, cmap="magma")
        axis.set_title(f"{fm.layer} head {head}", fontsize=7)
        axis.set_xticks(range(4), prompt, fontsize=6)
        axis.set_yticks(range(4), prompt, fontsize=6)
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Patching
#
# Two runs that differ in the name. Which places of the stream, put from one into the other, bring the answer back? Those
# are where the model keeps the name, and then the answer: it moves from the name's position to the last one.

# %%
other = next(n for n in names if answer[n, "likes"] != answer["Ada", "likes"])
corrupted = one.clone()
corrupted[0, 2] = number[other]
right, wrong = number[answer["Ada", "likes"]], number[answer[other, "likes"]]
found = patch(
    model,
    one,
    corrupted,
    lambda logits: logits[0, -1, right] - logits[0, -1, wrong],
    layers=blocks,
    positions="each",
    filter_axis=-1,
    progress=False,
)
print(found)
found.plot(positions=["well", "so", f"Ada/{other}", "likes"])

# %% [markdown]
# ## Probes
#
# What can a linear model read at the last position? The name is nowhere in that token: attention has to bring it there.

# %%
phi = feature_map(model, ["words", *blocks], kind="output", pool=lambda stream: stream[:, -1])
read = probe(phi, tokens, who, cv=3)
read

# %%
read.plot(title="which name? read at the last position")

# %% [markdown]
# ## Steering
#
# The stream after the first block has a direction that means "visits rather than likes". Added while the model runs, it
# changes the question, for every name: the answer is the town, and not the colour.

# %%
verb = torch.tensor([words.index("likes"), words.index("visits")])
with capture(model, "blocks.0") as maps:
    model(tokens)
stream = maps["blocks.0"].tensor[:, -1]
likes, visits = (stream[tokens[:, -1] == v].mean(0) for v in verb)
direction = visits - likes

prompts = tokens[tokens[:, -1] == verb[0]]
towns = torch.tensor([number[answer[words[n], "visits"]] for n in prompts[:, 2].tolist()])
last = edits.Where("blocks.0", "output", at=-1, filter_axis=-1)
for strength in (0.0, 0.5, 1.0):
    with capture(model, "blocks.0", edit={last: edits.add(strength * direction)}):
        said_town = model(prompts)[:, -1].argmax(-1) == towns
    print(f"strength {strength}: {said_town.float().mean():.0%} answer with the town")

# %% [markdown]
# The block ends, and the model is as it was: `edits` never touch a weight.

# %%
assert torch.equal(model(prompts)[:, -1].argmax(-1), said[tokens[:, -1] == verb[0]])
