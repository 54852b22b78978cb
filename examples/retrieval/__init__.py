"""Train, look at, search and export embeddings for retrieval: an application of pml_pnp.

In the order in which to read it:

1. `commands`: the front of `python examples/retrieval`. A command is a module with the same name,
   `train`, `report`, `search`, `export` and `compare`; a user's mistake is an `errors.UserError`.
2. `configuration`: what a run is made of, from flags (`arguments`, `by_name`), a file
   (`config_file`) or an earlier run.
3. `data`: data sets by name, from folders and zips (`image_tree`), the literature's split files
   (`benchmark_sets`) and images made ready (`prepare`).
4. `trunks`, then `network`: the model of a run and the transforms of its images.
5. `training`: PML's trainer and what happens when an epoch ends: `metrics` evaluates, `records`
   keeps the curves, `progress` says a line.
6. `run_folder`: the files of a run, its lock, and what makes a killed run continue; `image_list`
   checks that the images stay the same, `disk` writes whole files or none.
7. `report` with `report_parts`, `figures`, `ranking`, `sheet` and `thumbnails`; `embeddings` with
   `index` for search and export.

`processes` knows about torchrun, `screen` about what is said and logged, `seeding` about seeds.
"""
