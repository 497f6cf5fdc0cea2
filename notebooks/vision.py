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
# # A vision tour
#
# A small net learns to tell shapes apart, and we look at what its filters see: the maps of an image, the filters themselves,
# the nine images that excite each most, what a location sees, and what of an image a class hangs on. Nothing is downloaded.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from fmapkit import capture
from fmapkit.analysis import TopInputs
from fmapkit.explain import grad_cam, occlusion, plot_heat, receptive_field

# %config InlineBackend.rc = {"figure.dpi": 60}
torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## Images and a net
#
# Four shapes, at random places, with noise: a square, a plus, a bar, and a ring.


# %%
names = ["square", "plus", "bar", "ring"]


def shapes(count):
    images, labels = 0.2 * torch.randn(count, 1, 24, 24), torch.randint(4, (count,))
    for image, label in zip(images, labels):
        y, x = torch.randint(1, 15, (2,)).tolist()
        patch = image[0, y : y + 8, x : x + 8]
        if label == 0:
            patch += 1
        elif label == 1:
            patch[3:5] += 1
            patch[:, 3:5] += 1
        elif label == 2:
            patch[3:5] += 1
        else:
            patch += 1
            patch[2:6, 2:6] -= 1
    return images, labels


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 5, padding=2)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x))
        return self.fc(x.amax((2, 3)))  # is there such a shape, anywhere?


images, labels = shapes(512)
model = Net()
optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
for _ in range(12):
    for some in torch.randperm(512).split(64):
        optimiser.zero_grad()
        F.cross_entropy(model(images[some]), labels[some]).backward()
        optimiser.step()
model.eval()
tests, truth = shapes(256)
with torch.no_grad():
    print(f"{(model(tests).argmax(1) == truth).float().mean():.0%} right")

# %% [markdown]
# ## A gallery
#
# z and a of each layer, filter by filter, on one colour scale a map. `maps.to_html("maps.html", image=image)` writes the same
# as one file to point at and to send.

# %%
image = tests[truth == 3][:1]
with capture(model) as maps, torch.no_grad():
    model(image)
maps.plot("conv*", image=image[0])

# %% [markdown]
# ## Filters
#
# A map knows the weights that made it.

# %%
weights = maps["conv1"].weight
fig, axes = plt.subplots(1, 8, figsize=(8, 1.3))
for axis, weight in zip(axes, weights):
    axis.imshow(weight[0], cmap="RdBu_r", vmin=-weights.abs().max(), vmax=weights.abs().max())
    axis.axis("off")
plt.show()

# %% [markdown]
# ## What a location sees
#
# The receptive field is followed through the pass: what a location of `conv3` sees, in pixels of the image.

# %%
field = receptive_field(model, "conv3", image)
print(field.size, "pixels, every", field.stride, "pixels; location (2, 3) sees", field.box(2, 3))

# %% [markdown]
# ## Top-9
#
# The nine images that excite a filter most, cut to what the strongest location sees: the figure of Zeiler & Fergus (2014).

# %%
top = TopInputs(k=9)
with capture(model, "conv3", kinds="activation", analyses=top, keep=0), torch.no_grad():
    for batch in tests.split(64):
        model(batch)
top["conv3"].plot(tests, model=model, filters="strongest", max_filters=4)

# %% [markdown]
# ## What of the image did it
#
# Two ways to ask. *Occlusion* covers the image window by window, and measures how much the class's number drops: here, of the
# last layer's unit. *Grad-CAM* sums the maps of a layer, each by its mean gradient.

# %%
ring = names.index("ring")
drops = occlusion(model, image, "fc", filter=ring, window=4, stride=2, show_progress=False)
drops.plot(image[0])

# %%
cam = grad_cam(model, image, "conv3", ring)
plot_heat(cam[0], image[0], title="Grad-CAM of conv3 for the ring")
