"""A variational autoencoder on scikit-learn's handwritten digits, and what it draws."""

import argparse
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from mlx_adadelta import AdaDelta

PIXELS, HIDDEN, LATENT = 64, 128, 8


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Linear(PIXELS, HIDDEN), nn.relu, nn.Linear(HIDDEN, 2 * LATENT)
        )
        self.decode = nn.Sequential(
            nn.Linear(LATENT, HIDDEN), nn.relu, nn.Linear(HIDDEN, PIXELS)
        )

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        mean, log_variance = mx.split(self.encode(x), 2, axis=1)
        z = mean + mx.exp(log_variance / 2) * mx.random.normal(mean.shape)
        return self.decode(z), mean, log_variance


def loss_fn(model: VAE, x: mx.array) -> mx.array:
    """The negative evidence lower bound, a mean over the batch."""
    logits, mean, log_variance = model(x)
    likelihood = nn.losses.binary_cross_entropy(logits, x, reduction="none").sum(1)
    divergence = (mean**2 + mx.exp(log_variance) - 1 - log_variance).sum(1) / 2
    return (likelihood + divergence).mean()


def train(epochs: int, size: int) -> tuple[VAE, np.ndarray, list[float]]:
    images = (load_digits().data / 16).astype(np.float32)
    mx.random.seed(0)
    shuffle = np.random.default_rng(0)
    model, optimizer = VAE(), AdaDelta(learning_rate=1.0, rho=0.95)
    optimizer.init(model.trainable_parameters())
    loss_and_grad = nn.value_and_grad(model, loss_fn)
    # The noise is drawn within the step: its generator is state, too.
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x: mx.array) -> mx.array:
        loss, gradients = loss_and_grad(model, x)
        optimizer.update(model, gradients)
        return loss

    losses = []
    for _ in range(epochs):
        order = shuffle.permutation(len(images))
        for start in range(0, len(order) - size + 1, size):
            loss = step(mx.array(images[order[start : start + size]]))
            mx.eval(loss, state)
            losses.append(loss.item())
    return model, images, losses


def draw(model: VAE, images: np.ndarray, losses: list[float], path: Path) -> None:
    x = mx.array(images[:10])
    mean, _ = mx.split(model.encode(x), 2, axis=1)
    rows = {
        "digits": x,
        "through the code": mx.sigmoid(model.decode(mean)),
        "drawn at random": mx.sigmoid(model.decode(mx.random.normal((10, LATENT)))),
    }
    figure = Figure(figsize=(10, 3), dpi=120, layout="constrained")
    axes = figure.subplots(1, 1 + len(rows))
    axes[0].plot(losses, lw=0.5)
    axes[0].set(xlabel="step", ylabel="negative ELBO")
    for panel, (title, row) in zip(axes[1:], rows.items(), strict=True):
        grid = np.array(row).reshape(2, 5, 8, 8).transpose(0, 2, 1, 3).reshape(16, 40)
        panel.imshow(grid, cmap="gray_r", vmin=0, vmax=1)
        panel.set(title=title)
        panel.axis("off")
    figure.savefig(path)


if __name__ == "__main__":
    add = (parser := argparse.ArgumentParser(description=__doc__)).add_argument
    add("--epochs", type=int, default=30)
    add("--batch-size", type=int, default=64)
    add("--plot", type=Path, default=Path("vae.png"))
    args = parser.parse_args()
    model, images, losses = train(args.epochs, args.batch_size)
    draw(model, images, losses, args.plot)
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}, see {args.plot}")
