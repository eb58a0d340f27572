"""The front door: the `lamina` command, local runs, data sets, reports."""
