"""Parts of recipes, as YAML: `--config DATA_MODEL_METHOD` puts them together, see README.md."""
