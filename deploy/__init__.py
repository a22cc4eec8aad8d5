"""How it is launched and how it leaves: the command line, pipelines, exports. Imports trainer, models, data."""
