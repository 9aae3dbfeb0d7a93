"""Recipes: which scheme for which tensors, in a file; and back, from what a result says about itself.

Nothing here imports torch before it must: :func:`load` of a TOML file never does.
"""

from aoconvert.recipes.base import Choice, Recipe, RecipeRule, Section, rules
from aoconvert.recipes.files import load
from aoconvert.recipes.fqn import fqn_to_config
from aoconvert.recipes.recorded import (
    from_config,
    from_manifest,
    from_quantization_config,
    patterns,
    rule_schemes,
    scheme_of_config,
)

__all__ = [
    "Choice",
    "Recipe",
    "RecipeRule",
    "Section",
    "fqn_to_config",
    "from_config",
    "from_manifest",
    "from_quantization_config",
    "load",
    "patterns",
    "rule_schemes",
    "rules",
    "scheme_of_config",
]
