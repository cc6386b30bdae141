"""Data, recipes, engine, evaluation and figures: what `svitt pretrain` and `svitt demo` run."""
