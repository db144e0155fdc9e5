"""State <-> files, in a format of slices that does not depend on how many processes wrote it.

`format` has the layout, `save` writes so that a crash leaves the old or the new checkpoint and
never neither, and deletes old ones, `load` finds the newest good one and returns verified tensors.
"""
