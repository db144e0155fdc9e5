"""The report of a run as one offline HTML page, and experiment trackers.

    run directory --read_run_files--> RunFiles --page, templates--> report.html
    metrics.jsonl --trackers (in their own process)--> TensorBoard | W&B offline

`run` reads the files and tolerates missing ones; `page` computes the values of the templates,
`chart` places lines, `html` fills in templates, `units` formats numbers. It does not need torch.
"""
