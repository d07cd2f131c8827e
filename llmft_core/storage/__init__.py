"""Storage: where things lie (`places`), how they move (`transfer`, which stands on the `engine`), what becomes of a
store's errors (`faults`)."""
