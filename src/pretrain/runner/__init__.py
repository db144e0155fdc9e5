"""A request -> a running loop, and MODEL -> a loaded model: what is above `train` and below `cli`.

`start` starts, resumes and extends runs: from a target and settings (`request`), on prepared text
(`text`), in one process or several (`launch`). `checks` has the run as it was, lists what a resume
checks, and adds steps to a finished one. `open` loads a model for use.
"""
