"""SAM code written for other packages, on these optimizers: change the import. docs/migration.md says what changes."""
