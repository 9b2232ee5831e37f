"""One file a method; each answers the training loop's few questions (see base.Objective)."""
