"""`svitt finetune`: train a pretrained model for the task of a recipe."""

from __future__ import annotations

import argparse

from svitt_ops.training.engine.recipes import load_recipe, recipe_text


def run(arguments: argparse.Namespace) -> int:
    """Train, or show the recipe; the exit status."""
    recipe = load_recipe(arguments.config, arguments.overrides)
    if arguments.show:
        print(recipe_text(recipe), end="")
        return 0
    if recipe.init.checkpoint is None:
        raise ValueError(
            "recipe: init.checkpoint must be the folder of a pretrained model, or a file, got null"
        )
    from svitt_ops.training.cli.pretrain import train

    return train(recipe)
