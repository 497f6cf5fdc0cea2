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
# # A training tour
#
# A small net learns to tell shapes apart, and one `capture` block stands around the loop. On the way: statistics of every
# layer, filters that die, and the first NaN of a training that goes wrong. Nothing is downloaded.

# %%
import copy

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from fmapkit import capture
from fmapkit.analysis import DeadFilters, Statistics
from fmapkit.integrations import FirstNonFinite

# %config InlineBackend.rc = {"figure.dpi": 60}
torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## Images and a net
#
# Four shapes, at random places, with noise: a square, a plus, a bar, and a ring.


# %%
def shapes(count):
    images, labels = 0.2 * torch.randn(count, 1, 16, 16), torch.randint(4, (count,))
    for image, label in zip(images, labels):
        y, x = torch.randint(1, 9, (2,)).tolist()
        patch = image[0, y : y + 6, x : x + 6]
        if label == 0:
            patch += 1
        elif label == 1:
            patch[2:4] += 1
            patch[:, 2:4] += 1
        elif label == 2:
            patch[2:4] += 1
        else:
            patch += 1
            patch[2:4, 2:4] -= 1
    return images, labels


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc = nn.Linear(32 * 4 * 4, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # functions: no module to hook
        x = F.relu_(self.conv2(x) + x)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        return self.fc(x.flatten(1))


images, labels = shapes(512)
fig, axes = plt.subplots(1, 4, figsize=(6, 1.6))
for axis, label in zip(axes, range(4)):
    axis.imshow(images[labels == label][0, 0], cmap="gray")
    axis.axis("off")
plt.show()


# %% [markdown]
# ## One block around the loop
#
# Analyses see each map of each pass, and with `keep=0` none is held. Weights and losses are the same bits as without the
# block: a twin that nobody watches is trained beside.


# %%
def train(model, epochs, lr, seed=1):
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(epochs):
        for some in torch.randperm(512, generator=generator).split(64):
            optimiser.zero_grad()
            loss = F.cross_entropy(model(images[some]), labels[some])
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    return losses


model = Net()
twin = copy.deepcopy(model)
stats, dead = Statistics(bins="log2"), DeadFilters(after=512)
with capture(model, analyses=[stats, dead], keep=0):
    losses = train(model, epochs=10, lr=0.05)

assert losses == train(twin, epochs=10, lr=0.05)
for mine, other in zip(model.parameters(), twin.parameters()):
    assert torch.equal(mine, other)
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

# %% [markdown]
# ## Statistics
#
# Each line is of a layer; `stats["conv2"]` goes by filter. z and a have lines of their own.

# %%
stats

# %%
stats["conv2", "preactivation"]

# %% [markdown]
# ## Dead filters
#
# A learning rate that is too high drives some filters to where no image makes them fire. They get no gradient there, and
# stay.

# %%
hot = Net()
dead = DeadFilters(after=512)
with capture(hot, kinds="activation", analyses=[dead], keep=0):
    train(hot, epochs=10, lr=0.2)
dead

# %%
dead.plot(title="which filters fired, from left to right")

# %% [markdown]
# `dead["conv3"]` says when each fired for the last time. As a page to share: `dead.to_html("dead.html")`.

# %%
dead["conv3"]

# %% [markdown]
# ## The first NaN
#
# A step that is far too long. `FirstNonFinite` keeps one number a map, so that it may stay for a whole training, and says
# where it began.

# %%
broken = Net()
first = FirstNonFinite()
with capture(broken, kinds=("input", "response", "activation"), analyses=[first], keep=0):
    train(broken, epochs=2, lr=1e8)
print(first)
for found in first.found[:4]:
    print(found)
