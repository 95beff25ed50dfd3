"""The files that exporters and builders write, and that builders and validation read.

record            JSON into frozen records, strictly, and back
manifest          the step that made a folder, its inputs and its results
smoothing_file    smoothing scales and ranges of every linear
ports             names of a decoder's inputs and outputs
safetensors_files, shards   weights, written in place
"""
