"""clipfast inside other libraries: one module per library, which that module imports and the core never does."""
