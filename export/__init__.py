"""Models outside JAX: a torch module that reads what surgery writes, and what is made from it for other runtimes."""
