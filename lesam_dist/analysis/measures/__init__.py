"""The analyses as functions of an `Objective`, one file each: what it is, who says so, what it costs."""
