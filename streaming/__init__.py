"""The loop that merging and AIM share: tensors matched, read in blocks, changed, rounded once, written."""
