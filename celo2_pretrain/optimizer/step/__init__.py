"""One step of each rule on what a rank holds."""
