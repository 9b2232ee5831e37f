"""The methods: one file each, formula first. See `training.objective` for what the loop asks of them."""
