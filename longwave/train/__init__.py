"""A recipe is data; ``train`` is the loop that runs one, and goes on with one."""

from longwave.train.config import Recipe, load_recipe, recipe_names
from longwave.train.loop import train

__all__ = ["Recipe", "load_recipe", "recipe_names", "train"]
