"""Models outside JAX: a torch module that loads the folders that surgery writes, and exports to other runtimes."""
