"""Training one SAE whose latents are sharded over processes. Only `rank` and `group` use Ray."""
