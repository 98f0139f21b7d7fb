"""The only file that imports a private JAX name. Each says which JAX versions need it, and why."""
