"""Complete run configurations; `--config NAME` finds `NAME.yaml` in this folder."""
