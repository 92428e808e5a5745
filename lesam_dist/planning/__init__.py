"""The cost model behind `lesam-dist plan`: what a run would take elsewhere. See docs/planning.md."""
