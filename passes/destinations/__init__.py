"""Destination rules: which token of each cell the others merge into. A rule is one file, registered here."""

from __future__ import annotations

from bigain_fx.passes.destinations.laplacian import Laplacian
from bigain_fx.passes.destinations.random import Random
from bigain_fx.passes.destinations.rows import Rows
from bigain_fx.passes.destinations.rule import RULES, Destinations, destination_rule, operator_of, parse, rule_of

for _rule in (Laplacian, Random, Rows):
    destination_rule(_rule)

__all__ = [
    "RULES", "Destinations", "Laplacian", "Random", "Rows", "destination_rule", "operator_of", "parse", "rule_of",
]  # fmt: skip
