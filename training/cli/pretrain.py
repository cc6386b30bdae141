"""`svitt pretrain`: train what a recipe describes."""

from __future__ import annotations

import argparse

from svitt_ops.training.engine.recipes import Recipe, load_recipe, recipe_text


def run(arguments: argparse.Namespace) -> int:
    """Train, or show the recipe; the exit status."""
    recipe = load_recipe(arguments.config, arguments.overrides)
    if arguments.show:
        print(recipe_text(recipe), end="")
        return 0
    return train(recipe)


def train(recipe: Recipe) -> int:
    """Train what a recipe describes, and say where it is; the exit status."""
    from svitt_ops.training.engine.run import pretrain  # the recipe is refused before it is loaded

    trained = pretrain(recipe)
    print(f"{trained.skipped.summary()}\nmodel: {trained.folder}")
    if trained.best is not None:
        print(f"best:  {trained.best}")
    return 0
