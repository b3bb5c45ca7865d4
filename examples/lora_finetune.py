"""A LoRA fine-tune as in mlx-lm, on a tiny random transformer, with an exact resume."""

import argparse
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from matplotlib.figure import Figure
from mlx.utils import tree_flatten, tree_unflatten

from mlx_adadelta import AdaDelta, clip_scale, match_layout, nonfinite

VOCABULARY, WIDTH, LENGTH, RANK = 32, 64, 16, 8


class LoRALinear(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        (outputs, inputs), self.base = base.weight.shape, base
        self.lora_a = mx.random.normal((inputs, RANK)) * inputs**-0.5
        self.lora_b = mx.zeros((RANK, outputs))

    def __call__(self, x: mx.array) -> mx.array:
        return self.base(x) + 2.0 * (x @ self.lora_a) @ self.lora_b


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.TransformerEncoder(2, WIDTH, num_heads=4, mlp_dims=128)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def __call__(self, x: mx.array) -> mx.array:
        mask = nn.MultiHeadAttention.create_additive_causal_mask(x.shape[1])
        return self.head(self.encoder(self.embedding(x), mask))


def make_model() -> Model:
    mx.random.seed(0)
    model = Model().freeze()
    linear = [x for x in model.named_modules() if isinstance(x[1], nn.Linear)]
    model.update_modules(tree_unflatten([(k, LoRALinear(x)) for k, x in linear]))
    return model.unfreeze(keys=["lora_a", "lora_b"])


def batch(step: int, size: int) -> mx.array:
    """Counting up by 1 to 4 from anywhere; a function of the step alone."""
    mx.random.seed(step)
    start, by = mx.random.randint(0, VOCABULARY, (2, size, 1))
    return (start + (1 + by % 4) * mx.arange(LENGTH + 1)) % VOCABULARY


def loss_fn(model: Model, x: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(x[:, :-1]), x[:, 1:], reduction="mean")


def train(steps: int, size: int, checkpoint: Path, resume: bool) -> list[float]:
    model, optimizer = make_model(), AdaDelta(1.0, weight_decay=1e-4)
    if resume:
        tree = tree_unflatten(list(mx.load(str(checkpoint)).items()))
        model.update(tree["adapters"])
        optimizer.state = tree["optimizer"]
    optimizer.init(model.trainable_parameters())
    loss_and_grad = nn.value_and_grad(model, loss_fn)
    # Adapters lie as their gradients do: every update is one linear pass.
    _, gradients = loss_and_grad(model, batch(0, size))
    model.update(match_layout(model.trainable_parameters(), gradients))
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x: mx.array) -> mx.array:
        loss, gradients = loss_and_grad(model, x)
        scale, norm = clip_scale(gradients, max_norm=1.0)
        skip = nonfinite(norm)
        optimizer.update(model, gradients, gradient_scale=scale, skip=skip)
        return loss

    losses = []
    for i in range(optimizer.step.item(), steps):
        losses.append(step(batch(i, size)).item())
        mx.eval(state)
    tree = {"adapters": model.trainable_parameters(), "optimizer": optimizer.state}
    mx.save_safetensors(str(checkpoint), dict(tree_flatten(tree)))
    return losses


if __name__ == "__main__":
    add = (parser := argparse.ArgumentParser(description=__doc__)).add_argument
    add("--steps", type=int, default=200, help="of the whole run")
    add("--batch-size", type=int, default=16)
    add("--checkpoint", type=Path, default=Path("lora.safetensors"))
    add("--resume", action="store_true", help="go on from the checkpoint")
    args = parser.parse_args()
    losses = train(args.steps, args.batch_size, args.checkpoint, args.resume)
    if losses:
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        figure.subplots().plot(losses)
        figure.savefig(args.checkpoint.with_suffix(".png"))
        print(
            f"loss {losses[0]:.4f} to {losses[-1]:.4f}, see {args.checkpoint} and .png"
        )
    else:
        print(f"all {args.steps} steps are done: raise --steps to go on")
