"""Fine-tunes a language model: mlx_lm.lora's arguments and YAML, this optimizer.

python -m mlx_adadelta.mlx_lm --model MODEL --train --data FOLDER
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import lora
from mlx_lm.tuner import trainer, utils

from .optimizer import AdaDelta

NAME = "adadelta"
train_with_stock = lora.train_model


class OptimizerName(str):
    """mlx-lm saves the name and makes an optimizer of its lower case: an unused SGD."""

    def lower(self) -> str:
        return "sgd"


def make_optimizer(args: Any) -> AdaDelta:
    if args.optimizer != NAME:
        raise ValueError(
            f"optimizer must be {NAME} but is {args.optimizer}; use mlx_lm.lora"
        )
    options = dict(args.optimizer_config.get(NAME) or {})
    if isinstance(dtype := options.get("state_dtype"), str):
        options["state_dtype"] = getattr(mx, dtype, dtype)
    schedule = args.lr_schedule and utils.build_schedule(args.lr_schedule)
    return AdaDelta(schedule or args.learning_rate, **options)


def state_file(adapters: Path) -> Path:
    """Where the optimizer's state of such a file of adapters is."""
    return adapters.with_suffix(".optimizer.safetensors")


def train_model(args: Any, *others: Any) -> None:
    """Takes the place of mlx_lm.lora's function of this name."""
    optimizer = make_optimizer(args)
    args.optimizer = OptimizerName(NAME)
    if args.resume_adapter_file is not None:
        path = state_file(Path(args.resume_adapter_file))
        if path.exists():
            state: Any = mx.load(str(path))
            optimizer.state = tree_unflatten(list(state.items()))
            if not args.lr_schedule:
                optimizer.learning_rate = args.learning_rate
        else:
            print(f"There is no {path}: the optimizer begins anew")

    def save(done: int) -> None:
        """The state beside the adapters that mlx-lm saves after so many batches."""
        names = ["adapters"]
        if done % args.save_every == 0:
            names.append(f"{done:07d}_adapters")
        if mx.distributed.init().rank() == 0:
            for name in names:
                path = state_file(Path(args.adapter_path, f"{name}.safetensors"))
                mx.save_safetensors(str(path), dict(tree_flatten(optimizer.state)))

    def batches(*data: Any, loop: bool = False, **named: Any) -> Iterator[Any]:
        """Saves: mlx-lm asks for a batch when the one before is done and saved."""
        found = trainer.iterate_batches(*data, loop=loop, **named)
        for done, batch in enumerate(found):
            if loop and done and done % args.save_every == 0:  # not in validation
                save(done)
            yield batch

    def train(**arguments: Any) -> None:
        arguments |= {"optimizer": optimizer, "iterate_batches": batches}
        trainer.train(**arguments)
        save(args.iters)

    lora.train = train
    train_with_stock(args, *others)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_adadelta.mlx_lm",
        parents=[lora.build_parser()],
        conflict_handler="resolve",
    )
    parser.add_argument("--optimizer", choices=[NAME], help="AdaDelta only.")
    rate = "Learning rate. Default: 1.0, as AdaDelta needs; Adam's do nothing here."
    parser.add_argument("--learning-rate", type=float, help=rate)
    lora.build_parser = lambda: parser
    lora.CONFIG_DEFAULTS.update(
        optimizer=NAME, optimizer_config={NAME: {}}, learning_rate=1.0
    )
    lora.train_model = train_model
    lora.main()


if __name__ == "__main__":
    main()
