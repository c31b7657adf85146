"""Pure, differentiable losses; each returns one value per example."""
