"""From a cohort and a memory budget to a recipe: `python -m medjax.plan COHORT --budget=8GB`; see docs/plan.md."""
