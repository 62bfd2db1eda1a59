"""The built-in workload: training on handwritten digits, and a demo run that shows it."""
