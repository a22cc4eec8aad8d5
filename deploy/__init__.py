"""The command line, pipelines, reports and exports. This package may import all the others."""
